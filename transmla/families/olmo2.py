"""OLMo 2: one q/k norm over all heads together, norms after each block."""

from transmla.families.base import TINY, Family, lacks

FAMILY = Family(
    name="olmo2",
    native=lacks("q/k norms and norms after blocks"),
    tiny={**TINY},
    models="OLMo 2",
    after_attention="mlp",
)
