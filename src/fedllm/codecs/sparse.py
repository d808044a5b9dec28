"""A share of a tensor's numbers, and where they belong."""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedllm.codecs.base import (
    Codec,
    Layout,
    Parts,
    Shape,
    State,
    packed,
    read,
    unpacked,
    weight,
    written,
)
from fedllm.errors import FedllmError
from fedllm.streams import seed_of

LEAST = 100  # a number kept stands for no more than these: so much a frame can grow


class Sparse(Codec):
    """k = P percent of n numbers, rounded up; what has no fewer bytes so travels as it is."""

    def __init__(self, percent: float) -> None:
        """percent: P."""
        self.percent = percent
        self.loses = f"all but {percent:g} % of the numbers"

    def kept(self, n: int) -> int:
        """How many of n numbers travel."""
        return min(math.ceil(n * self.percent / 100), n)

    @abstractmethod
    def sparse(self, shape: Shape, kind: torch.dtype) -> Layout:
        """The parts, where it is worth it."""

    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """The parts, or the tensor itself."""
        dense: Layout = {"x": (shape, torch.float32)}
        found = self.sparse(shape, kind)
        return found if weight(found) < weight(dense) else dense

    def dense(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Shape]:
        """(zeros, the numbers kept, shape). Raises FedllmError for more zeros than there can be."""
        shape, value = read(parts["shape"]), parts["value"]
        n = math.prod(shape)
        if value.dim() != 1 or not len(value) <= n <= LEAST * len(value):
            raise FedllmError(f"{tuple(value.shape)} numbers for a tensor of shape {shape}")
        return torch.zeros(n), value.float(), shape


class TopK(Sparse):
    """
    The P percent that are largest in size, zeros elsewhere.

    The squared error is the least that k numbers leave: at most (1 - k / n) |x|^2, and no number
    dropped is larger in size than one kept. Biased towards zero; error feedback makes up for it.
    Bytes: 4 k, where they are (4 k as int32, or n / 8 as bits: the fewer), and 4 a dimension.
    A NaN or an infinity is among those kept.
    """

    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """Tensor -> numbers, places and shape."""
        shape = tuple(x.shape)
        layout = self.layout(shape)
        if "x" in layout:
            return state, {"x": x.float()}
        flat = x.detach().cpu().float().reshape(-1)
        n, k = len(flat), self.kept(len(flat))
        size = flat.abs().numpy()
        index = np.sort(np.argpartition(size, n - k)[n - k :])
        value = flat[torch.from_numpy(index)]
        if "index" in layout:
            where = {"index": torch.from_numpy(index.astype(np.int32))}
        else:
            chosen = np.zeros(n, np.bool_)
            chosen[index] = True
            where = {"mask": packed(torch.from_numpy(chosen))}
        return state, {"value": value, **where, "shape": written(shape)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Back, with zeros. Raises FedllmError for places that there are not."""
        if "x" in parts:
            return parts["x"].float()
        x, value, shape = self.dense(parts)
        if "mask" in parts:
            chosen = unpacked(parts["mask"], len(x))
            if int(chosen.sum()) != len(value):
                raise FedllmError(f"{len(value)} numbers for {int(chosen.sum())} places")
            x[chosen] = value
            return x.view(shape)
        index = parts["index"]
        if index.dtype is not torch.int32 or index.shape != value.shape:
            raise FedllmError(f"{tuple(index.shape)} places for {len(value)} numbers")
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(x)):
            raise FedllmError(f"places beyond a tensor of shape {shape}")
        x[index.long()] = value
        return x.view(shape)

    def sparse(self, shape: Shape, kind: torch.dtype) -> Layout:
        """Numbers, places and shape."""
        n = math.prod(shape)
        k = self.kept(n)
        where: Layout = (
            {"index": ((k,), torch.int32)} if 32 * k < n else {"mask": ((-(-n // 8),), torch.uint8)}
        )
        return {"value": ((k,), torch.float32), **where, "shape": ((len(shape),), torch.int32)}


class Random(Sparse):
    """
    P percent drawn without replacement, times n / k, zeros elsewhere.

    Unbiased; the squared error is (n / k - 1) |x|^2 in the mean. Under error feedback, which would
    not converge so, the numbers travel as they are: an error of (1 - k / n) |x|^2 in the mean.
    Bytes: 4 k, 16 for the seed of the places and their checksum, and 4 a dimension. A tensor with
    a NaN or an infinity in it comes out with NaN.
    """

    def __init__(self, percent: float, unbiased: bool = True) -> None:
        """percent: P.  unbiased: times n / k."""
        super().__init__(percent)
        self.unbiased = unbiased

    def biased(self) -> Random:
        """With the numbers as they are."""
        return Random(self.percent, unbiased=False)

    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """Tensor -> numbers, seed and shape."""
        shape = tuple(x.shape)
        if "x" in self.layout(shape):
            return state, {"x": x.float()}
        flat = x.detach().cpu().float().reshape(-1)
        n, k = len(flat), self.kept(len(flat))
        seed = seed_of(*purpose)
        index, checksum = _places(seed, n, k)
        value = flat[index]
        if self.unbiased:
            value *= n / k
        if not bool(torch.isfinite(flat.amin()) & torch.isfinite(flat.amax())):
            value.fill_(torch.nan)  # nobody may take it for a good one
        drawn = torch.tensor([seed, checksum])
        return state, {"value": value, "drawn": drawn, "shape": written(shape)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Back, with zeros. Raises FedllmError where the same seed gives other places."""
        if "x" in parts:
            return parts["x"].float()
        x, value, shape = self.dense(parts)
        drawn = parts["drawn"]
        if drawn.dtype is not torch.int64 or drawn.shape != (2,) or int(drawn[0]) < 0:
            raise FedllmError("no seed of places and their checksum")
        index, checksum = _places(int(drawn[0]), len(x), len(value))
        if checksum != int(drawn[1]):
            raise FedllmError("the seed gives other places here: is numpy of another version?")
        x[index] = value
        return x.view(shape)

    def sparse(self, shape: Shape, kind: torch.dtype) -> Layout:
        """Numbers, seed and shape."""
        k = self.kept(math.prod(shape))
        return {"value": ((k,), torch.float32), "drawn": ((2,), torch.int64),
                "shape": ((len(shape),), torch.int32)}  # fmt: skip


def _places(seed: int, n: int, k: int) -> tuple[Tensor, int]:
    """Places: k of n, ascending, and their checksum."""
    draw = np.random.Generator(np.random.PCG64(seed))
    index = np.sort(draw.choice(n, k, replace=False, shuffle=False))
    return torch.from_numpy(index), zlib.crc32(index.tobytes())
