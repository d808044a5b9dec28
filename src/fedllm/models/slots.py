"""
Layers whose tunables may have a slot for each client: one pass over the base for all of them.

A tunable of one client has its usual shape; those of S clients, stacked, one dimension more.
The rows of the clients lie one after another, so a slot is a range of the flattened input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Slots:
    """Whose rows lie where while a core runs; set by the core, read by its layers."""

    def __init__(self) -> None:
        """Nobody's."""
        self.written = False  # attention in single products, to be counted
        self.sizes: tuple[int, ...] = ()
        self.draws: Sequence[torch.Generator] = ()
        self.watched: int | None = None  # the block whose attention is noted
        self.received = torch.empty(0)  # by each cell there, as a mean over heads and queries

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(slots, rows of each) of neighbours with equally many rows."""
        found: list[tuple[int, int]] = []
        for size in self.sizes:
            if found and found[-1][1] == size:
                found[-1] = (found[-1][0] + 1, size)
            else:
                found.append((1, size))
        return found

    def linear(self, x: Tensor, weight: Tensor, start: Tensor | None = None) -> Tensor:
        """
        The product x weight^T (+ start), each slot's rows with the slot's own weight.

        x: [cells, in].  weight: [out, in] or [slots, out, in].  start: [cells, out].
        """
        if weight.dim() == 2:
            return x @ weight.T if start is None else torch.addmm(start, x, weight.T)
        runs = self.runs
        if len(runs) == 1:
            return _batched(x, weight, start, runs[0])
        sizes = [count * rows for count, rows in runs]
        starts = [None] * len(runs) if start is None else torch.split(start, sizes)
        weights = torch.split(weight, [count for count, _ in runs])
        parts = zip(torch.split(x, sizes), weights, starts, runs, strict=True)
        return torch.cat([_batched(*part) for part in parts])

    def spread(self, values: Tensor) -> Tensor:
        """[slots, features] -> [cells, features]: each slot's vector for each of its rows."""
        sizes = torch.tensor(self.sizes, device=values.device)
        return values.repeat_interleave(sizes, 0, output_size=sum(self.sizes))

    def drop(self, x: Tensor, share: float) -> Tensor:
        """Dropout, each slot from its own stream; none where the core runs without streams."""
        if not share or not self.draws:
            return x
        mask = torch.empty_like(x)
        for part, draw in zip(torch.split(mask, list(self.sizes)), self.draws, strict=True):
            part.bernoulli_(1 - share, generator=draw)
        return x * mask.div_(1 - share)


def _batched(x: Tensor, weight: Tensor, start: Tensor | None, run: tuple[int, int]) -> Tensor:
    count, rows = run
    x = x.view(count, rows, -1)
    if start is None:
        return torch.bmm(x, weight.transpose(1, 2)).flatten(0, 1)
    start = start.view(count, rows, -1)
    return torch.baddbmm(start, x, weight.transpose(1, 2)).flatten(0, 1)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class LoraLinear(nn.Module):
    """y = W x + alpha / r B A dropout(x) around a frozen linear layer, with PEFT's names."""

    def __init__(self, layer: Any, slots: Slots) -> None:
        """``layer``: PEFT's own, of which this takes the parts."""
        super().__init__()
        self.base_layer = layer.base_layer
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.alpha = float(layer.lora_alpha["default"])
        drop = layer.lora_dropout["default"]
        self.dropout = float(getattr(drop, "p", 0.0))
        self.slots = slots

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y: Tensor = self.base_layer(x)
        a: Tensor = self.lora_A["default"].weight
        b: Tensor = self.lora_B["default"].weight
        inner = self.slots.linear(self.slots.drop(_flat(x), self.dropout), a)
        inner = inner * (self.alpha / a.shape[-2])
        return self.slots.linear(inner, b, _flat(y)).view_as(y)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer with B A added to its weight, in place."""
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        delta = b @ a * (self.alpha / a.shape[0])
        weight: Tensor = self.base_layer.weight
        weight += delta if isinstance(self.base_layer, nn.Linear) else delta.T
        return self.base_layer


SPARSE = ".sparse"  # ends the name of the trained entries of a layer


class Masked(nn.Module):
    """y = W x + D x around a frozen linear layer; D is zero but for the entries of a mask."""

    def __init__(self, base: nn.Module, shape: tuple[int, int], places: Tensor) -> None:
        """shape: (out, in) of D.  places: of the mask in the flattened D, ascending."""
        super().__init__()
        self.base_layer, self.shape, self.slots = base, shape, Slots()
        # a parameter, so that it counts as something held, and in the hash of the base
        self.places = nn.Parameter(places, requires_grad=False)
        self.sparse = nn.Parameter(torch.zeros(len(places), device=places.device))

    def dense(self, values: Tensor) -> Tensor:
        """D [out, in] of these entries, or [slots, out, in] of [slots, entries]."""
        flat = values.new_zeros((*values.shape[:-1], self.shape[0] * self.shape[1]))
        return flat.index_copy(-1, self.places, values).view(*flat.shape[:-1], *self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y: Tensor = self.base_layer(x)
        return self.slots.linear(_flat(x), self.dense(self.sparse), _flat(y)).view_as(y)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer with D added to its weight, in place."""
        delta = self.dense(self.sparse)
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        weight += delta if isinstance(self.base_layer, nn.Linear) else delta.T
        return self.base_layer


