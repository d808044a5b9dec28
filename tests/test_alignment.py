from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from fedllm import experiment as ex
from fedllm.data.examples import EMPTY, NOTHING, Examples, packed
from fedllm.errors import FedllmError
from fedllm.flat import Ints
from fedllm.knowledge import vocabulary
from fedllm.knowledge.alignment import Bridge, align, bridge, carry, costs, pieces
from fedllm.knowledge.pieces import SPECIAL, UNKNOWN, bytes_of
from fedllm.knowledge.topk import TopK, bucketed_kl, check, kept, spread, top
from fedllm.knowledge.vocabulary import least_distance, lexicon, vocabulary_map
from fedllm.models.loading import load_tokenizer
from shared import model, needs_shared

REAL = ("minilm-l6-22m", "babyllama-0.9m", "stories-260k", "gpt2-tokenizer")
LOADED: dict[str, Any] = {}
MAPS: dict[tuple[str, str], Ints] = {}
# emoji, CJK, newlines and combining marks come up often enough only if they are asked for
LETTERS = st.one_of(
    st.characters(codec="utf-8"), st.sampled_from("aabetTH  .,\n\té\u0301日本😀👩‍🚀ß")
)
TEXT = st.text(LETTERS, min_size=1, max_size=60)
WORDS = st.lists(
    st.sampled_from(["the", "cat", "Sat", "a", ".", "naïve", ",", "hello", "World", "日本", "7"]),
    min_size=1, max_size=20,
).map(" ".join)  # fmt: skip
real_text = given(text=st.one_of(TEXT, WORDS))
few = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


def tokenizer(name: str) -> Any:
    if name not in LOADED:
        where = {} if name == "builtin" else {"name": model(name)}
        LOADED[name] = load_tokenizer(ex.Model(**where))
    return LOADED[name]


def mapped(source: str, target: str) -> Ints:
    if (source, target) not in MAPS:
        MAPS[source, target] = vocabulary_map(tokenizer(source), tokenizer(target))
    return MAPS[source, target]


def encoded(name: str, *texts: str) -> Examples:
    """Rows as the project makes them of a public set: a start token where there is one."""
    one = tokenizer(name)
    start = [t for t in (one.bos_token_id, one.eos_token_id) if t is not None][:1]
    rows = [start + list(one(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return Examples(*packed(rows), EMPTY, EMPTY, EMPTY).without_labels()


def joined(source: str, target: str, *texts: str) -> tuple[Bridge, Examples, Examples]:
    a, b = encoded(source, *texts), encoded(target, *texts)
    one, other = tokenizer(source), tokenizer(target)
    return bridge(one, other, a, b, mapped(source, target), len(other)), a, b


def drawn(units: int, outputs: int, k: int, seed: int = 0) -> TopK:
    return top(3 * torch.randn(units, outputs, generator=torch.manual_seed(seed)), k)


# the built-in tokenizer with itself, and all pairs where the real ones are
NAMES = ("builtin", *REAL)
every = pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(a, b, marks=() if a == b == "builtin" else needs_shared, id=f"{a}-{b}")
        for a in NAMES
        for b in NAMES
    ],
)


# top-k ------------------------------------------------------------------------------------------


@given(n=st.integers(0, 5), outputs=st.integers(1, 30), k=st.integers(1, 30), rest=st.booleans())
def test_spread_sums_to_one_and_keeps_what_was_known(
    n: int, outputs: int, k: int, rest: bool
) -> None:
    k = min(k, outputs)
    logits = 4 * torch.randn(n, outputs, generator=torch.manual_seed(k))
    known = top(logits, k)
    check(known, outputs, "nobody")
    dense = spread(known, outputs, "uniform" if rest else "renormalize")
    assert dense.shape == logits.shape and bool(torch.isfinite(dense).all())
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones(n))
    assert bool((dense.argmax(-1) == known.index[:, 0]).all())
    if k == outputs:
        torch.testing.assert_close(dense, logits.log_softmax(-1), atol=1e-5, rtol=1e-5)
    elif rest:
        torch.testing.assert_close(dense.gather(1, known.index.long()), known.value)
    else:
        shares = known.value.exp() / kept(known)[:, None]
        torch.testing.assert_close(dense.exp().gather(1, known.index.long()), shares)


