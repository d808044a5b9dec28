"""What is minimized: functions of what a pass gives, one value for each of the batch's units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""
(logits [units, outputs], targets [units], places [units], features [units, width]) -> loss of each
unit [units]. Features are the hidden states that the logits were made of.
"""


def cross_entropy(
    logits: Tensor, targets: Tensor, places: Tensor, features: Tensor | None = None
) -> Tensor:
    """Of classes or of next tokens."""
    return F.cross_entropy(logits, targets, reduction="none")


class Known(Protocol):
    """A teacher's logits or features, or what gives them when they are asked for."""

    def __getitem__(self, places: Tensor, /) -> Tensor:
        """[n, outputs] or [n, width] of these units."""
        ...


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
            value = self.temperature**2 * F.kl_div(
                F.log_softmax(logits / self.temperature, dim=-1),
                F.log_softmax(goal / self.temperature, dim=-1),
                reduction="none",
                log_target=True,
            ).sum(-1)
        if self.weight != 1:
            value = self.weight * value
        if self.label_weight:
            value = value + self.label_weight * cross_entropy(logits, targets, places)
        return value
