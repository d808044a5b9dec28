"""Sweeps: every combination once, what is there is not run again, side by side gives the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm import experiment as ex
from fedllm import federation, sweep
from fedllm.errors import FedllmError
from fedllm.federation import Silent
from small import experiment


def small(*axes: dict[str, tuple[Any, ...]], **more: Any) -> ex.Experiment:
    return experiment(
        rounds=1, sweep=list(axes), simulation={"clients": 2, "examples": 8, "test_examples": 10},
        **more,
    )  # fmt: skip


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@given(
    ranks=st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True),
    rates=st.lists(st.sampled_from([0.1, 0.01, 0.001]), min_size=1, max_size=3, unique=True),
)
def test_axes_multiply_and_keys_of_one_axis_go_together(ranks: Any, rates: Any) -> None:
    spec = small(
        {"tunables.rank": tuple(ranks), "tunables.alpha": tuple(2.0 * r for r in ranks)},
        {"training.rate": tuple(rates)},
    )
    found = sweep.points(spec)
    settings = {(p.experiment.tunables.rank, p.experiment.training.rate) for p in found}  # type: ignore[union-attr]
    assert settings == {(rank, rate) for rank in ranks for rate in rates}
    assert all(p.experiment.tunables.alpha == 2 * p.experiment.tunables.rank for p in found)  # type: ignore[union-attr]
    assert len({p.name for p in found}) == len(ranks) * len(rates)
    assert all(not p.experiment.sweep for p in found)
    assert ex.parse_text(ex.dump(spec), "again", Path.cwd()) == spec


def test_what_is_there_is_not_run_again_and_the_mean_is_of_all_seeds(tmp_path: Path) -> None:
    first = small({"tunables.rank": (1, 2)}, seeds=[0, 1])
    sweep.run(first, tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed-*/summary.json")}
    assert len(before) == 4
    notes = Notes()
    more = small({"tunables.rank": (1, 2, 4)}, seeds=[0, 1])
    total = sweep.run(more, tmp_path / "s", resume=True, listener=notes)
    assert "4 of 6 runs are there already" in notes.said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(total["parts"]) == ["rank=1", "rank=2", "rank=4"]
    assert total["parts"]["rank=4"]["settings"] == {"tunables.rank": 4}
    losses = [json.loads(path.read_text())["metrics"]["loss"]
              for path in (tmp_path / "s" / "rank=4").rglob("summary.json")]  # fmt: skip
    assert total["parts"]["rank=4"]["metrics"]["loss"]["mean"] == pytest.approx(sum(losses) / 2)
    with pytest.raises(FedllmError, match="holds another experiment"):
        sweep.run(more.replace(rounds=2), tmp_path / "s", resume=True)


def test_side_by_side_gives_the_same_as_one_after_the_other(tmp_path: Path) -> None:
    spec = small({"tunables.rank": (1, 2)})
    alone = sweep.run(spec, tmp_path / "alone")
    together = sweep.run(spec, tmp_path / "together", jobs=2)
    for name, part in alone["parts"].items():
        assert together["parts"][name]["metrics"] == part["metrics"]
        model = Path(name, "seed-0", "adapter", "adapter_model.safetensors")
        one, other = (tmp_path / f / model for f in ("alone", "together"))
        assert one.read_bytes() == other.read_bytes()


def test_a_sweep_over_strategies_has_each_ones_options(tmp_path: Path) -> None:
    kinds = ({"kind": "parameters"}, {"kind": "activations", "cut": 1})
    total = sweep.run(small({"strategy": kinds}), tmp_path / "s")
    assert list(total["parts"]) == ["strategy=parameters", "strategy=activations-cut-1"]
    split = total["parts"]["strategy=activations-cut-1"]
    assert split["variant"] == "activations (sequential, cut 1)"


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ([{"tunables.rnk": (1, 2)}], "rank"),
        ([{"tunables.rank": ("many",)}], "tunables.rank"),
        ([{"tunables.rank": (1,)}, {"tunables.rank": (2,)}], "in more than one"),
        ([], "nothing is varied"),
    ],
)
def test_what_cannot_be_varied_is_refused_before_anything_runs(
    axes: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(FedllmError, match=reason):
        sweep.run(small(*axes), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_keys_that_go_together_need_as_many_values() -> None:
    with pytest.raises(FedllmError, match="as many values each"):
        small({"tunables.rank": (1, 2), "tunables.alpha": (1.0,)})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tunables.rank=2,8", {"tunables.rank": (2, 8)}),
        ("model.name=a/b,c", {"model.name": ("a/b", "c")}),
        ("strategy={kind='logits'}, {kind='parameters'}",
         {"strategy": ({"kind": "logits"}, {"kind": "parameters"})}),
    ],
)  # fmt: skip
def test_axes_from_the_command_line(text: str, found: Any) -> None:
    assert ex.axis(text) == found


@pytest.mark.parametrize("text", ["", "a", "=1", "a="])
def test_axes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(FedllmError, match="--sweep"):
        ex.axis(text)


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    class Stop(Silent):
        def round(self, entry: Any) -> None:
            raise KeyboardInterrupt

    spec = small({"tunables.rank": (1, 2)}).replace(rounds=2)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(spec, tmp_path / "cut", listener=Stop())
    cut = sweep.run(spec, tmp_path / "cut", resume=True)
    whole = federation.run(sweep.points(spec)[0].experiment, 0, tmp_path / "whole")
    assert cut["parts"]["rank=1"]["metrics"]["loss"]["mean"] == whole["metrics"]["loss"]


def test_points_that_would_have_one_name_have_two(tmp_path: Path) -> None:
    kinds = tuple({"kind": "lora", "rank": rank} for rank in (2, 8))
    names = [point.name for point in sweep.points(small({"tunables": kinds}))]
    assert len(set(names)) == 2
    folders = ({f"{folder}/t.csv" for folder in ("p1", "p2")},)
    axis = {"simulation.source": tuple(sorted(folders[0]))}
    assert len({point.name for point in sweep.points(small(axis))}) == 2
    long = {"simulation.sizes": (tuple(range(8, 108)),), "simulation.clients": (100,)}
    (point,) = sweep.points(small(long).replace(simulation=ex.Simulation()))
    assert len(point.name) < 120


def test_names_follow_from_values_and_not_from_their_order() -> None:
    kinds = [{"kind": "activations"}, {"kind": "activations", "cut": 1}]
    sources = ["p1/t.csv", "p2/t.csv"]
    for key, values in (("strategy", kinds), ("simulation.source", sources)):
        one, other = (sweep.points(small({key: tuple(order)})) for order in (values, values[::-1]))
        assert {p.name: p.settings for p in one} == {p.name: p.settings for p in other}
        assert len({p.name for p in one}) == 2


def test_paths_from_the_command_line_are_of_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (axis,) = (ex.axis("simulation.source=./a.csv,builtin"),)
    assert axis == {"simulation.source": (str(tmp_path / "a.csv"), "builtin")}


def test_another_seed_or_plan_repeats_nothing(tmp_path: Path) -> None:
    spec = small({"tunables.rank": (1,)})
    sweep.run(spec, tmp_path / "s")
    before = (tmp_path / "s" / "rank=1" / "seed-0" / "summary.json").stat().st_mtime_ns
    more = spec.replace(seeds=(0, 1), plan=ex.Plan(rows=9), compare=ex.Compare(bounds=()))
    notes = Notes()
    total = sweep.run(more, tmp_path / "s", resume=True, listener=notes)
    assert total["seeds"] == [0, 1] and "1 of 2 runs are there already" in notes.said
    assert (tmp_path / "s" / "rank=1" / "seed-0" / "summary.json").stat().st_mtime_ns == before


def test_a_sweep_that_goes_on_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.run(small({"tunables.rank": (1,)}), tmp_path / "s")
    assert (tmp_path / "s" / "summary.json").exists()

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "_one", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(small({"tunables.rank": (1, 2)}), tmp_path / "s", resume=True)
    assert not (tmp_path / "s" / "summary.json").exists()


def test_a_kind_comes_before_its_options_whatever_the_order() -> None:
    spec = small({"strategy.cut": (1, 2), "strategy.kind": ("activations", "activations")})
    assert [point.experiment.strategy.cut for point in sweep.points(spec)] == [1, 2]  # type: ignore[union-attr]
    values = ["strategy.cut=2", "strategy.kind=activations"]
    assert ex.parse({}, "test", Path.cwd(), values).strategy.cut == 2  # type: ignore[union-attr]


def test_anothers_results_are_not_passed_off_as_ones_own(tmp_path: Path) -> None:
    spec = small({"tunables.rank": (1,)})
    sweep.run(spec, tmp_path / "s")
    (tmp_path / "s" / "rank=1").rename(tmp_path / "s" / "rank=2")
    with pytest.raises(FedllmError, match="has other settings than rank=2"):
        sweep.run(small({"tunables.rank": (2,)}), tmp_path / "s", resume=True)


def test_what_only_building_finds_is_refused_before_the_first_run(tmp_path: Path) -> None:
    cuts = tuple({"kind": "activations", "cut": cut} for cut in (1, 9))
    with pytest.raises(FedllmError, match=r"strategy.cut = 9"):
        sweep.run(small({"strategy": cuts}), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_the_first_failure_ends_the_others(tmp_path: Path) -> None:
    missing = str(tmp_path / "gone.csv")
    tasks = [
        (small().replace(simulation=ex.Simulation(source=missing)), 0, tmp_path / "a" / "seed-0"),
        *((small().replace(rounds=50), seed, tmp_path / "b" / f"seed-{seed}") for seed in (1, 2)),
    ]
    with pytest.raises(FedllmError, match=r"gone\.csv"):
        sweep._side_by_side(tasks, 2, Notes())
    assert not list(tmp_path.rglob("summary.json"))
