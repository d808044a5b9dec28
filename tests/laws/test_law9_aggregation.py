"""Law 9: what every aggregation rule keeps."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.aggregation import RULES
from fedllm.errors import FedllmError
from fedllm.message import Message
from fedllm.training.jobs import Tasked
from small import GPT2, build, experiment, finish

rules = pytest.mark.parametrize("name", sorted(RULES))


def updates(*values: float) -> dict[str, dict[str, Tensor]]:
    return {f"client-{i}": {"w": torch.full((2, 3), v)} for i, v in enumerate(values, 1)}


def equal(found: Mapping[str, object]) -> dict[str, float]:
    return dict.fromkeys(found, 1.0)


@rules
def test_the_mean_of_1_2_3_is_2(name: str) -> None:
    given_ = updates(1.0, 2.0, 3.0)
    assert torch.equal(RULES[name](given_, equal(given_))["w"], torch.full((2, 3), 2.0))


@rules
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6), data=st.data())
def test_the_order_of_clients_changes_nothing(
    name: str, values: list[float], data: st.DataObject
) -> None:
    given_ = updates(*values)
    weights = {c: float(i + 1) for i, c in enumerate(given_)}
    shuffled = {c: given_[c] for c in data.draw(st.permutations(list(given_)))}
    first, second = RULES[name](given_, weights)["w"], RULES[name](shuffled, weights)["w"]
    assert torch.equal(first, second)


@rules
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_client_is_refused_and_named(name: str, bad: float) -> None:
    given_ = updates(1.0, bad, 3.0)
    with pytest.raises(FedllmError, match=r"client-2.*NaN or infinity"):
        RULES[name](given_, equal(given_))


@rules
def test_other_names_and_shapes_are_refused_and_named(name: str) -> None:
    given_ = updates(1.0, 2.0)
    given_["client-2"] = {"w": torch.zeros(5)}
    with pytest.raises(FedllmError, match="client-2"):
        RULES[name](given_, equal(given_))
    given_["client-2"] = {"v": torch.zeros(2, 3)}
    with pytest.raises(FedllmError, match="client-2"):
        RULES[name](given_, equal(given_))


def test_weights_are_kept() -> None:
    given_ = updates(1.0, 4.0)
    found = RULES["mean"](given_, {"client-1": 3.0, "client-2": 1.0})["w"]
    assert torch.allclose(found, torch.full((2, 3), 1.75))


def _poison(built: object, client: str) -> None:
    strategy = built.strategy  # type: ignore[attr-defined]
    honest = strategy.tasks["train"]

    def train(site: object, message: Message) -> Tasked[Message]:
        reply: Message = yield from honest(site, message)
        if site.name == client:  # type: ignore[attr-defined]
            first = next(iter(reply.tensors))
            reply.tensors[first] = reply.tensors[first] * float("nan")
        return reply

    strategy.tasks = {**strategy.tasks, "train": train}


def test_a_client_that_answers_nan_ends_the_run_by_name() -> None:
    built = build(experiment(GPT2))
    _poison(built, "client-2")
    with pytest.raises(FedllmError, match=r"client-2: sent NaN or infinity"):
        finish(built)


def test_or_is_left_out_where_fewer_replies_are_enough() -> None:
    built = build(experiment(GPT2, exchange={"minimum_replies": 2}))
    _poison(built, "client-2")
    end = finish(built)
    assert all(torch.isfinite(t).all() for t in end.server.shared.values())
    failed = [row for row in built.ledger.rows if row.failures]
    assert [(row.client, row.failures) for row in failed] == [("client-2", 1)]
    assert "NaN" in failed[0].reason
