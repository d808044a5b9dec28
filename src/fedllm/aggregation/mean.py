"""Averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedllm.errors import FedllmError

Updates = Mapping[str, Mapping[str, Tensor]]
Rule = Callable[[Updates, Mapping[str, float]], dict[str, Tensor]]


def check(updates: Updates) -> None:
    """Refuse what cannot be combined, naming the client: other names or shapes, NaN, infinity."""
    if not updates:
        raise FedllmError("aggregation: no update to combine")
    first_client = min(updates)
    first = updates[first_client]
    for client in sorted(updates):
        update = updates[client]
        if update.keys() != first.keys():
            raise FedllmError(f"aggregation: client {client!r} sent other names than the others")
        for name, tensor in update.items():
            if tensor.shape != first[name].shape:
                raise FedllmError(
                    f"aggregation: client {client!r} sent {name!r} with shape "
                    f"{tuple(tensor.shape)}, client {first_client!r} {tuple(first[name].shape)}"
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise FedllmError(
                    f"aggregation: client {client!r} sent NaN or infinity in {name!r}"
                )


def mean(updates: Updates, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """
    sum_k w_k x_k / sum_k w_k for every name (FedAvg, arXiv 1602.05629, algorithm 1).

    Summed in float64 in the order of the clients' names, so their order of arrival is nothing.
    """
    check(updates)
    clients = sorted(updates)
    total = sum(weights[client] for client in clients)
    if not total > 0:
        raise FedllmError("aggregation: the clients' weights sum to zero")
    result = {}
    for name, like in updates[clients[0]].items():
        summed = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
        for client in clients:
            summed += updates[client][name].double() * (weights[client] / total)
        result[name] = summed.to(like.dtype)
    return result


def uniform(updates: Updates, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The mean with equal weights, whatever ``weights`` says."""
    return mean(updates, dict.fromkeys(updates, 1.0))
