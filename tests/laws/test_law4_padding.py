"""Law 4: batches without padding give the loss and the gradient of padded ones."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.training.batches import collate, order
from fedllm.training.objectives import cross_entropy
from small import TASKS, build, experiment, furthest


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_padding_changes_nothing(name: str, task: str) -> None:
    site = build(experiment(name, task)).worker.sites["client-1"]
    model = site.model

    def found(pad_to: int | None, rows: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
        params = {n: t.clone().requires_grad_(True) for n, t in model.initial.items()}
        batch = collate(site.train, rows, pad_to)
        logits = model.whole.apply_to(params, batch.inputs)
        loss = cross_entropy(logits, batch.targets, batch.places).mean()
        loss.backward()
        # LoRA's A has no gradient before B moves
        return float(loss), {n: p.grad for n, p in params.items() if p.grad is not None}

    rows = list(range(6))
    loss, gradient = found(None, rows)
    padded_loss, padded = found(90, rows)
    assert padded_loss == pytest.approx(loss, abs=1e-5)
    assert furthest(padded, gradient) < 1e-5
    one_by_one = [found(None, [row]) for row in rows]  # no padding at all
    weights = np.array([int(site.train.targets[row]) for row in rows], float)
    weights /= weights.sum()
    mean = sum(w * loss for w, (loss, _) in zip(weights, one_by_one, strict=True))
    assert mean == pytest.approx(loss, abs=1e-5)


@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=200),
    size=st.integers(1, 40),
    padding=st.sampled_from(["bucket", "longest", "fixed"]),
    seed=st.integers(0, 99),
)
def test_every_row_comes_once_an_epoch(
    lengths: list[int], size: int, padding: str, seed: int
) -> None:
    batches = order(lengths, size, padding, np.random.default_rng(seed))  # type: ignore[arg-type]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) <= size for batch in batches)
    assert len(batches) == -(-len(lengths) // size)
    assert batches == order(lengths, size, padding, np.random.default_rng(seed))  # type: ignore[arg-type]


def test_buckets_waste_little() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / 14, 1600).clip(3, 80)

    def waste(padding: str) -> float:
        batches = order(lengths, 16, padding, np.random.default_rng(1))  # type: ignore[arg-type]
        return sum(max(lengths[b]) * len(b) for b in batches) / lengths.sum()

    assert waste("bucket") < 1.15 < 2 < waste("longest")
