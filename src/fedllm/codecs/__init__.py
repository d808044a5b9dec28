"""What makes a tensor smaller on the wire: ``encode(state, x) -> (state, y)`` and back."""

from __future__ import annotations

from collections.abc import Callable

from fedllm.codecs.base import Codec
from fedllm.codecs.half import Half, Identity
from fedllm.codecs.lowrank import Energy, LowRank
from fedllm.codecs.quantized import Int8
from fedllm.errors import FedllmError, nearest
from fedllm.experiment import sized

CODECS: dict[str, Codec] = {"none": Identity(), "fp16": Half(), "int8": Int8()}
SIZED: dict[str, Callable[[float], Codec]] = {"lowrank": LowRank, "energy": Energy}
"""Made with a number, e.g. ``lowrank-16``; with two it runs from one to the other."""


def codec(name: str, progress: float = 0.0) -> Codec:
    """
    The codec of a name. Raises FedllmError for one that there is not.

    progress: 0 in the first round, 1 in the last; only what encodes depends on it.
    """
    if name in CODECS:
        return CODECS[name]
    if (found := sized(name)) is not None:
        kind, first, last = found
        return SIZED[kind](first + (last - first) * progress)
    known = [*CODECS, *(f"{kind}-16" for kind in SIZED)]
    raise FedllmError(f"unknown codec {name!r}; {nearest(name, known)}")


__all__ = ["CODECS", "SIZED", "Codec", "codec"]
