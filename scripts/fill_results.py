"""
Put finished comparisons into README.md and docs/results.md.

usage: python scripts/fill_results.py runs/banking77-minilm runs/shakespeare
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from fedllm.compare import read
from fedllm.report import plots, tables

ROOT = Path(__file__).parent.parent
MARK = "<!-- banking77 -->"
BANKING = """Banking77 divided as in the paper's case study (5,002 public rows, 3 clients x 1,667,
test 3,080), MiniLM (22.7 M, real weights), LoRA r = 8 on query and value; {what}, one core. Costs
are per client and round; memory is the peak of live tensors. Made by
`fedllm compare experiments/banking77-minilm.toml` (`make results` runs it). The rate was chosen
on held-out training rows. Activations, with the sequential server, get three server steps
for each step of the others; standalone-equal-steps gives each client alone as many steps as logits
gave it."""
SHAKESPEARE = """Tiny Shakespeare: five speakers, each a client with its own lines (80 % training,
20 % held out); stories-260k (Llama type, 260 k, real weights, trained on children's stories), LoRA
r = 8; {what}, one core. Made by `fedllm compare experiments/shakespeare.toml`{cut}."""


def described(summary: dict[str, Any]) -> str:
    """Rounds and seeds in words."""
    seeds = summary["seeds"]
    many = "s" if len(seeds) > 1 else ""
    return f"{summary['rounds']} rounds of one local epoch, seed{many} " + ", ".join(
        map(str, seeds)
    )


def main() -> None:
    """Rewrite the marked part of the README, the page of results and its picture."""
    banking, shakespeare = (read(Path(folder)) for folder in sys.argv[1:3])
    text = BANKING.format(what=described(banking))
    table = tables.markdown(*tables.rows(banking))
    block = f"{MARK}\n{text}\n\n{table}\n{MARK}"
    readme = ROOT / "README.md"
    pattern = re.compile(f"{MARK}.*{MARK}|{MARK}", re.DOTALL)
    readme.write_text(pattern.sub(lambda _: block, readme.read_text()))
    picture = plots.trade_off(banking)
    (ROOT / "docs" / "img" / "banking77-trade-off.svg").write_text(picture + "\n")
    cut = "" if len(shakespeare["seeds"]) > 1 else " with `--set seeds=[0]`"
    other = SHAKESPEARE.format(what=described(shakespeare), cut=cut)
    page = [
        "# Results",
        "Made by `scripts/fill_results.py` from finished runs.",
        "## Banking77, MiniLM",
        text,
        table,
        "![Quality against bytes](img/banking77-trade-off.svg)",
        "## Shakespeare, stories-260k",
        other,
        tables.markdown(*tables.rows(shakespeare)),
    ]
    (ROOT / "docs" / "results.md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    main()
