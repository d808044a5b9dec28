"""
A model as a function of its tunables, whole or a part of it, without rewriting it.

A part is the same architecture with the blocks of the other side replaced by a module that
passes its input on, so every tensor keeps its name and the tunables of the parts add up to
those of the whole. Modules are shared, never copied.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedllm.models.families import Family

Part = Literal["whole", "client", "server", "body", "tail"]


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
    ``server``: hidden states -> logits.  With the head at the client, ``body`` is the server's
    part (hidden -> hidden) and ``tail`` the client's second part (hidden -> logits).
    """

    def __init__(
        self,
        model: Any,
        family: Family | None,
        decoder_head: bool,
        part: Part = "whole",
        cut: int = 0,
        prompt: Any = None,
        prefix: Any = None,
        name: str = "",
    ) -> None:
        """``decoder_head``: logits of tokens; otherwise logits of classes.  name: of the model."""
        super().__init__()
        self.key = (name, part, cut)
        self.model: Any
        self.prompt: Any
        self.prefix: Any
        self.family, self.decoder_head, self.part = family, decoder_head, part
        self.model = model if family is None else graft(model, _changes(model, family, part, cut))
        starts = part in ("whole", "client")
        self.prompt = prompt if starts else None
        self.prefix = prefix
        self.prompt_tokens = 0 if prompt is None else prompt.embedding.num_embeddings

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, select: Tensor | None = None
    ) -> Tensor:
        """
        Run this part.

        x: tokens [batch, length] or hidden states [batch, (prompt +) length, width].
        lengths: real tokens of each row [batch], without the prompt; None: all are full.
        select: indices into the flattened [batch * length] tokens whose logits are wanted
        (token logits only). Returns hidden states, logits [batch, classes], or token logits
        [selected, vocabulary].
        """
        if self.family is None:
            return self._plain(x, lengths, select)
        hidden = x if self.part == "tail" else self._blocks(x, lengths)
        return hidden if self.part in ("client", "body") else self._head(hidden, lengths, select)

    def _plain(self, x: Tensor, lengths: Tensor | None, select: Tensor | None) -> Tensor:
        """Any other architecture: its own forward pass, as the library wrote it."""
        mask = _mask(x.shape[1], lengths)
        if mask is not None and self.model.config.pad_token_id is not None:
            # a classifier of the library finds a row's last token by its padding
            x = torch.where(mask.bool(), x, self.model.config.pad_token_id)
        logits: Tensor = self.model(input_ids=x, attention_mask=mask).logits
        if not self.decoder_head:
            return logits
        flat = logits.reshape(-1, logits.shape[-1])
        return flat if select is None else flat[select]

    def _blocks(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        assert self.family is not None
        backbone = self.model.get_submodule(self.family.backbone)
        inputs: dict[str, Any] = {}
        if self.prompt is not None:
            prompt = self.prompt.embedding.weight
            words = self.model.get_input_embeddings()(x)
            inputs["inputs_embeds"] = torch.cat([prompt.expand(len(x), -1, -1), words], dim=1)
        elif x.is_floating_point():
            inputs["inputs_embeds"] = x
        else:
            inputs["input_ids"] = x
        extra = self.prompt_tokens
        if self.prefix is not None:
            inputs["past_key_values"], extra = self._past(len(x))
        length = x.shape[1] + (extra if not x.is_floating_point() else 0)
        if lengths is not None:
            inputs["attention_mask"] = _mask(length, lengths + extra)
        if self.family.decoder:
            inputs["use_cache"] = False
        hidden: Tensor = backbone(**inputs).last_hidden_state
        return hidden

    def _past(self, batch: int) -> tuple[Any, int]:
        """PEFT's prefix: one embedding row per virtual token holds every layer's key and value."""
        from transformers import DynamicCache

        weight = self.prefix.embedding.weight  # [tokens, layers * 2 * kv_heads * head width]
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        layers = config.num_hidden_layers
        tokens = weight.shape[0]
        past = weight.view(tokens, layers * 2, heads, -1).permute(1, 2, 0, 3)
        past = past.unsqueeze(1).expand(-1, batch, -1, -1, -1)
        cache = DynamicCache([(past[2 * i], past[2 * i + 1]) for i in range(layers)])
        return cache, tokens

    def _head(self, hidden: Tensor, lengths: Tensor | None, select: Tensor | None) -> Tensor:
        assert self.family is not None
        if self.part == "tail" and self.family.norm is not None:
            norm = f"{self.family.backbone}.{self.family.norm}"
            hidden = self.model.get_submodule(norm)(hidden)
        if self.decoder_head:
            hidden = hidden[:, self.prompt_tokens :].reshape(-1, hidden.shape[-1])
            logits: Tensor = self.model.lm_head(hidden if select is None else hidden[select])
            return logits
        if self.family.decoder:
            hidden = hidden[:, self.prompt_tokens :]
            rows = torch.arange(len(hidden), device=hidden.device)
            last = hidden[:, -1] if lengths is None else hidden[rows, lengths - 1]
            pooled = last
        else:
            pooled = self.model.dropout(self.model.bert.pooler.pool(hidden))
        scores: Tensor = self.model.get_submodule(self.family.head)(pooled)
        return scores

    def apply_to(
        self,
        tunables: dict[str, Tensor],
        x: Tensor,
        lengths: Tensor | None = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """``forward`` with these tunables in place of the model's own (differentiable)."""
        result: Tensor = functional_call(self, tunables, (x, lengths, select))
        return result


def _mask(length: int, lengths: Tensor | None) -> Tensor | None:
    """Real tokens of right-padded rows, [batch, length]; None: no padding."""
    if lengths is None:
        return None
    return (torch.arange(length, device=lengths.device) < lengths[:, None]).long()


def _changes(model: Any, family: Family, part: Part, cut: int) -> dict[str, nn.Module | None]:
    """What a part replaces, by full path."""
    spine = family.backbone
    changes: dict[str, nn.Module | None] = {}
    if not family.decoder:
        # The pooler is called by the head, on the side where the head is
        pooler = model.get_submodule(spine).pooler
        changes[f"{spine}.pooler"] = None if part in ("client", "body") else Shy(pooler)
    blocks = len(model.get_submodule(f"{spine}.{family.blocks}"))
    keep = {"client": range(cut), "server": range(cut, blocks), "body": range(cut, blocks),
            "tail": range(0), "whole": range(blocks)}[part]  # fmt: skip
    for index in range(blocks):
        if index not in keep:
            changes[f"{spine}.{family.blocks}.{index}"] = Pass()
    if part in ("client", "body") and family.norm is not None:
        changes[f"{spine}.{family.norm}"] = Pass()
    if part in ("client", "body"):
        for head in (family.head, "lm_head"):
            if head in model._modules:
                changes[head] = Pass()
    if part not in ("whole", "client"):
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
        """[batch, length, width] -> [batch, width], from the first position as BERT does."""
        pooled: Tensor = self.get_submodule("activation")(self.get_submodule("dense")(hidden[:, 0]))
        return pooled
