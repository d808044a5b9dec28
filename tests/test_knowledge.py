"""What clients know becomes one consensus: selection, weights, clusters (K-11, K-12, K-13)."""

from __future__ import annotations

import math
import types
from dataclasses import replace
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
from fedllm.codecs import codec
from fedllm.data.examples import Examples
from fedllm.errors import FedllmError
from fedllm.strategies import forms
from fedllm.strategies.logits import Logits
from fedllm.training.objectives import Distillation
from shared import model as shared_model
from shared import needs_shared
from small import GPT2, LLAMA, build, experiment, finish


def voices(clients: int = 3, units: int = 6, outputs: int = 5, seed: int = 0) -> Voices:
    draw = torch.Generator().manual_seed(seed)
    said = {f"c{k}": torch.randn(units, outputs, generator=draw) for k in range(clients)}
    losses = {name: torch.rand(units, generator=draw) for name in said}
    return Voices.of(said, {name: k + 1.0 for k, name in enumerate(said)}, losses)


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
                      dict(zip(some.names, some.loss, strict=True)))  # fmt: skip
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
    losses = {name: torch.nn.functional.cross_entropy(z, truth, reduction="none")
              for name, z in said.items()}  # fmt: skip
    some = Voices.of(said, dict.fromkeys(said, 1.0), losses)
    for rule in ("confidence", "loss", "least-loss"):
        weights = KNOWLEDGE[rule](some, 1.0)
        for expert in range(3):
            assert float(weights[expert, truth == expert].min()) > 1 / 3, rule


def test_the_least_loss_picks_one_voice_whole() -> None:
    some = voices()
    chosen = KNOWLEDGE["least-loss"](some, 1.0)
    assert torch.equal(chosen.argmax(0), some.loss.argmin(0))
    picked = rules.combined(some, chosen)
    assert torch.equal(picked, some.logits[some.loss.argmin(0), torch.arange(6)])
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


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_a_clusters_consensus_teaches_both_groups_better_than_one_for_all(seed: int) -> None:
    """K-13: clients of two groups whose labels are swapped, and linear students of each."""
    draw = torch.Generator().manual_seed(seed)
    x, unseen = (torch.randn(n, 8, generator=draw) for n in (200, 400))
    truth = torch.randn(8, 4, generator=draw)
    labels = [(x @ truth).argmax(-1), 3 - (x @ truth).argmax(-1)]
    goals = [(unseen @ truth).argmax(-1), 3 - (unseen @ truth).argmax(-1)]
    groups = [0, 1, 0, 1, 0]
    said = {
        f"c{k}": 4 * torch.nn.functional.one_hot(labels[group], 4)
        + torch.randn(200, 4, generator=draw)
        for k, group in enumerate(groups)
    }
    heard = Voices.of(said, dict.fromkeys(said, 1.0))
    found = rules.clusters(rules.divergence(heard), 2)
    assert found == [[0, 2, 4], [1, 3]]

    def taught(clients: list[int], goal: torch.Tensor) -> float:
        """Accuracy on unseen rows of who follows the consensus of these clients."""
        some = Voices.of({f"c{k}": said[f"c{k}"] for k in clients}, dict.fromkeys(said, 1.0))
        follow = Distillation(rules.combined(some, KNOWLEDGE["uniform"](some, 1.0)), 1.0, "kl")
        student = torch.zeros(8, 4, requires_grad=True)
        for _ in range(60):
            loss = follow(x @ student, labels[0], torch.arange(200)).mean()
            (slope,) = torch.autograd.grad(loss, student)
            student = (student - slope).detach().requires_grad_()
        return float(((unseen @ student).argmax(-1) == goal).float().mean())

    for group, clients in enumerate(found):
        own, whole = taught(clients, goals[group]), taught(list(range(5)), goals[group])
        assert own > 0.8 and own > whole + 0.05, (group, own, whole)


