"""
A model as a function of its tunables, whole or a part of it, without rewriting it.

A part is the same architecture with the blocks of the other side replaced by a module that
passes its input on, so every tensor keeps its name and the tunables of the parts add up to
those of the whole. Modules are shared, never copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedllm.models.attention import Chosen, Layout
from fedllm.models.families import Family
from fedllm.models.inputs import Inputs
from fedllm.models.slots import Slots

Part = Literal["whole", "client", "server", "body", "tail"]
HALF = 0.5  # of a block: a place between its attention and its feed-forward part


@dataclass(frozen=True)
class Piece:
    """A part of a model by its places, as ``LanguageModel.part`` takes them."""

    part: Part
    cut: float
    begin: float = 0


def pieces(
    blocks: int, cut: int, inside: int = 0, home: bool = False, begin: int = 0
) -> tuple[list[Piece], list[Piece]]:
    """
    What lies at a client and what at the server, in the order in which a batch goes through it.

    A batch crosses between any two: the client's first piece, the server's first, the client's
    second, ... Of ``inside`` blocks above the cut the client has the attention and the server the
    feed-forward part.  home: the head is the client's last piece.  begin: as of ``Core``.
    """
    top = cut + inside
    client = [Piece("client", cut + HALF if inside else cut, begin)]
    client += [Piece("body", block + HALF, block) for block in range(cut + 1, top)]
    server = [Piece("body", block + 1, block + HALF) for block in range(cut, top - 1)]
    last = top - HALF if inside else cut
    if home:
        return [*client, Piece("tail", cut)], [*server, Piece("body", blocks, last)]
    return client, [*server, Piece("server", last)]


def span(part: Part, cut: float, begin: float, blocks: int) -> tuple[float, float]:
    """Where a part's blocks begin and end."""
    return {"whole": (begin, blocks), "client": (begin, cut), "body": (begin, cut),
            "server": (cut, blocks), "tail": (0, 0)}[part]  # fmt: skip


class Pass(nn.Module):
    """Hands its first input on: stands where a block or norm of the other side was."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """[any] -> the same."""
        return hidden


class NoPositions(nn.Module):
    """Zero position embeddings: given hidden states already hold GPT-2's."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """[batch, length] -> zeros [batch, length, 1]."""
        return torch.zeros((*position_ids.shape, 1), device=position_ids.device)


