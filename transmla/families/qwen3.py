"""Qwen3: queries and keys normed head by head."""

from transmla.families.base import TINY, Family, lacks

FAMILY = Family(
    name="qwen3",
    native=lacks("q/k norms"),
    tiny={**TINY},
    models="Qwen3",
)
