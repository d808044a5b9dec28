"""Law 3: clients trained together equal the same clients one by one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedllm import experiment as ex
from fedllm.ledger import total
from fedllm.training import fit
from fedllm.training.cohort import alone, stackable, work
from fedllm.training.jobs import Fit
from fedllm.training.learner import Span
from fedllm.training.meter import Meter
from fedllm.training.objectives import cross_entropy
from fedllm.training.passes import stack
from shared import needs_shared
from small import BERT, EACH, GPT2, LLAMA, build, experiment, finish, furthest

Tensors = dict[str, torch.Tensor]
KINDS: list[dict[str, Any]] = [
    {"kind": "lora", "rank": 2, "alpha": 2.0, "dropout": 0.2},
    {"kind": "adapter", "width": 3},
    {"kind": "bitfit"},
    {"kind": "prompt", "tokens": 3},
    {"kind": "prefix", "tokens": 3},
]
SPARSE: dict[str, Any] = {"kind": "sparse", "density": 0.05}
FITTING = [
    pytest.param(name, kind, id=f"{name.rpartition('/')[2]}-{kind['kind']}",
                 marks=[] if name == GPT2 else [needs_shared])
    for name in (GPT2, LLAMA, BERT)
    for kind in [*KINDS, *([SPARSE] if name == GPT2 else [])]
    if (name, kind["kind"]) not in ((BERT, "prefix"), (LLAMA, "bitfit"), (BERT, "prompt"))
]  # fmt: skip


# Rounding differs between products of few and of many rows, and large steps make it grow tenfold
# with each; a new head on this small Llama starts with a loss of about ten
STEEP = 0.001


def fits(
    spec: ex.Experiment, steps: Sequence[int], starts: Sequence[Tensors] | None = None
) -> list[Fit]:
    """A job for each client of a fresh federation: so many steps from these tunables."""
    built = build(spec)
    jobs = []
    for number, (site, last) in enumerate(zip(built.worker.sites.values(), steps, strict=True)):
        noise = torch.Generator().manual_seed(number)
        start = starts[number] if starts else {
            n: t + 0.02 * torch.randn(t.shape, generator=noise)
            for n, t in site.model.initial.items()
        }  # fmt: skip
        jobs.append(
            Fit(site.model, start, site.plan(site.train, "private"), cross_entropy, spec.training,
                0, last, Span(0, 2), Meter(), "a2")
        )  # fmt: skip
    return jobs


def both(jobs: list[Fit]) -> tuple[list[Any], list[Any]]:
    return work(jobs), [work([job])[0] for job in jobs]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clients went through each training pass that counts."""
    sizes: list[int] = []
    real = fit._train_pass

    def counted(pack: Any, params: Any) -> list[float]:
        if params[0] is pack[0].learner.params:  # not a pass that only measures
            sizes.append(len(pack))
        return real(pack, params)

    monkeypatch.setattr(fit, "_train_pass", counted)
    return sizes


@pytest.mark.parametrize(("name", "tunables"), FITTING)
def test_ten_sgd_steps_together_are_ten_steps_alone(
    name: str, tunables: dict[str, Any], passes: list[int]
) -> None:
    rate = STEEP if name == LLAMA else 0.005
    spec = experiment(name, tunables=tunables, training={"batch_size": 3, "rate": rate})
    jobs = fits(spec, [10, 10, 10])
    together, single = both(jobs)
    assert passes[:10] == [3] * 10
    assert passes[10:] == [1] * 30
    for one, other, job in zip(together, single, jobs, strict=True):
        assert furthest(one.values, other.values) < 1e-5
        assert furthest(one.values, dict(job.tunables)) > 2e-5
        assert one.loss == pytest.approx(other.loss, abs=1e-5)


