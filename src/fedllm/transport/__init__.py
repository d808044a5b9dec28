"""Moves bytes between server and clients; knows nothing above ``message``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from fedllm.message import Failure, Frame


class Transport(Protocol):
    """
    The seam between one process and many machines.

    window: how many frames may be posted before they are collected; None: any number.
    """

    window: int | None

    def clients(self) -> Sequence[str]:
        """Clients that can be asked."""
        ...

    def post(self, client: str, frame: bytes) -> str:
        """Send a frame; returns the id under which its answer will come."""
        ...

    def expire(self, id: str) -> None:
        """Nobody waits for this answer any more; ``collect`` gives it all the same if it comes."""
        ...

    def collect(self, timeout: float | None = None) -> Iterator[tuple[str, Frame | Failure]]:
        """Answers of everything posted, as they come."""
        ...
