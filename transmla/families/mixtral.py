"""Mixtral: Mistral with a mixture of experts."""

from transmla.families.base import TINY, TINY_WINDOW, Family, lacks

FAMILY = Family(
    name="mixtral",
    native=lacks("Mixtral's experts"),
    tiny={**TINY, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": TINY_WINDOW},
    models="Mixtral 8x7B, 8x22B",
)
