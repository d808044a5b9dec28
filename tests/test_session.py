"""Sessions over real gRPC streams: who gets in, what is lost when a stream or a site breaks."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import FedllmError
from fedllm.message import Failure, Message, pack
from fedllm.transport import session
from fedllm.transport.keys import authority, issue, request
from fedllm.transport.session import Keys, Sessions, attend


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Keys]:
    """Keys of anybody whom one authority knows."""
    own = authority("test authority")
    made: dict[str, Keys] = {}

    def of(name: str) -> Keys:
        if name not in made:
            key, asked = request(name)
            hosts = ["localhost", "127.0.0.1"] if name == "server" else []
            made[name] = Keys(own.certificate, issue(own, asked, hosts), key)
        return made[name]

    return of


class Site(threading.Thread):
    """A site in a thread: answers with its name before the question."""

    def __init__(self, server: Sessions, name: str, keys: Keys | None, **more: Any) -> None:
        super().__init__(daemon=True)
        self.server, self.site, self.keys = server, name, keys
        self.token = more.pop("token", None) or server.admit(more.pop("admitted", name))
        self.answer = more.pop("answer", lambda frame: name.encode() + b" " + frame)
        self.more = {"patience": 5.0, **more}
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            attend(self.server.address, self.site, self.token, self.keys, self.answer, **self.more)
        except Exception as error:
            self.error = error


@pytest.fixture
def server(keys: Callable[[str], Keys]) -> Iterator[Sessions]:
    found = Sessions("127.0.0.1:0", keys("server"), patience=2.0)
    yield found
    found.close()


def answers(server: Sessions, timeout: float = 20.0) -> dict[str, bytes | Failure]:
    return dict(server.collect(timeout))


def test_questions_are_answered_in_order_and_all_say_good_bye(
    server: Sessions, keys: Callable[[str], Keys]
) -> None:
    sites = [Site(server, name, keys(name)) for name in ("a", "b")]
    assert server.wait(["a", "b"], 20) == []
    asked = {server.post(name, f"{i}".encode()): f"{name} {i}".encode()
             for i in range(5) for name in ("a", "b")}  # fmt: skip
    assert answers(server) == asked
    server.close()
    for site in sites:
        site.join(20)
        assert not site.is_alive()
        assert site.error is None


def test_a_large_frame_passes_and_a_larger_one_than_allowed_does_not(
    keys: Callable[[str], Keys],
) -> None:
    small = Sessions("127.0.0.1:0", keys("server"), patience=1.0, largest=2**20)
    site = Site(
        small, "a", keys("a"), largest=2**20, patience=1.0, answer=lambda frame: bytes(frame) * 2
    )
    assert small.wait(["a"], 20) == []
    id = small.post("a", b"x" * 2**19)
    assert answers(small) == {id: b"x" * 2**20}
    id = small.post("a", b"x" * (2**19 + 100))  # its answer is larger than what either side takes
    assert isinstance(answers(small)[id], Failure)
    small.close()
    site.join(20)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no token": ({"token": "made up"}, "no valid token"),
    "another's token": ({"admitted": "b"}, "no valid token"),
    "another's certificate": ({"whose": "b"}, "came with the certificate of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_who_is_refused(
    server: Sessions, keys: Callable[[str], Keys], case: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes, reason = REFUSED[case]
    site = Site(server, "a", keys(changes.pop("whose", "a")), **changes)
    site.join(20)
    assert isinstance(site.error, FedllmError)
    assert reason in str(site.error)
    assert reason in caplog.text
    assert server.clients() == []


def test_a_token_opens_one_session_and_only_in_time(
    server: Sessions, keys: Callable[[str], Keys]
) -> None:
    token = server.admit("a")
    Site(server, "a", keys("a"), token=token)
    assert server.wait(["a"], 20) == []
    again = Site(server, "a", keys("a"), token=token)
    again.join(20)
    assert "no valid token" in str(again.error)
    late = Site(server, "a", keys("a"), token=server.admit("a", seconds=-1))
    late.join(20)
    assert "expired" in str(late.error)


@pytest.mark.parametrize("whose", ["stranger", "nobody"])
def test_a_certificate_of_another_authority_gets_no_connection(
    server: Sessions, keys: Callable[[str], Keys], whose: str
) -> None:
    theirs = authority("another")
    key, asked = request("a")
    certificate = issue(theirs, asked)
    site = Site(
        server, "a", Keys(keys("a").authority, certificate, key) if whose == "stranger" else None,
        patience=1.0,
    )  # fmt: skip
    site.join(20)
    assert "no connection" in str(site.error)
    assert server.clients() == []


def test_what_the_check_refuses_is_said_to_the_site(keys: Callable[[str], Keys]) -> None:
    server = Sessions(
        "127.0.0.1:0",
        keys("server"),
        check=lambda name, facts: f"base {facts['base']} is another",
    )
    site = Site(server, "a", keys("a"), facts={"base": "beef"})
    site.join(20)
    assert "base beef is another" in str(site.error)
    server.close()


def break_streams(server: Sessions) -> None:
    """As if the network had gone: the server's side of every stream ends without a word."""
    with server._lock:
        for link in server._links.values():
            if link.out is not None:
                link.out.put(None)