class GivenEmbeddings(nn.Module):
    """BERT's embeddings, bypassed: given hidden states went through them already."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """[batch, length, width] -> the same."""
        return inputs_embeds


def graft(module: nn.Module, changes: dict[str, nn.Module | None]) -> nn.Module:
    """The module with submodules replaced; what is not on a changed path is shared with it."""
    grafted = copy.copy(module)
    grafted._modules = dict(module._modules)
    grafted._parameters = dict(module._parameters)
    below: dict[str, dict[str, nn.Module | None]] = {}
    for path, new in changes.items():
        first, dot, rest = path.partition(".")
        if dot:
            below.setdefault(first, {})[rest] = new
        else:
            grafted._modules[first] = new
    for first, rest_changes in below.items():
        child = module._modules[first]
        assert child is not None, first
        grafted._modules[first] = graft(child, rest_changes)
    return grafted


class Core(nn.Module):
    """
    The function that is trained.

    ``whole``: tokens -> logits.  ``client``: tokens -> hidden states after ``cut`` blocks.
    ``server``: hidden states -> logits.  ``body``: hidden states -> hidden states, from ``begin``
    to ``cut``: what the server has with the head at the client, whose second part is then ``tail``
    (hidden -> logits), and all but the first and the last piece of a model cut several times.

    Places are numbers of blocks, and a half more between a block's attention and its feed-forward
    part.

    Many clients' inputs may lie side by side (``Inputs.slots``) with their tunables stacked.
    """

    def __init__(
        self,
        model: Any,
        family: Family | None,
        decoder_head: bool,
        part: Part = "whole",
        cut: float = 0,
        begin: float = 0,
        prompt: Any = None,
        prefix: Any = None,
        name: str = "",
        slots: Slots | None = None,
        half: bool = False,
    ) -> None:
        """
        ``decoder_head``: logits of tokens; otherwise logits of classes.  name: of the model.

        begin: blocks below it (and the embeddings) ran before; ``whole`` and ``client`` then take
        hidden states, too.  half: compute in bfloat16 where torch's autocast thinks that safe.
        """
        super().__init__()
        self.key: tuple[str, Part, float, float] = (name, part, cut, begin)
        self.model: Any
        self.prompt: Any
        self.prefix: Any
        self.family, self.decoder_head, self.part = family, decoder_head, part
        self.starts = part in ("whole", "client") and not begin  # takes tokens
        self.device: torch.device = model.device  # a part may have no parameter to ask
        if family is not None:
            model = graft(model, _changes(model, family, part, cut, begin))
        self.model = model
        self.prompt = prompt if self.starts else None
        self.prefix = prefix
        self.prompt_tokens = 0 if prompt is None else prompt.embedding.num_embeddings
        self.slots = slots or Slots()
        self.autocast = half
        self._places: dict[str, list[tuple[dict[str, Any], str]]] | None = None

    def forward(self, inputs: Inputs) -> Tensor:
        """
        Run this part.

        Returns hidden states [cells, width] with the virtual tokens' before each row's own,
        logits [rows, classes], or token logits [selected, vocabulary] (of all cells where
        ``inputs.select`` is None).
        """
        return self.finish(self.features(inputs))

    def features(self, inputs: Inputs) -> Tensor:
        """Hidden states, or of them only those that ``scores`` turns into logits."""
        if self.family is None:
            return self._plain(inputs)
        if self.part in ("client", "body"):
            return self._blocks(inputs, None)
        chosen, sizes = self._chosen(inputs)
        if self.part == "tail":
            hidden = inputs.x if chosen is None else inputs.x[chosen]
        else:
            hidden = self._blocks(inputs, Chosen(chosen, sizes, self.slots))
        self.slots.sizes = sizes
        if self.family.norm is not None:
            norm = self.model.get_submodule(f"{self.family.backbone}.{self.family.norm}")
            hidden = norm.real(hidden)
        return hidden

    def finish(self, features: Tensor) -> Tensor:
        """What ``forward`` returns, from the features."""
        return features.float() if self.part in ("client", "body") else self.scores(features)

    def _chosen(self, inputs: Inputs) -> tuple[Tensor | None, tuple[int, ...]]:
        """Cells that logits are made of (None: all), and how many are each client's."""
        assert self.family is not None
        extra, device = self.prompt_tokens, inputs.x.device
        if not self.decoder_head:
            places = inputs.starts(extra)
            rows = tuple(sum(r for r, _ in part) for part in inputs.parts)
            if not self.family.decoder:
                return torch.from_numpy(places).to(device), rows
            last = torch.from_numpy(places + extra - 1).to(device) + inputs.full_lengths()
            return last, rows
        cells = tuple(sum(r * n for r, n in part) for part in inputs.parts)
        select = inputs.select
        if select is None:
            sizes = cells
        elif len(cells) == 1:
            sizes = (len(select),)
        else:
            ends = torch.tensor(cells, device=device).cumsum(0)
            counts = torch.searchsorted(select.contiguous(), ends)
            sizes = tuple(counts.diff(prepend=counts.new_zeros(1)).tolist())
        if not extra:
            return select, sizes
        row = np.repeat(np.arange(inputs.rows), inputs.width_of_rows)
        index = torch.from_numpy(np.arange(inputs.cells) + extra * (row + 1)).to(device)
        return (index if select is None else index[select]), sizes

    def scores(self, features: Tensor) -> Tensor:
        """Features [units, width] -> logits [units, outputs], float32."""
        if self.family is None:
            return features.float()
        if self.decoder_head:
            logits: Tensor = self.model.lm_head(features)
            return logits.float()
        if not self.family.decoder:
            features = self.model.dropout(self.model.bert.pooler.pool(features))
        scores: Tensor = self.model.get_submodule(self.family.head)(features)
        return scores.float()

    def _plain(self, inputs: Inputs) -> Tensor:
        """Any other architecture: its own forward pass, as the library wrote it."""
        ((rows, length),) = inputs.blocks
        self.slots.sizes = (inputs.cells,)
        x = inputs.x.view(rows, length)
        mask = None
        if inputs.lengths is not None:
            mask = (torch.arange(length, device=x.device) < inputs.lengths[:, None]).long()
        padding = getattr(self.model.config, "pad_token_id", None)
        if mask is not None and padding is not None:
            # a classifier of the library finds a row's last token by its padding
            x = torch.where(mask.bool(), x, padding)
        logits: Tensor = self.model(input_ids=x, attention_mask=mask).logits
        if not self.decoder_head:
            return logits
        flat = logits.reshape(-1, logits.shape[-1])
        return flat if inputs.select is None else flat[inputs.select]

    def _blocks(self, inputs: Inputs, chosen: Chosen | None) -> Tensor:
        """Hidden states of all cells, or of those chosen after the last block's attention."""
        assert self.family is not None
        extra = self.prompt_tokens
        self.slots.sizes = tuple(
            sum(rows * (length + extra) for rows, length in part) for part in inputs.parts
        )
        # the library hands a mask of four dimensions on as it is; ours is in the layout
        known: dict[str, Any] = {"attention_mask": inputs.x.new_zeros((1, 1, 1, 1))}
        if not inputs.tokens:
            known["inputs_embeds"] = inputs.x[None]
        elif self.prompt is not None:
            known["inputs_embeds"] = self._prompted(inputs)[None]
        else:
            known["input_ids"] = inputs.x[None]
        layout = Layout(
            inputs, self.family.decoder, extra, self._past(inputs), chosen, self.slots.written
        )
        layout.slots = self.slots
        positions = inputs.positions(extra, layout.before) if inputs.at is None else inputs.at
        if self.family.decoder:
            known["use_cache"] = False
        backbone = self.model.get_submodule(self.family.backbone)
        hidden: Tensor = backbone(
            **known, position_ids=positions[None], layout=layout
        ).last_hidden_state
        return hidden[0] if layout.narrowed is None else layout.narrowed[0]

    def _prompted(self, inputs: Inputs) -> Tensor:
        """Embedded tokens with each client's soft prompt before every row."""
        prompt = self.prompt.embedding.weight  # [tokens, width], or one for each slot
        words = self.model.get_input_embeddings()(inputs.x)
        parts = iter(torch.split(words, [rows * length for rows, length in inputs.blocks]))
        whole = []
        for slot, blocks in enumerate(inputs.parts):
            own = prompt if prompt.dim() == 2 else prompt[slot]
            for rows, length in blocks:
                block = next(parts).view(rows, length, -1)
                whole.append(torch.cat([own.expand(rows, -1, -1), block], dim=1).flatten(0, 1))
        return torch.cat(whole)

    def _past(self, inputs: Inputs) -> Tensor | None:
        """PEFT's prefix: one embedding row per virtual token holds every layer's key and value."""
        if self.prefix is None:
            return None
        weight = self.prefix.embedding.weight  # [(slots,) tokens, layers * 2 * heads * width]
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        layers = config.num_hidden_layers
        past = weight.view(-1, weight.shape[-2], layers * 2, heads, weight.shape[-1] // (
            layers * 2 * heads
        )).permute(0, 2, 3, 1, 4)  # fmt: skip
        if len(past) == 1:
            return past.expand(inputs.rows, -1, -1, -1, -1)
        rows = torch.tensor([sum(r for r, _ in part) for part in inputs.parts])
        return past.repeat_interleave(rows.to(past.device), 0)

    @contextmanager
    def holding(
        self, tunables: Mapping[str, Tensor], draws: Sequence[torch.Generator] = ()
    ) -> Iterator[Core]:
        """
        Inside, these tunables stand in place of the model's own, moved to its device.

        draws: a stream for each client's dropout; none: no dropout. Raises KeyError for a name
        that this part does not have.
        """
        if self._places is None:
            self._places = _places(self)
        before = []
        try:
            self.slots.draws = draws
            for name, tensor in tunables.items():
                for owner, leaf in self._places[name]:
                    before.append((owner, leaf, owner[leaf]))
                    owner[leaf] = tensor.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, self.autocast):
                yield self
        finally:
            self.slots.draws = ()
            for owner, leaf, tensor in reversed(before):
                owner[leaf] = tensor

    def apply_to(
        self, tunables: Mapping[str, Tensor], inputs: Inputs, draws: Sequence[torch.Generator] = ()
    ) -> Tensor:
        """``forward`` with these tunables in place of the model's own (differentiable)."""
        with self.holding(tunables, draws):
            found: Tensor = self(inputs)
            return found


