"""Runs of clients with different ranks, of ranks that change, and of a frozen first factor."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm import compare, costs, federation, round
from fedllm import experiment as ex
from fedllm.aggregation import UNEQUAL
from fedllm.errors import FedllmError
from fedllm.lora import grow, pairs, rank_of, resized
from fedllm.models.export import load_adapter
from fedllm.models.inputs import Inputs
from fedllm.planning import plan
from fedllm.round import Federation
from fedllm.streams import stream
from small import build, experiment, finish

UNEVEN: dict[str, Any] = {"kind": "lora", "rank": 4, "ranks": [1, 2, 4], "layers": [3]}


def uneven(rule: str = "zero-pad", **sections: Any) -> ex.Experiment:
    strategy = {"kind": "parameters", "aggregation": rule, **sections.pop("strategy", {})}
    sections.setdefault("tunables", UNEVEN)
    sections.setdefault("training", {"rate": 0.03})
    return experiment(
        "builtin#4", rows=18, strategy=strategy,
        **{"rounds": 2, "evaluation": {"every": 0}, **sections},
    )  # fmt: skip


def paid(built: Federation, round: int, client: str, direction: str = "up") -> int:
    step = "a3" if direction == "up" else "a1"
    return sum(
        r.payload_bytes
        for r in built.ledger.rows
        if (r.round, r.client, r.direction, r.step) == (round, client, direction, step)
    )


def flops(built: Federation, round: int, client: str) -> int:
    return sum(r.flops for r in built.ledger.rows
               if (r.round, r.client, r.step) == (round, client, "a2"))  # fmt: skip


def test_each_client_has_its_own_rank_under_every_rule() -> None:
    """The first round trains the same; of all, ``flexlora`` is nearest to the mean of products."""
    gaps, losses = {}, set()
    for rule in UNEQUAL:
        built = build(uneven(rule))
        end = finish(built)
        first = built.model.initial
        assert {n: t.shape for n, t in end.server.shared.items()} == {
            n: t.shape for n, t in first.items()
        }
        for client, rank in (("client-1", 1), ("client-2", 2), ("client-3", 4)):
            size = costs.parameters_payload(built.model, rank=rank)
            for number in (1, 2):
                assert (paid(built, number, client), paid(built, number, client, "down")) == size
        gaps[rule] = end.history[0]["product_gap"]
        losses.add(end.history[0]["loss"])
    assert len(losses) == 1
    assert all(gaps["flexlora"] < gaps[rule] for rule in UNEQUAL if rule != "flexlora")


def test_a_plan_of_several_ranks_is_what_a_run_pays() -> None:
    spec = uneven("flexlora", tunables={
        **UNEVEN, "schedule": {"1": 1, "2": 4}, "budgets": {"client-3": 17_000},
    })  # fmt: skip
    built = build(spec)
    finish(built)
    line = plan.look(spec).lines[0]
    up = [paid(built, number, f"client-{k}") for number in (1, 2) for k in (1, 2, 3)]
    assert line.payload[0] == pytest.approx(sum(up) / 6, abs=1)
    work = sum(flops(built, number, f"client-{k}") for number in (1, 2) for k in (1, 2, 3))
    assert line.flops == pytest.approx(work / 6, rel=1e-3)
    other = plan.look(spec.replace(tunables=spec.tunables.even(4))).lines[0]  # type: ignore[union-attr]
    assert other.flops > line.flops and other.memory >= line.memory


def test_the_first_values_are_the_first_components() -> None:
    built = build(uneven(rounds=1))
    heard: dict[str, dict[str, torch.Tensor]] = {}
    real = built.strategy.tasks["train"]

    def train(site: Any, message: Any) -> Any:
        heard[site.name] = dict(message.tensors)
        return (yield from real(site, message))  # type: ignore[misc]

    built.strategy.tasks = {"train": train}
    finish(built)
    first = built.model.initial
    for got in heard.values():
        for a, b in pairs(first):
            assert torch.equal(got[a], first[a][: rank_of(got)])
            assert torch.equal(got[b], first[b][:, : rank_of(got)])
    assert {c: rank_of(t) for c, t in heard.items()} == {
        "client-1": 1, "client-2": 2, "client-3": 4
    }  # fmt: skip


def test_payloads_and_cohorts_change_nothing_but_rounding() -> None:
    """Law 3; what travels as a difference is the same."""
    ends = []
    for payload, cohort in (("value", 3), ("value", 1), ("delta", 3), ("change", 3)):
        built = build(uneven("normalized", strategy={"payload": payload}))
        built.exchange.transport.window = cohort
        ends.append(finish(built).server.shared)
    for other in ends[1:]:
        for name, tensor in ends[0].items():
            assert torch.allclose(tensor, other[name], atol=2e-5)


def test_a_table_says_whose_rank_is_which() -> None:
    spec = uneven(tunables={**UNEVEN, "ranks": {"client-2": 1}})
    assert federation.halve(
        spec, 0, federation.prepare(spec, 0), federation.Silent()
    ).setup.ranks == {"client-2": 1}
    with pytest.raises(FedllmError, match=r"tunables.ranks.klient-2: no such .*'client-2'"):
        build(uneven(tunables={**UNEVEN, "ranks": {"klient-2": 1}}))


def test_a_reply_of_another_rank_is_its_clients_failure() -> None:
    built = build(uneven(exchange={"minimum_replies": 2}))
    real = built.strategy.train  # type: ignore[attr-defined]

    def train(site: Any, message: Any) -> Any:
        reply = yield from real(site, message)
        if site.name == "client-3":
            reply.tensors.update(resized(reply.tensors, 2))
        return reply

    built.strategy.tasks = {"train": train}
    finish(built)
    faults = [r for r in built.ledger.rows if r.failures]
    assert {r.client for r in faults} == {"client-3"}
    assert all("with shape" in r.reason for r in faults)


# P-07 ---------------------------------------------------------------------------------------------


def test_a_client_with_shuffled_labels_ends_below_its_even_share() -> None:
    even = {"clients": 3, "sizes": [60, 60, 60]}
    built = build(
        experiment(
            "builtin#3", rounds=3, tunables={"rank": 8}, evaluation={"every": 0},
            simulation={**even, "shuffled": {"client-3": 1.0}},
            strategy={"kind": "parameters", "balance": {"temperature": 1.0}},
            training={"optimizer": "adam", "rate": 0.01, "epochs": 2},
        )
    )  # fmt: skip
    for entry in finish(built).history:
        shares = [entry[f"client-{k}_share"] for k in (1, 2, 3)]
        assert sum(shares) == pytest.approx(1) and shares[2] < 0.3


# P-09 ---------------------------------------------------------------------------------------------


def test_pruned_clients_send_less_and_never_grow_again() -> None:
    """A penalty that outweighs the loss shrinks what is above, after the first round's start."""
    spec = uneven(
        "hetlora", rounds=3, strategy={"prune": 0.5, "prune_penalty": 30.0},
        training={"rate": 0.02},
    )  # fmt: skip
    built = build(spec)
    end = finish(built)
    ranks = {c: int(group["rank"]) for c, group in end.server.clients.items()}
    assert "client-1" not in ranks and ranks["client-3"] < 4  # of 1 nothing can go
    for client, first in (("client-1", 1), ("client-2", 2), ("client-3", 4)):
        sent = [paid(built, number, client) for number in (1, 2, 3)]
        sizes = {costs.parameters_payload(built.model, rank=r)[0]: r for r in (1, 2, 4)}
        found = [sizes[size] for size in sent]
        assert found == sorted(found, reverse=True) and found[0] <= first
        assert found[-1] == ranks.get(client, first)
        down = [sizes[paid(built, number, client, "down")] for number in (2, 3)]
        assert down == found[:2]  # the server was told


