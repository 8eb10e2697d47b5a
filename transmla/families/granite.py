"""Granite: Llama with multipliers on embeddings, scores, residuals and logits."""

from transmla.families.base import TINY, Family, lacks

FAMILY = Family(
    name="granite",
    native=lacks("residual multipliers"),
    tiny={**TINY, "attention_multiplier": 0.1, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    models="Granite 3",
)
