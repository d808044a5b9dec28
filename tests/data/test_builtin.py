import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import fedllm
from fedllm.data.builtin import _DETAILS, INTENTS, SITES, rows

FOLDER = Path(fedllm.__file__).parent / "models" / "builtin"

# A change here means that every figure measured on the built-in data has to be measured anew.
DIGESTS = {
    "train": "7c44956bbee4ab17b22f3e16089eff6d6336733cad2b9215755a54f4b6a943d0",
    "test": "41e15e72f875b717aa9d39d7d43e902578e6c749a2f3a4fabf141f1ddc9580f0",
}


@pytest.mark.parametrize("part", ["train", "test"])
def test_rows_are_the_pinned_ones(part: str) -> None:
    blob = json.dumps(rows(part), sort_keys=True, ensure_ascii=True)
    assert hashlib.sha256(blob.encode()).hexdigest() == DIGESTS[part]


def test_default_sizes_and_columns() -> None:
    train, test, base = rows("train"), rows("test"), rows("pretrain")
    assert (len(train), len(test), len(base)) == (1_800, 600, 40_000)
    for row in [*train, *test, *base]:
        assert list(row) == ["text", "intent", "site", "reply"]
        assert row["intent"] in INTENTS
        assert row["site"] in SITES
        assert 5 <= len(row["text"].split()) <= 25
        assert not set("{}()|") & set(row["text"] + row["reply"])


def test_no_text_occurs_twice() -> None:
    texts = [row["text"] for part in ("train", "test", "pretrain") for row in rows(part)]
    assert len(set(texts)) == len(texts)


def test_parts_stay_disjoint_at_other_sizes() -> None:
    train = {row["text"] for row in rows("train", 6_000)}
    test = {row["text"] for row in rows("test", 3_000)}
    base = {row["text"] for row in rows("pretrain", 6_000)}
    assert not train & test
    assert not base & (train | test)


@pytest.mark.parametrize("part", ["train", "test", "pretrain"])
def test_a_smaller_size_gives_the_first_rows(part: str) -> None:
    assert rows(part, 100) == rows(part, 250)[:100]
    assert rows(part, 0) == []


@pytest.mark.parametrize(("part", "size"), [("valid", 10), ("train", -1)])
def test_bad_arguments_are_refused(part: str, size: int) -> None:
    with pytest.raises(ValueError, match=r"unknown part|negative"):
        rows(part, size)


def test_every_intent_is_in_train_and_test() -> None:
    assert len(set(INTENTS)) == len(INTENTS) >= 24
    assert {row["intent"] for row in rows("train")} == set(INTENTS)
    assert set(Counter(row["intent"] for row in rows("test")).values()) == {600 // len(INTENTS)}


def test_sites_are_uneven_in_size_and_intents() -> None:
    train = rows("train")
    share = [sum(row["site"] == site for row in train) / len(train) for site in SITES]
    assert share == pytest.approx([0.55, 0.30, 0.15], abs=0.03)
    for site in SITES:
        seen = Counter(row["intent"] for row in train if row["site"] == site)
        assert sum(seen[intent] < 5 for intent in INTENTS) >= 6
    spread = Counter(row["site"] for row in rows("test"))
    assert all(150 < spread[site] < 250 for site in SITES)


def test_replies_depend_on_the_intent_and_repeat_a_detail() -> None:
    details = [value for values in _DETAILS.values() for value in values]
    forms: dict[str, set[str]] = {}
    for row in [*rows("train"), *rows("test")]:
        repeated = [d for d in details if d in row["text"] and d in row["reply"]]
        assert repeated, row
        form = row["reply"].replace(max(repeated, key=len), "...")
        forms.setdefault(row["intent"], set()).add(form)
    assert all(len(found) == 1 for found in forms.values())
    assert len(set.union(*forms.values())) == len(INTENTS)


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_the_tokenizer_gives_text_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token == tokenizer.pad_token == tokenizer.bos_token == "<|endoftext|>"
    texts = [row["text"] for row in rows("test", 50)]
    for text in [*texts, "Grüße, 5 € \n\t twice  spaced", "猫 🐈"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_classifier_loads_as_float32_with_a_new_head() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        FOLDER, num_labels=len(INTENTS), local_files_only=True
    )
    assert model.dtype == torch.float32
    assert model.score.weight.shape == (len(INTENTS), model.config.n_embd)


@torch.no_grad()
def test_the_base_model_knows_the_language() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()
    assert model.dtype == torch.float32
    total, count = 0.0, 0
    for row in rows("pretrain", 60):  # the first thousand rows were held out
        ids = tokenizer(f"{row['text']}\n{row['reply']}", return_tensors="pt")["input_ids"]
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert total / count < math.log(len(tokenizer)) / 4
