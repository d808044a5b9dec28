"""Quality, as sums that add up over clients; and the metrics that follow from the sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.data.examples import Examples
from fedllm.flat import Ints
from fedllm.models.inputs import Inputs
from fedllm.models.loading import LanguageModel
from fedllm.training.batches import Batch
from fedllm.training.jobs import Infer, Tasked
from fedllm.training.meter import Meter

Metrics = dict[str, Any]


TIE = 1e-5  # of the score: padded passes round differently, and a rounding chooses nothing


def likelihoods(
    model: LanguageModel, tunables: Mapping[str, Tensor], examples: Examples, size: int,
    meter: Meter, step: str,
) -> Tasked[npt.NDArray[np.float64]]:  # fmt: skip
    """Each row's sum of ln p over its predicted tokens: [rows], in nats."""
    found = torch.zeros(len(examples), dtype=torch.float64)

    def take(batch: Batch, logits: Tensor, features: Tensor) -> None:
        rows = np.repeat(batch.row_numbers, examples.targets[batch.row_numbers])
        each = F.cross_entropy(logits, batch.targets, reduction="none").double().cpu()
        found.index_add_(0, torch.from_numpy(rows), each, alpha=-1)

    yield Infer(model, tunables, examples, size, meter, step, take)
    return found.numpy()


def right(scores: npt.NDArray[np.float64], option: Ints) -> float:
    """
    Questions whose right option (number 0) has the largest score, of rows as in ``Examples``.

    Where it shares the largest with others it counts as 1 / all of these.
    """
    first = np.flatnonzero(option == 0)
    best = np.repeat(np.maximum.reduceat(scores, first), np.diff([*first, len(option)]))
    among = np.isclose(scores, best, rtol=TIE, atol=0)
    shared = np.maximum(np.add.reduceat(among, first, dtype=np.int64), 1)
    return float((among[first] / shared).sum())


def statistics(
    model: LanguageModel, tunables: Mapping[str, Tensor], examples: Examples, size: int,
    meter: Meter, step: str,
) -> Tasked[dict[str, Tensor]]:  # fmt: skip
    """
    Sums over the examples: ``confusion`` [true, predicted] and ``loss``, or ``loss``,
    ``units`` (tokens), ``utf8`` (bytes of their text) and ``unknown`` tokens.

    With options ``loss``, ``units`` and ``utf8`` are those of the right ones; besides there are
    ``questions``, ``right`` (its sum of ln p is the largest) and ``right_per_byte``.
    """
    if len(examples.option):
        scores = yield from likelihoods(model, tunables, examples, size, meter, step)
        return _choices(scores, examples)
    classes = model.classification
    wide = model.outputs if classes else 0  # a vocabulary's table would be larger than the model
    confusion = torch.zeros((wide, wide), dtype=torch.int32)
    losses: list[float] = []

    def take(batch: Batch, logits: Tensor, features: Tensor) -> None:
        losses.append(float(F.cross_entropy(logits, batch.targets, reduction="sum")))
        if classes:
            pairs = (batch.targets * model.outputs + logits.argmax(-1)).cpu()
            counts = torch.bincount(pairs, minlength=confusion.numel())
            confusion.add_(counts.view_as(confusion))

    yield Infer(model, tunables, examples, size, meter, step, take)
    units = int(examples.targets.sum())
    found = {"loss": torch.tensor([sum(losses)], dtype=torch.float64),
             "units": torch.tensor([units], dtype=torch.int64)}  # fmt: skip
    if classes:
        return found | {"confusion": confusion}
    return found | {
        "utf8": torch.tensor([int(examples.utf8.sum())], dtype=torch.int64),
        "tokens": torch.tensor([examples.tokens], dtype=torch.int64),
        "unknown": torch.tensor([examples.unknown], dtype=torch.int64),
    }


def preferences(
    model: LanguageModel, tunables: Mapping[str, Tensor], examples: Examples, reference: Tensor,
    beta: float, size: int, meter: Meter, step: str,
) -> Tasked[dict[str, Tensor]]:  # fmt: skip
    """
    Sums over pairs of responses: ``loss`` (DPO's), ``units`` (pairs), ``margin``, ``preferred``
    (pairs with a margin above 0), ``tokens`` and ``unknown`` tokens.

    A margin is beta (m - m_ref), see ``objectives.Preference``.  reference: m_ref [pairs].
    """
    scores = yield from likelihoods(model, tunables, examples, size, meter, step)
    margin = beta * (scores[0::2] - scores[1::2] - reference.numpy())
    return {
        "loss": torch.tensor([np.logaddexp(0, -margin).sum()], dtype=torch.float64),
        "margin": torch.tensor([margin.sum()], dtype=torch.float64),
        "units": torch.tensor([examples.cases], dtype=torch.int64),
        "preferred": torch.tensor([int((margin > 0).sum())], dtype=torch.int64),
        "tokens": torch.tensor([examples.tokens], dtype=torch.int64),
        "unknown": torch.tensor([examples.unknown], dtype=torch.int64),
    }


