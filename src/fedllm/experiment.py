"""An experiment file: TOML -> a frozen, strict Experiment. The only home of defaults and limits."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from fedllm.errors import FedllmError, nearest

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A table of the file: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Section):
    """
    Which base model, and how it computes. ``name`` is ``builtin``, a folder, or a name on the hub;
    ``NAME#4`` is the model without the blocks above its first four.

    ``device = "auto"`` is a CUDA device where there is one. ``precision = "bf16"`` computes passes
    under torch's autocast; tunables, optimizers and all that travels stay float32.
    ``quantization = "nf4"`` holds the base in 4 bits (QLoRA, arXiv 2305.14314), with LoRA only.
    """

    name: str = "builtin"
    revision: str | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    tokenizer: str | None = None
    threads: Count = 0
    cache: bool = True
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    quantization: Literal["none", "nf4"] = "none"


class Task(Section):
    """
    What is learnt. Generation trains on the response only, unless ``response_only = false``.

    Multiple choice trains as generation does, on the right option; it is judged by which option
    the model finds likeliest.

    Preference learns from pairs of responses which of the two is better, against the model as it
    is at first (DPO, arXiv 2305.18290); ``beta`` is what weighs leaving it.
    """

    kind: Literal["classification", "generation", "multiple-choice", "preference"] = (
        "classification"
    )
    beta: Rate = 0.1
    chat_template: bool = False
    response_only: bool = True


class Data(Section):
    """
    The contract every client keeps: columns, labels, longest example in tokens.

    Generation takes either ``text`` alone (plain language modelling) or ``prompt`` and
    ``response``. Multiple choice takes ``prompt``, ``options`` and ``response``, which names the
    right option. Preference takes ``prompt``, ``response``, which is the better one, and
    ``rejected``. Without ``max_tokens`` the model's own limit holds (at most 512).
    """

    text: str = "text"
    label: str = "label"
    prompt: str | None = None
    response: str | None = None
    rejected: str | None = None
    options: str | None = None
    option_pattern: str | None = None
    answer_by: Literal["any", "index", "letter", "text"] = "any"
    labels: tuple[str, ...] = ()
    max_tokens: Annotated[int, Field(ge=4)] | None = None

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response columns go together")
        if self.option_pattern is not None:
            try:
                groups = re.compile(self.option_pattern).groups
            except re.error as error:
                raise ValueError(f"option_pattern: no regular expression ({error})") from None
            if groups > 1:
                raise ValueError(
                    f"option_pattern: {groups} groups; expected one, or none for the whole match"
                )
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: the same label twice")
        return self


LOOKING = ("entropy", "el2n", "coverage")  # choices of rows for which the server's model looks


class Public(Section):
    """
    The public set of the logits strategy: ``size`` rows cut from the training source before
    the clients get theirs, or all (at most ``size``, if given) of a ``source`` of its own.

    ``choose`` says which ``rows_per_round`` a round uses: a draw at random; those on which the
    server's model is least sure (``entropy``) or errs most (``el2n``), or that cover all its
    predictions (``coverage``); those on which clients disagreed; or a draw with the clients' mix
    of labels, of which each tells its own once (``feedback``), with noise of
    ``feedback_epsilon`` where that is given.
    """

    source: str | None = None
    size: Count = 0
    rows_per_round: Positive | None = None
    choose: Literal[
        "random", "entropy", "el2n", "coverage", "disagreement", "feedback"
    ] = "random"  # fmt: skip
    feedback_epsilon: Rate | None = None
    labelled: bool = False
    ship: bool = False

    @model_validator(mode="after")
    def _chosen(self) -> Self:
        if self.choose != "random" and self.rows_per_round is None:
            raise ValueError(
                f"choose = {self.choose!r}: without rows_per_round every round uses all rows; set "
                "it, or take 'random'"
            )
        if self.choose in ("el2n", "feedback") and not self.labelled:
            raise ValueError(
                f"choose = {self.choose!r}: needs the public rows' labels; set labelled = true"
            )
        if self.feedback_epsilon is not None and self.choose != "feedback":
            raise ValueError(
                f"feedback_epsilon: only with choose = 'feedback' (here {self.choose!r})"
            )
        return self


Head = Literal["shared", "personal", "frozen"]
V = TypeVar("V")


def since(table: Mapping[int, int], round: int) -> int:
    """What holds in this round, of a table that says from which round on."""
    return table[max(first for first in table if first <= round)]


def whose(key: str, listed: Sequence[V] | Mapping[str, V], clients: Sequence[str]) -> dict[str, V]:
    """
    What each client has: of a list they take one in turn; a table says it by their names.

    Who has nothing is left out. Raises FedllmError for a table with others in it.
    """
    if isinstance(listed, Mapping):
        for name in listed:
            if name not in clients:
                raise FedllmError(f"{key}.{name}: no such client; {nearest(name, clients)}")
        return dict(listed)
    return {name: listed[k % len(listed)] for k, name in enumerate(clients)} if listed else {}


Budget = dict[int, Positive]
"""Bytes from which round on; always with the first."""


def _budgets(value: Any) -> Any:
    """What ``budgets`` may be; the union's own errors would name its branches."""
    listed = list(value.values() if isinstance(value, dict) else value) if isinstance(
        value, list | tuple | dict
    ) else [0]  # fmt: skip
    found = [one if isinstance(one, dict) else {1: one} for one in listed]
    for table in found:
        fits = all(type(most) is int and most >= 1 for most in table.values())
        if not fits or not all(str(n).isdecimal() for n in table) or 1 not in map(int, table):
            raise ValueError(
                f"{json.dumps(value, default=str)}: expected a list of bytes, or a table from "
                "clients' names to them; each a number, or a table of rounds from 1 on, e.g. "
                "{ 1 = 100_000, 4 = 20_000 }"
            )
    rounds = [{int(n): most for n, most in table.items()} for table in found]
    return dict(zip(value, rounds, strict=True)) if isinstance(value, dict) else tuple(rounds)


def _ranks(value: Any) -> Any:
    """What ``ranks`` may be; the union's own errors would name its branches."""
    listed = list(value.values() if isinstance(value, dict) else value) if isinstance(
        value, list | tuple | dict
    ) else [0]  # fmt: skip
    if not all(type(rank) is int and rank >= 1 for rank in listed):
        raise ValueError(
            f"{json.dumps(value, default=str)}: expected a list of ranks of at least 1, or a table "
            "from clients' names to them"
        )
    return tuple(value) if isinstance(value, list) else value


class Modules(Section):
    """
    The share of what LoRA is around that a client has: these of its blocks, numbered as ``layers``
    are, and these of its targets; none named: all.
    """

    layers: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()

    @model_serializer
    def _named(self) -> dict[str, Any]:
        """Without what is not named: a run's file is read back, and an empty list is refused."""
        return {key: list(some) for key, some in self if some}


def _modules(value: Any) -> Any:
    """What ``modules`` may be; the union's own errors would name its branches."""
    listed: list[Any] = list(value.values() if isinstance(value, dict) else value) if isinstance(
        value, list | tuple | dict
    ) else [0]  # fmt: skip
    kinds = {"layers": int, "targets": str}
    for one in listed:
        if isinstance(one, Modules):
            continue
        if not isinstance(one, dict) or not all(
            key in kinds and isinstance(some, list | tuple) and some
            and all(type(part) is kinds[key] for part in some)
            for key, some in one.items()
        ):  # fmt: skip
            raise ValueError(
                f"{json.dumps(value, default=str)}: expected a list of tables, or a table of them "
                "by clients' names; each with layers, targets or both, e.g. { layers = [-1], "
                'targets = ["query"] }'
            )
    found = [one if isinstance(one, Modules) else Modules(**{k: tuple(v) for k, v in one.items()})
             for one in listed]  # fmt: skip
    return dict(zip(value, found, strict=True)) if isinstance(value, dict) else tuple(found)


class Growth(Section):
    """
    Ranks that grow on a plateau: from ``start`` by ``factor``, up to ``tunables.rank``, once the
    clients' mean training loss was for ``patience`` rounds in a row not below the best one before
    by a share ``gain`` of it.
    """

    start: Positive = 2
    factor: Annotated[int, Field(ge=2)] = 2
    patience: Positive = 2
    gain: Fraction = 0.01


class SparseStart(Section):
    """
    SLoRA (arXiv 2308.06522): the first ``rounds`` train single weights, as ``kind = "sparse"`` with
    this ``density`` does; LoRA then starts from the best approximation of what they changed.
    """

    rounds: Positive = 5
    density: Annotated[float, Field(gt=0, le=1)] = 0.01


