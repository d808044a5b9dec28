"""What every pass shares: many clients' tunables as one, and who fits into one pass."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm import experiment as ex
from fedllm.models.core import Core
from fedllm.models.loading import LanguageModel, calm
from fedllm.streams import generator, torch_stream
from fedllm.training.batches import Batch

LOG = logging.getLogger(__name__)
CELLS = 4096  # cells of one pass at most; larger ones gain nothing more
CONTAINER = (
    Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
)  # fmt: skip
J = TypeVar("J")


def apart(
    pack: list[J], attempt: Callable[[list[J]], None], fault: Callable[[J, Exception], None]
) -> None:
    """Try a pass; where it fails, each of its members alone: one client's fault is its own."""
    try:
        attempt(pack)
    except Exception as error:
        if len(pack) == 1:
            fault(pack[0], error)
            return
        LOG.debug("a pass of %d failed and is tried one by one", len(pack), exc_info=error)
        for one in pack:
            apart([one], attempt, fault)


def stack(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """
    The tunables of many clients as one, differentiable; of one as they are.

    LoRA of uneven ranks is filled up with zeros, which stay zero; each keeps its own alpha / r.
    """
    if len(parts) == 1:
        return dict(parts[0])
    return {name: _stacked(name, [part[name] for part in parts]) for name in parts[0]}


def _stacked(name: str, tensors: list[Tensor]) -> Tensor:
    side = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
    if side is not None:
        ranks = [tensor.shape[side] for tensor in tensors]
        most = max(ranks)
        if min(ranks) < most:
            filled = []
            for tensor, rank in zip(tensors, ranks, strict=True):
                if side == 0:
                    tensor = tensor * (most / rank)
                pad = (0, 0, 0, most - rank) if side == 0 else (0, most - rank)
                filled.append(F.pad(tensor, pad))
            tensors = filled
    return torch.stack(tensors)


def packs(
    members: Sequence[J], cells: Callable[[J], int], model: LanguageModel, device: torch.device
) -> Iterator[list[J]]:
    """Members in order, as many together as one pass should take."""
    width = getattr(model.model.config, "hidden_size", 1024)
    # about forty numbers a cell, block and unit of width live through a pass
    fits = memory(device) // 4 // (width * max(model.blocks, 1) * 160)
    limit = min(CELLS, fits)
    pack: list[J] = []
    filled = 0
    for member in members:
        size = cells(member)
        if pack and filled + size > limit:
            yield pack
            pack, filled = [], 0
        pack.append(member)
        filled += size
    if pack:
        yield pack


@cache
def memory(device: torch.device) -> int:
    """Bytes that this process may fill on this machine or device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in CONTAINER:
        with suppress(OSError, ValueError):  # none such here, or "max"
            found = min(found, int(limit.read_text()))
    return found


@contextmanager
def drawing(
    model: LanguageModel, training: ex.Training, core: Core, tunables: Mapping[str, Tensor],
    purposes: Sequence[tuple[object, ...]], device: torch.device,
) -> Iterator[None]:  # fmt: skip
    """A core that holds these tunables and draws each client's dropout from its own stream."""
    draws = [generator(device, *purpose) for purpose in purposes] if model.draws else []
    with ExitStack() as around:
        if training.base_dropout:  # the library's own layers know of no streams
            around.enter_context(torch_stream(*purposes[0]))
            model.model.train(True)
            around.callback(calm, model.model)
        around.enter_context(core.holding(tunables, draws))
        yield


def copies(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves of the same values, whose gradients nobody uses."""
    return {name: t.detach().clone().requires_grad_(True) for name, t in params.items()}


def given(batch: Batch) -> int:
    """Bytes of hidden states that a pass starts from; they were made before it."""
    return 0 if batch.inputs.tokens else batch.inputs.x.numel() * batch.inputs.x.element_size()


def weight(batch: Batch, model: LanguageModel) -> int:
    """Cells of a pass, or as many as weigh what its token logits do (8,192 a cell)."""
    return max(batch.inputs.cells, batch.selected * model.outputs // 8192)
