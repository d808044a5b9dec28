"""What the three strategies share: the server's state, a client as its half sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.data.clients import ClientData
from fedllm.data.examples import Examples
from fedllm.exchange import Exchange
from fedllm.knowledge.interpreter import Interpreter
from fedllm.lora import moved, rank_of
from fedllm.message import Message
from fedllm.models.loading import LanguageModel
from fedllm.states import States
from fedllm.training.evaluate import likelihoods
from fedllm.training.jobs import Fit, Penalty, Tasked, Trained
from fedllm.training.learner import Plan, Pull, Span
from fedllm.training.meter import Meter
from fedllm.training.objectives import Objective, Preference, cross_entropy
from fedllm.training.sampling import chances

Group = dict[str, Tensor]
LOSSES = "losses"  # group of a client's state: what is known of its private rows


class Cutter(Protocol):
    """Chooses everybody's cut from what is measured of machines and links."""

    def at(self, round: int) -> dict[str, int]:
        """By what this round measured; 0: by what is known beforehand."""
        ...

    def seconds(self, round: int, cuts: Mapping[str, int]) -> float:
        """What a round takes of these clients, with these cuts."""
        ...

    def changed(self, since: int, now: int) -> bool:
        """Whether round ``now`` measured something far from what round ``since`` did."""
        ...


@dataclass(frozen=True)
class Setup:
    """What both halves know of the experiment."""

    seed: int
    rounds: int
    training: ex.Training
    evaluation: ex.Evaluation
    public: ex.Public
    longest: int
    # of clients with another tokenizer than the server's: to the server, and back
    interpreters: Mapping[str, tuple[Interpreter, Interpreter]] = field(default_factory=dict)
    task: ex.Task = field(default_factory=ex.Task)
    width: int = 0  # of the clients' hidden states, where these are what they say
    ranks: Mapping[str, int] = field(default_factory=dict)  # of clients who have their own
    budgets: Mapping[str, ex.Budget] = field(
        default_factory=dict
    )  # in bytes, of those who have one
    modules: Mapping[str, ex.Modules] = field(default_factory=dict)  # as ranks
    cuts: Mapping[str, int] = field(default_factory=dict)  # of clients who have their own
    cutter: Cutter | None = None  # where cuts are chosen as it goes


@dataclass(frozen=True)
class ServerState:
    """
    State in, state out. ``shared``: tunables; ``optimizer``: of server-side training;
    ``clients``: what the server keeps per client; ``facts``: small values; ``public``: what it
    keeps of public rows.
    """

    shared: Group = field(default_factory=dict)
    optimizer: Group = field(default_factory=dict)
    clients: dict[str, Group] = field(default_factory=dict)
    facts: dict[str, int | float | str] = field(default_factory=dict)
    public: Group = field(default_factory=dict)


