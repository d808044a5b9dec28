"""
What a round will cost: before anything runs, and without weights.

Bytes and FLOPs follow from shapes (``costs``); memory from one pass over a meta model under the
counter that a run has; seconds from speeds and links that ``[plan]`` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm import costs, federation
from fedllm import experiment as ex
from fedllm.costs import Blueprint, ClientSize, PublicSize, Roles
from fedllm.data.examples import Examples
from fedllm.data.simulation import names
from fedllm.errors import FedllmError
from fedllm.flat import Ints
from fedllm.models import attention
from fedllm.models.core import Core, Part
from fedllm.models.inputs import Inputs
from fedllm.models.loading import LanguageModel, calm, load_config
from fedllm.strategies.activations import check_cut
from fedllm.strategies.logits import NO_PUBLIC
from fedllm.streams import stream
from fedllm.summary import variant
from fedllm.training.batches import order
from fedllm.training.fit import LOGITS
from fedllm.training.meter import LiveBytes, held_bytes
from fedllm.training.objectives import Distillation, Objective, cross_entropy

NF4 = 33 / 64  # bytes of a weight in 4 bits: half a byte, and a scale for each 64
Kind = Literal["train", "distil", "forward", "half"]


@dataclass(frozen=True)
class Rows:
    """Some rows: tokens and predicted units of each."""

    lengths: Ints
    targets: Ints

    @staticmethod
    def of(examples: Examples | None) -> Rows:
        """Those of a tokenized set."""
        if examples is None:
            return Rows.alike(0, 1, 1)
        return Rows(examples.lengths, examples.targets)

    @staticmethod
    def alike(count: int, tokens: float, targets: float) -> Rows:
        """So many rows with these means."""
        return Rows(_spread(count, tokens), _spread(count, targets))

    @property
    def size(self) -> ClientSize:
        """What byte formulas take."""
        return ClientSize(len(self.lengths), int(self.lengths.sum()), int(self.targets.sum()))

    def resized(self, count: int) -> Rows:
        """So many of them, again from the first where there are fewer."""
        return Rows(np.resize(self.lengths, count), np.resize(self.targets, count))


def _spread(count: int, mean: float) -> Ints:
    """Whole numbers with this mean, as near to each other as can be."""
    ends = np.round(np.arange(count + 1) * mean).astype(np.int64)
    return np.maximum(np.diff(ends), 1)


@dataclass(frozen=True)
class Batches:
    """Rows, padded length, tokens and predicted units of some batches."""

    rows: Ints
    lengths: Ints
    tokens: Ints
    units: Ints

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def of(rows: Rows, groups: Sequence[Sequence[int]], pad_to: int | None = None) -> Batches:
        """Those that hold these row numbers."""
        starts = np.cumsum([0, *map(len, groups)])[:-1]
        flat = np.concatenate([np.asarray(g, np.int64) for g in groups])
        lengths, targets = rows.lengths[flat], rows.targets[flat]
        longest = np.maximum.reduceat(lengths, starts)
        return Batches(
            np.array([len(g) for g in groups], np.int64), np.maximum(longest, pad_to or 0),
            np.add.reduceat(lengths, starts), np.add.reduceat(targets, starts),
        )  # fmt: skip

    @staticmethod
    def joined(parts: Sequence[Batches]) -> Batches:
        """All of them."""
        none = np.zeros(0, np.int64)
        columns = ("rows", "lengths", "tokens", "units")
        return Batches(*(np.concatenate([none, *(getattr(p, c) for p in parts)]) for c in columns))

    def largest(self) -> list[Shape]:
        """The shapes among which the one that takes most memory is."""
        cells = self.rows * self.lengths
        found = {int(cells.argmax())}
        if bool((self.units != self.rows).any()):  # token logits, which may weigh more
            found.add(int(self.units.argmax()))
        return [
            Shape(int(self.rows[i]), int(self.lengths[i]), int(self.tokens[i]) == int(cells[i]),
                  int(self.units[i]))
            for i in sorted(found)
        ]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One batch: rows, their padded length, whether none is padded, predicted units."""

    rows: int
    length: int
    full: bool
    units: int


@dataclass(frozen=True)
class Crowd:
    """Clients that are alike: how many, their rows, tokens held out, and their machines."""

    name: str
    count: int
    train: Rows
    held_out: int
    site: ex.PlanSite


@dataclass(frozen=True)
class Sizes:
    """Everybody's rows, and those that are public; labels; the longest row there may be."""

    crowds: tuple[Crowd, ...]
    public: Rows
    labels: int
    longest: int
    notes: tuple[str, ...] = ()

    @cached_property
    def few(self) -> bool:
        """Whether rows have two lengths at most."""
        found = [np.unique(rows.lengths) for rows in (self.public, *(c.train for c in self.crowds))]
        return len(np.unique(np.concatenate(found))) < 3

    @property
    def clients(self) -> int:
        """How many there are."""
        return sum(crowd.count for crowd in self.crowds)


