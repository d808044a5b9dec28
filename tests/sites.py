"""
Three sites on this machine: processes of their own, keys, mutual TLS, and what may go wrong.

Processes come from a fork server that has the libraries loaded, so that one starts in a moment.
"""

import csv
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import site_process
from fedllm import checkpoint, ledger
from fedllm import experiment as ex
from fedllm.across import Order, lead
from fedllm.data.simulation import divide
from fedllm.federation import Silent
from fedllm.message import Failure, unpack
from fedllm.transport import Transport
from fedllm.transport.keys import Authority, authority, issue, request, write
from fedllm.transport.session import Keys, Sessions
from small import build, finish

LOADED = ["fedllm.across", "fedllm.models.loading", "transformers.modeling_utils", "peft"]
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(LOADED)


def rows(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "intent"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.glob("adapter/*.safetensors"))}  # fmt: skip


def counted(path: Path) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """Bytes and arithmetic of every step but the sites' saving."""
    return {
        (r.round, r.step, r.client, r.direction, r.role):
            (r.payload_bytes, r.wire_bytes, r.flops, r.optimizer_steps, r.frames)
        for r in ledger.read(path / "ledger.jsonl")
        if r.step != "commit" and r.role not in ("measurement", "header")
    }  # fmt: skip


def keys_into(folder: Path, own: Authority, name: str) -> Keys:
    """Keys of this name under an authority, and the files of them."""
    key, asked = request(name)
    hosts = ["127.0.0.1"] if name == "server" else []
    keys = Keys(own.certificate, issue(own, asked, hosts), key)
    write(folder / "ca.pem", keys.authority)
    write(folder / "certificate.pem", keys.certificate)
    write(folder / "key.pem", key, private=True)
    return keys


