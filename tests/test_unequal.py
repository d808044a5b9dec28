"""P-06 to P-10, P-14: clients with LoRA of different ranks, and ranks that change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.aggregation import OPTIMIZERS, RULES, UNEQUAL, by_owners, mean
from fedllm.aggregation.balance import balanced
from fedllm.aggregation.unequal import product_gap, strengths
from fedllm.errors import FedllmError
from fedllm.lora import excess, grow, moved, rank_of, resized, scaled_up, shrink
from fedllm.streams import stream

Group = dict[str, Tensor]
OUT, IN, MODULES, ALPHA = 7, 5, ("x", "y"), 16.0
rules = pytest.mark.parametrize("name", sorted(UNEQUAL))
few = settings(max_examples=12)
ranks_ = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def client(rank: int, seed: int) -> Group:
    """LoRA of two modules, and a head."""
    draw = torch.Generator().manual_seed(seed)
    found = {"head": torch.randn(3, generator=draw)}
    for module in MODULES:
        found[f"{module}.lora_A.default.weight"] = torch.randn(rank, IN, generator=draw)
        found[f"{module}.lora_B.default.weight"] = torch.randn(OUT, rank, generator=draw)
    return found


def clients(*ranks: int) -> dict[str, Group]:
    return {f"client-{k}": client(rank, k) for k, rank in enumerate(ranks, 1)}


def added(tunables: Group, module: str = "x") -> Tensor:
    """(alpha / r) B A, written out: what the module adds to its weight."""
    a = tunables[f"{module}.lora_A.default.weight"].double()
    return tunables[f"{module}.lora_B.default.weight"].double() @ a * (ALPHA / len(a))


def filled(value: float, rank: int) -> Group:
    return {n: torch.full_like(t, value) for n, t in client(rank, 0).items()}


def some(updates: dict[str, Group]) -> dict[str, float]:
    return {name: float(k) for k, name in enumerate(updates, 1)}


def close(one: Tensor, other: Tensor, atol: float = 1e-6) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=0, atol=atol)


# The rules ----------------------------------------------------------------------------------------


@rules
def test_the_mean_of_1_2_3_is_2(name: str) -> None:
    """Of every tensor; of a product space, of the products."""
    updates = {f"client-{v}": {**filled(1.0, 1), "head": torch.full((3,), float(v))}
               for v in (1, 2, 3)}  # fmt: skip
    for v, update in enumerate(updates.values(), 1):
        for module in MODULES:
            update[f"{module}.lora_B.default.weight"] *= v
    result = UNEQUAL[name](updates, dict.fromkeys(updates, 1.0), filled(0.0, 1))
    share = 14 / 6 if name == "hetlora" else 2.0  # it weighs 1, 2 and 3 by their norms
    assert close(added(result), torch.full((OUT, IN), ALPHA * share), 1e-5)
    assert close(result["head"], torch.full((3,), 2.0))


@rules
@few
@given(ranks=ranks_, data=st.data())
def test_the_order_of_clients_changes_nothing(
    name: str, ranks: list[int], data: st.DataObject
) -> None:
    updates = clients(*ranks)
    weights = some(updates)
    other = {c: updates[c] for c in data.draw(st.permutations(list(updates)))}
    before = client(4, 99)
    first, second = (UNEQUAL[name](given_, weights, before) for given_ in (updates, other))
    assert all(torch.equal(first[n], second[n]) for n in before)
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in before.items()}


@rules
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_client_is_refused_and_named(name: str, bad: float) -> None:
    updates = clients(1, 2, 4)
    updates["client-2"]["y.lora_A.default.weight"][0, 0] = bad
    with pytest.raises(FedllmError, match=r"client-2.*NaN or infinity"):
        UNEQUAL[name](updates, some(updates), client(4, 99))


@rules
def test_other_names_and_shapes_are_refused_and_named(name: str) -> None:
    for wrong in ({"head": torch.zeros(5)}, {"more": torch.zeros(1)}):
        updates = clients(1, 2)
        updates["client-2"] |= wrong
        with pytest.raises(FedllmError, match="client-2"):
            UNEQUAL[name](updates, some(updates), client(4, 99))


@pytest.mark.parametrize("name", ["zero-pad", "normalized"])
@few
@given(rank=st.integers(1, 4), count=st.integers(1, 5))
def test_equal_ranks_are_fedavg_bit_for_bit(name: str, rank: int, count: int) -> None:
    updates = clients(*[rank] * count)
    weights = {c: 0.1 + 3.7 * w for c, w in some(updates).items()}
    result, plain = UNEQUAL[name](updates, weights, client(rank, 99)), mean(updates, weights)
    assert all(torch.equal(result[n], plain[n]) for n in plain)


@pytest.mark.parametrize("name", sorted({*RULES, *UNEQUAL}))
@few
@given(ranks=ranks_, data=st.data())
def test_each_tensor_is_its_owners_alone(name: str, ranks: list[int], data: st.DataObject) -> None:
    """As if there were no other clients; what nobody has stays; heads are everybody's."""
    most = ranks if name in UNEQUAL else [3] * len(ranks)
    before, updates = client(4 if name in UNEQUAL else 3, 99), clients(*most)
    rule = UNEQUAL[name] if name in UNEQUAL else lambda u, w, _: RULES[name](u, w)
    weights = some(updates)
    whole = rule(updates, weights, before)
    assert all(
        torch.equal(whole[n], t) for n, t in by_owners(rule, updates, weights, before).items()
    )
    owners = [c for c in updates if data.draw(st.booleans(), label=c)]
    mine = {c: {n: t for n, t in u.items() if c in owners or not n.startswith("x.")}
            for c, u in updates.items()}  # fmt: skip
    found = by_owners(rule, mine, weights, before)
    assert found.keys() == before.keys() and torch.equal(found["head"], whole["head"])
    only = {c: {n: t for n, t in updates[c].items() if n.startswith("x.")} for c in owners}
    x = {n: t for n, t in before.items() if n.startswith("x.")}
    want = rule(only, weights, x) if owners else x
    if len(owners) < len(updates):  # else norms are of all modules together
        assert all(torch.equal(found[n], want[n]) for n in x)
    gap = product_gap(mine, weights, found)
    assert gap == gap and (name != "flexlora" or sum(most) > 4 or gap < 1e-4)