def sizes(experiment: ex.Experiment) -> Sizes:
    """
    What ``[plan]`` says of the data; what it leaves out is measured.

    Raises FedllmError for whatever a run would refuse of its data.
    """
    spec = experiment.plan
    labels = spec.labels or len(experiment.data.labels)
    told = spec.tokens is not None and (
        spec.rows is not None or (bool(spec.sites) and all(site.rows for site in spec.sites))
    )
    named = spec.public_rows is not None or experiment.public.size or not experiment.public.source
    if told and named and (labels or experiment.task.kind != "classification"):
        return _described(experiment, labels, None)
    prepared = federation.prepare(experiment, experiment.seeds[0])
    labels = labels or len(prepared.labels)
    if spec.rows is not None or spec.tokens is not None or any(s.rows for s in spec.sites):
        return _described(experiment, labels, prepared)
    sites = [site for site in _sites(experiment) for _ in range(site.count)]
    crowds = tuple(
        Crowd(name, 1, Rows.of(data.train), data.test.tokens, site)
        for (name, data), site in zip(prepared.clients.items(), sites, strict=True)
    )
    public = _public(experiment, Rows.of(prepared.public))
    return Sizes(crowds, public, labels, prepared.longest, prepared.notes)


def _sites(experiment: ex.Experiment) -> tuple[ex.PlanSite, ...]:
    return experiment.plan.sites or (ex.PlanSite(count=experiment.simulation.clients),)


def _described(
    experiment: ex.Experiment, labels: int, prepared: federation.Prepared | None
) -> Sizes:
    """Everybody with the same means: those of ``[plan]``, else of the data."""
    spec = experiment.plan
    read = None if prepared is None else Rows.of(prepared.clients.train).size
    tokens, mean = spec.tokens, 0.0
    if read is not None:
        tokens = tokens or read.tokens / read.rows
        mean = read.rows / experiment.simulation.clients
    assert tokens is not None
    longest = prepared.longest if prepared else _longest(experiment)
    if tokens > longest:
        raise FedllmError(
            f"plan.tokens = {tokens:g}: a row has at most {longest} tokens (data.max_tokens)"
        )
    per_row = 1.0 if experiment.task.kind == "classification" else (
        spec.targets or (read.units / read.rows if read else max(tokens - 1, 1))
    )  # fmt: skip
    crowds = tuple(
        Crowd(site.name, site.count, Rows.alike(site.rows or spec.rows or round(mean), tokens,
                                                min(per_row, tokens)), 0, site)
        for site in _sites(experiment)
    )  # fmt: skip
    known = Rows.of(prepared.public) if prepared else Rows.alike(
        experiment.public.size, tokens, per_row
    )  # fmt: skip
    return Sizes(crowds, _public(experiment, known, tokens), labels, longest)


def _longest(experiment: ex.Experiment) -> int:
    limit = int(getattr(load_config(experiment.model), "max_position_embeddings", 512))
    limit -= getattr(experiment.tunables, "tokens", 0)
    return experiment.data.max_tokens or min(limit, 512)


def _public(experiment: ex.Experiment, known: Rows, tokens: float = 0.0) -> Rows:
    """The public rows, as ``[plan]`` has them or as they are."""
    spec = experiment.plan
    count = len(known.lengths) if spec.public_rows is None else spec.public_rows
    if spec.public_tokens is None and (count == len(known.lengths) or len(known.lengths)):
        return known.resized(count)
    mean = spec.public_tokens or tokens
    targets = 1.0 if experiment.task.kind == "classification" else max(mean - 1, 1)
    return Rows.alike(count, mean, targets)


@dataclass(frozen=True)
class Share:
    """What one client of a crowd pays in a round: bytes, FLOPs, peak bytes, seconds."""

    name: str
    count: int
    up: int
    down: int
    flops: float
    memory: int
    seconds: float
    limit: float | None = None


@dataclass(frozen=True)
class Line:
    """
    What a round costs under one strategy.

    up, down: bytes of whole frames, the mean of the clients; payload: of tensor data.
    flops: the mean of the clients.  memory: the largest of them.  refused: why this cannot run.
    """

    strategy: str
    variant: str
    up: float = 0.0
    down: float = 0.0
    payload: tuple[float, float] = (0.0, 0.0)
    flops: float = 0.0
    server_flops: float = 0.0
    memory: int = 0
    server_memory: int = 0
    seconds: float = 0.0
    messages: int = 0
    shares: tuple[Share, ...] = field(default=(), repr=False)
    refused: str = ""


@contextmanager
def _fused() -> Iterator[None]:
    """Attention that keeps what a run's does; for FLOPs it is written out on the meta device."""
    before = attention._plain
    attention._plain = _kept
    try:
        yield
    finally:
        attention._plain = before


def _kept(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    if mask is not None:
        mask = torch.empty_like(mask, dtype=q.dtype)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout, causal, attn_mask=mask, scale=scale
    )
    out: Tensor = found[0]
    return out


