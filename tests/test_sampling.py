"""Rows drawn by their losses (S-09): nothing is biased, and a run is as repeatable as any other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm import round
from fedllm.checkpoint import Committed
from fedllm.errors import FedllmError
from fedllm.training.batches import Batch
from fedllm.training.objectives import cross_entropy
from fedllm.training.sampling import chances
from small import GPT2, build, experiment, final, finish, furthest

LOSS = {"sampling": "loss", "rate": 0.02}


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_the_expected_gradient_is_that_of_all_rows(task: str) -> None:
    """By enumeration: every batch of two rows that can be drawn, times its chance."""
    site = build(experiment(GPT2, task, rows=12, training=LOSS)).worker.sites["client-1"]
    rows = len(site.train)
    assert rows == 6
    site.learnt({0: 3.0, 1: 0.1, 2: 0.0, 4: 1.5}, rows)
    plan, model = site.private(), site.model
    assert plan.chances is not None

    def gradient(batch: Batch) -> tuple[float, torch.Tensor]:
        params = {n: t.clone().requires_grad_(True) for n, t in model.initial.items()}
        logits = model.whole.apply_to(params, batch.inputs)
        losses = cross_entropy(logits, batch.targets, batch.places)
        loss = (losses if batch.weights is None else losses * batch.weights).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad.flatten() for p in params.values() if p.grad is not None]
        return float(loss.detach()), torch.cat(grads)

    uniform = site.plan(site.train, "private")
    loss, whole = gradient(uniform.batch(range(rows)))
    expected, mean = torch.zeros_like(whole), 0.0
    for first in range(rows):
        for second in range(rows):
            chance = float(plan.chances[first] * plan.chances[second])
            value, part = gradient(plan.batch([first, second]))
            expected, mean = expected + chance * part, mean + chance * value
    assert mean == pytest.approx(loss, rel=1e-5)
    assert float((expected - whole).abs().max()) < 1e-5
    some = [row for number in range(400) for group in plan.rows(number) for row in group]
    drawn = np.bincount(some, minlength=rows)
    assert drawn / drawn.sum() == pytest.approx(plan.chances, abs=0.04)


def test_no_row_is_given_up() -> None:
    nan = float("nan")
    found = chances(torch.tensor([4.0, 0.0, nan, 2.0]), 0.2)
    assert found == pytest.approx(0.8 * np.array([4, 0, 2, 2]) / 8 + 0.05)
    assert chances(torch.tensor([nan, nan]), 0.1) == pytest.approx(0.5)
    assert chances(torch.tensor([0.0, 0.0]), 0.1) == pytest.approx(0.5)


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_wherever_the_loss_is_training_is_the_same(task: str) -> None:
    """Also cut in two, with labels at the server or at the client; over two rounds."""
    some: dict[str, Any] = {
        "rounds": 2, "training": LOSS, "simulation": {"clients": 1, "sizes": [20]},
    }  # fmt: skip
    whole = final(experiment(GPT2, task, **some))
    for labels in ("server", "client"):
        split = {"kind": "activations", "cut": 2, "labels": labels}
        assert furthest(final(experiment(GPT2, task, strategy=split, **some)), whole) < 1e-5
    uniform = final(experiment(GPT2, task, **{**some, "training": {"rate": 0.02}}))
    assert furthest(uniform, whole) > 1e-4


def test_a_resumed_run_draws_the_same_rows(tmp_path: Path) -> None:
    """What is known of the rows lies in the clients' states."""
    spec = experiment(GPT2, rounds=2, training=LOSS)
    built, commits = build(spec), []
    built.clients.attach(tmp_path)
    end = finish(built, commits.append)
    again = build(spec)
    again.clients.attach(tmp_path)
    first: Committed = commits[0]
    again.clients.restore(first.clients)
    resumed = round.run(again, first, lambda committed: None)
    assert furthest(resumed.server.shared, end.server.shared) == 0
    known = again.worker.sites["client-1"].group("losses")["rows"]
    assert bool((known[~known.isnan()] > 0).all()) and not bool(known.isnan().all())


def test_two_models_of_one_row_are_refused() -> None:
    with pytest.raises(FedllmError, match=r"mentor: .* expected training.sampling = 'uniform'"):
        experiment(GPT2, training=LOSS, strategy={"kind": "parameters", "mentor": GPT2})
