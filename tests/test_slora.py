"""SLoRA (P-13): rounds of sparse tuning under one mask, then LoRA from their best approximation."""

from typing import Any

import numpy as np
import pytest
import torch

from fedllm import costs, federation, round
from fedllm import experiment as ex
from fedllm.errors import FedllmError
from fedllm.lora import pairs
from fedllm.models.slots import SPARSE, Masked
from fedllm.planning import plan
from small import build, experiment, finish

DENSITY, RANK, ALPHA = 0.05, 4, 6.0
SLORA: dict[str, Any] = {
    "kind": "lora", "rank": RANK, "alpha": ALPHA, "layers": [3],
    "sparse": {"rounds": 2, "density": DENSITY},
}  # fmt: skip
LAYER = "model.transformer.h.3.attn.c_attn"


def slora(rounds: int = 3, tunables: dict[str, Any] = SLORA, **sections: Any) -> ex.Experiment:
    training = {"optimizer": "adam", "rate": 0.01, **sections.pop("training", {})}
    return experiment(
        "builtin#4", rounds=rounds, rows=18, tunables=tunables, evaluation={"every": 0},
        training=training, **sections,
    )  # fmt: skip


def test_both_stages_and_what_lies_between_them() -> None:
    built, committed = build(slora()), []
    end = finish(built, committed.append)
    base = built.model.hash_base()
    first, second = committed[1].server.shared, end.server.shared
    sparse = {n: t for n, t in first.items() if n.endswith(SPARSE)}
    assert list(sparse) == [LAYER + SPARSE]
    assert built.model.before is not None
    layer = built.model.before.whole.get_submodule(LAYER)
    assert isinstance(layer, Masked)

    # stage 1 pays for the share of the weights that the mask has, and for the head
    numbers = int(np.rint(DENSITY * 128 * 384))
    head = costs.tunable_bytes(built.model, sorted(built.model.head))
    lora = costs.parameters_payload(built.model)[0]
    paid = [sum(r.payload_bytes for r in built.ledger.rows
                if (r.round, r.client, r.step) == (number, "client-1", "a3"))
            for number in (1, 2, 3)]  # fmt: skip
    assert paid == [4 * numbers + head] * 2 + [lora]

    # nothing else of the layer changed, and the base did not
    change = layer.dense(first[LAYER + SPARSE])
    outside = torch.ones(change.numel(), dtype=torch.bool)
    outside[layer.places] = False
    assert not change.flatten()[outside].any() and change.flatten()[~outside].all()
    assert base == built.model.base_hash

    # stage 2 starts from the best approximation; what is left is told
    shared, told = built.strategy.ranks.due(committed[1].server, 3)  # type: ignore[attr-defined]
    ((a, b),) = pairs(shared)
    u, s, v = np.linalg.svd(change.double().numpy())
    best = torch.from_numpy((u[:, :RANK] * s[:RANK]) @ v[:RANK])
    product = shared[b].double() @ shared[a].double() * (ALPHA / RANK)
    assert torch.allclose(product, best, rtol=0, atol=1e-6)
    gap = float(np.sqrt((s[RANK:] ** 2).sum() / (s**2).sum()))
    assert told["remainder_gap"] == pytest.approx(gap, abs=1e-6)
    assert committed[2].history[-1]["remainder_gap"] == told["remainder_gap"]
    assert second.keys() == built.model.initial.keys() == shared.keys()
    assert torch.equal(shared["model.score.weight"], first["model.score.weight"])

    # stage 1 is what a run of sparse tunables is, and a run that stopped in it ends the same
    same = {"kind": "sparse", "density": DENSITY, "layers": [3]}
    alone = finish(build(slora(2, same))).server.shared
    assert all(torch.equal(t, alone[n]) for n, t in first.items())
    again = round.run(build(slora()), committed[0], lambda committed: None)
    assert all(torch.equal(t, second[n]) for n, t in again.server.shared.items())
    assert again.history == end.history


def test_other_payloads_cohorts_and_optimizers_go_through_both_stages() -> None:
    """Law 3, and what the server's and the clients' optimizers remember of the first stage."""
    spec = slora(3, training={"optimizer_state": "keep", "optimizer": "sgd", "momentum": 0.9})
    ends = []
    for payload, cohort in (("value", 3), ("value", 1), ("change", 3)):
        strategy = ex.Parameters(payload=payload, server=ex.Momentum(beta=0.5))  # type: ignore[arg-type]
        built = build(spec.replace(strategy=strategy))
        built.exchange.transport.window = cohort
        ends.append(finish(built).server)
        assert {n.partition("|")[0] for n in ends[-1].optimizer} == ends[-1].shared.keys()
    for other in ends[1:]:
        for name, tensor in ends[0].shared.items():
            assert torch.allclose(tensor, other.shared[name], atol=2e-5)


def test_a_plan_knows_both_stages() -> None:
    spec = slora(3)
    built = build(spec)
    finish(built)
    line = plan.look(spec).lines[0]
    rows = [r for r in built.ledger.rows if r.client != "server" and r.step != "eval"]
    for payload, step in ((line.payload[0], "a3"), (line.payload[1], "a1")):
        paid = sum(r.payload_bytes for r in rows if r.step == step)
        assert payload == pytest.approx(paid / 9, abs=1)
    assert line.flops == pytest.approx(sum(r.flops for r in rows) / 9, rel=0.01)
    assert line.memory == pytest.approx(max(r.peak_memory for r in rows), rel=0.2)


def test_a_codec_may_name_a_tunable_of_either_stage() -> None:
    for name in (LAYER + SPARSE, f"{LAYER}.lora_B.default.weight"):
        build(slora(exchange={"codecs": {"parameter": {name: "int8"}}}))
    with pytest.raises(FedllmError, match="is no tunable; did you mean"):
        build(slora(exchange={"codecs": {"parameter": {LAYER + ".sparsely": "int8"}}}))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"rounds": 2}, r"sparse.rounds = 2: LoRA follows; expected rounds = 3 or more \(here 2\)"),
        ({"tunables": {**SLORA, "schedule": {"1": 2}}}, "same LoRA for all only, .*schedule"),
        ({"tunables": {**SLORA, "modules": [{"layers": [3]}]}}, "LoRA for all only, .*modules"),
        ({"tunables": {**SLORA, "freeze_a": True}}, "freeze_a: .* without sparse"),
        ({"tunables": {**SLORA, "sparse": {"density": 0.0}}}, "sparse.density"),
        ({"strategy": {"aggregation": "flexlora"}}, "which tunables.sparse begins without"),
        ({"strategy": {"kind": "logits"}}, "tunables.sparse: only with strategy.kind"),
        ({"strategy": {"mentor": "builtin#2"}}, "without tunables.sparse"),
    ],
)
def test_what_has_no_two_stages_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        slora(**sections)


def test_a_site_that_allows_no_sparse_tuning_refuses_its_first_stage() -> None:
    assert "'sparse' is not allowed" in ex.Allow(tunables=("lora",)).refusal(slora())
    assert not ex.Allow().refusal(slora())
    assert federation.check(slora(), 0, federation.prepare(slora(), 0)).model.before is not None