class SlotLinear(nn.Linear):
    """A linear layer whose weight, bias or both may be stacked."""

    slots: Slots

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.weight.dim() == 2 and (self.bias is None or self.bias.dim() == 1):
            return F.linear(input, self.weight, self.bias)
        y = self.slots.linear(_flat(input), self.weight)
        if self.bias is not None:
            y = y + (self.bias if self.bias.dim() == 1 else self.slots.spread(self.bias))
        return y.view(*input.shape[:-1], -1)


class SlotNorm(nn.LayerNorm):
    """A layer norm whose weight and bias may be stacked."""

    slots: Slots

    def forward(self, input: Tensor) -> Tensor:
        """[..., width] -> the same."""
        weight, bias = self.weight, self.bias
        own = [t is not None and t.dim() == 2 for t in (weight, bias)]
        y = F.layer_norm(
            input, self.normalized_shape, None if own[0] else weight, None if any(own) else bias,
            self.eps,
        )  # fmt: skip
        flat = _flat(y)
        if own[0]:
            flat = flat * self.slots.spread(weight)
        if any(own) and bias is not None:
            flat = flat + (self.slots.spread(bias) if own[1] else bias)
        return flat.view_as(y)


def _slot_conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    class SlotConv1D(Conv1D):
        """GPT-2's linear layer, whose bias may be stacked."""

        slots: Slots

        def forward(self, x: Tensor) -> Tensor:
            """[..., in] -> [..., out]."""
            if self.bias.dim() == 1:
                y: Tensor = super().forward(x)
                return y
            y = torch.addmm(self.slots.spread(self.bias), _flat(x), self.weight)
            return y.view(*x.shape[:-1], -1)

    return SlotConv1D


def give_slots(model: nn.Module, names: Mapping[str, Tensor] | set[str], slots: Slots) -> bool:
    """
    Make the layers that hold these tunables take stacked ones, in place; names stay.

    Returns False, and changes nothing but LoRA layers, where one of them cannot.
    """
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import LoraLayer
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        # around a base in 4 bits PEFT has a class of its own, with the same parts
        if type(module) is PeftLinear or (
            isinstance(module, LoraLayer) and type(module).__name__ == "Linear4bit"
        ):
            model.set_submodule(name, LoraLinear(module, slots))
        elif isinstance(module, Masked):
            module.slots = slots
    kinds = {nn.Linear: SlotLinear, nn.LayerNorm: SlotNorm, Conv1D: _slot_conv1d()}
    holders: dict[str, set[str]] = {}
    for path in names:
        owner, _, leaf = path.rpartition(".")
        if isinstance(model.get_submodule(owner), Masked):
            continue
        if ".lora_" not in path:
            holders.setdefault(owner, set()).add(leaf)
        elif not any(isinstance(m, LoraLinear) for m in _above(model, owner)):
            return False
    modules = {owner: model.get_submodule(owner) for owner in holders}
    for owner, module in modules.items():
        only_bias = type(module) is Conv1D and holders[owner] != {"bias"}
        if type(module) not in (*kinds, *kinds.values()) or only_bias:
            return False
    for module in modules.values():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
            module.slots = slots  # type: ignore[assignment]
    return True


def _above(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules on the way to a path."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]