def test_a_bucketed_kl_is_that_of_the_grouped_events() -> None:
    teacher, student = torch.randn(6, 20), torch.randn(6, 20, requires_grad=True)
    known = top(teacher, 4)
    p = torch.cat([known.value.exp(), 1 - kept(known)[:, None]], 1)
    q = student.softmax(-1).gather(1, known.index.long())
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], 1)
    torch.testing.assert_close(bucketed_kl(student, known), (p * (p / q).log()).sum(-1))
    full = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(bucketed_kl(student, top(teacher, 20)), full)
    bucketed_kl(student, known).sum().backward()
    assert student.grad is not None and bool(torch.isfinite(student.grad).all())


def test_a_sure_teacher_costs_a_finite_amount() -> None:
    sure = torch.zeros(1, 9)
    sure[0, 3] = 500
    student = torch.zeros(1, 9, requires_grad=True)
    for k in (1, 2, 9):
        loss = bucketed_kl(student, top(sure, k)).sum()
        loss.backward()
        assert loss.item() == pytest.approx(np.log(9), abs=1e-5)
    assert student.grad is not None and bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_beyond_the_outputs_is_refused(k: int) -> None:
    with pytest.raises(FedllmError, match=f"k = {k}: this model has 5 outputs; valid: 1 to 5"):
        top(torch.zeros(2, 5), k)


def test_what_is_no_knowledge_is_refused() -> None:
    good = drawn(3, 9, 4)
    index, value = good.index, good.value
    for wrong, says in (
        (TopK(index + 6, value), "0 to 8"), (TopK(index - 9, value), "0 to 8"),
        (TopK(index, value * torch.nan), "NaN"), (TopK(index, value + 9), "more than 1"),
        (TopK(index * 0, value), "twice"),
    ):  # fmt: skip
        with pytest.raises(FedllmError, match=f"of hospital-2: .*{says}"):
            check(wrong, 9, "hospital-2")
    with pytest.raises(FedllmError, match="expected int32 and float32"):
        TopK(index.long(), value)
    with pytest.raises(FedllmError, match="expected int32 and float32"):
        TopK(index, value[:, :2])
    with pytest.raises(FedllmError, match="indices below 3"):
        spread(good, 3, "uniform")
    with pytest.raises(FedllmError, match="bucketed_kl"):
        spread(good, 9, "bucket")  # type: ignore[arg-type]


# the vocabularies -------------------------------------------------------------------------------


@every
def test_each_token_becomes_a_valid_one(source: str, target: str) -> None:
    found, mine, theirs = mapped(source, target), tokenizer(source), tokenizer(target)
    assert found.dtype == np.int64 and found.shape == (len(mine),)
    assert 0 <= found.min() <= found.max() < len(theirs)
    if source == target:
        assert (found == np.arange(len(found))).all()
    a, b = lexicon(mine), lexicon(theirs)
    held = {text for number, text in enumerate(b.texts) if number not in b.special}
    for number, text in enumerate(a.texts):
        if number not in a.special:
            assert int(found[number]) not in b.special
            assert text not in held or b.texts[found[number]] == text
    for role, wanted in (("bos", ("bos", "cls")), ("eos", ("eos", "sep")), ("sep", ("sep", "eos"))):
        if role in a.roles and a.roles["eos" if "eos" in a.roles else role] != a.roles.get("bos"):
            assert found[a.roles[role]] in [b.roles[name] for name in wanted if name in b.roles]


