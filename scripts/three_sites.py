"""
A server and three sites on this machine, over TLS, by the same commands that operators use.

    python scripts/three_sites.py up DIR      # keys, rows, a SuperLink and three SuperNodes
    python scripts/three_sites.py run DIR     # the demo's three strategies over it, and a table
    python scripts/three_sites.py down DIR    # stop all of it

``up DIR --run`` does the first two. DIR holds ``server`` and a folder for each site, ``logs``,
``pids`` and ``runs``. After ``down``, or a crash, ``up`` starts the same federation again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM

import fedllm
from fedllm import experiment as ex
from fedllm.compare import read
from fedllm.data.simulation import Division, divide
from fedllm.errors import FedllmError
from fedllm.report import tables

Say = Callable[[str], None]
HOST, PORT = "127.0.0.1", 8000
DEMO = Path(fedllm.__file__).parent / "demo.toml"
CLI = ("fedllm", "fedllm.cli")
COMMAND = [sys.executable, "-m", "fedllm.cli"]
PATIENCE = 120.0  # seconds for the server to listen, and for all sites to be connected
CONNECTED = "SuperNode ID"  # in the log of a node that is
GRACE = 15.0  # seconds to end after being asked


def aloud(text: str) -> None:
    """Say it now: commands that we start write to the same place."""
    print(text, flush=True)


def up(
    folder: Path, spec: ex.Experiment, division: Division, port: int | None = None, say: Say = aloud
) -> dict[str, subprocess.Popen[bytes]]:
    """
    Bring up a server and a site for each client of the division; processes by name.

    port: of Flower, and the first of as many as there are sites and two more (8000, or what the
    folder had before). Returns when all are connected; ``down`` stops them, also from elsewhere.
    Raises FedllmError for a folder in use or of something else, and for a port that is taken.
    """
    folder = folder.resolve()
    if running := members(folder):
        raise FedllmError(
            f"{folder}: already up ({len(running)} processes); "
            f"'three_sites.py down {folder}' stops it"
        )
    names = list(division.clients)
    port = _port(folder, port)
    check_ports(port, 2 + len(names))
    _prepare(folder, spec, division, port, say)
    started: dict[str, subprocess.Popen[bytes]] = {}

    def wait(failed: str, there: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not there():
            ended = any(process.poll() is not None for process in started.values())
            if ended or time.monotonic() > until:
                tails = [f"{p}:\n{p.read_text()[-600:]}" for p in sorted(folder.glob("logs/*.log"))]
                raise FedllmError("\n".join([failed, *tails]))
            time.sleep(0.5)

    try:
        started["server"] = _start(folder, "server", ["server", "start"], say)
        wait("the server does not listen", lambda: "ready" in _log(folder, "server"))
        for number, name in enumerate(names):
            words = ["--server", f"{HOST}:{port}", "--port", str(port + 2 + number)]
            started[name] = _start(folder, name, ["site", "start"], say, words)
        say("waiting until all sites are connected")
        wait(
            "not all sites are connected", lambda: all(CONNECTED in _log(folder, n) for n in names)
        )
    except FedllmError:
        down(folder, say)
        raise
    say(f"up: {', '.join(names)} at {HOST}:{port}")
    return started


def run(
    folder: Path, sets: Sequence[str] = (), out: Path | None = None, say: Say = aloud
) -> list[str]:
    """
    The experiment with each strategy over the federation; lines of a table of what came out.

    sets: KEY=VALUE of the experiment.  out: where the run folders go (``runs`` in the folder). A
    run that is complete is not repeated, one that is not is resumed. Raises FedllmError where
    nothing is up, a run failed, or a run folder holds other settings.
    """
    folder = folder.resolve()
    if not members(folder):
        raise FedllmError(f"{folder}: nothing is up; 'three_sites.py up {folder}' brings it up")
    file = folder / "experiment.toml"
    seconds = {}
    kinds = ex.load(file, sets).compare.strategies
    outs = {kind: (out or folder / "runs").resolve() / kind for kind in kinds}
    for kind, target in outs.items():
        given = [f"strategy={_inline(file, sets, kind)}", *sets]
        if _complete(ex.load(file, given), target):
            say(f"{target}: complete")
            continue
        words = [w for one in given for w in ("--set", one)] + ["--resume"] * target.exists()
        command = ["run", str(file), "--on", str(folder / "server"), "--out", str(target)]
        began = time.monotonic()
        _fedllm([*command, *words], say)
        seconds[kind] = time.monotonic() - began
    return _table({kind: read(target) for kind, target in outs.items()}, seconds)


def down(folder: Path, say: Say = aloud) -> list[str]:
    """
    Stop whatever runs for this folder, whoever started it; what was stopped, by name.

    They are asked first, and made to after 15 s. Does nothing where nothing runs.
    """
    folder = folder.resolve()
    stopped = _end(folder, lambda one: not one.at(folder / "server"), say)
    stopped += _end(folder, lambda one: True, say)
    shutil.rmtree(folder / "pids", ignore_errors=True)
    say(f"stopped: {', '.join(stopped)}" if stopped else f"{folder}: nothing runs")
    return stopped


def _end(folder: Path, which: Callable[[Member], bool], say: Say) -> list[str]:
    """Some of the folder's processes. Sites go first: a node that says good-bye may come back."""
    asked: dict[int, Member] = {}
    until = time.monotonic() + GRACE
    while left := {pid: one for pid, one in members(folder).items() if which(one)}:
        late = time.monotonic() > until
        _signal(left if late else left.keys() - asked.keys(), SIGKILL if late else SIGTERM)
        asked |= left
        if late:
            say(f"killed: {', '.join(f'{one.name} ({pid})' for pid, one in left.items())}")
        time.sleep(0.2)
    return [f"{one.name} ({pid})" for pid, one in sorted(asked.items())]


