"""
A site in a process of its own, as an engine would start it: python site_process.py FOLDER.

``faults.json`` in its folder makes it misbehave, once in each of the rounds that it names, at the
first answer to what is trained there::

    {"rounds": {"2": "flipped"}, "seconds": 3.0, "hello": {"base": "beef"}, "patience": 20.0}

seconds: how long a slow answer takes.  hello: what it says of itself instead of the truth.  Every
fault leaves a line with its time in ``done.jsonl``.
"""

import json
import logging
import os
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedllm import across
from fedllm import experiment as ex
from fedllm.errors import FedllmError
from fedllm.exchange import decode, encode
from fedllm.message import Message, of_role, unpack
from fedllm.transport.session import Keys, attend

UNTRAINED = ("evaluate", "save")
LARGE = 4 * 2**20  # bytes that an oversized answer has too many


def flipped(frame: bytes) -> bytes:
    """One bit of the middle differs."""
    middle = len(frame) // 2
    return frame[:middle] + bytes([frame[middle] ^ 1]) + frame[middle + 1 :]


def truncated(frame: bytes) -> bytes:
    return frame[: len(frame) // 2]


def version(frame: bytes) -> bytes:
    """Whole and intact, of a version that does not exist yet."""
    rest = frame[8:].replace(b'"version":3', b'"version":9', 1)
    return frame[:4] + struct.pack("<I", zlib.crc32(rest)) + rest


def oversized(frame: bytes) -> bytes:
    return frame + bytes(LARGE)


def otherwise(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[bytes], bytes]:
    """A whole frame with other tensors in it."""

    def changed(frame: bytes) -> bytes:
        message, _, _ = decode(frame, {})
        tensors = change(dict(message.tensors))
        roles = of_role(next(iter(message.roles.values())), tensors)
        return encode(replace(message, tensors=tensors, roles=roles), {})[0]

    return changed


def not_a_number(tensors: dict[str, Any]) -> dict[str, Any]:
    name = min(tensors)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = float("nan")
    return tensors


def shapes(tensors: dict[str, Any]) -> dict[str, Any]:
    name = min(tensors)
    return tensors | {name: tensors[name].reshape(1, -1)}


def names(tensors: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.other": tensor for name, tensor in tensors.items()}


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flipped, "truncated": truncated, "version": version, "oversized": oversized,
    "NaN": otherwise(not_a_number), "shapes": otherwise(shapes), "names": otherwise(names),
}  # fmt: skip


class Faulty:
    """Answers as a site does, but for the rounds of its plan."""

    def __init__(
        self, answer: Callable[[bytes], bytes], folder: Path, plan: dict[str, Any]
    ) -> None:
        self._answer, self._plan = answer, plan
        self._done, self._before = folder / "done.jsonl", b""

    def __call__(self, frame: bytes) -> bytes:
        asked, _ = unpack(frame)
        answer = self._answer(frame)
        if asked.task in UNTRAINED:
            return answer
        fault = self._due(asked)
        before, self._before = self._before, answer
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "slow":
            time.sleep(self._plan["seconds"])
        if fault == "replayed":
            return before
        return BROKEN[fault](answer) if fault in BROKEN else answer

    def _due(self, asked: Message) -> str:
        """What goes wrong now; on disk before it does, since the process may not outlive it."""
        fault = str(self._plan.get("rounds", {}).get(str(asked.round), ""))
        done = [json.loads(line) for line in self._done.open()] if self._done.exists() else []
        if not fault or any(one["round"] == asked.round for one in done):
            return ""
        self.note(asked.round, fault)
        return fault

    def note(self, number: int, fault: str) -> None:
        line = {"round": number, "fault": fault, "time": time.time()}
        with self._done.open("a") as file:
            file.write(json.dumps(line) + "\n")


def attend_badly(folder: Path, plan: dict[str, Any]) -> Callable[..., None]:
    """``attend`` with the plan between the site and its session."""

    def badly(
        address: str, name: str, token: str, keys: Keys | None, answer: Callable[[bytes], bytes],
        facts: dict[str, Any], *more: Any, sent: Callable[[bytes], None], **named: Any,
    ) -> None:  # fmt: skip
        def written(frame: bytes) -> None:
            with suppress(FedllmError):  # the audit reads what leaves, and this may be unreadable
                sent(frame)

        faulty = Faulty(answer, folder, plan)
        faulty.note(0, "dials")
        facts = {**facts, **plan.get("hello", {})}
        attend(address, name, token, keys, faulty, facts, *more, sent=written, **named)

    return badly


def main(folder: Path) -> None:
    """Take part in the run of ``order.json``, with the keys of the folder."""
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(created).3f %(name)s: %(message)s"
    )
    order = json.loads((folder / "order.json").read_text())
    pems = [(folder / f"{part}.pem").read_bytes() for part in ("ca", "certificate", "key")]
    plan: dict[str, Any] = {}
    if (folder / "faults.json").exists():
        plan = json.loads((folder / "faults.json").read_text())
        across.attend = attend_badly(folder, plan)
    site = ex.load_site(folder / "site.toml")
    across.take_part(order, site, folder, Keys(*pems), plan.get("patience", 20.0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
