"""What a round costs under one strategy: bytes, FLOPs, memory and seconds of every client."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import ValidationError

from fedllm import costs
from fedllm import experiment as ex
from fedllm.costs import PublicSize, Roles
from fedllm.errors import FedllmError
from fedllm.estimates.estimator import Estimator
from fedllm.estimates.makespan import Choices, Way, choose
from fedllm.estimates.sizes import Batches, Crowd, Rows, Sizes
from fedllm.models.core import Piece, pieces
from fedllm.models.loading import LanguageModel
from fedllm.strategies.activations import at_client, check_alike, check_cut
from fedllm.strategies.corrections import SLOT
from fedllm.strategies.logits import NO_PUBLIC
from fedllm.summary import variant
from fedllm.training.halves import watching


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
    messages: float = 0.0
    shares: tuple[Share, ...] = field(default=(), repr=False)
    refused: str = ""


def line(estimator: Estimator, spec: ex.Strategy, data: Sizes) -> Line:
    """What a round costs under this strategy; one that cannot run says why."""
    makers: dict[str, Callable[[Estimator, Any, Sizes, str], Line]] = {
        "parameters": _parameters, "logits": _logits, "activations": _activations,
    }  # fmt: skip
    estimator.few = data.few
    named = variant(estimator.experiment.model_copy(update={"strategy": spec}))
    try:
        if data.refused:
            raise FedllmError(data.refused)
        estimator.experiment.replace(strategy=spec)
        if estimator.experiment.task.kind == "preference":
            raise FedllmError("task.kind = 'preference': what pairs cost is not planned yet")
        return makers[spec.kind](estimator, spec, data, named)
    except ValidationError as error:
        said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        return Line(spec.kind, named, refused=said)
    except FedllmError as error:
        return Line(spec.kind, named, refused=str(error))


@dataclass
class Bill:
    """What one client of a crowd has to pay, as it is added up; shapes: of what it pays for."""

    crowd: Crowd
    up: Roles
    down: Roles
    shapes: costs.Shapes
    frames: _Frames
    flops: float
    memory: int
    server: float = 0.0
    batches: int = 1


def _total(
    estimator: Estimator, data: Sizes, bills: Sequence[Bill], kind: str, named: str,
    server_flops: float, server_memory: int, serial: bool = False,
) -> Line:  # fmt: skip
    """Means over the clients, and the seconds of a round of those who take part."""
    experiment = estimator.experiment
    shares = [_share(experiment, bill, bill.crowd.site) for bill in bills]
    payloads = [_payload(experiment, bill) for bill in bills]
    present = experiment.exchange.clients_per_round or data.clients

    def mean(values: Sequence[float]) -> float:
        counted = zip(values, shares, strict=True)
        return sum(value * share.count for value, share in counted) / data.clients

    mean_up, mean_down = mean([s.up for s in shares]), mean([s.down for s in shares])
    server = experiment.plan.server
    own = server_flops * present / server.flops
    each = [share.seconds for share in shares]
    seconds = mean(each) * present if serial else _in_step(each, [bill.batches for bill in bills])
    links = present * max(mean_up / (server.down or math.inf), mean_down / (server.up or math.inf))
    return Line(
        kind, named, mean_up, mean_down,
        (mean([p[0] for p in payloads]), mean([p[1] for p in payloads])),
        mean([share.flops for share in shares]), server_flops * present,
        max(share.memory for share in shares), server_memory, max(seconds, links) + own,
        max(bill.frames.messages for bill in bills), tuple(shares),
    )  # fmt: skip


def _payload(experiment: ex.Experiment, bill: Bill) -> tuple[int, int]:
    """Bytes of tensor data, (up, down)."""
    codecs = dict(experiment.exchange.codecs)
    up, down = (
        costs.coded(roles, codecs, bill.shapes, way)  # type: ignore[arg-type]
        for way, roles in (("up", bill.up), ("down", bill.down))
    )
    return up, down


def _share(experiment: ex.Experiment, bill: Bill, site: ex.PlanSite) -> Share:
    """The same with whole frames and seconds, on this machine and these links."""
    up, down = _payload(experiment, bill)
    up, down = up + round(bill.frames.up), down + round(bill.frames.down)
    seconds = bill.flops / site.flops + up / site.up + down / site.down
    seconds += bill.frames.messages * site.latency
    crowd = bill.crowd
    return Share(
        crowd.name, crowd.count, up, down, bill.flops, bill.memory, seconds, site.memory
    )  # fmt: skip


def _in_step(seconds: Sequence[float], batches: Sequence[int]) -> float:
    """Seconds where each batch begins when everybody who has one is done with the one before."""
    found, slowest, later = 0.0, 0.0, sorted(zip(batches, seconds, strict=True), reverse=True)
    for (number, own), (fewer, _) in pairwise([*later, (0, 0.0)]):
        slowest = max(slowest, own / number)
        found += slowest * (number - fewer)
    return found


class _Frames:
    """Headers of what a client is sent and sends."""

    def __init__(self, estimator: Estimator, kind: str, crowd: Crowd) -> None:
        experiment = estimator.experiment
        self.run = f"{experiment.name}-{kind}-{experiment.seeds[0]}"
        self.client = crowd.client
        self.codecs = experiment.exchange.codecs
        self.down = self.up = self.messages = 0.0

    def add(
        self, direction: str, step: str, task: str = "", role: str | Mapping[str, str] = "",
        times: float = 1, sent: Mapping[str, tuple[int, ...]] | None = None, **facts: Any,
    ) -> None:  # fmt: skip
        """So many frames of a kind."""
        size = times * costs.header(
            sent or {}, role, step, task, facts, self.run, self.client,
            self.codecs, direction,  # type: ignore[arg-type]
        )  # fmt: skip
        self.messages += times
        if direction == "up":
            self.up += size
        else:
            self.down += size


LOSS = 1.2345678901234567  # as long as most numbers are when they are written out


def _shapes(model: LanguageModel, which: Sequence[str]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(model.initial[name].shape) for name in which}


def _first(est: Estimator, data: Sizes) -> float:
    """Of the rounds that a client takes part in, the share that are its first one."""
    rounds = est.experiment.rounds
    part = (est.experiment.exchange.clients_per_round or data.clients) / data.clients
    return (1 - (1 - part) ** rounds) / (part * rounds)


def _below(
    est: Estimator, rows: Rows, begin: int, shown: int, share: float
) -> tuple[float, int, int]:
    """
    What running the lowest blocks once for each row costs: FLOPs in the mean round (of which this
    share are first ones), bytes kept, and the most bytes at once. Nothing where no block is
    frozen, or few rows are shown.
    """
    if not begin or not len(rows.lengths) or shown < len(rows.lengths):
        return 0.0, 0, 0
    batches = est.in_order(rows, est.training.batch_size)
    once = est.flops(batches, "client", False, begin) * share
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
    once, kept, peak = _below(est, crowd.train, begin, len(crowd.train.lengths), _first(est, data))
    if kept:
        kept += crowd.held_out * est.model.width * costs.FLOAT
    whole = est.model.whole
    base = est.held(whole) + est.reserved(whole) + kept
    memory = max(base + est.most("train", "whole", private, begin=begin), peak)
    return once + est.flops(private, "whole", True, begin=begin), memory, kept, begin


def _parameters(est: Estimator, spec: ex.Parameters, data: Sizes, named: str) -> Line:
    whole = costs.parameters_roles(est.model, spec)
    largest = sum(whole.values())
    # what its tunables are held to, or shifted by
    pulled = 0.0 if spec.client.kind == "plain" else 1.0
    bills = []
    for crowd, ranks, modules in _ranked(est, data):
        frames, flops, memory = _Frames(est, "parameters", crowd), 0.0, 0
        every: dict[str, dict[str, tuple[int, ...]]] = {role: {} for role in whole}
        paid = dict.fromkeys(whole, 0.0)
        for rank, share in ranks.items():
            now = est.at(rank, modules)
            travels = costs.parameters_roles(now.model, spec)
            mine = costs.shapes(now.model, costs.travelling(now.model))
            role, sent = dict.fromkeys(mine, "parameter"), dict(mine)
            if "gradient" in travels:
                role |= {f"{name}{SLOT}": "gradient" for name in mine}
                sent |= {f"{name}{SLOT}": shape for name, shape in mine.items()}
            for name, shape in sent.items():
                every[role[name]][f"{rank}/{name}" if len(ranks) > 1 else name] = shape
            frames.add("down", "a1", "train", role, share, sent)
            frames.add("up", "a3", "", role, share, sent,
                       weight=float(len(crowd.train.lengths)), loss=LOSS)  # fmt: skip
            more, most, _, _ = _fitting(now, crowd, data)
            flops += share * more
            memory = max(memory, most + round(pulled * travels["parameter"]))
            largest = max(largest, sum(travels.values()))
            for one, size in travels.items():
                paid[one] += share * size
        roles = {one: round(size) for one, size in paid.items()}
        bills.append(Bill(crowd, roles, roles, every, frames, flops, memory))
    present = est.experiment.exchange.clients_per_round or data.clients
    held = (present + 1) * largest
    held += {"average": 0, "momentum": 1}.get(spec.server.kind, 2) * whole["parameter"]
    found = _total(est, data, bills, "parameters", named, 0.0, held)
    if spec.mentor is not None:
        return replace(found, variant=f"{named} (clients' work without their mentors)")
    return found


def _ranked(
    est: Estimator, data: Sizes
) -> Iterator[tuple[Crowd, dict[int | None, float], ex.Modules | None]]:
    """
    Clients of the same ranks, the share of the rounds at each, and their modules.

    None: the tunables' own rank, all modules.
    """
    spec = est.experiment.tunables
    if not isinstance(spec, ex.Lora) or not spec.varies:
        for crowd in data.crowds:
            yield crowd, {None: 1.0}, None
        return
    modules = spec.modules_of(data.names)

    def within(client: str, most: int) -> int:
        own = modules.get(client)
        return (est.model if own is None else est.model.only(own)).within(most)

    shares, first = spec.shares(data.names, est.experiment.rounds, within), 0
    for crowd in data.crowds:
        mine = [(tuple(shares[n].items()), modules.get(n))
                for n in data.names[first : first + crowd.count]]  # fmt: skip
        first += crowd.count
        for ranks, own in dict.fromkeys(mine):
            said = f"rank {', '.join(str(rank) for rank, _ in ranks)}"
            if own is not None:
                said += "".join(f", {key} {'/'.join(map(str, some))}" for key, some in own if some)
            name = crowd.name if len(set(mine)) == 1 else f"{crowd.name} ({said})"
            yield replace(crowd, count=mine.count((ranks, own)), name=name), dict(ranks), own


def _logits(est: Estimator, spec: ex.Logits, data: Sizes, named: str) -> Line:
    experiment, model, training = est.experiment, est.model, est.training
    if not len(data.public.lengths):
        raise FedllmError(NO_PUBLIC)
    every = len(data.public.lengths)
    drawn = min(experiment.public.rows_per_round or every, every)
    rows, whole = data.public.resized(drawn), data.public.size
    # of a draw at random bytes are those of the mean
    size = PublicSize(drawn, round(whole.tokens * drawn / every),
                      round(whole.units * drawn / every))  # fmt: skip
    said = costs.knowledge_roles(spec, size, model)
    shaped = costs.knowledge_shapes(spec, size, model)
    shapes = {n: s for n, (s, _) in shaped.items()}
    role = {n: r for n, (_, r) in shaped.items()} | {"histogram": "statistic", "rows": "index"}
    looked = est.in_order(rows, experiment.evaluation.batch_size)
    learnt = est.anew(rows, spec.batch_size or training.batch_size, data.longest, spec.epochs)
    shown = experiment.rounds * drawn

    @cache
    def public(begin: int, share: float) -> tuple[float, int, int, int]:
        """FLOPs of looking and of learning, peak bytes beside weights, and bytes kept."""
        once, kept, peak = _below(est, data.public, begin, shown, share)
        begin = begin if kept else 0
        look = est.flops(looked, "whole", False, begin=begin)
        learn = est.flops(learnt, "whole", True, begin=begin)
        most = max(
            est.most("forward", "whole", looked, begin=begin),
            est.reserved(model.whole) + est.most("distil", "whole", learnt, begin=begin, goal=spec),
        )
        return once + look + learn, most, kept, peak

    share, bills = _first(est, data), []
    chosen = experiment.public.choose if drawn < every else "random"
    told = {"histogram": (model.outputs,)} if chosen == "feedback" else {}
    tells = share if told else 0.0
    upward = {**said, "statistic": said.get("statistic", 0)
              + round(tells * costs.FLOAT * model.outputs)}  # fmt: skip
    shipped = _shipped(experiment, spec, data.public) if experiment.public.ship else {}
    shipping = round(share * costs.INT * sum(size for (size,) in shipped.values()))
    for crowd in data.crowds:
        frames = _Frames(est, "logits", crowd)
        if shipped:
            frames.add("down", "b0", "receive", "token", share, shipped)
            frames.add("up", "b0", times=share)
        for times, tell, asks in ((1 - tells, {}, {}), (tells, told, {"histogram": 1})):
            frames.add("down", "b1", "know", "index", times, {"rows": (drawn,)}, public="0" * 16,
                       **asks)  # fmt: skip
            frames.add("up", "b3", "", role, times, {**shapes, **tell}, weight=float(drawn),
                       loss=LOSS)  # fmt: skip
        frames.add("down", "b7", "digest", role, sent={**shapes, "rows": (drawn,)})
        frames.add("up", "b8", loss=LOSS)
        flops, memory, kept, begin = _fitting(est, crowd, data)
        more, most, beside, peak = public(begin, share)
        memory = max(memory + beside, est.held(model.whole) + most + kept + beside, peak + kept)
        index = said.get("index", 0) + 2 * drawn * costs.INT
        sent = {**said, "index": index, "token": shipping}
        bills.append(Bill(crowd, upward, sent, costs.by_role(shaped), frames, flops + more,
                          memory))  # fmt: skip
    present = experiment.exchange.clients_per_round or data.clients
    server, server_memory = 0.0, (present + 1) * sum(said.values())
    if spec.server_model:
        server, most, kept, peak = public(est.begin, 1 / experiment.rounds)
        server_memory = max(server_memory, est.held(model.whole) + most + kept, peak)
        look = est.flops(looked, "whole", False, begin=est.begin if kept else 0)
        if spec.selective:  # what it knows before it is taught
            server += look
        if spec.clusters > 1:  # what it knows then is sent to nobody
            server -= look
        if chosen in ex.LOOKING:
            scored = est.in_order(data.public, experiment.evaluation.batch_size)
            server += est.flops(scored, "whole", False, begin=est.begin if kept else 0)
    found = _total(est, data, bills, "logits", named, server / present, server_memory)
    if spec.client_models:
        return replace(found, variant=f"{named} (every client with the server's model)")
    return found


def _shipped(experiment: ex.Experiment, spec: ex.Logits, rows: Rows) -> dict[str, tuple[int]]:
    """Shapes of the public set as it travels, once to each client."""
    size = rows.size
    found = {"tokens": (size.tokens,), "lengths": (size.rows,)}
    text = experiment.task.kind != "classification"
    by_loss = spec.knowledge in ("loss", "least-loss")
    if text and by_loss and spec.loss_per == "byte":
        found["utf8"] = (size.rows,)
    if experiment.public.labelled and experiment.task.kind == "classification":
        found["labels"] = (size.rows,)
    return found


def _activations(est: Estimator, spec: ex.Activations, data: Sizes, named: str) -> Line:
    pieces = split_pieces(est, spec, data)
    bills = [_split_bill(est, spec, crowd, data, cut) for crowd, cut in pieces]
    server_flops = sum(bill.server * bill.crowd.count for bill in bills) / data.clients
    memory = _split_server(est, spec, data, [(cut, crowd.count) for crowd, cut in pieces])
    serial = spec.server == "sequential"
    return _total(est, data, bills, "activations", named, server_flops, memory, serial)


def split_pieces(est: Estimator, spec: ex.Activations, data: Sizes) -> list[tuple[Crowd, int]]:
    """The crowds, each in as many pieces as its clients have cuts. Raises FedllmError as a run."""
    if spec.cut == "auto":
        cuts = choose(
            choices(est.experiment, data, split_bills(est, spec, data)),
            spec.server == "sequential",
        )  # fmt: skip
        return list(zip(data.crowds, cuts, strict=True))
    own = spec.cuts(data.names)
    chosen = [check_cut(spec, est.model, own.get(name, 0)) for name in data.names]
    check_alike(spec, chosen)
    pieces, first = [], 0
    for crowd in data.crowds:
        counts = Counter(chosen[first : first + crowd.count])
        first += crowd.count
        for cut, count in sorted(counts.items()):
            alike = len(counts) == 1
            name = crowd.name if alike else f"{crowd.name}, cut {cut}"
            pieces.append((crowd if alike else replace(crowd, name=name, count=count), cut))
    return pieces


def split_bills(est: Estimator, spec: ex.Activations, data: Sizes) -> list[dict[int, Bill]]:
    """What a client of each crowd has to pay at every cut."""
    check_cut(spec, est.model)
    cuts = range(1, est.model.blocks)
    return [
        {cut: _split_bill(est, spec, crowd, data, cut) for cut in cuts} for crowd in data.crowds
    ]


def choices(
    experiment: ex.Experiment, data: Sizes, bills: Sequence[Mapping[int, Bill]], round: int = 0
) -> list[Choices]:  # fmt: skip
    """The same in seconds, on everybody's machine and links as they are in a round."""
    server = experiment.plan.server.flops
    found = []
    for crowd, mine in zip(data.crowds, bills, strict=True):
        site = crowd.site.at(round)
        shares = {cut: _share(experiment, bill, site) for cut, bill in mine.items()}
        ways = {
            cut: Way(share.seconds, mine[cut].server / server, share.memory)
            for cut, share in shares.items()
        }
        found.append(Choices(crowd.name, crowd.count, ways, site.memory))
    return found


