"""Our step of many optimizers at once is torch's step of each."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm import experiment as ex
from fedllm.training.learner import Learner, advance, rate_factor

SHAPES = {"a": (3, 2), "b": (4,), "c": (2, 2)}


def torchs(training: ex.Training, params: list[torch.Tensor]) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": training.rate, "weight_decay": training.weight_decay}
    if training.optimizer == "sgd":
        return torch.optim.SGD(params, momentum=training.momentum, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optimizer]
    return kind(params, **options)


@settings(max_examples=60, deadline=None)
@given(
    optimizer=st.sampled_from(["sgd", "adam", "adamw"]),
    momentum=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.1]),
    clip=st.sampled_from([None, 0.5, 50.0]),
    clients=st.integers(1, 3),
    broken_off=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_many_steps_are_those_of_torch(
    optimizer: Any, momentum: float, decay: float, clip: float | None, clients: int,
    broken_off: bool, seed: int,
) -> None:  # fmt: skip
    """Also when a client's state is saved and taken up again, and when one leaves out steps."""
    training = ex.Training(
        optimizer=optimizer, momentum=momentum if optimizer == "sgd" else 0.0, weight_decay=decay,
        clip=clip, rate=0.05,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    starts = [
        {n: torch.randn(shape, generator=draw) for n, shape in SHAPES.items()}
        for _ in range(clients)
    ]
    ours = [Learner(start, training) for start in starts]
    theirs = [{n: t.clone().requires_grad_(True) for n, t in start.items()} for start in starts]
    optimizers = [torchs(training, list(params.values())) for params in theirs]
    for number in range(4):
        moving = [i for i in range(clients) if (i + number) % 3 or clients == 1]
        for i in moving:
            for name, parameter in ours[i].params.items():
                if name == "c" and number == 0:
                    continue  # no gradient yet, as LoRA's first factor
                gradient = torch.randn(parameter.shape, generator=draw)
                parameter.grad = gradient.clone()
                theirs[i][name].grad = gradient.clone()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(theirs[i].values(), clip)
            optimizers[i].step()
            optimizers[i].zero_grad(set_to_none=True)
        if moving:
            advance([ours[i] for i in moving], [0.0] * len(moving))
        if broken_off:
            ours = [Learner(one.values(), training, one.state()) for one in ours]
    for one, params in zip(ours, theirs, strict=True):
        for name, tensor in one.values().items():
            assert torch.allclose(tensor, params[name], atol=1e-6)


def test_the_state_has_torchs_names_and_values() -> None:
    start = {"w": torch.ones(2)}
    one = Learner(start, ex.Training())
    w = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.Adam([w])
    for parameter in (one.params["w"], w):
        parameter.grad = torch.tensor([1.0, -2.0])
    one.step(0.0)
    optimizer.step()
    theirs = {f"w|{slot}": value for slot, value in optimizer.state[w].items()}
    assert one.state().keys() == theirs.keys()
    assert all(torch.allclose(one.state()[key], value) for key, value in theirs.items())


def test_each_learner_moves_at_its_own_rate() -> None:
    training = ex.Training(optimizer="sgd", rate=1.0, schedule="linear")
    learners = [Learner({"w": torch.zeros(1)}, training, rate=rate) for rate in (1.0, 3.0)]
    for learner in learners:
        learner.params["w"].grad = torch.ones(1)
    advance(learners, [0.0, 0.5])
    moved = [-float(learner.values()["w"]) for learner in learners]
    assert moved == pytest.approx([1.0, 3.0 * rate_factor(training, 0.5)])
    assert all(learner.params["w"].grad is None for learner in learners)