@needs_shared
def test_what_a_token_stands_for_decides() -> None:
    mini, gpt2, llama = "minilm-l6-22m", "gpt2-tokenizer", "stories-260k"

    def to(source: str, token: str, target: str) -> str:
        number = tokenizer(source).convert_tokens_to_ids(token)
        return str(tokenizer(target).convert_ids_to_tokens(int(mapped(source, target)[number])))

    assert to(mini, "house", gpt2) == "Ġhouse" and to(mini, "##ing", gpt2) == "ing"
    assert to(mini, ",", gpt2) == "," and to(mini, "winston", gpt2) == "ĠWinston"
    assert to(gpt2, "ĠHouse", mini) == "house" and to(gpt2, "ing", mini) == "##ing"
    assert to(llama, "<0x0A>", gpt2) == "Ċ" and to(gpt2, "Ċ", llama) == "<0x0A>"
    assert to(llama, "▁very", gpt2) == "Ġvery" and to(llama, "▁very", mini) == "very"
    assert to(llama, "é", gpt2) == "Ã©"
    assert to(llama, "</s>", gpt2) == to(llama, "<s>", gpt2) == "<|endoftext|>"
    assert to(llama, "<unk>", gpt2) == "ï¿½"  # U+FFFD; never the end of the text
    assert to(llama, "<unk>", mini) == "[UNK]" and to(gpt2, "<|endoftext|>", llama) == "</s>"


TOKEN = st.binary(min_size=1, max_size=7) | st.text("abc ", min_size=1, max_size=9).map(str.encode)


@given(texts=st.lists(TOKEN, max_size=6), candidates=st.lists(TOKEN, min_size=1, max_size=12))
def test_least_distance_is_that_of_a_full_search(
    texts: list[bytes], candidates: list[bytes]
) -> None:
    def rank(text: bytes, place: int) -> tuple[int, int, int]:
        other = candidates[place]
        return Levenshtein.distance(text, other), abs(len(text) - len(other)), place

    slow = [min(range(len(candidates)), key=lambda place: rank(text, place)) for text in texts]
    assert least_distance(texts, candidates).tolist() == slow


@needs_shared
def test_the_map_is_kept_and_a_damaged_one_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = tokenizer("stories-260k"), tokenizer("babyllama-0.9m")
    calls = []
    compute = vocabulary.nearest_tokens
    monkeypatch.setattr(
        vocabulary, "nearest_tokens", lambda *both: calls.append(1) or compute(*both)
    )
    folder = tmp_path / "maps"
    first = vocabulary_map(a, b, folder)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    assert (vocabulary_map(a, b, folder) == first).all() and len(calls) == 1
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    at = whole.index(b"sha256")
    nothing = b"" + whole[:9] + b"?" + whole[10:]
    for damaged in (
        b"",
        whole[:-8],
        bytes(flipped),
        whole[:at] + b"SHA" + whole[at + 3 :],
        nothing,
    ):
        path.write_bytes(damaged)
        calls.clear()
        assert (vocabulary_map(a, b, folder) == first).all() and len(calls) == 1
        assert path.read_bytes() == whole
    vocabulary_map(b, a, folder)
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(FedllmError, match="cannot be kept"):
        vocabulary_map(a, b, path / "below a file")


# two tokenizations of one text ------------------------------------------------------------------


def slow_path(cost: Ints) -> list[tuple[int, int]]:
    """FATE-LLM's way: the whole matrix, then back by the diagonal, the source, the target."""
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    for i in range(n):
        for j in range(m):
            total[i + 1, j + 1] = cost[i, j] + min(total[i, j + 1], total[i + 1, j], total[i, j])
    total = total[1:, 1:]
    i, j, path = n - 1, m - 1, [(n - 1, m - 1)]
    while i > 0 or j > 0:
        options = [
            total[i - 1, j - 1] if i > 0 and j > 0 else np.inf,
            total[i - 1, j] if i > 0 else np.inf,
            total[i, j - 1] if j > 0 else np.inf,
        ]
        move = int(np.argmin(options))
        i, j = i - (move != 2), j - (move != 1)
        path.append((i, j))
    return path


