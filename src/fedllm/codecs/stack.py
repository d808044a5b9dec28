"""Codecs one after the other, and the memory of what they left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedllm.codecs.base import Codec, Layout, Parts, Shape, State, Whole
from fedllm.errors import FedllmError


class Stack(Codec):
    """
    Each codec encodes the numbers that the one before it made, or all of its parts (``Whole``).

    ``topk-10+int8+zstd``: the numbers kept are quantized, and these, their ranges and their places
    packed. Parts are named by the way that they went: ``value.level``. The error is that of the
    first codec plus that of the second on the numbers that are left.
    """

    def __init__(self, stages: Sequence[Codec]) -> None:
        """stages: in the order of encoding."""
        self.stages = list(stages)
        self.exact = all(stage.exact for stage in stages)
        self.loses = ", then ".join(s.loses for s in stages if s.loses != "nothing") or "nothing"

    def biased(self) -> Stack:
        """Of stages that are."""
        return Stack([stage.biased() for stage in self.stages])

    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """Tensor -> the parts of the last stage, and what it did not take."""
        _, found = self.stages[0].encode({}, x, purpose)
        for stage in self.stages[1:]:
            if isinstance(stage, Whole):
                found = stage.join(found)
                continue
            before, found = found, {}
            for name, part in before.items():
                if part.is_floating_point():
                    _, parts = stage.encode({}, part, (*purpose, name))
                    found |= {f"{name}.{inner}": tensor for inner, tensor in parts.items()}
                else:
                    found[name] = part
        return state, found

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Back, stage by stage."""
        found = dict(parts)
        for depth in range(len(self.stages) - 1, 0, -1):
            stage = self.stages[depth]
            if isinstance(stage, Whole):
                found = stage.split(found)
                continue
            taken, before = dict[str, Parts](), Parts()
            for name, part in found.items():
                outer, _, inner = name.rpartition(".")
                if outer and outer.count(".") == depth - 1:
                    taken.setdefault(outer, {})[inner] = part
                else:
                    before[name] = part
            found = before | {name: stage.decode(inner) for name, inner in taken.items()}
        return self.stages[0].decode(found)

    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """The parts of the last stage, and what it did not take."""
        found = self.stages[0].layout(shape, kind)
        for stage in self.stages[1:]:
            if isinstance(stage, Whole):
                found = stage.joined(found)
                continue
            before, found = found, {}
            for name, (size, of) in before.items():
                if of.is_floating_point:
                    inner = stage.layout(size, of)
                    found |= {f"{name}.{part}": about for part, about in inner.items()}
                else:
                    found[name] = (size, of)
        return found


class Feedback(Codec):
    """
    What was left out of one tensor is added to the next of its name (arXiv 1809.07599).

    So the sum of what was sent differs from the sum of what should have been by what is left out
    now, which is bounded where the codec's error is at most a share below 1 of the tensor, as of
    ``topk``, ``sign`` and ``random`` (in the mean). Only for what is a new difference each time.
    Bytes as of the codec. A NaN or an infinity is forgotten.
    """

    def __init__(self, inner: Codec) -> None:
        """inner: what leaves something out."""
        self.inner = inner.biased()
        self.exact = inner.exact
        self.loses = f"{inner.loses}, which is added to the next message"

    def encode(
        self, state: State, x: Tensor, purpose: tuple[object, ...] = ()
    ) -> tuple[State, Parts]:
        """``rest`` is what was left out, of the shape of x. Raises FedllmError for another one."""
        whole = x.float()
        if "rest" in state:
            if state["rest"].shape != x.shape:
                raise FedllmError(
                    f"feedback: what was left out is of shape {tuple(state['rest'].shape)}, for a "
                    f"tensor of {tuple(x.shape)}"
                )
            whole = whole + state["rest"].to(x.device)
        _, parts = self.inner.encode({}, whole, purpose)
        rest = whole.cpu() - self.inner.decode({n: t.cpu() for n, t in parts.items()})
        return {"rest": torch.nan_to_num(rest, 0.0, 0.0, 0.0)}, parts

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """As the codec inside."""
        return self.inner.decode(parts)

    def layout(self, shape: Shape, kind: torch.dtype = torch.float32) -> Layout:
        """As the codec inside."""
        return self.inner.layout(shape, kind)
