"""
Speed of codecs: encode and decode of hidden states, on one core, beside what its memory can do.

100 MB of float32 in rows of 384 (MiniLM's width), a batch as it comes off a model; what costs far
more than reading its input, or is a variant, has 4 MB. Medians of several calls, in seconds of
the core's time, which waiting for other processes is not. The floor is a copy: any decoder writes a
new tensor of the input's size, and any encoder reads one.

    python benchmarks/codecs.py --out benchmarks/CODECS.md
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fedllm.codecs import CODECS, codec
from fedllm.codecs.base import weight
from fedllm.report.tables import markdown

WIDTH = 384
LARGE, SMALL = 100_000_000, 4_000_000  # bytes
FAST = ["fp16", "bf16", "int8", "int8-tensor", "int8-channel", "int4", "int8-stochastic",
        "sign"]  # fmt: skip
SLOW = [*(name for name in CODECS if name not in ("none", *FAST)), "int8+zstd", "topk-10", "topk-1",
        "random-10", "topk-10+int8", "topk-10+int8+zstd", "topk-10+feedback", "lowrank-8",
        "energy-90"]  # fmt: skip


def seconds(call: Callable[[], object], times: int) -> float:
    """The median of so many calls, after one that does not count."""
    call()
    found = []
    for _ in range(times):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return statistics.median(found)


def hidden(size: int) -> Tensor:
    """Rows of hidden states: normal, and some columns of larger size than others."""
    draw = torch.Generator().manual_seed(0)
    rows = size // 4 // WIDTH
    return torch.randn(rows, WIDTH, generator=draw) * torch.rand(WIDTH, generator=draw).add(0.1)


def measured(name: str, x: Tensor, times: int) -> list[str]:
    """A line of the table."""
    used = codec(name)
    size = x.numel() * 4
    _, parts = used.encode({}, x, ("bench",))
    sent = weight({n: (tuple(t.shape), t.dtype) for n, t in parts.items()})
    there = seconds(lambda: used.encode({}, x, ("bench",)), times)
    back = seconds(lambda: used.decode(parts), times)
    rate = size / (there + back) / 1e9
    return [f"`{name}`", f"{size / 1e6:.0f}", f"{100 * sent / size:.1f} %", f"{1e3 * there:,.0f}",
            f"{1e3 * back:,.0f}", f"{rate:.2f}"]  # fmt: skip


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    large, small = hidden(LARGE), hidden(SMALL)
    copy = seconds(large.clone, given.times)
    rows = [measured(name, large, given.times) for name in FAST]
    rows += [measured(name, small, given.times) for name in SLOW]
    head = ["codec", "MB", "bytes sent", "encode, ms", "decode, ms", "GB/s, both together"]
    floor, took = LARGE / (2 * copy) / 1e9, f"{1e3 * copy:,.0f} ms"
    version = torch.__version__.partition("+")[0]
    text = f"""# Speed of codecs

Made by `python benchmarks/codecs.py --out benchmarks/CODECS.md` on {platform.machine()}, torch
{version}, one thread: medians of {given.times} calls, in milliseconds of one core's own time. Other
processes shared the memory.

Floor: a copy of the 100 MB takes {took}; a codec that did no more than that, once each
way, would reach {floor:.2f} GB/s.

{markdown(head, rows)}
"""
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
