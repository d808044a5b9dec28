"""
Frames over one outgoing, mutually authenticated gRPC stream for each site.

A site dials the server, never the other way, and stays until it is told to go. What travels on
the stream is a number (u64, little endian) and a frame: the server counts its questions, and an
answer carries the number of its question. A stream that breaks is dialled again within
``patience``; unanswered questions are then sent once more, and a site that has the answer already
gives it again. Number 0 is the session's own: hello, welcome, and good-bye.

A site opens a session with a one-time token (given out by ``Sessions.admit`` and brought to it by
the engine; spent as soon as the site has said that the welcome came), and resumes it with a secret
that the welcome holds. Its certificate must carry its
name. A site that opens a new one (its process died) has lost what it was doing: what it was asked
before has failed.
"""

from __future__ import annotations

import hmac
import logging
import queue
import secrets
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from fedllm.errors import FedllmError
from fedllm.message import Failure, Frame, Message, pack, unpack

LOG = logging.getLogger(__name__)
SERVICE, METHOD = "fedllm.Session", "Open"
LARGEST = 2**30  # bytes of a frame, unless somebody says otherwise
TOKEN_SECONDS = 600.0
HELLO_SECONDS = 10.0  # a stream that says nothing for so long is closed
STRANGE = 8  # streams of one certificate that have not said hello yet
Facts = dict[str, int | float | str]
Answer = Callable[[Frame], bytes]


@dataclass(frozen=True)
class Keys:
    """PEM: the certificate authority that both sides trust, and one's own certificate and key."""

    authority: bytes
    certificate: bytes
    key: bytes


def _options(largest: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # an address that is taken is an error
        ("grpc.max_send_message_length", largest + 8),
        ("grpc.max_receive_message_length", largest + 8),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 40_000),  # a network may be gone for 20 s
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


def _numbered(number: int, frame: bytes) -> bytes:
    return struct.pack("<Q", number) + frame


def _read(data: bytes) -> tuple[int, memoryview]:
    """Number and frame, not copied. Raises FedllmError for less than a number."""
    if len(data) < 8:
        raise FedllmError("session: less than a number arrived")
    return struct.unpack_from("<Q", data)[0], memoryview(data)[8:]


def _session(task: str, facts: Mapping[str, Any] | None = None) -> bytes:
    """A frame of the session's own."""
    return _numbered(0, pack(Message("session", task, facts=dict(facts or {}))))


@dataclass
class _Link:
    """One site as the server sees it."""

    name: str
    secret: str
    token: str
    waiting: dict[int, bytes] = field(default_factory=dict)  # asked, not answered
    expired: set[int] = field(default_factory=set)  # nobody waits for these answers any more
    out: queue.Queue[bytes | None] | None = None  # of the stream that is open now
    lost: float = 0.0  # when the stream broke


