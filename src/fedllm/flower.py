"""
Flower as the engine: it knows the machines, carries the call to the sites, and starts both ends.

A run is a Flower app of three files: a ``pyproject.toml``, the experiment, and three lines that ask
this module for both ends. What the algorithms exchange goes through sessions, or, where no site is
to stay for a whole run, through Flower's own messages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedllm import experiment as ex
from fedllm.across import (
    Order,
    agree_on_names,
    hosted,
    lead,
    lead_over,
    order_of,
    server_says,
    take_part,
)
from fedllm.errors import FedllmError, Refusal
from fedllm.federation import Silent, write_json
from fedllm.operate import keys_of
from fedllm.remote import Distant
from fedllm.transport.flower import RECORD, Carried, connected, content, send
from fedllm.transport.keys import prove
from fedllm.transport.session import Keys, Sessions

LOG = logging.getLogger(__name__)
SESSION = "train.session"
ENDED = "flower/ended.json"  # in the server's folder: how the last run ended

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedllm-run"
version = "1.0.0"
description = "A run of fedllm"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedllm"

[tool.flwr.app.components]
serverapp = "fedllm_app:server"
clientapp = "fedllm_app:client"

[tool.flwr.app.config]
server = ""
out = ""
resume = false
check = false
word = ""
"""
APP = """\
from pathlib import Path

from fedllm.flower import client_app, server_app

server = server_app(Path(__file__).with_name("experiment.toml"))
client = client_app()
"""


def write_app(experiment: ex.Experiment, folder: Path) -> None:
    """The Flower app of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "fedllm_app.py").write_text(APP)
    (folder / "experiment.toml").write_text(ex.dump(experiment))


class Caller:
    """Brings orders to sites as Flower messages, one to each node."""

    def __init__(self, grid: Grid) -> None:
        """Nobody was called yet."""
        self._grid = grid
        self._called: dict[str, int] = {}  # message -> node

    def __call__(self, name: str, order: Order) -> None:
        """
        Call one node more; which site it is, it says itself, and its certificate.

        Raises FedllmError where there is none.
        """
        nodes = sorted(self._grid.get_node_ids())
        free = [node for node in nodes if node not in self._called.values()]
        if not free:
            raise FedllmError(f"{len(nodes)} nodes are connected, and all were called already")
        self._called[send(self._grid, SESSION, free[0], order)] = free[0]

    def lost(self) -> list[str]:
        """Why calls ended that did, since this was asked before."""
        found = []
        for reply in self._grid.pull_messages(list(self._called)):
            node = self._called.pop(reply.metadata.reply_to_message_id, None)
            if reply.has_error():
                found.append(f"node {node}: {reply.error.reason}")
        return found


class Logged(Silent):
    """Says in Flower's log how the run goes on."""

    def round(self, entry: Any) -> None:
        """A round is committed."""
        LOG.info("round %s", {k: v for k, v in entry.items() if k in ("round", "loss")})

    def note(self, text: str) -> None:
        """A failure, or something else worth knowing."""
        LOG.warning("%s", text)