class Lora(Section):
    """
    LoRA (arXiv 2106.09685) through PEFT; targets default to the model type's usual ones.

    ``rank`` is the largest there is. ``ranks`` are taken in turn by the clients, or a table says
    whose is which, as it must across machines; who has none there has the largest. ``schedule``
    says from which round on nobody's is higher: ``{ 1 = 2, 4 = 8 }``; with ``growth`` the server
    decides by the loss. ``budgets`` are what clients can pay for each way in a round, in bytes
    before any codec, given as ``ranks`` are; each has the highest rank that its own allows.
    ``modules``, given so, too, are the blocks and targets that a client has, where not all.
    With ``freeze_a`` the first matrix keeps its start, which follows from the seed, and only B is
    trained and sent (FFA-LoRA, arXiv 2403.12313).
    ``sparse`` has rounds before the first of LoRA.
    """

    kind: Literal["lora"] = "lora"
    rank: Positive = 8
    ranks: Annotated[tuple[Positive, ...] | dict[str, Positive], BeforeValidator(_ranks)] = ()
    budgets: Annotated[tuple[Budget, ...] | dict[str, Budget], BeforeValidator(_budgets)] = ()
    modules: Annotated[tuple[Modules, ...] | dict[str, Modules], BeforeValidator(_modules)] = ()
    schedule: dict[int, Positive] = {}
    growth: Growth | None = None
    sparse: SparseStart | None = None
    freeze_a: bool = False
    alpha: Rate = 16.0
    dropout: Fraction = 0.0
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    init: Literal["gaussian", "kaiming"] = "gaussian"
    head: Head = "shared"

    @model_validator(mode="after")
    def _at_most(self) -> Self:
        listed = self.ranks.values() if isinstance(self.ranks, dict) else self.ranks
        start = () if self.growth is None else (self.growth.start,)
        named = (("ranks", listed), ("schedule", self.schedule.values()), ("growth.start", start))
        for key, ranks in named:
            if ranks and max(ranks) > self.rank:
                raise ValueError(
                    f"{key}: {max(ranks)} is more than rank = {self.rank}, which is the largest"
                )
        if self.freeze_a and self.varies not in ("", "modules"):
            raise ValueError(
                f"freeze_a: one first matrix for all; expected one rank, without {self.varies}"
            )
        if self.schedule and self.growth is not None:
            raise ValueError("growth: schedule says already when ranks change; leave one out")
        if self.sparse is not None and (self.varies != "sparse" or self.modules):
            key = "modules" if self.varies == "sparse" else self.varies
            raise ValueError(f"sparse: with the same LoRA for all only, without {key}")
        if self.schedule and min(self.schedule) != 1:
            raise ValueError("schedule: expected rounds from 1 on, 1 among them, e.g. { 1 = 2 }")
        return self

    def even(self, rank: int | None = None) -> Lora:
        """The same with all modules and one rank for all and always; none given: the largest."""
        return self.model_copy(update={
            "rank": rank or self.rank, "ranks": (), "budgets": (), "modules": (), "schedule": {},
            "growth": None, "sparse": None,
        })  # fmt: skip

    def only(self, modules: Modules | None) -> Lora:
        """The same around these alone; none: around all."""
        if modules is None:
            return self
        targets = tuple(
            max(one, own, key=len) for one in modules.targets for own in self.targets or (one,)
            if f".{own}".endswith(f".{one}") or f".{one}".endswith(f".{own}")
        )  # fmt: skip
        return self.model_copy(update={
            "layers": modules.layers or self.layers, "targets": targets or self.targets,
        })  # fmt: skip

    @property
    def varies(self) -> str:
        """The first key by which anybody's LoRA is, or was, another than plain; or empty."""
        return "ranks" if self.ranks else self.changes or ("modules" if self.modules else "")

    @property
    def changes(self) -> str:
        """The first key by which a client's rank may change from round to round; or empty."""
        keys = ("budgets", "schedule", "growth", "sparse")
        return next((key for key in keys if getattr(self, key)), "")

    @property
    def first(self) -> Sparse:
        """What is trained before there is any LoRA."""
        density = SparseStart().density if self.sparse is None else self.sparse.density
        return Sparse(density=density, targets=self.targets, layers=self.layers, head=self.head)

    @property
    def uneven(self) -> bool:
        """Whether clients may have different ranks in one round."""
        listed = self.ranks.values() if isinstance(self.ranks, dict) else self.ranks
        return bool(self.budgets) or any(rank != self.rank for rank in listed)

    def ranks_of(self, clients: Sequence[str]) -> dict[str, int]:
        """The ranks of those of these clients who have their own (``whose``)."""
        return whose("tunables.ranks", self.ranks, clients)

    def budgets_of(self, clients: Sequence[str]) -> dict[str, Budget]:
        """The budgets of those of these clients who have one (``whose``)."""
        return whose("tunables.budgets", self.budgets, clients)

    def modules_of(self, clients: Sequence[str]) -> dict[str, Modules]:
        """The modules of those of these clients who have their own (``whose``)."""
        return whose("tunables.modules", self.modules, clients)

    def most(self, round: int) -> int:
        """The highest rank that anybody may have in this round; 0 before there is any LoRA."""
        if self.sparse is not None:
            return self.rank if round > self.sparse.rounds else 0
        if not self.schedule and self.growth is None:
            return self.rank
        if self.growth is not None:  # as early as losses can tell
            times = max(round - 2, 0) // self.growth.patience
            return min(self.growth.start * self.growth.factor**times, self.rank)
        return since(self.schedule, round)

    def fall(self, round: int) -> int:
        """The last round until now in which ``schedule`` went down; 0 where it never did."""
        steps = sorted(self.schedule.items())
        falls = [r for (_, before), (r, now) in pairwise(steps) if now < before and r <= round]
        return max(falls, default=0)

    def shares(
        self, clients: Sequence[str], rounds: int, within: Callable[[str, int], int]
    ) -> dict[str, dict[int, float]]:
        """
        Which ranks each of these clients may have, and in what share of the rounds.

        within: the highest rank that so many bytes allow a client.
        """
        own, budgets, found = self.ranks_of(clients), self.budgets_of(clients), {}
        for client in clients:
            ranks = [min(own.get(client, self.rank), self.most(n)) for n in range(1, rounds + 1)]
            if client in budgets:
                ranks = [min(rank, within(client, since(budgets[client], n)))
                         for n, rank in enumerate(ranks, 1)]  # fmt: skip
            found[client] = {rank: ranks.count(rank) / rounds for rank in sorted(set(ranks))}
        return found


class Adapter(Section):
    """Bottleneck adapters, h + W_up gelu(W_down h), with W_up = 0 at the start."""

    kind: Literal["adapter"] = "adapter"
    width: Positive = 16
    after: Annotated[tuple[Literal["attention", "ffn"], ...], Field(min_length=1)] = (
        "attention",
        "ffn",
    )
    layers: tuple[int, ...] = ()
    head: Head = "shared"


class BitFit(Section):
    """All biases of the base are trained (BERT and GPT-2 types have them; Llama types do not)."""

    kind: Literal["bitfit"] = "bitfit"
    head: Head = "shared"


class Prompt(Section):
    """Soft prompt: learnt vectors before the input embeddings (PEFT's prompt tuning)."""

    kind: Literal["prompt"] = "prompt"
    tokens: Positive = 10
    head: Head = "shared"


class Prefix(Section):
    """Learnt keys and values before every layer's own (PEFT's prefix tuning); decoders only."""

    kind: Literal["prefix"] = "prefix"
    tokens: Positive = 10
    head: Head = "shared"


class Sparse(Section):
    """
    Some weights of the targets are trained: those of a random mask, of which every side draws the
    same from the run's seed. Only their changes travel.
    """

    kind: Literal["sparse"] = "sparse"
    density: Annotated[float, Field(gt=0, le=1)] = 0.01
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    head: Head = "shared"


class Full(Section):
    """Every weight of the model is trained."""

    kind: Literal["full"] = "full"
    head: Head = "shared"


Tunables = Annotated[
    Lora | Adapter | BitFit | Prompt | Prefix | Sparse | Full, Field(discriminator="kind")
]


class Training(Section):
    """
    How a client trains. ``schedule`` runs over all rounds of the experiment.

    ``sampling = "loss"`` draws private rows in proportion to their last known loss, but for a share
    ``sampling_floor`` that is drawn evenly, and weighs each by 1 / (rows x chance).
    """

    epochs: Positive = 1
    batch_size: Positive = 16
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    rate: Rate = 1e-3
    momentum: Fraction = 0.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Fraction = 0.0
    clip: Rate | None = None
    optimizer_state: Literal["reset", "keep"] = "reset"
    base_dropout: bool = False
    padding: Literal["bucket", "longest", "fixed"] = "bucket"
    sampling: Literal["uniform", "loss"] = "uniform"
    sampling_floor: Annotated[float, Field(gt=0, le=1)] = 0.2


