"""What is measured costs nobody its seconds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.models.flops import FlopCounter
from fedllm.training.batches import Batch, collate
from fedllm.training.cohort import alone
from fedllm.training.meter import Cost, LiveBytes, Member, Meter, passing
from small import build, experiment


class Clock:
    """Time passes only when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_counting_flops_is_not_charged(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    site = build(experiment()).worker.sites["client-1"]
    meter = site.meter = Meter(clock=clock)
    count = FlopCounter.__call__

    def slow(self: FlopCounter, *args: Any) -> int:
        clock.now += 100
        return count(self, *args)

    monkeypatch.setattr(FlopCounter, "__call__", slow)
    site.round = 1
    alone(site.fine_tune(site.model.initial, "a2"))
    assert clock.now >= 100
    assert meter.cost("a2").flops > 0
    assert meter.cost("a2").seconds == 0


def test_a_measured_pass_is_charged_as_an_unmeasured_one(clock: Clock) -> None:
    site = build(experiment()).worker.sites["client-1"]
    core, meter = site.model.whole, Meter(clock=clock)

    def one_pass(batch: Batch, seconds: float) -> float:
        cost = Cost()

        with passing(core, "train", [Member(meter, cost, batch, 0)], None):
            clock.now += seconds
        return cost.seconds

    two, four = collate(site.train, [0, 1], 48), collate(site.train, [0, 1, 2, 3], 48)
    one_pass(two, 50)  # nothing is known yet of how long it takes without measuring
    assert one_pass(two, 1) == 1
    assert one_pass(four, 90) == pytest.approx(2)  # measured for the first time: twice the rows
    assert one_pass(four, 7) == 7


def test_a_pass_of_many_is_charged_by_tokens_and_its_probes_to_nobody(clock: Clock) -> None:
    site = build(experiment()).worker.sites["client-1"]
    meter = Meter(clock=clock)
    batches = [collate(site.train, [0, 1]), collate(site.train, [2])]
    members = [Member(meter, Cost(), batch, 1000 * n) for n, batch in enumerate(batches)]
    probed = []

    def pass_alone(member: Member) -> Callable[[], Tensor]:
        clock.now += 100
        probed.append(member)
        prepared = torch.ones(1000)  # not counted
        return lambda: prepared[:1] * torch.zeros(10 * member.batch.rows)

    with passing(site.model.whole, "train", members, pass_alone):
        clock.now += 6
    assert probed == members
    assert sum(member.cost.seconds for member in members) == pytest.approx(6)
    shares = [member.cost.seconds / member.batch.tokens for member in members]
    assert shares[0] == pytest.approx(shares[1])
    assert [member.cost.peak_memory for member in members] == [160, 1000 + 80]


@given(rows=st.integers(1, 50), times=st.integers(1, 9))
def test_live_bytes_are_what_is_alive(rows: int, times: int) -> None:
    with LiveBytes() as counter:
        kept = [torch.zeros(rows) for _ in range(times)]
        del kept[times // 2 :]
    assert counter.peak == 4 * rows * times
    assert counter.live == 4 * rows * (times // 2)
