"""What clients know becomes one consensus: selection, weights, clusters (K-11, K-12, K-13)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm import experiment as ex
from fedllm.aggregation import knowledge as rules
from fedllm.aggregation import mean
from fedllm.aggregation.knowledge import KNOWLEDGE, Voices
from fedllm.data.examples import Examples
from fedllm.errors import FedllmError
from small import GPT2, build, experiment, finish


def voices(clients: int = 3, units: int = 6, outputs: int = 5, seed: int = 0) -> Voices:
    draw = torch.Generator().manual_seed(seed)
    said = {f"c{k}": torch.randn(units, outputs, generator=draw) for k in range(clients)}
    targets = torch.randint(outputs, (units,), generator=draw)
    return Voices.of(said, {name: k + 1.0 for k, name in enumerate(said)}, targets,
                     torch.arange(units) // 2)  # fmt: skip


@given(
    name=st.sampled_from(sorted(KNOWLEDGE)), clients=st.integers(1, 5), keep=st.integers(0, 6),
    limit=st.sampled_from([0.2, 0.9, 1.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_weights_of_every_rule_sum_to_one(
    name: str, clients: int, keep: int, limit: float, seed: int
) -> None:
    some = voices(clients, seed=seed)
    weights = KNOWLEDGE[name](some, limit)
    kept = rules.keep_best(some, weights, keep, name.endswith("loss"))
    for found in (weights, kept):
        assert found.shape == (clients, 6) and bool((found >= 0).all())
        assert torch.allclose(found.sum(0), torch.ones(6, dtype=torch.float64))
    if keep:
        assert int((kept > 0).sum(0).max()) <= max(keep, 1)
    order = torch.randperm(clients, generator=torch.Generator().manual_seed(seed)).tolist()
    said = {some.names[i]: some.logits[i] for i in order}
    again = Voices.of(said, {n: float(some.weights[i]) for i, n in enumerate(some.names)},
                      some.targets, some.rows)  # fmt: skip
    assert torch.equal(KNOWLEDGE[name](again, limit), weights)


def test_mean_and_uniform_are_the_means_of_the_arrays() -> None:
    some = voices()
    updates = {name: {"z": z} for name, z in zip(some.names, some.logits, strict=True)}
    weights = {name: float(w) for name, w in zip(some.names, some.weights, strict=True)}
    found = rules.combined(some, KNOWLEDGE["mean"](some, 1.0))
    assert torch.equal(found, mean(updates, weights)["z"])
    three = Voices.of({f"c{k}": torch.full((1, 2), float(k)) for k in (1, 2, 3)},
                      {f"c{k}": 1.0 for k in (1, 2, 3)})  # fmt: skip
    assert rules.combined(three, KNOWLEDGE["uniform"](three, 1.0)).tolist() == [[2.0, 2.0]]
    assert torch.equal(KNOWLEDGE["entropy"](some, 1.0), KNOWLEDGE["mean"](some, 1.0))


def test_one_nan_client_is_refused_and_named() -> None:
    with pytest.raises(FedllmError, match="'b' sent NaN"):
        Voices.of({"a": torch.ones(2, 2), "b": torch.full((2, 2), math.nan)}, {"a": 1.0, "b": 1.0})


def test_who_says_noise_is_not_heard() -> None:
    """K-11: random logits are dropped by entropy; the consensus is that without the client."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.randint(20, (200,), generator=draw)
    sure = 8 * torch.nn.functional.one_hot(truth, 20).float()
    said = {f"good-{k}": sure + 0.3 * torch.randn(200, 20, generator=draw) for k in (1, 2)}
    without = Voices.of(said, dict.fromkeys(said, 1.0))
    said["noise"] = torch.randn(200, 20, generator=draw)
    heard = Voices.of(said, dict.fromkeys(said, 1.0))
    weights = KNOWLEDGE["entropy"](heard, 0.6)
    assert float(weights[heard.names.index("noise")].mean()) < 0.01
    alone = rules.combined(without, KNOWLEDGE["mean"](without, 1.0))
    dropped = weights[heard.names.index("noise")] == 0
    assert torch.allclose(rules.combined(heard, weights)[dropped], alone[dropped])
    best = rules.keep_best(heard, KNOWLEDGE["uniform"](heard, 1.0), 2)
    assert float(best[heard.names.index("noise")].mean()) < 0.01


def test_an_expert_counts_more_where_it_is_one() -> None:
    """K-12: a client that knows class c weighs more than the others on that class's rows."""
    truth = torch.arange(60) % 3
    said = {}
    for expert in range(3):
        logits = 0.1 * torch.randn(60, 3, generator=torch.Generator().manual_seed(expert))
        logits[truth == expert, expert] += 5
        said[f"c{expert}"] = logits
    some = Voices.of(said, dict.fromkeys(said, 1.0), truth)
    for rule in ("confidence", "loss", "least-loss"):
        weights = KNOWLEDGE[rule](some, 1.0)
        for expert in range(3):
            assert float(weights[expert, truth == expert].min()) > 1 / 3, rule