Aggregation = Literal["mean", "uniform", "zero-pad", "normalized", "hetlora", "flexlora"]


class Balance(Section):
    """
    Clients weigh more the lower their training loss of the round is.

    Their weight times exp((mean - loss) / ``temperature``), kept between ``floor`` and ``cap``.
    """

    temperature: Rate = 1.0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    cap: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0


class Average(Section):
    """The common tunables become the clients' mean (FedAvg, arXiv 1602.05629)."""

    kind: Literal["average"] = "average"


class Momentum(Section):
    """
    The mean of the clients' changes moves the common tunables with momentum (FedAvgM, arXiv
    1909.06335); ``beta = 0`` leaves a rate of the server's own.
    """

    kind: Literal["momentum"] = "momentum"
    rate: Rate = 1.0
    beta: Fraction = 0.9


class Adagrad(Section):
    """FedAdagrad (arXiv 2003.00295) on the mean of the clients' changes."""

    kind: Literal["adagrad"] = "adagrad"
    rate: Rate = 0.01
    beta1: Fraction = 0.0
    tau: Rate = 1e-3


class Yogi(Section):
    """FedYogi (arXiv 2003.00295) on the mean of the clients' changes."""

    kind: Literal["yogi"] = "yogi"
    rate: Rate = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Rate = 1e-3


class Adam(Section):
    """FedAdam (arXiv 2003.00295) on the mean of the clients' changes."""

    kind: Literal["adam"] = "adam"
    rate: Rate = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Rate = 1e-3


ServerStep = Annotated[Average | Momentum | Adagrad | Yogi | Adam, Field(discriminator="kind")]


class Plain(Section):
    """Each client minimizes the loss of its own rows."""

    kind: Literal["plain"] = "plain"


class Prox(Section):
    """
    The distance from what came is part of a client's loss, mu / 2 |w - w_global|^2 (FedProx, arXiv
    1812.06127); ``training.clip`` clips both together.
    """

    kind: Literal["prox"] = "prox"
    mu: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01


class Scaffold(Section):
    """
    Gradients are corrected by control variates, which travel, too (SCAFFOLD, arXiv 1910.06378,
    option II). Needs plain SGD; ``training.clip`` clips a gradient before it is corrected.
    """

    kind: Literal["scaffold"] = "scaffold"


ClientStep = Annotated[Plain | Prox | Scaffold, Field(discriminator="kind")]


class Parameters(Section):
    """
    Clients exchange tunables (steps a1 to a4).

    ``server`` says what becomes of the clients' mean change, ``client`` what holds a client back
    that has rows unlike the others'. Any two of them go together.

    ``mentor`` is a larger model that each client has for itself, reading the same tokens: it and
    the experiment's model teach each other, and only the latter travels (FedKD, arXiv 2108.13323).

    Clients with LoRA of different ranks (``tunables.ranks``) need an ``aggregation`` that takes
    them: ``zero-pad``, ``normalized`` (each component by its owners alone), ``hetlora`` (by the
    norms of the clients' updates, arXiv 2401.06432) or ``flexlora`` (the mean of their products,
    arXiv 2402.11505). ``prune`` is the share of its rank that a client of ``hetlora`` goes down to
    once the rest has become less.
    """

    kind: Literal["parameters"] = "parameters"
    payload: Literal["value", "delta", "change"] = "value"
    aggregation: Aggregation = "mean"
    server: ServerStep = Average()
    client: ClientStep = Plain()
    balance: Balance | None = None
    prune: Annotated[float, Field(gt=0, lt=1)] | None = None
    prune_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    mentor: str | None = None

    @model_validator(mode="after")
    def _pruned(self) -> Self:
        if self.prune is not None and self.aggregation != "hetlora":
            raise ValueError(
                f"prune: only with aggregation = 'hetlora' (here {self.aggregation!r})"
            )
        default = type(self).model_fields["prune_penalty"].default
        if self.prune is None and self.prune_penalty != default:
            raise ValueError(
                f"prune_penalty = {self.prune_penalty:g}: only with prune, the share that is left"
            )
        if self.balance is not None and self.aggregation in ("uniform", "hetlora"):
            raise ValueError(
                f"balance: aggregation = {self.aggregation!r} has weights of its own; expected "
                "'mean', 'zero-pad', 'normalized' or 'flexlora'"
            )
        if self.aggregation == "flexlora" and self.server.kind != "average":
            raise ValueError(
                "server: flexlora gives the factors another basis in every round, in which steps "
                f"of the last one mean nothing; expected server.kind = 'average' (here "
                f"{self.server.kind!r})"
            )
        return self


TOP_K = 128


def _models(value: Any) -> Any:
    """Refused here: of a union pydantic would name types that nobody wrote."""
    names = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple) or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"{json.dumps(value, default=str)}: expected a list of models' names, or a table of "
            "clients' names and models'"
        )
    return tuple(value) if isinstance(value, list) else value


class Logits(Section):
    """
    Clients exchange logits of the public set (steps b1 to b8).

    ``server_model = false`` is FedMD (arXiv 1910.03581): no model at the server.
    ``client_models`` are taken in turn by the clients, or a table says whose is which, as it must
    across machines; who has none there has the experiment's model.
    ``rate`` is the rate of distillation; none means the training rate.

    ``form`` is what is said of each public unit: all logits, softened labels, the ``top_k``
    likeliest outputs (none: 128, or all where there are fewer), the likeliest one and its
    probability, or the hidden state that the head reads (then ``loss`` is ``mse`` or ``cosine``).
    ``selective`` lets a student follow others only where its own loss is not less, with
    ``knowledge = "least-loss"`` (FedMKT, arXiv 2406.02224); losses are compared a byte of text, or
    a token.

    ``knowledge`` weighs what clients say of each public unit; ``keep`` and ``max_entropy`` leave
    some of it out. With ``clusters`` above 1 each client is taught by those who think alike.
    ``label_share`` is that of the cross-entropy on a labelled set's own labels in the loss of
    distillation; none adds it with weight 1.
    """

    kind: Literal["logits"] = "logits"
    form: Literal["logits", "labels", "top-k", "statistics", "features"] = "logits"
    top_k: Positive | None = None
    rest: Literal["renormalize", "uniform"] = "renormalize"
    temperature: Rate = 1.0
    loss: Literal["kl", "mse", "cosine"] = "kl"
    knowledge: Literal["mean", "uniform", "confidence", "entropy", "loss", "least-loss"] = "uniform"
    selective: bool = False
    loss_per: Literal["byte", "token"] = "byte"
    keep: Count = 0
    max_entropy: Annotated[float, Field(gt=0, le=1)] = 1.0
    clusters: Positive = 1
    label_share: Annotated[float, Field(ge=0, le=1)] | None = None
    server_model: bool = True
    client_models: Annotated[tuple[str, ...] | dict[str, str], BeforeValidator(_models)] = ()
    epochs: Positive = 1
    batch_size: Positive | None = None
    rate: Rate | None = None

    def models(self, clients: Sequence[str]) -> dict[str, str]:
        """Names of the models of those of these clients who have their own (``whose``)."""
        return whose("strategy.client_models", self.client_models, clients)


def _cut(value: Any) -> Any:
    """What a cut may be; the union's own errors would name its branches."""
    if value == "auto":
        return value
    table = isinstance(value, list | tuple | dict)
    listed = list(value.values() if isinstance(value, dict) else value) if table else [value]
    if not listed or not all(type(one) is int and one >= 0 for one in listed):
        raise ValueError(
            f"{json.dumps(value, default=str)}: expected a number of blocks, a list of them, a "
            "table from clients' names to them, or 'auto'; 0 is half of the blocks"
        )
    return tuple(value) if isinstance(value, list) else value


