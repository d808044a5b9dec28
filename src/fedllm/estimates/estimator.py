"""What passes over a model cost, without weights: FLOPs and bytes from torch's meta device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedllm import costs
from fedllm import experiment as ex
from fedllm.costs import Blueprint
from fedllm.errors import FedllmError
from fedllm.estimates.sizes import Batches, Crowd, Rows, Shape, Sizes
from fedllm.models.core import Core, Part
from fedllm.models.flops import written
from fedllm.models.inputs import Inputs
from fedllm.models.loading import LanguageModel, calm
from fedllm.streams import stream
from fedllm.training.batches import order
from fedllm.training.fit import LOGITS
from fedllm.training.meter import LiveBytes, held_bytes
from fedllm.training.objectives import Distillation, Objective, cross_entropy

NF4 = 33 / 64  # bytes of a weight in 4 bits: half a byte, and a scale for each 64
Kind = Literal["train", "distil", "forward", "half"]


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
        self._others: dict[tuple[int | None, ex.Modules | None], Estimator] = {}
        self.labels = labels
        self.shapes = Blueprint(experiment.model, experiment.task, experiment.tunables, labels)
        self.anchors = anchors or ((1, self.shapes),)
        self.model = self.shapes.whole
        self._per_row: dict[tuple[object, ...], int] = {}
        self.few = False  # so few lengths that each had better be counted by itself
        self._private: dict[tuple[Crowd, int | None], Batches] = {}
        self._joined: tuple[tuple[Crowd, ...], Batches] = ((), Batches.joined([]))
        self._held: dict[tuple[object, ...], int] = {}  # both by a part's key
        self._reserved: dict[tuple[object, ...], int] = {}
        self._lives: dict[tuple[object, ...], tuple[int, int, int]] = {}

    def at(self, rank: int | None, modules: ex.Modules | None = None) -> Estimator:
        """
        The same with LoRA of this rank in these modules.

        rank: 0: before there is any; None: as it is.  modules: None: all. Raises FedllmError for
        what LoRA is not around.
        """
        spec = self.experiment.tunables
        if not isinstance(spec, ex.Lora) or (rank in (None, spec.rank) and modules is None):
            return self
        key = (rank, modules)
        if key not in self._others:
            if modules is not None:
                self.model.only(modules)  # refuses as a run does
            plain = spec.even(rank).only(modules)
            experiment = self.experiment.replace(tunables=spec.first if rank == 0 else plain)
            self._others[key] = Estimator(experiment, self.labels)
        found = self._others[key]
        found.few = self.few
        return found

    # FLOPs ------------------------------------------------------------------------------------

    def flops(
        self, batches: Batches, part: Part, backward: bool, cut: float = 0, begin: float = 0,
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
        self, part: Part, length: int, backward: bool, cut: float, begin: float, input_grad: bool,
        once: bool, selected: int = 0,
    ) -> int:  # fmt: skip
        key = (part, length, backward, cut, begin, input_grad, selected)
        if key not in self._per_row:
            with self._without_values():
                self._per_row[key] = sum(
                    factor * shapes.flops(
                        part, length, backward, cut, begin, selected, input_grad, once
                    )
                    for factor, shapes in self.anchors
                )  # fmt: skip
        return self._per_row[key]

    @contextmanager
    def _without_values(self) -> Iterator[None]:
        """What a model's own code makes of meta tensors; an error of it becomes ours."""
        try:
            yield
        except Exception as error:
            said = str(error).strip().splitlines()
            raise FedllmError(
                f"model.name = {self.experiment.model.name!r}: a model of type "
                f"{self.model.model.config.model_type!r} and these sizes does not run without "
                f"values ({type(error).__name__}: {said[0] if said else ''}), so it cannot be "
                "planned; correct its config.json, or run one round and see what that cost"
            ) from error

    # memory -----------------------------------------------------------------------------------

    def live(
        self, kind: Kind, part: Part, shape: Shape, cut: float = 0, begin: float = 0,
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
                with self._without_values():
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
        if core.key not in self._held:
            self._held[core.key] = self._weights(core)
        return self._held[core.key]

    def _weights(self, core: Core) -> int:
        if self.experiment.model.quantization == "none":
            return held_bytes(core)
        return round(sum(
            p.numel() * (NF4 if self._packed(name, p) else p.element_size())
            for name, p in core.named_parameters()
        ))  # fmt: skip

    def _packed(self, name: str, weight: Tensor) -> bool:
        family = self.model.family
        inside = family is None or f"{family.backbone}.{family.blocks}." in name
        return (
            inside
            and weight.ndim == 2
            and ".lora_" not in name
            and (name not in self.model.initial)
        )

    def reserved(self, core: Core) -> int:
        """Bytes of a part's trained copies and their optimizer."""
        if core.key not in self._reserved:
            names = self.model.tunables_of(core)
            self._reserved[core.key] = self._slots() * costs.tunable_bytes(self.model, names)
        return self._reserved[core.key]

    def _slots(self) -> int:
        if self.training.optimizer == "sgd":
            return 2 if self.training.momentum else 1
        return 3

    # how rows become batches ------------------------------------------------------------------

    def heaviest(self, data: Sizes) -> Batches:
        """All batches that come to a server of activations: the largest decides on its memory."""
        crowds, found = self._joined
        if crowds is not data.crowds:
            found = Batches.joined([self.travelled(crowd) for crowd in data.crowds])
            self._joined = data.crowds, found
        return found

    def private(self, crowd: Crowd, longest: int) -> Batches:
        """The batches of a client's first round."""
        return self._batches(crowd, longest if self.training.padding == "fixed" else None)

    def travelled(self, crowd: Crowd) -> Batches:
        """The same as a server of activations has them: packed, so no longer than their rows."""
        return self._batches(crowd, None)

    def _batches(self, crowd: Crowd, pad_to: int | None) -> Batches:
        if (crowd, pad_to) not in self._private:
            self._private[crowd, pad_to] = Batches.of(crowd.train, self._groups(crowd), pad_to)
        return self._private[crowd, pad_to]

    def _groups(self, crowd: Crowd) -> list[list[int]]:
        training, seed = self.training, self.experiment.seeds[0]
        groups: list[list[int]] = []
        for number in range(training.epochs):
            rng = stream(seed, crowd.client, "private", "order", number)
            groups += order(crowd.train.lengths, training.batch_size, training.padding, rng)
        return groups

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
        alone = written(core) if core.family is None else nullcontext()
        with torch.set_grad_enabled(back), _drawing(model, training, back), alone:
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
    hidden = goal.form == "features"
    teacher = torch.empty((units, model.width if hidden else model.outputs), device="meta")
    return Distillation(teacher, goal.temperature, goal.loss, hidden=hidden)


def _train(model: LanguageModel, core: Core, inputs: Inputs, objective: Objective) -> None:
    """What ``training.fit`` does with one batch, chunk by chunk where logits are many."""
    features = core.features(inputs)
    count = _units(inputs)
    targets = torch.zeros(count, dtype=torch.long, device="meta")
    whole = any(name.startswith("model.lm_head.") for name in model.initial)
    if not core.decoder_head or whole or count * model.outputs <= LOGITS:
        loss = objective(core.scores(features), targets, targets, features).mean()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return
    leaf = features.detach().requires_grad_(features.requires_grad)
    size = max(LOGITS // model.outputs, 1)
    for i in range(0, count, size):
        some, part = slice(i, i + size), leaf[i : i + size]
        value = objective(core.scores(part), targets[some], targets[some], part).sum() / count
        if value.requires_grad:
            value.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    if leaf.grad is not None:
        (features * leaf.grad).sum().backward()  # type: ignore[no-untyped-call]
