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

With ``inside = N`` a batch crosses more often: of the N blocks above the cut the client has the
attention and the server the feed-forward part. Between the client's first piece and the loss c1, c2
and c3 then take turns, and c4 and c5 on the way back; an ordinary cut is the case of one turn.

Activations travel packed: real tokens only, [tokens, width], with the lengths of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
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
from fedllm.models.core import Core, Piece, pieces
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
from fedllm.training.meter import Meter, held_bytes
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
class Side:
    """
    One side's pieces in training, in the order in which a batch goes through them.

    learners: of all of them; they step when a batch's gradient has gone back through the first.
    """

    pieces: list[Half]
    learners: tuple[Learner, ...]

    def forward(
        self, passes: Sequence[Passed], batch: Batch, purpose: tuple[object, ...], step: str,
        watched: int | None = None,
    ) -> Forward:  # fmt: skip
        """The pass of the piece that comes after these passes."""
        number = len(passes)
        purpose = (*purpose, number) if number else purpose
        below = sum(passed.left for passed in passes)
        return Forward(self.pieces[number], batch, purpose, step, watched=watched, below=below)


@dataclass(eq=False)
class Crossed:
    """What crossed to a server's piece, and its pass.  parts: each client's rows."""

    parts: dict[str, Inputs]
    batch: Batch
    passed: Passed = field(init=False)

    def split(self, cells: Tensor, extra: int) -> dict[str, Tensor]:
        """Each client's cells."""
        sizes = [i.cells + extra * i.rows for i in self.parts.values()]
        return dict(zip(self.parts, torch.split(cells, sizes), strict=True))


