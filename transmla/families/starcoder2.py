"""StarCoder2: LayerNorm, biases in all projections, a sliding window."""

from transmla.families.base import TINY, TINY_WINDOW, Family, lacks

FAMILY = Family(
    name="starcoder2",
    native=lacks("LayerNorm and biases"),
    tiny={**TINY, "use_bias": True, "sliding_window": TINY_WINDOW},
    models="StarCoder2",
)
