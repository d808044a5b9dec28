"""
Clients with LoRA of different ranks and modules, and ranks that change (Yan et al., section IV-A2
and A3).

What the server has is of the highest rank of the round and of all modules; a client gets the first
components of its own ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.exchange import Want, like
from fedllm.lora import (
    A,
    B,
    best,
    excess,
    filled,
    grow,
    rank_of,
    resized,
    scaled_up,
    shrink,
    without_factors,
)
from fedllm.message import Message
from fedllm.models.loading import LanguageModel
from fedllm.models.slots import SPARSE, Masked
from fedllm.strategies.base import Group, ServerState, Setup, Site
from fedllm.streams import stream

BEST, STALE = "best", "stale"  # facts: the least loss, and rounds since it was found
REMAINDER_GAP = "remainder_gap"  # share of SLoRA's first stage that LoRA does not start from
Facts = dict[str, int | float | str]
BASIS = "basis"  # in what a client keeps: the round of the fall that gave the factors theirs
RANK = "rank"  # in what the server keeps of a client: the one that it went down to


class Ranks:
    """Who has which rank in which round."""

    def __init__(self, options: ex.Parameters, setup: Setup, model: LanguageModel) -> None:
        """options: whether clients prune.  setup: their ranks.  model: the schedule."""
        self.pruning = options.prune
        self.setup, self.model = setup, model
        self.spec = model.spec if isinstance(model.spec, ex.Lora) else None
        self.names = {
            client: frozenset(model.only(modules).initial)
            for client, modules in setup.modules.items()
        }
        self.budgets = {
            client: {n: self._whose(client).within(most) for n, most in budget.items()}
            for client, budget in setup.budgets.items()
        }

    def _whose(self, client: str) -> LanguageModel:
        modules = self.setup.modules.get(client)
        return self.model if modules is None else self.model.only(modules)

    def initial(self, rank: int) -> Group:
        """The first values at this rank; 0: where there is no LoRA, or not yet."""
        before = self.model.before
        if not rank and before is not None:
            return dict(before.initial)
        return resized(self.model.initial, rank)

    @property
    def first(self) -> Group:
        """What everybody has before the first round."""
        return self.initial(0 if self.spec is None else self.spec.most(1))

    def due(self, state: ServerState, round: int) -> tuple[Group, Facts]:
        """What the server has, at the rank of this round (P-10, P-13), and what to say of it."""
        shared, own = state.shared, rank_of(state.shared)
        rank = own if self.spec is None else self.spec.most(round)
        if self.spec is not None and (growth := self.spec.growth):
            plateau = int(state.facts.get(STALE, 0)) >= growth.patience
            rank = min(own * growth.factor, self.spec.rank) if plateau else own
        if rank == own:
            return shared, {}
        if not own and self.spec is not None and self.model.before is not None:
            return _factored(shared, self.model, self.model.before, self.spec.alpha)
        rng = stream(self.setup.seed, "rank", round)
        return shrink(shared, rank) if rank < own else grow(shared, rank, rng), {}

    def rebased(self, site: Site) -> None:
        """
        Have a client's optimizer forget factors of another basis: of before the last fall.

        Whose rank is low enough to stay must, too, as all components are others since.
        """
        fall = 0 if self.spec is None else self.spec.fall(site.round)
        known = site.group(BASIS)
        if fall != int(known.get(BASIS, 0)):
            site.keep("optimizer", without_factors(site.group("optimizer")))
            site.keep(BASIS, {BASIS: torch.tensor(fall)})

    def noted(self, state: ServerState, shared: Group, loss: float) -> Facts:
        """What tells a plateau, after a round that began with these and ended with this loss."""
        growth = None if self.spec is None else self.spec.growth
        if growth is None:
            return {}
        best = float(state.facts.get(BEST, math.inf))
        if loss < best * (1 - growth.gain):
            return {BEST: loss, STALE: 0}
        before = state.facts.get(STALE, 0) if rank_of(shared) == rank_of(state.shared) else 0
        return {BEST: best, STALE: int(before) + 1}

    def of(self, state: ServerState, client: str, shared: Group, round: int) -> int:
        """A client's rank, where the server has these."""
        found = [rank_of(shared)]
        if client in self.setup.ranks:
            found.append(self.setup.ranks[client])
        if client in self.budgets:
            found.append(ex.since(self.budgets[client], round))
        if RANK in state.clients.get(client, {}):
            found.append(int(state.clients[client][RANK]))
        return min(found)

    def part(self, shared: Group, rank: int, names: frozenset[str] | None) -> Group:
        """What a client of this rank gets of these, where it has these tunables only."""
        mine = shared if names is None else {n: t for n, t in shared.items() if n in names}
        return resized(mine, rank)

    def want(self, given: Group) -> Want:
        """What a client that was given these may answer: the same shapes, or those of fewer."""
        whole = Want(("loss",), ("weight",), like(given))
        rank = rank_of(given)
        if self.pruning is None or kept(rank, self.pruning) == rank:
            return whole
        cut = Want(shapes=like(resized(given, kept(rank, self.pruning))))

        def look(reply: Message) -> str:
            return cut.misfit(reply) and whole.misfit(reply)

        return Want(("loss",), ("weight",), look=look)

    def told(
        self, state: ServerState, updates: Mapping[str, Group], given: Mapping[str, int]
    ) -> dict[str, Group]:  # fmt: skip
        """
        What the server keeps of its clients: the ranks to which they went down (P-09).

        given: what they had in this round; who still has it may have more as ``schedule`` goes on.
        """
        if self.pruning is None:
            return state.clients
        found = {
            client: {RANK: torch.tensor(rank_of(update))} for client, update in updates.items()
            if rank_of(update) < given[client]
        }  # fmt: skip
        return {**state.clients, **found}


