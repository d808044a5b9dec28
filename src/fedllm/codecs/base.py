"""The shape of a codec."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedllm.errors import FedllmError

State = dict[str, Tensor]
Parts = dict[str, Tensor]
Shape = tuple[int, ...]
Layout = dict[str, tuple[Shape, torch.dtype]]
"""Shape and kind of each part."""
MOST = 2**28  # numbers of a decoded tensor: a small frame must not become a large one without end
SIZE = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2, torch.float64: 8,
        torch.uint8: 1, torch.int8: 1, torch.bool: 1, torch.int16: 2, torch.int32: 4,
        torch.int64: 8}  # fmt: skip


class Codec(ABC):
    """
    Encodes one tensor into named parts and back.

    ``state`` (error feedback) belongs to the side that encodes and is saved with it; a codec
    without one returns what it was given. ``purpose`` names the random stream of what is drawn.

    exact: bytes follow from the shape alone; else ``layout`` is an upper bound.  loses: what it
    takes from a number, in words.
    """

    exact = True
    loses = "what its author knows"

    @abstractmethod
    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """Tensor -> (new state, parts that travel)."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Parts -> tensor of the original shape, in float32. Raises FedllmError for misfits."""

    @abstractmethod
    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """What ``encode`` makes of a tensor of this shape and kind."""

    def biased(self) -> Self:
        """What to use under error feedback, which wants a small error rather than a mean of 0."""
        return self


class Whole(Codec):
    """Takes all that the codec before it made, at once; of a single tensor, that."""

    @abstractmethod
    def join(self, parts: Parts) -> Parts:
        """Parts of any kind -> what travels in their place."""

    @abstractmethod
    def split(self, parts: Mapping[str, Tensor]) -> Parts:
        """Back, each of its kind. Raises FedllmError for what is damaged."""

    @abstractmethod
    def joined(self, layout: Layout) -> Layout:
        """What ``join`` makes of these parts."""

    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """Tensor of any kind -> what travels."""
        return state, self.join({"x": x})

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensor, of the kind that it was."""
        return self.split(parts)["x"]

    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """Of a single tensor."""
        return self.joined({"x": (shape, kind)})


def weight(layout: Layout) -> int:
    """Bytes of these parts."""
    return sum(math.prod(shape) * SIZE[kind] for shape, kind in layout.values())


def written(shape: Shape) -> Tensor:
    """A shape as a part, int32 [dimensions]."""
    return torch.tensor(shape, dtype=torch.int32)


def read(part: Tensor) -> Shape:
    """Back to a shape. Raises FedllmError for one that no tensor here has."""
    if part.dim() != 1 or part.dtype is not torch.int32 or len(part) > 8:
        raise FedllmError(f"{tuple(part.shape)} numbers as {part.dtype} are no shape")
    shape = tuple(part.tolist())
    if min(shape, default=0) < 0 or math.prod(shape) > MOST:
        raise FedllmError(f"a tensor of shape {shape} is refused")
    return shape


def packed(bits: Tensor) -> Tensor:
    """Booleans, flat -> uint8, eight to a byte, the first in the lowest bit."""
    return torch.from_numpy(np.packbits(bits.cpu().numpy(), bitorder="little"))


def unpacked(part: Tensor, count: int) -> Tensor:
    """uint8 -> so many booleans. Raises FedllmError where there are not as many."""
    if part.dim() != 1 or part.dtype is not torch.uint8 or len(part) != -(-count // 8):
        raise FedllmError(f"{tuple(part.shape)} of {part.dtype} are no {count} bits")
    bits = np.unpackbits(part.numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits).view(torch.bool)
