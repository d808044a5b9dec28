"""The pages say what is so: examples run, files parse, commands and links exist."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedllm import experiment as ex
from fedllm.cli import app
from fedllm.errors import FedllmError

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for page in [*ROOT.glob("docs/*.md"), *(ROOT / f"{name}.md" for name in
                 ("README", "CONTRIBUTING", "CHANGELOG"))]
    if page.exists()
)  # fmt: skip
TARGETS = {"demo", "test", "lint", "bench", "study", "paper", "knowledge", "unequal",
           "messages", "results"}  # fmt: skip
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line before the first, text) of every fenced block in this language."""
    text = page.read_text()
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(2)].count("\n"), match[2]) for match in found]


def shell_lines(page: Path) -> list[str]:
    text = "\n".join(block for language in ("sh", "bash", "console", "shell")
                     for _, block in blocks(page, language))  # fmt: skip
    lines = text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").strip() for line in lines if line.strip()]


@pytest.fixture
def tables() -> Iterator[None]:
    """Put back what an example adds to the tables of names."""
    from fedllm.aggregation import RULES
    from fedllm.codecs import CODECS

    before = [(table, dict(table)) for table in (RULES, CODECS)]
    yield
    for table, content in before:
        table.clear()
        table.update(content)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: None
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "__main__"}
    for line, block in blocks(page, "python"):
        exec(compile("\n" * line + block, str(page), "exec", dont_inherit=True), space)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "toml")], ids=name_of)
def test_toml_blocks_are_experiments(page: Path, tmp_path: Path) -> None:
    for line, block in blocks(page, "toml"):
        if block.startswith("# site.toml"):
            (tmp_path / "site.toml").write_text(block)
            ex.load_site(tmp_path / "site.toml")
            continue
        ex.parse(tomllib.loads(block), f"{page.name}:{line + 1}", tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"`fedllm\s+([a-z]+)", text)
    targets = re.findall(r"`make\s+([a-z]+)[^`]*`", text)
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            targets += words[1:2]
        if words[:1] == ["fedllm"] and not words[1].startswith("-"):
            named.append(words[1])
            assert words[1] in COMMANDS, line
            command = COMMANDS[words[1]]
            if hasattr(command, "commands"):
                assert words[2] in command.commands, line
                command = command.commands[words[2]]
            known = {o for p in command.params for o in p.opts} | {"--help"}
            options = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert options <= known, line
    assert set(named) <= set(COMMANDS)
    assert set(targets) <= TARGETS
    makefile = ROOT / "Makefile"
    if makefile.exists():
        assert set(targets) <= set(re.findall(r"^([a-z]+):", makefile.read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_source_files_named_exist(page: Path) -> None:
    named = r"`((?:src|scripts|docs|tests|experiments)/[\w./-]+)`"
    for path in re.findall(named, page.read_text()):
        assert (ROOT / path).exists(), path


def test_reference_is_what_the_script_makes() -> None:
    path = ROOT / "scripts" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run scripts/make_reference.py"


def test_first_commands_on_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("data.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["message", "topic"])
        for number in range(24):
            rows.writerow([f"where is parcel number {number}", ("billing", "delivery")[number % 2]])
    lines = [line for line in shell_lines(ROOT / "docs" / "own-data.md") if "fedllm" in line]
    assert len(lines) == 2
    for line in ["fedllm --help", *lines]:
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, (line, result.output, result.exception)
    assert 'label = "topic"' in Path("fedllm.toml").read_text()


SHAPES = {
    "GPT-2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16},
    "Llama": {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8,
              "intermediate_size": 8, "num_attention_heads": 2, "max_position_embeddings": 16,
              "tie_word_embeddings": False},
    "BERT": {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 8,
             "intermediate_size": 8, "num_attention_heads": 2, "max_position_embeddings": 16},
}  # fmt: skip


def support() -> list[tuple[dict[str, str], dict[str, str]]]:
    """Rows of the two tables of tunables: without and with a cut, in the same order."""
    found: list[list[dict[str, str]]] = []
    header: list[str] = []
    for line in (ROOT / "docs" / "own-model.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == ["tunables", "task"]:
            header = cells
            found.append([])
        elif not line.startswith("|"):
            header = []
        elif header and not cells[0].startswith("---"):
            found[-1].append(dict(zip(header, cells, strict=True)))
    whole, cut = found
    return list(zip(whole, cut, strict=True))


@pytest.mark.parametrize("kind", SHAPES)
def test_table_of_tunables(kind: str, tmp_path: Path) -> None:
    from fedllm.models.loading import load
    from fedllm.strategies.activations import check_cut

    (tmp_path / "config.json").write_text(json.dumps({**SHAPES[kind], "vocab_size": 10}))
    pairs = support()
    assert len(pairs) == 14
    for whole, cut in pairs:
        spec = ex.parse(
            {
                "model": {"name": str(tmp_path), "weights": "random"},
                "tunables": {"kind": whole["tunables"]},
                "task": {"kind": whole["task"]},
            },
            "table", tmp_path,
        )  # fmt: skip
        loads = cuts = True
        try:
            model = load(spec.model, spec.task, spec.tunables, 2, 0)
        except FedllmError:
            loads = cuts = False
        else:
            try:
                check_cut(ex.Activations(), model)
            except FedllmError:
                cuts = False
        assert whole[kind].startswith("yes") == loads, (whole, kind)
        assert (whole["tunables"], whole["task"]) == (cut["tunables"], cut["task"])
        assert cut[kind].startswith("yes") == cuts, (cut, kind)