class Estimator:
    """Costs of one model with one kind of tunables."""

    def __init__(
        self, experiment: ex.Experiment, labels: int,
        anchors: Sequence[tuple[int, Blueprint]] = (),
    ) -> None:  # fmt: skip
        """
        anchors: blueprints whose FLOPs, times these factors, sum up to this one's, where they are
        known already. Raises FedllmError where there is no such model, or the tunables do not fit.
        """
        self.experiment = experiment
        self.training = experiment.training
        self.shapes = Blueprint(experiment.model, experiment.task, experiment.tunables, labels)
        self.anchors = anchors or ((1, self.shapes),)
        self.model = self.shapes.whole
        self._per_row: dict[tuple[object, ...], int] = {}
        self.few = False  # so few lengths that each had better be counted by itself
        self._private: dict[str, Batches] = {}
        self._joined: tuple[tuple[Crowd, ...], Batches] = ((), Batches.joined([]))
        self._lives: dict[tuple[object, ...], tuple[int, int, int]] = {}

    # FLOPs ------------------------------------------------------------------------------------

    def flops(
        self, batches: Batches, part: Part, backward: bool, cut: int = 0, begin: int = 0,
        input_grad: bool = False,
    ) -> float:  # fmt: skip
        """Of a pass over each of these batches."""
        chosen = not self.model.classification and part not in ("client", "body")
        total = 0
        for length in np.unique(batches.lengths).tolist():
            here = batches.lengths == length
            rows, units = int(batches.rows[here].sum()), int(batches.units[here].sum())
            case = (part, length, backward, cut, begin, input_grad, self.few)
            if chosen:
                one, two = (self._of_row(*case, selected=n) for n in (1, 2))
                total += rows * one + (units - rows) * (two - one)
            else:
                total += rows * self._of_row(*case)
        return total

    def _of_row(
        self, part: Part, length: int, backward: bool, cut: int, begin: int, input_grad: bool,
        once: bool, selected: int = 0,
    ) -> int:  # fmt: skip
        key = (part, length, backward, cut, begin, input_grad, selected)
        if key not in self._per_row:
            self._per_row[key] = sum(
                factor * shapes.flops(
                    part, length, backward, cut, begin, selected, input_grad, once
                )
                for factor, shapes in self.anchors
            )  # fmt: skip
        return self._per_row[key]

    # memory -----------------------------------------------------------------------------------

    def live(
        self, kind: Kind, part: Part, shape: Shape, cut: int = 0, begin: int = 0,
        goal: ex.Logits | None = None,
    ) -> tuple[int, int, int]:  # fmt: skip
        """
        Bytes of tensors that a pass makes: the most at once, those left after it, and the most
        at once on the way back (of a half, that waits for its gradient in between).
        """
        found = [0, 0, 0]
        for one in self.shapes.small(part, cut, begin, 0 if kind == "forward" else 1):
            key = (id(one.model), kind, part, shape, one.cut, one.begin, goal)
            if key not in self._lives:
                self._lives[key] = _live(
                    kind, one.model, one.part(part), shape, self.training, goal
                )
            parts = self._lives[key]
            found = [a + one.factor * b for a, b in zip(found, parts, strict=True)]
        return found[0], found[1], found[2]

    def most(
        self, kind: Kind, part: Part, batches: Batches, cut: int = 0, begin: int = 0,
        goal: ex.Logits | None = None,
    ) -> int:  # fmt: skip
        """The peak of a pass over the largest of these, with what it starts from."""
        if not len(batches):
            return 0
        return max(
            self.live(kind, part, shape, cut, begin, goal)[0] + self.given(shape, begin)
            for shape in batches.largest()
        )

    def given(self, shape: Shape, begin: int) -> int:
        """Bytes of the hidden states that a pass above the first blocks starts from."""
        return shape.rows * shape.length * self.model.width * 4 if begin else 0

    def held(self, core: Core) -> int:
        """Bytes of a part's weights."""
        if self.experiment.model.quantization == "none":
            return held_bytes(core)
        return round(sum(
            p.numel() * (NF4 if self._packed(name, p) else p.element_size())
            for name, p in core.named_parameters()
        ))  # fmt: skip

    def _packed(self, name: str, weight: Tensor) -> bool:
        family = self.model.family
        inside = family is None or f"{family.backbone}.{family.blocks}." in name
        return inside and weight.ndim == 2 and name not in self.model.initial

    def reserved(self, core: Core) -> int:
        """Bytes of a part's trained copies and their optimizer."""
        return self._slots() * costs.tunable_bytes(self.model, self.model.tunables_of(core))

    def _slots(self) -> int:
        if self.training.optimizer == "sgd":
            return 2 if self.training.momentum else 1
        return 3

    # how rows become batches ------------------------------------------------------------------

    def heaviest(self, data: Sizes) -> Batches:
        """The batches of all clients, of which the largest decides how much memory one needs."""
        crowds, found = self._joined
        if crowds is not data.crowds:
            found = Batches.joined([self.private(crowd, data.longest) for crowd in data.crowds])
            self._joined = data.crowds, found
        return found

    def private(self, crowd: Crowd, longest: int) -> Batches:
        """The batches of a client's first round."""
        if crowd.name not in self._private:
            self._private[crowd.name] = self._batches(crowd, longest)
        return self._private[crowd.name]

    def _batches(self, crowd: Crowd, longest: int) -> Batches:
        training, seed = self.training, self.experiment.seeds[0]
        groups: list[list[int]] = []
        for number in range(training.epochs):
            rng = stream(seed, crowd.name, "private", "order", number)
            groups += order(crowd.train.lengths, training.batch_size, training.padding, rng)
        return Batches.of(crowd.train, groups, longest if training.padding == "fixed" else None)

    def anew(self, rows: Rows, size: int, longest: int, epochs: int = 1) -> Batches:
        """Batches of shuffled rows; none of no rows."""
        if not len(rows.lengths):
            return Batches.joined([])
        padding = self.training.padding
        groups = [
            group for number in range(epochs)
            for group in order(rows.lengths, size, padding, stream("plan", number))
        ]  # fmt: skip
        return Batches.of(rows, groups, longest if padding == "fixed" else None)

    def in_order(self, rows: Rows, size: int) -> Batches:
        """Batches of rows sorted by length, as those are that nothing is learnt from."""
        if not len(rows.lengths):
            return self.anew(rows, size, 0)
        return Batches.of(rows, order(rows.lengths, size, "bucket", None))

    @cached_property
    def begin(self) -> int:
        """Blocks that run once for each row, where there is room to remember it."""
        keeps = self.experiment.model.cache and not self.training.base_dropout
        return self.model.untouched if keeps else 0


