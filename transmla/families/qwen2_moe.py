"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with a mixture of experts and one shared expert."""

from transmla.families.base import TINY, TINY_EXPERTS, Family, lacks

FAMILY = Family(
    name="qwen2_moe",
    native=lacks("biases on queries, keys and values, and Qwen's experts"),
    tiny={**TINY, **TINY_EXPERTS, "shared_expert_intermediate_size": 32},
    models="Qwen1.5-MoE, Qwen2-57B-A14B",
)
