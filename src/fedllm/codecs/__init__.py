"""What makes a tensor smaller on the wire: ``encode(state, x) -> (state, y)`` and back."""

from __future__ import annotations

from fedllm.codecs.base import Codec
from fedllm.codecs.half import Half, Identity

CODECS: dict[str, Codec] = {"none": Identity(), "fp16": Half()}

__all__ = ["CODECS", "Codec"]