def _live(
    kind: Kind, model: LanguageModel, core: Core, shape: Shape, training: ex.Training,
    goal: ex.Logits | None,
) -> tuple[int, int, int]:  # fmt: skip
    """``Estimator.live`` of one meta model."""
    back = kind != "forward"
    tensors = dict(core.named_parameters())
    for name, tensor in tensors.items():
        tensor.requires_grad_(back and name in model.initial)
    inputs = _inputs(core, shape, back)
    there, on_return = LiveBytes(), LiveBytes()
    left = 0
    try:
        with _fused(), torch.set_grad_enabled(back), _drawing(model, training, back):
            if kind in ("forward", "half"):
                with there:
                    out = core(inputs)
                left = there.live
                if out.requires_grad:
                    with on_return:
                        out.backward(torch.empty_like(out))
            else:
                objective = cross_entropy if goal is None else _follow(model, goal, _units(inputs))
                with there:
                    _train(model, core, inputs, objective)
    finally:
        for tensor in tensors.values():
            tensor.grad = None
            tensor.requires_grad_(False)
    return there.peak, left, on_return.peak


@contextmanager
def _drawing(model: LanguageModel, training: ex.Training, back: bool) -> Iterator[None]:
    """Dropout as in training, without anybody's stream."""
    if back and model.draws:
        model.slots.draws = [torch.Generator()]
    if back and training.base_dropout:
        model.model.train(True)
    try:
        yield
    finally:
        model.slots.draws = ()
        calm(model.model)


def _units(inputs: Inputs) -> int:
    return inputs.rows if inputs.select is None else len(inputs.select)


