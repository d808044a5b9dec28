"""
Flower as the engine: it knows the machines, carries the call to the sites, and starts both ends.

A run is a Flower app of three files: a ``pyproject.toml``, the experiment, and three lines that ask
this module for both ends. All that the algorithms exchange goes through sessions.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedllm import experiment as ex
from fedllm.across import Order, lead, take_part
from fedllm.errors import FedllmError
from fedllm.federation import Listener, Silent
from fedllm.operate import keys_of
from fedllm.transport.session import Sessions

LOG = logging.getLogger(__name__)
KIND = "train.session"
HOUR = 3600.0

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
folder = ""
keys = ""
address = "127.0.0.1:0"
sites = ""
seconds = 300.0
resume = false
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

    def __init__(self, grid: Grid, names: list[str]) -> None:
        """names: of the sites; who is behind which node, their certificates say."""
        self._grid, self._names = grid, names
        self._called: dict[str, int] = {}  # message -> node

    def __call__(self, name: str, order: Order) -> None:
        """Call one node more; which site it is, it says itself."""
        free = [node for node in self._nodes() if node not in self._called.values()]
        message = self._grid.create_message(
            RecordDict({"order": ConfigRecord(dict(order))}), KIND, free[0], group_id="call",
            ttl=24 * HOUR,
        )  # fmt: skip
        (id,) = self._grid.push_messages([message])
        self._called[id] = free[0]

    def lost(self) -> list[str]:
        """Why calls ended that did, since this was asked before."""
        found = []
        for reply in self._grid.pull_messages(list(self._called)):
            node = self._called.pop(reply.metadata.reply_to_message_id, None)
            if reply.has_error():
                found.append(f"node {node}: {reply.error.reason}")
        return found

    def _nodes(self, seconds: float = 120.0) -> list[int]:
        until = time.monotonic() + seconds
        while len(nodes := sorted(self._grid.get_node_ids())) < len(self._names):
            if time.monotonic() > until:
                raise FedllmError(f"{len(nodes)} of {len(self._names)} sites are connected")
            time.sleep(0.5)
        return nodes


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
        experiment = ex.load(file)
        keys = keys_of(Path(str(config["keys"])))
        names = [name for name in str(config["sites"]).split(",") if name]
        listener: Listener = Logged()
        with Sessions(str(config["address"]), keys, names) as sessions:
            caller = Caller(grid, names)
            lead(
                experiment, experiment.seeds[0], Path(str(config["folder"])), sessions, names,
                caller, resume=bool(config["resume"]), listener=listener,
                seconds=float(config["seconds"]), lost=caller.lost,
            )  # fmt: skip

    return app


def client_app() -> ClientApp:
    """A site's end; its folder is the node's setting ``site``."""
    app = ClientApp()

    @app.train("session")  # type: ignore[untyped-decorator]
    def session(message: Message, context: Context) -> Message:
        folder = Path(str(context.node_config["site"]))
        site = ex.load_site(folder / "site.toml")
        order = dict(message.content.config_records["order"])
        take_part(order, site, folder, keys_of(folder))
        return Message(RecordDict({"done": ConfigRecord({"site": site.name})}), reply_to=message)

    return app
