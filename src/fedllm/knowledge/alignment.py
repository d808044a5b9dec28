"""
From one tokenizer's units to another's: dynamic time warping over tokens (FedMKT, 3.3; K-02).

A unit is the prediction of one token from all before it; its knowledge is a distribution of that
token. A target unit may take the knowledge of a source unit only where both predict the same piece
of the text; elsewhere it is shown its own token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from fedllm.data.examples import Examples
from fedllm.errors import FedllmError
from fedllm.flat import Ints
from fedllm.knowledge.pieces import SPECIAL, UNKNOWN, bytes_of, pieces, reader
from fedllm.knowledge.topk import FLOOR, TopK

__all__ = ["Bridge", "align", "bridge", "carry", "costs", "pieces"]

FAR = 1 << 30
REACH = 16  # bytes of text before two tokens that must agree, lest one "the" passes for another
UNITS = 4096  # carried at a time, so that what is sorted stays in the cache


def costs(source: Sequence[str], target: Sequence[str]) -> Ints:
    """Levenshtein distance, in characters, of each source to each target text: [n, m]."""
    from rapidfuzz import process
    from rapidfuzz.distance import Levenshtein

    rows, columns = dict.fromkeys(source), dict.fromkeys(target)
    found = process.cdist(list(rows), list(columns), scorer=Levenshtein.distance, dtype=np.int32)
    row = {text: place for place, text in enumerate(rows)}
    column = {text: place for place, text in enumerate(columns)}
    across = np.fromiter((column[text] for text in target), np.int64, len(target))
    down = np.fromiter((row[text] for text in source), np.int64, len(source))
    distances: Ints = found[down[:, None], across]
    return distances


def align(source: Sequence[str], target: Sequence[str]) -> Ints:
    """
    For each target piece the source piece that is the same piece of the text, or -1: [len(target)].

    Both are all pieces of one text (``pieces``), in order; results rise. Dynamic time warping:
    D(i, j) = c(i, j) + min(D(i-1, j-1), D(i-1, j), D(i, j-1)) with c the Levenshtein distance in
    characters of the two pieces, each without one leading space (a word's start, which WordPiece
    and the first piece of sentencepiece say differently). Of equal ways back, the diagonal first,
    then the source's step. A pair counts if neither of the two is paired with anything else and
    c = 0. The whole matrix is computed, a diagonal at a time: O(n m).
    """
    a = [piece.removeprefix(" ") for piece in source]
    b = [piece.removeprefix(" ") for piece in target]
    if a == b:
        return np.arange(len(b))  # the diagonal costs nothing, and nothing costs less
    result = np.full(len(b), -1, np.int64)
    if a and b:
        cost = costs(a, b)
        rows, columns = _path(cost)
        alone = (np.bincount(rows)[rows] == 1) & (np.bincount(columns)[columns] == 1)
        alone &= cost[rows, columns] == 0
        result[columns[alone]] = rows[alone]
    return result


def _path(cost: Ints) -> tuple[Ints, Ints]:
    """The cheapest way from the first cell to the last: its rows and its columns."""
    n, m = cost.shape
    # cell (i, j) lies in line i + j, so that a line needs only the two before it
    skewed = np.empty((n + m - 1, n), np.int32)
    step = skewed.itemsize
    as_strided(skewed, (n, m), ((n + 1) * step, n * step))[...] = cost
    total = np.full((n + m + 1, n + 1), FAR, np.int32)  # D(i, j) at [i + j + 2, i + 1]
    total[0, 0] = 0
    for line in range(n + m - 1):
        low, high = max(0, line - m + 1), min(n, line + 1)
        best = np.minimum(total[line + 1, low + 1 : high + 1], total[line + 1, low:high])
        np.minimum(best, total[line, low:high], out=best)
        np.add(best, skewed[line, low:high], out=total[line + 2, low + 1 : high + 1])
    i, j = n - 1, m - 1
    rows, columns = [i], [j]
    flat, width = total.ravel(), n + 1
    while i or j:
        here = (i + j) * width + i
        diagonal, up, left = flat[here], flat[here + width], flat[here + width + 1]
        if diagonal <= up and diagonal <= left and i and j:
            i, j = i - 1, j - 1
        elif i and (up <= left or not j):
            i -= 1
        else:
            j -= 1
        rows.append(i)
        columns.append(j)
    return np.array(rows[::-1]), np.array(columns[::-1])


@dataclass(frozen=True, eq=False)
class Bridge:
    """
    What carries knowledge of a public set from a source model to a target model.

    units: for each target unit the source unit whose knowledge it takes, or -1.  own: the token
    that each target unit predicts.  map: source token -> target token.  outputs: of the target.
    Units of a set: the predicted tokens of its first row in order, then of its second, and so on.
    """

    units: Ints
    own: Ints
    map: Ints
    outputs: int

    @property
    def share(self) -> float:
        """Of the target's units, how many take knowledge (0 to 1)."""
        return float((self.units >= 0).mean()) if len(self.units) else 0.0

    def carry(self, known: TopK) -> TopK:
        """Knowledge of the source's units as knowledge of the target's: ``carry``."""
        return carry(known, self.units, self.map, self.own, self.outputs)


