"""Pure rules over arrays: what clients sent -> one result. No message, config or file in sight."""

from __future__ import annotations

from fedllm.aggregation.mean import Rule, mean, uniform
from fedllm.aggregation.optimizers import OPTIMIZERS
from fedllm.aggregation.unequal import (
    UnequalRule,
    by_owners,
    flexlora,
    hetlora,
    normalized,
    zero_pad,
)

RULES: dict[str, Rule] = {"mean": mean, "uniform": uniform}
UNEQUAL: dict[str, UnequalRule] = {
    "zero-pad": zero_pad, "normalized": normalized, "hetlora": hetlora, "flexlora": flexlora,
}  # fmt: skip

__all__ = ["OPTIMIZERS", "RULES", "UNEQUAL", "Rule", "UnequalRule", "by_owners", "mean", "uniform"]
