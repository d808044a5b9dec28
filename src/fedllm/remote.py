"""Clients in other processes, as the server sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import fedllm
from fedllm.exchange import Exchange
from fedllm.message import Message
from fedllm.transport import Transport

Facts = dict[str, int | float | str]


class Remote(Transport, Protocol):
    """A transport to sites that have to be called first."""

    def begin(self, greet: Callable[[str], Facts], refuse: Callable[[str, Facts], str]) -> None:
        """
        Call the sites, and wait until they are there.

        greet: what a site is told that comes.  refuse: why one is turned away, given what it says
        of itself; empty: it is not.  Raises FedllmError when too few come.
        """
        ...


def hello(base: str, labels: Sequence[str], public: str, own: str = "") -> Facts:
    """
    What both sides must agree on before anything is trained.

    base: hash of the frozen weights.  labels: in the order of their numbers.  public: hash of the
    public set, where every site has a copy of its own.  own: hash of the site's own model, where
    it is another.
    """
    return {
        "version": fedllm.__version__, "base": base, "labels": "|".join(labels), "public": public,
        "model": own,
    }  # fmt: skip


class Distant:
    """
    Keeps the names of the states that the sites saved; the states stay there.

    A site that comes anew is told which of its states the last committed round had.
    """

    def __init__(self, ours: Facts, bases: Mapping[str, str]) -> None:
        """ours: what the server would say of itself (``hello``).  bases: of sites' own models."""
        self.exchange: Exchange
        self._ours, self._bases = ours, bases
        self._names: dict[str, str] = {}
        self._before: dict[str, str] | None = {}  # of the checkpoint before; None: not known

    def attach(self, folder: Path) -> None:
        """Nothing of the sites' states is kept here."""

    def snapshot(self) -> dict[str, str]:
        """Have everybody who is there save its state; who is not keeps its last one."""
        asked = {
            client: Message("commit", "save", facts=self._needed(client))
            for client in self.exchange.transport.clients()
        }
        names = dict(self._names)
        for client, reply in self.exchange.ask(asked):
            if isinstance(reply, Message) and reply.facts.get("state"):
                names[client] = str(reply.facts["state"])
        self._before, self._names = self._names, names
        return dict(sorted(names.items()))

    def _needed(self, client: str) -> Facts:
        """Which states of a client checkpoints name; it may remove all others."""
        if self._before is None:
            return {}
        names = {self._names.get(client, ""), self._before.get(client, "")} - {""}
        return {"keep": " ".join(sorted(names))}

    def restore(self, names: Mapping[str, str]) -> None:
        """Go on from a checkpoint: the sites will be told when they come."""
        self._names, self._before = dict(names), None

    def greet(self, name: str) -> Facts:
        """What a site that comes anew has to know."""
        return {"state": self._names.get(name, "")}

    def refuse(self, name: str, facts: Facts) -> str:
        """Why a site is turned away: another version, model, list of labels, or public set."""
        for key, value in {**self._ours, "model": self._bases.get(name, "")}.items():
            if facts.get(key) != value:
                return f"site {name!r} has {key} {facts.get(key)!r}, the server {value!r}"
        return ""
