"""
What a run will cost, by formula; tests hold it against what is counted.

Units: bytes of payload (tensor data, no headers), FLOPs, rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm import experiment as ex
from fedllm.models.loading import LanguageModel

FLOAT = 4
INT = 4


@dataclass(frozen=True)
class ClientSize:
    """
    What a client's costs depend on: rows and tokens of one pass over its training rows, and
    predicted tokens (for classification: rows).
    """

    rows: int
    tokens: int
    units: int


@dataclass(frozen=True)
class PublicSize:
    """The same of a round's public rows."""

    rows: int
    tokens: int
    units: int


def tunable_bytes(model: LanguageModel, names: Sequence[str] | None = None) -> int:
    """Bytes of the tunables (4 per number), of all or of these."""
    wanted = model.initial if names is None else {n: model.initial[n] for n in names}
    return sum(t.numel() * FLOAT for t in wanted.values())


def travelling(model: LanguageModel) -> list[str]:
    """Names of the tunables that are sent: all but a personal head."""
    if model.spec.head == "personal":
        return [name for name in model.initial if name not in model.head]
    return list(model.initial)


def parameters_payload(model: LanguageModel) -> tuple[int, int]:
    """(up, down) of one client and round: the tunables, once each way."""
    size = tunable_bytes(model, travelling(model))
    return size, size


def logits_payload(model: LanguageModel, public: PublicSize) -> tuple[int, int]:
    """(up, down): units x outputs floats each way, and twice the chosen rows' numbers down."""
    knowledge = public.units * model.outputs * FLOAT
    return knowledge, knowledge + 2 * public.rows * INT


def activations_payload(
    model: LanguageModel,
    options: ex.Activations,
    client: ClientSize,
    epochs: int,
    client_half: int,
    averages: int = 1,
    uploads: int | None = None,
) -> tuple[int, int]:
    """
    (up, down): width floats a token each way (twice each way with labels at the client),
    lengths and labels up, and the client half's tunables for each average.

    client_half: bytes of the client's tunables.  averages: how often they are averaged a round.
    uploads: how many of these this client had a batch for (None: all).
    """
    prompt = getattr(model.spec, "tokens", 0) if model.spec.kind == "prompt" else 0
    tokens = (client.tokens + prompt * client.rows) * epochs
    hidden = tokens * model.width * FLOAT
    home = options.labels == "client"
    labels = 0
    if not home:
        per_pass = client.rows if model.classification else client.tokens
        labels = per_pass * epochs * INT
    crossings = 2 if home else 1
    up = crossings * hidden + client.rows * epochs * INT + labels
    up += (averages if uploads is None else uploads) * client_half
    return up, crossings * hidden + averages * client_half


def batches(rows: int, size: int) -> int:
    """Batches of one pass."""
    return math.ceil(rows / size)


def bound_steps(client: ClientSize, training: ex.Training, rounds: int) -> int:
    """Optimizer steps of a client alone."""
    return batches(client.rows, training.batch_size) * training.epochs * rounds


def disk(model: LanguageModel, spec: ex.Strategy, clients: int) -> int:
    """Bytes of a run folder, roughly: two checkpoints of all states, the adapter, the ledger."""
    own = tunable_bytes(model)
    kept = {"parameters": 1, "logits": clients + 1, "activations": 3 + clients,
            "standalone": 3 * clients, "centralized": 3}[spec.kind]  # fmt: skip
    return 2 * kept * own + own + 200_000