class Sites:
    """Three sites with the rows that the simulation gives its clients."""

    def __init__(self, folder: Path, spec: ex.Experiment) -> None:
        self.folder = folder
        self.processes: dict[str, BaseProcess] = {}
        self.started: list[BaseProcess] = []
        self.through: Callable[[str], str] = lambda address: address  # of the server -> to dial
        self.sessions: Sessions
        self.simulated = spec
        self.own = authority("test")
        division = divide(spec, ("text", "intent"), 0)
        self.public = rows(folder / "public.csv", list(division.public))
        self.names = list(division.clients)
        self.keys = keys_into(folder / "server", self.own, "server")
        for name in self.names:
            keys_into(folder / name, self.own, name)
            rows(folder / name / "train.csv", list(division.clients[name].train))
            rows(folder / name / "test.csv", list(division.clients[name].test))
            (folder / name / "site.toml").write_text(
                f'name = "{name}"\n[data]\ntrain = "train.csv"\ntest = "test.csv"\n'
                f'public = "{self.public}"\n'
            )
        data = spec.data.model_copy(update={"labels": division.labels})
        public = spec.public.model_copy(update={"source": self.public, "size": 0})
        self.spec = spec.replace(data=data, public=public)

    def plan(self, name: str, **plan: Any) -> None:
        """What will go wrong at this site (``site_process``)."""
        (self.folder / name / "faults.json").write_text(json.dumps(plan))

    def done(self, name: str) -> list[dict[str, Any]]:
        """What went wrong there, and when."""
        path = self.folder / name / "done.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def injected(self, name: str) -> float:
        """When the first fault of its plan came; 0 before it does."""
        return next((one["time"] for one in self.done(name) if one["round"]), 0.0)

    def wait(self, name: str, seconds: float = 120.0) -> None:
        """Until it came. Raises TimeoutError."""
        until = time.monotonic() + seconds
        while not self.injected(name):
            if time.monotonic() > until:
                raise TimeoutError(f"nothing went wrong at {name}")
            time.sleep(0.01)

    def call(self, name: str, order: Order) -> None:
        """Start a site; without a name one whose process died (``lost`` found it)."""
        name = name or next(n for n, p in self.processes.items() if p.exitcode)
        order = {**order, "address": self.through(str(order["address"]))}
        self.processes[name] = self.start(name, order)

    def start(self, name: str, order: Order) -> BaseProcess:
        """A process of the site in this folder, whether or not anybody called it."""
        folder = self.folder / name
        (folder / "order.json").write_text(json.dumps(order))
        process = CONTEXT.Process(target=site_process.main, args=(folder,), daemon=True)
        process.start()
        self.started.append(process)
        return process

    def stranger(
        self, name: str, token: str, keys: Callable[[Path], Keys] | None = None, **plan: Any
    ) -> dict[str, Any]:
        """Somebody who dials in as this site while a run is open; when it did, and how it ended."""
        folder = self.folder / "stranger"
        left = shutil.ignore_patterns("runs", "done.jsonl", "log.txt")
        shutil.copytree(self.folder / name, folder, ignore=left)
        if keys is not None:
            keys(folder)
            write(folder / "ca.pem", self.own.certificate)  # it trusts the server all the same
        self.plan("stranger", **plan)
        order = json.loads((folder / "order.json").read_text())
        process = self.start("stranger", {**order, "token": token})
        process.join(120)
        return {"code": process.exitcode, **self.done("stranger")[0]}

    def lost(self) -> list[str]:
        """Whose process died, as an engine tells it."""
        return [f"{n}: code {p.exitcode}" for n, p in self.processes.items() if p.exitcode]

    def lead(
        self, run: str, patience: float = 10.0, call: Callable[[str, Order], None] | None = None,
        largest: int = 2**30, **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        with Sessions(
            "127.0.0.1:0", self.keys, self.names, patience=patience, largest=largest
        ) as sessions:
            self.sessions = sessions
            return lead(
                self.spec, 0, self.folder / run, sessions, self.names, call or self.call,
                seconds=120, **more,
            )  # fmt: skip

    def log(self) -> str:
        return "\n".join((self.folder / name / "log.txt").read_text() for name in self.names)

    def stop(self) -> None:
        for process in self.started:
            process.kill()
            process.join()


# a server of its own ----------------------------------------------------------------------------


def _lead(sites: Sites, run: str, resume: bool, calls: Any) -> None:
    torch.set_num_threads(1)
    sites.lead(run, call=lambda name, order: calls.send((name, order)), resume=resume)


class Server:
    """The server in a process that may be killed; the calls to the sites outlive it."""

    def __init__(self, sites: Sites, run: str, resume: bool = False) -> None:
        self._sites = sites
        self._calls, self._called = CONTEXT.Pipe(duplex=False)
        arguments = (Portable.of(sites), run, resume, self._called)
        self.process = CONTEXT.Process(target=_lead, args=arguments, daemon=True)
        self.process.start()

    def until(self, event: Callable[[], bool], seconds: float = 120.0) -> None:
        """Call whom the server calls until something happens. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not event():
            if time.monotonic() > end:
                raise TimeoutError(self._sites.log())
            while self._calls.poll():
                self._sites.call(*self._calls.recv())
            time.sleep(0.01)

    def ended(self) -> bool:
        return self.process.exitcode is not None


class Portable(Sites):
    """What another process needs of the sites: no processes, no way to them."""

    def __init__(self, folder: Path, spec: ex.Experiment, names: list[str], keys: Keys) -> None:
        self.folder, self.spec, self.names, self.keys = folder, spec, names, keys

    @classmethod
    def of(cls, sites: Sites) -> "Portable":
        return cls(sites.folder, sites.spec, sites.names, sites.keys)


# the network ------------------------------------------------------------------------------------


class Proxy:
    """TCP to an address and back, until it is cut."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._to, self._pairs = ("", 0), []  # type: ignore[var-annotated]
        self._up, self._flows = threading.Event(), threading.Event()
        self._up.set()
        self._flows.set()
        threading.Thread(target=self._serve, daemon=True).start()

    def to(self, address: str) -> str:
        """The address to dial instead of this one."""
        host, _, port = address.rpartition(":")
        self._to = host, int(port)
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self, silently: bool = False) -> None:
        """End all connections and take no more; silently: nothing passes, and nobody is told."""
        if silently:
            self._flows.clear()
            return
        self._up.clear()
        for one in self._pairs:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def mend(self) -> None:
        self._up.set()
        self._flows.set()

    def close(self) -> None:
        self.mend()
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if not self._up.is_set():
                    near.close()
                    continue
                far = socket.create_connection(self._to)
                self._pairs += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                self._flows.wait()
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


