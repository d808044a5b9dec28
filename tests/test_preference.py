"""Preference tuning (DPO): pairs of responses, against the model as it is at first."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm import experiment as ex
from fedllm import federation
from fedllm.data import builtin
from fedllm.data.examples import Encoder, Examples
from fedllm.errors import FedllmError
from fedllm.federation import Prepared
from fedllm.models.loading import load_tokenizer
from fedllm.planning import plan
from fedllm.report import init
from fedllm.round import Federation
from fedllm.strategies.base import units
from fedllm.training import fit
from fedllm.training.cohort import alone, work
from fedllm.training.evaluate import likelihoods, misfit
from fedllm.training.jobs import Fit
from fedllm.training.learner import Plan, Span
from fedllm.training.meter import Measured, Meter
from fedllm.training.objectives import Preference
from small import build, finish, furthest

CONTRACT = {"prompt": "prompt", "response": "chosen", "rejected": "rejected", "max_tokens": 64}
MEASURED = Measured()  # each shape of a batch is measured once
ROWS = [
    {"prompt": row["text"], "chosen": row["reply"],
     "rejected": " ".join(reversed(row["reply"].split()))}
    for row in builtin.rows("train", 30)
]  # fmt: skip


def pairs(file: Path, **sections: Any) -> ex.Experiment:
    """Two clients with pairs, a fifth of which are held out."""
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {
        "task": {"kind": "preference", "beta": 0.5}, "data": CONTRACT, "public": {},
        "rounds": 2, "training": {"rate": 0.003, "batch_size": 4}, "strategy": {},
        "model": {"name": "builtin#2"}, "tunables": {"kind": "lora", "rank": 2},
        "simulation": {"source": str(file), "clients": 2, "sizes": [15, 10],
                       "test_fraction": 0.4},
    }  # fmt: skip
    return ex.parse({**values, **sections}, "test", Path.cwd())


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ex.Experiment:
    return pairs(tmp_path_factory.mktemp("pairs") / "rows.jsonl")


@pytest.fixture(scope="module")
def prepared(spec: ex.Experiment) -> Prepared:
    return federation.prepare(spec, 0)


def encoder(**changes: Any) -> Encoder:
    data = ex.Data(**{**CONTRACT, **changes})
    return Encoder(load_tokenizer(ex.Model()), ex.Task(kind="preference"), data, (), 128)


def test_a_pair_is_two_rows_with_one_prompt() -> None:
    found = encoder()(ROWS[:5], "test")
    assert len(found) == 10 and found.cases == 5
    assert found.option.tolist() == [0, 1] * 5
    for first in range(0, 10, 2):
        better, other = found.row(first), found.row(first + 1)
        begin = found.start[first]
        assert begin == found.start[first + 1]
        assert better[:begin].tolist() == other[:begin].tolist()
        assert better[begin:].tolist() != other[begin:].tolist()
        assert better[-1] == other[-1] == load_tokenizer(ex.Model()).eos_token_id
    cut = encoder(max_tokens=24)([{**ROWS[0], "prompt": "word " * 50}], "test")
    assert cut.lengths.max() == 24 and cut.start[0] == cut.start[1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"rejected": ROWS[0]["chosen"]}, "row 1: 'chosen' and 'rejected' say the same"),
        ({"rejected": ""}, "row 1: no token in 'rejected'"),
    ],
)
def test_rows_that_teach_nothing_are_refused(row: dict[str, str], said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        encoder()([{**ROWS[0], **row}], "test")


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(["bucket", "longest", "fixed"]))
def test_pairs_stay_in_one_batch(count: int, size: int, padding: Any) -> None:
    sizes = np.arange(2, 2 + 2 * count)
    ones = np.ones(2 * count, np.int64)
    examples = Examples(np.zeros(sizes.sum(), np.int32), np.cumsum(sizes), np.zeros(0, np.int64),
                        ones, ones, option=np.tile([0, 1], count))  # fmt: skip
    plan = Plan(examples, size, padding, 99, ("test",))
    rows = plan.rows(3)
    assert len(rows) == plan.per_pass == -(-count // size)
    assert all(len(batch) <= 2 * size for batch in rows)
    assert all(b == a + 1 and a % 2 == 0 for batch in rows
               for a, b in zip(batch[0::2], batch[1::2], strict=True))  # fmt: skip
    assert sorted(row for batch in rows for row in batch) == list(range(2 * count))
    assert plan.batch(rows[0]).averaged == len(rows[0]) // 2


def fits(built: Federation, steps: int, noise: float) -> tuple[list[Fit], list[float]]:
    """A job for each client, from tunables near the first; and what the first loss should be."""
    jobs, wanted = [], []
    training = built.experiment.training.model_copy(update={"optimizer": "sgd"})
    beta = built.experiment.task.beta
    for site in built.worker.sites.values():
        draw = torch.Generator().manual_seed(3)
        start = {n: t + noise * torch.randn(t.shape, generator=draw)
                 for n, t in site.model.initial.items()}  # fmt: skip
        train, found = site.train, []
        for tunables in (site.model.initial, start):
            scores = alone(likelihoods(site.model, tunables, train, 64, Meter(MEASURED), "a2"))
            found.append(scores[0::2] - scores[1::2])
        reference = torch.from_numpy(found[0])
        wanted.append(float(np.log1p(np.exp(-beta * (found[1] - found[0]))).mean()))
        goal = Preference.of(train, reference, beta, site.model.device)
        plan = site.plan(train, "private", size=99 if steps == 1 else None)
        jobs.append(Fit(site.model, start, plan, goal, training, 0, steps,
                        Span(0, 1), Meter(MEASURED), "a2"))  # fmt: skip
    return jobs, wanted


def test_the_loss_is_dpos(spec: ex.Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against likelihoods of whole rows; ln 2 at first; chunk by chunk; together as alone."""
    built = build(spec)
    for noise in (0.0, 0.05):
        jobs, wanted = fits(built, 1, noise)
        assert wanted == pytest.approx([np.log(2)] * 2) or noise
        assert [result.loss for result in work(jobs)] == pytest.approx(wanted, abs=1e-4)
    jobs, _ = fits(built, 2, 0.05)
    together, single = work(jobs), [work([job])[0] for job in jobs]
    monkeypatch.setattr(fit, "LOGITS", 1 << 15)  # 32 positions at once
    for job, one, other, chunked in zip(jobs, together, single, work(jobs), strict=True):
        assert furthest(one.values, other.values) < 1e-5
        assert furthest(one.values, chunked.values) < 1e-5
        assert furthest(one.values, dict(job.tunables)) > 1e-4
        assert one.loss == pytest.approx(chunked.loss, rel=1e-5)


