"""Phi-3 and Phi-4: one projection for queries, keys and values; only a part of each head may be rotated."""

from transmla.families.base import TINY, Family, lacks

FAMILY = Family(
    name="phi3",
    native=lacks("Phi's fused projections"),
    tiny={**TINY, "hidden_size": 96, "partial_rotary_factor": 0.5},
    models="Phi-3, Phi-3.5, Phi-4",
)