@dataclass(eq=False)
class Turn:
    """
    One server side's step on the way: of one client, or of all that are concatenated.

    sent: what c2 said first of each client's rows.  crossed: of each of the server's pieces.
    weights: units of those who have a say.  goal, gradient: the loss at the server, or the gradient
    that clients sent of what the last piece gave.  each: the loss of each unit.
    """

    side: Side
    sent: dict[str, Message]
    crossed: list[Crossed] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
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
        own = self._cuts(list(setup.cuts)).values()
        check_alike(options, own)
        # half of the blocks is nobody's cut, and may not do, where all have their own
        self.cut = min(own) if own else check_cut(options, model)
        self.rule = RULES["mean"]
        self.home = options.labels == "client"
        self.share = options.keep_tokens
        self.slots = {*SLOTS[setup.training.optimizer], "step"}
        self.weighs = setup.training.sampling == "loss" and not self.home
        self.batches = Want(("left", "number"), ("units",), look=self._misfit)
        self.extra = self._server(self.cut)[0].prompt_tokens
        self.personal = model.head if model.spec.head == "personal" else frozenset[str]()
        self.tasks: Tasks = {
            "forward": self.forward, "head": self.head, "backward": self.backward,
            "collect": self.collect, "replace": self.replace,
        }  # fmt: skip

    def start(self) -> ServerState:
        """First values of both halves."""
        return ServerState({n: t for n, t in self.model.initial.items() if n not in self.personal})

    def _pieces(self, cut: int, begin: int = 0) -> tuple[list[Piece], list[Piece]]:
        """What lies at a client of this cut, and at the server."""
        return pieces(self.model.blocks, cut, self.options.inside, self.home, begin)

    def _server(self, cut: int) -> list[Core]:
        """The server's pieces of a model cut there."""
        return [self.model.piece(piece) for piece in self._pieces(cut)[1]]

    def _there(self, cut: int) -> list[str]:
        """Tunables at the server, for clients of this cut."""
        return sorted({n for core in self._server(cut) for n in self.model.tunables_of(core)})

    def _names(self, cut: int) -> set[str]:
        """Tunables at a client of this cut; a personal head, which is of no average, left out."""
        return set(self.model.initial) - set(self._there(cut)) - self.personal

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
        sides = self._sides(state, cuts, ask)
        alive = Alive(cohort, ask)
        since: dict[str, float] = {}  # units seen since the last average
        whole: dict[str, float] = {}  # and in this round
        losses: list[float] = []
        sweeps = 0
        for group, sweep_ends in self._turns(alive, rng):
            asked = {client: Message("c1", "forward", facts=self._told(cuts[client]))
                     for client in group}  # fmt: skip
            replies = alive.gather(asked, self.batches)  # c1, c2
            turns = self._through(sides, replies, alive, ask) if replies else []  # c3
            if turns:
                losses.append(float(np.mean([turn.loss for turn in turns])))
                for turn in turns:
                    for client, seen in turn.weights.items():
                        since[client] = since.get(client, 0.0) + seen
                        whole[client] = whole.get(client, 0.0) + seen
                self._back(turns, alive, ask)  # c3 to c5
            sweeps += sweep_ends
            every = self.options.average_every
            if every and sweep_ends and sweeps % every == 0 and alive.busy():
                state, _ = self._average(state, alive, since, cuts, sides, ask)
                since = {}
        if self.setup.cutter is not None:
            clock = {"clock": self.setup.cutter.seconds(ask.round, cuts)}
            state = replace(state, facts={**state.facts, **clock})
        state = self._chosen(state, ask.round)
        state, moments = self._average(state, alive, since, cuts, sides, ask)
        state = self._merge(state, sides, whole, cuts, ask)
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

    def _sides(
        self, state: ServerState, cuts: Mapping[str, int], ask: Exchange
    ) -> dict[str, Side]:  # fmt: skip
        """The server's side that serves each client, with its persistent optimizer."""

        def learner(cut: int, optimizer: Group) -> Learner:
            values = {name: state.shared[name] for name in self._there(cut)}
            return Learner(values, self.setup.training, optimizer, device=self.model.device)

        def side(cut: int, learner: Learner) -> Side:
            return side_of(self.model, self._server(cut), learner, ask.meter)

        lowest = min(cuts.values())
        if self.options.server == "per-client":
            sides = {
                client: side(cut, learner(cut, state.clients.get(client, {})))
                for client, cut in cuts.items()
            }
            together = sum(one.learners[0].reserved for one in sides.values())
        else:
            common = learner(lowest, state.optimizer)
            above = {cut: side(cut, common.within(self._there(cut)))
                     for cut in sorted(set(cuts.values()))}  # fmt: skip
            sides = {client: above[cut] for client, cut in cuts.items()}
            together = common.reserved
        everything = sum(map(held_bytes, self._server(lowest))) + together
        for half in (half for one in sides.values() for half in one.pieces):
            half.beside = everything - held_bytes(half.core) - half.learner.reserved
        return sides

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

    def _through(
        self, sides: Mapping[str, Side], replies: Mapping[str, Message], alive: Alive,
        ask: Exchange,
    ) -> list[Turn]:  # fmt: skip
        """
        c3: forward through all pieces, those of the clients in between, and the loss.

        Returns who got so far. One who fails on the way has no say in this step.
        """
        whole = self.options.server == "concatenated"
        groups = [list(replies)] if whole else [[client] for client in replies]
        turns = [Turn(sides[group[0]], {c: replies[c] for c in group}) for group in groups]
        for number in range(len(turns[0].side.pieces)):
            if number:  # c1 and c2 again
                sent = self._down(turns, "c1", "forward")
                replies = alive.gather(sent, Want(look=_like(sent, H, H)))
            turns = [turn for turn in turns if any(c in replies for c in turn.sent)]
            if not turns:
                return turns
            jobs = [self._cross(turn, replies, ask) for turn in turns]
            for turn, passed in zip(turns, _all(work(jobs)), strict=True):
                turn.crossed[-1].passed = passed
        for turn in turns:
            turn.weights = {c: float(turn.sent[c].facts["units"]) for c in turn.crossed[-1].parts}
        if self.home:
            self._ask_heads(turns, alive)
        else:
            for turn in turns:
                with ask.meter.step("c3"):
                    last = turn.crossed[-1]
                    goal = last.passed.out
                    each = cross_entropy(goal, last.batch.targets, last.batch.places)
                    loss = _mean(each, last.batch)
                turn.goal, turn.loss, turn.each = loss, float(loss.detach()), each.detach()
        turns = [turn for turn in turns if turn.weights]
        for turn in turns:
            if not np.isfinite(turn.loss):
                raise FedllmError(
                    f"round {ask.round}: the loss became {turn.loss}; lower training.rate"
                )
        return turns

    def _down(self, turns: Sequence[Turn], step: str, task: str) -> dict[str, Message]:
        """What the last piece gave, to those whose rows went through it."""
        found = {}
        for turn in turns:
            last = turn.crossed[-1]
            for client, out in last.split(last.passed.out.detach(), self.extra).items():
                packed = pack_rows(out, last.parts[client], self.extra).contiguous()
                found[client] = Message(step, task, {H: packed}, {H: Role.ACTIVATION})
        return found

    def _cross(self, turn: Turn, replies: Mapping[str, Message], ask: Exchange) -> Forward:
        """The pass of the server's next piece over what came up."""
        mine = {
            client: replace(sent, tensors={**sent.tensors, H: replies[client].tensors[H]})
            for client, sent in turn.sent.items() if client in replies
        }  # fmt: skip
        passes = [crossed.passed for crossed in turn.crossed]
        with ask.meter.step("c3"):
            batch, parts = self._server_batch(mine)
            if len(passes) < len(turn.side.pieces) - 1:
                batch = _bare(batch, batch.inputs)
        turn.crossed.append(Crossed(parts, batch))
        number = next(iter(mine.values())).facts["number"]
        purpose = (self.setup.seed, ask.round, "server", *sorted(mine), "dropout", number)
        return turn.side.forward(passes, batch, purpose, "c3")

    def _back(self, turns: Sequence[Turn], alive: Alive, ask: Exchange) -> None:
        """
        c3: backward through all pieces, and a step; c4: what each client gets, its gradient.

        A client gets the gradient of its own mean loss, however many rows others brought.
        """
        span = Span(ask.round - 1, self.setup.rounds)
        for number in reversed(range(len(turns[0].side.pieces))):
            jobs = [
                Backward(
                    turn.crossed[number].passed, "c3", turn.gradient, turn.goal,
                    () if number else turn.side.learners, span.at(self._done(turn, alive)),
                )
                for turn in turns
            ]  # fmt: skip
            gradients: dict[str, Group] = {}
            for turn, found in zip(turns, _all(work(jobs)), strict=True):
                with ask.meter.step("c3"):
                    shares = self._share(turn, turn.crossed[number], found)
                    mine = {client: {GRAD: g} for client, g in shares.items() if client in alive}
                    if self.weighs and turn.each is not None:
                        counts = [len(turn.sent[c].tensors[WEIGHTS]) for c in turn.weights]
                        parts = torch.split(turn.each, counts)
                        for client, part in zip(turn.weights, parts, strict=True):
                            mine[client][LOSSES] = part
                    gradients |= mine
                turn.goal = turn.each = None
            sent = {
                client: Message("c4", "backward", tensors, {n: ROLES[n] for n in tensors})
                for client, tensors in gradients.items()
            }
            if not number:
                alive.gather(sent)  # c5
                return
            replies = alive.gather(sent, Want(look=_like(sent, GRAD, GRAD)))
            for turn in turns:
                turn.gradient = self._joined(turn, turn.crossed[number - 1], replies)

    def _joined(
        self, turn: Turn, crossed: Crossed, replies: Mapping[str, Message]
    ) -> Tensor:  # fmt: skip
        """
        The gradient of the mean loss of all by what a piece gave, from the clients' own.

        Who did not answer has no say in it.
        """
        total, parts = sum(turn.weights.values()), []
        for client, out in crossed.split(crossed.passed.out, self.extra).items():
            if client in replies and client in turn.weights:
                sent = replies[client].tensors[GRAD].to(out.device)
                whole = unpack_rows(sent, crossed.parts[client], self.extra)
                parts.append(whole * (turn.weights[client] / total))
            else:
                parts.append(torch.zeros_like(out))
        return torch.cat(parts)

    def _done(self, turn: Turn, alive: Alive) -> float:
        """How much of the round lies behind this step of a server side."""
        if self.options.server == "concatenated":
            return alive.longest()
        if self.options.server == "per-client":
            return alive.fraction(next(iter(turn.sent)))
        return alive.overall()

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
        sent = self._down(turns, "c3", "head")
        back = alive.gather(sent, Want(("loss",), look=_like(sent, H, GRAD)))
        if sent and not back:
            raise FedllmError(f"no client's head answered: {alive.why()}")
        for turn in turns:
            turn.weights = {c: w for c, w in turn.weights.items() if c in back}
            total = sum(turn.weights.values())
            if not total:
                continue
            turn.loss = (
                sum(float(back[c].facts["loss"]) * w for c, w in turn.weights.items()) / total
            )
            turn.gradient = self._joined(turn, turn.crossed[-1], back)

    def _share(self, turn: Turn, crossed: Crossed, found: Tensor | None) -> dict[str, Tensor]:
        """The gradient of each client's own mean loss by what crossed, packed."""
        if found is None:
            found = torch.zeros_like(crossed.batch.inputs.x)
        total = sum(turn.weights.values())
        return {
            client: pack_rows(
                part * (total / turn.weights[client]), crossed.parts[client], self.extra
            )
            for client, part in crossed.split(found, self.extra).items()
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
        cuts: Mapping[str, int], sides: Mapping[str, Side], ask: Exchange,
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
                (learner,) = sides[client].learners
                here = learner.within(sorted(somewhere - names[cuts[client]]))
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
                joining[client] = _of(sides[client].learners[0].state(), new)
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
        self, state: ServerState, sides: Mapping[str, Side], seen: Mapping[str, float],
        cuts: Mapping[str, int], ask: Exchange,
    ) -> ServerState:  # fmt: skip
        """What lies at the server for everybody: as it is, or the mean of the clients' (V1)."""
        always = self._there(max(cuts.values()))
        learners = {client: side.learners[0] for client, side in sides.items()}
        if self.options.server != "per-client":
            learner = next(iter(learners.values()))
            return replace(
                state, shared={**state.shared, **learner.within(always).values()},
                optimizer={**state.optimizer, **learner.state()},
            )  # fmt: skip
        with ask.meter.step("cc2"):
            values = {client: learners[client].within(always).values() for client in seen}
            merged = self.rule(values, seen)
        optimizers = {
            client: {**state.clients.get(client, {}), **learner.state()}
            for client, learner in learners.items()
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

    def _side(self, site: Site) -> Side:
        """The client's pieces in training; with labels at home the head has its own learner."""
        if "side" not in site.live:
            cut = self._cut(site)
            begin = self._begin(cut)
            values = self.model.initial | site.group("tunables") | self.own(site)
            keep = self.setup.training.optimizer_state == "keep"
            optimizer = site.group("optimizer") if keep else {}
            cores = [self.model.piece(piece) for piece in self._pieces(cut, begin)[0]]

            def side(some: list[Core]) -> Side:
                names = sorted({n for core in some for n in self.model.tunables_of(core)})
                mine = {n: values[n] for n in names}
                learner = Learner(mine, self.setup.training, optimizer, device=self.model.device)
                return side_of(self.model, some, learner, site.meter)

            lower = side(cores[:-1] if self.home else cores)
            beside = sum(half.held for half in lower.pieces)
            if self._below(site) is not None:  # the blocks that ran once are still there
                apart = self.model.part("client", begin)
                beside += held_bytes(apart) + sum(site.meter.held.values())
            for half in lower.pieces:
                half.beside = beside - half.held
            head = side(cores[-1:]) if self.home else Side([], ())
            site.live["side"] = Side(
                [*lower.pieces, *head.pieces], (*lower.learners, *head.learners)
            )
        found: Side = site.live["side"]
        return found

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
        """
        c1 run the first layers on a private batch, c2 send activations (and labels).

        c1 with hidden states: run the next piece on what the server made of these activations.
        """
        if H in message.tensors:
            return (yield from self._further(site, message.tensors[H]))
        if CUT in message.facts:
            site.live[CUT] = check_cut(self.options, self.model, int(message.facts[CUT]))
        side = self._side(site)
        batch, number, left = self._next(site)
        watched = self.share < 1 and self.options.keep_by == "attention"
        passed: Passed = yield side.forward(
            [], _bare(batch, batch.inputs), self._purpose(site), "c1",
            self._cut(site) - 1 if watched else None,
        )  # fmt: skip
        with site.meter.step("c1"):
            extra, chosen = self.extra, None
            if self.share < 1:
                chosen = self._kept(site, batch, passed.received, number)
            site.live.update(batch=batch, passes=[passed], kept=chosen)
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

    def _further(self, site: Site, sent: Tensor) -> Tasked[Message]:
        """c1 and c2 of the next piece."""
        side, batch = self._side(site), site.live["batch"]
        passes: list[Passed] = site.live["passes"]
        if len(passes) >= len(side.pieces) - self.home:
            raise FedllmError(
                f"strategy.inside = {self.options.inside}: nothing here takes c1 again"
            )
        with site.meter.step("c1"):
            bare = _bare(batch, self._given(site, sent))
        passed: Passed = yield side.forward(passes, bare, self._purpose(site), "c1")
        passes.append(passed)
        up = {H: pack_rows(passed.out.detach(), batch.inputs, self.extra)}
        return Message("c2", tensors=up, roles=of_role(Role.ACTIVATION, up))

    def _purpose(self, site: Site) -> tuple[object, ...]:
        """Of what the client's pieces draw for the batch."""
        number = site.live["number"]
        return (self.setup.seed, site.name, "private", "dropout", site.round, number)

    def _given(self, site: Site, sent: Tensor) -> Inputs:
        """The batch's rows as the hidden states that came down, whose gradient is wanted."""
        inputs: Inputs = site.live["batch"].inputs
        here = sent.to(inputs.x.device)
        hidden = unpack_rows(here, inputs, self.extra, site.live["kept"])
        return inputs.after(hidden.clone().requires_grad_(True))

    def head(self, site: Site, message: Message) -> Tasked[Message]:
        """Labels at home: the loss from the server's hidden states, its gradient back."""
        half = self._side(site).pieces[-1]
        batch: Batch = site.live["batch"]
        with site.meter.step("c3"):
            given = replace(batch, inputs=self._given(site, message.tensors[H]))
        purpose = (self.setup.seed, site.name, "tail", site.round, site.live["number"])
        passed: Passed = yield Forward(half, given, purpose, "c3", "tail")
        with site.meter.step("c3"):
            each = cross_entropy(passed.out, batch.targets, batch.places)
            loss = _mean(each, batch)
            if batch.weights is not None:
                train = site.train
                site.learnt(of_rows(batch, train, each), len(train))
        found: Tensor = yield Backward(passed, "c3", goal=loss)
        gradient = {GRAD: pack_rows(found, batch.inputs, self.extra, site.live["kept"])}
        return Message(
            "c3", tensors=gradient, roles=of_role(Role.GRADIENT, gradient),
            facts={"loss": float(loss.detach())},
        )  # fmt: skip

    def backward(self, site: Site, message: Message) -> Tasked[Message]:
        """c5: finish the back-propagation, step; before the first piece only hand it on."""
        passes: list[Passed] = site.live["passes"]
        passed = passes.pop()
        batch: Batch = site.live["batch"]
        sent = message.tensors[GRAD].to(passed.out.device)
        if LOSSES in message.tensors:
            train = site.train
            site.learnt(of_rows(batch, train, message.tensors[LOSSES]), len(train))
        gradient = unpack_rows(sent, batch.inputs, self.extra, site.live["kept"])
        fraction = (site.live["number"] - 1) / site.live["per_round"]
        found: Tensor = yield Backward(
            passed, "c5", gradient, None, () if passes else self._side(site).learners,
            Span(site.round - 1, self.setup.rounds).at(fraction),
        )  # fmt: skip
        if not passes:
            return Message("c5")
        up = {GRAD: pack_rows(found, batch.inputs, self.extra)}
        return Message("c5", tensors=up, roles=of_role(Role.GRADIENT, up))

    def collect(self, site: Site, message: Message) -> Message:
        """cc1: send the tunables of the client's side."""
        values: Group = {}
        optimizer: Group = {}
        for learner in self._side(site).learners:
            values |= learner.values()
            optimizer |= learner.state()
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
        site.live.pop("side", None)  # its optimizers end here
        return Message("cc4")


def side_of(
    model: LanguageModel, cores: Sequence[Core], learner: Learner, meter: Meter
) -> Side:  # fmt: skip
    """A side of these pieces, which share a learner."""
    halves = [
        Half(model, core, learner.within(model.tunables_of(core)), meter) for core in cores
    ]  # fmt: skip
    return Side(halves, (learner,))


def _like(requests: Mapping[str, Message], name: str, said: str) -> Callable[[Message], str]:
    """To look at a reply, which should say only this, shaped as what ``name`` is in the request."""

    def look(reply: Message) -> str:
        sent, found = requests[reply.client].tensors[name], reply.tensors.get(said)
        if set(reply.tensors) != {said} or found is None:
            return f"sent {sorted(reply.tensors)}, not [{said!r}]"
        fits = found.shape == sent.shape and found.dtype is sent.dtype
        return "" if fits else f"sent {said!r} of other tokens than it got"

    return look


def _bare(batch: Batch, inputs: Inputs) -> Batch:
    """A batch for a piece that makes no logits."""
    return replace(batch, inputs=replace(inputs, select=None))


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
    inside = options.inside
    if not 1 <= cut < model.blocks:
        raise FedllmError(
            f"strategy.cut = {asked}: the model has {model.blocks} blocks; "
            f"expected 1 to {model.blocks - 1}"
        )
    if cut + inside > model.blocks:
        raise FedllmError(
            f"strategy.inside = {inside}: the model has {model.blocks} blocks, {cut} of them below "
            f"the cut; expected 0 to {model.blocks - cut}"
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


def at_client(options: ex.Activations, model: LanguageModel, cut: int) -> list[str]:
    """Names of the tunables of a client of this cut, sorted."""
    mine, _ = pieces(model.blocks, cut, options.inside, options.labels == "client")
    return sorted({n for piece in mine for n in model.tunables_of(model.piece(piece))})
