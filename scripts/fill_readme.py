"""
Puts the table and the picture of a finished comparison into README.md.

usage: python scripts/fill_readme.py runs/banking77-minilm
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from fedllm.compare import read
from fedllm.report import plots, tables

ROOT = Path(__file__).parent.parent
MARK = "<!-- banking77 -->"
TEXT = """Banking77 divided as in the paper's case study (5,002 public rows, 3 clients x 1,667,
test 3,080), MiniLM (22.7 M, real weights), LoRA r = 8 on query and value; {rounds} rounds of
one local epoch, {seeds}, one core. Costs are per client and round; memory is the peak of live
tensors. `fedllm compare experiments/banking77-minilm.toml` made it (`make study` runs it).
Activations, with the sequential server, get three server steps for each step of the others."""


def main() -> None:
    """Rewrite what stands between the two marks."""
    summary = read(Path(sys.argv[1]))
    header, lines = tables.rows(summary)
    seeds = summary["seeds"]
    text = TEXT.format(
        rounds=summary["rounds"],
        seeds=f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
    )
    block = f"{MARK}\n{text}\n\n{tables.markdown(header, lines)}\n{MARK}"
    readme = ROOT / "README.md"
    old = readme.read_text()
    pattern = re.compile(f"{MARK}.*{MARK}|{MARK}", re.DOTALL)
    readme.write_text(pattern.sub(lambda _: block, old))
    picture = plots.trade_off(summary)
    (ROOT / "docs" / "img" / "banking77-trade-off.svg").write_text(picture + "\n")


if __name__ == "__main__":
    main()
