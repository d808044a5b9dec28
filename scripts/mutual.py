"""
Large and small models teach each other: FedMKT beside what one would otherwise do.

usage: python scripts/mutual.py runs/mutual docs/mutual

Server babyllama (0.9 M, characters), clients two stories-260k (512 tokens) and one small GPT-2 type
with a tokenizer of its own, trained here on answers to instructions. None of them has seen
Shakespeare, whose last sentences, in letters that all tokenizers know, are divided among unequal
clients, a public set and held-out rows. Finished runs are not repeated. Bits per byte of held-out
text, three seeds, the last round.
"""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from fedllm import experiment as ex
from fedllm import federation
from fedllm.report.tables import markdown, size

SHARED = Path(os.environ.get("FEDLLM_SHARED", Path(__file__).parents[2] / "shared"))
SEEDS = (0, 1, 42)
LONGEST = 80  # letters of a row: babyllama reads one at a time
ROWS = 1600  # for clients, public set and evaluation
RATE = 0.0005
LARGE, STORIES = (str(SHARED / "models" / name) for name in ("babyllama-0.9m", "stories-260k"))


def known(text: str) -> str:
    """The letters that every tokenizer here knows."""
    return re.sub(r"[^A-Za-z .,;:'!?-]", "", text.replace("\n", " "))


def plays() -> list[str]:
    """The shorter sentences of Shakespeare."""
    whole = (SHARED / "data" / "tinyshakespeare" / "input.txt").read_text()
    said = [known(speech.partition(":\n")[2]) for speech in whole.split("\n\n")]
    sentences = [one for speech in said for one in re.split(r"(?<=[.!?;]) ", speech)]
    return [one for one in sentences if 20 <= len(one) <= LONGEST]


def answers() -> list[str]:
    """Answers to instructions."""
    path = SHARED / "data" / "instructions" / "dolly_hhrlhf_train_small.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [known(row["response"]) for row in rows]