class Activations(Section):
    """
    Clients run the first ``cut`` blocks, the server the rest (steps c1 to c5, cc1 to cc4).

    ``cut = 0`` stands for half of the blocks. Several cuts are taken in turn by the clients, or a
    table says whose is which, as it must across machines. ``cut = "auto"`` gives each client that
    with which a round is soonest over, by the machines and links of ``[plan]`` (a simulation only);
    it is chosen anew when a speed has changed by more than ``recut`` of itself.
    ``average_every`` batches the client halves are averaged; 0 means once, at the end of the round.
    ``keep_tokens`` is the share of each row's tokens that crosses, rounded up (classification): the
    server's blocks see no others, and only they get a gradient. ``keep_by`` says which: those that
    the client's last block attends to most, or some at random; what the head reads always crosses.
    ``inside`` blocks above the cut are split inside: attention at the client, feed-forward at the
    server. Hidden states then cross twice more each way for each of them but the first.
    """

    kind: Literal["activations"] = "activations"
    cut: Annotated[
        Count | tuple[Count, ...] | dict[str, Count] | Literal["auto"], BeforeValidator(_cut)
    ] = 0
    recut: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    server: Literal["sequential", "per-client", "concatenated"] = "sequential"
    turn: Literal["batch", "epoch"] = "batch"
    labels: Literal["server", "client"] = "server"
    average_every: Count = 0
    keep_tokens: Annotated[float, Field(gt=0, le=1)] = 1.0
    keep_by: Literal["attention", "random"] = "attention"
    inside: Count = 0

    @model_validator(mode="after")
    def _averages(self) -> Self:
        if self.inside and self.cut == "auto":
            raise ValueError(
                f"inside = {self.inside}: cut = 'auto' chooses between blocks; expected 0, or a cut"
            )
        if self.inside and self.keep_tokens < 1:
            raise ValueError(
                f"inside = {self.inside}: the attention needs every token, so keep_tokens = "
                f"{self.keep_tokens:g} does not go with it; expected 0, or keep_tokens = 1"
            )
        if self.average_every and self.server == "sequential" and self.turn == "epoch":
            raise ValueError("average_every: needs turn = 'batch' with the sequential server")
        if self.cut == "auto" and (self.server == "concatenated" or self.average_every):
            key = "average_every" if self.average_every else "server = 'concatenated'"
            raise ValueError(f"{key}: needs one cut for all, which cut = 'auto' does not promise")
        return self

    def cuts(self, clients: Sequence[str]) -> dict[str, int]:
        """The cuts of those of these clients who have their own (``whose``)."""
        return {} if isinstance(self.cut, int | str) else whose("strategy.cut", self.cut, clients)


class Standalone(Section):
    """
    Bound: each client alone; nothing is exchanged. ``steps`` replaces rounds x epochs.

    ``public`` trains each of them on the public set with its labels instead.
    """

    kind: Literal["standalone"] = "standalone"
    steps: tuple[Positive, ...] = ()
    public: bool = False


class Centralized(Section):
    """Bound: all private data in one place. Only a simulation can do this."""

    kind: Literal["centralized"] = "centralized"


Strategy = Annotated[
    Parameters | Logits | Activations | Standalone | Centralized, Field(discriminator="kind")
]


INTEGERS = tuple(
    f"int{bits}{along}{rounding}"
    for bits in (8, 4)
    for rounding in ("", "-stochastic")
    for along in ("", "-tensor", "-channel")
)
CODECS = ("none", "fp16", "bf16", *INTEGERS, "sign", "zstd")  # of ``codecs``; it loads torch
SIZED = {"lowrank": 999_999, "energy": 100, "topk": 100, "random": 100}  # with at most this number
FEEDBACK = "feedback"
ORDER = (tuple(SIZED), CODECS[1:-1], ("zstd",), (FEEDBACK,))  # one of each may follow
SPARSE = ("topk", "random", "sign")  # they leave most numbers out, or all sizes
WAYS = ("up", "down")


def sized(name: str) -> tuple[str, int, int] | None:
    """``energy-95-98`` -> ("energy", 95, 98); ``lowrank-16`` -> ("lowrank", 16, 16); else None."""
    found = re.fullmatch(r"([a-z]+)-([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?", name)
    if found is None or found[1] not in SIZED:
        return None
    first, last = int(found[2]), int(found[3] or found[2])
    return (found[1], first, last) if max(first, last) <= SIZED[found[1]] else None


def stages(name: str) -> list[str]:
    """
    ``topk-10+int8+zstd`` -> its codecs in the order of encoding.

    Raises ValueError for a codec that there is not, and for an order that means nothing.
    """
    if name == "none":
        return [name]
    found = name.split("+")
    known = [*CODECS, *(f"{kind}-16" for kind in SIZED)]
    places = []
    for stage in found:
        kind = (sized(stage) or (stage,))[0]
        place = [i for i, some in enumerate(ORDER) if kind in some and stage not in SIZED]
        if not place:
            raise ValueError(f"unknown codec {stage!r}; {nearest(stage, known)}")
        places += place
    if places != sorted(set(places)) or found == [FEEDBACK]:
        raise ValueError(
            f"codecs {name!r}: at most one each of what leaves numbers out, what makes them short, "
            "'zstd' and 'feedback', in this order; expected e.g. 'topk-10+int8+zstd+feedback'"
        )
    return found


def _codec(value: Any) -> Any:
    """What codecs of a role may be; the union's own errors would name its branches."""
    listed = value.values() if isinstance(value, dict) else [value]
    if not all(isinstance(name, str) for name in listed):
        raise ValueError(
            f"{json.dumps(value, default=str)}: expected a codec's name, or a table of them by "
            "patterns of tensors' names"
        )
    for name in listed:
        stages(name)
    for key in value if isinstance(value, dict) else ():
        head, sign, _ = key.rpartition(":")
        if sign and head not in WAYS:
            raise ValueError(f"{key!r}: no way {head!r}; {nearest(head, WAYS)}")
    return value


Codec = Annotated[str | dict[str, str], BeforeValidator(_codec)]


class Exchange(Section):
    """
    What happens between strategy and wire. ``codecs`` maps a role to a codec's name, or to a table
    of them by patterns of tensors' names, of which the first that fits counts.

    resident: sites stay for the whole run, in a session; else each message is a process of its own.
    """

    clients_per_round: Positive | None = None
    minimum_replies: Positive | None = None
    deadline: Rate | None = None
    resident: bool = True
    codecs: dict[
        Literal["parameter", "logit", "feature", "activation", "gradient"],
        Codec,
    ] = {}


class Evaluation(Section):
    """``every`` rounds, and always after the last. ``rouge_examples`` answers a client writes."""

    every: Count = 1
    batch_size: Positive = 64
    on: Literal["test", "validation"] = "test"
    rouge_examples: Count = 0
    max_new_tokens: Positive = 40


class Iid(Section):
    """Rows are dealt at random."""

    kind: Literal["iid"] = "iid"


class Dirichlet(Section):
    """Each label's rows are divided in proportions drawn from Dirichlet(alpha)."""

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: Rate = 0.5


class ByColumn(Section):
    """Natural clients: one for each value of a column, the largest first."""

    kind: Literal["by_column"] = "by_column"
    column: str


Partition = Annotated[Iid | Dirichlet | ByColumn, Field(discriminator="kind")]


class Simulation(Section):
    """
    Where the data of a simulated federation comes from, and how clients get theirs.

    ``sizes`` gives the clients' numbers of rows one by one; ``examples`` the same for all.
    ``shuffled`` makes some of them useless, to see what a method makes of that: of each client in
    the table this share of its training rows have their labels shuffled among themselves.
    """

    source: str = "builtin"
    test: str | None = None
    format: Literal["auto", "csv", "jsonl", "dialogue"] = "auto"
    split: str = "train"
    clients: Positive = 3
    partition: Partition = Iid()
    sizes: tuple[Positive, ...] = ()
    examples: Positive | None = None
    test_examples: Positive | None = None
    test_fraction: Fraction = 0.2
    validation: Fraction = 0.0
    shuffled: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    cohort: Positive | None = None


StrategyName = Literal["parameters", "logits", "activations"]
BoundName = Literal["centralized", "standalone", "standalone-equal-steps"]


class Compare(Section):
    """What ``fedllm compare`` runs, and each strategy's options there."""

    strategies: tuple[StrategyName, ...] = get_args(StrategyName)
    bounds: tuple[BoundName, ...] = get_args(BoundName)
    parameters: Parameters = Parameters()
    logits: Logits = Logits()
    activations: Activations = Activations()


Axis = dict[str, tuple[Any, ...]]
"""Keys of an experiment (dotted) that change together, and the values of each."""


class PlanSite(Section):
    """
    Clients that are alike, for ``fedllm plan``: ``count`` of them, each with these means.

    flops: operations a second.  memory: bytes.  up, down: bytes a second.  latency: seconds that
    a message takes however short it is.  speed, bandwidth: what these are in each round of a
    simulation, as factors of ``flops`` and of ``up`` and ``down``; the last of them stays.
    """

    name: str | None = None
    count: Positive = 1
    rows: Positive | None = None
    flops: Rate = 1e11
    memory: Rate | None = None
    up: Rate = 2.5e6
    down: Rate = 1.25e7
    latency: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    speed: tuple[Rate, ...] = ()
    bandwidth: tuple[Rate, ...] = ()

    def at(self, round: int) -> PlanSite:
        """The same as it is in a round; 0: as it is known beforehand."""

        def factor(listed: tuple[float, ...]) -> float:
            return listed[min(round, len(listed)) - 1] if round and listed else 1.0

        machine, link = factor(self.speed), factor(self.bandwidth)
        return self.model_copy(update={
            "flops": self.flops * machine, "up": self.up * link, "down": self.down * link,
        })  # fmt: skip


