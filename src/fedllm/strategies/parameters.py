"""Clients exchange parameters (FedLLMs): Yan et al., section II-A, steps a1 to a4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from fedllm import experiment as ex
from fedllm.aggregation import OPTIMIZERS, RULES
from fedllm.data.examples import Examples
from fedllm.exchange import Exchange, Want, like
from fedllm.message import Message, Role, of_role
from fedllm.models.loading import LanguageModel
from fedllm.strategies import corrections
from fedllm.strategies.base import Group, ServerState, Setup, Site, Tasks, mean_loss, units
from fedllm.strategies.mentor import MENTOR, learn_together
from fedllm.training.jobs import Tasked


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
        self.rule = RULES[options.aggregation]
        numbers = options.server.model_dump(exclude={"kind"})
        self.step = partial(OPTIMIZERS[options.server.kind], **numbers)
        self.scaffold = isinstance(options.client, ex.Scaffold)
        self.evaluates_clients = options.mentor is not None
        self.personal = model.head if model.spec.head == "personal" else frozenset[str]()
        self.tasks: Tasks = {"train": self.train}

    def start(self) -> ServerState:
        """The first values, without what stays personal."""
        shared = {n: t for n, t in self.model.initial.items() if n not in self.personal}
        return ServerState(shared, corrections.variates(shared) if self.scaffold else {})

    # server -----------------------------------------------------------------------------------

    def serve(
        self, state: ServerState, cohort: Sequence[str], ask: Exchange, rng: np.random.Generator
    ) -> ServerState:
        """One round."""
        down = state.shared
        if self.options.payload == "change":
            down = {name: down[name] - self.model.initial[name] for name in down}
        c = corrections.controls(state.optimizer)
        roles = of_role(Role.PARAMETER, down) | of_role(Role.GRADIENT, c)
        sent = Message("a1", "train", down | c, roles)
        want = Want(("loss",), ("weight",), like(state.shared | c))
        replies = ask.gather(dict.fromkeys(cohort, sent), want)  # a1, a2, a3
        with ask.meter.step("a4"):
            weights = {client: float(r.facts["weight"]) for client, r in replies.items()}
            updates = {k: {n: r.tensors[n] for n in down} for k, r in replies.items()}
            combined, optimizer = self.rule(updates, weights), state.optimizer
            value = self.options.payload == "value"
            if not value or self.options.server.kind != "average":
                if value:
                    combined = {n: tensor - state.shared[n] for n, tensor in combined.items()}
                optimizer, combined = self.step(optimizer, state.shared, combined)
            if c:
                changes = [replies[k].tensors for k in sorted(replies)]
                optimizer = {**optimizer, **corrections.folded(c, changes, len(ask.clients()))}
        return replace(
            state, shared=combined, optimizer=optimizer, facts={"loss": mean_loss(replies)}
        )

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
            start = {name: self.model.initial[name] + start[name] for name in start}
        if self.options.mentor is not None:
            result = yield from learn_together(site, start, self.own(site), "a2")
            change: Group = {}
        else:
            result, change = yield from corrections.fine_tune(
                site, self.options.client, {**self.own(site), **start}, start, c, "a2"
            )
            site.keep("personal", {name: result.values[name] for name in self.personal})
        update = {name: result.values[name] for name in start}
        if self.options.payload != "value":
            update = {name: update[name] - start[name] for name in update}
        return Message(
            "a3", tensors=update | change,
            roles=of_role(Role.PARAMETER, update) | of_role(Role.GRADIENT, change),
            facts={"weight": units(site), "loss": result.loss},
        )  # fmt: skip
