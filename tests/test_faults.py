"""A client that fails: named, counted, and left out where fewer replies are enough."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedllm.errors import FedllmError
from fedllm.message import Failure, Message, Role, of_role
from fedllm.round import Federation
from fedllm.training import halves
from fedllm.training.jobs import Tasked
from fedllm.training.learner import Learner
from small import GPT2, build, experiment, finish, furthest

STRATEGIES: list[dict[str, Any]] = [
    {"kind": "parameters"},
    {"kind": "logits"},
    {"kind": "activations", "cut": 2},
    {"kind": "activations", "cut": 2, "server": "per-client"},
    {"kind": "activations", "cut": 2, "server": "concatenated"},
    {"kind": "activations", "cut": 2, "server": "concatenated", "labels": "client"},
]
NAMES = ["parameters", "logits", "sequential", "per-client", "concatenated", "labels-at-home"]


def break_down(built: Federation, task: str, client: str = "client-2") -> None:
    """From its second call on, this client's task raises what no one expected."""
    strategy: Any = built.strategy
    honest = strategy.tasks[task]
    calls = 0

    def broken(site: Any, message: Message) -> Tasked[Message]:
        nonlocal calls
        if site.name == client:
            calls += 1
            if calls > (task in ("forward", "backward", "head")):
                raise RuntimeError("out of cheese")
        reply = honest(site, message)
        return reply if isinstance(reply, Message) else (yield from reply)

    strategy.tasks = {**strategy.tasks, task: broken}


def first_task(built: Federation) -> str:
    tasks = list(built.strategy.tasks)
    return {"train": "train", "know": "know", "forward": "forward"}[tasks[0]]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=NAMES)
def test_a_failing_client_ends_the_run_by_name(strategy: dict[str, Any]) -> None:
    built = build(experiment(GPT2, rows=48, strategy=strategy))
    break_down(built, first_task(built))
    with pytest.raises(FedllmError, match=r"client-2: RuntimeError: out of cheese"):
        finish(built)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=NAMES)
def test_or_is_left_out_where_fewer_are_enough(strategy: dict[str, Any]) -> None:
    spec = experiment(GPT2, rows=48, rounds=2, strategy=strategy, exchange={"minimum_replies": 2})
    built = build(spec)
    break_down(built, first_task(built))
    end = finish(built)
    assert [entry["round"] for entry in end.history] == [1, 2]
    assert all(torch.isfinite(t).all() for t in end.server.shared.values())
    failed = {row.client for row in built.ledger.rows if row.failures}
    assert failed == {"client-2"}


@pytest.mark.parametrize(("task", "inside", "server"), [
    ("backward", 0, "concatenated"), ("head", 0, "concatenated"), ("collect", 0, "concatenated"),
    ("forward", 2, "concatenated"), ("forward", 2, "sequential"), ("backward", 2, "concatenated"),
])  # fmt: skip
def test_so_in_the_later_steps_of_activations(task: str, inside: int, server: str) -> None:
    strategy = {
        "kind": "activations", "cut": 2, "server": server, "labels": "client", "inside": inside,
    }  # fmt: skip
    spec = experiment(GPT2, rows=48, strategy=strategy, exchange={"minimum_replies": 2})
    built = build(spec)
    break_down(built, task)
    end = finish(built)
    assert all(torch.isfinite(t).all() for t in end.server.shared.values())


def test_a_client_that_missed_the_public_set_gets_it_later() -> None:
    spec = experiment(
        GPT2, rounds=2, strategy={"kind": "logits"}, public={"size": 12, "ship": True},
        exchange={"minimum_replies": 2},
    )  # fmt: skip
    built = build(spec)
    break_down(built, "receive")
    finish(built)
    sent = [(r.round, r.client) for r in built.ledger.rows if r.role == "token"]
    assert sent.count((2, "client-2")) == 1
    assert (2, "client-1") not in sent


