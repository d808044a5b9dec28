"""
Two hundred clients, a fifth of whose answers fail: fifty rounds, every byte and failure counted.

The transport is wrapped: a drawn answer is lost, cut, flipped in one bit, replayed from an earlier
question, or holds NaN. The run must finish, the ledger must hold exactly the bytes that crossed and
the failures that were made, and memory must not grow with the rounds.

    python benchmarks/faults.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedllm import experiment as ex
from fedllm import federation, ledger
from fedllm.exchange import decode, encode
from fedllm.federation import Silent
from fedllm.message import Failure
from fedllm.transport import Transport

KINDS = ("lost", "cut", "flipped", "replayed", "NaN")


class Faulty:
    """A transport some of whose answers go wrong; counts what crossed it."""

    def __init__(self, inside: Transport, share: float, seed: int = 0) -> None:
        """share: of the answers."""
        self.inside, self.share = inside, share
        self.window = inside.window
        self.rng = np.random.default_rng(seed)
        self.made: Counter[str] = Counter()
        self.crossed = 0
        self._before: dict[str, bytes] = {}
        self._whose: dict[str, str] = {}

    def clients(self) -> Sequence[str]:
        """All of them."""
        return self.inside.clients()

    def post(self, client: str, frame: bytes) -> str:
        """Send a frame."""
        self.crossed += len(frame)
        id = self.inside.post(client, frame)
        self._whose[id] = client
        return id

    def collect(self, timeout: float | None = None) -> Iterator[tuple[str, bytes | Failure]]:
        """Answers, some of them broken."""
        for id, answer in self.inside.collect(timeout):
            client = self._whose.pop(id)
            assert isinstance(answer, bytes)
            broken = answer
            if self.rng.random() < self.share:
                broken = self._break(client, answer)
            self._before[client] = answer
            if isinstance(broken, bytes):
                self.crossed += len(broken)
            yield id, broken

    def _break(self, client: str, answer: bytes) -> Any:
        kind = str(self.rng.choice(KINDS))
        message, _, _ = decode(answer, {})
        if kind == "replayed" and client not in self._before:
            kind = "cut"
        if kind == "NaN" and not message.tensors:
            kind = "flipped"
        self.made[kind] += 1
        if kind == "lost":
            return Failure(client, "", "lost")
        if kind == "cut":
            return answer[: len(answer) // 2]
        if kind == "flipped":
            data = bytearray(answer)
            data[int(self.rng.integers(len(data)))] ^= 1
            return bytes(data)
        if kind == "replayed":
            return self._before[client]
        tensors = {
            name: torch.full_like(t, float("nan")) if t.is_floating_point() else t
            for name, t in message.tensors.items()
        }
        return encode(replace(message, tensors=tensors), {})[0]


def resident() -> int:
    """Resident bytes of this process now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


class Sampled(Silent):
    """Notes memory and failures as rounds go by."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.failures = 0

    def round(self, entry: Any) -> None:
        """A round is committed."""
        self.memory.append(resident())

    def note(self, text: str) -> None:
        """A failure is told."""
        self.failures += text.startswith("round ")


def run(clients: int, rounds: int, share: float) -> dict[str, Any]:
    """The run, and what must hold of it. Raises AssertionError where it does not."""
    spec = ex.parse(
        {
            "rounds": rounds, "model": {"threads": 1}, "data": {"label": "intent"},
            "training": {"batch_size": 4, "rate": 0.003}, "public": {"size": 20},
            "evaluation": {"every": 0, "batch_size": 4}, "tunables": {"rank": 2},
            "exchange": {"clients_per_round": clients, "minimum_replies": clients // 2},
            "simulation": {"clients": clients, "examples": 4, "test_examples": clients},
        },
        "faults", Path.cwd(),
    )  # fmt: skip
    listener = Sampled()
    transports: list[Faulty] = []
    real = federation.assemble

    def assemble(*arguments: Any) -> Any:
        built = real(*arguments)
        built.exchange.transport = Faulty(built.exchange.transport, share)
        transports.append(built.exchange.transport)
        return built

    federation.assemble = assemble  # type: ignore[assignment]
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as name:
            summary = federation.run(spec, 0, Path(name) / "run", listener=listener)
            rows = ledger.read(Path(name) / "run" / "ledger.jsonl")
    finally:
        federation.assemble = real
    (faulty,) = transports
    made = sum(faulty.made.values())
    assert sum(row.wire_bytes for row in rows) == faulty.crossed
    assert sum(row.failures for row in rows) == made == listener.failures
    assert [entry["round"] for entry in summary["history"]] == list(range(1, rounds + 1))
    settled = listener.memory[rounds // 5]
    return {
        "clients": clients, "rounds": rounds, "seconds": time.perf_counter() - start,
        "faults": dict(faulty.made), "bytes": faulty.crossed,
        "memory after a fifth": settled, "memory at the end": listener.memory[-1],
        "growth": listener.memory[-1] / settled, "metrics": summary["metrics"]["accuracy"],
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--share", type=float, default=0.2)
    found = parser.parse_args()
    print(json.dumps(run(found.clients, found.rounds, found.share), indent=1))