def server_app(file: Path) -> ServerApp:
    """The server's end of the experiment in this file."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        experiment = ex.parse_text(file.read_text(), "the run", file.parent, foreign=True)
        folder = Path(str(config["server"]))
        federation = ex.load_federation(folder / "federation.toml")
        keys = None if federation.insecure else keys_of(folder)
        run = Run(experiment, Path(str(config["out"])), bool(config["resume"]))
        ended = {"word": config["word"], "error": ""}
        try:
            if config["check"]:
                ended["check"] = _check(grid, federation, keys, experiment)
            elif experiment.exchange.resident:
                _over_sessions(grid, federation, keys, run)
            else:
                _over_messages(grid, federation, keys, run)
        except BaseException as error:
            ended["error"] = str(error) or type(error).__name__
            raise
        finally:
            write_json(folder / ENDED, ended)

    return app


@dataclass(frozen=True)
class Run:
    """What is to be run, and where to."""

    experiment: ex.Experiment
    folder: Path
    resume: bool

    @property
    def seed(self) -> int:
        return self.experiment.seeds[0]


def _over_sessions(grid: Grid, federation: ex.FederationFile, keys: Keys | None, run: Run) -> None:
    names = list(federation.sites)
    with Sessions(federation.sessions, keys, names) as sessions:
        connected(grid, len(names), federation.wait)
        caller = Caller(grid)
        lead(
            run.experiment, run.seed, run.folder, sessions, names, caller, resume=run.resume,
            listener=Logged(), seconds=federation.wait, lost=caller.lost,
        )  # fmt: skip


def _over_messages(grid: Grid, federation: ex.FederationFile, keys: Keys | None, run: Run) -> None:
    remote = _carried(grid, federation, keys, run.experiment, run.folder)
    lead_over(remote, run.experiment, run.seed, run.folder, resume=run.resume, listener=Logged())


def _carried(
    grid: Grid, federation: ex.FederationFile, keys: Keys | None, experiment: ex.Experiment,
    folder: Path | None = None,
) -> Carried:  # fmt: skip
    agree_on_names(experiment, federation.sites)

    def order() -> Order:
        return order_of(experiment, experiment.seeds[0], folder)

    authority = keys.authority if keys else None
    return Carried(grid, federation.sites, order, authority, federation.wait)


def _check(
    grid: Grid, federation: ex.FederationFile, keys: Keys | None, experiment: ex.Experiment
) -> dict[str, Any]:
    """Ask all sites what they would say; nothing is trained."""
    ours, bases = server_says(experiment)
    found, reasons = _carried(grid, federation, keys, experiment).hello(Distant(ours, bases).refuse)
    missing = [f"{name} did not answer" for name in federation.sites if name not in found]
    return {"server": ours, "sites": found, "refused": [*reasons, *missing]}


@contextmanager
def discreet() -> Iterator[None]:
    """
    What went wrong at a site stays in its log; Flower would tell the server.

    An error may hold a row of the site's data, whoever raised it. That its policy forbids something
    it says openly.
    """
    try:
        yield
    except Refusal:
        raise
    except Exception:
        LOG.exception("this site cannot take part")
        raise FedllmError("the site cannot take part; its own log says why") from None


Work = Callable[[dict[str, Any], Path, ex.SiteFile, Keys | None, Context], dict[str, Any]]


def client_app() -> ClientApp:
    """A site's end; its folder is the node's setting ``site``."""
    app = ClientApp()

    def answered(work: Work) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            folder = Path(str(context.node_config["site"]))
            with discreet():
                site = ex.load_site(folder / "site.toml")
                keys = None if site.insecure else keys_of(folder)
                facts = work(content(message), folder, site, keys, context)
            return Message(RecordDict({RECORD: ConfigRecord(facts)}), reply_to=message)

        return answer

    app.train("session")(answered(_session))
    app.query("hello")(answered(_hello))
    app.train("frame")(answered(_frame))
    return app


def _session(
    order: dict[str, Any], folder: Path, site: ex.SiteFile, keys: Keys | None, _: Context
) -> dict[str, Any]:
    """Take part until the server says good-bye."""
    take_part(order, site, folder, keys)
    return {"done": site.name}


def _hello(
    order: dict[str, Any], folder: Path, site: ex.SiteFile, keys: Keys | None, context: Context
) -> dict[str, Any]:
    """What this site would say, and the proof that it is this site."""
    facts: dict[str, Any] = {**hosted(order, site, folder).facts, "name": site.name}
    if keys is not None:
        said = f"{order['nonce']} {context.node_id}".encode()
        facts |= {"certificate": keys.certificate, "proof": prove(keys.key, said)}
    return facts


def _frame(
    order: dict[str, Any], folder: Path, site: ex.SiteFile, keys: Keys | None, _: Context
) -> dict[str, Any]:
    """Answer one frame, from where the process before this one stopped."""
    half = hosted(order, site, folder)
    begun = str(order["begun"])
    with half.alone():  # an earlier message may have outlived its deadline
        if "state" in order:
            half.welcomed(order)
        else:
            half.go_on(begun)
        answer = half.answer(order["frame"])
        half.pause(begun)
        half.sent(answer)
    return {"frame": answer}
