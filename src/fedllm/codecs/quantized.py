"""Eight bits a number, for logits and whatever else bears it."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm.codecs.base import State
from fedllm.errors import FedllmError

STEPS = 255


class Int8:
    """
    One byte a number, and the least and the step of each row (the last dimension) beside it.

    Rounded to the nearest of 256 values between a row's least and largest number: the error is
    at most half a step, (largest - least) / 510. Sent as softened labels after a softmax it is
    K-09's quantization; logits are as good, as a softmax does not see a row's offset.
    """

    def encode(self, state: State, x: Tensor) -> tuple[State, dict[str, Tensor]]:
        """[..., n] -> uint8 [..., n], float32 [..., 1] twice."""
        rows = x.float() if x.dim() else x.float().reshape(1)
        low, high = (
            (rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)) if rows.numel()
            else (rows.new_zeros((*rows.shape[:-1], 1)),) * 2
        )  # fmt: skip
        step = (high - low) / STEPS
        safe = torch.where(step > 0, step, torch.ones_like(step))
        level = ((rows - low) / safe).round().clamp(0, STEPS).to(torch.uint8)
        return state, {"level": level.view(x.shape), "low": low, "step": step}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """Back to float32."""
        level, low, step = parts["level"], parts["low"], parts["step"]
        wanted = (*level.shape[:-1], 1) if level.dim() else (1,)
        if level.dtype is not torch.uint8 or not tuple(low.shape) == tuple(step.shape) == wanted:
            raise FedllmError(f"levels of {tuple(level.shape)} do not fit their ranges")
        rows = level.float() if level.dim() else level.float().reshape(1)
        return (rows * step + low).view(level.shape)
