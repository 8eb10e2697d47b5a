"""The own format for transformers' Auto classes, where transmla is installed: no remote code is needed then."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from transmla.modeling.configuration_transmla import MODEL_TYPE, TransmlaConfig, config_class
from transmla.modeling.modeling_transmla import TransmlaForCausalLM, TransmlaModel

# What models of transformers, and their outputs, call their cache; until 5.23 by the first of these names.
CACHE_ARGUMENT = next(
    name for name in ("past_key_values", "cache") if name in BaseModelOutputWithPast.__dataclass_fields__
)

READERS: tuple[tuple[Any, Any], ...] = ((AutoModel, TransmlaModel), (AutoModelForCausalLM, TransmlaForCausalLM))


class _Registering(TransmlaConfig):
    """Makes the Auto classes know a family's config when the first one of it is read."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        for auto, reader in READERS:
            auto.register(config_class(config_dict["source_model_type"]), reader, exist_ok=True)
        return super().from_dict(config_dict, **kwargs)


def register() -> None:
    """Let ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` read exports of the own format."""
    AutoConfig.register(MODEL_TYPE, _Registering, exist_ok=True)
