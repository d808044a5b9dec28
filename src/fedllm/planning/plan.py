"""The plan of an experiment: the three strategies side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedllm import costs
from fedllm import experiment as ex
from fedllm.estimates.estimator import Estimator
from fedllm.estimates.lines import Line, line, split_pieces
from fedllm.estimates.sizes import Sizes
from fedllm.planning.sizes import sizes


@dataclass(frozen=True)
class Cutting:
    """
    One way to cut everybody's model: how many clients have each cut, and whose machines lack the
    memory for theirs.
    """

    name: str
    clients: dict[int, int]
    line: Line
    small: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """
    The three strategies side by side.

    base, tunable: numbers in the model.  break_even: public rows a round below which logits send
    less than parameters, by rank (or what takes its place), head included.  cuttings: where cuts go
    by machines, these beside every cut that is the same for all.
    """

    title: str
    base: int
    tunable: int
    lines: tuple[Line, ...]
    break_even: dict[int, float]
    facts: dict[str, str]
    notes: tuple[str, ...]
    cuttings: tuple[Cutting, ...] = ()


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
    return plan_of(experiment, data, estimator, lines, tuple(_cuttings(estimator, data)))


def _cuttings(estimator: Estimator, data: Sizes) -> Iterator[Cutting]:
    """Cuts by machines, where the file asks for them, then each cut for everybody."""
    (spec,) = (one for one in options(estimator.experiment) if isinstance(one, ex.Activations))
    if spec.cut != "auto":
        return
    fixed = [spec.model_copy(update={"cut": cut}) for cut in range(1, estimator.model.blocks)]
    for one in (spec, *fixed):
        found = line(estimator, one, data)
        if found.refused:
            continue
        clients: dict[int, int] = {}
        for crowd, cut in split_pieces(estimator, one, data):
            clients[cut] = clients.get(cut, 0) + crowd.count
        small = (s.name for s in found.shares if s.limit is not None and s.memory > s.limit)
        name = "by machine" if one is spec else f"{one.cut} for all"
        yield Cutting(name, dict(sorted(clients.items())), found, tuple(small))


def plan_of(
    experiment: ex.Experiment, data: Sizes, estimator: Estimator, lines: tuple[Line, ...],
    cuttings: tuple[Cutting, ...] = (),
) -> Plan:  # fmt: skip
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
        (*data.notes, *_notes(experiment, estimator)), cuttings,
    )  # fmt: skip


def even_rows(experiment: ex.Experiment, data: Sizes, estimator: Estimator) -> dict[int, float]:
    """F-04: the break-even number of public rows of each rank, from the actual payload."""
    model, spec = estimator.model, experiment.tunables
    per_row = 1.0
    if not model.classification:
        public = data.public if len(data.public.lengths) else data.crowds[0].train
        per_row = public.size.units / max(public.size.rows, 1)
    codecs = dict(experiment.exchange.codecs)
    (taught,) = (one for one in options(experiment) if isinstance(one, ex.Logits))
    (sent,) = (one for one in options(experiment) if isinstance(one, ex.Parameters))
    now = costs.break_even(model, per_row, codecs, taught, sent)  # type: ignore[arg-type]
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
    if isinstance(experiment.strategy, ex.Parameters) and experiment.strategy.prune is not None:
        yield "strategy.prune: bytes and FLOPs are those of the ranks at the start"
    if isinstance(experiment.tunables, ex.Lora) and experiment.tunables.growth is not None:
        yield "tunables.growth: bytes and FLOPs are those of growing as early as it can"
    if experiment.model.precision == "bf16":
        yield "memory is that of float32; bf16 keeps less between forward and backward"
    if model.family is None:
        kind = model.model.config.model_type
        yield f"models of type {kind!r}: memory with attention written out, an upper bound"
    if open_ended := costs.inexact(experiment.exchange.codecs):  # type: ignore[arg-type]
        yield (
            f"codecs {open_ended}: what they save depends on the data, bytes are the most that "
            "they can be"
        )
