"""What is minimized: functions of what a pass gives, one value for each of the batch's units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.data.examples import Examples

Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""
(logits [units, outputs], targets [units], places [units], features [units, width]) -> loss of each
unit [units], or of each pair. Features are the hidden states that the logits were made of.
"""


def cross_entropy(
    logits: Tensor, targets: Tensor, places: Tensor, features: Tensor | None = None
) -> Tensor:
    """Of classes or of next tokens."""
    return F.cross_entropy(logits, targets, reduction="none")


@dataclass(frozen=True)
class Preference:
    """
    DPO (arXiv 2305.18290, equation 7): -ln sigmoid(beta (m - m_ref)) of each pair of responses.

    m = ln p(better) - ln p(other), sums over the responses' tokens; of the model in training and
    of the reference.  pair, sign: of each target of the whole set: which pair it is of, and 1 in
    the better response, -1 in the other.  reference: m_ref of each pair.  A batch has pairs whole.
    """

    pair: Tensor
    sign: Tensor
    reference: Tensor
    beta: float

    @staticmethod
    def of(examples: Examples, reference: Tensor, beta: float, device: torch.device) -> Preference:
        """For a set of pairs, two rows each."""
        rows = torch.from_numpy(np.repeat(np.arange(len(examples)), examples.targets))
        sign = (1 - 2 * (rows % 2)).float()
        return Preference(
            (rows // 2).to(device), sign.to(device), reference.float().to(device), beta
        )

    def __call__(
        self, logits: Tensor, targets: Tensor, places: Tensor, features: Tensor | None = None
    ) -> Tensor:
        """The loss of each pair of a batch: [pairs]."""
        return self.judged(cross_entropy(logits, targets, places), places)

    def judged(self, losses: Tensor, places: Tensor) -> Tensor:
        """The same from the cross-entropy of each unit."""
        pairs, which = torch.unique_consecutive(self.pair[places], return_inverse=True)
        margin = losses.new_zeros(len(pairs)).index_add(0, which, -losses * self.sign[places])
        return F.softplus(-self.beta * (margin - self.reference[pairs]))


class Known(Protocol):
    """A teacher's logits or features, or what gives them when they are asked for."""

    def __getitem__(self, places: Tensor, /) -> Tensor:
        """[n, outputs] or [n, width] of these units."""
        ...


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each unit: [units]."""
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, dim=-1), F.log_softmax(teacher / temperature, dim=-1),
        reduction="none", log_target=True,
    ).sum(-1)  # fmt: skip


@dataclass(frozen=True)
class Distillation:
    """
    Follow a teacher's logits or features (steps b5 and b8).

    kl: T^2 KL(softmax(teacher / T) || softmax(student / T)); mse: mean squared difference of
    logits or features; cosine: 1 - cos of the angle between features.
    teacher: [units of the whole set, outputs or width].  label_weight: of an added cross-entropy
    on the set's own labels, for a public set that is labelled.  weight: of following the teacher.
    hidden: features are compared.  projector: [student's width, teacher's], where these differ.
    """

    teacher: Known
    temperature: float
    loss: str
    label_weight: float = 0.0
    weight: float = 1.0
    hidden: bool = False
    projector: Tensor | None = None

    def __call__(
        self, logits: Tensor, targets: Tensor, places: Tensor, features: Tensor | None = None
    ) -> Tensor:
        """The loss of each unit."""
        goal, student = self.teacher[places], logits
        if self.hidden:
            assert features is not None
            student = features.float()  # a pass in half precision gives them as it has them
            if self.projector is not None:
                student = student @ self.projector
        if self.loss == "mse":
            value = (student - goal).square().mean(-1)
        elif self.loss == "cosine":
            value = 1 - F.cosine_similarity(student, goal, dim=-1)
        else:
            value = divergence(logits, goal, self.temperature)
        if self.weight != 1:
            value = self.weight * value
        if self.label_weight:
            value = value + self.label_weight * cross_entropy(logits, targets, places)
        return value


@dataclass(frozen=True)
class Said:
    """What a model says of a batch: logits [units, outputs], features [units, width]."""

    logits: Tensor
    features: Tensor


SURE = 1e-6  # nats: two models with less loss than this have nothing to teach each other


def mutual(
    models: tuple[Said, Said], targets: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """
    What two models of one batch minimize that teach each other (FedKD, arXiv 2108.13323).

    L_i = CE_i + (KL(softmax(z_j) || softmax(z_i)) + MSE(h_i, h_j)) / (CE_i + CE_j), means over the
    units; the divisor and whatever is the other's are constants. Who is wrong is followed less.
    The term of the hidden states is left out where their widths differ. Returns each one's loss,
    and each one's cross-entropy.
    """
    tasks = [cross_entropy(one.logits, targets, targets).mean() for one in models]
    doubt = (tasks[0] + tasks[1]).detach().clamp_min(SURE)
    losses = []
    for one, other, task in zip(models, reversed(models), tasks, strict=True):
        apart = divergence(one.logits, other.logits.detach()).mean()
        if one.features.shape == other.features.shape:
            apart = apart + F.mse_loss(one.features.float(), other.features.detach().float())
        losses.append(task + apart / doubt)
    return (losses[0], losses[1]), (tasks[0].detach(), tasks[1].detach())
