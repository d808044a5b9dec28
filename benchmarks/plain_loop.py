"""
Our path beside a loop that anyone would write with PyTorch and PEFT, on Banking77 and MiniLM.

``--losses`` (default): 20 steps on identical batches, dropout off; the largest difference.
``--accuracy``: FedAvg written out by hand, 3 seeds x 3 rounds, against our ``parameters``.
Both sides use the same division of the data, taken from our own partition.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from fedllm import experiment as ex
from fedllm import federation
from fedllm.federation import Prepared, Silent
from fedllm.ledger import Ledger
from fedllm.models.export import outside

FILE = Path(__file__).parent.parent / "experiments" / "banking77-minilm.toml"
ROUNDS = 3


def plain_model(spec: ex.Experiment, labels: int, seed: int) -> Any:
    """What the documentation of PEFT tells one to write."""
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        spec.model.name, num_labels=labels, dtype=torch.float32
    )
    lora = spec.tunables
    assert isinstance(lora, ex.Lora)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
        target_modules=list(lora.targets), init_lora_weights="gaussian", task_type="SEQ_CLS",
    )  # fmt: skip
    return get_peft_model(base, config)


def padded(examples: Any, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch padded to its longest row."""
    ids = [torch.from_numpy(examples.row(row)) for row in rows]
    x = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(row) for row in ids])
    mask = (torch.arange(x.shape[1]) < lengths[:, None]).long()
    return x, mask, torch.from_numpy(examples.labels[rows])


def trained(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that a federation of plain loops would send."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def fine_tune(
    model: Any, start: Mapping[str, torch.Tensor], examples: Any, rows: list[int],
    training: ex.Training, pad_to: int | None = None,
) -> None:  # fmt: skip
    """
    One client's round: from ``start`` once through its rows in this order, in batches.

    pad_to: how long every batch is made; None: as its longest row.
    """
    for name, parameter in trained(model).items():
        parameter.data.copy_(start[name])
    optimizer = torch.optim.Adam(trained(model).values(), lr=training.rate)
    model.train()
    for first in range(0, len(rows), training.batch_size):
        x, mask, y = padded(examples, rows[first : first + training.batch_size])
        if pad_to is not None:
            x = F.pad(x, (0, pad_to - x.shape[1]))
            mask = F.pad(mask, (0, pad_to - mask.shape[1]))
        F.cross_entropy(model(input_ids=x, attention_mask=mask).logits, y).backward()
        optimizer.step()
        optimizer.zero_grad()


def losses(spec: ex.Experiment) -> float:
    """Largest difference of the loss over 20 steps on identical batches."""
    tunables = spec.tunables.model_copy(update={"dropout": 0.0})
    spec = spec.replace(tunables=tunables, strategy=ex.Parameters())
    prepared = federation.prepare(spec, 0)
    built = federation.assemble(spec, 0, prepared, Ledger(), "bench", Silent())
    site = built.worker.sites["client-1"]
    model = plain_model(spec, len(prepared.labels), 0).eval()
    state = model.state_dict()
    names = {k.replace(".default", "").replace(".modules_to_save", ""): k for k in state}
    for name, tensor in site.model.initial.items():
        state[names[outside(name, tunables)]].copy_(tensor)
    theirs = torch.optim.Adam(trained(model).values(), lr=spec.training.rate)
    from fedllm.training.learner import Learner

    learner = Learner(site.model.initial, spec.training)
    worst = 0.0
    plan = site.plan(site.train, "private")
    for rows in plan.rows(0)[:20]:
        batch = plan.batch(rows)
        ours = F.cross_entropy(
            site.model.whole.apply_to(learner.params, batch.inputs), batch.targets
        )
        ours.backward()
        learner.step(0.0)
        x, mask, y = padded(site.train, list(rows))
        loss = F.cross_entropy(model(input_ids=x, attention_mask=mask).logits, y)
        loss.backward()
        theirs.step()
        theirs.zero_grad()
        worst = max(worst, abs(float(ours) - float(loss)))
    return worst


def plain_fedavg(spec: ex.Experiment, prepared: Prepared, seed: int) -> tuple[float, float]:
    """
    FedAvg by hand, base and adapters in train mode as ``model.train()`` leaves them.

    Returns the accuracy after the last round and the seconds of training.
    """
    model = plain_model(spec, len(prepared.labels), seed)
    shared = {n: p.detach().clone() for n, p in trained(model).items()}
    shuffle = random.Random(seed)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        updates, weights = [], []
        for data in prepared.clients.values():
            rows = list(range(len(data.train)))
            shuffle.shuffle(rows)
            fine_tune(model, shared, data.train, rows, spec.training)
            updates.append({n: p.detach().clone() for n, p in trained(model).items()})
            weights.append(len(rows))
        total = sum(weights)
        shared = {
            n: sum(w / total * u[n] for w, u in zip(weights, updates, strict=True)) for n in shared
        }
    seconds = time.perf_counter() - start
    for name, parameter in trained(model).items():
        parameter.data.copy_(shared[name])
    model.eval()
    right = count = 0
    with torch.no_grad():
        for data in prepared.clients.values():
            order = sorted(range(len(data.test)), key=lambda row: data.test.lengths[row])
            for first in range(0, len(order), 64):
                x, mask, y = padded(data.test, order[first : first + 64])
                right += int((model(input_ids=x, attention_mask=mask).logits.argmax(-1) == y).sum())
                count += len(y)
    return right / count, seconds


def accuracy(spec: ex.Experiment) -> list[str]:
    """Three seeds of both sides, as lines of a Markdown table."""
    lines = ["| seed | ours | plain loop | seconds ours | seconds plain |", "|---|---|---|---|---|"]
    ours, theirs = [], []
    for seed in (0, 1, 42):
        # the plain loop does not clip, so neither do we here
        training = spec.training.model_copy(update={"clip": None})
        one = spec.replace(rounds=ROUNDS, seeds=(seed,), strategy=ex.Parameters(),
                           training=training, evaluation=ex.Evaluation(every=0))  # fmt: skip
        prepared = federation.prepare(one, seed)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            summary = federation.run(one, seed, Path(folder) / "run", prepared=prepared)
            wall = time.perf_counter() - start
        plain, seconds = plain_fedavg(one, prepared, seed)
        ours.append(summary["metrics"]["accuracy"])
        theirs.append(plain)
        lines.append(
            f"| {seed} | {ours[-1]:.2%} | {plain:.2%} | {wall:.0f} (all) | {seconds:.0f} |"
        )
        print(lines[-1], flush=True)
    lines.append(f"| mean | {statistics.fmean(ours):.2%} | {statistics.fmean(theirs):.2%} | | |")
    return lines


def main() -> None:
    """Run what was asked and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = ex.load(FILE)
    text = ["# Quality beside a plain PyTorch + PEFT loop", "",
            f"{platform.machine()}, torch {torch.__version__}, 1 thread; Banking77, MiniLM, "
            "LoRA r = 8", ""]  # fmt: skip
    text.append(
        f"Largest difference of the loss over 20 steps on identical batches, dropout off: "
        f"{losses(spec):.1e} (`python benchmarks/plain_loop.py`)"
    )
    print(text[-1], flush=True)
    if arguments.accuracy:
        text += ["", f"Accuracy after {ROUNDS} rounds (`make results`):", "", *accuracy(spec)]
    if arguments.out:
        arguments.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
