"""Clients exchange parameters (FedLLMs): Yan et al., section II-A, steps a1 to a4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.aggregation import OPTIMIZERS, RULES, UNEQUAL, by_owners
from fedllm.aggregation.balance import balanced
from fedllm.aggregation.mean import Updates
from fedllm.aggregation.unequal import product_gap
from fedllm.data.examples import Examples
from fedllm.exchange import Exchange
from fedllm.lora import pairs, rank_of, resized
from fedllm.message import Message, Role, of_role
from fedllm.models.loading import LanguageModel
from fedllm.strategies import corrections
from fedllm.strategies.base import Group, ServerState, Setup, Site, Tasks, mean_loss, units
from fedllm.strategies.mentor import MENTOR, learn_together
from fedllm.strategies.ranks import Ranks, kept_at, pruning
from fedllm.training.jobs import Tasked

SHARE = "_share"  # after a client's name: what it counted, where usefulness decides
PRODUCT_GAP = "product_gap"  # of what was combined to the mean of the clients' products


class Parameters:
    """
    FedAvg over the tunables (arXiv 1602.05629), with a mentor at each client FedKD (K-03).

    With other server and client steps FedAvgM, FedAdagrad, FedYogi, FedAdam, FedProx, SCAFFOLD
    (P-30), alone or together.

    ``payload = "change"``: down goes the difference from the first values, which every side draws
    from the run's seed, up that from what came; a codec that leaves some of a tensor out then
    leaves no weight of the base out.
    """

    def __init__(
        self, options: ex.Parameters, setup: Setup, model: LanguageModel,
        public: Examples | None = None,
    ) -> None:  # fmt: skip
        """``model``: gives the tunables their first values."""
        self.options, self.setup, self.model = options, setup, model
        self.rule = RULES.get(options.aggregation)  # none: it is one of UNEQUAL
        self.ranks = Ranks(options, setup, model)
        numbers = options.server.model_dump(exclude={"kind"})
        self.step = partial(OPTIMIZERS[options.server.kind], **numbers)
        self.scaffold = isinstance(options.client, ex.Scaffold)
        self.evaluates_clients = options.mentor is not None
        self.personal = model.head if model.spec.head == "personal" else frozenset[str]()
        self.tasks: Tasks = {"train": self.train}

    def start(self) -> ServerState:
        """The first values, without what stays personal."""
        shared = {n: t for n, t in self.ranks.first.items() if n not in self.personal}
        return ServerState(shared, corrections.variates(shared) if self.scaffold else {})

    # server -----------------------------------------------------------------------------------

    def serve(
        self, state: ServerState, cohort: Sequence[str], ask: Exchange, rng: np.random.Generator
    ) -> ServerState:
        """One round."""
        with ask.meter.step("a4"):
            shared, told = self.ranks.due(state, ask.round)
        optimizer = kept_at(state.optimizer, state.shared, shared, self.options.server)
        ranks = {client: self.ranks.of(state, client, shared, ask.round) for client in cohort}
        shares = {client: (rank, self.ranks.names.get(client)) for client, rank in ranks.items()}
        given = {share: self.ranks.part(shared, *share) for share in set(shares.values())}
        down = given if self.options.payload != "change" else {
            share: _less(values, self.ranks.initial(share[0])) for share, values in given.items()
        }  # fmt: skip
        c = corrections.controls(optimizer)  # only where all have one rank
        sent = {
            share: Message("a1", "train", values | c,
                           of_role(Role.PARAMETER, values) | of_role(Role.GRADIENT, c))
            for share, values in down.items()
        }  # fmt: skip
        wants = {share: self.ranks.want(values | c) for share, values in given.items()}
        replies = ask.gather(
            {client: sent[share] for client, share in shares.items()},
            {client: wants[share] for client, share in shares.items()},
        )  # a1, a2, a3
        updates = {
            client: {name: reply.tensors[name] for name in given[shares[client]]}
            for client, reply in replies.items()
        }
        values = updates
        if self.options.payload != "value":
            values = {
                client: _plus(resized(given[shares[client]], rank_of(update)), update)
                for client, update in updates.items()
            }
        with ask.meter.step("a4"):
            weights = self._weights(replies)
            change: Group | None = None
            if self.rule is None:
                rule = UNEQUAL[self.options.aggregation]
                combined = by_owners(rule, values, weights, shared)
            elif self.options.payload == "value":
                combined = by_owners(self._mean, updates, weights, shared)
            else:
                still = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
                change = by_owners(self._mean, updates, weights, still)
                combined = _plus(shared, change)
            stepped = combined
            if self.options.server.kind != "average":
                change = _less(combined, shared) if change is None else change
                optimizer, stepped = self.step(optimizer, shared, change)
            if c:
                changes = [replies[client].tensors for client in sorted(replies)]
                optimizer = {**optimizer, **corrections.folded(c, changes, len(ask.clients()))}
        loss = mean_loss(replies)
        facts: dict[str, int | float | str] = {
            "loss": loss, **told, **self.ranks.noted(state, shared, loss)
        }  # fmt: skip
        if pairs(shared):  # of the rule, whatever the server makes of it
            facts[PRODUCT_GAP] = product_gap(values, weights, combined)
        if self.options.balance is not None:
            total = sum(weights[client] for client in sorted(weights))
            facts |= {f"{client}{SHARE}": weights[client] / total for client in sorted(weights)}
        kept = self.ranks.told(state, values, ranks)
        return replace(state, shared=stepped, optimizer=optimizer, clients=kept, facts=facts)

    def _mean(
        self, updates: Updates, weights: Mapping[str, float], before: Mapping[str, Tensor]
    ) -> Group:
        """A rule for clients of one rank, which asks nothing of what was before."""
        assert self.rule is not None
        return self.rule(updates, weights)

    def _weights(self, replies: Mapping[str, Message]) -> dict[str, float]:
        """What each client counts."""
        if self.options.aggregation == "uniform":
            return dict.fromkeys(replies, 1.0)
        weights = {client: float(r.facts["weight"]) for client, r in replies.items()}
        spec = self.options.balance
        if spec is None:
            return weights
        losses = {client: float(r.facts["loss"]) for client, r in replies.items()}
        return balanced(weights, losses, spec.temperature, spec.floor, spec.cap)

    def candidate(self, state: ServerState) -> Group:
        """The global tunables."""
        return state.shared

    # client -----------------------------------------------------------------------------------

    def own(self, site: Site) -> Group:
        """What stays at this client: its mentor, or its head, if that is personal."""
        if self.options.mentor is not None:
            return {**site.model.initial, **site.group(MENTOR)}
        return {n: self.model.initial[n] for n in self.personal} | site.group("personal")

    def train(self, site: Site, message: Message) -> Tasked[Message]:
        """a2 fine-tune what came with a1, a3 send it back."""
        c = corrections.controls(message.tensors)
        start = {name: tensor for name, tensor in message.tensors.items() if name not in c}
        if self.options.payload == "change":
            start = _plus(self.ranks.initial(rank_of(start)), start)
        site = replace(site, model=site.model.stage(start))
        if site.setup.training.optimizer_state == "keep":
            self.ranks.rebased(site)
        if self.options.mentor is not None:
            result = yield from learn_together(site, start, self.own(site), "a2")
            change: Group = {}
        else:
            fewer = pruning(self.options, start)
            result, change = yield from corrections.fine_tune(
                site, self.options.client, {**self.own(site), **start}, start, c, "a2", fewer
            )
            if fewer is not None:
                result = replace(result, values=fewer.cut(start, result.values))
            site.keep("personal", {name: result.values[name] for name in self.personal})
        update = {name: result.values[name] for name in start}
        if self.options.payload != "value":
            update = _less(update, resized(start, rank_of(update)))
        return Message(
            "a3", tensors=update | change,
            roles=of_role(Role.PARAMETER, update) | of_role(Role.GRADIENT, change),
            facts={"weight": units(site), "loss": result.loss},
        )  # fmt: skip


def _plus(values: Group, update: Group) -> Group:
    return {name: values[name] + update[name] for name in update}


def _less(values: Group, start: Group) -> Group:
    return {name: values[name] - start[name] for name in values}