def test_too_few_replies_say_how_many_were_needed() -> None:
    built = build(experiment(GPT2, exchange={"minimum_replies": 3}))
    break_down(built, "train")
    with pytest.raises(FedllmError, match=r"2 of 3 clients replied, 3 are needed"):
        finish(built)


# The worker's own rules -------------------------------------------------------------------------


def message(built: Federation, **changes: Any) -> Message:
    shared = built.strategy.start().shared
    from fedllm.message import Role, of_role

    values: dict[str, Any] = {
        "step": "a1", "task": "train", "tensors": shared,
        "roles": of_role(Role.PARAMETER, shared), "client": "client-1", "id": "1", "attempt": 1,
        "run": "run", "round": 1, "base": built.worker.base,
    }  # fmt: skip
    return Message(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"run": "another"}, "another run"), ({"base": "beef"}, "base model differs"),
     ({"task": "dance"}, "no task 'dance'")],
)  # fmt: skip
def test_what_a_worker_refuses(changes: dict[str, Any], reason: str) -> None:
    built = build(experiment(GPT2))
    answer = built.worker.handle({"client-1": message(built, **changes)})["client-1"]
    assert isinstance(answer, Failure)
    assert reason in answer.reason


def test_a_repeated_message_is_not_trained_twice() -> None:
    built = build(experiment(GPT2))
    first = built.worker.handle({"client-1": message(built)})["client-1"]
    assert built.worker.handle({"client-1": message(built)})["client-1"] is first


def test_a_round_asked_again_starts_from_the_committed_one() -> None:
    spec = experiment(GPT2, training={"optimizer": "adam", "optimizer_state": "keep"})
    built = build(spec)
    worker = built.worker
    first = worker.handle({"client-1": message(built)})["client-1"]
    moved = worker.states.get("client-1")
    again = worker.handle({"client-1": message(built, attempt=2, id="2")})["client-1"]
    assert isinstance(first, Message)
    assert isinstance(again, Message)
    assert all(torch.equal(first.tensors[n], again.tensors[n]) for n in first.tensors)
    state = worker.states.get("client-1")
    assert all(torch.equal(moved[name], state[name]) for name in moved)
    later = worker.handle({"client-1": message(built, round=2, id="3")})["client-1"]
    assert isinstance(later, Message)
    assert any(not torch.equal(moved[n], worker.states.get("client-1")[n]) for n in moved)


def test_many_clients_in_one_call() -> None:
    built = build(experiment(GPT2))
    asked = {c: message(built, client=c, id=c) for c in built.worker.sites}
    answers = built.worker.handle({**asked, "nobody": message(built, client="nobody")})
    assert isinstance(answers["nobody"], Failure)
    alone = build(experiment(GPT2)).worker.handle({"client-3": asked["client-3"]})["client-3"]
    together = answers["client-3"]
    assert isinstance(alone, Message)
    assert isinstance(together, Message)
    assert furthest(alone.tensors, together.tensors) < 1e-5


# Bounds and measurement -------------------------------------------------------------------------


def steps(built: Federation) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in built.ledger.rows:
        if row.step == "local":
            found[row.client] = found.get(row.client, 0) + row.optimizer_steps
    return found


def test_bounds_train_everybody_in_every_round() -> None:
    spec = experiment(GPT2, rounds=2, strategy={"kind": "standalone"},
                      exchange={"clients_per_round": 1})  # fmt: skip
    built = build(spec)
    finish(built)
    assert steps(built) == {"client-1": 4, "client-2": 2, "client-3": 2}
    equal = build(spec.replace(strategy={"kind": "standalone", "steps": (2, 9, 5)}))
    finish(equal)
    assert steps(equal) == {"client-1": 2, "client-2": 9, "client-3": 5}


