"""What makes a tensor smaller on the wire: ``encode(state, x) -> (state, y)`` and back."""

from __future__ import annotations

from collections.abc import Callable

from fedllm.codecs.base import Codec
from fedllm.codecs.half import Half, Identity
from fedllm.codecs.lowrank import LowRank
from fedllm.codecs.quantized import Int8
from fedllm.errors import FedllmError, nearest

CODECS: dict[str, Codec] = {"none": Identity(), "fp16": Half(), "int8": Int8()}
SIZED: dict[str, Callable[[int], Codec]] = {"lowrank": LowRank}
"""Made with a number, e.g. ``lowrank-16``."""


def codec(name: str) -> Codec:
    """The codec of a name. Raises FedllmError for one that there is not."""
    if name in CODECS:
        return CODECS[name]
    kind, _, number = name.rpartition("-")
    if kind in SIZED and number.isdecimal() and 0 < int(number) < 10**6:
        return SIZED[kind](int(number))
    known = [*CODECS, *(f"{kind}-16" for kind in SIZED)]
    raise FedllmError(f"unknown codec {name!r}; {nearest(name, known)}")


__all__ = ["CODECS", "SIZED", "Codec", "codec"]
