"""Gemma 2: soft-capped scores, sliding windows in every other layer, norms before and after each block."""

from transmla.families.base import TINY, TINY_WINDOWS, Family, lacks

FAMILY = Family(
    name="gemma2",
    native=lacks("soft-capped scores, windows and Gemma's norms"),
    tiny={**TINY, **TINY_WINDOWS, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    models="Gemma 2",
    after_attention="pre_feedforward_layernorm",
)
