"""Small real federations for tests: an experiment in a few words, built and run in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm import experiment as ex
from fedllm import federation, round
from fedllm.checkpoint import Committed
from fedllm.federation import Prepared, Silent
from fedllm.ledger import Ledger
from fedllm.round import Federation
from shared import model, needs_shared

GPT2, LLAMA, BERT = "builtin", model("stories-260k"), model("minilm-l6-22m")
TYPES = [
    pytest.param(GPT2, id="gpt2"),
    pytest.param(LLAMA, id="llama", marks=needs_shared),
    pytest.param(BERT, id="bert", marks=needs_shared),
]
DECODERS = TYPES[:2]
TASKS = [
    pytest.param(GPT2, "classification", id="gpt2-classification"),
    pytest.param(GPT2, "generation", id="gpt2-generation"),
    pytest.param(LLAMA, "classification", id="llama-classification", marks=needs_shared),
    pytest.param(LLAMA, "generation", id="llama-generation", marks=needs_shared),
    pytest.param(BERT, "classification", id="bert-classification", marks=needs_shared),
]
EACH = [TASKS[0], TASKS[3], TASKS[4]]  # every model type once, and both tasks
_prepared: dict[Any, Prepared] = {}


def experiment(
    name: str = GPT2, task: str = "classification", rows: int = 24, **sections: Any
) -> ex.Experiment:
    """Three clients of uneven size on the built-in text set; keys such as ``training`` merge."""
    values: dict[str, Any] = {
        "name": "small",
        "rounds": 1,
        "model": {"name": name},
        "task": {"kind": task},
        "data": {"text": "text", "label": "intent", "max_tokens": 48},
        "public": {"size": 12},
        "tunables": {"kind": "lora", "rank": 2},
        "training": {"optimizer": "sgd", "rate": 0.1, "batch_size": 8},
        "simulation": {
            "clients": 3, "sizes": [rows // 2, rows // 3, rows - rows // 2 - rows // 3],
            "test_examples": 30,
        },
    }  # fmt: skip
    if task == "generation":
        values["data"] = {"prompt": "text", "response": "reply", "max_tokens": 96}
    for section, changes in sections.items():
        if isinstance(changes, dict) and section in values:
            kind = changes.get("kind")
            same = kind is None or kind == values[section].get("kind")
            values[section] = {**(values[section] if same else {}), **changes}
        else:
            values[section] = changes
    if "clients" in sections.get("simulation", {}) and "sizes" not in sections["simulation"]:
        values["simulation"].pop("sizes")
    return ex.parse(values, "test", Path.cwd())


def build(spec: ex.Experiment, seed: int = 0) -> Federation:
    key = (spec.model, spec.task, spec.data, spec.public, spec.simulation, seed,
           spec.evaluation.on, getattr(spec.tunables, "tokens", 0))  # fmt: skip
    key = tuple(repr(part) for part in key)
    if key not in _prepared:
        _prepared[key] = federation.prepare(spec, seed)
    return federation.assemble(spec, seed, _prepared[key], Ledger(), "run", Silent())


def finish(
    built: Federation, commit: Callable[[Committed], None] = lambda committed: None
) -> Committed:
    return round.run(built, Committed(0, built.strategy.start()), commit)


def final(spec: ex.Experiment, seed: int = 0) -> dict[str, torch.Tensor]:
    """The global tunables after all rounds, or those of the only client."""
    built = build(spec, seed)
    end = finish(built)
    candidate = built.strategy.candidate(end.server)
    if candidate is None:
        (site,) = built.worker.sites.values()
        candidate = built.strategy.own(site)
    return candidate


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
