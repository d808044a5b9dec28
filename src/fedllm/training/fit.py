"""Local training: one batch of each client in a pass, and the optimizers' step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fedllm.errors import FedllmError
from fedllm.lora import rank_of
from fedllm.models.core import Core
from fedllm.models.inputs import beside
from fedllm.training.batches import Batch
from fedllm.training.jobs import Fit, Trained
from fedllm.training.known import known
from fedllm.training.learner import Learner, advance
from fedllm.training.meter import Member, charged, held_bytes, measures_itself, passing, typical
from fedllm.training.objectives import Preference, cross_entropy
from fedllm.training.passes import apart, copies, drawing, given, packs, stack
from fedllm.training.sampling import of_rows

LOGITS = 1 << 22  # token logits that exist at once at most
ALL = slice(None)


class _Fitting:
    """A ``Fit`` on its way."""

    def __init__(self, job: Fit) -> None:
        self.job = job
        device = job.model.device
        self.learner = Learner(
            job.tunables, job.training, job.optimizer, job.rate, device, job.pull
        )
        self.cost = job.meter.cost(job.step)
        self.core: Core
        self.batches: Iterator[Batch] | None = None
        self.held = held_bytes(job.model.whole) + self.learner.reserved
        self.rank = rank_of(job.tunables)
        self.left = job.last - job.first
        self.number = 0
        self.seen, self.summed = 0, 0.0
        self.each: Tensor | None = None  # loss of each unit, where the batch has weights
        self.rows: dict[int, float] = {}
        self.batch: Batch
        self.error: Exception | None = None

    @property
    def member(self) -> Member:
        held = self.held + given(self.batch)
        return Member(self.job.meter, self.cost, self.batch, held, self.rank)

    @property
    def purpose(self) -> tuple[object, ...]:
        return (*self.job.plan.purpose, "dropout", self.job.first, self.number)

    def fetch(self) -> None:
        job = self.job
        try:
            if self.batches is None:
                plan = job.plan
                below = known(job.model, job.model.frozen.begin, plan.examples, job.meter, job.step)
                begin = 0 if below is None else job.model.frozen.begin
                self.core = job.model.part("whole", 0, begin)
                self.held += sum(job.meter.held.values())
                self.batches = replace(plan, known=below).between(job.first, job.last)
            with job.meter.step(job.step):
                self.batch = next(self.batches)
        except Exception as error:
            self.error = error

    def fail(self, error: Exception) -> None:
        self.error = error

    def note(self, loss: float) -> None:
        """Take down the loss; one that is no number ends this client's training."""
        if not math.isfinite(loss):
            self.error = FedllmError(
                f"the loss became {loss} at batch {self.number + 1}: lower training.rate "
                f"(now {self.learner.rate}) or set training.clip"
            )
        self.summed += loss * self.batch.averaged
        self.seen += self.batch.averaged
        if self.each is not None:
            self.rows |= of_rows(self.batch, self.job.plan.examples, self.each)

    def weigh(self, losses: Tensor, units: slice = ALL) -> Tensor:
        """The losses of these units with the batch's weights; as they are, they are noted."""
        if self.batch.weights is None:
            return losses
        if self.each is None or len(self.each) != self.batch.units:
            self.each = losses.new_empty(self.batch.units)
        self.each[units] = losses.detach()
        return losses * self.batch.weights[units]

    @property
    def progress(self) -> float:
        """Where in the experiment this step lies."""
        return self.job.span.at(self.number / (self.job.last - self.job.first))

    def count(self) -> None:
        model, batch = self.job.model, self.batch
        self.number += 1
        self.left -= 1
        self.cost.flops += self.job.meter.flops(
            model, self.core, batch, backward=True, rank=self.rank
        )
        self.cost.examples += batch.rows
        self.cost.tokens += batch.tokens
        self.cost.optimizer_steps += 1
        self.job.meter.tick(batch.rows)

    def result(self) -> Trained | Exception:
        if self.error is not None:
            return self.error
        loss = self.summed / max(self.seen, 1)
        learner = self.learner
        return Trained(
            learner.values(), learner.state(), loss, self.number, learner.stepped, self.rows
        )


def fit(jobs: list[Fit]) -> list[Any]:
    fittings = [_Fitting(job) for job in jobs]
    model = jobs[0].model
    device = torch.device(jobs[0].plan.device)
    while live := [f for f in fittings if f.left and f.error is None]:
        for fitting in live:
            fitting.fetch()
        live = [fitting for fitting in live if fitting.error is None]
        for pack in packs(live, lambda f: f.batch.inputs.cells, model, device):
            apart(pack, _train, _Fitting.fail)
    return [fitting.result() for fitting in fittings]


