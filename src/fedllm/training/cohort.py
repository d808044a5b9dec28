"""
Many clients' work in one pass over the frozen base; one client's is the same with one slot.

A client's half of a strategy asks for work by yielding a job (``training.jobs``); ``work`` does the
jobs of all clients that wait, side by side where their tunables can be stacked, and one by one
where they cannot. Losses, clipping, schedule, optimizer, dropout streams and numbers of steps stay
each client's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fedllm import experiment as ex
from fedllm.models.loading import LanguageModel
from fedllm.training.fit import fit
from fedllm.training.halves import backward, forward
from fedllm.training.infer import infer
from fedllm.training.jobs import Backward, Fit, Forward, Infer, Job, Tasked
from fedllm.training.passes import memory

J = TypeVar("J")
R = TypeVar("R")


def work(jobs: Sequence[Job]) -> list[Any]:
    """
    Do the jobs; returns each one's result, or the exception that it met.

    One client's fault (data that do not fit, a loss that is no number) is its own.
    """
    results: dict[int, Any] = {}
    for kind, do in ((Fit, fit), (Infer, infer), (Forward, forward), (Backward, backward)):
        mine: list[Any] = [job for job in jobs if isinstance(job, kind)]
        for group in _groups(mine):
            try:
                found: list[Any] = do(group)
            except Exception as error:  # not of one client's pass, where faults are its own
                found = [error] * len(group)
            results |= {id(job): result for job, result in zip(group, found, strict=True)}
    return [results[id(job)] for job in jobs]


def together(tasks: Mapping[str, Tasked[R]]) -> dict[str, R | Exception]:
    """Carry on with everybody's task until all are done; what one raises is its own result."""
    results: dict[str, R | Exception] = {}
    news: dict[str, Any] = dict.fromkeys(tasks)
    while news:
        jobs: dict[str, Job] = {}
        for name, result in news.items():
            try:
                task = tasks[name]
                failed = isinstance(result, Exception)
                jobs[name] = task.throw(result) if failed else task.send(result)
            except StopIteration as end:
                results[name] = end.value
            except Exception as error:  # the boundary of a client: its fault is not spread
                results[name] = error
        news = dict(zip(jobs, work(list(jobs.values())), strict=True))
    return {name: results[name] for name in tasks}


def alone(task: Tasked[R]) -> R:
    """The same for one. Raises what it raised."""
    result = together({"": task})[""]
    if isinstance(result, Exception):
        raise result
    return result


def stackable(model: LanguageModel, training: ex.Training | None = None) -> bool:
    """Whether many clients' tunables can train in one pass."""
    return model.stackable and not (training is not None and training.base_dropout)


def cohort_size(model: LanguageModel, training: ex.Training) -> int:
    """How many clients one process should train at once: as its memory allows, at most 256."""
    if not stackable(model, training):
        return 1
    # values, gradients, two slots of the optimizer, stacked copies, frames in and out
    each = 10 * max(
        sum(t.numel() * t.element_size() for t in one.initial.values())
        for one in (model, model.before) if one is not None
    )  # fmt: skip
    return max(1, min(256, memory(model.device) // 8 // each))


def _groups(jobs: Sequence[J]) -> list[list[J]]:
    """Jobs that can be done in one pass."""
    found: dict[object, list[J]] = {}
    for job in jobs:
        found.setdefault(_kin(job), []).append(job)
    return list(found.values())


def _kin(job: Any) -> object:
    if isinstance(job, Backward):
        return "backward"
    if isinstance(job, Forward):
        half, training = job.half, job.half.learner.training
        key: tuple[object, ...] = (id(half.core), training.base_dropout, job.kind)
        model, alone = half.model, not stackable(half.model, training)
    elif isinstance(job, Fit):
        model, alone = job.model, not stackable(job.model, job.training)
        key = (id(model), job.training)
    else:
        model, alone = job.model, not stackable(job.model)
        key = (id(model), job.size)
    return (id(job), *key) if alone else key