def test_loss_is_that_of_whole_rows() -> None:
    some = voices()
    each = torch.nn.functional.cross_entropy(
        some.logits.flatten(0, 1),
        some.targets.repeat(3),
        reduction="none",  # type: ignore[union-attr]
    ).view(3, 6)
    rows = each.view(3, 3, 2).mean(-1).repeat_interleave(2, 1)
    assert torch.allclose(some.loss, rows.double(), atol=1e-6)
    chosen = KNOWLEDGE["least-loss"](some, 1.0)
    assert torch.equal(chosen.argmax(0), rows.argmin(0))
    picked = rules.combined(some, chosen)
    assert torch.equal(picked, some.logits[rows.argmin(0), torch.arange(6)])
    with pytest.raises(FedllmError, match="labelled"):
        _ = Voices.of({"a": torch.ones(1, 2)}, {"a": 1.0}).loss


@given(seed=st.integers(0, 30), sizes=st.tuples(st.integers(2, 4), st.integers(2, 4)))
def test_planted_groups_are_found(seed: int, sizes: tuple[int, int]) -> None:
    """K-13: clients with swapped labels are told apart exactly; one group is the plain mean."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randint(6, (80,), generator=draw)
    planted, said = [], {}
    for group, size in enumerate(sizes):
        for _ in range(size):
            goal = truth if group == 0 else 5 - truth
            logits = 4 * torch.nn.functional.one_hot(goal, 6).float()
            said[f"c{len(planted)}"] = logits + torch.randn(80, 6, generator=draw)
            planted.append(group)
    some = Voices.of(said, dict.fromkeys(said, 1.0))
    found = rules.clusters(rules.divergence(some), 2)
    assert found == [[i for i, g in enumerate(planted) if g == group] for group in (0, 1)]
    (whole,) = rules.clusters(rules.divergence(some), 1)
    assert whole == list(range(len(planted)))
    assert len(rules.clusters(rules.divergence(some), 99)) == len(planted)


def test_goals_are_labels_or_next_tokens() -> None:
    none = np.zeros(0, np.int64)
    text = Examples(np.array([7, 8, 9, 4, 5], np.int32), np.array([3, 5]), none,
                    np.array([1, 1]), none)  # fmt: skip
    assert text.goals.tolist() == [8, 9, 5]
    late = Examples(text.flat, text.ends, none, np.array([2, 1]), none)
    assert late.goals.tolist() == [9, 5] and late.goals.size == late.targets.sum()


# in the loop ------------------------------------------------------------------------------------


def ran(**strategy: Any) -> tuple[Any, list[Any]]:
    spec = experiment(
        GPT2, strategy={"kind": "logits", **strategy}, evaluation={"every": 0},
        public={"size": 12, "labelled": True},
    )  # fmt: skip
    built = build(spec)
    done = finish(built)
    return done.server, built.ledger.rows


def test_every_rule_runs_a_round_and_sends_the_same_bytes() -> None:
    payload = set()
    shared = []
    for rule in KNOWLEDGE:
        server, rows = ran(knowledge=rule, label_share=0.5)
        payload.add(sum(row.payload_bytes for row in rows if row.role == "logit"))
        shared.append(server.shared["model.score.weight"])
    assert len(payload) == 1
    assert not torch.equal(shared[0], shared[-1])


def test_clusters_teach_their_own() -> None:
    """With as many clusters as clients each is taught by itself alone; with one as before."""
    one, _ = ran(clusters=1, server_model=False)
    own, rows = ran(clusters=3, server_model=False)
    assert one.facts["digest_loss"] != own.facts["digest_loss"]
    assert sum(row.payload_bytes for row in rows if row.role == "logit") == 6 * 12 * 4 * 24


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"knowledge": "least-loss"}, r"strategy.knowledge = 'least-loss': a loss needs targets"),
        ({"label_share": 0.5}, r"strategy.label_share: only with public.labelled"),
        ({"max_entropy": 0.5}, r"strategy.max_entropy: only with knowledge = 'entropy'"),
        ({"knowledge": "entropie"}, r"entropie.*'entropy'"),
        ({"temperature": 0.0}, r"strategy\S*.temperature"),
    ],
)
def test_settings_without_meaning_are_refused(strategy: dict[str, Any], said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        ex.parse({"strategy": {"kind": "logits", **strategy}}, "test", Path.cwd())
