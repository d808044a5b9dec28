"""
LoRA's two factors by name: of which rank they are, and the same at another rank.

A module adds (alpha / r) B A to its weight, A [r, in] and B [out, r]. alpha is one for all, so it
falls out wherever products of different ranks meet: they are compared and summed as B A / r.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Group = dict[str, Tensor]
A, B = ".lora_A.", ".lora_B."


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """(name of A, name of B) of each module that has both, sorted."""
    there = set(names)
    both = [(name, name.replace(A, B)) for name in sorted(there) if A in name]
    return [(a, b) for a, b in both if b in there]


def module_of(name: str) -> str:
    """The path of the module that a factor of this name belongs to."""
    return name.partition(A if A in name else B)[0]


def rank_of(tunables: Mapping[str, Tensor]) -> int:
    """The rank of these; 0 where there is no LoRA among them."""
    for name, tensor in tunables.items():
        if A in name:
            return tensor.shape[-2]
        if B in name:
            return tensor.shape[-1]
    return 0


def sizes(tunables: Mapping[str, Tensor]) -> tuple[int, int]:
    """Numbers beside LoRA, and those of one component of all its modules."""
    parts = {n: t.numel() for n, t in tunables.items() if A in n or B in n}
    beside = sum(t.numel() for n, t in tunables.items() if n not in parts)
    return beside, sum(parts.values()) // max(rank_of(tunables), 1)


def shape_at(name: str, shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """The shape that a tunable of this shape has at another rank."""
    if A in name:
        return rank, shape[1]
    return (shape[0], rank) if B in name else tuple(shape)


def shape_fits(name: str, shape: Sequence[int], own: Sequence[int]) -> bool:
    """Whether this is a tunable's own shape, or that of LoRA at a lower rank."""
    if tuple(shape) == tuple(own) or len(shape) != len(own):
        return tuple(shape) == tuple(own)
    side = 0 if A in name else -1
    return 1 <= shape[side] < own[side] and tuple(shape) == shape_at(name, own, shape[side])


def resized(tunables: Mapping[str, Tensor], rank: int) -> Group:
    """
    The first ``rank`` components, filled up with zeros where there are fewer.

    B takes up the change of alpha / r, so that every component that stays adds what it added
    before. Other tunables are left as they are.
    """
    own = rank_of(tunables)
    if own in (0, rank):
        return dict(tunables)
    more = rank - own
    found = {}
    for name, tensor in tunables.items():
        if A in name:
            tensor = F.pad(tensor, (0, 0, 0, more))
        elif B in name:
            tensor = F.pad(tensor, (0, more)) * (rank / own)
        found[name] = tensor
    return found


def grow(tunables: Mapping[str, Tensor], rank: int, rng: np.random.Generator) -> Group:
    """
    The same at a higher rank (P-10): no logit changes, and the new components can learn.

    A gets Gaussian rows of deviation 1 / rank, as at the start, and B columns of zeros.
    """
    own, found = rank_of(tunables), resized(tunables, rank)
    for name in sorted(found):
        if A in name and rank > own:
            new = rng.normal(0.0, 1 / rank, (rank - own, found[name].shape[1]))
            found[name][own:] = torch.from_numpy(new)
    return found


def shrink(tunables: Mapping[str, Tensor], rank: int) -> Group:
    """
    The best approximation of each module's product at a lower rank (P-10).

    The squared error is the sum of the squares of the singular values that were dropped.
    """
    own, found = rank_of(tunables), dict(tunables)
    for a, b in pairs(tunables):
        found[a], found[b] = best(tunables[b].double() / own, tunables[a].double(), rank)
    return found


def core(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    (P, M, Q) with left right = P M Q^T and orthonormal columns in P and Q.

    left [out, n], right [n, in]; M is at most [n, n], so that nothing of [out, in] is made.
    """
    p, upper = torch.linalg.qr(left)
    q, lower = torch.linalg.qr(right.T)
    return p, upper @ lower.T, q


def best(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """
    (A, B) for which B A / rank is the best approximation of left right at this rank.

    B = U S rank and A = V^T of the singular value decomposition U S V^T, as float32; fewer
    components than ``rank`` where the product has fewer.
    """
    p, middle, q = core(left, right)
    u, s, v = torch.linalg.svd(middle, full_matrices=False)
    kept = slice(rank)
    b = p @ (u[:, kept] * s[kept]) * rank
    return (v[kept] @ q.T).float().contiguous(), b.float().contiguous()


def filled(a: Tensor, b: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """
    (A, B) at the rank of ``spare``, with its last rows and zero columns where they have fewer.

    So that the components that a product lacks can learn, but add nothing.
    """
    missing = len(spare) - len(a)
    if not missing:
        return a, b
    return torch.cat([a, spare[-missing:]]), torch.cat([b, b.new_zeros(len(b), missing)], 1)


def excess(tunables: Mapping[str, Tensor], kept: int) -> Tensor:
    """
    |B[:, kept:]| |A[kept:, :]|, summed over the modules, differentiable (HETLORA's regularizer).

    Frobenius norms; what the components above the first ``kept`` could add.
    """
    each = [
        torch.linalg.vector_norm(tunables[b][:, kept:])
        * torch.linalg.vector_norm(tunables[a][kept:])
        for a, b in pairs(tunables)
    ]
    return torch.stack(each).sum()


def without_factors(tensors: Mapping[str, Tensor]) -> Group:
    """Those that are neither A nor B, nor an optimizer's of one of them."""
    return {name: t for name, t in tensors.items() if A not in name and B not in name}


def scaled_up(state: Mapping[str, Tensor], rank: int, fresh: float) -> Group:
    """
    A server optimizer's state (``<tunable>|<slot>``) for factors that grew to this rank.

    It goes by changes of values, so B's follow B: as if all changes had been of what grew. New
    components have no steps; fresh: what second moments start from.
    """
    found = {}
    for name, tensor in state.items():
        own, (tunable, _, slot) = rank_of({name: tensor}), name.partition("|")
        squared = slot == "v" and f"{tunable}|m" in state
        found[name] = resized({name: tensor}, rank)[name]
        if squared and B in name:
            found[name] *= rank / own
        if squared and own:
            new = found[name][own:] if A in name else found[name][:, own:]
            new.fill_(fresh)
    return found


def moved(state: Mapping[str, Tensor], rank: int) -> Group:
    """
    An optimizer's state (``<tunable>|<slot>``) for tunables that are of this rank now.

    What grew keeps its moments: new components have none, and B's follow its gradient, which
    shrinks as B is scaled up. What shrank has another basis, in which the old moments mean nothing.
    """
    own = rank_of({name: tensor for name, tensor in state.items() if tensor.dim()})
    if own in (0, rank):
        return dict(state)
    if rank < own:
        return without_factors(state)
    more, found = rank - own, {}
    for name, tensor in state.items():
        if A in name and tensor.dim():
            tensor = F.pad(tensor, (0, 0, 0, more))
        elif B in name and tensor.dim():
            power = 2 if name.endswith("_sq") else 1
            tensor = F.pad(tensor, (0, more)) * (own / rank) ** power
        found[name] = tensor
    return found
