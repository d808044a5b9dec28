"""All clients in this process. Frames are real bytes all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fedllm.message import Failure, Frame

Endpoint = Callable[[dict[str, bytes]], dict[str, bytes]]


class Local:
    """Hands posted frames to the clients' endpoint, up to ``cohort`` clients in one call."""

    def __init__(self, clients: Sequence[str], endpoint: Endpoint, cohort: int = 16) -> None:
        """``endpoint`` answers {client: frame} with {client: frame}."""
        self._clients = tuple(clients)
        self._endpoint = endpoint
        self._cohort = cohort
        self.window: int | None = cohort  # more would only wait in memory
        self._posted: list[tuple[str, str, bytes]] = []
        self._count = 0

    def clients(self) -> Sequence[str]:
        """All clients, always there."""
        return self._clients

    def post(self, client: str, frame: bytes) -> str:
        """Keep the frame for the next ``collect``."""
        self._count += 1
        self._posted.append((str(self._count), client, frame))
        return str(self._count)

    def expire(self, id: str) -> None:
        """Nobody is late here."""

    def collect(self, timeout: float | None = None) -> Iterator[tuple[str, Frame | Failure]]:
        """Let the endpoint work through what was posted; a client appears once in each call."""
        while self._posted:
            taken: dict[str, tuple[str, bytes]] = {}
            later = []
            for id, client, frame in self._posted:
                if client in taken or len(taken) >= self._cohort:
                    later.append((id, client, frame))
                else:
                    taken[client] = (id, frame)
            self._posted = later
            answers = self._endpoint({client: frame for client, (_, frame) in taken.items()})
            for client, (id, _) in taken.items():
                yield id, answers[client]
