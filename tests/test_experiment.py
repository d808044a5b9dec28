import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedllm
from fedllm import experiment as ex
from fedllm import federation, sweep
from fedllm.errors import FedllmError
from shared import ROOT, needs_shared

SHIPPED = sorted((ROOT / "experiments").glob("*.toml"))
STUDY = sorted((ROOT / "experiments").glob("*/*.toml"))
DEMO = Path(fedllm.__file__).parent / "demo.toml"


def parsed(values: dict[str, Any], *overrides: str) -> ex.Experiment:
    return ex.parse(values, "test", Path.cwd(), overrides)


def test_everything_has_a_default() -> None:
    spec = parsed({})
    assert spec.strategy.kind == "parameters"
    assert spec.tunables.kind == "lora"


def test_it_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parsed({}).rounds = 3  # type: ignore[misc]


@given(
    rounds=st.integers(1, 500),
    rate=st.floats(1e-8, 1e3),
    strategy=st.sampled_from(
        [{"kind": "parameters", "payload": "delta"}, {"kind": "logits", "temperature": 3},
         {"kind": "activations", "cut": 2, "labels": "client"}, {"kind": "standalone"}]
    ),
    labels=st.lists(
        st.text(min_size=1, max_size=9).map(lambda text: text.replace("$", "S")),
        max_size=4,
        unique=True,
    ),
    partition=st.sampled_from([{"kind": "iid"}, {"kind": "dirichlet", "alpha": 0.3},
                               {"kind": "by_column", "column": "ward"}]),
)  # fmt: skip
def test_dump_reads_back_equal(
    rounds: int, rate: float, strategy: dict[str, Any], labels: list[str],
    partition: dict[str, Any],
) -> None:  # fmt: skip
    values = {
        "rounds": rounds, "training": {"rate": rate}, "strategy": strategy,
        "data": {"labels": labels}, "simulation": {"partition": partition},
    }  # fmt: skip
    spec = parsed(values)
    assert parsed(tomllib.loads(ex.dump(spec))) == spec


@pytest.mark.parametrize("name", ["client-1", "bank.a", "card arrival", 'a"b', "${HOME}", "Zürich"])
def test_a_client_may_have_any_name(name: str, tmp_path: Path) -> None:
    """A site's may hold dots, a column's value anything; what is stored is what sites are sent."""
    spec = parsed({"strategy": {"kind": "logits", "client_models": {name: "builtin#2"}}})
    again = ex.parse_text(ex.dump(spec), "stored", tmp_path, foreign=True)
    assert again.strategy == spec.strategy


@pytest.mark.parametrize("wrong", [3, "gpt2", [1], {"a": 1}, {"a": {"b": "gpt2"}}])
def test_models_of_clients_are_a_list_or_a_table(wrong: Any, tmp_path: Path) -> None:
    values = {"strategy": {"kind": "logits", "client_models": wrong}}
    with pytest.raises(FedllmError, match=r"strategy.client_models: .*expected a list of models"):
        ex.parse(values, "test", tmp_path)


def test_overrides_are_toml_or_words() -> None:
    spec = parsed({}, "training.rate=0.5", "training.optimizer=sgd", "seeds=[3, 4]",
                  "strategy.kind=activations", "strategy.cut=2")  # fmt: skip
    assert (spec.training.rate, spec.training.optimizer, spec.seeds) == (0.5, "sgd", (3, 4))
    assert isinstance(spec.strategy, ex.Activations)
    assert spec.strategy.cut == 2


def test_another_kind_forgets_the_old_ones_keys() -> None:
    values = {"strategy": {"kind": "logits", "temperature": 2.0}}
    assert parsed(values, "strategy.kind=parameters").strategy == ex.Parameters()


@pytest.mark.parametrize("override", ["rounds", "=3", "rounds.x=1"])
def test_a_bad_override_is_named(override: str) -> None:
    with pytest.raises(FedllmError, match=override.partition("=")[0] or "key=value"):
        parsed({"rounds": 2}, override)


