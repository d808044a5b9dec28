"""Top-k knowledge: of each unit's distribution only the k likeliest outputs (FedMKT, 3.2; K-08)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedllm.errors import FedllmError

Rest = Literal["renormalize", "uniform"]
# ln 1e-30: what stands for a probability of nothing. Not -inf: 0 x (-inf - log q) would be NaN.
FLOOR = -69.0


@dataclass(frozen=True, eq=False)
class TopK:
    """
    The k likeliest outputs of each unit.

    index: int32 [units, k], distinct within a row.  value: float32 [units, k], natural logarithms
    of the probabilities under the full softmax, so that 1 - sum exp(value) is missing.
    """

    index: Tensor
    value: Tensor

    def __post_init__(self) -> None:
        """Raise FedllmError where the two parts do not fit each other."""
        shapes = tuple(self.index.shape), tuple(self.value.shape)
        types = self.index.dtype, self.value.dtype
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or types != (torch.int32, torch.float32):
            raise FedllmError(
                f"top-k knowledge: index {types[0]} {shapes[0]} and value {types[1]} {shapes[1]}; "
                "expected int32 and float32 of one shape [units, k]"
            )

    def __len__(self) -> int:
        """Units."""
        return len(self.index)

    @property
    def k(self) -> int:
        """Entries of a unit."""
        return self.index.shape[1]

    def take(self, units: Tensor) -> TopK:
        """These units, in this order."""
        return TopK(self.index[units], self.value[units])


def top(logits: Tensor, k: int) -> TopK:
    """
    The ``k`` likeliest outputs under softmax(logits [n, V]), the likeliest first.

    k = V loses nothing. Raises FedllmError unless 1 <= k <= V.
    """
    outputs = logits.shape[-1]
    if not 1 <= k <= outputs:
        raise FedllmError(f"k = {k}: this model has {outputs} outputs; valid: 1 to {outputs}")
    logits = logits.float()
    value, index = logits.topk(k)
    return TopK(index.int(), value - logits.logsumexp(-1, keepdim=True))


def check(known: TopK, outputs: int, whose: str) -> None:
    """Refuse what is no knowledge over ``outputs`` outputs, naming ``whose`` it is: FedllmError."""
    wrong = ""
    index, value = known.index, known.value
    if not known.k or (len(known) and not bool(((index >= 0) & (index < outputs)).all())):
        wrong = f"its indices are not all in 0 to {outputs - 1}"
    elif not bool(torch.isfinite(value).all()):
        wrong = "it holds NaN or infinity"
    elif bool((kept(known) > 1 + 1e-3).any()):
        wrong = "its probabilities sum to more than 1"
    else:
        ordered = index.sort(-1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            wrong = "it names an output twice in one unit"
    if wrong:
        raise FedllmError(f"top-k knowledge of {whose}: {wrong}")


def kept(known: TopK) -> Tensor:
    """Probability mass of the k entries: [n]."""
    return known.value.exp().sum(-1)


def spread(known: TopK, outputs: int, rest: Rest) -> Tensor:
    """
    Log-probabilities of all outputs, [n, V], whose exponentials sum to 1.

    rest: what becomes of the missing mass. "renormalize": the k entries share it as they share the
    rest, all others get e^FLOOR = 1e-30, so that a KL against it stays finite. "uniform": the other
    V - k outputs share it evenly (each at least 1e-30). A tail in one bucket is no matrix of V
    columns: ``bucketed_kl``. Raises FedllmError for another ``rest`` or an index beyond V.
    """
    if rest not in ("renormalize", "uniform"):
        raise FedllmError(
            f"rest = {rest!r}: valid: renormalize, uniform (for one bucket use bucketed_kl)"
        )
    _within(known, outputs)
    value, others = known.value, outputs - known.k
    if rest == "renormalize" or others == 0:
        value = value - value.logsumexp(-1, keepdim=True)
        tail = torch.full_like(value[:, :1], FLOOR)
    else:
        tail = ((1 - kept(known)) / others).clamp(min=0).log().clamp(min=FLOOR)[:, None]
    return tail.repeat(1, outputs).scatter(-1, known.index.long(), value)


def bucketed_kl(student: Tensor, known: TopK) -> Tensor:
    """
    KL of the knowledge from softmax(student [n, V]) over k + 1 events, the last "any other": [n].

    sum_k p ln(p / q) + (1 - P) ln((1 - P) / (1 - Q)), with P and Q the mass that knowledge and
    student give to the k outputs. It says nothing of how the tail is divided. Raises FedllmError
    for an index beyond V.
    """
    outputs = student.shape[-1]
    _within(known, outputs)
    index = known.index.long()
    q = student.float().log_softmax(-1)
    loss = (known.value.exp() * (known.value - q.gather(-1, index))).sum(-1)
    if known.k == outputs:
        return loss
    missing = (1 - kept(known)).clamp(min=0)
    tail = q.scatter(-1, index, -torch.inf).logsumexp(-1)  # ln(1 - Q) without cancellation
    return loss + missing * (missing.log().clamp(min=FLOOR) - tail)


def _within(known: TopK, outputs: int) -> None:
    if known.k > outputs or (len(known) and int(known.index.max()) >= outputs):
        raise FedllmError(
            f"top-k knowledge: k = {known.k}, highest index {int(known.index.max())}; "
            f"expected k of at most {outputs} and indices below {outputs}"
        )
