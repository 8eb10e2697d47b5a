"""Names that differ between versions of transformers."""

from __future__ import annotations

from transformers.modeling_outputs import BaseModelOutputWithPast

# Name of the cache in the arguments and outputs of transformers' models: the first until 5.23, the second since.
CACHE_ARGUMENT = next(
    name for name in ("past_key_values", "cache") if name in BaseModelOutputWithPast.__dataclass_fields__
)