def _train(pack: list[_Fitting]) -> None:
    """One batch of each: a pass, and the optimizers' step."""
    members = [fitting.member for fitting in pack]

    def by_itself(member: Member) -> Callable[[], Any]:
        one = copy.copy(next(f for f in pack if f.batch is member.batch))
        one.batch = typical(one.batch)
        params = copies(one.learner.params)
        return lambda: _train_pass([one], [params])

    probe = None if measures_itself(members) else by_itself
    for fitting in pack:
        fitting.learner.forget()  # what a pass left that failed
    with passing(pack[0].core, _kind(pack[0]), members, probe):
        losses = _train_pass(pack, [fitting.learner.params for fitting in pack])
    with charged(members):
        for fitting, loss in zip(pack, losses, strict=True):
            fitting.note(loss)
        well = [fitting for fitting in pack if fitting.error is None]
        if well:
            advance([f.learner for f in well], [f.progress for f in well])
    for fitting in well:
        fitting.count()


def _kind(fitting: _Fitting) -> str:
    objective = fitting.job.objective
    return getattr(objective, "__name__", type(objective).__name__)


def _train_pass(
    pack: Sequence[_Fitting], params: Sequence[Mapping[str, Tensor]]
) -> list[float]:  # fmt: skip
    """Forward and backward of one batch each; the gradients go to ``params``. The losses."""
    job, core = pack[0].job, pack[0].core
    inputs = beside([fitting.batch.inputs for fitting in pack])
    purposes = [fitting.purpose for fitting in pack]
    around = drawing(job.model, job.training, core, stack(params), purposes, inputs.x.device)
    with around:
        features = core.features(inputs)
        units = [fitting.batch.units for fitting in pack]
        whole = any(name.startswith("model.lm_head.") for name in params[0])  # rows have slots
        if core.decoder_head and not whole and len(features) * job.model.outputs > LOGITS:
            losses, goal = _in_chunks(core, features, pack, units)
        else:
            losses = _losses(core.scores(features), features, pack, units)
            goal = losses.sum()
        for fitting, own in zip(pack, params, strict=True):
            if fitting.job.penalty is not None:
                goal = goal + fitting.job.penalty(own)
        if goal.requires_grad:
            goal.backward()  # type: ignore[no-untyped-call]
    return [float(loss) for loss in losses.detach().tolist()]


def _losses(
    logits: Tensor, features: Tensor, pack: Sequence[_Fitting], units: list[int]
) -> Tensor:  # fmt: skip
    """Each client's mean loss over its units: [clients]."""
    objective = pack[0].job.objective
    if len(pack) > 1 and all(fitting.job.objective is objective for fitting in pack):
        targets = torch.cat([fitting.batch.targets for fitting in pack])
        places = torch.cat([fitting.batch.places for fitting in pack])
        parts = torch.split(objective(logits, targets, places, features), units)
    else:
        parts = tuple(
            fitting.job.objective(part, fitting.batch.targets, fitting.batch.places, hidden)
            for fitting, part, hidden in zip(
                pack, torch.split(logits, units), torch.split(features, units), strict=True
            )
        )
    weighed = (fitting.weigh(part) for fitting, part in zip(pack, parts, strict=True))
    return torch.stack([part.mean() for part in weighed])


def _in_chunks(
    core: Core, features: Tensor, pack: Sequence[_Fitting], units: list[int]
) -> tuple[Tensor, Tensor]:
    """
    The same without ever holding all token logits: each chunk's gradient is taken at once.

    Returns the losses and a scalar whose gradient by ``features`` is that of their sum.
    """
    leaf = features.detach().requires_grad_(features.requires_grad)
    size = max(LOGITS // max(pack[0].job.model.outputs, 1), 1)
    losses = []
    for fitting, part in zip(pack, torch.split(leaf, units), strict=True):
        targets, places = fitting.batch.targets, fitting.batch.places
        if isinstance(fitting.job.objective, Preference):
            losses.append(_of_pairs(core, fitting.job.objective, part, targets, places, size))
            continue
        pieces = []
        for i in range(0, len(part), size):
            chunk = slice(i, i + size)
            some = part[chunk]
            value = fitting.job.objective(core.scores(some), targets[chunk], places[chunk], some)
            value = fitting.weigh(value, chunk).sum() / len(part)
            if value.requires_grad:
                value.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            pieces.append(value.detach())
        losses.append(torch.stack(pieces).sum())
    gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(features)
    return torch.stack(losses), (features * gradient).sum()


def _of_pairs(
    core: Core, objective: Preference, features: Tensor, targets: Tensor, places: Tensor, size: int
) -> Tensor:
    """The same for a loss that is no sum over units: logits are made anew on the way back."""

    def losses(some: Tensor, goals: Tensor) -> Tensor:
        return cross_entropy(core.scores(some), goals, goals)

    parts = zip(torch.split(features, size), torch.split(targets, size), strict=True)
    each: list[Tensor] = [
        checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
    ]
    value = objective.judged(torch.cat(each), places).mean()
    if value.requires_grad:
        value.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return value.detach()
