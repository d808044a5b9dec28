"""What a client's or the server's half of a strategy may ask to have done for it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from fedllm import experiment as ex
from fedllm.data.examples import Examples
from fedllm.models.core import Core
from fedllm.models.loading import LanguageModel
from fedllm.training.batches import Batch
from fedllm.training.learner import Learner, Plan, Pull, Span
from fedllm.training.meter import Meter, held_bytes
from fedllm.training.objectives import Objective

R = TypeVar("R")
Penalty = Callable[[Mapping[str, Tensor]], Tensor]
"""Of the tunables themselves: a scalar that is minimized besides the objective."""


@dataclass(eq=False)
class Fit:
    """
    Train a copy of the tunables on batches ``first`` to ``last`` - 1 of the plan (a2, b1, b5, b8).

    step: of the paper, to be charged.  optimizer: the state to continue from; None: afresh.
    rate: other than the training's.  penalty: added to the loss of every batch, and not to the
    loss that is reported.  pull: what else moves the tunables.  The result is ``Trained``.
    """

    model: LanguageModel
    tunables: Mapping[str, Tensor]
    plan: Plan
    objective: Objective
    training: ex.Training
    first: int
    last: int
    span: Span
    meter: Meter
    step: str
    optimizer: dict[str, Tensor] | None = None
    rate: float | None = None
    penalty: Penalty | None = None
    pull: Pull | None = None


@dataclass(frozen=True)
class Trained:
    """
    What a stretch of local training gives back.

    stepped: sum of the rates of its steps.  rows: the last loss of each row, by its number, where
    rows are drawn by their losses.
    """

    values: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    loss: float
    steps: int
    stepped: float = 0.0
    rows: Mapping[int, float] = field(default_factory=dict)


@dataclass(eq=False)
class Infer:
    """
    Logits and features of all examples, batch by batch, handed to ``take``; without gradients.

    Features [units, width] are the hidden states that the logits were made of.
    """

    model: LanguageModel
    tunables: Mapping[str, Tensor]
    examples: Examples
    size: int
    meter: Meter
    step: str
    take: Callable[[Batch, Tensor, Tensor], None]


@dataclass(eq=False)
class Half:
    """
    One side's part of the model in training.

    beside: bytes of further halves that the same side holds.
    """

    model: LanguageModel
    core: Core
    learner: Learner
    meter: Meter
    beside: int = 0

    @property
    def held(self) -> int:
        """Bytes of weights, optimizer and what lies beside."""
        return held_bytes(self.core) + self.learner.reserved + self.beside


@dataclass(eq=False)
class Forward:
    """
    Run a half, keeping the graph. The result is ``Passed``.

    watched: the block of which ``Passed.received`` says what attention each cell received there.
    below: bytes that graphs of earlier pieces of the same side keep.
    """

    half: Half
    batch: Batch
    purpose: tuple[object, ...]
    step: str
    kind: str = "train"
    watched: int | None = None
    below: int = 0

    @property
    def held(self) -> int:
        """Bytes that its side holds besides this pass."""
        return self.half.held + self.below


@dataclass(eq=False)
class Passed:
    """The output of a half that waits for its gradient."""

    job: Forward
    out: Tensor
    features: Tensor  # the hidden states that logits were made of; else the output itself
    inputs: Tensor  # what the pass started from: a leaf where the input wants a gradient
    left: int  # bytes that the graph keeps
    waiting: set[int]  # slots of the pass without gradient yet
    slot: int
    slots: int  # of the pass
    received: Tensor | None = None


@dataclass(eq=False)
class Backward:
    """
    Back-propagate into the tunables; with ``goal`` a scalar made of the output, otherwise from
    the ``gradient`` of the output. The result is the gradient of the input, if it wants one.

    learners: those that take their optimizer's step after it, at this ``progress`` of the
    experiment.
    """

    passed: Passed
    step: str
    gradient: Tensor | None = None
    goal: Tensor | None = None
    learners: tuple[Learner, ...] = ()
    progress: float = 0.0


Job = Fit | Infer | Forward | Backward

Tasked = Generator[Job, Any, R]
"""Somebody's work: yields jobs, is sent their results, returns what it found out."""
