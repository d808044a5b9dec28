"""
Clients exchange activations (Split-FedLLMs): Yan et al., section II-C, c1 to c5, cc1 to cc4.

The client runs the embeddings and the first blocks, the server the rest. ``server`` says how
the one trains with many: ``sequential`` (SplitFed V2, SplitLoRA: one server half, client after
client), ``per-client`` (SplitFed V1: one each, averaged every round) or ``concatenated`` (one
step on all clients' batches). With ``labels = "client"`` the head, and so the loss, is at the
client: c3 then sends hidden states back instead of using labels.

Clients may have cuts of their own, of which the server tells them with c1. A tunable that lies at
some clients and, for others, at the server is averaged over all of them, wherever it lay. Where
cuts are chosen as it goes, cc1 says how the next round cuts: blocks change sides with cc3, and what
their optimizers remember goes along.

Activations travel packed: real tokens only, [tokens, width], with the lengths of the rows.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.aggregation import RULES
from fedllm.costs import kept
from fedllm.data.examples import Examples
from fedllm.errors import FedllmError
from fedllm.exchange import ANYTHING, Exchange, Want, like
from fedllm.message import Failure, Message, Role, of_role
from fedllm.models.core import Core
from fedllm.models.frozen import Known
from fedllm.models.inputs import Inputs, beside
from fedllm.models.loading import LanguageModel
from fedllm.strategies.base import Group, ServerState, Setup, Site, Tasks
from fedllm.streams import stream
from fedllm.training.batches import Batch
from fedllm.training.cohort import work
from fedllm.training.jobs import Backward, Forward, Half, Passed, Tasked
from fedllm.training.known import known
from fedllm.training.learner import SLOTS, Learner, Span
from fedllm.training.meter import held_bytes
from fedllm.training.objectives import cross_entropy
from fedllm.training.sampling import of_rows

H, LENGTHS, LABELS, GRAD = "hidden", "lengths", "labels", "gradient"
PLACES = "places"  # of the tokens that cross in their rows, where not all do
WEIGHTS, LOSSES = "weights", "losses"  # of units, where rows are drawn by their losses
CUT, CHOSEN = "cut", "cuts.round"  # facts: of a client; the round whose measures chose them
ROLES = {GRAD: Role.GRADIENT, WEIGHTS: Role.STATISTIC, LOSSES: Role.STATISTIC}
IGNORED = -1


def unpack_rows(packed: Tensor, inputs: Inputs, extra: int, kept: Tensor | None = None) -> Tensor:
    """
    Real cells [tokens, features] -> all cells [cells, features], the others zero.

    kept: the cells that these are, where not all real ones.
    """
    if inputs.packed and kept is None:
        return packed
    cells = inputs.cells + extra * inputs.rows
    rows = torch.zeros((cells, *packed.shape[1:]), dtype=packed.dtype, device=packed.device)
    rows[inputs.real(extra) if kept is None else kept] = packed
    return rows


def pack_rows(cells: Tensor, inputs: Inputs, extra: int, kept: Tensor | None = None) -> Tensor:
    """The inverse: real tokens (and virtual ones), or of them those ``kept``."""
    if kept is not None:
        return cells[kept]
    return cells if inputs.packed else cells[inputs.real(extra)]


class Alive:
    """
    The cohort of a round, and who of it still takes part.

    A client that fails is out for the rest of the round; the round ends where fewer than
    ``exchange.minimum_replies`` are left.
    """

    def __init__(self, cohort: Sequence[str], ask: Exchange) -> None:
        """Everybody takes part, and nobody has said how many batches it has."""
        self.cohort, self.ask = list(cohort), ask
        self.failed: dict[str, str] = {}
        self.done: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self._before = 0.0

    def __contains__(self, client: str) -> bool:
        return client not in self.failed

    def busy(self) -> list[str]:
        """Who takes part and has a batch left."""
        return [c for c in self.cohort if c in self and self.left.get(c, 1) > 0]

    def why(self) -> str:
        """Who failed, and why."""
        return "; ".join(f"{client}: {reason}" for client, reason in self.failed.items())

    def gather(self, requests: Mapping[str, Message], want: Want = ANYTHING) -> dict[str, Message]:
        """Ask; the good replies by name. Raises FedllmError where too few are left."""
        replies = {}
        for client, reply in self.ask.ask(requests, want):
            if isinstance(reply, Failure):
                self.failed[client] = reply.reason
                continue
            replies[client] = reply
            if want is not ANYTHING and "left" in want.facts:
                self.done[client] = int(reply.facts["number"])
                self.left[client] = int(reply.facts["left"])
        present = len(self.cohort) - len(self.failed)
        self.ask.enough(present, len(self.cohort), self.why())
        return dict(sorted(replies.items()))

    def fraction(self, client: str) -> float:
        """How much of its batches a client did before the current one."""
        return (self.done[client] - 1) / (self.done[client] + self.left[client])

    def longest(self) -> float:
        """The same of the client with the most batches."""
        most = max(self.done, key=lambda c: self.done[c] + self.left[c])
        return self.fraction(most)

    def overall(self) -> float:
        """
        The same of all together; who has not begun is taken for an average one.

        Never less than before, though a larger client may come to light.
        """
        known = [self.done[c] + self.left[c] for c in self.done]
        total = sum(known) / len(known) * len(self.cohort)
        self._before = max(self._before, min((sum(self.done.values()) - 1) / total, 1.0))
        return self._before


@dataclass(eq=False)
class Turn:
    """
    One server half's step on the way: of one client, or of all that are concatenated.

    parts: each client's rows.  weights: units of those who have a say.  goal, gradient: the loss
    at the server, or the gradient that the clients' heads sent.  each: the loss of each unit.
    """

    half: Half
    clients: list[str]
    parts: dict[str, Inputs]
    batch: Batch
    weights: dict[str, float]
    forward: Forward
    passed: Passed = field(init=False)
    goal: Tensor | None = None
    gradient: Tensor | None = None
    loss: float = 0.0
    each: Tensor | None = None


class Activations:
    """Split learning with averaged client halves."""

    evaluates_clients = False

    def __init__(
        self, options: ex.Activations, setup: Setup, model: LanguageModel,
        public: Examples | None = None,
    ) -> None:  # fmt: skip
        """Cut the model. Raises FedllmError where it cannot be cut as asked."""
        self.options, self.setup, self.model = options, setup, model
        self.cut = check_cut(options, model)
        self.rule = RULES["mean"]
        self.home = options.labels == "client"
        check_alike(options, self._cuts(list(setup.cuts)).values())
        self.share = options.keep_tokens
        self.slots = {*SLOTS[setup.training.optimizer], "step"}
        self.weighs = setup.training.sampling == "loss" and not self.home
        self.batches = Want(("left", "number"), ("units",), look=self._misfit)
        self.extra = self._server(self.cut).prompt_tokens
        self.personal = model.head if model.spec.head == "personal" else frozenset[str]()
        self.tasks: Tasks = {
            "forward": self.forward, "head": self.head, "backward": self.backward,
            "collect": self.collect, "replace": self.replace,
        }  # fmt: skip

    def start(self) -> ServerState:
        """First values of both halves."""
        return ServerState({n: t for n, t in self.model.initial.items() if n not in self.personal})

    def _server(self, cut: int) -> Core:
        """The server's part of a model cut there."""
        return self.model.part("body" if self.home else "server", cut)

    def _names(self, cut: int) -> set[str]:
        """Tunables at a client of this cut; a personal head, which is of no average, left out."""
        there = self.model.tunables_of(self._server(cut))
        return set(self.model.initial) - set(there) - self.personal

    def _cuts(self, clients: Sequence[str], state: ServerState | None = None) -> dict[str, int]:
        """Blocks at each of these clients."""
        facts = {} if state is None else state.facts
        own = {c: int(facts.get(f"{CUT}.{c}", self.setup.cuts.get(c, 0))) for c in clients}
        return {c: check_cut(self.options, self.model, cut) for c, cut in own.items()}

    def _chosen(self, state: ServerState, round: int) -> ServerState:
        """
        The state with everybody's cut, chosen by what this round measured (0: beforehand).

        They stay as they are while nothing measured is far from what it was.
        """
        cutter = self.setup.cutter
        if cutter is None or (round and not cutter.changed(int(state.facts[CHOSEN]), round)):
            return state
        facts = {f"{CUT}.{client}": cut for client, cut in cutter.at(round).items()}
        return replace(state, facts={**state.facts, **facts, CHOSEN: round})

    # server -----------------------------------------------------------------------------------

    def serve(
        self, state: ServerState, cohort: Sequence[str], ask: Exchange, rng: np.random.Generator
    ) -> ServerState:
        """One round: the batches of the local epochs, then the average of the client halves."""
        if CHOSEN not in state.facts:
            state = self._chosen(state, 0)
        cuts = self._cuts(cohort, state)
        check_alike(self.options, cuts.values())
        state = self._bring(state, [c for c in cohort if self._stale(state, c)], cuts, ask)
        halves = self._halves(state, cuts, ask)
        alive = Alive(cohort, ask)
        since: dict[str, float] = {}  # units seen since the last average
        whole: dict[str, float] = {}  # and in this round
        losses: list[float] = []
        sweeps = 0
        for group, sweep_ends in self._turns(alive, rng):
            asked = {client: Message("c1", "forward", facts=self._told(cuts[client]))
                     for client in group}  # fmt: skip
            replies = alive.gather(asked, self.batches)  # c1, c2
            if replies:
                gradients, loss = self._step(halves, replies, alive, ask)  # c3
                losses.append(loss)
                for client in gradients:
                    seen = float(replies[client].facts["units"])
                    since[client] = since.get(client, 0.0) + seen
                    whole[client] = whole.get(client, 0.0) + seen
                alive.gather(
                    {
                        client: Message("c4", "backward", sent, {n: ROLES[n] for n in sent})
                        for client, sent in gradients.items()
                    }
                )  # c4, c5
            sweeps += sweep_ends
            every = self.options.average_every
            if every and sweep_ends and sweeps % every == 0 and alive.busy():
                state, _ = self._average(state, alive, since, cuts, halves, ask)
                since = {}
        if self.setup.cutter is not None:
            clock = {"clock": self.setup.cutter.seconds(ask.round, cuts)}
            state = replace(state, facts={**state.facts, **clock})
        state = self._chosen(state, ask.round)
        state, moments = self._average(state, alive, since, cuts, halves, ask)
        state = self._merge(state, halves, whole, cuts, ask)
        state = self._moved(state, moments, cuts)
        return replace(state, facts={**state.facts, "loss": float(np.mean(losses))})

    def _told(self, cut: int) -> dict[str, Any]:
        """What c1 and cc1 say of the cut: nothing where the file has one for all."""
        return {} if isinstance(self.options.cut, int) else {CUT: cut}

    def _misfit(self, reply: Message) -> str:
        """Why c2 is no batch: what it says of its rows decides how much the server allocates."""
        lengths, labels = reply.tensors.get(LENGTHS), reply.tensors.get(LABELS)
        hidden = reply.tensors.get(H)
        names = {H, LENGTHS} if self.home else {H, LENGTHS, LABELS}
        names |= {WEIGHTS} if self.weighs else set()
        names |= {PLACES} if self.share < 1 else set()
        if set(reply.tensors) != names or lengths is None or hidden is None:
            return f"sent {sorted(reply.tensors)}, not {sorted(names)}"
        extra, width = self.extra, self.model.model.config.hidden_size
        if lengths.ndim != 1 or lengths.dtype is not torch.int32:
            return "its lengths are none"
        most = self.setup.training.batch_size
        if not 1 <= len(lengths) <= most:
            return f"sent {len(lengths)} rows, a batch has 1 to {most}"
        if not (0 <= int(reply.facts["left"]) < 2**31 and 1 <= int(reply.facts["number"]) < 2**31):
            return "its number of batches is none"
        if hidden.dtype not in (
            torch.float32,
            torch.bfloat16 if self.model.half else torch.float32,
        ):
            return f"sent activations as {hidden.dtype}"
        if int(lengths.min()) <= extra or int(lengths.max()) > self.setup.longest + extra:
            return f"a row is longer than {self.setup.longest} tokens, or empty"
        cells = int(self._crossing(lengths).sum())
        if tuple(hidden.shape) != (cells, width):
            return f"sent activations of {tuple(hidden.shape)}, not {(cells, width)}"
        if self.share < 1 and (wrong := self._misplaced(reply.tensors[PLACES], lengths)):
            return wrong
        if labels is None:
            return ""
        many = len(lengths) if self.model.classification else cells - extra * len(lengths)
        lowest = 0 if self.model.classification else IGNORED
        if (
            tuple(labels.shape) != (many,) or labels.dtype is not torch.int32
            or int(labels.min()) < lowest or int(labels.max()) >= self.model.outputs
        ):  # fmt: skip
            return f"its labels are not {many} numbers below {self.model.outputs}"
        if self.weighs:
            weights, units = reply.tensors[WEIGHTS], int((labels != IGNORED).sum())
            largest = 1.001 / self.setup.training.sampling_floor
            largest *= 1 if self.model.classification else units  # long texts weigh more
            fits = tuple(weights.shape) == (units,) and weights.dtype is torch.float32
            if not fits or not bool(((weights > 0) & (weights <= largest)).all()):
                return f"its weights are not {units} numbers above 0, at most {largest:g}"
        return ""

    def _crossing(self, lengths: Tensor) -> Tensor:
        """How many tokens of rows of these lengths cross: [rows]."""
        if self.share == 1:
            return lengths.long()
        return torch.from_numpy(kept(lengths.long().cpu().numpy(), self.share)).to(lengths.device)

    def _misplaced(self, places: Tensor, lengths: Tensor) -> str:
        """Why these are not the places of so many tokens, row after row, in order."""
        counts = self._crossing(lengths)
        if places.dtype is not torch.int32 or tuple(places.shape) != (int(counts.sum()),):
            return f"the places of its tokens are not {int(counts.sum())} numbers"
        row = torch.arange(len(counts)).repeat_interleave(counts)
        rises = (places.diff() > 0) | (row.diff() > 0)
        if int(places.min()) < 0 or bool((places >= lengths[row]).any()) or not bool(rises.all()):
            return "the places of its tokens are not in order, or beyond their rows"
        return ""

    def _halves(
        self, state: ServerState, cuts: Mapping[str, int], ask: Exchange
    ) -> dict[str, Half]:  # fmt: skip
        """The server half that serves each client, with its persistent optimizer."""
        lowest = self._server(min(cuts.values()))

        def learner(core: Core, optimizer: Group) -> Learner:
            values = {name: state.shared[name] for name in self.model.tunables_of(core)}
            return Learner(values, self.setup.training, optimizer, device=self.model.device)

        def half(cut: int, learner: Learner) -> Half:
            return Half(self.model, self._server(cut), learner, ask.meter)

        if self.options.server == "per-client":
            halves = {
                client: half(cut, learner(self._server(cut), state.clients.get(client, {})))
                for client, cut in cuts.items()
            }
            together = sum(one.learner.reserved for one in halves.values())
        else:
            common = learner(lowest, state.optimizer)
            above = {
                cut: half(cut, common.within(self.model.tunables_of(self._server(cut))))
                for cut in sorted(set(cuts.values()))
            }
            halves = {client: above[cut] for client, cut in cuts.items()}
            together = common.reserved
        for one in halves.values():  # the server holds all of them at once
            one.beside = held_bytes(lowest) + together - held_bytes(one.core)
            one.beside -= one.learner.reserved
        return halves

    def _turns(self, alive: Alive, rng: np.random.Generator) -> Iterator[tuple[list[str], bool]]:
        """
        Who is asked together, until nobody has a batch left; and whether everybody who has
        one had a turn (a sweep ends).
        """
        order = [alive.cohort[i] for i in rng.permutation(len(alive.cohort))]
        if self.options.server != "sequential":
            while group := alive.busy():
                yield group, True
        elif self.options.turn == "epoch":
            for client in order:
                while client in alive.busy():
                    yield [client], False
        else:
            while busy := set(alive.busy()):
                sweep = [client for client in order if client in busy]
                for client in sweep:
                    if client in alive.busy():
                        yield [client], client == sweep[-1]

    def _step(
        self, halves: Mapping[str, Half], replies: Mapping[str, Message], alive: Alive,
        ask: Exchange,
    ) -> tuple[dict[str, Group], float]:  # fmt: skip
        """
        c3: forward, loss, backward and step; returns what each client gets (c4), its gradient.

        A client gets the gradient of its own mean loss, however many rows others brought.
        """
        whole = self.options.server == "concatenated"
        groups = [list(replies)] if whole else [[client] for client in replies]
        turns = [self._turn(halves[group[0]], group, replies, ask) for group in groups]
        for turn, passed in zip(turns, _all(work([t.forward for t in turns])), strict=True):
            turn.passed = passed
        if self.home:
            self._ask_heads(turns, alive)
        else:
            for turn in turns:
                with ask.meter.step("c3"):
                    goal = turn.passed.out
                    each = cross_entropy(goal, turn.batch.targets, turn.batch.places)
                    loss = _mean(each, turn.batch)
                turn.goal, turn.loss, turn.each = loss, float(loss.detach()), each.detach()
        turns = [turn for turn in turns if turn.weights]
        for turn in turns:
            if not np.isfinite(turn.loss):
                raise FedllmError(
                    f"round {ask.round}: the loss became {turn.loss}; lower training.rate"
                )
        span = Span(ask.round - 1, self.setup.rounds)
        jobs = [
            Backward(
                turn.passed, "c3", turn.gradient, turn.goal, (turn.half.learner,),
                span.at(self._done(turn, alive)),
            )
            for turn in turns
        ]  # fmt: skip
        gradients: dict[str, Group] = {}
        for turn, found in zip(turns, _all(work(jobs)), strict=True):
            with ask.meter.step("c3"):
                gradients |= {client: {GRAD: g} for client, g in self._share(turn, found).items()}
                if self.weighs and turn.each is not None:
                    counts = [len(replies[client].tensors[WEIGHTS]) for client in turn.clients]
                    for client, part in zip(
                        turn.clients, torch.split(turn.each, counts), strict=True
                    ):
                        gradients[client][LOSSES] = part
        return gradients, float(np.mean([turn.loss for turn in turns]))

    def _done(self, turn: Turn, alive: Alive) -> float:
        """How much of the round lies behind this step of a server half."""
        if self.options.server == "concatenated":
            return alive.longest()
        if self.options.server == "per-client":
            return alive.fraction(turn.clients[0])
        return alive.overall()

    def _turn(
        self, half: Half, clients: list[str], replies: Mapping[str, Message], ask: Exchange
    ) -> Turn:
        """One server half's pass over these clients' batches."""
        mine = {client: replies[client] for client in clients}
        with ask.meter.step("c3"):
            batch, parts = self._server_batch(mine)
        number = mine[clients[0]].facts["number"]
        purpose = (self.setup.seed, ask.round, "server", *sorted(clients), "dropout", number)
        weights = {client: float(reply.facts["units"]) for client, reply in mine.items()}
        return Turn(half, clients, parts, batch, weights, Forward(half, batch, purpose, "c3"))

    def _server_batch(
        self, replies: Mapping[str, Message]
    ) -> tuple[Batch, dict[str, Inputs]]:  # fmt: skip
        """The activations as the server half takes them, and each client's rows alone."""
        device, extra = self.model.device, self.extra
        parts: dict[str, Inputs] = {}
        targets, selects, offset = [], [], 0
        for client, reply in replies.items():
            lengths = self._crossing(reply.tensors[LENGTHS].to(device)) - extra  # with the prompt
            longest = int(lengths.max())
            full = bool((lengths == longest).all())
            nothing = torch.empty(0, device=device)
            rows = Inputs(nothing, ((len(lengths), longest),), None if full else lengths)
            if self.share < 1:
                places = reply.tensors[PLACES].long().to(device)
                rows = replace(rows, at=unpack_rows(places, rows, extra))
            parts[client] = rows.after(unpack_rows(reply.tensors[H].to(device), rows, extra))
            if not self.home:
                labels = reply.tensors[LABELS].long().to(device)
                if self.model.classification:
                    targets.append(labels)
                else:
                    goals = torch.full((rows.cells,), IGNORED, device=device)
                    goals[rows.after(labels).real()] = labels
                    chosen = (goals != IGNORED).nonzero().flatten()
                    selects.append(chosen + offset)
                    targets.append(goals[chosen])
            offset += rows.cells
        inputs = replace(beside(list(parts.values())), slots=())
        inputs.x.requires_grad_(True)
        if selects:
            inputs = replace(inputs, select=torch.cat(selects))
        goal = torch.cat(targets) if targets else torch.zeros(0, dtype=torch.long, device=device)
        weights = None
        if self.weighs:
            weights = torch.cat([reply.tensors[WEIGHTS].to(device) for reply in replies.values()])
        tokens = int(inputs.full_lengths().sum())
        return Batch(inputs, goal, goal, tokens, weights=weights), parts

    def _ask_heads(self, turns: Sequence[Turn], alive: Alive) -> None:
        """Labels at home: hidden states down, the loss's gradient up."""
        extra = self.extra
        requests = {}
        for turn in turns:
            for client, out in zip(turn.clients, self._split(turn, turn.passed.out), strict=True):
                packed = pack_rows(out.detach(), turn.parts[client], extra).contiguous()
                requests[client] = Message("c3", "head", {H: packed}, {H: Role.ACTIVATION})

        def look(reply: Message) -> str:
            sent = requests[reply.client].tensors[H]
            fits = set(reply.tensors) == {GRAD} and reply.tensors[GRAD].shape == sent.shape
            fits = fits and reply.tensors[GRAD].dtype is sent.dtype
            return "" if fits else "sent another gradient than of the hidden states it got"

        back = alive.gather(requests, Want(("loss",), look=look))
        if not back:
            raise FedllmError(f"no client's head answered: {alive.why()}")
        for turn in turns:
            turn.weights = {c: w for c, w in turn.weights.items() if c in back}
            total = sum(turn.weights.values())
            if not total:
                continue
            turn.loss = (
                sum(float(back[c].facts["loss"]) * w for c, w in turn.weights.items()) / total
            )
            parts = []
            for client, out in zip(turn.clients, self._split(turn, turn.passed.out), strict=True):
                if client in back:
                    sent = back[client].tensors[GRAD].to(out.device)
                    whole = unpack_rows(sent, turn.parts[client], extra)
                    parts.append(whole * (turn.weights[client] / total))
                else:  # its head failed: it has no say in this step
                    parts.append(torch.zeros_like(out))
            turn.gradient = torch.cat(parts)

    def _split(self, turn: Turn, cells: Tensor) -> Sequence[Tensor]:
        """Each client's cells of a turn."""
        extra = self.extra
        return torch.split(cells, [i.cells + extra * i.rows for i in turn.parts.values()])

    def _share(self, turn: Turn, found: Tensor | None) -> dict[str, Tensor]:
        """The gradient of each client's own mean loss by its activations, packed."""
        if found is None:
            found = torch.zeros_like(turn.batch.inputs.x)
        total = sum(turn.weights.values())
        extra = self.extra
        parts = zip(turn.clients, self._split(turn, found), strict=True)
        return {
            client: pack_rows(part * (total / turn.weights[client]), turn.parts[client], extra)
            for client, part in parts
            if client in turn.weights
        }

    def _stale(self, state: ServerState, client: str) -> bool:
        """Whether a client's half is older than the server's (all start with the same)."""
        newest = int(state.facts.get("version", 0))
        return int(state.facts.get(f"version.{client}", 0)) < newest

    def _half(self, state: ServerState, cut: int) -> Group:
        """The common values of a client half."""
        names = self._names(cut)
        return {n: t for n, t in state.shared.items() if n in names}

    def _bring(
        self, state: ServerState, clients: Sequence[str], cuts: Mapping[str, int], ask: Exchange,
        moments: Mapping[str, Group] | None = None,
    ) -> ServerState:  # fmt: skip
        """cc3: send the averaged client half (and what came to it); cc4: they replace theirs."""
        if not clients:
            return state
        halves = {cut: self._half(state, cut) for cut in {cuts[client] for client in clients}}
        sent = {c: {**halves[cuts[c]], **(moments or {}).get(c, {})} for c in clients}
        took = ask.gather({
            client: Message("cc3", "replace", half, _roles(half))
            for client, half in sent.items()
        })  # fmt: skip
        # others are asked again next time
        newest = state.facts.get("version", 0)
        facts = {**state.facts, **{f"version.{client}": newest for client in took}}
        return replace(state, facts=facts)

    def _average(
        self, state: ServerState, alive: Alive, seen: Mapping[str, float],
        cuts: Mapping[str, int], halves: Mapping[str, Half], ask: Exchange,
    ) -> tuple[ServerState, dict[str, Group]]:  # fmt: skip
        """
        cc1 to cc4, weighted by the units seen since the last average.

        What lies at some clients and at the server for others counts wherever it lay. Also returns
        what optimizers of clients remember of blocks that go to the server.
        """
        asked = [client for client in alive.cohort if client in seen and client in alive]
        names = {cut: self._names(cut) for cut in set(cuts.values())}
        wants = {cut: Want(shapes=like(self._half(state, cut))) for cut in names}
        after = self._cuts(alive.cohort, state)

        def look(reply: Message) -> str:
            values, moments = _parted(reply.tensors)
            leaving = names[cuts[reply.client]] - self._names(after[reply.client])
            wrong = _no_moments(moments, {n: state.shared[n] for n in leaving}, self.slots)
            return wrong or wants[cuts[reply.client]].misfit(replace(reply, tensors=values))

        replies = alive.gather(
            {
                client: Message("cc1", "collect", facts=self._told(after[client]))
                for client in asked
            },
            Want(look=look),
        )
        somewhere = set().union(*names.values())
        with ask.meter.step("cc2"):
            updates = {}
            for client, reply in replies.items():
                here = halves[client].learner.within(sorted(somewhere - names[cuts[client]]))
                updates[client] = {**_parted(reply.tensors)[0], **here.values()}
            half = self.rule(updates, seen)
        version = int(state.facts.get("version", 0)) + 1
        state = replace(
            state, shared={**state.shared, **half}, facts={**state.facts, "version": version}
        )
        there = [client for client in alive.cohort if client in alive]
        joining = {}
        if self.setup.training.optimizer_state == "keep":
            for client in (c for c in there if after[c] != cuts[c]):
                new = self._names(after[client]) - names[cuts[client]]
                joining[client] = _of(halves[client].learner.state(), new)
        left = {client: _parted(reply.tensors)[1] for client, reply in replies.items()}
        return self._bring(state, there, after, ask, joining), left

    def _moved(
        self, state: ServerState, left: Mapping[str, Group], before: Mapping[str, int]
    ) -> ServerState:  # fmt: skip
        """What the server's optimizers remember after blocks changed sides, as ``left`` says."""
        after = self._cuts(list(before), state)
        if after == before:
            return state
        gone = {c: self._names(after[c]) for c in after}
        if self.options.server == "per-client":
            clients = dict(state.clients)
            for client, names in gone.items():
                mine = {**clients.get(client, {}), **left.get(client, {})}
                clients[client] = {k: t for k, t in mine.items() if _owner(k) not in names}
            return replace(state, clients=clients)
        optimizer = dict(state.optimizer)
        for key in sorted({key for group in left.values() for key in group}):
            if key not in optimizer:  # of all who bring it
                bring = [group[key] for group in left.values() if key in group]
                optimizer[key] = torch.stack(bring).mean(0)
        common = set.intersection(*gone.values())
        optimizer = {k: t for k, t in optimizer.items() if _owner(k) not in common}
        return replace(state, optimizer=optimizer)

    def _merge(
        self, state: ServerState, halves: Mapping[str, Half], seen: Mapping[str, float],
        cuts: Mapping[str, int], ask: Exchange,
    ) -> ServerState:  # fmt: skip
        """What lies at the server for everybody: as it is, or the mean of the clients' (V1)."""
        always = self.model.tunables_of(self._server(max(cuts.values())))
        if self.options.server != "per-client":
            learner = next(iter(halves.values())).learner
            return replace(
                state, shared={**state.shared, **learner.within(always).values()},
                optimizer={**state.optimizer, **learner.state()},
            )  # fmt: skip
        with ask.meter.step("cc2"):
            values = {client: halves[client].learner.within(always).values() for client in seen}
            merged = self.rule(values, seen)
        optimizers = {
            client: {**state.clients.get(client, {}), **half.learner.state()}
            for client, half in halves.items()
        }
        return replace(
            state, shared={**state.shared, **merged}, clients={**state.clients, **optimizers}
        )

    def candidate(self, state: ServerState) -> Group:
        """Both halves joined."""
        return state.shared

    # client -----------------------------------------------------------------------------------

    def own(self, site: Site) -> Group:
        """What stays at this client: its head, if that is personal."""
        return {n: self.model.initial[n] for n in self.personal} | site.group("personal")

    def _half_of(self, site: Site) -> dict[str, Half]:
        """The client's parts in training (the tail only with labels at home)."""
        if "halves" not in site.live:
            cut = self._cut(site)
            begin = self._begin(cut)
            parts = {"client": self.model.part("client", cut, begin)}
            if self.home:
                parts["tail"] = self.model.part("tail", cut)
            values = self.model.initial | site.group("tunables") | self.own(site)
            keep = self.setup.training.optimizer_state == "keep"
            optimizer = site.group("optimizer") if keep else {}
            halves = {}
            for name, core in parts.items():
                mine = {n: values[n] for n in self.model.tunables_of(core)}
                learner = Learner(mine, self.setup.training, optimizer, device=self.model.device)
                halves[name] = Half(self.model, core, learner, site.meter)
            if self._below(site) is not None:  # the blocks that ran once are still there
                apart = self.model.part("client", begin)
                halves["client"].beside = held_bytes(apart) + sum(site.meter.held.values())
            site.live["halves"] = halves
        return dict(site.live["halves"])

    def _below(self, site: Site) -> Known | None:
        """The private rows' hidden states, as far as nothing before them is trained."""
        return known(self.model, self._begin(self._cut(site)), site.train, site.meter, "c1")

    def _begin(self, cut: int) -> int:
        """Blocks that ran once for each row; not the last one, where its attention is asked for."""
        watched = self.share < 1 and self.options.keep_by == "attention"
        return min(self.model.frozen.begin, cut - 1 if watched else cut)

    def _kept(self, site: Site, batch: Batch, received: Tensor | None, number: int) -> Tensor:
        """
        The cells of a batch that cross, in order: those that received most attention, or any.

        What the head reads always does: the first token of an encoder, the last one of a decoder.
        """
        assert self.model.family is not None
        inputs, device = batch.inputs, batch.targets.device
        lengths, begins = inputs.full_lengths().cpu().numpy(), inputs.starts()
        rng = stream(self.setup.seed, site.name, "tokens", site.round, number)
        score = rng.random(inputs.cells) if received is None else received.double().cpu().numpy()
        found = []
        for begin, length, count in zip(begins, lengths, kept(lengths, self.share), strict=True):
            mine = score[begin : begin + length].copy()
            mine[length - 1 if self.model.family.decoder else 0] = np.inf
            found.append(begin + np.sort(np.argsort(-mine, kind="stable")[:count]))
        return torch.from_numpy(np.concatenate(found)).to(device)

    def _cut(self, site: Site) -> int:
        """Blocks at this client, as the server says."""
        return int(site.live.get(CUT, self.cut))

    def _next(self, site: Site) -> tuple[Batch, int, int]:
        """The client's next batch of this round, its number, and how many are left after it."""
        if "batches" not in site.live:
            plan = replace(site.private(), known=self._below(site))
            per_round = plan.per_pass * self.setup.training.epochs
            first = per_round * (site.round - 1)
            site.live["batches"] = iter(plan.between(first, first + per_round))
            site.live.update(number=0, per_round=per_round)
        site.live["number"] += 1
        number = int(site.live["number"])
        return next(site.live["batches"]), number, site.live["per_round"] - number

    def forward(self, site: Site, message: Message) -> Tasked[Message]:
        """c1 run the first layers on a private batch, c2 send activations (and labels)."""
        if CUT in message.facts:
            site.live[CUT] = check_cut(self.options, self.model, int(message.facts[CUT]))
        half = self._half_of(site)["client"]
        batch, number, left = self._next(site)
        purpose = (self.setup.seed, site.name, "private", "dropout", site.round, number)
        bare = replace(batch, inputs=replace(batch.inputs, select=None))
        watched = self.share < 1 and self.options.keep_by == "attention"
        passed: Passed = yield Forward(
            half, bare, purpose, "c1", watched=self._cut(site) - 1 if watched else None
        )
        with site.meter.step("c1"):
            extra, chosen = self.extra, None
            if self.share < 1:
                chosen = self._kept(site, batch, passed.received, number)
            site.live.update(batch=batch, passed=passed, kept=chosen)
            real = batch.inputs.full_lengths() + extra
            out = pack_rows(passed.out.detach(), batch.inputs, extra, chosen)
            tensors, roles = {H: out, LENGTHS: real.int()}, {H: Role.ACTIVATION, LENGTHS: Role.MASK}
            if chosen is not None:
                tensors[PLACES] = batch.inputs.positions()[chosen].int()
                roles[PLACES] = Role.INDEX
            if not self.home:
                tensors[LABELS] = _labels(batch, self.model.classification)
                roles[LABELS] = Role.LABEL
            if self.weighs and batch.weights is not None:
                tensors[WEIGHTS], roles[WEIGHTS] = batch.weights, ROLES[WEIGHTS]
        facts: dict[str, Any] = {"left": left, "number": number, "units": batch.units}
        return Message("c2", tensors=tensors, roles=roles, facts=facts)

    def head(self, site: Site, message: Message) -> Tasked[Message]:
        """Labels at home: the loss from the server's hidden states, its gradient back."""
        half = self._half_of(site)["tail"]
        batch: Batch = site.live["batch"]
        extra = self.extra
        with site.meter.step("c3"):
            sent, chosen = message.tensors[H].to(batch.targets.device), site.live["kept"]
            hidden = unpack_rows(sent, batch.inputs, extra, chosen)
            hidden = hidden.clone().requires_grad_(True)
        purpose = (self.setup.seed, site.name, "tail", site.round, site.live["number"])
        given = replace(batch, inputs=batch.inputs.after(hidden))
        passed: Passed = yield Forward(half, given, purpose, "c3", "tail")
        with site.meter.step("c3"):
            each = cross_entropy(passed.out, batch.targets, batch.places)
            loss = _mean(each, batch)
            if batch.weights is not None:
                train = site.train
                site.learnt(of_rows(batch, train, each), len(train))
        found: Tensor = yield Backward(passed, "c3", goal=loss)
        gradient = {GRAD: pack_rows(found, batch.inputs, extra, chosen)}
        return Message(
            "c3", tensors=gradient, roles=of_role(Role.GRADIENT, gradient),
            facts={"loss": float(loss.detach())},
        )  # fmt: skip

    def backward(self, site: Site, message: Message) -> Tasked[Message]:
        """c5: finish the back-propagation, step."""
        passed: Passed = site.live.pop("passed")
        batch: Batch = site.live["batch"]
        sent = message.tensors[GRAD].to(passed.out.device)
        if LOSSES in message.tensors:
            train = site.train
            site.learnt(of_rows(batch, train, message.tensors[LOSSES]), len(train))
        gradient = unpack_rows(sent, batch.inputs, self.extra, site.live["kept"])
        fraction = (site.live["number"] - 1) / site.live["per_round"]
        yield Backward(
            passed, "c5", gradient, None,
            tuple(half.learner for half in self._half_of(site).values()),
            Span(site.round - 1, self.setup.rounds).at(fraction),
        )  # fmt: skip
        return Message("c5")

    def collect(self, site: Site, message: Message) -> Message:
        """cc1: send the tunables of the client's side."""
        values: Group = {}
        optimizer: Group = {}
        for half in self._half_of(site).values():
            values |= half.learner.values()
            optimizer |= half.learner.state()
        site.keep("personal", {n: t for n, t in values.items() if n in self.personal})
        sent = {n: t for n, t in values.items() if n not in self.personal}
        if self.setup.training.optimizer_state == "keep":
            cut = check_cut(self.options, self.model, int(message.facts.get(CUT, self._cut(site))))
            moments = _of(optimizer, set(sent) - self._names(cut))  # of blocks that leave
            site.keep("optimizer", {k: t for k, t in optimizer.items() if k not in moments})
            sent |= moments
        return Message("cc1", tensors=sent, roles=_roles(sent))

    def replace(self, site: Site, message: Message) -> Message:
        """cc4: take the averaged half."""
        values, moments = _parted(message.tensors)
        if wrong := _no_moments(moments, values, self.slots):
            raise FedllmError(f"the server {wrong}")
        site.keep("tunables", values)
        if moments:
            site.keep("optimizer", site.group("optimizer") | moments)
        site.live.pop("halves", None)  # their optimizers end here
        return Message("cc4")


