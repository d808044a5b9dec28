"""Law 2: a model cut anywhere has the gradients of the whole."""

from itertools import chain, zip_longest
from typing import Any

import pytest
import torch

from fedllm.errors import FedllmError
from fedllm.models.core import Core, pieces
from fedllm.models.loading import LanguageModel
from fedllm.streams import stream
from fedllm.training.objectives import cross_entropy
from small import EACH, GPT2, TASKS, TYPES, build, experiment, final, furthest


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
    return loss.item(), {n: p.grad for n, p in params.items() if p.grad is not None}


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
        for inside in {0, 1, model.blocks - cut}:
            for home in (False, True):
                cores = in_turn(model, cut, inside, home)
                assert len(cores) == 2 * max(inside, 1) + home
                again, found = gradients(model, cores, batch, tunables)
                assert again == pytest.approx(loss, abs=1e-5)
                assert furthest(found, whole) < 1e-5


def in_turn(model: LanguageModel, cut: int, inside: int, home: bool = False) -> list[Core]:
    """The client's first piece, the server's first, the client's second, ..."""
    sides = pieces(model.blocks, cut, inside, home)
    both = chain.from_iterable(zip_longest(*sides))
    return [model.piece(piece) for piece in both if piece is not None]


@pytest.mark.parametrize("inside", [0, 2])
@pytest.mark.parametrize("kind", ["adapter", "bitfit", "prompt", "sparse", "full"])
def test_so_has_every_tunable_that_can_be_cut(kind: str, inside: int) -> None:
    built = build(experiment(GPT2, tunables={"kind": kind}))
    site = built.worker.sites["client-1"]
    batch = next(site.plan(site.train, "private").between(0, 1))
    model = site.model
    _, whole = gradients(model, [model.whole], batch, model.initial)
    _, found = gradients(model, in_turn(model, 2, inside), batch, model.initial)
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
    body = {n for n, _ in model.part("body", 4, 2).named_parameters()}
    assert not any("score" in n for n in body)


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("name", [TYPES[0], TYPES[2]])
def test_clients_of_several_cuts_with_a_server_half_each_are_plain_averaging(
    name: str, labels: str
) -> None:
    """Each trains the whole model on its own rows, wherever it is cut."""
    named: dict[str, Any] = {"client-1": 1, "client-3": 3}  # client-2: half of the blocks
    cut = [1, 2, 3] if labels == "server" else named
    strategy = {"kind": "activations", "cut": cut, "server": "per-client", "labels": labels}
    some = {"rounds": 2, "training": {"rate": 0.02}}
    split = final(experiment(name, strategy=strategy, **some))
    assert furthest(split, final(experiment(name, **some))) < 1e-5


def test_one_server_half_for_several_cuts_is_what_each_client_would_see() -> None:
    """SplitFed V2 by hand: a client's own blocks, above them the server's as they are by then."""
    spec = experiment(
        GPT2, training={"batch_size": 100, "rate": 0.05},
        strategy={"kind": "activations", "cut": [1, 3, 2]},
    )  # fmt: skip
    built = build(spec)
    model, cuts = built.model, {"client-1": 1, "client-2": 3, "client-3": 2}
    at_client = {
        client: set(model.initial) - set(model.tunables_of(model.part("server", cut)))
        for client, cut in cuts.items()
    }
    server, copies, weights = dict(model.initial), {}, {}
    order = stream(0, "server", 1).permutation(3)
    for client in [sorted(cuts)[i] for i in order]:
        site = built.worker.sites[client]
        batch = next(site.plan(site.train, "private").between(0, 1))
        seen = {n: model.initial[n] if n in at_client[client] else t for n, t in server.items()}
        _, grads = gradients(model, [model.whole], batch, seen)
        stepped = {n: t - 0.05 * grads[n] for n, t in seen.items()}
        copies[client], weights[client] = stepped, len(site.train)
        server |= {n: t for n, t in stepped.items() if n not in at_client[client]}
    whole = {
        n: sum(w * (copies[c] if n in at_client[c] else server)[n] for c, w in weights.items())
        / sum(weights.values())
        for n in server
    }  # fmt: skip
    assert furthest(final(spec), whole) < 1e-5


@pytest.mark.parametrize(("changes", "said"), [
    ({"cut": [1, 2], "server": "concatenated"}, r"'concatenated': .* blocks \[1, 2\]; expected"),
    ({"cut": [1, 2], "average_every": 1}, r"average_every = 1: .* expected 0, or one"),
    ({"cut": [1, 4]}, r"strategy.cut = 4: the model has 4 blocks; expected 1 to 3"),
    ({"cut": {"klient-1": 1}}, r"strategy.cut.klient-1: no such client; .*'client-1'"),
])  # fmt: skip
def test_several_cuts_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        build(experiment(GPT2, strategy={"kind": "activations", **changes}))


@pytest.mark.parametrize("cut", [-1, [], "half", {"a": "b"}, 1.5])
def test_what_is_no_cut_is_refused(cut: Any) -> None:
    with pytest.raises(FedllmError, match=r"strategy.*cut.*expected a number of blocks, a list"):
        experiment(GPT2, strategy={"kind": "activations", "cut": cut})
