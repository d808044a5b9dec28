"""Tunables under an optimizer, and the batches that they see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.data.examples import Examples
from fedllm.streams import stream
from fedllm.training.batches import Batch, Padding, collate, order


def rate_factor(training: ex.Training, progress: float) -> float:
    """Schedule of the rate; ``progress`` runs from 0 to 1 over the whole experiment."""
    if progress < training.warmup:
        return max(progress / training.warmup, 0.01)
    left = (progress - training.warmup) / (1 - training.warmup)
    if training.schedule == "linear":
        return max(1 - left, 0.0)
    if training.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))
    return 1.0


class Learner:
    """Trainable copies of some tunables with their optimizer: state in, state out."""

    def __init__(
        self, tunables: Mapping[str, Tensor], training: ex.Training,
        state: dict[str, Tensor] | None = None, rate: float | None = None,
    ) -> None:  # fmt: skip
        """Copy ``tunables``; continue from an optimizer ``state`` that ``state()`` returned."""
        self.params = {
            name: tensor.detach().clone().requires_grad_(True) for name, tensor in tunables.items()
        }
        self.training = training
        self.rate = rate or training.rate
        values = list(self.params.values())
        self.optimizer: torch.optim.Optimizer | None = None
        if values:
            decay = training.weight_decay
            if training.optimizer == "sgd":
                self.optimizer = torch.optim.SGD(
                    values, self.rate, momentum=training.momentum, weight_decay=decay
                )
            else:
                kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optimizer]
                self.optimizer = kind(values, self.rate, weight_decay=decay)
        if state and self.optimizer is not None:
            self._restore(state)

    def _restore(self, state: dict[str, Tensor]) -> None:
        assert self.optimizer is not None
        for name, parameter in self.params.items():
            slots = {
                key.rpartition("|")[2]: tensor.clone()
                for key, tensor in state.items()
                if key.rpartition("|")[0] == name
            }
            if slots:
                self.optimizer.state[parameter] = slots

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, named ``<tunable>|<slot>``."""
        if self.optimizer is None:
            return {}
        return {
            f"{name}|{slot}": value.detach().clone()
            for name, parameter in self.params.items()
            for slot, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    @property
    def reserved(self) -> int:
        """Bytes of the trained copies and of the optimizer's slots for them."""
        training = self.training
        slots = (1 if training.momentum else 0) if training.optimizer == "sgd" else 2
        return (1 + slots) * sum(t.numel() * t.element_size() for t in self.params.values())

    def values(self) -> dict[str, Tensor]:
        """The tunables as they are now, detached."""
        return {name: tensor.detach().clone() for name, tensor in self.params.items()}

    def step(self, progress: float) -> None:
        """Clip, set the rate for this point of the experiment, step, forget the gradients."""
        if self.optimizer is None:
            return
        if self.training.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.params.values(), self.training.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_factor(self.training, progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Span:
    """Where in the experiment a stretch of training lies: rounds done before, rounds in all."""

    before: float
    rounds: int
    length: float = 1.0

    def at(self, fraction: float) -> float:
        """Progress of the experiment when ``fraction`` of this stretch is done."""
        return (self.before + self.length * fraction) / self.rounds


@dataclass(frozen=True)
class Plan:
    """
    The batches of some passes over the examples, drawn from ``purpose``'s streams.

    Pass e is shuffled by the stream (purpose, "order", e) alone, so that a resumed or a
    stretched training sees the same batches.
    """

    examples: Examples
    size: int
    padding: Padding
    longest: int
    purpose: tuple[object, ...]
    device: str = "cpu"

    @property
    def per_pass(self) -> int:
        """Batches of one pass."""
        return math.ceil(len(self.examples) / self.size)

    def rows(self, number: int) -> Sequence[list[int]]:
        """Row numbers of each batch of pass ``number``."""
        rng = stream(*self.purpose, "order", number)
        return order(self.examples.lengths, self.size, self.padding, rng)

    def batch(self, rows: Sequence[int]) -> Batch:
        """One batch."""
        pad_to = self.longest if self.padding == "fixed" else None
        return collate(self.examples, rows, pad_to, self.device)

    def between(self, first: int, last: int) -> Iterator[Batch]:
        """Batches number ``first`` to ``last`` - 1 of the endless sequence of passes."""
        rows: Sequence[list[int]] = []
        for number in range(first, last):
            position = number % self.per_pass
            if position == 0 or number == first:
                rows = self.rows(number // self.per_pass)
            yield self.batch(rows[position])
