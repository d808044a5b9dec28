"""The rounds' rows in TensorBoard and MLflow, where they are installed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fedllm.errors import FedllmError, nearest

Row = Mapping[str, Any]


class Sink(Protocol):
    """Where rows go besides the page."""

    def write(self, row: Row, settings: Mapping[str, Any]) -> None:
        """A round of the run ``row["run"]`` with ``row["seed"]``, which has these settings."""
        ...

    def close(self) -> None:
        """No rows come any more."""
        ...


def numbers(row: Row) -> dict[str, float]:
    """What is measured in a row: all but its names."""
    return {
        key: float(value)
        for key, value in row.items()
        if key not in ("run", "seed", "round") and isinstance(value, int | float)
    }


class TensorBoard:
    """A log folder for each run and seed. What an earlier report wrote there is replaced."""

    def __init__(self, folder: str) -> None:
        """Write below ``folder``. Raises FedllmError where tensorboard is not installed."""
        _need("tensorboard", "tensorboard")
        self._module = _need("torch.utils.tensorboard", "tensorboard")
        self._folder = Path(folder)
        self._writers: dict[str, Any] = {}

    def write(self, row: Row, settings: Mapping[str, Any]) -> None:
        """One point of each curve."""
        name = _word(f"{row['run']}-seed{row['seed']}")
        if name not in self._writers:
            self._writers[name] = self._module.SummaryWriter(str(self._folder / name), purge_step=0)
        for key, value in numbers(row).items():
            self._writers[name].add_scalar(key, value, row["round"])
        self._writers[name].flush()

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()


class MLflow:
    """A run of MLflow for each run and seed, with its settings as parameters."""

    def __init__(self, uri: str) -> None:
        """Write to a tracking ``uri``. Raises FedllmError where mlflow is not installed."""
        self._uri = uri
        self._refusal = _need("mlflow.exceptions", "mlflow").MlflowException
        self._runs: dict[str, str] = {}
        with self._named():
            self._client = _need("mlflow.tracking", "mlflow").MlflowClient(uri)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except self._refusal as error:
            said = str(error).partition("\n")[0][:300]
            raise FedllmError(f"--to mlflow={self._uri}: {said}") from None

    def write(self, row: Row, settings: Mapping[str, Any]) -> None:
        """One step of each metric. Raises FedllmError where MLflow does not take it."""
        name = f"{row['run']}-seed{row['seed']}"
        with self._named():
            if name not in self._runs:
                self._runs[name] = self._begin(name, settings)
            for key, value in numbers(row).items():
                self._client.log_metric(self._runs[name], key, value, step=row["round"])

    def _begin(self, name: str, settings: Mapping[str, Any]) -> str:
        title = str(settings.get("name", "fedllm"))
        known = self._client.get_experiment_by_name(title)
        number = known.experiment_id if known else self._client.create_experiment(title)
        started = self._client.create_run(number, run_name=name, tags={"fedllm.run": name})
        for key, value in settings.items():
            self._client.log_param(started.info.run_id, key, str(value)[:500])
        return str(started.info.run_id)

    def close(self) -> None:
        """All runs are over."""
        with self._named():
            for number in self._runs.values():
                self._client.set_terminated(number)


SINKS: dict[str, Callable[[str], Sink]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
_PLACE = {"tensorboard": "{}/tensorboard", "mlflow": "sqlite:///{}/mlflow.db"}


def sink(text: str, beside: Path) -> Sink:
    """
    ``tensorboard``, ``tensorboard=DIR``, ``mlflow`` or ``mlflow=URI``.

    beside: the folder of the report, where the rows go without a DIR or URI. Raises FedllmError for
    other names, and where the package is missing.
    """
    name, _, place = text.partition("=")
    if name not in SINKS:
        raise FedllmError(f"--to {text}: unknown; {nearest(name, SINKS)}")
    return SINKS[name](place or _PLACE[name].format(beside.resolve()))


def _need(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FedllmError(
            f"--to {extra}: {error.name or module} is not installed: pip install 'fedllm[{extra}]'"
        ) from None


def _word(text: str) -> str:
    return re.sub(r"[^\w.=,+-]+", "-", text)
