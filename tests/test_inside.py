"""Blocks that are split inside (S-04): attention at the client, feed-forward at the server."""

from typing import Any

import pytest
import torch

from fedllm.errors import FedllmError
from fedllm.ledger import total
from fedllm.message import Message, Role
from fedllm.strategies.activations import GRAD, H, _like
from shared import needs_shared
from small import BERT, GPT2, LLAMA, build, experiment, final, finish, furthest

INSIDE: dict[str, Any] = {"kind": "activations", "cut": 1, "inside": 2}
QUIET = {"evaluation": {"every": 0}}
BOTH = {"kind": "adapter", "width": 4}  # tunables in both halves of a block


@pytest.mark.parametrize(("name", "task", "server", "labels"), [
    pytest.param(LLAMA, "generation", "concatenated", "client", id="llama",
                 marks=needs_shared),
    pytest.param(BERT, "classification", "sequential", "server", id="bert",
                 marks=needs_shared),
])  # fmt: skip
def test_one_client_is_joint_training(name: str, task: str, server: str, labels: str) -> None:
    """Gradients of every family and every cut: ``laws/test_law2_cut.py``."""
    some: dict[str, Any] = {
        "simulation": {"clients": 1, "sizes": [20]}, "tunables": BOTH, "training": {"rate": 0.02},
        **QUIET,
    }  # fmt: skip
    strategy = {**INSIDE, "server": server, "labels": labels}
    split = final(experiment(name, task, strategy=strategy, **some))
    assert furthest(split, final(experiment(name, task, **some))) < 1e-5


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_server_side_each_is_plain_averaging(labels: str) -> None:
    """Whatever the cuts, also with what optimizers remember; rows are padded."""
    some: dict[str, Any] = {
        "rounds": 2, "tunables": BOTH,
        "training": {"rate": 0.01, "momentum": 0.9, "optimizer_state": "keep"}, **QUIET,
    }  # fmt: skip
    split = {**INSIDE, "cut": [1, 2, 1], "server": "per-client", "labels": labels}
    assert furthest(final(experiment(GPT2, strategy=split, **some)),
                    final(experiment(GPT2, **some))) < 1e-5  # fmt: skip


def test_clients_side_by_side_draw_what_each_would_alone() -> None:
    some: dict[str, Any] = {
        "strategy": {**INSIDE, "server": "per-client"},
        "tunables": {"kind": "lora", "rank": 2, "dropout": 0.2, "targets": ["c_attn", "c_fc"]},
        **QUIET,
    }  # fmt: skip
    alone = {"cohort": 1, "sizes": [12, 8, 4]}
    ends = [final(experiment(GPT2, simulation=one, **some)) for one in ({}, alone)]
    assert furthest(*ends) < 1e-5


def test_one_step_on_all_batches_is_that_of_an_ordinary_cut() -> None:
    """A server that joins the clients' gradients on the way: with plain SGD it is one model's."""
    some: dict[str, Any] = {
        "tunables": BOTH, "training": {"batch_size": 100, "rate": 0.05}, **QUIET,
    }  # fmt: skip
    ends = [
        final(experiment(GPT2, strategy={**INSIDE, "inside": n, "server": "concatenated"}, **some))
        for n in (0, 3)
    ]
    assert furthest(*ends) < 1e-5


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("inside", [1, 3])
def test_hidden_states_cross_twice_for_each_split_block(inside: int, labels: str) -> None:
    """Of the last way down nothing crosses where the server goes on above."""
    strategy = {**INSIDE, "inside": inside, "labels": labels}
    built = build(experiment(GPT2, strategy=strategy, **QUIET))
    finish(built)
    rows = [row for row in built.ledger.rows if row.step != "eval"]
    home = labels == "client"
    for name, site in built.worker.sites.items():
        batches = -(-len(site.train) // 8)
        hidden = site.train.tokens * site.model.width * 4

        def crossed(role: str, direction: str, name: str = name) -> float:
            return total(rows, "payload_bytes", client=name, direction=direction, role=role)

        up, down = crossed("activation", "up"), crossed("activation", "down")
        assert (up, down) == (inside * hidden, (inside - 1 + home) * hidden)
        assert up + down == (2 * inside - (not home)) * hidden
        assert crossed("gradient", "down") == up  # what went up has its gradient go down
        assert crossed("gradient", "up") == down
        sent = [total(rows, "frames", client=name, step=s, direction="up") for s in ("c2", "c5")]
        assert sent == [inside * batches, inside * batches]


def test_attention_lies_at_the_client_and_feed_forward_at_the_server() -> None:
    built = build(experiment(GPT2, tunables=BOTH, strategy=INSIDE))
    split: Any = built.strategy
    mine, there = split._names(1), split._there(1)
    assert mine | set(there) == set(built.model.initial) and not mine & set(there)
    for name in built.model.initial:
        block = int(name.split(".h.")[1].split(".")[0]) if ".h." in name else 9
        assert (name in mine) == (block < 1 or (block < 3 and ".attn." in name))


@pytest.mark.parametrize(("name", "shape", "good"), [
    (GRAD, (3, 2), True), (GRAD, (2, 2), False), (H, (3, 2), False),
])  # fmt: skip
def test_replies_of_other_tokens_are_refused(name: str, shape: tuple[int, ...], good: bool) -> None:
    """Between the first and the last crossing a reply has the shape of what it answers."""
    asked = Message("c4", tensors={GRAD: torch.zeros(3, 2)}, roles={GRAD: Role.GRADIENT})
    reply = Message(
        "c5", tensors={name: torch.zeros(shape)}, roles={name: Role.GRADIENT}, client="a"
    )
    assert (_like({"a": asked}, GRAD, GRAD)(reply) == "") is good


def test_half_of_the_blocks_need_not_do_where_all_clients_have_cuts_of_their_own() -> None:
    """Of 4 blocks 3 can be split above a cut at 1, which is every client's here."""
    built = build(experiment(GPT2, strategy={**INSIDE, "inside": 3, "cut": [1, 1, 1]}))
    split: Any = built.strategy
    assert split._cuts(list(built.worker.sites)) == dict.fromkeys(built.worker.sites, 1)
    with pytest.raises(FedllmError, match="2 of them below the cut"):  # who has none has half
        build(experiment(GPT2, strategy={**INSIDE, "inside": 3, "cut": {"client-1": 1}}))


@pytest.mark.parametrize(("changes", "said"), [
    ({"inside": 4}, r"strategy.inside = 4: the model has 4 blocks, 1 of them below .* 0 to 3"),
    ({"cut": [1, 3]}, r"strategy.inside = 2: .* 3 of them below the cut; expected 0 to 1"),
    ({"cut": "auto"}, r"inside = 2: cut = 'auto' chooses between blocks; expected 0, or a cut"),
    ({"keep_tokens": 0.5}, r"inside = 2: .* keep_tokens = 0.5 .* expected 0, or keep_tokens = 1"),
])  # fmt: skip
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        build(experiment(GPT2, strategy={**INSIDE, **changes}))
