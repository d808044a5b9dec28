"""
What is planned, beside what is then measured: bytes, FLOPs, memory and seconds of a round.

Each line plans an experiment from its configuration, runs two rounds of it, and compares. MiniLM
and babyllama have real weights (FEDLLM_SHARED), GPT-2 random ones: what they have learnt changes
no cost. Seconds: those that a client computes, planned with the FLOP/s that the run of parameters
had. The last lines plan a Llama-type model of seven billion weights, which nothing here could run.

    python benchmarks/planned.py --out benchmarks/PLANNED.md
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedllm import experiment as ex
from fedllm import federation, round
from fedllm.checkpoint import Committed
from fedllm.estimates.lines import Line
from fedllm.federation import Silent
from fedllm.ledger import Ledger
from fedllm.planning import plan
from fedllm.report.tables import amount, markdown, size
from fedllm.summary import costs, per_client_round

SHARED = Path(os.environ.get("FEDLLM_SHARED", Path(__file__).parents[2] / "shared"))
STRATEGIES: tuple[dict[str, Any], ...] = (
    {"kind": "parameters"}, {"kind": "logits"}, {"kind": "activations", "cut": 2},
)  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_layer": 6, "n_embd": 192, "n_head": 6, "n_positions": 256}
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
HEADER = ["model, task", "strategy", "up", "down", "client FLOPs", "server FLOPs", "client memory",
          "server memory", "client seconds"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and a task."""

    title: str
    model: str
    task: str
    tokenizer: str | None = None  # of another place: then the weights are random


def experiment(case: Case, strategy: dict[str, Any]) -> ex.Experiment:
    """Two rounds of three uneven clients on the built-in text."""
    columns = {"label": "intent"} if case.task == "classification" else {"response": "reply"}
    key = "text" if case.task == "classification" else "prompt"
    values: dict[str, Any] = {
        "name": "planned", "rounds": 2,
        "model": {
            "name": case.model, "tokenizer": case.tokenizer or case.model,
            "weights": "random" if case.tokenizer else "pretrained",
        },
        "task": {"kind": case.task}, "data": {key: "text", **columns, "max_tokens": 96},
        "public": {"size": 120}, "tunables": {"kind": "lora", "rank": 8},
        "training": {"batch_size": 16}, "strategy": strategy,
        "simulation": {"clients": 3, "sizes": [300, 200, 100], "test_examples": 30},
        "evaluation": {"every": 0},
    }  # fmt: skip
    return ex.parse(values, "planned", Path.cwd())


def measured(spec: ex.Experiment) -> tuple[dict[str, float], dict[str, Any]]:
    """What the clients' mean round cost, and the server."""
    prepared = federation.prepare(spec, 0)
    name = federation.run_id(spec, 0)
    built = federation.assemble(spec, 0, prepared, Ledger(), name, Silent())
    round.run(built, Committed(0, built.strategy.start()), lambda committed: None)
    found = costs(built.ledger.rows, spec.rounds)
    return per_client_round(found, spec.rounds), found.get("server", {})


def cell(show: Any, planned: float, run: float) -> str:
    """``planned`` and by how much it misses."""
    return f"{show(planned)} ({planned / run - 1:+.1%})" if run else show(planned)


def lines(case: Case) -> list[list[str]]:
    """A line for each strategy, parameters first: its speed is what seconds are planned with."""
    found, speed = [], 0.0
    for strategy in STRATEGIES:
        spec = experiment(case, strategy)
        line = next(x for x in plan.look(spec).lines if x.strategy == strategy["kind"])
        client, server = measured(spec)
        speed = speed or client["flops"] / client["seconds"]
        found.append([case.title, line.variant, *cells(line, client, server, spec.rounds, speed)])
        print(found[-1], flush=True)
    return found


def cells(
    line: Line, client: dict[str, float], server: dict[str, Any], rounds: int, speed: float
) -> list[str]:
    """Planned values with their errors."""

    def flops(value: float) -> str:
        return amount("flops", value)

    own, most = server.get("flops", 0) / rounds, server.get("peak_memory", 0)
    return [
        cell(size, line.up, client["bytes_up"]), cell(size, line.down, client["bytes_down"]),
        cell(flops, line.flops, client["flops"]),
        cell(flops, line.server_flops, own) if own > 1e6 else "",
        cell(size, line.memory, client["peak_memory"]),
        cell(size, line.server_memory, most) if most else "",
        cell(lambda v: f"{v:.2f}", line.flops / speed, client["seconds"]),
    ]  # fmt: skip


def large(folder: Path) -> list[str]:
    """Seconds of planning seven billion weights."""
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    said = []
    for clients in (3, 1000, 10_000):
        values = {
            "name": "7b", "model": {"name": str(folder)}, "simulation": {"clients": clients},
            "task": {"kind": "generation"}, "data": {"prompt": "text", "response": "reply"},
            "plan": {"rows": 1667, "tokens": 120, "public_rows": 5002},
        }  # fmt: skip
        spec = ex.parse(values, "7b", folder)
        start = time.process_time()
        found = plan.look(spec)
        seconds = time.process_time() - start
        costs_ = "; ".join(
            f"{line.strategy} {size(line.up)} up, {amount('flops', line.flops)}, "
            f"{size(line.memory)}"
            for line in found.lines
        )
        said.append(f"- {clients:,} clients: {seconds:.2f} s of CPU ({costs_})")
        print(said[-1], flush=True)
    return said


def main() -> None:
    """Plan, run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        gpt2, llama = Path(place, "gpt2"), Path(place, "llama")
        for folder in (gpt2, llama):
            folder.mkdir()
        (gpt2 / "config.json").write_text(json.dumps({**GPT2, "vocab_size": 50257}))
        words = str(SHARED / "models" / "gpt2-tokenizer")
        cases = [
            Case("MiniLM, classification", str(SHARED / "models" / "minilm-l6-22m"),
                 "classification"),
            Case("babyllama, generation", str(SHARED / "models" / "babyllama-0.9m"), "generation"),
            Case("GPT-2 (random), classification", str(gpt2), "classification", words),
            Case("GPT-2 (random), generation", str(gpt2), "generation", words),
        ]  # fmt: skip
        table = [line for case in cases for line in lines(case)]
        big = large(llama)
    text = "\n".join([
        "# Planned, and measured", "",
        "Made by `python benchmarks/planned.py --out benchmarks/PLANNED.md`. Planned values of a "
        "client and round, and in brackets by how much they differ from what a run of two rounds "
        "then measured (server: of a round). Three clients with 300, 200 and 100 rows of the "
        "built-in text, 120 public rows, LoRA r = 8, batches of 16. Seconds are planned with the "
        "FLOP/s of the run of parameters, so its own cell says nothing. Under logits the server's "
        "memory has room for what all clients say, which a run does not count; with a large "
        "vocabulary that is most of it.", "",
        markdown(HEADER, table), "",
        "Planning a Llama-type model of seven billion weights (1,667 rows of 120 tokens a client, "
        "5,002 public rows), after importing, without weights:", "", *big, "",
    ])  # fmt: skip
    if asked.out:
        asked.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
