"""K-03, FedKD: a mentor at each client, a common mentee, updates with a share of their energy."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm import costs, exchange, federation
from fedllm import experiment as ex
from fedllm.data.clients import Clients
from fedllm.errors import FedllmError
from fedllm.message import Message
from fedllm.round import Federation
from fedllm.strategies.mentor import MENTOR, STATE
from fedllm.training.objectives import Said, cross_entropy, divergence, mutual
from shared import needs_shared
from small import LLAMA, build, experiment, finish

FEDKD: dict[str, Any] = {"kind": "parameters", "payload": "change", "mentor": "builtin#2"}


def fedkd(name: str = "builtin#1", **sections: Any) -> ex.Experiment:
    sections.setdefault("strategy", FEDKD)
    sections.setdefault("training", {"rate": 0.03})  # at 0.1 rounding grows from step to step
    sections.setdefault("tunables", {"kind": "lora", "rank": 2})
    return experiment(name, **{"rounds": 2, "evaluation": {"every": 0}, **sections})


def said(seed: int, width: int = 6) -> Said:
    draw = torch.Generator().manual_seed(seed)
    return Said(torch.randn(5, 4, generator=draw).requires_grad_(True),
                torch.randn(5, width, generator=draw).requires_grad_(True))  # fmt: skip


def test_each_follows_the_other_the_less_the_more_both_are_wrong() -> None:
    one, other, targets = said(1), said(2), torch.tensor([0, 1, 2, 3, 0])
    losses, tasks = mutual((one, other), targets)
    gap = torch.nn.functional.mse_loss(one.features, other.features)
    for mine, theirs, loss, task in ((one, other, losses[0], tasks[0]),
                                     (other, one, losses[1], tasks[1])):  # fmt: skip
        own = cross_entropy(mine.logits, targets, targets).mean()
        assert torch.equal(own.detach(), task)
        apart = divergence(mine.logits, theirs.logits).mean() + gap
        assert float(loss.detach()) == pytest.approx(
            float((own + apart / sum(tasks)).detach()), rel=1e-5
        )
    losses[0].backward()  # type: ignore[no-untyped-call]
    assert one.logits.grad is not None and one.features.grad is not None
    assert other.logits.grad is None and other.features.grad is None


def test_equals_teach_each_other_nothing() -> None:
    one, targets = said(1), torch.tensor([0, 1, 2, 3, 0])
    losses, tasks = mutual((one, one), targets)
    assert float(losses[0].detach()) == pytest.approx(float(tasks[0]), abs=1e-6)
    narrow = Said(one.logits, torch.randn(5, 3))  # another width: no term of hidden states
    losses, _ = mutual((one, narrow), targets)
    assert float(losses[0].detach()) == pytest.approx(float(tasks[0]), abs=1e-6)


class Listening:
    """Stands around a transport and reads every frame."""

    def __init__(self, inner: Any, codecs: dict[str, str]) -> None:
        self.inner, self.window, self.codecs = inner, inner.window, codecs
        self.heard: list[Message] = []
        self.wires: list[Message] = []

    def clients(self) -> Any:
        return self.inner.clients()

    def _read(self, frame: bytes) -> None:
        message, wire, _ = exchange.decode(frame, self.codecs)
        self.heard.append(message)
        self.wires.append(wire)

    def post(self, client: str, frame: bytes) -> Any:
        self._read(frame)
        return self.inner.post(client, frame)

    def collect(self, timeout: float | None = None) -> Iterator[Any]:
        for id, answer in self.inner.collect(timeout):
            self._read(answer)
            yield id, answer


def overheard(spec: ex.Experiment) -> tuple[Federation, Any, Listening]:
    built = build(spec)
    ear = Listening(built.exchange.transport, built.exchange.codecs)
    built.exchange.transport = ear  # type: ignore[assignment]
    return built, finish(built), ear


def test_the_mentor_stays_and_the_update_keeps_its_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """T of each update is 0.95 in the first round and 0.98 in the last; less travels than raw."""
    codecs = {"parameter": "energy-95-98"}
    before: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    inner = exchange.encode

    def noted(message: Message, *rest: Any) -> Any:
        frame, wire, used, kept = inner(message, *rest)
        for name in used:
            found = exchange.decode(frame, codecs)[0].tensors[name]
            before.append((message.round, message.tensors[name], found))
        return frame, wire, used, kept

    monkeypatch.setattr(exchange, "encode", noted)
    built, done, ear = overheard(fedkd(exchange={"codecs": codecs}))
    mentee, names = built.model, set(built.model.initial)
    for message in ear.heard:
        assert set(message.tensors) <= names or message.step == "eval"
    mentors = [site.group(MENTOR) for site in built.worker.sites.values()]
    assert all(set(mentor) > names for mentor in mentors)  # of twice as many blocks
    wire = [t for m in ear.wires for t in m.tensors.values()]
    for tensor in (t for mentor in mentors for t in mentor.values()):
        assert not any(w.shape == tensor.shape and torch.equal(w, tensor) for w in wire)
    assert len(before) == 2 * 2 * 3 * len(names)
    for number, sent, found in before:
        if float(sent.norm()):
            share = 0.95 if number == 1 else 0.98
            assert float((sent - found).norm() / sent.norm()) <= (1 - share) ** 0.5 + 1e-5
            assert float(found.square().sum() / sent.square().sum()) >= share - 1e-5
    up, _ = costs.parameters_payload(mentee)
    rows = [r for r in built.ledger.rows if r.step == "a3" and r.role == "parameter"]
    assert 0 < sum(row.payload_bytes for row in rows) < 0.8 * 2 * 3 * up
    assert {row.codec for row in rows} == {"energy-95-98"}
    assert done.history[-1]["mean"] and done.history[-1]["global"]


def test_a_client_without_finite_update_fails_by_itself() -> None:
    """Law 9 holds with a codec that takes matrices apart, too."""
    once = {"codecs": {"parameter": "energy-95"}, "minimum_replies": 1}
    built = build(fedkd(rounds=1, strategy={"kind": "parameters"}, exchange=once))
    strategy: Any = built.strategy
    honest = strategy.train

    def broken(site: Any, message: Any) -> Any:
        reply = yield from honest(site, message)
        if site.name == "client-1":
            for tensor in reply.tensors.values():
                tensor.fill_(math.nan)
        return reply

    strategy.tasks = {"train": broken}
    finish(built)
    failed = [(row.client, row.reason) for row in built.ledger.rows if row.failures]
    assert [client for client, _ in failed] == ["client-1"]
    assert failed[0][1].startswith("sent NaN or infinity")


def test_both_models_learn_and_neither_is_the_others_copy() -> None:
    built, done, _ = overheard(fedkd())
    alone = finish(build(fedkd(strategy={"kind": "parameters"}))).server.shared
    start = built.model.initial
    assert any(not torch.equal(t, start[n]) for n, t in done.server.shared.items())
    assert any(not torch.equal(t, alone[n]) for n, t in done.server.shared.items())
    for site in built.worker.sites.values():
        mentor = built.strategy.own(site)
        assert site.model is not built.model and set(mentor) == set(site.model.initial)
        assert any(not torch.equal(t, site.model.initial[n]) for n, t in mentor.items())


def test_clients_together_are_the_clients_one_by_one() -> None:
    """Law 3, with memory counted for both models."""
    ends = []
    for cohort in (3, 1):
        built = build(fedkd())
        built.exchange.transport.window = cohort
        ends.append((finish(built).server.shared, built))
    (together, one), (apart, _) = ends
    for name, tensor in together.items():
        assert torch.allclose(tensor, apart[name], atol=1e-5)
    peak, alone = (max(r.peak_memory for r in b.ledger.rows if r.step == "a2") for _, b in ends)
    assert peak == pytest.approx(alone, rel=0.05)
    mentor = one.worker.sites["client-1"].model
    assert peak > mentor.base_bytes + one.model.base_bytes


def test_a_resumed_run_has_the_same_mentors(tmp_path: Path) -> None:
    spec = fedkd(training={"optimizer": "adam", "optimizer_state": "keep", "rate": 0.01},
                 simulation={"clients": 2, "examples": 8, "test_examples": 8})  # fmt: skip
    prepared = federation.prepare(spec, 0)

    class Stop(federation.Silent):
        def round(self, entry: Any) -> None:
            raise KeyboardInterrupt

    whole = federation.run(spec, 0, tmp_path / "whole", prepared=prepared)
    with pytest.raises(KeyboardInterrupt):
        federation.run(spec, 0, tmp_path / "cut", prepared=prepared, listener=Stop())
    again = federation.run(spec, 0, tmp_path / "cut", resume=True, prepared=prepared)
    assert again["metrics"] == whole["metrics"]
    for path in sorted((tmp_path / "whole" / "adapter").rglob("*.safetensors")):
        other = tmp_path / "cut" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes()
    kept = {p.name for p in (tmp_path / "whole" / "checkpoints").rglob("*.safetensors")}
    assert kept == {p.name for p in (tmp_path / "cut" / "checkpoints").rglob("*.safetensors")}


def test_the_mentors_optimizer_goes_on() -> None:
    built = build(fedkd(training={"optimizer": "adam", "rate": 0.01}))
    finish(built)
    for site in built.worker.sites.values():
        steps = {float(t) for n, t in site.group(STATE).items() if n.endswith("|step")}
        assert steps == {2.0 * -(-len(site.train) // 8)}
        assert not site.group("optimizer")


def test_changes_are_what_values_are() -> None:
    """Without a codec the payload changes nothing but rounding."""
    ends = [finish(build(fedkd(strategy={"kind": "parameters", "payload": payload}))).server.shared
            for payload in ("value", "change")]  # fmt: skip
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], atol=1e-6)


@pytest.mark.parametrize(
    ("sections", "said_"),
    [
        ({"task": "generation"}, r"strategy.mentor: for task.kind = 'classification' only"),
        ({"tunables": {"kind": "lora", "head": "personal"}}, "strategy.mentor: the common model"),
        pytest.param({"strategy": {**FEDKD, "mentor": LLAMA}}, "has another tokenizer than",
                     marks=needs_shared),
        ({"strategy": {**FEDKD, "mentor": "builtin#9"}}, "the model has 4 blocks"),
    ],
)  # fmt: skip
def test_mentors_that_cannot_be_are_refused(sections: dict[str, Any], said_: str) -> None:
    with pytest.raises(FedllmError, match=said_):
        build(fedkd(**sections))


def test_the_variant_names_the_mentor() -> None:
    spec = fedkd()
    assert federation.variant(spec) == "parameters (with mentors)"
    bare = spec.strategy.model_copy(update={"mentor": None})
    assert federation.variant(spec.replace(strategy=bare)) == "parameters"


def test_a_server_knows_nothing_of_mentors() -> None:
    spec = fedkd()
    prepared = federation.prepare(spec, 0)
    site = federation.halve(spec, 0, prepared, federation.Silent())
    assert set(site.others) == set(prepared.clients) and site.bases == {}
    nobody = replace(prepared, clients=Clients.of([]))
    assert federation.halve(spec, 0, nobody, federation.Silent()).others == {}
