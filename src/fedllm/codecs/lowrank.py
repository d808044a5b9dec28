"""A matrix as the product of two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm.codecs.base import MOST, State
from fedllm.errors import FedllmError


class LowRank:
    """
    The best approximation of rank q: Z about (U_q S_q) V_q, [n, C] as [n, q] and [q, C].

    Its squared error is the sum of the squares of the singular values that were dropped, and
    q (n + C) numbers travel (Yan et al., section IV-B2, dimensionality reduction of logits). What
    is no matrix, or has not more than q (n + C) numbers, travels as it is.
    """

    def __init__(self, rank: int) -> None:
        """rank: q."""
        self.rank = rank

    def encode(self, state: State, x: Tensor) -> tuple[State, dict[str, Tensor]]:
        """[n, C] -> [n, q] and [q, C]."""
        if x.dim() != 2 or self.rank * sum(x.shape) >= x.numel():
            return state, {"x": x}
        u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
        left = u[:, : self.rank] * s[: self.rank]
        return state, {"left": left.float(), "right": v[: self.rank].float().contiguous()}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """The product. Raises FedllmError for one that is larger than any tensor here."""
        if "x" in parts:
            return parts["x"].float()
        left, right = parts["left"], parts["right"]
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise FedllmError(f"{tuple(left.shape)} and {tuple(right.shape)} have no product")
        if left.shape[0] * right.shape[1] > MOST:
            raise FedllmError(f"a product of {left.shape[0]} x {right.shape[1]} is refused")
        return left.float() @ right.float()
