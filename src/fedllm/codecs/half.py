"""Codecs that change nothing but the type of the numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm.codecs.base import State


class Identity:
    """As it is."""

    def encode(self, state: State, x: Tensor) -> tuple[State, dict[str, Tensor]]:
        """Itself."""
        return state, {"x": x}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Itself."""
        return parts["x"]


class Half:
    """
    float16: half the bytes. Relative error at most 2^-11 within its range; biased by none
    (round to nearest even). Values beyond 65,504 are clamped to it.
    """

    def encode(self, state: State, x: Tensor) -> tuple[State, dict[str, Tensor]]:
        """float32 -> float16."""
        limit = torch.finfo(torch.float16).max
        return state, {"x": x.clamp(-limit, limit).half()}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """float16 -> float32."""
        return parts["x"].float()
