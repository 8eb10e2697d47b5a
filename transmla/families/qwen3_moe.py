"""Qwen3-MoE: Qwen3 with a mixture of experts."""

from transmla.families.base import TINY, TINY_EXPERTS, Family, lacks

FAMILY = Family(
    name="qwen3_moe",
    native=lacks("q/k norms and Qwen's experts"),
    tiny={**TINY, **TINY_EXPERTS},
    models="Qwen3-30B-A3B, Qwen3-235B-A22B",
)