class PlanServer(Section):
    """The server, for ``fedllm plan``. Its links are shared by all clients of a round."""

    flops: Rate = 1e13
    memory: Rate | None = None
    up: Rate | None = None
    down: Rate | None = None


class Plan(Section):
    """
    What ``fedllm plan`` assumes: sizes that it then need not read from the data, machines and
    links, and what its advisor tries. No run looks at it but one with ``strategy.cut = "auto"``.
    """

    rows: Positive | None = None
    tokens: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    targets: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    public_rows: Count | None = None
    public_tokens: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    labels: Annotated[int, Field(ge=2)] | None = None
    ranks: tuple[Positive, ...] = ()
    cuts: tuple[Positive, ...] = ()
    public_sizes: tuple[Positive, ...] = ()
    codecs: tuple[Annotated[str, BeforeValidator(_codec)], ...] = ("int8",)
    sites: tuple[PlanSite, ...] = ()
    server: PlanServer = PlanServer()

    @property
    def names(self) -> tuple[str, ...]:
        """What each of the sites is called, also those without a name; one where there is none."""
        if len(self.sites) < 2:
            return tuple(site.name or "site" for site in self.sites) or ("site",)
        return tuple(site.name or f"site {n}" for n, site in enumerate(self.sites, 1))

    @model_validator(mode="after")
    def _apart(self) -> Self:
        names = sorted(self.names)
        twice = [name for name, after in pairwise(names) if name == after]
        if twice:
            raise ValueError(f"sites: {twice[0]!r} twice; give each another name")
        return self