def test_without_a_penalty_nobody_is_pruned_where_nothing_shrinks() -> None:
    end = finish(build(uneven("hetlora", rounds=1, strategy={"prune": 0.5})))
    assert end.server.clients == {}


def test_what_a_schedule_holds_back_is_not_pruned() -> None:
    """Who had one component in the first round has its own rank in the second."""
    spec = uneven("hetlora", tunables={**UNEVEN, "schedule": {1: 1, 2: 4}}, strategy={"prune": 0.5})
    built = build(spec)
    finish(built)
    for client, rank in (("client-1", 1), ("client-2", 2), ("client-3", 4)):
        size, _ = costs.parameters_payload(built.model, rank=rank)
        assert paid(built, 2, client, "down") == size


@pytest.mark.parametrize("rule", ["zero-pad", "hetlora"])
def test_what_nobody_of_a_round_owns_adds_nothing_and_can_still_learn(rule: str) -> None:
    """With both factors zero there would be no gradient of either, for good."""
    built = build(uneven(rule, rounds=1, tunables={**UNEVEN, "ranks": [1, 2, 1]}))
    shared, first = finish(built).server.shared, built.model.initial
    for a, b in pairs(shared):
        assert torch.equal(shared[a][2:], first[a][2:]) and not shared[b][:, 2:].any()
        assert bool(shared[b][:, 1].any())


