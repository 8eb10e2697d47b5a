"""Qwen3: q/k norms, applied to each head separately."""

from transmla.families.base import TINY, Family, lacks

FAMILY = Family(
    name="qwen3",
    native=lacks("q/k norms"),
    tiny={**TINY},
    models="Qwen3",
)
