"""``fedllm check``: what would run, and what it would cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm import compare, costs, federation
from fedllm import experiment as ex
from fedllm.costs import ClientSize, PublicSize
from fedllm.data.examples import Examples
from fedllm.models.core import HALF
from fedllm.models.loading import LanguageModel
from fedllm.report.tables import amount, size
from fedllm.round import Federation
from fedllm.summary import variant
from fedllm.training.jobs import Tasked
from fedllm.training.meter import Meter, clock_of, held_bytes


def _size(examples: Examples) -> ClientSize:
    return ClientSize(len(examples), examples.tokens, int(examples.targets.sum()))


def _speed(federation_: Federation) -> tuple[float, int, float]:
    """(FLOP/s, peak bytes, FLOPs a token) of training, from three real steps of one client."""
    from fedllm.training.cohort import alone
    from fedllm.training.jobs import Fit
    from fedllm.training.learner import Span
    from fedllm.training.objectives import cross_entropy

    site = next(iter(federation_.worker.sites.values()))
    plan = site.plan(site.train, "check")
    number = min(4, plan.per_pass)
    meter = Meter(clock=clock_of(site.model.device))
    cost = meter.cost("check")
    seconds, flops, tokens = [], [], []

    def steps() -> Tasked[None]:
        for batch in [*range(number)] * 2:  # every shape once to count, once to time
            start, done, seen = time.perf_counter(), cost.flops, cost.tokens
            yield Fit(
                site.model, site.model.initial, plan, cross_entropy, site.setup.training, batch,
                batch + 1, Span(0, 1), meter, "check",
            )  # fmt: skip
            seconds.append(time.perf_counter() - start)
            flops.append(cost.flops - done)
            tokens.append(cost.tokens - seen)

    alone(steps())
    rates = [f / s for f, s in zip(flops[number:], seconds[number:], strict=True)]
    per_token = sum(flops[number:]) / sum(tokens[number:])
    return float(np.median(rates)), cost.peak_memory, per_token


def look(experiment: ex.Experiment) -> dict[str, Any]:
    """
    Prepare everything, run three training steps to learn the speed, and estimate the rest.

    Raises FedllmError for whatever a run would refuse.
    """
    seed = experiment.seeds[0]
    prepared = federation.prepare(experiment, seed)
    anew = experiment.model.model_copy(update={"cache": False})
    built = federation.check(experiment.replace(model=anew), seed, prepared)
    model = next(iter(built.worker.sites.values())).model
    speed, memory, per_token = _speed(built)
    sizes = {name: _size(data.train) for name, data in prepared.clients.items()}
    fields = ("rows", "tokens", "units")
    everybody = ClientSize(*(sum(getattr(s, f) for s in sizes.values()) for f in fields))
    mean = ClientSize(*(round(getattr(everybody, f) / len(sizes)) for f in fields))
    listed = [part for part in compare.parts(experiment) if not part.equal_steps] if (
        experiment.public.size or experiment.public.source
        or "logits" not in experiment.compare.strategies
    ) else [compare.Part(experiment.strategy.kind, experiment.strategy)]  # fmt: skip
    spec = experiment.tunables
    changing = isinstance(spec, ex.Lora) and bool(spec.varies)
    if changing:  # other strategies have one rank
        listed = []
    if all(part.strategy != experiment.strategy for part in listed):
        listed = [compare.Part(experiment.strategy.kind, experiment.strategy), *listed]
    rows = []
    public = _public(experiment, prepared.public)
    for part in listed:
        one = experiment.replace(strategy=part.strategy)
        central = part.strategy.kind == "centralized"
        whose, whom = (everybody, ["all"]) if central else (mean, list(sizes))
        rows.append(_line(one, model, whose, public, whom, per_token, speed))
    notes = list(prepared.notes)
    if model.untouched and experiment.model.cache:
        notes.append(
            f"{model.untouched} of {model.blocks} blocks are below everything that is trained: "
            "they run once for each row, so FLOPs and seconds will be lower than said here"
        )
    if changing:
        notes.append("clients' LoRA differs or changes: FLOPs and seconds are of the largest")
    labels = f"{len(prepared.labels)} labels" if prepared.labels else "no labels"
    train = [s.rows for s in sizes.values()]
    tests = [data.test.cases for data in prepared.clients.values()]
    facts = {
        "model": f"{model.name} ({model.model.config.model_type}, {model.blocks} blocks, width "
                 f"{model.width})",
        "tunables": f"{model.spec.kind}: {sum(t.numel() for t in model.initial.values()):,} numbers"
                    f" ({size(costs.tunable_bytes(model))}), base frozen: {size(model.base_bytes)}",
        "task": f"{experiment.task.kind}, {labels}, at most {prepared.longest} tokens",
        "clients": f"{len(sizes)} with {min(train)} to {max(train)} training rows, "
                   f"{mean.tokens / max(mean.rows, 1):.1f} tokens a row, {sum(tests)} "
                   f"{experiment.evaluation.on} rows in all",
        "public": f"{public.rows} rows a round of {len(prepared.public)}" if prepared.public
                  else "none",
        "rounds": f"{experiment.rounds} rounds, seeds {', '.join(map(str, experiment.seeds))}",
        "disk": "about " + size(sum(
            costs.disk(model, part.strategy, len(sizes)) for part in listed
        ) * len(experiment.seeds)),
        "memory": f"a training step holds {size(memory)} of tensors",
        "this machine": f"{speed / 1e9:.1f} GFLOP/s in a training step",
    }  # fmt: skip
    return {
        "title": f"{experiment.name}: nothing wrong found",
        "facts": facts,
        "header": ["run", "up", "down", "FLOPs", "seconds (all clients and server, whole run)"],
        "rows": rows,
        "caption": "payload by formula; FLOPs and time from three measured steps; evaluation apart",
        "notes": notes,
    }


def _public(experiment: ex.Experiment, public: Examples | None) -> PublicSize:
    if public is None:
        return PublicSize(0, 0, 0)
    rows = min(experiment.public.rows_per_round or len(public), len(public))
    share = rows / max(len(public), 1)
    return PublicSize(rows, round(public.tokens * share), round(int(public.targets.sum()) * share))


def _mean_payload(
    experiment: ex.Experiment, model: LanguageModel, spec: ex.Parameters, names: Sequence[str]
) -> float:
    """Bytes that a client sends, and gets: the mean of the clients and rounds."""
    tunables = experiment.tunables
    if not isinstance(tunables, ex.Lora):
        return costs.parameters_payload(model, spec)[0]
    modules = tunables.modules_of(names)
    own = {name: model.only(modules[name]) if name in modules else model for name in names}

    def within(name: str, most: int) -> int:
        return own[name].within(most)

    paid = (part * costs.parameters_payload(own[name], spec, rank)[0]
            for name, ranks in tunables.shares(names, experiment.rounds, within).items()
            for rank, part in ranks.items())  # fmt: skip
    return sum(paid) / len(names)


def _line(
    experiment: ex.Experiment, model: LanguageModel, client: ClientSize, public: PublicSize,
    whom: Sequence[str], per_token: float, speed: float,
) -> list[str]:  # fmt: skip
    spec, epochs = experiment.strategy, experiment.training.epochs
    train = client.tokens * epochs * per_token
    up: float
    down: float
    up = down = server = 0.0
    if isinstance(spec, ex.Parameters):
        up = down = _mean_payload(experiment, model, spec, whom)
    elif isinstance(spec, ex.Logits):
        up, down = costs.logits_payload(model, public, spec)
        # distillation costs as much a token as training, a forward pass about 40 % of it
        extra = public.tokens * per_token * spec.epochs
        server = extra + 0.4 * public.tokens * per_token if spec.server_model else 0.0
        train += extra + 0.4 * public.tokens * per_token
    elif isinstance(spec, ex.Activations):
        from fedllm.strategies.activations import at_client, check_cut

        listed = list(spec.cut.values() if isinstance(spec.cut, dict) else spec.cut) \
            if not isinstance(spec.cut, int | str) else [0]  # fmt: skip
        each = [check_cut(spec, model, own) for own in listed]
        cut = round(sum(each) / len(each))
        half = costs.tunable_bytes(model, at_client(spec, model, cut))
        number = costs.batches(client.rows, experiment.training.batch_size) * epochs
        averages = 1 + (number - 1) // spec.average_every if spec.average_every else 1
        up, down = costs.activations_payload(model, spec, client, epochs, half, averages)
        attention, block = (
            held_bytes(model.part("body", cut - 1 + part, cut - 1)) for part in (HALF, 1)
        )  # as good as any other block's
        share = (cut + spec.inside * attention / block) / model.blocks
        server = train * (1 - share) * len(whom)
        train *= share
    seconds = (train * len(whom) + server) * experiment.rounds / speed
    return [variant(experiment), size(up), size(down), amount("flops", train), f"{seconds:.0f}"]
