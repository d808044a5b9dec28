"""What is measured costs nobody its seconds."""

from typing import Any

import pytest

from fedllm.models.flops import FlopCounter
from fedllm.training.batches import Batch, collate
from fedllm.training.meter import Cost, Meter
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
    meter = Meter(clock=clock)
    batch = collate(site.train, [0, 1])
    count = FlopCounter.__call__

    def slow(self: FlopCounter, *args: Any) -> int:
        clock.now += 100
        return count(self, *args)

    monkeypatch.setattr(FlopCounter, "__call__", slow)
    with meter.step("a2") as cost:
        clock.now += 3
        assert meter.flops(site.model, site.model.whole, batch, True) > 0
    assert cost.seconds == 3


def test_a_measured_pass_is_charged_as_an_unmeasured_one(clock: Clock) -> None:
    site = build(experiment()).worker.sites["client-1"]
    core, meter = site.model.whole, Meter(clock=clock)

    def one_pass(batch: Batch, seconds: float) -> float:
        with meter.step("a2") as cost:
            before = cost.seconds
            with meter.memory(cost, core, batch, "train", 0):
                clock.now += seconds
        return cost.seconds - before

    two, four = collate(site.train, [0, 1], 48), collate(site.train, [0, 1, 2, 3], 48)
    one_pass(two, 50)  # nothing is known yet of how long it takes without measuring
    assert one_pass(two, 1) == 1
    assert one_pass(four, 90) == pytest.approx(2)  # measured for the first time: twice the rows
    assert one_pass(four, 7) == 7


def test_what_was_held_before_counts_for_the_peak() -> None:
    site = build(experiment()).worker.sites["client-1"]
    batch = collate(site.train, [0, 1], 20)
    peaks = []
    for held in (0, 1000):
        cost = Cost()
        with site.meter.memory(cost, site.model.whole, batch, "train", held):
            pass
        peaks.append(cost.peak_memory)
    assert peaks[1] - peaks[0] == 1000
