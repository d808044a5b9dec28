"""
How fast a round is: ours beside the plain loop, one by one, and the bare passes.

All sides train the same rows with the same steps on the same machine, in turn, so that a noisy
neighbour slows all of them; medians and ratios are of one run. Evaluation is left out everywhere.

    python benchmarks/speed.py --out benchmarks/RESULTS.md     (make bench)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import many_clients
import plain_loop

from fedllm import experiment as ex
from fedllm import federation
from fedllm.federation import Prepared, Silent
from fedllm.ledger import Ledger, total
from fedllm.round import Federation
from fedllm.strategies import ServerState

SHARED = Path(os.environ.get("FEDLLM_SHARED", plain_loop.FILE.parents[2] / "shared"))
Side = Callable[[], float]
PARTS = ["banking", "strategies", "threads", "gpt2", "stories", "accelerator", "clients", "flower"]


class Ours:
    """A federation of which one round at a time is run."""

    def __init__(self, spec: ex.Experiment, prepared: Prepared) -> None:
        self.built: Federation = federation.assemble(spec, 0, prepared, Ledger(), "bench", Silent())
        self.state: ServerState = self.built.strategy.start()
        self.number = 0

    def __call__(self) -> float:
        """Seconds of the next round."""
        self.number += 1
        ask = self.built.exchange
        start = time.perf_counter()
        ask.open(self.number)
        self.state = self.built.strategy.serve(
            self.state, sorted(ask.transport.clients()), ask, np.random.default_rng(self.number)
        )
        ask.close()
        self.built.ledger.commit()
        return time.perf_counter() - start


def banking(examples: int, **sections: Any) -> ex.Experiment:
    """The Banking77 experiment with fewer rows a client."""
    spec = ex.load(plain_loop.FILE)
    simulation = spec.simulation.model_copy(update={"examples": examples, "test_examples": 30})
    public = spec.public.model_copy(update={"size": examples, "rows_per_round": None})
    model = spec.model.model_copy(update={"threads": torch.get_num_threads()})
    training = spec.training.model_copy(update={"clip": None})
    return spec.replace(
        rounds=1000, simulation=simulation, public=public, model=model, training=training,
        **sections,
    )  # fmt: skip


def plain(spec: ex.Experiment, prepared: Prepared, pad_to: int | None) -> Side:
    """A round of FedAvg as anyone would write it with PEFT, padded to the longest or to 80."""
    model = plain_loop.plain_model(spec, len(prepared.labels), 0)
    shared = {n: p.detach().clone() for n, p in plain_loop.trained(model).items()}
    shuffle = np.random.default_rng(0)

    def one() -> float:
        start = time.perf_counter()
        for data in prepared.clients.values():
            rows = shuffle.permutation(len(data.train)).tolist()
            plain_loop.fine_tune(model, shared, data.train, rows, spec.training, pad_to)
        return time.perf_counter() - start

    return one


def bare(spec: ex.Experiment, prepared: Prepared) -> Side:
    """
    The passes of a round and nothing else: the library's model on ready bucketed tensors.

    parameters and activations: forward, backward, step of each client's batches; logits: those,
    forward over the public rows for each client and the server, and distillation at all of them.
    """
    model = plain_loop.plain_model(spec, len(prepared.labels), 0).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and ".lora_dropout." in name:
            module.train()
    ours = Ours(spec, prepared)
    kind = spec.strategy.kind

    def ready(batches: Any) -> list[tuple[Any, Any, Any]]:
        return [(b.inputs.x.view(b.rows, -1), b.inputs.real().view(b.rows, -1).long(), b.targets)
                for b in batches]  # fmt: skip

    private, public, order = [], [], []
    for site in ours.built.worker.sites.values():
        plan = site.plan(site.train, "private")
        private.append(ready(plan.between(0, plan.per_pass)))
    if kind == "logits":
        assert isinstance(spec.strategy, ex.Logits)
        site = next(iter(ours.built.worker.sites.values()))
        assert site.public is not None
        plan = site.plan(site.public, "public")
        steps = plan.per_pass * spec.strategy.epochs
        public = ready(plan.between(0, steps))
        order = ready(
            site.plan(site.public, "eval", size=64).between(0, -(-len(site.public) // 64))
        )

    def passes(batches: Sequence[Any], distil: bool) -> None:
        optimizer = torch.optim.Adam(plain_loop.trained(model).values(), lr=1e-4)
        for x, mask, y in batches:
            logits = model(input_ids=x, attention_mask=mask).logits
            goal = torch.zeros_like(logits) if distil else y
            (F.mse_loss if distil else F.cross_entropy)(logits, goal).backward()
            optimizer.step()
            optimizer.zero_grad()

    def one() -> float:
        start = time.perf_counter()
        for batches in private:
            passes(batches, False)
        if kind == "logits":
            for _ in range(len(private) + 1):
                passes(public, True)
                with torch.no_grad():
                    for x, mask, _ in order:
                        model(input_ids=x, attention_mask=mask)
        return time.perf_counter() - start

    return one


def interleaved(sides: dict[str, Side], times: int, warm: bool = True) -> dict[str, list[float]]:
    """Every side in turn, after once to warm up."""
    for side in sides.values() if warm else ():
        side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(times):
        for name, side in sides.items():
            found[name].append(side())
            print(f"{number + 1}/{times} {name}: {found[name][-1]:.2f} s", flush=True)
    return found


def matrix_rate() -> float:
    """FLOP/s of this machine's own product of two 2048 x 2048 matrices."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    rates = []
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        rates.append(2 * 2048**3 / (time.perf_counter() - start))
    return statistics.median(rates)


