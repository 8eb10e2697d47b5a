"""SmolLM3: some layers have no rotary embedding."""

from transmla.families.base import TINY, Family, lacks

FAMILY = Family(
    name="smollm3",
    native=lacks("layers without rotary embedding"),
    tiny={**TINY, "no_rope_layers": [1, 0]},
    models="SmolLM3",
)