def test_a_broken_stream_is_dialled_again_and_nothing_is_lost_or_done_twice(
    server: Sessions, keys: Callable[[str], Keys]
) -> None:
    done: list[bytes] = []
    go = threading.Event()

    def slowly(frame: bytes) -> bytes:
        done.append(frame)
        go.wait(20)
        return frame

    Site(server, "a", keys("a"), answer=slowly)
    assert server.wait(["a"], 20) == []
    ids = [server.post("a", b"one"), server.post("a", b"two")]
    while not done:
        time.sleep(0.01)
    break_streams(server)
    time.sleep(0.2)
    go.set()
    assert answers(server) == dict(zip(ids, (b"one", b"two"), strict=True))
    assert done == [b"one", b"two"]


def test_a_site_that_stays_away_fails_by_name(keys: Callable[[str], Keys]) -> None:
    server = Sessions("127.0.0.1:0", keys("server"), patience=0.5)
    stay = threading.Event()
    site = Site(server, "a", keys("a"), answer=lambda frame: stay.wait(20) and b"", patience=0.1)
    assert server.wait(["a"], 20) == []
    id = server.post("a", b"x")
    site.run = lambda: None  # type: ignore[method-assign]
    with server._lock:
        server._links["a"].secret = "changed: it cannot come back"
    break_streams(server)
    found = answers(server)
    assert isinstance(found[id], Failure)
    assert "not there" in found[id].reason
    stay.set()
    server.close()


def test_a_site_that_begins_anew_has_lost_what_it_was_asked(
    server: Sessions, keys: Callable[[str], Keys]
) -> None:
    stay = threading.Event()
    Site(server, "a", keys("a"), answer=lambda frame: stay.wait(20) and b"")
    assert server.wait(["a"], 20) == []
    lost = server.post("a", b"x")
    told: list[Any] = []
    server.greet = lambda name: {"state": f"of {name}"}
    Site(server, "a", keys("a"), welcomed=told.append)
    found = answers(server)
    assert isinstance(found[lost], Failure)
    assert "began anew" in found[lost].reason
    id = server.post("a", b"y")
    assert answers(server) == {id: b"a y"}
    assert told[0]["state"] == "of a"
    stay.set()


def test_who_is_too_slow_is_given_later(server: Sessions, keys: Callable[[str], Keys]) -> None:
    go = threading.Event()
    Site(server, "a", keys("a"), answer=lambda frame: frame if go.wait(20) else b"")
    assert server.wait(["a"], 20) == []
    id = server.post("a", b"x")
    assert answers(server, 0.3) == {}
    go.set()
    assert answers(server) == {id: b"x"}


data = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda number, frame: session._numbered(number, frame),
        st.integers(0, 3),
        st.one_of(
            st.binary(max_size=30),
            st.builds(
                lambda task, facts: pack(Message("session", task, facts=facts)),
                st.sampled_from(["hello", "welcome", "bye", ""]),
                st.dictionaries(st.sampled_from(["name", "token", "secret"]),
                                st.text(max_size=4) | st.integers()),
            ),
        ),
    ),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(words=st.lists(data, min_size=1, max_size=4))
def test_no_words_of_a_stranger_open_a_session_or_stop_the_server(words: list[bytes]) -> None:
    server = _open_server()
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(f"/{session.SERVICE}/{session.METHOD}")(iter(words))
        with pytest.raises(grpc.RpcError) as error:
            list(call)
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert server.clients() == []


_servers: list[Sessions] = []


def _open_server() -> Sessions:
    """One without TLS, where anybody reaches the protocol itself."""
    if not _servers:
        _servers.append(Sessions("127.0.0.1:0", None))
    return _servers[0]