class Sessions:
    """
    The server's end: a transport whose clients are the sites that dialled in.

    check: given a site's name and the facts of its hello, says why it is refused, or nothing.
    """

    window: int | None = None

    def __init__(
        self, address: str, keys: Keys | None, names: Sequence[str] = (),
        check: Callable[[str, Facts], str] = lambda *_: "",
        greet: Callable[[str], Facts] = lambda _: {}, patience: float = 60.0,
        largest: int = LARGEST, most: int = 1000,
    ) -> None:  # fmt: skip
        """
        address: host and port to listen on (port 0: any).  keys: None only where somebody wrote
        ``insecure``.  names: of all sites, whether or not they are there; none: of those that are.
        greet: what a site that opens a session is told.  patience: seconds that a site may be away.
        largest: bytes of a frame.  most: sites at once.
        """
        self.check, self.greet, self._largest = check, greet, largest
        self._names = sorted(names)
        self._keys, self._patience = keys, patience
        self._lock = threading.Lock()
        self._links: dict[str, _Link] = {}
        self._tokens: dict[str, tuple[str, float]] = {}  # token -> (site, until)
        self._arrived: queue.Queue[tuple[int, Frame | Failure]] = queue.Queue()
        self._count = 0
        self._asked: dict[int, str] = {}  # number -> site
        self._strange: Counter[str] = Counter()
        # a handler lives as long as its stream
        self._server = grpc.server(
            ThreadPoolExecutor(most, thread_name_prefix="session"), options=_options(largest)
        )
        handler = grpc.stream_stream_rpc_method_handler(self._open)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
        )
        try:
            if keys is None:
                port = self._server.add_insecure_port(address)
            else:
                credentials = grpc.ssl_server_credentials(
                    [(keys.key, keys.certificate)], keys.authority, require_client_auth=True
                )
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise FedllmError(f"sessions: cannot listen on {address} ({error})") from None
        self.address = f"{address.rpartition(':')[0]}:{port}"
        self._server.start()

    def admit(self, name: str = "", seconds: float = TOKEN_SECONDS) -> str:
        """
        A token with which this site may open a session, once, within so many seconds.

        Without a name it is for any site of the federation: its certificate says which.
        """
        token = secrets.token_urlsafe(32)
        now = time.monotonic()
        with self._lock:
            self._tokens = {t: found for t, found in self._tokens.items() if found[1] > now}
            self._tokens[token] = (name, now + seconds)
        return token

    def wait(self, names: Sequence[str], seconds: float) -> list[str]:
        """Wait until these sites are there; returns who is missing after so many seconds."""
        until = time.monotonic() + seconds
        while missing := [name for name in names if name not in self.present()]:
            if time.monotonic() > until:
                return missing
            time.sleep(0.05)
        return []

    # transport --------------------------------------------------------------------------------

    def clients(self) -> Sequence[str]:
        """All sites of the federation."""
        return self._names or self.present()

    def present(self) -> list[str]:
        """Sites with a session, also while their stream is broken."""
        with self._lock:
            return sorted(self._links)

    def post(self, client: str, frame: bytes) -> str:
        """Send a frame, or keep it until the site is back."""
        with self._lock:
            self._count += 1
            number = self._count
            self._asked[number] = client
            link = self._links.get(client)
            if link is not None:
                link.waiting[number] = frame
                if link.out is not None:
                    link.out.put(_numbered(number, frame))
        return str(number)

    def expire(self, id: str) -> None:
        """
        Nobody waits for this answer any more: its frame is not kept, and a site that has not begun
        with it need not. An answer that comes all the same is given by ``collect``.
        """
        number = int(id)
        with self._lock:
            link = self._links.get(self._asked.get(number, ""))
            if link is None or link.waiting.pop(number, None) is None:
                return
            link.expired.add(number)
            if link.out is not None:
                link.out.put(_session("skip", {"number": number}))

    def collect(self, timeout: float | None = None) -> Iterator[tuple[str, Frame | Failure]]:
        """
        Answers of everything posted, as they come; a Failure for a site that stays away.

        After ``timeout`` seconds it ends; what comes later is given by a later call.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self._asked and (until is None or time.monotonic() < until):
            try:
                number, answer = self._arrived.get(timeout=0.2)
            except queue.Empty:
                yield from self._gone()
                continue
            if self._asked.pop(number, None) is not None:
                yield str(number), answer

    def _gone(self) -> Iterator[tuple[str, Failure]]:
        now = time.monotonic()
        with self._lock:
            lost = [
                (number, client)
                for number, client in self._asked.items()
                if (link := self._links.get(client)) is None
                or (link.out is None and now - link.lost > self._patience)
            ]
            for number, client in lost:
                del self._asked[number]
                self._links.pop(client, None)
        for number, client in lost:
            LOG.warning("site %s is gone", client)
            reason = f"the site is not there (no connection for {self._patience:g} s)"
            yield str(number), Failure(client, "", reason)

    def __enter__(self) -> Sessions:
        """For ``with``: closed in the end, without which the process would wait for the sites."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Say good-bye to all sites and stop listening."""
        with self._lock:
            for link in self._links.values():
                if link.out is not None:
                    link.out.put(_session("bye"))
                    link.out.put(None)
            self._links.clear()
        self._server.stop(grace=2.0).wait()

    # streams ----------------------------------------------------------------------------------

    def _open(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """One stream of one site, from its hello on."""
        try:
            with self._stranger(context):
                first = next(requests, b"")
            hello = self._hello(first)
            name = str(hello.get("name", ""))
            self._identify(name, context)
            link, out = self._welcome(name, hello)
        except FedllmError as error:
            LOG.warning("refused %s: %s", context.peer(), error)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            return
        LOG.info("site %s is here", name)
        threading.Thread(target=self._listen, args=(requests, link, out), daemon=True).start()
        while (data := out.get()) is not None:
            yield data

    @contextmanager
    def _stranger(self, context: Any) -> Iterator[None]:
        """Streams that say nothing must not keep others out."""
        names = context.auth_context().get("x509_common_name", [b""]) if self._keys else [b""]
        name = names[0].decode()
        with self._lock:
            self._strange[name] += 1
            many = self._strange[name] > STRANGE
        silence = threading.Timer(HELLO_SECONDS, context.cancel)
        silence.daemon = True
        try:
            if many:
                raise FedllmError(f"session: {name!r} opened {STRANGE} streams without a hello")
            silence.start()
            yield
        finally:
            silence.cancel()
            with self._lock:
                self._strange[name] -= 1
                self._strange += Counter()  # forget who has none

    def _hello(self, data: bytes) -> Facts:
        number, frame = _read(data)
        message, _ = unpack(frame)
        if number or message.task != "hello":
            raise FedllmError("session: it does not begin with a hello")
        return message.facts

    def _identify(self, name: str, context: Any) -> None:
        if self._keys is None:
            return
        names = [n.decode() for n in context.auth_context().get("x509_common_name", [])]
        if name not in names:
            raise FedllmError(f"session: {name!r} came with the certificate of {names}")

    def _welcome(self, name: str, hello: Facts) -> tuple[_Link, queue.Queue[bytes | None]]:
        """Let a site in, with a new token or back with its secret."""
        out: queue.Queue[bytes | None] = queue.Queue()
        secret = str(hello.get("secret", ""))
        with self._lock:
            link = self._links.get(name)
            if secret:
                if link is None or not hmac.compare_digest(link.secret.encode(), secret.encode()):
                    raise FedllmError(f"session: {name!r} has no session to resume")
            else:
                token = str(hello.get("token", ""))
                whose, until = self._tokens.get(token, ("no site", 0.0))
                if whose != name and (whose or name not in self._names):
                    raise FedllmError(f"session: {name!r} has no valid token (each opens one)")
                if time.monotonic() > until:
                    raise FedllmError(f"session: the token of {name!r} has expired")
                if reason := self.check(name, hello):
                    raise FedllmError(reason)
                self._tokens[token] = (name, until)  # nobody else's from now on
                before, link = link, _Link(name, secrets.token_urlsafe(32), token)
                self._links[name] = link
                if before is not None:
                    self._replace(before)
                    link.out, before.out = before.out, None
            if link.out is not None:
                link.out.put(None)
            greeting = {} if secret else self.greet(name)
            told = {**greeting, "secret": link.secret, "largest": self._largest}
            out.put(_session("welcome", told))
            for number, frame in sorted(link.waiting.items()):
                out.put(_numbered(number, frame))
            link.out = out
        return link, out

    def _replace(self, before: _Link) -> None:
        """What the site was asked in an earlier session has failed."""
        for number in (*before.waiting, *before.expired):
            failure = Failure(before.name, "", "the site began anew and has lost this round's work")
            self._arrived.put((number, failure))

    def _listen(
        self, requests: Iterator[bytes], link: _Link, out: queue.Queue[bytes | None]
    ) -> None:
        try:
            for data in requests:
                number, frame = _read(data)
                answer: Frame | Failure = frame
                if not number:
                    facts = unpack(frame)[0].facts
                    number = int(facts.get("number", 0))
                    answer = Failure(link.name, "", str(facts.get("reason", "")))
                with self._lock:
                    self._tokens.pop(link.token, None)  # the welcome came
                    late = number in link.expired
                    link.expired.discard(number)
                    if link.waiting.pop(number, None) is not None or late:  # asked of it, once
                        self._arrived.put((number, answer))
        except (grpc.RpcError, FedllmError, ValueError) as error:
            LOG.info("the stream of %s broke: %s", link.name, error)
        finally:
            with self._lock:
                if link.out is out:
                    link.out, link.lost = None, time.monotonic()
            out.put(None)


# the site's end ---------------------------------------------------------------------------------


def attend(
    address: str, name: str, token: str, keys: Keys | None, answer: Answer,
    facts: Mapping[str, Any] | None = None, welcomed: Callable[[Facts], None] = lambda _: None,
    patience: float = 60.0, largest: int = LARGEST, sent: Callable[[Frame], None] = lambda _: None,
) -> None:  # fmt: skip
    """
    Dial the server and answer its frames until it says good-bye.

    answer: frame -> frame.  facts: what the hello says besides.  welcomed: hears what a new session
    is told, before the first question.  sent: hears of every frame that leaves.  Raises FedllmError
    when the server refuses, or stays away for ``patience`` seconds.
    """
    site = _Site(answer, largest, sent)
    hello: dict[str, Any] = {**(facts or {}), "name": name, "token": token}
    since = time.monotonic()
    while True:
        there = False
        try:
            for told in site.stream(address, keys, hello):
                there = True
                if "secret" not in hello:
                    welcomed(told)
                hello = {"name": name, "secret": str(told["secret"])}
            site.close()
            return
        except grpc.RpcError as error:
            if there:  # until now
                since = time.monotonic()
            code = error.code() if hasattr(error, "code") else None
            if code == grpc.StatusCode.UNAUTHENTICATED:
                raise FedllmError(f"{address} refused: {error.details()}") from None
            if time.monotonic() - since > patience:
                raise FedllmError(
                    f"{address}: no connection for {patience:g} s ({code and code.name})"
                ) from None
            LOG.info("dialling %s again: %s", address, error)
            time.sleep(min(1.0, patience / 10))


class _Site:
    """Numbers and answers that outlive a stream."""

    def __init__(self, answer: Answer, largest: int, sent: Callable[[Frame], None]) -> None:
        self._answer, self._largest, self._sent = answer, largest, sent
        self._skipped: set[int] = set()
        self._last: dict[int, bytes] = {}
        self._busy: set[int] = set()
        self._lock = threading.Lock()
        self._out: queue.Queue[bytes | None] = queue.Queue()
        # one question after another, whichever stream brought it
        self._work = ThreadPoolExecutor(1, thread_name_prefix="answers")

    def stream(self, address: str, keys: Keys | None, hello: Mapping[str, Any]) -> Iterator[Facts]:
        """One stream until it breaks (grpc.RpcError) or ends; yields the welcome's facts."""
        out: queue.Queue[bytes | None] = queue.Queue()
        self._put(out, _session("hello", hello))
        if keys is None:
            channel = grpc.insecure_channel(address, _options(self._largest))
        else:
            credentials = grpc.ssl_channel_credentials(keys.authority, keys.key, keys.certificate)
            channel = grpc.secure_channel(address, credentials, _options(self._largest))
        with self._lock:
            self._out = out
        try:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")
            for data in call(iter(out.get, None)):
                number, frame = _read(data)
                if number:
                    self._take(number, frame)
                    continue
                message, _ = unpack(frame)
                if message.task == "bye":
                    return
                if message.task == "skip":
                    with self._lock:
                        self._skipped.add(int(message.facts["number"]))
                    continue
                # a larger answer would break the stream, again and again
                theirs = int(message.facts.get("largest", self._largest))
                self._largest = min(self._largest, theirs)
                yield message.facts
                self._put(out, _session("here"))
            raise _Broken
        finally:
            out.put(None)
            channel.close()

    def close(self) -> None:
        """Good-bye: what waits is not begun any more."""
        self._work.shutdown(wait=False, cancel_futures=True)

    def _put(self, out: queue.Queue[bytes | None], data: bytes) -> None:
        try:
            self._sent(memoryview(data)[8:])
        except OSError as error:  # what is not written down does not leave
            LOG.error("the audit cannot be written: %s", error)
            number, _ = _read(data)
            data = _session("failed", {"number": number, "reason": "its audit cannot be written"})
        out.put(data)

    def _take(self, number: int, frame: Frame) -> None:
        with self._lock:
            if number in self._last:
                self._put(self._out, self._last[number])
            elif number not in self._busy:
                self._busy.add(number)
                self._work.submit(self._do, number, frame)

    def _do(self, number: int, frame: Frame) -> None:
        try:
            with self._lock:
                if number in self._skipped:
                    self._skipped.discard(number)
                    raise FedllmError("not begun, nobody waited for it any more")
            reply = _numbered(number, self._answer(frame))
            if len(reply) > self._largest + 8:
                raise FedllmError(
                    f"the answer takes {len(reply)} bytes, {self._largest} may travel"
                )
        except FedllmError as error:
            LOG.warning("question %d: %s", number, error)
            reply = _session("failed", {"number": number, "reason": str(error)})
        except Exception as error:  # the boundary of a site: its fault becomes an answer
            LOG.warning("question %d", number, exc_info=error)
            reason = f"{type(error).__name__}, the site's log says more"
            reply = _session("failed", {"number": number, "reason": reason})
        with self._lock:
            self._busy.discard(number)
            self._last[number] = reply
            while len(self._last) > 4:
                del self._last[min(self._last)]
            self._put(self._out, reply)


class _Broken(grpc.RpcError):
    """The server closed the stream without a word."""
