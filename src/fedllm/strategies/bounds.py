"""Bounds, without any exchange: each client alone, or all private data in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedllm import experiment as ex
from fedllm.data.examples import Examples
from fedllm.exchange import Exchange, Want
from fedllm.message import Message
from fedllm.models.loading import LanguageModel
from fedllm.strategies.base import Group, ServerState, Setup, Site, Tasks, mean_loss
from fedllm.training.jobs import Tasked


class Standalone:
    """
    Our own trainer, without federation: rounds x epochs passes with one persistent optimizer.

    ``centralized`` is the same with one client that has everybody's rows.
    """

    evaluates_clients = True

    def __init__(
        self, options: ex.Standalone | ex.Centralized, setup: Setup, model: LanguageModel,
        public: Examples | None = None,
    ) -> None:  # fmt: skip
        """options.steps: optimizer steps of each client over all rounds, in order of names."""
        self.steps = options.steps if isinstance(options, ex.Standalone) else ()
        # One long training: its optimizer goes on from round to round
        self.setup = replace(
            setup, training=setup.training.model_copy(update={"optimizer_state": "keep"})
        )
        self.tasks: Tasks = {"alone": self.alone}

    def start(self) -> ServerState:
        """Nothing."""
        return ServerState()

    def serve(
        self, state: ServerState, cohort: Sequence[str], ask: Exchange, rng: np.random.Generator
    ) -> ServerState:
        """Tell each client to go on."""
        requests = {}
        for number, client in enumerate(sorted(cohort)):
            steps = self.steps[number] if self.steps else 0
            requests[client] = Message("alone", "alone", facts={"steps": steps})
        replies = ask.gather(requests, Want(("loss",)))
        return replace(state, facts={"loss": mean_loss(replies)})

    def candidate(self, state: ServerState) -> Group | None:
        """There is no common model."""
        return None

    def own(self, site: Site) -> Group:
        """The client's model."""
        return {**site.model.initial, **site.group("tunables")}

    def alone(self, site: Site, message: Message) -> Tasked[Message]:
        """Train on the private rows."""
        site.setup = self.setup
        first, last = None, None
        if total := int(message.facts["steps"]):
            rounds = self.setup.rounds
            first, last = total * (site.round - 1) // rounds, total * site.round // rounds
        result = yield from site.fine_tune(self.own(site), "local", first, last)
        site.keep("tunables", result.values)
        return Message("local", facts={"loss": result.loss})
