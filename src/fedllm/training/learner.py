"""Tunables under an optimizer, and the batches that they see."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.data.examples import Examples
from fedllm.models.frozen import Known
from fedllm.streams import stream
from fedllm.training.batches import Batch, Padding, collate, order
from fedllm.training.sampling import Chances, weighed


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


@dataclass(frozen=True)
class Pull:
    """
    What is added to a gradient, to keep a client near the others; of the tunables that it names.

    toward: the term mu / 2 |w - toward|^2 belongs to the objective, so that clipping sees it
    (FedProx, arXiv 1812.06127, equation 2).  shift: is added to what clipping left of a gradient
    (SCAFFOLD, arXiv 1910.06378, algorithm 1, which clips nothing): so its control variates stay
    means of the gradients that are stepped along.
    """

    mu: float = 0.0
    toward: Mapping[str, Tensor] = field(default_factory=dict)
    shift: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | None) -> Pull:
        """The same on a device."""
        toward, shift = ({n: t.to(device) for n, t in some.items()}
                         for some in (self.toward, self.shift))  # fmt: skip
        return Pull(self.mu, toward, shift)

    def before(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """Add the objective's own term, in place."""
        if name in self.toward:
            gradient.add_(parameter - self.toward[name], alpha=self.mu)

    def after(self, name: str, gradient: Tensor) -> None:
        """Add what is no part of the objective, in place."""
        if name in self.shift:
            gradient.add_(self.shift[name])


class Learner:
    """Trainable copies of some tunables with their optimizer: state in, state out."""

    def __init__(
        self, tunables: Mapping[str, Tensor], training: ex.Training,
        state: dict[str, Tensor] | None = None, rate: float | None = None,
        device: torch.device | None = None, pull: Pull | None = None,
    ) -> None:  # fmt: skip
        """
        Copy ``tunables``; continue from an optimizer ``state`` that ``state()`` returned.

        device: where to train; what is given and given back lies on the CPU.
        """
        self.pull = (pull or Pull()).to(device)
        self.stepped = 0.0  # sum of the rates of all steps
        self.params = {
            name: tensor.detach().to(device, copy=True).requires_grad_(True)
            for name, tensor in tunables.items()
        }
        self.training = training
        self.rate = rate or training.rate
        self.slots: dict[str, dict[str, Tensor]] = {slot: {} for slot in SLOTS[training.optimizer]}
        self.steps: dict[str, int] = {}
        for key, tensor in (state or {}).items():
            name, _, slot = key.rpartition("|")
            if name not in self.params:
                continue  # of the other half of a cut model
            if slot == "step":
                self.steps[name] = int(tensor)
            else:
                self.slots[slot][name] = tensor.to(device, copy=True)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, named ``<tunable>|<slot>`` as torch's optimizers name them."""
        found = {
            f"{name}|{slot}": tensor.detach().to("cpu", copy=True)
            for slot, tensors in self.slots.items()
            for name, tensor in tensors.items()
        }
        return found | {f"{n}|step": torch.tensor(float(step)) for n, step in self.steps.items()}

    @property
    def reserved(self) -> int:
        """Bytes of the trained copies, of the optimizer's slots for them, and of what pulls."""
        training = self.training
        slots = (1 if training.momentum else 0) if training.optimizer == "sgd" else 2
        pulls = [*self.pull.toward.values(), *self.pull.shift.values()]
        copies = sum(t.numel() * t.element_size() for t in self.params.values())
        return (1 + slots) * copies + sum(t.numel() * t.element_size() for t in pulls)

    def values(self) -> dict[str, Tensor]:
        """The tunables as they are now, detached."""
        return {name: t.detach().to("cpu", copy=True) for name, t in self.params.items()}

    def within(self, names: Iterable[str]) -> Learner:
        """The same learner as far as these tunables go: values and optimizer are shared."""
        found = copy.copy(self)
        found.params = {name: self.params[name] for name in names}
        return found

    def forget(self) -> None:
        """Drop gradients that came."""
        for parameter in self.params.values():
            parameter.grad = None

    def step(self, progress: float) -> None:
        """Clip, set the rate for this point of the experiment, step, forget the gradients."""
        advance([self], [progress])


SLOTS = {
    "sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}  # fmt: skip
BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's


@torch.no_grad()
def advance(learners: Sequence[Learner], progress: Sequence[float]) -> None:
    """
    One optimizer step of many learners of the same training, each at its own rate.

    The formulas are those of torch.optim's SGD, Adam and AdamW, which take a step of one model
    at a time: a hundred small ones would spend more time in Python than in arithmetic.
    """
    training = learners[0].training
    params: list[Tensor] = []
    grads: list[Tensor] = []
    rates: list[float] = []
    keys: list[tuple[Learner, str]] = []
    for learner, at in zip(learners, progress, strict=True):
        mine = [(n, p) for n, p in learner.params.items() if p.grad is not None]
        found = [p.grad for _, p in mine if p.grad is not None]
        for (name, parameter), gradient in zip(mine, found, strict=True):
            learner.pull.before(name, parameter, gradient)
        if training.clip is not None and found:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found)))
            factor = training.clip / (norm + 1e-6)
            torch._foreach_mul_(found, factor.clamp(max=1.0))
        for (name, _), gradient in zip(mine, found, strict=True):
            learner.pull.after(name, gradient)
        params += [p for _, p in mine]
        grads += found
        rate = learner.rate * rate_factor(training, at)
        learner.stepped += rate
        rates += [rate] * len(mine)
        keys += [(learner, n) for n, _ in mine]
    if params:
        (_descend if training.optimizer == "sgd" else _adam)(params, grads, rates, keys, training)
    for learner in learners:
        learner.forget()


