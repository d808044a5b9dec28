"""Runs the blocks below the first tunable one, once for each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedllm.data.examples import Examples
from fedllm.flat import cells
from fedllm.models.frozen import Known
from fedllm.models.loading import LanguageModel
from fedllm.training.batches import batches
from fedllm.training.meter import LiveBytes, Meter, held_bytes

FLOAT = 4
PAID = "paid."


def known(
    model: LanguageModel, begin: int, examples: Examples, meter: Meter, step: str
) -> Known | None:
    """
    Hidden states of the examples after ``begin`` blocks; None where they are not remembered.

    Rows meet in an order that depends on the set alone, so that a resumed run finds the same
    bits. Whoever uses a set for the first time is charged what it costs to run it, also where
    somebody beside has done so already: on a machine of its own it would have to.
    """
    whole, rows = examples.origin or (examples, None)
    if not begin or whole.content not in model.frozen.wanted:
        return None
    sets = model.frozen.sets
    key = (whole.content, begin)
    if key not in sets:
        sets[key] = _run(model, begin, whole, meter)
    found = sets[key]
    name = f"{model.name} {begin} {whole.content[:16]}"
    meter.held[name] = found.bytes
    if name not in meter.paid:
        meter.paid.add(name)
        cost = meter.cost(step)
        cost.flops += found.flops
        cost.seconds += found.seconds
        cost.peak_memory = max(cost.peak_memory, found.peak_memory + sum(meter.held.values()))
    return found if rows is None else found.take(rows)


@torch.no_grad()
def _run(model: LanguageModel, begin: int, examples: Examples, meter: Meter) -> Known:
    core = model.part("client", begin)
    device = model.device
    states = torch.empty((examples.tokens, model.width), device=device)
    flops, seconds = 0, 0.0
    batch = None
    for batch in batches(examples, model.frozen.rows, "bucket", None, 0, str(device)):
        start = meter.clock()
        hidden = core.apply_to({}, batch.inputs)[batch.inputs.real()]
        sizes = examples.lengths[batch.row_numbers]
        places = cells(examples.ends[batch.row_numbers] - sizes, sizes)
        states[torch.from_numpy(places).to(device)] = hidden
        seconds += meter.clock() - start
        flops += meter.flops(model, core, batch, backward=False)
    assert batch is not None
    with LiveBytes(device) as live:  # of the longest rows, which come last; charged to nobody
        core.apply_to({}, batch.inputs)
    peak = held_bytes(model.whole) + live.peak
    return Known(states, examples.ends, flops=flops, seconds=seconds, peak_memory=peak)


@dataclass(frozen=True)
class Use:
    """A set that a model will see, and how many of its rows it is shown in all of the run."""

    examples: Examples
    shown: int


def remember(models: Sequence[tuple[LanguageModel, Iterable[Use]]], rows: int, limit: int) -> str:
    """
    Have each model keep the hidden states of its sets, if any of its blocks never change.

    A set of which fewer rows are shown than it has is not worth running as a whole. rows: of one
    pass.  limit: bytes, for all models together. Returns a remark for the user where the states
    do not fit: then nothing is kept.
    """
    wanted: dict[int, dict[str, int]] = {}
    for model, uses in models:
        mine = wanted.setdefault(id(model), {})
        if model.untouched:
            for use in uses:
                if use.shown >= len(use.examples) > 0:
                    mine[use.examples.content] = use.examples.tokens * model.width * FLOAT
    size = sum(sum(mine.values()) for mine in wanted.values())
    if size > limit:
        return (
            "hidden states of blocks that nobody trains are computed anew each time: they take "
            f"{size / 1e9:.1f} GB, a quarter of the memory is {limit / 1e9:.1f} GB"
        )
    for model, _ in models:
        model.frozen.begin, model.frozen.rows = model.untouched, rows
        model.frozen.wanted = frozenset(wanted[id(model)])
    return ""


def restore_paid(meter: Meter, facts: Mapping[str, object]) -> None:
    """What was paid for, as ``paid`` wrote it down."""
    meter.paid = {name.removeprefix(PAID) for name in facts if name.startswith(PAID)}


def paid(meter: Meter) -> dict[str, int]:
    """What was paid for, to be kept with the state of whoever did."""
    return {f"{PAID}{name}": 1 for name in sorted(meter.paid)}