def _places(core: nn.Module) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Where each parameter is held; a tied one at several places."""
    found: dict[str, list[tuple[dict[str, Any], str]]] = {}
    names: dict[int, str] = {}
    for path, module in core.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                name = names.setdefault(id(parameter), f"{path}.{leaf}" if path else leaf)
                found.setdefault(name, []).append((module._parameters, leaf))
    return found


class Later(nn.Module):
    """Hands its input on inside the library's forward pass; the core calls the ``real`` one."""

    def __init__(self, module: nn.Module) -> None:
        """Share the module's parameters, so that names stay."""
        super().__init__()
        self._parameters, self._modules = module._parameters, module._modules
        self._real = (module,)  # in a tuple, so that it is not a submodule

    def forward(self, hidden: Tensor) -> Tensor:
        """[any] -> the same."""
        return hidden

    def real(self, hidden: Tensor) -> Tensor:
        """What the module itself makes of it."""
        found: Tensor = self._real[0](hidden)
        return found


class Sublayers(nn.Module):
    """
    A block's attention, its feed-forward part, or both; each with its norm and its residual.

    narrow: the last block, whose feed-forward part sees only the cells that logits are made of.
    They lie in the layout afterwards; the block's own return value is of no use then.
    """

    def __init__(
        self, block: nn.Module, family: Family, attends: bool, feeds: bool, narrow: bool
    ) -> None:  # fmt: skip
        """Share the block's modules, so that names stay."""
        super().__init__()
        self._modules = {
            name: module for name, module in block._modules.items()
            if (attends if name in family.attention else feeds)
        }  # fmt: skip
        self._real = (block,)
        self.attends, self.feeds, self.narrow = attends, feeds, narrow

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[1, cells, width] -> the same."""
        layout: Layout = kwargs["layout"]
        block: Any = self._real[0]
        chosen = layout.chosen if self.narrow else None
        cells = None if chosen is None else chosen.cells
        if self.attends and self.feeds and cells is None:
            whole: Tensor = block(hidden, *args, **kwargs)
            return whole
        if self.attends:
            hidden = _attended(block, hidden, kwargs)
        if not self.feeds:
            return hidden
        if chosen is None or cells is None:
            return _fed(block, hidden)
        chosen.begin()
        layout.narrowed = _fed(block, hidden[:, cells])
        return hidden


def _attended(block: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The first half, in the three ways in which the families' blocks are written."""
    if hasattr(block, "feed_forward_chunk"):  # BERT
        found: Tensor = block.attention(hidden, **kwargs)[0]
        return found
    if hasattr(block, "ln_1"):  # GPT-2
        before, attention = block.ln_1, block.attn
    else:  # Llama and its kin
        before, attention = block.input_layernorm, block.self_attn
    attended: Tensor = attention(hidden_states=before(hidden), **kwargs)[0]
    return hidden + attended


