"""
Clients exchange logits of a public set (KD-FedLLMs): Yan et al., section II-B, b1 to b8.

No parameter travels. With ``server_model = false`` this is FedMD (arXiv 1910.03581).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from fedllm import experiment as ex
from fedllm.aggregation import knowledge as rules
from fedllm.aggregation.knowledge import KNOWLEDGE, Voices
from fedllm.data.examples import NOTHING, Examples
from fedllm.errors import FedllmError
from fedllm.exchange import Exchange, Want
from fedllm.flat import Ints
from fedllm.message import Fact, Message, Role, of_role
from fedllm.models.loading import LanguageModel
from fedllm.strategies import choice
from fedllm.strategies.base import Group, ServerState, Setup, Site, Tasks, mean_loss, units
from fedllm.strategies.forms import (
    LOSS,
    Features,
    Known,
    Teacher,
    form_of,
    look,
    projection,
    roles,
    row_of,
    shaped,
    slices,
)
from fedllm.training.cohort import alone
from fedllm.training.jobs import Fit, Tasked, Trained
from fedllm.training.learner import Plan, Span
from fedllm.training.meter import Meter
from fedllm.training.objectives import Distillation

STUDENT = ""  # the voice of who is taught, the first of all
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
        if options.top_k is not None and options.top_k > model.outputs:
            raise FedllmError(
                f"strategy.top_k = {options.top_k}: {model.name!r} has {model.outputs} outputs; "
                f"expected 1 to {model.outputs}"
            )
        self.rule, self.form = KNOWLEDGE[options.knowledge], form_of(options)
        self.hidden = isinstance(self.form, Features)
        self.columns = setup.width if self.hidden else model.outputs  # of what clients say
        by_loss = options.selective or options.knowledge in ("loss", "least-loss")
        per = "token" if model.classification else options.loss_per
        self.per = per if by_loss else ""
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
        rows = self._draw(state, ask.meter, rng)
        which = {"rows": torch.from_numpy(rows.astype(np.int32))}
        new = choice.asked(self.setup.public, len(self.public), state, cohort)
        requests = {
            client: Message(
                "b1", "know", which, {"rows": Role.INDEX},
                {"public": self.public.hash, **({choice.HISTOGRAM: 1} if client in new else {})},
            )
            for client in cohort
        }  # fmt: skip
        public = self.public.take(rows)
        want = Want(("loss",), ("weight",), look=lambda reply: self._misfit(reply, rows, new))
        replies = ask.gather(requests, want)  # b1, b2, b3
        said = {client: self._heard(reply, rows) for client, reply in replies.items()}
        weights = {client: float(reply.facts["weight"]) for client, reply in replies.items()}
        state = self._kept(state, said, weights, public, rows, ask.meter)
        size = self.setup.evaluation.batch_size
        if self.options.selective and self.options.server_model:
            own = look(self.form, self.model, state.shared, public, size, ask.meter, "b4", self.per)
            said[STUDENT], weights[STUDENT] = alone(own), max(weights.values())
        with ask.meter.step("b4"):
            taught, knowledge = self._combine(said, weights, public)
        if self.options.server_model:
            goal = self._distil(
                self.model, state.shared, public, knowledge, "server", ask.round, ask.meter, "b5"
            )
            state = replace(state, shared=alone(goal).values)
            if not taught:  # else nobody is sent the server's
                seen = look(
                    self.form, self.model, state.shared, public, size, ask.meter, "b6", self.per
                )
                knowledge = alone(seen)
        sent = {
            client: Message(
                "b7", "digest", {**taught.get(client, knowledge), **which},
                {**roles(self.form, taught.get(client, knowledge)), "rows": Role.INDEX},
            )
            for client in replies
        }  # fmt: skip
        done = ask.gather(sent, Want(("loss",)))  # b7, b8
        facts = {**state.facts, "loss": mean_loss(replies), "digest_loss": mean_loss(done)}
        return replace(state, facts=facts)

    def _heard(self, reply: Message, rows: Ints) -> Known:
        """A client's knowledge in the server's tokens."""
        known = dict(reply.tensors)
        ways = self.setup.interpreters.get(reply.client)
        return known if ways is None else ways[0](known, rows)

    def _misfit(self, reply: Message, rows: Ints, asked: Collection[str]) -> str:
        """Why a reply is no knowledge of these rows; empty where it is.  asked: of histograms."""
        known = reply.tensors
        parts = [*self.form.parts, *([LOSS] if self.per else [])]
        parts += [choice.HISTOGRAM] if reply.client in asked else []
        if set(known) != set(parts):
            odd = sorted(set(known) ^ set(parts))
            return f"sent other names than it was asked for ({', '.join(odd[:3])})"
        if LOSS in parts:
            if said := shaped(known, **{LOSS: ((len(rows),), torch.float32)}):
                return said
            if len(rows) and float(known[LOSS].min()) < 0:
                return f"sent {LOSS!r} below 0"
        if choice.HISTOGRAM in parts and (said := choice.misfit(known, self.model.outputs)):
            return said
        units, outputs = int(self.public.targets[rows].sum()), self.columns
        if reply.client in self.setup.interpreters:
            way, _ = self.setup.interpreters[reply.client]
            units, outputs = way.units(rows), way.outputs
        return self.form.wrong(known, units, outputs)

    def _combine(
        self, said: Mapping[str, Known], weights: Mapping[str, float], public: Examples
    ) -> tuple[dict[str, Known], Known]:
        """
        b4: (what each client is to be taught, where that is its cluster's; what the server is).

        With clusters the server learns from their consensus, each weighing as much as its clients.
        """
        spec = self.options
        if spec.clusters == 1:
            return {}, self._consensus(said, weights, public)
        clients = sorted(set(said) - {STUDENT})
        distance = torch.zeros(len(clients), len(clients), dtype=torch.float64)
        for some in slices(int(public.targets.sum()), self.model.outputs * len(clients)):
            heard = {client: said[client] for client in clients}
            voices = self._voices(heard, weights, public, some, self.model.outputs)
            distance += rules.divergence(voices)
        taught: dict[str, Known] = {}
        heads: dict[str, Known] = {}
        totals: dict[str, float] = {}
        for group in rules.clusters(distance, spec.clusters):
            names = [clients[i] for i in group]
            found = self._consensus({name: said[name] for name in names}, weights, public)
            taught |= dict.fromkeys(names, found)
            heads[names[0]], totals[names[0]] = found, sum(weights[name] for name in names)
        return taught, self._consensus(heads, totals, public, rules.mean)

    def _consensus(
        self, said: Mapping[str, Known], weights: Mapping[str, float], public: Examples,
        rule: rules.Rule | None = None, outputs: int = 0,
    ) -> Known:  # fmt: skip
        """What these say together, in the form in which they said it; outputs: not the server's."""
        spec, outputs = self.options, outputs or self.columns
        weigh = rule or self.rule
        by_loss = spec.knowledge in ("loss", "least-loss")
        pieces = []
        for some in slices(int(public.targets.sum()), outputs * len(said)):
            voices = self._voices(said, weights, public, some, outputs)
            share = weigh(voices, spec.max_entropy)
            if rule is None:  # else it is over clusters, each of which is heard
                share = rules.keep_best(voices, share, spec.keep, by_loss)
            if self.form.linear:
                found = rules.combined(voices, share)
            else:
                found = rules.mixed(voices, share, spec.temperature if spec.form == "labels" else 1)
            pieces.append(self.form.encode(found))
        return {name: torch.cat([piece[name] for piece in pieces]) for name in self.form.parts}

    def _voices(
        self, said: Mapping[str, Known], weights: Mapping[str, float], public: Examples,
        some: slice, outputs: int,
    ) -> Voices:  # fmt: skip
        """What everybody says of some of the units."""
        rows = row_of(public)[some]
        heard = {
            name: self.form.decode({n: known[n][some] for n in self.form.parts}, outputs)
            for name, known in said.items()
        }
        lost = all(LOSS in known for known in said.values())
        return Voices.of(
            heard, weights, {name: said[name][LOSS][rows] for name in said} if lost else None
        )

    def _draw(self, state: ServerState, meter: Meter, rng: np.random.Generator) -> Ints:
        """This round's public rows, sorted."""
        size = self.setup.evaluation.batch_size
        return choice.draw(self.setup.public, self.public, self.model, state, size, meter, rng)

    def _kept(
        self, state: ServerState, said: Mapping[str, Known], weights: Mapping[str, float],
        public: Examples, rows: Ints, meter: Meter,
    ) -> ServerState:  # fmt: skip
        """The state, with what later rounds choose their rows by."""
        if self.setup.public.choose == "disagreement":
            outputs = self.model.outputs
            with meter.step(choice.STEP):
                units = torch.cat([
                    rules.disagreement(self._voices(said, weights, public, some, outputs))
                    for some in slices(int(public.targets.sum()), outputs * len(said))
                ])  # fmt: skip
                kept = choice.noted(state.public, rows, units, public, len(self.public))
            return replace(state, public=kept)
        told = {
            client: {choice.HISTOGRAM: known[choice.HISTOGRAM]}
            for client, known in said.items() if choice.HISTOGRAM in known
        }  # fmt: skip
        return replace(state, clients={**state.clients, **told})

    def _ship(self, state: ServerState, cohort: Sequence[str], ask: Exchange) -> ServerState:
        """b0: the public set travels, once to each client."""
        new = [client for client in cohort if f"shipped.{client}" not in state.facts]
        if new:
            packed = {
                "tokens": torch.from_numpy(self.public.flat),
                "lengths": torch.from_numpy(self.public.lengths.astype(np.int32)),
            }
            kinds = of_role(Role.TOKEN, packed)
            if self.per == "byte":
                packed["utf8"] = torch.from_numpy(self.public.utf8.astype(np.int32))
                kinds["utf8"] = Role.STATISTIC
            if self.setup.public.labelled and len(self.public.labels):
                packed["labels"] = torch.from_numpy(self.public.labels.astype(np.int32))
                kinds["labels"] = Role.LABEL
            sent = dict.fromkeys(new, Message("b0", "receive", packed, kinds))
            new = [client for client, reply in ask.ask(sent) if isinstance(reply, Message)]
        return replace(state, facts={**state.facts, **{f"shipped.{c}": 1 for c in new}})

    def candidate(self, state: ServerState) -> Group | None:
        """The server's model; none in FedMD."""
        return state.shared if self.options.server_model else None

    # both -------------------------------------------------------------------------------------

    def _distil(
        self, model: LanguageModel, tunables: Group, public: Examples, known: Known, who: str,
        round: int, meter: Meter, step: str,
    ) -> Tasked[Trained]:  # fmt: skip
        """b5 and b8: fit the model to the teacher's logits or features of these public rows."""
        options, training = self.options, self.setup.training
        plan = Plan(
            public, options.batch_size or training.batch_size, training.padding,
            self.setup.longest, (self.setup.seed, who, "public", round), str(model.device),
        )  # fmt: skip
        projector = None
        if self.hidden and known["features"].shape[1] != model.width:
            size = self.setup.evaluation.batch_size
            own = yield from look(self.form, model, tunables, public, size, meter, step)
            projector = projection(own["features"], known["features"]).to(model.device)
        share = options.label_share
        labels, weight = (1.0, 1.0) if share is None else (share, 1 - share)
        if not self.setup.public.labelled:
            labels = 0.0
        goal = Distillation(
            Teacher(self.form, known, model.outputs).to(model.device), options.temperature,
            options.loss, labels, weight, self.hidden, projector,
        )  # fmt: skip
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
            utf8 = kept["utf8"].numpy().astype(np.int64) if "utf8" in kept else empty
            return Examples(flat, ends, empty, np.ones(len(ends), np.int64), utf8)
        if site.public is None:
            raise FedllmError(f"client {site.name!r} has no public set; set public.ship = true")
        return site.public

    def know(self, site: Site, message: Message) -> Tasked[Message]:
        """b1 fine-tune on the private rows, b2 compute logits of the public ones, b3 send them."""
        site.keep("known", {})  # of a round that ended without b7
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
        known = yield from look(
            self.form, site.model, result.values, rows, size, site.meter, "b2", self.per
        )
        if self.options.selective:
            site.keep("known", known)
        if choice.HISTOGRAM in message.facts:
            known = {**known, choice.HISTOGRAM: choice.histogram(site)}
        facts: dict[str, Fact] = {"weight": units(site), "loss": result.loss}
        return Message("b3", "", known, roles(self.form, known), facts)

    def digest(self, site: Site, message: Message) -> Tasked[Message]:
        """b8 distil the knowledge into the client's model."""
        chosen = message.tensors["rows"].numpy().astype(np.int64)
        rows = self._public(site).take(chosen)
        known: Known = {n: t for n, t in message.tensors.items() if n != "rows"}
        if site.name in self.setup.interpreters:
            known = self.setup.interpreters[site.name][1](known, chosen)
        if self.options.selective:
            own = site.group("known")
            if not own:
                raise FedllmError(
                    "what this client knew (b2) is gone; it goes on in the next round"
                )
            voices = {STUDENT: own, "server": known}
            weights = dict.fromkeys(voices, 1.0)
            known = self._consensus(voices, weights, rows, outputs=site.model.outputs)
            site.keep("known", {})
        result = yield from self._distil(
            site.model, self.own(site), rows, known, site.name, site.round, site.meter, "b8"
        )
        site.keep("tunables", result.values)
        return Message("b8", facts={"loss": result.loss})
