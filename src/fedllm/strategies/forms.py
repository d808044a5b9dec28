"""
Forms of knowledge: what is said of each public unit (Yan et al., sections II-B and IV-B2).

A form turns logits into the tensors that travel, and these back into something that a softmax
reads like logits; or it says the hidden states that logits are made of. Everything else of the
logits strategy is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.data.examples import Examples
from fedllm.errors import FedllmError
from fedllm.knowledge import topk
from fedllm.knowledge.topk import TopK
from fedllm.message import Role
from fedllm.models.loading import LanguageModel
from fedllm.training.batches import Batch
from fedllm.training.jobs import Infer, Tasked
from fedllm.training.meter import Meter
from fedllm.training.objectives import cross_entropy

TINY = 1e-9
LARGE = 65_504.0  # what float16 carries
Known = dict[str, Tensor]


class Form(Protocol):
    """One form. Its tensors have units as first dimension."""

    @property
    def linear(self) -> bool:
        """Whether a mean of what is decoded is meant; else of the distributions it stands for."""
        ...

    @property
    def parts(self) -> Mapping[str, Role]:
        """Roles of the tensors that travel, by name."""
        ...

    def encode(self, logits: Tensor) -> Known:
        """[n, outputs] (``Features``: [n, width]) -> tensors [n, ...]."""
        ...

    def decode(self, known: Mapping[str, Tensor], outputs: int) -> Tensor:
        """Tensors [n, ...] -> float32 of the same shape."""
        ...

    def wrong(self, known: Mapping[str, Tensor], units: int, outputs: int) -> str:
        """Why these are not what units of so many outputs give; empty where they are."""
        ...


def shaped(known: Mapping[str, Tensor], **wanted: tuple[tuple[int, ...], torch.dtype]) -> str:
    """Which tensor has another shape or type than wanted; empty where none has."""
    for name, (shape, kind) in wanted.items():
        found = known[name]
        if tuple(found.shape) != shape:
            return f"sent {name!r} with shape {tuple(found.shape)}, not {shape}"
        if found.dtype is not kind:
            return f"sent {name!r} as {found.dtype}, not {kind}"
    return ""


class Logits:
    """All logits as they are: 4 bytes an output."""

    linear: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, Role]] = {"logits": Role.LOGIT}

    def encode(self, logits: Tensor) -> Known:
        """Themselves."""
        return {"logits": logits}

    def decode(self, known: Mapping[str, Tensor], outputs: int) -> Tensor:
        """Themselves."""
        return known["logits"]

    def wrong(self, known: Mapping[str, Tensor], units: int, outputs: int) -> str:
        """Another shape, or numbers that no model says and that would end the server's training."""
        return _bounded(known, "logits", (units, outputs))


def _bounded(known: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> str:
    said = shaped(known, **{name: (shape, torch.float32)})
    if not said and shape[0] and float(known[name].abs().max()) > LARGE:
        return f"sent {name} beyond {LARGE:g}"
    return said


class Features:
    """
    The hidden states that the head reads (K-05): 4 bytes a unit of width, whatever the outputs.

    A student is fitted to them with its own hidden states, and with a map where widths differ
    (``projection``). They teach no head.
    """

    linear: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, Role]] = {"features": Role.FEATURE}

    def encode(self, logits: Tensor) -> Known:
        """Themselves: what is given are hidden states."""
        return {"features": logits}

    def decode(self, known: Mapping[str, Tensor], outputs: int) -> Tensor:
        """Themselves."""
        return known["features"]

    def wrong(self, known: Mapping[str, Tensor], units: int, outputs: int) -> str:
        """Another shape than [units, width], or numbers too large; outputs: the width."""
        return _bounded(known, "features", (units, outputs))


RIDGE = 1e-3


def projection(student: Tensor, teacher: Tensor) -> Tensor:
    """
    The map from a student's features [n, d] to a teacher's [n, e]: float32 [d, e].

    P = argmin |F P - T|^2 + r |P|^2 = (F'F + r I)^-1 F'T with r = 0.001 of the mean of F'F's
    diagonal: fitted once, on all public units, before a distillation, and fixed in it. So
    no optimizer has a say in it, and the student, not the map, has to come nearer. With fewer units
    than d the map alone fits nearly all of them, and there is little left to be learnt.
    """
    f, t = student.double(), teacher.double()
    gram = f.T @ f
    ridge = RIDGE * gram.diagonal().mean().clamp_min(TINY)
    eye = torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge * eye, f.T @ t).float()


@dataclass(frozen=True)
class Labels:
    """
    Softened labels (K-05), softmax(z / T): with codec int8 one byte an output (K-09).

    Decoded they are T ln p of rows that sum to 1, which are the logits up to an offset.
    """

    temperature: float
    linear: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, Role]] = {"labels": Role.LOGIT}

    def encode(self, logits: Tensor) -> Known:
        """Probabilities."""
        return {"labels": (logits / self.temperature).softmax(-1)}

    def decode(self, known: Mapping[str, Tensor], outputs: int) -> Tensor:
        """T ln p, after a codec may have changed what they sum to."""
        p = known["labels"].clamp_min(TINY)
        return self.temperature * (p / p.sum(-1, keepdim=True)).log()

    def wrong(self, known: Mapping[str, Tensor], units: int, outputs: int) -> str:
        """Another shape, or what no codec makes of probabilities."""
        said = shaped(known, labels=((units, outputs), torch.float32))
        if not said and units and float(known["labels"].abs().max()) > 100:
            return "sent 'labels' that are no probabilities"
        return said