# P-10 ---------------------------------------------------------------------------------------------


def test_growth_changes_no_logit() -> None:
    built = build(uneven())
    site = built.worker.sites["client-1"]
    noise = torch.Generator().manual_seed(1)
    own = {n: t + 0.1 * torch.randn(t.shape, generator=noise)
           for n, t in resized(site.model.initial, 2).items()}  # fmt: skip
    inputs = site.plan(site.train, "private").batch([0, 1, 2]).inputs
    grown = grow(own, 4, stream("growth"))
    one, other = (site.model.whole.apply_to(t, inputs) for t in (own, grown))
    assert torch.allclose(one, other, rtol=0, atol=1e-6)


SCHEDULE: dict[str, Any] = {"schedule": {"1": 1, "2": 4, "3": 2}}


def change(tunables: dict[str, Any], **sections: Any) -> ex.Experiment:
    return experiment(
        "builtin#4", rounds=3, rows=18, evaluation={"every": 0},
        tunables={"kind": "lora", "rank": 4, "layers": [3], **tunables},
        training={"optimizer": "adam", "rate": 0.01, **sections.pop("training", {})}, **sections,
    )  # fmt: skip


def test_the_payload_follows_the_schedule_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    """Optimizers go on through growth; a shorter list of ranks at the end is exported as it is."""
    spec = change(SCHEDULE, training={"optimizer_state": "keep"})
    prepared = federation.prepare(spec, 0)

    class Stop(federation.Silent):
        def round(self, entry: Any) -> None:
            raise KeyboardInterrupt

    federation.run(spec, 0, tmp_path / "whole", prepared=prepared)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            federation.run(spec, 0, tmp_path / "cut", prepared=prepared, listener=Stop(),
                           resume=(tmp_path / "cut").exists())  # fmt: skip
    federation.run(spec, 0, tmp_path / "cut", resume=True, prepared=prepared)
    whole, cut = ({p.name: p.read_bytes() for p in (tmp_path / n / "checkpoints").rglob("*.safe*")}
                  for n in ("whole", "cut"))  # fmt: skip
    assert whole == cut
    built = build(spec)
    end = finish(built)
    for number, rank in ((1, 1), (2, 4), (3, 2)):
        up, _ = costs.parameters_payload(built.model, rank=rank)
        assert paid(built, number, "client-1") == up
    steps = {float(t) for n, t in built.worker.sites["client-1"].group("optimizer").items()
             if n.endswith("|step") and "lora" not in n}  # fmt: skip
    assert steps == {3.0 * -(-len(built.worker.sites["client-1"].train) // 8)}
    assert rank_of(end.server.shared) == 2
    again = load_adapter(built.model, tmp_path / "whole" / "adapter")
    assert all(torch.equal(again[n], t) for n, t in end.server.shared.items())


def test_after_a_fall_optimizers_forget_factors_of_the_old_basis() -> None:
    """Also where a client's own rank stays as it was."""
    built = build(change(
        {"ranks": {"client-1": 1}, "schedule": {"1": 4, "3": 2}},
        training={"optimizer_state": "keep"},
        strategy={"kind": "parameters", "aggregation": "zero-pad"},
    ))  # fmt: skip
    finish(built)
    for client in ("client-1", "client-2"):
        site = built.worker.sites[client]
        steps = {("lora" in name): float(t) for name, t in site.group("optimizer").items()
                 if name.endswith("|step")}  # fmt: skip
        once = -(-len(site.train) // 8)
        assert steps == {True: once, False: 3 * once}


@pytest.mark.parametrize(("gain", "last"), [(0.0, 1), (0.9, 4)])
def test_a_plateau_lets_the_rank_grow_also_after_a_resume(gain: float, last: int) -> None:
    """A fall of the loss counts as such where it is large enough; a plan is of no fall at all."""
    spec = change({"growth": {"start": 1, "factor": 4, "patience": 1, "gain": gain}})
    built, committed = build(spec), []
    end = finish(built, committed.append)
    first, second, _ = (entry["loss"] for entry in end.history)
    assert 0.1 * first < second < first
    sizes = {rank: costs.parameters_payload(built.model, rank=rank)[0] for rank in (1, 4)}
    ranks = (1, 1, last)
    assert [paid(built, n, "client-1") for n in (1, 2, 3)] == [sizes[r] for r in ranks]
    again = round.run(build(spec), committed[1], lambda committed: None)
    assert rank_of(again.server.shared) == last and again.server.facts == end.server.facts
    assert all(torch.equal(t, again.server.shared[n]) for n, t in end.server.shared.items())
    assert isinstance(spec.tunables, ex.Lora)
    assert [spec.tunables.most(n) for n in (1, 2, 3)] == [1, 1, 4]


def test_a_client_whose_budget_falls_goes_on_with_a_lower_rank() -> None:
    """Its bytes follow its budget from round to round; the others' do not."""
    built = build(
        change({"budgets": {"client-2": {"1": 10**6, "2": 17_000}}}, training={"optimizer": "adam"},
               strategy={"kind": "parameters", "aggregation": "flexlora"})
    )  # fmt: skip
    finish(built)
    sizes = {r: costs.parameters_payload(built.model, rank=r)[0] for r in (1, 2, 3, 4)}
    low = max(rank for rank, size in sizes.items() if size <= 17_000)
    assert low < 4
    for number, rank in ((1, 4), (2, low), (3, low)):
        assert [paid(built, number, f"client-{k}") for k in (1, 2, 3)] == [
            sizes[4], sizes[rank], sizes[4]
        ]  # fmt: skip


# P-14 ---------------------------------------------------------------------------------------------


def test_with_a_frozen_first_factor_the_mean_is_the_mean_of_products(tmp_path: Path) -> None:
    """And the payload of LoRA is d_out / (d_in + d_out) of what it was: 3 of 4 for c_attn."""
    spec = uneven("mean", rounds=1, tunables={"kind": "lora", "rank": 2, "freeze_a": True})
    built = build(spec)
    plain = build(uneven("mean", rounds=1, tunables={"kind": "lora", "rank": 2}))
    sent: dict[str, dict[str, torch.Tensor]] = {}
    inner = built.strategy.rule  # type: ignore[attr-defined]

    def listen(updates: Any, weights: Any) -> Any:
        sent.update(updates)
        return inner(updates, weights)

    built.strategy.rule = listen  # type: ignore[attr-defined]
    shared, end = finish(built).server.shared, finish(plain)
    own = dict(built.model.whole.named_parameters())
    names = [a for a, _ in pairs(own)]
    assert names and not any(a in shared for a in names)
    assert all(torch.equal(own[a], plain.model.initial[a]) for a in names)  # from the seed
    total = sum(len(s.train) for s in built.worker.sites.values())
    for a, b in pairs(own):
        products = sum(len(built.worker.sites[c].train) / total * (u[b] @ own[a])
                       for c, u in sent.items())  # fmt: skip
        assert torch.allclose(shared[b] @ own[a], products, rtol=0, atol=1e-6)
    assert end.history[0]["product_gap"] > 1e-4  # which the mean of both factors is not
    head = costs.tunable_bytes(built.model, sorted(built.model.head))
    less, more = (paid(one, 1, "client-1") - head for one in (built, plain))
    assert less / more == pytest.approx(0.75)
    federation.save_adapter(built.model, shared, tmp_path, ["x"])
    again = load_adapter(built.model, tmp_path)
    assert all(torch.equal(again[n], t) for n, t in shared.items())


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"strategy": {"aggregation": "mean"}}, "different ranks .*'zero-pad', 'normalized'"),
        ({"tunables": {**UNEVEN, "ranks": [8]}}, "8 is more than rank = 4"),
        ({"tunables": {**UNEVEN, "ranks": ["x"]}}, "expected a list of ranks"),
        ({"tunables": {**UNEVEN, "freeze_a": True}}, "freeze_a: one first matrix for all"),
        ({"tunables": {**UNEVEN, "budgets": {"client-1": {"2": 9}}}}, "budgets: .*rounds from 1"),
        ({"tunables": {"rank": 4, "growth": {"start": 8}}}, "growth.start: 8 is more than rank"),
        ({"tunables": {"rank": 4, "growth": {}, "schedule": {"1": 2}}}, "growth: schedule says"),
        ({"tunables": {**UNEVEN, "schedule": {"2": 2}}}, "schedule: expected rounds from 1"),
        ({"tunables": {"kind": "bitfit"}}, "both factors of LoRA.*'bitfit'"),
        ({"strategy": {"aggregation": "hetlora", "balance": {}}}, "has weights of its own"),
        ({"strategy": {"prune": 0.5}}, "prune: only with aggregation = 'hetlora'"),
        ({"strategy": {"mentor": "builtin#2"}}, "strategy.mentor: with one LoRA for all"),
        ({"strategy": {"prune_penalty": 0.5}}, "prune_penalty = 0.5: only with prune"),
        (
            {
                "strategy": {"mentor": "builtin#2", "aggregation": "hetlora", "prune": 0.5},
                "tunables": {"kind": "lora"},
            },
            "leave strategy.prune out",
        ),
        (
            {"strategy": {"aggregation": "flexlora"}, "training": {"optimizer_state": "keep"}},
            "another basis in every round.*expected 'reset'",
        ),
    ],
)
def test_ranks_that_cannot_be_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        uneven(**sections)


