"""What makes a tensor smaller on the wire: ``encode(state, x) -> (state, y)`` and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch

from fedllm.codecs.base import Codec
from fedllm.codecs.half import Half, Identity
from fedllm.codecs.lowrank import Energy, LowRank
from fedllm.codecs.packed import Zstd
from fedllm.codecs.quantized import Uniform
from fedllm.codecs.sign import Sign
from fedllm.codecs.sparse import Random, TopK
from fedllm.codecs.stack import Feedback, Stack
from fedllm.errors import FedllmError
from fedllm.experiment import FEEDBACK, WAYS, sized, stages

Codecs = Mapping[str, str | Mapping[str, str]]
"""By role: a codec's name, or a table of them by the tensors' names (``chosen``)."""

CODECS: dict[str, Codec] = {
    "none": Identity(),
    "fp16": Half(torch.float16),
    "bf16": Half(torch.bfloat16),
    "int8": Uniform(8),
    "int8-tensor": Uniform(8, "tensor"),
    "int8-channel": Uniform(8, "channel"),
    "int8-stochastic": Uniform(8, stochastic=True),
    "int8-tensor-stochastic": Uniform(8, "tensor", stochastic=True),
    "int8-channel-stochastic": Uniform(8, "channel", stochastic=True),
    "int4": Uniform(4),
    "int4-tensor": Uniform(4, "tensor"),
    "int4-channel": Uniform(4, "channel"),
    "int4-stochastic": Uniform(4, stochastic=True),
    "int4-tensor-stochastic": Uniform(4, "tensor", stochastic=True),
    "int4-channel-stochastic": Uniform(4, "channel", stochastic=True),
    "sign": Sign(),
    "zstd": Zstd(),
}
SIZED: dict[str, Callable[[float], Codec]] = {
    "lowrank": LowRank, "energy": Energy, "topk": TopK, "random": Random,
}  # fmt: skip
"""Made with a number, e.g. ``lowrank-16``; with two it runs from one to the other."""


def codec(name: str, progress: float = 0.0) -> Codec:
    """
    The codec of a name, or of several with ``+`` between them. Raises FedllmError for none.

    progress: 0 in the first round, 1 in the last; only what encodes depends on it.
    """
    if name in CODECS:
        return CODECS[name]
    try:
        listed = stages(name)
    except ValueError as error:
        raise FedllmError(str(error)) from None
    made = [_stage(one, progress) for one in listed if one != FEEDBACK]
    whole = made[0] if len(made) == 1 else Stack(made)
    return Feedback(whole) if listed[-1] == FEEDBACK else whole


def _stage(name: str, progress: float) -> Codec:
    found = sized(name)
    if found is None:
        return CODECS[name]
    kind, first, last = found
    return SIZED[kind](first + (last - first) * progress)


def chosen(codecs: Codecs, role: str, name: str, way: str) -> str:
    """
    The codec of a tensor of this role and name on its ``way``, "up" or "down".

    Of a table the first pattern that fits; ``up:*`` or just ``up`` fits only what clients send.
    """
    found = codecs.get(role, "none")
    if isinstance(found, str):
        return found
    for key, codec in found.items():
        head, _, pattern = (f"{key}:*" if key in WAYS else key).rpartition(":")
        if head in ("", way) and fnmatchcase(name, pattern):
            return codec
    return "none"


__all__ = ["CODECS", "SIZED", "Codec", "Codecs", "chosen", "codec"]