class Experiment(Section):
    """The whole file. Paths in it are already resolved against the file's folder."""

    name: str = "experiment"
    rounds: Positive = 5
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] = (0,)
    model: Model = Model()
    task: Task = Task()
    data: Data = Data()
    public: Public = Public()
    tunables: Tunables = Lora()
    training: Training = Training()
    strategy: Strategy = Parameters()
    exchange: Exchange = Exchange()
    evaluation: Evaluation = Evaluation()
    simulation: Simulation = Simulation()
    compare: Compare = Compare()
    sweep: tuple[Axis, ...] = ()
    plan: Plan = Plan()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        sizes = self.simulation.sizes
        planned = sum(site.count for site in self.plan.sites)
        if planned and planned != self.simulation.clients:
            raise ValueError(
                f"plan.sites: they count {planned} clients, simulation.clients is "
                f"{self.simulation.clients}; expected the same number"
            )
        if sizes and len(sizes) != self.simulation.clients:
            raise ValueError(
                f"simulation.sizes: {len(sizes)} sizes for {self.simulation.clients} clients"
            )
        if sizes and self.simulation.examples is not None:
            raise ValueError("simulation: sizes and examples say the same thing; leave one out")
        if self.task.kind == "classification" and self.data.prompt is not None:
            raise ValueError(
                "data.prompt: classification reads data.text and data.label; "
                "set task.kind = 'generation' or leave prompt and response out"
            )
        if self.simulation.shuffled and self.task.kind != "classification":
            raise ValueError(
                "simulation.shuffled: only with task.kind = 'classification' (here "
                f"{self.task.kind!r})"
            )
        self._chosen()
        self._preferred()
        if self.model.quantization != "none":
            if self.tunables.kind != "lora":
                raise ValueError(
                    f"model.quantization: a base in 4 bits trains with tunables.kind = 'lora' only "
                    f"(here {self.tunables.kind!r})"
                )
            if self.model.weights == "random":
                raise ValueError("model.quantization: there are no weights to quantize ('random')")
        if self.training.momentum and self.training.optimizer != "sgd":
            raise ValueError("training.momentum: only with optimizer = 'sgd'")
        if sizes and self.simulation.partition.kind != "iid":
            raise ValueError(
                "simulation.sizes: only for the partition 'iid'; others make their own sizes"
            )
        for where, spec in (("strategy", self.strategy), ("compare.logits", self.compare.logits)):
            if isinstance(spec, Logits):
                self._taught(where, spec)
        splits = (("strategy", self.strategy), ("compare.activations", self.compare.activations))
        for where, half in splits:
            if isinstance(half, Activations) and half.keep_tokens < 1:
                self._thinned(where, half)
        parts = (("strategy", self.strategy), ("compare.parameters", self.compare.parameters))
        for where, part in parts:
            if isinstance(part, Parameters) and part.mentor is not None:
                self._mentored(where, part)
            if isinstance(part, Parameters) and isinstance(part.client, Scaffold):
                self._corrected(where, part)
        self._sized()
        if not self.exchange.resident and self.strategy.kind == "activations":
            raise ValueError(
                "exchange.resident = false: activations cross for every batch, for which sites "
                "have to stay; leave it out"
            )
        for axis in self.sweep:
            counts = {key: len(values) for key, values in axis.items()}
            if len(set(counts.values())) != 1 or not min(counts.values()):
                raise ValueError(
                    f"sweep: keys of one [[sweep]] change together and need as many values each "
                    f"(here {counts})"
                )
        self._coded()
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: the same seed twice")
        if self.task.kind != "classification" and self.tunables.head != "shared":
            raise ValueError(
                "tunables.head: a language model has no task head of its own; leave it out"
            )
        every = self.exchange.clients_per_round
        if every is not None and every > self.simulation.clients:
            raise ValueError(
                f"exchange.clients_per_round: {every} of {self.simulation.clients} clients"
            )
        return self

    def _coded(self) -> None:
        """What a codec would spoil, by role and way."""
        for role, value in self.exchange.codecs.items():
            for key, name in ({"": value} if isinstance(value, str) else value).items():
                head = key.partition(":")[0]
                ways = (head,) if head in WAYS else WAYS
                listed = stages(name)
                if FEEDBACK in listed:
                    self._fed_back(role, name, ways)
                kinds = {(sized(stage) or (stage,))[0] for stage in listed}
                self._left_out(role, name, ways, kinds)

    def _fed_back(self, role: str, name: str, ways: Sequence[str]) -> None:
        """What was left out can be added to the next only where each is a difference."""
        spec, where = self.strategy, f"exchange.codecs.{role} = {name!r}"
        scaffold = isinstance(spec, Parameters) and isinstance(spec.client, Scaffold)
        if role != "parameter" and not (role == "gradient" and scaffold):
            raise ValueError(
                f"{where}: rows differ from message to message, and what is left out of one is no "
                f"part of the next; expected it without '+{FEEDBACK}'"
            )
        if tuple(ways) != ("up",):
            raise ValueError(
                f"{where}: only what clients send is a new difference each time; expected "
                f"exchange.codecs.{role} = {{ up = {name!r} }}"
            )
        if role == "parameter" and self._values("up"):
            raise ValueError(
                f"{where}: needs differences, and here values travel; expected "
                "strategy.kind = 'parameters' with payload = 'delta' or 'change'"
            )
        if not isinstance(spec, Parameters):
            return
        if spec.aggregation == "flexlora":
            raise ValueError(
                f"{where}: flexlora gives the factors another basis in every round, in which what "
                "was left out of the last one means nothing; expected another aggregation, or the "
                f"codec without '+{FEEDBACK}'"
            )
        changing = self.tunables.changes if isinstance(self.tunables, Lora) else ""
        for key, changes in ((f"tunables.{changing}", changing), ("strategy.prune", spec.prune)):
            if changes:
                raise ValueError(
                    f"{where}: what was left out is of one rank; leave {key} out, or expected the "
                    f"codec without '+{FEEDBACK}'"
                )

    def _values(self, way: str) -> bool:
        """Whether tunables themselves travel this way, and no differences."""
        spec = self.strategy
        if isinstance(spec, Parameters):
            return spec.payload == "value" or (spec.payload == "delta" and way == "down")
        return isinstance(spec, Activations)

    def _left_out(self, role: str, name: str, ways: Sequence[str], kinds: set[str]) -> None:
        """Weights, and control variates, of which most numbers or all sizes would be lost."""
        spec, where = self.strategy, f"exchange.codecs.{role} = {name!r}"
        scaffold = isinstance(spec, Parameters) and isinstance(spec.client, Scaffold)
        sparse = sorted(kinds & set(SPARSE))
        for way in ways:
            whole = (role == "parameter" and self._values(way)) or (
                role == "gradient" and scaffold and way == "down"
            )
            if sparse and whole:
                expected = {
                    "up": "payload = 'delta' or 'change', of which only a difference goes up",
                    "down": f"{{ up = {name!r} }}, where what goes up is a difference",
                }[way]
                raise ValueError(
                    f"{where}: what travels {way} is values, of which {sparse[0]!r} would leave "
                    f"few as they are; expected {expected}"
                )
            exact = kinds <= {"none", "fp16", "bf16", "zstd", FEEDBACK} or FEEDBACK in kinds
            if role == "gradient" and scaffold and way == "up" and not exact:
                raise ValueError(
                    f"{where}: c has to hear of all that c_k changes by (client.kind = "
                    f"'scaffold'); expected exchange.codecs.gradient = "
                    f"{{ up = '{name}+{FEEDBACK}' }}, 'fp16' or 'bf16'"
                )

    def _chosen(self) -> None:
        """What multiple choice and Rouge-L ask of the data, and keys that mean nothing without."""
        answered = self.task.kind == "generation" and self.data.prompt is not None
        if self.evaluation.rouge_examples and not answered:
            raise ValueError(
                "evaluation.rouge_examples: Rouge-L compares written responses with given ones; "
                "expected task.kind = 'generation' with data.prompt and data.response"
            )
        if self.task.kind == "multiple-choice":
            if self.data.options is None or self.data.prompt is None:
                missing = "options" if self.data.options is None else "prompt"
                raise ValueError(
                    f"data.{missing}: multiple choice needs the columns data.prompt, data.options "
                    "and data.response (which names the right option)"
                )
            return
        for key in ("options", "option_pattern"):
            if getattr(self.data, key) is not None:
                raise ValueError(f"data.{key}: only with task.kind = 'multiple-choice'")
        if self.data.answer_by != "any":
            raise ValueError("data.answer_by: only with task.kind = 'multiple-choice'")

    def _preferred(self) -> None:
        """What preference tuning asks of the data, and what has no pairs to learn from."""
        if self.task.kind != "preference":
            if self.data.rejected is not None:
                raise ValueError("data.rejected: only with task.kind = 'preference'")
            return
        if self.data.rejected is None or self.data.prompt is None:
            missing = "rejected" if self.data.rejected is None else "prompt"
            raise ValueError(
                f"data.{missing}: preference tuning needs the columns data.prompt, data.response "
                "(the better one) and data.rejected"
            )
        if not self.task.response_only:
            raise ValueError(
                "task.response_only = false: both responses of a pair have the same prompt, of "
                "which nothing is learnt; leave it out"
            )
        if self.training.sampling != "uniform":
            raise ValueError(
                "training.sampling = 'loss': draws row by row, and the two responses of a pair are "
                "learnt together; expected 'uniform'"
            )
        if self.strategy.kind in ("logits", "activations"):
            raise ValueError(
                f"strategy.kind = {self.strategy.kind!r}: preferences are learnt where both "
                "responses and the whole model are; expected 'parameters', 'standalone' or "
                "'centralized' (for fedllm compare: compare.strategies = ['parameters'])"
            )

    def _taught(self, where: str, spec: Logits) -> None:
        """What logits ask of the public set, and settings that would mean nothing."""
        by_loss = spec.knowledge in ("loss", "least-loss")
        if by_loss and not self.public.labelled:
            raise ValueError(
                f"{where}.knowledge = {spec.knowledge!r}: a loss needs targets; set "
                "public.labelled = true, or take 'confidence' or 'entropy'"
            )
        if self.public.choose in LOOKING and not spec.server_model:
            raise ValueError(
                f"public.choose = {self.public.choose!r}: the server's model looks at the rows; "
                f"set {where}.server_model = true, or take 'disagreement', 'feedback' or 'random'"
            )
        if self.public.choose == "feedback" and self.task.kind != "classification":
            raise ValueError(
                "public.choose = 'feedback': compares classes; expected task.kind = "
                f"'classification' (here {self.task.kind!r})"
            )
        if spec.selective and not (by_loss and spec.server_model and spec.clusters == 1):
            raise ValueError(
                f"{where}.selective: compares losses with the server's model; expected knowledge = "
                "'least-loss' (or 'loss'), server_model = true and clusters = 1"
            )
        if spec.form == "top-k" and spec.rest == "renormalize" and spec.temperature != 1:
            raise ValueError(
                f"{where}.temperature = {spec.temperature:g}: what a top-k leaves out has no logit "
                "to be softened; expected 1, or rest = 'uniform'"
            )
        fits = {"logits": ("kl", "mse"), "features": ("mse", "cosine")}.get(spec.form, ("kl",))
        if spec.loss not in fits:
            raise ValueError(
                f"{where}.loss = {spec.loss!r}: says nothing of what form = {spec.form!r} sends; "
                f"expected {' or '.join(map(repr, fits))}"
            )
        if spec.form == "features":
            self._hidden(where, spec)
        if spec.label_share is not None and not self.public.labelled:
            raise ValueError(f"{where}.label_share: only with public.labelled = true")
        if spec.max_entropy < 1 and spec.knowledge != "entropy":
            raise ValueError(
                f"{where}.max_entropy: only with knowledge = 'entropy' (here {spec.knowledge!r})"
            )

    def _thinned(self, where: str, spec: Activations) -> None:
        """What needs all tokens."""
        for key, value, fits in (
            ("task.kind", self.task.kind, self.task.kind == "classification"),
            ("tunables.kind", self.tunables.kind, self.tunables.kind != "prompt"),
        ):
            if not fits:
                raise ValueError(
                    f"{where}.keep_tokens = {spec.keep_tokens:g}: {key} = {value!r} needs every "
                    "token; expected 1, or a classification without virtual tokens"
                )

    def _corrected(self, where: str, spec: Parameters) -> None:
        """What SCAFFOLD's control variates cannot be learnt from."""
        key = f"{where}.client.kind = 'scaffold'"
        if self.training.optimizer != "sgd" or self.training.momentum:
            used = f"momentum = {self.training.momentum:g}" if self.training.momentum else repr(
                self.training.optimizer
            )  # fmt: skip
            raise ValueError(
                f"{key}: (x - y) / (K eta) is a mean of gradients for plain SGD only (here {used});"
                " expected training.optimizer = 'sgd' without momentum, or client.kind = 'prox'"
            )
        if self.exchange.minimum_replies is not None:
            raise ValueError(
                f"{key}: c has to hear of every change of c_k, and a reply that is lost or late "
                "would not be made up for; leave exchange.minimum_replies out"
            )
        if isinstance(self.tunables, Lora) and self.tunables.varies:
            raise ValueError(
                f"{key}: control variates are of one LoRA for all; leave "
                f"tunables.{self.tunables.varies} out, or expected client.kind = 'prox'"
            )
        if spec.prune is not None:
            raise ValueError(
                f"{key}: control variates are of one rank; leave {where}.prune out, or expected "
                "client.kind = 'prox'"
            )
        if spec.aggregation == "flexlora":
            raise ValueError(
                f"{key}: flexlora gives the factors another basis in every round, in which control "
                "variates of the last one mean nothing; expected another aggregation, or "
                "client.kind = 'prox'"
            )

    def _mentored(self, where: str, spec: Parameters) -> None:
        """What a mentor cannot do yet."""
        if spec.client.kind != "plain":
            raise ValueError(
                f"{where}.mentor: its pupil is held back by nothing else; expected "
                f"{where}.client.kind = 'plain' (here {spec.client.kind!r})"
            )
        if spec.prune is not None:
            raise ValueError(f"{where}.mentor: its pupil is not pruned; leave {where}.prune out")
        if self.training.sampling != "uniform":
            raise ValueError(
                f"{where}.mentor: two models have two losses of a row; expected training.sampling "
                f"= 'uniform' (here {self.training.sampling!r})"
            )
        if self.task.kind != "classification":
            raise ValueError(f"{where}.mentor: for task.kind = 'classification' only so far")
        if self.tunables.head == "personal":
            raise ValueError(
                f"{where}.mentor: the common model needs its head; expected tunables.head = "
                "'shared' or 'frozen'"
            )

    def _sized(self) -> None:
        """What LoRA of several ranks asks of the strategy, and rules that mean nothing without."""
        spec, tunables = self.strategy, self.tunables
        lora = tunables if isinstance(tunables, Lora) else None
        key = "" if lora is None else lora.varies
        if key and not isinstance(spec, Parameters):
            raise ValueError(
                f"tunables.{key}: only with strategy.kind = 'parameters' (here {spec.kind!r})"
            )
        if not isinstance(spec, Parameters):
            return
        rule = spec.aggregation
        takes = [name for name in get_args(Aggregation) if name not in ("mean", "uniform")]
        if rule in takes and (lora is None or lora.freeze_a):
            here = "freeze_a = true" if lora is not None else f"tunables.kind = {tunables.kind!r}"
            raise ValueError(
                f"strategy.aggregation = {rule!r}: is about both factors of LoRA; expected 'mean' "
                f"or 'uniform' with {here}"
            )
        if lora is not None and lora.uneven and rule not in takes:
            raise ValueError(
                f"strategy.aggregation = {rule!r}: clients have different ranks (tunables.{key}); "
                f"expected {', '.join(map(repr, takes))}"
            )
        if rule == "flexlora" and self.training.optimizer_state == "keep":
            raise ValueError(
                "training.optimizer_state = 'keep': flexlora gives the factors another basis in "
                "every round, in which what optimizers remember means nothing; expected 'reset', "
                "or another aggregation"
            )
        if lora is not None and lora.sparse is not None:
            self._begun_sparse(lora.sparse, rule)
        if key and spec.mentor is not None:
            raise ValueError(
                f"strategy.mentor: with one LoRA for all so far, without tunables.{key}"
            )

    def _begun_sparse(self, sparse: SparseStart, rule: str) -> None:
        """What SLoRA's two stages ask of the run."""
        if self.rounds <= sparse.rounds:
            raise ValueError(
                f"tunables.sparse.rounds = {sparse.rounds}: LoRA follows; expected rounds = "
                f"{sparse.rounds + 1} or more (here {self.rounds})"
            )
        if rule not in ("mean", "uniform"):
            raise ValueError(
                f"strategy.aggregation = {rule!r}: is about both factors of LoRA, which "
                "tunables.sparse begins without; expected 'mean' or 'uniform'"
            )

    def _hidden(self, where: str, spec: Logits) -> None:
        """What cannot be done with hidden states, which are no distributions."""
        by_loss = spec.knowledge in ("loss", "least-loss")
        doubt = {
            f"knowledge = {spec.knowledge!r}": spec.knowledge in ("confidence", "entropy"),
            f"keep = {spec.keep}": spec.keep and not by_loss,
            f"clusters = {spec.clusters}": spec.clusters > 1,
        }  # fmt: skip
        if self.public.choose == "disagreement":
            raise ValueError(
                "public.choose = 'disagreement': needs distributions, and form = 'features' sends "
                "none; expected another choice"
            )
        for key in (key for key, wrong in doubt.items() if wrong):
            raise ValueError(
                f"{where}.{key}: needs distributions, and form = 'features' sends none; expected "
                "knowledge = 'uniform', 'mean', 'loss' or 'least-loss' and one cluster"
            )
        if spec.temperature != 1:
            raise ValueError(
                f"{where}.temperature = {spec.temperature:g}: form = 'features' sends nothing that "
                "a temperature softens; leave it out"
            )
        headless = self.task.kind == "classification" and spec.server_model
        if headless and (not self.public.labelled or spec.label_share == 0):
            raise ValueError(
                f"{where}.form = 'features': hidden states teach the server's model no head; set "
                "public.labelled = true and leave it a label_share, or set server_model = false"
            )

    def replace(self, **changes: Any) -> Experiment:
        """A changed copy, checked again; e.g. ``replace(strategy=Logits(), seeds=(1,))``."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return Experiment(**{**values, **changes})


class SiteData(Section):
    """A site's own rows: files with the columns of the experiment's ``[data]``."""

    train: str
    test: str
    public: str | None = None
    format: Literal["auto", "csv", "jsonl", "dialogue"] = "auto"


class Allow(Section):
    """What a site lets happen to it; what is not allowed is refused before anything is trained."""

    strategies: tuple[StrategyName, ...] = get_args(StrategyName)
    tunables: tuple[
        Literal["lora", "adapter", "bitfit", "prompt", "prefix", "sparse", "full"], ...
    ] = ("lora", "adapter", "bitfit", "prompt", "prefix", "sparse", "full")
    largest_rank: Positive | None = None
    labels: bool = True
    logits: bool = True

    def refusal(self, experiment: Experiment) -> str:
        """Why this experiment is not allowed here; empty where it is."""
        spec, tunables = experiment.strategy, experiment.tunables
        if spec.kind not in self.strategies:
            return f"strategy.kind = {spec.kind!r} is not allowed here (allow.strategies)"
        kinds: list[str] = [tunables.kind]
        if isinstance(tunables, Lora) and tunables.sparse is not None:
            kinds.append("sparse")
        for kind in kinds:
            if kind not in self.tunables:
                return f"tunables.kind = {kind!r} is not allowed here (allow.tunables)"
        most = self.largest_rank
        if isinstance(tunables, Lora) and most is not None and tunables.rank > most:
            return f"tunables.rank = {tunables.rank}: at most {most} here (allow.largest_rank)"
        if isinstance(spec, Activations) and spec.labels == "server" and not self.labels:
            return "labels may not leave this site (allow.labels): set strategy.labels = 'client'"
        if isinstance(spec, Logits) and not self.logits:
            return "logits may not leave this site (allow.logits)"
        if isinstance(spec, Logits) and experiment.public.choose == "feedback" and not self.labels:
            return "label counts may not leave this site (allow.labels): public.choose = 'feedback'"
        return ""


SITE_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}"


class SiteFile(Section):
    """
    ``site.toml``: what one site has, and what it allows.

    insecure: no TLS and no keys, for trials on one machine.
    """

    name: Annotated[str, Field(pattern=f"^{SITE_NAME}$")]
    data: SiteData
    allow: Allow = Allow()
    insecure: bool = False


class FederationFile(Section):
    """
    ``federation.toml`` in the server's folder: where sites find it, and who they are.

    superlink: host and port of Flower.  sessions: host and port that sites dial for a run.
    wait: seconds for all sites to come.  insecure: no TLS and no keys, for trials on one machine.
    """

    superlink: Annotated[str, Field(pattern=r"^[^:]+:\d+$")]
    sessions: Annotated[str, Field(pattern=r"^[^:]+:\d+$")]
    sites: tuple[str, ...] = ()
    wait: Rate = 300.0
    insecure: bool = False


PATHS = (("model", "name"), ("model", "tokenizer"), ("simulation", "source"),
         ("simulation", "test"), ("public", "source"), ("strategy", "mentor"))  # fmt: skip
_VARIABLE = re.compile(r"(\$?)\$\{(\w+)(?::-([^}]*))?\}")
NO_RUN = ("plan",)  # sections that no run looks at, unless it chooses its cuts by them


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """
    Read, expand, override and check an experiment file.

    ``overrides`` are ``dotted.key=value`` with TOML values (bare words are strings).
    Raises FedllmError naming the file, the key, the value, and what was expected.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FedllmError(f"{path}: cannot be read ({error})") from None
    return parse_text(text, str(path), path.resolve().parent, overrides, path.stem)


