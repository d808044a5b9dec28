import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm import experiment as ex
from fedllm import federation
from fedllm.data import sources
from fedllm.data.clients import ClientData, Clients
from fedllm.data.examples import EMPTY, Encoder, Examples, join, packed
from fedllm.data.partition import by_column, dirichlet, even, iid
from fedllm.errors import FedllmError
from fedllm.models.loading import load_tokenizer
from fedllm.training.batches import collate
from shared import data, needs_shared
from small import LLAMA, experiment

GENERATION = ex.Task(kind="generation")


@given(rows=st.integers(1, 300), clients=st.integers(1, 9), seed=st.integers(0, 9))
def test_iid_deals_every_row_once(rows: int, clients: int, seed: int) -> None:
    sizes = even(rows, clients)
    parts = iid(rows, sizes, np.random.default_rng(seed))
    assert [len(part) for part in parts] == sizes
    assert sorted(row for part in parts for row in part) == list(range(rows))


@given(
    labels=st.lists(st.sampled_from("abcde"), min_size=9, max_size=200),
    clients=st.integers(1, 6), alpha=st.floats(0.01, 100), seed=st.integers(0, 9),
)  # fmt: skip
def test_dirichlet_leaves_nobody_out_and_loses_nothing(
    labels: list[str], clients: int, alpha: float, seed: int
) -> None:
    parts = dirichlet(labels, clients, alpha, np.random.default_rng(seed))
    assert all(parts)
    assert sorted(row for part in parts for row in part) == list(range(len(labels)))


def test_a_small_alpha_means_skew() -> None:
    labels = [f"{i % 10}" for i in range(2000)]

    def kinds(alpha: float) -> float:
        parts = dirichlet(labels, 4, alpha, np.random.default_rng(0))
        shares = [max(np.bincount([int(labels[r]) for r in p])) / len(p) for p in parts]
        return float(np.mean(shares))

    assert kinds(0.05) > 0.3 > 0.15 > kinds(100.0)


def test_by_column_takes_the_largest() -> None:
    parts = by_column(list("aabbbc"), 2)
    assert parts == {"b": [2, 3, 4], "a": [0, 1]}
    with pytest.raises(FedllmError, match="only 3 values"):
        by_column(list("aabbbc"), 4)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_files_are_read_as_strings(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], ['a, "b"\nc', "1"], ["ü", "2"]])
    else:
        path.write_text('{"text": "a, \\"b\\"\\nc", "label": 1}\n{"text": "ü", "label": 2}\n')
    assert sources.read(str(path)) == [
        {"text": 'a, "b"\nc', "label": "1"}, {"text": "ü", "label": "2"}
    ]  # fmt: skip


