"""``fedllm init``: a commented experiment file for somebody's own rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args

from fedllm import experiment as ex
from fedllm.data import sources
from fedllm.errors import FedllmError

_LABEL = ("label", "labels", "category", "intent", "class", "target", "topic")
_TEXT = ("text", "message", "sentence", "query", "utterance", "body", "content")
_PAIRS = (("prompt", "response"), ("instruction", "output"), ("question", "answer"),
          ("instruction", "response"), ("input", "output"))  # fmt: skip
_PREFERENCE = ("prompt", "chosen", "rejected")
_OPTIONS = ("choices", "options", "answers", "endings")
_QUESTION = ("query", "question", "prompt", "instruction", "input", "text")
_RIGHT = ("gold", "answer", "label", "answer_index", "answer_idx", "target", "response")


def template(data: Path, out: Path) -> str:
    """
    Guess the columns and write them down, with what else one would want to set.

    Raises FedllmError when the rows cannot be read, or no column looks like text.
    """
    rows = sources.read(str(data), key="data")
    columns = list(rows[0])
    asked = [next((c for c in names if c in columns), None)
             for names in (_QUESTION, _OPTIONS, _RIGHT)]  # fmt: skip
    pair = next((p for p in _PAIRS if set(p) <= set(columns)), None)
    label = next((c for c in _LABEL if c in columns), None)
    text = next((c for c in _TEXT if c in columns), None) or _longest(rows, columns, label)
    source = os.path.relpath(data.resolve(), out.resolve().parent)
    source = source if source.startswith(".") else f"./{source}"
    if label is None and pair is None and text is None:
        raise FedllmError(f"{data}: none of the columns {', '.join(columns)} looks like text")
    quoted = json.dumps
    kind = "generation" if pair or not label else "classification"
    others = get_args(ex.Task.model_fields["kind"].annotation)
    if None not in asked and rows[0][str(asked[1])].startswith("["):
        kind = "multiple-choice"
        names = zip(("prompt", "options", "response"), asked, strict=True)
        contract = "\n".join(f"{key} = {quoted(column)}" for key, column in names)
    elif set(_PREFERENCE) <= set(columns):
        kind = "preference"
        names = zip(("prompt", "response", "rejected"), _PREFERENCE, strict=True)
        contract = "\n".join(f"{key} = {quoted(column)}" for key, column in names)
    elif pair:
        contract = f"prompt = {quoted(pair[0])}\nresponse = {quoted(pair[1])}"
    elif kind == "classification":
        contract = f"text = {quoted(text)}\nlabel = {quoted(label)}"
    else:
        contract = f"text = {quoted(text)}"
    model = "sentence-transformers/all-MiniLM-L6-v2" if kind == "classification" else (
        "openai-community/gpt2"
    )  # fmt: skip
    public = max(len(rows) // 5, 1)
    return f"""# {data.name}: {len(rows)} rows, columns {", ".join(columns)}
# Run it:      fedllm check {out}    then    fedllm compare {out}
rounds = 5
seeds = [0]

[model]
name = "builtin"          # a small model for a first try; then e.g. {quoted(model)}
                          # (from the hub), or the path of a folder

[task]
kind = {quoted(kind)}     # or {" or ".join(quoted(one) for one in others if one != kind)}

[data]                    # the contract that every site keeps
{contract}
max_tokens = 80           # longer rows are cut

[public]                  # rows that everybody may see, for the logits strategy
size = {public}

[tunables]
kind = "lora"             # or "adapter", "bitfit", "prompt", "prefix", "full"
rank = 8
alpha = 16

[training]
epochs = 1                # passes over a client's rows in each round
batch_size = 16
optimizer = "adam"
rate = 0.002

[simulation]              # only for trying it out in one process; real sites ignore this
source = {quoted(source)}
clients = 3
test_fraction = 0.2
# partition = {{ kind = "dirichlet", alpha = 0.5 }}          # uneven labels
# partition = {{ kind = "by_column", column = "hospital" }}  # natural clients
"""


def _longest(rows: sources.Rows, columns: list[str], label: str | None) -> str | None:
    """The column with the longest values, which is most likely the text."""
    some = rows[:200]
    lengths = {c: sum(len(row[c]) for row in some) / len(some) for c in columns if c != label}
    best = max(lengths, key=lambda c: lengths[c]) if lengths else None
    return best if best and lengths[best] >= 10 else None