@dataclass(slots=True)
class Site:
    """
    One client: its model, its rows, and its state.

    data: where its rows are, by its name.  server_model, server_data: the server's model, where it
    is another, and the rows in that model's tokens, to evaluate it.

    states: what is saved with every committed round; this client's is named
    ``<group>/<tensor>``.  live: models in training, graphs; gone when a round ends or is asked
    again.
    """

    name: str
    model: LanguageModel
    data: Mapping[str, ClientData]
    setup: Setup
    meter: Meter
    public: Examples | None = None
    server_model: LanguageModel | None = None
    server_data: Mapping[str, ClientData] | None = None
    states: States = field(default_factory=States)
    live: dict[str, Any] = field(default_factory=dict)
    round: int = 0

    @property
    def train(self) -> Examples:
        """Its private rows; cut out anew each time, so ask once."""
        return self.data[self.name].train

    @property
    def test(self) -> Examples:
        """Its held-out rows; cut out anew each time, too."""
        return self.data[self.name].test

    def group(self, name: str) -> Group:
        """The tensors of one group of the state."""
        prefix = f"{name}/"
        state = self.states.get(self.name)
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace one group of the state."""
        before = self.states.get(self.name)
        state = {k: v for k, v in before.items() if not k.startswith(f"{name}/")}
        if tensors or len(state) < len(before):
            self.states.put(self.name, state | {f"{name}/{k}": t for k, t in tensors.items()})

    def plan(self, examples: Examples, *purpose: object, size: int | None = None) -> Plan:
        """Batches over some examples, from this client's own streams."""
        training = self.setup.training
        return Plan(
            examples, size or training.batch_size, training.padding, self.setup.longest,
            (self.setup.seed, self.name, *purpose), str(self.model.device),
        )  # fmt: skip

    def private(self) -> Plan:
        """Batches of its private rows, drawn as ``training.sampling`` says."""
        training, train = self.setup.training, self.train
        plan = self.plan(train, "private")
        if training.sampling == "uniform":
            return plan
        return replace(plan, chances=chances(self._losses(len(train)), training.sampling_floor))

    def _losses(self, rows: int) -> Tensor:
        """The last known loss of each private row; NaN where there is none."""
        return self.group(LOSSES).get("rows", torch.full((rows,), torch.nan))

    def learnt(self, losses: Mapping[int, float], rows: int) -> None:
        """Note losses of some of its private rows, by their numbers."""
        if losses:
            known = self._losses(rows).clone()
            known[torch.tensor(list(losses))] = torch.tensor(list(losses.values()))
            self.keep(LOSSES, {"rows": known})

    def fine_tune(
        self, tunables: Group, step: str, first: int | None = None, last: int | None = None,
        penalty: Penalty | None = None, pull: Pull | None = None,
    ) -> Tasked[Trained]:  # fmt: skip
        """This round's epochs over the private rows (a2, b1), or batches first to last - 1."""
        training = self.setup.training
        plan = self.private()
        per_round = plan.per_pass * training.epochs
        begin = per_round * (self.round - 1) if first is None else first
        keep = training.optimizer_state == "keep"
        objective = yield from self._objective(plan.examples, step)
        result: Trained = yield Fit(
            self.model, tunables, plan, objective, training,
            begin, begin + per_round if last is None else last,
            Span(self.round - 1, self.setup.rounds), self.meter, step,
            moved(self.group("optimizer"), rank_of(tunables)) if keep else None,
            penalty=penalty, pull=pull,
        )  # fmt: skip
        if keep:
            self.keep("optimizer", result.optimizer)
        self.learnt(result.rows, len(plan.examples))
        return result

    def _objective(self, examples: Examples, step: str) -> Tasked[Objective]:
        """What local training minimizes."""
        task = self.setup.task
        if task.kind != "preference":
            return cross_entropy
        reference = yield from self.reference("train", examples, step)
        return Preference.of(examples, reference, task.beta, self.model.device)

    def reference(self, name: str, examples: Examples, step: str) -> Tasked[Tensor]:
        """
        How much the tunables' first values prefer the better response of each pair: ln p - ln p'.

        Float64 [pairs]. Found out when first asked for, and kept with the state under ``name``.
        """
        kept = self.group("reference")
        if name not in kept:
            size = self.setup.evaluation.batch_size
            scores = yield from likelihoods(
                self.model, self.model.initial, examples, size, self.meter, step
            )
            kept[name] = torch.from_numpy(scores[0::2] - scores[1::2])
            self.keep("reference", kept)
        return kept[name]


Tasks = Mapping[str, Callable[[Site, Message], Message | Tasked[Message]]]
"""A client's answers by task; those that train or infer yield jobs (``training.jobs``)."""


class Strategy(Protocol):
    """
    Server half and client half of one exchange.

    tasks: the client half, one method a task.  evaluates_clients: clients have models of their
    own, which are evaluated besides the candidate.
    """

    tasks: Tasks
    evaluates_clients: bool

    def start(self) -> ServerState:
        """State before the first round."""
        ...

    def serve(
        self, state: ServerState, cohort: Sequence[str], ask: Exchange, rng: np.random.Generator
    ) -> ServerState:
        """One round of the server half."""
        ...

    def candidate(self, state: ServerState) -> Group | None:
        """The model to evaluate, or none."""
        ...

    def own(self, site: Site) -> Group:
        """A client's own tunables: of its own model, or what completes the candidate."""
        ...


def units(site: Site) -> float:
    """What the loss averages over: a client's rows, its predicted tokens, or its pairs."""
    train = site.train
    return float(train.cases if len(train.option) else train.targets.sum())


def mean_loss(replies: Mapping[str, Message]) -> float:
    """Mean of the training losses that the replies state."""
    return sum(float(r.facts["loss"]) for r in replies.values()) / len(replies)
