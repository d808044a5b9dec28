"""A matrix as the product of two thin ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedllm.codecs.base import MOST, Codec, Layout, Parts, Shape, State
from fedllm.errors import FedllmError


class LowRank(Codec):
    """
    The best approximation of rank q: Z about (U_q S_q) V_q, [n, C] as [n, q] and [q, C].

    Its squared error is the sum of the squares of the singular values that were dropped, and
    q (n + C) numbers travel (Yan et al., section IV-B2, dimensionality reduction of logits). What
    is no matrix, or has not more than q (n + C) numbers, travels as it is; so does what holds NaN
    or infinity, for its receiver to refuse. Biased towards zero.
    """

    def __init__(self, rank: float) -> None:
        """rank: q."""
        self.least = int(rank)
        self.loses = f"singular values of a matrix beyond the first {self.least}"

    def rank(self, values: Tensor) -> int:
        """How many of these singular values, the largest first, are kept."""
        return self.least

    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """[n, C] -> [n, q] and [q, C]."""
        if x.dim() != 2 or self.least * sum(x.shape) >= x.numel() or not x.isfinite().all():
            return state, {"x": x}
        u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
        q = self.rank(s)
        if q * sum(x.shape) >= x.numel():
            return state, {"x": x}
        left = u[:, :q] * s[:q]
        return state, {"left": left.float(), "right": v[:q].float().contiguous()}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The product. Raises FedllmError for one that is larger than any tensor here."""
        if "x" in parts:
            return parts["x"].float()
        left, right = parts["left"], parts["right"]
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise FedllmError(f"{tuple(left.shape)} and {tuple(right.shape)} have no product")
        if left.shape[0] * right.shape[1] > MOST:
            raise FedllmError(f"a product of {left.shape[0]} x {right.shape[1]} is refused")
        return left.float() @ right.float()

    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """[n, q] and [q, C], or the matrix itself."""
        if len(shape) != 2 or self.least * sum(shape) >= math.prod(shape):
            return {"x": (shape, kind)}
        n, columns = shape
        return {"left": ((n, self.least), torch.float32),
                "right": ((self.least, columns), torch.float32)}  # fmt: skip


class Energy(LowRank):
    """
    The least rank that keeps a share T of the energy, sum of kept sigma^2 >= T sum of sigma^2.

    So the relative error |Z - Z'| / |Z| is at most sqrt(1 - T). FedKD (arXiv 2108.13323) sends
    updates so, with T from 0.95 in the first round to 0.98 in the last: ``energy-95-98``.
    """

    exact = False

    def __init__(self, percent: float) -> None:
        """percent: 100 T."""
        super().__init__(1)
        self.share = percent / 100
        self.loses = f"up to {100 - percent:g} % of a matrix's energy"

    def rank(self, values: Tensor) -> int:
        """The first at which enough is kept."""
        kept = values.square().cumsum(0)
        return min(int((kept < self.share * kept[-1]).sum()) + 1, len(values))

    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """At most the matrix itself; which rank is enough, only its values tell."""
        return {"x": (shape, kind)}
