"""OLMo 3: OLMo 2 with sliding windows."""

from transmla.families.base import TINY, TINY_WINDOWS, Family, lacks

FAMILY = Family(
    name="olmo3",
    native=lacks("q/k norms, norms after blocks and windows"),
    tiny={**TINY, **TINY_WINDOWS},
    models="OLMo 3",
    after_attention="mlp",
)
