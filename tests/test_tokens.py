"""Tokens that cross because the client's last block attends to them (S-06)."""

from typing import Any

import numpy as np
import pytest
import torch

from fedllm import experiment as ex
from fedllm.costs import kept
from fedllm.errors import FedllmError
from fedllm.ledger import total
from fedllm.models.inputs import Inputs
from fedllm.models.loading import source_of
from fedllm.planning import plan
from fedllm.training.cohort import work
from fedllm.training.jobs import Forward, Half
from fedllm.training.learner import Learner
from fedllm.training.meter import Meter
from shared import needs_shared
from small import BERT, GPT2, LLAMA, TYPES, build, experiment, final, finish, furthest

SPLIT: dict[str, Any] = {"kind": "activations", "cut": 2}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("labels", ["server", "client"])
def test_all_tokens_are_as_good_as_no_choice(name: str, labels: str) -> None:
    """A share that rounds up to every token, through all that a smaller one goes through."""
    whole = final(experiment(name, strategy={**SPLIT, "labels": labels}))
    every = {**SPLIT, "labels": labels, "keep_tokens": 0.9999}
    assert furthest(final(experiment(name, strategy=every)), whole) < 1e-5


def test_clients_side_by_side_send_what_each_would_alone() -> None:
    half = experiment(GPT2, strategy={**SPLIT, "keep_tokens": 0.5, "server": "per-client"})
    alone = experiment(
        GPT2, strategy={**SPLIT, "keep_tokens": 0.5, "server": "per-client"},
        simulation={"cohort": 1},
    )  # fmt: skip
    assert furthest(final(half), final(alone)) < 1e-5
    everything = experiment(GPT2, strategy={**SPLIT, "server": "per-client"})
    assert furthest(final(half), final(everything)) > 1e-4


def test_attention_is_seen_also_above_blocks_that_ran_once() -> None:
    """The last block at the client runs anew, whatever is remembered below it; cuts differ."""
    spec = experiment(
        GPT2, tunables={"kind": "lora", "rank": 2, "layers": [-1]},
        strategy={"kind": "activations", "cut": [1, 3, 2], "keep_tokens": 0.5},
    )  # fmt: skip
    anew = spec.replace(model=ex.Model(cache=False))
    assert furthest(final(spec), final(anew)) < 1e-5


@pytest.mark.parametrize("by", ["attention", "random"])
def test_bytes_are_those_of_the_tokens_that_cross(by: str) -> None:
    half = {**SPLIT, "keep_tokens": 0.5, "keep_by": by, "labels": "client"}
    spec = experiment(GPT2, strategy=half, evaluation={"every": 0})
    built = build(spec)
    finish(built)
    rows = [row for row in built.ledger.rows if row.step != "eval"]
    for name, site in built.worker.sites.items():
        tokens = int(np.ceil(site.train.lengths / 2).sum())
        for direction in ("up", "down"):
            for role in ("activation", "gradient"):
                paid = total(rows, "payload_bytes", client=name, direction=direction, role=role)
                assert paid == tokens * site.model.width * 4
        assert total(rows, "payload_bytes", client=name, role="index") == tokens * 4
    found = plan.look(spec).lines[2]
    wire = sum(
        row.wire_bytes for row in rows if row.direction == "up" and row.role != "measurement"
    )
    assert found.up == pytest.approx(wire / 3, rel=0.01)
    counted = sum(row.flops for row in rows if row.client != "server")
    assert found.flops == pytest.approx(counted / 3, rel=0.05)
    assert found.server_flops == pytest.approx(total(rows, "flops", client="server"), rel=0.05)


