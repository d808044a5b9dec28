"""
What a run will cost, by formula; tests hold it against what is counted.

Units: bytes of payload (tensor data, no headers), FLOPs, rows.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fedllm import experiment as ex
from fedllm.codecs import Codecs, chosen, codec
from fedllm.codecs.base import SIZE, Shape, weight
from fedllm.flat import Ints
from fedllm.lora import shape_at
from fedllm.message import KINDS, ORDER, PART, Fact, Message, briefly, pack
from fedllm.models.core import Core, Part, span
from fedllm.models.flops import FlopCounter, count
from fedllm.models.loading import LanguageModel, load, load_config
from fedllm.models.tunables import blocks_of

FLOAT = 4
INT = 4
Roles = dict[str, int]
"""Bytes by the role of a tensor."""
Shapes = Mapping[str, Mapping[str, Shape]]
"""Of the tensors of one frame: by role, by name."""


@dataclass(frozen=True)
class ClientSize:
    """
    What a client's costs depend on: rows and tokens of one pass over its training rows, and
    predicted tokens (for classification: rows).
    """

    rows: int
    tokens: int
    units: int


@dataclass(frozen=True)
class PublicSize:
    """The same of a round's public rows."""

    rows: int
    tokens: int
    units: int


def tunable_bytes(
    model: LanguageModel, names: Sequence[str] | None = None, rank: int | None = None
) -> int:
    """Bytes of the tunables (4 per number), of all or of these; rank: of LoRA, if another."""
    return sum(math.prod(shape) * FLOAT for shape in shapes(model, names, rank).values())


