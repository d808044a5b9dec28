"""
What keeps clients of unlike rows together while they train: FedProx and SCAFFOLD.

FedProx (Li et al., arXiv 1812.06127): mu / 2 |w - w_global|^2 is added to each client's objective.
SCAFFOLD (Karimireddy et al., arXiv 1910.06378, algorithm 1): each gradient is corrected by c - c_k,
control variates of the server and the client. c travels down with the tunables, the change of c_k
up with the update, each as ``<tunable>|control``; c_k stays at its client, zero at first. Of a
personal head there is nothing common to stay near, so it is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.strategies.base import Group, Site
from fedllm.training.jobs import Penalty, Tasked, Trained
from fedllm.training.learner import Pull

SLOT = "|control"  # after a tunable's name: its control variate
KEPT = "control"  # group of a client's state


def variates(shared: Mapping[str, Tensor]) -> Group:
    """The server's c at the start: zero."""
    return {f"{name}{SLOT}": torch.zeros_like(tensor) for name, tensor in shared.items()}


def controls(tensors: Mapping[str, Tensor]) -> Group:
    """Those of these tensors that are control variates or changes of them, as they are named."""
    return {name: tensor for name, tensor in tensors.items() if name.endswith(SLOT)}


def folded(c: Group, changes: Sequence[Mapping[str, Tensor]], clients: int) -> Group:
    """
    The new c = c + (sum of the changes of c_k) / (clients in all), so that it stays their mean.

    changes: of those who took part, in a fixed order; everybody counts the same, as in the paper.
    """
    found = {}
    for name, tensor in c.items():
        total = torch.zeros(tensor.shape, dtype=torch.float64)
        for change in changes:
            total += change[name].double()
        found[name] = (tensor.double() + total / clients).to(tensor.dtype)
    return found


def fine_tune(
    site: Site, spec: ex.ClientStep, tunables: Group, start: Group, c: Group, step: str,
    penalty: Penalty | None = None,
) -> Tasked[tuple[Trained, Group]]:  # fmt: skip
    """
    This round's epochs, held back as ``spec`` says; the result, and the change of c_k to send.

    start: what came and is common.  c: the server's control variates that came with it; empty
    without SCAFFOLD.  penalty: what else is minimized.

    Option II of the paper: c_k+ = c_k - c + (x - y_k) / (K eta), where K eta is the sum of the
    steps' rates. That is the mean of the gradients only where each step is y - eta g: so ``ex``
    refuses SCAFFOLD with other optimizers than plain SGD.
    """
    if isinstance(spec, ex.Prox):
        pull = Pull(spec.mu, toward=start)
        return (yield from site.fine_tune(tunables, step, penalty=penalty, pull=pull)), {}
    if not c:
        return (yield from site.fine_tune(tunables, step, penalty=penalty)), {}
    own = site.group(KEPT) or {name: torch.zeros_like(tensor) for name, tensor in c.items()}
    shift = {name: c[f"{name}{SLOT}"] - own[f"{name}{SLOT}"] for name in start}
    result = yield from site.fine_tune(tunables, step, penalty=penalty, pull=Pull(shift=shift))
    moved = {name: (start[name] - result.values[name]) / result.stepped for name in start}
    change = {f"{name}{SLOT}": moved[name] - c[f"{name}{SLOT}"] for name in start}
    site.keep(KEPT, {name: own[name] + change[name] for name in own})
    return result, change
