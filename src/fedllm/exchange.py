"""
ask: the only caller of codecs and transport; it counts every frame.

Outgoing order: strategy -> codec -> frame. ``Exchange`` is the server's end, ``Endpoint`` the
clients' end of the same wire.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedllm.codecs import Codecs, chosen
from fedllm.codecs import codec as codec_of
from fedllm.codecs.base import MOST, State
from fedllm.errors import FedllmError
from fedllm.ledger import Ledger, Row
from fedllm.message import PART, Failure, Frame, Message, pack, unpack
from fedllm.training.meter import Listen, Measured, Meter, costs_of
from fedllm.transport import Transport

Handler = Callable[[dict[str, Message]], dict[str, Message | Failure]]
FAILED = "failed"


def encode(
    message: Message, codecs: Codecs, rounds: int = 1, way: str = "up", seed: int = 0,
    memory: Mapping[str, State] | None = None,
) -> tuple[bytes, Message, dict[str, str], dict[str, State]]:  # fmt: skip
    """
    Message -> (frame, the message as it travels, codecs by tensor, what codecs will remember).

    Each tensor goes through the codec of its role and name, which may change over the run's
    ``rounds``. What is drawn comes from a stream of seed, round, client, way, the message's number
    in its round, and name. memory: what codecs kept of the last tensors of these names.
    """
    progress = min(max(message.round - 1, 0) / max(rounds - 1, 1), 1.0)
    tensors, roles, used, kept = {}, {}, {}, {}
    number = message.id.rpartition(".")[2]
    for name, tensor in message.tensors.items():
        role = message.roles[name]
        codec = chosen(codecs, role.value, name, way)
        if codec == "none" or not tensor.is_floating_point():
            tensors[name], roles[name] = tensor, role
            continue
        purpose = ("codec", seed, message.round, message.client, way, number, name)
        before = (memory or {}).get(name, {})
        state, parts = codec_of(codec, progress).encode(before, tensor, purpose)
        if state:
            kept[name] = state
        for part, value in parts.items():
            tensors[f"{name}{PART}{part}"] = value
            roles[f"{name}{PART}{part}"] = role
        used[name] = codec
    wire = replace(message, tensors=tensors, roles=roles)
    return pack(wire, used), wire, used, kept


def decode(
    frame: Frame, codecs: Codecs, way: str = "up"
) -> tuple[Message, Message, dict[str, str]]:
    """
    Frame -> (message, the message as it travelled, codecs by tensor).

    Raises FedllmError for what is damaged, and for another codec than that of its role and name:
    whoever sends does not choose what is computed here.
    """
    wire, used = unpack(frame)
    tensors = {n: t for n, t in wire.tensors.items() if PART not in n}
    roles = {n: r for n, r in wire.roles.items() if PART not in n}
    every: dict[str, list[str]] = {}
    for n in wire.tensors:
        if PART in n:
            every.setdefault(n.rpartition(PART)[0], []).append(n)
    total = 0
    for name, codec in used.items():
        sent = every[name]
        parts = {n.rpartition(PART)[2]: wire.tensors[n] for n in sent}
        for role in {wire.roles[n].value for n in sent}:
            wanted = chosen(codecs, role, name, way)
            if codec != wanted:
                raise FedllmError(
                    f"frame: {name!r} came with codec {codec!r}; exchange.codecs gives role "
                    f"{role!r} {wanted!r}"
                )
        try:
            tensors[name] = codec_of(codec).decode(parts)
        except FedllmError as error:
            raise FedllmError(f"frame: {name!r}: {error}") from None
        except KeyError as error:
            raise FedllmError(f"frame: codec {codec!r} of {name!r} lacks part {error}") from None
        except (RuntimeError, ValueError, IndexError, TypeError) as error:  # they do not fit
            raise FedllmError(f"frame: codec {codec!r} of {name!r}: {error}") from None
        roles[name] = wire.roles[sent[0]]
        total += tensors[name].numel()
        if total > MOST:
            raise FedllmError(f"frame: decoded it holds more than {MOST:,} numbers")
    return replace(wire, tensors=tensors, roles=roles), wire, used


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGE = 2.0**62
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Want:
    """
    What a reply must hold; a reply that does not is the failure of its client, not of the run.

    facts: finite numbers.  positive: numbers above 0.  shapes: of floating-point tensors by name,
    None for a size that may be any.  look: what else is wrong, or nothing.
    """

    facts: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    shapes: Mapping[str, Shape] | None = None
    look: Callable[[Message], str] = lambda _: ""

    def misfit(self, reply: Message) -> str:
        """What is wrong with a reply; empty where it fits."""
        for name in (*self.facts, *self.positive):
            value = reply.facts.get(name)
            if not isinstance(value, int | float) or not abs(value) < LARGE:  # nor NaN
                return f"said {str(value)[:40]} for {name!r}, a number is needed"
            if name in self.positive and not value > 0:
                return f"said {value!r} for {name!r}, more than 0 is needed"
        if self.shapes is not None:
            if reply.tensors.keys() != self.shapes.keys():
                odd = sorted(set(reply.tensors) ^ set(self.shapes))
                return f"sent other names than it was asked for ({', '.join(odd[:3])})"
            for name, shape in self.shapes.items():
                sent = tuple(reply.tensors[name].shape)
                if len(sent) != len(shape) or any(
                    size not in (None, found) for size, found in zip(shape, sent, strict=True)
                ):
                    wanted = tuple("any" if size is None else size for size in shape)
                    return f"sent {name!r} with shape {sent}, not {wanted}"
                if reply.tensors[name].dtype is not torch.float32:  # codecs are undone by now
                    return f"sent {name!r} as {reply.tensors[name].dtype}"
        return self.look(reply)


def like(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shapes of these."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


ANYTHING = Want()


class Exchange:
    """The server's end: asks clients and counts what it costs."""

    def __init__(
        self, transport: Transport, ledger: Ledger, run: str, base: str,
        codecs: Codecs | None = None, minimum: int | None = None,
        listen: Listen | None = None, measured: Measured | None = None,
        clock: Callable[[], float] = time.perf_counter, deadline: float | None = None,
        tell: Callable[[str], None] | None = None, rounds: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        """
        minimum: replies without which a step fails (None: all).  listen: (step, client, rows)
        for a progress line.  clock: seconds of the server's own work.  deadline: seconds for the
        answers of one step.  tell: hears of every failure.  rounds, seed: of the run.
        """
        self.transport, self.ledger, self.run, self.base = transport, ledger, run, base
        self.codecs, self.rounds, self.seed = dict(codecs or {}), rounds, seed
        self.minimum = minimum
        self.listen = listen or (lambda step, client, rows: None)
        self.deadline, self.tell = deadline, tell or (lambda text: None)
        self._late: dict[str, tuple[str, str]] = {}  # id -> who did not answer in time, and what
        self.round, self.attempt = 0, 0
        self.meter = Meter(measured, "server", self.listen, clock)
        self._count = 0

    def open(self, round: int) -> None:
        """Begin (or begin again) a round."""
        self.attempt = self.attempt + 1 if round == self.round else 1
        self.round, self._count = round, 0
        self.ledger.rollback()
        self.meter.take()

    def clients(self) -> Sequence[str]:
        """Everybody, whether asked in this round or not."""
        return self.transport.clients()

    def close(self) -> None:
        """Write down what the server computed in this round."""
        self._costs("server", self.meter.take(), 1)

    def ask(
        self, requests: Mapping[str, Message], want: Want | Mapping[str, Want] = ANYTHING
    ) -> Iterator[tuple[str, Message | Failure]]:
        """
        Send one request to each client; yield (client, reply or failure) as they come.

        want: of all replies, or of each client's.

        A reply with NaN or infinity, of another run, round or client, or without what is wanted is
        a Failure.
        """
        clients = list(requests)
        size = self.transport.window or max(len(clients), 1)
        for first in range(0, len(clients), size):
            part = {client: requests[client] for client in clients[first : first + size]}
            yield from self._ask(part, len(requests), want)

    def _ask(
        self, requests: Mapping[str, Message], cohort: int, want: Want | Mapping[str, Want]
    ) -> Iterator[tuple[str, Message | Failure]]:
        waiting: dict[str, tuple[str, Message]] = {}
        for client, request in requests.items():
            self._count += 1
            message = replace(
                request, client=client, run=self.run, round=self.round, attempt=self.attempt,
                base=self.base, id=f"{self.round}.{self.attempt}.{self._count}",
            )  # fmt: skip
            # what is evaluated is the model itself, not what a codec makes of it
            codecs = {} if message.task == "evaluate" else self.codecs
            frame, wire, used, _ = encode(message, codecs, self.rounds, "down", self.seed)
            self._frame(len(frame), wire, used, client, "down", cohort)
            self.listen(message.step, client, 0)
            waiting[self.transport.post(client, frame)] = (client, message)
        until = None if self.deadline is None else time.monotonic() + self.deadline
        while waiting:
            left = None if until is None else max(until - time.monotonic(), 0.0)
            for id, answer in self.transport.collect(left):
                if id not in waiting:
                    self._too_late(id, answer)
                    continue
                client, message = waiting.pop(id)
                reply = self._receive(answer, message, cohort)
                wanted = want if isinstance(want, Want) else want[client]
                if isinstance(reply, Message) and (wrong := wanted.misfit(reply)):
                    reply = Failure(client, message.step, wrong)
                yield client, self._counted(reply, client)
                if not waiting:
                    return
            if until is None or time.monotonic() >= until:
                break
        for id, (client, message) in waiting.items():
            self._late[id] = (client, message.step)
            self.transport.expire(id)
            reason = f"no answer within {self.deadline or 0:g} s (exchange.deadline)"
            yield client, self._counted(Failure(client, message.step, reason), client)

    def _counted(self, reply: Message | Failure, client: str) -> Message | Failure:
        """A failure is named in the ledger, and told."""
        if isinstance(reply, Failure):
            reason = reply.reason[:200]
            self.ledger.add(
                Row(self.run, self.round, reply.step, client, "up", failures=1, reason=reason)
            )
            self.tell(f"round {self.round}, step {reply.step}: {client}: {reason}")
        return reply

    def _too_late(self, id: str, answer: Frame | Failure) -> None:
        """An answer that nobody waits for any more is counted and dropped."""
        client, step = self._late.pop(id, ("", ""))
        if client and not isinstance(answer, Failure):
            self.ledger.add(
                Row(self.run, self.round, step, client, "up", role="late", wire_bytes=len(answer),
                    frames=1, reason="came after the deadline")
            )  # fmt: skip

    def gather(
        self, requests: Mapping[str, Message], want: Want | Mapping[str, Want] = ANYTHING
    ) -> dict[str, Message]:
        """
        ``ask``, and wait for all: the good replies in the order of the clients' names.

        Raises FedllmError naming who failed and why when fewer than ``minimum`` replied.
        """
        replies: dict[str, Message] = {}
        failures = []
        for client, reply in self.ask(requests, want):
            if isinstance(reply, Failure):
                failures.append(f"{client}: {reply.reason}")
            else:
                replies[client] = reply
        self.enough(len(replies), len(requests), "; ".join(failures))
        return dict(sorted(replies.items()))

    def enough(self, present: int, asked: int, why: str) -> None:
        """Raise FedllmError, saying why, unless as many clients as needed are there."""
        needed = asked if self.minimum is None else max(min(self.minimum, asked), 1)
        if present < needed:
            raise FedllmError(
                f"round {self.round}: {present} of {asked} clients replied, {needed} are needed "
                f"(exchange.minimum_replies); {why}"
            )

    def _receive(self, answer: Frame | Failure, request: Message, cohort: int) -> Message | Failure:
        client = request.client
        if isinstance(answer, Failure):
            return replace(answer, step=answer.step or request.step)
        try:
            reply, wire, used = decode(answer, self.codecs)
        except FedllmError as error:
            self.ledger.add(
                Row(self.run, self.round, request.step, client, "up", role="damaged",
                    wire_bytes=len(answer), frames=1, cohort=cohort)
            )  # fmt: skip
            return Failure(client, request.step, str(error))
        self._frame(len(answer), wire, used, client, "up", cohort)
        try:
            self._costs(client, dict(reply.facts), cohort)
        except FedllmError as error:
            return Failure(client, request.step, str(error))
        expected = (self.run, self.round, client, request.id)
        if (reply.run, reply.round, reply.client, reply.id) != expected:
            return Failure(client, request.step, "the reply belongs to another request")
        if reply.task == FAILED:
            return Failure(client, request.step, str(reply.facts.get("reason", "unknown")))
        for name, tensor in reply.tensors.items():
            if not tensor.is_floating_point() and not tensor.is_complex():
                continue
            if tensor.dtype not in FLOATS:
                return Failure(client, request.step, f"sent {name!r} as {tensor.dtype}")
            if not bool(torch.isfinite(tensor).all()):
                return Failure(client, request.step, f"sent NaN or infinity in {name!r}")
        return reply

    def _frame(
        self, whole: int, wire: Message, used: dict[str, str], client: str, direction: str,
        cohort: int,
    ) -> None:  # fmt: skip
        common: dict[str, Any] = {
            "run": self.run, "round": self.round, "step": wire.step, "client": client,
            "direction": direction, "cohort": cohort,
        }  # fmt: skip
        paid: dict[tuple[str, str], int] = {}
        for name, tensor in sorted(wire.tensors.items()):
            key = wire.roles[name].value, used.get(name.rpartition(PART)[0], "none")
            paid[key] = paid.get(key, 0) + tensor.numel() * tensor.element_size()
        for (role, codec), size in paid.items():
            self.ledger.add(
                Row(**common, role=role, codec=codec, payload_bytes=size, wire_bytes=size)
            )
        costs = {name: v for name, v in wire.facts.items() if name.startswith("cost.")}
        told = len(json.dumps(costs, separators=(",", ":"))) if costs else 0
        if told:  # what a client says of its own costs is ours, not the strategy's
            self.ledger.add(Row(**common, role="measurement", wire_bytes=told))
        rest = whole - sum(paid.values()) - told
        self.ledger.add(Row(**common, role="header", wire_bytes=rest, frames=1))

    def _costs(self, client: str, facts: dict[str, Any], cohort: int) -> None:
        for step, cost in costs_of(facts).items():
            self.ledger.add(
                Row(self.run, self.round, step, client, "compute", cohort=cohort, **cost)  # type: ignore[arg-type]
            )


class Memory(Protocol):
    """Where a client's codecs keep what they left out, from round to round."""

    def recall(self, client: str) -> Mapping[str, State]:
        """By tensor, as of the last committed round: a repeated answer is the same one."""
        ...

    def retain(self, client: str, states: Mapping[str, State]) -> None:
        """Keep it in the open round."""
        ...


class Endpoint:
    """The clients' end: frames in, frames out, around a worker's ``handle``."""

    def __init__(
        self, handle: Handler, codecs: Codecs | None = None, rounds: int = 1, seed: int = 0,
        memory: Memory | None = None,
    ) -> None:  # fmt: skip
        """
        ``handle``: many clients' messages in, as many replies or failures out.

        rounds, seed: of the run.  memory: of codecs that have one; without it they forget.
        """
        self.handle = handle
        self.codecs, self.rounds, self.seed = dict(codecs or {}), rounds, seed
        self.memory = memory

    def __call__(self, frames: Mapping[str, Frame]) -> dict[str, bytes]:
        """Answer every client's frame; a failure travels as a frame, too."""
        requests = {client: decode(frame, self.codecs, "down")[0]
                    for client, frame in frames.items()}  # fmt: skip
        answers = {}
        for client, reply in self.handle(requests).items():
            request = requests[client]
            if isinstance(reply, Failure):
                reply = Message(request.step, FAILED, facts={"reason": reply.reason})
            stamped = replace(
                reply, client=client, run=request.run, round=request.round, id=request.id,
                attempt=request.attempt, base=request.base,
            )  # fmt: skip
            answers[client] = self._encode(stamped)
        return answers

    def _encode(self, reply: Message) -> bytes:
        recalled = self.memory.recall(reply.client) if self.memory else {}
        frame, _, _, kept = encode(
            reply, self.codecs, self.rounds, "up", self.seed, recalled
        )  # fmt: skip
        if self.memory and kept:
            self.memory.retain(reply.client, {**recalled, **kept})
        return frame