def test_goals_are_labels_or_next_tokens() -> None:
    none = np.zeros(0, np.int64)
    text = Examples(np.array([7, 8, 9, 4, 5], np.int32), np.array([3, 5]), none,
                    np.array([1, 1]), none)  # fmt: skip
    assert text.goals.tolist() == [8, 9, 5]
    late = Examples(text.flat, text.ends, none, np.array([2, 1]), none)
    assert late.goals.tolist() == [9, 5] and late.goals.size == late.targets.sum()


# forms ------------------------------------------------------------------------------------------

FORMS: dict[str, forms.Form] = {
    "logits": forms.Logits(), "labels": forms.Labels(2.0), "statistics": forms.Statistics(),
    "features": forms.Features(),
    "top-k": forms.Top(4), "top-k, uniform": forms.Top(4, "uniform"), "all of them": forms.Top(9),
}  # fmt: skip


@given(name=st.sampled_from(sorted(FORMS)), units=st.integers(0, 7), scale=st.floats(0.1, 60))
def test_a_form_decodes_into_a_distribution_with_the_same_favourite(
    name: str, units: int, scale: float
) -> None:
    form, outputs = FORMS[name], 9
    logits = scale * torch.randn(units, outputs, generator=torch.Generator().manual_seed(units))
    known = form.encode(logits)
    assert form.wrong(known, units, outputs) == ""
    assert set(known) == set(form.parts)
    found = form.decode(known, outputs)
    assert found.shape == logits.shape and found.dtype is torch.float32
    assert bool(torch.isfinite(found).all())
    assert torch.allclose(found.softmax(-1).sum(-1), torch.ones(units))
    assert torch.equal(found.argmax(-1), logits.argmax(-1))
    if name in ("logits", "all of them") and scale < 10:
        assert torch.allclose(found.softmax(-1), logits.softmax(-1), atol=1e-6)


def test_softened_labels_give_the_student_what_logits_give() -> None:
    """K-05: with the same temperature the distillation is the same, but for what clamping cuts."""
    logits, student = torch.randn(8, 9), torch.randn(8, 9)
    goals = torch.zeros(8, dtype=torch.long)
    form = forms.Labels(2.0)
    places = torch.arange(8)
    teachers = [logits, forms.Teacher(form, form.encode(logits), 9)]
    one, other = (Distillation(t, 2.0, "kl")(student, goals, places) for t in teachers)
    assert torch.allclose(one, other, atol=1e-5)


def test_eight_bits_of_softened_labels_err_by_half_a_step() -> None:
    """K-09: |p - p'| <= range / 510, and a byte an output."""
    p = forms.Labels(1.0).encode(3 * torch.randn(20, 77))["labels"]
    _, parts = codec("int8").encode({}, p)
    error = (codec("int8").decode(parts) - p).abs().amax(-1)
    assert bool((error <= (p.amax(-1) - p.amin(-1)) / 510 * 1.001).all())
    assert parts["level"].numel() * parts["level"].element_size() == p.numel()


def test_statistics_are_eight_bytes_a_unit() -> None:
    known = forms.Statistics().encode(torch.randn(20, 77))
    assert sum(t.numel() * t.element_size() for t in known.values()) == 20 * 8


@pytest.mark.parametrize("name", sorted(FORMS))
def test_a_hostile_reply_is_no_knowledge(name: str) -> None:
    form = FORMS[name]
    known = form.encode(torch.randn(5, 9))
    for part in known:
        for wrong in (known[part][:3], known[part].double(), known[part][..., None]):
            assert form.wrong({**known, part: wrong}, 5, 9)
    if "index" in known:
        for bad in (known["index"] + 9, torch.zeros_like(known["index"])):
            assert form.wrong({**known, "index": bad}, 5, 9)
    if "best" in known:
        assert form.wrong({**known, "best": known["best"] - 20}, 5, 9)


FEATURES: dict[str, Any] = {"form": "features", "loss": "mse"}

