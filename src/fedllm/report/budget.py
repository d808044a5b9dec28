"""
Protocols: the best quality that a budget buys, and what it costs to reach a quality.

Both look at the rounds that were evaluated, with what all clients and the server spent up to each
(evaluation left out, as in every table).
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.errors import FedllmError, nearest
from fedllm.report.gather import Entry, Run
from fedllm.report.tables import QUALITY, Sheet, amount, size

LOWER = ("loss", "perplexity", "bits_per_byte")
COSTS: dict[str, tuple[str, ...]] = {
    "bytes": ("bytes_up", "bytes_down"), "up": ("bytes_up",), "down": ("bytes_down",),
    "seconds": ("seconds",), "flops": ("flops",), "client-flops": ("client_flops",),
    "steps": ("optimizer_steps",), "rounds": (),
}  # fmt: skip
_ALSO = {"time": "seconds", "bytes_up": "up", "bytes_down": "down"}
_PREFIX = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_TIME = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Budget:
    """At most ``limit`` of a cost, over the whole run."""

    cost: str
    limit: float
    text: str


@dataclass(frozen=True)
class Target:
    """A quality to be reached."""

    metric: str
    value: float
    text: str


@dataclass(frozen=True)
class State:
    """An evaluated round: its quality, and what was spent until then."""

    round: int
    metrics: dict[str, float]
    spent: dict[str, float]


def budget(text: str) -> Budget:
    """``bytes=10MB``, ``flops=2T``, ``time=5min``. Raises FedllmError for anything else."""
    name, sign, value = (part.strip() for part in text.partition("="))
    cost = _ALSO.get(name, name)
    if not sign or not value:
        raise FedllmError(f"--budget {text}: expected a cost and a limit, e.g. bytes=10MB")
    if cost not in COSTS:
        raise FedllmError(f"--budget {text}: unknown cost {name!r}; {nearest(name, list(COSTS))}")
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?\d+)?)\s*([A-Za-z]*)", value)
    factor = _unit(cost, match[2]) if match else None
    try:
        limit = float(match[1]) * factor if match and factor else 0.0
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise FedllmError(
            f"--budget {text}: {value!r} is no amount of {cost}, e.g. {_EXAMPLE[cost]}"
        )
    return Budget(cost, limit, text)


_EXAMPLE = {"bytes": "10MB", "up": "10MB", "down": "10MB", "seconds": "90s, 5min",
            "flops": "2T, 2e12", "client-flops": "2T, 2e12", "steps": "500",
            "rounds": "3"}  # fmt: skip


def _unit(cost: str, unit: str) -> float | None:
    if cost == "seconds":
        return _TIME.get(unit)
    if cost in ("bytes", "up", "down"):
        unit = unit.removesuffix("B")
        binary = unit.removesuffix("i").upper()
        if unit.endswith("i"):
            return 1024 ** ("KMGT".index(binary) + 1) if binary and binary in "KMGT" else None
        return _PREFIX.get("k" if unit == "K" else unit)
    if "flops" in cost:
        return _PREFIX.get(unit.removesuffix("FLOP").removesuffix("FLOPs"))
    return None if unit else 1


def target(text: str) -> Target:
    """``accuracy=0.8``, ``accuracy=80%``, ``loss=3.2``. Raises FedllmError for anything else."""
    name, sign, value = (part.strip() for part in text.partition("="))
    metrics = [metric for columns in QUALITY.values() for metric, _, _ in columns] + ["loss"]
    if not sign or not value:
        raise FedllmError(f"--target {text}: expected a metric and a value, e.g. accuracy=0.8")
    if name not in metrics:
        raise FedllmError(f"--target {text}: unknown metric {name!r}; {nearest(name, metrics)}")
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise FedllmError(f"--target {text}: {value!r} is no number, e.g. 0.8 or 80%") from None
    if not math.isfinite(number):
        raise FedllmError(f"--target {text}: expected a finite number, e.g. 0.8 or 80%")
    share = name in ("accuracy", "accuracy_per_byte", "macro_f1", "rouge_l")
    if share and not 0 <= number <= 1:
        raise FedllmError(f"--target {text}: {name} lies between 0 and 1; {value}% is a percentage")
    return Target(name, number, text)


def states(run: Run) -> list[State]:
    """The evaluated rounds of a run, in order."""
    found = []
    for entry in run.summary["history"]:
        metrics = entry.get("global") or entry.get("mean") or {}
        plain = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        if plain:
            found.append(State(entry["round"], plain, run.spent.until(entry["round"])))
    return found


def cost_of(state: State, cost: str) -> float:
    """What was spent of a cost until this state."""
    return sum(state.spent[name] for name in COSTS[cost]) if COSTS[cost] else state.round


def best(run: Run, spec: Budget, metric: str) -> State | None:
    """The evaluated round of best quality within the budget; None where none is within it."""
    within = [
        state for state in states(run)
        if cost_of(state, spec.cost) <= spec.limit and metric in state.metrics
    ]  # fmt: skip
    sign = 1 if metric in LOWER else -1
    return min(within, key=lambda state: sign * state.metrics[metric], default=None)


def reach(run: Run, spec: Target) -> State | None:
    """The first evaluated round that is as good as the target; None where none is."""
    for state in states(run):
        value = state.metrics.get(spec.metric)
        if value is None:
            continue
        if value <= spec.value if spec.metric in LOWER else value >= spec.value:
            return state
    return None


def _column(metric: str) -> tuple[str, float]:
    """A metric's title and factor."""
    for columns in QUALITY.values():
        for name, title, factor in columns:
            if name == metric:
                return title, factor
    return metric, 1


