"""
Which public rows a round uses: each row has a score, and the highest are taken.

Yan et al., sections IV-B1 (selection with client feedback, K-06) and IV-B2 (pruning, K-10). What
is scored by unit is a row's mean over its units; among equal scores chance decides, so no scores
at all are a draw at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm import experiment as ex
from fedllm.data.examples import Examples
from fedllm.errors import FedllmError
from fedllm.flat import Ints
from fedllm.models.loading import LanguageModel
from fedllm.strategies.base import Group, ServerState, Site
from fedllm.strategies.forms import row_of, shaped
from fedllm.streams import stream
from fedllm.training.batches import Batch
from fedllm.training.cohort import alone
from fedllm.training.jobs import Infer, Tasked
from fedllm.training.meter import Meter

STEP = "choose"  # what the server computes for it
HISTOGRAM, SCORE = "histogram", "score"
Score = Callable[[Tensor, Tensor], Tensor]
"""(logits [units, outputs], targets [units]) -> what is found of each unit [units, ...]."""

# from the predictions of the server's model ------------------------------------------------------


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum p ln p: [units]."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def el2n(logits: Tensor, targets: Tensor) -> Tensor:
    """||softmax(z) - onehot(y)||_2 (arXiv 2107.07075): [units]."""
    return (logits.softmax(-1) - F.one_hot(targets, logits.shape[-1])).norm(dim=-1)


def prediction(logits: Tensor, targets: Tensor) -> Tensor:
    """softmax(z), which rows are near to or far from each other by: [units, outputs]."""
    return logits.softmax(-1)


SCORES: dict[str, Score] = {"entropy": entropy, "el2n": el2n, "coverage": prediction}


def looked(
    score: Score, model: LanguageModel, tunables: Mapping[str, Tensor], rows: Examples, size: int,
    meter: Meter,
) -> Tasked[Tensor]:  # fmt: skip
    """The mean of a score over each row's units: [rows, ...]."""
    whose, units = row_of(rows), torch.from_numpy(rows.targets)
    means: list[Tensor] = []

    def take(batch: Batch, logits: Tensor, features: Tensor) -> None:
        found = score(logits, batch.targets).cpu()
        if not means:
            means.append(found.new_zeros((len(rows), *found.shape[1:])))
        mine = whose[batch.places.cpu()]
        found = found / units[mine].view(-1, *[1] * (found.ndim - 1))
        means[0].index_add_(0, mine, found)

    yield Infer(model, tunables, rows, size, meter, STEP, take)
    return means[0]


# from scores to rows ----------------------------------------------------------------------------


def highest(scores: Tensor, count: int, rng: np.random.Generator) -> Ints:
    """The rows with the ``count`` highest scores, sorted; among equal ones chance decides."""
    order = rng.permutation(len(scores))
    falling = np.argsort(-scores.numpy()[order], kind="stable")
    return np.sort(order[falling[:count]])


def farthest_first(vectors: Tensor, count: int, rng: np.random.Generator) -> Ints:
    """
    Greedy k-center (Gonzalez, 1985): each row is the farthest from all before it. Sorted.

    vectors: [rows, n].  The first row is drawn. The largest distance of any row to the nearest
    chosen one is at most twice the least there is.
    """
    chosen = [int(rng.integers(len(vectors)))]
    nearest = torch.full((len(vectors),), torch.inf)
    exact = "donot_use_mm_for_euclid_dist"
    while len(chosen) < count:
        last = vectors[chosen[-1:]]
        nearest = nearest.minimum(torch.cdist(vectors, last, compute_mode=exact)[:, 0])
        nearest[chosen[-1]] = -1  # also where others lie on it
        chosen.append(int(nearest.argmax()))
    return np.sort(np.array(chosen))


def drawn(spec: ex.Public, rows: int) -> int:
    """How many of so many rows a round uses."""
    return min(spec.rows_per_round or rows, rows)