# in the loop ------------------------------------------------------------------------------------


def ran(
    exchange: dict[str, Any] | None = None, task: str = "classification", rounds: int = 1,
    public: dict[str, Any] | None = None, **strategy: Any,
) -> tuple[Any, list[Any]]:  # fmt: skip
    spec = experiment(
        GPT2, task, rounds=rounds, strategy={"kind": "logits", **strategy},
        evaluation={"every": 0}, public={"size": 12, "labelled": True, **(public or {})},
        exchange=exchange or {},
    )  # fmt: skip
    built = build(spec)
    done = finish(built)
    return done.server, built.ledger.rows


def payload(rows: list[Any], *roles: str) -> int:
    return sum(row.payload_bytes for row in rows if row.role in roles)


def test_every_rule_runs_a_round_and_sends_the_same_logits() -> None:
    sent, losses, shared = set(), {}, []
    for rule in KNOWLEDGE:
        server, rows = ran(knowledge=rule, label_share=0.5)
        sent.add(payload(rows, "logit"))
        losses[rule] = payload([r for r in rows if r.step != "eval"], "statistic")
        shared.append(server.shared["model.score.weight"])
    assert len(sent) == 1
    assert losses["least-loss"] == losses["loss"] == 2 * 3 * 12 * 4 and losses["mean"] == 0
    assert not torch.equal(shared[0], shared[-1])


@pytest.mark.parametrize(
    ("form", "bytes_", "roles"),
    [
        ("logits", 24 * 4, ["logit"]), ("labels", 24 * 4, ["logit"]),
        ("statistics", 8, ["logit", "index"]), ("top-k", 5 * 8, ["logit", "index"]),
    ],
)  # fmt: skip
def test_every_form_goes_through_a_round(form: str, bytes_: int, roles: list[str]) -> None:
    _, rows = ran(form=form, top_k=5)
    chosen = 3 * 12 * 8  # rows' numbers down, b1 and b7
    assert payload(rows, *roles) == 2 * 3 * 12 * bytes_ + (chosen if "index" in roles else 0)


def test_all_outputs_as_top_k_teach_what_logits_teach() -> None:
    """k = V loses nothing: of one teacher the tunables are the same but for rounding."""
    whole, _ = ran(form="logits", knowledge="least-loss")
    top, _ = ran(form="top-k", top_k=24, knowledge="least-loss")
    for name, tensor in whole.shared.items():
        assert torch.allclose(tensor, top.shared[name], atol=2e-5)


def test_codecs_carry_every_form() -> None:
    for form, name in (("labels", "int8"), ("top-k", "fp16"), ("top-k", "int8"),
                       ("logits", "lowrank-3"), ("labels", "lowrank-3"),
                       ("statistics", "int8")):  # fmt: skip
        _, rows = ran({"codecs": {"logit": name}}, form=form)
        assert {row.codec for row in rows if row.role == "logit"} == {name}


def test_selective_students_follow_nobody_worse() -> None:
    """K-01 (ii): on a row where nobody's loss is less than its own, a student hears itself."""
    server, _ = ran(
        task="generation", knowledge="least-loss", selective=True, form="top-k", top_k=16,
        label_share=0.9,
    )  # fmt: skip
    assert server.facts["digest_loss"] > 0
    spec = ex.Logits(knowledge="least-loss", selective=True, form="top-k", top_k=4)
    logits = {"": torch.randn(6, 9), "server": torch.randn(6, 9)}
    form = forms.form_of(spec)
    losses = {"": torch.tensor([1.0, 1.0, 1.0]), "server": torch.tensor([2.0, 0.5, 1.0])}
    said = {n: {**form.encode(z), "loss": losses[n]} for n, z in logits.items()}
    rows_ = Examples(np.zeros(9, np.int32), np.array([3, 6, 9]), np.zeros(0, np.int64),
                     np.ones(3, np.int64), np.zeros(0, np.int64))  # fmt: skip
    setup = build(experiment(GPT2, strategy={"kind": "logits"})).strategy.setup  # type: ignore[attr-defined]
    model = build(experiment(GPT2)).model
    strategy = Logits(spec, replace(setup, public=ex.Public(labelled=True)), model, rows_)
    strategy.model = types.SimpleNamespace(outputs=9)  # type: ignore[assignment]
    found = strategy._consensus(said, {"": 1.0, "server": 1.0}, rows_)
    whose = ["", "", "server", "server", "", ""]
    for unit, name in enumerate(whose):
        assert set(found["index"][unit].tolist()) == set(said[name]["index"][unit].tolist())


