"""Bytes without what repeats in them."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

import torch
import zstandard
from torch import Tensor

from fedllm.codecs.base import MOST, SIZE, Codec, Layout, Parts, Shape, State
from fedllm.errors import FedllmError

KINDS = list(SIZE)
LEVEL = 3  # the library's own choice
WINDOW = 2**27  # bytes that a reader has to look back at most


class Zstd(Codec):
    """
    Zstandard (RFC 8878): the tensor as it was, from as many bytes as its repetition leaves.

    No error. Bytes depend on the data; ``layout`` is the library's own bound, n + n / 256 and
    at most 64 more for n bytes, with 2 for the kind and 8 a dimension.
    """

    loses = "nothing"
    whole = True
    exact = False

    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """Tensor of any kind -> bytes."""
        data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        body = zstandard.ZstdCompressor(level=LEVEL).compress(data)  # names its whole size
        head = struct.pack(f"<BB{x.dim()}q", KINDS.index(x.dtype), x.dim(), *x.shape)
        return state, {"zstd": torch.frombuffer(bytearray(head + body), dtype=torch.uint8)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """
        Bytes -> the tensor, of the kind that it was.

        Raises FedllmError for what is damaged or is not as large as it says: before anything is
        unpacked, so that few bytes do not become many.
        """
        part = parts["zstd"]
        if part.dtype is not torch.uint8 or part.dim() != 1:
            raise FedllmError(f"{tuple(part.shape)} of {part.dtype} are no bytes")
        data = part.numpy().data
        try:
            number, dims = struct.unpack_from("<BB", data)
            shape = struct.unpack_from(f"<{dims}q", data, 2)
            kind = KINDS[number]
            if dims > 8 or min(shape, default=0) < 0 or math.prod(shape) > MOST:
                raise FedllmError(f"a tensor of shape {shape[:8]} is refused")
            body, size = data[2 + 8 * dims :], math.prod(shape) * SIZE[kind]
            said = zstandard.frame_content_size(body)
            if said != size:
                raise FedllmError(f"{said} bytes packed for a tensor of {size}")
            found = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompress(
                body, max_output_size=size, allow_extra_data=False
            )
        except (struct.error, IndexError, zstandard.ZstdError) as error:
            raise FedllmError(f"damaged ({error})") from None
        if not size:
            return torch.zeros(shape, dtype=kind)
        return torch.frombuffer(bytearray(found), dtype=kind).view(shape)

    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """The most bytes that it takes."""
        n = math.prod(shape) * SIZE[kind]
        most = n + (n >> 8) + (max(2**17 - n, 0) >> 11)  # ZSTD_COMPRESSBOUND
        return {"zstd": ((2 + 8 * len(shape) + most,), torch.uint8)}
