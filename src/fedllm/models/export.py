"""Tunables on disk: PEFT's own format where it has one, otherwise safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.errors import FedllmError
from fedllm.lora import A, rank_of, shape_fits
from fedllm.models.loading import LanguageModel, load_tokenizer, source_of
from fedllm.models.slots import LoraLinear, Masked
from fedllm.models.tunables import lora_config, virtual_config

WEIGHTS = "adapter_model.safetensors"
_VIRTUAL = "prompt_embeddings"


def outside(name: str, spec: ex.Tunables) -> str:
    """Our name of a tensor -> PEFT's (which wraps a model once more for LoRA than for prompts)."""
    if isinstance(spec, ex.Prompt | ex.Prefix):
        inside = name.partition(".")[0] in ("prompt", "prefix")
        return _VIRTUAL if inside else "base_model." + name.removeprefix("model.")
    return "base_model." + name.replace(".lora_A.default.", ".lora_A.").replace(
        ".lora_B.default.", ".lora_B."
    )


def save_adapter(
    model: LanguageModel, tunables: Mapping[str, Tensor], folder: Path, labels: Sequence[str]
) -> None:
    """
    Write the tunables so that others can use them.

    LoRA, prompt and prefix load with ``PeftModel.from_pretrained(base, folder)``; adapters,
    BitFit, sparse and full are tensors by name beside ``tunables.json``. ``labels.json`` lists
    classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = dict(model.whole.named_parameters())
    # a frozen head or factor is needed all the same
    kept = {name: t for name, t in own.items() if name in model.head or A in name}
    tensors = {
        outside(name, model.spec): t.detach().cpu().contiguous()
        for name, t in {**kept, **tunables}.items()
    }
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    spec = model.spec
    if isinstance(spec, ex.Lora):
        spec = spec.model_copy(update={"rank": rank_of(tunables)})  # a schedule may end lower
    if isinstance(spec, ex.Lora | ex.Prompt | ex.Prefix):
        config = (
            lora_config(spec, model.model, model.classification)
            if isinstance(spec, ex.Lora)
            else virtual_config(spec, model.model, model.classification)
        )
        config.base_model_name_or_path = source_of(model.name)
        config.inference_mode = True
        if model.classification:
            heads = {name.removeprefix("model.").partition(".")[0] for name in model.head}
            config.modules_to_save = sorted(heads)
        config.save_pretrained(str(folder))
    about = {
        "tunables": spec.model_dump(mode="json"), "model": model.name,
        "base_hash": model.base_hash, "names": sorted(tunables),
    }  # fmt: skip
    (folder / "tunables.json").write_text(json.dumps(about, indent=1) + "\n")
    if labels:
        (folder / "labels.json").write_text(json.dumps(list(labels), indent=1) + "\n")


def load_adapter(model: LanguageModel, folder: Path) -> dict[str, Tensor]:
    """Read what ``save_adapter`` wrote. Raises FedllmError when it does not fit the model."""
    path = folder / WEIGHTS
    try:
        stored = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise FedllmError(f"{path}: cannot be read ({error})") from None
    about = json.loads((folder / "tunables.json").read_text())
    if about["base_hash"] != model.base_hash:
        raise FedllmError(
            f"{folder}: was trained on another base than {model.name!r} is now (hash "
            f"{about['base_hash']}, here {model.base_hash})"
        )
    found = {}
    for name, tensor in model.initial.items():
        value = stored.get(outside(name, model.spec))
        if value is None or not shape_fits(name, value.shape, tensor.shape):
            raise FedllmError(f"{path}: does not fit the model {model.name!r} (tensor {name!r})")
        found[name] = value.to(tensor.device)
    return found


def merge(
    model: LanguageModel, tunables: Mapping[str, Tensor], target: Path, experiment: ex.Experiment,
    labels: Sequence[str],
) -> None:  # fmt: skip
    """
    Write a whole model that ``from_pretrained`` loads without PEFT or fedllm.

    ``model`` is used up. Raises FedllmError for tunables that are no change of its own weights.
    """
    spec = model.spec
    if experiment.model.quantization != "none":
        raise FedllmError(
            "model.quantization: a base in 4 bits cannot take up the update; export without --merge"
        )
    if isinstance(spec, ex.Adapter | ex.Prompt | ex.Prefix):
        raise FedllmError(
            f"tunables.kind = {spec.kind!r} adds layers or tokens and cannot be merged into the "
            "weights; export without --merge"
        )
    own = dict(model.whole.named_parameters())
    for name, tensor in tunables.items():
        own[name].data.copy_(tensor)
    whole = model.model
    for name, layer in list(whole.named_modules()):
        if isinstance(layer, LoraLinear | Masked):
            whole.set_submodule(name, layer.merged())
    if labels:
        whole.config.id2label = dict(enumerate(labels))
        whole.config.label2id = {label: index for index, label in enumerate(labels)}
    whole.save_pretrained(str(target))
    other = model.name if model.name != experiment.model.name else None
    load_tokenizer(experiment.model, other).save_pretrained(str(target))