def draw(
    spec: ex.Public, rows: Examples, model: LanguageModel, state: ServerState, size: int,
    meter: Meter, rng: np.random.Generator,
) -> Ints:  # fmt: skip
    """A round's rows, sorted.  size: rows in a batch, where the server's model looks at them."""
    every, count = len(rows), drawn(spec, len(rows))
    scores = torch.zeros(every)
    if spec.choose == "random" or count == every:
        return highest(scores, count, rng)
    if spec.choose in SCORES:
        scores = alone(looked(SCORES[spec.choose], model, state.shared, rows, size, meter))
    with meter.step(STEP):
        if spec.choose == "coverage":
            return farthest_first(scores, count, rng)
        if spec.choose == "disagreement":
            scores = state.public.get(SCORE, scores)
        if spec.choose == "feedback" and state.clients:
            said = torch.stack([state.clients[name][HISTOGRAM] for name in sorted(state.clients)])
            scores = sampled(likeness(said, rows.labels), rng)
        return highest(scores, count, rng)


# from what clients say --------------------------------------------------------------------------


def noted(kept: Group, rows: Ints, units: Tensor, public: Examples, every: int) -> Group:
    """
    How much clients disagree on each public row, as of the last round that used it: ``score``.

    rows: those of this round.  units: what is found of each of their units.  public: these rows.
    Rows that no round used yet come before all others.
    """
    score = kept[SCORE].clone() if kept else torch.full((every,), torch.inf, dtype=torch.float64)
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row_of(public), units)
    score[torch.from_numpy(rows)] = sums / torch.from_numpy(public.targets)
    return {SCORE: score}


def likeness(histograms: Tensor, labels: Ints) -> Tensor:
    """
    w_y = p(y) / q(y) of each public row's label y: [rows].

    histograms: [clients, labels], rows of each label, whose sum is p; q is that of the ``labels``.
    """
    mine = torch.from_numpy(labels)
    p = histograms.double().sum(0)
    q = torch.bincount(mine, minlength=len(p))
    return (p / p.sum().clamp_min(1e-300))[mine] / (q[mine] / len(mine))


def sampled(weights: Tensor, rng: np.random.Generator) -> Tensor:
    """
    Scores whose highest are a sample without replacement by these weights: ln w + Gumbel noise.

    Rows of weight 0 come after all others.
    """
    return weights.log() + torch.from_numpy(rng.gumbel(size=len(weights)))


def asked(spec: ex.Public, rows: int, state: ServerState, cohort: Sequence[str]) -> set[str]:
    """Who is to say its histogram in this round: who has not yet, where rows are chosen by it."""
    if spec.choose != "feedback" or drawn(spec, rows) == rows:
        return set()
    return set(cohort) - set(state.clients)


def histogram(site: Site) -> Tensor:
    """
    The rows of each label among a client's training rows: float32 [labels].

    With ``feedback_epsilon`` Laplace noise of scale 2 / epsilon is added (a row with another label
    changes two counts by 1; how many rows there are is no secret), and what is then below 0 is 0.
    It is the same noise whenever it is asked. Raises FedllmError where the experiment does not say
    that rows are chosen by it.
    """
    public = site.setup.public
    if public.choose != "feedback":
        raise FedllmError(f"asked for a {HISTOGRAM}, but public.choose = {public.choose!r}")
    counts = np.bincount(site.train.labels, minlength=site.model.outputs).astype(np.float64)
    if public.feedback_epsilon is not None:
        rng = stream(site.setup.seed, site.name, HISTOGRAM)
        counts += rng.laplace(0, 2 / public.feedback_epsilon, len(counts))
    return torch.from_numpy(counts.clip(0)).float()


def misfit(known: Mapping[str, Tensor], labels: int) -> str:
    """Why what was said is no histogram; empty where it is one."""
    said = shaped(known, **{HISTOGRAM: ((labels,), torch.float32)})
    if not said and float(known[HISTOGRAM].min()) < 0:
        return f"sent {HISTOGRAM!r} below 0"
    return said
