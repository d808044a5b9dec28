"""Which tensors are trained: LoRA, prompt and prefix through PEFT; the rest by us."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedllm import experiment as ex
from fedllm.errors import FedllmError, nearest
from fedllm.lora import A, B, module_of
from fedllm.models.families import FAMILIES, Family
from fedllm.models.slots import SPARSE, Masked
from fedllm.streams import stream


class Adapted(nn.Module):
    """A projection with a bottleneck adapter behind it: y + W_up gelu(W_down y), y = W x."""

    def __init__(self, base: nn.Module, width: int, features: int) -> None:
        """W_up starts at zero, so the model starts as it was."""
        super().__init__()
        self.base = base
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        self.act = nn.GELU()
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., features]."""
        y: Tensor = self.base(x)
        added: Tensor = self.up(self.act(self.down(y)))
        return y + added


def install(
    model: Any, spec: ex.Tunables, classification: bool, seed: int = 0
) -> tuple[dict[str, nn.Module], set[str]]:
    """
    Put the tunables into ``model``, in place.

    Returns the prompt or prefix module, if any, by its name, and the names of the trained
    tensors (relative to the model; head excluded).  seed: of a mask.  Raises FedllmError where
    this kind of tunable does not fit the model.
    """
    kind = model.config.model_type
    family = FAMILIES.get(kind)
    before = {name for name, _ in model.named_parameters()}
    if isinstance(spec, ex.Lora):
        _lora(model, spec, family)
    elif isinstance(spec, ex.Sparse):
        _lora(model, ex.Lora(rank=1, targets=spec.targets, layers=spec.layers), family)
        for path, layer in masks(model, spec.density, seed).items():
            model.set_submodule(path, layer)
    elif isinstance(spec, ex.Adapter):
        _adapters(model, spec, _need(family, kind, "adapter"))
    elif isinstance(spec, ex.Prompt | ex.Prefix):
        family = _need(family, kind, spec.kind)
        return _virtual_tokens(model, spec, family, classification), set()
    head = head_names(model) if classification else set()
    names = {name for name, _ in model.named_parameters()}
    if isinstance(spec, ex.Full):
        return {}, names - head
    if isinstance(spec, ex.BitFit):
        biases = {name for name in names if name.endswith("bias")} - head
        if not biases:
            raise FedllmError(
                f"tunables.kind = 'bitfit': a model of type {kind!r} has no biases; use 'lora'"
            )
        return {}, biases
    if isinstance(spec, ex.Adapter):
        return {}, {n for n in names - before if ".down." in n or ".up." in n}
    if isinstance(spec, ex.Sparse):
        return {}, {name for name in names if name.endswith(SPARSE)}
    frozen = isinstance(spec, ex.Lora) and spec.freeze_a
    return {}, {name for name in names if (B if frozen else ".lora_") in name}


def masks(model: Any, density: float, seed: int) -> dict[str, Masked]:
    """
    For each layer that LoRA is around, by its path: one with a mask in its place.

    Each mask has its own stream, of the seed and the path: all sides draw the same, and nobody
    sends it. Raises FedllmError for a layer that is not linear.
    """
    found = {}
    for path, layer in model.named_modules():
        factors = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
        if not all(isinstance(one, nn.ModuleDict) and len(one) for one in factors):
            if hasattr(layer, "lora_A"):
                raise FedllmError(f"tunables.targets: {path!r} is no linear layer")
            continue
        first, second = (one["default"].weight for one in factors)  # type: ignore[index]
        shape = second.shape[0], first.shape[-1]
        size = shape[0] * shape[1]
        count = max(round(density * size), 1)
        if first.device.type == "meta":
            places = torch.empty(count, dtype=torch.long, device="meta")
        else:
            drawn = stream(seed, "mask", path).choice(size, count, replace=False, shuffle=False)
            places = torch.from_numpy(np.sort(drawn)).to(first.device)
        found[path] = Masked(layer.base_layer, shape, places)
    return found


def head_names(model: Any) -> set[str]:
    """Parameters of the classification head."""
    family = FAMILIES.get(model.config.model_type)
    heads = (family.head,) if family else ("score", "classifier", "classification_head")
    return {name for name, _ in model.named_parameters() if name.partition(".")[0] in heads}


def _need(family: Family | None, kind: str, what: str) -> Family:
    if family is None:
        raise FedllmError(
            f"tunables.kind = {what!r}: not supported for models of type {kind!r} "
            f"(supported: {', '.join(FAMILIES)}); 'lora', 'bitfit' and 'full' are"
        )
    return family


def blocks_of(spec: ex.Lora | ex.Adapter | ex.Sparse, model: Any) -> tuple[int, ...]:
    """
    Numbers of the blocks that get these tunables, ascending; none named means all.

    Raises FedllmError for a block that the model does not have.
    """
    count = int(model.config.num_hidden_layers)
    wrong = [number for number in spec.layers if not -count <= number < count]
    if wrong:
        raise FedllmError(
            f"tunables.layers = {list(spec.layers)}: the model has {count} blocks; expected 0 to "
            f"{count - 1}, or -{count} to -1 from the end (not {wrong[0]})"
        )
    return tuple(sorted({number % count for number in spec.layers})) or tuple(range(count))


