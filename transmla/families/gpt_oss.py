"""gpt-oss: attention sinks, biases, sliding windows, mixture of experts."""

from transmla.families.base import TINY, TINY_WINDOWS, Family, lacks

FAMILY = Family(
    name="gpt_oss",
    native=lacks("sinks, biases, windows and gpt-oss's experts"),
    tiny={**TINY, **TINY_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    models="gpt-oss, in bfloat16",
)
