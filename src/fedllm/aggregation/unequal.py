"""
Rules for clients whose LoRA has different ranks (Yan et al., section IV-A2).

Each makes one group of tunables, of the rank that ``before`` has, from groups of lower or equal
ranks. A client gets the first r_k components of it (``lora.resized``), which after ``flexlora`` is
the best approximation of rank r_k. Factors are averaged at the common rank, where every component
adds what it added at its client: alpha / r differs between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from fedllm.aggregation.mean import Updates, check, mean
from fedllm.lora import A, B, best, filled, pairs, rank_of, resized, without_factors

UnequalRule = Callable[[Updates, Mapping[str, float], Mapping[str, Tensor]], dict[str, Tensor]]
"""(updates, weights, what the server had before, whose rank is that of the result) -> result."""


def by_owners(
    rule: UnequalRule, updates: Updates, weights: Mapping[str, float], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """
    The rule for clients who have not all the same tensors: each is made by those who have it.

    What nobody here has stays as ``before``, as does what only those have who count nothing; what
    all have comes out as of the rule itself.
    """
    order, owned = sorted(updates), dict[tuple[str, ...], list[str]]()
    for name in before:
        owned.setdefault(tuple(c for c in order if name in updates[c]), []).append(name)
    found = dict(before)
    for clients, names in owned.items():
        if any(weights[client] > 0 for client in clients):
            mine = {client: {name: updates[client][name] for name in names} for client in clients}
            found |= rule(mine, weights, {name: before[name] for name in names})
    return found


def zero_pad(
    updates: Updates, weights: Mapping[str, float], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """
    The mean of A and of B, filled up with zeros: what few clients own is diluted.

    What nobody owns adds nothing, but keeps its rows of A, without which it could never learn.
    """
    result = mean(_filled(updates, before), weights)
    owned = max(map(rank_of, updates.values()))
    rows = {n: torch.cat([t[:owned], before[n][owned:]]) for n, t in result.items() if A in n}
    return {**result, **rows}


def normalized(
    updates: Updates, weights: Mapping[str, float], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """
    theta_j = sum_k w_k s_k theta_kj / sum_k w_k s_k over the clients that own j (P-06).

    s_k is the client's rank, in parts of the largest one here. What nobody owns stays as it was.
    What is no factor of LoRA everybody owns alike: there s_k is 1.
    """
    filled, ranks = _filled(updates, before), {c: rank_of(update) for c, update in updates.items()}
    largest = max(ranks.values())
    if not largest:  # none of it is a factor
        return mean(updates, weights)
    scaled = {client: weights[client] * (ranks[client] / largest) for client in updates}
    result = mean(filled, weights)  # right for what is no factor
    bands: dict[str, list[Tensor]] = {}
    for low, high in pairwise([0, *sorted({*ranks.values(), rank_of(before)})]):
        owners = {c: filled[c] for c in updates if ranks[c] >= high and scaled[c] > 0}
        part = {c: _band(update, low, high) for c, update in owners.items()}
        found = mean(part, scaled) if part else _band(before, low, high)
        for name, tensor in found.items():
            bands.setdefault(name, []).append(tensor)
    return {**result, **{n: torch.cat(parts, 0 if A in n else 1) for n, parts in bands.items()}}


def hetlora(
    updates: Updates, weights: Mapping[str, float], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """
    ``zero_pad`` with the weights of ``strengths`` instead of the given ones (P-09).

    They are of the factors alone: other tunables, such as a head, are averaged with the given ones.
    """
    return {**zero_pad(updates, strengths(updates), before), **_others(updates, weights)}


def strengths(updates: Updates) -> dict[str, float]:
    """
    |B_k A_k|_F over all modules, as shares that sum to 1 (HETLORA).

    Equal where all are zero, as equal norms are.
    """
    norms = {client: _strength(updates[client]) for client in sorted(updates)}
    total = sum(norms.values())
    return {c: norm / total if total else 1 / len(norms) for c, norm in norms.items()}


def _strength(update: Mapping[str, Tensor]) -> float:
    squared = 0.0
    for a, b in pairs(update):
        left, right = update[b].double(), update[a].double()
        squared += float(((left.T @ left) * (right @ right.T)).sum())
    return max(squared, 0.0) ** 0.5


def flexlora(
    updates: Updates, weights: Mapping[str, float], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """
    D = sum_k w_k (alpha / r_k) B_k A_k = U S V^T; B = U S (r / alpha), A = V^T (FlexLoRA, P-08).

    Exact where D has no higher rank than the result. Other tunables are averaged.
    """
    check(_filled(updates, before))
    rank, found = rank_of(before), {}
    for a, b in pairs(before):
        factors = best(*mean_product(updates, weights, a, b), rank)
        found[a], found[b] = filled(*factors, before[a])
    return {**_others(updates, weights), **found}


def mean_product(
    updates: Updates, weights: Mapping[str, float], a: str, b: str
) -> tuple[Tensor, Tensor]:
    """
    sum_k w_k B_k A_k / r_k / sum_k w_k of one module, as left [out, n] and right [n, in].

    Over the clients who have it. Factors side by side, in float64; multiplied out where they are
    twice as wide as the product.
    """
    owners = [client for client in sorted(updates) if b in updates[client]]
    total = sum(weights[client] for client in owners)
    lefts, rights = [], []
    for client in owners:
        left, right = updates[client][b].double(), updates[client][a].double()
        lefts.append(left * (weights[client] / total / len(right)))
        rights.append(right)
        if sum(map(len, rights)) > 2 * min(len(left), right.shape[1]):
            whole = torch.cat(lefts, 1) @ torch.cat(rights)
            one = torch.eye(min(whole.shape), dtype=whole.dtype)
            tall = len(whole) > whole.shape[1]
            lefts, rights = ([whole], [one]) if tall else ([one], [whole])
    return torch.cat(lefts, 1), torch.cat(rights)


def product_gap(
    updates: Updates, weights: Mapping[str, float], combined: Mapping[str, Tensor]
) -> float:
    """
    |mean of products - product of what was combined|_F / |mean of products|_F over all modules.

    How far a mean of A and B apart, or any other rule, lies from the mean of what the clients'
    modules add; 0 where they add nothing. What no client who counts has is left out.
    """
    rank, apart, whole = rank_of(combined), 0.0, 0.0
    there = {name for client, update in updates.items() if weights[client] > 0 for name in update}
    for a, b in pairs(there):
        left, right = mean_product(updates, weights, a, b)
        whole += _square(left, right)
        wide = torch.cat([left, -combined[b].double() / rank], 1)
        apart += _square(wide, torch.cat([right, combined[a].double()]))
    return (max(apart, 0.0) / whole) ** 0.5 if whole else 0.0


def _square(left: Tensor, right: Tensor) -> float:
    """|L R|_F^2 = sum of (L'L) * (R R'): no product of all rows and columns, no decomposition."""
    return float(((left.T @ left) * (right @ right.T)).sum())


def _others(updates: Updates, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The mean of what is no factor of LoRA: its clients' ranks and norms say nothing of it."""
    return mean({client: without_factors(update) for client, update in updates.items()}, weights)


def _filled(updates: Updates, before: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Everybody's at the common rank."""
    return {client: resized(update, rank_of(before)) for client, update in updates.items()}


def _band(tunables: Mapping[str, Tensor], low: int, high: int) -> dict[str, Tensor]:
    """Components ``low`` to ``high`` - 1 of the factors."""
    rows = {name: t[low:high] for name, t in tunables.items() if A in name}
    return rows | {name: t[:, low:high] for name, t in tunables.items() if B in name}