# processes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A process of a federation: its parent, its group, and the words of its command."""

    parent: int
    group: int
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is, in a word or a few."""
        for at, word in enumerate(self.words[:3]):
            if _flower(word):
                return Path(word).name
            if Path(word).name in CLI:
                return " ".join(["fedllm", *(Path(w).name for w in self.words[at + 1 : at + 4])])
        return Path(self.words[0]).name

    def at(self, folder: Path) -> bool:
        """Whether its command names this folder, or something in it."""
        return any(re.search(rf"(^|[\"'=]){re.escape(str(folder))}(/|$)", w) for w in self.words)


def members(folder: Path) -> dict[int, Member]:
    """
    Processes that run for this folder, by id: found by their commands, so also after a crash.

    A SuperLink gives its helpers a session of their own: its group is not all of it.
    """
    folder = folder.resolve()
    everybody = processes()
    groups = {int(path.read_text()) for path in folder.glob("pids/*")}
    addresses = {f"{HOST}:{port}" for port in _known_ports(folder)}

    def belongs(one: Member) -> bool:
        flower = any(_flower(word) for word in one.words[:3])
        ours = flower or any(Path(word).name in CLI for word in one.words[:3])
        return (ours and one.at(folder)) or (flower and not addresses.isdisjoint(one.words))

    found = {pid: one for pid, one in everybody.items() if belongs(one)}
    led = {group for group in groups if any(one.group == group for one in found.values())}
    while True:  # children, and the rest of the groups that we made
        more = {
            pid: one for pid, one in everybody.items()
            if pid not in found and (one.parent in found or one.group in led)
        }  # fmt: skip
        if not more:
            found.pop(os.getpid(), None)
            return found
        found |= more


def processes() -> dict[int, Member]:
    """All processes of this machine, by id; those that have ended are left out."""
    if Path("/proc/self/stat").exists():
        return _from_proc()
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,pgid=,args="], capture_output=True, text=True, check=True
    ).stdout
    lines = (line.split(None, 3) for line in listed.splitlines())
    return {
        int(pid): Member(int(parent), int(group), tuple(words.split()))
        for pid, parent, group, words in lines
    }


def _from_proc() -> dict[int, Member]:
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended while we looked
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if words and fields[0] != "Z":
                found[int(path.name)] = Member(int(fields[1]), int(fields[2]), tuple(words))
    return found


def _flower(word: str) -> bool:
    return Path(word).name.startswith(("flower-", "flwr"))


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _start(
    folder: Path, name: str, command: list[str], say: Say, more: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """A command in the background, in a group of its own, which Ctrl-C here does not reach."""
    words = [*command, str(folder / name), *more]
    log, pid = folder / "logs" / f"{name}.log", folder / "pids" / name
    for path in (log, pid):
        path.parent.mkdir(exist_ok=True)
    say(f"$ fedllm {shlex.join(words)} > {log} &")
    # so small a model is fastest on one core, and there are fewer cores than sites
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*COMMAND, *words], start_new_session=True, env=environment,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    pid.write_text(f"{process.pid}\n")
    return process


def _fedllm(words: Sequence[str], say: Say) -> None:
    """A command of the project, shown. Raises FedllmError where it fails."""
    say(f"$ fedllm {shlex.join(words)}")
    process = subprocess.Popen([*COMMAND, *words])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it has heard it, too, and has its run to stop
        raise
    if code:
        raise FedllmError(f"fedllm {' '.join(words[:2])}: ended with code {code} (its words above)")


def _log(folder: Path, name: str) -> str:
    return (folder / "logs" / f"{name}.log").read_text(errors="replace")


# folders and ports ------------------------------------------------------------------------------


def _prepare(folder: Path, spec: ex.Experiment, division: Division, port: int, say: Say) -> None:
    """Keys, certificates, rows and the experiment, or those that a folder of the same has."""
    file = folder / "experiment.toml"
    data = spec.data.model_copy(update={"labels": division.labels})
    if division.public:
        public = spec.public.model_copy(update={"source": "public.csv", "size": 0})
        spec = spec.replace(public=public)
    text = ex.dump(spec.replace(data=data))
    if file.exists():  # it is written last: all else is there, too
        if file.read_text() != text:
            raise FedllmError(f"{file}: the folder holds another experiment; take another folder")
        return
    if folder.exists() and any(folder.iterdir()):
        raise FedllmError(f"{folder}: not empty, and no federation; take another folder")
    folder.mkdir(parents=True, exist_ok=True)
    server = str(folder / "server")
    _fedllm(["server", "init", server, "--host", HOST, "--port", str(port)], say)
    if division.public:
        write_rows(folder / "public.csv", division.public, _public_columns(spec))
    for name, mine in division.clients.items():
        site = folder / name
        _fedllm(["site", "init", str(site), "--name", name], say)
        _fedllm(["server", "sign", server, str(site / "request.pem")], say)
        write_rows(site / "train.csv", mine.train, columns(spec))
        write_rows(site / "test.csv", mine.test, columns(spec))
        if division.public:
            shutil.copy(folder / "public.csv", site / "public.csv")
            _name_public(site / "site.toml")
    file.write_text(text)


def _name_public(path: Path) -> None:
    """What an operator does: the site's copy of the public set is named in its file."""
    path.write_text(path.read_text().replace("# public =", "public =", 1))
    if ex.load_site(path).data.public is None:
        raise FedllmError(f"{path}: no line '# public =' to uncomment")