def _slot(keys: Sequence[tuple[Learner, str]], slot: str, params: Sequence[Tensor]) -> list[Tensor]:
    """One slot of every tensor; zeros where it is new."""
    found = []
    for (learner, name), parameter in zip(keys, params, strict=True):
        tensors = learner.slots[slot]
        if name not in tensors:
            tensors[name] = torch.zeros_like(parameter)
        found.append(tensors[name])
    return found


def _descend(
    params: list[Tensor], grads: list[Tensor], rates: list[float],
    keys: list[tuple[Learner, str]], training: ex.Training,
) -> None:  # fmt: skip
    if training.weight_decay:
        torch._foreach_add_(grads, params, alpha=training.weight_decay)
    if training.momentum:
        buffers = _slot(keys, "momentum_buffer", params)  # zero at first: v = g, as torch's
        torch._foreach_mul_(buffers, training.momentum)
        torch._foreach_add_(buffers, grads)
        grads = buffers
    torch._foreach_sub_(params, torch._foreach_mul(grads, rates))


def _adam(
    params: list[Tensor], grads: list[Tensor], rates: list[float],
    keys: list[tuple[Learner, str]], training: ex.Training,
) -> None:  # fmt: skip
    counts = []
    for learner, name in keys:
        learner.steps[name] = learner.steps.get(name, 0) + 1
        counts.append(learner.steps[name])
    if training.weight_decay and training.optimizer == "adamw":
        torch._foreach_mul_(params, [1 - rate * training.weight_decay for rate in rates])
    elif training.weight_decay:
        torch._foreach_add_(grads, params, alpha=training.weight_decay)
    first, second = _slot(keys, "exp_avg", params), _slot(keys, "exp_avg_sq", params)
    torch._foreach_lerp_(first, grads, 1 - BETAS[0])
    torch._foreach_mul_(second, BETAS[1])
    torch._foreach_addcmul_(second, grads, grads, value=1 - BETAS[1])
    scale = torch._foreach_sqrt(second)
    torch._foreach_div_(scale, [math.sqrt(1 - BETAS[1] ** count) for count in counts])
    torch._foreach_add_(scale, EPSILON)
    sizes = [-rate / (1 - BETAS[0] ** n) for rate, n in zip(rates, counts, strict=True)]
    torch._foreach_addcdiv_(params, first, scale, sizes)


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
    stretched training sees the same batches.  known: hidden states in place of the tokens.
    chances: of each row to be drawn, over and over (``training.sampling``); None: each once a pass.
    """

    examples: Examples
    size: int
    padding: Padding
    longest: int
    purpose: tuple[object, ...]
    device: str = "cpu"
    known: Known | None = None
    chances: Chances | None = None

    @property
    def per_pass(self) -> int:
        """Batches of one pass."""
        return math.ceil(self.examples.cases / self.size)

    def rows(self, number: int) -> Sequence[list[int]]:
        """Row numbers of each batch of pass ``number``; rows of one case stay together."""
        rng, lengths = stream(*self.purpose, "order", number), self.examples.lengths
        if self.chances is not None:
            drawn = rng.choice(len(lengths), len(lengths), p=self.chances)
            groups = order(lengths[drawn], self.size, self.padding, rng)
            return [drawn[group].tolist() for group in groups]
        if not len(self.examples.option):
            return order(lengths, self.size, self.padding, rng)
        heads = self.examples.heads
        ends = [*heads[1:].tolist(), len(lengths)]
        longest = np.maximum.reduceat(lengths, heads)
        return [
            [row for case in cases for row in range(int(heads[case]), ends[case])]
            for cases in order(longest, self.size, self.padding, rng)
        ]

    def batch(self, rows: Sequence[int]) -> Batch:
        """One batch."""
        pad_to = self.longest if self.padding == "fixed" else None
        found = collate(self.examples, rows, pad_to, self.device, self.known)
        return found if self.chances is None else weighed(found, self.examples, self.chances)

    def between(self, first: int, last: int) -> Iterator[Batch]:
        """Batches number ``first`` to ``last`` - 1 of the endless sequence of passes."""
        rows: Sequence[list[int]] = []
        for number in range(first, last):
            position = number % self.per_pass
            if position == 0 or number == first:
                rows = self.rows(number // self.per_pass)
            yield self.batch(rows[position])