def test_a_budget_that_carries_nothing_is_refused() -> None:
    with pytest.raises(FedllmError, match=r"tunables.budgets: 9 bytes; expected at least [0-9,]+"):
        build(uneven(tunables={**UNEVEN, "budgets": [{"1": 10**6, "2": 9}]}))
    with pytest.raises(FedllmError, match=r"tunables.budgets.klient-2: no such .*'client-2'"):
        build(uneven(tunables={**UNEVEN, "budgets": {"klient-2": 10**6}}))


PARTED: dict[str, Any] = {
    "kind": "lora", "rank": 4, "layers": [2, 3], "targets": ["c_attn", "c_fc"],
    "modules": {"client-1": {"layers": [-1]}, "client-2": {"targets": ["c_fc"]}},
}  # fmt: skip


@pytest.mark.parametrize("payload", ["value", "delta", "change"])
def test_a_module_is_made_by_those_who_have_it(payload: str) -> None:
    """Of what only client 3 has its own values are the new ones; nobody sends what it has not."""
    built = build(uneven("mean", rounds=1, tunables=PARTED, strategy={"payload": payload}))
    sent: dict[str, dict[str, torch.Tensor]] = {}
    rows: dict[str, float] = {}
    real = built.strategy.tasks["train"]

    def train(site: Any, message: Any) -> Any:
        reply = yield from real(site, message)  # type: ignore[misc]
        sent[site.name] = reply.tensors
        rows[site.name] = float(reply.facts["weight"])
        assert reply.tensors.keys() == message.tensors.keys()
        return reply

    built.strategy.tasks = {"train": train}
    end = finish(built).server.shared
    first, factors = built.model.initial, [n for n in built.model.initial if ".lora_" in n]
    own = {
        "client-1": {n for n in factors if ".3." in n},
        "client-2": {n for n in factors if "c_fc" in n}, "client-3": set(factors),
    }  # fmt: skip
    for client, names in own.items():
        assert {n for n in sent[client] if ".lora_" in n} == names
        size = sum(first[n].numel() * 4 for n in first if n in names or n not in factors)
        assert paid(built, 1, client) == paid(built, 1, client, "down") == size
    alone = [n for n in factors if ".2." in n and "c_attn" in n]
    both = [n for n in factors if ".3." in n and "c_attn" in n]
    assert alone and both
    for names, owners in ((alone, ["client-3"]), (both, ["client-1", "client-3"])):
        for name in names:
            total = sum(rows[c] for c in owners)
            mean = sum(sent[c][name].double() * rows[c] / total for c in owners)
            if payload != "value":
                mean = mean + first[name].double()
            assert torch.allclose(end[name].double(), mean, atol=1e-6)


