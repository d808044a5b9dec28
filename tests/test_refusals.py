"""Bad input: exit code 2, what was wrong and what is valid, no traceback, nothing half-written."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.cli import main
from shared import needs_shared
from small import BERT

BASE = """
rounds = 1
[data]
text = "text"
label = "intent"
[public]
size = 6
[training]
batch_size = 8
[simulation]
source = "rows.csv"
clients = 2
"""


def write_rows(path: Path, count: int = 24) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "intent"])
        writer.writerows([f"this is message number {i}", f"kind-{i % 3}"] for i in range(count))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_rows(tmp_path / "rows.csv")
    (tmp_path / "one.toml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedllm", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


CASES = {
    "unknown key": (["trainig.rate=0.1"], ["trainig", "did you mean 'training'"]),
    "unknown key inside": (["training.rat=0.1"], ["training.rat", "did you mean 'rate'"]),
    "wrong type": (["training.rate=fast"], ["training.rate", "fast", "valid number"]),
    "out of range": (["rounds=0"], ["rounds", "0"]),
    "unknown choice": (["training.optimizer=adma"], ["training.optimizer", "adma", "'adam'"]),
    "unknown strategy": (["strategy.kind=logit"], ["strategy.kind", "did you mean 'logits'"]),
    "missing column": (["data.text=txt"], ["no column 'txt'", "did you mean 'text'"]),
    "label only in the test set": (["simulation.test=test.csv"], ["'kind-9'", "test rows"]),
    "unlisted label": (['data.labels=["kind-0","kind-1"]'], ["'kind-2'", "data.labels"]),
    "more clients than examples": (["simulation.clients=50"], ["simulation.clients", "18"]),
    "public set larger than the data": (["public.size=24"], ["public.size = 24", "24 rows"]),
    "no public set": (["strategy.kind=logits", "public.size=0"], ["public.size"]),
    "cut outside the model": (
        ["strategy.kind=activations", "strategy.cut=4"], ["strategy.cut = 4", "1 to 3"]),
    "targets that match nothing": (
        ['tunables.targets=["c_atn"]'], ["c_atn", "did you mean 'c_attn'"]),
    "a device that is not there": (
        ["model.device=cuda:99"], ["model.device = 'cuda:99'", "expected 'auto', 'cpu'"]),
    "no device at all": (["model.device=gpu"], ["model.device", "gpu"]),
    "adapters on a base in 4 bits": (
        ["model.quantization=nf4", "tunables.kind=adapter"], ["model.quantization", "'lora'"]),
    "a layer that is not there": (
        ["tunables.layers=[4]"], ["tunables.layers = [4]", "expected 0 to 3"]),
    "prefix under activations": (
        ["strategy.kind=activations", "tunables.kind=prefix"], ["prefix", "'lora'"]),
    "full, tied, under activations": (
        ["strategy.kind=activations", "tunables.kind=full", "task.kind=generation"],
        ["'full'", "'lora'"]),
    "personal head at the server": (
        ["strategy.kind=activations", "tunables.head=personal"], ["strategy.labels = 'client'"]),
    "head of a language model": (
        ["task.kind=generation", "tunables.head=frozen"], ["tunables.head"]),
    "chat template of a tokenizer without": (
        ["task.kind=generation", "task.chat_template=true", "data.prompt=text",
         "data.response=intent"], ["chat template"]),
    "too many tokens": (["data.max_tokens=5000"], ["data.max_tokens = 5000", "128"]),
    "no such folder": (["model.name=/no/such/model"], ["model.name", "/no/such/model"]),
    "no such rows": (["simulation.source=/no/rows.csv"], ["/no/rows.csv", "no such file"]),
    "unknown variable": (["simulation.source=${NO_SUCH_PLACE}/x.csv"], ["NO_SUCH_PLACE"]),
    "sizes": (["simulation.sizes=[1,2,3]"], ["simulation.sizes", "3 sizes for 2"]),
    "steps": (
        ["strategy.kind=standalone", "strategy.steps=[1]"], ["strategy.steps", "2 clients"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_a_bad_setting_is_refused(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, expected = CASES[case]
    with (folder / "test.csv").open("w") as file:
        file.write("text,intent\nhello out there,kind-0\nhello again,kind-9\n")
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert call(monkeypatch, "run", "one.toml", "--quiet", "--out", "out", *arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for words in expected:
        assert words in error
    assert not (folder / "out").exists()


@needs_shared
@pytest.mark.parametrize(
    ("settings", "expected"),
    [(["tunables.kind=prefix"], "encoders"), (["task.kind=generation"], "encoder")],
)
def test_what_an_encoder_cannot_do(
    settings: list[str], expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = [p for s in [f"model.name={BERT}", *settings] for p in ("--set", s)]
    assert call(monkeypatch, "run", "one.toml", "--quiet", "--out", "out", *arguments) == 2
    assert expected in capsys.readouterr().err


@needs_shared
def test_biases_that_are_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from small import LLAMA

    arguments = ["--set", f"model.name={LLAMA}", "--set", "tunables.kind=bitfit"]
    assert call(monkeypatch, "run", "one.toml", "--quiet", "--out", "out", *arguments) == 2
    assert "no biases" in capsys.readouterr().err


def test_a_hub_name_without_a_network(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedllm.cli", "run", "one.toml", "--quiet", "--out", "out",
         "--set", "model.name=nobody/no-such-model"],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "nobody/no-such-model" in done.stderr
    assert "folder's path" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", ["run", "compare"])
def test_an_unwritable_run_folder(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").write_text("")  # root may write anywhere, but not below a file
    assert call(monkeypatch, command, "one.toml", "--quiet", "--out", "file/out") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_used_folder_is_not_overwritten(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("precious")
    assert call(monkeypatch, "run", "one.toml", "--quiet", "--out", "out") == 2
    assert "--resume" in capsys.readouterr().err
    assert (folder / "out" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("damage", ["flip", "cut", "json", "gone"])
def test_a_torn_checkpoint_costs_a_round(
    damage: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last good one is gone back to, and said so; without one the run is refused."""
    arguments = ("run", "one.toml", "--quiet", "--out", "out", "--set", "rounds=2")
    assert call(monkeypatch, *arguments) == 0
    adapter = (folder / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
    (folder / "out" / "summary.json").unlink()  # as if it had been killed before the end
    for number in (2, 1):
        harm(sorted((folder / "out" / "checkpoints").glob("round-*"))[number - 1], damage)
        capsys.readouterr()
        code = call(monkeypatch, *arguments, "--resume")
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert "round-00002" in error or "round-00002" in (folder / "out" / "log.txt").read_text()
        if number == 2:
            assert code == 0
            assert "going on from round-00001" in (folder / "out" / "log.txt").read_text()
            again = (folder / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
            assert again == adapter
            (folder / "out" / "summary.json").unlink()
            harm(sorted((folder / "out" / "checkpoints").glob("round-*"))[1], damage)
        else:
            assert code == 2
            assert "none before it is whole" in error


def harm(newest: Path, damage: str) -> None:
    weights = newest / "server.safetensors"
    data = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "json":
        (newest / "state.json").write_text('{"round": ')
    else:
        weights.unlink()


def test_another_experiment_is_not_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("run", "one.toml", "--quiet", "--out", "out")
    assert call(monkeypatch, *arguments) == 0
    assert call(monkeypatch, *arguments, "--resume", "--set", "training.rate=0.5") == 2
    assert "another experiment" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [("rounds = ", "not valid TOML"), ("", ""), (None, "cannot be read")],
)
def test_a_bad_file(
    content: str | None, expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if content is not None:
        (folder / "bad.toml").write_text(content)
    code = call(monkeypatch, "check", "bad.toml", "--set", "data.label=none")
    assert code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "report", "export"])
def test_no_run_there(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"predict": ["--text", "x"], "report": [], "export": ["--out", "exported"]}[command]
    assert call(monkeypatch, command, "nothing", *more) == 2
    assert "nothing" in capsys.readouterr().err


def test_a_diverging_loss_is_named_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--set", "training.rate=1e30", "--set", "training.optimizer=sgd",
                 "--set", "training.epochs=3"]  # fmt: skip
    assert call(monkeypatch, "run", "one.toml", "--quiet", "--out", "out", *arguments) == 2
    error = capsys.readouterr().err
    assert "training.rate" in error or "NaN" in error
    assert "client-1" in error
    assert not (folder / "out").exists()


def test_rows_that_are_no_csv(folder: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (folder / "rows.jsonl").write_text('{"text": "a", "intent": \n')
    arguments = ("run", "one.toml", "--quiet", "--out", "out")
    assert call(monkeypatch, *arguments, "--set", "simulation.source=rows.jsonl") == 2
    error = capsys.readouterr().err
    assert "rows.jsonl" in error
    assert "Traceback" not in error
