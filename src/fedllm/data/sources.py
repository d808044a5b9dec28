"""Rows from a CSV, JSON lines, a play's script, a folder, the hub, or the built-in text set."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedllm.errors import FedllmError, nearest

Rows = list[dict[str, str]]
_SPEAKER = re.compile(r"^([A-Z][^\n:]{0,40}):\n", re.MULTILINE)


def read(source: str, kind: str = "auto", split: str = "train", key: str = "source") -> Rows:
    """
    All rows of a source, every value a string: lists and tables as JSON.

    source: ``builtin``, a file (.csv, .json, .jsonl, .txt for a dialogue), a folder or a name
    on the hub that ``datasets.load_dataset`` takes.  Raises FedllmError when nothing is found.
    """
    if source == "builtin":
        from fedllm.data import builtin

        found = builtin.rows("test" if split == "test" else "train")
        return [{**row, "label": row["intent"]} for row in found]
    path = Path(source)
    if kind == "dialogue" or (kind == "auto" and path.suffix == ".txt"):
        return list(_dialogue(_text(path, key), path, key))
    rows = _load(path, source, kind, split, key)
    if not rows:
        raise FedllmError(f"{key} = {source!r}: no rows")
    return rows


def _text(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FedllmError(f"{key} = {str(path)!r}: cannot be read ({error})") from None


def _dialogue(text: str, path: Path, key: str) -> Iterator[dict[str, str]]:
    """Speeches of a script: a line ``NAME:``, then the lines spoken, up to the next name."""
    parts = _SPEAKER.split(text)
    if len(parts) < 3:
        raise FedllmError(f"{key} = {str(path)!r}: no line such as 'NAME:' in this dialogue")
    for speaker, speech in zip(parts[1::2], parts[2::2], strict=True):
        if speech.strip():
            yield {"speaker": speaker, "text": speech.strip()}


def _load(path: Path, source: str, kind: str, split: str, key: str) -> Rows:
    import datasets
    import pyarrow  # type: ignore[import-untyped]
    from datasets import load_dataset

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is said below, once
    suffix = {"csv": ".csv", "jsonl": ".jsonl"}.get(kind, path.suffix)
    pool = pyarrow.default_memory_pool()  # it would keep what each of its threads took
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    try:
        if path.is_file():
            builder = {".csv": "csv", ".jsonl": "json", ".json": "json"}.get(suffix)
            if builder is None:
                raise FedllmError(
                    f"{key} = {source!r}: cannot tell the format of {path.suffix!r}; "
                    "use .csv, .json, .jsonl or .txt (dialogue)"
                )
            # A cache of its own: the user's home may not be writable, and files may change
            with tempfile.TemporaryDirectory() as cache:
                data = load_dataset(
                    builder, data_files=str(path), split="train", cache_dir=cache,
                    keep_in_memory=True,
                )  # fmt: skip
                return _rows(data)
        if path.is_absolute() and not path.exists():
            raise FedllmError(f"{key} = {source!r}: no such file or folder")
        return _rows(load_dataset(source, split=split))
    except FedllmError:
        raise
    except Exception as error:  # datasets raises errors of many libraries, all mean the same here
        first = (str(error).strip().splitlines() or [""])[0][:200]
        hint = (
            "is it valid UTF-8 text of that format?"
            if path.is_file()
            else "without a network, download it elsewhere and write the path of the file"
        )
        raise FedllmError(
            f"{key} = {source!r}: cannot be loaded ({type(error).__name__}: {first}); {hint}"
        ) from None
    finally:
        pyarrow.set_memory_pool(pool)


def _rows(data: Any) -> Rows:
    import pyarrow

    features = data.features
    columns = {}
    for name in data.column_names:
        values: Sequence[Any] = data[name][:]
        decode = getattr(features[name], "int2str", None)
        columns[name] = [decode(v) if decode and v is not None else _text_of(v) for v in values]
    names = list(columns)
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    pyarrow.default_memory_pool().release_unused()  # what the file took
    return rows


def _text_of(value: Any) -> str:
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)


def need(rows: Rows, columns: Sequence[str], source: str, section: str = "data") -> None:
    """Raise FedllmError unless every named column exists."""
    for column in columns:
        if column not in rows[0]:
            raise FedllmError(
                f"{source}: no column {column!r} (named in [{section}]); {nearest(column, rows[0])}"
            )
