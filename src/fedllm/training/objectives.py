"""What is minimized: functions of (logits, batch), each a mean over the batch's units."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fedllm.training.batches import Batch

Objective = Callable[[Tensor, Batch], Tensor]


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean over rows (classes) or predicted tokens."""
    return F.cross_entropy(logits, batch.targets)


def distillation(
    teacher: Tensor, temperature: float, loss: str, label_weight: float = 0.0
) -> Objective:
    """
    Follow the teacher's logits (steps b5 and b8).

    kl: T^2 KL(softmax(teacher / T) || softmax(student / T)); mse: squared difference of logits.
    teacher: [units of the whole set, outputs].  label_weight: of an added cross-entropy on the
    set's own labels, for a public set that is labelled.
    """

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        goal = teacher[batch.places]
        if loss == "mse":
            value = F.mse_loss(logits, goal)
        else:
            value = temperature**2 * F.kl_div(
                F.log_softmax(logits / temperature, dim=-1),
                F.log_softmax(goal / temperature, dim=-1),
                reduction="batchmean",
                log_target=True,
            )
        if label_weight:
            value = value + label_weight * cross_entropy(logits, batch)
        return value

    return objective