def columns(spec: ex.Experiment) -> list[str]:
    """Columns of private rows."""
    if spec.data.prompt is not None and spec.data.response is not None:
        listed = [] if spec.data.options is None else [spec.data.options]
        return list(dict.fromkeys([spec.data.prompt, spec.data.response, *listed]))
    if spec.task.kind == "classification":
        return [spec.data.text, spec.data.label]
    return [spec.data.text]


def _public_columns(spec: ex.Experiment) -> list[str]:
    hidden = spec.task.kind == "classification" and not spec.public.labelled
    return columns(spec)[:1] if hidden else columns(spec)


def write_rows(path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str]) -> None:
    """A CSV file of these columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _port(folder: Path, port: int | None) -> int:
    """The port of Flower: as the folder has it, or as given."""
    file = folder / "server" / "federation.toml"
    if not file.exists():
        return port or PORT
    before = int(ex.load_federation(file).superlink.rpartition(":")[2])
    if port not in (None, before):
        raise FedllmError(f"{folder}: its server's port is {before}; leave --port out")
    return before


def _known_ports(folder: Path) -> range:
    """All ports of the folder's federation; none where there is none yet."""
    with suppress(FedllmError):
        spec = ex.load_federation(folder / "server" / "federation.toml")
        port = int(spec.superlink.rpartition(":")[2])
        return range(port, port + 2 + len(spec.sites))
    return range(0)


