"""Law 2: a model cut anywhere has the gradients of the whole."""

from typing import Any

import pytest
import torch

from fedllm.models.core import Core
from fedllm.models.loading import LanguageModel
from fedllm.training.objectives import cross_entropy
from small import EACH, GPT2, TASKS, build, experiment, final, furthest


def gradients(
    model: LanguageModel, cores: list[Core], batch: Any, tunables: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    params = {n: t.clone().requires_grad_(True) for n, t in tunables.items()}
    inputs = batch.inputs
    for core in cores:
        mine = {n: params[n] for n in model.tunables_of(core)}
        inputs = inputs.after(core.apply_to(mine, inputs))
    loss = cross_entropy(inputs.x, batch.targets, batch.places).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss), {n: p.grad for n, p in params.items() if p.grad is not None}


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_every_cut_has_the_gradients_of_the_whole(name: str, task: str) -> None:
    built = build(experiment(name, task))
    site = built.worker.sites["client-1"]
    model = site.model
    noise = torch.Generator().manual_seed(1)
    tunables = {n: t + 0.02 * torch.randn(t.shape, generator=noise)
                for n, t in model.initial.items()}  # fmt: skip
    batch = next(site.plan(site.train, "private").between(0, 1))
    loss, whole = gradients(model, [model.whole], batch, tunables)
    assert whole.keys() == tunables.keys()
    for cut in range(1, model.blocks):
        for parts in (("client", "server"), ("client", "body", "tail")):
            cores = [model.part(part, cut) for part in parts]
            again, found = gradients(model, cores, batch, tunables)
            assert again == pytest.approx(loss, abs=1e-5)
            assert furthest(found, whole) < 1e-5


@pytest.mark.parametrize("kind", ["adapter", "bitfit", "prompt", "full"])
def test_so_has_every_tunable_that_can_be_cut(kind: str) -> None:
    built = build(experiment(GPT2, tunables={"kind": kind}))
    site = built.worker.sites["client-1"]
    batch = next(site.plan(site.train, "private").between(0, 1))
    model = site.model
    _, whole = gradients(model, [model.whole], batch, model.initial)
    cores = [model.part("client", 2), model.part("server", 2)]
    _, found = gradients(model, cores, batch, model.initial)
    assert furthest(found, whole) < 1e-5


@pytest.mark.parametrize(("name", "task"), EACH)
@pytest.mark.parametrize(("server", "labels"), [
    ("sequential", "server"), ("sequential", "client"), ("per-client", "client"),
    ("concatenated", "server"),
])  # fmt: skip
def test_one_client_under_activations_is_joint_training(
    name: str, task: str, server: str, labels: str
) -> None:
    strategy = {"kind": "activations", "cut": 2, "server": server, "labels": labels}
    one = {"clients": 1, "sizes": [20]}
    training = {"rate": 0.02}  # at 0.1 rounding grows tenfold in three steps
    split = final(experiment(name, task, simulation=one, strategy=strategy, training=training))
    joint = final(experiment(name, task, simulation=one, training=training))
    assert furthest(split, joint) < 1e-5


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_fixed_padding_changes_nothing(task: str, labels: str) -> None:
    strategy = {"kind": "activations", "cut": 2, "server": "concatenated", "labels": labels}
    bucket = final(experiment(GPT2, task, strategy=strategy, training={"batch_size": 100}))
    fixed = final(
        experiment(GPT2, task, strategy=strategy, training={"batch_size": 100, "padding": "fixed"})
    )
    assert furthest(bucket, fixed) < 1e-5


def test_a_client_holds_nothing_of_the_server() -> None:
    model = build(experiment(GPT2)).worker.sites["client-1"].model
    client = {n for n, _ in model.part("client", 2).named_parameters()}
    server = {n for n, _ in model.part("server", 2).named_parameters()}
    assert not client & server
    assert client | server == {n for n, _ in model.whole.named_parameters()}
    assert not any(".h.2." in n or ".h.3." in n or "score" in n for n in client)
    body = {n for n, _ in model.part("body", 2).named_parameters()}
    assert not any("score" in n for n in body)