def _choices(scores: npt.NDArray[np.float64], examples: Examples) -> dict[str, Tensor]:
    first = examples.option == 0
    sums = {
        "loss": -float(scores[first].sum()),
        "units": int(examples.targets[first].sum()),
        "utf8": int(examples.utf8[first].sum()),
        "tokens": examples.tokens,
        "unknown": examples.unknown,
        "right": right(scores, examples.option),
        "right_per_byte": right(scores / examples.utf8, examples.option),
        "questions": examples.cases,
    }
    kinds = {int: torch.int64, float: torch.float64}
    return {name: torch.tensor([value], dtype=kinds[type(value)]) for name, value in sums.items()}


def add(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Statistics of several clients together."""
    names = parts[0].keys()
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in names}


ROUGE = {"rouge", "rouge_units"}
TOKENS = {"loss", "units", "utf8", "tokens", "unknown"}
COUNTED = {
    "classification": {"loss", "units", "confusion"},
    "generation": TOKENS,
    "multiple-choice": TOKENS | {"right", "right_per_byte", "questions"},
    "preference": {"loss", "units", "margin", "preferred", "tokens", "unknown"},
}


def misfit(sums: Mapping[str, Tensor], task: str, labels: int) -> str:
    """Why these are not the statistics of a client in this task; empty where they are."""
    names = COUNTED[task]
    if not names <= set(sums) <= names | (ROUGE if task == "generation" else set()):
        return f"counted {sorted(sums)}, not {sorted(names)}"
    for name, tensor in sums.items():
        shape = (labels, labels) if name == "confusion" else (1,)
        floats = name in ("loss", "margin", "rouge", "right", "right_per_byte")
        if tuple(tensor.shape) != shape or tensor.is_floating_point() != floats:
            return f"counted {name!r} as {tensor.dtype} of {tuple(tensor.shape)}"
        if name not in ("loss", "margin") and bool((tensor < 0).any()):
            return f"counted fewer than none ({name!r})"
    for name in sorted(names & {"right", "right_per_byte"}):
        if not float(sums[name]) <= int(sums["questions"]):  # nor NaN
            return f"counted more than all questions ({name!r})"
    if "preferred" in names and int(sums["preferred"]) > int(sums["units"]):
        return "counted more than all pairs ('preferred')"
    return ""


def metrics(sums: Mapping[str, Tensor], labels: Sequence[str] = ()) -> Metrics:
    """
    Statistics -> accuracy, macro_f1, per_class, loss; or loss, perplexity, bits_per_byte, with
    options (of the right ones) besides accuracy, accuracy_per_byte and questions; or, of pairs,
    loss, accuracy (share with a margin above 0) and margin (its mean).

    macro_f1 averages over the classes that occur among the true or the predicted labels.
    """
    units = max(int(sums["units"]), 1)
    loss = float(sums["loss"]) / units
    found: Metrics = {"loss": loss, "units": units}
    if "confusion" in sums:
        table = sums["confusion"].numpy().astype(np.int64)
        right, true, said = np.diag(table), table.sum(1), table.sum(0)
        occurs = (true + said) > 0
        f1 = 2 * right[occurs] / (true + said)[occurs]
        found["accuracy"] = float(right.sum() / max(table.sum(), 1))
        found["macro_f1"] = float(f1.mean()) if len(f1) else 0.0
        found["per_class"] = {
            labels[i] if labels else str(i): float(right[i] / true[i])
            for i in range(len(table))
            if true[i]
        }
        return found
    if "preferred" in sums:
        found["accuracy"] = int(sums["preferred"]) / units
        found["margin"] = float(sums["margin"]) / units
        found["unknown_rate"] = int(sums["unknown"]) / max(int(sums["tokens"]), 1)
        return found
    found["perplexity"] = math.exp(min(loss, 700))
    found["bits_per_byte"] = float(sums["loss"]) / math.log(2) / max(int(sums["utf8"]), 1)
    found["unknown_rate"] = int(sums["unknown"]) / max(int(sums["tokens"]), 1)
    if "questions" in sums:
        found["questions"] = int(sums["questions"])
        for name, count in (("accuracy", "right"), ("accuracy_per_byte", "right_per_byte")):
            found[name] = float(sums[count]) / max(found["questions"], 1)
    if "rouge" in sums and int(sums["rouge_units"]):
        found["rouge_l"] = float(sums["rouge"]) / int(sums["rouge_units"])
    return found


def rouge_l(candidate: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), lower-cased, no stemming."""
    a, b = candidate.lower().split(), reference.lower().split()
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(row[j], row[j - 1])
            diagonal = above
    common = row[-1]
    return 2 * common / (len(a) + len(b))


@torch.no_grad()
def generate(
    model: LanguageModel, tunables: Mapping[str, Tensor], prompt: Sequence[int], stop: int | None,
    limit: int,
) -> list[int]:  # fmt: skip
    """Greedy continuation of a prompt: at most ``limit`` new tokens, up to ``stop``."""
    longest = getattr(model.model.config, "max_position_embeddings", 1024)
    longest -= getattr(model.spec, "tokens", 0)
    tokens = list(prompt)
    device = model.device
    for _ in range(limit):
        x = torch.tensor([tokens[-longest:]], device=device)
        last = torch.tensor([x.shape[1] - 1], device=device)
        new = int(model.whole.apply_to(tunables, Inputs.of(x, select=last))[0].argmax())
        if new == stop:
            break
        tokens.append(new)
    return tokens[len(prompt) :]
