"""The whole of it, as operators do it: Flower with TLS and node authentication, three sites."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import three_sites

from fedllm import experiment as ex
from fedllm import federation
from fedllm.across import Called
from fedllm.data import own
from fedllm.data.simulation import divide
from fedllm.errors import FedllmError
from fedllm.flower import Caller
from fedllm.transport.session import Sessions
from small import experiment

COMMAND = [sys.executable, "-m", "fedllm.cli"]
SPEC = experiment(
    rounds=2, strategy={"kind": "activations", "cut": 2}, tunables={"dropout": 0.1},
    training={"optimizer": "adam", "rate": 0.003, "optimizer_state": "keep"},
    simulation={"cohort": 1, "test_examples": 30},
)  # fmt: skip


def fedllm(*words: str, cwd: Path) -> str:
    done = subprocess.run([*COMMAND, *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A federation of three sites that is up."""
    folder = tmp_path_factory.mktemp("federation")
    started = three_sites.up(
        folder, SPEC, divide(SPEC, ("text", "intent"), 0), three_sites.free_ports(), lambda _: None
    )
    yield folder
    three_sites.down(folder, lambda _: None)
    for process in started.values():
        process.wait(20)


def simulated(spec: ex.Experiment) -> federation.Prepared:
    """The sites' rows in one process."""

    def together(columns: Any) -> Any:
        nobody = own.division(spec, columns, None)
        return replace(divide(SPEC, columns, 0), public=nobody.public)

    return federation.prepare(spec, 0, divided=together)


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_over_flower_is_the_one_in_process(folder: Path) -> None:
    said = fedllm("run", "experiment.toml", "--on", "server", "--out", "across", cwd=folder)
    assert re.search(r"\$ flwr run .* --stream", said)
    spec = ex.load(folder / "experiment.toml")
    federation.run(spec, 0, folder / "inside", prepared=simulated(spec))
    assert adapter(folder / "across") == adapter(folder / "inside")
    assert list(folder.glob("client-*/runs/*/audit.jsonl"))
    again = [*COMMAND, "run", "experiment.toml", "--on", "server", "--out", "across"]
    refused = subprocess.run(again, cwd=folder, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "holds a finished run" in refused.stderr


class Grid:
    """Flower's, as far as it is used, with nodes whose calls can be made to fail."""

    def __init__(self, nodes: list[int]) -> None:
        self.nodes, self.pushed, self.failed = nodes, [], {}  # type: ignore[var-annotated]

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def create_message(self, content: Any, kind: str, node: int, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(node=node)

    def push_messages(self, messages: list[SimpleNamespace]) -> list[str]:
        ids = [str(len(self.pushed) + i) for i in range(len(messages))]
        self.pushed += messages
        return ids

    def pull_messages(self, ids: list[str]) -> list[Any]:
        return [self.failed.pop(id) for id in ids if id in self.failed]

    def fail(self, number: int, reason: str) -> None:
        reply = SimpleNamespace(
            metadata=SimpleNamespace(reply_to_message_id=str(number)),
            has_error=lambda: True, error=SimpleNamespace(reason=reason),
        )  # fmt: skip
        self.failed[str(number)] = reply


def test_a_site_whose_process_died_is_called_again_and_one_that_refuses_ends_the_run() -> None:
    grid = Grid([11, 22])
    caller = Caller(grid)  # type: ignore[arg-type]
    with Sessions("127.0.0.1:0", None, ["a", "b"]) as sessions:
        called = Called(sessions, ["a", "b"], lambda name, token: caller(name, {"token": token}),
                        60.0, caller.lost)  # fmt: skip
        grid.fail(1, "labels may not leave this site")
        with pytest.raises(FedllmError, match="did not come: node 22: labels may not leave"):
            called.begin(lambda name: {}, lambda name, facts: "")
        assert called.clients() == ["a", "b"]
        assert len(grid.pushed) == 2
        grid.fail(0, "the process ended")
        called.clients()
        assert [message.node for message in grid.pushed] == [11, 22, 11]
        called.clients()
        assert len(grid.pushed) == 3
