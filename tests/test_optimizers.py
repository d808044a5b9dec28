"""P-30: what a server makes of the mean change, and what holds clients together meanwhile."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import small
from fedllm import costs, federation
from fedllm import experiment as ex
from fedllm.aggregation import OPTIMIZERS, mean
from fedllm.errors import FedllmError
from fedllm.estimates import lines
from fedllm.estimates.estimator import Estimator
from fedllm.ledger import total
from fedllm.message import Message, Role
from fedllm.planning.sizes import sizes
from fedllm.round import Federation
from fedllm.strategies.corrections import KEPT, SLOT, controls
from fedllm.training.cohort import work
from fedllm.training.jobs import Fit
from fedllm.training.learner import Pull, Span
from fedllm.training.meter import Meter
from fedllm.training.objectives import cross_entropy
from fedllm.worker import LEFT_OUT
from small import build, finish, furthest

SCAFFOLD: dict[str, Any] = {"kind": "parameters", "client": {"kind": "scaffold"}}


def experiment(**sections: Any) -> ex.Experiment:
    return small.experiment("builtin#1", **sections)


HALF = {"beta1": 0.5, "beta2": 0.5, "tau": 1.0}
# From x = [10, 10] with changes [1, -2] and [3, 0] of two clients, the same in both rounds.
BY_HAND: list[tuple[str, dict[str, float], list[float], list[float]]] = [
    ("average", {}, [12, 9], [14, 8]),
    ("momentum", {"rate": 0.5, "beta": 0.9}, [11, 9.5], [12.9, 8.55]),
    # v = 5, 2 and then 9, 3
    ("adagrad", {"rate": 1.0, "beta1": 0.0, "tau": 1.0},
     [10.6180340, 9.5857864], [11.1180340, 9.2197610]),
    # m = 1, -1/2 and then 3/2, -3/4; v = 3, 1 and then 5, 1
    ("yogi", {"rate": 1.0, **HALF}, [10.3660254, 9.75], [10.8295509, 9.375]),
    # the same m; v = 5/2, 1 and then 13/4, 1
    ("adam", {"rate": 1.0, **HALF}, [10.3874259, 9.75], [10.9226097, 9.375]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "numbers", "first", "second"), BY_HAND)
def test_two_clients_by_hand(
    kind: str, numbers: dict[str, float], first: list[float], second: list[float]
) -> None:
    sent = {"a": {"w": torch.tensor([1.0, -2.0])}, "b": {"w": torch.tensor([3.0, 0.0])}}
    change = mean(sent, {"a": 1.0, "b": 1.0})
    state: Mapping[str, Tensor] = {}
    shared: Mapping[str, Tensor] = {"w": torch.tensor([10.0, 10.0])}
    for wanted in (first, second):
        state, shared = OPTIMIZERS[kind](state, shared, change, **numbers)
        assert torch.allclose(shared["w"], torch.tensor(wanted).float(), atol=1e-5)


changes = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=5)


@given(changes, st.floats(0.1, 0.99), st.floats(0.01, 2))
def test_rules_become_one_another(delta: list[float], beta2: float, rate: float) -> None:
    change = {"w": torch.tensor(delta)}
    shared = {"w": torch.linspace(-1, 1, len(delta))}

    def after(kind: str, **numbers: float) -> Tensor:
        found: Tensor = OPTIMIZERS[kind]({}, shared, change, **numbers)[1]["w"]
        return found

    plain = after("average")
    assert torch.equal(after("momentum", rate=1.0, beta=0.0), plain)
    # a large tau hides v: the rules are FedAvg with a rate of the server's
    tau = 1e4
    for kind, more in (("adagrad", {}), ("yogi", {"beta2": beta2}), ("adam", {"beta2": beta2})):
        root = math.sqrt(beta2) if kind == "adam" else 1.0  # of v / tau^2
        found = after(kind, rate=tau * (1 + root), beta1=0.0, tau=tau, **more)
        assert torch.allclose(found, plain, atol=1e-3)
    # without any memory and tau Adam goes by the sign alone
    signed = after("adam", rate=rate, beta1=0.0, beta2=0.0, tau=1e-12)
    small = change["w"].abs() < 1e-6
    assert torch.allclose((signed - shared["w"])[~small], rate * change["w"].sign()[~small],
                          atol=1e-4)  # fmt: skip


def fit(spec: ex.Experiment, steps: int, *pulls: Pull) -> list[Any]:
    """One client's training from first values that are not zero, once for each pull, together."""
    site = build(spec).worker.sites["client-1"]
    return work([
        Fit(site.model, site.model.initial, site.plan(site.train, "private"), cross_entropy,
            spec.training, 0, steps, Span(0, 1), Meter(), "a2", pull=pull)
        for pull in pulls
    ])  # fmt: skip


