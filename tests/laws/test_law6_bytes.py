"""Law 6: the ledger is what crossed the transport, and what the formulas say."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from fedllm import costs
from fedllm.costs import ClientSize, PublicSize
from fedllm.ledger import total
from fedllm.message import Failure
from fedllm.round import Federation
from fedllm.strategies.base import ServerState
from fedllm.training.meter import Meter
from fedllm.transport import Transport
from shared import needs_shared
from small import BERT, GPT2, build, experiment, finish


class Counting:
    """Stands around a transport and weighs what passes, knowing nothing of frames."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.down, self.up, self.frames = inner, 0, 0, 0
        self.window = inner.window

    def clients(self) -> Sequence[str]:
        return self.inner.clients()

    def post(self, client: str, frame: bytes) -> str:
        self.down += len(frame)
        self.frames += 1
        return self.inner.post(client, frame)

    def collect(self, timeout: float | None = None) -> Iterator[tuple[str, bytes | Failure]]:
        for id, answer in self.inner.collect(timeout):
            if isinstance(answer, bytes):
                self.up += len(answer)
                self.frames += 1
            yield id, answer


def weighed(spec: Any) -> tuple[Federation, Counting]:
    built = build(spec)
    scale = Counting(built.exchange.transport)
    built.exchange.transport = scale
    finish(built)
    return built, scale


VARIANTS = [
    {"kind": "parameters"},
    {"kind": "parameters", "payload": "delta"},
    {"kind": "logits"},
    {"kind": "logits", "server_model": False},
    {"kind": "logits", "form": "top-k", "top_k": 5, "knowledge": "least-loss", "selective": True},
    {"kind": "logits", "form": "statistics"},
    {"kind": "logits", "form": "features", "loss": "mse"},
    {"kind": "activations", "cut": 1},
    {"kind": "activations", "cut": 2, "server": "per-client", "labels": "client"},
    {"kind": "activations", "cut": 2, "server": "concatenated", "average_every": 2},
    {"kind": "activations", "cut": 2, "server": "sequential", "average_every": 1},
    {"kind": "activations", "cut": [1, 3, 2]},
    {"kind": "activations", "cut": 1, "inside": 2, "labels": "client"},
]
CASES = [
    pytest.param(GPT2, "classification", {"kind": "lora"}),
    pytest.param(GPT2, "generation", {"kind": "prompt", "tokens": 4}),
    pytest.param(BERT, "classification", {"kind": "bitfit"}, marks=needs_shared),
]


@pytest.mark.parametrize("strategy", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize(("name", "task", "tunables"), CASES)
def test_ledger_transport_and_formula_agree(
    name: str, task: str, tunables: dict[str, Any], strategy: dict[str, Any]
) -> None:
    spec = experiment(
        name, task, rounds=2, strategy=strategy, tunables=tunables,
        training={"epochs": 2, "rate": 0.01},
        public={"size": 12, "rows_per_round": 7,
                "labelled": bool({"knowledge", "loss"} & strategy.keys())},
        evaluation={"every": 0},
    )  # fmt: skip
    built, scale = weighed(spec)
    rows = built.ledger.rows
    assert total(rows, "wire_bytes", direction="down") == scale.down
    assert total(rows, "wire_bytes", direction="up") == scale.up
    assert total(rows, "frames") == scale.frames
    payload = total(rows, "payload_bytes")
    declared = total(rows, "wire_bytes", role="header")
    declared += total(rows, "wire_bytes", role="measurement")
    assert total(rows, "wire_bytes") == payload + declared

    work = [row for row in rows if row.step != "eval" and row.direction != "compute"]
    for client, site in built.worker.sites.items():
        up = total([r for r in work if r.direction == "up"], "payload_bytes", client=client)
        down = total([r for r in work if r.direction == "down"], "payload_bytes", client=client)
        assert (up, down) == expected(built, site, spec)


def expected(built: Federation, site: Any, spec: Any) -> tuple[int, int]:
    """The planner's payload of one client over the whole run."""
    strategy, model = spec.strategy, site.model
    if strategy.kind == "parameters":
        up, down = costs.parameters_payload(model)
        return up * spec.rounds, down * spec.rounds
    if strategy.kind == "logits":
        up = down = 0
        from fedllm.streams import stream

        for number in range(1, spec.rounds + 1):
            rng = stream(built.seed, "server", number)
            rows = built.strategy._draw(ServerState(), Meter(), rng)  # type: ignore[attr-defined]
            public = site.public.take(rows)
            size = PublicSize(len(public), public.tokens, int(public.targets.sum()))
            more = costs.logits_payload(model, size, strategy)
            up, down = up + more[0], down + more[1]
        return up, down
    size_ = ClientSize(len(site.train), site.train.tokens, int(site.train.targets.sum()))
    split: Any = built.strategy
    (cut,) = split._cuts([site.name]).values()
    half = costs.tunable_bytes(model, sorted(split._names(cut)))
    averages, uploads = 1, 1
    if strategy.average_every:
        most = max(costs.batches(len(s.train), spec.training.batch_size)
                   for s in built.worker.sites.values()) * spec.training.epochs  # fmt: skip
        mine = costs.batches(len(site.train), spec.training.batch_size) * spec.training.epochs
        averages = -(-most // strategy.average_every)
        uploads = -(-mine // strategy.average_every)  # who had no batch since is not asked
    up, down = costs.activations_payload(
        model, strategy, size_, spec.training.epochs, half, averages, uploads
    )
    return up * spec.rounds, down * spec.rounds


def test_a_codec_shows_in_the_payload() -> None:
    plain, _ = weighed(experiment(GPT2))
    half, scale = weighed(experiment(GPT2, exchange={"codecs": {"parameter": "fp16"}}))

    def sent(built: Federation) -> float:
        rows = [r for r in built.ledger.rows if r.step in ("a1", "a3")]
        return total(rows, "payload_bytes", role="parameter")

    assert sent(half) * 2 == sent(plain)
    assert total(half.ledger.rows, "wire_bytes", direction="up") == scale.up
    codecs = {(r.step == "eval", r.codec) for r in half.ledger.rows if r.role == "parameter"}
    assert codecs == {(False, "fp16"), (True, "none")}  # what is evaluated is the model itself


def test_logits_payload_is_rows_times_classes() -> None:
    built, _ = weighed(experiment(GPT2, strategy={"kind": "logits"}, evaluation={"every": 0}))
    rows = [r for r in built.ledger.rows if r.step != "eval"]
    for direction in ("up", "down"):
        sent = total(rows, "payload_bytes", role="logit", direction=direction, client="client-1")
        assert sent == 12 * 24 * 4
    assert total(rows, "payload_bytes", role="parameter") == 0
