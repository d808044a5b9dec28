"""
Memory and start-up with ten clients and with ten thousand, of whom ten train in each round.

Each number runs in a process of its own; every client is evaluated at the end, and the optimizers'
states are kept. The data are a thousand times more, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NUMBERS = (10, 10_000)
ROWS = 2  # a client


def run(clients: int) -> dict[str, float]:
    """Two rounds; returns peak resident bytes, seconds to the first round, and in all."""
    from fedllm import experiment as ex
    from fedllm import federation
    from fedllm.data import builtin

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = builtin.rows("train")
        (folder / "train.jsonl").write_text(
            "".join(json.dumps(rows[i % len(rows)]) + "\n" for i in range(clients * ROWS + 20))
        )
        (folder / "test.jsonl").write_text(
            "".join(json.dumps(rows[i % len(rows)]) + "\n" for i in range(clients))
        )
        spec = ex.parse(
            {
                "rounds": 2, "model": {"threads": 1}, "data": {"label": "intent"},
                "training": {"batch_size": ROWS, "optimizer_state": "keep"},
                "evaluation": {"every": 0, "batch_size": 1},
                "exchange": {"clients_per_round": 10}, "public": {"size": 20},
                "simulation": {
                    "source": "train.jsonl", "test": "test.jsonl", "clients": clients,
                    "examples": ROWS, "cohort": 10,
                },
            },
            "many_clients", folder,
        )  # fmt: skip
        prepared = federation.prepare(spec, 0)
        ready = time.perf_counter() - start
        federation.run(spec, 0, folder / "run", prepared=prepared)
    return {"peak": _peak(), "ready": ready, "seconds": time.perf_counter() - start}


def _peak() -> int:
    """Most resident bytes of this process (rusage would inherit its parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not say how much memory a process had")


def measure() -> dict[int, dict[str, Any]]:
    """Both numbers."""
    found: dict[int, dict[str, Any]] = {}
    for clients in NUMBERS:
        command = [sys.executable, __file__, str(clients)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[clients] = json.loads(out)
    return found


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(run(int(sys.argv[1]))))
    else:
        print(json.dumps(measure(), indent=1))