def within(names: Iterable[str], modules: ex.Modules, blocks: int) -> set[str]:
    """
    Those of LoRA's names (and all others) that lie in these modules of a model of so many blocks.

    Raises FedllmError for blocks and targets that LoRA is not around.
    """
    paths = {name: module_of(name) for name in names if A in name or B in name}
    there: dict[str, int] = {}
    for path in paths.values():
        found = re.match(r".*\.[^.]*\.(\d+)\.", path)  # as PEFT finds a layer's number
        there[path] = int(found[1]) if found else -1
    known = sorted({number for number in there.values() if number >= 0})
    for number in modules.layers:
        if not -blocks <= number < blocks or number % blocks not in known:
            raise FedllmError(
                f"tunables.modules: layers = {list(modules.layers)}: LoRA is in the blocks "
                f"{', '.join(map(str, known))} of {blocks}; expected some of them (not {number})"
            )
    layers = {number % blocks for number in modules.layers} or {*known, -1}
    tails = {path.rpartition(".")[2] for path in there}
    for target in modules.targets:
        if not any(f".{path}".endswith(f".{target}") for path in there):
            raise FedllmError(
                f"tunables.modules: targets = {list(modules.targets)}: LoRA is not around "
                f"{target!r}; {nearest(target, tails)}"
            )
    ends = tuple(f".{target}" for target in modules.targets) or ("",)
    mine = {p for p, number in there.items() if number in layers and f".{p}".endswith(ends)}
    if not mine:
        raise FedllmError(
            f"tunables.modules: none of the targets {list(modules.targets)} lies in the blocks "
            f"{list(modules.layers)}"
        )
    return {name for name in names if name not in paths or paths[name] in mine}


def lora_config(spec: ex.Lora, model: Any, classification: bool) -> Any:
    """PEFT's own configuration of these tunables (also written at export)."""
    from peft import LoraConfig

    family = FAMILIES.get(model.config.model_type)
    targets = list(spec.targets) or (list(family.lora) if family else None)
    return LoraConfig(
        layers_to_transform=list(blocks_of(spec, model)) if spec.layers else None,
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        bias="none",
        init_lora_weights="gaussian" if spec.init == "gaussian" else True,
        fan_in_fan_out=model.config.model_type == "gpt2",
        task_type="SEQ_CLS" if classification else "CAUSAL_LM",
    )


def _lora(model: Any, spec: ex.Lora, family: Family | None) -> None:
    from peft import inject_adapter_in_model

    try:
        with warnings.catch_warnings():
            # fan_in_fan_out is right for GPT-2's Conv1D and PEFT corrects it for other layers
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            inject_adapter_in_model(lora_config(spec, model, False), model)
    except ValueError as error:
        from transformers.pytorch_utils import Conv1D

        layers = {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        wanted = spec.targets[0] if spec.targets else ""
        raise FedllmError(
            f"tunables.targets = {list(spec.targets)}: no layer of this model of type "
            f"{model.config.model_type!r} matches; {nearest(wanted, layers)} "
            f"(PEFT: {str(error).splitlines()[0][:120]})"
        ) from None


def _adapters(model: Any, spec: ex.Adapter, family: Family) -> None:
    blocks = model.get_submodule(f"{family.backbone}.{family.blocks}")
    for block in (blocks[number] for number in blocks_of(spec, model)):
        for place in dict.fromkeys(spec.after):
            path = family.projections[place]
            width = model.config.hidden_size
            block.set_submodule(path, Adapted(block.get_submodule(path), spec.width, width))


def _virtual_tokens(
    model: Any, spec: ex.Prompt | ex.Prefix, family: Family, classification: bool
) -> dict[str, nn.Module]:
    from peft.tuners.prefix_tuning import PrefixEncoder
    from peft.tuners.prompt_tuning import PromptEmbedding

    config = virtual_config(spec, model, classification)
    if isinstance(spec, ex.Prompt):
        return {"prompt": PromptEmbedding(config, model.get_input_embeddings())}
    if not family.decoder:
        raise FedllmError(
            "tunables.kind = 'prefix': encoders such as BERT keep no keys and values to put it "
            "before; use 'prompt', 'lora', 'adapter' or 'bitfit'"
        )
    return {"prefix": PrefixEncoder(config)}


def virtual_config(spec: ex.Prompt | ex.Prefix, model: Any, classification: bool) -> Any:
    """PEFT's own configuration of a prompt or prefix."""
    from peft import PrefixTuningConfig, PromptTuningConfig, PromptTuningInit

    config = model.config
    heads = config.num_attention_heads
    width = config.hidden_size
    shared: dict[str, Any] = {
        "num_virtual_tokens": spec.tokens,
        "num_transformer_submodules": 1,
        "num_layers": config.num_hidden_layers,
        "task_type": "SEQ_CLS" if classification else "CAUSAL_LM",
    }
    if isinstance(spec, ex.Prompt):
        return PromptTuningConfig(
            token_dim=width, num_attention_heads=heads,
            prompt_tuning_init=PromptTuningInit.RANDOM, **shared,
        )  # fmt: skip
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return PrefixTuningConfig(
        token_dim=width // heads * kv_heads, num_attention_heads=kv_heads,
        prefix_projection=False, encoder_hidden_size=width, **shared,
    )  # fmt: skip
