"""Committed rounds on disk: written aside, checked by hash, renamed into place; two stay."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fedllm.errors import FedllmError
from fedllm.strategies.base import ServerState

KEEP = 2


@dataclass(frozen=True)
class Committed:
    """Everything needed to go on after ``round``."""

    round: int = 0
    server: ServerState = field(default_factory=ServerState)
    clients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
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


def save(folder: Path, committed: Committed) -> None:
    """Write ``folder/round-N``, atomically; older ones than the last two go."""
    target = folder / f"round-{committed.round:05d}"
    aside = folder / f".{target.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    server = {"shared": committed.server.shared, "optimizer": committed.server.optimizer}
    server |= {f"client:{name}": group for name, group in committed.server.clients.items()}
    hashes = {}
    for name, groups in (("server", server), ("clients", committed.clients)):
        data = safetensors.torch.save(_flat(groups))
        hashes[name] = hashlib.sha256(data).hexdigest()
        _write(aside / f"{name}.safetensors", data)
    facts = {
        "round": committed.round, "facts": committed.server.facts,
        "history": committed.history, "hashes": hashes,
    }  # fmt: skip
    _write(aside / "state.json", json.dumps(facts).encode())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    for old in sorted(folder.glob("round-*"))[:-KEEP]:
        shutil.rmtree(old)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path) -> Committed | None:
    """
    The newest committed round, or None if there is none.

    Raises FedllmError when it is damaged, naming the file and the round to fall back to.
    """
    found = sorted(folder.glob("round-*"))
    if not found:
        return None
    newest = found[-1]
    other = f"remove {newest} to go on from {found[-2].name}" if found[:-1] else (
        f"remove {newest} to start again"
    )  # fmt: skip
    try:
        facts = json.loads((newest / "state.json").read_text())
        groups = {}
        for name in ("server", "clients"):
            data = (newest / f"{name}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != facts["hashes"][name]:
                raise FedllmError(
                    f"{newest / name}.safetensors: damaged checkpoint (hash differs); {other}"
                )
            groups[name] = _unflat(safetensors.torch.load(data))
        server = groups["server"]
        state = ServerState(
            server.get("shared", {}), server.get("optimizer", {}),
            {k.removeprefix("client:"): v for k, v in server.items() if k.startswith("client:")},
            facts["facts"],
        )  # fmt: skip
        return Committed(int(facts["round"]), state, groups["clients"], facts["history"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise FedllmError(
            f"{newest}: damaged checkpoint ({type(error).__name__}: {error}); {other}"
        ) from None
