"""
What crossing to other processes costs: a round of each strategy, and one split step.

Rounds: the same federation in this process, and over sessions (mutual TLS, loopback) with each
site a process of its own. A round over sessions is timed twice: one site at a time, which is the
order of the round in process with ``simulation.cohort = 1``, so that nothing but the way differs;
and side by side, as in reality, where sites share the machine's cores. What a round takes beyond
its clients' own work is its wall time less the seconds that the clients measured in that round,
summed; with sites side by side their sum is no part of the wall time, and only the wall time is
given. A round is that of ``fedllm.round`` without evaluation and the checkpoint's file.

A split step: a frame with one float32 tensor of 1.2 MB there and back, one at a time, through
``Sessions`` and ``attend`` with ``pack`` and ``unpack`` at both ends, beside the bare gRPC stream
with the same keys that carries as many raw bytes. With both ends in two processes, and in one.

    python benchmarks/overhead.py --out overhead.md
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

import fedllm
from fedllm import experiment as ex
from fedllm import federation
from fedllm.across import Called, Order, take_part
from fedllm.data.simulation import Division, divide
from fedllm.federation import Silent
from fedllm.ledger import Ledger, total
from fedllm.message import Failure, Message, Role, pack, unpack
from fedllm.remote import Distant, Remote
from fedllm.site import prepare_server
from fedllm.strategies import ServerState
from fedllm.transport.keys import authority, issue, request
from fedllm.transport.session import Keys, Sessions, attend

DEMO = Path(fedllm.__file__).parent / "demo.toml"
FLOATS = 300_000  # 1.2 MB
PARTS = ["rounds", "steps"]
SPAWN = get_context("spawn")


def made_keys(names: Sequence[str]) -> dict[str, Keys]:
    """Keys for each, signed by one authority."""
    own = authority("overhead")
    made = {}
    for name in names:
        key, asked = request(name)
        hosts = ["127.0.0.1"] if name == "server" else []
        made[name] = Keys(own.certificate, issue(own, asked, hosts), key)
    return made


# rounds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Took:
    """Seconds of a round: all of it, and what clients and server measured of their own work."""

    wall: float
    clients: float
    server: float
    frames: int

    @property
    def beyond(self) -> float:
        """Beyond the clients' own work."""
        return self.wall - self.clients


class Rounds:
    """A federation of which one round at a time is run; its clients are here, or ``remote``."""

    def __init__(self, spec: ex.Experiment, folder: Path, remote: Remote | None = None) -> None:
        """folder: for the states of clients that are here."""
        prepared = prepare_server(spec, 0) if remote else federation.prepare(spec, 0)
        name = federation.run_id(spec, 0)
        self.built = federation.assemble(spec, 0, prepared, Ledger(), name, Silent(), remote)
        self.built.clients.attach(folder)
        if remote is not None and isinstance(self.built.clients, Distant):
            remote.begin(self.built.clients.greet, self.built.clients.refuse)
        self.state: ServerState = self.built.strategy.start()
        self.number = 0

    def __call__(self) -> Took:
        """The next round."""
        self.number += 1
        ask, built = self.built.exchange, self.built
        start = time.perf_counter()
        ask.open(self.number)
        self.state = built.strategy.serve(
            self.state, sorted(ask.transport.clients()), ask, np.random.default_rng(self.number)
        )
        ask.close()
        built.clients.snapshot()
        built.ledger.commit()
        wall = time.perf_counter() - start
        rows = [row for row in built.ledger.rows if row.round == self.number]
        server = total(rows, "seconds", client="server")
        frames = int(total(rows, "frames"))
        return Took(wall, total(rows, "seconds") - server, server, frames)