class Statistics:
    """
    The likeliest output and its probability (K-09): 8 bytes a unit whatever the outputs.

    The rest of the probability is taken to be even over all other outputs.
    """

    linear: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, Role]] = {"best": Role.INDEX, "chance": Role.LOGIT}

    def encode(self, logits: Tensor) -> Known:
        """Arg-max, and the largest probability."""
        chance, best = logits.softmax(-1).max(-1)
        return {"best": best.int(), "chance": chance[:, None]}

    def decode(self, known: Mapping[str, Tensor], outputs: int) -> Tensor:
        """Ln p of the reduced distribution."""
        chance = known["chance"].double().clamp(TINY, 1 - TINY)
        rest = ((1 - chance) / max(outputs - 1, 1)).log()
        logs = rest.repeat(1, outputs)
        return logs.scatter(-1, known["best"].long()[:, None], chance.log()).float()

    def wrong(self, known: Mapping[str, Tensor], units: int, outputs: int) -> str:
        """Another shape, or outputs that there are not."""
        said = shaped(known, best=((units,), torch.int32), chance=((units, 1), torch.float32))
        best = known["best"]
        if not said and units and not bool(((best >= 0) & (best < outputs)).all()):
            return f"sent 'best' outside 0 to {outputs - 1}"
        return said


def _within_one(known: Mapping[str, Tensor]) -> TopK:
    """Top-k knowledge whose mass a codec may have rounded to above 1."""
    value = known["value"]
    return TopK(known["index"], value - value.logsumexp(-1, keepdim=True).clamp_min(0))


@dataclass(frozen=True)
class Top:
    """The k likeliest outputs and ln p of each (K-08, FedMKT): 8 k bytes a unit."""

    k: int
    rest: topk.Rest = "renormalize"
    linear: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, Role]] = {"index": Role.INDEX, "value": Role.LOGIT}

    def encode(self, logits: Tensor) -> Known:
        """The likeliest first."""
        known = topk.top(logits, min(self.k, logits.shape[-1]))
        return {"index": known.index, "value": known.value.clamp_min(topk.FLOOR)}

    def decode(self, known: Mapping[str, Tensor], outputs: int) -> Tensor:
        """Logarithms of probabilities, with what is missing spread by ``rest``."""
        return topk.spread(_within_one(known), outputs, self.rest)

    def wrong(self, known: Mapping[str, Tensor], units: int, outputs: int) -> str:
        """Another shape, outputs that there are not, or the same one twice."""
        shape = (units, min(self.k, outputs))
        said = shaped(known, index=(shape, torch.int32), value=(shape, torch.float32))
        if said:
            return said
        try:
            topk.check(_within_one(known), outputs, "a reply")
        except FedllmError as error:
            return str(error)
        return ""


def form_of(spec: ex.Logits) -> Form:
    """The form that the options name; a model with fewer than ``top_k`` outputs sends them all."""
    if spec.form == "labels":
        return Labels(spec.temperature)
    if spec.form == "statistics":
        return Statistics()
    if spec.form == "features":
        return Features()
    return Top(spec.top_k or ex.TOP_K, spec.rest) if spec.form == "top-k" else Logits()


LOSS = "loss"


def roles(form: Form, known: Mapping[str, Tensor]) -> dict[str, Role]:
    """Of what ``look`` gave."""
    return {name: form.parts.get(name, Role.STATISTIC) for name in known}


def look(
    form: Form, model: LanguageModel, tunables: Mapping[str, Tensor], rows: Examples, size: int,
    meter: Meter, step: str, per: str = "",
) -> Tasked[Known]:  # fmt: skip
    """
    What a model knows of these rows, in this form: tensors [units, ...] in the rows' order.

    per: ``byte`` or ``token``: with ``loss``, too, [rows]: the cross-entropy of each row's targets
    by what it is divided by.
    """
    known: Known = {}
    units, losses = int(rows.targets.sum()), torch.zeros(int(rows.targets.sum()))

    def take(batch: Batch, logits: Tensor, features: Tensor) -> None:
        places = batch.places.cpu()
        for name, part in form.encode(features if isinstance(form, Features) else logits).items():
            if name not in known:
                known[name] = part.new_zeros((units, *part.shape[1:]), device="cpu")
            known[name][places] = part.cpu()
        if per:
            losses[places] = cross_entropy(logits, batch.targets, batch.places).cpu()

    yield Infer(model, tunables, rows, size, meter, step, take)
    if per:
        count = torch.from_numpy(rows.targets)
        each = torch.zeros(len(rows)).index_add_(0, row_of(rows), losses)
        known[LOSS] = each / (torch.from_numpy(rows.utf8) if per == "byte" else count)
    return known


def row_of(rows: Examples) -> Tensor:
    """The row that each unit belongs to: [units]."""
    return torch.repeat_interleave(torch.from_numpy(rows.targets))


@dataclass(frozen=True)
class Teacher:
    """Knowledge that is decoded as it is asked for: what ``Distillation`` follows."""

    form: Form
    known: Mapping[str, Tensor]
    outputs: int

    def __getitem__(self, places: Tensor) -> Tensor:
        """[n, outputs], or [n, width], of these units."""
        return self.form.decode({n: self.known[n][places] for n in self.form.parts}, self.outputs)

    def to(self, device: torch.device) -> Teacher:
        """The same on another device."""
        return Teacher(self.form, {n: t.to(device) for n, t in self.known.items()}, self.outputs)


CHUNK = 1 << 22  # decoded numbers that exist at once, of all who are heard


def slices(units: int, outputs: int) -> list[slice]:
    """All units, as many at a time as may be decoded together; one of none where there are none."""
    size = max(CHUNK // max(outputs, 1), 1)
    return [slice(i, i + size) for i in range(0, units, size)] or [slice(0, 0)]
