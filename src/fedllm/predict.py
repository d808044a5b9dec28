"""Use what a run learnt: answers for new texts, and models for other programs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedllm import experiment as ex
from fedllm.data import choices, sources
from fedllm.data.examples import Encoder
from fedllm.errors import FedllmError, nearest
from fedllm.models import export as adapters
from fedllm.models.inputs import Inputs
from fedllm.models.loading import LanguageModel, load, load_config, load_tokenizer
from fedllm.training.cohort import alone
from fedllm.training.evaluate import generate, likelihoods
from fedllm.training.meter import Meter


def _adapter(folder: Path, client: str | None) -> Path:
    """Where the wanted adapter lies: the common one, or a client's own."""
    adapter = folder / "adapter"
    if not (folder / "experiment.toml").exists() or not (folder / "summary.json").exists():
        inner = sorted(p.name for p in folder.glob("*/summary.json")) if folder.exists() else []
        hint = "choose one of the runs inside it" if inner else "is it a finished run folder?"
        raise FedllmError(f"{folder}: no finished run here; {hint}")
    names = sorted(path.parent.name for path in adapter.glob(f"*/{adapters.WEIGHTS}"))
    common = (adapter / adapters.WEIGHTS).exists()
    if client is None and common:
        return adapter
    if client is None and len(names) == 1:
        return adapter / names[0]
    if client in names:
        return adapter / str(client)
    if not names and not common:
        raise FedllmError(
            f"{folder}: no adapter here; for a comparison choose one of the runs inside it"
        )
    if not names:
        raise FedllmError(f"--client {client}: this run ends with one common model")
    asked = "--client is needed" if client is None else f"--client {client}: no such client"
    raise FedllmError(f"{asked}: each client has its own model; {nearest(client or '', names)}")


def open_run(
    folder: Path, client: str | None = None
) -> tuple[ex.Experiment, LanguageModel, dict[str, torch.Tensor], Path]:
    """The experiment, model and tunables of a finished run; FedllmError if there are none."""
    path = _adapter(folder, client)
    experiment = ex.load(folder / "experiment.toml")
    import json

    name = str(json.loads((path / "tunables.json").read_text())["model"])
    here = experiment.model.model_copy(update={"device": "auto"})  # it may have run elsewhere
    model = load(
        here, experiment.task, experiment.tunables, len(experiment.data.labels),
        experiment.seeds[0], name,
    )  # fmt: skip
    return experiment, model, adapters.load_adapter(model, path), path


def predict(
    folder: Path, texts: Sequence[str], file: Path | None = None, client: str | None = None
) -> Iterator[dict[str, Any]]:
    """
    For each text its label and the probability of it, or the text that the model writes on; with
    options the likeliest of them, and its share of their probability.
    """
    experiment, model, tunables, _ = open_run(folder, client)
    data = experiment.data
    column = data.prompt or data.text
    columns = [column] if data.options in (None, column) else [column, str(data.options)]
    given = [{column: text} for text in texts]
    if given and len(columns) > 1:
        raise FedllmError(
            f"--text: a question needs its options; give a FILE with the columns {columns}"
        )
    if file is not None:
        if file.suffix in (".csv", ".json", ".jsonl"):
            rows = sources.read(str(file), key="FILE")
            sources.need(rows, columns, str(file))
            given += rows
        else:
            try:
                lines = file.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise FedllmError(f"{file}: cannot be read ({error})") from None
            given += [{column: line} for line in lines if line.strip()]
            if len(columns) > 1:
                raise FedllmError(f"{file}: expected .csv, .json or .jsonl with columns {columns}")
    if not given:
        raise FedllmError("nothing to predict: give --text or a FILE")
    other = model.name if model.name != experiment.model.name else None
    tokenizer = load_tokenizer(experiment.model, other)
    config = load_config(experiment.model, other)
    limit = int(getattr(config, "max_position_embeddings", 512))
    limit -= getattr(experiment.tunables, "tokens", 0)
    encode = Encoder(tokenizer, experiment.task, data, data.labels, limit)
    if data.options is not None:
        yield from _chosen(experiment, model, tunables, encode, given)
        return
    for text in (row[column] for row in given):
        if model.classification:
            row = {data.text: text, data.label: data.labels[0]}
            ids = torch.from_numpy(encode([row], "--text").row(0))[None].to(model.device)
            with torch.no_grad():
                chances = model.whole.apply_to(tunables, Inputs.of(ids)).softmax(-1)[0]
            best = int(chances.argmax())
            yield {"text": text, "label": data.labels[best], "probability": float(chances[best])}
        else:
            tokens = encode.prompt(text)
            new = generate(
                model, tunables, tokens, tokenizer.eos_token_id,
                experiment.evaluation.max_new_tokens,
            )  # fmt: skip
            yield {"text": text, "answer": tokenizer.decode(new, skip_special_tokens=True)}


def _chosen(
    experiment: ex.Experiment, model: LanguageModel, tunables: dict[str, torch.Tensor],
    encode: Encoder, rows: sources.Rows,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """For each question the likeliest option, and its share of the options' probability."""
    questions = [
        (row[str(experiment.data.prompt)], choices.options(row, experiment.data, f"row {number}"))
        for number, row in enumerate(rows, 1)
    ]
    examples, size = encode.choices(questions, "FILE"), experiment.evaluation.batch_size
    scores = alone(likelihoods(model, tunables, examples, size, Meter(), "predict"))
    each = np.split(scores, np.flatnonzero(examples.option == 0)[1:])
    for (text, options), score in zip(questions, each, strict=True):
        best = int(score.argmax())
        share = float(1 / np.exp(score - score[best]).sum())
        yield {"text": text, "answer": options[best], "probability": share}


def export(folder: Path, out: Path, merge: bool, client: str | None = None) -> Path:
    """Copy the adapter to ``out``, or write the whole model with it merged in."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FedllmError(f"{out}: not empty; --out takes another folder")
    if not merge:
        path = _adapter(folder, client)
        shutil.copytree(path, out, dirs_exist_ok=True)
        return out
    experiment, model, tunables, _ = open_run(folder, client)
    try:
        adapters.merge(model, tunables, out, experiment, experiment.data.labels)
    except OSError as error:
        raise FedllmError(f"{out}: cannot be written ({error})") from None
    return out
