"""Pure rules over arrays: what clients sent -> one result. No message, config or file in sight."""

from __future__ import annotations

from fedllm.aggregation.mean import Rule, mean, uniform
from fedllm.aggregation.optimizers import OPTIMIZERS

RULES: dict[str, Rule] = {"mean": mean, "uniform": uniform}

__all__ = ["OPTIMIZERS", "RULES", "Rule", "mean", "uniform"]
