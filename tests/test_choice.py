"""Which public rows a round uses: by importance (K-10), and by the clients' labels (K-06)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm import costs, federation
from fedllm import experiment as ex
from fedllm.aggregation import knowledge as rules
from fedllm.aggregation.knowledge import Voices
from fedllm.checkpoint import load, save
from fedllm.data.examples import Examples
from fedllm.errors import FedllmError
from fedllm.exchange import Want
from fedllm.federation import Prepared, Silent
from fedllm.flat import Ints
from fedllm.ledger import Ledger, Row
from fedllm.round import Federation
from fedllm.strategies import choice
from fedllm.strategies.base import ServerState
from fedllm.streams import stream
from fedllm.training.cohort import alone
from fedllm.training.infer import infer
from fedllm.training.jobs import Infer
from fedllm.training.meter import Meter
from shared import needs_shared
from small import GPT2, LLAMA, build, experiment, finish

RULES = [rule for rule in get_args(ex.Public.model_fields["choose"].annotation) if rule != "random"]
NONE = np.zeros(0, np.int64)


def pruned(
    choose: str, rows: int = 6, rounds: int = 1, task: str = "classification",
    strategy: dict[str, Any] | None = None, **public: Any,
) -> ex.Experiment:  # fmt: skip
    return experiment(
        GPT2, task, rounds=rounds, strategy={"kind": "logits", **(strategy or {})},
        evaluation={"every": 0}, simulation={"test_examples": 3},
        public={"size": 24, "labelled": True, "rows_per_round": rows, "choose": choose, **public},
    )  # fmt: skip


@cache
def prepared(task: str) -> Prepared:
    return federation.prepare(pruned("random", task=task), 0)


def made(spec: ex.Experiment) -> Federation:
    """How rows are chosen changes neither data nor what a pass costs, so both are shared."""
    return federation.assemble(spec, 0, prepared(spec.task.kind), Ledger(), "run", Silent())


def sent(rows: list[Row], *roles: str) -> int:
    return sum(r.payload_bytes for r in rows if r.role in roles and r.step != "eval")


def used(built: Federation) -> list[list[int]]:
    """The rows of each round, as they are asked for."""
    found, gather = [], built.exchange.gather

    def spy(requests: Any, want: Want) -> Any:
        for message in itertools.islice(requests.values(), 1):
            if message.task == "know":
                found.append(message.tensors["rows"].tolist())
        return gather(requests, want)

    built.exchange.gather = spy  # type: ignore[method-assign]
    return found


# from scores to rows ----------------------------------------------------------------------------


@given(count=st.integers(0, 12), seed=st.integers(0, 20))
def test_the_highest_are_taken_and_ties_are_drawn(count: int, seed: int) -> None:
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, 12)).float()
    found = choice.highest(scores, count, np.random.default_rng(seed))
    assert len(set(found.tolist())) == count and found.tolist() == sorted(found.tolist())
    assert sorted(scores[found].tolist()) == sorted(scores.tolist())[12 - count :]
    even = choice.highest(torch.full((12,), torch.inf), count, np.random.default_rng(seed))
    assert even.tolist() == sorted(np.random.default_rng(seed).permutation(12)[:count])


def radius(vectors: torch.Tensor, chosen: Ints | list[int]) -> float:
    return float(torch.cdist(vectors, vectors[list(chosen)]).amin(1).max())


@given(seed=st.integers(0, 30), count=st.integers(1, 4))
def test_coverage_is_greedy_and_within_twice_the_best(seed: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(9, 3, generator=draw)
    found = choice.farthest_first(vectors, count, np.random.default_rng(seed))
    slow = [int(np.random.default_rng(seed).integers(9))]
    while len(slow) < count:
        slow.append(max(range(9), key=lambda i: min(float((vectors[i] - vectors[j]).norm())
                                                    for j in slow)))  # fmt: skip
    assert found.tolist() == sorted(slow)
    best = min(radius(vectors, list(some)) for some in itertools.combinations(range(9), count))
    assert radius(vectors, found) <= 2 * best + 1e-6


def test_coverage_leaves_nothing_farther_than_a_random_draw_does() -> None:
    """K-10; and rows that lie on one another are not taken twice."""
    for seed in range(10):
        vectors = (3 * torch.randn(80, 6, generator=torch.manual_seed(seed))).softmax(-1)
        found = choice.farthest_first(vectors, 20, np.random.default_rng(seed))
        some = np.random.default_rng(seed).permutation(80)[:20]
        assert radius(vectors, found) <= radius(vectors, some)
    same = choice.farthest_first(torch.zeros(5, 2), 4, np.random.default_rng(0))
    assert len(set(same.tolist())) == 4


# scores -----------------------------------------------------------------------------------------


@given(seed=st.integers(0, 20), outputs=st.integers(2, 6))
def test_scores_of_units_are_the_formulas(seed: int, outputs: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, outputs, generator=draw)
    targets = torch.randint(outputs, (4,), generator=draw)
    for unit in range(4):
        top = max(logits[unit].tolist())
        odds = [math.exp(z - top) for z in logits[unit].tolist()]
        p = [one / sum(odds) for one in odds]
        doubt = -sum(one * math.log(one) for one in p)
        error = math.sqrt(sum((p[y] - (y == int(targets[unit]))) ** 2 for y in range(outputs)))
        for name, slow in (("entropy", doubt), ("el2n", error)):
            found = choice.SCORES[name](logits, targets)
            assert float(found[unit]) == pytest.approx(slow, abs=1e-5)
    assert torch.allclose(choice.SCORES["coverage"](logits, targets), logits.softmax(-1))
    assert set(choice.SCORES) == set(ex.LOOKING)


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_a_rows_score_is_the_mean_over_its_units(task: str) -> None:
    strategy: Any = made(pruned("random", task=task)).strategy
    public, model = strategy.public, strategy.model
    logits = torch.zeros(int(public.targets.sum()), model.outputs)

    def take(batch: Any, found: torch.Tensor, features: torch.Tensor) -> None:
        logits[batch.places] = found

    infer([Infer(model, model.initial, public, 64, Meter(), "", take)])
    ends = np.cumsum(public.targets)
    for score in choice.SCORES.values():
        meter = Meter()
        found = alone(choice.looked(score, model, model.initial, public, 10, meter))
        each = score(logits, torch.from_numpy(public.goals))
        slow = [each[end - n : end].mean(0) for end, n in zip(ends, public.targets, strict=True)]
        assert torch.allclose(found, torch.stack(slow), atol=1e-5)
        assert list(meter.steps) == ["choose"] and meter.steps["choose"].examples == 24


def test_disagreement_is_what_entropy_the_mean_has_more() -> None:
    """H(mean p) - mean H(p); of two clients the sum over units is their divergence."""
    said = {f"c{k}": 2 * torch.randn(6, 4, generator=torch.manual_seed(k)) for k in range(3)}
    heard = Voices.of(said, dict.fromkeys(said, 1.0))
    p = heard.logits.double().softmax(-1)

    def doubt(x: torch.Tensor) -> torch.Tensor:
        return -(x * x.log()).sum(-1)

    assert torch.allclose(rules.disagreement(heard), doubt(p.mean(0)) - doubt(p).mean(0))
    two = Voices.of({n: said[n] for n in ("c0", "c2")}, {"c0": 1.0, "c2": 5.0})
    assert float(rules.disagreement(two).sum()) == pytest.approx(float(rules.divergence(two)[0, 1]))
    same = Voices.of(dict.fromkeys(said, said["c0"]), dict.fromkeys(said, 1.0))
    assert float(rules.disagreement(same).abs().max()) < 1e-12


def test_rows_never_used_come_before_those_that_clients_disagree_on() -> None:
    rows = np.array([1, 4])
    text = Examples(np.zeros(7, np.int32), np.array([4, 7]), NONE, np.ones(2, np.int64), NONE)
    kept = choice.noted({}, rows, torch.tensor([3.0, 0.0, 0.0, 4.0, 2.0]).double(), text, 6)
    assert kept["score"].tolist() == [math.inf, 1.0, math.inf, math.inf, 3.0, math.inf]
    state, spec = ServerState(public=kept), ex.Public(rows_per_round=5, choose="disagreement")
    public = Examples(np.zeros(6, np.int32), np.arange(1, 7), NONE, np.zeros(6, np.int64), NONE)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        found = choice.draw(spec, public, None, state, 1, Meter(), rng)  # type: ignore[arg-type]
        assert found.tolist() == [0, 2, 3, 4, 5]
    later = choice.noted(kept, rows, torch.zeros(5).double(), text, 6)
    assert later["score"][1] == 0 and kept["score"][1] == 1  # state in, state out


# client feedback --------------------------------------------------------------------------------


def distance(labels: Ints, mix: Ints) -> float:
    """Total variation between the labels of some rows and a mix of labels."""
    found = np.bincount(labels, minlength=len(mix)) / len(labels)
    return float(abs(found - mix / mix.sum()).sum()) / 2


def test_rows_are_drawn_with_the_clients_mix_of_labels() -> None:
    """K-06: the total variation distance falls; a label that no client has comes last."""
    labels = np.repeat(np.arange(5), 40)
    mix = np.array([30, 10, 5, 5, 0])
    weights = choice.likeness(torch.from_numpy(np.stack([mix, 3 * mix])).float(), labels)
    assert torch.allclose(weights.view(5, 40)[:, 0].float(), torch.tensor([3.0, 1.0, 0.5, 0.5, 0]))
    plain, chosen = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = choice.highest(choice.sampled(weights, rng), 30, rng)
        chosen.append(distance(labels[found], mix))
        plain.append(distance(labels[rng.permutation(200)[:30]], mix))
        assert 4 not in labels[found]
    assert max(chosen) < min(plain) and np.mean(chosen) < 0.5 * np.mean(plain)
    rng = np.random.default_rng(0)
    assert len(set(choice.highest(choice.sampled(weights, rng), 190, rng).tolist())) == 190
    nothing = choice.likeness(torch.zeros(2, 5), labels)
    assert choice.highest(choice.sampled(nothing, rng), 30, rng).size == 30


def test_a_histogram_is_told_once_and_nothing_else() -> None:
    """K-06: below 1 kB, in the reply that comes anyway, and the only bytes more."""
    plain, told = (made(pruned(rule, rounds=2)) for rule in ("random", "feedback"))
    asked = used(told)
    for built in (plain, told):
        finish(built)
    size = 4 * plain.model.outputs
    assert size < 1000
    for role in ("logit", "index"):
        assert sent(plain.ledger.rows, role) == sent(told.ledger.rows, role)
    assert sent(plain.ledger.rows, "statistic") == 0
    rows = [r for r in told.ledger.rows if r.role == "statistic" and r.payload_bytes]
    assert [(r.round, r.step, r.direction) for r in rows if r.step != "eval"] == [
        (1, "b3", "up")
    ] * 3
    assert sent(told.ledger.rows, "statistic") == 3 * size
    frames = [sum(r.frames for r in b.ledger.rows) for b in (plain, told)]
    assert frames[0] == frames[1]
    first = choice.draw(plain.strategy.setup.public, told.strategy.public, told.model,  # type: ignore[attr-defined]
                        ServerState(), 1, Meter(), stream(0, "server", 1))  # fmt: skip
    assert asked[0] == first.tolist() and asked[1] != asked[0]


def test_noise_is_drawn_once_and_leaves_no_count_below_zero() -> None:
    built = made(pruned("feedback", feedback_epsilon=0.5))
    site = built.worker.sites["client-1"]
    noisy = choice.histogram(site)
    assert torch.equal(noisy, choice.histogram(site)) and float(noisy.min()) == 0
    site.setup = replace(site.setup, public=pruned("feedback").public)
    exact = choice.histogram(site)
    assert exact.tolist() == np.bincount(site.train.labels, minlength=24).tolist()
    assert not torch.equal(noisy, exact)
    site.setup = replace(site.setup, public=pruned("random").public)
    with pytest.raises(FedllmError, match=r"asked for a histogram, but public.choose = 'random'"):
        choice.histogram(site)


def test_a_false_histogram_is_its_tellers_failure() -> None:
    good = torch.tensor([2.0, 0.0, 1.0])
    assert choice.misfit({"histogram": good}, 3) == ""
    for lie, says in ((good[:2], "with shape"), (good - 1, "below 0"), (good.double(), "float64")):
        assert says in choice.misfit({"histogram": lie}, 3)
    built = made(pruned("feedback").replace(exchange=ex.Exchange(minimum_replies=1)))
    strategy: Any = built.strategy
    honest, lies = strategy.know, {"client-1": math.nan, "client-2": -1.0}

    def lying(site: Any, message: Any) -> Any:
        reply = yield from honest(site, message)
        reply.tensors["histogram"][3] = lies.get(site.name, 0.0)
        return reply

    strategy.tasks = {**strategy.tasks, "know": lying}
    end = finish(built)
    assert {row.client for row in built.ledger.rows if row.failures} == set(lies)
    assert set(end.server.clients) == {"client-3"}


# in the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_uses_so_many_rows_and_a_resumed_run_the_same_ones(
    rule: str, tmp_path: Path
) -> None:
    """K-10: bytes in proportion to the rows; state in, state out. Most need no server's model."""
    spec = pruned(rule, rounds=2, strategy={"server_model": rule in ex.LOOKING})
    whole = made(spec)
    rows = used(whole)
    kept: list[Any] = []
    end = finish(whole, kept.append)
    assert [len(some) for some in rows] == [6, 6]
    assert sent(whole.ledger.rows, "logit") == 2 * 2 * 3 * 6 * 24 * 4
    assert sent(whole.ledger.rows, "index") == 2 * 2 * 3 * 6 * 4
    every = sum(r.examples for r in whole.ledger.rows if r.step == "choose")
    assert every == (2 * 24 if rule in ex.LOOKING else 0)
    save(tmp_path, kept[0])
    begin = load(tmp_path, states_here=False)
    assert begin is not None
    strategy: Any = made(spec).strategy
    assert strategy._draw(begin.server, Meter(), stream(0, "server", 2)).tolist() == rows[1]
    if rule == "disagreement":
        assert not set(rows[0]) & set(rows[1])  # those never used come first
        assert int(end.server.public["score"].isinf().sum()) == 12