@pytest.mark.parametrize("name", sorted({"mean", *UNEQUAL} - {"hetlora"}))
def test_who_counts_nothing_makes_nothing(name: str) -> None:
    """Of a module that only those have who count nothing."""
    before, updates = client(3, 99), clients(3, 3)
    rule = UNEQUAL[name] if name in UNEQUAL else lambda u, w, _: mean(u, w)
    few, every = sorted(updates)
    mine = {**updates, few: {n: t for n, t in updates[few].items() if not n.startswith("x.")}}
    found = by_owners(rule, mine, {few: 1.0, every: 0.0}, before)
    assert all(torch.equal(found[n], before[n]) == n.startswith("x.") for n in before)
    assert product_gap(mine, {few: 1.0, every: 0.0}, found) < 1e-4


@few
@given(ranks=ranks_)
def test_filled_up_and_cut_again_is_what_it_was(ranks: list[int]) -> None:
    """At every step the components that are there add what they added."""
    for rank in ranks:
        own = client(rank, 1)
        wide = resized(own, 8)
        assert rank_of(wide) == 8
        assert close(added(wide), added(own), 1e-5)
        again = resized(wide, rank)
        assert all(torch.allclose(again[n], own[n], rtol=1e-6, atol=0) for n in own)
        if rank != 3:  # 8 / r is exact in floating point
            assert all(torch.equal(again[n], own[n]) for n in own)


