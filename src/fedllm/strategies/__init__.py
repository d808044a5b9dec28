"""The three exchanges and their bounds: server half and client half in one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedllm import experiment as ex
from fedllm.data.examples import Examples
from fedllm.models.loading import LanguageModel
from fedllm.strategies.activations import Activations
from fedllm.strategies.base import ServerState, Setup, Site, Strategy
from fedllm.strategies.bounds import Standalone
from fedllm.strategies.logits import Logits
from fedllm.strategies.parameters import Parameters

# Each is made from its section of the experiment file, the setup, the server's model and the
# public set (None: there is none).
STRATEGIES: dict[str, Callable[[Any, Setup, LanguageModel, Examples | None], Strategy]] = {
    "parameters": Parameters,
    "logits": Logits,
    "activations": Activations,
    "standalone": Standalone,
    "centralized": Standalone,
}


def build(
    options: ex.Strategy, setup: Setup, model: LanguageModel, public: Examples | None
) -> Strategy:
    """The strategy that these options describe."""
    return STRATEGIES[options.kind](options, setup, model, public)


__all__ = ["STRATEGIES", "ServerState", "Setup", "Site", "Strategy", "build"]
