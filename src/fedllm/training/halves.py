"""Halves of a cut model: a pass forward, whose graph waits for its gradients, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedllm.errors import FedllmError
from fedllm.models.inputs import beside
from fedllm.training.jobs import Backward, Forward, Passed
from fedllm.training.learner import advance
from fedllm.training.meter import Member, charged, measures_itself, passing, typical
from fedllm.training.passes import apart, copies, drawing, packs, stack, weight


def forward(jobs: list[Forward]) -> list[Any]:
    half = jobs[0].half
    found: dict[int, Passed | Exception] = {}
    device = jobs[0].batch.inputs.x.device

    def attempt(pack: list[Forward]) -> None:
        found.update(zip(map(id, pack), _start(pack), strict=True))

    def fault(job: Forward, error: Exception) -> None:
        found[id(job)] = error

    for pack in packs(jobs, lambda job: weight(job.batch, half.model), half.model, device):
        apart(pack, attempt, fault)
    return [found[id(job)] for job in jobs]


def _start(pack: list[Forward]) -> list[Passed]:
    """A pass forward, whose graph waits for the gradients."""
    half = pack[0].half
    costs = [job.half.meter.cost(job.step) for job in pack]
    members = [
        Member(job.half.meter, cost, job.batch, job.held)
        for job, cost in zip(pack, costs, strict=True)
    ]

    def by_itself(member: Member) -> Callable[[], Any]:
        return _forgotten(next(job for job in pack if job.batch is member.batch))

    probe = None if measures_itself(members) else by_itself
    with passing(half.core, pack[0].kind, members, probe):
        outs = _half_pass(pack, [job.half.learner.params for job in pack])
    for job, cost in zip(pack, costs, strict=True):
        cost.flops += job.half.meter.flops(half.model, half.core, job.batch, backward=False)
        if job.watched is not None:
            cost.flops += sum(r * watching(n, half.model.width) for r, n in job.batch.inputs.blocks)
        cost.examples += job.batch.rows
        cost.tokens += job.batch.tokens
        job.half.meter.tick(job.batch.rows)
    waiting, peaks = set(range(len(pack))), members[0].meter.measured.peaks
    return [
        Passed(
            job, out, features, job.batch.inputs.x, peaks[member.shape(half.core, job.kind)][1],
            waiting, slot, len(pack), received,
        )
        for slot, (job, member, (out, features, received)) in enumerate(
            zip(pack, members, outs, strict=True)
        )
    ]  # fmt: skip


def _half_pass(
    pack: Sequence[Forward], params: Sequence[Mapping[str, Tensor]]
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """
    (output, features, attention received where it is watched) of each client, one graph behind all
    of them.
    """
    half = pack[0].half
    inputs = beside([job.batch.inputs for job in pack])
    around = drawing(
        half.model, half.learner.training, half.core, stack(params),
        [job.purpose for job in pack], inputs.x.device,
    )  # fmt: skip
    slots, watched = half.core.slots, pack[0].watched
    with around:
        slots.watched = watched
        try:
            features = half.core.features(inputs)
            out = half.core.finish(features)
        finally:
            slots.watched = None
    received = None if watched is None else slots.received
    if half.core.part in ("client", "body"):
        extra = half.core.prompt_tokens
        sizes = [sum(r * (n + extra) for r, n in job.batch.inputs.blocks) for job in pack]
    else:
        sizes = [job.batch.units for job in pack]
    if len(pack) == 1:
        return [(out, features, received)]
    parts = [None] * len(pack) if received is None else torch.split(received, sizes)
    return list(zip(torch.split(out, sizes), torch.split(features, sizes), parts, strict=True))


def watching(length: int, width: int) -> int:
    """FLOPs of a row's attention weights, written out beside the fused attention."""
    return 2 * length * length * width


def _forgotten(job: Forward) -> Callable[[], Tensor]:
    """To run a half for one client, so that the output's gradient goes nowhere."""
    params = copies(job.half.learner.params)
    batch = typical(job.batch)
    inputs = batch.inputs
    if inputs.x.requires_grad:
        inputs = inputs.after(inputs.x.detach().requires_grad_(True))
    copied = replace(job, batch=replace(batch, inputs=inputs))
    return lambda: _half_pass([copied], [params])[0][0]


def backward(jobs: list[Backward]) -> list[Any]:
    """Those of one pass go back together; a graph stays until its last client's gradient came."""
    passes: dict[int, list[Backward]] = {}
    results: dict[int, Any] = {}
    for job in jobs:
        out, gradient = job.passed.out, job.gradient
        if job.goal is None and gradient is not None and gradient.shape != out.shape:
            results[id(job)] = FedllmError(
                f"a gradient of shape {list(gradient.shape)} for an output of {list(out.shape)}"
            )
        else:
            passes.setdefault(id(job.passed.waiting), []).append(job)
    for group in passes.values():
        try:
            found = _back(group)
        except Exception as error:  # autograd's: nobody of this pass can go on
            found = [error] * len(group)
        results |= {id(job): result for job, result in zip(group, found, strict=True)}
    return [results[id(job)] for job in jobs]


def _back(group: list[Backward]) -> list[Any]:
    """Those of one pass: back, and the optimizers' step."""
    first = group[0].passed.job
    half = first.half
    members = []
    for job in group:
        own = job.passed.job
        meter = own.half.meter
        held = own.held + job.passed.left
        members.append(Member(meter, meter.cost(job.step), own.batch, held))
    waiting = group[0].passed.waiting
    later = waiting - {job.passed.slot for job in group}
    pairs = [
        (goal, job.gradient)
        for job in group
        if (goal := job.passed.out if job.goal is None else job.goal).requires_grad
    ]

    def by_itself(member: Member) -> Callable[[], None]:
        out = _forgotten(next(j.passed.job for j in group if j.passed.job.batch is member.batch))()

        def back() -> None:
            if out.requires_grad:
                out.sum().backward()  # type: ignore[no-untyped-call]

        return back

    probe = None if measures_itself(members) and group[0].passed.slots == 1 else by_itself
    with passing(half.core, f"{first.kind} backward", members, probe):
        if pairs:
            torch.autograd.backward(
                [goal for goal, _ in pairs], [gradient for _, gradient in pairs],
                retain_graph=bool(later),
            )  # fmt: skip
    waiting &= later
    moving = [(learner, job.progress) for job in group for learner in job.learners]
    if moving:
        with charged(members):
            advance([learner for learner, _ in moving], [at for _, at in moving])
    found = []
    for job, member in zip(group, members, strict=True):
        own, x = job.passed.job, job.passed.inputs
        meter, wants = own.half.meter, job.passed.inputs.requires_grad
        both = meter.flops(half.model, half.core, own.batch, True, wants)
        member.cost.flops += both - meter.flops(half.model, half.core, own.batch, False)
        member.cost.optimizer_steps += bool(job.learners)
        found.append(x.grad if wants else None)
    return found
