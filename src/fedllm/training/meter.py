"""What a step costs: FLOPs, seconds, peak of live tensor bytes, examples, tokens, steps."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedllm.errors import FedllmError
from fedllm.lora import rank_of
from fedllm.message import Fact
from fedllm.models.core import Core
from fedllm.models.flops import FlopCounter
from fedllm.models.loading import LanguageModel
from fedllm.training.batches import Batch

Listen = Callable[[str, str, int], None]
"""Hears (step, client, rows) as work goes on."""


@dataclass
class Cost:
    """Sums of one step of the paper; ``peak_memory`` is the largest, in bytes."""

    flops: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    examples: int = 0
    tokens: int = 0
    optimizer_steps: int = 0


COLUMNS = frozenset(column.name for column in fields(Cost))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """
    Counts the bytes of tensors made inside and still alive; ``peak`` is the most at once.

    On a CUDA device the allocator counts instead.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Start at zero: what existed before is the caller's to add."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._before = 0

    def __enter__(self) -> Any:
        """Start counting."""
        if self._cuda is None:
            return super().__enter__()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(self._cuda)
        self._before = torch.cuda.memory_allocated(self._cuda)
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        if self._cuda is None:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
            return
        self.live = torch.cuda.memory_allocated(self._cuda) - self._before
        self.peak = torch.cuda.max_memory_allocated(self._cuda) - self._before

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


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds by which everything asked of the device so far is done."""
    if device.type != "cuda":
        return time.perf_counter

    def seconds() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return seconds


class Meter:
    """The costs of one client's task, or of the server's round, step by step."""

    __slots__ = ("clock", "held", "listen", "measured", "name", "paid", "steps")

    def __init__(
        self, measured: Measured | None = None, name: str = "", listen: Listen | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        """
        name: whose costs these are.  listen: hears of every batch, for a progress bar.
        clock: seconds.
        """
        self.steps: dict[str, Cost] = {}
        self.paid: set[str] = set()  # what ran once for this one (``training.known``)
        self.held: dict[str, int] = {}  # bytes that it keeps of that
        self.measured = measured or Measured()
        self.name, self.listen = name, listen
        self.clock = clock

    def tick(self, rows: int) -> None:
        """A batch of so many rows is done."""
        if self.listen is not None:
            self.listen("", self.name, rows)

    def cost(self, step: str) -> Cost:
        """What this step has cost so far, to add to."""
        return self.steps.setdefault(step, Cost())

    @contextmanager
    def step(self, name: str) -> Iterator[Cost]:
        """Charge the body's seconds to a step."""
        cost = self.cost(name)
        start = self.clock()
        try:
            yield cost
        finally:
            cost.seconds += self.clock() - start

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
        input_grad: bool = False, rank: int = 0,
    ) -> int:  # fmt: skip
        """FLOPs of this pass (forward, or forward and backward); rank: of its LoRA."""
        core = model.countable(core)
        other = 0 if rank == rank_of(model.initial) else rank
        counter = FlopCounter(core, frozenset(model.initial), self.measured.flops, other)
        return counter(batch.inputs.blocks, batch.selected, backward, input_grad)


@dataclass
class Member:
    """
    One client's share of a pass.

    held: bytes it held before: weights, optimizer, graphs.  rank: of its LoRA, where it may differ.
    """

    meter: Meter
    cost: Cost
    batch: Batch
    held: int
    rank: int = 0

    def shape(self, core: Core, kind: str) -> tuple[object, ...]:
        """
        What its peak of memory is remembered for: rows and lengths, whether there is padding,
        and predicted positions to the next eighth of all (``typical`` has that many).
        """
        inputs = self.batch.inputs
        return (core.key, kind, inputs.blocks, inputs.packed, _eighths(self.batch), self.rank)


def _eighths(batch: Batch) -> int:
    return -(-8 * batch.selected // batch.inputs.cells)


def typical(batch: Batch) -> Batch:
    """
    A batch of the same shape, with predicted positions to the next eighth: what is measured.

    So a peak depends on the shape alone, and not on which batch happened to come first.
    """
    if not batch.selected:
        return batch
    count = _eighths(batch) * batch.inputs.cells // 8
    some = torch.arange(count, device=batch.targets.device)
    return Batch(replace(batch.inputs, select=some), some * 0, some * 0, batch.tokens)


def measures_itself(members: Sequence[Member]) -> bool:
    """Whether a pass is one client's and of a shape that is exact."""
    return len(members) == 1 and not members[0].batch.selected


@contextmanager
def charged(members: Sequence[Member]) -> Iterator[None]:
    """Charge the body's seconds to these clients, by their real tokens."""
    clock = members[0].meter.clock
    start = clock()
    yield
    _charge(members, clock() - start)


def _charge(members: Sequence[Member], seconds: float) -> None:
    tokens = sum(member.batch.tokens for member in members)
    for member in members:
        member.cost.seconds += seconds * member.batch.tokens / tokens


@contextmanager
def passing(
    core: Core, kind: str, members: Sequence[Member],
    alone: Callable[[Member], Callable[[], Any]] | None,
) -> Iterator[None]:  # fmt: skip
    """
    Around one pass of these clients side by side: charge its seconds, note peaks of memory.

    The peak is what the client would need on a machine of its own. It is measured on the first
    batch of each shape of each kind of pass: on the pass itself, or by ``alone``, which prepares
    the same for one member's ``typical`` batch; what it returns is run and forgotten. Neither the
    measuring (a dispatch mode slows a pass down) nor ``alone`` is charged to anybody.
    """
    measured, clock = members[0].meter.measured, members[0].meter.clock
    mode: LiveBytes | nullcontext[None] = nullcontext()
    for member in members:
        shape = member.shape(core, kind)
        if shape not in measured.peaks:
            probe = LiveBytes(members[0].batch.inputs.x.device)
            if alone is None:
                mode = probe
                break
            run = alone(member)
            with probe:
                kept = run()
            measured.peaks[shape] = (probe.peak, probe.live)
            del kept
    start = clock()
    with mode:
        yield
    seconds = clock() - start
    cells = sum(member.batch.inputs.cells for member in members)
    known, spent = measured.pace.get((core.key, kind), (0, 0.0))
    if isinstance(mode, LiveBytes):
        measured.peaks[members[0].shape(core, kind)] = (mode.peak, mode.live)
        if known:  # the measured pass is charged as an unmeasured one would have been
            seconds = min(seconds, cells * spent / known)
    else:
        measured.pace[core.key, kind] = (known + cells, spent + seconds)
    _charge(members, seconds)
    for member in members:
        peak = member.held + measured.peaks[member.shape(core, kind)][0]
        member.cost.peak_memory = max(member.cost.peak_memory, peak)


def held_bytes(core: Core) -> int:
    """Bytes of a part's weights."""
    return sum(p.numel() * p.element_size() for p in core.parameters())


def costs_of(facts: dict[str, Fact]) -> dict[str, dict[str, Fact]]:
    """The costs in a reply's facts, by step. Raises FedllmError for what are none."""
    found: dict[str, dict[str, Fact]] = {}
    for name, value in facts.items():
        if not name.startswith("cost."):
            continue
        _, _, rest = name.partition(".")
        step, _, column = rest.partition(".")
        try:
            number = float(value) if column == "seconds" else int(value)
        except (ValueError, OverflowError):
            number = -1
        if column not in COLUMNS or not 0 <= number < 2**62:
            raise FedllmError(f"costs: {name!r} = {value!r} is none")
        found.setdefault(step, {})[column] = number
    return found
