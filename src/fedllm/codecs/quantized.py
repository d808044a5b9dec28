"""Few bits a number, for logits, activations and whatever else bears it (S-07, K-09)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from fedllm.codecs.base import Codec, Layout, Parts, Shape, State, read, written
from fedllm.errors import FedllmError
from fedllm.streams import generator

BLOCK = 2**18  # numbers of a block, 1 MB: they stay in the cache from their range to their levels
Along = Literal["row", "tensor", "channel"]


class Uniform(Codec):
    """
    ``bits`` a number, and the least number and the step of each range beside it, as float32.

    Ranges are the rows (the last dimension: a token), the whole tensor, or the channels (columns:
    one place of the last dimension); with fewer than two dimensions always the whole tensor.
    Rounded to the nearest of 2^bits values between a range's least and largest: the error is at
    most half a step, (largest - least) / (2^(bits + 1) - 2), plus float32's own rounding. That is
    a bias, but of no direction. ``stochastic`` rounds up as often as the number is close to the
    upper value: the error is less than a step, and 0 in the mean. A range with a NaN or an
    infinity in it comes out as NaN.

    Bytes: bits / 8 of the numbers, 8 a range, and in 4 bits (two numbers to a byte, the last one
    alone if need be) 4 for each dimension.

    Sent as softened labels after a softmax, 8 bits a row are K-09's quantization; logits are as
    good, as a softmax does not see a row's offset.
    """

    def __init__(self, bits: Literal[4, 8], along: Along = "row", stochastic: bool = False) -> None:
        """bits: a number's.  along: what shares a range."""
        self.bits, self.along, self.stochastic = bits, along, stochastic
        self.steps = 2**bits - 1
        part = "a step" if stochastic else "half a step"
        self.loses = f"up to {part} of each {along}'s range, of {self.steps}"

    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """[..., n] -> levels, least numbers and steps."""
        table, by_row = self._table(x.float()), self._rowwise(x.shape)
        level = torch.empty(table.shape, dtype=torch.uint8, device=x.device)
        low, step = self._ranges(table, by_row)
        draw = generator(x.device, *purpose) if self.stochastic else None
        for some in _blocks(table):
            block = table[some]
            least, size = (low[some], step[some]) if by_row else (low, step)
            if by_row:  # while the block is in the cache
                torch.amin(block, -1, keepdim=True, out=least)
                torch.amax(block, -1, keepdim=True, out=size)
                size.sub_(least).div_(self.steps)
            scaled = (block - least).mul_(torch.where(size > 0, 1 / size, 0.0))
            if draw is None:
                scaled.round_()
            else:
                scaled.add_(torch.rand(block.shape, generator=draw, device=x.device)).floor_()
            level[some].copy_(scaled.clamp_(0, self.steps))
        low, step = low.view(self._wanted(x.shape)), step.view(self._wanted(x.shape))
        if self.bits == 8:
            return state, {"level": level.view(x.shape), "low": low, "step": step}
        return state, {"level": _paired(level.view(-1)), "shape": written(tuple(x.shape)),
                       "low": low, "step": step}  # fmt: skip

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Back to float32."""
        level, low, step = parts["level"], parts["low"], parts["step"]
        shape = tuple(level.shape) if self.bits == 8 else read(parts["shape"])
        wanted = self._wanted(shape)
        if level.dtype is not torch.uint8 or not tuple(low.shape) == tuple(step.shape) == wanted:
            raise FedllmError(f"levels of {shape} do not fit their ranges")
        if self.bits == 4:
            level = _unpaired(level, math.prod(shape))
        x = torch.empty(shape, device=level.device)
        table, levels = self._table(x), self._table(level.view(shape))
        by_row = self._rowwise(shape)
        across = (-1, 1) if by_row else (1, -1)
        low, step = low.float().reshape(across), step.float().reshape(across)
        for some in _blocks(table):
            least, size = (low[some], step[some]) if by_row else (low, step)
            table[some].copy_(levels[some]).mul_(size).add_(least)
        return x

    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """Levels, least numbers and steps."""
        ranges = (self._wanted(shape), torch.float32)
        if self.bits == 8:
            return {"level": (shape, torch.uint8), "low": ranges, "step": ranges}
        pairs = (-(-math.prod(shape) // 2),)
        return {"level": (pairs, torch.uint8), "shape": ((len(shape),), torch.int32),
                "low": ranges, "step": ranges}  # fmt: skip

    def _rowwise(self, shape: Shape) -> bool:
        return self.along == "row" and len(shape) > 1

    def _wanted(self, shape: Shape) -> Shape:
        """The shape in which ranges travel."""
        if len(shape) < 2 or self.along == "tensor":
            return (1,)
        return (*shape[:-1], 1) if self.along == "row" else (shape[-1],)

    def _table(self, x: Tensor) -> Tensor:
        """[rows, n], or [numbers, 1] where all share one range."""
        if x.dim() < 2 or self.along == "tensor":
            return x.reshape(-1, 1)
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def _ranges(self, table: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
        """Least numbers and steps along the table; those of rows are left to be filled in."""
        if by_row and table.numel():
            low = table.new_empty((len(table), 1))
            return low, torch.empty_like(low)
        if by_row or not table.numel():
            low = table.new_zeros((len(table), 1) if by_row else (1, table.shape[1]))
            return low, low.clone()
        low = table.amin(0, keepdim=True)
        return low, (table.amax(0, keepdim=True) - low) / self.steps


def _blocks(table: Tensor) -> Iterator[slice]:
    """Rows, as many at once as there are in ``BLOCK`` numbers."""
    if table.numel():
        size = max(BLOCK // table.shape[1], 1)
        for first in range(0, len(table), size):
            yield slice(first, first + size)


def _paired(level: Tensor) -> Tensor:
    """Levels of four bits, two to a byte, the first in the lower half."""
    if len(level) % 2:
        level = torch.cat([level, level.new_zeros(1)])
    found = torch.empty(len(level) // 2, dtype=torch.uint8, device=level.device)
    pairs = level.view(torch.int16)  # the second one lies in the upper byte
    for first in range(0, len(pairs), BLOCK):
        some = pairs[first : first + BLOCK]
        found[first : first + BLOCK].copy_((some | (some >> 4)).bitwise_and_(255))
    return found


def _unpaired(pairs: Tensor, count: int) -> Tensor:
    """Back to so many levels. Raises FedllmError where there are not as many."""
    if pairs.dim() != 1 or len(pairs) != -(-count // 2):
        raise FedllmError(f"{tuple(pairs.shape)} bytes do not hold {count} levels")
    found = torch.empty(len(pairs), dtype=torch.int16, device=pairs.device)
    for first in range(0, len(pairs), BLOCK):
        some = pairs[first : first + BLOCK].to(torch.int16)
        found[first : first + BLOCK] = (some | (some << 4)).bitwise_and_(0x0F0F)
    return found.view(torch.uint8)[:count]
