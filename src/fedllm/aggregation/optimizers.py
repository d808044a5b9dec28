"""
What a server makes of the clients' mean change: one step of an optimizer (FedOpt).

Reddi et al., arXiv 2003.00295, algorithm 2, with FedAvgM of Hsu et al., arXiv 1909.06335. There is
no correction of the first steps' bias, as in the paper. A state's tensors are named
``<tunable>|<slot>``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Stepped = tuple[dict[str, Tensor], dict[str, Tensor]]
Step = Callable[..., Stepped]
"""(state, shared, mean of changes, the rule's numbers by name) -> (state, shared)."""


def average(state: Tensors, shared: Tensors, change: Tensors) -> Stepped:
    """FedAvg: x + Delta. No state."""
    return {}, {name: shared[name] + change[name] for name in shared}


def momentum(
    state: Tensors, shared: Tensors, change: Tensors, *, rate: float, beta: float
) -> Stepped:
    """FedAvgM: v = beta v + Delta; x + rate v."""
    moved = {n: beta * state[f"{n}|v"] + d if f"{n}|v" in state else d for n, d in change.items()}
    return (
        {f"{name}|v": tensor for name, tensor in moved.items()},
        {name: shared[name] + rate * moved[name] for name in shared},
    )


def _adaptive(
    state: Tensors, shared: Tensors, change: Tensors, rate: float, beta1: float, tau: float,
    second: Callable[[Tensor, Tensor], Tensor],
) -> Stepped:  # fmt: skip
    """
    From m = 0 and v = tau^2: x + rate m / (sqrt(v) + tau).

    m = beta1 m + (1 - beta1) Delta, v = second(v, Delta^2).
    """
    new: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, delta in change.items():
        m = state.get(f"{name}|m", torch.zeros_like(delta))
        v = state.get(f"{name}|v", torch.full_like(delta, tau**2))
        m, v = beta1 * m + (1 - beta1) * delta, second(v, delta.square())
        new |= {f"{name}|m": m, f"{name}|v": v}
        found[name] = shared[name] + rate * m / (v.sqrt() + tau)
    return new, found


def adagrad(
    state: Tensors, shared: Tensors, change: Tensors, *, rate: float, beta1: float, tau: float
) -> Stepped:
    """FedAdagrad: v + Delta^2."""
    return _adaptive(state, shared, change, rate, beta1, tau, lambda v, squared: v + squared)


def yogi(
    state: Tensors, shared: Tensors, change: Tensors, *, rate: float, beta1: float, beta2: float,
    tau: float,
) -> Stepped:  # fmt: skip
    """FedYogi: v - (1 - beta2) Delta^2 sign(v - Delta^2)."""

    def second(v: Tensor, squared: Tensor) -> Tensor:
        return v - (1 - beta2) * squared * (v - squared).sign()

    return _adaptive(state, shared, change, rate, beta1, tau, second)


def adam(
    state: Tensors, shared: Tensors, change: Tensors, *, rate: float, beta1: float, beta2: float,
    tau: float,
) -> Stepped:  # fmt: skip
    """FedAdam: beta2 v + (1 - beta2) Delta^2."""

    def second(v: Tensor, squared: Tensor) -> Tensor:
        return beta2 * v + (1 - beta2) * squared

    return _adaptive(state, shared, change, rate, beta1, tau, second)


OPTIMIZERS: dict[str, Step] = {
    "average": average, "momentum": momentum, "adagrad": adagrad, "yogi": yogi, "adam": adam,
}  # fmt: skip