def test_with_every_module_it_is_the_same_run() -> None:
    whole = finish(build(uneven("normalized", rounds=1))).server.shared
    modules = [{"layers": [3]}, {"layers": [-1], "targets": ["c_attn"]}]
    built = build(uneven("normalized", rounds=1, tunables={**UNEVEN, "modules": modules}))
    for name, tensor in finish(built).server.shared.items():
        assert torch.equal(tensor, whole[name])


def test_a_target_is_named_as_shortly_as_it_is_known() -> None:
    """Where LoRA is around ``attn.c_proj``, ``c_proj`` is that alone, also in a plan."""
    spec = uneven("mean", rounds=1, tunables={
        **PARTED, "targets": ["attn.c_proj"], "modules": [{"targets": ["c_proj"], "layers": [3]}],
    })  # fmt: skip
    built = build(spec)
    finish(built)
    assert plan.look(spec).lines[0].payload[0] == paid(built, 1, "client-1")


def test_modules_are_written_down_as_they_are_read() -> None:
    spec = uneven("mean", tunables=PARTED)
    assert ex.parse_text(ex.dump(spec), "test", Path.cwd()) == spec
    listed = ex.vary(spec, {"tunables.modules": [{"layers": [3]}, {}]})
    assert ex.vary(listed, {"tunables.rank": 4}) == listed


