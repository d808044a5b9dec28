"""What is frozen below the first tunable block runs once for each row, and changes nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm import federation, ledger
from fedllm.data.examples import Examples, packed
from fedllm.federation import Silent
from fedllm.models.frozen import Known
from fedllm.round import Federation
from fedllm.training.batches import collate
from fedllm.training.known import Use, known, remember
from fedllm.training.meter import Meter
from small import EACH, build, experiment, finish, furthest

Tensors = dict[str, torch.Tensor]
UPPER = {"layers": [-2, -1], "dropout": 0.1}
STRATEGIES: list[dict[str, Any]] = [
    {"kind": "parameters"},
    {"kind": "logits", "epochs": 2},
    {"kind": "activations", "cut": 1},
    {"kind": "activations", "cut": 3, "server": "concatenated", "labels": "client"},
]


def ran(built: Federation) -> tuple[Tensors, dict[str, int]]:
    """Everybody's tunables at the end, and FLOPs by step."""
    end = finish(built)
    found = dict(end.server.shared)
    for client, site in built.worker.sites.items():
        found |= {f"{client} {n}": t for n, t in built.strategy.own(site).items()}
    flops: dict[str, int] = {}
    for row in built.ledger.rows:
        flops[row.step] = flops.get(row.step, 0) + (row.flops or 0)
    return found, flops


CASES = [
    pytest.param(*case.values, strategy, marks=case.marks,
                 id=f"{case.id}-{'-'.join(map(str, strategy.values()))}")
    for number, case in enumerate(EACH)
    for strategy in (STRATEGIES if number == 0 else STRATEGIES[number :: 2])
]  # fmt: skip


@pytest.mark.parametrize(("name", "task", "strategy"), CASES)
def test_runs_are_the_same_with_and_without(name: str, task: str, strategy: dict[str, Any]) -> None:
    def run(cache: bool) -> tuple[Tensors, dict[str, int]]:
        spec = experiment(
            name, task, rounds=3, strategy=strategy, tunables=UPPER,
            model={"name": name, "cache": cache}, training={"rate": 0.001},
            public={"size": 12, "rows_per_round": 8},
        )  # fmt: skip
        return ran(build(spec))

    kept, cheap = run(True)
    anew, dear = run(False)
    assert furthest(kept, anew) < 1e-6
    first = {"parameters": "a2", "logits": "b1", "activations": "c1"}[strategy["kind"]]
    assert cheap[first] < dear[first]
    assert cheap["eval"] < dear["eval"]


def test_a_client_half_without_tunables_costs_one_pass() -> None:
    spec = experiment(
        rounds=3, tunables=UPPER, strategy={"kind": "activations", "cut": 2},
        training={"batch_size": 24},
    )  # fmt: skip
    built = build(spec)
    _, flops = ran(built)
    _, dear = ran(build(spec.replace(model=spec.model.model_copy(update={"cache": False}))))
    assert flops["c1"] * 3 == pytest.approx(dear["c1"], rel=0.2)  # other lengths meet
    assert flops["c5"] == 0


def test_everybody_pays_once_for_a_set_that_many_share() -> None:
    built = build(experiment(tunables=UPPER, strategy={"kind": "logits"}))
    site = built.worker.sites["client-1"]
    assert site.public is not None
    one, other = Meter(), Meter()
    found = known(site.model, 2, site.public, one, "b2")
    part = known(site.model, 2, site.public.take([3, 1]).take([1]), one, "b2")
    again = known(site.model, 2, site.public, other, "b2")
    assert found is not None and part is not None and again is not None
    assert found.states is part.states is again.states
    assert one.cost("b2").flops == other.cost("b2").flops > 0
    assert one.cost("b2").seconds == other.cost("b2").seconds > 0
    length = int(site.public.lengths[1])
    assert torch.equal(part.padded([0], length), found.padded([1], length))


def test_who_failed_pays_in_the_next_round() -> None:
    """The costs of a failed step are not counted, so what ran once in it is paid for later."""
    spec = experiment(
        rounds=2, tunables=UPPER, exchange={"minimum_replies": 2}, training={"rate": 0.001}
    )
    built = build(spec)
    site = built.worker.sites["client-1"]
    real, failed = built.strategy.tasks["train"], []

    def once(site: Any, message: Any) -> Any:
        reply = yield from real(site, message)  # type: ignore[misc]
        if site.name == "client-1" and not failed:
            failed.append(True)
            raise RuntimeError("lost")
        return reply

    built.strategy.tasks = {**built.strategy.tasks, "train": once}
    finish(built)
    rows = [r for r in built.ledger.rows if r.step == "a2" and r.direction == "compute"]
    first = {r.client: r.flops for r in rows if r.round == 1}
    second = {r.client: r.flops for r in rows if r.round == 2}
    assert set(first) == {"client-2", "client-3"}
    below = known(site.model, 2, site.train, Meter(), "a2")
    assert below is not None
    assert second["client-1"] > below.flops
    assert second["client-2"] < first["client-2"]


