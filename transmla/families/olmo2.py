"""OLMo 2: queries and keys normed over all heads at once, norms behind each block."""

from transmla.families.base import TINY, Family, lacks

FAMILY = Family(
    name="olmo2",
    native=lacks("q/k norms and norms behind blocks"),
    tiny={**TINY},
    models="OLMo 2",
    after_attention="mlp",
)
