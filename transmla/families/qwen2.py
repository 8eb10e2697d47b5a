"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from transmla.families.base import TINY, Family, lacks

FAMILY = Family(
    name="qwen2",
    native=lacks("biases on queries, keys and values"),
    tiny={**TINY},
    models="Qwen2, Qwen2.5",
)
