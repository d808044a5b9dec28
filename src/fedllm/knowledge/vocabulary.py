"""From each token of one vocabulary to the likest of another (FedMKT, 3.3 and appendix: MinED)."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedllm.errors import FedllmError
from fedllm.flat import Ints
from fedllm.knowledge.pieces import BYTE, UNKNOWN, bytes_of, folded, reader

VERSION = 1  # of the rule; another one finds no cached map of this one
# What a special token may become, best first; a token of several roles is taken by the first. What
# ends a text comes first, as GPT-2's one special token is predicted only there.
ROLES = {
    "eos": ("eos", "sep", "bos", "cls", "pad"),
    "bos": ("bos", "cls", "eos", "sep", "pad"),
    "sep": ("sep", "eos", "bos", "cls", "pad"),
    "cls": ("cls", "bos", "eos", "sep", "pad"),
    "pad": ("pad", "eos", "sep", "bos", "cls"),
    "mask": ("mask",),
    "unk": ("unk",),
}
CELLS = 1 << 21  # distances held at a time


@dataclass(frozen=True, eq=False)
class Lexicon:
    """A vocabulary by number. tokens: as written.  texts: as meant.  roles: name -> number."""

    tokens: list[str]
    texts: list[bytes]
    special: frozenset[int]
    roles: dict[str, int]
    uncased: bool

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        texts = [text.hex() for text in self.texts]
        whole = [self.tokens, texts, sorted(self.special), sorted(self.roles.items()), self.uncased]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    @property
    def plain(self) -> Ints:
        """Tokens that stand for text, in order."""
        found = (i for i, text in enumerate(self.texts) if text and i not in self.special)
        return np.fromiter(found, np.int64)


def lexicon(tokenizer: Any) -> Lexicon:
    """The vocabulary of a tokenizer that transformers loads; raises FedllmError without any."""
    read = reader(tokenizer)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if not vocabulary:
        raise FedllmError(f"{type(tokenizer).__name__}: the tokenizer has no vocabulary")
    tokens = [""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        tokens[number] = token
    roles = {}
    for role in ROLES:
        held = read.unknown if role == "unk" else getattr(tokenizer, f"{role}_token_id", None)
        if held is not None and 0 <= held < len(tokens):
            roles[role] = int(held)
    texts = [read.raw(number, token) for number, token in enumerate(tokens)]
    return Lexicon(tokens, texts, read.special, roles, read.uncased)


def vocabulary_map(source: Any, target: Any, cache: Path | None = None) -> Ints:
    """
    For each token of ``source`` the token of ``target`` that comes closest: [source vocabulary].

    A token becomes itself where the target has it, text compared (word starts, bytes), else its
    lower or upper case, else itself with or without the word's start, else the one of least edit
    distance over UTF-8 bytes (lower case, if one side is uncased); of several the one whose length
    differs least, then the lowest number. Special tokens become the target's of the same meaning
    (an unknown one U+FFFD where the target knows no unknown). No other token becomes a special one.

    cache: a folder that keeps the map under a hash of both vocabularies; a damaged file is computed
    anew. Raises FedllmError where a tokenizer has no vocabulary or the folder cannot be written.
    """
    mine, theirs = lexicon(source), lexicon(target)
    if cache is None:
        return nearest_tokens(mine, theirs)
    key = hashlib.sha256(f"{VERSION} {mine.digest} {theirs.digest}".encode()).hexdigest()
    path = cache / f"vocabulary-{key[:32]}.safetensors"
    found = _read(path, len(mine.tokens), len(theirs.tokens))
    if found is None:
        found = nearest_tokens(mine, theirs)
        _write(path, found)
    return found


def nearest_tokens(source: Lexicon, target: Lexicon) -> Ints:
    """``vocabulary_map`` of two vocabularies, computed."""
    if source.tokens == target.tokens and source.texts == target.texts:
        return np.arange(len(source.tokens))
    plain = target.plain
    if not len(plain):
        raise FedllmError("the target tokenizer has no token that stands for text")
    # <0x41> and A may both be there: text is written with the latter
    order = sorted(plain.tolist(), key=lambda i: (bool(BYTE.fullmatch(target.tokens[i])), i))
    same: dict[bytes, int] = {}
    lower: dict[bytes, int] = {}
    for number in order:
        same.setdefault(target.texts[number], number)
        lower.setdefault(folded(target.texts[number]), number)
    literal = {token: number for number, token in enumerate(target.tokens) if token}
    result = np.full(len(source.tokens), -1, np.int64)
    left: list[int] = []
    wanted: list[bytes] = []
    for number, token in enumerate(source.tokens):
        text, twin = source.texts[number], literal.get(token, -1)
        if number in source.special:
            result[number] = _special(number, source, target, literal)
            if number == source.roles.get("unk"):
                text = bytes_of(UNKNOWN)
        elif twin >= 0 and twin not in target.special and target.texts[twin] == text:
            result[number] = twin
        if result[number] < 0:
            result[number] = _same(text, same, lower)
        if result[number] < 0:
            left.append(number)
            wanted.append(text)
    texts = [target.texts[number] for number in plain]
    if source.uncased or target.uncased:
        wanted, texts = [folded(text) for text in wanted], [folded(text) for text in texts]
    result[left] = plain[least_distance(wanted, texts)]
    return result


def _same(text: bytes, same: dict[bytes, int], lower: dict[bytes, int]) -> int:
    """The token of this text but for case, then but for a word's start; -1: none."""
    other = text.removeprefix(b" ") if text.startswith(b" ") else b" " + text
    for found in (
        same.get(text),
        lower.get(folded(text)),
        same.get(other),
        lower.get(folded(other)),
    ):
        if found is not None:
            return found
    return -1


