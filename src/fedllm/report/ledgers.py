"""What a ledger says about rounds, roles and faults, read once from beginning to end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fedllm import ledger
from fedllm.ledger import Row

COSTS = ("bytes_up", "bytes_down", "flops", "client_flops", "seconds", "optimizer_steps")


@dataclass(frozen=True)
class Spent:
    """
    What a run spent: all clients and the server together, evaluation left out of all but faults.

    rounds: {round: {cost: amount of this round}} of ``COSTS``.  roles: {(direction, role): bytes}.
    """

    rounds: dict[int, dict[str, float]] = field(default_factory=dict)
    roles: dict[tuple[str, str], int] = field(default_factory=dict)
    faults: list[Row] = field(default_factory=list)

    def until(self, number: int) -> dict[str, float]:
        """Each cost of the rounds up to and including this one."""
        past = [costs for round_, costs in self.rounds.items() if round_ <= number]
        return {name: sum(costs[name] for costs in past) for name in COSTS}


def read(path: Path, upto: int | None = None) -> Spent:
    """What a ``ledger.jsonl`` holds; nothing where there is none. upto: the last round to count."""
    return spent(ledger.stream(path), upto) if path.exists() else Spent()


def spent(rows: Iterable[Row], upto: int | None = None) -> Spent:
    """Sum rows as ``summary.costs`` does, by round and by role."""
    found = Spent()
    for row in rows:
        if upto is not None and row.round > upto:
            continue
        if row.failures:
            found.faults.append(row)
        if row.step != "eval":
            _add(found, row)
    return found


def _add(found: Spent, row: Row) -> None:
    costs = found.rounds.setdefault(row.round, dict.fromkeys(COSTS, 0))
    if row.direction in ("up", "down") and row.role != "measurement":
        costs[f"bytes_{row.direction}"] += row.wire_bytes
        if row.wire_bytes:
            key = (row.direction, row.role)
            found.roles[key] = found.roles.get(key, 0) + row.wire_bytes
    costs["flops"] += row.flops
    costs["client_flops"] += row.flops if row.client != "server" else 0
    costs["seconds"] += row.seconds
    costs["optimizer_steps"] += row.optimizer_steps
