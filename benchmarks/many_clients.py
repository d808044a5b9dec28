"""
Memory and start-up with ten clients and with ten thousand, of whom ten train in each round.

Each number runs in a process of its own; every client is evaluated at the end, and the optimizers'
states are kept. The data are a thousand times more, too.
"""

from __future__ import annotations

import json
import resource
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "ready": ready, "seconds": time.perf_counter() - start}


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
