"""All clients' rows in two pools; a client's own are cut out when somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fedllm.data.examples import NOTHING, Examples, join

BLOCK = 256  # clients whose rows are joined at once


@dataclass(frozen=True)
class ClientData:
    """One client's tokenized rows."""

    train: Examples
    test: Examples


class Clients(Mapping[str, ClientData]):
    """
    Each client's rows, by name.

    A set of rows is half a dozen small objects; ten thousand clients would have a hundred
    thousand. Here they have two sets together, of which a client's rows are a view.
    """

    def __init__(
        self, train: Examples, test: Examples, sizes: Mapping[str, tuple[int, int]]
    ) -> None:
        """train, test: rows of one client after another's.  sizes: how many each has of both."""
        self.train, self.test = train, test
        self._numbers = {name: number for number, name in enumerate(sizes)}
        self._ends = np.cumsum([(0, 0), *sizes.values()], axis=0)

    @staticmethod
    def of(clients: Iterable[tuple[str, ClientData]]) -> Clients:
        """Pool the clients' rows as they come."""
        sizes: dict[str, tuple[int, int]] = {}
        pools: list[ClientData] = []
        rest = iter(clients)
        while block := dict(islice(rest, BLOCK)):
            sizes |= {name: (len(data.train), len(data.test)) for name, data in block.items()}
            pools.append(_joined(list(block.values())))
        if not pools:  # a server of other people's rows
            return Clients(NOTHING, NOTHING, sizes)
        whole = _joined(pools)
        return Clients(whole.train, whole.test, sizes)

    def __getitem__(self, name: str) -> ClientData:
        """This client's rows; nothing is copied."""
        number = self._numbers[name]
        (train, test), (train_end, test_end) = self._ends[number : number + 2].tolist()
        return ClientData(self.train.part(train, train_end), self.test.part(test, test_end))

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def _joined(parts: Sequence[ClientData]) -> ClientData:
    return ClientData(join([data.train for data in parts]), join([data.test for data in parts]))
