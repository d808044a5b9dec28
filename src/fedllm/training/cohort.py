"""
Many clients' work in one pass over the frozen base; one client's is the same with one slot.

A client's half of a strategy asks for work by yielding a job (``Fit``, ``Infer``, ``Forward``,
``Backward``); ``work`` does the jobs of all clients that wait, side by side where their tunables
can be stacked, and one by one where they cannot. Losses, clipping, schedule, optimizer, dropout
streams and numbers of steps stay each client's own.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm import experiment as ex
from fedllm.data.examples import Examples
from fedllm.errors import FedllmError
from fedllm.models.core import Core
from fedllm.models.inputs import beside
from fedllm.models.loading import LanguageModel, calm
from fedllm.streams import generator, torch_stream
from fedllm.training.batches import Batch, batches
from fedllm.training.known import known
from fedllm.training.learner import Learner, Plan, Span, advance
from fedllm.training.meter import (
    Cost,
    Member,
    Meter,
    charged,
    held_bytes,
    measures_itself,
    passing,
    typical,
)  # fmt: skip
from fedllm.training.objectives import Objective

LOG = logging.getLogger(__name__)
CELLS = 4096  # cells of one pass at most; larger ones gain nothing more
LOGITS = 1 << 22  # token logits that exist at once at most
Group = dict[str, Tensor]
J = TypeVar("J")
R = TypeVar("R")


@dataclass(eq=False)
class Fit:
    """
    Train a copy of the tunables on batches ``first`` to ``last`` - 1 of the plan (a2, b1, b5, b8).

    step: of the paper, to be charged.  optimizer: the state to continue from; None: afresh.
    rate: other than the training's.  The result is ``Trained``.
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


@dataclass(frozen=True)
class Trained:
    """What a stretch of local training gives back."""

    values: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    loss: float
    steps: int


@dataclass(eq=False)
class Infer:
    """Logits of all examples, batch by batch, handed to ``take``; without gradients."""

    model: LanguageModel
    tunables: Mapping[str, Tensor]
    examples: Examples
    size: int
    meter: Meter
    step: str
    take: Callable[[Batch, Tensor], None]


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
    """Run a half, keeping the graph. The result is ``Passed``."""

    half: Half
    batch: Batch
    purpose: tuple[object, ...]
    step: str
    kind: str = "train"


@dataclass(eq=False)
class Passed:
    """The output of a half that waits for its gradient."""

    job: Forward
    out: Tensor
    inputs: Tensor  # what the pass started from: a leaf where the input wants a gradient
    waiting: set[int]  # slots of the pass without gradient yet
    slot: int
    slots: int  # of the pass


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


def work(jobs: Sequence[Job]) -> list[Any]:
    """
    Do the jobs; returns each one's result, or the exception that it met.

    One client's fault (data that do not fit, a loss that is no number) is its own.
    """
    results: dict[int, Any] = {}
    for kind, do in ((Fit, _fit), (Infer, _infer), (Forward, _forward), (Backward, _backward)):
        mine: list[Any] = [job for job in jobs if isinstance(job, kind)]
        for group in _groups(mine):
            try:
                found: list[Any] = do(group)
            except Exception as error:  # not of one client's pass, where faults are its own
                found = [error] * len(group)
            results |= {id(job): result for job, result in zip(group, found, strict=True)}
    return [results[id(job)] for job in jobs]


def _apart(
    pack: list[J], attempt: Callable[[list[J]], None], fault: Callable[[J, Exception], None]
) -> None:
    """Try a pass; where it fails, each of its members alone: one client's fault is its own."""
    try:
        attempt(pack)
    except Exception as error:
        if len(pack) == 1:
            fault(pack[0], error)
            return
        LOG.debug("a pass of %d failed and is tried one by one", len(pack), exc_info=error)
        for one in pack:
            _apart([one], attempt, fault)


Tasked = Generator[Job, Any, R]
"""Somebody's work: yields jobs, is sent their results, returns what it found out."""


def together(tasks: Mapping[str, Tasked[R]]) -> dict[str, R | Exception]:
    """Carry on with everybody's task until all are done; what one raises is its own result."""
    results: dict[str, R | Exception] = {}
    news: dict[str, Any] = dict.fromkeys(tasks)
    while news:
        jobs: dict[str, Job] = {}
        for name, result in news.items():
            try:
                task = tasks[name]
                failed = isinstance(result, Exception)
                jobs[name] = task.throw(result) if failed else task.send(result)
            except StopIteration as end:
                results[name] = end.value
            except Exception as error:  # the boundary of a client: its fault is not spread
                results[name] = error
        news = dict(zip(jobs, work(list(jobs.values())), strict=True))
    return {name: results[name] for name in tasks}