def random_gpt2(folder: Path) -> Path:
    """A folder with GPT-2's configuration (124 M) and tokenizer, and no weights."""
    from transformers import AutoTokenizer, GPT2Config

    GPT2Config().save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHARED / "models" / "gpt2-tokenizer").save_pretrained(folder)
    return folder


def threads(examples: int, times: int) -> dict[int, list[float]]:
    """Seconds of our round of parameters with one thread, and with as many as torch would take."""
    most = torch.get_num_threads()
    spec = banking(examples, strategy=ex.Parameters())
    side = Ours(spec, federation.prepare(spec, 0))

    def using(number: int) -> Side:
        def one() -> float:
            torch.set_num_threads(number)
            return side()

        return one

    found = interleaved({f"{n} threads": using(n) for n in (1, most)}, times)
    torch.set_num_threads(most)
    return dict(zip((1, most), found.values(), strict=True))


def gpt2(times: int) -> dict[str, Any]:
    """Achieved FLOP/s over the machine's own, a random GPT-2 of 124 M, real tokens only."""
    with tempfile.TemporaryDirectory() as name:
        folder = random_gpt2(Path(name))
        text = (SHARED / "data" / "tinyshakespeare" / "input.txt").read_text()
        rows = [json.dumps({"text": text[i : i + 8000]}) for i in range(0, 40_000, 8000)]
        (folder / "rows.jsonl").write_text("\n".join(rows))
        (folder / "held.jsonl").write_text(json.dumps({"text": text[-500:]}))
        spec = ex.parse(
            {
                "rounds": 1000,
                "model": {"name": str(folder), "weights": "random",
                          "threads": torch.get_num_threads()},
                "task": {"kind": "generation"}, "data": {"max_tokens": 128},
                "training": {"batch_size": 8, "rate": 1e-4},
                "simulation": {"source": str(folder / "rows.jsonl"), "clients": 1,
                               "test": str(folder / "held.jsonl"), "examples": 1},
            },
            "gpt2", folder,
        )  # fmt: skip
        side = Ours(spec, federation.prepare(spec, 0))
    side()
    rates, machine = [], []
    for _ in range(times):
        machine.append(matrix_rate())
        seconds = side()
        rows_ = [r for r in side.built.ledger.rows if r.round == side.number]
        site = next(iter(side.built.worker.sites.values()))
        cells = sum(b.inputs.cells for b in site.plan(site.train, "private").between(
            (side.number - 1) * site.plan(site.train, "private").per_pass,
            side.number * site.plan(site.train, "private").per_pass))  # fmt: skip
        real = total(rows_, "tokens", step="a2") / cells
        rates.append(total(rows_, "flops", step="a2") * real / seconds)
        print(f"gpt2: {rates[-1] / 1e9:.1f} of {machine[-1] / 1e9:.1f} GFLOP/s", flush=True)
    ratios = [rate / most for rate, most in zip(rates, machine, strict=True)]
    return {
        "rate": statistics.median(rates), "machine": statistics.median(machine),
        "ratio": statistics.median(ratios),
    }  # fmt: skip


