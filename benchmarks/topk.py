"""
Bytes of token knowledge: the 128 likeliest outputs beside the whole vocabulary, as sent.

Two clients, one round, 20 public rows of the built-in text; a GPT-2 type with random weights and
GPT-2's own tokenizer (FEDLLM_SHARED), so 50,257 outputs: what a model has learnt changes no byte.

    python benchmarks/topk.py --out benchmarks/TOPK.md
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedllm import experiment as ex
from fedllm import federation
from fedllm.report.tables import markdown, size

SHARED = Path(os.environ.get("FEDLLM_SHARED", Path(__file__).parents[2] / "shared"))
SMALL = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 128,
         "vocab_size": 50257}  # fmt: skip
FORMS: tuple[tuple[str, dict[str, Any], dict[str, str]], ...] = (
    ("all logits, fp32", {}, {}),
    ("all logits, fp16", {}, {"logit": "fp16"}),
    ("softened labels, int8", {"form": "labels"}, {"logit": "int8"}),
    ("top-k, k = 128, fp32", {"form": "top-k"}, {}),
    ("top-k, k = 128, fp16", {"form": "top-k"}, {"logit": "fp16"}),
    ("top-k, k = 8, fp32", {"form": "top-k", "top_k": 8}, {}),
    ("the likeliest token and its probability", {"form": "statistics"}, {}),
)


def measured(model: Path, folder: Path, form: dict[str, Any], codecs: dict[str, str]) -> Any:
    """Mean of the clients: (payload of the knowledge, whole frames, predicted tokens)."""
    spec = ex.parse({
        "name": "topk", "model": {"name": str(model), "weights": "random",
                                  "tokenizer": str(SHARED / "models" / "gpt2-tokenizer")},
        "task": {"kind": "generation"}, "data": {"prompt": "text", "response": "reply"},
        "rounds": 1, "public": {"size": 20}, "tunables": {"kind": "lora", "rank": 2},
        "strategy": {"kind": "logits", **form}, "exchange": {"codecs": codecs},
        "simulation": {"clients": 2, "sizes": [8, 8], "test_examples": 4},
        "evaluation": {"every": 0},
    }, "topk", folder)  # fmt: skip
    prepared = federation.prepare(spec, 0)
    run = federation.run(spec, 0, folder / "run")
    public = prepared.public
    assert public is not None
    one = run["costs"]["client-1"]
    payload = sum(one["payload_up"][role] for role in ("logit", "index") if
                  role in one["payload_up"])  # fmt: skip
    return payload, run["per_client_round"]["bytes_up"], int(public.targets.sum())


def main() -> None:
    """Run each form, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as place:
        model = Path(place, "gpt2")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(SMALL))
        for number, (title, form, codecs) in enumerate(FORMS):
            folder = Path(place, str(number))
            folder.mkdir()
            found.append((title, *measured(model, folder, form, codecs)))
    whole, frames, units = found[0][1:]
    lines = [
        [title, f"{payload / units:,.0f}", size(payload), f"{whole / payload:,.1f} x",
         size(sent), f"{frames / sent:,.1f} x"]
        for title, payload, sent, _ in found
    ]  # fmt: skip
    text = "\n".join([
        "# Bytes of token knowledge", "",
        "Made by `python benchmarks/topk.py --out benchmarks/TOPK.md`: a GPT-2 type with random "
        f"weights, 50,257 outputs; what a client sends of 20 public texts ({units} predicted "
        "tokens), as the ledger of a run has it. An index counts 4 bytes.", "",
        markdown(["form", "bytes a token", "payload", "less", "frames up", "less"], lines), "",
    ])  # fmt: skip
    if asked.out:
        asked.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
