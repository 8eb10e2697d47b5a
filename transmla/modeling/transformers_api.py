"""Names that differ between versions of transformers."""

from __future__ import annotations

from transformers.modeling_outputs import BaseModelOutputWithPast

# Name of the cache in the arguments of transformers' models until 5.23. Later ones take it too, and warn.
OLD_CACHE_ARGUMENT = "past_key_values"
# Name of the cache in the arguments and outputs of transformers' models: the first until 5.23, the second since.
CACHE_ARGUMENT = next(
    name for name in (OLD_CACHE_ARGUMENT, "cache") if name in BaseModelOutputWithPast.__dataclass_fields__
)
