"""
A mentor at each client (FedKD, Wu et al., arXiv 2108.13323; K-03).

A larger model that never leaves the client and the small common one, the mentee, see the same
private batches and learn from each other; the mentee alone travels. Left out of the paper: the
terms of the attention maps, as fused attention has none, and the learnt map between hidden states,
which are compared where both models are equally wide, and only those that the heads read.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fedllm.errors import FedllmError
from fedllm.models.loading import LanguageModel
from fedllm.strategies.base import Group, Site
from fedllm.training.jobs import Backward, Forward, Half, Passed, Tasked, Trained
from fedllm.training.known import known
from fedllm.training.learner import Learner, Plan, Span
from fedllm.training.objectives import Said, mutual

MENTOR, STATE = "mentor", "mentor-optimizer"  # groups of a client's state
NAMES = ("mentee", MENTOR)


def learn_together(site: Site, mentee: Group, mentor: Group, step: str) -> Tasked[Trained]:
    """
    This round's epochs over the private rows, for both models; the mentee's result.

    The mentor and its optimizer go on from round to round, kept at the site; the mentee's
    optimizer does as ``training.optimizer_state`` says. The loss is the mentee's cross-entropy.
    """
    assert site.server_model is not None
    training, keep = site.setup.training, site.setup.training.optimizer_state == "keep"
    pair = (
        _side(site, site.server_model, mentee, site.group("optimizer") if keep else {}, step),
        _side(site, site.model, mentor, site.group(STATE), step),
    )
    plans, halves = [plan for plan, _ in pair], [half for _, half in pair]
    kept = sum(site.meter.held.values())
    beside = [half.held + kept for half in reversed(halves)]
    per_round = plans[0].per_pass * training.epochs
    first = per_round * (site.round - 1)
    batches = [plan.between(first, first + per_round) for plan in plans]
    span, summed, seen = Span(site.round - 1, site.setup.rounds), 0.0, 0
    for number in range(per_round):
        passes: list[Passed] = []
        for name, half, rows, held in zip(NAMES, halves, batches, beside, strict=True):
            half.beside = held + sum(passed.left for passed in passes)
            with site.meter.step(step):
                batch = next(rows)
            purpose = (*plans[0].purpose, name, "dropout", first, number)
            passes.append((yield Forward(half, batch, purpose, step)))
        with site.meter.step(step):
            said = Said(passes[0].out, passes[0].features), Said(passes[1].out, passes[1].features)
            losses, tasks = mutual(said, batch.targets)
            summed, seen = summed + float(tasks[0]) * batch.units, seen + batch.units
        if not math.isfinite(sum(float(loss.detach()) for loss in losses)):
            raise FedllmError(
                f"the loss became {[float(loss.detach()) for loss in losses]} at batch "
                f"{number + 1}: lower training.rate or set training.clip"
            )
        halves[0].beside = beside[0] + passes[1].left
        for half, passed, loss in zip(halves, passes, losses, strict=True):
            at = span.at(number / per_round)
            yield Backward(passed, step, goal=loss, learners=(half.learner,), progress=at)
            halves[1].beside = beside[1]  # the mentee's graph is gone
    site.keep(MENTOR, halves[1].learner.values())
    site.keep(STATE, halves[1].learner.state())
    learner = halves[0].learner
    if keep:
        site.keep("optimizer", learner.state())
    return Trained(learner.values(), learner.state(), summed / max(seen, 1), per_round)


def _side(
    site: Site, model: LanguageModel, tunables: Group, optimizer: Group, step: str
) -> tuple[Plan, Half]:
    """One model's batches and the model in training; blocks that nobody trains ran before."""
    plan = site.plan(site.train, "private")
    below = known(model, model.frozen.begin, plan.examples, site.meter, step)
    core = model.part("whole", 0, 0 if below is None else model.frozen.begin)
    learner = Learner(tunables, site.setup.training, optimizer, device=model.device)
    return replace(plan, known=below), Half(model, core, learner, site.meter)
