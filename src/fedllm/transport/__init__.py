"""Moves bytes between server and clients; knows nothing above ``message``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from fedllm.message import Failure


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

    def collect(self, timeout: float | None = None) -> Iterator[tuple[str, bytes | Failure]]:
        """Answers of everything posted, as they come."""
        ...