def bridge(
    source_tokenizer: Any, target_tokenizer: Any, source: Examples, target: Examples, map: Ints,
    outputs: int,
) -> Bridge:  # fmt: skip
    """
    Align two tokenizations of one public set, row by row.

    map: ``vocabulary_map`` of the two tokenizers.  outputs: of the target model. A target unit
    takes a source unit's knowledge where ``align`` pairs the tokens that they predict, the REACH
    bytes before them agree (spaces apart, as far as both sides know them), and the map turns the
    one into the other: where it does not (capitals that the source does not know, a first word
    whose leading space only one side writes), the knowledge would speak for another token. Letters
    are compared in lower case if one side knows no capitals. Raises FedllmError for sets without
    predicted tokens or of different length, and for a map of another vocabulary.
    """
    for name, rows in (("source", source), ("target", target)):
        if len(rows.start) != len(rows):
            raise FedllmError(f"alignment: the {name}'s public rows predict no tokens")
    if len(source) != len(target):
        raise FedllmError(
            f"alignment: the public set has {len(source)} rows for the source's tokenizer and "
            f"{len(target)} for the target's; a text longer than data.max_tokens becomes several"
        )
    if len(source.flat) and len(map) <= int(source.flat.max()):
        raise FedllmError(
            f"alignment: the vocabulary map covers tokens 0 to {len(map) - 1}, "
            f"the source's public rows hold {int(source.flat.max())}"
        )
    readers = reader(source_tokenizer), reader(target_tokenizer)
    a, b = readers[0].pieces(source.flat), readers[1].pieces(target.flat)
    if readers[0].uncased or readers[1].uncased:
        a, b = [piece.lower() for piece in a], [piece.lower() for piece in b]
    found = np.full(len(b), -1, np.int64)  # for each target token a source token
    for row in range(len(target)):
        last, end = int(source.ends[row]), int(target.ends[row])
        first, begin = last - int(source.lengths[row]), end - int(target.lengths[row])
        paired = _in_place(align(a[first:last], b[begin:end]), a[first:last], b[begin:end])
        found[begin:end] = np.where(paired < 0, -1, paired + first)
    # one more token, which -1 points at and nothing predicts
    numbers, tokens = np.append(_numbers(source), -1), np.append(source.flat, 0)
    wanted = _numbers(target) >= 0
    found = found[wanted]
    own = target.flat[wanted].astype(np.int64)
    sure = (found >= 0) & (map[tokens[found]] == own)
    return Bridge(np.where(sure, numbers[found], -1), own, map, outputs)


def _in_place(paired: Ints, source: Sequence[str], target: Sequence[str]) -> Ints:
    """
    ``paired`` without pairs before which the texts differ.

    The warping weighs distances only and may pair a word with its like some words further on.
    """
    (a, starts), (b, begins) = _letters(source), _letters(target)
    result = np.full_like(paired, -1)
    for column in np.flatnonzero(paired >= 0):
        row = paired[column]
        mine, theirs = _before(a, starts[row]), _before(b, begins[column])
        if mine == theirs:
            result[column] = row
        elif not (mine[1] and theirs[1]):  # one side has read less
            size = min(len(mine[0]), len(theirs[0]))
            if mine[0][len(mine[0]) - size :] == theirs[0][len(theirs[0]) - size :]:
                result[column] = row
    return result


def _letters(parts: Sequence[str]) -> tuple[bytes, list[int]]:
    """The text without spaces, which tokenizers treat differently, and where each piece begins."""
    letters = [b"" if part == SPECIAL else bytes_of("".join(part.split())) for part in parts]
    return b"".join(letters), [0, *accumulate(map(len, letters))]


def _before(text: bytes, end: int) -> tuple[bytes, bool]:
    """What is known of the REACH bytes before ``end``, and whether that is all of them."""
    window = text[max(end - REACH, 0) : end]
    known = window.rpartition(UNKNOWN.encode())[2]
    return known, known == window


