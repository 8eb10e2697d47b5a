"""Llama 1/2/3, TinyLlama, SmolLM2 and every other checkpoint with ``model_type`` llama."""

from transmla.families.base import TINY, Family, llama_gap

FAMILY = Family(
    name="llama",
    native=llama_gap,
    tiny={**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    models="Llama 1/2/3, SmolLM2; biases in the transmla format",
)
