"""Which strategy, rank, cut, public set and codec fit what there is: every choice, and why not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fedllm import experiment as ex
from fedllm.costs import Blueprint, loses
from fedllm.errors import FedllmError, nearest
from fedllm.estimates.estimator import Estimator
from fedllm.estimates.lines import Line, line
from fedllm.estimates.sizes import Sizes
from fedllm.planning.plan import RANKS, SIZE, options
from fedllm.planning.sizes import anew, sizes
from fedllm.report.tables import amount, size
from fedllm.strategies.activations import at_client, check_cut

BYTES = {
    "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2.0**10, "MiB": 2.0**20,
    "GiB": 2.0**30, "TiB": 2.0**40,
}  # fmt: skip
UNITS = {
    "bytes": BYTES, "memory": BYTES, "deadline": {"s": 1.0, "min": 60.0, "h": 3600.0},
    "flops": {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18},
}  # fmt: skip
NUMBERS = {
    "bytes": "up and down of a client and round", "memory": "peak of a client",
    "flops": "of a client and round", "deadline": "seconds of a round",
}  # fmt: skip
EXAMPLES = {
    "bytes": "bytes=50MB", "memory": "memory=4GB", "flops": "flops=1e15", "deadline": "deadline=600"
}  # fmt: skip
STAYS = ("labels", "weights")
ACCURACY = ("parameters", "activations", "logits")  # the order of the paper's Table I
SENT = {
    "parameters": ("parameter",), "logits": ("logit", "feature"),
    "activations": ("activation", "gradient"),
}  # fmt: skip
"""Roles of what a strategy is about; whatever else it sends travels as the file has it."""
FRONT = ("bytes", "flops", "memory", "deadline")


@dataclass(frozen=True)
class Limits:
    """What a choice may cost at most, and what may not leave a client."""

    most: tuple[tuple[str, float], ...] = ()
    stay: frozenset[str] = frozenset()


def parse(given: Iterable[str]) -> Limits:
    """``bytes=50MB``, ``labels=stay`` and so on. Raises FedllmError naming the key and value."""
    most: dict[str, float] = {}
    stay = set()
    for text in given:
        key, _, value = (part.strip() for part in text.partition("="))
        if key not in NUMBERS and key not in STAYS:
            hint = nearest(key, [*NUMBERS, *STAYS])
            raise FedllmError(f"--limit {text}: unknown {key!r}; {hint}")
        if key in STAYS:
            if value != "stay":
                raise FedllmError(f"--limit {text}: expected {key}=stay")
            stay.add(key)
            continue
        most[key] = _amount(text, key, value)
    return Limits(tuple(most.items()), frozenset(stay))


def _amount(text: str, key: str, value: str) -> float:
    """A number above 0, with or without a unit of this key."""
    units = {"": 1.0, **UNITS[key]}
    found = re.fullmatch(r"(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)", value)
    if found is None or found[2] not in units or not float(found[1]) > 0:
        hint = nearest(found[2] if found else "", UNITS[key])
        raise FedllmError(
            f"--limit {text}: expected a number above 0, and a unit or none, e.g. "
            f"{EXAMPLES[key]}; {hint}"
        )
    return float(found[1]) * units[found[2]]


@dataclass(frozen=True)
class Choice:
    """
    One way to run the experiment, and what it costs.

    rank: what the tunables' size is called.  public: rows a round.  tunable: trained numbers.
    sends_weights, sends_labels: whether private ones leave a client.  broken: why it is rejected.
    codec: of what the strategy is about (``SENT``); empty: the file's own.  coarse: its place among
    those that are tried; 0: the file's own.
    """

    strategy: str
    rank: int
    cut: int
    labels: str
    public: int
    tunable: int
    line: Line
    sends_weights: bool
    sends_labels: bool
    broken: tuple[str, ...] = ()
    codec: str = ""
    coarse: int = 0

    @property
    def name(self) -> str:
        """In words."""
        more = f"rank {self.rank}" if self.rank else "as in the file"
        if self.strategy == "activations":
            more += f", cut {self.cut}, labels at the {self.labels}"
        if self.strategy == "logits":
            more += f", {self.public:,} public rows"
        if self.codec:
            more += f", {self.codec}"
        return f"{self.strategy} ({more})"

    def cost(self, what: str) -> float:
        """Of ``NUMBERS``."""
        found = self.line
        return {"bytes": found.up + found.down, "flops": found.flops,
                "memory": float(found.memory), "deadline": found.seconds}[what]  # fmt: skip


def broken(choice: Choice, limits: Limits, server_memory: float | None = None) -> tuple[str, ...]:
    """Every limit that this breaks, with its value; also the memory of the machines there are."""
    if choice.line.refused:
        return (choice.line.refused,)
    found = [
        f"{key} {_shown(key, choice.cost(key))} > {_shown(key, limit)}"
        for key, limit in limits.most
        if choice.cost(key) > limit
    ]
    if "labels" in limits.stay and choice.sends_labels:
        found.append("labels travel to the server")
    if "weights" in limits.stay and choice.sends_weights:
        found.append("weights travel to the server")
    for share in choice.line.shares:
        if share.limit is not None and share.memory > share.limit:
            found.append(f"memory {size(share.memory)} > {size(share.limit)} of {share.name!r}")
    if server_memory is not None and choice.line.server_memory > server_memory:
        found.append(
            f"memory {size(choice.line.server_memory)} > {size(server_memory)} of the server"
        )
    return tuple(dict.fromkeys(found))


def _shown(key: str, value: float) -> str:
    if key in ("bytes", "memory"):
        return size(value)
    return amount("flops", value) if key == "flops" else f"{value:.0f} s"


def front(choices: Sequence[Choice]) -> list[Choice]:
    """
    Those that no other one beats in bytes, FLOPs and memory of a client, seconds of a round, and
    in the place of its codec.
    """
    return [one for one in choices if not any(_beats(other, one) for other in choices)]


def _beats(a: Choice, b: Choice) -> bool:
    """Whether a is nowhere dearer and somewhere cheaper."""
    x, y = _costs(a), _costs(b)
    return all(p <= q for p, q in zip(x, y, strict=True)) and x != y


def _costs(choice: Choice) -> tuple[float, ...]:
    return (*(choice.cost(key) for key in FRONT), choice.coarse)


def worth(choice: Choice) -> tuple[float, ...]:
    """
    What the advisor prefers, the larger the better.

    First the paper's order of accuracy (Table I: parameters, activations, logits), then the number
    of trained weights, then public rows, then the file's own codec before the others in their
    order, then fewer bytes, fewer FLOPs, fewer seconds.
    """
    return (
        -ACCURACY.index(choice.strategy), choice.tunable, choice.public,
        -choice.coarse, -choice.cost("bytes"), -choice.cost("flops"), -choice.cost("deadline"),
    )  # fmt: skip


def best(choices: Iterable[Choice]) -> Choice | None:
    """The one worth most of those that break nothing."""
    return max((c for c in choices if not c.broken), key=worth, default=None)


def budget(choices: Iterable[Choice], most: float) -> Choice | None:
    """P-05: the one worth most of those with at most so many bytes a client and round."""
    return best(c for c in choices if not c.line.refused and c.cost("bytes") <= most)


def price(choice: Choice, experiment: ex.Experiment) -> tuple[str, ...]:
    """What a choice gives up of what the file asks for, in words."""
    found, own, key = [], experiment.strategy.kind, SIZE.get(experiment.tunables.kind)
    if own in ACCURACY and ACCURACY.index(choice.strategy) > ACCURACY.index(own):
        found.append(f"{choice.strategy} instead of {own}, which the paper found more accurate")
    size_ = getattr(experiment.tunables, key) if key else 0
    if choice.rank < size_:
        found.append(f"{key} {choice.rank} instead of {size_}: {choice.tunable:,} trained numbers")
    spec = experiment.tunables
    if isinstance(spec, ex.Lora) and spec.varies:
        found.append(f"one LoRA for all clients and rounds instead of tunables.{spec.varies}")
    if choice.codec:
        roles = " and ".join(f"{role}s" for role in SENT[choice.strategy])
        found.append(f"{roles} as {choice.codec}: loses {loses(choice.codec)}")
    return tuple(found)


@dataclass(frozen=True)
class Advice:
    """
    What fits: the choice worth most, the front of all that fit, and everything looked at.

    price: what the best one gives up of what the file asks for.
    """

    best: Choice | None
    front: tuple[Choice, ...]
    choices: tuple[Choice, ...]
    limits: Limits
    price: tuple[str, ...] = ()


def advise(experiment: ex.Experiment, limits: Limits, data: Sizes | None = None) -> Advice:
    """Look at every choice of the grids. Raises FedllmError as ``plan.look`` does."""
    data = data or sizes(experiment)
    memory = experiment.plan.server.memory
    found = [
        replace(choice, broken=broken(choice, limits, memory)) for choice in every(experiment, data)
    ]
    fitting = [choice for choice in found if not choice.broken]
    top = best(found)
    paid = () if top is None else price(top, experiment)
    return Advice(top, tuple(front(fitting)), tuple(found), limits, paid)


def every(experiment: ex.Experiment, data: Sizes) -> list[Choice]:
    """All choices of the grids."""
    found: list[Choice] = []
    anchors: list[Blueprint] = []
    for rank in ranks(experiment):
        sized = resized(experiment, rank)
        try:
            mine = anew(sized, data)
        except FedllmError as error:
            mine = replace(data, refused=str(error))
        if not anchors and sized.tunables.kind in ("lora", "adapter"):
            anchors = [
                Blueprint(sized.model, sized.task, resized(experiment, r).tunables, data.labels)
                for r in (1, 2)
            ]
        # every product with a low-rank matrix costs in proportion to its rank
        terms = [(2 - rank, anchors[0]), (rank - 1, anchors[1])] if anchors else []
        estimator = Estimator(sized, data.labels, [term for term in terms if term[0]])
        found += _of_rank(estimator, rank, mine)
    return found


def _of_rank(estimator: Estimator, rank: int, data: Sizes) -> list[Choice]:
    """All choices with tunables of this size."""
    experiment = estimator.experiment
    parameters, logits, split = options(experiment)
    listed: list[tuple[ex.Strategy, Sizes]] = [(parameters, data)]
    for count in public_sizes(experiment, data):
        listed.append((logits, replace(data, public=data.public.resized(count))))
    for cut in cuts(experiment, estimator.model.blocks):
        for labels in ("server", "client"):
            listed.append((split.model_copy(update={"cut": cut, "labels": labels}), data))
    return [
        _choice(estimator, spec, rank, some, coarse, name)
        for spec, some in listed for coarse, name in codecs(experiment, spec.kind)
    ]  # fmt: skip


def codecs(experiment: ex.Experiment, strategy: str) -> list[tuple[int, str]]:
    """Codecs to try for what a strategy is about, with their places; the file's own first."""
    given: dict[str, Any] = dict(experiment.exchange.codecs.items())
    own = [given.get(role, "none") for role in SENT[strategy]]
    tried = [name for name in experiment.plan.codecs if any(one != name for one in own)]
    return list(enumerate(["", *dict.fromkeys(tried)]))