def test_a_dialogue_is_read_by_speaker(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text("First Citizen:\nSpeak.\nSpeak, I say.\n\nAll:\nNo: we will not.\n")
    assert sources.read(str(path)) == [
        {"speaker": "First Citizen", "text": "Speak.\nSpeak, I say."},
        {"speaker": "All", "text": "No: we will not."},
    ]


@needs_shared
def test_real_sources() -> None:
    banking = sources.read(data("banking77/train.csv"))
    assert len(banking) == 10_003
    assert len({row["category"] for row in banking}) == 77
    assert len(sources.read(data("gsm8k/test.jsonl"))) == 1_319
    speakers = {row["speaker"] for row in sources.read(data("tinyshakespeare/input.txt"))}
    assert {"ROMEO", "JULIET", "First Citizen"} <= speakers


@given(text=st.text(min_size=1, max_size=300), size=st.integers(4, 40))
def test_windows_predict_every_token_once_and_count_every_byte(text: str, size: int) -> None:
    tokenizer = _tokenizer()
    encode = Encoder(tokenizer, GENERATION, ex.Data(max_tokens=size), (), 128)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not whole:
        return
    found = encode([{"text": text}], "test")
    predicted = [int(t) for i, s in enumerate(found.start) for t in found.row(i)[s:]]
    assert predicted == whole
    assert max(found.lengths) <= size
    assert int(found.utf8.sum()) == len(text.encode())


def _tokenizer(cache: list[object] = []) -> object:  # noqa: B006
    if not cache:
        cache.append(load_tokenizer(ex.Model()))
    return cache[0]


def test_loss_is_on_the_response_only() -> None:
    tokenizer = _tokenizer()
    contract = ex.Data(prompt="q", response="a", max_tokens=64)
    row = {"q": "where is my parcel", "a": "it is on its way"}
    found = Encoder(tokenizer, GENERATION, contract, (), 128)([row], "test")
    answer = tokenizer.decode(found.row(0)[found.start[0] :], skip_special_tokens=True)  # type: ignore[attr-defined]
    assert answer == row["a"]
    assert int(found.utf8[0]) == len(row["a"])
    all_of_it = ex.Task(kind="generation", response_only=False)
    assert Encoder(tokenizer, all_of_it, contract, (), 128)([row], "test").start[0] == 1


def test_a_chat_template_is_used() -> None:
    tokenizer = load_tokenizer(ex.Model())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    contract = ex.Data(prompt="q", response="a", max_tokens=64)
    task = ex.Task(kind="generation", chat_template=True)
    found = Encoder(tokenizer, task, contract, (), 128)([{"q": "hello", "a": "bye"}], "test")
    text = tokenizer.decode(found.row(0))
    assert text.startswith("user: hello\nassistant: bye")
    assert tokenizer.decode(found.row(0)[found.start[0] :]).startswith("bye")


def test_a_long_prompt_loses_its_beginning_not_the_answer() -> None:
    contract = ex.Data(prompt="q", response="a", max_tokens=24)
    row = {"q": "word " * 100, "a": "yes indeed"}
    found = Encoder(_tokenizer(), GENERATION, contract, (), 128)([row], "test")
    assert len(found.row(0)) <= 24
    kept = _tokenizer().decode(found.row(0)[found.start[0] :], skip_special_tokens=True)  # type: ignore[attr-defined]
    assert kept == row["a"]


@st.composite
def sets(draw: st.DrawFn) -> tuple[list[list[int]], Examples]:
    """Rows of tokens, and the same with what generation needs besides."""
    rows = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1))
    start = [draw(st.integers(0, len(row) - 1)) + 1 for row in rows]
    texts = tuple(str(row) for row in rows)
    extra = (EMPTY, np.array(start), np.arange(len(rows)), texts, texts, 0)
    return rows, Examples(*packed(rows), *extra, prompt_lengths=tuple(start))


@given(made=sets(), data=st.data(), pad_to=st.none() | st.integers(1, 9))
def test_a_batch_holds_what_its_rows_do(made: Any, data: Any, pad_to: int | None) -> None:
    """Against a loop over rows and tokens."""
    ids, examples = made
    rows = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=5))
    batch = collate(examples, rows, pad_to)
    length = max([len(ids[row]) for row in rows] + [pad_to or 0])
    assert batch.inputs.x.tolist() == [t for r in rows for t in (ids[r] + [0] * length)[:length]]
    spans = [(i, row, range(examples.start[row], len(ids[row]))) for i, row in enumerate(rows)]
    assert batch.targets.tolist() == [ids[row][k] for _, row, span in spans for k in span]
    assert batch.inputs.select is not None
    assert batch.inputs.select.tolist() == [i * length + k - 1 for i, _, s in spans for k in s]
    before = [sum(len(ids[j]) - examples.start[j] for j in range(row)) for row in rows]
    expected = [
        b + k for b, (_, _, span) in zip(before, spans, strict=True) for k in range(len(span))
    ]
    assert batch.places.tolist() == expected
    assert batch.inputs.packed == all(len(ids[row]) == length for row in rows)


def same(one: Examples, other: Examples) -> bool:
    arrays = ("flat", "ends", "labels", "start", "utf8", "lengths", "targets")
    rest = ("prompts", "responses", "prompt_lengths", "unknown", "tokens", "content")
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in arrays) and all(
        getattr(one, n) == getattr(other, n) for n in rest
    )


