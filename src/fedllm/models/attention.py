"""Attention over rows that lie flat, block by block: fused where there is something to fuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from fedllm.models.inputs import Inputs
from fedllm.models.slots import Slots

NAME = "fedllm-blocks"


@dataclass(frozen=True)
class Run:
    """
    Neighbouring blocks of equal length. mask: which keys a query sees, None: all. lengths: real
    tokens of each row, None: all.
    """

    rows: int
    length: int
    mask: Tensor | None
    lengths: Tensor | None = None


@dataclass(frozen=True)
class Chosen:
    """Cells that logits are made of (None: all), and how many of them are each client's."""

    cells: Tensor | None
    sizes: tuple[int, ...]
    slots: Slots

    def begin(self) -> None:
        """From here on layers see these cells only."""
        self.slots.sizes = self.sizes


class Layout:
    """Where each row lies, and what comes before it, for every layer of one pass."""

    def __init__(
        self, inputs: Inputs, causal: bool, extra: int, prefix: Tensor | None = None,
        chosen: Chosen | None = None, written: bool = False,
    ) -> None:  # fmt: skip
        """
        extra: virtual tokens in every row.  prefix: learnt keys and values of each row,
        [rows, layers * 2, heads, tokens, width].  chosen: what the last block goes on with; its
        hidden states are ``narrowed`` afterwards.  written: attention in single products.
        """
        self.attention = _written if written else _fused
        self.chosen = chosen
        self.narrowed: Tensor | None = None
        self.slots: Slots | None = None  # who wants to know what attention a cell received
        self.causal, self.prefix = causal, prefix
        self.before = 0 if prefix is None else prefix.shape[-2]
        lengths = None if inputs.lengths is None else inputs.lengths + extra
        self.runs: list[Run] = []
        begin = 0
        for rows, length in _joined(inputs.blocks):
            mine = None if lengths is None else lengths[begin : begin + rows]
            mask = self._mask(length + extra, mine)
            self.runs.append(Run(rows, length + extra, mask, mine))
            begin += rows
        self.cells = [run.rows * run.length for run in self.runs]

    def _mask(self, length: int, lengths: Tensor | None) -> Tensor | None:
        if self.causal:  # padding stands on the right, where no real token looks
            if not self.before:
                return None
            place = torch.arange(length + self.before, device=self.prefix.device)  # type: ignore[union-attr]
            return place <= torch.arange(length, device=place.device)[:, None] + self.before
        if lengths is None:
            return None
        keys = torch.arange(length, device=lengths.device) < lengths[:, None]
        return keys[:, None, None, :]

    def past(self, layer: int, begin: int, rows: int) -> tuple[Tensor, Tensor]:
        """Learnt keys and values of these rows in this layer: [rows, heads, tokens, width]."""
        assert self.prefix is not None
        mine = self.prefix[begin : begin + rows]
        return mine[:, 2 * layer], mine[:, 2 * layer + 1]


def _joined(blocks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for rows, length in blocks:
        if found and found[-1][1] == length:
            found[-1] = (found[-1][0] + rows, length)
        else:
            found.append((rows, length))
    return found


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    layout: Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, heads, cells, width] of query, key and value -> [1, cells, heads, width]."""
    parts = [torch.split(t.transpose(1, 2)[0], layout.cells) for t in (query, key, value)]
    done, begin, noted = [], 0, []
    watch = layout.slots is not None and layout.slots.watched == module.layer_idx
    for run, *qkv in zip(layout.runs, *parts, strict=True):
        q, k, v = (t.unflatten(0, (run.rows, run.length)).transpose(1, 2) for t in qkv)
        if layout.prefix is not None:
            before_k, before_v = layout.past(module.layer_idx, begin, run.rows)
            k, v = torch.cat([before_k, k], 2), torch.cat([before_v, v], 2)
        if k.shape[1] != q.shape[1]:
            times = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        mask, causal = run.mask, layout.causal and not layout.before
        if sliding_window and layout.causal and run.length + layout.before > sliding_window:
            mask, causal = _window(run.length, layout.before, sliding_window, q.device), False
        if watch:
            noted.append(_received(q, k, mask, causal, scaling, run.lengths))
        out = layout.attention(q, k, v, mask, causal, scaling, dropout)
        done.append(out.transpose(1, 2).flatten(0, 1))
        begin += run.rows
    if watch and layout.slots is not None:
        layout.slots.received = torch.cat(noted)
    return (done[0] if len(done) == 1 else torch.cat(done))[None], None


@torch.no_grad()
def _received(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None,
    lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    """
    What attention each token receives, the mean over heads and real queries: [rows * tokens].

    q, k: [rows, heads, tokens, width].  Written out, as fused attention keeps no weights.
    """
    tokens = q.shape[2]
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones((tokens, tokens), dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.float().softmax(-1).mean(1)
    if lengths is None:
        return weights.mean(1).flatten()
    real = torch.arange(tokens, device=q.device) < lengths[:, None]
    return ((weights * real[:, :, None]).sum(1) / lengths[:, None] * real).flatten()


def _window(length: int, before: int, window: int, device: torch.device) -> Tensor:
    """Causal, and no further back than the window."""
    key = torch.arange(length + before, device=device)
    query = torch.arange(length, device=device)[:, None] + before
    return (key <= query) & (key > query - window)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    if q.is_meta:  # torch would choose another kernel there, one that keeps more
        shape = None if mask is None else torch.empty_like(mask, dtype=q.dtype)
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout, causal, attn_mask=shape, scale=scale
        )[0]
        return out
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale)


def _written(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    """For counting FLOPs: torch counts none for fused attention on a CPU."""
    weights = (q @ k.transpose(2, 3)).softmax(-1)
    return weights @ v


# the library's own way of adding an attention; a model uses it when its config names it
AttentionInterface.register(NAME, attend)