def _choice(
    estimator: Estimator, spec: ex.Strategy, rank: int, data: Sizes, coarse: int, codec: str
) -> Choice:
    model = estimator.model
    weights, labels, cut, where = spec.kind == "parameters", False, 0, ""
    if isinstance(spec, ex.Activations):
        where, labels = spec.labels, spec.labels == "server"
        cut = spec.cut if isinstance(spec.cut, int) else 0
        weights = _shared(estimator, spec)
    if isinstance(spec, ex.Parameters) or where == "client":
        head = model.spec.head == "shared" and bool(set(model.initial) & model.head)
        weights = weights or head
    public = len(data.public.lengths) if spec.kind == "logits" else 0
    count = sum(tensor.numel() for tensor in model.initial.values())
    with _asked(estimator, spec.kind, codec):
        found = line(estimator, spec, data)
    return Choice(
        spec.kind, rank, cut, where, public, count, found, weights, labels, (), codec, coarse
    )  # fmt: skip


@contextmanager
def _asked(estimator: Estimator, strategy: str, codec: str) -> Iterator[None]:
    """Inside, the experiment is that of a choice; all public rows are used every round."""
    before = estimator.experiment
    changed: dict[str, Any] = {}
    if strategy == "logits":
        every = {"rows_per_round": None, "choose": "random"}
        changed["public"] = before.public.model_copy(update=every)
    if codec:
        mine: dict[str, Any] = dict(before.exchange.codecs.items())
        mine |= dict.fromkeys(SENT[strategy], codec)
        changed["exchange"] = before.exchange.model_copy(update={"codecs": mine})
    estimator.experiment = before.model_copy(update=changed)  # ``line`` checks it
    try:
        yield
    finally:
        estimator.experiment = before