def slow_align(source: list[str], target: list[str]) -> list[int]:
    result = [-1] * len(target)
    if not source or not target:
        return result
    a = [s[1:] if s.startswith(" ") else s for s in source]
    b = [t[1:] if t.startswith(" ") else t for t in target]
    path = slow_path(np.array([[Levenshtein.distance(s, t) for t in b] for s in a]))
    for i, j in path:
        alone = sum(i == row for row, _ in path) == sum(j == column for _, column in path) == 1
        if alone and a[i] == b[j]:
            result[j] = i
    return result


PIECES = st.lists(st.text("ab ", max_size=4), max_size=14)


@settings(max_examples=300)
@given(source=PIECES, target=PIECES)
@example(source=[" a"], target=["a"])
@example(source=["a", "a"], target=["a"])
def test_the_fast_alignment_is_the_slow_one(source: list[str], target: list[str]) -> None:
    assert align(source, target).tolist() == slow_align(source, target)


@given(text=st.text("ab c", max_size=20), data=st.data())
def test_any_two_ways_to_cut_a_text_align_in_order(text: str, data: st.DataObject) -> None:
    def cut() -> list[str]:
        places = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
        return [text[a:b] for a, b in pairwise(places)]

    a, b = cut(), cut()
    found = align(a, b)
    assert found.tolist() == slow_align(a, b)
    used = found[found >= 0]
    assert (np.diff(used) > 0).all()
    assert align(a, a).tolist() == list(range(len(a)))


def test_costs_are_edit_distances() -> None:
    a, b = ["kitten", "", "kitten", "\udce6"], ["sitting", "kitten", "日"]
    assert costs(a, b).tolist() == [[Levenshtein.distance(s, t) for t in b] for s in a]


@pytest.mark.parametrize(
    "name", ["builtin", *(pytest.param(name, marks=needs_shared) for name in REAL)]
)
@few
@real_text
def test_pieces_are_the_text(name: str, text: str) -> None:
    one = tokenizer(name)
    found = pieces(one, one(text, add_special_tokens=False)["input_ids"])
    assert len(found) == len(one(text, add_special_tokens=False)["input_ids"])
    whole = "".join(found)
    if name in ("builtin", "gpt2-tokenizer"):
        assert bytes_of(whole).decode() == text
    elif name == "stories-260k" and UNKNOWN not in whole and SPECIAL not in whole:
        assert bytes_of(whole).decode() == " " + text
    elif name == "minilm-l6-22m":
        assert whole == whole.lower() or UNKNOWN in whole or not whole.lower().islower()


@needs_shared
def test_pieces_of_every_kind() -> None:
    assert pieces(tokenizer("minilm-l6-22m"), [101, 100, 2160, 2075, 1010]) == [
        SPECIAL, UNKNOWN, " house", "ing", ","
    ]  # fmt: skip
    gpt2 = tokenizer("gpt2-tokenizer")
    assert pieces(gpt2, gpt2("A house😀\n")["input_ids"]) == [
        "A",
        " house",
        "\udcf0\udc9f\udc98",
        "\udc80",
        "\n",
    ]


# units ------------------------------------------------------------------------------------------


@every
@few
@real_text
def test_every_target_unit_gets_a_distribution(source: str, target: str, text: str) -> None:
    joint, a, b = joined(source, target, text, "the cat sat on a mat.")
    outputs = len(tokenizer(target))
    # a text may leave no token at all: MiniLM drops what it takes for control characters
    known = drawn(int(a.targets.clip(0).sum()), len(tokenizer(source)), 20)
    found = joint.carry(known)
    assert found.index.shape == (int(b.targets.clip(0).sum()), 20)
    check(found, outputs, source)
    tail = joint.units < 0
    assert (found.index[tail, 0].numpy() == joint.own[tail]).all()
    torch.testing.assert_close(kept(found)[tail], torch.ones(int(tail.sum())))
    dense = spread(found, outputs, "uniform")
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones(len(dense)))
    # of what is paired: in order, each once, saying of the source's token what the target's is
    paired = joint.units[~tail]
    assert (np.diff(paired) > 0).all()
    tokens = np.concatenate([a.row(row)[1:] for row in range(len(a))])
    assert (mapped(source, target)[tokens[paired]] == joint.own[~tail]).all()
    # and its mass is what the source knew
    torch.testing.assert_close(kept(found)[~tail], kept(known)[paired])
    if source == target:
        assert not tail.any()
        assert torch.equal(found.index, known.index)
        torch.testing.assert_close(found.value, known.value, atol=1e-6, rtol=0)