def _numbers(examples: Examples) -> Ints:
    """For each token the number of the unit that predicts it; -1: none does."""
    begins = np.repeat(examples.ends - examples.lengths, examples.lengths)
    place = np.arange(examples.tokens) - begins
    predicted = place >= np.repeat(examples.start, examples.lengths)
    return np.where(predicted, np.cumsum(predicted) - 1, -1)


def carry(known: TopK, units: Ints, map: Ints, own: Ints, outputs: int) -> TopK:
    """
    Knowledge of source units over the source's vocabulary -> [len(units), min(k, outputs)].

    units: for each target unit a source unit, or -1.  map: source token -> target token.  own: the
    token that each target unit predicts.  outputs: of the target. Entries that land on one token
    are one entry with their summed probability; the likeliest stays first. Mass is kept, not
    renormalized, so that equal vocabularies change nothing: what was missing is missing still, and
    ``spread`` or ``bucketed_kl`` deals with it. Where entries became fewer, unused tokens follow
    with probability e^FLOOR = 1e-30, so no row names a token twice. A unit without a source (or
    whose source names nothing but outputs beyond the map, which padded embeddings have) gets
    probability 1 on its own token. Raises FedllmError where numbers are out of range.
    """
    if len(units) != len(own):
        raise FedllmError(f"carry: {len(units)} target units, but {len(own)} tokens of their own")
    for what, numbers, low, limit in (
        ("a source unit", units, -1, len(known)), ("the map", map, 0, outputs),
        ("a target's token", own, 0, outputs),
    ):  # fmt: skip
        if len(numbers) and not low <= int(numbers.min()) <= int(numbers.max()) < limit:
            raise FedllmError(
                f"carry: {what} is {int(numbers.min())} to {int(numbers.max())}; "
                f"valid: {low} to {limit - 1}"
            )
    if len(known) and int(known.index.min()) < 0:
        raise FedllmError("carry: the knowledge names a token below 0")
    k = min(known.k, outputs)
    device = known.index.device
    index = torch.empty((len(units), k), dtype=torch.int32, device=device)
    value = torch.empty((len(units), k), device=device)
    table = torch.from_numpy(np.append(map, -1)).to(device)
    for begin in range(0, len(units), UNITS):
        part = slice(begin, begin + UNITS)
        chosen = torch.from_numpy(units[part]).to(device)
        # a unit without a source reads the first one's knowledge, and then has its own instead
        some = known.take(chosen.clamp(min=0)) if len(known) else _nothing(len(chosen), known)
        ids = table[some.index.long().clamp(max=len(map))]
        logs = some.value.double()
        alone = (chosen < 0) | (ids < 0).all(1)
        ids[alone] = -1
        ids[alone, 0] = torch.from_numpy(own[part]).to(device)[alone]
        logs[alone, 0] = 0
        index[part], value[part] = _merged(ids, logs, k)
    return TopK(index, value)


def _nothing(units: int, known: TopK) -> TopK:
    return TopK(known.index.new_zeros(units, known.k), known.value.new_zeros(units, known.k))


def _merged(ids: Tensor, logs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    Entries [n, K] of one token summed, the likeliest first, padded with unused tokens to k.

    ids: -1 for no entry; not more than k different ones in a row.
    """
    n, many = ids.shape
    ordered, order = ids.sort(dim=1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = new.cumsum(1) - 1
    logs = logs.gather(1, order)
    token = torch.full_like(ids, -1).scatter(1, group, ordered)
    most = torch.full_like(logs, -torch.inf).scatter_reduce(1, group, logs, "amax")
    mass = torch.zeros_like(logs).scatter_add(1, group, (logs - most.gather(1, group)).exp())
    total = (mass.log() + most).masked_fill(token < 0, -torch.inf)
    # among equals the one named first stays first
    first = torch.full_like(order, many).scatter_reduce(1, group, order, "amin")
    place = first.argsort(dim=1, stable=True)
    place = place.gather(1, total.gather(1, place).argsort(dim=1, descending=True, stable=True))[
        :, :k
    ]
    token, total = token.gather(1, place), total.gather(1, place)
    # of the tokens 0 to k - 1 at least as many are unused as entries are missing
    used = torch.zeros((n, k + 1), dtype=torch.bool, device=ids.device)
    used.scatter_(1, torch.where((token < 0) | (token > k), k, token), True)
    spare = used[:, :k].byte().argsort(dim=1, stable=True)
    missing = token < 0
    rank = (missing.cumsum(1) - 1).clamp(min=0)
    token = torch.where(missing, spare.gather(1, rank), token)
    return token.int(), total.masked_fill(missing, FLOOR).float()
