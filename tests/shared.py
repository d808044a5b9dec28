"""Where real models and data lie, and the marker of the tests that need them."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("FEDLLM_SHARED", ROOT.parent / "shared")).resolve()

needs_shared = pytest.mark.shared


def model(name: str) -> str:
    return str(SHARED / "models" / name)


def data(name: str) -> str:
    return str(SHARED / "data" / name)