@pytest.mark.parametrize("per", ["byte", "token"])
@pytest.mark.parametrize("ship", [False, True])
def test_losses_are_those_of_the_rows_text(per: str, ship: bool) -> None:
    """K-01 (i): PD x L x k x 8 and PD x 4 each way, however the clients got the public set."""
    _, rows = ran(
        task="generation", knowledge="least-loss", form="top-k", top_k=6, loss_per=per,
        public={"ship": ship},
    )  # fmt: skip
    units = payload([r for r in rows if r.step == "b3"], "logit") // (3 * 6 * 4)
    assert payload([r for r in rows if r.step == "b3"], "statistic") == 3 * 12 * 4
    assert payload([r for r in rows if r.step == "b3"], "index") == 3 * units * 6 * 4


@pytest.mark.parametrize("knowledge", ["mean", "least-loss"])
def test_the_server_hears_every_cluster(knowledge: str) -> None:
    """``keep`` chooses within clusters, not among them."""
    spec = experiment(GPT2, strategy={"kind": "logits", "clusters": 3, "keep": 1,
                                      "knowledge": knowledge},
                      public={"size": 12, "labelled": True})  # fmt: skip
    strategy = build(spec).strategy
    public = strategy.public.take(np.arange(12))  # type: ignore[attr-defined]
    said = {f"c{k}": {"logits": torch.randn(12, 24), "loss": torch.rand(12)} for k in range(3)}
    taught, whole = strategy._combine(said, dict.fromkeys(said, 1.0), public)  # type: ignore[attr-defined]
    assert all(torch.equal(taught[name]["logits"], said[name]["logits"]) for name in said)
    mean_ = torch.stack([known["logits"] for known in said.values()]).mean(0)
    assert torch.allclose(whole["logits"], mean_, atol=1e-6)


def test_what_one_leaves_out_is_no_veto() -> None:
    """The mean of distributions: an output at 0.9 in one of two top-k lists keeps half of it."""
    form = forms.Top(2)
    sure = torch.tensor([[9.0, 6.0, 0.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 0.0, 0.0, 7.0, 7.0]])
    heard = Voices.of({n: form.decode(form.encode(z), 5) for n, z in (("a", sure), ("b", other))},
                      {"a": 1.0, "b": 1.0})  # fmt: skip
    p = rules.mixed(heard, KNOWLEDGE["uniform"](heard, 1.0)).softmax(-1)
    assert float(p[0, 0]) == pytest.approx(0.4763, abs=1e-3)
    assert float(p[0, 3]) == pytest.approx(0.25, abs=1e-3)


def test_clusters_teach_their_own() -> None:
    """With as many clusters as clients each is taught by itself alone; with one as before."""
    public = {"labelled": False}
    one, _ = ran(clusters=1, server_model=False, public=public)
    own, rows = ran(clusters=3, server_model=False, public=public)
    assert one.facts["digest_loss"] > 1e-3 and abs(own.facts["digest_loss"]) < 1e-6
    assert sum(row.payload_bytes for row in rows if row.role == "logit") == 6 * 12 * 4 * 24


