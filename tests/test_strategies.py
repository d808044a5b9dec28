"""Acceptance tests of the catalogue's rows F-01 to F-03, K-04, S-01 to S-03."""

import csv
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fedllm import experiment as ex
from fedllm.ledger import Row, total
from fedllm.round import Federation
from fedllm.strategies import STRATEGIES
from fedllm.strategies.logits import Logits
from fedllm.training.jobs import Tasked, Trained
from shared import needs_shared
from small import GPT2, LLAMA, build, experiment, final, finish, furthest


def steps(built: Federation, client: str, round: int) -> list[str]:
    """Steps of one client and the server in the order in which they first came."""
    rows = [r for r in built.ledger.rows if r.round == round and r.client in (client, "server")]
    return list(dict.fromkeys(row.step for row in rows))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ({"kind": "parameters"}, "a1 a2 a3 a4"),
        ({"kind": "logits"}, "b1 b2 b3 b4 b5 b6 b7 b8"),
        ({"kind": "logits", "server_model": False}, "b1 b2 b3 b4 b7 b8"),
        ({"kind": "activations", "cut": 2}, "c1 c2 c3 c4 c5 cc1 cc2 cc3 cc4"),
        ({"kind": "standalone"}, "alone local"),
    ],
    ids=["parameters", "logits", "fedmd", "activations", "standalone"],
)
def test_the_papers_steps_stand_in_the_ledger(strategy: dict[str, Any], expected: str) -> None:
    built = build(experiment(rounds=2, strategy=strategy, evaluation={"every": 0}))
    finish(built)
    for number in (1, 2):
        assert set(steps(built, "client-1", number)) - {"eval"} == set(expected.split())
    clock = {r.step for r in built.ledger.rows if r.direction == "compute" and r.seconds > 0}
    assert clock & set(expected.split())


@pytest.mark.parametrize("kind", ["parameters", "activations"])
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_training_helps(kind: str, task: str) -> None:
    spec = experiment(
        GPT2, task, rounds=3, strategy={"kind": kind}, rows=60,
        training={"optimizer": "adam", "rate": 0.005, "epochs": 2},
    )  # fmt: skip
    history = finish(build(spec)).history
    assert history[-1]["loss"] < history[0]["loss"] - 0.05


# F-02 -------------------------------------------------------------------------------------------


