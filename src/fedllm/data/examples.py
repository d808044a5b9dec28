"""Tokenized examples, and how text becomes them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy as np
import numpy.typing as npt

from fedllm import experiment as ex
from fedllm.data import choices
from fedllm.errors import FedllmError, nearest
from fedllm.flat import Ints, cells

Tokens = npt.NDArray[np.int32]
EMPTY: Ints = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Examples:
    """
    Rows ready for a model.

    flat: tokens, row after row.  ends: where each row ends.  labels: class of each row
    (classification; empty otherwise).  start: index of the first token that is predicted
    (generation).  utf8: bytes of the text that the predicted tokens stand for (generation).
    prompts, responses: text, kept for Rouge-L.  unk: the token ``<unk>``; -1: there is none.
    hash: of the text, to see that two sites hold the same public set whatever their tokenizers.
    option: number of a row among the options of its question, the rows of which follow one another
    and begin with the right one, number 0 (held-out rows of multiple choice; of preference, where
    0 is the better response and 1 the other; empty otherwise).
    origin: the set that these rows were taken from, and which of its rows they are.
    """

    flat: Tokens
    ends: Ints
    labels: Ints
    start: Ints
    utf8: Ints
    prompts: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()
    unk: int = -1
    hash: str = ""
    prompt_lengths: tuple[int, ...] = ()
    option: Ints = field(default_factory=lambda: EMPTY)
    origin: tuple[Examples, Ints] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def cases(self) -> int:
        """Rows of the source: questions where each has a row for every option."""
        return int((self.option == 0).sum()) if len(self.option) else len(self)

    @cached_property
    def heads(self) -> Ints:
        """First row of each case."""
        return np.flatnonzero(self.option == 0) if len(self.option) else np.arange(len(self))

    def row(self, number: int) -> Ints:
        """Tokens of one row."""
        end = self.ends[number]
        return self.flat[end - self.lengths[number] : end].astype(np.int64)

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each row."""
        found = self.ends.copy()
        found[1:] -= self.ends[:-1]
        return found

    @cached_property
    def targets(self) -> Ints:
        """Predicted tokens of each row (generation), or 1 each (classification)."""
        return np.ones(len(self), np.int64) if len(self.labels) else self.lengths - self.start

    @property
    def goals(self) -> Ints:
        """What is to be predicted, one number for each target: labels, or next tokens."""
        if len(self.labels):
            return self.labels
        first = self.ends - self.lengths + self.start
        return self.flat[cells(first, self.ends - first)].astype(np.int64)

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return len(self.flat)

    @property
    def unknown(self) -> int:
        """Tokens that are ``<unk>``."""
        return int((self.flat == self.unk).sum())

    @cached_property
    def content(self) -> str:
        """SHA-256 of the tokens."""
        digest = hashlib.sha256(self.lengths.tobytes())
        digest.update(self.flat.tobytes())
        return digest.hexdigest()

    def take(self, rows: Sequence[int] | Ints) -> Examples:
        """These rows, in this order."""
        index = np.asarray(rows, dtype=np.int64)
        sizes = self.lengths[index]
        whole, before = self.origin or (self, None)
        return Examples(
            flat=self.flat[cells(self.ends[index] - sizes, sizes)],
            ends=np.cumsum(sizes),
            labels=self.labels[index] if len(self.labels) else self.labels,
            start=self.start[index] if len(self.start) else self.start,
            utf8=self.utf8[index] if len(self.utf8) else self.utf8,
            prompts=tuple(self.prompts[i] for i in index) if self.prompts else (),
            responses=tuple(self.responses[i] for i in index) if self.responses else (),
            prompt_lengths=(
                tuple(self.prompt_lengths[i] for i in index) if self.prompt_lengths else ()
            ),
            unk=self.unk,
            option=self.option[index] if len(self.option) else self.option,
            origin=(whole, index if before is None else before[index]),
        )

    def part(self, begin: int, end: int) -> Examples:
        """Rows ``begin`` to ``end`` - 1 as a set of their own; their tokens are not copied."""
        rows = slice(begin, end)
        first, last = (int(self.ends[i - 1]) if i else 0 for i in (begin, end))
        return Examples(
            flat=self.flat[first:last],
            ends=self.ends[rows] - first,
            labels=self.labels[rows],
            start=self.start[rows],
            utf8=self.utf8[rows],
            prompts=self.prompts[rows],
            responses=self.responses[rows],
            unk=self.unk,
            prompt_lengths=self.prompt_lengths[rows],
            option=self.option[rows],
        )

    def without_labels(self) -> Examples:
        """The same rows with nothing but their tokens; every token but the first is predicted."""
        ones = np.ones(len(self), np.int64)
        return Examples(self.flat, self.ends, EMPTY, ones, self.utf8, hash=self.hash)


