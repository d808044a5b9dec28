"""
Clients exchange logits of a public set (KD-FedLLMs): Yan et al., section II-B, b1 to b8.

No parameter travels. With ``server_model = false`` this is FedMD (arXiv 1910.03581).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.aggregation import knowledge as rules
from fedllm.aggregation.knowledge import KNOWLEDGE, Voices
from fedllm.data.examples import NOTHING, Examples
from fedllm.errors import FedllmError
from fedllm.exchange import Exchange, Want
from fedllm.flat import Ints
from fedllm.message import Fact, Message, Role, of_role
from fedllm.models.loading import LanguageModel
from fedllm.strategies.base import Group, ServerState, Setup, Site, Tasks, mean_loss, units
from fedllm.training.cohort import alone
from fedllm.training.evaluate import logits_of
from fedllm.training.jobs import Fit, Tasked, Trained
from fedllm.training.learner import Plan, Span
from fedllm.training.meter import Meter
from fedllm.training.objectives import Distillation

Z = "logits"
NO_PUBLIC = "strategy.kind = 'logits': there is no public set; set public.size or public.source"


class Logits:
    """Federated distillation through the logits of a public set."""

    evaluates_clients = True

    def __init__(
        self, options: ex.Logits, setup: Setup, model: LanguageModel, public: Examples | None
    ) -> None:
        """``model``: the server's.  ``public``: rows that everybody has; FedllmError without."""
        if public is None or not len(public):
            if not setup.public.ship:  # then it will come
                raise FedllmError(NO_PUBLIC)
            public = NOTHING
        self.options, self.setup, self.model, self.public = options, setup, model, public
        self.rule = KNOWLEDGE[options.knowledge]
        self.tasks: Tasks = {"know": self.know, "digest": self.digest, "receive": self.receive}

    def start(self) -> ServerState:
        """The server's model, if it has one."""
        return ServerState(dict(self.model.initial) if self.options.server_model else {})

    # server -----------------------------------------------------------------------------------

    def serve(
        self, state: ServerState, cohort: Sequence[str], ask: Exchange, rng: np.random.Generator
    ) -> ServerState:
        """One round."""
        if self.setup.public.ship:
            state = self._ship(state, cohort, ask)
            there = [client for client in cohort if f"shipped.{client}" in state.facts]
            ask.enough(len(there), len(cohort), "others did not take the public set (b0)")
            cohort = there
        rows = self._draw(rng)
        which = {"rows": torch.from_numpy(rows.astype(np.int32))}
        request = Message("b1", "know", which, {"rows": Role.INDEX}, {"public": self.public.hash})
        units = int(self.public.take(rows).targets.sum())
        want = Want(("loss",), ("weight",), {Z: (units, self.model.outputs)})
        replies = ask.gather(dict.fromkeys(cohort, request), want)  # b1, b2, b3
        with ask.meter.step("b4"):
            taught, knowledge = self._combine(replies, rows)
        if self.options.server_model:
            public = self.public.take(rows)
            goal = self._distil(
                self.model, state.shared, public, knowledge, "server", ask.round, ask.meter, "b5"
            )
            shared = alone(goal).values
            size = self.setup.evaluation.batch_size
            knowledge = alone(logits_of(self.model, shared, public, size, ask.meter, "b6"))
            state = replace(state, shared=shared)
        roles = {Z: Role.LOGIT, "rows": Role.INDEX}
        sent = {
            client: Message("b7", "digest", {Z: taught.get(client, knowledge), **which}, roles)
            for client in replies
        }
        done = ask.gather(sent, Want(("loss",)))  # b7, b8
        facts = {**state.facts, "loss": mean_loss(replies), "digest_loss": mean_loss(done)}
        return replace(state, facts=facts)

    def _combine(
        self, replies: Mapping[str, Message], rows: Ints
    ) -> tuple[dict[str, Tensor], Tensor]:
        """
        b4: (what each client is to be taught, where that is its cluster's; what the server is).

        With clusters the server learns from their consensus, each weighing as much as its clients.
        """
        spec, public = self.options, self.public.take(rows)
        row = torch.from_numpy(np.repeat(np.arange(len(public)), public.targets))
        voices = Voices.of(
            {client: reply.tensors[Z] for client, reply in replies.items()},
            {client: float(reply.facts["weight"]) for client, reply in replies.items()},
            torch.from_numpy(public.goals) if self.setup.public.labelled else None, row,
        )  # fmt: skip
        if spec.clusters == 1:
            return {}, self._consensus(voices)
        groups = rules.clusters(rules.divergence(voices), spec.clusters)
        parts = [rules.part(voices, group) for group in groups]
        found = [self._consensus(part) for part in parts]
        taught = {name: z for part, z in zip(parts, found, strict=True) for name in part.names}
        heads = {part.names[0]: float(part.weights.sum()) for part in parts}
        over = Voices.of({name: taught[name] for name in heads}, heads)
        return taught, rules.combined(over, rules.mean(over, 1.0))

    def _consensus(self, voices: Voices) -> Tensor:
        """What these clients say together."""
        spec = self.options
        weights = self.rule(voices, spec.max_entropy)
        by_loss = spec.knowledge in ("loss", "least-loss")
        return rules.combined(voices, rules.keep_best(voices, weights, spec.keep, by_loss))

    def _draw(self, rng: np.random.Generator) -> Ints:
        """This round's public rows, sorted."""
        size = len(self.public)
        wanted = min(self.setup.public.rows_per_round or size, size)
        return np.sort(rng.permutation(size)[:wanted])

    def _ship(self, state: ServerState, cohort: Sequence[str], ask: Exchange) -> ServerState:
        """b0: the public set travels, once to each client."""
        new = [client for client in cohort if f"shipped.{client}" not in state.facts]
        if new:
            packed = {
                "tokens": torch.from_numpy(self.public.flat),
                "lengths": torch.from_numpy(self.public.lengths.astype(np.int32)),
            }
            roles = of_role(Role.TOKEN, packed)
            if self.setup.public.labelled and len(self.public.labels):
                packed["labels"] = torch.from_numpy(self.public.labels.astype(np.int32))
                roles["labels"] = Role.LABEL
            sent = dict.fromkeys(new, Message("b0", "receive", packed, roles))
            new = [client for client, reply in ask.ask(sent) if isinstance(reply, Message)]
        return replace(state, facts={**state.facts, **{f"shipped.{c}": 1 for c in new}})

    def candidate(self, state: ServerState) -> Group | None:
        """The server's model; none in FedMD."""
        return state.shared if self.options.server_model else None

    # both -------------------------------------------------------------------------------------

    def _distil(
        self, model: LanguageModel, tunables: Group, public: Examples, teacher: Tensor, who: str,
        round: int, meter: Meter, step: str,
    ) -> Tasked[Trained]:  # fmt: skip
        """b5 and b8: fit the model to the teacher's logits of these public rows."""
        options, training = self.options, self.setup.training
        plan = Plan(
            public, options.batch_size or training.batch_size, training.padding,
            self.setup.longest, (self.setup.seed, who, "public", round), str(model.device),
        )  # fmt: skip
        share, teacher = options.label_share, teacher.to(model.device)
        if not self.setup.public.labelled:
            goal = Distillation(teacher, options.temperature, options.loss)
        elif share is None:
            goal = Distillation(teacher, options.temperature, options.loss, 1.0)
        else:
            goal = Distillation(teacher, options.temperature, options.loss, share, 1 - share)
        result: Trained = yield Fit(
            model, tunables, plan, goal, training, 0, plan.per_pass * options.epochs,
            Span(round - 1, self.setup.rounds), meter, step, rate=options.rate,
        )  # fmt: skip
        return result

    # client -----------------------------------------------------------------------------------

    def own(self, site: Site) -> Group:
        """The client's model."""
        return {**site.model.initial, **site.group("tunables")}

    def receive(self, site: Site, message: Message) -> Message:
        """b0: keep the public set that came."""
        site.keep("public", message.tensors)
        return Message("b0")

    def _public(self, site: Site) -> Examples:
        if self.setup.public.ship:
            kept = site.group("public")
            flat, ends = kept["tokens"].numpy(), np.cumsum(kept["lengths"].numpy(), dtype=np.int64)
            labels = np.full(len(ends), -1, np.int64)
            if "labels" in kept:
                labels = kept["labels"].numpy().astype(np.int64)
            empty = np.zeros(0, np.int64)
            if self.model.classification:
                return Examples(flat, ends, labels, empty, empty)
            return Examples(flat, ends, empty, np.ones(len(ends), np.int64), empty)
        if site.public is None:
            raise FedllmError(f"client {site.name!r} has no public set; set public.ship = true")
        return site.public

    def know(self, site: Site, message: Message) -> Tasked[Message]:
        """b1 fine-tune on the private rows, b2 compute logits of the public ones, b3 send them."""
        result = yield from site.fine_tune(self.own(site), "b1")
        site.keep("tunables", result.values)
        public = self._public(site)
        if not self.setup.public.ship and public.hash != message.facts["public"]:
            raise FedllmError(
                f"client {site.name!r} holds another public set than the server "
                f"({public.hash}, not {message.facts['public']})"
            )
        rows = public.take(message.tensors["rows"].numpy())
        size = self.setup.evaluation.batch_size
        found = yield from logits_of(site.model, result.values, rows, size, site.meter, "b2")
        facts: dict[str, Fact] = {"weight": units(site), "loss": result.loss}
        return Message("b3", tensors={Z: found}, roles={Z: Role.LOGIT}, facts=facts)

    def digest(self, site: Site, message: Message) -> Tasked[Message]:
        """b8 distil the knowledge into the client's model."""
        rows = self._public(site).take(message.tensors["rows"].numpy())
        result = yield from self._distil(
            site.model, self.own(site), rows, message.tensors[Z], site.name, site.round,
            site.meter, "b8",
        )  # fmt: skip
        site.keep("tunables", result.values)
        return Message("b8", facts={"loss": result.loss})