def _special(number: int, source: Lexicon, target: Lexicon, literal: dict[str, int]) -> int:
    """The special token of the same meaning; -1: none."""
    for role, choices in ROLES.items():
        if source.roles.get(role) == number:
            found = [target.roles[choice] for choice in choices if choice in target.roles]
            if found:
                return found[0]
    twin = literal.get(source.tokens[number], -1)
    return twin if twin in target.special else -1


def least_distance(texts: Sequence[bytes], candidates: Sequence[bytes]) -> Ints:
    """
    For each text the place of the candidate of least edit distance over bytes: [texts].

    Of several the one whose length differs least, then the first. Candidates whose length alone
    puts them beyond the limit are not looked at; the limit doubles until all texts have found one.
    """
    from rapidfuzz import process
    from rapidfuzz.distance import Levenshtein

    unique = sorted(set(texts), key=lambda text: (len(text), text))
    lengths = np.fromiter(map(len, candidates), np.int64)
    order = np.argsort(lengths, kind="stable")  # one length after another, each in first order
    ends = lengths[order]
    letters = [candidates[place].decode("latin-1") for place in order]
    found: dict[bytes, int] = {}
    limit = 1
    while unique:
        missed = []
        for length, group in _by_length(unique):
            begin, end = np.searchsorted(ends, (length - limit, length + limit + 1))
            if begin == end:
                missed += group
                continue
            gaps = np.abs(ends[begin:end] - length)
            rank = np.argsort(np.argsort(gaps * len(order) + order[begin:end]))
            size = max(1, CELLS // int(end - begin))
            for place in range(0, len(group), size):
                part = group[place : place + size]
                distances = process.cdist(
                    [text.decode("latin-1") for text in part], letters[begin:end],
                    scorer=Levenshtein.distance, score_cutoff=limit, dtype=np.uint16,
                )  # fmt: skip
                best = (distances * np.int64(len(order)) + rank).argmin(1)
                for text, row, column in zip(part, distances, best, strict=True):
                    if row[column] <= limit:
                        found[text] = int(order[begin + column])
                    else:
                        missed.append(text)
        unique, limit = missed, limit * 2
    return np.fromiter((found[text] for text in texts), np.int64, len(texts))


def _by_length(texts: Iterable[bytes]) -> list[tuple[int, list[bytes]]]:
    groups: dict[int, list[bytes]] = {}
    for text in texts:
        groups.setdefault(len(text), []).append(text)
    return sorted(groups.items())


def _sum(values: Ints) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def _read(path: Path, size: int, outputs: int) -> Ints | None:
    """The map in a file; None where there is none, or a damaged one."""
    try:
        with safe_open(path, "np") as file:
            values = np.asarray(file.get_tensor("map"))
            whole = (file.metadata() or {}).get("sha256") == _sum(values)
    except (OSError, SafetensorError, ValueError, TypeError):
        return None
    fits = values.dtype == np.int64 and values.shape == (size,)
    return (
        values if whole and fits and size and 0 <= values.min() <= values.max() < outputs else None
    )


def _write(path: Path, values: Ints) -> None:
    """Atomically: whoever reads meanwhile sees the whole file or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".vocabulary-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(save({"map": values}, metadata={"sha256": _sum(values)}))
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise FedllmError(
            f"{path.parent}: the vocabulary map cannot be kept there ({error.strerror}); "
            "name a folder that can be written"
        ) from None
