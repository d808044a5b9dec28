"""Bytes without what repeats in them."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

import torch
import zstandard
from torch import Tensor

from fedllm.codecs.base import MOST, SIZE, Layout, Parts, Whole
from fedllm.errors import FedllmError

KINDS = list(SIZE)
LEVEL = 3  # the library's own choice
WINDOW = 2**27  # bytes that a reader has to look back at most


class Zstd(Whole):
    """
    Zstandard (RFC 8878): the parts as they were, from as many bytes as their repetition leaves.

    All parts of a tensor travel as one, as a part of its own costs a hundred bytes and more in a
    frame's header. No error. Bytes depend on the data; ``layout`` is the library's own bound,
    n + n / 256 and at most 64 more for n bytes, with 1 for the number of parts, and for each 3,
    its name and 4 a dimension.
    """

    loses = "nothing"
    exact = False

    def join(self, parts: Parts) -> Parts:
        """Parts of any kind -> bytes: what they hold packed, behind names, kinds and shapes."""
        head, bodies = [struct.pack("<B", len(parts))], []
        for name, part in parts.items():
            about = KINDS.index(part.dtype), part.dim(), *part.shape
            text = name.encode()
            head.append(struct.pack(f"<B{len(text)}sBB{part.dim()}I", len(text), text, *about))
            bodies.append(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        size = sum(map(len, bodies))
        packer = zstandard.ZstdCompressor(level=LEVEL).compressobj(size=size)  # named in the frame
        body = [*(packer.compress(body.data) for body in bodies), packer.flush()]
        return {"zstd": torch.frombuffer(bytearray(b"".join(head + body)), dtype=torch.uint8)}

    def split(self, parts: Mapping[str, Tensor]) -> Parts:
        """
        Bytes -> the parts.

        Raises FedllmError for what is damaged or is not as large as it says: before anything is
        unpacked, so that few bytes do not become many.
        """
        part = parts["zstd"]
        if part.dtype is not torch.uint8 or part.dim() != 1:
            raise FedllmError(f"{tuple(part.shape)} of {part.dtype} are no bytes")
        data = part.numpy().data
        try:
            layout, place = _read(data)
            size = sum(math.prod(shape) * SIZE[kind] for shape, kind in layout.values())
            said = zstandard.frame_content_size(data[place:])
            if said != size:
                raise FedllmError(f"{said} bytes packed for a tensor of {size}")
            unpacked = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompress(
                data[place:], max_output_size=size, allow_extra_data=False
            )
        except (struct.error, IndexError, UnicodeError, zstandard.ZstdError) as error:
            raise FedllmError(f"damaged ({error})") from None
        found, place = Parts(), 0
        for name, (shape, kind) in layout.items():
            end = place + math.prod(shape) * SIZE[kind]
            found[name] = (
                torch.frombuffer(bytearray(unpacked[place:end]), dtype=kind).view(shape)
                if end > place else torch.zeros(shape, dtype=kind)
            )  # fmt: skip
            place = end
        return found

    def joined(self, layout: Layout) -> Layout:
        """The most bytes that it takes."""
        n = sum(math.prod(shape) * SIZE[kind] for shape, kind in layout.values())
        most = n + (n >> 8) + (max(2**17 - n, 0) >> 11)  # ZSTD_COMPRESSBOUND
        head = 1 + sum(3 + len(name) + 4 * len(shape) for name, (shape, _) in layout.items())
        return {"zstd": ((head + most,), torch.uint8)}


def _read(data: memoryview) -> tuple[Layout, int]:
    """Names, shapes and kinds of the parts, and how many bytes tell them."""
    layout, place = Layout(), 1
    for _ in range(data[0]):
        length = data[place]
        name = bytes(data[place + 1 : place + 1 + length]).decode()
        place += 1 + length
        number, dims = struct.unpack_from("<BB", data, place)
        shape = struct.unpack_from(f"<{dims}I", data, place + 2)
        place += 2 + 4 * dims
        if dims > 8 or math.prod(shape) > MOST or name in layout:
            raise FedllmError(f"a tensor of shape {shape[:8]} is refused")
        layout[name] = shape, KINDS[number]
    if sum(math.prod(shape) * SIZE[kind] for shape, kind in layout.values()) > 4 * MOST:
        raise FedllmError(f"parts of more than {4 * MOST:,} bytes are refused")
    return layout, place
