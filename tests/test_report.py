"""Reports: what is on the page is what is in the files, and nothing unlike stands side by side."""

import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest

from fedllm import compare, federation
from fedllm import experiment as ex
from fedllm.errors import FedllmError
from fedllm.federation import Silent
from fedllm.ledger import Row, read, total
from fedllm.report import budget, drawing, joint, ledgers, page, plots, sheets, sinks, tables
from fedllm.report.gather import gather
from fedllm.report.watch import Watch
from fedllm.summary import summarize
from small import GPT2, experiment
from test_refusals import call

EVIL = "a<script>alert(1)</script>&\"'"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Notes:
    notes: tuple[str, ...] = ()


def made(
    folder: Path, values: list[float], seed: int = 0, faults: tuple[tuple[int, str, str], ...] = (),
    **sections: Any,
) -> Path:  # fmt: skip
    """A finished run's files without a run: accuracies by round, 1 MB up and 1 GFLOP a round."""
    spec = experiment(GPT2, rounds=len(values), seeds=[seed], **sections)
    folder.mkdir(parents=True)
    (folder / "experiment.toml").write_text(ex.dump(spec))
    rows = []
    for number in range(1, len(values) + 1):
        for client in ("client-1", "client-2"):
            facts = {"run": "r", "round": number, "client": client}
            rows += [
                Row(**facts, step="a3", direction="up", role="parameter", payload_bytes=400_000,
                    wire_bytes=400_000),
                Row(**facts, step="a3", direction="up", role="header", wire_bytes=100_000),
                Row(**facts, step="a2", direction="compute", flops=500_000_000, seconds=0.5,
                    optimizer_steps=2),
                Row(**facts, step="eval", direction="up", role="header", wire_bytes=999),
            ]  # fmt: skip
    rows += [Row("r", number, "a3", client, "up", failures=1, reason=why)
             for number, client, why in faults]  # fmt: skip
    lines = [json.dumps({f: getattr(row, f) for f in row.__slots__}) for row in rows]
    (folder / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    each = {c: {"accuracy": values[-1], "loss": 1.0, "units": 15} for c in ("client-1", "client-2")}
    history = [
        {"round": r, "loss": 1.0 / r, "clients": each, "mean": None,
         "global": {"accuracy": v, "loss": 1.0 - v, "units": 30, "macro_f1": v}}
        for r, v in enumerate(values, 1)
    ]  # fmt: skip
    summary = summarize(spec, seed, rows, history, Notes())
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real comparison of two strategies and a bound, with two seeds."""
    folder = tmp_path_factory.mktemp("report") / "compared"
    spec = experiment(
        GPT2, rounds=2, seeds=[0, 1], training={"rate": 0.1},
        compare={"strategies": ["parameters", "logits"], "bounds": ["standalone"]},
    ).replace(name=EVIL)  # fmt: skip
    compare.run(spec, folder)
    page.write(folder)
    return folder


# The page ---------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """Tables by the id of what is around them, links by the file that they save, texts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.files: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.tags: set[str] = set()
        self.urls: list[str] = []
        self._id = self._cell = ""
        self._text: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        self.tags.add(tag)
        self.urls += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if facts.get("download") and facts.get("href"):
            self.files[facts["download"] or ""] = unquote((facts["href"] or "").partition(",")[2])
        if facts.get("id") and tag in ("div", "section", "pre"):
            self._id = facts["id"] or ""
        if tag == "pre" and facts.get("id"):
            self._text = ""
        if tag == "tr":
            self.tables.setdefault(self._id, []).append([])
        if tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.tables[self._id][-1].append(self._cell)
        if tag == "pre" and self._text is not None:
            self.texts[self._id], self._text = self._text, None

    def handle_data(self, data: str) -> None:
        self._cell += data
        if self._text is not None:
            self._text += data


def cells(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def holds(text: str, folder: Path) -> None:
    """The page shows what the folder's files say."""
    stored = json.loads((folder / "summary.json").read_text())
    found = Parsed(text)
    header, lines = tables.rows(stored)
    assert found.tables["results"] == [header, *lines]
    assert json.loads(found.texts["summary"]) == stored
    for line in cells(found.files["results.csv"]):
        part = stored["parts"][line["run"]]
        for key in ("accuracy", "loss", "macro_f1"):
            assert float(line[key]) == part["metrics"][key]["mean"]
            assert float(line[f"{key}_sd"]) == part["metrics"][key]["sd"]
        for key in ("bytes_up", "bytes_down", "flops", "optimizer_steps"):
            assert float(line[key]) == part["per_client_round"][key]["mean"]
    points = {line["run"]: line for line in cells(found.files["trade-off.csv"])}
    for name, part in stored["parts"].items():
        costs = part["per_client_round"]
        if not part["same_as"]:
            moved = costs["bytes_up"]["mean"] + costs["bytes_down"]["mean"]
            assert float(points[name]["bytes_a_client_and_round"]) == moved
            assert float(points[name]["accuracy"]) == part["metrics"]["accuracy"]["mean"]
    rounds = cells(found.files["rounds.csv"])
    for name, part in stored["parts"].items():
        for seed, history in zip(stored["seeds"], part["history"], strict=True):
            for entry in [] if part["same_as"] else history:
                (row,) = [r for r in rounds if (r["run"], r["seed"], r["round"])
                          == (name, str(seed), str(entry["round"]))]  # fmt: skip
                assert float(row["eval_accuracy"]) == entry["metrics"]["accuracy"]
    header, *lines = found.tables["clients"]
    for line in lines:
        for name, shown in list(zip(header, line, strict=True))[1:]:
            each = [seed[line[0]]["accuracy"] for seed in stored["parts"][name]["clients"]]
            assert shown == f"{100 * sum(each) / len(each):.1f}"


def test_the_page_says_what_the_summary_says(compared: Path) -> None:
    text = (compared / "report.html").read_text()
    holds(text, compared)
    assert text.count("<svg") == 3  # curves, trade-off, roles


def test_the_page_needs_no_network_and_runs_nothing(compared: Path) -> None:
    text = (compared / "report.html").read_text()
    found = Parsed(text)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "base"}
    assert all(url.startswith(("data:text/", "#")) for url in found.urls)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "&lt;script&gt;" in text


def browser(page_: Path, scratch: Path, *more: str) -> tuple[str, str]:
    """What a headless Chromium makes of a page, and what it says meanwhile."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={scratch}", "--enable-logging=stderr", "--v=0", *more,
        page_.resolve().as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return ended.stdout, ended.stderr


@pytest.mark.browser
def test_the_page_in_a_browser(compared: Path, tmp_path: Path) -> None:
    text = (compared / "report.html").read_text()
    measure = (
        "<script>const e = document.documentElement; console.log('wide', e.scrollWidth,"
        " innerWidth, [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect())"
        ".every(r => r.width > 200 && r.height > 100))</script>"
    )
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</body>", f"{measure}</body>"))
    dom, said = browser(copy, tmp_path / "profile", "--dump-dom", "--window-size=500,900")
    holds(dom.replace(measure, ""), compared)
    lines = [line for line in said.splitlines() if "CONSOLE" in line]
    assert len(lines) == 1, lines  # the measure below, and no error
    wide, inner = map(int, re.findall(r"wide (\d+) (\d+) true", lines[0])[0])
    assert wide <= inner, "the page is wider than a narrow window"


def test_the_same_again(compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Parsed((compared / "report.html").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.toml").write_text(found.files["experiment.toml"])
    (command,) = found.texts["again"].splitlines()
    assert call(monkeypatch, *shlex.split(command)[1:], "--quiet") == 0
    first, again = (json.loads((f / "summary.json").read_text())
                    for f in (compared, tmp_path / "again"))  # fmt: skip
    for name, part in first["parts"].items():
        assert again["parts"][name]["metrics"] == part["metrics"]
        assert again["parts"][name]["clients"] == part["clients"]


def test_an_old_folder_with_a_summary_only(compared: Path, tmp_path: Path) -> None:
    shutil.copy(compared / "summary.json", tmp_path)
    text = page.write(tmp_path).read_text()
    stored = json.loads((compared / "summary.json").read_text())
    header, lines = tables.rows(stored)
    assert Parsed(text).tables["results"] == [header, *lines]
    assert "again" not in Parsed(text).texts


def test_bytes_by_role_are_those_of_the_ledger(compared: Path) -> None:
    found = gather([compared])
    for entry in found.entries:
        for run in entry.runs:
            rows = read(run.folder / "ledger.jsonl")
            costs = run.summary["costs"]
            for direction in ("up", "down"):
                mine = sum(b for (d, _), b in run.spent.roles.items() if d == direction)
                assert mine == sum(cost[f"bytes_{direction}"] for cost in costs.values())
                assert run.spent.until(2)[f"bytes_{direction}"] == mine
            flops = total(rows, "flops") - total(rows, "flops", step="eval")
            assert run.spent.until(2)["flops"] == flops
    shown = {(line[0], line[1], line[2]): line[3] for line in sheets.roles(found.entries).data}
    logits = next(e for e in found.entries if e.name == "logits")
    means = [run.spent.roles["up", "logit"] / 3 / 2 for run in logits.runs]
    assert shown["logits", "up", "logit"] == pytest.approx(sum(means) / 2)


def test_faults_are_who_when_why(tmp_path: Path) -> None:
    why = "no answer within 3 s <exchange.deadline>"
    made(tmp_path / "run", [0.1, 0.2, 0.3, 0.4],
         faults=((1, "client-2", why), (2, "client-2", why), (4, "client-2", why),
                 (4, "client-1", "memory")))  # fmt: skip
    text = page.write(tmp_path / "run").read_text()
    assert why not in text
    found = Parsed(text)
    assert found.tables["faults"][1:] == [
        ["parameters", "client-2", why, "1-2, 4", "a3", "3", "0"],
        ["parameters", "client-1", "memory", "4", "a3", "1", "0"],
    ]
    assert [line["round"] for line in cells(found.files["faults.csv"])] == ["1", "2", "4", "4"]


def test_many_clients_are_cut_on_the_page_and_whole_in_the_csv(tmp_path: Path) -> None:
    made(tmp_path / "run", [0.1])
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    stored["clients"] = {f"client-{n}": {"accuracy": n / 300} for n in range(1, 251)}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(stored))
    found = Parsed(page.write(tmp_path / "run").read_text())
    assert len(found.tables["clients"]) == 101
    assert found.tables["clients"][10][0] == "client-10"
    assert len(cells(found.files["clients.csv"])) == 250


@pytest.mark.parametrize("cell", ["=1+1", "@x", "+1", "-2+3"])
def test_a_csv_computes_nothing(cell: str) -> None:
    assert tables.as_csv(["a"], [[cell], [-1.5]]) == f"a\n'{cell}\n-1.5\n"


# Several folders --------------------------------------------------------------------------------


def test_seeds_of_several_folders_are_one_line(tmp_path: Path) -> None:
    folders = [made(tmp_path / f"s{seed}", [0.1, value], seed)
               for seed, value in ((0, 0.2), (1, 0.4))]  # fmt: skip
    found = gather(folders)
    (entry,) = found.entries
    assert entry.seeds == [0, 1] and entry.name == "parameters"
    assert entry.part["metrics"]["accuracy"]["mean"] == pytest.approx(0.3)
    assert plots.curves(found.summary, "accuracy")["parameters"][1] == pytest.approx(
        (2, 0.3, 0.1414213562)
    )
    twice = gather([folders[0], Path(shutil.copytree(folders[0], tmp_path / "copy"))])
    assert [entry.name for entry in twice.entries] == ["s0", "copy"]


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": {"label": "reply"}}, 'data differs, data.label: "intent" (a) / "reply" (b)'),
    "task": ({"data": {"max_tokens": 32}}, "data differs, data.max_tokens: 48 (a) / 32 (b)"),
    "split": ({"simulation": {"sizes": [8, 8, 8]}}, "data differs, simulation.sizes: [12, 8, 4]"),
    "public": ({"public": {"size": 6}}, "data differs, public.size: 12 (a) / 6 (b)"),
    "epochs": ({"training": {"epochs": 2}}, "budget differs, training.epochs: 1 (a) / 2 (b)"),
    "batch": ({"training": {"batch_size": 4}}, "budget differs, training.batch_size: 8 (a)"),
    "rounds": ({"values": [0.1, 0.2, 0.3]}, "budget differs, rounds: 2 (a) / 3 (b)"),
    "seed": ({"seed": 1, "tunables": {"rank": 4}}, "split differs, seeds: [0] (a) / [1] (b)"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_unlike_runs_share_no_table(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, said = DIFFERENT[case]
    changes = {"values": [0.1, 0.2], **changes}
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "a", [0.1, 0.2])
    made(tmp_path / "b", changes.pop("values"), **changes)
    assert call(monkeypatch, "report", "a", "b") == 2
    error = capsys.readouterr().err
    assert said in error and "--anyway" in error
    assert not (tmp_path / "report.html").exists()
    assert call(monkeypatch, "report", "a", "b", "--anyway") == 0
    text = (tmp_path / "report.html").read_text()
    assert "Not like for like" in text and said.partition(",")[0] in text


def test_other_held_out_rows_are_other_data(tmp_path: Path) -> None:
    folders = [made(tmp_path / name, [0.1], tunables={"rank": rank})
               for name, rank in (("a", 2), ("b", 4))]  # fmt: skip
    assert joint.refuse(gather(folders)) == []
    stored = json.loads((folders[1] / "summary.json").read_text())
    stored["metrics"]["units"] = 31
    (folders[1] / "summary.json").write_text(json.dumps(stored))
    with pytest.raises(FedllmError, match=r"held-out rows of the evaluation: 30.* 31"):
        joint.refuse(gather(folders))


def test_other_sites_are_another_split(tmp_path: Path) -> None:
    """No setting says which rows lie at sites; their names and counts do."""
    folders = [made(tmp_path / name, [0.1], tunables={"rank": rank})
               for name, rank in (("a", 2), ("b", 4))]  # fmt: skip
    for name in ("summary.json", "ledger.jsonl"):
        path = folders[1] / name
        path.write_text(path.read_text().replace("client-1", "hospital"))
    with pytest.raises(FedllmError, match=r"split differs, clients .*client-1.*hospital"):
        joint.refuse(gather(folders))


def test_no_run_vanishes_behind_anothers_name(tmp_path: Path) -> None:
    folders = [
        made(tmp_path / f"lr{sign}seed{seed}", [0.1, rank / 10], seed, tunables={"rank": rank})
        for sign, rank in (("-", 8), ("_", 4)) for seed in (0, 1)
    ]  # fmt: skip
    found = gather([*folders, made(tmp_path / "lr", [0.5, 0.6], tunables={"rank": 2})])
    names = [entry.name for entry in found.entries]
    assert len(set(names)) == 3 and len(found.summary["parts"]) == 3
    ranks = {entry.name: entry.settings["tunables.rank"] for entry in found.entries}
    rounds = plots.curves(found.summary, "accuracy")
    assert all(rounds[name][1][1] == pytest.approx(
        {8: 0.8, 4: 0.4, 2: 0.6}[ranks[name]]) for name in names)  # fmt: skip


def test_values_that_differ_late_are_not_taken_for_equal(tmp_path: Path) -> None:
    deep = "/data/" + "x" * 70
    folders = [made(tmp_path / end, [0.1], public={"source": f"{deep}/{end}.csv"})
               for end in "ab"]  # fmt: skip
    found = gather(folders)
    _, short, whole = joint.settings(found.entries)
    (line,) = [line for line in short if line[0] == "public.source"]
    assert line[1] != line[2] and all(len(text) <= joint.LONGEST for text in line)
    assert ["public.source", f'"{deep}/a.csv"', f'"{deep}/b.csv"'] in whole
    with pytest.raises(FedllmError, match=r"a\.csv\S* \(a\) / \S*b\.csv"):
        joint.refuse(found)


def test_steps_found_out_for_each_seed_keep_no_seeds_apart(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        strategy = {"kind": "standalone", "steps": [3 + seed, 4]}
        folder = made(tmp_path / f"s{seed}", [0.1], seed, strategy=strategy)
        summary = json.loads((folder / "summary.json").read_text())
        summary["variant"] = "standalone-equal-steps"
        (folder / "summary.json").write_text(json.dumps(summary))
        folders.append(folder)
    assert [entry.seeds for entry in gather(folders).entries] == [[0, 1]]


@pytest.mark.parametrize("text", ["{}", "[]", "[1, 2]", '{"strategy": "x"}', "{"])
def test_what_is_no_summary_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text(text)
    assert call(monkeypatch, "report", str(tmp_path)) == 2
    assert "summary.json" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_experiment_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", [0.1])
    (folder / "experiment.toml").write_text("rounds = = 3")
    with pytest.raises(FedllmError, match=r"experiment.toml: not valid TOML"):
        gather([folder])


def test_a_key_that_came_later_has_its_default(tmp_path: Path) -> None:
    old, new = made(tmp_path / "old", [0.1]), made(tmp_path / "new", [0.1], tunables={"rank": 3})
    path = old / "experiment.toml"
    lines = [line for line in path.read_text().splitlines() if "test_fraction" not in line]
    path.write_text("\n".join(lines))
    assert joint.refuse(gather([old, new])) == []


def test_names_mean_nothing_to_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path / "r[bold]x", [0.1])
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "name": "a [/b]"}))
    tables.show(gather([folder]).summary)
    assert "a [/b]" in capsys.readouterr().out
    assert call(monkeypatch, "report", str(folder), "--budget", "bytes=9MB") == 0


def test_another_task_is_refused_always(tmp_path: Path) -> None:
    a, b = (made(tmp_path / name, [0.1]) for name in "ab")
    stored = json.loads((b / "summary.json").read_text())
    (b / "summary.json").write_text(json.dumps({**stored, "task": "generation"}))
    with pytest.raises(FedllmError, match=r"task.kind differs: classification .*generation"):
        gather([a, b])


def test_what_is_not_known_is_not_alike(compared: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    shutil.copy(compared / "summary.json", tmp_path / "old")
    found = gather([compared, tmp_path / "old"])
    with pytest.raises(FedllmError, match=r"unknown: no experiment.toml and ledger of old/param"):
        joint.refuse(found)


def test_a_stray_folder_is_in_no_report(compared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "whole"))
    (folder / "stray").mkdir()
    (folder / "stray" / "ledger.jsonl").write_text("{}\n")
    assert gather([folder]).summary == gather([compared]).summary


def test_what_may_differ_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for rank in (2, 16):
        made(tmp_path / f"rank{rank}", [0.1, rank / 20], tunables={"rank": rank})
    assert call(monkeypatch, "report", "rank2", "rank16", "--out", "both.html") == 0
    found = Parsed((tmp_path / "both.html").read_text())
    assert found.tables["settings"] == [
        ["setting", "rank2", "rank16"], ["tunables.rank", "2", "16"],
    ]  # fmt: skip
    assert [line[0] for line in found.tables["results"]] == ["run", "rank2", "rank16"]
    assert found.texts["again"].splitlines() == [
        "fedllm run 1-rank2.toml --out again-1", "fedllm run 2-rank16.toml --out again-2",
    ]  # fmt: skip
    assert "1-rank2.toml" in found.files


def test_a_sweep_says_what_each_point_sets(tmp_path: Path) -> None:
    folder = tmp_path / "swept"
    summaries: dict[str, Any] = {}
    for rank in (2, 4):
        inner = made(folder / f"rank={rank}" / "seed-0", [0.1, 0.2], tunables={"rank": rank})
        one = json.loads((inner / "summary.json").read_text())
        settings = {"tunables.rank": rank}
        summaries[f"rank={rank}"] = {**compare.combine([one]), "settings": settings}
    whole = {"name": "x", "kind": "compare", "task": "classification", "model": "builtin",
             "tunables": "lora", "seeds": [0], "rounds": 2, "parts": summaries,
             "base": None}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(whole))
    (folder / "experiment.toml").write_text((inner / "experiment.toml").read_text())
    found = Parsed(page.write(folder).read_text())
    assert found.texts["again"] == "fedllm sweep experiment.toml --out again"
    assert found.tables["settings"][1] == ["tunables.rank", "2", "4"]


# Budgets and targets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cost", "limit"),
    [
        ("bytes=10MB", "bytes", 1e7), ("bytes=2KiB", "bytes", 2048), ("up=3kB", "up", 3e3),
        ("bytes_down=1e6", "down", 1e6), ("down=1.5GiB", "down", 1.5 * 2**30),
        ("time=2min", "seconds", 120), ("seconds=1.5", "seconds", 1.5), ("flops=2T", "flops", 2e12),
        ("client-flops=3GFLOPs", "client-flops", 3e9), ("steps=500", "steps", 500),
        ("rounds = 3", "rounds", 3),
    ],
)  # fmt: skip
def test_budgets_are_read(text: str, cost: str, limit: float) -> None:
    found = budget.budget(text)
    assert (found.cost, found.limit) == (cost, pytest.approx(limit))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bytes", "bytes=10MB"), ("bites=1MB", "did you mean 'bytes'"), ("bytes=1X", "'1X'"),
        ("bytes=-1MB", "'-1MB'"), ("bytes=0", "'0'"), ("bytes=1.2.3MB", "1.2.3MB"),
        ("bytes=1iB", "1iB"), ("rounds=3MB", "3MB"), ("time=1e999", "1e999"),
        ("flops=", "expected"),
    ],
)  # fmt: skip
def test_budgets_are_refused(text: str, said: str) -> None:
    with pytest.raises(FedllmError, match=re.escape(said)):
        budget.budget(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [("accuracy", "accuracy=0.8"), ("acuracy=1", "did you mean 'accuracy'"),
     ("accuracy=80", "80% is a percentage"), ("loss=low", "'low'")],
)  # fmt: skip
def test_targets_are_refused(text: str, said: str) -> None:
    with pytest.raises(FedllmError, match=re.escape(said)):
        budget.target(text)


def test_two_budgets_of_one_cost_are_two_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "a", [0.2, float("nan"), 0.6])
    options = ["--budget", "bytes=3MB", "--budget", "bytes=5MB", "--target", "accuracy=0.1"]
    out = tmp_path / "a.json"
    assert call(monkeypatch, "report", str(folder), *options, "--format", "json",
                "--out", str(out)) == 0  # fmt: skip

    def never(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    found = json.loads(out.read_text(), parse_constant=never)
    assert {"budget-bytes-3MB", "budget-bytes-5MB", "target-accuracy-0.1"} <= set(found["tables"])
    assert found["rounds"][1]["eval_accuracy"] is None


def test_a_report_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "_a", [0.2])
    (tmp_path / "out").mkdir()
    assert call(monkeypatch, "report", str(folder), "--out", str(tmp_path / "out")) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"_a", "out"}


def test_the_best_within_a_budget(tmp_path: Path) -> None:
    (entry,) = gather([made(tmp_path / "run", [0.2, 0.6, 0.5, 0.9])]).entries
    (run,) = entry.runs
    # 1 MB, 1 GFLOP, 1 s and 4 steps a round, evaluation left out
    for text, round_ in (("bytes=3MB", 2), ("bytes=2MB", 2), ("bytes=1.9MB", 1), ("bytes=1GB", 4),
                         ("time=1s", 1), ("flops=4G", 4), ("steps=11", 2), ("rounds=3", 2),
                         ("up=1MB", 1), ("down=1B", 4)):  # fmt: skip
        found = budget.best(run, budget.budget(text), "accuracy")
        assert found is not None and found.round == round_, text
    assert budget.best(run, budget.budget("bytes=999kB"), "accuracy") is None
    lower = budget.best(run, budget.budget("rounds=3"), "loss")
    assert lower is not None and lower.round == 2


def test_the_cost_of_a_target(tmp_path: Path) -> None:
    (entry,) = gather([made(tmp_path / "run", [0.2, 0.6, 0.5, 0.9])]).entries
    (run,) = entry.runs
    found = budget.reach(run, budget.target("accuracy=60%"))
    assert found is not None and found.round == 2
    assert budget.cost_of(found, "bytes") == 2_000_000
    assert budget.cost_of(found, "flops") == 2e9
    lower = budget.reach(run, budget.target("loss=0.1"))
    assert lower is not None and lower.round == 4
    assert budget.reach(run, budget.target("accuracy=0.95")) is None


def test_protocols_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, value in ((0, 0.6), (1, 0.8)):
        made(tmp_path / f"a{seed}", [0.2, value], seed)
        made(tmp_path / f"b{seed}", [0.1, 0.7 - seed / 2], seed, strategy={"kind": "logits"})
    asked = ("--budget", "bytes=2MB", "--budget", "time=0.5s", "--target", "accuracy=0.65")
    assert call(monkeypatch, "report", "a0", "a1", "b0", "b1", *asked) == 0
    out = capsys.readouterr().out
    assert "Best accuracy under bytes=2MB" in out
    found = Parsed((tmp_path / "report.html").read_text())
    assert found.tables["budget-bytes-2MB"][1:] == [
        ["parameters", "70.0 ± 14.1", "2", "2.00 MB", "2 of 2"],
        ["logits", "45.0 ± 35.4", "2", "2.00 MB", "2 of 2"],
    ]
    none = ["parameters", "none", "", "at least 1.0", "0 of 2"]
    assert found.tables["budget-seconds-0.5s"][1] == none
    assert found.tables["target-accuracy-0.65"][1][:3] == ["parameters", "1 of 2", "2"]
    line = cells(found.files["target-accuracy-0.65.csv"])[1]
    assert (line["seed"], line["bytes_up"], line["accuracy"]) == ("1", "2000000", "0.8")
    assert call(monkeypatch, "report", "a0", "--target", "rouge_l=0.5") == 2
    assert "no run here measured it" in capsys.readouterr().err


# Formats ----------------------------------------------------------------------------------------


def test_the_other_formats(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    stored = json.loads((compared / "summary.json").read_text())
    for kind in ("md", "csv", "json", "png"):
        arguments = ("report", str(compared), "--format", kind, "--out", f"r.{kind}")
        assert call(monkeypatch, *arguments, "--budget", "rounds=1") == 0
    text = Path("r.md").read_text()
    header, lines = tables.rows(stored)
    assert tables.markdown(header, lines).splitlines()[2] in text
    assert "Best accuracy under rounds=1" in text and "<script" not in text.partition("```")[0]
    everything = json.loads(Path("r.json").read_text())
    assert everything["summary"] == stored
    assert everything["tables"]["budget-rounds-1"]["columns"][:3] == ["run", "seed", "round"]
    rows = cells(Path("r.csv").read_text())
    assert len(rows) == len(everything["rounds"]) >= 2 * 2 * 3
    assert Path("r.png").read_bytes()[:4] == b"\x89PNG"


def test_where_reports_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "a", [0.1, 0.2])
    assert call(monkeypatch, "report", "a") == 0
    assert "report: a/report.html" in capsys.readouterr().out
    assert call(monkeypatch, "report", "a", "--format", "md") == 0
    assert (tmp_path / "a" / "report.md").exists()
    for arguments, said in (
        (["nowhere"], "nowhere: no finished run here"), (["a", "a"], "named twice"),
        (["a", "--format", "pdf"], "--format pdf: unknown"), (["a", "--to", "x"], "--to x"),
        (["a", "--out", "no/such/folder.html"], "cannot be written"),
    ):  # fmt: skip
        assert call(monkeypatch, "report", *arguments) == 2
        assert said in capsys.readouterr().err


# Live -------------------------------------------------------------------------------------------


class Between(Silent):
    """Looks after each committed round."""

    def __init__(self, look: Callable[[], object]) -> None:
        self.look = look

    def round(self, entry: Mapping[str, Any]) -> None:
        self.look()


def test_a_page_is_drawn_again_at_every_round(tmp_path: Path) -> None:
    folder, said, drawn = tmp_path / "run", [], []
    watching = Watch(
        [folder], lambda found: drawn.append(page.render(found, live=not found.complete)),
        said.append,
    )  # fmt: skip
    assert not watching.look()  # nothing there yet
    complete: list[bool] = []
    spec = experiment(GPT2, rounds=3, evaluation={"every": 2})
    federation.run(spec, 0, folder, listener=Between(lambda: complete.append(watching.look())))
    assert complete == [False] * 3
    assert watching.look()
    assert [re.sub(r"%\) [\d.]+$", "%) N", line) for line in said] == [
        "parameters, seed 0: round 1 of 3",
        "parameters, seed 0: round 2 of 3, accuracy (%) N",
        "parameters, seed 0: round 3 of 3, accuracy (%) N",
    ]
    assert len(drawn) == 4
    assert "unfinished: 2 of 3 rounds" in drawn[1] and "http-equiv" in drawn[1]
    assert "unfinished" not in drawn[3] and "http-equiv" not in drawn[3]
    assert drawn[3] == page.write(folder).read_text()


def test_what_still_runs_may_have_fewer_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    for seed in (0, 1):
        made(whole / f"seed-{seed}", [0.1, 0.2], seed)
    made(begun / "seed-0", [0.1, 0.2], tunables={"rank": 4})
    one = [compare.read(whole / f"seed-{seed}") for seed in (0, 1)]
    spec = ex.load(whole / "seed-0" / "experiment.toml").replace(seeds=(0, 1))
    (whole / "summary.json").write_text(json.dumps(compare.joined(spec, {"parameters": one})))
    asked = drawing.asked([whole, begun], tmp_path / "both.html", "html", [], [], False)
    found = gather([whole, begun], unfinished=True)
    assert not found.complete
    assert "split differs, seeds" in asked.draw(found, live=True).read_text()
    with pytest.raises(FedllmError, match="split differs, seeds"):
        asked.draw(replace(found, complete=True))


def test_watching_a_comparison(tmp_path: Path) -> None:
    folder, drawn = tmp_path / "run", []
    watching = Watch([folder], lambda found: drawn.append(found), lambda _: None)
    spec = experiment(GPT2, rounds=1, compare={"strategies": ["parameters", "logits"],
                                               "bounds": []})  # fmt: skip
    compare.run(spec, folder, listener=Between(watching.look))
    assert [len(found.entries) for found in drawn] == [1, 2]
    assert watching.look() and drawn[-1].complete
    assert drawn[-1].summary == compare.read(folder)


def test_watching_ends_with_the_run_or_with_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "a", [0.1, 0.2])
    assert call(monkeypatch, "report", "--watch", "a") == 0
    out = capsys.readouterr().out
    assert "parameters, seed 0: round 2 of 2, accuracy (%) 20.0" in out

    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", pressed)
    assert call(monkeypatch, "report", "--watch", "later") == 2
    said = capsys.readouterr()
    assert "waiting for later" in said.out and "stopped watching" in said.out
    assert "no committed round" in said.err


# Sinks ------------------------------------------------------------------------------------------


class Writer:
    """Stands for torch's SummaryWriter."""

    kept: ClassVar[dict[str, list[tuple[str, float, int]]]] = {}

    def __init__(self, folder: str, purge_step: int) -> None:
        self.mine = self.kept.setdefault(Path(folder).name, [])

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.mine.append((key, value, step))

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Client:
    """Stands for MLflow's client."""

    kept: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, uri: str) -> None:
        self.kept.append(("uri", uri))

    def get_experiment_by_name(self, name: str) -> None: ...

    def create_experiment(self, name: str) -> str:
        return name

    def create_run(self, number: str, run_name: str, tags: dict[str, str]) -> Any:
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_name))

    def log_param(self, run: str, key: str, value: str) -> None:
        self.kept.append((run, key, value))

    def log_metric(self, run: str, key: str, value: float, step: int) -> None:
        self.kept.append((run, key, value, step))

    def set_terminated(self, run: str) -> None:
        self.kept.append(("end", run))


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stands for both packages."""
    fakes = {"tensorboard": {}, "torch.utils.tensorboard": {"SummaryWriter": Writer},
             "mlflow": {}, "mlflow.tracking": {"MlflowClient": Client},
             "mlflow.exceptions": {"MlflowException": OSError}}  # fmt: skip
    for name, content in fakes.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    Writer.kept, Client.kept = {}, []
    yield


def test_rows_go_to_sinks(
    packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "a", [0.1, 0.2])
    assert call(monkeypatch, "report", "a", "--to", "tensorboard", "--to", "mlflow=mine") == 0
    written = Writer.kept["parameters-seed0"]
    assert ("eval_accuracy", 0.2, 2) in written and ("bytes_up", 2e6, 2) in written
    assert Client.kept[0] == ("uri", "mine")
    assert ("parameters-seed0", "tunables.rank", "2") in Client.kept
    assert ("parameters-seed0", "eval_accuracy", 0.1, 1) in Client.kept
    assert Client.kept[-1] == ("end", "parameters-seed0")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space\nleft")

    monkeypatch.setattr(Client, "log_metric", full)
    assert call(monkeypatch, "report", "a", "--to", "mlflow=mine") == 2
    assert "error: --to mlflow=mine: no space\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_sink_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.exceptions", None)
    with pytest.raises(FedllmError, match=rf"pip install 'fedllm\[{name}\]'"):
        sinks.sink(name, tmp_path)


def test_a_ledger_that_is_not_there_costs_nothing(tmp_path: Path) -> None:
    assert ledgers.read(tmp_path / "ledger.jsonl").rounds == {}