def _mean(values: Sequence[float], show: Callable[[float], str]) -> str:
    text = show(statistics.fmean(values))
    return text + (f" ± {show(statistics.stdev(values))}" if len(set(values)) > 1 else "")


def _quality(metric: str) -> Callable[[float], str]:
    factor = _column(metric)[1]
    return lambda value: f"{value * factor:.{1 if factor == 100 else 3}f}"


def show_cost(cost: str, value: float) -> str:
    """A cost with its unit."""
    if cost in ("bytes", "up", "down"):
        return size(value)
    if "flops" in cost:
        return amount("flops", value)
    if cost == "seconds":
        return f"{value:.1f}"
    return f"{value:.3g}" if cost == "rounds" else f"{value:.0f}"


def protocols(
    entries: Sequence[Entry], budgets: Sequence[Budget], targets: Sequence[Target], metric: str
) -> list[Sheet]:
    """
    One table for each budget and each target. metric: what is meant by quality.

    Raises FedllmError where no run has a ledger to say what its rounds cost, and for a target of
    something that no run measured.
    """
    known = [entry for entry in entries if entry.runs]
    if (budgets or targets) and not known:
        raise FedllmError("budgets and targets need ledger.jsonl, which is not in these folders")
    measured = {name for entry in known for run in entry.runs for state in states(run)
                for name in state.metrics}  # fmt: skip
    for spec in targets:
        if spec.metric not in measured:
            said = nearest(spec.metric, measured)
            raise FedllmError(f"--target {spec.text}: no run here measured it; {said}")
    return [*(_budgeted(known, spec, metric) for spec in dict.fromkeys(budgets)),
            *(_targeted(known, spec) for spec in dict.fromkeys(targets))]  # fmt: skip


def _budgeted(entries: Sequence[Entry], spec: Budget, metric: str) -> Sheet:
    lines, data = [], []
    for entry in entries:
        found = [best(run, spec, metric) for run in entry.runs]
        good = [state for state in found if state is not None]
        data += _raw(entry, found, metric)
        if not good:
            cheapest = min((cost_of(s, spec.cost) for run in entry.runs for s in states(run)[:1]),
                           default=0)  # fmt: skip
            least = f"at least {show_cost(spec.cost, cheapest)}"
            lines.append([entry.name, "none", "", least, f"0 of {len(found)}"])
            continue
        lines.append([
            entry.name,
            _mean([state.metrics[metric] for state in good], _quality(metric)),
            _mean([state.round for state in good], lambda v: f"{v:.3g}"),
            _mean([cost_of(state, spec.cost) for state in good],
                  lambda v: show_cost(spec.cost, v)),
            f"{len(good)} of {len(found)}",
        ])  # fmt: skip
    return Sheet(
        f"budget-{spec.cost}-{_value(spec)}", f"Best {_column(metric)[0]} under {spec.text}",
        ["run", _column(metric)[0], "round", f"spent ({spec.cost})", "seeds"], lines,
        ["run", "seed", "round", metric, *_RAW], data,
        "Best of the evaluated rounds within the budget, chosen on the rows that it is reported "
        "on. " + SPENT,
    )  # fmt: skip


SPENT = "Spent: by all clients and the server together, evaluation left out."
_RAW = ("bytes_up", "bytes_down", "flops", "client_flops", "seconds", "optimizer_steps")
_SHOWN = ("rounds", "up", "down", "flops", "client-flops", "seconds", "steps")


def _targeted(entries: Sequence[Entry], spec: Target) -> Sheet:
    title, factor = _column(spec.metric)
    lines, data = [], []
    for entry in entries:
        found = [reach(run, spec) for run in entry.runs]
        good = [state for state in found if state is not None]
        data += _raw(entry, found, spec.metric)
        costs = [
            _mean([cost_of(s, cost) for s in good], lambda v, c=cost: show_cost(c, v))  # type: ignore[misc]
            for cost in _SHOWN
        ] if good else [_closest(entry, spec), *[""] * (len(_SHOWN) - 1)]  # fmt: skip
        lines.append([entry.name, f"{len(good)} of {len(found)}", *costs])
    sign = "at most" if spec.metric in LOWER else "at least"
    value = f"{spec.value * factor:g}{' %' if factor == 100 else ''}"
    header = ["run", "seeds", "round", "up", "down", "FLOPs", "client FLOPs", "seconds", "steps"]
    return Sheet(
        f"target-{spec.metric}-{_value(spec)}", f"Cost to reach {title} of {sign} {value}",
        header, lines,
        ["run", "seed", "round", spec.metric, *_RAW], data,
        "At the first evaluated round that reached it; means over the seeds that did. " + SPENT,
    )  # fmt: skip


def _value(spec: Budget | Target) -> str:
    """What was asked for, as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "", spec.text.partition("=")[2])


def _closest(entry: Entry, spec: Target) -> str:
    values = [s.metrics[spec.metric] for run in entry.runs for s in states(run)
              if spec.metric in s.metrics]  # fmt: skip
    if not values:
        return "not measured"
    nearest_ = min(values) if spec.metric in LOWER else max(values)
    return f"not reached (best {_quality(spec.metric)(nearest_)})"


def _raw(entry: Entry, found: Sequence[State | None], metric: str) -> list[list[Any]]:
    """A line for each seed, in full precision."""
    lines: list[list[Any]] = []
    for seed, state in zip(entry.seeds, found, strict=True):
        if state is None:
            lines.append([entry.name, seed, *[""] * (2 + len(_RAW))])
        else:
            spent = [state.spent[name] for name in _RAW]
            lines.append([entry.name, seed, state.round, state.metrics[metric], *spent])
    return lines
