"""Convert pretrained Hugging Face models from MHA/GQA to Multi-head Latent Attention (MLA)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transmla.modeling.transformers_api import register
    from transmla.runtime.load import accelerate, load
    from transmla.runtime.shared_prefix import shared_prefix

__all__ = ["accelerate", "load", "register", "shared_prefix"]
_PUBLIC = {
    "accelerate": "transmla.runtime.load",
    "load": "transmla.runtime.load",
    "register": "transmla.modeling.transformers_api",
    "shared_prefix": "transmla.runtime.shared_prefix",
}
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first used: transformers takes seconds to import."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'transmla' has no attribute '{name}'")
