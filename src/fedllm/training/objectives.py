"""What is minimized: functions of (logits, batch), one value for each of the batch's units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [units, outputs], targets [units], places [units]) -> loss of each unit [units]."""


def cross_entropy(logits: Tensor, targets: Tensor, places: Tensor) -> Tensor:
    """Of classes or of next tokens."""
    return F.cross_entropy(logits, targets, reduction="none")


class Known(Protocol):
    """A teacher's logits, or what gives them when they are asked for."""

    def __getitem__(self, places: Tensor, /) -> Tensor:
        """[n, outputs] of these units."""
        ...


@dataclass(frozen=True)
class Distillation:
    """
    Follow a teacher's logits (steps b5 and b8).

    kl: T^2 KL(softmax(teacher / T) || softmax(student / T)); mse: squared difference of logits.
    teacher: [units of the whole set, outputs].  label_weight: of an added cross-entropy on the
    set's own labels, for a public set that is labelled.  weight: of following the teacher.
    """

    teacher: Known
    temperature: float
    loss: str
    label_weight: float = 0.0
    weight: float = 1.0

    def __call__(self, logits: Tensor, targets: Tensor, places: Tensor) -> Tensor:
        """The loss of each unit."""
        goal = self.teacher[places]
        if self.loss == "mse":
            value = (logits - goal).square().mean(-1)
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