def test_variables_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("text\nx\n")
    file = tmp_path / "one.toml"
    file.write_text('[simulation]\nsource = "${PLACE:-./}rows.csv"\n')
    assert ex.load(file).simulation.source == str(tmp_path / "rows.csv")
    monkeypatch.setenv("PLACE", "/elsewhere/")
    assert ex.load(file).simulation.source == "/elsewhere/rows.csv"
    file.write_text('[model]\nname = "openai-community/gpt2"\n')
    assert ex.load(file).model.name == "openai-community/gpt2"  # a name on the hub stays one


def test_the_name_is_the_files() -> None:
    assert ex.load(DEMO).name == "demo"


@pytest.mark.parametrize("path", [*SHIPPED, *STUDY], ids=lambda path: path.stem)
def test_shipped_files_state_rounds_and_seeds_on_lines_of_their_own(path: Path) -> None:
    ex.load(path)
    lines = path.read_text().splitlines()
    assert sum(line.startswith("rounds = ") for line in lines) == 1
    assert sum(line.startswith("seeds = ") for line in lines) == 1


SHRINK = {
    "banking77-minilm": ["public.size=12", "public.rows_per_round=6", "simulation.examples=20",
                         "simulation.test_examples=30"],
    "shakespeare": ["public.size=8", "simulation.examples=12"],
    "demo": ["public.size=12", "simulation.sizes=[12, 8, 6]", "simulation.test_examples=30"],
}  # fmt: skip


@needs_shared
@pytest.mark.parametrize("path", [*SHIPPED, DEMO], ids=lambda path: path.stem)
def test_every_shipped_file_runs_shrunken(path: Path, tmp_path: Path) -> None:
    from fedllm import compare
    from fedllm.report import page, tables

    settings = ["rounds=1", "seeds=[0]", "training.epochs=1", *SHRINK[path.stem]]
    spec = ex.load(path, settings)
    summary = compare.run(spec, tmp_path / "out")
    assert {"parameters", "logits", "activations", "centralized", "standalone"} <= set(
        summary["parts"]
    )
    header, lines = tables.rows(summary)
    assert all(len(line) == len(header) for line in lines)
    assert "<svg" in page.write(tmp_path / "out").read_text()


@pytest.mark.parametrize("path", STUDY, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_studys_files_are_sweeps(path: Path) -> None:
    spec = ex.load(path)
    assert spec.seeds == (0, 1, 42)
    points = sweep.points(spec)
    assert len(points) == len({point.name for point in points}) >= 2


@needs_shared
@pytest.mark.parametrize("path", [p for p in STUDY if p.parent.name == "study"],
                         ids=lambda path: path.stem)  # fmt: skip
def test_the_studys_files_run_shrunken(path: Path, tmp_path: Path) -> None:
    few = {"rounds": 1, "public.size": 12, "simulation.examples": 16,
           "simulation.test_examples": 20}  # fmt: skip
    spec = ex.vary(sweep.points(ex.load(path))[-1].experiment, few)
    assert federation.run(spec, 0, tmp_path / path.stem)["metrics"]["units"]


def test_a_folder_of_an_older_version_agrees_and_another_experiments_does_not(
    tmp_path: Path,
) -> None:
    """What the older one did not know has its default."""
    spec = ex.load(DEMO)
    lines = ex.dump(spec).splitlines()
    older = [line for line in lines if not line.startswith(("resident", "sweep"))]
    assert len(older) < len(lines)
    (tmp_path / "experiment.toml").write_text("\n".join(older))
    ex.agree(tmp_path / "experiment.toml", spec)
    for text in (ex.dump(spec.replace(rounds=9)), "nonsense", "nonsense = 1"):
        (tmp_path / "experiment.toml").write_text(text)
        with pytest.raises(FedllmError, match="holds another experiment"):
            ex.agree(tmp_path / "experiment.toml", spec)


def test_what_looks_like_a_variable_is_written_as_text(tmp_path: Path) -> None:
    spec = ex.parse({}, "test", tmp_path)
    data = spec.data.model_copy(update={"labels": ("${PRICE}", "$${HOME}", "${A:-b}", "$5 {x}")})
    text = ex.dump(spec.replace(data=data))
    for foreign in (False, True):
        found = ex.parse_text(text, "again", tmp_path, foreign=foreign)
        assert found.data.labels == data.labels