@pytest.mark.parametrize(("name", "task"), EACH)
def test_gradients_and_adam_updates_are_those_alone(name: str, task: str) -> None:
    """One step of SGD at rate 1 is the gradient; clipped, with a schedule, and for Adam."""
    for training in (
        {"optimizer": "sgd", "rate": 1.0},
        {"optimizer": "sgd", "rate": 1.0, "clip": 0.05, "momentum": 0.5, "weight_decay": 0.1},
        {"optimizer": "adamw", "rate": 1e-3, "clip": 0.05, "schedule": "cosine", "warmup": 0.1},
    ):
        jobs = fits(experiment(name, task, training=training), [1, 1, 1])
        for one, other in zip(*both(jobs), strict=True):
            assert furthest(one.values, other.values) < 1e-5
            assert one.optimizer.keys() == other.optimizer.keys()


def test_uneven_numbers_of_steps_are_kept_apart(passes: list[int]) -> None:
    spec = experiment(
        training={"batch_size": 4, "schedule": "linear", "rate": 0.002}, tunables={"dropout": 0.3}
    )
    together, single = both(fits(spec, [1, 5, 3]))
    assert passes[:5] == [3, 2, 2, 1, 1]
    assert [result.steps for result in together] == [1, 5, 3]
    for one, other in zip(together, single, strict=True):
        assert furthest(one.values, other.values) < 1e-5


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_uneven_ranks_are_kept_apart(task: str, passes: list[int]) -> None:
    """Each keeps its own alpha / r, as PEFT would scale an adapter of that rank."""
    starts = []
    for rank in (1, 4, 2):
        model = build(experiment(GPT2, task, tunables={"rank": rank})).worker.sites
        site = next(iter(model.values()))
        noise = torch.Generator().manual_seed(rank)
        starts.append({n: t + 0.05 * torch.randn(t.shape, generator=noise)
                       for n, t in site.model.initial.items()})  # fmt: skip
    spec = experiment(
        GPT2, task, tunables={"rank": 4, "alpha": 4.0}, training={"batch_size": 3, "rate": 0.001}
    )
    together, single = both(fits(spec, [4, 4, 4], starts))
    assert passes[:4] == [3] * 4
    for one, other, start in zip(together, single, starts, strict=True):
        assert {n: t.shape for n, t in one.values.items()} == {n: t.shape for n, t in start.items()}
        assert furthest(one.values, other.values) < 1e-5


def test_a_rank_of_its_own_means_what_peft_makes_of_it() -> None:
    low = experiment(tunables={"rank": 1, "alpha": 8.0})
    site = build(low).worker.sites["client-1"]
    start = {n: t + 0.1 for n, t in site.model.initial.items()}
    high = build(experiment(tunables={"rank": 4, "alpha": 8.0})).worker.sites["client-1"]
    inputs = site.plan(site.train, "private").batch([0, 1]).inputs
    theirs = site.model.whole.apply_to(start, inputs)
    assert torch.allclose(high.model.whole.apply_to(start, inputs), theirs, atol=1e-6)


STRATEGIES: list[dict[str, Any]] = [
    {"kind": "parameters"},
    {"kind": "logits", "epochs": 2},
    {"kind": "logits", "server_model": False, "loss": "mse", "rate": 0.0001},
    {"kind": "activations", "cut": 2, "server": "per-client"},
    {"kind": "activations", "cut": 2, "server": "per-client", "labels": "client"},
    {"kind": "activations", "cut": 2, "server": "concatenated"},
    {"kind": "activations", "cut": 2, "server": "concatenated", "labels": "client"},
    {"kind": "standalone"},
]


# every variant on the built-in model, and on the other types what their models see differently
RUNS = [
    pytest.param(*case.values, strategy, marks=case.marks,
                 id=f"{case.id}-{'-'.join(map(str, strategy.values()))}")
    for number, case in enumerate(EACH)
    for strategy in (STRATEGIES if number == 0 else STRATEGIES[1:5:3])
]  # fmt: skip