NOTHING = Examples(np.zeros(0, np.int32), EMPTY, EMPTY, EMPTY, EMPTY)


def packed(rows: Sequence[Sequence[int]]) -> tuple[Tokens, Ints]:
    """Rows of tokens one after another, and where each ends."""
    return (
        np.fromiter(chain.from_iterable(rows), np.int32),
        np.fromiter(accumulate(map(len, rows)), np.int64),
    )


def join(parts: Sequence[Examples]) -> Examples:
    """One set after another."""
    return Examples(
        flat=np.concatenate([part.flat for part in parts]),
        ends=np.cumsum(np.concatenate([part.lengths for part in parts])),
        labels=np.concatenate([part.labels for part in parts]),
        start=np.concatenate([part.start for part in parts]),
        utf8=np.concatenate([part.utf8 for part in parts]),
        prompts=tuple(text for part in parts for text in part.prompts),
        responses=tuple(text for part in parts for text in part.responses),
        unk=parts[0].unk,
        prompt_lengths=tuple(length for part in parts for length in part.prompt_lengths),
        option=np.concatenate([part.option for part in parts]),
    )


def most_tokens(data: ex.Data, longest: int) -> int:
    """
    Tokens of an example at most, for a model that takes ``longest``.

    Raises FedllmError where there is no room for what ``[data]`` asks for.
    """
    if longest < 4:
        raise FedllmError(
            f"tunables.tokens: they leave {max(longest, 0)} of the model's positions for text"
        )
    if data.max_tokens is not None and data.max_tokens > longest:
        raise FedllmError(f"data.max_tokens = {data.max_tokens}: the model takes at most {longest}")
    return data.max_tokens or min(longest, 512)


