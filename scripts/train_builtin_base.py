"""
Train the built-in base model from scratch on the built-in data.

Writes a folder that transformers loads with ``from_pretrained``: a byte-level BPE tokenizer, a
small GPT-2 and a README with the figures of the run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from fedllm.data import builtin

END = "<|endoftext|>"
POSITIONS = 128
HELD_OUT = 1_000
MAX_BYTES = 4_000_000
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "src" / "fedllm" / "models" / "builtin"


def documents(size: int) -> list[str]:
    """The training texts: a message, a line break and its reply."""
    return [f"{row['text']}\n{row['reply']}" for row in builtin.rows("pretrain", size)]


def train_tokenizer(texts: list[str], vocab_size: int, out: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer, save it to ``out`` and load it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    # Written by hand: GPT2TokenizerFast built from vocabulary files is empty in transformers 5.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "model_max_length": POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(out)
    for text in texts[:50]:
        if loaded.decode(loaded(text)["input_ids"]) != text:
            raise RuntimeError(f"the tokenizer does not give back {text!r}")
    return loaded


def batches(encoded: list[list[int]], size: int, order: np.random.Generator) -> list[list[int]]:
    """One epoch of index batches of similar lengths, in random order."""
    # The random key shuffles rows of equal length, so the batches differ between epochs.
    key = order.random(len(encoded))
    by_length = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), key[i]))
    groups = [by_length[at : at + size] for at in range(0, len(by_length), size)]
    return [groups[i] for i in np.argsort(order.random(len(groups)), kind="stable")]


def collate(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad on the right: input ids, attention mask and labels."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row)
        mask[at, : len(row)] = 1
    return ids, mask, ids.masked_fill(mask == 0, -100)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, encoded: list[list[int]], pad: int) -> float:
    """Mean loss per token, in nats."""
    model.eval()
    total, count = 0.0, 0
    ranked = sorted(encoded, key=len)
    for at in range(0, len(ranked), 100):
        ids, mask, labels = collate(ranked[at : at + 100], pad)
        tokens = int(mask[:, 1:].sum())
        total += model(input_ids=ids, attention_mask=mask, labels=labels).loss.item() * tokens
        count += tokens
    model.train()
    return total / count


README = """# Built-in base model

A GPT-2 of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads, {positions}
positions) with a byte-level BPE tokenizer of {vocabulary:,} entries. It lets demos and tests run
without a download, and is of no other use.

It was trained from random weights, only on the text that `fedllm.data.builtin` generates (the
part "pretrain": a message, a line break, an acknowledgement, `<|endoftext|>`), without labels.
That text is invented and holds no personal data. Replies in this part are general
acknowledgements; the replies of the parts "train" and "test" are left for fine-tuning to learn.

Made by

    {command}

| held-out loss per token ({held_out:,} documents) | nats |
| --- | --- |
| before training | {before:.3f} |
| after {steps:,} steps | {after:.3f} |
| uniform guess, ln({vocabulary}) | {uniform:.3f} |

The weights are stored as float16 and load as float32, as `config.json` says. The same command on
another machine gives the same texts and tokenizer; the weights may differ by rounding.

Licence: Apache-2.0, as the rest of the project.
"""


def main() -> None:
    """Train, save and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--steps", type=int, default=1_200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocab", type=int, default=1_000)
    parser.add_argument("--size", type=int, default=builtin.DEFAULT_SIZES["pretrain"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    texts = documents(args.size)
    out: Path = args.out
    tokenizer = train_tokenizer(texts, args.vocab, out)
    pad = tokenizer.eos_token_id
    encoded = [[*ids, pad] for ids in tokenizer(texts)["input_ids"]]
    if max(map(len, encoded)) > POSITIONS:
        raise RuntimeError(f"a document has more than {POSITIONS} tokens")
    held_out, encoded = encoded[:HELD_OUT], encoded[HELD_OUT:]

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        bos_token_id=pad,
        eos_token_id=pad,
        pad_token_id=pad,
    )
    model = GPT2LMHeadModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    before = held_out_loss(model, held_out, pad)
    print(f"{parameters:,} parameters, {len(encoded):,} documents, held-out loss {before:.3f}")

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = max(1, min(100, args.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * step / args.steps)) / 2
        ),
    )
    order = np.random.default_rng(np.random.SeedSequence([args.seed, 7]))
    epoch: list[list[int]] = []
    started = time.monotonic()
    for step in range(1, args.steps + 1):
        if not epoch:
            epoch = batches(encoded, args.batch, order)
        ids, mask, labels = collate([encoded[i] for i in epoch.pop()], pad)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps:
            seconds = time.monotonic() - started
            print(f"step {step}/{args.steps} loss {loss.item():.3f} {seconds:.0f} s", flush=True)

    # float16 halves the package; the config's dtype makes transformers load it as float32.
    weights = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the input embedding
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # written as private to the user otherwise
    config.architectures = ["GPT2LMHeadModel"]
    config.dtype = "float32"
    config.save_pretrained(out)

    loaded = GPT2LMHeadModel.from_pretrained(out)
    after = held_out_loss(loaded, held_out, pad)
    print(f"held-out loss {before:.3f} before, {after:.3f} after (as stored)")
    command = " ".join(["PYTHONPATH=src python scripts/train_builtin_base.py", *sys.argv[1:]])
    readme = README.format(
        parameters=parameters,
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        positions=POSITIONS,
        vocabulary=len(tokenizer),
        command=command,
        held_out=HELD_OUT,
        before=before,
        after=after,
        steps=args.steps,
        uniform=math.log(len(tokenizer)),
    )
    (out / "README.md").write_text(readme)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{size:,} bytes in {out}")
    if size > MAX_BYTES:
        raise RuntimeError(f"the folder has {size:,} bytes, more than {MAX_BYTES:,}")


if __name__ == "__main__":
    main()