def test_a_pull_is_added_to_the_gradient() -> None:
    """The second of two steps by hand, and the order in which clipping comes."""
    start = build(experiment()).model.initial
    rate = 0.05
    for clip in (None, 0.5):
        spec = experiment(training={"rate": rate, "batch_size": 4, "clip": clip})
        shift = {name: torch.full_like(tensor, 0.01) for name, tensor in start.items()}
        (one,) = fit(spec, 1, Pull())
        plain, near, shifted = fit(spec, 2, Pull(), Pull(3.0, toward=start), Pull(shift=shift))
        (first,) = fit(spec, 1, Pull(shift=shift))
        assert near.stepped == pytest.approx(2 * rate)
        for name in start:
            # the correction comes after clipping, whole
            assert torch.allclose(one.values[name] - first.values[name], rate * shift[name],
                                  atol=1e-6)  # fmt: skip
            assert not torch.equal(shifted.values[name], plain.values[name])
            gradient = (one.values[name] - plain.values[name]) / rate
            if clip is None:
                gradient = gradient + 3.0 * (one.values[name] - start[name])
                wanted = one.values[name] - rate * gradient
                assert torch.allclose(near.values[name], wanted, atol=1e-6)
        if clip is not None:  # the term is part of the objective: no step is longer than rate clip
            moved = [(near.values[n] - one.values[n]).norm() for n in start]
            assert float(torch.stack(moved).norm()) <= rate * clip * 1.001


def test_with_a_large_mu_a_client_stays() -> None:
    """At mu = 1 / rate each step begins where the first one did."""
    spec = experiment(training={"rate": 0.005, "batch_size": 8})
    start = build(spec).model.initial
    plain, near, none = fit(spec, 12, Pull(), Pull(200.0, toward=start), Pull(0.0, toward=start))
    assert furthest(none.values, plain.values) == 0
    assert 0 < furthest(near.values, dict(start)) < 0.3 * furthest(plain.values, dict(start))


def trained(strategy: dict[str, Any], window: int = 3, **sections: Any) -> tuple[Any, Federation]:
    sections.setdefault("training", {"rate": 0.02, "batch_size": 4})
    spec = experiment(strategy=strategy, **{"rounds": 2, "evaluation": {"every": 0}, **sections})
    built = build(spec)
    built.exchange.transport.window = window  # type: ignore[misc]
    return finish(built).server, built


def test_mu_zero_is_fedavg_bit_for_bit() -> None:
    plain, _ = trained({"kind": "parameters"})
    none, _ = trained({"kind": "parameters", "client": {"kind": "prox", "mu": 0.0}})
    near, _ = trained({"kind": "parameters", "client": {"kind": "prox", "mu": 5.0}})
    assert furthest(plain.shared, none.shared) == 0
    assert furthest(plain.shared, near.shared) > 1e-4


def test_control_variates_sum_up_and_cost_what_the_formula_says() -> None:
    """c is the mean of all c_k, though two of three take part; together as one by one (law 3)."""
    sections: dict[str, Any] = {
        "rounds": 3, "exchange": {"clients_per_round": 2},
        "training": {"rate": 0.005, "batch_size": 4},
    }  # fmt: skip
    ends = [trained(SCAFFOLD, window, **sections) for window in (3, 1)]
    for server, built in ends:
        c = controls(server.optimizer)
        assert {name.removesuffix(SLOT) for name in c} == set(server.shared)
        sites = built.worker.sites.values()
        for name, tensor in c.items():
            kept = [site.group(KEPT).get(name, torch.zeros_like(tensor)) for site in sites]
            assert torch.allclose(tensor, torch.stack(kept).mean(0), atol=1e-6)
        assert any(float(tensor.abs().max()) > 1e-3 for tensor in c.values())
    (together, one), (apart, _) = ends
    assert furthest(together.shared, apart.shared) < 1e-5
    assert furthest(together.optimizer, apart.optimizer) < 1e-3  # divided by K eta
    plain = costs.parameters_payload(one.model)
    twice = costs.parameters_payload(one.model, one.experiment.strategy)  # type: ignore[arg-type]
    assert twice == (2 * plain[0], 2 * plain[1])
    for direction, size in zip(("up", "down"), plain, strict=True):
        for role in ("parameter", "gradient"):
            rows = [r for r in one.ledger.rows if r.role == role and r.direction == direction]
            assert total([r for r in rows if r.step != "eval"], "payload_bytes") == 3 * 2 * size


