"""The three exchanges and their bounds: server half and client half in one file each."""

from __future__ import annotations

from fedllm import experiment as ex
from fedllm.data.examples import Examples
from fedllm.errors import FedllmError
from fedllm.models.loading import LanguageModel
from fedllm.strategies.activations import Activations
from fedllm.strategies.base import ServerState, Setup, Site, Strategy
from fedllm.strategies.bounds import Standalone
from fedllm.strategies.logits import Logits
from fedllm.strategies.parameters import Parameters

STRATEGIES = {
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
    if isinstance(options, ex.Parameters):
        return Parameters(options, setup, model)
    if isinstance(options, ex.Logits):
        if public is None or not len(public):
            raise FedllmError(
                "strategy.kind = 'logits': there is no public set; set public.size or public.source"
            )
        return Logits(options, setup, model, public)
    if isinstance(options, ex.Activations):
        return Activations(options, setup, model)
    return Standalone(options, setup)


__all__ = ["STRATEGIES", "ServerState", "Setup", "Site", "Strategy", "build"]
