"""Cuts that go by machines (S-05): the best there are; training is the same wherever a block is."""

import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm import experiment as ex
from fedllm.checkpoint import Committed
from fedllm.errors import FedllmError
from fedllm.estimates.makespan import Choices, Way, choose, makespan
from fedllm.models.inputs import Inputs
from fedllm.planning import plan, show
from fedllm.strategies.activations import _no_moments
from small import GPT2, build, experiment, final, finish, furthest

AUTO = {"kind": "activations", "cut": "auto", "server": "per-client"}
FLEET = [
    {"name": "phone", "flops": 3e7, "speed": [1.0, 100.0], "latency": 0.0, "up": 1e9, "down": 1e9},
    {"name": "desk", "flops": 2e9, "latency": 0.0, "up": 1e9, "down": 1e9},
    {"name": "room", "flops": 1e10, "speed": [1.0, 0.003], "latency": 0.0, "up": 1e9, "down": 1e9},
]


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("serial", [True, False])
def test_the_chosen_cuts_are_those_of_brute_force(seed: int, serial: bool) -> None:
    rng = random.Random(seed)
    cuts = range(1, rng.randint(2, 5))
    clients = [
        Choices(
            f"site {i}", rng.randint(1, 3),
            {c: Way(rng.choice([rng.random(), 1]), rng.random(), rng.randint(1, 9)) for c in cuts},
            rng.choice([None, 5, 8]),
        )
        for i in range(rng.randint(1, 5))
    ]  # fmt: skip
    allowed = [
        [c for c, way in one.ways.items() if one.limit is None or way.memory <= one.limit]
        for one in clients
    ]
    if not all(allowed):
        with pytest.raises(FedllmError, match=r"strategy.cut = 'auto': 'site \d' has [58] bytes"):
            choose(clients, serial)
        return
    found = choose(clients, serial)
    assert all(cut in ways for cut, ways in zip(found, allowed, strict=True))
    least = min(makespan(clients, cuts, serial) for cuts in product(*allowed))
    assert makespan(clients, found, serial) == pytest.approx(least, rel=1e-12)


def test_blocks_that_change_sides_take_their_optimizers_along() -> None:
    """Every client trains the whole model: wherever it is cut, it is plain averaging."""
    some: dict[str, Any] = {
        "rounds": 3, "training": {"momentum": 0.9, "rate": 0.01, "optimizer_state": "keep"},
        "plan": {"sites": FLEET, "server": {"flops": 3e9}},
    }  # fmt: skip
    spec = experiment(GPT2, strategy=AUTO, **some)
    built = build(spec)
    strategy: Any = built.strategy
    seen = []

    def look(committed: Committed) -> None:
        state = committed.server
        cuts = strategy._cuts(sorted(built.worker.sites), state)
        seen.append(tuple(cuts.values()))
        for name, site in built.worker.sites.items():
            mine, model = site.group("tunables"), site.model
            assert set(mine) == strategy._names(cuts[name])
            x = Inputs.of(torch.from_numpy(site.train.row(0))[None])
            whole = model.whole.apply_to(state.shared, x)
            half = x.after(model.part("client", cuts[name]).apply_to(mine, x))
            above = model.part("server", cuts[name])
            there = {n: state.shared[n] for n in model.tunables_of(above)}
            assert float((above.apply_to(there, half) - whole).abs().max()) < 1e-5

    end = finish(built, look)
    assert len(set(seen)) > 1, seen
    first = end.history[0]["clock"]
    assert first == pytest.approx(plan.look(spec).cuttings[0].line.seconds, rel=0.02)
    assert len({entry["clock"] for entry in end.history}) > 1
    plain = final(experiment(GPT2, **some))
    assert furthest(end.server.shared, plain) < 1e-5


def test_cuts_stay_while_no_speed_has_changed_by_much() -> None:
    cutter = build(
        experiment(GPT2, strategy={**AUTO, "recut": 0.5}, plan={"sites": [
            {"count": 2, "speed": [1.0, 1.4, 1.6]}, {"bandwidth": [1.0, 1.0, 1.0, 0.4]},
        ]})
    ).strategy.setup.cutter  # type: ignore[attr-defined] # fmt: skip
    assert [cutter.changed(0, number) for number in (1, 2, 3)] == [False, False, True]
    assert [cutter.changed(3, number) for number in (4, 5)] == [True, True]
    assert not cutter.changed(4, 9)
    cuts = dict.fromkeys(("client-1", "client-2", "client-3"), 1)
    whole = cutter.seconds(1, cuts)  # of those who take part, if not everybody does
    each = [cutter.seconds(1, {client: 1}) for client in cuts]
    assert max(each) < whole < sum(each)


def test_a_mixed_fleet_is_sooner_done_than_with_one_cut_for_all() -> None:
    """Three kinds of machines on two kinds of links; what the plan says is what a run measures."""
    slow = {"up": 2e5, "down": 1e6}
    sites = [
        {"name": "phone", "flops": 1e8, **slow},
        {"name": "desk", "flops": 1e9, **slow},
        {"name": "room", "flops": 1e11, "up": 1e7, "down": 1e7},
    ]
    spec = experiment(GPT2, strategy=AUTO, plan={"sites": sites, "server": {"flops": 1e9}})
    found = plan.look(spec)
    ours, *fixed = found.cuttings
    assert len(fixed) == 3 and len(ours.clients) > 1
    assert all(ours.line.seconds < one.line.seconds for one in fixed)
    text = show.text(found, None, "md")
    assert "| by machine |" in text and "| 3 for all |" in text


@pytest.mark.parametrize(("key", "shape", "good"), [
    ("a|exp_avg", (2,), True), ("a|step", (), True), ("b|exp_avg", (2,), False),
    ("a|exp_avg", (3,), False), ("a|other", (2,), False), ("a|step", (2,), False),
])  # fmt: skip
def test_what_an_optimizer_does_not_remember_is_refused(
    key: str, shape: tuple[int, ...], good: bool
) -> None:
    found = _no_moments({key: torch.ones(shape)}, {"a": torch.zeros(2)}, {"exp_avg", "step"})
    assert (found == "") is good
    assert _no_moments({"a|step": -torch.ones(())}, {"a": torch.zeros(2)}, {"step"})


def test_what_needs_one_cut_refuses_several() -> None:
    for more in ({"server": "concatenated"}, {"average_every": 2}):
        with pytest.raises(FedllmError, match="needs one cut for all"):
            ex.parse({"strategy": {**AUTO, **more}}, "test", Path.cwd())
