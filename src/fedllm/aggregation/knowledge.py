"""
Rules over knowledge: how much each client's word on each public unit weighs.

Yan et al., section IV-B3: selection of logits, weighted aggregation, clusters of clients. A rule
gives weights [clients, units] whose columns sum to 1; ``combined`` is what they make of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.aggregation.mean import check
from fedllm.errors import FedllmError

Z = "logits"


@dataclass(frozen=True)
class Voices:
    """
    What clients say of the same public units.

    names: of the clients, sorted.  logits: [clients, units, outputs].  weights: [clients], above 0.
    losses: [clients, units], of the row that each unit belongs to, where targets may be seen.
    """

    names: tuple[str, ...]
    logits: Tensor
    weights: Tensor
    losses: Tensor | None = None

    @staticmethod
    def of(
        said: Mapping[str, Tensor], weights: Mapping[str, float],
        losses: Mapping[str, Tensor] | None = None,
    ) -> Voices:  # fmt: skip
        """Raises FedllmError for other shapes, NaN, infinity and weights that sum to nothing."""
        check({client: {Z: logits} for client, logits in said.items()})
        names = tuple(sorted(said))
        each = torch.tensor([float(weights[name]) for name in names], dtype=torch.float64)
        if not float(each.sum()) > 0:
            raise FedllmError("aggregation: the clients' weights sum to zero")
        lost = torch.stack([losses[name].double() for name in names]) if losses else None
        return Voices(names, torch.stack([said[name] for name in names]), each, lost)

    @property
    def doubt(self) -> Tensor:
        """Entropy of each distribution over the largest there may be: 0 to 1, [clients, units]."""
        logs = F.log_softmax(self.logits.double(), -1)
        return -(logs.exp() * logs).sum(-1) / math.log(max(self.logits.shape[-1], 2))

    @property
    def loss(self) -> Tensor:
        """Of each unit's row, [clients, units]. Raises FedllmError where nobody said it."""
        if self.losses is None:
            raise FedllmError(
                "strategy.knowledge: a rule by loss needs targets; set public.labelled = true"
            )
        return self.losses


Rule = Callable[[Voices, float], Tensor]


def _share(weights: Tensor) -> Tensor:
    """Columns that sum to 1."""
    return weights / weights.sum(0)


def _plain(voices: Voices) -> Tensor:
    return voices.weights[:, None].expand(voices.logits.shape[:2])


def mean(voices: Voices, limit: float) -> Tensor:
    """As much as the clients' own weights say."""
    return _share(_plain(voices))


def uniform(voices: Voices, limit: float) -> Tensor:
    """All alike."""
    return _share(torch.ones_like(_plain(voices)))


def confidence(voices: Voices, limit: float) -> Tensor:
    """In proportion to 1 - entropy (K-12): who is sure of a unit counts more on that unit."""
    return _share(_plain(voices) * (1 - voices.doubt).clamp_min(1e-9))


def entropy(voices: Voices, limit: float) -> Tensor:
    """
    None whose entropy, of the largest there may be, exceeds the limit (K-11); 1 drops nobody.

    Where all exceed it, nobody is dropped: a unit is never without a teacher.
    """
    sure = voices.doubt <= limit if limit < 1 else torch.ones_like(_plain(voices), dtype=torch.bool)
    sure = sure | ~sure.any(0)
    return _share(_plain(voices) * sure)


def loss(voices: Voices, limit: float) -> Tensor:
    """softmax(-loss) over the clients, by the loss of each row (FedMKT's weighted mean)."""
    return (-voices.loss).softmax(0)


def least_loss(voices: Voices, limit: float) -> Tensor:
    """All to the client whose loss on the row is least (FedMKT's selection); ties: the first."""
    best = voices.loss.argmin(0)
    return F.one_hot(best, len(voices.names)).T.double()


KNOWLEDGE: dict[str, Rule] = {
    "mean": mean, "uniform": uniform, "confidence": confidence, "entropy": entropy, "loss": loss,
    "least-loss": least_loss,
}  # fmt: skip


def keep_best(voices: Voices, weights: Tensor, most: int, by_loss: bool = False) -> Tensor:
    """The weights without all but the ``most`` best clients of each unit, by doubt or by loss."""
    if not 0 < most < len(voices.names):
        return weights
    worse = voices.loss if by_loss else voices.doubt
    kept = torch.zeros_like(weights)
    kept.scatter_(0, worse.argsort(stable=True, dim=0)[:most], 1.0)
    kept = kept * weights
    left = kept.sum(0, keepdim=True)
    return torch.where(left > 0, kept / left.clamp_min(1e-300), weights)


def combined(voices: Voices, weights: Tensor) -> Tensor:
    """sum_k w_k(x) z_k(x): [units, outputs], summed in float64 in the order of the names."""
    total = torch.zeros(voices.logits.shape[1:], dtype=torch.float64)
    for weight, logits in zip(weights, voices.logits, strict=True):
        total += logits.double() * weight[:, None]
    return total.to(voices.logits.dtype)


def mixed(voices: Voices, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """
    T ln sum_k w_k(x) softmax(z_k(x) / T): the mean of distributions, [units, outputs].

    For forms that do not say all logits: what one client leaves out is no veto on what others say.
    """
    total = torch.zeros(voices.logits.shape[1:], dtype=torch.float64)
    for weight, logits in zip(weights, voices.logits, strict=True):
        total += (logits.double() / temperature).softmax(-1) * weight[:, None]
    return (temperature * total.clamp_min(1e-30).log()).to(voices.logits.dtype)


# clusters ---------------------------------------------------------------------------------------


def disagreement(voices: Voices) -> Tensor:
    """Jensen-Shannon divergence of all clients, each counting the same (K-10): [units]."""
    return _jensen_shannon(F.log_softmax(voices.logits.double(), -1))


def divergence(voices: Voices) -> Tensor:
    """Jensen-Shannon divergence of each two clients, summed over the units: [clients, clients]."""
    logs = F.log_softmax(voices.logits.double(), -1)
    found = torch.zeros((len(logs), len(logs)), dtype=torch.float64)
    for i in range(len(logs)):
        for j in range(i):
            found[i, j] = found[j, i] = _jensen_shannon(logs[[i, j]]).sum()
    return found


def _jensen_shannon(logs: Tensor) -> Tensor:
    """The mean of KL(p_k || mean of all p): [clients, units, outputs] of ln p -> [units]."""
    middle = logs.logsumexp(0) - math.log(len(logs))
    return (logs.exp() * (logs - middle)).sum(-1).mean(0)


def clusters(distance: Tensor, number: int) -> list[list[int]]:
    """
    Agglomerative clustering with average linkage (K-13): ``number`` groups, each and all sorted.

    distance: [clients, clients], symmetric.
    """
    groups = [[i] for i in range(len(distance))]
    while len(groups) > max(number, 1):
        pairs = [
            (float(distance[groups[a]][:, groups[b]].mean()), a, b)
            for b in range(len(groups)) for a in range(b)
        ]  # fmt: skip
        _, a, b = min(pairs)
        groups[a] = sorted(groups[a] + groups.pop(b))
    return sorted(groups)