def test_a_token_that_stays_gets_no_gradient() -> None:
    """One step by hand: the server's part sees the kept tokens alone."""
    one = {"clients": 1, "sizes": [6]}
    half = {**SPLIT, "keep_tokens": 0.4, "keep_by": "random"}
    spec = experiment(GPT2, strategy=half, simulation=one)
    built = build(spec)
    (site,), strategy = built.worker.sites.values(), built.strategy
    model = site.model
    batch = next(site.plan(site.train, "private").between(0, 1))
    site.round = 1
    cells = strategy._kept(site, batch, None, 1)  # type: ignore[attr-defined]
    params = {n: t.clone().requires_grad_(True) for n, t in model.initial.items()}
    client, server = model.part("client", 2), model.part("server", 2)
    out = client.apply_to({n: params[n] for n in model.tunables_of(client)}, batch.inputs)
    above = {n: params[n] for n in model.tunables_of(server)}
    row = batch.inputs.width_of_rows[0]
    logits = []
    for number in range(batch.rows):
        mine = cells[(cells >= number * row) & (cells < (number + 1) * row)]
        last = number * row + int(batch.inputs.full_lengths()[number]) - 1
        assert len(mine) == kept(np.array([site.train.lengths[batch.row_numbers[number]]]), 0.4)[0]
        assert last in mine.tolist()
        logits.append(server.apply_to(above, Inputs.of(out[mine][None])))
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), batch.targets)
    loss.backward()  # type: ignore[no-untyped-call]
    by_hand = {n: p.detach() - 0.1 * p.grad for n, p in params.items() if p.grad is not None}
    assert furthest(final(spec), by_hand) < 1e-5


@pytest.mark.parametrize("name", TYPES)
def test_what_is_received_is_the_mean_of_the_library_s_attention(name: str) -> None:
    from transformers import AutoModel

    site = build(experiment(name)).worker.sites["client-1"]
    model = site.model
    batch = next(site.plan(site.train, "private").between(0, 1))
    core = model.part("client", 2)
    values = {n: model.initial[n] for n in model.tunables_of(core)}
    half = Half(model, core, Learner(values, site.setup.training), Meter())
    (passed,) = work([Forward(half, batch, (0,), "c1", watched=1)])
    plain = AutoModel.from_pretrained(source_of(name), attn_implementation="eager")
    plain.eval()
    found = torch.split(passed.received, batch.inputs.width_of_rows.tolist())
    x = torch.split(batch.inputs.x, batch.inputs.width_of_rows.tolist())
    for mine, tokens, length in zip(found, x, batch.inputs.full_lengths().tolist(), strict=True):
        with torch.no_grad():
            seen = plain(input_ids=tokens[:length][None], output_attentions=True).attentions[1]
        assert float((mine[:length] - seen[0].mean((0, 1))).abs().max()) < 1e-5
        assert not bool(mine[length:].any())


@needs_shared
def test_kept_tokens_are_where_they_were() -> None:
    """Rotary positions are those in the row: only distances count, and gaps are distances."""
    model = build(experiment(LLAMA)).worker.sites["client-1"].model
    server = model.part("server", 2)
    x = Inputs.of(torch.randn((1, 3, model.width), generator=torch.Generator().manual_seed(0)))
    there = {n: model.initial[n] for n in model.tunables_of(server)}

    def logits(*places: int) -> torch.Tensor:
        return server.apply_to(there, Inputs(x.x, x.blocks, at=torch.tensor(places)))

    assert float((logits(0, 1, 2) - server.apply_to(there, x)).abs().max()) < 1e-6
    assert float((logits(4, 7, 9) - logits(0, 3, 5)).abs().max()) < 1e-4
    assert float((logits(0, 3, 9) - logits(0, 1, 2)).abs().max()) > 1e-3


@pytest.mark.parametrize(("places", "said"), [
    ([0, 1, 0, 2], ""), ([1, 0, 0, 2], "not in order"), ([0, 1, 0, 4], "beyond"),
    ([0, 1, 0], "are not 4 numbers"),
])  # fmt: skip
def test_places_that_are_none_are_refused(places: list[int], said: str) -> None:
    strategy: Any = build(experiment(GPT2, strategy={**SPLIT, "keep_tokens": 0.5})).strategy
    lengths = torch.tensor([4, 3], dtype=torch.int32)
    found = strategy._misplaced(torch.tensor(places, dtype=torch.int32), lengths)
    assert said in found and bool(said) == bool(found)


@pytest.mark.parametrize("changes", [{"task": "generation"}, {"tunables": {"kind": "prompt"}}])
def test_what_needs_every_token_refuses_a_share(changes: dict[str, Any]) -> None:
    with pytest.raises(FedllmError, match=r"keep_tokens = 0.5: .* needs every token; expected 1"):
        experiment(BERT, strategy={**SPLIT, "keep_tokens": 0.5}, **changes)
