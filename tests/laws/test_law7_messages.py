"""Law 7 where no site stays: every message meets a process that knows only the site's folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, Metadata, RecordDict

from fedllm import experiment as ex
from fedllm import federation, ledger
from fedllm.across import lead_over, order_of
from fedllm.data import own
from fedllm.data.simulation import divide
from fedllm.errors import FedllmError
from fedllm.federation import Silent
from fedllm.flower import ENDED, client_app, server_app
from fedllm.message import Failure, Role, of_role
from fedllm.message import Message as Message_
from fedllm.transport.flower import FRAME, HELLO, RECORD, Carried
from laws.test_law7_across import Sites, counted, rows, weights
from small import build, experiment


class Nodes:
    """Flower's Grid without machines: each message meets a new app, which may be made to die."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = {11 + number: folder for number, folder in enumerate(folders)}
        self.replies: dict[str, Message] = {}
        self.kinds: list[str] = []
        self.dying: dict[int, str] = {}  # number of a message -> what its process dies of

    def get_node_ids(self) -> list[int]:
        return list(self.folders)

    def create_message(self, record: RecordDict, kind: str, node: int, **_: Any) -> Message:
        about = Metadata(1, str(len(self.kinds)), 0, node, "", "", 0.0, 60.0, kind)
        return Message(content=record, metadata=about)

    def push_messages(self, messages: list[Message]) -> list[str]:
        (message,) = messages
        about = message.metadata
        context = Context(
            1, about.dst_node_id, {"site": str(self.folders[about.dst_node_id])}, RecordDict(), {}
        )
        number = len(self.kinds)
        self.kinds.append(about.message_type)
        try:
            if number in self.dying:
                raise FedllmError(self.dying[number])
            reply = client_app()(message, context)
        except FedllmError as error:
            answer = Metadata(1, "", about.dst_node_id, 0, str(number), "", 0.0, 60.0, "train")
            reply = Message(error=Error(2, str(error)), metadata=answer)
        self.replies[str(number)] = reply
        return [str(number)]

    def pull_messages(self, ids: list[str]) -> list[Message]:
        return [self.replies.pop(id) for id in ids if id in self.replies]


def ran(sites: Sites, folder: Path, dying: dict[int, str] | None = None, **more: Any) -> Nodes:
    nodes = Nodes([folder.parent / name for name in sites.names])
    nodes.dying = dying or {}
    remote = Carried(
        nodes, sites.names, lambda: order_of(sites.spec, 0, folder), sites.keys.authority, 5.0
    )  # type: ignore[arg-type]
    lead_over(remote, sites.spec, 0, folder, **more)
    return nodes


@pytest.mark.parametrize("kind", ["parameters", "logits"])
def test_a_run_by_messages_is_the_one_in_process(kind: str, tmp_path: Path) -> None:
    spec = experiment(
        rounds=2, strategy={"kind": kind}, tunables={"dropout": 0.1}, exchange={"resident": False},
        training={"optimizer": "adam", "rate": 0.003, "optimizer_state": "keep"},
        simulation={"cohort": 1, "test_examples": 30},
    )  # fmt: skip
    sites = Sites(tmp_path, spec)
    torch.set_num_threads(1)
    nodes = ran(sites, tmp_path / "across")
    assert nodes.kinds[:3] == [HELLO] * 3
    assert set(nodes.kinds[3:]) == {FRAME}

    def together(columns: Any) -> Any:
        public = own.division(sites.spec, columns, None).public
        return replace(divide(spec, columns, 0), public=public)

    prepared = federation.prepare(sites.spec, 0, divided=together)
    federation.run(sites.spec, 0, tmp_path / "inside", prepared=prepared)
    assert weights(tmp_path / "inside") == weights(tmp_path / "across") != {}
    assert counted(tmp_path / "inside") == counted(tmp_path / "across")


