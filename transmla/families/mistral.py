"""Mistral, with sliding-window attention or without (7B v0.2 and later)."""

from typing import Any

from transmla.families.base import TINY, Family, llama_gap


def native(config: Any) -> str | None:
    """A window that is really used, then whatever Llama lacks."""
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"sliding_window={window}"
    return llama_gap(config)


FAMILY = Family(
    name="mistral",
    native=native,
    tiny={**TINY, "sliding_window": None},
    models="Mistral 7B; windows in the own format",
)