def _mean(losses: Tensor, batch: Batch) -> Tensor:
    """The mean loss of the batch's units, each with its weight."""
    return (losses if batch.weights is None else losses * batch.weights).mean()


def _owner(key: str) -> str:
    """The tunable that a tensor is of, or is remembered for (``Learner.state``)."""
    return key.rpartition("|")[0]


def _parted(tensors: Mapping[str, Tensor]) -> tuple[Group, Group]:
    """Values of tunables, and what optimizers remember of some."""
    moments = {name: t for name, t in tensors.items() if "|" in name}
    return {name: t for name, t in tensors.items() if name not in moments}, moments


def _roles(tensors: Mapping[str, Tensor]) -> dict[str, Role]:
    """
    Of values and of what optimizers remember.

    The latter are no parameters, so that no codec makes 0 of what a step is divided by.
    """
    values, moments = _parted(tensors)
    return of_role(Role.PARAMETER, values) | of_role(Role.STATISTIC, moments)


def _of(optimizer: Mapping[str, Tensor], names: set[str]) -> Group:
    """What an optimizer remembers of these tunables."""
    return {key: tensor for key, tensor in optimizer.items() if _owner(key) in names}


def _no_moments(
    moments: Mapping[str, Tensor], values: Mapping[str, Tensor], slots: Container[str]
) -> str:
    """
    Why these are not what an optimizer remembers of these tunables; empty where they are.

    slots: what it remembers of each.
    """
    shapes = like(values)
    for key, tensor in moments.items():
        name, _, slot = key.rpartition("|")
        shape = () if slot == "step" else shapes.get(name)
        fits = name in values and slot in slots and tuple(tensor.shape) == shape
        if not fits or tensor.dtype is not torch.float32:
            return f"sent {key!r}, which nobody needs"
        if slot in ("step", "exp_avg_sq") and bool((tensor < 0).any()):
            return f"sent {key!r} below 0"
    return ""