def shapes(
    model: LanguageModel, names: Sequence[str] | None = None, rank: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Of the tunables, as for ``tunable_bytes``."""
    found = {n: tuple(model.initial[n].shape) for n in (model.initial if names is None else names)}
    return found if rank is None else {n: shape_at(n, s, rank) for n, s in found.items()}


def travelling(model: LanguageModel) -> list[str]:
    """Names of the tunables that are sent: all but a personal head."""
    if model.spec.head == "personal":
        return [name for name in model.initial if name not in model.head]
    return list(model.initial)


def parameters_roles(
    model: LanguageModel, spec: ex.Parameters | None = None, rank: int | None = None
) -> Roles:
    """
    Bytes each way, by role: the tunables, and as many control variates under SCAFFOLD.

    rank: of LoRA, if another; 0: what is trained before there is any.
    """
    if rank == 0 and model.before is not None:
        model, rank = model.before, None
    size = tunable_bytes(model, travelling(model), rank)
    scaffold = spec is not None and isinstance(spec.client, ex.Scaffold)
    return {"parameter": size} | ({"gradient": size} if scaffold else {})


def parameters_payload(
    model: LanguageModel, spec: ex.Parameters | None = None, rank: int | None = None
) -> tuple[int, int]:
    """(up, down) of one client and round: the same each way; as for ``parameters_roles``."""
    size = sum(parameters_roles(model, spec, rank).values())
    return size, size


def knowledge_shapes(
    spec: ex.Logits, public: PublicSize, model: LanguageModel
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and role of what a model says of public rows (``strategies.forms``); all of 4 bytes."""
    outputs = model.outputs
    units, k = public.units, min(spec.top_k or ex.TOP_K, outputs)
    forms: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {
        "logits": {"logits": ((units, outputs), "logit")},
        "labels": {"labels": ((units, outputs), "logit")},
        "features": {"features": ((units, model.width), "feature")},
        "statistics": {"best": ((units,), "index"), "chance": ((units, 1), "logit")},
        "top-k": {"index": ((units, k), "index"), "value": ((units, k), "logit")},
    }
    found = forms[spec.form]
    if spec.knowledge in ("loss", "least-loss"):
        found["loss"] = ((public.rows,), "statistic")
    return found


def by_role(shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, dict[str, Shape]]:
    """Shapes and roles by name -> shapes by role and name."""
    found: dict[str, dict[str, Shape]] = {}
    for name, (shape, role) in shapes.items():
        found.setdefault(role, {})[name] = shape
    return found


def knowledge_roles(spec: ex.Logits, public: PublicSize, model: LanguageModel) -> Roles:
    """Bytes by role of what one model says of public rows."""
    found: Roles = {}
    for shape, role in knowledge_shapes(spec, public, model).values():
        found[role] = found.get(role, 0) + math.prod(shape) * FLOAT
    return found


def logits_payload(
    model: LanguageModel, public: PublicSize, spec: ex.Logits | None = None
) -> tuple[int, int]:
    """(up, down): what is said of the rows each way, and twice the chosen rows' numbers down."""
    said = sum(knowledge_roles(spec or ex.Logits(), public, model).values())
    return said, said + 2 * public.rows * INT


def activations_payload(
    model: LanguageModel,
    options: ex.Activations,
    client: ClientSize,
    epochs: int,
    client_half: int,
    averages: int = 1,
    uploads: int | None = None,
) -> tuple[int, int]:
    """
    (up, down): width floats a token each way (twice each way with labels at the client, and twice
    more each way for every block split inside but the first), lengths and labels up, and the client
    half's tunables for each average.

    client: its tokens are those that cross (``kept``), each with its place where some do not.
    client_half: bytes of the client's tunables.  averages: how often they are averaged a round.
    uploads: how many of these this client had a batch for (None: all).
    """
    up, down = activations_roles(model, options, client, epochs, client_half, averages, uploads)
    return sum(up.values()), sum(down.values())


def activations_roles(
    model: LanguageModel,
    options: ex.Activations,
    client: ClientSize,
    epochs: int,
    client_half: int,
    averages: int = 1,
    uploads: int | None = None,
) -> tuple[Roles, Roles]:
    """``activations_payload``, by the role of the tensors."""
    prompt = getattr(model.spec, "tokens", 0) if model.spec.kind == "prompt" else 0
    tokens = (client.tokens + prompt * client.rows) * epochs
    hidden = tokens * model.width * FLOAT
    home = options.labels == "client"
    more = max(options.inside - 1, 0) * hidden  # of blocks that are split inside, but the first
    per_pass = client.rows if model.classification else client.tokens
    up = {
        "activation": hidden + more, "gradient": (hidden if home else 0) + more,
        "mask": client.rows * epochs * INT, "label": 0 if home else per_pass * epochs * INT,
        "parameter": (averages if uploads is None else uploads) * client_half,
        "index": tokens * INT if options.keep_tokens < 1 else 0,
    }  # fmt: skip
    down = {
        "activation": (hidden if home else 0) + more, "gradient": hidden + more,
        "parameter": averages * client_half,
    }  # fmt: skip
    return up, down


def kept(lengths: Ints, share: float) -> Ints:
    """How many tokens of rows of these lengths cross (``strategy.keep_tokens``); at least one."""
    return np.maximum(np.ceil(lengths * share - 1e-9), 1).astype(np.int64)


def share(codecs: Codecs, role: str, shapes: Mapping[str, Shape], way: str) -> float:
    """
    Bytes of tensors of this role behind their codecs, of those before (4 a number).

    Where the data decides, the most that it can be; a codec that changes over the rounds is taken
    half-way.
    """
    before = behind = 0
    for name, shape in shapes.items():
        used = chosen(codecs, role, name, way)
        dense = math.prod(shape) * FLOAT
        before += dense
        behind += dense if used == "none" else weight(codec(used, 0.5).layout(shape))
    return behind / before if before else 1.0


LARGE: Shape = (1000, 1000)  # for a tensor that nobody knows the shape of


def coded(roles: Roles, codecs: Codecs, shapes: Shapes | None = None, way: str = "up") -> int:
    """Bytes of these roles behind the codecs; shapes: of the tensors that these bytes are."""
    known = shapes or {}
    return round(
        sum(n * share(codecs, r, known.get(r, {"": LARGE}), way) for r, n in roles.items())
    )


def inexact(codecs: Codecs) -> list[str]:
    """Those of these codecs whose bytes depend on the data."""
    named = {n for v in codecs.values() for n in ([v] if isinstance(v, str) else v.values())}
    return sorted(name for name in named if not codec(name).exact)


def loses(name: str) -> str:
    """What a codec takes from a number, in words."""
    return codec(name).loses


def header(
    sent: Mapping[str, Sequence[int]], role: str | Mapping[str, str] = "", step: str = "a1",
    task: str = "", facts: dict[str, Fact] | None = None, run: str = "", client: str = "",
    codecs: Codecs | None = None, way: str = "up",
) -> int:  # fmt: skip
    """
    Bytes of a frame that are no tensor data: names, shapes and facts, and who speaks.

    sent: shapes of four-byte tensors by name, all of one role, or each of its own.  codecs: they
    travel in parts, of which each has a name and a shape, too.
    """
    message = Message(
        step, task, {}, {}, facts or {}, client, "1.1.10", 1, run, 1, "0" * 16
    )  # fmt: skip
    parts: list[tuple[str, str, Shape, torch.dtype]] = []
    used: dict[str, str] = {}
    for name, size in sent.items():
        own = role if isinstance(role, str) else role[name]
        stages = chosen(codecs or {}, own, name, way)
        if stages == "none":
            parts.append((name, own, tuple(size), torch.float32))
            continue
        used[name] = stages
        layout = codec(stages, 0.5).layout(tuple(size))
        parts += [(f"{name}{PART}{part}", own, *about) for part, about in layout.items()]
    told = _written({name: own for name, own, _, _ in parts}) + _written(used)
    shapes, end = 0, 0
    for name, _, shape, kind in sorted(parts, key=lambda part: (ORDER.index(part[3]), part[0])):
        begin, end = end, end + math.prod(shape) * SIZE[kind]
        listed = ",".join(map(str, shape))
        place = f'{{"dtype":"{KINDS[kind]}","shape":[{listed}],"data_offsets":[{begin},{end}]}}'
        shapes += len(f'"{name}":{place},')
    text = -(-(max(shapes - 1, 0) + 2) // 8) * 8
    digits = len(str(8 + text + end)) - len("16")
    return len(pack(message)) + told + digits + text - 8


def _written(said: Mapping[str, str]) -> int:
    """Bytes that these take in a header, where {} stands without them."""
    return len(json.dumps(briefly(said), separators=(",", ":"))) - len("{}")


def break_even(
    model: LanguageModel, tokens: float = 1.0, codecs: Codecs | None = None,
    spec: ex.Logits | None = None, sent: ex.Parameters | None = None,
) -> float:  # fmt: skip
    """
    Public rows a round below which logits send less than parameters, both directions together.

    Units of ``tokens`` predicted positions a row (classification: 1), each side behind its codec,
    that of logits as of a thousand units. The head is included, where it travels.  spec: the form
    of what is said; none: all logits.  sent: how parameters are trained; none: plainly.
    """
    taught, used = spec or ex.Logits(), codecs or {}
    said = knowledge_roles(taught, PublicSize(1, 1, 1), model)
    lost = said.pop("statistic", 0)
    many = by_role(knowledge_shapes(taught, PublicSize(1000, 1000, 1000), model))
    unit = sum(size * share(used, role, many[role], way) for role, size in said.items()
               for way in ex.WAYS)  # fmt: skip
    row = tokens * unit + 2 * lost + 2 * INT
    mine = shapes(model, travelling(model))  # of control variates, too
    paid = parameters_roles(model, sent).items()
    return sum(size * share(used, role, mine, way) for role, size in paid for way in ex.WAYS) / row


def batches(rows: int, size: int) -> int:
    """Batches of one pass."""
    return math.ceil(rows / size)


def bound_steps(client: ClientSize, training: ex.Training, rounds: int) -> int:
    """Optimizer steps of a client alone."""
    return batches(client.rows, training.batch_size) * training.epochs * rounds


def disk(model: LanguageModel, spec: ex.Strategy, clients: int) -> int:
    """Bytes of a run folder, roughly: two checkpoints of all states, the adapter, the ledger."""
    own = max(tunable_bytes(one) for one in (model, model.before) if one is not None)
    common = 1
    if isinstance(spec, ex.Parameters):
        common += {"average": 0, "momentum": 1}.get(spec.server.kind, 2)
        common += 1 + clients if isinstance(spec.client, ex.Scaffold) else 0
    kept = {"parameters": common, "logits": clients + 1, "activations": 3 + clients,
            "standalone": 3 * clients, "centralized": 3}[spec.kind]  # fmt: skip
    return 2 * kept * own + own + 200_000


@dataclass(frozen=True)
class Run:
    """Neighbouring blocks that cost the same: how many, and whether they hold tunables."""

    blocks: int
    trained: bool


@dataclass(frozen=True)
class Small:
    """
    A model with fewer blocks, one term of a sum that stands for the whole one.

    cut, begin: where the whole one's lie in it.
    """

    factor: int
    model: LanguageModel
    cut: float
    begin: float

    def part(self, part: Part) -> Core:
        """One side, as ``LanguageModel.part``; blocks below ``begin`` count as run before."""
        return self.model.part(part, self.cut, self.begin)


class Blueprint:
    """
    A model from its configuration alone, on torch's meta device, and small versions of it.

    Whatever costs add up to block by block (FLOPs, bytes of weights and of what a pass keeps) is
    linear in the length of each run of equal blocks. So it is found out on models whose runs are
    short, and extended.
    """

    def __init__(self, model: ex.Model, task: ex.Task, tunables: ex.Tunables, labels: int) -> None:
        """Raises FedllmError where there is no such model, or the tunables do not fit it."""
        self.spec, self.task, self.tunables, self.labels = model, task, tunables, labels
        self.whole = load(model, task, tunables, labels, 0, meta=True)
        self._config = load_config(model)
        self._small: dict[tuple[Run, ...], LanguageModel] = {}
        self._terms: dict[tuple[Part, float, float, int], list[Small]] = {}
        self._flops: dict[int, dict[tuple[object, ...], int]] = {}

    @cached_property
    def trained(self) -> frozenset[int]:
        """Numbers of the blocks that tunables are put into."""
        if isinstance(self.tunables, ex.Lora | ex.Adapter | ex.Sparse):
            return frozenset(blocks_of(self.tunables, SimpleNamespace(config=self._config)))
        return frozenset(range(self.whole.blocks))

    def small(
        self, part: Part, cut: float = 0, begin: float = 0, more: int = 0
    ) -> list[Small]:  # fmt: skip
        """
        Models whose costs of this part, times their factors, sum up to the whole one's.

        more: blocks that each run keeps beyond the fewest, where neighbours matter.
        """
        if self.whole.family is None:  # nobody knows which of its blocks are alike
            return [Small(1, self.whole, cut, begin)]
        key = (part, cut, begin, more)
        if key not in self._terms:
            self._terms[key] = self._shortened(*key)
        return self._terms[key]

    def _shortened(self, part: Part, cut: float, begin: float, more: int) -> list[Small]:
        blocks = self.whole.blocks
        # a block that is split inside stands for itself
        around = {end(place) for place in (begin, cut) for end in (math.floor, math.ceil)}
        marks = sorted({0, *around, blocks})
        stretches = [
            (low, Run(len(list(same)), held))
            for low, high in pairwise(marks)
            for held, same in groupby(range(low, high), self.trained.__contains__)
        ]
        runs = [run for _, run in stretches]
        # the last block is one of a kind, and so may the first trained one be
        short = [min(run.blocks, 1 + (run is runs[-1]) + more) for run in runs]
        first, last = span(part, cut, begin, blocks)
        mine = [
            i for i, (low, run) in enumerate(stretches) if first < low + run.blocks and low < last
        ]  # fmt: skip
        spare = {i: runs[i].blocks - short[i] for i in mine if runs[i].blocks > short[i]}
        found = [self._one(1 - sum(spare.values()), stretches, short, cut, begin)]
        for i, factor in spare.items():
            longer = [n + (j == i) for j, n in enumerate(short)]
            found.append(self._one(factor, stretches, longer, cut, begin))
        return [one for one in found if one.factor]

    def _one(
        self, factor: int, stretches: Sequence[tuple[int, Run]], sizes: Sequence[int], cut: float,
        begin: float,
    ) -> Small:  # fmt: skip
        """The term with runs of these lengths."""
        kept = tuple(Run(n, run.trained) for n, (_, run) in zip(sizes, stretches, strict=True))

        def place(mark: float) -> float:
            whole, rest = divmod(mark, 1)
            below = (n for n, (low, _) in zip(sizes, stretches, strict=True) if low < whole)
            return sum(below) + rest

        return Small(factor, self._model(kept), place(cut), place(begin))

    def _model(self, runs: tuple[Run, ...]) -> LanguageModel:
        """A model of these runs; as many blocks and the same ones trained: the same model."""
        joined = tuple(
            Run(sum(run.blocks for run in same), held)
            for held, same in ((h, list(g)) for h, g in groupby(runs, lambda run: run.trained))
        )
        if joined not in self._small:
            self._small[joined] = self._load(joined)
        return self._small[joined]

    def _load(self, runs: tuple[Run, ...]) -> LanguageModel:
        spec: Any = self.tunables
        flat = [run.trained for run in runs for _ in range(run.blocks)]
        if getattr(spec, "layers", ()):
            spec = spec.model_copy(update={"layers": tuple(i for i, t in enumerate(flat) if t)})
        config = copy.deepcopy(self._config)
        kinds = getattr(config, "layer_types", None)
        config.num_hidden_layers = len(flat)
        if kinds:
            config.layer_types = list(kinds)[: len(flat)]
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            return load(self.spec, self.task, spec, self.labels, 0, folder, meta=True)

    def flops(
        self, part: Part, length: int, backward: bool, cut: float = 0, begin: float = 0,
        selected: int = 0, input_grad: bool = False, once: bool = False,
    ) -> int:  # fmt: skip
        """
        FLOPs of a row of ``length`` tokens with so many token logits in this part.

        once: count this length; else it follows from four others, good for all lengths.
        """
        total = 0
        for one in self.small(part, cut, begin):
            core, trained = one.part(part), frozenset(one.model.initial)
            cache = self._flops.setdefault(id(one.model), {})
            if once:  # under the counter's own key
                key = (core.key, length, selected, backward, input_grad)
                if key not in cache:
                    cache[key] = count(core, trained, length, 1, selected, backward, input_grad)
                found = cache[key]
            else:
                counter = FlopCounter(core, trained, cache)
                found = counter([(1, length)], selected, backward, input_grad)
            total += one.factor * found
        return total
