"""Law 8: no private text, and no label that a strategy does not need, leaves a client."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm import federation
from fedllm.checkpoint import Committed
from fedllm.message import Failure, Role, unpack
from fedllm.round import Federation
from fedllm.round import run as run_rounds
from fedllm.transport import Transport
from small import GPT2, build, experiment, files

CANARY = "zebrafish quartz umbrella"


class Tapped:
    """Keeps every frame."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.window = inner, inner.window
        self.frames: list[bytes] = []

    def clients(self) -> Sequence[str]:
        return self.inner.clients()

    def post(self, client: str, frame: bytes) -> str:
        self.frames.append(frame)
        return self.inner.post(client, frame)

    def collect(self, timeout: float | None = None) -> Iterator[tuple[str, bytes | Failure]]:
        for id, answer in self.inner.collect(timeout):
            if isinstance(answer, bytes):
                self.frames.append(answer)
            yield id, answer


def rows(path: Path) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "intent", "reply"])
        for number in range(40):
            writer.writerow([f"{CANARY} number {number}", f"kind-{number % 4}",
                             f"answer {CANARY} {number}"])  # fmt: skip
    return str(path)


def tapped(spec: Any) -> tuple[Federation, list[bytes]]:
    built = build(spec)
    tap = Tapped(built.exchange.transport)
    built.exchange.transport = tap
    run_rounds(built, Committed(0, built.strategy.start()), lambda committed: None)
    return built, tap.frames


def needles(built: Federation) -> list[bytes]:
    """The canary as text, and as the token numbers that every private row holds."""
    tokenizer: Any = built.worker.tokenizers[built.model.name]
    ids = tokenizer(f"x {CANARY}", add_special_tokens=False)["input_ids"][-4:]
    found = [CANARY.encode()]
    for kind in ("<i4", "<i8", "<i2"):
        found.append(np.array(ids, kind).tobytes())
    return found


CASES = [
    ({"kind": "parameters"}, {Role.PARAMETER, Role.STATISTIC}),
    ({"kind": "logits", "server_model": False}, {Role.LOGIT, Role.INDEX, Role.STATISTIC}),
    (
        {"kind": "activations", "cut": 2, "labels": "client"},
        {Role.ACTIVATION, Role.GRADIENT, Role.MASK, Role.PARAMETER, Role.STATISTIC},
    ),
]


@pytest.mark.parametrize("task", ["classification", "generation"])
@pytest.mark.parametrize(("strategy", "roles"), CASES, ids=["parameters", "logits", "activations"])
def test_frames_hold_no_private_text_and_only_the_needed_roles(
    tmp_path: Path, task: str, strategy: dict[str, Any], roles: set[Role]
) -> None:
    source = rows(tmp_path / "rows.csv")
    spec = experiment(
        GPT2, task, strategy=strategy, simulation={"source": source, "clients": 2},
        public={"source": "builtin", "size": 6} if task == "generation" else {"size": 6},
    )  # fmt: skip
    built, frames = tapped(spec)
    seen = set()
    for frame in frames:
        assert not any(needle in frame for needle in needles(built))
        seen |= set(unpack(frame)[0].roles.values())
    assert seen == roles


def test_labels_travel_only_where_the_server_needs_them(tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.csv")
    spec = experiment(
        GPT2, strategy={"kind": "activations"}, simulation={"source": source, "clients": 2}
    )
    _, frames = tapped(spec)
    steps = {m.step for m in (unpack(f)[0] for f in frames) if Role.LABEL in m.roles.values()}
    assert steps == {"c2"}


def test_the_run_folder_holds_no_private_text(tmp_path: Path) -> None:
    from fedllm.report import page

    source = rows(tmp_path / "rows.csv")
    spec = experiment(GPT2, simulation={"source": source, "clients": 2}, public={"size": 6})
    folder = tmp_path / "run"
    federation.run(spec, 0, folder)
    page.write(folder)
    assert {"experiment.toml", "ledger.jsonl", "log.txt", "summary.json", "report.html"} <= {
        path.name for path in folder.iterdir()
    }
    for path in files(folder):
        assert CANARY.encode() not in path.read_bytes(), path
