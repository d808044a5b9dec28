"""Law 7: over sessions, with every site a process of its own, a run is the one in process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm import experiment as ex
from fedllm import federation
from fedllm.across import Order
from fedllm.data.simulation import divide
from fedllm.federation import Silent
from shared import needs_shared
from sites import Sites, counted, weights
from sites import rows as rows  # of use to others, too
from small import LLAMA, experiment

TEXT = {
    "task": "generation", "data": {"response": "intent"}, "public": {"size": 8, "labelled": True},
}  # fmt: skip
MUTUAL = {
    "kind": "logits", "form": "top-k", "top_k": 16, "knowledge": "least-loss", "selective": True,
    "client_models": {"client-1": LLAMA},  # another model with another tokenizer
}  # fmt: skip
OWN = {"tunables": {"ranks": {"client-2": 2}, "modules": {"client-1": {"layers": [-1]}}}}
STRATEGIES = [
    pytest.param({"kind": "parameters", "aggregation": "normalized"}, OWN, id="parameters"),
    pytest.param({"kind": "logits"}, {}, id="logits"),
    # every message of an ordinary cut, and those of the crossings between
    pytest.param({"kind": "activations", "cut": 1, "inside": 2}, {}, id="activations"),
    pytest.param(MUTUAL, TEXT, id="fedmkt", marks=needs_shared),
]


@pytest.fixture
def stopping() -> Iterator[list[Sites]]:
    made: list[Sites] = []
    yield made
    for sites in made:
        sites.stop()


@pytest.mark.parametrize(("strategy", "more"), STRATEGIES)
def test_a_run_over_processes_is_the_one_in_process(
    tmp_path: Path, strategy: dict[str, Any], more: dict[str, Any], stopping: list[Sites]
) -> None:
    more = dict(more)
    spec = experiment(
        rounds=2, strategy=strategy, tunables={"dropout": 0.1, **more.pop("tunables", {})},
        training={"optimizer": "adam", "rate": 0.003, "optimizer_state": "keep"},
        simulation={"cohort": 1, "test_examples": 30}, **more,
    )  # fmt: skip
    sites = Sites(tmp_path, spec)
    stopping.append(sites)
    torch.set_num_threads(1)
    # the same public rows, in the order of their file
    inside = sites.spec.replace(public=sites.spec.public)
    prepared = federation.prepare(
        inside, 0, divided=lambda columns: together(spec, sites.spec, columns)
    )
    federation.run(inside, 0, tmp_path / "inside", prepared=prepared)
    try:
        sites.lead("across")
    except Exception as error:
        raise AssertionError(sites.log()) from error
    assert weights(tmp_path / "inside") == weights(tmp_path / "across") != {}
    assert counted(tmp_path / "inside") == counted(tmp_path / "across")
    one, other = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("inside", "across")
    )
    assert one["global"] == other["global"]
    for name, process in sites.processes.items():
        process.join(30)
        assert process.exitcode == 0
        lines = (tmp_path / name / "runs").rglob("audit.jsonl")
        steps = [json.loads(line)["step"] for path in lines for line in path.open()]
        assert steps.count("commit") == 2


def together(spec: ex.Experiment, named: ex.Experiment, columns: Any) -> Any:
    """The clients of the simulation, the public set of the sites' file."""
    from dataclasses import replace

    from fedllm.data import own

    return replace(divide(spec, columns, 0), public=own.division(named, columns, None).public)


class Stop(Silent):
    """Stops this server after a round."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round(self, entry: Any) -> None:
        if entry["round"] == self.number:
            raise KeyboardInterrupt


def test_a_server_that_stopped_goes_on_with_the_same_sites(
    tmp_path: Path, stopping: list[Sites]
) -> None:
    """Their states are theirs, and as of the last committed round."""
    spec = experiment(
        rounds=3, strategy={"kind": "logits"},
        training={"optimizer": "adam", "rate": 0.003, "optimizer_state": "keep"},
    )  # fmt: skip
    sites = Sites(tmp_path, spec)
    stopping.append(sites)
    sites.lead("whole")
    for name in sites.names:
        (tmp_path / name / "runs").rename(tmp_path / name / "runs of the whole")
    with pytest.raises(KeyboardInterrupt):
        sites.lead("cut", listener=Stop(2))
    sites.stop()
    sites.lead("cut", resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut") != {}


def test_what_a_site_does_not_allow_is_refused_before_it_dials(
    tmp_path: Path, stopping: list[Sites]
) -> None:
    from fedllm.across import take_part
    from fedllm.errors import FedllmError

    sites = Sites(tmp_path, experiment(strategy={"kind": "activations"}))
    order: Order = {"experiment": ex.dump(sites.spec), "seed": 0, "run": "r", "address": "",
                    "token": ""}  # fmt: skip
    site = ex.load_site(tmp_path / "client-1" / "site.toml")
    for allow, reason in (
        ({"strategies": ["parameters"]}, "allow.strategies"), ({"labels": False}, "allow.labels"),
        ({"tunables": ["adapter"]}, "allow.tunables"), ({"largest_rank": 1}, "allow.largest_rank"),
    ):  # fmt: skip
        strict = site.model_copy(update={"allow": ex.Allow.model_validate_json(json.dumps(allow))})
        with pytest.raises(FedllmError, match=reason):
            take_part(order, strict, tmp_path / "client-1", None)
    with pytest.raises(FedllmError, match="not the name of a folder"):
        take_part({**order, "run": "../up"}, site, tmp_path / "client-1", None)