def _inputs(core: Core, shape: Shape, back: bool) -> Inputs:
    """A batch of this shape without values."""
    cells = shape.rows * shape.length
    if core.starts:
        x = torch.zeros(cells, dtype=torch.long, device="meta")
    else:
        later = core.part in ("server", "body", "tail")
        extra = core.prompt_tokens if later else 0
        size = (cells + shape.rows * extra, core.model.config.hidden_size)
        x = torch.empty(size, device="meta", requires_grad=back and later)
    lengths = None
    if core.family is None:
        if core.decoder_head:
            lengths = torch.full((shape.rows,), shape.length, device="meta")
    elif not shape.full:
        lengths = torch.full((shape.rows,), shape.length, device="meta")
    select = None
    if core.decoder_head and core.part not in ("client", "body"):
        some = -(-8 * shape.units // cells) * cells // 8  # as ``training.meter.typical``
        select = torch.zeros(some, dtype=torch.long, device="meta")
    return Inputs(x, ((shape.rows, shape.length),), lengths, select)


def _follow(model: LanguageModel, goal: ex.Logits, units: int) -> Objective:
    teacher = torch.empty((units, model.outputs), device="meta")
    return Distillation(teacher, goal.temperature, goal.loss)


def _train(model: LanguageModel, core: Core, inputs: Inputs, objective: Objective) -> None:
    """What ``training.fit`` does with one batch, chunk by chunk where logits are many."""
    features = core.features(inputs)
    count = _units(inputs)
    targets = torch.zeros(count, dtype=torch.long, device="meta")
    whole = any(name.startswith("model.lm_head.") for name in model.initial)
    if not core.decoder_head or whole or count * model.outputs <= LOGITS:
        loss = objective(core.scores(features), targets, targets).mean()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return
    leaf = features.detach().requires_grad_(features.requires_grad)
    size = max(LOGITS // model.outputs, 1)
    for i in range(0, count, size):
        some = slice(i, i + size)
        value = objective(core.scores(leaf[some]), targets[some], targets[some]).sum() / count
        if value.requires_grad:
            value.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    if leaf.grad is not None:
        (features * leaf.grad).sum().backward()  # type: ignore[no-untyped-call]


def line(estimator: Estimator, spec: ex.Strategy, data: Sizes) -> Line:
    """What a round costs under this strategy; one that cannot run says why."""
    makers: dict[str, Callable[[Estimator, Any, Sizes, str], Line]] = {
        "parameters": _parameters, "logits": _logits, "activations": _activations,
    }  # fmt: skip
    estimator.few = data.few
    named = variant(estimator.experiment.replace(strategy=spec))
    try:
        return makers[spec.kind](estimator, spec, data, named)
    except FedllmError as error:
        return Line(spec.kind, named, refused=str(error))


@dataclass
class _Bill:
    """What one client of a crowd has to pay, as it is added up."""

    crowd: Crowd
    up: Roles
    down: Roles
    headers: tuple[int, int]
    messages: int
    flops: float
    memory: int
    server: float = 0.0


def _total(
    estimator: Estimator, data: Sizes, bills: Sequence[_Bill], kind: str, named: str,
    server_flops: float, server_memory: int, serial: bool = False,
) -> Line:  # fmt: skip
    """Means over the clients, and the seconds of a round of those who take part."""
    experiment = estimator.experiment
    codecs = dict(experiment.exchange.codecs)
    shares, payloads = [], []
    for bill in bills:
        site = bill.crowd.site
        payload = [costs.coded(roles, codecs) for roles in (bill.up, bill.down)]  # type: ignore[arg-type]
        up, down = (p + h for p, h in zip(payload, bill.headers, strict=True))
        seconds = bill.flops / site.flops + up / site.up + down / site.down
        seconds += bill.messages * site.latency
        shares.append(Share(bill.crowd.name, bill.crowd.count, up, down, bill.flops, bill.memory,
                            seconds, site.memory))  # fmt: skip
        payloads.append(payload)
    present = experiment.exchange.clients_per_round or data.clients

    def mean(values: Sequence[float]) -> float:
        counted = zip(values, shares, strict=True)
        return sum(value * share.count for value, share in counted) / data.clients

    mean_up, mean_down = mean([s.up for s in shares]), mean([s.down for s in shares])
    server = experiment.plan.server
    own = server_flops * present / server.flops
    each = [share.seconds for share in shares]
    seconds = mean(each) * present if serial else max(each)
    links = present * max(mean_up / (server.down or math.inf), mean_down / (server.up or math.inf))
    return Line(
        kind, named, mean_up, mean_down,
        (mean([p[0] for p in payloads]), mean([p[1] for p in payloads])),
        mean([share.flops for share in shares]), server_flops * present,
        max(share.memory for share in shares), server_memory, max(seconds, links) + own,
        max(bill.messages for bill in bills), tuple(shares),
    )  # fmt: skip


class _Frames:
    """Headers of what a client is sent and sends."""

    def __init__(self, estimator: Estimator, data: Sizes, kind: str, crowd: Crowd) -> None:
        experiment = estimator.experiment
        self.run = f"{experiment.name}-{kind}-{experiment.seeds[0]}"
        alike = crowd.count > 1 or bool(experiment.plan.rows)
        self.client = names(data.clients)[0] if alike else crowd.name
        self.down = self.up = self.messages = 0

    def add(
        self, direction: str, step: str, task: str = "", role: str = "", times: int = 1,
        sent: Mapping[str, tuple[int, ...]] | None = None, **facts: Any,
    ) -> None:  # fmt: skip
        """So many frames of a kind."""
        size = costs.header(sent or {}, role, step, task, facts, self.run, self.client) * times
        self.messages += times
        if direction == "up":
            self.up += size
        else:
            self.down += size


LOSS = 1.2345678901234567  # as long as most numbers are when they are written out


def _shapes(model: LanguageModel, which: Sequence[str]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(model.initial[name].shape) for name in which}


def _below(est: Estimator, rows: Rows, begin: int, shown: int) -> tuple[float, int, int]:
    """
    What running the lowest blocks once for each row costs: FLOPs in the mean round, bytes kept,
    and the most bytes at once. Nothing where no block is frozen, or few rows are shown.
    """
    if not begin or not len(rows.lengths) or shown < len(rows.lengths):
        return 0.0, 0, 0
    batches = est.in_order(rows, est.training.batch_size)
    once = est.flops(batches, "client", False, begin) / est.experiment.rounds
    kept = rows.size.tokens * est.model.width * costs.FLOAT
    peak = est.held(est.model.whole) + est.most("forward", "client", batches, begin)
    return once, kept, peak + kept


def _fits(est: Estimator, crowd: Crowd, begin: int) -> int:
    """``begin``, unless a client's states would fill more than a quarter of its memory."""
    kept = crowd.train.size.tokens * est.model.width * costs.FLOAT
    limit = crowd.site.memory
    return 0 if limit is not None and kept > limit / 4 else begin


def _fitting(est: Estimator, crowd: Crowd, data: Sizes) -> tuple[float, int, int, int]:
    """(FLOPs, peak bytes, bytes kept of frozen blocks, begin) of a round of local training."""
    begin = _fits(est, crowd, est.begin)
    private = est.private(crowd, data.longest)
    once, kept, peak = _below(est, crowd.train, begin, len(crowd.train.lengths))
    if kept:
        kept += crowd.held_out * est.model.width * costs.FLOAT
    whole = est.model.whole
    base = est.held(whole) + est.reserved(whole) + kept
    memory = max(base + est.most("train", "whole", est.heaviest(data), begin=begin), peak)
    return once + est.flops(private, "whole", True, begin=begin), memory, kept, begin


def _parameters(est: Estimator, spec: ex.Parameters, data: Sizes, named: str) -> Line:
    sent = _shapes(est.model, costs.travelling(est.model))
    up, down = costs.parameters_payload(est.model)
    bills = []
    for crowd in data.crowds:
        frames = _Frames(est, data, "parameters", crowd)
        frames.add("down", "a1", "train", "parameter", sent=sent)
        frames.add("up", "a3", "", "parameter", sent=sent, weight=float(len(crowd.train.lengths)),
                   loss=LOSS)  # fmt: skip
        flops, memory, _, _ = _fitting(est, crowd, data)
        bills.append(_Bill(crowd, {"parameter": up}, {"parameter": down}, (frames.up, frames.down),
                           frames.messages, flops, memory))  # fmt: skip
    present = est.experiment.exchange.clients_per_round or data.clients
    return _total(est, data, bills, "parameters", named, 0.0, (present + 1) * up)


def _logits(est: Estimator, spec: ex.Logits, data: Sizes, named: str) -> Line:
    experiment, model, training = est.experiment, est.model, est.training
    if not len(data.public.lengths):
        raise FedllmError(NO_PUBLIC)
    every = len(data.public.lengths)
    drawn = min(experiment.public.rows_per_round or every, every)
    rows = data.public.resized(drawn)
    size = PublicSize(drawn, rows.size.tokens, rows.size.units)
    up, down = costs.logits_payload(model, size)
    index = 2 * drawn * costs.INT
    looked = est.in_order(rows, experiment.evaluation.batch_size)
    learnt = est.anew(rows, spec.batch_size or training.batch_size, data.longest, spec.epochs)
    shown = experiment.rounds * drawn

    def public(begin: int) -> tuple[float, int, int, int]:
        """FLOPs of looking and of learning, peak bytes beside weights, and bytes kept."""
        once, kept, peak = _below(est, data.public, begin, shown)
        begin = begin if kept else 0
        look = est.flops(looked, "whole", False, begin=begin)
        learn = est.flops(learnt, "whole", True, begin=begin)
        most = max(
            est.most("forward", "whole", looked, begin=begin),
            est.reserved(model.whole) + est.most("distil", "whole", learnt, begin=begin, goal=spec),
        )
        return once + look + learn, most, kept, peak

    bills = []
    for crowd in data.crowds:
        frames = _Frames(est, data, "logits", crowd)
        frames.add("down", "b1", "know", "index", sent={"rows": (drawn,)}, public="0" * 16)
        shape = {"logits": (size.units, model.outputs)}
        frames.add("up", "b3", "", "logit", sent=shape, weight=float(drawn), loss=LOSS)
        frames.add("down", "b7", "digest", "logit", sent={**shape, "rows": (drawn,)})
        frames.add("up", "b8", loss=LOSS)
        flops, memory, kept, begin = _fitting(est, crowd, data)
        more, most, beside, peak = public(begin)
        memory = max(memory + beside, est.held(model.whole) + most + kept + beside, peak + kept)
        bills.append(_Bill(crowd, {"logit": up}, {"logit": down - index, "index": index},
                           (frames.up, frames.down), frames.messages, flops + more,
                           memory))  # fmt: skip
    present = experiment.exchange.clients_per_round or data.clients
    server, server_memory = 0.0, (present + 1) * up
    if spec.server_model:
        server, most, kept, peak = public(est.begin)
        server_memory = max(server_memory, est.held(model.whole) + most + kept, peak)
    found = _total(est, data, bills, "logits", named, server / present, server_memory)
    if spec.client_models:
        return replace(found, variant=f"{named} (every client with the server's model)")
    return found


def _activations(est: Estimator, spec: ex.Activations, data: Sizes, named: str) -> Line:
    model, experiment = est.model, est.experiment
    cut = check_cut(spec, model)
    home = spec.labels == "client"
    parts: list[Part] = ["client", "tail"] if home else ["client"]
    mine = sorted({n for part in parts for n in model.tunables_of(model.part(part, cut))})
    mine = [n for n in mine if n in costs.travelling(model)]
    half = costs.tunable_bytes(model, mine)
    sent = _shapes(model, mine)
    batch_of = {crowd.name: est.private(crowd, data.longest) for crowd in data.crowds}
    most = max(len(batches) for batches in batch_of.values())
    bills = []
    for crowd in data.crowds:
        private = batch_of[crowd.name]
        number, every = len(private), spec.average_every
        averages = -(-most // every) if every else 1
        uploads = -(-number // every) if every else 1
        up, down = costs.activations_roles(
            model, spec, crowd.train.size, experiment.training.epochs, half, averages, uploads
        )
        frames = _split_frames(est, data, crowd, private, home, sent, averages, uploads)
        flops, memory, server = _split_client(est, crowd, private, est.heaviest(data), cut, home)
        bills.append(_Bill(crowd, up, down, (frames.up, frames.down), frames.messages, flops,
                           memory, server))  # fmt: skip
    server_flops = sum(bill.server * bill.crowd.count for bill in bills) / data.clients
    memory = _split_server(est, spec, data, cut, home)
    serial = spec.server == "sequential"
    return _total(est, data, bills, "activations", named, server_flops, memory, serial)


def _split_frames(
    est: Estimator, data: Sizes, crowd: Crowd, private: Batches, home: bool,
    sent: dict[str, tuple[int, ...]], averages: int, uploads: int,
) -> _Frames:  # fmt: skip
    """What crosses for the batches of a round, and for its averages."""
    frames, number = _Frames(est, data, "activations", crowd), len(private)
    cells, rows = int(private.tokens.mean()), int(private.rows.mean())
    hidden = (cells, est.model.width)
    bare = {"hidden": hidden, "lengths": (rows,)}
    facts = {"left": 10, "number": 10, "units": rows}
    frames.add("down", "c1", "forward", times=number)
    shapes = bare if home else {**bare, "labels": (rows,)}
    frames.add("up", "c2", "", "activation", number, shapes, **facts)
    if home:
        frames.add("down", "c3", "head", "activation", number, {"hidden": hidden})
        frames.add("up", "c3", "", "gradient", number, {"gradient": hidden}, loss=LOSS)
    frames.add("down", "c4", "backward", "gradient", number, {"gradient": hidden})
    frames.add("up", "c5", times=number)
    frames.add("down", "cc1", "collect", times=uploads)
    frames.add("up", "cc1", "", "parameter", uploads, sent)
    frames.add("down", "cc3", "replace", "parameter", averages, sent)
    frames.add("up", "cc4", times=averages)
    return frames


def _split_client(
    est: Estimator, crowd: Crowd, private: Batches, heaviest: Batches, cut: int, home: bool
) -> tuple[float, int, float]:
    """(FLOPs, peak bytes) of a client's side, and FLOPs of the server's for its batches."""
    model = est.model
    begin = min(_fits(est, crowd, est.begin), cut)
    once, kept, peak = _below(est, crowd.train, begin, len(crowd.train.lengths))
    core = model.part("client", cut, begin)
    flops = once + est.flops(private, "client", True, cut, begin)
    held = est.held(core) + est.reserved(core)
    if kept:
        held += est.held(model.part("client", begin)) + kept
        held += crowd.held_out * model.width * costs.FLOAT
    memory = max(peak, held + _waiting(est, "client", heaviest, cut, begin))
    if home:
        tail = model.part("tail", cut)
        flops += est.flops(private, "tail", True, cut, input_grad=True)
        memory = max(
            memory, est.held(tail) + est.reserved(tail) + _waiting(est, "tail", heaviest, cut)
        )
    server = est.flops(private, "body" if home else "server", True, cut, input_grad=True)
    return flops, memory, server


def _waiting(est: Estimator, part: Part, batches: Batches, cut: int, begin: int = 0) -> int:
    """The most bytes of a half's pass, forward and back, over the largest batch."""
    found = 0
    for shape in batches.largest():
        peak, left, back = est.live("half", part, shape, cut, begin)
        found = max(found, peak, left + back)
    return found


def _split_server(est: Estimator, spec: ex.Activations, data: Sizes, cut: int, home: bool) -> int:
    """Peak bytes of the server's side."""
    part: Part = "body" if home else "server"
    core = est.model.part(part, cut)
    present = est.experiment.exchange.clients_per_round or data.clients
    own = est.reserved(core) * (present if spec.server == "per-client" else 1)
    batches = est.heaviest(data)
    if spec.server == "concatenated":
        batches = _side_by_side(est, data, present / data.clients)
    return est.held(core) + own + _waiting(est, part, batches, cut)


def _side_by_side(est: Estimator, data: Sizes, share: float) -> Batches:
    """The clients' first batches as one, their second ones, and so on; of a share of them."""
    mine = [(crowd.count, est.private(crowd, data.longest)) for crowd in data.crowds]
    columns = []
    for i in range(max(len(batches) for _, batches in mine)):
        there = [(count, batches) for count, batches in mine if i < len(batches)]
        longest = max(int(b.lengths[i]) for _, b in there)
        cells = sum(count * int(b.rows[i] * b.lengths[i]) for count, b in there) * share
        tokens, units = (
            round(sum(count * int(getattr(b, name)[i]) for count, b in there) * share)
            for name in ("tokens", "units")
        )
        rows = max(round(cells / longest), 1)
        columns.append((rows, longest, min(tokens, rows * longest), units))
    return Batches(*np.array(columns, np.int64).T)


@dataclass(frozen=True)
class Plan:
    """
    The three strategies side by side.

    base, tunable: numbers in the model.  break_even: public rows a round below which logits send
    less than parameters, by rank (or what takes its place), head included.
    """

    title: str
    base: int
    tunable: int
    lines: tuple[Line, ...]
    break_even: dict[int, float]
    facts: dict[str, str]
    notes: tuple[str, ...]


SIZE = {"lora": "rank", "adapter": "width", "prompt": "tokens", "prefix": "tokens"}
"""The key that says how large the tunables are."""


def options(experiment: ex.Experiment) -> list[ex.Strategy]:
    """The three strategies as the file has them: ``[strategy]`` for its own, else ``[compare]``."""
    own = experiment.strategy
    listed: list[ex.Strategy] = [
        experiment.compare.parameters, experiment.compare.logits, experiment.compare.activations
    ]  # fmt: skip
    return [own if spec.kind == own.kind else spec for spec in listed]


def look(experiment: ex.Experiment) -> Plan:
    """Plan the experiment. Raises FedllmError for what a run would refuse whatever the strategy."""
    data = sizes(experiment)
    estimator = Estimator(experiment, data.labels)
    lines = tuple(line(estimator, spec, data) for spec in options(experiment))
    return plan_of(experiment, data, estimator, lines)


def plan_of(
    experiment: ex.Experiment, data: Sizes, estimator: Estimator, lines: tuple[Line, ...]
) -> Plan:
    """The plan around these lines."""
    model = estimator.model
    count = sum(tensor.numel() for tensor in model.initial.values())
    rows = sum(len(crowd.train.lengths) * crowd.count for crowd in data.crowds)
    tokens = sum(crowd.train.size.tokens * crowd.count for crowd in data.crowds)
    facts = {
        "model": f"{model.name} ({model.model.config.model_type}, {model.blocks} blocks, width "
                 f"{model.width})",
        "clients": f"{data.clients:,} with {rows / data.clients:,.1f} rows, "
                   f"{tokens / max(rows, 1):.1f} tokens a row",
        "public rows": f"{len(data.public.lengths):,}",
    }  # fmt: skip
    return Plan(
        f"{experiment.name}: plan", model.base_bytes // 4, count, lines,
        even_rows(experiment, data, estimator), facts,
        (*data.notes, *_notes(experiment, estimator)),
    )  # fmt: skip


def even_rows(experiment: ex.Experiment, data: Sizes, estimator: Estimator) -> dict[int, float]:
    """F-04: the break-even number of public rows of each rank, from the actual payload."""
    model, spec = estimator.model, experiment.tunables
    per_row = 1.0
    if not model.classification:
        public = data.public if len(data.public.lengths) else data.crowds[0].train
        per_row = public.size.units / max(public.size.rows, 1)
    now = costs.break_even(model, per_row)
    key = SIZE.get(spec.kind)
    if key is None:
        return {0: now}
    # what travels beside the head is proportional to the rank (an adapter's outer bias is not)
    current = getattr(spec, key)
    head = costs.tunable_bytes(model, [n for n in costs.travelling(model) if n in model.head])
    fixed = head + sum(t.numel() * 4 for n, t in model.initial.items() if n.endswith("up.bias"))
    size = costs.parameters_payload(model)[0]
    ranks = sorted({*(experiment.plan.ranks or RANKS), current})
    return {r: now * (fixed + (size - fixed) * r / current) / size for r in ranks}


RANKS = (2, 4, 8, 16, 32)


def _notes(experiment: ex.Experiment, estimator: Estimator) -> Iterator[str]:
    model = estimator.model
    if estimator.begin:
        yield (
            f"{model.untouched} of {model.blocks} blocks lie below everything that is trained: "
            "they run once for each row (model.cache), spread here over the rounds"
        )
    if experiment.model.precision == "bf16":
        yield "memory is that of float32; bf16 keeps less between forward and backward"
    if model.family is None:
        kind = model.model.config.model_type
        yield f"models of type {kind!r}: memory with attention written out, an upper bound"
    unknown = {c for c in experiment.exchange.codecs.values() if c not in costs.SHARE}
    if unknown:
        yield f"codecs {sorted(unknown)}: their savings are not foreseen, bytes are without them"