def hundred(base: Path, times: int, **model: Any) -> dict[str, list[float]]:
    """100 clients x 50 windows of 32 tokens, batch 8: together and one by one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    text = (SHARED / "data" / "tinyshakespeare" / "input.txt").read_text()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = 31 * 50  # one token of the 32 is the start
        texts = [tokenizer.decode(ids[i * size : (i + 1) * size]) for i in range(200)]
        for file, some in (("train", texts[:100]), ("test", [t[:60] for t in texts[100:]])):
            (folder / f"{file}.jsonl").write_text(
                "".join(json.dumps({"text": t}) + "\n" for t in some)
            )
        sides: dict[str, Side] = {}
        for what, cohort in (("together", 100), ("one by one", 1)):
            spec = ex.parse(
                {
                    "rounds": 1000,
                    "model": {"name": str(base), "threads": torch.get_num_threads(), **model},
                    "task": {"kind": "generation"}, "data": {"max_tokens": 32},
                    "training": {"batch_size": 8},
                    "simulation": {
                        "source": str(folder / "train.jsonl"), "clients": 100, "examples": 1,
                        "test": str(folder / "test.jsonl"), "cohort": cohort,
                    },
                },
                base.name, folder,
            )  # fmt: skip
            sides[what] = Ours(spec, federation.prepare(spec, 0))
    return interleaved(sides, times)


def flower(examples: int, times: int) -> dict[str, list[float]]:
    """Whole commands of three rounds: ours, and the plain loop in Flower's simulation."""
    import flower_simulation

    spec = banking(examples, evaluation=ex.Evaluation(every=0))
    clients = spec.simulation.clients  # one test row each: evaluation cannot be left out
    simulation = spec.simulation.model_copy(update={"test_examples": clients})
    spec = spec.replace(rounds=plain_loop.ROUNDS, public=ex.Public(), simulation=simulation)
    with tempfile.TemporaryDirectory() as name:
        sides = flower_simulation.commands(spec, Path(name))
        return interleaved(sides, times, warm=False)


def table(found: dict[str, list[float]], against: str) -> list[str]:
    """Medians, spread, and how many times as long each side takes as ``against``."""
    base = statistics.median(found[against])
    lines = ["| side | median s | min - max | over ours |", "|---|---|---|---|"]
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        span = f"{min(seconds):.2f} - {max(seconds):.2f}"
        lines.append(f"| {name} | {middle:.2f} | {span} | {middle / base:.2f}x |")
    return lines