class Encoder:
    """Turns rows into Examples, as the experiment's task and data contract say."""

    def __init__(
        self, tokenizer: Any, task: ex.Task, data: ex.Data, labels: Sequence[str], longest: int
    ) -> None:
        """``longest``: tokens the model takes at most; ``data.max_tokens`` may say less."""
        self.tokenizer, self.task, self.data = tokenizer, task, data
        self.labels = {label: index for index, label in enumerate(labels)}
        unk = tokenizer.unk_token_id
        # GPT-2 declares its end-of-text token as "unknown" too, but its bytes cover everything
        self.unk = -1 if unk is None or unk == tokenizer.eos_token_id else int(unk)
        self.max_tokens = most_tokens(data, longest)
        if task.chat_template and not getattr(tokenizer, "chat_template", None):
            raise FedllmError(
                "task.chat_template = true: this tokenizer has no chat template; "
                "use one of an instruction-tuned model, or write the prompt out"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that every source must have."""
        if self.data.prompt is not None and self.data.response is not None:
            more = [name for name in (self.data.options, self.data.rejected) if name is not None]
            return tuple(dict.fromkeys((self.data.prompt, self.data.response, *more)))
        if self.task.kind == "classification":
            return (self.data.text, self.data.label)
        return (self.data.text,)

    def seen(self, rows: Sequence[dict[str, str]], where: str) -> Examples:
        """Texts as inputs only: every token but the first is predicted, ``utf8`` is of all."""
        whole = copy.copy(self)
        whole.task = self.task.model_copy(update={"response_only": False})
        return whole(rows, where).without_labels()

    def __call__(self, rows: Sequence[dict[str, str]], where: str) -> Examples:
        """Encode rows; ``where`` is what an error about an unknown label names."""
        if self.task.kind == "classification":
            found = self._classified(rows, where)
        elif self.task.kind == "multiple-choice":
            assert self.data.response is not None
            found = self._answered([
                {**row, self.data.response: choices.question(row, self.data, where)[0]}
                for row in rows
            ])  # fmt: skip
        elif self.task.kind == "preference":
            found = self._paired(rows, where)
        elif self.data.prompt is not None:
            found = self._answered(rows)
        else:
            found = self._plain(rows)
        inputs = self.columns[:1] if self.task.kind == "classification" else self.columns
        texts = json.dumps([[row[name] for name in inputs] for row in rows])
        return replace(found, hash=hashlib.sha256(texts.encode()).hexdigest()[:16])

    def held_out(self, rows: Sequence[dict[str, str]], where: str) -> Examples:
        """Rows as they are judged: each as it is trained on, or a question's option by option."""
        if self.task.kind != "multiple-choice":
            return self(rows, where)
        assert self.data.prompt is not None
        questions = [
            (row[self.data.prompt], choices.question(row, self.data, where)) for row in rows
        ]
        return self.choices(questions, where)

    def choices(self, questions: Sequence[tuple[str, Sequence[str]]], where: str) -> Examples:
        """
        A row for each option of each question, of which only the option is predicted.

        No end token: an option may begin another. A prompt that is too long loses the same
        beginning for all its options. ``utf8`` are the option's bytes. Raises FedllmError for an
        option of no token, or too long to be compared whole.
        """
        ids, starts, utf8 = [], [], []
        numbers: list[int] = []
        for number, (text, options) in enumerate(questions, 1):
            coded = [self._ids(option) for option in options]
            for option, tokens in zip(options, coded, strict=True):
                if not 0 < len(tokens) < self.max_tokens:
                    raise FedllmError(
                        f"{where}: question {number}: option {option[:80]!r} has {len(tokens)} "
                        f"tokens; expected 1 to {self.max_tokens - 1} (data.max_tokens)"
                    )
            prompt = self.prompt(text)[-(self.max_tokens - max(map(len, coded))) :]
            ids += [prompt + tokens for tokens in coded]
            starts += [len(prompt)] * len(coded)
            utf8 += [len(option.encode()) for option in options]
            numbers += range(len(coded))
        return Examples(
            *packed(ids),
            labels=EMPTY,
            start=np.array(starts, np.int64),
            utf8=np.array(utf8, np.int64),
            unk=self.unk,
            option=np.array(numbers, np.int64),
        )

    def _paired(self, rows: Sequence[dict[str, str]], where: str) -> Examples:
        """
        Two rows a pair: prompt, better response, end; the same prompt, the other response, end.

        A response that is too long is cut and does not end; a prompt loses the same beginning for
        both. Raises FedllmError for an empty response, and for two that are (cut) the same.
        """
        assert self.data.prompt is not None
        columns = (self.data.response, self.data.rejected)
        eos = self.tokenizer.eos_token_id
        end = [] if eos is None else [eos]
        room = max(self.max_tokens - 1 - len(end), 1)
        ids, starts, utf8 = [], [], []
        for number, row in enumerate(rows, 1):
            answers = []
            for column in columns:
                assert column is not None
                tokens = self._ids(row[column])
                if not tokens:
                    raise FedllmError(f"{where}: row {number}: no token in {column!r}")
                answers.append(tokens[:room] + (end if len(tokens) <= room else []))
                utf8.append(len(row[column].encode()))
            if answers[0] == answers[1]:
                raise FedllmError(
                    f"{where}: row {number}: {columns[0]!r} and {columns[1]!r} say the same "
                    f"({row[str(columns[0])][:40]!r}, within data.max_tokens = {self.max_tokens}); "
                    "leave such rows out, or raise the limit"
                )
            left = self.max_tokens - max(map(len, answers))
            prompt = self.prompt(row[self.data.prompt])[-left:]
            ids += [prompt + answer for answer in answers]
            starts += [len(prompt)] * 2
        return Examples(
            *packed(ids),
            labels=EMPTY,
            start=np.array(starts, np.int64),
            utf8=np.array(utf8, np.int64),
            unk=self.unk,
            option=np.tile(np.arange(2), len(rows)),
        )

    def _classified(self, rows: Sequence[dict[str, str]], where: str) -> Examples:
        labels = []
        for number, row in enumerate(rows, 1):
            label = row[self.data.label]
            if not label:
                raise FedllmError(f"{where}: row {number}: no label in {self.data.label!r}")
            if label not in self.labels:
                raise FedllmError(
                    f"{where}: row {number}: label {label!r} is not among the experiment's labels "
                    f"(data.labels, or those of the training rows); {nearest(label, self.labels)}"
                )
            labels.append(self.labels[label])
        texts = [row[self.data.text] for row in rows]
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        empty = [number for number, row in enumerate(ids, 1) if not row]
        if empty:
            raise FedllmError(f"{where}: row {empty[0]}: no token in {self.data.text!r}")
        return Examples(
            *packed(ids),
            labels=np.array(labels, np.int64),
            start=EMPTY,
            utf8=EMPTY,
            unk=self.unk,
        )

    def _start(self) -> list[int]:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return [token]
        return []

    def _plain(self, rows: Sequence[dict[str, str]]) -> Examples:
        """Text in windows of at most ``max_tokens``; every token is predicted exactly once."""
        ids: list[list[int]] = []
        utf8: list[int] = []
        start = self._start()
        size = self.max_tokens - len(start)
        for row in rows:
            text = row[self.data.text]
            coded = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            tokens, offsets = coded["input_ids"], coded["offset_mapping"]
            for begin in range(0, len(tokens), size):
                window = start + tokens[begin : begin + size]
                if len(window) < 2:
                    continue
                end = begin + size
                first = 0 if begin == 0 else offsets[begin][0]
                last = offsets[end][0] if end < len(tokens) else len(text)
                if not start:  # without a start token the first one is not predicted
                    first = offsets[begin + 1][0]
                ids.append(window)
                utf8.append(len(text[first:last].encode()))
        if not ids:
            raise FedllmError(f"no text in column {self.data.text!r}")
        return Examples(
            *packed(ids),
            labels=EMPTY,
            start=np.ones(len(ids), np.int64),
            utf8=np.array(utf8, np.int64),
            unk=self.unk,
        )

    def prompt(self, text: str) -> list[int]:
        """Tokens before the response, the start token included."""
        if self.task.chat_template:
            coded = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True,
                return_dict=True,
            )  # fmt: skip
            return list(coded["input_ids"])
        return self._start() + self._ids(text)

    def _ids(self, text: str) -> list[int]:
        """All its tokens, without a warning of how many they are: what is too long is cut here."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _answered(self, rows: Sequence[dict[str, str]]) -> Examples:
        """Prompt, response, end. A prompt too long for the response loses its beginning."""
        assert self.data.prompt is not None and self.data.response is not None
        ids, starts, utf8, before = [], [], [], []
        eos = self.tokenizer.eos_token_id
        end = [] if eos is None else [eos]
        for row in rows:
            prompt = self.prompt(row[self.data.prompt])
            coded = self.tokenizer(
                row[self.data.response], add_special_tokens=False, return_offsets_mapping=True,
                verbose=False,
            )  # fmt: skip
            room = max(self.max_tokens - 1 - len(end), 1)
            answer, offsets = coded["input_ids"][:room], coded["offset_mapping"][:room]
            whole = len(answer) == len(coded["input_ids"])  # a cut answer does not end there
            prompt = prompt[-max(self.max_tokens - len(answer) - len(end), 1) :]
            ids.append(prompt + answer + (end if whole else []))
            before.append(len(prompt))
            starts.append(len(prompt) if self.task.response_only else 1)
            shown = row[self.data.response][: offsets[-1][1] if offsets else 0]
            if not self.task.response_only:  # what of the prompt was kept and is predicted
                shown = self.tokenizer.decode(prompt[1:], skip_special_tokens=True) + shown
            utf8.append(max(len(shown.encode()), 1))
        return Examples(
            *packed(ids),
            labels=EMPTY,
            start=np.array(starts, np.int64),
            utf8=np.array(utf8, np.int64),
            prompts=tuple(row[self.data.prompt] for row in rows),
            responses=tuple(row[self.data.response] for row in rows),
            prompt_lengths=tuple(before),
            unk=self.unk,
        )