def test_a_lossy_codec_keeps_nothing_from_c_for_good() -> None:
    """c is the mean of what the clients' c_k are without what their codecs still hold back."""
    codecs = {"gradient": {"up": "topk-10+int8+feedback", "down": "int8"}}
    server, built = trained(SCAFFOLD, rounds=3, exchange={"codecs": codecs, "clients_per_round": 2})
    for name, tensor in controls(server.optimizer).items():
        heard = []
        for site in built.worker.sites.values():
            rest = site.group(LEFT_OUT).get(f"{name}//rest", torch.zeros_like(tensor))
            heard.append(site.group(KEPT).get(name, torch.zeros_like(tensor)) - rest)
        assert torch.allclose(tensor, torch.stack(heard).mean(0), atol=1e-5)


def test_prox_together_is_prox_one_by_one() -> None:
    strategy = {"kind": "parameters", "client": {"kind": "prox", "mu": 1.0}}
    (together, _), (apart, _) = (trained(strategy, window) for window in (3, 1))
    assert furthest(together.shared, apart.shared) < 1e-5


def test_with_one_full_step_corrections_cancel_out() -> None:
    """The mean of g_k - c_k + c is that of g_k; with more steps SCAFFOLD goes elsewhere."""
    same = {"aggregation": "uniform"}
    for size, differs in ((24, False), (4, True)):
        training = {"rate": 0.05, "batch_size": size, "schedule": "linear"}
        ends = [trained({**strategy, **same}, training=training, rounds=3)[0].shared
                for strategy in ({"kind": "parameters"}, SCAFFOLD)]  # fmt: skip
        assert (furthest(*ends) > 1e-4) is differs
        assert furthest(*ends) < (1 if differs else 1e-5)


def test_a_resumed_run_has_the_same_state(tmp_path: Path) -> None:
    strategy = {**SCAFFOLD, "payload": "change", "server": {"kind": "yogi"}}
    spec = experiment(strategy=strategy, rounds=2, evaluation={"every": 0},
                      simulation={"clients": 2, "examples": 6, "test_examples": 6})  # fmt: skip
    prepared = federation.prepare(spec, 0)

    class Stop(federation.Silent):
        def round(self, entry: Any) -> None:
            raise KeyboardInterrupt

    whole = federation.run(spec, 0, tmp_path / "whole", prepared=prepared)
    with pytest.raises(KeyboardInterrupt):
        federation.run(spec, 0, tmp_path / "cut", prepared=prepared, listener=Stop())
    again = federation.run(spec, 0, tmp_path / "cut", resume=True, prepared=prepared)
    assert again["metrics"] == whole["metrics"]
    assert whole["variant"] == "parameters (scaffold, yogi)"
    for path in sorted((tmp_path / "whole").rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")
                                     ).read_bytes()  # fmt: skip


UNEQUAL: dict[str, Any] = {"ranks": [1, 2, 1], "schedule": {1: 1, 2: 2}}


@pytest.mark.parametrize("rule", ["zero-pad", "normalized", "hetlora"])
def test_a_server_steps_from_what_a_rule_of_unequal_ranks_combined(rule: str) -> None:
    """Momentum of none is no optimizer; others keep tensors of the rank that the server has."""
    strategy = {"kind": "parameters", "aggregation": rule, "client": {"kind": "prox", "mu": 0.1}}
    if rule == "hetlora":
        strategy["prune"] = 0.5
    ends = {}
    for kind, server in (("plain", {}), ("same", {"kind": "momentum", "beta": 0.0}),
                         ("adam", {"kind": "adam"})):  # fmt: skip
        mine = {**strategy, "server": server} if server else strategy
        ends[kind], _ = trained(mine, tunables={"rank": 2, **UNEQUAL}, rounds=3)
    assert furthest(ends["plain"].shared, ends["same"].shared) < 1e-5
    assert furthest(ends["plain"].shared, ends["adam"].shared) > 1e-4
    for name, tensor in ends["adam"].shared.items():
        for slot in ("m", "v"):
            assert ends["adam"].optimizer[f"{name}|{slot}"].shape == tensor.shape


