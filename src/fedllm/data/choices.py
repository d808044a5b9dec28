"""Questions with options, as the columns of a data contract hold them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from fedllm import experiment as ex
from fedllm.errors import FedllmError


def options(row: Mapping[str, str], data: ex.Data, where: str) -> tuple[str, ...]:
    """
    What may follow the question: a JSON list, or all matches of ``data.option_pattern``.

    where: file and row, which errors name. Raises FedllmError for no such list, fewer than two
    options, or an empty one.
    """
    assert data.options is not None
    value = row[data.options]
    key = f"{where}: data.options = {data.options!r}"
    if data.option_pattern is not None:
        found = tuple(re.findall(data.option_pattern, value))
    else:
        try:
            listed = json.loads(value)
        except json.JSONDecodeError:
            listed = None
        if not isinstance(listed, list) or any(isinstance(one, list | dict) for one in listed):
            raise FedllmError(f'{key}: {_short(value)} is no list; expected e.g. ["yes", "no"]')
        found = tuple(_plain(one) for one in listed)
    if len(found) < 2:
        raise FedllmError(f"{key}: {_short(value)} has {len(found)}; expected 2 options or more")
    for number, option in enumerate(found):
        if not option.strip():
            raise FedllmError(f"{key}: option {number} of {_short(value)} is empty; expected text")
    return found


def right(row: Mapping[str, str], listed: Sequence[str], data: ex.Data, where: str) -> int:
    """
    Number of the right option, from 0: the response column names it as ``data.answer_by`` says.

    Raises FedllmError where it names none, or different ones under ``answer_by = "any"``.
    """
    assert data.response is not None
    answer = row[data.response].strip()
    key = f"{where}: data.response = {data.response!r}: {_short(answer)}"
    texts = [option.strip() for option in listed]
    letter = ord(answer.upper()) - ord("A") if re.fullmatch("[A-Za-z]", answer) else -1
    named = {
        "index": int(answer) if re.fullmatch("[0-9]{1,9}", answer) else -1,
        "letter": letter,
        "text": texts.index(answer) if answer in texts else -1,
    }
    fit = {
        by: number for by, number in named.items()
        if data.answer_by in ("any", by) and 0 <= number < len(listed)
    }  # fmt: skip
    if not fit:
        last = len(listed) - 1
        said = {
            "index": f"a number from 0 to {last}",
            "letter": f"a letter from A to {chr(ord('A') + min(last, 25))}",
            "text": f"one of {_short(json.dumps(listed, ensure_ascii=False))}",
        }
        wanted = list(said.values()) if data.answer_by == "any" else [said[data.answer_by]]
        raise FedllmError(f"{key} is none of the options; expected {' or '.join(wanted)}")
    if len(set(fit.values())) > 1:
        meant = ", ".join(f"option {number} by {by}" for by, number in fit.items())
        raise FedllmError(f"{key} may be {meant}; expected data.answer_by to say which")
    return next(iter(fit.values()))


def question(row: Mapping[str, str], data: ex.Data, where: str) -> tuple[str, ...]:
    """A row's options, the right one first. Raises FedllmError as ``options`` and ``right`` do."""
    listed = options(row, data, where)
    answer = right(row, listed, data, where)
    return listed[answer], *listed[:answer], *listed[answer + 1 :]


def need(rows: Sequence[Mapping[str, str]], data: ex.Data, source: str) -> None:
    """Raise FedllmError, naming the row of the source, unless each is a question and its answer."""
    assert data.prompt is not None
    for number, row in enumerate(rows, 1):
        where = f"{source}: row {number}"
        if not row[data.prompt].strip():
            raise FedllmError(f"{where}: data.prompt = {data.prompt!r}: empty; expected a question")
        question(row, data, where)


def _plain(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
