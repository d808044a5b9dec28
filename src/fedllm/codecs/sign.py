"""One bit a number."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedllm.codecs.base import Codec, Layout, Parts, Shape, State, packed, read, unpacked, written
from fedllm.errors import FedllmError


class Sign(Codec):
    """
    Each number's sign times the mean size, |x|_1 / n (arXiv 1901.09847).

    The squared error is |x|^2 - |x|_1^2 / n, the least that signs leave. Biased; error feedback
    makes up for it. Bytes: n / 8, 4 for the size, and 4 a dimension. A tensor with a NaN or an
    infinity in it comes out so altogether.
    """

    loses = "all but each number's sign"

    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """Tensor -> signs, size and shape."""
        flat = x.float().reshape(-1)
        scale = flat.abs().mean().reshape(1) if len(flat) else flat.new_zeros(1)
        return state, {"sign": packed(flat >= 0), "scale": scale, "shape": written(tuple(x.shape))}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Back to float32."""
        shape, scale = read(parts["shape"]), parts["scale"]
        if scale.shape != (1,):
            raise FedllmError(f"{tuple(scale.shape)} sizes instead of one")
        positive = unpacked(parts["sign"], math.prod(shape))
        size = scale.float()
        return torch.where(positive, size, -size).view(shape)

    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """Signs, size and shape."""
        return {"sign": ((-(-math.prod(shape) // 8),), torch.uint8),
                "scale": ((1,), torch.float32), "shape": ((len(shape),), torch.int32)}  # fmt: skip
