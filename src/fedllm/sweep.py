"""
One experiment with several values of some of its keys, each with every seed.

Axes multiply; keys of one axis change together. Each point and seed is a run folder of its own, so
an interrupted sweep goes on where it was, and one with more values runs only what is new.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm import experiment as ex
from fedllm import federation
from fedllm.compare import joined, read
from fedllm.errors import FedllmError
from fedllm.federation import Listener, Silent

LONGEST = 100  # letters of a point's name, which is a folder's
FREE = ("sweep", "seeds", "compare")  # a sweep that is resumed may have more values and seeds


@dataclass(frozen=True)
class Point:
    """One combination of values: its name, what it sets, and the experiment that it makes."""

    name: str
    settings: Mapping[str, Any]
    experiment: ex.Experiment


def points(experiment: ex.Experiment) -> list[Point]:
    """
    All combinations, in the order of the file; the same one twice counts once.

    Raises FedllmError for a key or value that no experiment has, and where nothing is varied.
    """
    if not experiment.sweep:
        raise FedllmError(
            "sweep: nothing is varied; give --sweep KEY=A,B,C, or a [[sweep]] table in the file"
        )
    axes = [[dict(zip(axis, values, strict=True)) for values in zip(*axis.values(), strict=True)]
            for axis in experiment.sweep]  # fmt: skip
    keys = [key for axis in experiment.sweep for key in axis]
    for key in keys:
        if key.partition(".")[0] in ("seeds", "name", "sweep", "compare", "plan"):
            raise FedllmError(
                f"sweep: {key!r} cannot be varied: no run depends on it, or every point has it"
            )
    if len(set(keys)) < len(keys):
        raise FedllmError(f"sweep: {max(keys, key=keys.count)!r} is in more than one [[sweep]]")
    plain = experiment.replace(sweep=())
    named: dict[str, list[dict[str, Any]]] = {}
    for combination in itertools.product(*axes):
        settings = {key: value for part in combination for key, value in part.items()}
        name = ",".join(f"{_short(key, keys)}={_word(value)}" for key, value in settings.items())
        alike = named.setdefault(name, [])
        if settings not in alike:
            alike.append(settings)
    found = []
    for name, alike in named.items():
        for settings in alike:  # a name follows from its values, not from their order
            whole = len(alike) == 1 and len(name) <= LONGEST
            full = name if whole else f"{name[:LONGEST]},{_digest(settings)}"
            found.append(Point(full, settings, ex.vary(plain, settings)))
    return found


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _short(key: str, keys: Sequence[str]) -> str:
    """A key's last word, where it is no other key's."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _word(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, dict):
        value = "-".join(str(v) if k == "kind" else f"{k}-{v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        value = "-".join(map(str, value))
    return re.sub(r"[^\w.+-]+", "_", str(value).rpartition("/")[2] or str(value))


def run(
    experiment: ex.Experiment, folder: Path, *, resume: bool = False, jobs: int = 1,
    listener: Listener | None = None,
) -> dict[str, Any]:  # fmt: skip
    """
    Run every point with every seed into ``folder/<point>/seed-<seed>``; returns the summary.

    resume: finished runs are not repeated, unfinished ones go on.  jobs: processes at once, each
    with one thread.  Raises FedllmError for what a point would refuse, before the first one runs.
    """
    listener = listener or Silent()
    listed = points(experiment)
    stored = folder / "experiment.toml"
    if resume and stored.exists():
        ex.agree(stored, experiment, FREE)
    _look(listed, experiment.seeds[0], folder)
    federation.create(folder, force=resume)
    stored.write_text(ex.dump(experiment))
    tasks = [
        (point.experiment, seed, folder / point.name / f"seed-{seed}")
        for seed in experiment.seeds
        for point in listed
    ]
    todo = [task for task in tasks if not (task[2] / "summary.json").exists()]
    if len(todo) < len(tasks):
        listener.note(f"{len(tasks) - len(todo)} of {len(tasks)} runs are there already")
    if todo:  # until they are there, the sweep is not complete
        (folder / "summary.json").unlink(missing_ok=True)
    if jobs > 1:
        _side_by_side(todo, jobs, listener)
    else:
        for spec, seed, inner in todo:
            _one(spec, seed, inner, listener)
    runs = {
        point.name: [read(folder / point.name / f"seed-{seed}") for seed in experiment.seeds]
        for point in listed
    }
    total = joined(experiment, runs)
    for point in listed:
        total["parts"][point.name]["settings"] = dict(point.settings)
    federation.write_json(folder / "summary.json", total)
    return total


def _look(listed: Sequence[Point], seed: int, folder: Path) -> None:
    """Raise FedllmError for whatever a point would refuse, and for results of another's."""
    for point in listed:
        there = list((folder / point.name).glob("seed-*/experiment.toml"))
        for path in there:
            run = ex.load(path)
            data = point.experiment.data.model_copy(update={"labels": run.data.labels})
            if not ex.same(run, point.experiment.replace(data=data), FREE):
                raise FedllmError(
                    f"{path}: has other settings than {point.name}; take another --out"
                )
        if not there:
            prepared = federation.prepare(point.experiment, seed)
            federation.check(point.experiment, seed, prepared)


def _one(spec: ex.Experiment, seed: int, folder: Path, listener: Listener | None = None) -> None:
    federation.run(spec, seed, folder, resume=folder.exists(), listener=listener)


def _alone() -> None:
    """A process beside others computes with one thread."""
    import torch

    torch.set_num_threads(1)


def _side_by_side(
    tasks: Sequence[tuple[ex.Experiment, int, Path]], jobs: int, listener: Listener
) -> None:
    """Runs in processes; the first that fails ends the sweep, what is committed stays."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process loads torch
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_alone)
    left, count = list(tasks), 0
    waiting: dict[Future[None], Path] = {}
    try:
        while left or waiting:
            while left and len(waiting) < jobs:  # no more: what is submitted cannot be called back
                task = left.pop(0)
                waiting[pool.submit(_one, *task)] = task[2]
            done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                folder = waiting.pop(future)
                count += 1
                listener.note(f"{count} of {len(tasks)}: {folder.parent.name}, {folder.name}")
    except BrokenProcessPool:
        raise FedllmError(
            "a process of the sweep was killed (out of memory?): --resume goes on, perhaps with "
            "fewer --jobs"
        ) from None
    except BaseException:
        for process in list(getattr(pool, "_processes", {}).values()):
            process.terminate()  # committed rounds are kept
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