# what should come of it -------------------------------------------------------------------------

Missed = Mapping[tuple[int, str], bool]
"""(round, client): whether it trained all the same, and only its answer was not taken."""


class Missing:
    """A transport over which some answers of some rounds never come."""

    def __init__(self, inside: Transport, missed: Missed) -> None:
        self.inside, self.missed, self.window = inside, missed, inside.window
        self._failed: list[tuple[str, str]] = []
        self._unheard: dict[str, str] = {}

    def clients(self) -> Sequence[str]:
        return self.inside.clients()

    def post(self, client: str, frame: bytes) -> str:
        asked, _ = unpack(frame)
        trained = self.missed.get((asked.round, client))
        if asked.task in site_process.UNTRAINED or trained is None:
            return self.inside.post(client, frame)
        if not trained:
            self._failed.append((f"missing {asked.id}", client))
            return self._failed[-1][0]
        id = self.inside.post(client, frame)
        self._unheard[id] = client
        return id

    def expire(self, id: str) -> None:
        self.inside.expire(id)

    def collect(self, timeout: float | None = None) -> Iterator[tuple[str, bytes | Failure]]:
        while self._failed:
            id, client = self._failed.pop()
            yield id, Failure(client, "", "missing")
        for id, answer in self.inside.collect(timeout):
            client = self._unheard.pop(id, "")
            yield id, Failure(client, "", "missing") if client else answer


def reference(spec: ex.Experiment, missed: Missed | None = None) -> dict[str, torch.Tensor]:
    """The tunables of the run in one process in which these clients were missing."""
    torch.set_num_threads(1)
    built = build(spec)
    built.exchange.transport = Missing(built.exchange.transport, missed or {})
    return finish(built).server.shared


def committed(folder: Path) -> dict[str, torch.Tensor]:
    """The tunables of the last round that a run committed."""
    found = checkpoint.load(folder / "checkpoints", states_here=False)
    assert found is not None
    return found.server.shared


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def failures(folder: Path) -> dict[tuple[int, str], str]:
    """(round, client) of the answers to what was to be trained that failed, and why."""
    return {
        (row.round, row.client): row.reason
        for row in ledger.read(folder / "ledger.jsonl")
        if row.failures and row.step not in ("commit", "eval")
    }


def missed(failed: Mapping[tuple[int, str], str]) -> dict[tuple[int, str], bool]:
    """A site that was not there goes back to its last state; any other has trained."""
    away = ("not there", "began anew")
    return {key: not any(word in reason for word in away) for key, reason in failed.items()}


# what the server notices ------------------------------------------------------------------------


class Watch(Silent, logging.Handler):
    """Everything that the server says, with its time; may hold a round's end until something is."""

    def __init__(self, hold: Mapping[int, Callable[[], Any]] | None = None) -> None:
        logging.Handler.__init__(self, logging.INFO)
        self.said: list[tuple[float, str]] = []
        self._hold = hold or {}

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.created, record.getMessage()))

    def note(self, text: str) -> None:
        self.said.append((time.time(), text))

    def round(self, entry: Mapping[str, Any]) -> None:
        self._hold.get(entry["round"], lambda: None)()

    def after(self, moment: float, word: str) -> list[tuple[float, str]]:
        """What was said with this word in it since then."""
        return [(when, text) for when, text in list(self.said) if when >= moment and word in text]

    def wait(self, word: str, since: float, seconds: float = 60.0) -> None:
        """Until it is said. Raises TimeoutError."""
        until = time.monotonic() + seconds
        while not self.after(since, word):
            if time.monotonic() > until:
                raise TimeoutError(f"nobody said {word!r}")
            time.sleep(0.02)

    def __enter__(self) -> "Watch":
        log = logging.getLogger("fedllm")
        self._before = log.level
        log.setLevel(logging.INFO)
        log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        log = logging.getLogger("fedllm")
        log.removeHandler(self)
        log.setLevel(self._before)