def parse_text(
    text: str, origin: str, folder: Path, overrides: Sequence[str] = (), name: str = "experiment",
    foreign: bool = False,
) -> Experiment:  # fmt: skip
    """
    Check the text of a file as ``load`` does.

    foreign: somebody else wrote it; nothing of this machine's environment gets into it.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FedllmError(f"{origin}: not valid TOML: {error}") from None
    values.setdefault("name", name)
    return parse(_literal(values) if foreign else values, origin, folder, overrides, foreign)


def agree(stored: Path, experiment: Experiment, free: Sequence[str] = ()) -> None:
    """
    Raise FedllmError unless a folder's file holds this experiment, so that it can be resumed.

    Keys that an older version did not have are there with their defaults.  free: sections and
    keys that may have changed, as what no run looks at may.
    """
    try:
        found = parse_text(stored.read_text(), str(stored), stored.parent, foreign=True)
    except FedllmError:
        found = None
    if found is None or not same(found, experiment, free):
        raise FedllmError(
            f"{stored}: this folder holds another experiment; resume with the same file and "
            "settings, or take another --out"
        )


def same(one: Experiment, other: Experiment, free: Sequence[str] = ()) -> bool:
    """Whether two experiments differ in nothing but these sections and what no run looks at."""
    looks = isinstance(one.strategy, Activations) and one.strategy.cut == "auto"
    unseen = free if looks else (*NO_RUN, *free)
    return one.model_copy(update={key: getattr(other, key) for key in unseen}) == other


def load_site(path: Path) -> SiteFile:
    """
    Read and check a ``site.toml``; paths in it are relative to its folder.

    Raises FedllmError as ``load`` does.
    """
    values = _expand(_table(path), str(path))
    found = _checked(SiteFile, values, path)
    paths = {}
    for key in ("train", "test", "public"):
        name = getattr(found.data, key)
        if name is not None:
            paths[key] = str(path.resolve().parent / name)
    return found.model_copy(update={"data": found.data.model_copy(update=paths)})


def load_federation(path: Path) -> FederationFile:
    """Read and check a ``federation.toml``. Raises FedllmError as ``load`` does."""
    return _checked(FederationFile, _expand(_table(path), str(path)), path)


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise FedllmError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise FedllmError(f"{path}: not valid TOML: {error}") from None


T = TypeVar("T", bound=Section)


def _checked(kind: type[T], values: dict[str, Any], path: Path) -> T:
    try:
        return kind.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise FedllmError(_explain(error, values, str(path))) from None


def parse(
    values: dict[str, Any], origin: str, folder: Path | None, overrides: Sequence[str] = (),
    foreign: bool = False,
) -> Experiment:  # fmt: skip
    """
    Check a dictionary as ``load`` does; ``origin`` is what errors name.

    folder: that relative paths are of; None: there are none any more.
    """
    for override in sorted(overrides, key=lambda one: not one.partition("=")[0].endswith("kind")):
        _override(values, override)
    values = values if foreign else _expand(values, origin)
    if folder is not None:
        _resolve_all(values, folder)
    for section in ("tunables", "strategy"):
        if isinstance(values.get(section), dict):
            default = {"tunables": "lora", "strategy": "parameters"}[section]
            values[section].setdefault("kind", default)
    try:
        return Experiment.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise FedllmError(_explain(error, values, origin)) from None


def axis(text: str) -> Axis:
    """
    ``key=a,b,c`` -> an axis; values are TOML, bare words are strings.

    Raises FedllmError for anything else.
    """
    key, sign, listed = text.partition("=")
    if not sign or not key.strip() or not listed.strip():
        raise FedllmError(f"--sweep {text}: expected key=a,b,c, e.g. --sweep tunables.rank=2,8,32")
    try:
        values = tomllib.loads(f"value = [{listed}]")["value"]
    except tomllib.TOMLDecodeError:
        values = [_value(word.strip()) for word in listed.split(",")]
    key = key.strip()
    if tuple(key.split(".")) in PATHS:
        values = [_named(value, Path.cwd()) for value in values]
    return {key: tuple(values)}


def _value(text: str) -> Any:
    """A TOML value, or the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def vary(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """
    The experiment with other values of these keys (dotted), checked again.

    Raises FedllmError naming the key that there is not, or the value that does not fit.
    """
    values = experiment.model_dump(mode="json", exclude_none=True)
    for key, value in sorted(settings.items(), key=lambda one: not one[0].endswith("kind")):
        _set(values, key, value, f"sweep {key}", here=False)
    return parse(values, "sweep", None, foreign=True)


def dump(experiment: Experiment) -> str:
    """The resolved experiment as TOML, with every default, that ``load`` reads back equal."""
    lines: list[str] = []
    _write(lines, experiment.model_dump(mode="json", exclude_none=True), "")
    return "\n".join(lines).lstrip("\n") + "\n"


def _write(lines: list[str], table: Mapping[str, Any], prefix: str) -> None:
    for key, value in table.items():
        if not isinstance(value, dict):
            lines.append(f"{_bare(key)} = {_toml(value)}")
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{prefix}{_bare(key)}]"]
            _write(lines, value, f"{prefix}{_bare(key)}.")