def test_the_margin_of_held_out_pairs_rises(spec: ex.Experiment, prepared: Prepared) -> None:
    before = federation.untrained(spec, 0, prepared)
    assert before["margin"] == pytest.approx(0, abs=1e-5)
    assert before["loss"] == pytest.approx(np.log(2), abs=1e-5)
    built = build(spec)
    (first, last) = finish(built).history
    assert 0 < first["global"]["margin"] < last["global"]["margin"]
    assert last["global"]["accuracy"] > 0.9 and last["global"]["loss"] < np.log(2)
    each = last["clients"].values()
    assert last["global"]["units"] == sum(one["units"] for one in each) == 10
    for name in ("accuracy", "margin", "loss"):  # sums add up over clients
        mean = sum(one[name] * one["units"] for one in each) / 10
        assert last["global"][name] == pytest.approx(mean)
    for site in built.worker.sites.values():
        rows = [r for r in built.ledger.rows if r.client == site.name and r.step == "a2"]
        assert units(site) == len(site.train) / 2
        # what the reference says is found out once, in the first round
        assert [r.examples for r in rows if r.examples] == [2 * len(site.train), len(site.train)]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"prompt": "p", "response": "c"}}, "data.rejected: preference tuning needs"),
        ({"data": {"rejected": "r"}}, "data.prompt: preference tuning needs"),
        ({"task": {"kind": "generation"}}, "data.rejected: only with task.kind = 'preference'"),
        ({"task": {"kind": "preference", "response_only": False}}, "task.response_only = false"),
        ({"task": {"kind": "preference", "beta": 0.0}}, "task.beta"),
        ({"training": {"sampling": "loss"}}, "training.sampling = 'loss': draws row by row"),
        ({"strategy": {"kind": "logits"}}, "strategy.kind = 'logits': preferences are learnt"),
        ({"strategy": {"kind": "activations"}}, "strategy.kind = 'activations': preferences"),
        ({"strategy": {"kind": "parameters", "mentor": "builtin#2"}}, "strategy.mentor"),
        ({"evaluation": {"rouge_examples": 3}}, "evaluation.rouge_examples"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        pairs(tmp_path / "rows.jsonl", **sections)


def test_a_file_of_pairs_is_recognized(tmp_path: Path, spec: ex.Experiment) -> None:
    data, out = Path(spec.simulation.source), tmp_path / "fedllm.toml"
    out.write_text(init.template(data, out))
    found = ex.load(out)
    assert found.task.kind == "preference"
    assert (found.data.response, found.data.rejected) == ("chosen", "rejected")


def test_a_plan_says_that_it_knows_no_pairs(spec: ex.Experiment) -> None:
    first, *others = plan.look(spec).lines
    assert "what pairs cost is not planned yet" in first.refused
    assert all("preferences are learnt" in line.refused for line in others)


def test_sums_of_pairs_are_looked_at() -> None:
    def sums(**changes: float) -> dict[str, torch.Tensor]:
        found = {"loss": 1.0, "margin": -0.5, "units": 3, "preferred": 2, "tokens": 9, "unknown": 0}
        return {n: torch.tensor([v], dtype=torch.float64 if isinstance(v, float) else torch.int64)
                for n, v in {**found, **changes}.items()}  # fmt: skip

    assert not misfit(sums(), "preference", 0)
    assert "more than all pairs" in misfit(sums(preferred=4), "preference", 0)
    assert "fewer than none" in misfit(sums(preferred=-1), "preference", 0)
