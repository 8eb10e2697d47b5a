"""Mistral, with or without (7B v0.2 and later) sliding-window attention."""

from typing import Any

from transmla.families.base import TINY, Family, llama_gap


def native(config: Any) -> str | None:
    """Name the feature of ``config`` that a dense DeepSeek-V3 cannot store, or return None.

    A window counts only if it is shorter than the longest text.
    """
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"sliding_window={window}"
    return llama_gap(config)


FAMILY = Family(
    name="mistral",
    native=native,
    tiny={**TINY, "sliding_window": None},
    models="Mistral 7B; windows in the transmla format",
)