@pytest.mark.parametrize(
    ("public", "more", "said"),
    [
        ({"choose": "entropy"}, {}, r"choose = 'entropy': without rows_per_round"),
        ({"choose": "el2n", "rows_per_round": 2}, {}, r"choose = 'el2n': needs .* labelled = true"),
        ({"choose": "feedback", "rows_per_round": 2}, {}, r"needs the public rows' labels"),
        ({"feedback_epsilon": 1.0}, {}, r"feedback_epsilon: only with choose = 'feedback'"),
        ({"choose": "coverage", "rows_per_round": 2}, {"server_model": False},
         r"public.choose = 'coverage': .*strategy.server_model = true"),
        ({"choose": "entropie"}, {}, r"entropie.*did you mean 'entropy'"),
    ],
)  # fmt: skip
def test_choices_without_meaning_are_refused(
    public: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(FedllmError, match=said):
        ex.parse({"public": public, "strategy": {"kind": "logits", **more}}, "test", Path.cwd())


def test_counts_of_labels_are_for_classes_and_for_sites_that_allow_them() -> None:
    with pytest.raises(FedllmError, match=r"choose = 'feedback': compares classes"):
        pruned("feedback", task="generation")
    site = ex.Allow(labels=False)
    assert "allow.labels" in site.refusal(pruned("feedback"))
    assert not site.refusal(pruned("entropy"))


def test_the_plan_knows_of_the_histogram_and_of_the_servers_look() -> None:
    from fedllm.estimates import lines
    from fedllm.estimates.estimator import Estimator
    from fedllm.planning.sizes import sizes

    data = sizes(pruned("random"))
    estimator, found = Estimator(pruned("random"), data.labels), {}
    for rule in ("random", "feedback", "coverage"):
        estimator.experiment = pruned(rule, rounds=2)
        found[rule] = lines.line(estimator, ex.Logits(), data)
    plain, told, looked = found.values()
    outputs = 24
    assert told.payload[0] - plain.payload[0] == outputs * costs.FLOAT / 2  # of two rounds
    assert 0 < told.up - plain.up - outputs * costs.FLOAT / 2 < 100 > told.down - plain.down > 0
    built = made(pruned("coverage"))
    finish(built)
    more = sum(r.flops or 0 for r in built.ledger.rows if r.step == "choose")
    assert looked.server_flops - plain.server_flops == pytest.approx(more, rel=0.05)


@needs_shared
def test_some_rows_a_round_go_through_interpreters() -> None:
    """Rows are numbers that all tokenizers share; each client is asked for its own units."""
    spec = experiment(
        GPT2, "generation", rounds=2, evaluation={"every": 0},
        strategy={"kind": "logits", "form": "top-k", "top_k": 8, "knowledge": "least-loss",
                  "selective": True, "client_models": [LLAMA, GPT2]},
        simulation={"clients": 2, "sizes": [4, 4], "test_examples": 4},
        public={"size": 6, "labelled": True, "rows_per_round": 3, "choose": "disagreement"},
    )  # fmt: skip
    built = build(spec)
    rows = used(built)
    finish(built)
    assert set(built.strategy.setup.interpreters) == {"client-1"}  # type: ignore[attr-defined]
    assert sorted(rows[0] + rows[1]) == list(range(6))  # those never used come first
    assert not [row for row in built.ledger.rows if row.failures]
    for client, site in built.worker.sites.items():
        assert site.public is not None
        mine = [r for r in built.ledger.rows if r.client == client and r.step == "b3"]
        assert sent(mine, "logit", "index") == int(site.public.targets.sum()) * 8 * 8
        assert sent(mine, "statistic") == 2 * 3 * 4
