"""Clients' states: committed round by round, in memory up to a limit."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm import ledger
from fedllm.errors import FedllmError
from fedllm.ledger import Ledger, Row, total
from fedllm.states import States, sweep, verify

NAMES = st.sampled_from(["a", "b", "c"])
ACTION = st.one_of(
    st.tuples(st.just("put"), NAMES, st.integers(0, 9)),
    st.tuples(st.sampled_from(["commit", "rollback", "get", "save"]), NAMES, st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(actions=st.lists(ACTION, max_size=25), limit=st.sampled_from([0, 20, 10**6]))
def test_they_behave_as_two_dictionaries(
    actions: list[tuple[str, str, int]], limit: int
) -> None:  # fmt: skip
    """Whatever fits into memory; saved and restored in between or not."""
    states = States(limit=limit)
    now: dict[str, int] = {}
    then: dict[str, int] = {}
    for action, client, value in actions:
        if action == "put":
            states.put(client, {"x": torch.full((3,), float(value))})
            now[client] = value
        elif action == "commit":
            states.commit(client)
            if client in now:
                then[client] = now[client]
        elif action == "rollback":
            states.rollback(client)
            now.pop(client, None)
            if client in then:
                now[client] = then[client]
        elif action == "save":
            states.restore(states.save())
            then = dict(now)
        for name in "abc":
            found = states.get(name)
            assert (int(found["x"][0]) if found else None) == now.get(name)


def test_what_does_not_fit_lies_on_disk(tmp_path: Path) -> None:
    states = States(tmp_path, limit=4000)
    for number in range(50):
        states.put(f"client-{number}", {"x": torch.full((250,), float(number))})
    assert len(list(tmp_path.glob("*.safetensors"))) == 46
    assert all(float(states.get(f"client-{n}")["x"][7]) == n for n in range(50))


def test_a_damaged_or_missing_state_is_named(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.put("a", {"x": torch.ones(3)})
    (name,) = states.save().values()
    verify(tmp_path, [name])
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    fresh = States(tmp_path)
    fresh.restore({"a": name})
    with pytest.raises(FedllmError, match="damaged client state"):
        fresh.get("a")
    sweep(tmp_path, [])
    with pytest.raises(FedllmError, match="cannot be read"):
        verify(tmp_path, [name])


def test_a_ledger_of_many_rows_waits_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "OPEN", 5)
    book = Ledger()
    book.attach(tmp_path / "ledger.jsonl", 0)
    for round in (1, 2):
        for number in range(12):
            book.add(Row("run", round, "a1", f"client-{number}", "up", wire_bytes=1))
        assert len(book._open) == 2
        if round == 1:
            book.commit()
        assert [row.client for row in book.rows] == [f"client-{n}" for n in range(12)]
    book.rollback()
    assert total(book.rows, "wire_bytes") == 12
    book.add(Row("run", 2, "a1", "client-0", "up", wire_bytes=5))
    book.commit()
    assert total(book.rows, "wire_bytes") == 17
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.jsonl"]


def test_equal_states_are_held_once_and_a_broken_file_is_written_again(tmp_path: Path) -> None:
    states = States(tmp_path)
    for _ in range(3):
        for number in range(10):
            states.put(f"client-{number}", {"x": torch.ones(100)})
        (name,) = set(states.save().values())
    assert states._held == 400
    (tmp_path / name).write_bytes(b"")
    again = States(tmp_path)
    again.put("a", {"x": torch.ones(100)})
    again.save()
    verify(tmp_path, [name])