@every
@few
@given(text=WORDS)
def test_shared_tokens_keep_the_arg_max_both_ways(source: str, target: str, text: str) -> None:
    there, a, _ = joined(source, target, text)
    back, _, _ = joined(target, source, text)
    tokens = torch.from_numpy(a.row(0)[1:])
    logits = torch.zeros(len(tokens), len(tokenizer(source)))
    logits[torch.arange(len(tokens)), tokens] = 12  # the source is right about each token
    known = top(logits, 30)
    carried = there.carry(known)
    assert (carried.index[:, 0].numpy() == there.own).all()
    again = back.carry(carried)
    assert (again.index[:, 0] == tokens).all()


@needs_shared
def test_units_are_numbered_from_the_first_predicted_token() -> None:
    """A row's start is where its predictions begin: tokens before it are nobody's units."""
    texts = ["the cat sat on the mat", "a bird sings in the tree"]
    names = ("stories-260k", "gpt2-tokenizer")
    whole, a, b = joined(*names, *texts)
    later = [replace(a, start=np.array([4, 2])), replace(b, start=np.array([2, 3]))]
    part = bridge(*map(tokenizer, names), *later, mapped(*names), 50257)
    numbers = []  # of the units that remain: how the whole set counts them
    for rows, full in zip(later, (a, b), strict=True):
        places = np.cumsum(np.concatenate([[0], full.targets[:-1]]))
        each = zip(places, full.targets, rows.start, strict=True)
        numbers.append(np.concatenate([at + np.arange(start - 1, n) for at, n, start in each]))
    renumbered = {int(old): new for new, old in enumerate(numbers[0])}
    assert (part.own == whole.own[numbers[1]]).all()
    assert part.units.tolist() == [renumbered.get(int(u), -1) for u in whole.units[numbers[1]]]
    assert 0 < part.share < 1 and len(part.units) == int(later[1].targets.sum())


@needs_shared
def test_words_that_both_know_meet() -> None:
    text = "He said that the little house was near the big tree."
    joint, a, _ = joined("stories-260k", "gpt2-tokenizer", text)
    assert 0.3 < joint.share < 1
    joint, a, _ = joined("minilm-l6-22m", "gpt2-tokenizer", text.lower())
    assert joint.share > 0.8
    # knowledge of the token after " the": the source's row for " little" goes where " little" is
    place = list(a.row(0)).index(tokenizer("minilm-l6-22m").convert_tokens_to_ids("little"))
    little = tokenizer("gpt2-tokenizer").convert_tokens_to_ids("Ġlittle")
    assert joint.units[list(joint.own).index(little)] == place - 1


@needs_shared
def test_a_word_does_not_pass_for_its_like() -> None:
    """Where the warping alone would pair two "the" at different places of the text."""
    texts = [
        "on to sends global the for model data global the trains with",
        "server with the the the sends the",
    ]
    joint, a, b = joined("stories-260k", "gpt2-tokenizer", *texts)
    for row in range(2):
        mine = "".join(pieces(tokenizer("stories-260k"), a.row(row)[1:])).replace(" ", "")
        assert mine == texts[row].replace(" ", "")
    starts = []
    for name, rows in (("stories-260k", a), ("gpt2-tokenizer", b)):
        found = []
        for row in range(2):
            parts = [p.replace(" ", "") for p in pieces(tokenizer(name), rows.row(row)[1:])]
            found += [(row, len("".join(parts[:place]))) for place in range(len(parts))]
        starts.append(found)
    paired = [(starts[0][i], starts[1][j]) for j, i in enumerate(joint.units) if i >= 0]
    assert paired and all(mine == theirs for mine, theirs in paired)