def _bare(key: str) -> str:
    """A key as TOML has it: a client's name may hold dots, spaces or anything else."""
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _quoted(key)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    text = _quoted(value)
    return _VARIABLE.sub(lambda match: f"${match[0]}", text)  # nobody's environment is meant


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML forbids it bare


def _literal(value: Any) -> Any:
    """What ``dump`` wrote, whatever the environment: ``$${NAME}`` means ``${NAME}``."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: match[0].removeprefix(match[1]), value)
    return value


def _expand(value: Any, origin: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, origin) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, origin) for item in value]
    if isinstance(value, str):

        def variable(match: re.Match[str]) -> str:
            escaped, name, default = match.groups()
            if escaped:
                return match[0][1:]
            found = os.environ.get(name, default)
            if found is None:
                raise FedllmError(
                    f"{origin}: ${{{name}}} is not set; set it, or write ${{{name}:-default}}"
                )
            return found

        return _VARIABLE.sub(variable, value)
    return value


def _path(text: str, folder: Path) -> str:
    """A path that exists relative to the file becomes absolute; other names stay as they are."""
    looks_local = text.startswith((".", "/", "~"))
    candidate = folder / Path(text).expanduser()
    whole = Path(re.sub(r"#\d+$", "", str(candidate)))
    there = candidate.exists() or whole.exists()
    return str(candidate.resolve()) if looks_local or there else text


def _named(value: Any, folder: Path) -> Any:
    """The value of a key in PATHS: a path, the word ``builtin``, or something else altogether."""
    return _path(value, folder) if isinstance(value, str) and value != "builtin" else value


def _resolve_all(values: dict[str, Any], folder: Path) -> None:
    """Every path of an experiment, also those that a sweep sets."""
    sweep, compare = values.get("sweep"), values.get("compare")
    for section, key in PATHS:
        _resolve(values.get(section), key, folder)
        for axis in sweep if isinstance(sweep, list | tuple) else ():
            name = f"{section}.{key}"
            if isinstance(axis, dict) and isinstance(axis.get(name), list | tuple):
                axis[name] = [_named(value, folder) for value in axis[name]]
            for part in axis.get(section, ()) if isinstance(axis, dict) else ():
                _resolve(part, key, folder)  # of a whole section
    if isinstance(compare, dict):
        _resolve(compare.get("parameters"), "mentor", folder)
    for strategy in (values.get("strategy"), isinstance(compare, dict) and compare.get("logits")):
        if not isinstance(strategy, dict):
            continue
        found = strategy.get("client_models")
        if isinstance(found, list):
            strategy["client_models"] = [_named(item, folder) for item in found]
        elif isinstance(found, dict):
            strategy["client_models"] = {k: _named(item, folder) for k, item in found.items()}


def _resolve(section: Any, key: str, folder: Path) -> None:
    if isinstance(section, dict) and section.get(key) is not None:
        section[key] = _named(section[key], folder)


def _override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise FedllmError(f"--set {override}: expected key=value, e.g. --set training.rate=0.001")
    value = _value(text)
    _set(values, key.strip(), value, f"--set {override}")


def _set(values: dict[str, Any], key: str, value: Any, origin: str, here: bool = True) -> None:
    *sections, last = key.split(".")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise FedllmError(f"{origin}: {section!r} is not a section")
    if here and (*sections, last) in PATHS:
        value = _named(value, Path.cwd())
    if last == "kind" and table.get("kind") != value:
        table.clear()  # another kind has other keys; those of the old one would be refused
    table[last] = value


def _explain(error: ValidationError, values: dict[str, Any], origin: str) -> str:
    """The first problem, with the key as the user wrote it and the nearest valid choice."""
    problem = error.errors(include_url=False)[0]
    keys = [str(part) for part in problem["loc"]]
    shown = ".".join(key for key, real in _walk(keys, values) if real) or "file"
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        return f"{origin}: unknown key {shown!r}; {nearest(keys[-1], _known(keys[:-1]))}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{origin}: {message}" if shown == "file" else f"{origin}: {shown}: {message}"
    expected = str(problem.get("ctx", {}).get("expected", ""))
    if problem["type"] == "union_tag_invalid":
        expected = str(problem["ctx"]["expected_tags"])
        value = problem["ctx"]["tag"]
        shown += ".kind"
    choices = re.findall(r"'([^']*)'", expected)
    hint = f"; {nearest(value, choices)}" if choices else ""
    return f"{origin}: {shown} = {json.dumps(value, default=str)}: {message}{hint}"


def _walk(keys: list[str], values: Any) -> list[tuple[str, bool]]:
    """Which parts of an error's location stand in the file (a union adds its tag)."""
    out = []
    for position, key in enumerate(keys):
        if isinstance(values, dict) and key in values:
            values = values[key]
            out.append((key, True))
        elif isinstance(values, list) and key.isdigit():
            out.append((key, True))
        else:
            out.append((key, position == len(keys) - 1))
    return out


def _known(keys: list[str]) -> list[str]:
    """Field names of the section at this location."""
    model: Any = Experiment
    for key in keys:
        if isinstance(model, type) and issubclass(model, BaseModel) and key in model.model_fields:
            model = model.model_fields[key].annotation
        else:
            options: list[Any] = [
                option
                for option in get_args(model)
                if isinstance(option, type) and issubclass(option, BaseModel)
            ]
            if key.isdigit() and options:  # one of a list
                model = options[0]
                continue
            tagged = [
                option
                for option in options
                if key in get_args(option.model_fields["kind"].annotation)
            ]
            model = tagged[0] if tagged else model
    return list(model.model_fields) if hasattr(model, "model_fields") else []