def test_who_owns_a_component_alone_is_not_diluted() -> None:
    """P-06: theta_j = sum w_k s_k theta_kj / sum over the owners of j of w_k s_k, s_k = r_k."""
    updates = clients(1, 4, 2)
    weights = {"client-1": 5.0, "client-2": 2.0, "client-3": 1.0}
    result = UNEQUAL["normalized"](updates, weights, client(4, 99))
    full = {c: resized(u, 4) for c, u in updates.items()}
    a, b = "x.lora_A.default.weight", "x.lora_B.default.weight"
    assert torch.equal(result[a][2:], full["client-2"][a][2:])
    assert torch.equal(result[b][:, 2:], full["client-2"][b][:, 2:])
    shared = (2 * 4 * full["client-2"][a][1] + 1 * 2 * full["client-3"][a][1]) / (2 * 4 + 1 * 2)
    assert close(result[a][1], shared)
    head = sum(w * updates[c]["head"] for c, w in weights.items())
    assert close(result["head"], head / 8)  # ranks say nothing of it
    padded = UNEQUAL["zero-pad"](updates, weights, client(4, 99))
    assert close(padded[a][3], updates["client-2"][a][3] * 2 / 8)  # and this one is


@pytest.mark.parametrize("weightless", [False, True])
def test_what_nobody_owns_stays_as_it_was(weightless: bool) -> None:
    """Or only those who do not count (``strategy.balance`` may have it so)."""
    updates, before = clients(1, 2, *[4] * weightless), client(4, 99)
    weights = {**some(updates), "client-3": 0.0}
    result = UNEQUAL["normalized"](updates, weights, before)
    assert torch.equal(result["x.lora_A.default.weight"][2:], before["x.lora_A.default.weight"][2:])


@few
@given(ranks=ranks_)
def test_strengths_are_frobenius_norms_in_shares(ranks: list[int]) -> None:
    updates = clients(*ranks)
    slow = {
        c: sum(float((u[f"{m}.lora_B.default.weight"].double()
                      @ u[f"{m}.lora_A.default.weight"].double()).square().sum())
               for m in MODULES) ** 0.5
        for c, u in updates.items()
    }  # fmt: skip
    found = strengths(updates)
    assert sum(found.values()) == pytest.approx(1.0)
    for c, norm in slow.items():
        assert found[c] == pytest.approx(norm / sum(slow.values()), rel=1e-9)
    equal = {c: client(2, 1) for c in updates}  # equal norms and ranks: FedAvg
    plain = RULES["uniform"](equal, some(equal))
    result = UNEQUAL["hetlora"](equal, some(equal), client(2, 99))
    assert all(close(result[n], plain[n]) for n in plain)
    still = {c: filled(0.0, 2) for c in updates}
    assert set(strengths(still).values()) == {1 / len(still)}


@few
@given(ranks=ranks_, rank=st.integers(1, 4))
def test_flexlora_delivers_the_best_approximation_of_the_mean_product(
    ranks: list[int], rank: int
) -> None:
    updates = clients(*ranks)
    weights = some(updates)
    total = sum(weights.values())
    result = UNEQUAL["flexlora"](updates, weights, client(5, 99))
    for module in MODULES:
        whole = sum((weights[c] / total * added(u, module) for c, u in updates.items()),
                    torch.zeros(OUT, IN, dtype=torch.float64))  # fmt: skip
        assert close(added(result, module), whole, 1e-4)  # of rank 5 at most: exact
        sigma = torch.linalg.svdvals(whole)
        got = resized(result, rank)
        error = float((added(got, module) - whole).square().sum())
        assert error == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-3, abs=1e-6)
    heads = {c: {"head": u["head"]} for c, u in updates.items()}
    assert torch.equal(result["head"], mean(heads, weights)["head"])


@few
@given(ranks=ranks_)
def test_with_room_for_all_ranks_nothing_is_lost(ranks: list[int]) -> None:
    """What FLoRA's stacking is for: the mean product itself, not its best approximation."""
    updates = clients(*ranks)
    found = UNEQUAL["flexlora"](updates, some(updates), client(sum(ranks), 99))
    assert product_gap(updates, some(updates), found) < 1e-4


def test_the_mean_product_is_exact_and_counts_each_rank() -> None:
    """Within 1e-6; without the alpha / r_k of each client it is another one."""
    updates = {c: {n: t / 8 for n, t in u.items()} for c, u in clients(1, 2, 1).items()}
    weights = some(updates)
    result = UNEQUAL["flexlora"](updates, weights, client(4, 99))
    whole = sum((weights[c] / 6 * added(u) for c, u in updates.items()),
                torch.zeros(OUT, IN, dtype=torch.float64))  # fmt: skip
    assert close(added(result), whole)
    blind = sum((weights[c] / 6 * added(u) * rank_of(u) / 4 for c, u in updates.items()),
                torch.zeros(OUT, IN, dtype=torch.float64))  # fmt: skip
    assert not close(added(result), blind, 1e-2)


