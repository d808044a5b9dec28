"""Runs as a user starts them: folders, resume, comparison, the command line."""

import json
import resource
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedllm import compare, federation
from fedllm import experiment as ex
from fedllm.checkpoint import load
from fedllm.federation import Silent
from fedllm.ledger import Ledger, Row, read, total
from fedllm.report import tables
from small import GPT2, experiment
from test_refusals import BASE, call, write_rows

STRATEGIES: list[dict[str, Any]] = [
    {"kind": "parameters"},
    {"kind": "logits"},
    {"kind": "activations", "cut": 2},
    {"kind": "activations", "cut": 2, "server": "per-client"},
    {"kind": "standalone"},
]
NAMES = ["parameters", "logits", "sequential", "per-client", "standalone"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_rows(tmp_path / "rows.csv", 40)
    (tmp_path / "one.toml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Stop(Silent):
    """Presses Ctrl-C after a round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, entry: Mapping[str, Any]) -> None:
        if entry["round"] == self.after:
            raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((folder / "adapter").rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.parent.name}/{name}"] = tensor
    return found


def plain(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows without what differs between two runs of the same thing."""
    return [
        {k: v for k, v in asdict(row).items() if k not in ("seconds", "peak_memory")}
        for row in rows
    ]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=NAMES)
def test_an_interrupted_run_ends_bit_identical(tmp_path: Path, strategy: dict[str, Any]) -> None:
    """Law 7, in process: momentum and dropout included."""
    spec = experiment(
        GPT2, rounds=3, strategy=strategy, tunables={"dropout": 0.2},
        training={"optimizer": "adam", "rate": 0.003, "schedule": "cosine",
                  "optimizer_state": "keep"},
        exchange={"clients_per_round": 2},
    )  # fmt: skip
    federation.run(spec, 0, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        federation.run(spec, 0, tmp_path / "cut", listener=Stop(1))
    with pytest.raises(KeyboardInterrupt):
        federation.run(spec, 0, tmp_path / "cut", resume=True, listener=Stop(2))
    summary = federation.run(spec, 0, tmp_path / "cut", resume=True)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = (read(tmp_path / name / "ledger.jsonl") for name in ("whole", "cut"))
    assert plain(one) == plain(two)
    assert [entry["round"] for entry in summary["history"]] == [1, 2, 3]


FEDLLM = [sys.executable, "-m", "fedllm.cli"]


def test_a_killed_process_leaves_a_resumable_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["run", "one.toml", "--quiet", "--set", "rounds=8", "--set", "evaluation.every=0"]
    process = subprocess.Popen([*FEDLLM, *words, "--out", "out"], stderr=subprocess.PIPE)
    checkpoints = folder / "out" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("round-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = load(checkpoints)
    assert before is not None
    assert call(monkeypatch, *words, "--out", "out", "--resume") == 0
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert call(monkeypatch, *words, "--out", "whole") == 0
    assert same_bits(folder / "out", folder / "whole")
    assert [entry["round"] for entry in summary["history"]] == list(range(1, 9))
    assert {row.round for row in read(folder / "out" / "ledger.jsonl")} == set(range(1, 9))


def same_bits(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_a_full_disk_leaves_a_resumable_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", "one.toml", "--quiet",
             "--set", "rounds=25", "--set", "evaluation.every=0", "--set", "tunables.rank=1",
             "--set", "tunables.head=frozen", "--out"]  # fmt: skip
    most = 60_000  # bytes of a file; the ledger grows larger than that
    full = subprocess.run(
        [*FEDLLM, *words, "out"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )  # fmt: skip
    assert full.returncode == 2, full.stderr
    assert "--resume goes on" in full.stderr
    assert "Traceback" not in full.stderr
    before = load(folder / "out" / "checkpoints")
    assert before is not None
    assert 1 <= before.round < 25
    for name, more in (("out", ["--resume"]), ("whole", [])):
        assert call(monkeypatch, *words, name, *more) == 0
    assert same_bits(folder / "out", folder / "whole")
    one, two = (read(folder / name / "ledger.jsonl") for name in ("out", "whole"))
    assert plain(one) == plain(two)


def test_ctrl_c_says_how_to_go_on(folder: Path) -> None:
    command = [*FEDLLM, "run", "one.toml", "--out", "out",
               "--set", "rounds=500", "--set", "evaluation.every=0"]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True,
        # a shell in the background lets its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.poll() is None and not list((folder / "out").glob("checkpoints/round-*")):
        time.sleep(0.01)
    for _ in range(4):  # Python drops a Ctrl-C that meets a finalizer
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=25)
            break
        except subprocess.TimeoutExpired:
            continue
    assert process.stderr is not None
    error = process.stderr.read()
    assert process.returncode == 130
    assert "--resume" in error
    assert "Traceback" not in error


def test_the_run_folder(tmp_path: Path) -> None:
    spec = experiment(GPT2, rounds=3)
    folder = tmp_path / "run"
    summary = federation.run(spec, 0, folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"experiment.toml", "ledger.jsonl", "log.txt", "checkpoints", "adapter",
                     "summary.json"}  # fmt: skip
    kept = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert kept == ["round-00002", "round-00003"]
    again = ex.load(folder / "experiment.toml")
    assert len(again.data.labels) == 24  # resolved
    assert again.training == spec.training
    assert json.loads((folder / "summary.json").read_text()) == summary
    rows = read(folder / "ledger.jsonl")
    work = [row for row in rows if row.step != "eval" and row.role != "measurement"]
    up = total(work, "wire_bytes", direction="up", client="client-2")
    assert summary["costs"]["client-2"]["bytes_up"] == up


def test_seconds_of_the_steps_sum_to_the_time_of_the_run(tmp_path: Path) -> None:
    import time

    spec = experiment(GPT2, rounds=2, rows=60)
    start = time.perf_counter()
    federation.run(spec, 0, tmp_path / "run")
    wall = time.perf_counter() - start
    counted = total(read(tmp_path / "run" / "ledger.jsonl"), "seconds")
    assert 0.02 * wall < counted < wall  # loading and counting operations take the rest


def test_a_killed_comparison_repeats_nothing_finished(tmp_path: Path) -> None:
    spec = experiment(GPT2, rounds=2, strategy={"kind": "parameters"})

    class StopInActivations(Silent):
        name = ""

        def begin(self, name: str, rounds: int, done: int) -> None:
            self.name = name

        def round(self, entry: Mapping[str, Any]) -> None:
            if "activations" in self.name:
                raise KeyboardInterrupt

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compare.run(spec, folder, listener=StopInActivations())
    done = (folder / "parameters" / "summary.json").stat().st_mtime_ns
    begun: list[tuple[str, int]] = []

    class Note(Silent):
        def begin(self, name: str, rounds: int, done: int) -> None:
            begun.append((name.split("-")[1], done))

    summary = compare.run(spec, folder, resume=True, listener=Note())
    assert begun[0] == ("activations", 1)
    assert {name for name, _ in begun} == {"activations", "centralized", "standalone"}
    assert (folder / "parameters" / "summary.json").stat().st_mtime_ns == done
    assert set(summary["parts"]) == {"parameters", "logits", "activations", "centralized",
                                     "standalone", "standalone-equal-steps"}  # fmt: skip
    equal = summary["parts"]["standalone-equal-steps"]["optimizer_steps"]
    assert equal["client-1"] == summary["parts"]["logits"]["optimizer_steps"]["client-1"]


def test_a_labelled_public_set_brings_its_own_bound(tmp_path: Path) -> None:
    spec = experiment(GPT2, public={"size": 12, "labelled": True},
                      compare={"strategies": ["logits"], "bounds": []})  # fmt: skip
    summary = compare.run(spec, tmp_path / "out")
    assert set(summary["parts"]) == {"logits", "public-only"}
    assert any("labels were used" in flag for flag in summary["parts"]["logits"]["flags"])


def test_several_seeds_give_mean_and_spread(tmp_path: Path) -> None:
    spec = experiment(GPT2, seeds=[0, 1], compare={"strategies": ["parameters"],
                                                   "bounds": ["centralized"]})  # fmt: skip
    summary = compare.run(spec, tmp_path / "out")
    singles = [
        json.loads((tmp_path / "out" / f"parameters-seed{seed}" / "summary.json").read_text())
        for seed in (0, 1)
    ]
    found = summary["parts"]["parameters"]["metrics"]["loss"]
    values = [single["metrics"]["loss"] for single in singles]
    assert found["mean"] == pytest.approx(sum(values) / 2)
    assert found["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    header, lines = tables.rows(summary)
    assert "±" in tables.markdown(header, lines)
    one = compare.seeds(spec, tmp_path / "seeds")
    assert one["parts"]["parameters"]["metrics"]["loss"] == found


def test_an_untrained_language_model_is_the_first_row(tmp_path: Path) -> None:
    spec = experiment(GPT2, "generation", training={"optimizer": "adam", "rate": 0.003},
                      compare={"strategies": ["parameters"], "bounds": []})  # fmt: skip
    summary = compare.run(spec, tmp_path / "out")
    before = summary["base"]["bits_per_byte"]
    assert summary["parts"]["parameters"]["metrics"]["bits_per_byte"]["mean"] < before
    assert tables.rows(summary)[1][0][0] == "before training"


# The command line -------------------------------------------------------------------------------


def test_from_init_to_export(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "init", "rows.csv", "--out", "mine.toml") == 0
    values = tomllib.loads((folder / "mine.toml").read_text())
    assert values["data"] == {"text": "text", "label": "intent", "max_tokens": 80}
    assert call(monkeypatch, "init", "rows.csv", "--out", "mine.toml") == 2
    small = ("--set", "rounds=1", "--set", "public.size=4")
    assert call(monkeypatch, "check", "mine.toml", *small) == 0
    assert "nothing wrong found" in capsys.readouterr().out
    assert not (folder / "runs").exists()
    assert call(monkeypatch, "run", "mine.toml", *small) == 0
    out = capsys.readouterr()
    assert "accuracy" in out.out
    assert "report: runs/mine/report.html" in out.out
    assert call(monkeypatch, "run", "mine.toml", *small, "--resume") == 0  # nothing left to do
    capsys.readouterr()
    assert call(monkeypatch, "predict", "runs/mine", "--text", "this is message number 7") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["label"].startswith("kind-")
    assert call(monkeypatch, "export", "runs/mine", "--out", "merged", "--merge") == 0
    assert (folder / "merged" / "model.safetensors").exists()
    assert call(monkeypatch, "export", "runs/mine", "--out", "copied") == 0
    assert (folder / "copied" / "adapter_config.json").exists()
    assert call(monkeypatch, "report", "runs/mine") == 0


@pytest.mark.parametrize(
    ("columns", "contract"),
    [
        ("prompt,response", {"prompt": "prompt", "response": "response"}),
        ("question,answer,label", {"prompt": "question", "response": "answer"}),
        ("id,story", {"text": "story"}),
    ],
)
def test_init_guesses_the_columns(
    columns: str, contract: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ",".join(f"a long enough text of {name}" if name != "id" else "1"
                   for name in columns.split(","))  # fmt: skip
    (folder / "own.csv").write_text(f"{columns}\n" + f"{row}\n" * 9)
    assert call(monkeypatch, "init", "own.csv", "--out", "own.toml") == 0
    values = tomllib.loads((folder / "own.toml").read_text())
    assert values["data"] == {**contract, "max_tokens": 80}
    assert values["task"]["kind"] == "generation"
    ex.load(folder / "own.toml")


def test_compare_on_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("compare", "one.toml", "--set", 'compare.bounds=["standalone"]')
    assert call(monkeypatch, *arguments, "--out", "out", "--set", "rounds=2") == 0
    out = capsys.readouterr()
    for word in ("parameters", "logits", "activations (sequential", "standalone", "in clear"):
        assert word in out.out
    page = (folder / "out" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http://www.w3.org", "")
    few = ("--set", 'compare.strategies=["parameters"]', "--out", "few")
    assert call(monkeypatch, *arguments, *few) == 0
    page = (folder / "few" / "report.html").read_text()
    assert page.count("<svg") == 2  # one round makes no curve


# Ledger -----------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out_and_others_are_refused(tmp_path: Path) -> None:
    from fedllm.errors import FedllmError

    path = tmp_path / "ledger.jsonl"
    ledger = Ledger()
    ledger.attach(path, 0)
    for number in (1, 2):
        ledger.add(Row("r", number, "a1", "client-1", "down", "parameter", wire_bytes=5))
        ledger.add(Row("r", number, "a1", "client-1", "down", "parameter", wire_bytes=6))
        ledger.commit()
    assert [row.wire_bytes for row in read(path)] == [11, 11]
    whole = path.read_text()
    path.write_text(whole + '{"run": "r", "rou')
    assert len(read(path)) == 2
    path.write_text('{"run": \n' + whole)
    with pytest.raises(FedllmError, match="line 1"):
        read(path)


def test_an_uncommitted_round_is_forgotten(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.add(Row("r", 1, "a1", "c", "down", wire_bytes=5))
    ledger.rollback()
    ledger.commit()
    assert ledger.rows == []
