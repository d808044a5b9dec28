"""What a site gives away and what it keeps, whatever the server orders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm import experiment as ex
from fedllm.across import Called, agree_on_names, hosted, order_of, server_says
from fedllm.errors import FedllmError, Refusal
from fedllm.exchange import encode
from fedllm.flower import Caller, _carried, discreet
from fedllm.message import Message, unpack
from fedllm.remote import Distant
from fedllm.site import Hosted
from fedllm.transport.session import Sessions
from shared import needs_shared
from sites import Sites
from small import GPT2, LLAMA, experiment


@pytest.fixture
def sites(tmp_path: Path) -> Sites:
    return Sites(tmp_path, experiment(simulation={"cohort": 1, "test_examples": 30}))


def half(sites: Sites, folder: str = "run", **changes: Any) -> Hosted:
    """The half of client-1 of a run into this folder of the server."""
    (sites.folder / folder).mkdir(exist_ok=True)
    order = order_of(sites.spec.replace(**changes), 0, sites.folder / folder)
    site = ex.load_site(sites.folder / "client-1" / "site.toml")
    return hosted(order, site, sites.folder / "client-1")


def test_nothing_of_its_environment_gets_into_an_order(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECIOUS", "secret of the site")
    labels = [*sites.spec.data.labels, "${PRECIOUS}"]
    data = sites.spec.data.model_copy(update={"labels": tuple(labels)})
    assert "secret" not in str(half(sites, data=data).facts)


@pytest.mark.parametrize("name", ["/etc/hostname", "../train.csv", "a" * 40])
def test_states_are_read_from_its_own_folder_only(sites: Sites, name: str) -> None:
    with pytest.raises(FedllmError, match="not the name of one"):
        half(sites).welcomed({"state": name})


def test_only_a_simulation_reads_other_rows(sites: Sites) -> None:
    strategy = ex.Logits(client_models=("builtin",))
    with pytest.raises(FedllmError, match="client_models: sites have no turn"):
        half(sites, strategy=strategy)
    with pytest.raises(FedllmError, match="budgets: sites have no turn"):
        half(sites, tunables=ex.Lora(budgets=({1: 10**6},)),
             strategy=ex.Parameters(aggregation="flexlora"))  # fmt: skip


@pytest.mark.parametrize(("cut", "said"), [
    ((1, 2), r"strategy.cut: sites have no turn; .* \{ bank-a = 2 \}"),
    ("auto", r"strategy.cut = 'auto': .* only a simulation has"),
])  # fmt: skip
def test_cuts_go_by_the_names_of_sites(sites: Sites, cut: Any, said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        half(sites, strategy=ex.Activations(cut=cut))
    assert half(sites, strategy=ex.Activations(cut={"client-1": 1, "client-2": 3})).rows[0]
    with pytest.raises(FedllmError, match=r"strategy.cut.klient-1: no such .*'client-1'"):
        agree_on_names(
            sites.spec.replace(strategy=ex.Activations(cut={"klient-1": 1})), sites.names
        )


@needs_shared
def test_a_site_with_a_model_of_its_own_says_which(sites: Sites) -> None:
    """Its hash is compared with what the server has under that site's name."""
    strategy = ex.Logits(client_models={"client-1": LLAMA, "client-2": GPT2})
    mine = half(sites, strategy=strategy)
    ours, bases = server_says(sites.spec.replace(strategy=strategy))
    assert mine.facts["model"] == bases["client-1"] != ours["base"] == mine.facts["base"]
    server = Distant(ours, bases)
    assert server.refuse("client-1", mine.facts) == ""
    assert "has model" in server.refuse("client-2", mine.facts)
    assert "has model" in server.refuse("client-3", mine.facts)  # which has the server's
    assert ex.Logits().models(sites.names) == {}
    with pytest.raises(FedllmError, match=r"client_models.klient-1: no such .*'client-1'"):
        ex.Logits(client_models={"klient-1": LLAMA}).models(sites.names)


def test_a_public_set_that_will_come_needs_no_interpreter(tmp_path: Path) -> None:
    """A model of the same tokens understands the server's; the site has no row of the set yet."""
    text = {"prompt": "text", "response": "intent", "max_tokens": 48}
    sites = Sites(tmp_path, experiment(task="generation", data=text))
    public = sites.spec.public.model_copy(update={"ship": True})
    mine = half(sites, strategy=ex.Logits(client_models={"client-1": "builtin#2"}), public=public)
    assert mine.facts["model"] and not mine.facts["public"]