def write_rows(path: Path, rows: Sequence[dict[str, str]], spec: ex.Experiment) -> str:
    """A CSV file of a classification's columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        names = [spec.data.text, spec.data.label]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def site_files(folder: Path, spec: ex.Experiment, division: Division) -> ex.Experiment:
    """Write what each site has; the experiment as a server has it."""
    public = write_rows(folder / "public.csv", division.public, spec)
    for name, mine in division.clients.items():
        write_rows(folder / name / "train.csv", mine.train, spec)
        write_rows(folder / name / "test.csv", mine.test, spec)
        (folder / name / "site.toml").write_text(
            f'name = "{name}"\n[data]\ntrain = "train.csv"\ntest = "test.csv"\n'
            f'public = "{public}"\n'
        )
    data = spec.data.model_copy(update={"labels": division.labels})
    shared = spec.public.model_copy(update={"source": public, "size": 0})
    return spec.replace(data=data, public=shared)


class Across:
    """The same federation over sessions, each site in a process that it starts."""

    def __init__(self, spec: ex.Experiment, folder: Path) -> None:
        """Returns when all sites are there."""
        division = divide(spec, (spec.data.text, spec.data.label), 0)
        names = list(division.clients)
        self._folder, self._keys = folder, made_keys([*names, "server"])
        self._spec = site_files(folder, spec, division)
        self._processes: list[Any] = []
        self._sessions = Sessions("127.0.0.1:0", self._keys["server"], names)
        self._called = Called(self._sessions, names, self._call, 120.0)
        self.rounds = Rounds(self._spec, folder / "server", self._called)

    def _call(self, name: str, token: str) -> None:
        order: Order = {
            "experiment": ex.dump(self._spec), "seed": 0, "token": token,
            "run": federation.run_id(self._spec, 0), "address": self._sessions.address,
        }  # fmt: skip
        site = ex.load_site(self._folder / name / "site.toml")
        arguments = (order, site, self._folder / name, self._keys[name])
        process = SPAWN.Process(target=take_part, args=arguments, daemon=True)
        process.start()
        self._processes.append(process)

    def __call__(self, window: int | None) -> Took:
        """The next round, with so many sites at work at once (None: all)."""
        self._called.window = window
        return self.rounds()

    def close(self) -> None:
        """Send the sites home."""
        self._sessions.close()
        for process in self._processes:
            process.join(30)


WAYS = ("in process", "one site at a time", "side by side")


def rounds_of(spec: ex.Experiment, times: int) -> dict[str, list[Took]]:
    """Rounds in process and over sessions, in turn, after one of each to warm up."""
    one = spec.replace(simulation=spec.simulation.model_copy(update={"cohort": 1}))
    with tempfile.TemporaryDirectory() as name:
        across = Across(one, Path(name))
        inside = Rounds(one, Path(name) / "inside")
        sides: list[Callable[[], Took]] = [inside, partial(across, 1), partial(across, None)]
        try:
            for side in sides:
                side()
            found: dict[str, list[Took]] = {way: [] for way in WAYS}
            for number in range(times):
                for way, side in zip(WAYS, sides, strict=True):
                    found[way].append(side())
                    said = f"{spec.strategy.kind}, {way}: {found[way][-1].wall:.2f} s"
                    print(f"{number + 1}/{times} {said}", flush=True)
        finally:
            across.close()
    return found


def median(found: Sequence[Took], name: str) -> float:
    """Of one column."""
    return statistics.median(getattr(took, name) for took in found)


def round_lines(found: dict[str, list[Took]]) -> list[str]:
    """A table of the three ways, and what the sessions added."""
    header = (
        "| round | wall s | min - max | clients' own s | server's own s | beyond the clients' |"
    )
    lines = [header, "|---|---|---|---|---|---|"]
    for way, took in found.items():
        walls = [one.wall for one in took]
        cells = [way, f"{median(took, 'wall'):.2f}", f"{min(walls):.2f} - {max(walls):.2f}"]
        if way != WAYS[2]:
            cells += [f"{median(took, name):.2f}" for name in ("clients", "server", "beyond")]
        lines.append(f"| {' | '.join(cells + [''] * (6 - len(cells)))} |")
    inside, alone, together = (found[way] for way in WAYS)
    frames = median(alone, "frames")
    more = statistics.median(a.wall - b.wall for a, b in zip(alone, inside, strict=True))
    beyond = statistics.median(a.beyond - b.beyond for a, b in zip(alone, inside, strict=True))
    ratio = statistics.median(a.wall / b.wall for a, b in zip(alone, inside, strict=True))
    beside = statistics.median(a.wall / b.wall for a, b in zip(together, inside, strict=True))
    said = (
        f"Over sessions, one site at a time, a round takes {more:+.2f} s ({ratio:.2f}x) of that in "
        f"process; beyond the clients' own work {beyond:+.2f} s, {1000 * beyond / frames:.1f} ms a "
        f"frame ({frames:.0f} frames). Side by side it takes {beside:.2f}x."
    )
    return [*lines, "", said]


# one step ---------------------------------------------------------------------------------------


def echo(frame: bytes) -> bytes:
    """A site that sends back the tensor that it was sent."""
    return pack(unpack(frame)[0])


def dial(address: str, keys: Keys) -> None:
    """The site's end of the bare stream: whatever comes goes back."""
    credentials = grpc.ssl_channel_credentials(keys.authority, keys.key, keys.certificate)
    back: queue.Queue[bytes] = queue.Queue()
    with grpc.secure_channel(address, credentials, unlimited()) as channel:
        call = channel.stream_stream("/bare/Open")
        try:
            for data in call(iter(back.get, None), wait_for_ready=True):
                back.put(data)
        finally:
            back.put(None)  # type: ignore[arg-type]


