"""Convert pretrained Hugging Face models from MHA/GQA to Multi-head Latent Attention (MLA)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transmla.auto import register
    from transmla.fast import accelerate, load, shared_prefix

__all__ = ["accelerate", "load", "register", "shared_prefix"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first used: transformers takes seconds to import."""
    if name in __all__:
        from transmla import auto, fast

        return getattr(auto if name == "register" else fast, name)
    raise AttributeError(f"module 'transmla' has no attribute '{name}'")
