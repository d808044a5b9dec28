import os
import shutil
from collections.abc import Iterator

import pytest

from shared import SHARED

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a hub that is not there
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as the command line sets it

import torch

torch.set_num_threads(1)  # so small models lose more than they win by a second thread


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WITHOUT = [  # marker, and why its tests are left out
    ("gpu", "accelerator: none", torch.cuda.is_available()),
    ("browser", "Chromium: none", CHROMIUM is not None),
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, _, there in WITHOUT:
        marked = [] if there else [item for item in items if item.get_closest_marker(marker)]
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in marked]
    if not SHARED.is_dir():
        absent = pytest.mark.skip(reason="the folder of real models and data is absent")
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(absent)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker, why, there in WITHOUT:
        if not there:
            terminalreporter.write_line(f"{why}, tests marked {marker} are left out")
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "shared" in r.keywords]
    if SHARED.is_dir():
        terminalreporter.write_line(f"real models and data: {SHARED.name}, {len(skipped)} skipped")
    else:
        terminalreporter.write_line(
            f"real models and data: absent, {len(skipped)} tests skipped (set FEDLLM_SHARED)"
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not SHARED.is_dir():
        return
    if any("shared" in report.keywords for report in reporter.stats.get("skipped", [])):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