def test_a_table_of_models_names_sites_only_whoever_carries_the_frames(sites: Sites) -> None:
    """A site that the table misses for a slip of the pen would train the server's model."""
    table = ex.Logits(client_models={"klient-1": GPT2})
    there = ex.FederationFile(superlink="a:1", sessions="a:2", sites=tuple(sites.names))
    with pytest.raises(FedllmError, match=r"client_models.klient-1: no such client"):
        _carried(None, there, None, sites.spec.replace(strategy=table))  # type: ignore[arg-type]


def test_errors_that_may_hold_a_row_stay_at_the_site(
    sites: Sites, caplog: pytest.LogCaptureFixture
) -> None:
    data = sites.spec.data.model_copy(update={"text": "intent", "label": "text"})
    with pytest.raises(FedllmError) as error, discreet():
        half(sites, data=data)
    assert "its own log says why" in str(error.value)
    assert "is not in the experiment's data.labels" in caplog.text
    with pytest.raises(FedllmError, match="may not leave"), discreet():
        raise Refusal("labels may not leave this site (allow.labels)")


class Server:
    """Asks one site; keeps of its states what ``Distant`` does."""

    def __init__(self, site: Hosted, run: str, base: str) -> None:
        self.site, self.round, self.run, self.base = site, 0, run, base
        self.late = False
        self.distant = Distant({}, {})
        self.distant.exchange = self  # type: ignore[assignment]
        self.transport = self

    def clients(self) -> list[str]:
        return ["client-1"]

    def ask(self, requests: dict[str, Message]) -> Any:
        for client, request in requests.items():
            reply = self.say(request.task, request.facts)
            if not self.late:
                yield client, reply

    def say(self, task: str, facts: Any) -> Message:
        message = Message(
            "s", task, facts=dict(facts), client="client-1", id=f"{self.round}.{task}", attempt=1,
            run=self.run, round=self.round, base=self.base,
        )  # fmt: skip
        return unpack(self.site.answer(encode(message, {})[0]))[0]

    def rounds(self, count: int) -> str:
        """Rounds in which the site trains and saves; the name that a checkpoint would hold."""
        for _ in range(count):
            self.round += 1
            self.site._worker.sites["client-1"].keep("new", {"x": torch.ones(self.round)})
            names = self.distant.snapshot()
        return names["client-1"]


def test_no_state_that_a_checkpoint_names_is_removed(sites: Sites) -> None:
    site = half(sites)
    server = Server(site, site._worker.run, site._worker.base)
    older, committed = server.rounds(2), server.rounds(1)
    assert {older, committed} <= {path.name for path in site._states.iterdir()}
    folder = site._states
    server.late = True  # three answers come after the deadline: the server keeps the old name
    assert server.rounds(3) == committed
    half(sites).welcomed({"state": committed})  # and can go back to it
    server.late = False
    server.rounds(3)
    assert len(list(folder.iterdir())) <= 4  # others go
    other = half(sites, "another run of the same file")
    Server(other, other._worker.run, other._worker.base).rounds(4)
    half(sites).welcomed({"state": server.distant.snapshot()["client-1"]})


def test_a_machine_that_is_away_holds_nobody_up() -> None:
    class Grid:
        def __init__(self) -> None:
            self.nodes, self.pushed = [11, 22], []  # type: ignore[var-annotated]

        def get_node_ids(self) -> list[int]:
            return self.nodes

        def create_message(self, record: Any, kind: str, node: int, **_: Any) -> Any:
            return node

        def push_messages(self, messages: list[int]) -> list[str]:
            self.pushed += messages
            return [str(len(self.pushed))]

        def pull_messages(self, ids: list[str]) -> list[Any]:
            return []

    grid = Grid()
    caller = Caller(grid)  # type: ignore[arg-type]
    reasons = [["node 22: its machine is off"], [], []]
    with Sessions("127.0.0.1:0", None, ["a", "b"]) as sessions:
        called = Called(
            sessions, ["a", "b"], lambda name, token: caller(name, {"token": token}), 0.0,
            lambda: reasons.pop(0) if reasons else [],
        )  # fmt: skip
        for _ in range(2):
            caller("", {"token": "t"})
        caller._called.popitem()
        grid.nodes = [11]
        assert called.clients() == ["a", "b"]  # nobody to call: the round goes on without
        assert grid.pushed == [11, 22]
        grid.nodes = [11, 22]
        called.clients()
        assert grid.pushed == [11, 22, 22]  # back again
        called.clients()
        assert grid.pushed == [11, 22, 22]


def test_the_audit_has_a_line_for_the_hello_too(sites: Sites) -> None:
    site = half(sites)
    site.sent(encode(Message("session", "hello", facts={"token": "t"}), {})[0])
    (line,) = [json.loads(one) for one in site._audit.read_text().splitlines()]
    assert line["task"] == "hello"
    assert "token" not in json.dumps(line)