def _shared(estimator: Estimator, spec: ex.Activations) -> bool:
    """Whether the client half has tunables, which are averaged."""
    try:
        cut = check_cut(spec, estimator.model)
    except FedllmError:
        return True
    return bool(at_client(spec, estimator.model, cut))


def ranks(experiment: ex.Experiment) -> list[int]:
    """Sizes of the tunables to try; 0 where their kind has none."""
    key = SIZE.get(experiment.tunables.kind)
    if key is None:
        return [0]
    grid = experiment.plan.ranks or (*RANKS, getattr(experiment.tunables, key))
    return sorted(set(grid))


def resized(experiment: ex.Experiment, rank: int) -> ex.Experiment:
    """The same with tunables of this size."""
    key = SIZE.get(experiment.tunables.kind)
    if key is None:
        return experiment
    spec = experiment.tunables
    changed: Any = spec.even(rank) if isinstance(spec, ex.Lora) else spec.model_copy(
        update={key: rank}
    )  # fmt: skip
    return experiment.replace(tunables=changed)


def cuts(experiment: ex.Experiment, blocks: int) -> list[int]:
    """Cuts to try: those of ``[plan]``, else after one block and at the quarters."""
    if blocks < 2:  # ``line`` says of one cut or another that there is none
        return [1]
    wrong = [cut for cut in experiment.plan.cuts if cut >= blocks]
    if wrong:
        raise FedllmError(
            f"plan.cuts = {list(experiment.plan.cuts)}: the model has {blocks} blocks; expected 1 "
            f"to {blocks - 1} (not {wrong[0]})"
        )
    grid = experiment.plan.cuts or (1, blocks // 4, blocks // 2, 3 * blocks // 4)
    return sorted({cut for cut in grid if 1 <= cut < blocks})


def public_sizes(experiment: ex.Experiment, data: Sizes) -> list[int]:
    """Public rows a round to try: those of ``[plan]``, else a tenth, half and all there are."""
    there = len(data.public.lengths)
    grid = experiment.plan.public_sizes
    if grid and not there:
        raise FedllmError(
            f"plan.public_sizes = {list(grid)}: there is no public set to size; set public.size, "
            "public.source or plan.public_rows"
        )
    return sorted(set(grid or {max(there // 10, min(there, 1)), there // 2, there} - {0})) or [0]
