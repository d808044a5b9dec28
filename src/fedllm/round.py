"""
The loop of an experiment. Start reading here: a round from top to bottom.

select the cohort -> the strategy asks, combines and steps -> evaluate -> commit
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedllm import experiment as ex
from fedllm.checkpoint import Committed
from fedllm.exchange import Exchange, Want
from fedllm.ledger import Ledger
from fedllm.message import Failure, Message, Role, of_role
from fedllm.models.loading import LanguageModel
from fedllm.remote import Distant
from fedllm.strategies.base import Group, ServerState, Strategy
from fedllm.streams import stream
from fedllm.training.evaluate import Metrics, add, metrics, misfit
from fedllm.training.known import paid, restore_paid
from fedllm.worker import Worker

CLOCK = "clock"  # seconds of a round under the clock of ``[plan]``, where cuts go by it
SAID = ("loss", "_gap", "_share", CLOCK)  # ends of facts that belong into a run's history
DETAILED = 100  # with more clients than this, theirs are reported without each class


@dataclass(frozen=True)
class Federation:
    """All that a run needs, built by ``federation.build``."""

    experiment: ex.Experiment
    seed: int
    strategy: Strategy
    exchange: Exchange
    clients: Worker | Distant
    ledger: Ledger
    labels: Sequence[str]
    model: LanguageModel

    @property
    def worker(self) -> Worker:
        """The clients, where they are in this process."""
        assert isinstance(self.clients, Worker)
        return self.clients


def run(federation: Federation, begin: Committed, commit: Callable[[Committed], None]) -> Committed:
    """Rounds after ``begin`` to the last; ``commit`` is called at the end of each."""
    experiment, strategy, ask = federation.experiment, federation.strategy, federation.exchange
    committed = begin
    for number in range(begin.round + 1, experiment.rounds + 1):
        cohort = select(federation, number)
        ask.open(number)
        restore_paid(ask.meter, committed.server.facts)
        rng = stream(federation.seed, "server", number)
        state = strategy.serve(committed.server, cohort, ask, rng)
        ask.close()
        state = replace(state, facts={**state.facts, **paid(ask.meter)})
        entry: dict[str, Any] = {
            "round": number, "cohort": cohort,
            **{k: v for k, v in state.facts.items() if k.endswith(SAID)},
        }  # fmt: skip
        every = experiment.evaluation.every
        if number == experiment.rounds or (every and number % every == 0):
            entry |= evaluate(federation, state)
        states = federation.clients.snapshot()
        federation.ledger.commit()
        committed = Committed(number, state, states, [*committed.history, entry])
        commit(committed)
    return committed


def select(federation: Federation, number: int) -> list[str]:
    """The clients of this round, drawn from the round's own stream."""
    clients = sorted(federation.exchange.transport.clients())
    wanted = federation.experiment.exchange.clients_per_round
    if isinstance(federation.experiment.strategy, ex.Standalone | ex.Centralized):
        return clients  # a bound trains everybody in every round
    if wanted is None or wanted >= len(clients):
        return clients
    rng = stream(federation.seed, "cohort", number)
    return sorted(clients[i] for i in rng.permutation(len(clients))[:wanted])


def evaluate(federation: Federation, state: ServerState) -> dict[str, Any]:
    """
    Ask all clients for their sums over held-out rows, of the candidate and of their own models.

    Returns ``global`` (the candidate, or None), ``mean`` (the clients' own models over all their
    rows) and ``clients`` (each one's model, or the candidate, on its own rows).
    """
    strategy = federation.strategy
    candidate = strategy.candidate(state)
    found: dict[str, Any] = {"global": None, "mean": None}
    if candidate is not None:
        found["global"], found["clients"] = _ask(federation, candidate, "candidate")
    if strategy.evaluates_clients:
        found["mean"], found["clients"] = _ask(federation, {}, "own")
    return found


def _ask(federation: Federation, tunables: Group, model: str) -> tuple[Metrics, dict[str, Metrics]]:
    """One kind of evaluation; replies are summed as they come."""
    message = Message(
        "eval", "evaluate", tunables, of_role(Role.PARAMETER, tunables), {"model": model}
    )
    clients = sorted(federation.exchange.transport.clients())
    labels, task = federation.labels, federation.experiment.task.kind
    want = Want(look=lambda reply: misfit(reply.tensors, task, len(labels)))
    sums: dict[str, Tensor] = {}
    each: dict[str, Metrics] = {}
    failures = []
    for client, reply in federation.exchange.ask(dict.fromkeys(clients, message), want):
        if isinstance(reply, Failure):
            failures.append(f"{client}: {reply.reason}")
            continue
        sums = add([sums, reply.tensors]) if sums else dict(reply.tensors)
        each[client] = metrics(reply.tensors, labels)
        if len(clients) > DETAILED:
            each[client].pop("per_class", None)
    federation.exchange.enough(len(each), len(clients), "; ".join(failures))
    whole = metrics(sums, labels)
    if failures:
        whole["missing_clients"] = len(failures)
    return whole, dict(sorted(each.items()))