def _split_bill(
    est: Estimator, spec: ex.Activations, crowd: Crowd, data: Sizes, cut: int
) -> Bill:  # fmt: skip
    """What one client of a crowd has to pay at this cut."""
    model, experiment, home = est.model, est.experiment, spec.labels == "client"
    mine = [n for n in at_client(spec, model, cut) if n in costs.travelling(model)]
    half = costs.tunable_bytes(model, mine)
    private = est.private(crowd, data.longest)
    present = (experiment.exchange.clients_per_round or data.clients) / data.clients
    late = (1 - present) * (1 - 1 / experiment.rounds)  # who missed a round is brought up to date
    number, every = len(private), spec.average_every
    averages = uploads = 1
    if every:
        most = max(len(est.private(other, data.longest)) for other in data.crowds)
        averages, uploads = -(-most // every), -(-number // every)
    size = replace(
        crowd.train.size, tokens=int(costs.kept(crowd.train.lengths, spec.keep_tokens).sum())
    )  # fmt: skip
    up, down = costs.activations_roles(
        model, spec, size, experiment.training.epochs, half, averages, uploads
    )
    down["parameter"] += round(late * half)
    if experiment.training.sampling == "loss" and not home:  # weights up, losses down
        units = size.rows if model.classification else size.units
        up["statistic"] = down["statistic"] = units * experiment.training.epochs * costs.FLOAT
    told: dict[str, Any] = {} if isinstance(spec.cut, int) else {"cut": cut}
    frames = _split_frames(
        est, spec, crowd, private, _shapes(model, mine), averages + late, uploads, told
    )
    flops, memory, server = _split_client(est, spec, crowd, data, cut)
    hidden = int(private.tokens.mean() * spec.keep_tokens), model.width
    shapes: costs.Shapes
    shapes = {"activation": {"hidden": hidden}, "gradient": {"gradient": hidden},
              "parameter": _shapes(model, mine)}  # fmt: skip
    return Bill(crowd, up, down, shapes, frames, flops, memory, server, number)


def _split_frames(
    est: Estimator, spec: ex.Activations, crowd: Crowd, private: Batches,
    sent: dict[str, tuple[int, ...]], averages: float, uploads: int, told: dict[str, Any],
) -> _Frames:  # fmt: skip
    """What crosses for the batches of a round, and for its averages."""
    frames, number = _Frames(est, "activations", crowd), len(private)
    home, rows = spec.labels == "client", int(private.rows.mean())
    cells = int(private.tokens.mean() * spec.keep_tokens)
    hidden = (cells, est.model.width)
    bare = {"hidden": hidden, "lengths": (rows,)}
    facts = {"left": 10, "number": 10, "units": rows}
    frames.add("down", "c1", "forward", times=number, **told)
    shapes = bare if home else {**bare, "labels": (rows,)}
    given: dict[str, tuple[int, ...]] = {"gradient": hidden}
    role = {"hidden": "activation", "lengths": "mask", "labels": "label", "places": "index",
            "gradient": "gradient", "weights": "statistic", "losses": "statistic"}  # fmt: skip
    if spec.keep_tokens < 1:
        shapes = {**shapes, "places": (cells,)}
    if est.training.sampling == "loss" and not home:
        units = int(private.units.mean())
        shapes, given = {**shapes, "weights": (units,)}, {**given, "losses": (units,)}
    frames.add("up", "c2", "", role, number, shapes, **facts)
    if home:
        frames.add("down", "c3", "head", "activation", number, {"hidden": hidden})
        frames.add("up", "c3", "", "gradient", number, {"gradient": hidden}, loss=LOSS)
    frames.add("down", "c4", "backward", role, number, given)
    frames.add("up", "c5", times=number)
    again = number * max(spec.inside - 1, 0)
    for step, task, kind, name in (
        ("c1", "forward", "activation", "hidden"), ("c4", "backward", "gradient", "gradient"),
    ):  # fmt: skip
        frames.add("down", step, task, kind, again, {name: hidden})
        frames.add("up", "c2" if step == "c1" else "c5", "", kind, again, {name: hidden})
    frames.add("down", "cc1", "collect", times=uploads, **told)
    frames.add("up", "cc1", "", "parameter", uploads, sent)
    frames.add("down", "cc3", "replace", "parameter", averages, sent)
    frames.add("up", "cc4", times=averages)
    return frames


def _thinned(batches: Batches, share: float) -> Batches:
    """Batches of which only this share of the tokens crosses."""
    if share == 1:
        return batches
    return replace(
        batches, lengths=costs.kept(batches.lengths, share),
        tokens=costs.kept(batches.tokens, share),
    )  # fmt: skip


def _split_client(
    est: Estimator, spec: ex.Activations, crowd: Crowd, data: Sizes, cut: int
) -> tuple[float, int, float]:
    """(FLOPs, peak bytes) of a client's side, and FLOPs of the server's for its batches."""
    model, private, home = est.model, est.private(crowd, data.longest), spec.labels == "client"
    watched = spec.keep_tokens < 1 and spec.keep_by == "attention"
    begin = min(_fits(est, crowd, est.begin), cut - 1 if watched else cut)
    once, kept, peak = _below(est, crowd.train, begin, len(crowd.train.lengths), _first(est, data))
    mine, above = pieces(model.blocks, cut, spec.inside, home, begin)
    tail = mine.pop() if home else None
    flops = once + _passing(est, mine, private)
    if watched:
        rows = zip(private.rows.tolist(), private.lengths.tolist(), strict=True)
        flops += sum(count * watching(length, model.width) for count, length in rows)
    held = sum(_held(est, piece) for piece in mine)
    if kept:
        held += est.held(model.part("client", begin)) + kept
        held += crowd.held_out * model.width * costs.FLOAT
    memory = max(peak, held + _waiting(est, mine, private))
    if tail is not None:
        flops += _passing(est, [tail], private)
        memory = max(memory, _held(est, tail) + _waiting(est, [tail], private))
    there = _thinned(est.travelled(crowd), spec.keep_tokens)
    return flops, memory, _passing(est, above, there)


def _passing(est: Estimator, side: Sequence[Piece], batches: Batches) -> float:
    """FLOPs of these batches through a side's pieces and back."""
    return sum(
        est.flops(
            batches, piece.part, True, piece.cut, piece.begin, input_grad=piece.part != "client"
        )
        for piece in side
    )  # fmt: skip


def _held(est: Estimator, piece: Piece) -> int:
    """Bytes of a piece's weights, its trained copies and their optimizer."""
    core = est.model.piece(piece)
    return est.held(core) + est.reserved(core)


def _waiting(est: Estimator, side: Sequence[Piece], batches: Batches) -> int:
    """The most bytes of the passes of a side's pieces, forward and back, over the largest batch."""
    found = 0
    for shape in batches.largest():
        below = 0  # of graphs that wait
        for piece in side:
            peak, left, back = est.live("half", piece.part, shape, piece.cut, piece.begin)
            found = max(found, below + peak, below + left + back)
            below += left
    return found


def _split_server(
    est: Estimator, spec: ex.Activations, data: Sizes, cuts: Sequence[tuple[int, int]]
) -> int:
    """Peak bytes of the server's side; cuts: each with the number of its clients."""
    sides = {
        cut: pieces(est.model.blocks, cut, spec.inside, spec.labels == "client")[1]
        for cut, _ in cuts
    }
    cores = {cut: [est.model.piece(piece) for piece in side] for cut, side in sides.items()}
    reserved = {cut: sum(map(est.reserved, side)) for cut, side in cores.items()}
    lowest = min(cores)
    present = est.experiment.exchange.clients_per_round or data.clients
    own = reserved[lowest]
    if spec.server == "per-client":
        every = sum(count * reserved[cut] for cut, count in cuts)
        own = round(every * present / data.clients)
    batches = est.heaviest(data)
    if spec.server == "concatenated":
        batches = _side_by_side(est, data, present / data.clients)
    batches = _thinned(batches, spec.keep_tokens)
    most = max(_waiting(est, side, batches) for side in sides.values())
    return sum(map(est.held, cores[lowest])) + own + most


def _side_by_side(est: Estimator, data: Sizes, share: float) -> Batches:
    """The clients' first batches as one, their second ones, and so on; of a share of them."""
    mine = [(crowd.count, est.travelled(crowd)) for crowd in data.crowds]
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