@pytest.mark.parametrize(
    ("server", "turn"),
    [("sequential", "batch"), ("sequential", "epoch"), ("per-client", "batch"),
     ("concatenated", "batch")],
)  # fmt: skip
def test_the_servers_rate_never_rises_under_a_falling_schedule(
    server: str, turn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = {"kind": "activations", "cut": 2, "server": server, "turn": turn}
    spec = experiment(GPT2, rows=60, rounds=2, strategy=strategy,
                      training={"schedule": "linear"})  # fmt: skip
    seen: dict[int, list[float]] = {}
    original = halves.advance

    def spy(learners: Sequence[Learner], progress: Sequence[float]) -> None:
        for one, at in zip(learners, progress, strict=True):
            if any(name.startswith("model.score") for name in one.params):
                seen.setdefault(id(one), []).append(at)
        original(learners, progress)

    monkeypatch.setattr(halves, "advance", spy)
    finish(build(spec))
    assert seen
    for progress in seen.values():
        assert progress == sorted(progress)
        assert 0 <= progress[0] <= progress[-1] < 1


def test_a_soft_prompt_is_counted_once() -> None:
    one = {"clients": 1, "sizes": [8]}
    prompt = {"kind": "prompt", "tokens": 10}

    def flops(strategy: dict[str, Any]) -> float:
        built = build(experiment(GPT2, simulation=one, tunables=prompt, strategy=strategy,
                                 evaluation={"every": 0}))  # fmt: skip
        finish(built)
        return sum(row.flops for row in built.ledger.rows if row.step != "eval")

    whole = flops({"kind": "parameters"})
    assert flops({"kind": "activations", "cut": 2}) == pytest.approx(whole, rel=0.02)


LIES: dict[str, tuple[str, Any, str]] = {
    "an infinite weight": ("parameters", lambda m: m.facts.update(weight=math.inf), "'weight'"),
    "a weight below 0": ("parameters", lambda m: m.facts.update(weight=-5.0), "more than 0"),
    "no weight": ("logits", lambda m: m.facts.pop("weight"), "said None for 'weight'"),
    "no number": ("logits", lambda m: m.facts.update(loss="low"), "said low for 'loss'"),
    "a cost of nothing": ("parameters", lambda m: m.facts.update({"cost.a": 1}), "costs"),
    "a cost unheard of": ("parameters", lambda m: m.facts.update({"cost.a.gold": 1}), "costs"),
    "a cost below 0": ("parameters", lambda m: m.facts.update({"cost.a.flops": -1}), "costs"),
    "another name": ("parameters", lambda m: rename(m, "other"), "other names"),
    "another shape": ("parameters", lambda m: reshape(m), "with shape"),
    "eight bits": ("parameters", lambda m: cast(m, torch.float8_e4m3fn), "float8"),
    "sixteen bits": ("parameters", lambda m: cast(m, torch.float16), "float16"),
    "a number beyond all": ("parameters", lambda m: m.facts.update(loss=10**400), "'loss'"),
    "a cost beyond all": ("parameters", lambda m: m.facts.update({"cost.a.flops": 10**99}), "cost"),
    "whole activations": ("activations", lambda m: cast(m, torch.int32), "as torch.int32"),
    "activations in 64 bits": ("activations", lambda m: cast(m, torch.float64), "as torch.float64"),
    "batches below none": ("activations", lambda m: m.facts.update(left=-1), "number of batches"),
    "too many rows": ("activations", lambda m: more_rows(m), "rows, a batch has"),
    "too few logits": ("logits", lambda m: reshape(m), "with shape"),
    "no activations": ("activations", lambda m: rename(m, "other"), "not ["),
    "endless rows": ("activations", lambda m: m.tensors["lengths"].fill_(2**30), "is longer than"),
    "negative rows": ("activations", lambda m: m.tensors["lengths"].fill_(-1), "or empty"),
    "labels unheard of": ("activations", lambda m: m.tensors["labels"].fill_(10**6), "labels"),
}  # fmt: skip


def rename(message: Message, name: str) -> None:
    first = min(message.tensors)
    message.tensors[name], message.roles[name] = (
        message.tensors.pop(first),
        message.roles.pop(first),
    )


def reshape(message: Message) -> None:
    first = min(message.tensors)
    message.tensors[first] = message.tensors[first][:1].flatten()


def cast(message: Message, dtype: torch.dtype) -> None:
    first = min(message.tensors)
    message.tensors[first] = message.tensors[first].to(dtype)


def more_rows(message: Message) -> None:
    message.tensors["lengths"] = torch.ones(1000, dtype=torch.int32)


@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_does_not_fit_is_its_clients_failure(lie: str) -> None:
    """Not the run's: nothing of it is used, whatever it says."""
    kind, change, reason = LIES[lie]
    spec = experiment(
        GPT2, rows=48, strategy={"kind": kind}, exchange={"minimum_replies": 2}
    )  # fmt: skip
    built = build(spec)
    strategy: Any = built.strategy
    task = first_task(built)
    honest = strategy.tasks[task]

    def lying(site: Any, message: Message) -> Tasked[Message]:
        reply = honest(site, message)
        reply = reply if isinstance(reply, Message) else (yield from reply)
        if site.name == "client-2":
            change(reply)
        return reply

    strategy.tasks = {**strategy.tasks, task: lying}
    end = finish(built)
    assert all(torch.isfinite(t).all() for t in end.server.shared.values())
    failed = [row for row in built.ledger.rows if row.failures]
    assert {row.client for row in failed} == {"client-2"}
    assert all(reason in row.reason for row in failed), failed[0].reason


def test_a_client_trains_its_tunables_and_nothing_else() -> None:
    """Whatever names and shapes the server sends: the base is frozen, and ranks are agreed."""
    built = build(experiment(GPT2, rows=48))
    site = built.worker.sites["client-1"]
    base = "model.transformer.wte.weight"
    name = next(name for name in site.model.initial if "lora_A" in name)
    larger = torch.zeros(64, site.model.initial[name].shape[1])
    for sent in ({base: torch.zeros(1000, 128)}, {name: larger}, {name: larger.int()}):
        for task in ("train", "evaluate"):
            message = Message(
                "a1", task, sent, of_role(Role.PARAMETER, sent), {"model": "candidate"}, "client-1",
                "1", run=built.worker.run, base=built.worker.base,
            )  # fmt: skip
            (reply,) = built.worker.handle({"client-1": message}).values()
            assert isinstance(reply, Failure)
            assert "none of this experiment's tunables" in reply.reason
    hidden = Message(
        "a1", "train", {name: larger}, {name: Role.INDEX}, {}, "client-1", "2",
        run=built.worker.run, base=built.worker.base,
    )  # fmt: skip
    (reply,) = built.worker.handle({"client-1": hidden}).values()
    assert isinstance(reply, Failure)


@pytest.mark.parametrize("change", [
    lambda sums: sums.pop("units"), lambda sums: sums.update(confusion=torch.zeros(2, 2)),
    lambda sums: sums["confusion"].fill_(-1), lambda sums: sums.update(more=torch.ones(1)),
])  # fmt: skip
def test_statistics_that_are_none_are_left_out(change: Any) -> None:
    built = build(experiment(GPT2, rows=48, exchange={"minimum_replies": 2}))
    evaluate = built.worker._evaluate

    def lying(site: Any, message: Message) -> Tasked[Message]:
        reply = yield from evaluate(site, message)
        if site.name == "client-2":
            change(reply.tensors)
            reply.roles.update(of_role(Role.STATISTIC, reply.tensors))
            for name in set(reply.roles) - set(reply.tensors):
                del reply.roles[name]
        return reply

    built.worker._evaluate = lying  # type: ignore[method-assign]
    end = finish(built)
    assert end.history[-1]["global"]["missing_clients"] == 1
    failed = [row for row in built.ledger.rows if row.failures]
    assert {(row.client, row.step) for row in failed} == {("client-2", "eval")}
    assert all("counted" in row.reason for row in failed)