@pytest.mark.parametrize(("name", "task", "strategy"), RUNS)
def test_whole_runs_are_those_of_a_cohort_of_one(
    name: str, task: str, strategy: dict[str, Any]
) -> None:
    def run(size: int) -> tuple[Tensors, list[dict[str, Any]], dict[str, float]]:
        spec = experiment(
            name, task, rounds=2, strategy=strategy, tunables={"dropout": 0.1},
            training={"rate": STEEP if name == LLAMA else 0.002, "batch_size": 4},
            simulation={"cohort": size, "clients": 3, "sizes": [11, 8, 5], "test_examples": 30},
        )  # fmt: skip
        built = build(spec)
        end = finish(built)
        found = dict(end.server.shared)
        for client, site in built.worker.sites.items():
            found |= {f"{client} {n}": t for n, t in built.strategy.own(site).items()}
        costs: dict[str, float] = {}
        for row in built.ledger.rows:
            for column in ("flops", "payload_bytes", "examples", "tokens", "optimizer_steps"):
                key = f"{row.client} {row.step} {column}"
                costs[key] = costs.get(key, 0) + getattr(row, column)
        return found, end.history, costs

    together, history, costs = run(3)
    single, alone_history, alone_costs = run(1)
    assert furthest(together, single) < 2e-5
    assert costs == alone_costs  # a client costs the same, whoever trains beside it
    for one, other in zip(history, alone_history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_what_cannot_be_stacked_trains_alone_and_the_run_says_so(passes: list[int]) -> None:
    for changes in ({"tunables": {"kind": "full"}}, {"training": {"base_dropout": True}}):
        spec = experiment(**changes)
        site = build(spec).worker.sites["client-1"]
        assert not stackable(site.model, spec.training)
        passes.clear()
        results = work(fits(spec, [1, 1, 1]))
        assert passes == [1, 1, 1]
        assert all(result.steps == 1 for result in results)


def test_one_clients_broken_loss_leaves_the_others_alone() -> None:
    """A client whose tunables hold NaN fails by itself; the rest get what they get without it."""
    jobs = fits(experiment(training={"rate": 0.005}), [3, 3, 3])
    broken = {n: torch.full_like(t, float("nan")) for n, t in jobs[1].tunables.items()}
    jobs[1].tunables = broken
    together, single = both(jobs)
    assert "the loss became nan" in str(together[1])
    for number in (0, 2):
        assert furthest(together[number].values, single[number].values) < 1e-5


def test_a_fault_in_one_job_is_its_own() -> None:
    jobs = fits(experiment(), [2, 2, 2])
    name = next(iter(jobs[2].tunables))
    jobs[2].tunables = {**jobs[2].tunables, name: torch.zeros(1, 7)}
    results = work(jobs)
    assert isinstance(results[2], Exception)
    assert all(result.steps == 2 for result in results[:2])


def test_a_task_hears_of_its_jobs_failure() -> None:
    (job, *_) = fits(experiment(), [1, 1, 1])
    job.tunables = {"no such tunable": torch.zeros(1)}

    def task() -> Any:
        yield job

    with pytest.raises(KeyError, match="no such tunable"):
        alone(task())


def test_stacking_one_is_that_one() -> None:
    site = build(experiment()).worker.sites["client-1"]
    same = stack([site.model.initial])
    assert all(same[name] is tensor for name, tensor in site.model.initial.items())


def test_one_pass_takes_no_more_than_fits(
    monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    monkeypatch.setattr("fedllm.training.passes.CELLS", 250)
    work(fits(experiment(training={"batch_size": 4}), [3, 3, 3]))
    assert max(passes) == 2
    assert sum(passes) == 9


# Faults that a review found ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 1])
def test_halves_of_the_same_shape_measure_one_of_them(size: int) -> None:
    """Also where the clients train one by one: the server's halves are stacked all the same."""
    spec = experiment(
        strategy={"kind": "activations", "cut": 2, "server": "per-client"},
        training={"padding": "fixed", "batch_size": 32, "rate": 0.001},
        simulation={"clients": 6, "sizes": [40, 40, 40, 24, 24, 24], "cohort": size,
                    "test_examples": 30},
    )  # fmt: skip
    built = build(spec)
    finish(built)
    for number in range(1, 7):
        taken = total(built.ledger.rows, "optimizer_steps", step="c5", client=f"client-{number}")
        assert taken == (2 if number <= 3 else 1)


def test_peaks_of_memory_do_not_depend_on_who_trains_beside() -> None:
    def peaks(size: int) -> dict[tuple[str, str], int]:
        spec = experiment(
            strategy={"kind": "activations", "cut": 2, "server": "per-client"},
            training={"batch_size": 4, "rate": 0.001},
            simulation={"cohort": size, "clients": 3, "sizes": [8, 8, 4], "test_examples": 30},
        )  # fmt: skip
        built = build(spec)
        built.worker.sites["client-1"].meter.measured.peaks.clear()
        finish(built)
        return {(r.client, r.step): r.peak_memory for r in built.ledger.rows if r.peak_memory}

    assert peaks(3) == pytest.approx(peaks(1), rel=1e-4)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_both_halves_optimizers_go_on(labels: str) -> None:
    spec = experiment(
        rounds=3, strategy={"kind": "activations", "cut": 2, "labels": labels},
        training={"optimizer": "adam", "rate": 0.001, "optimizer_state": "keep", "batch_size": 4},
    )  # fmt: skip
    built = build(spec)
    finish(built)
    state = built.worker.states.get("client-1")
    counts = {int(value) for name, value in state.items() if name.endswith("|step")}
    assert counts == {9}  # three batches in each of three rounds


@pytest.mark.parametrize("what", ["test", "train"])
def test_a_bad_row_changes_nothing_for_the_others(what: str) -> None:
    """Neither their results nor their costs."""

    def run(bad: bool) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        spec = experiment(
            training={"batch_size": 2, "rate": 0.001}, exchange={"minimum_replies": 1},
            evaluation={"batch_size": 4},
        )  # fmt: skip
        built = build(spec)
        site = built.worker.sites["client-3"]
        if bad:
            mine = site.data[site.name]
            rows = getattr(mine, what)
            flat = rows.flat.copy()
            flat[rows.ends[-1] - rows.lengths[-1]] = 10**7  # no such token
            site.data = {site.name: replace(mine, **{what: replace(rows, flat=flat)})}
        history = finish(built).history
        asked = {"test": "eval", "train": "a2"}[what]
        rows_ = [r for r in built.ledger.rows if r.direction == "compute" and r.step == asked]
        costs = {r.client: (r.flops, r.examples) for r in rows_ if r.client != "client-3"}
        return history[-1]["clients"], costs

    well, costs = run(False)
    broken, same = run(True)
    assert costs == same
    if what == "test":
        assert set(broken) == {"client-1", "client-2"}
        for client in broken:
            assert broken[client]["units"] == well[client]["units"]
            assert broken[client]["loss"] == pytest.approx(well[client]["loss"], abs=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_lora_on_the_output_layer_trains_together(
    dropout: float, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    monkeypatch.setattr(fit, "LOGITS", 1 << 12)
    spec = experiment(
        GPT2, "generation", tunables={"targets": ["c_attn", "lm_head"], "dropout": dropout},
        training={"rate": 0.001, "batch_size": 4},
    )  # fmt: skip
    together, single = both(fits(spec, [2, 2, 2]))
    assert passes[:2] == [3, 3]
    for one, other in zip(together, single, strict=True):
        assert furthest(one.values, other.values) < 1e-5


def test_token_logits_in_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = experiment(GPT2, "generation", training={"rate": 0.01, "batch_size": 4})
    whole = work(fits(spec, [3, 3, 3]))
    monkeypatch.setattr(fit, "LOGITS", 1 << 12)
    for one, other in zip(work(fits(spec, [3, 3, 3])), whole, strict=True):
        assert furthest(one.values, other.values) < 1e-5
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