@pytest.mark.parametrize("clusters", [1, 2])
def test_a_server_looks_only_at_what_it_sends(clusters: int) -> None:
    """Where clusters teach their own, b6 would be work for nobody."""
    _, rows = ran(clusters=clusters, public={"labelled": False})
    assert any(row.step == "b5" and row.flops for row in rows)
    assert any(row.step == "b6" and row.flops for row in rows) == (clusters == 1)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"knowledge": "least-loss"}, r"strategy.knowledge = 'least-loss': a loss needs targets"),
        ({"label_share": 0.5}, r"strategy.label_share: only with public.labelled"),
        ({"selective": True}, r"strategy.selective: compares losses"),
        ({"form": "top-k", "loss": "mse"}, r"strategy.loss = 'mse'"),
        ({"form": "top-k", "temperature": 4.0}, r"strategy.temperature = 4: what a top-k leaves"),
        ({"loss": "cosine"}, r"loss = 'cosine': says nothing .* expected 'kl' or 'mse'"),
        ({"form": "features"}, r"loss = 'kl': says nothing .* expected 'mse' or 'cosine'"),
        ({**FEATURES, "knowledge": "confidence"}, r"'confidence': needs distributions"),
        ({**FEATURES, "keep": 1}, r"strategy.keep = 1: needs distributions"),
        ({**FEATURES, "clusters": 2}, r"strategy.clusters = 2: needs distributions"),
        ({**FEATURES, "temperature": 2.0}, r"strategy.temperature = 2: form = 'features' sends"),
        (FEATURES, r"teach the server's model no head"),
        ({"max_entropy": 0.5}, r"strategy.max_entropy: only with knowledge = 'entropy'"),
        ({"knowledge": "entropie"}, r"entropie.*'entropy'"),
        ({"temperature": 0.0}, r"strategy\S*.temperature"),
    ],
)
def test_settings_without_meaning_are_refused(strategy: dict[str, Any], said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        ex.parse({"strategy": {"kind": "logits", **strategy}}, "test", Path.cwd())


# hidden states ----------------------------------------------------------------------------------


def test_hidden_states_disagree_by_no_measure() -> None:
    with pytest.raises(FedllmError, match=r"public.choose = 'disagreement': needs distributions"):
        ran(public={"choose": "disagreement", "rows_per_round": 6}, **FEATURES)


@pytest.mark.parametrize(
    ("codecs", "bytes_", "strategy"),
    [
        ({}, 128 * 4, {}),
        ({}, 128 * 4, {"loss": "cosine", "server_model": False}),
        ({"feature": "fp16"}, 128 * 2, {"loss": "cosine", "label_share": 0.5}),
        ({"feature": "int8"}, 128 + 2 * 4, {}),
        ({"feature": "lowrank-3"}, (12 + 128) * 3 * 4 / 12, {}),
        ({}, 128 * 4, {"knowledge": "least-loss", "selective": True}),
    ],
)  # fmt: skip
def test_hidden_states_are_four_bytes_of_width(
    codecs: dict[str, str], bytes_: float, strategy: dict[str, Any]
) -> None:
    """K-05: PD x d x 4 each way."""
    server, rows = ran({"codecs": codecs}, **{**FEATURES, **strategy})
    sent = [r for r in rows if r.role == "feature"]
    assert sum(r.payload_bytes for r in sent) == 2 * 3 * 12 * bytes_
    assert not payload([r for r in rows if r.step != "eval"], "logit", "parameter")
    assert server.facts["digest_loss"] > 0


def test_what_a_student_knows_already_costs_nothing() -> None:
    known, places = torch.randn(6, 5), torch.tensor([2, 0, 5])
    logits, goals = torch.randn(3, 9), torch.zeros(3, dtype=torch.long)
    for loss in ("mse", "cosine"):
        goal = Distillation(known, 1.0, loss, hidden=True)
        found = goal(logits, goals, places, known[places])
        assert torch.allclose(found, torch.zeros(3), atol=1e-6)
        assert float(goal(logits, goals, places, known[places] + torch.randn(3, 5)).min()) > 0
        wide = torch.randn(5, 7)
        mapped = Distillation(known @ wide, 1.0, loss, hidden=True, projector=wide)
        assert torch.allclose(
            mapped(logits, goals, places, known[places]), torch.zeros(3), atol=1e-5
        )


@given(n=st.integers(1, 30), d=st.integers(1, 12), e=st.integers(1, 12))
def test_the_map_between_widths_is_least_squares(n: int, d: int, e: int) -> None:
    draw = torch.Generator().manual_seed(n)
    f, t = (torch.randn(n, size, generator=draw, dtype=torch.float64) for size in (d, e))
    ridge = forms.RIDGE * (f.T @ f).diagonal().mean()
    above = torch.cat([f, ridge.sqrt() * torch.eye(d, dtype=f.dtype)])
    expected = torch.linalg.lstsq(above, torch.cat([t, t.new_zeros(d, e)])).solution
    assert torch.allclose(forms.projection(f.float(), t.float()).double(), expected, atol=1e-3)


@needs_shared
def test_widths_may_differ_between_server_and_clients_alone() -> None:
    _, rows = ran(**FEATURES, client_models=[LLAMA])
    sent = {step: payload([r for r in rows if r.step == step], "feature") for step in ("b3", "b7")}
    assert sent == {"b3": 3 * 12 * 64 * 4, "b7": 3 * 12 * 128 * 4}
    with pytest.raises(FedllmError, match="of widths 64, 128, which have no mean"):
        ran(**FEATURES, client_models=[LLAMA, GPT2])
    with pytest.raises(FedllmError, match="of width 64, the server's of 128"):
        ran(**FEATURES, client_models=[LLAMA], knowledge="loss", selective=True)


def test_hidden_states_of_text_are_matched_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of features taken chunk by chunk is that of the whole."""
    whole, _ = ran(task="generation", **FEATURES)
    monkeypatch.setattr("fedllm.training.fit.LOGITS", 7000)
    some, _ = ran(task="generation", **FEATURES)
    for name, tensor in whole.shared.items():
        assert torch.allclose(tensor, some.shared[name], atol=1e-5)
    assert any(not torch.equal(t, some.shared[n]) for n, t in whole.shared.items())


# FedMKT across tokenizers -----------------------------------------------------------------------

BABY = shared_model("babyllama-0.9m")
MUTUAL: dict[str, Any] = {
    "kind": "logits", "form": "top-k", "top_k": 16, "knowledge": "least-loss", "selective": True,
    "label_share": 0.9,
}  # fmt: skip


def mutual(models: list[str], server: str = GPT2, **sections: Any) -> ex.Experiment:
    return experiment(
        server, "generation", rounds=2, strategy={**MUTUAL, "client_models": models},
        public={"size": 8, "labelled": True}, evaluation={"every": 0}, **sections,
    )  # fmt: skip


@pytest.mark.parametrize(
    "lie",
    [
        lambda t: {**t, "loss": torch.full_like(t["loss"], -1.0)},
        lambda t: {**t, "loss": torch.full((12,), complex("nan"), dtype=torch.complex64)},
        lambda t: {**t, "logits": torch.full_like(t["logits"], 3e38)},
    ],
    ids=["below zero", "complex", "huge"],
)
def test_a_lie_is_its_tellers_failure(lie: Any) -> None:
    spec = experiment(
        GPT2, strategy={"kind": "logits", "knowledge": "least-loss", "loss": "kl"},
        public={"size": 12, "labelled": True}, exchange={"minimum_replies": 2},
        evaluation={"every": 0},
    )  # fmt: skip
    built = build(spec)
    strategy: Any = built.strategy
    honest = strategy.know

    def lying(site: Any, message: Any) -> Any:
        reply = yield from honest(site, message)
        if site.name == "client-2":
            reply = replace(reply, tensors=lie(reply.tensors))
        return reply

    strategy.tasks = {**strategy.tasks, "know": lying}
    end = finish(built)
    assert all(bool(torch.isfinite(t).all()) for t in end.server.shared.values())
    assert {row.client for row in built.ledger.rows if row.failures} == {"client-2"}


@needs_shared
@pytest.mark.parametrize("server", [GPT2, BABY], ids=["builtin", "babyllama"])
def test_models_with_other_tokenizers_teach_each_other(server: str) -> None:
    """K-01 (v) heterogeneous: knowledge travels in its speaker's tokens, and no weights do."""
    spec = mutual([LLAMA, server, LLAMA], server)
    built = build(spec)
    done = finish(built)
    assert set(built.strategy.setup.interpreters) == {"client-1", "client-3"}  # type: ignore[attr-defined]
    rows = [row for row in built.ledger.rows if row.step != "eval"]
    assert {row.role for row in rows if row.direction in ("up", "down")} <= {
        "logit", "index", "statistic", "header", "measurement",
    }  # fmt: skip
    for client, site in built.worker.sites.items():
        assert site.public is not None
        sent = sum(r.payload_bytes for r in rows if r.client == client and r.step == "b3")
        k = min(16, site.model.outputs)
        assert sent == 2 * (int(site.public.targets.sum()) * k * 8 + len(site.public) * 4)
    before = built.model.initial
    assert any(not torch.equal(t, before[n]) for n, t in done.server.shared.items())


@pytest.mark.parametrize(
    ("models", "clients"),
    [([GPT2], 3), ([], 3), ([], 1)],
    ids=["homogeneous", "same", "one-to-one"],
)
def test_all_modes_run(models: list[str], clients: int) -> None:
    """K-01 (v): equal clients, and one client."""
    spec = mutual(models, simulation={"clients": clients, "examples": 8, "test_examples": 9})
    built = build(spec)
    assert finish(built).server.facts["digest_loss"] > 0
    assert not built.strategy.setup.interpreters  # type: ignore[attr-defined]


@needs_shared
def test_an_interpreter_of_some_rows_is_that_of_all() -> None:
    spec = mutual([LLAMA])
    built = build(spec)
    up, _ = built.strategy.setup.interpreters["client-1"]  # type: ignore[attr-defined]
    site = built.worker.sites["client-1"]
    assert site.public is not None
    units, outputs = int(site.public.targets.sum()), site.model.outputs
    known = forms.Top(6).encode(torch.randn(units, outputs))
    whole = up(known, np.arange(8))
    chosen = np.array([1, 4, 7])
    mine = torch.from_numpy(np.isin(forms.row_of(site.public).numpy(), chosen))
    theirs = torch.from_numpy(np.isin(forms.row_of(built.strategy.public).numpy(), chosen))  # type: ignore[attr-defined]
    some = up({name: tensor[mine] for name, tensor in known.items()}, chosen)
    for name in ("index", "value"):
        assert torch.equal(some[name], whole[name][theirs])
    assert 0 < up.way.share < 1


@needs_shared
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"form": "logits", "selective": False, "knowledge": "mean", "label_share": None},
         r"has another tokenizer .*form = 'top-k'"),
        ({"server_model": False, "selective": False}, r"has another tokenizer .*server_model"),
        ({"knowledge": "mean", "selective": False}, r"has another tokenizer .*'least-loss'"),
        ({"top_k": 4000, "client_models": []}, r"strategy.top_k = 4000: .* has \d+ outputs"),
    ],
)  # fmt: skip
def test_what_no_tokenizer_carries_is_refused(changes: dict[str, Any], said: str) -> None:
    strategy = {**MUTUAL, "client_models": [LLAMA], **changes}
    spec = experiment(
        GPT2, "generation", strategy={k: v for k, v in strategy.items() if v is not None},
        public={"size": 8, "labelled": True},
    )  # fmt: skip
    with pytest.raises(FedllmError, match=said):
        build(spec)
