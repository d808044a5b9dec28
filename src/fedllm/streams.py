"""Random streams derived from what they are for, never from the order of calls."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_of(*purpose: object) -> int:
    """A 63-bit seed for this purpose, e.g. ``seed_of(run_seed, round, client, "dropout")``."""
    text = "\x1f".join(str(part) for part in purpose)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(*purpose: object) -> np.random.Generator:
    """A numpy generator for this purpose."""
    return np.random.default_rng(seed_of(*purpose))


def generator(device: torch.device, *purpose: object) -> torch.Generator:
    """A torch generator for this purpose."""
    import torch

    return torch.Generator(device).manual_seed(seed_of(*purpose))


@contextmanager
def torch_stream(*purpose: object) -> Iterator[None]:
    """
    Inside, torch draws from this purpose's stream; outside, its state is untouched.

    For a library's own initialization and dropout, which take no generator.
    """
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of(*purpose))
        yield