@pytest.mark.parametrize(
    ("strategy", "tunables", "codecs"),
    [
        ({**SCAFFOLD, "server": {"kind": "adam"}}, {}, {"gradient": "fp16", "parameter": "int8"}),
        ({"kind": "parameters", "aggregation": "zero-pad", "server": {"kind": "yogi"},
          "client": {"kind": "prox"}}, UNEQUAL, {"parameter": {"up": "int8"}}),
    ],
)  # fmt: skip
def test_a_plan_knows_the_bytes_of_all_together(
    strategy: dict[str, Any], tunables: dict[str, Any], codecs: dict[str, Any]
) -> None:
    _, built = trained(strategy, tunables={"rank": 2, **tunables}, exchange={"codecs": codecs})
    spec, data = built.experiment, sizes(built.experiment)
    line = lines.line(Estimator(spec, data.labels), spec.strategy, data)
    rows = [r for r in built.ledger.rows if r.step.startswith("a")]
    for way, foreseen in zip(("up", "down"), line.payload, strict=True):
        sent = total(rows, "payload_bytes", direction=way) / len(built.worker.sites)
        assert foreseen == pytest.approx(sent / spec.rounds, rel=0.005)
    rows = [r for r in rows if r.role != "measurement"]
    for way, foreseen in (("up", line.up), ("down", line.down)):  # and the names of all parts
        whole = total(rows, "wire_bytes", direction=way) / len(built.worker.sites)
        assert foreseen == pytest.approx(whole / spec.rounds, rel=0.01)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"optimizer": "adam"}}, "for plain SGD only \\(here 'adam'\\)"),
        ({"training": {"momentum": 0.9}}, "for plain SGD only \\(here momentum = 0.9\\)"),
        ({"exchange": {"minimum_replies": 1}}, "leave exchange.minimum_replies out"),
        ({"strategy": {**SCAFFOLD, "mentor": "builtin#1"}}, "strategy.mentor: its pupil"),
        ({"tunables": {"ranks": [1, 2]}, "strategy": {**SCAFFOLD, "aggregation": "zero-pad"}},
         "of one LoRA for all; leave tunables.ranks out"),
        ({"tunables": {"schedule": {1: 1, 2: 2}}}, "one LoRA for all; leave tunables.schedule"),
        ({"strategy": {**SCAFFOLD, "aggregation": "hetlora", "prune": 0.5}},
         "of one rank; leave strategy.prune out"),
        ({"strategy": {**SCAFFOLD, "aggregation": "flexlora"}}, "another basis in every round"),
        ({"strategy": {"kind": "parameters", "aggregation": "flexlora",
                       "server": {"kind": "momentum"}}},
         "another basis.*expected server.kind = 'average'"),
        ({"strategy": {"kind": "parameters", "client": {"kind": "proxy"}}},
         "strategy.client.kind = \"proxy\".*'prox'"),
        ({"strategy": {"kind": "parameters", "server": {"kind": "adam", "beta": 0.5}}},
         "unknown key 'strategy.server.beta'.*beta1"),
        ({"strategy": {"kind": "parameters", "server": {"kind": "yogi", "tau": 0.0}}},
         "strategy.server.tau"),
        ({"strategy": {"kind": "parameters", "client": {"kind": "prox", "mu": -1.0}}},
         "strategy.client.mu"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        experiment(**{"strategy": SCAFFOLD, **sections})


def test_a_site_takes_control_variates_under_scaffold_only() -> None:
    for strategy, shape, wrong in ((SCAFFOLD, (1,), True), ({"kind": "parameters"}, None, True),
                                   (SCAFFOLD, None, False)):  # fmt: skip
        built = build(experiment(strategy=strategy))
        initial = built.model.initial
        sent = dict(initial) | {f"{n}{SLOT}": torch.zeros(shape or t.shape)
                                for n, t in initial.items()}  # fmt: skip
        message = Message("a1", "train", sent, dict.fromkeys(sent, Role.GRADIENT), {}, "client-3",
                          "1.1.1", 1, "run", 1, built.model.base_hash)  # fmt: skip
        (reply,) = built.worker.handle({"client-3": replace(message)}).values()
        assert ("is none of this experiment's tunables" in getattr(reply, "reason", "")) is wrong