def picture(found: dict[str, float], path: Path) -> None:
    """Seconds of each side over ours."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    names = list(found)
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(names) + 1))
    bars = axes.barh(names, list(found.values()), color="#4477aa")
    axes.bar_label(bars, fmt="%.2fx", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("time of a round over ours (parameters, MiniLM, Banking77)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _command() -> str:
    """How this was called, but for where the result goes."""
    words = sys.argv[1:]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return " ".join(["python benchmarks/speed.py", *words])


def main() -> None:
    """Run everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--examples", type=int, default=320, help="rows a client on Banking77")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--flower-examples", type=int, default=1667, help="rows a client beside Flower"
    )
    parser.add_argument("--only", nargs="*", help=f"of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    installed = all(map(importlib.util.find_spec, ("flwr", "ray")))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    wanted = arguments.only or PARTS
    text = [
        "# Speed", "",
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}; "
        f"`{_command()}`. Machine's own matrix product: "
        f"{matrix_rate() / 1e9:.0f} GFLOP/s (fp32). Medians of {arguments.times}, sides in turn.",
    ]  # fmt: skip
    if "banking" in wanted:
        spec = banking(arguments.examples, strategy=ex.Parameters())
        prepared = federation.prepare(spec, 0)
        alone = spec.replace(simulation=spec.simulation.model_copy(update={"cohort": 1}))
        sides: dict[str, Side] = {
            "ours": Ours(spec, prepared), "ours, one by one": Ours(alone, prepared),
            "bare passes": bare(spec, prepared),
            "plain loop, padded to the longest": plain(spec, prepared, None),
            "plain loop, padded to 80": plain(spec, prepared, 80),
        }  # fmt: skip
        found = interleaved(sides, arguments.times)
        text += ["", f"## One round of parameters: 3 clients x {arguments.examples}, MiniLM, "
                 "LoRA r = 8, batch 16", "", *table(found, "ours")]  # fmt: skip
        medians = {name: statistics.median(seconds) for name, seconds in found.items()}
        if arguments.out:
            drawn = {name: value / medians["ours"] for name, value in medians.items()}
            picture(drawn, arguments.out.with_suffix(".svg"))
            text += ["", f"![time of a round over ours]({arguments.out.stem}.svg)"]
    if "strategies" in wanted:
        text += ["", "## Our round over the bare passes, each strategy"]
        for strategy in (ex.Logits(epochs=2), ex.Activations(cut=2, server="concatenated"),
                         ex.Activations(cut=2)):  # fmt: skip
            spec = banking(arguments.examples // 2, strategy=strategy)
            prepared = federation.prepare(spec, 0)
            found = interleaved(
                {"ours": Ours(spec, prepared), "bare passes": bare(spec, prepared)},
                arguments.times,
            )
            name = strategy.kind + (
                f" ({strategy.server})" if isinstance(strategy, ex.Activations) else ""
            )
            ratio = statistics.median(
                a / b for a, b in zip(found["ours"], found["bare passes"], strict=True)
            )
            text += ["", f"{name}: {ratio:.2f}x", "", *table(found, "ours")]
    if "stories" in wanted:
        found = hundred(SHARED / "models" / "stories-260k", arguments.times)
        text += ["", "## 100 clients x 50 windows of 32 tokens, batch 8, stories-260k", "",
                 *table(found, "together")]  # fmt: skip
    if "threads" in wanted:
        text += ["", "## Our round by number of threads", "", "| threads | median s | min - max |",
                 "|---|---|---|"]  # fmt: skip
        for number, seconds in threads(arguments.examples, arguments.times).items():
            span = f"{min(seconds):.2f} - {max(seconds):.2f}"
            text.append(f"| {number} | {statistics.median(seconds):.2f} | {span} |")
    if "accelerator" in wanted and torch.cuda.is_available():
        with tempfile.TemporaryDirectory() as name:
            base = random_gpt2(Path(name) / "gpt2")
            for precision in ("fp32", "bf16"):
                found = hundred(
                    base, arguments.times, weights="random", device="cuda", precision=precision
                )
                where = f"{precision}, {torch.cuda.get_device_name()}"
                text += ["", f"## 100 clients, random GPT-2 (124 M), {where}", "",
                         *table(found, "together")]  # fmt: skip
    if "gpt2" in wanted:
        rates = gpt2(arguments.times)
        text += ["", "## Random GPT-2 (124 M), LoRA, 8 x 128 tokens", "",
                 f"{rates['rate'] / 1e9:.0f} GFLOP/s of the machine's "
                 f"{rates['machine'] / 1e9:.0f}: {rates['ratio']:.2f}"]  # fmt: skip
    if "clients" in wanted:
        sizes = many_clients.measure()
        few, many = (sizes[number] for number in many_clients.NUMBERS)
        text += ["", "## 10,000 clients against 10 (10 train a round, all are evaluated)", "",
                 f"peak resident memory {many['peak'] / 1e6:.0f} MB against "
                 f"{few['peak'] / 1e6:.0f} MB: {many['peak'] / few['peak']:.3f}x; ready after "
                 f"{many['ready']:.1f} s against {few['ready']:.1f} s"]  # fmt: skip
    if "flower" in wanted and installed:
        found = flower(arguments.flower_examples, arguments.times)
        text += ["", f"## The whole command of {plain_loop.ROUNDS} rounds: 3 clients x "
                 f"{arguments.flower_examples}, MiniLM, LoRA r = 8, batch 16", "",
                 *table(found, "ours"), "",
                 "Flower's clients run the plain loop, padded to the longest, one thread each.",
                 ]  # fmt: skip
    elif "flower" in wanted:
        text += ["", "Flower is not installed here (`pip install fedllm[bench]`): not compared."]
    print("\n".join(text))
    if arguments.out:
        arguments.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
