"""
Three rounds of FedAvg in Flower's simulation: the plain loop of ``plain_loop.py`` as a Flower app.

Everything that Flower leaves to the author is made cheap: only what is trained travels, each actor
loads its model and tokenizes once, and nothing is evaluated. ``run_simulation`` starts the same
engine as ``flwr run``, without the SuperLink that the latter adds.

    python benchmarks/flower_simulation.py experiment.toml 2     (two clients at once)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import plain_loop
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedllm import experiment as ex
from fedllm import federation
from fedllm.federation import Prepared

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
         "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip
client_app = ClientApp()


@cache
def ready(file: str) -> tuple[ex.Experiment, Prepared, Any]:
    """The experiment, everybody's tokenized rows and a model, once in each process."""
    torch.set_num_threads(1)
    spec = ex.load(Path(file))
    return spec, federation.prepare(spec, 0), plain_loop.plain_model(spec, len(spec.data.labels), 0)


def packed(model: Any) -> ArrayRecord:
    """What travels."""
    return ArrayRecord({n: p.detach().clone() for n, p in plain_loop.trained(model).items()})


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    config = message.content.config_records["config"]
    spec, prepared, model = ready(str(config["file"]))
    number = int(context.node_config["partition-id"])
    examples = list(prepared.clients.values())[number].train
    order = np.random.default_rng((config["server-round"], number)).permutation(len(examples))
    start = message.content.array_records["arrays"].to_torch_state_dict()
    plain_loop.fine_tune(model, start, examples, order.tolist(), spec.training)
    metrics = MetricRecord({"num-examples": len(examples)})
    return Message(RecordDict({"arrays": packed(model), "metrics": metrics}), reply_to=message)


def simulate(file: str, at_once: int) -> None:
    """
    All rounds of the experiment, so many clients at once, one thread each.

    Raises RuntimeError when a reply failed.
    """
    spec = ex.load(Path(file))
    clients = spec.simulation.clients
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients,
            train_metrics_aggr_fn=lambda replies, _: MetricRecord({"replies": len(replies)}),
        )  # fmt: skip
        result = strategy.start(
            grid, packed(plain_loop.plain_model(spec, len(spec.data.labels), 0)),
            num_rounds=spec.rounds, train_config=ConfigRecord({"file": file}),
        )  # fmt: skip
        replies = [metrics["replies"] for metrics in result.train_metrics_clientapp.values()]
        if replies != [clients] * spec.rounds:
            raise RuntimeError(f"replies a round: {replies}, expected {clients} in {spec.rounds}")

    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0},
               "init_args": {"num_cpus": at_once}}  # fmt: skip
    run_simulation(server_app, client_app, num_supernodes=clients, backend_config=backend)


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Wall time of a whole command. Raises RuntimeError with its last words when it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return wall


def commands(spec: ex.Experiment, folder: Path) -> dict[str, Callable[[], float]]:
    """The whole commands on one experiment file; each call gives the seconds of one run."""
    file = folder / "experiment.toml"
    data = spec.data.model_copy(update={"labels": federation.prepare(spec, 0).labels})
    file.write_text(ex.dump(spec.replace(data=data)))
    fedllm = str(Path(sys.executable).with_name("fedllm"))
    cores = spec.model.threads

    def ours(threads: int) -> float:
        out = Path(tempfile.mkdtemp(dir=folder)) / "run"
        options = ["--set", f"model.threads={threads}", "--out", str(out), "--quiet"]
        return seconds([fedllm, "run", str(file), *options], {})

    def flower(at_once: int) -> float:
        return seconds([sys.executable, __file__, str(file), str(at_once)], QUIET)

    sides = {"ours": partial(ours, cores), "Flower, a core for each client": partial(flower, cores)}
    if cores > 1:
        sides["ours, one thread"] = partial(ours, 1)
    if spec.simulation.clients > cores:
        sides["Flower, all clients at once"] = partial(flower, spec.simulation.clients)
    return sides


if __name__ == "__main__":
    import flower_simulation  # by name: actors import the app instead of unpickling a copy

    flower_simulation.simulate(sys.argv[1], int(sys.argv[2]))
