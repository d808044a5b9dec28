"""
What carrying knowledge between tokenizers costs: the vocabulary map, the alignment, the top-k rows.

The text is this repository's own README and guides; MiniLM's and GPT-2's tokenizers lie in
FEDLLM_SHARED. Medians on this machine, one thread. "plain Python" is the same warping as two loops
over the same distances.

    python benchmarks/alignment.py --out benchmarks/ALIGNMENT.md
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedllm import experiment as ex
from fedllm.data.examples import EMPTY, Examples, packed
from fedllm.knowledge.alignment import align, bridge, carry, costs, pieces
from fedllm.knowledge.topk import top
from fedllm.knowledge.vocabulary import vocabulary_map
from fedllm.models.loading import load_tokenizer
from fedllm.report.tables import markdown

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("FEDLLM_SHARED", ROOT.parent / "shared")).resolve()
SIZE = 512
ROWS, UNITS, K = 160, 20_000, 128


def seconds(what: Callable[[], object], times: int) -> float:
    """Median of so many calls, after one that does not count."""
    what()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        what()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def loops(source: Sequence[str], target: Sequence[str]) -> float:
    """The warping's distance by two loops, as FuseLLM and FATE-LLM have them."""
    cost = costs(source, target)
    total = np.full((len(source) + 1, len(target) + 1), np.inf)
    total[0, 0] = 0
    for i in range(len(source)):
        for j in range(len(target)):
            total[i + 1, j + 1] = cost[i, j] + min(total[i, j + 1], total[i + 1, j], total[i, j])
    return float(total[-1, -1])


def rows(tokenizer: Any, texts: Sequence[str]) -> Examples:
    """A public set."""
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return Examples(*packed(found), EMPTY, EMPTY, EMPTY).without_labels()


def main() -> None:
    """Measure and print, or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    mini, gpt2 = (
        load_tokenizer(ex.Model(name=str(SHARED / "models" / name)))
        for name in ("minilm-l6-22m", "gpt2-tokenizer")
    )
    text = "\n".join(
        path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    ).lower()
    texts = [text[begin : begin + 500] for begin in range(0, 500 * ROWS, 500)]
    ids = [one(text[:5000], add_special_tokens=False)["input_ids"] for one in (mini, gpt2)]
    a, b = pieces(mini, ids[0])[:SIZE], pieces(gpt2, ids[1])[:SIZE]
    assert len(a) == len(b) == SIZE
    map = vocabulary_map(mini, gpt2)
    source, target = rows(mini, texts), rows(gpt2, texts)
    joint = bridge(mini, gpt2, source, target, map, len(gpt2))
    known = top(torch.randn(UNITS, 4096, generator=torch.manual_seed(0)), K)
    units = np.arange(UNITS)
    lines = [
        [
            "vocabulary map, 30,522 x 50,257",
            f"{seconds(lambda: vocabulary_map(mini, gpt2), 3):.1f} s",
        ],
        [
            "vocabulary map, 50,257 x 30,522",
            f"{seconds(lambda: vocabulary_map(gpt2, mini), 3):.1f} s",
        ],
    ]
    with tempfile.TemporaryDirectory() as folder:
        again = seconds(lambda: vocabulary_map(mini, gpt2, Path(folder)), 5)
    took = seconds(lambda: bridge(mini, gpt2, source, target, map, len(gpt2)), 3)
    moved = seconds(lambda: carry(known, units, map, units, len(gpt2)), 3)
    lines += [
        ["the first of them from its cache", f"{again:.2f} s"],
        [f"alignment, {SIZE} x {SIZE} tokens", f"{seconds(lambda: align(a, b), 21) * 1e3:.1f} ms"],
        ["the same in plain Python", f"{seconds(lambda: loops(a, b), 3) * 1e3:.0f} ms"],
        [f"a public set of {ROWS} rows, {len(joint.units):,} units", f"{took:.2f} s"],
        [f"{UNITS:,} units of k = {K} carried", f"{moved:.2f} s"],
    ]
    page = (
        "# Knowledge between tokenizers\n\n"
        f"{platform.machine()}, torch {torch.__version__}, 1 thread; MiniLM to GPT-2, medians "
        "(`python benchmarks/alignment.py --out benchmarks/ALIGNMENT.md`)\n\n"
        f"{markdown(['what', 'time'], lines)}\n\n"
        f"Of that public set's units {joint.share:.0%} take knowledge; the others are shown their "
        "own token.\n"
    )
    if options.out:
        options.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
