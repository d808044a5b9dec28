"""Passes without gradients, for evaluation and for what is known of a public set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fedllm.models.core import Core
from fedllm.models.inputs import beside
from fedllm.training.batches import Batch, batches
from fedllm.training.jobs import Infer
from fedllm.training.known import known
from fedllm.training.meter import Member, charged, held_bytes, measures_itself, passing, typical
from fedllm.training.passes import apart, given, packs, stack, weight


class _Inferring:
    """An ``Infer`` on its way."""

    def __init__(self, job: Infer) -> None:
        self.job = job
        self.cost = job.meter.cost(job.step)
        self.tunables = {name: tensor.to(job.model.device) for name, tensor in job.tunables.items()}
        self.core: Core
        self.batches: Iterator[Batch] | None = None
        self.held = held_bytes(job.model.whole)
        self.batch: Batch | None = None
        self.error: Exception | None = None

    @property
    def member(self) -> Member:
        assert self.batch is not None
        return Member(self.job.meter, self.cost, self.batch, self.held + given(self.batch))

    def fetch(self) -> None:
        job = self.job
        try:
            if self.batches is None:
                below = known(job.model, job.model.frozen.begin, job.examples, job.meter, job.step)
                begin = 0 if below is None else job.model.frozen.begin
                self.core = job.model.part("whole", 0, begin)
                self.held += sum(job.meter.held.values())
                device = str(job.model.device)
                self.batches = batches(job.examples, job.size, "bucket", None, 0, device, below)
            with job.meter.step(job.step):
                self.batch = next(self.batches, None)
        except Exception as error:
            self.error = error

    def fail(self, error: Exception) -> None:
        self.error = error

    @property
    def cells(self) -> int:
        """What the pass's limit counts: cells, or as many as the logits weigh."""
        return weight(self.member.batch, self.job.model)


@torch.no_grad()
def infer(jobs: list[Infer]) -> list[Any]:
    model = jobs[0].model
    every = [_Inferring(job) for job in jobs]
    live = every
    while True:
        for one in live:
            one.fetch()
        live = [one for one in live if one.batch is not None and one.error is None]
        if not live:
            return [one.error for one in every]
        for pack in packs(live, lambda one: one.cells, model, model.device):
            apart(pack, _look, _Inferring.fail)


def _look(pack: list[_Inferring]) -> None:
    """One batch of each: their logits and features, handed over."""
    model, core = pack[0].job.model, pack[0].core
    members = [one.member for one in pack]

    def by_itself(member: Member) -> Callable[[], Any]:
        one = next(one for one in pack if one.batch is member.batch)
        return lambda: core.apply_to(one.tunables, typical(member.batch).inputs)

    probe = None if measures_itself(members) else by_itself
    with passing(core, "forward", members, probe):
        tunables = stack([one.tunables for one in pack])
        inputs = beside([member.batch.inputs for member in members])
        with core.holding(tunables):
            features = core.features(inputs)
            logits = core.finish(features)
    units = [member.batch.units for member in members]
    parts = zip(torch.split(logits, units), torch.split(features.float(), units), strict=True)
    with charged(members):
        for one, part in zip(pack, parts, strict=True):
            try:
                one.job.take(one.member.batch, *part)
            except Exception as error:
                one.error = error
    for one, member in zip(pack, members, strict=True):
        batch = member.batch
        one.cost.flops += one.job.meter.flops(model, core, batch, backward=False)
        one.cost.examples += batch.rows
        one.cost.tokens += batch.tokens
        one.job.meter.tick(batch.rows)
