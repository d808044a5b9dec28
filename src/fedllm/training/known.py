"""Runs the blocks below the first tunable one, once for each row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from fedllm.data.examples import Examples
from fedllm.models.frozen import Known
from fedllm.models.loading import LanguageModel
from fedllm.training.batches import batches
from fedllm.training.meter import Member, Meter, held_bytes, passing

ROWS = 64  # of one pass
FLOAT = 4


def known(
    model: LanguageModel, begin: int, examples: Examples, meter: Meter, step: str
) -> Known | None:
    """
    Hidden states of the examples after ``begin`` blocks; None where nothing is remembered.

    Rows meet in an order that depends on the set alone, so that a resumed run finds the same
    bits. Whoever uses a set for the first time is charged what it costs to run it, also where
    somebody beside has done so already: on a machine of its own it would have to.
    """
    if not begin:
        return None
    whole, rows = examples.origin or (examples, None)
    key = (whole.content, begin)
    sets = model.frozen.sets
    if key not in sets:
        sets[key] = _run(model, begin, whole, meter)
    found = sets[key]
    if key not in meter.paid:
        meter.paid.add(key)
        cost = meter.cost(step)
        cost.flops += found.flops
        cost.seconds += found.seconds
        cost.peak_memory = max(cost.peak_memory, found.peak_memory)
    return found if rows is None else found.take(rows)


@torch.no_grad()
def _run(model: LanguageModel, begin: int, examples: Examples, meter: Meter) -> Known:
    core = model.part("client", begin)
    device = str(model.device)
    held = held_bytes(core)
    own = Meter(meter.measured, clock=meter.clock)
    cost = own.cost("known")
    ends = np.cumsum(examples.lengths)
    states = torch.empty(0)
    for batch in batches(examples, ROWS, "bucket", None, 0, device):
        with passing(core, "forward", [Member(own, cost, batch, held)], None):
            hidden = core.apply_to({}, batch.inputs)
        if not len(states):
            states = hidden.new_empty((int(ends[-1]), hidden.shape[-1]))
        hidden = hidden[batch.inputs.real()]
        sizes = examples.lengths[batch.row_numbers]
        within = np.arange(len(hidden)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        places = np.repeat(ends[batch.row_numbers] - sizes, sizes) + within
        states[torch.from_numpy(places).to(states.device)] = hidden
        cost.flops += own.flops(model, core, batch, backward=False)
    size = states.numel() * states.element_size()
    return Known(
        states, ends, flops=cost.flops, seconds=cost.seconds, peak_memory=cost.peak_memory + size
    )


def remember(model: LanguageModel, sets: Iterable[Examples | None], limit: int) -> str:
    """
    Have ``model`` keep the hidden states of these sets, if any blocks never change.

    limit: bytes. Returns a remark for the user where they do not fit: then nothing is kept.
    """
    if not model.untouched:
        return ""
    tokens = {examples.content: examples.tokens for examples in sets if examples is not None}
    size = sum(tokens.values()) * model.width * FLOAT
    if size > limit:
        return (
            f"hidden states of the {model.untouched} blocks that nobody trains are not kept: "
            f"they take {size / 1e9:.1f} GB, a quarter of the memory is {limit / 1e9:.1f} GB"
        )
    model.frozen.begin = model.untouched
    return ""
