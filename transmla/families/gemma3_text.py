"""Gemma 3, text models only: q/k norms, sliding windows, two rotary bases."""

from transmla.families.base import TINY, TINY_WINDOWS, Family, lacks

FAMILY = Family(
    name="gemma3_text",
    native=lacks("q/k norms, windows and Gemma's norms"),
    tiny={**TINY, **TINY_WINDOWS, "query_pre_attn_scalar": 24},
    models="Gemma 3, text",
    after_attention="pre_feedforward_layernorm",
)