def table(path: Path, rows: list[str]) -> str:
    """A CSV with one column."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text"], *([row] for row in rows)])
    return str(path)


def third(folder: Path, rows: list[str]) -> str:
    """A GPT-2 type of 0.5 M weights and a tokenizer of 400 tokens, both from these rows."""
    if (folder / "model.safetensors").exists():
        return str(folder)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    base.train_from_iterator(rows, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    words = PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<|end|>", eos_token="<|end|>",
                                    pad_token="<|end|>")  # fmt: skip
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(words), n_positions=128, n_embd=96, n_layer=4, n_head=4,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    flat = torch.tensor([t for row in rows for t in [0, *words(row)["input_ids"]]])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(1000):
        begin = torch.randint(len(flat) - 65, (16,))
        batch = torch.stack([flat[i : i + 65] for i in begin.tolist()])
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def spec(work: Path, model: str, strategy: dict[str, Any], seed: int) -> ex.Experiment:
    """The same rows, rounds and training for everything that is compared."""
    return ex.parse({
        "name": "mutual", "rounds": 4, "seeds": [seed], "strategy": strategy,
        "model": {"name": model, "threads": 1}, "task": {"kind": "generation"},
        "data": {"text": "text", "max_tokens": 96},
        "public": {"size": 200, "labelled": True},
        "tunables": {"kind": "lora", "rank": 8, "alpha": 16},
        "training": {"batch_size": 8, "rate": RATE},
        "simulation": {"source": str(work / "train.csv"), "test": str(work / "test.csv"),
                       "clients": 3, "sizes": [400, 300, 100]},
        "evaluation": {"every": 4},
    }, "mutual", work)  # fmt: skip


def run(work: Path, name: str, experiment: ex.Experiment) -> dict[str, Any]:
    """One run, or what it left when it ran before."""
    folder = work / name / f"seed-{experiment.seeds[0]}"
    return federation.run(experiment, experiment.seeds[0], folder, resume=folder.exists())


def untrained(work: Path, model: str, seed: int) -> float:
    """Bits per byte of a model as it came."""
    experiment = spec(work, model, {"kind": "parameters"}, seed)
    prepared = federation.prepare(experiment, seed)
    return float(federation.untrained(experiment, seed, prepared)["bits_per_byte"])


def measured(
    work: Path, small: str
) -> tuple[dict[str, dict[str, list[float]]], list[float], list[float]]:
    """
    {line: {model: one value a seed}}, bytes that a client sent and got in a round, and shares of
    held-out tokens that a tokenizer does not know.
    """
    models = [STORIES, STORIES, small]
    mutual = {
        "kind": "logits", "form": "top-k", "knowledge": "least-loss", "selective": True,
        "label_share": 0.9, "epochs": 2, "client_models": models,
    }  # fmt: skip
    variants = {
        "FedMKT, losses a byte": mutual,
        "FedMKT, losses a token": {**mutual, "loss_per": "token"},
        "FedMKT, weighted mean": {**mutual, "knowledge": "loss"},
        "the same steps without knowledge": {**mutual, "label_share": 1.0},
    }
    found: dict[str, dict[str, list[float]]] = {}
    moved: list[float] = []
    unknown: list[float] = []

    def add(line: str, who: str, value: float) -> None:
        found.setdefault(line, {}).setdefault(who, []).append(value)

    for seed in SEEDS:
        for line, strategy in variants.items():
            name = re.sub(r"\W+", "-", line)
            summary = run(work, name, spec(work, LARGE, strategy, seed))
            add(line, "server", summary["metrics"]["bits_per_byte"])
            every = [summary["metrics"], *summary["clients"].values()]
            unknown += [one["unknown_rate"] for one in every]
            for client, metrics in summary["clients"].items():
                add(line, client, metrics["bits_per_byte"])
            if line == next(iter(variants)):
                costs = summary["per_client_round"]
                moved.append(costs["bytes_up"] + costs["bytes_down"])
        alone = {}
        for model in set(models):
            only = spec(work, model, {"kind": "standalone"}, seed)
            alone[model] = run(work, f"standalone-{Path(model).name}", only)
        for number, model in enumerate(models, 1):
            client = f"client-{number}"
            add("standalone", client, alone[model]["clients"][client]["bits_per_byte"])
            add("zero-shot", client, untrained(work, model, seed))
        add("zero-shot", "server", untrained(work, LARGE, seed))
        whole = run(work, "centralized", spec(work, LARGE, {"kind": "centralized"}, seed))
        add("centralized", "server", whole["metrics"]["bits_per_byte"])
        print(seed, {k: {w: v[-1] for w, v in x.items()} for k, x in found.items()}, flush=True)
    return found, moved, unknown


def page(
    found: dict[str, dict[str, list[float]]], moved: list[float], unknown: list[float]
) -> str:  # fmt: skip
    """README.md of the comparison, with its verdicts."""
    who = ["server", "client-1", "client-2", "client-3"]

    def cell(line: str, name: str) -> str:
        values = found[line].get(name)
        if not values:
            return ""
        return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"

    order = ["zero-shot", "standalone", "the same steps without knowledge",
             *(line for line in found if line.startswith("FedMKT")), "centralized"]  # fmt: skip
    lines = [[line, *(cell(line, name) for name in who)] for line in order]
    ours = found["FedMKT, losses a byte"]
    verdicts = []
    for name in who:
        rivals = ["zero-shot", "the same steps without knowledge"]
        rivals += ["standalone"] if name != "server" else []
        for rival in rivals:
            gaps = [a - b for a, b in zip(found[rival][name], ours[name], strict=True)]
            holds = "holds" if statistics.fmean(gaps) > 0 else "**does not hold**"
            if abs(statistics.fmean(gaps)) <= statistics.stdev(gaps):
                holds += ", within the spread of the seeds"
            verdicts.append([
                f"{name} better than {rival}", holds,
                f"{statistics.fmean(gaps):+.4f} bits per byte ({sum(g > 0 for g in gaps)} of "
                f"{len(gaps)} seeds)",
            ])  # fmt: skip
    return "\n".join([
        "# Large and small models teach each other", "",
        "Made by `python scripts/mutual.py runs/mutual docs/mutual`. " + " ".join(
            (__doc__ or "").split("\n\n")[2].split()), "",
        markdown(["bits per byte, held out", *who], lines), "",
        f"A client sent and got {size(statistics.fmean(moved))} a round. Clients 1 and 2: "
        "stories-260k, 400 and 300 rows; client 3: the small GPT-2 type, 100 rows. LoRA r = 8, "
        "four rounds, 200 public rows twice a round. Without knowledge: the same steps on the same "
        "texts, with the teacher's share of the loss at 0: for the server that is the public set "
        f"alone. Tokens unknown to a tokenizer: at most {max(unknown):.2%}. The rate, {RATE:g}, is "
        "the best for FedMKT of 0.00025, 0.0005 and 0.001 on other held-out rows with seed 7.", "",
        markdown(["claim", "here", "by"], verdicts), "",
    ])  # fmt: skip


def main() -> None:
    """Make the data and the third model, run what is missing, write the page."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    work, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rest = plays()[-ROWS:]
    table(work / "train.csv", rest[:1200])
    table(work / "test.csv", rest[1200:])
    found, moved, unknown = measured(work, third(work / "small-gpt2", answers()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "README.md").write_text(page(found, moved, unknown))


if __name__ == "__main__":
    main()
