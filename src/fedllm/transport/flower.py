"""
Frames as Flower messages: each is a process at the site that begins and ends with it.

Slower than a session, but nothing stays resident and Flower's port is the only one. Which site is
behind a node, the site proves once with the key of its certificate; from then on Flower's own keys
say that answers come from that node.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedllm.errors import FedllmError
from fedllm.message import Failure, Frame
from fedllm.transport.keys import proven
from fedllm.transport.session import Facts

LOG = logging.getLogger(__name__)
HELLO, FRAME = "query.hello", "train.frame"
RECORD = "fedllm"
PAUSE = 0.3  # seconds between looks for answers; Flower's own are 3 s apart
DAY = 86_400.0


def connected(grid: Grid, count: int, seconds: float) -> list[int]:
    """Nodes, once there are so many. Raises FedllmError when there are fewer after ``seconds``."""
    until = time.monotonic() + seconds
    while len(nodes := sorted(grid.get_node_ids())) < count:
        if time.monotonic() > until:
            raise FedllmError(f"{len(nodes)} of {count} sites are connected after {seconds:g} s")
        time.sleep(PAUSE)
    return nodes


def send(grid: Grid, kind: str, node: int, content: Mapping[str, Any]) -> str:
    """One message to one node; returns its id. Raises FedllmError where Flower refuses it."""
    record = RecordDict({RECORD: ConfigRecord(dict(content))})
    ids = list(grid.push_messages([grid.create_message(record, kind, node, group_id="", ttl=DAY)]))
    if len(ids) != 1 or not ids[0]:
        raise FedllmError(f"Flower did not take a message for node {node}")
    return ids[0]


def content(message: Message) -> dict[str, Any]:
    """What ``send`` put in, or a reply holds. Raises FedllmError where it holds nothing."""
    try:
        return dict(message.content.config_records[RECORD])
    except (KeyError, ValueError):
        raise FedllmError("a message without what belongs in it") from None


class Carried:
    """
    The server's end: a transport over Flower's Grid.

    What a site knows from one message to the next lies in its own folder.
    """

    window: int | None = None

    def __init__(
        self, grid: Grid, names: Sequence[str], order: Callable[[], Mapping[str, Any]],
        authority: bytes | None, seconds: float = 300.0,
    ) -> None:  # fmt: skip
        """
        names: of all sites.  order: what every message says of the run.  authority: PEM of who
        signed the sites' certificates; None only where somebody wrote ``insecure``.  seconds: to
        wait for the sites.
        """
        self._grid, self._names, self._order = grid, sorted(names), order
        self._authority, self._seconds = authority, seconds
        self._nodes: dict[str, int] = {}
        self._asked: dict[str, str] = {}  # message -> site
        self._told: set[str] = set()  # messages that say which state to go back to
        self._unfit: set[str] = set()
        self._refused: list[tuple[str, Failure]] = []
        self._begun = secrets.token_hex(8)
        self._new: set[str] = set()  # sites that did not answer since the run began
        self._greet: Callable[[str], Facts] = lambda _: {}

    def begin(self, greet: Callable[[str], Facts], refuse: Callable[[str, Facts], str]) -> None:
        """Have all sites say what they have. Raises FedllmError naming who is missing or unfit."""
        found, reasons = self.hello(refuse)
        if all(name in found for name in self._names) and not self._unfit:
            reasons = []  # of nodes that are none of this federation
        missing = [name for name in self._names if name not in found]
        if reasons or missing:
            reasons += [f"{name} did not answer" for name in missing]
            raise FedllmError("; ".join(reasons))
        self._greet, self._new = greet, set(self._names)

    def hello(self, refuse: Callable[[str, Facts], str]) -> tuple[dict[str, Facts], list[str]]:
        """What each site says of itself, and why sites are turned away or did not answer."""
        nodes = connected(self._grid, len(self._names), self._seconds)
        nonce, order = secrets.token_hex(16), self._order()
        asked = {send(self._grid, HELLO, n, {**order, "nonce": nonce}): n for n in nodes}
        found: dict[str, Facts] = {}
        reasons: list[str] = []
        until = time.monotonic() + self._seconds
        while asked and time.monotonic() < until:
            for reply in self._grid.pull_messages(list(asked)):
                node = asked.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    reasons.append(f"node {node}: {reply.error.reason}")
                    continue
                try:
                    facts = content(reply)
                    name = self._identify(facts, f"{nonce} {node}".encode())
                except FedllmError as error:
                    reasons.append(f"node {node}: {error}")
                    continue
                if reason := refuse(name, facts):
                    reasons.append(reason)
                    self._unfit.add(name)
                found[name] = facts
                self._nodes[name] = node
            time.sleep(PAUSE)
        return found, reasons

    def _identify(self, facts: dict[str, Any], said: bytes) -> str:
        name = str(facts.pop("name", ""))
        certificate, proof = facts.pop("certificate", b""), facts.pop("proof", b"")
        if self._authority is not None:
            name = proven(self._authority, certificate, proof, said)
        if name not in self._names:
            raise FedllmError(f"{name!r} is no site of this federation")
        return name

    def clients(self) -> Sequence[str]:
        """All sites of the federation."""
        return self._names

    def post(self, client: str, frame: bytes) -> str:
        """Send a frame to the process that Flower will start for it."""
        more = {"state": self._greet(client)["state"]} if client in self._new else {}
        order = {**self._order(), **more, "begun": self._begun, "frame": frame}
        try:
            id = send(self._grid, FRAME, self._nodes[client], order)
        except FedllmError as error:
            id = f"refused {secrets.token_hex(8)}"
            self._refused.append((id, Failure(client, "", str(error))))
        else:
            self._asked[id] = client
            if client in self._new:
                self._told.add(id)
        return id

    def expire(self, id: str) -> None:
        """The message is on its way; only its answer can be dropped."""

    def collect(self, timeout: float | None = None) -> Iterator[tuple[str, Frame | Failure]]:
        """Answers as they come; a Failure where Flower gives a site or its process up."""
        until = None if timeout is None else time.monotonic() + timeout
        while self._refused:
            yield self._refused.pop()
        while self._asked:
            for reply in self._grid.pull_messages(list(self._asked)):
                id = reply.metadata.reply_to_message_id
                client = self._asked.pop(id)
                told = id in self._told
                self._told.discard(id)
                if reply.has_error():
                    self._new.add(client)  # it goes back to its last committed state
                    yield id, Failure(client, "", f"Flower: {reply.error.reason}")
                    continue
                if told:
                    self._new.discard(client)
                yield id, self._frame(client, reply)
            if until is not None and time.monotonic() >= until:
                return
            time.sleep(PAUSE)

    def _frame(self, client: str, reply: Message) -> Frame | Failure:
        try:
            frame = content(reply).get("frame")
        except FedllmError as error:
            return Failure(client, "", str(error))
        return (
            frame if isinstance(frame, bytes) else Failure(client, "", "answered without a frame")
        )