@given(made=st.lists(st.tuples(sets(), sets()), min_size=1, max_size=4), block=st.integers(1, 3))
def test_what_is_cut_out_of_a_pool_is_what_was_put_in(made: Any, block: int) -> None:
    put = {f"c{i}": ClientData(train, test) for i, ((_, train), (_, test)) in enumerate(made)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedllm.data.clients.BLOCK", block)
        pool = Clients.of(put.items())
    assert list(pool) == list(put)
    for name, mine in pool.items():
        assert same(mine.train, put[name].train)
        assert same(mine.test, put[name].test)
        assert np.shares_memory(mine.train.flat, pool.train.flat)
    rows = [tuple(row) for ((ids, _), _) in made for row in ids]
    assert [tuple(pool.train.row(i).tolist()) for i in range(len(pool.train))] == rows
    some = range(0, len(rows), 2)
    assert same(pool.train.take(some), join([pool.train.part(i, i + 1) for i in some]))


def test_hidden_labels_are_not_there() -> None:
    prepared = federation.prepare(experiment(), 0)
    assert prepared.public is not None
    assert set(prepared.public.labels.tolist()) == {-1}
    assert prepared.public_labelled is None
    shown = federation.prepare(experiment(public={"size": 12, "labelled": True}), 0)
    assert shown.public is not None
    assert min(shown.public.labels) >= 0


def test_the_division_depends_on_the_seed_alone() -> None:
    def division(seed: int) -> list[list[int]]:
        found = federation.prepare(experiment(), seed)
        return [data.train.labels.tolist() for data in found.clients.values()]

    assert division(0) == division(0)
    assert division(0) != division(1)


def test_validation_is_cut_from_training_rows() -> None:
    spec = experiment(simulation={"validation": 0.25}, evaluation={"on": "validation"})
    found = federation.prepare(spec, 0)
    assert [(len(d.train), len(d.test)) for d in found.clients.values()] == [
        (9, 3), (6, 2), (3, 1)
    ]  # fmt: skip


@needs_shared
def test_unknown_tokens_are_said() -> None:
    from shared import model

    spec = experiment(model("babyllama-0.9m"), "generation", public={"size": 0},
                      data={"text": "text"})  # fmt: skip
    spec = spec.replace(
        data=ex.Data(max_tokens=64),
        simulation=ex.Simulation(
            source=data("tinyshakespeare/input.txt"), format="dialogue", clients=2, examples=20,
            partition=ex.ByColumn(column="speaker"),
        ),
    )  # fmt: skip
    notes = federation.prepare(spec, 0).notes
    assert any("unknown to this tokenizer" in note for note in notes)
    quiet = federation.prepare(spec.replace(model=ex.Model(name=LLAMA)), 0).notes
    assert not any("unknown to this tokenizer" in note for note in quiet)


def test_labels_are_shuffled_among_the_training_rows_of_who_is_named() -> None:
    def rows(shuffled: dict[str, float]) -> Clients:
        spec = experiment(rows=90, simulation={"shuffled": shuffled})
        return federation.prepare(spec, 0).clients

    plain, half = rows({}), rows({"client-2": 0.5})
    assert np.array_equal(plain.train.flat, half.train.flat)
    for name in plain:
        before, after = plain[name].train.labels, half[name].train.labels
        assert np.array_equal(plain[name].test.labels, half[name].test.labels)
        assert sorted(before) == sorted(after)
        changed = int((before != after).sum())
        assert 0 < changed <= round(0.5 * len(before)) if name == "client-2" else not changed
    with pytest.raises(FedllmError, match=r"simulation.shuffled.client-9: no such client"):
        rows({"client-9": 1.0})
    with pytest.raises(FedllmError, match=r"simulation.shuffled: only with task.kind = 'class"):
        experiment(task="generation", simulation={"shuffled": {"client-1": 1.0}})