def test_components_that_a_mean_product_has_not_can_still_learn() -> None:
    before = client(6, 99)  # higher than the sum of ranks, and than the module is wide
    result = UNEQUAL["flexlora"](clients(1, 2), {"client-1": 1.0, "client-2": 1.0}, before)
    a, b = result["x.lora_A.default.weight"], result["x.lora_B.default.weight"]
    assert a.shape == (6, IN) and bool((a.norm(dim=1) > 0).all())
    assert not b[:, 3:].any()


@few
@given(ranks=ranks_)
def test_the_gap_is_the_distance_written_out(ranks: list[int]) -> None:
    updates = clients(*ranks)
    weights = some(updates)
    total, apart, whole = sum(weights.values()), 0.0, 0.0
    result = UNEQUAL["zero-pad"](updates, weights, client(4, 99))
    for module in MODULES:
        target = sum((weights[c] / total * added(u, module) for c, u in updates.items()),
                     torch.zeros(OUT, IN, dtype=torch.float64))  # fmt: skip
        whole += float(target.square().sum())
        apart += float((added(result, module) - target).square().sum())
    assert product_gap(updates, weights, result) == pytest.approx((apart / whole) ** 0.5, abs=1e-6)
    exact = UNEQUAL["flexlora"](updates, weights, client(5, 99))
    assert product_gap(updates, weights, exact) < 1e-5
    one = {"client-1": client(4, 1)}
    assert product_gap(one, {"client-1": 3.0}, one["client-1"]) < 1e-7


# P-07 ---------------------------------------------------------------------------------------------


def test_the_less_a_client_errs_the_more_it_counts() -> None:
    weights, losses = {"a": 10.0, "b": 10.0, "c": 20.0}, {"a": 1.0, "b": 3.0, "c": 1.0}
    found = balanced(weights, losses, 1.0, 0.01, 100.0)
    assert found["b"] / found["a"] == pytest.approx(torch.e**-2)
    assert found["c"] == pytest.approx(2 * found["a"])
    assert found["b"] / sum(found.values()) < weights["b"] / sum(weights.values())
    assert balanced(weights, dict.fromkeys(weights, 0.7), 0.1, 0.01, 100.0) == weights


def test_nobody_falls_below_the_floor_or_rises_above_the_cap() -> None:
    weights, losses = {"a": 1.0, "b": 2.0, "c": 1.0}, {"a": 0.0, "b": 1e6, "c": 1e6}
    assert balanced(weights, losses, 1.0, 0.25, 4.0) == {"a": 4.0, "b": 0.5, "c": 0.25}


# P-09 ---------------------------------------------------------------------------------------------


def test_the_pruning_penalty_has_a_gradient() -> None:
    own = {n: t.requires_grad_(True) for n, t in client(4, 1).items()}
    value = excess(own, 3)
    b, a = own["x.lora_B.default.weight"], own["x.lora_A.default.weight"]
    by_hand = sum(float(t[f"{m}.lora_B.default.weight"][:, 3:].norm()
                        * t[f"{m}.lora_A.default.weight"][3:].norm())
                  for t in (client(4, 1),) for m in MODULES)  # fmt: skip
    assert float(value.detach()) == pytest.approx(by_hand)
    value.backward()  # type: ignore[no-untyped-call]
    assert b.grad is not None and a.grad is not None
    assert bool(b.grad[:, 3].any()) and bool(a.grad[3].any())
    assert not b.grad[:, :3].any() and not a.grad[:3].any()


# P-10 ---------------------------------------------------------------------------------------------


