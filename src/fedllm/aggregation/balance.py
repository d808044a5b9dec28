"""Weights by how useful clients are."""

from __future__ import annotations

import math
from collections.abc import Mapping


def balanced(
    weights: Mapping[str, float], losses: Mapping[str, float], temperature: float, floor: float,
    cap: float,
) -> dict[str, float]:  # fmt: skip
    """
    w_k exp((L - loss_k) / temperature), the factor kept between ``floor`` and ``cap`` (P-07).

    L is the mean of the losses by the given weights, so that equal losses leave the weights alone.
    """
    total = sum(weights[client] for client in sorted(weights))
    middle = sum(weights[c] * losses[c] for c in sorted(weights)) / total
    found = {}
    for client, weight in weights.items():
        power = (middle - losses[client]) / temperature
        factor = math.exp(min(power, 700.0))  # more is no float, and above any cap
        found[client] = weight * min(max(factor, floor), cap)
    return found