def slow_carry(known: TopK, units: Ints, map: Ints, own: Ints) -> list[dict[int, float]]:
    found = []
    for unit, token in zip(units, own, strict=True):
        one: dict[int, float] = {}
        if unit >= 0:
            for index, value in zip(known.index[unit], known.value[unit], strict=True):
                if index < len(map):
                    to = int(map[index])
                    one[to] = one.get(to, 0.0) + float(value.double().exp())
        found.append(one or {int(token): 1.0})
    return found


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 6), m=st.integers(0, 8), source=st.integers(1, 12), target=st.integers(1, 12),
    k=st.integers(1, 12), lacking=st.integers(0, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_carrying_is_summing_over_the_map(
    n: int, m: int, source: int, target: int, k: int, lacking: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    known = drawn(n, source + lacking, min(k, source + lacking), seed)
    units = rng.integers(-1, n, m) if n else np.full(m, -1)
    map, own = rng.integers(0, target, source), rng.integers(0, target, m)
    found = carry(known, units, map, own, target)
    check(found, target, "nobody")
    assert found.k == min(known.k, target) and len(found) == m
    for row, wanted in enumerate(slow_carry(known, units, map, own)):
        got = dict(zip(found.index[row].tolist(), found.value[row].exp().tolist(), strict=True))
        assert {i: p for i, p in got.items() if p > 1e-29} == pytest.approx(wanted, rel=1e-5)
        assert int(found.index[row, 0]) == max(wanted, key=lambda i: (wanted[i], got[i]))


def test_equal_vocabularies_change_nothing() -> None:
    known = drawn(9000, 50, 50)
    steps = np.arange(9000)
    found = carry(known, steps, np.arange(50), steps % 50, 50)
    assert torch.equal(found.index, known.index)
    torch.testing.assert_close(found.value, known.value, atol=1e-6, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    known, map, own = drawn(3, 5, 2), np.arange(5), np.arange(2)
    for arguments, says in (
        ((known, np.array([0, 3]), map, own, 9), "a source unit is 0 to 3; valid: -1 to 2"),
        ((known, np.array([0, 1]), map, own, 4), "the map is 0 to 4; valid: 0 to 3"),
        ((known, np.array([0, 1]), map, own + 8, 9), "a target's token is 8 to 9"),
        ((known, np.array([0]), map, own, 9), "1 target units, but 2 tokens"),
    ):
        with pytest.raises(FedllmError, match=says):
            carry(*arguments)
    one = tokenizer("builtin")
    same = np.arange(len(one))
    two, three = encoded("builtin", "a b", "c d"), encoded("builtin", "a", "b", "c")
    with pytest.raises(FedllmError, match="2 rows for the source's tokenizer and 3"):
        bridge(one, one, two, three, same, len(one))
    with pytest.raises(FedllmError, match="the vocabulary map covers tokens 0 to 2"):
        bridge(one, one, two, two, same[:3], len(one))
    labelled = Examples(two.flat, two.ends, np.zeros(2, np.int64), EMPTY, EMPTY)
    with pytest.raises(FedllmError, match="source's public rows predict no tokens"):
        bridge(one, one, labelled, two, same, len(one))
    assert not len(bridge(one, one, NOTHING, NOTHING, same, len(one)).units)
    bare = Examples(*packed([[], []]), EMPTY, EMPTY, EMPTY).without_labels()
    assert (bridge(one, one, bare, two, same, len(one)).units == -1).all()
    assert not len(bridge(one, one, two, bare, same, len(one)).units)