def _all(results: Sequence[Any]) -> Sequence[Any]:
    """Results of the server's own jobs. Raises the first that failed."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _labels(batch: Batch, classification: bool) -> Tensor:
    """Classes [rows], or for each real token the one to predict after it, or -1 [tokens]."""
    if classification:
        return batch.targets.int()
    inputs = batch.inputs
    assert inputs.select is not None
    places = torch.full((inputs.cells,), IGNORED, dtype=torch.int32, device=inputs.x.device)
    places[inputs.select] = batch.targets.int()
    return pack_rows(places, inputs, 0)


def check_alike(options: ex.Activations, cuts: Iterable[int]) -> None:
    """Raises FedllmError for what needs one cut for all clients, where there are several."""
    several = sorted(set(cuts))
    if len(several) < 2:
        return
    if options.server == "concatenated":
        raise FedllmError(
            f"strategy.server = 'concatenated': one step takes all clients' batches from one block "
            f"on, here from blocks {several}; expected one strategy.cut, or server = 'sequential' "
            "or 'per-client'"
        )
    if options.average_every:
        raise FedllmError(
            f"strategy.average_every = {options.average_every}: halves of several cuts ({several}) "
            "are averaged at the end of the round; expected 0, or one strategy.cut"
        )


def check_cut(options: ex.Activations, model: LanguageModel, own: int = 0) -> int:
    """
    The number of blocks at a client: its own, else the file's, else half of all.

    Raises FedllmError where the model cannot be cut so.
    """
    if model.family is None:
        raise FedllmError(
            f"strategy.kind = 'activations': models of type {model.model.config.model_type!r} "
            "cannot be cut yet; 'parameters' and 'logits' work with them"
        )
    asked = own or (options.cut if isinstance(options.cut, int) else 0)
    cut = asked or max(model.blocks // 2, 1)
    if not 1 <= cut < model.blocks:
        raise FedllmError(
            f"strategy.cut = {asked}: the model has {model.blocks} blocks; "
            f"expected 1 to {model.blocks - 1}"
        )
    if model.spec.kind == "prefix":
        raise FedllmError(
            "tunables.kind = 'prefix': one tensor holds every layer's prefix and cannot be cut; "
            "use 'lora', 'adapter', 'bitfit' or 'prompt' with strategy.kind = 'activations'"
        )
    tied = bool(getattr(model.model.config, "tie_word_embeddings", False))
    if model.spec.kind == "full" and tied and not model.classification:
        raise FedllmError(
            "tunables.kind = 'full': this model's input and output embeddings are one tensor, "
            "which would have to be trained on both sides of the cut; use 'lora' or 'adapter'"
        )
    if model.spec.head == "personal" and options.labels == "server":
        raise FedllmError(
            "tunables.head = 'personal': with labels at the server the head is there, too; "
            "set strategy.labels = 'client'"
        )
    return cut
