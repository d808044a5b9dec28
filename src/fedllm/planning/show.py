"""A plan, and the advice that goes with it, on a terminal, in Markdown and as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedllm.errors import FedllmError, nearest
from fedllm.estimates.lines import Line
from fedllm.planning.advise import Advice, Choice
from fedllm.planning.plan import Cutting, Plan
from fedllm.report.tables import amount, markdown, size

FORMATS = ("table", "md", "json")
HEADER = [
    "strategy", "up", "down", "client FLOPs", "server FLOPs", "client memory", "server memory",
    "seconds a round",
]  # fmt: skip
CAPTION = (
    "bytes: whole frames of a client and round; FLOPs and seconds: of a round; memory: tensors, at "
    "most; nothing was run"
)
CUTTINGS = ["cut", "clients at each", "seconds a round", "client memory", "too large for"]
CHOICES = ["choice", "bytes", "client FLOPs", "client memory", "seconds"]


def _row(line: Line) -> list[str]:
    if line.refused:
        return [line.variant, *("" for _ in HEADER[1:])]
    return [
        line.variant, size(line.up), size(line.down), amount("flops", line.flops),
        amount("flops", line.server_flops), size(line.memory), size(line.server_memory),
        f"{line.seconds:.1f}",
    ]  # fmt: skip


def _cutting(cutting: Cutting) -> list[str]:
    cuts = ", ".join(f"{cut}: {count:,}" for cut, count in cutting.clients.items())
    return [cutting.name, cuts, f"{cutting.line.seconds:.1f}", size(cutting.line.memory),
            ", ".join(cutting.small)]  # fmt: skip


def _choice(choice: Choice) -> list[str]:
    return [
        choice.name, size(choice.cost("bytes")), amount("flops", choice.cost("flops")),
        size(choice.cost("memory")), f"{choice.cost('deadline'):.1f}",
    ]  # fmt: skip


def _facts(plan: Plan) -> dict[str, str]:
    rows = plan.break_even.items()
    even = ", ".join((f"rank {r}: " if r else "") + f"{count:,.1f}" for r, count in rows)
    return {
        **plan.facts,
        "parameters": f"{plan.base:,} frozen, {plan.tunable:,} trained",
        "break-even": f"logits send less than parameters below so many public rows a round: {even}",
    }


def _notes(plan: Plan) -> list[str]:
    refused = [f"{line.strategy} cannot run: {line.refused}" for line in plan.lines if line.refused]
    return [*plan.notes, *refused]


def _advice(advice: Advice) -> list[str]:
    """What the advisor says, in sentences."""
    found = advice.best
    if found is None:
        return ["nothing fits; every choice breaks a limit"]
    said = f"fits best: {found.name}, {size(found.cost('bytes'))} a client and round"
    return [said, *(f"its price: {text}" for text in advice.price)]


def known(form: str) -> None:
    """Raises FedllmError for a format that there is not."""
    if form not in FORMATS:
        raise FedllmError(f"--format {form}: {nearest(form, FORMATS)}")


def text(plan: Plan, advice: Advice | None, form: str) -> str:
    """The plan in Markdown (``md``) or as JSON (``json``)."""
    if form == "json":
        return json.dumps(as_data(plan, advice), indent=1)
    parts = [f"# {plan.title}", *(f"- {key}: {value}" for key, value in _facts(plan).items())]
    parts += ["", markdown(HEADER, [_row(line) for line in plan.lines]), "", CAPTION]
    parts += [f"- note: {note}" for note in _notes(plan)]
    if plan.cuttings:
        parts += ["", "## Cuts", "", markdown(CUTTINGS, [_cutting(one) for one in plan.cuttings])]
    if advice is not None:
        parts += ["", "## What fits", "", *_advice(advice), ""]
        parts += [markdown(CHOICES, [_choice(choice) for choice in advice.front]), ""]
        rejected = [c for c in advice.choices if c.broken]
        parts += [f"- {c.name}: {'; '.join(c.broken)}" for c in rejected]
    return "\n".join(parts)


def as_data(plan: Plan, advice: Advice | None) -> dict[str, Any]:
    """The same as plain values."""
    lines = {
        line.strategy: {
            "variant": line.variant, "refused": line.refused, "up": line.up, "down": line.down,
            "payload_up": line.payload[0], "payload_down": line.payload[1],
            "client_flops": line.flops, "server_flops": line.server_flops,
            "client_memory": line.memory, "server_memory": line.server_memory,
            "seconds": line.seconds, "messages": line.messages,
        }
        for line in plan.lines
    }  # fmt: skip
    found: dict[str, Any] = {
        "title": plan.title, "base": plan.base, "tunable": plan.tunable, "lines": lines,
        "break_even": {str(rank): rows for rank, rows in plan.break_even.items()},
        "facts": plan.facts, "notes": _notes(plan),
    }  # fmt: skip
    if plan.cuttings:
        found["cuts"] = [
            {"name": one.name, "clients": {str(c): n for c, n in one.clients.items()},
             "seconds": one.line.seconds, "client_memory": one.line.memory,
             "too_large_for": list(one.small)}
            for one in plan.cuttings
        ]  # fmt: skip
    if advice is not None:
        found["advice"] = {
            "best": advice.best and _plain(advice.best),
            "price": list(advice.price),
            "front": [_plain(choice) for choice in advice.front],
            "rejected": [_plain(choice) for choice in advice.choices if choice.broken],
        }
    return found


def _plain(choice: Choice) -> dict[str, Any]:
    costs = {key: choice.cost(key) for key in ("bytes", "flops", "memory", "deadline")}
    return {
        "name": choice.name, "strategy": choice.strategy, "rank": choice.rank, "cut": choice.cut,
        "labels": choice.labels, "public": choice.public, "codec": choice.codec, **costs,
        "broken": list(choice.broken),
    }  # fmt: skip


def show(plan: Plan, advice: Advice | None) -> None:
    """Print tables."""
    console = Console(width=None if Console().is_terminal else 150)
    facts = Table(title=escape(plan.title), show_header=False)
    for key, value in _facts(plan).items():
        facts.add_row(key, escape(value))
    console.print(facts)
    console.print(_table("", CAPTION, HEADER, [_row(line) for line in plan.lines]))
    for note in _notes(plan):
        console.print(f"note: {note}", style="yellow", markup=False)
    if plan.cuttings:
        rows = [_cutting(one) for one in plan.cuttings]
        console.print(_table("cuts", "blocks at the clients", CUTTINGS, rows))
    if advice is None:
        return
    for sentence in _advice(advice):
        console.print(sentence, style="bold", markup=False)
    rows = [_choice(choice) for choice in advice.front]
    console.print(_table("what fits", "no other choice is cheaper everywhere", CHOICES, rows))
    rejected = [[c.name, "; ".join(c.broken)] for c in advice.choices if c.broken]
    if rejected:
        console.print(_table("rejected", "", ["choice", "because"], rejected, right=False))


def _table(
    title: str, caption: str, header: list[str], rows: list[list[str]], right: bool = True
) -> Table:
    table = Table(title=title, caption=caption)
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if right and position else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
