"""What a step costs: FLOPs, seconds, peak of live tensor bytes, examples, tokens, steps."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedllm.message import Fact
from fedllm.models.core import Core
from fedllm.models.flops import FlopCounter
from fedllm.models.loading import LanguageModel
from fedllm.training.batches import Batch


@dataclass
class Cost:
    """Sums of one step of the paper; ``peak_memory`` is the largest, in bytes."""

    flops: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    examples: int = 0
    tokens: int = 0
    optimizer_steps: int = 0


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made inside and still alive; ``peak`` is the most at once."""

    def __init__(self) -> None:
        """Start at zero: what existed before is the caller's to add."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count its new storages."""
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs))
                  if isinstance(t, Tensor)}  # fmt: skip
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in before and key not in self._seen:
                    self._seen.add(key)
                    size = storage.nbytes()
                    self.live += size
                    weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.live)
        return out


@dataclass
class Measured:
    """
    What was counted once per shape; shared by all clients and parts of one experiment.

    pace: rows x length and seconds of the passes that were not slowed down by measuring.
    """

    flops: dict[tuple[object, ...], int] = field(default_factory=dict)
    peaks: dict[tuple[object, ...], tuple[int, int]] = field(default_factory=dict)
    pace: dict[tuple[object, ...], tuple[int, float]] = field(default_factory=dict)


class Meter:
    """
    Measures the steps of one task, on the client's or the server's side.

    The peak of memory is measured on the first batch of each shape of each kind of pass (a
    dispatch mode on the CPU slows that pass down), and remembered in ``Measured``.
    """

    def __init__(
        self, measured: Measured | None = None, tick: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        """``tick`` hears of every batch's rows, for a progress bar.  clock: seconds."""
        self.steps: dict[str, Cost] = {}
        self._overhead = 0.0
        self.measured = measured or Measured()
        self.tick = tick or (lambda rows: None)
        self.clock = clock

    @contextmanager
    def step(self, name: str) -> Iterator[Cost]:
        """Time a step; the body adds the rest to the Cost it is given."""
        cost = self.steps.setdefault(name, Cost())
        start = self.clock()
        self._overhead = 0.0
        try:
            yield cost
        finally:
            cost.seconds += max(self.clock() - start - self._overhead, 0.0)

    def take(self) -> dict[str, Fact]:
        """All costs as facts of a reply, ``cost.<step>.<field>``; the meter starts anew."""
        facts: dict[str, Fact] = {}
        for step, cost in self.steps.items():
            for column in fields(Cost):
                value = getattr(cost, column.name)
                if value:
                    # seconds at a fixed width: how long a step took is nothing a byte count
                    # should depend on
                    text = f"{value:.6e}" if isinstance(value, float) else value
                    facts[f"cost.{step}.{column.name}"] = text
        self.steps = {}
        return facts

    def flops(
        self, model: LanguageModel, core: Core, batch: Batch, backward: bool,
        input_grad: bool = False,
    ) -> int:  # fmt: skip
        """FLOPs of this pass (forward, or forward and backward)."""
        counter = FlopCounter(core, frozenset(model.initial), self.measured.flops)
        length = batch.x.shape[1]
        if core.part not in ("whole", "client"):
            length -= core.prompt_tokens  # hidden states hold the prompt, tokens do not
        start = self.clock()
        found = counter(batch.rows, length, batch.selected, backward, input_grad)
        self._overhead += self.clock() - start
        return found

    @contextmanager
    def memory(self, cost: Cost, core: Core, batch: Batch, kind: str, held: int) -> Iterator[None]:
        """Peak of live bytes in the body, plus ``held`` bytes that were there before."""
        key = (core.key, kind, batch.rows, batch.x.shape[1], batch.selected)
        if batch.x.is_cuda:
            torch.cuda.reset_peak_memory_stats(batch.x.device)
            yield
            cost.peak_memory = max(
                cost.peak_memory, torch.cuda.max_memory_allocated(batch.x.device)
            )
            return
        mode = LiveBytes() if key not in self.measured.peaks else nullcontext()
        start = self.clock()
        with mode:
            yield
        seconds = self.clock() - start
        cells, spent = self.measured.pace.get(key[:2], (0, 0.0))
        size = batch.rows * batch.x.shape[1]
        if isinstance(mode, LiveBytes):
            self.measured.peaks[key] = (mode.peak, mode.live)
            if cells:  # the measured pass is charged as an unmeasured one would have been
                self._overhead += max(seconds - size * spent / cells, 0.0)
        else:
            self.measured.pace[key[:2]] = (cells + size, spent + seconds)
        cost.peak_memory = max(cost.peak_memory, held + self.measured.peaks[key][0])

    def left(self, core: Core, batch: Batch, kind: str) -> int:
        """Live bytes that the body of ``memory`` left behind: a graph that waits for backward."""
        key = (core.key, kind, batch.rows, batch.x.shape[1], batch.selected)
        return self.measured.peaks.get(key, (0, 0))[1]


def held_bytes(core: Core) -> int:
    """Bytes of a part's weights."""
    return sum(p.numel() * p.element_size() for p in core.parameters())


def costs_of(facts: dict[str, Fact]) -> dict[str, dict[str, Fact]]:
    """The costs in a reply's facts, by step."""
    found: dict[str, dict[str, Fact]] = {}
    for name, value in facts.items():
        if name.startswith("cost."):
            _, step, column = name.split(".")
            found.setdefault(step, {})[column] = float(value) if column == "seconds" else value
    return found
