"""
Floating-point operations, counted by torch on meta tensors: no weights, no arithmetic.

Attention is written out while counting, because torch counts none for fused attention on a CPU.
Matrix products are linear in the batch and in the number of predicted positions, and quadratic
in the length (attention). So three lengths are counted and a fourth confirms it; a model of
which that is not true is counted length by length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from fedllm.lora import shape_at
from fedllm.models.core import Core
from fedllm.models.inputs import Block, Inputs

NODES = (4, 8, 16, 12)  # lengths that are counted; the last one confirms
# of passes that this process has counted: runs of a sweep are mostly alike, and a count is a
# function of what ``_alike`` names
_COUNTED: dict[bytes, int] = {}


def count(
    core: Core, trained: frozenset[str], length: int, rows: int, selected: int, backward: bool,
    input_grad: bool, rank: int = 0,
) -> int:  # fmt: skip
    """
    FLOPs of one pass over ``rows`` rows of ``length`` tokens, counted on the meta device.

    rank: of LoRA, where it is another than the model's own.

    selected: number of token logits (0: class logits). input_grad: the input is activations
    whose gradient is wanted too.
    """
    shapes: Shapes = {
        name: (tuple(shape_at(name, tensor.shape, rank) if rank else tensor.shape), tensor.dtype)
        for name, tensor in [*core.named_parameters(), *core.named_buffers()]
    }
    asked = (length, rows, selected)
    grads = (sorted(trained & shapes.keys()), input_grad) if backward else None
    key = _alike(core, shapes, asked, grads)
    if key not in _COUNTED:
        forward, both = _counted(core, shapes, asked, grads)
        _COUNTED[_alike(core, shapes, asked, None)] = forward
        _COUNTED[key] = both
    return _COUNTED[key]


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
Grads = tuple[list[str], bool] | None  # names of tensors with a gradient, and the input's


def _alike(core: Core, shapes: Shapes, asked: tuple[int, int, int], grads: Grads) -> bytes:
    """What a count depends on: the modules, their settings and shapes, and the pass."""
    parts = [(name, type(module)) for name, module in core.named_modules()]
    own = (core.key[1:], core.decoder_head, core.prompt_tokens, core.autocast, core.family)
    config = {**core.model.config.to_dict(), "_name_or_path": ""}
    text = repr((parts, own, config, shapes, asked, grads))
    return hashlib.sha256(text.encode()).digest()


def _counted(
    core: Core, shapes: Shapes, asked: tuple[int, int, int], grads: Grads
) -> tuple[int, int]:
    """FLOPs of the forward pass, and with those of the backward pass where there are gradients."""
    length, rows, selected = asked
    trained, input_grad = grads or ([], False)
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta").requires_grad_(name in trained)
        for name, (shape, dtype) in shapes.items()
    }
    cells = rows * length
    if core.starts:
        x = torch.zeros(cells, dtype=torch.long, device="meta")
    else:
        width = core.model.config.hidden_size
        size = (cells + rows * core.prompt_tokens, width)
        x = torch.empty(size, device="meta", requires_grad=input_grad)
    select = None
    if core.decoder_head and core.part not in ("client", "body"):
        select = torch.zeros(selected, dtype=torch.long, device="meta")
    # transformers looks into a decoder's positions when it has no mask, and into an encoder's
    # mask when it has one; meta tensors hold nothing to look into
    lengths = None
    if core.family is None and core.decoder_head:
        lengths = torch.full((rows,), length, device="meta")
    inputs = Inputs(x, ((rows, length),), lengths, select)
    counter = FlopCounterMode(display=False)
    with written(core), counter, torch.set_grad_enabled(grads is not None):
        out = functional_call(core, tensors, (inputs,))
        forward = int(counter.get_total_flops())
        if out.requires_grad:
            out.sum().backward()
    return forward, int(counter.get_total_flops())


@contextmanager
def written(core: Core) -> Iterator[None]:
    """Attention written out: ours, or the library's own where we have none for the model."""
    config = core.model.config
    before = config._attn_implementation
    if core.family is None:
        config._attn_implementation = "eager"
    core.slots.written = True
    try:
        yield
    finally:
        core.slots.written = False
        config._attn_implementation = before


class FlopCounter:
    """Counts of one core, cached by its key."""

    def __init__(
        self, core: Core, trained: frozenset[str],
        cache: dict[tuple[object, ...], int] | None = None, rank: int = 0,
    ) -> None:  # fmt: skip
        """
        trained: names of the tunables, which get gradients.

        rank: of LoRA, where it is another than the model's own.
        """
        self.core, self.trained = core, trained
        self.rank, self._of = rank, (core.key, rank) if rank else core.key
        self._cache = {} if cache is None else cache

    def _count(self, length: int, selected: int, backward: bool, input_grad: bool) -> int:
        key = (self._of, length, selected, backward, input_grad)
        if key not in self._cache:
            self._cache[key] = count(
                self.core, self.trained, length, 1, selected, backward, input_grad, self.rank
            )
        return self._cache[key]

    def _one(self, length: int, selected: int, backward: bool, input_grad: bool) -> int:
        """FLOPs of one row, by the parabola through three lengths."""
        *nodes, probe = NODES
        a, b, c, check = (self._count(n, selected, backward, input_grad) for n in NODES)

        def parabola(x: int) -> Fraction:
            first, second = (
                Fraction(b - a, nodes[1] - nodes[0]),
                Fraction(c - b, nodes[2] - nodes[1]),
            )
            curve = (second - first) / (nodes[2] - nodes[0])
            return a + first * (x - nodes[0]) + curve * (x - nodes[0]) * (x - nodes[1])

        if parabola(probe) != check:
            return self._count(length, selected, backward, input_grad)
        return int(parabola(length))

    def __call__(
        self, blocks: Sequence[Block], selected: int, backward: bool, input_grad: bool = False
    ) -> int:
        """
        FLOPs of a pass over blocks of (rows, length) with ``selected`` token logits in all.

        ``backward``: forward and backward together.
        """
        key = (self._of, tuple(blocks), bool(selected), backward, input_grad)
        if key not in self._cache:
            one = 1 if selected else 0
            self._cache[key] = sum(
                rows * self._one(length, one, backward, input_grad) for rows, length in blocks
            )
        if not selected:
            return self._cache[key]
        length = blocks[0][1]
        once = self._one(length, 1, backward, input_grad)
        per_token = self._one(length, 2, backward, input_grad) - once
        return self._cache[key] + (selected - sum(rows for rows, _ in blocks)) * per_token