def test_a_set_of_which_few_rows_are_drawn_is_not_run_as_a_whole() -> None:
    def public(rounds: int) -> Any:
        spec = experiment(
            rounds=rounds, tunables=UPPER, strategy={"kind": "logits"},
            public={"size": 12, "rows_per_round": 4},
        )  # fmt: skip
        site = build(spec).worker.sites["client-1"]
        assert site.public is not None
        return known(site.model, 2, site.public.take([1, 5]), Meter(), "b2")

    assert public(2) is None
    assert public(3) is not None


def test_what_does_not_fit_is_computed_anew_and_the_run_says_so() -> None:
    built = build(experiment(tunables=UPPER, model={"cache": False}))
    site = built.worker.sites["client-1"]
    size = site.train.tokens * site.model.width * 4
    uses = [(site.model, [Use(site.train, 10**6)] * 2), (site.model, [Use(site.train, 10**6)])]
    assert "computed anew" in remember(uses, 8, size - 1)
    assert site.model.frozen.begin == 0
    assert remember(uses, 8, size) == ""
    assert site.model.frozen.begin == 2


def test_a_first_pass_is_no_larger_than_a_batch_of_training() -> None:
    def peak(cache: bool) -> int:
        spec = experiment(
            "builtin", "generation", tunables=UPPER, model={"cache": cache},
            training={"batch_size": 1, "rate": 0.001}, evaluation={"batch_size": 1},
        )  # fmt: skip
        built = build(spec)
        finish(built)
        site = built.worker.sites["client-1"]
        kept = sum(site.meter.held.values())
        return max(r.peak_memory for r in built.ledger.rows if r.client == "client-1") - kept

    assert peak(True) < 1.1 * peak(False)


def test_a_base_with_dropout_is_never_remembered() -> None:
    spec = experiment(tunables=UPPER, training={"base_dropout": True})
    assert build(spec).worker.sites["client-1"].model.frozen.begin == 0


class Stop(Silent):
    """Interrupts after the first round, as Ctrl-C would."""

    def round(self, entry: Any) -> None:
        raise KeyboardInterrupt


def test_a_resumed_run_finds_the_same_bits(tmp_path: Any) -> None:
    spec = experiment(
        rounds=3, tunables=UPPER, public={"size": 12, "rows_per_round": 5},
        strategy={"kind": "logits", "epochs": 1}, training={"batch_size": 3, "rate": 0.001},
    )  # fmt: skip
    federation.run(spec, 0, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        federation.run(spec, 0, tmp_path / "cut", listener=Stop())
    federation.run(spec, 0, tmp_path / "cut", resume=True)
    for path in sorted((tmp_path / "whole" / "adapter").rglob("*.safetensors")):
        other = tmp_path / "cut" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes()
    whole, cut = (ledger.read(tmp_path / name / "ledger.jsonl") for name in ("whole", "cut"))
    for step in ("b1", "b2", "b5", "b6", "b8", "eval"):
        assert ledger.total(whole, "flops", step=step) == ledger.total(cut, "flops", step=step) > 0


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8), data=st.data())
def test_rows_are_found_where_they_lie(lengths: list[int], data: Any) -> None:
    ids = [[*range(100 * i, 100 * i + n)] for i, n in enumerate(lengths)]
    empty = np.zeros(0, np.int64)
    examples = Examples(*packed(ids), np.zeros(len(ids), np.int64), empty, empty)
    states = torch.from_numpy(examples.flat).float()[:, None].repeat(1, 2)
    below = Known(states, examples.ends)
    some = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=5))
    rows = data.draw(st.lists(st.integers(0, len(some) - 1), min_size=1, max_size=5))
    part = examples.take(some)
    batch = collate(part, rows)
    hidden = collate(part, rows, known=below.take(part.origin[1])).inputs  # type: ignore[index]
    assert torch.equal(hidden.x[:, 0], batch.inputs.x.float())
    assert hidden.blocks == batch.inputs.blocks