def test_distillation_brings_the_server_closer_to_the_knowledge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = experiment(
        rounds=1, strategy={"kind": "logits", "epochs": 12}, public={"size": 24},
        training={"optimizer": "adam", "rate": 0.01, "epochs": 3},
    )  # fmt: skip
    losses: list[float] = []
    distil = Logits._distil

    def spy(*arguments: Any) -> Tasked[Trained]:
        result = yield from distil(*arguments)
        losses.append(result.loss)
        return result

    monkeypatch.setattr(Logits, "_distil", spy)
    finish(build(spec.replace(strategy={"kind": "logits", "epochs": 1})))
    finish(build(spec))
    # the first distillation of each run is the server's (b5): a longer one has a lower mean loss
    assert losses[len(losses) // 2] < losses[0]


def test_no_parameter_travels_with_logits() -> None:
    built = build(experiment(strategy={"kind": "logits"}))
    finish(built)
    work = [row for row in built.ledger.rows if row.step != "eval"]
    assert {row.role for row in work if row.direction != "compute"} == {
        "logit", "index", "header", "measurement",
    }  # fmt: skip


def test_a_shipped_public_set_is_counted_once() -> None:
    built = build(experiment(rounds=2, strategy={"kind": "logits"},
                             public={"size": 12, "ship": True}))  # fmt: skip
    finish(built)
    sent = [row for row in built.ledger.rows if row.role == "token"]
    assert {row.round for row in sent} == {1}
    assert {row.step for row in sent} == {"b0"}
    tokens = built.strategy.public.tokens  # type: ignore[attr-defined]
    assert total(sent, "payload_bytes", client="client-1") == 4 * (tokens + 12)


def test_shipping_changes_no_result() -> None:
    strategy = {"kind": "logits"}
    here = final(experiment(strategy=strategy))
    shipped = final(experiment(strategy=strategy, public={"size": 12, "ship": True}))
    assert furthest(here, shipped) == 0


@needs_shared
@pytest.mark.parametrize("server", [True, False])
def test_clients_of_different_architecture(server: bool) -> None:
    """A Llama type beside GPT-2 types; with ``server_model = false`` this is FedMD (K-04)."""
    strategy = {"kind": "logits", "server_model": server, "client_models": [GPT2, LLAMA, GPT2]}
    spec = experiment(GPT2, rounds=1, strategy=strategy)
    built = build(spec)
    kinds = {site.model.model.config.model_type for site in built.worker.sites.values()}
    assert kinds == {"gpt2", "llama"}
    entry = finish(built).history[-1]
    assert (entry["global"] is not None) == server
    assert set(entry["clients"]) == {"client-1", "client-2", "client-3"}


def test_a_client_learns_a_class_it_has_never_seen(tmp_path: Path) -> None:
    """F-02 (iii): a class that is missing at home is learnt through the others' logits (b8)."""
    words = {"fruit": "sweet apple and pear", "metal": "heavy iron and steel",
             "water": "deep river and lake"}  # fmt: skip
    homes = {"a": ["fruit", "metal"], "b": ["metal", "water"], "c": ["water", "fruit"]}

    def write(name: str, rows: list[tuple[str, str, str]]) -> str:
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([("text", "intent", "home"), *rows])
        return str(tmp_path / name)

    def some(kind: str, home: str, count: int) -> list[tuple[str, str, str]]:
        return [(f"{i} {words[kind]} {i * 7 % 10}", kind, home) for i in range(count)]

    train = write("train.csv", [r for h, ks in homes.items() for k in ks for r in some(k, h, 16)])
    test = write("test.csv", [r for h in homes for k in words for r in some(k, h, 6)])
    public = write("public.csv", [r for k in words for r in some(k, "", 16)])
    spec = experiment(
        rounds=3, public={"source": public, "size": 48},
        strategy={"kind": "logits", "epochs": 4, "server_model": False},
        simulation={"clients": 3, "partition": {"kind": "by_column", "column": "home"},
                    "source": train, "test": test},
        training={"optimizer": "adam", "rate": 0.005, "epochs": 2},
    )  # fmt: skip
    together = finish(build(spec)).history[-1]["clients"]
    alone = finish(build(spec.replace(strategy={"kind": "standalone"}))).history[-1]["clients"]
    missing = {"a": "water", "b": "fruit", "c": "metal"}
    assert all(alone[home]["per_class"][label] == 0 for home, label in missing.items())
    assert sum(together[home]["per_class"][label] for home, label in missing.items()) >= 0.5


# F-03 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["sequential", "per-client", "concatenated"])
def test_after_cc4_all_client_halves_are_equal(server: str) -> None:
    built = build(experiment(strategy={"kind": "activations", "cut": 2, "server": server}))
    finish(built)
    halves = [site.group("tunables") for site in built.worker.sites.values()]
    assert halves[0]
    assert all(furthest(half, halves[0]) == 0 for half in halves)


def test_client_flops_grow_with_the_cut_and_stay_below_the_whole() -> None:
    def flops(strategy: dict[str, Any]) -> float:
        built = build(experiment(strategy=strategy, evaluation={"every": 0}))
        finish(built)
        rows = [row for row in built.ledger.rows if row.step != "eval"]
        return total(rows, "flops", client="client-1")

    cuts = [flops({"kind": "activations", "cut": cut}) for cut in (1, 2, 3)]
    whole = flops({"kind": "parameters"})
    assert cuts[0] < cuts[1] < cuts[2] < whole
    assert cuts[2] - cuts[1] == pytest.approx(cuts[1] - cuts[0], rel=0.01)  # linear in the cut


def test_both_halves_compute_what_the_whole_does() -> None:
    one = {"clients": 1, "sizes": [16]}
    split = build(experiment(simulation=one, strategy={"kind": "activations", "cut": 2}))
    whole = build(experiment(simulation=one))
    finish(split)
    finish(whole)

    def flops(rows: list[Row]) -> float:
        return total([row for row in rows if row.step != "eval"], "flops")

    # below the first tunable of the server half there is a gradient to compute, too
    assert flops(split.ledger.rows) == pytest.approx(flops(whole.ledger.rows), rel=0.05)


def test_only_sequential_depends_on_the_order_of_clients() -> None:
    """S-02: V1 and one step on all batches do not; V2 draws its order anew each round."""
    spec = experiment(strategy={"kind": "activations", "cut": 2})

    def with_order(server: str, flip: bool) -> dict[str, torch.Tensor]:
        built = build(spec.replace(strategy={"kind": "activations", "cut": 2, "server": server}))
        state = built.strategy.start()
        built.exchange.open(1)

        class Order:
            def permutation(self, count: int) -> list[int]:
                return list(range(count))[:: -1 if flip else 1]

        cohort = sorted(built.worker.sites)
        return built.strategy.serve(state, cohort, built.exchange, Order()).shared  # type: ignore[arg-type]

    for server in ("per-client", "concatenated"):
        assert furthest(with_order(server, False), with_order(server, True)) == 0
    assert furthest(with_order("sequential", False), with_order("sequential", True)) > 0


def test_averaging_may_come_more_often() -> None:
    def averages(every: int) -> float:
        strategy = {"kind": "activations", "cut": 2, "average_every": every}
        built = build(experiment(strategy=strategy))
        finish(built)
        rows = [row for row in built.ledger.rows if row.step == "cc1" and row.direction == "up"]
        return total(rows, "frames", client="client-1")

    assert averages(0) == 1
    assert averages(1) == 2  # after the first of its two batches, and at the end of the round


def test_the_server_keeps_its_optimizer_and_clients_restart_theirs() -> None:
    spec = experiment(rounds=2, strategy={"kind": "activations", "cut": 2},
                      training={"optimizer": "adam", "rate": 1e-3})  # fmt: skip
    built = build(spec)
    seen: list[float] = []
    finish(
        built,
        lambda committed: seen.append(
            max(float(t) for n, t in committed.server.optimizer.items() if n.endswith("|step"))
        ),
    )
    assert seen[1] == 2 * seen[0] > 0
    assert not any(site.group("optimizer") for site in built.worker.sites.values())


# Heads, sampling, objective ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parameters", "activations"])
def test_a_personal_head_stays_at_home(kind: str) -> None:
    strategy = {"kind": kind} | ({"labels": "client"} if kind == "activations" else {})
    built = build(experiment(rounds=2, strategy=strategy, tunables={"head": "personal"}))
    end = finish(built)
    assert not any("score" in name for name in end.server.shared)
    heads = [site.group("personal") for site in built.worker.sites.values()]
    assert all(set(head) == {"model.score.weight"} for head in heads)
    assert furthest(heads[0], heads[1]) > 0


def test_a_frozen_head_is_part_of_the_base() -> None:
    model = build(experiment(tunables={"head": "frozen"})).worker.sites["client-1"].model
    assert not any("score" in name for name in model.initial)
    assert model.base_hash != build(experiment()).worker.sites["client-1"].model.base_hash


def test_some_clients_a_round_by_the_rounds_own_stream() -> None:
    spec = experiment(rounds=6, exchange={"clients_per_round": 1}, evaluation={"every": 0})
    cohorts = [entry["cohort"] for entry in finish(build(spec)).history]
    assert all(len(cohort) == 1 for cohort in cohorts)
    assert len({cohort[0] for cohort in cohorts}) > 1
    assert cohorts == [entry["cohort"] for entry in finish(build(spec)).history]


def test_absent_clients_catch_up_under_activations() -> None:
    spec = experiment(rounds=4, strategy={"kind": "activations", "cut": 2},
                      exchange={"clients_per_round": 2}, evaluation={"every": 0})  # fmt: skip
    built = build(spec)
    finish(built)
    sent = [row for row in built.ledger.rows if row.step == "cc3"]
    assert total(sent, "frames") > 4 * 2  # more than the cohorts' own: who was away got it later


@pytest.mark.parametrize("labelled", [False, True])
def test_labels_of_the_public_set_change_the_result_only_if_shown(labelled: bool) -> None:
    plain = final(experiment(strategy={"kind": "logits"}))
    other = final(
        experiment(strategy={"kind": "logits"}, public={"size": 12, "labelled": labelled})
    )
    assert (furthest(plain, other) > 0) == labelled


def test_the_table_names_every_strategy_of_the_experiment_file() -> None:
    options = get_args(get_args(ex.Strategy)[0])
    kinds = {option.model_fields["kind"].default for option in options}
    assert set(STRATEGIES) == kinds