def alone(task: Tasked[R]) -> R:
    """The same for one. Raises what it raised."""
    result = together({"": task})[""]
    if isinstance(result, Exception):
        raise result
    return result


def stackable(model: LanguageModel, training: ex.Training | None = None) -> bool:
    """Whether many clients' tunables can train in one pass."""
    return model.stackable and not (training is not None and training.base_dropout)


def cohort_size(model: LanguageModel, training: ex.Training) -> int:
    """How many clients one process should train at once: as its memory allows, at most 256."""
    if not stackable(model, training):
        return 1
    # values, gradients, two slots of the optimizer, stacked copies, frames in and out
    each = 10 * sum(t.numel() * t.element_size() for t in model.initial.values())
    return max(1, min(256, memory(model.device) // 8 // each))


def _groups(jobs: Sequence[J]) -> list[list[J]]:
    """Jobs that can be done in one pass."""
    found: dict[object, list[J]] = {}
    for job in jobs:
        found.setdefault(_kin(job), []).append(job)
    return list(found.values())


def _kin(job: Any) -> object:
    if isinstance(job, Backward):
        return "backward"
    if isinstance(job, Forward):
        half, training = job.half, job.half.learner.training
        key: tuple[object, ...] = (id(half.core), training.base_dropout, job.kind)
        model, alone = half.model, not stackable(half.model, training)
    elif isinstance(job, Fit):
        model, alone = job.model, not stackable(job.model, job.training)
        key = (id(model), job.training)
    else:
        model, alone = job.model, not stackable(job.model)
        key = (id(model), job.size)
    return (id(job), *key) if alone else key


# passes ---------------------------------------------------------------------------------------


def stack(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """
    The tunables of many clients as one, differentiable; of one as they are.

    LoRA of uneven ranks is filled up with zeros, which stay zero; each keeps its own alpha / r.
    """
    if len(parts) == 1:
        return dict(parts[0])
    return {name: _stacked(name, [part[name] for part in parts]) for name in parts[0]}


def _stacked(name: str, tensors: list[Tensor]) -> Tensor:
    side = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
    if side is not None:
        ranks = [tensor.shape[side] for tensor in tensors]
        most = max(ranks)
        if min(ranks) < most:
            filled = []
            for tensor, rank in zip(tensors, ranks, strict=True):
                if side == 0:
                    tensor = tensor * (most / rank)
                pad = (0, 0, 0, most - rank) if side == 0 else (0, most - rank)
                filled.append(F.pad(tensor, pad))
            tensors = filled
    return torch.stack(tensors)


def packs(
    members: Sequence[J], cells: Callable[[J], int], model: LanguageModel, device: torch.device
) -> Iterator[list[J]]:
    """Members in order, as many together as one pass should take."""
    width = getattr(model.model.config, "hidden_size", 1024)
    # about forty numbers a cell, block and unit of width live through a pass
    fits = memory(device) // 4 // (width * max(model.blocks, 1) * 160)
    limit = min(CELLS, fits)
    pack: list[J] = []
    filled = 0
    for member in members:
        size = cells(member)
        if pack and filled + size > limit:
            yield pack
            pack, filled = [], 0
        pack.append(member)
        filled += size
    if pack:
        yield pack


@cache
def memory(device: torch.device) -> int:
    """Bytes that this machine, or this device, has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def _drawing(
    model: LanguageModel, training: ex.Training, core: Core, tunables: Mapping[str, Tensor],
    purposes: Sequence[tuple[object, ...]], device: torch.device,
) -> Iterator[None]:  # fmt: skip
    """A core that holds these tunables and draws each client's dropout from its own stream."""
    draws = [generator(device, *purpose) for purpose in purposes] if model.draws else []
    with ExitStack() as around:
        if training.base_dropout:  # the library's own layers know of no streams
            around.enter_context(torch_stream(*purposes[0]))
            model.model.train(True)
            around.callback(calm, model.model)
        around.enter_context(core.holding(tunables, draws))
        yield


# training -------------------------------------------------------------------------------------


class _Fitting:
    """A ``Fit`` on its way."""

    def __init__(self, job: Fit) -> None:
        self.job = job
        device = job.model.device
        self.learner = Learner(job.tunables, job.training, job.optimizer, job.rate, device)
        self.cost = job.meter.cost(job.step)
        self.core = job.model.part("whole", 0, job.model.frozen.begin)
        self.batches: Iterator[Batch] | None = None
        self.held = held_bytes(job.model.whole) + self.learner.reserved
        self.left = job.last - job.first
        self.number = 0
        self.seen, self.summed = 0, 0.0
        self.batch: Batch
        self.error: Exception | None = None

    @property
    def member(self) -> Member:
        return Member(self.job.meter, self.cost, self.batch, self.held)

    @property
    def purpose(self) -> tuple[object, ...]:
        return (*self.job.plan.purpose, "dropout", self.job.first, self.number)

    def fetch(self) -> None:
        job = self.job
        try:
            if self.batches is None:
                plan = job.plan
                below = known(job.model, job.model.frozen.begin, plan.examples, job.meter, job.step)
                self.held += below.bytes if below else 0
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
        self.summed += loss * self.batch.units
        self.seen += self.batch.units

    @property
    def progress(self) -> float:
        """Where in the experiment this step lies."""
        return self.job.span.at(self.number / (self.job.last - self.job.first))

    def count(self) -> None:
        model, batch = self.job.model, self.batch
        self.number += 1
        self.left -= 1
        self.cost.flops += self.job.meter.flops(model, self.core, batch, backward=True)
        self.cost.examples += batch.rows
        self.cost.tokens += batch.tokens
        self.cost.optimizer_steps += 1
        self.job.meter.tick(batch.rows)

    def result(self) -> Trained | Exception:
        if self.error is not None:
            return self.error
        loss = self.summed / max(self.seen, 1)
        return Trained(self.learner.values(), self.learner.state(), loss, self.number)


def _fit(jobs: list[Fit]) -> list[Any]:
    fittings = [_Fitting(job) for job in jobs]
    model = jobs[0].model
    device = torch.device(jobs[0].plan.device)
    while live := [f for f in fittings if f.left and f.error is None]:
        for fitting in live:
            fitting.fetch()
        live = [fitting for fitting in live if fitting.error is None]
        for pack in packs(live, lambda f: f.batch.inputs.cells, model, device):
            _apart(pack, _train, _Fitting.fail)
    return [fitting.result() for fitting in fittings]


def _train(pack: list[_Fitting]) -> None:
    """One batch of each: a pass, and the optimizers' step."""
    members = [fitting.member for fitting in pack]

    def by_itself(member: Member) -> Callable[[], Any]:
        one = copy.copy(next(f for f in pack if f.batch is member.batch))
        one.batch = typical(one.batch)
        params = _copies(one.learner.params)
        return lambda: _train_pass([one], [params])

    probe = None if measures_itself(members) else by_itself
    try:
        with passing(pack[0].core, _kind(pack[0]), members, probe):
            losses = _train_pass(pack, [fitting.learner.params for fitting in pack])
    except Exception:
        for fitting in pack:
            fitting.learner.forget()
        raise
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
    around = _drawing(job.model, job.training, core, stack(params), purposes, inputs.x.device)
    with around:
        features = core.features(inputs)
        units = [fitting.batch.units for fitting in pack]
        whole = any(name.startswith("model.lm_head.") for name in params[0])  # rows have slots
        if core.decoder_head and not whole and len(features) * job.model.outputs > LOGITS:
            losses, goal = _in_chunks(core, features, pack, units)
        else:
            losses = _losses(core.scores(features), pack, units)
            goal = losses.sum()
        if goal.requires_grad:
            goal.backward()  # type: ignore[no-untyped-call]
    return [float(loss) for loss in losses.detach().tolist()]


def _copies(params: Mapping[str, Tensor]) -> Group:
    """Leaves of the same values, whose gradients nobody uses."""
    return {name: t.detach().clone().requires_grad_(True) for name, t in params.items()}


def _losses(logits: Tensor, pack: Sequence[_Fitting], units: list[int]) -> Tensor:
    """Each client's mean loss over its units: [clients]."""
    objective = pack[0].job.objective
    if all(fitting.job.objective is objective for fitting in pack):
        targets = torch.cat([fitting.batch.targets for fitting in pack])
        places = torch.cat([fitting.batch.places for fitting in pack])
        parts = torch.split(objective(logits, targets, places), units)
    else:
        parts = tuple(
            fitting.job.objective(part, fitting.batch.targets, fitting.batch.places)
            for fitting, part in zip(pack, torch.split(logits, units), strict=True)
        )
    return torch.stack([part.mean() for part in parts])


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
        pieces = []
        for i in range(0, len(part), size):
            chunk = slice(i, i + size)
            value = fitting.job.objective(core.scores(part[chunk]), targets[chunk], places[chunk])
            value = value.sum() / len(part)
            if value.requires_grad:
                value.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            pieces.append(value.detach())
        losses.append(torch.stack(pieces).sum())
    gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(features)
    return torch.stack(losses), (features * gradient).sum()


# logits without gradients ---------------------------------------------------------------------


class _Inferring:
    """An ``Infer`` on its way."""

    def __init__(self, job: Infer) -> None:
        self.job = job
        self.cost = job.meter.cost(job.step)
        self.core = job.model.part("whole", 0, job.model.frozen.begin)
        self.batches: Iterator[Batch] | None = None
        self.held = held_bytes(job.model.whole)
        self.batch: Batch | None = None
        self.error: Exception | None = None

    @property
    def member(self) -> Member:
        assert self.batch is not None
        return Member(self.job.meter, self.cost, self.batch, self.held)

    def fetch(self) -> None:
        job = self.job
        try:
            if self.batches is None:
                below = known(job.model, job.model.frozen.begin, job.examples, job.meter, job.step)
                self.held += below.bytes if below else 0
                device = str(job.model.device)
                self.batches = batches(job.examples, job.size, "bucket", None, 0, device, below)
            with job.meter.step(job.step):
                self.batch = next(self.batches, None)
        except Exception as error:
            self.error = error

    def fail(self, error: Exception) -> None:
        self.error = error

    @property
    def cells(self) -> int:
        """What the pass's limit counts: cells, or as many as the logits weigh."""
        return _weight(self.member.batch, self.job.model)


@torch.no_grad()
def _infer(jobs: list[Infer]) -> list[Any]:
    model = jobs[0].model
    every = [_Inferring(job) for job in jobs]
    live = every
    while True:
        for one in live:
            one.fetch()
        live = [one for one in live if one.batch is not None and one.error is None]
        if not live:
            return [one.error for one in every]
        for pack in packs(live, lambda one: one.cells, model, model.device):
            _apart(pack, _look, _Inferring.fail)


def _look(pack: list[_Inferring]) -> None:
    """One batch of each: their logits, handed over."""
    model, core = pack[0].job.model, pack[0].core
    members = [one.member for one in pack]

    def by_itself(member: Member) -> Callable[[], Any]:
        one = next(one for one in pack if one.batch is member.batch)
        return lambda: core.apply_to(one.job.tunables, typical(member.batch).inputs)

    probe = None if measures_itself(members) else by_itself
    with passing(core, "forward", members, probe):
        tunables = stack([one.job.tunables for one in pack])
        inputs = beside([member.batch.inputs for member in members])
        logits = core.apply_to(tunables, inputs).float()
    parts = torch.split(logits, [member.batch.units for member in members])
    with charged(members):
        for one, part in zip(pack, parts, strict=True):
            try:
                one.job.take(one.member.batch, part)
            except Exception as error:
                one.error = error
    for one, member in zip(pack, members, strict=True):
        batch = member.batch
        one.cost.flops += one.job.meter.flops(model, core, batch, backward=False)
        one.cost.examples += batch.rows
        one.cost.tokens += batch.tokens
        one.job.meter.tick(batch.rows)


def _weight(batch: Batch, model: LanguageModel) -> int:
    """Cells of a pass, or as many as weigh what its token logits do (8,192 a cell)."""
    return max(batch.inputs.cells, batch.selected * model.outputs // 8192)


# halves of a cut model ------------------------------------------------------------------------


def _forward(jobs: list[Forward]) -> list[Any]:
    half = jobs[0].half
    found: dict[int, Passed | Exception] = {}
    device = jobs[0].batch.inputs.x.device

    def attempt(pack: list[Forward]) -> None:
        found.update(zip(map(id, pack), _start(pack), strict=True))

    def fault(job: Forward, error: Exception) -> None:
        found[id(job)] = error

    for pack in packs(jobs, lambda job: _weight(job.batch, half.model), half.model, device):
        _apart(pack, attempt, fault)
    return [found[id(job)] for job in jobs]


def _start(pack: list[Forward]) -> list[Passed]:
    """A pass forward, whose graph waits for the gradients."""
    half = pack[0].half
    costs = [job.half.meter.cost(job.step) for job in pack]
    members = [
        Member(job.half.meter, cost, job.batch, job.half.held)
        for job, cost in zip(pack, costs, strict=True)
    ]

    def by_itself(member: Member) -> Callable[[], Any]:
        return _forgotten(next(job for job in pack if job.batch is member.batch))

    probe = None if measures_itself(members) else by_itself
    with passing(half.core, pack[0].kind, members, probe):
        outs = _half_pass(pack, [job.half.learner.params for job in pack])
    for job, cost in zip(pack, costs, strict=True):
        cost.flops += job.half.meter.flops(half.model, half.core, job.batch, backward=False)
        cost.examples += job.batch.rows
        cost.tokens += job.batch.tokens
        job.half.meter.tick(job.batch.rows)
    waiting = set(range(len(pack)))
    return [
        Passed(job, out, x, waiting, slot, len(pack))
        for slot, (job, (x, out)) in enumerate(zip(pack, outs, strict=True))
    ]


def _half_pass(
    pack: Sequence[Forward], params: Sequence[Mapping[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """(input, output) of each client, one graph behind all outputs."""
    half = pack[0].half
    inputs = beside([job.batch.inputs for job in pack])
    around = _drawing(
        half.model, half.learner.training, half.core, stack(params),
        [job.purpose for job in pack], inputs.x.device,
    )  # fmt: skip
    with around:
        out = half.core(inputs)
    if half.core.part in ("client", "body"):
        extra = half.core.prompt_tokens
        sizes = [sum(r * (n + extra) for r, n in job.batch.inputs.blocks) for job in pack]
    else:
        sizes = [job.batch.units for job in pack]
    parts = torch.split(out, sizes) if len(pack) > 1 else (out,)
    return [(job.batch.inputs.x, part) for job, part in zip(pack, parts, strict=True)]


def _forgotten(job: Forward) -> Callable[[], Tensor]:
    """To run a half for one client, so that the output's gradient goes nowhere."""
    params = _copies(job.half.learner.params)
    batch = typical(job.batch)
    inputs = batch.inputs
    if inputs.x.requires_grad:
        inputs = inputs.after(inputs.x.detach().requires_grad_(True))
    copied = replace(job, batch=replace(batch, inputs=inputs))
    return lambda: _half_pass([copied], [params])[0][1]


def _backward(jobs: list[Backward]) -> list[Any]:
    """Those of one pass go back together; a graph stays until its last client's gradient came."""
    passes: dict[int, list[Backward]] = {}
    results: dict[int, Any] = {}
    for job in jobs:
        out, gradient = job.passed.out, job.gradient
        if job.goal is None and gradient is not None and gradient.shape != out.shape:
            results[id(job)] = FedllmError(
                f"a gradient of shape {list(gradient.shape)} for an output of {list(out.shape)}"
            )
        else:
            passes.setdefault(id(job.passed.waiting), []).append(job)
    for group in passes.values():
        try:
            found = _back(group)
        except Exception as error:  # autograd's: nobody of this pass can go on
            found = [error] * len(group)
        results |= {id(job): result for job, result in zip(group, found, strict=True)}
    return [results[id(job)] for job in jobs]


def _back(group: list[Backward]) -> list[Any]:
    """Those of one pass: back, and the optimizers' step."""
    first = group[0].passed.job
    half = first.half
    members = []
    for job in group:
        own = job.passed.job
        meter = own.half.meter
        before = Member(meter, Cost(), own.batch, 0).shape(half.core, own.kind)
        left = meter.measured.peaks.get(before, (0, 0))[1]
        members.append(Member(meter, meter.cost(job.step), own.batch, own.half.held + left))
    waiting = group[0].passed.waiting
    later = waiting - {job.passed.slot for job in group}
    pairs = [
        (goal, job.gradient)
        for job in group
        if (goal := job.passed.out if job.goal is None else job.goal).requires_grad
    ]

    def by_itself(member: Member) -> Callable[[], None]:
        out = _forgotten(next(j.passed.job for j in group if j.passed.job.batch is member.batch))()

        def back() -> None:
            if out.requires_grad:
                out.sum().backward()  # type: ignore[no-untyped-call]

        return back

    probe = None if measures_itself(members) and group[0].passed.slots == 1 else by_itself
    with passing(half.core, f"{first.kind} backward", members, probe):
        if pairs:
            torch.autograd.backward(
                [goal for goal, _ in pairs], [gradient for _, gradient in pairs],
                retain_graph=bool(later),
            )  # fmt: skip
    waiting &= later
    moving = [(learner, job.progress) for job in group for learner in job.learners]
    if moving:
        with charged(members):
            advance([learner for learner, _ in moving], [at for _, at in moving])
    found = []
    for job, member in zip(group, members, strict=True):
        own, x = job.passed.job, job.passed.inputs
        meter, wants = own.half.meter, job.passed.inputs.requires_grad
        both = meter.flops(half.model, half.core, own.batch, True, wants)
        member.cost.flops += both - meter.flops(half.model, half.core, own.batch, False)
        member.cost.optimizer_steps += bool(job.learners)
        found.append(x.grad if wants else None)
    return found