def test_an_address_in_use_is_refused(server: Sessions) -> None:
    with pytest.raises(FedllmError, match="cannot listen on 127"):
        Sessions(server.address, None)


def test_keys_are_files_that_only_the_owner_reads(tmp_path: Path) -> None:
    from fedllm.transport.keys import write

    write(tmp_path / "key.pem", b"secret", private=True)
    assert (tmp_path / "key.pem").stat().st_mode & 0o077 == 0


def test_patience_counts_from_when_the_stream_broke(
    server: Sessions, keys: Callable[[str], Keys]
) -> None:
    """A site may wait for long between two questions; that is no absence."""
    site = Site(server, "a", keys("a"), patience=1.0)
    assert server.wait(["a"], 20) == []
    time.sleep(1.5)
    break_streams(server)
    id = server.post("a", b"x")
    assert answers(server) == {id: b"a x"}
    assert site.error is None


def stream(server: Sessions, *words: bytes, end: threading.Event | None = None) -> Any:
    """A stream of somebody who writes by hand; open until ``end``."""

    def said() -> Iterator[bytes]:
        yield from words
        if end is not None:
            end.wait(20)

    channel = grpc.insecure_channel(server.address)
    return channel.stream_stream(f"/{session.SERVICE}/{session.METHOD}")(said())


def test_a_token_is_spent_when_the_site_says_that_the_welcome_came() -> None:
    with Sessions("127.0.0.1:0", None, ["a", "b"]) as server:
        token, stay = server.admit(), threading.Event()
        hello = session._session("hello", {"name": "a", "token": token})
        first = stream(server, hello, end=stay)
        next(first)  # the welcome; as if it were lost on its way
        theirs = stream(server, session._session("hello", {"name": "b", "token": token}), end=stay)
        with pytest.raises(grpc.RpcError, match="no valid token"):
            next(theirs)
        second = stream(server, hello, session._session("here"), end=stay)
        next(second)
        assert server.present() == ["a"]
        time.sleep(0.2)
        third = stream(server, hello, end=stay)
        with pytest.raises(grpc.RpcError, match="no valid token"):
            next(third)
        stay.set()


def test_streams_that_say_nothing_are_closed_and_keep_nobody_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "HELLO_SECONDS", 0.5)
    monkeypatch.setattr(session, "STRANGE", 100)
    with Sessions("127.0.0.1:0", None, ["a"], most=4) as server:
        stay = threading.Event()
        silent = [stream(server, end=stay) for _ in range(4)]
        site = Site(server, "a", None)
        assert server.wait(["a"], 20) == []
        for one in silent:
            with pytest.raises(grpc.RpcError):
                next(one)
        monkeypatch.setattr(session, "STRANGE", 1)
        silent = [stream(server, end=stay) for _ in range(3)]
        reasons = []
        for one in silent:
            with pytest.raises(grpc.RpcError) as error:
                next(one)
            reasons.append(error.value.details())
        assert sum("without a hello" in reason for reason in reasons) == 2
        stay.set()
        assert site.error is None


def test_what_nobody_waits_for_is_not_kept_and_not_begun(
    server: Sessions, keys: Callable[[str], Keys]
) -> None:
    done: list[bytes] = []
    go = threading.Event()

    def slowly(frame: bytes) -> bytes:
        done.append(frame)
        go.wait(20)
        return frame

    Site(server, "a", keys("a"), answer=slowly)
    assert server.wait(["a"], 20) == []
    ids = [server.post("a", word) for word in (b"one", b"two", b"three")]
    while not done:
        time.sleep(0.01)
    for id in ids[:2]:
        server.expire(id)
    assert list(server._links["a"].waiting) == [3]
    time.sleep(0.3)  # the site hears of it while it is busy
    go.set()
    found = answers(server)
    assert found[ids[0]] == b"one"  # late, to be counted
    assert isinstance(found[ids[1]], Failure)
    assert found[ids[2]] == b"three"
    assert done == [b"one", b"three"]


def test_every_frame_that_leaves_is_heard_of(server: Sessions, keys: Callable[[str], Keys]) -> None:
    left: list[bytes] = []

    def broken(frame: bytes) -> bytes:
        raise ValueError("row 7: Jane Doe")

    Site(server, "a", keys("a"), answer=broken, sent=left.append)
    assert server.wait(["a"], 20) == []
    id = server.post("a", b"x")
    found = answers(server)[id]
    assert isinstance(found, Failure)
    assert "Jane" not in found.reason
    assert [session.unpack(frame)[0].task for frame in left] == ["hello", "here", "failed"]