@few
@given(rank=st.integers(1, 4), more=st.integers(1, 9))
def test_growth_changes_nothing_that_is_added(rank: int, more: int) -> None:
    own = client(rank, 1)
    grown = grow(own, rank + more, stream("growth"))
    assert rank_of(grown) == rank + more
    assert all(close(added(grown, m), added(own, m), 1e-5) for m in MODULES)
    a, b = grown["x.lora_A.default.weight"], grown["x.lora_B.default.weight"]
    assert bool(a[rank:].any(dim=1).all()) and not b[:, rank:].any()
    again = grow(own, rank + more, stream("growth"))
    assert all(torch.equal(grown[n], again[n]) for n in own)


@few
@given(rank=st.integers(1, 4), less=st.integers(1, 4))
def test_shrinking_drops_the_least_singular_values(rank: int, less: int) -> None:
    own = client(rank, 1)
    cut = shrink(own, min(less, rank))
    for module in MODULES:
        sigma = torch.linalg.svdvals(added(own, module))
        error = float((added(cut, module) - added(own, module)).square().sum())
        assert error == pytest.approx(float(sigma[less:].square().sum()), rel=1e-3, abs=1e-6)
    assert torch.equal(cut["head"], own["head"])


@pytest.mark.parametrize("kind", ["momentum", "adagrad", "yogi", "adam"])
def test_a_servers_optimizer_goes_on_as_if_all_had_been_of_the_higher_rank(kind: str) -> None:
    """State of rank 2 that grew to 6, and state of the same changes at rank 6."""
    numbers = {"rate": 0.5, "beta": 0.9} if kind == "momentum" else {
        "rate": 0.1, "beta1": 0.9, "tau": 1e-3, **({} if kind == "adagrad" else {"beta2": 0.99}),
    }  # fmt: skip
    low, high, tau = dict[str, Tensor](), dict[str, Tensor](), numbers.get("tau", 0.0)
    for seed in range(4):
        change = client(2, seed)
        low, _ = OPTIMIZERS[kind](low, client(2, 9), change, **numbers)
        high, _ = OPTIMIZERS[kind](high, client(6, 9), resized(change, 6), **numbers)
    grown = scaled_up(low, 6, tau**2)
    assert grown.keys() == high.keys()
    for name, tensor in grown.items():
        want, begun = high[name], tau**2 if kind != "momentum" and name.endswith("|v") else 0.0
        if "lora_" in name:
            side = 0 if "lora_A" in name else 1
            tensor, new = tensor.tensor_split([2], side)
            want = want.tensor_split([2], side)[0]
            assert bool((new == begun).all())
        assert torch.allclose(tensor, want, rtol=1e-4, atol=2e-5)


def test_moments_follow_the_gradient_of_what_grew() -> None:
    """B is scaled up by r' / r, so its gradient by r / r'; A's is the same as before."""
    draw = torch.Generator().manual_seed(3)
    x, probe = torch.randn(4, IN, generator=draw), torch.randn(4, OUT, generator=draw)
    grads: list[dict[str, Tensor]] = []
    small = client(2, 1)
    for tunables in (small, grow(small, 8, stream("g"))):
        own = {n: t.clone().requires_grad_(True) for n, t in tunables.items()}
        a, b = own["x.lora_A.default.weight"], own["x.lora_B.default.weight"]
        ((x @ a.T) @ b.T * (ALPHA / len(a)) * probe).sum().backward()  # type: ignore[no-untyped-call]
        assert a.grad is not None and b.grad is not None
        grads.append({"x.lora_A.default.weight": a.grad, "x.lora_B.default.weight": b.grad})
    state = {f"{n}|{slot}": g**power for n, g in grads[0].items()
             for slot, power in (("exp_avg", 1), ("exp_avg_sq", 2))}  # fmt: skip
    found = moved({**state, "x.lora_A.default.weight|step": torch.tensor(5.0)}, 8)
    for name, grad in grads[1].items():
        side = (slice(2), slice(None)) if "lora_A" in name else (slice(None), slice(2))
        for slot, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            tensor = found[f"{name}|{slot}"]
            assert tensor.shape == grad.shape
            assert close(tensor[side], grad[side] ** power, 1e-4)
            assert float(tensor.norm()) == pytest.approx(float(tensor[side].norm()))
    assert float(found["x.lora_A.default.weight|step"]) == 5.0
    assert moved(found, 2) == {}