def unlimited() -> list[tuple[str, int]]:
    """No limit: gRPC takes 4 MB at most unless it is told otherwise."""
    return [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def start(target: Callable[..., None], arguments: tuple[Any, ...], apart: bool) -> None:
    """The site's end, in a process of its own or in a thread of this one."""
    kind: Any = SPAWN.Process if apart else threading.Thread
    kind(target=target, args=arguments, daemon=True).start()


class OverSession:
    """Steps through ``Sessions`` and ``attend``."""

    def __init__(self, keys: dict[str, Keys], apart: bool) -> None:
        """apart: the site is another process."""
        self._sessions = Sessions("127.0.0.1:0", keys["server"], ["site"])
        token = self._sessions.admit("site")
        start(attend, (self._sessions.address, "site", token, keys["site"], echo), apart)
        assert not self._sessions.wait(["site"], 120.0)
        self._tensors = {"x": torch.randn(FLOATS)}

    def __call__(self, steps: int) -> list[float]:
        """Milliseconds of each step."""
        took = []
        for _ in range(steps):
            began = time.perf_counter()
            roles = {"x": Role.ACTIVATION}
            self._sessions.post("site", pack(Message("c3", "step", self._tensors, roles)))
            for _, answer in self._sessions.collect(60.0):
                assert not isinstance(answer, Failure)
                unpack(answer)
            took.append(1000 * (time.perf_counter() - began))
        return took

    def close(self) -> None:
        """Say good-bye."""
        self._sessions.close()


class Bare:
    """Steps over a gRPC stream and nothing else: its handler sends, and waits for what comes."""

    def __init__(self, keys: dict[str, Keys], apart: bool) -> None:
        """apart: the site is another process."""
        self._wanted: queue.Queue[int] = queue.Queue()
        self._took: queue.Queue[list[float]] = queue.Queue()
        self._server = grpc.server(ThreadPoolExecutor(2), options=unlimited())
        handler = grpc.method_handlers_generic_handler(
            "bare", {"Open": grpc.stream_stream_rpc_method_handler(self._open)}
        )
        self._server.add_generic_rpc_handlers((handler,))
        mine = keys["server"]
        credentials = grpc.ssl_server_credentials(
            [(mine.key, mine.certificate)], mine.authority, require_client_auth=True
        )
        port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()
        start(dial, (f"127.0.0.1:{port}", keys["site"]), apart)

    def _open(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        data = os.urandom(4 * FLOATS)
        while steps := self._wanted.get():
            took = []
            for _ in range(steps):
                began = time.perf_counter()
                yield data
                assert len(next(requests)) == len(data)
                took.append(1000 * (time.perf_counter() - began))
            self._took.put(took)

    def __call__(self, steps: int) -> list[float]:
        """Milliseconds of each step."""
        self._wanted.put(steps)
        return self._took.get(timeout=300)

    def close(self) -> None:
        """End the stream."""
        self._wanted.put(0)
        self._server.stop(grace=2.0).wait()


def steps_of(apart: bool, times: int, steps: int) -> dict[str, list[float]]:
    """Median milliseconds a step of each turn, both sides in turn."""
    keys = made_keys(["server", "site"])
    sides = {"session": OverSession(keys, apart), "bare stream": Bare(keys, apart)}
    try:
        for side in sides.values():
            side(10)
        found: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(times):
            for name, side in sides.items():
                found[name].append(statistics.median(side(steps)))
                print(f"{number + 1}/{times} {name}: {found[name][-1]:.2f} ms", flush=True)
        return found
    finally:
        for side in sides.values():
            side.close()


def step_lines(found: dict[str, list[float]]) -> list[str]:
    """A table of both sides."""
    ours, bare = found["session"], found["bare stream"]
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    lines = ["| side | ms a step | min - max of the turns |", "|---|---|---|"]
    for name, turns in found.items():
        span = f"{min(turns):.2f} - {max(turns):.2f}"
        lines.append(f"| {name} | {statistics.median(turns):.2f} | {span} |")
    return [*lines, "", f"Ratio {ratio:.2f}x (median of the turns' ratios)."]


def main() -> None:
    """Measure what is asked for, and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", type=Path, default=DEMO, help="of classification")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="a turn")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = [
        "# What crossing to other processes costs", "",
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, torch "
        f"{torch.__version__}, gRPC {grpc.__version__}; one thread a process, loopback, mutual "
        "TLS; medians, sides in turn.",
    ]  # fmt: skip
    if "rounds" in arguments.only:
        spec = ex.load(arguments.experiment, arguments.set)
        spec = spec.replace(model=spec.model.model_copy(update={"threads": 1}))
        for kind in spec.compare.strategies:
            chosen = spec.replace(rounds=1000, strategy=getattr(spec.compare, kind))
            found = rounds_of(chosen, arguments.times)
            title = f"## A round of {kind}: {spec.simulation.clients} sites, {spec.name}"
            text += ["", title, "", *round_lines(found)]
    if "steps" in arguments.only:
        for apart in (True, False):
            where = "in two processes" if apart else "in one process"
            found_ = steps_of(apart, arguments.times, arguments.steps)
            size = f"{4 * FLOATS / 1e6:.1f} MB there and back"
            text += ["", f"## A split step, both ends {where}: {size}", "", *step_lines(found_)]
    print("\n".join(text))
    if arguments.out:
        arguments.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # of the sites' processes
    sys.exit(main())