def test_what_a_client_has_not_adds_nothing_to_its_model() -> None:
    """And what lies below its own modules runs once for each row, for which it is charged less."""
    built = build(uneven("mean", tunables=PARTED))
    model, modules = built.model, ex.Modules(layers=(-1,))
    own = model.only(modules)
    assert model.only(modules) is own and model.stage(own.initial) is own
    assert model.stage(model.initial) is model
    assert (model.untouched, own.untouched) == (2, 3)
    drawn = torch.Generator().manual_seed(1)
    values = {n: torch.randn(t.shape, generator=drawn) / 10 for n, t in own.initial.items()}
    inputs = Inputs.of(torch.arange(3, 11).view(2, 4))
    whole = model.whole.apply_to({**model.initial, **values}, inputs)
    assert torch.equal(own.whole.apply_to(values, inputs), whole)
    assert not torch.equal(own.whole.apply_to(own.initial, inputs), whole)


@pytest.mark.parametrize("rule", ["normalized", "flexlora"])
def test_a_plan_of_several_modules_is_what_a_run_pays(rule: str) -> None:
    """With ranks of their own, too; and a run that goes on after a break is the same."""
    spec = uneven(rule, tunables={**PARTED, "ranks": [4, 2, 1], "budgets": {"client-2": 30_000}})
    built = build(spec)
    finish(built)
    line = plan.look(spec).lines[0]
    up = [paid(built, number, f"client-{k}") for number in (1, 2) for k in (1, 2, 3)]
    assert len(set(up)) == 3
    assert line.payload[0] == pytest.approx(sum(up) / 6, abs=1)
    work = sum(flops(built, number, f"client-{k}") for number in (1, 2) for k in (1, 2, 3))
    assert line.flops == pytest.approx(work / 6, rel=1e-3)


def test_modules_that_there_are_not_are_refused() -> None:
    for modules, said in (
        ({"client-1": {"layers": [1]}}, "LoRA is in the blocks 2, 3 of 4; .*not 1"),
        ({"client-1": {"targets": ["c_atn"]}}, "'c_atn'; did you mean 'c_attn'"),
        ({"client-9": {"layers": [3]}}, r"tunables.modules.client-9: no such client"),
    ):
        spec = uneven("mean", tunables={**PARTED, "modules": modules})
        with pytest.raises(FedllmError, match=said):
            build(spec)
        assert re.search(said, plan.look(spec).lines[0].refused)
    with pytest.raises(FedllmError, match="around the head, which all have"):
        build(uneven("mean", tunables={**PARTED, "targets": ["c_fc", "score"]}))
    for wrong in (3, [3], [{"layer": [3]}], [{"layers": ["3"]}], {"client-1": {"layers": []}}):
        with pytest.raises(FedllmError, match=r"tunables.modules: .*expected a list of tables"):
            uneven("mean", tunables={**PARTED, "modules": wrong})


def test_a_comparison_says_which_part_cannot_have_them(tmp_path: Path) -> None:
    spec = uneven("mean", tunables=PARTED, compare={"strategies": ["parameters"]})
    with pytest.raises(FedllmError, match=r"compare: \w+ cannot run: tunables.modules: only"):
        compare.run(spec, tmp_path / "out")


@pytest.mark.parametrize("kind", ["logits", "activations", "standalone", "centralized"])
def test_other_strategies_have_one_rank(kind: str) -> None:
    with pytest.raises(
        FedllmError, match=r"tunables\.ranks: only with strategy.kind = 'parameters'"
    ):
        experiment(tunables=UNEVEN, strategy={"kind": kind})
