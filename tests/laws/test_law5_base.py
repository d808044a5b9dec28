"""Law 5: the base is bit-identical after a run."""

import pytest

from small import TYPES, build, experiment, finish

STRATEGIES = ["parameters", "logits", "activations"]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", STRATEGIES)
def test_the_base_is_bit_identical_after_a_run(name: str, kind: str) -> None:
    built = build(experiment(name, strategy={"kind": kind}, tunables={"dropout": 0.1}))
    model = built.worker.sites["client-1"].model
    before = model.hash_base()
    start = built.strategy.start().shared
    end = finish(built)
    assert model.hash_base() == before
    assert any((end.server.shared[n] != start[n]).any() for n in start)


def test_the_hash_sees_a_changed_weight() -> None:
    model = build(experiment()).worker.sites["client-1"].model
    before = model.hash_base()
    weight = next(p for n, p in model.whole.named_parameters() if n not in model.initial)
    weight.data.view(-1)[0] += 1e-6 + abs(float(weight.data.view(-1)[0])) * 1e-6
    assert model.hash_base() != before
