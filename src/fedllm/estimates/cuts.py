"""Everybody's cut, round by round, under the clock of ``[plan]`` (``strategy.cut = "auto"``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedllm import experiment as ex
from fedllm.estimates.estimator import Estimator
from fedllm.estimates.lines import Bill, choices, split_bills
from fedllm.estimates.makespan import Choices, choose, makespan
from fedllm.estimates.sizes import Sizes


class Cutter:
    """
    Chooses cuts from what is foreseen of each, and from how fast machines and links are.

    A simulation knows no other speeds than those of ``[plan]``: what is measured in a round is
    what the sites' ``speed`` and ``bandwidth`` make of them, so that a run is repeatable.
    """

    def __init__(self, experiment: ex.Experiment, data: Sizes) -> None:
        """data: the clients, a crowd for each or for some that are alike."""
        assert isinstance(experiment.strategy, ex.Activations)
        self.experiment, self.spec, self.data = experiment, experiment.strategy, data
        self._bills: list[dict[int, Bill]] = []

    def at(self, round: int) -> dict[str, int]:
        """Everybody's cut by the speeds measured in this round; 0: by those known beforehand."""
        found = choose(self._choices(round), self._serial)
        each = [cut for cut, crowd in zip(found, self.data.crowds, strict=True)
                for _ in range(crowd.count)]  # fmt: skip
        return dict(zip(self.data.names, each, strict=True))

    def seconds(self, round: int, cuts: Mapping[str, int]) -> float:
        """What a round takes under this clock of those who take part, with their cuts."""
        first, there, mine = 0, [], []
        for one in self._choices(round):
            names = [n for n in self.data.names[first : first + one.count] if n in cuts]
            first += one.count
            if names:  # those of a crowd are alike
                there.append(replace(one, count=len(names)))
                mine.append(cuts[names[0]])
        return makespan(there, mine, self._serial)

    @property
    def _serial(self) -> bool:
        return self.spec.server == "sequential"

    def _choices(self, round: int) -> list[Choices]:
        if not self._bills:
            estimator = Estimator(self.experiment, self.data.labels)
            estimator.few = self.data.few
            self._bills = split_bills(estimator, self.spec, self.data)
        return choices(self.experiment, self.data, self._bills, round)

    def changed(self, since: int, now: int) -> bool:
        """Whether a speed of round ``now`` is far from what it was in round ``since``."""
        most = self.spec.recut
        for crowd in self.data.crowds:
            before, after = crowd.site.at(since), crowd.site.at(now)
            for name in ("flops", "up", "down"):
                old, new = getattr(before, name), getattr(after, name)
                if abs(new - old) > most * old:
                    return True
        return False
