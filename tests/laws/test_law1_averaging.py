"""Law 1: averaged full-batch steps are one centralized step; our trainer is a plain loop."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from fedllm.models.export import outside
from fedllm.models.loading import source_of
from small import BERT, GPT2, TASKS, TYPES, build, experiment, final, finish, furthest

FULL_BATCH = {"batch_size": 1000, "rate": 0.05}


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_one_full_batch_step_averaged_is_one_centralized_step(name: str, task: str) -> None:
    spec = experiment(name, task, training=FULL_BATCH)
    averaged = final(spec)
    together = final(spec.replace(strategy={"kind": "centralized"}))
    start = build(spec).strategy.start().shared
    assert furthest(averaged, together) < 1e-6
    assert furthest(averaged, start) > 1e-5  # something was learnt


@pytest.mark.parametrize("server", ["per-client", "concatenated"])
@pytest.mark.parametrize("labels", ["server", "client"])
def test_the_same_holds_for_activations(server: str, labels: str) -> None:
    strategy = {"kind": "activations", "cut": 2, "server": server, "labels": labels}
    spec = experiment(GPT2, training=FULL_BATCH, strategy=strategy)
    together = final(spec.replace(strategy={"kind": "centralized"}))
    assert furthest(final(spec), together) < 1e-6


@pytest.mark.parametrize("payload", ["value", "delta"])
def test_deltas_and_values_mean_the_same(payload: str) -> None:
    spec = experiment(GPT2, strategy={"kind": "parameters", "payload": payload})
    assert furthest(final(spec), final(experiment(GPT2))) < 1e-6


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_one_client_is_our_trainer_without_federation_bit_for_bit(name: str, task: str) -> None:
    spec = experiment(
        name, task, rounds=2, simulation={"clients": 1, "sizes": [20]},
        tunables={"dropout": 0.2},
        training={"optimizer": "adam", "rate": 1e-3, "optimizer_state": "keep"},
    )  # fmt: skip
    alone = final(spec.replace(strategy={"kind": "standalone"}))
    federated = final(spec)
    assert all(torch.equal(federated[n], alone[n]) for n in alone)


@pytest.mark.parametrize("name", TYPES)
def test_one_client_is_a_plain_peft_loop(name: str) -> None:
    """The same batches, SGD, no dropout: a loop that anyone would write with PEFT."""
    spec = experiment(name, simulation={"clients": 1, "sizes": [20]},
                      training={"epochs": 2, "rate": 0.01})  # fmt: skip
    built = build(spec)
    (site,) = built.worker.sites.values()
    initial = dict(site.model.initial)
    ours = built.strategy.candidate(finish(built).server)
    assert ours is not None

    targets = ["query", "value"] if name == BERT else ["c_attn"] if name == GPT2 else [
        "q_proj", "v_proj"]  # fmt: skip
    config = LoraConfig(r=2, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS",
                        fan_in_fan_out=name == GPT2)  # fmt: skip
    pad = {} if name == BERT else {"pad_token_id": 0}
    base = AutoModelForSequenceClassification.from_pretrained(
        source_of(name), num_labels=len(built.labels), dtype=torch.float32, **pad
    )
    plain = get_peft_model(base, config).eval()
    inner = plain.state_dict()
    for key, value in initial.items():
        match = [k for k in inner if _like(k) == outside(key, site.model.spec)]
        assert len(match) == 1, key
        inner[match[0]].copy_(value)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.01)
    for batch in site.plan(site.train, "private").between(0, 6):
        x = batch.inputs.x.view(batch.rows, -1)
        mask = batch.inputs.real().view_as(x).long()
        if name != BERT:  # a decoder of the library finds the last token by its padding id
            x = torch.where(mask.bool() & (x == 0), torch.ones_like(x), x)
        loss = F.cross_entropy(plain(input_ids=x, attention_mask=mask).logits, batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs = {_like(k): v for k, v in plain.state_dict().items()}
    assert (
        max(float((theirs[outside(k, site.model.spec)] - v).abs().max()) for k, v in ours.items())
        < 1e-5
    )


def _like(key: str) -> str:
    return key.replace(".default.", ".").replace(".modules_to_save", "")
