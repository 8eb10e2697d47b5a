"""Mistral without sliding-window attention (Mistral-7B v0.2 and later)."""

from typing import Any

from transmla.families.base import Family, check_llama_like, refuse
from transmla.families.llama import FAMILY as LLAMA


def check(config: Any) -> None:
    """Refuse a window that is really used, then whatever Llama refuses."""
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise refuse(
            "mistral",
            f"sliding_window={window} is not supported",
            "the native format attends to the whole context",
            "use a release without a window (v0.2 and later)",
        )
    check_llama_like(config)


FAMILY = Family(name="mistral", check=check, tiny={**LLAMA.tiny, "sliding_window": None})
