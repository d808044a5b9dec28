"""Committed rounds on disk: written aside, checked by hash, renamed into place; two stay."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fedllm import states
from fedllm.errors import FedllmError
from fedllm.strategies.base import ServerState

KEEP = 2


@dataclass(frozen=True)
class Committed:
    """Everything needed to go on after ``round``; ``clients``: names of their ``States``."""

    round: int = 0
    server: ServerState = field(default_factory=ServerState)
    clients: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def _flat(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        json.dumps([group, name]): tensor.contiguous()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def _unflat(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, name = json.loads(key)
        groups.setdefault(group, {})[name] = tensor
    return groups


def states_in(folder: Path) -> Path:
    """Where the clients' states lie that the checkpoints in ``folder`` list."""
    return folder / "clients"


def save(folder: Path, committed: Committed) -> None:
    """Write ``folder/round-N``, atomically; older ones than the last two go."""
    target = folder / f"round-{committed.round:05d}"
    aside = folder / f".{target.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    state = committed.server
    server = {"shared": state.shared, "optimizer": state.optimizer, "public": state.public}
    server |= {f"client:{name}": group for name, group in state.clients.items()}
    data = safetensors.torch.save(_flat(server))
    _write(aside / "server.safetensors", data)
    facts = {
        "round": committed.round, "facts": state.facts,
        "history": committed.history, "clients": committed.clients,
        "hash": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    _write(aside / "state.json", json.dumps(facts).encode())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    rounds = _rounds(folder)
    for old in rounds[:-KEEP]:
        shutil.rmtree(old)
    kept = set(committed.clients.values())
    for other in rounds[-KEEP:-1]:
        kept |= set(json.loads((other / "state.json").read_text())["clients"].values())
    states.sweep(states_in(folder), kept)


def _rounds(folder: Path) -> list[Path]:
    """Committed rounds, the newest last."""
    return sorted(folder.glob("round-*"), key=lambda path: int(path.name.partition("-")[2]))


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load(
    folder: Path, states_here: bool = True, tell: Callable[[str], None] = lambda _: None
) -> Committed | None:
    """
    The newest committed round that is whole, or None if none was committed.

    states_here: the clients' states lie beside it, and are checked; those of sites do not.
    tell: hears of a damaged one and of the round gone back to. Raises FedllmError when all are
    damaged.
    """
    wrong = ""
    for path in reversed(_rounds(folder)):
        try:
            found = _load(path, folder, states_here)
        except FedllmError as error:
            wrong = wrong or str(error)
            continue
        if wrong:
            tell(f"{wrong}: going on from {path.name}")
        return found
    if wrong:
        raise FedllmError(f"{wrong}; none before it is whole: take another --out to start again")
    return None


def _load(path: Path, folder: Path, states_here: bool) -> Committed:
    try:
        facts = json.loads((path / "state.json").read_text())
        data = (path / "server.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != facts["hash"]:
            raise FedllmError(f"{path / 'server.safetensors'}: damaged checkpoint (hash differs)")
        server = _unflat(safetensors.torch.load(data))
        clients = dict(facts["clients"])
        if states_here:
            states.verify(states_in(folder), clients.values())
        state = ServerState(
            server.get("shared", {}), server.get("optimizer", {}),
            {k.removeprefix("client:"): v for k, v in server.items() if k.startswith("client:")},
            facts["facts"], server.get("public", {}),
        )  # fmt: skip
        return Committed(int(facts["round"]), state, clients, facts["history"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise FedllmError(f"{path}: damaged checkpoint ({type(error).__name__}: {error})") from None