def _fed(block: Any, attended: Tensor) -> Tensor:
    """The second half, in the same three ways."""
    if hasattr(block, "feed_forward_chunk"):
        found: Tensor = block.feed_forward_chunk(attended)
        return found
    after = block.ln_2 if hasattr(block, "ln_1") else block.post_attention_layernorm
    more: Tensor = block.mlp(after(attended))
    return attended + more


def _changes(
    model: Any, family: Family, part: Part, cut: float, begin: float
) -> dict[str, nn.Module | None]:
    """What a part replaces, by full path."""
    spine = family.backbone
    changes: dict[str, nn.Module | None] = {}
    if not family.decoder:
        # The pooler is called by the head, on the side where the head is
        pooler = model.get_submodule(spine).pooler
        changes[f"{spine}.pooler"] = None if part in ("client", "body") else Shy(pooler)
    blocks = len(model.get_submodule(f"{spine}.{family.blocks}"))
    first, last = span(part, cut, begin, blocks)
    for index in range(blocks):
        path = f"{spine}.{family.blocks}.{index}"
        attends = first <= index and index + HALF <= last
        feeds = first <= index + HALF and index + 1 <= last
        narrow = part in ("whole", "server") and index == blocks - 1
        if not attends and not feeds:
            changes[path] = Pass()
        elif narrow or not attends or not feeds:
            block = model.get_submodule(path)
            changes[path] = Sublayers(block, family, attends, feeds, narrow)
    if family.norm is not None:
        norm = f"{spine}.{family.norm}"
        changes[norm] = Pass() if part in ("client", "body") else Later(model.get_submodule(norm))
    if part in ("client", "body"):
        for head in (family.head, "lm_head"):
            if head in model._modules:
                changes[head] = Pass()
    if part not in ("whole", "client") or begin:
        if spine == "bert":
            changes[f"{spine}.embeddings"] = GivenEmbeddings()
        elif spine == "transformer":
            changes[f"{spine}.wte"], changes[f"{spine}.wpe"] = Pass(), NoPositions()
        else:
            changes[f"{spine}.embed_tokens"] = Pass()
    return changes


class Shy(nn.Module):
    """BERT's pooler, silent inside the backbone's own forward pass (the head calls it)."""

    def __init__(self, pooler: nn.Module) -> None:
        """Share the pooler's modules, so that names stay."""
        super().__init__()
        self._modules = pooler._modules

    def forward(self, hidden: Tensor) -> None:
        """Nothing: the backbone asks too early when the head is elsewhere."""

    def pool(self, hidden: Tensor) -> Tensor:
        """First hidden states [rows, width] -> [rows, width]."""
        pooled: Tensor = self.get_submodule("activation")(self.get_submodule("dense")(hidden))
        return pooled
