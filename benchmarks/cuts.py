"""
A mixed fleet under the clock of ``[plan]``: cuts by machine beside one cut for all.

The machines and links are those of experiments/unequal/cuts.toml (three profiles, two links).
Predicted: what the plan and the run itself foresee. Simulated: the same machines' seconds for the
bytes, frames and FLOPs that a run really had, round by round: everybody's own and, when the slowest
is done, the server's for all. Evaluation is no part of it.

    python benchmarks/cuts.py --out benchmarks/CUTS.md
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from fedllm import experiment as ex
from fedllm import federation, round
from fedllm.checkpoint import Committed
from fedllm.estimates.cuts import Cutter
from fedllm.federation import Silent
from fedllm.ledger import Ledger, Row
from fedllm.planning import plan
from fedllm.planning.sizes import sizes
from fedllm.report.tables import markdown

FILE = Path(__file__).parents[1] / "experiments" / "unequal" / "cuts.toml"


def seconds(rows: Sequence[Row], spec: ex.Experiment, number: int, cutter: Cutter) -> float:
    """Of one round, of what was measured in it."""
    sites = dict(zip(cutter.data.names, [crowd.site.at(number) for crowd in cutter.data.crowds
                                         for _ in range(crowd.count)], strict=True))  # fmt: skip
    own: dict[str, float] = defaultdict(float)
    server = 0.0
    for row in rows:
        if row.round != number or row.step == "eval":
            continue
        if row.client not in sites:
            server += row.flops / spec.plan.server.flops
            continue
        site = sites[row.client]
        own[row.client] += row.flops / site.flops + row.frames * site.latency
        if row.direction in ("up", "down"):
            own[row.client] += row.wire_bytes / getattr(site, row.direction)
    return max(own.values()) + server


def simulated(spec: ex.Experiment) -> tuple[list[float], list[float]]:
    """Seconds of every round of a run: by the run's own clock, and by what it measured."""
    prepared = federation.prepare(spec, 0)
    name = federation.run_id(spec, 0)
    built = federation.assemble(spec, 0, prepared, Ledger(), name, Silent())
    cutter = Cutter(spec, sizes(spec))
    clock: list[float] = []
    found: list[float] = []

    def commit(committed: Committed) -> None:
        found.append(seconds(built.ledger.rows, spec, committed.round, cutter))
        fixed = dict.fromkeys(cutter.data.names, spec.strategy.cut)
        clock.append(
            committed.history[-1].get(round.CLOCK) or cutter.seconds(committed.round, fixed)
        )

    round.run(built, Committed(0, built.strategy.start()), commit)
    return clock, found


def main() -> None:
    """Plan, run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200, help="of each client")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    whole = ex.load(FILE).replace(sweep=(), seeds=(0,))
    whole = ex.vary(whole, {"simulation.examples": asked.rows, "simulation.test_examples": 40})
    table = []
    for cutting in plan.look(whole).cuttings:
        cut = "auto" if cutting.name == "by machine" else next(iter(cutting.clients))
        spec = ex.vary(whole, {"strategy.cut": cut})
        clock, found = simulated(spec)
        table.append([cutting.name, ", ".join(cutting.small), f"{clock[1]:.2f}", f"{found[1]:.2f}",
                      f"{clock[3]:.2f}", f"{found[3]:.2f}",
                      f"{statistics.fmean(found):.2f}"])  # fmt: skip
        print(table[-1], flush=True)
    text = "\n".join([
        "# A mixed fleet: cuts by machine", "",
        f"Made by `python benchmarks/cuts.py --rows {asked.rows} --out benchmarks/CUTS.md`:",
        f"MiniLM, Banking77, six clients with {asked.rows} rows each on the machines and links of",
        "`experiments/unequal/cuts.toml`. Seconds of a round under their clock: predicted, and of",
        "the bytes, frames and FLOPs that the run had. From the third round on the phones are busy",
        "with something else; cuts by machine are chosen anew after it.", "",
        markdown(["cut", "no memory for it", "round 2, predicted", "simulated",
                  "round 4, predicted", "simulated", "mean of five, simulated"], table), "",
    ])  # fmt: skip
    if asked.out:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
