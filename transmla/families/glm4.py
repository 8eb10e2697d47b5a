"""GLM-4: half of each head is rotated, and rotary pairs are neighbouring channels."""

from transmla.families.base import TINY, Family, lacks

FAMILY = Family(
    name="glm4",
    native=lacks("partial rotary embedding and GLM's norms"),
    tiny={**TINY, "partial_rotary_factor": 0.5, "attention_bias": True},
    models="GLM-4 0414",
    interleaved=True,
)