def check_ports(first: int, count: int) -> None:
    """Raise FedllmError where somebody listens on one of so many ports in a row."""
    for port in range(first, first + count):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            try:
                one.bind((HOST, port))
            except (OSError, OverflowError) as error:
                raise FedllmError(
                    f"port {port} cannot be had ({error}); {first} to {first + count - 1} are "
                    "needed: --port takes another first"
                ) from None


def free_ports(count: int = 5) -> int:
    """The first of so many ports in a row that nobody listens on now."""
    while True:
        with socket.socket() as one:
            one.bind((HOST, 0))
            first = int(one.getsockname()[1])
        with suppress(FedllmError):
            check_ports(first, count)
            return first


# runs -------------------------------------------------------------------------------------------


def _inline(file: Path, sets: Sequence[str], kind: str) -> str:
    """A strategy's options in the comparison, as one TOML value."""
    options = getattr(ex.load(file, sets).compare, kind).model_dump(mode="json", exclude_none=True)
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in options.items()) + "}"


def _complete(spec: ex.Experiment, folder: Path) -> bool:
    """Whether the run is done. Raises FedllmError for a folder with other settings."""
    stored = folder / "experiment.toml"
    if stored.exists() and stored.read_text() != ex.dump(spec):
        raise FedllmError(f"{folder}: holds a run with other settings; --out takes another folder")
    return (folder / "summary.json").exists()


def _table(summaries: dict[str, dict[str, object]], seconds: dict[str, float]) -> list[str]:
    """Quality and costs of each strategy; ``whole`` is the command from start to end."""
    header = ["strategy", "accuracy", "up", "down", "client's seconds", "whole command"]
    lines = []
    for kind, summary in summaries.items():
        costs, quality = summary["per_client_round"], summary["metrics"]
        assert isinstance(costs, dict) and isinstance(quality, dict)
        accuracy = quality.get("accuracy")
        lines.append([
            kind, "" if accuracy is None else f"{accuracy:.1%}",
            tables.size(costs["bytes_up"]), tables.size(costs["bytes_down"]),
            f"{costs['seconds']:.1f}", f"{seconds[kind]:.0f} s" if kind in seconds else "before",
        ])  # fmt: skip
    return [tables.markdown(header, lines), "", "up, down and seconds: of a client and round"]


# the command line -------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("up", "run", "down"):
        one = commands.add_parser(name)
        one.add_argument("folder", type=Path, metavar="DIR")
        if name == "up":
            one.add_argument("--experiment", type=Path, metavar="FILE", default=DEMO)
            one.add_argument("--port", type=int, metavar="N", help=f"the first of five ({PORT})")
            one.add_argument("--run", action="store_true", help="and run the three strategies")
        if name != "down":
            one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
            one.add_argument("--out", type=Path, metavar="DIR", help="where run folders go")
    return parser


def main() -> None:
    """Do what is asked; what the user can set right ends with code 2."""
    found = _parser().parse_args()
    try:
        if found.command == "up":
            spec = ex.load(found.experiment)
            if found.set and not found.run:
                raise FedllmError("--set: with 'run', or 'up --run'")
            division = divide(spec, columns(spec), spec.seeds[0])
            up(found.folder, spec, division, found.port)
        if found.command == "run" or getattr(found, "run", False):
            print("\n".join(run(found.folder, found.set, found.out)))
        if found.command == "down":
            down(found.folder)
    except FedllmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted; 'three_sites.py down {found.folder}' stops what runs",
              file=sys.stderr)  # fmt: skip
        sys.exit(130)


if __name__ == "__main__":
    main()
