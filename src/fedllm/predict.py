"""Use what a run learnt: answers for new texts, and models for other programs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedllm import experiment as ex
from fedllm.data import sources
from fedllm.data.examples import Encoder
from fedllm.errors import FedllmError, nearest
from fedllm.models import export as adapters
from fedllm.models.inputs import Inputs
from fedllm.models.loading import LanguageModel, load, load_config, load_tokenizer
from fedllm.training.evaluate import generate


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
    """For each text its label and the probability of it, or the text that the model writes on."""
    experiment, model, tunables, _ = open_run(folder, client)
    data = experiment.data
    column = data.prompt or data.text
    given = list(texts)
    if file is not None:
        if file.suffix in (".csv", ".json", ".jsonl"):
            rows = sources.read(str(file), key="FILE")
            sources.need(rows, [column], str(file))
            given += [row[column] for row in rows]
        else:
            try:
                given += [line for line in file.read_text().splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise FedllmError(f"{file}: cannot be read ({error})") from None
    if not given:
        raise FedllmError("nothing to predict: give --text or a FILE")
    other = model.name if model.name != experiment.model.name else None
    tokenizer = load_tokenizer(experiment.model, other)
    config = load_config(experiment.model, other)
    limit = int(getattr(config, "max_position_embeddings", 512))
    limit -= getattr(experiment.tunables, "tokens", 0)
    encode = Encoder(tokenizer, experiment.task, data, data.labels, limit)
    for text in given:
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
