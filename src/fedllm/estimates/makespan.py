"""Where to cut each client's model (S-05), given what every cut would cost: pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.errors import FedllmError


@dataclass(frozen=True)
class Way:
    """
    What a client pays in a round at one cut.

    own: seconds on its machine and its links.  server: seconds of the server for it.  memory:
    bytes at most, on its machine.
    """

    own: float
    server: float
    memory: int


@dataclass(frozen=True)
class Choices:
    """What there is for ``count`` clients that are alike: a way for each cut; bytes they have."""

    name: str
    count: int
    ways: Mapping[int, Way]
    limit: float | None = None

    @property
    def fitting(self) -> dict[int, Way]:
        """Those that the memory allows. Raises FedllmError where it allows none."""
        most = math.inf if self.limit is None else self.limit
        found = {cut: way for cut, way in self.ways.items() if way.memory <= most}
        if not found:
            least = min(way.memory for way in self.ways.values())
            raise FedllmError(
                f"strategy.cut = 'auto': {self.name!r} has {most:,.0f} bytes of memory "
                f"(plan.sites.memory), every cut needs at least {least:,}"
            )
        return found


def makespan(clients: Sequence[Choices], cuts: Sequence[int], serial: bool) -> float:
    """
    Seconds of a round with these cuts.

    serial: clients work one after another, so all that they pay adds up; else they wait for the
    slowest of them, and the server then does its own for everybody.
    """
    chosen = [(one.count, one.ways[cut]) for one, cut in zip(clients, cuts, strict=True)]
    server = sum(count * way.server for count, way in chosen)
    own = [count * way.own for count, way in chosen] if serial else [way.own for _, way in chosen]
    return (sum(own) if serial else max(own)) + server


def choose(clients: Sequence[Choices], serial: bool) -> list[int]:
    """
    The cuts with the least ``makespan``; of equal ones those with fewer blocks at the clients.

    Raises FedllmError where a client has memory for none.
    """
    allowed = [one.fitting for one in clients]
    if serial:  # a sum: everybody's least
        return [
            min(ways, key=lambda cut, ways=ways: (ways[cut].own + ways[cut].server, cut))  # type: ignore[misc]
            for ways in allowed
        ]
    # whatever the slowest may take, everybody takes what spares the server most within that time
    events = sorted(
        (way.own, i, cut) for i, ways in enumerate(allowed) for cut, way in ways.items()
    )
    spared = [math.inf] * len(clients)
    missing, server = len(clients), 0.0
    best, limit = math.inf, math.inf
    for own, i, cut in events:
        before, now = spared[i], clients[i].count * allowed[i][cut].server
        if now < before:
            missing -= before == math.inf
            server += now - (0.0 if before == math.inf else before)
            spared[i] = now
        if not missing and own + server < best:
            best, limit = own + server, own
    return [
        min((way.server, cut) for cut, way in ways.items() if way.own <= limit)[1]
        for ways in allowed
    ]
