"""The shape of a codec."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

State = dict[str, Tensor]
MOST = 2**28  # numbers of a decoded tensor: a small frame must not become a large one without end


class Codec(Protocol):
    """
    Encodes one tensor into named parts and back.

    ``state`` (error feedback and the like) belongs to the side that encodes and is saved with
    it; a codec without one returns what it was given.
    """

    def encode(self, state: State, x: Tensor) -> tuple[State, dict[str, Tensor]]:
        """Tensor -> (new state, parts that travel)."""
        ...

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Parts -> tensor of the original shape, in float32."""
        ...
