"""Who gets which rows: pure functions from labels or columns to lists of row numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedllm.errors import FedllmError


def iid(rows: int, sizes: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
    """Deal rows at random, ``sizes[k]`` of them to client k."""
    order = rng.permutation(rows)
    ends = np.cumsum(sizes)
    return [sorted(order[end - size : end].tolist()) for size, end in zip(sizes, ends, strict=True)]


def even(rows: int, clients: int) -> list[int]:
    """Sizes that differ by at most one and sum to ``rows``."""
    return [rows // clients + (k < rows % clients) for k in range(clients)]


def dirichlet(
    labels: Sequence[str], clients: int, alpha: float, rng: np.random.Generator
) -> list[list[int]]:
    """Divide each label's rows in proportions ~ Dirichlet(alpha); nobody is left without a row."""
    found: list[list[int]] = [[] for _ in range(clients)]
    array = np.asarray(labels)
    for label in sorted(set(labels)):
        rows = rng.permutation(np.flatnonzero(array == label))
        ends = np.round(np.cumsum(rng.dirichlet([alpha] * clients)) * len(rows)).astype(int)
        for client, part in enumerate(np.split(rows, ends[:-1])):
            found[client] += part.tolist()
    for client in range(clients):
        if not found[client]:  # a small alpha can leave a client out: it gets the largest's last
            largest = max(range(clients), key=lambda k: len(found[k]))
            found[client].append(found[largest].pop())
    return [sorted(rows) for rows in found]


def by_column(values: Sequence[str], clients: int) -> dict[str, list[int]]:
    """The ``clients`` most frequent values and their rows, the largest first."""
    groups: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        groups.setdefault(value, []).append(row)
    if clients > len(groups):
        raise FedllmError(
            f"simulation.clients = {clients}: the column has only {len(groups)} values"
        )
    ranked = sorted(groups, key=lambda value: (-len(groups[value]), value))[:clients]
    return {value: groups[value] for value in ranked}