def _factored(
    shared: Group, model: LanguageModel, before: LanguageModel, alpha: float
) -> tuple[Group, Facts]:
    """
    SLoRA's second stage (P-13): (alpha / r) B A is the best approximation of what was changed.

    What is left of the change is dropped, as the base is frozen for good; its share is told.
    """
    found, left, whole = {n: t for n, t in shared.items() if n in model.head}, 0.0, 0.0
    for name in sorted(shared.keys() - found.keys()):
        path = name.removesuffix(SPARSE)
        layer = before.whole.get_submodule(path)
        assert isinstance(layer, Masked)
        change = layer.dense(shared[name].to(before.device)).cpu().double()
        a, b = (f"{path}{part}default.weight" for part in (A, B))
        rank, one = rank_of(model.initial), torch.eye(change.shape[1], dtype=change.dtype)
        found[a], found[b] = filled(*best(change / alpha, one, rank), model.initial[a])
        near = found[b].double() @ found[a].double() * (alpha / rank)
        left += float((change - near).square().sum())
        whole += float(change.square().sum())
    return dict(sorted(found.items())), {REMAINDER_GAP: (left / whole) ** 0.5 if whole else 0.0}


def kept_at(optimizer: Group, before: Group, now: Group, server: ex.ServerStep) -> Group:
    """
    The server's optimizer for tunables that may be of another rank than before.

    It goes on through growth. Of factors that fell it begins anew: their basis is another.
    """
    own, rank = rank_of(before), rank_of(now)
    if own == rank:
        return optimizer
    if 0 < own < rank:
        return scaled_up(optimizer, rank, getattr(server, "tau", 0.0) ** 2)
    return {n: t for n, t in without_factors(optimizer).items() if n.partition("|")[0] in now}


def kept(rank: int, share: float) -> int:
    """What is left of a rank after pruning: at least 1."""
    return max(int(rank * share), 1)


@dataclass(frozen=True)
class Pruning:
    """
    HETLORA's self-pruning (arXiv 2401.06432; P-09).

    ``weight`` |B[:, g r:]| |A[g r:, :]|, summed over the modules, is minimized besides the loss;
    where it is less after local training than before, the rank goes down to g r, for good.
    """

    kept: int
    weight: float

    def __call__(self, tunables: Mapping[str, Tensor]) -> Tensor:
        """The regularizer."""
        return self.weight * excess(tunables, self.kept)

    def cut(self, start: Group, after: Group) -> Group:
        """What training gave, at the lower rank where there is less above it than at the start."""
        less = bool(excess(after, self.kept) < excess(start, self.kept))
        return resized(after, self.kept) if less else after


def pruning(options: ex.Parameters, start: Group) -> Pruning | None:
    """For a client that starts from these; none where it does not prune, or has one component."""
    rank = rank_of(start)
    if options.prune is None or kept(rank, options.prune) == rank:
        return None
    return Pruning(kept(rank, options.prune), options.prune_penalty)
