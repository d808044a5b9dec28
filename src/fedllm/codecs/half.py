"""Codecs that change nothing but the type of the numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedllm.codecs.base import Codec, Layout, Parts, Shape, State


class Identity(Codec):
    """As it is."""

    loses = "nothing"

    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """Itself."""
        return state, {"x": x}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Itself."""
        return parts["x"]

    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """Itself."""
        return {"x": (shape, kind)}


class Half(Codec):
    """
    Two bytes a number. Rounded to the nearest, biased by none.

    float16: relative error at most 2^-11 within its range, absolute at most 2^-25 below it; values
    beyond 65,504 are clamped to it. bfloat16: relative error at most 2^-8, and float32's range.
    An infinity stays one, for its receiver to refuse.
    """

    def __init__(self, kind: torch.dtype) -> None:
        """kind: float16 or bfloat16."""
        self.kind, self.limit = kind, torch.finfo(kind).max
        self.loses = f"up to 2^-{11 if kind is torch.float16 else 8} of each number"

    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """float32 -> two bytes."""
        found = x.clamp(-self.limit, self.limit).to(self.kind)
        if x.numel() and bool(torch.stack(x.aminmax()).isinf().any()):
            found = torch.where(x.isinf(), x.to(self.kind), found)
        return state, {"x": found}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Two bytes -> float32."""
        return parts["x"].float()

    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """Two bytes a number."""
        return {"x": (shape, self.kind)}