class Stop(Silent):
    """Stops the server after a round."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round(self, entry: Any) -> None:
        if entry["round"] == self.number:
            raise KeyboardInterrupt


def test_a_server_that_stopped_goes_on_and_a_dead_process_costs_its_message(tmp_path: Path) -> None:
    spec = experiment(
        rounds=3, exchange={"resident": False, "minimum_replies": 2},
        training={"optimizer": "adam", "rate": 0.003, "optimizer_state": "keep"},
        simulation={"cohort": 1, "test_examples": 30},
    )  # fmt: skip
    sites = Sites(tmp_path, spec)
    whole = ran(sites, tmp_path / "whole", {5: "out of memory"})  # of the first three trainings
    failed = [row for row in ledger.read(tmp_path / "whole" / "ledger.jsonl") if row.failures]
    assert [(row.round, row.reason) for row in failed] == [(1, "Flower: out of memory")]
    for name in sites.names:
        (tmp_path / name / "runs").rename(tmp_path / name / "runs of the whole")
    with pytest.raises(KeyboardInterrupt):
        ran(sites, tmp_path / "cut", {5: "out of memory"}, listener=Stop(2))
    again = ran(sites, tmp_path / "cut", resume=True)
    assert len(again.kinds) < len(whole.kinds)
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut") != {}


def test_a_handshake_says_what_everybody_has_and_trains_nothing(tmp_path: Path) -> None:
    sites = Sites(tmp_path, experiment(strategy={"kind": "logits"}, exchange={"resident": False}))
    (tmp_path / "experiment.toml").write_text(ex.dump(sites.spec))
    listed = ", ".join(f'"{name}"' for name in sites.names)
    (tmp_path / "server" / "federation.toml").write_text(
        f'superlink = "127.0.0.1:1"\nsessions = "127.0.0.1:2"\nsites = [{listed}]\nwait = 5\n'
    )
    (tmp_path / "server" / "flower").mkdir()
    other = rows(tmp_path / "other.csv", [{"text": "something else", "intent": "greeting"}])
    site = tmp_path / "client-2" / "site.toml"
    site.write_text(site.read_text().replace(sites.public, other))
    nodes = Nodes([tmp_path / name for name in sites.names])
    config = {
        "server": str(tmp_path / "server"),
        "out": "",
        "resume": False,
        "check": True,
        "word": "one",
    }
    context = Context(1, 0, {}, RecordDict(), config)
    server_app(tmp_path / "experiment.toml")(nodes, context)  # type: ignore[arg-type]
    found = json.loads((tmp_path / "server" / ENDED).read_text())["check"]
    assert found["sites"]["client-1"] == found["server"]
    assert found["sites"]["client-2"]["base"] == found["server"]["base"]
    (reason,) = found["refused"]
    assert "site 'client-2' has public" in reason
    assert set(nodes.kinds) == {HELLO}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_who_a_node_is_it_has_to_prove(tmp_path: Path) -> None:
    sites = Sites(tmp_path, experiment(exchange={"resident": False}))
    for file in ("certificate.pem", "key.pem"):  # client-1 comes with the keys of client-2
        (tmp_path / "client-1" / file).write_bytes((tmp_path / "client-2" / file).read_bytes())
    with pytest.raises(FedllmError, match="client-1 did not answer"):
        ran(sites, tmp_path / "one")
    (tmp_path / "other").mkdir()
    Sites(tmp_path / "other", experiment())
    stranger_keys = tmp_path / "other" / "client-1"
    for file in ("certificate.pem", "key.pem"):
        (tmp_path / "client-1" / file).write_bytes((stranger_keys / file).read_bytes())
    with pytest.raises(FedllmError, match="not one of this federation"):
        ran(sites, tmp_path / "two")
    own = (tmp_path / "other" / "client-2" / "key.pem").read_bytes()
    (tmp_path / "client-2" / "key.pem").write_bytes(own)  # its certificate, another's key
    with pytest.raises(FedllmError, match="the signature is not its key's"):
        ran(sites, tmp_path / "three")


def test_an_answer_without_a_frame_is_a_failure_and_the_site_is_told_where_to_go_on(
    tmp_path: Path,
) -> None:
    sites = Sites(tmp_path, experiment(exchange={"resident": False}))
    folders = [tmp_path / name for name in sites.names]
    (tmp_path / "run").mkdir()

    class Liar(Nodes):
        lies: ClassVar[list[Any]] = ["text", 10**9, None]

        def push_messages(self, messages: list[Message]) -> list[str]:
            (message,) = messages
            if message.metadata.message_type != FRAME:
                return super().push_messages(messages)
            states.append("state" in message.content.config_records[RECORD])
            if len(states) > len(self.lies):
                return [""]  # Flower did not take it
            number = str(len(self.kinds))
            self.kinds.append(FRAME)
            lie = self.lies[len(states) - 1]
            record = RecordDict({} if lie is None else {RECORD: ConfigRecord({"frame": lie})})
            about = Metadata(1, "", message.metadata.dst_node_id, 0, number, "", 0.0, 60.0, FRAME)
            self.replies[number] = Message(content=record, metadata=about)
            return [number]

    states: list[bool] = []
    nodes = Liar(folders)
    remote = Carried(
        nodes, sites.names, lambda: order_of(sites.spec, 0, tmp_path / "run"),  # type: ignore[arg-type]
        sites.keys.authority, 5.0,
    )  # fmt: skip
    remote.begin(lambda name: {"state": ""}, lambda name, facts: "")
    reasons = []
    for _ in range(4):
        id = remote.post("client-1", b"frame")
        (found,) = remote.collect(5.0)
        assert found[0] == id
        assert isinstance(found[1], Failure)
        reasons.append(found[1].reason)
    assert ["without" in reason for reason in reasons] == [True, True, True, False]
    assert "did not take a message" in reasons[-1]


def test_a_frame_of_a_round_that_is_over_changes_nothing() -> None:
    """A process that outlived its deadline may come to it late."""
    built = build(experiment(rows=48))
    worker = built.worker
    sent = built.strategy.start().shared

    def ask(number: int) -> Any:
        message = Message_("a1", "train", sent, of_role(Role.PARAMETER, sent), {}, "client-1",
                           f"{number}", 1, worker.run, number, worker.base)  # fmt: skip
        return worker.handle({"client-1": message})["client-1"]

    assert not isinstance(ask(2), Failure)
    before = worker.standing()
    late = ask(1)
    assert isinstance(late, Failure)
    assert "which is over" in late.reason
    assert worker.standing() == before
