"""Where the parts of a model lie, by model type: all that cutting and adapters need to know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """
    Attribute paths; those below ``backbone`` are relative to it.

    backbone: the model without its head.  blocks: the list of layers.  norm: what follows the
    last block (None: nothing).  head: the classification head.  lora: default LoRA targets.
    projections: the last linear layer of the two halves of a block, where adapters sit.
    attention: the modules of a block that its first half consists of.
    """

    backbone: str
    blocks: str
    norm: str | None
    head: str
    lora: tuple[str, ...]
    projections: dict[str, str]
    attention: tuple[str, ...]
    decoder: bool = True


_LLAMA = Family(
    backbone="model",
    blocks="layers",
    norm="norm",
    head="score",
    lora=("q_proj", "v_proj"),
    projections={"attention": "self_attn.o_proj", "ffn": "mlp.down_proj"},
    attention=("input_layernorm", "self_attn"),
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        backbone="transformer",
        blocks="h",
        norm="ln_f",
        head="score",
        lora=("c_attn",),
        projections={"attention": "attn.c_proj", "ffn": "mlp.c_proj"},
        attention=("ln_1", "attn"),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "bert": Family(
        backbone="bert",
        blocks="encoder.layer",
        norm=None,
        head="classifier",
        lora=("query", "value"),
        projections={"attention": "attention.output.dense", "ffn": "output.dense"},
        attention=("attention",),
        decoder=False,
    ),
}
