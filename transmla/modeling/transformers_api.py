"""Registration of the transmla format with transformers' Auto classes, and names that differ between its versions.

Once registered, exports load without ``trust_remote_code``.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from transmla.modeling.configuration_transmla import MODEL_TYPE, TransmlaConfig, config_class
from transmla.modeling.modeling_transmla import (
    TransmlaForCausalLM,
    TransmlaForSequenceClassification,
    TransmlaForTokenClassification,
    TransmlaModel,
)

# Name of the cache in the arguments and outputs of transformers' models: the first until 5.23, the second since.
CACHE_ARGUMENT = next(
    name for name in ("past_key_values", "cache") if name in BaseModelOutputWithPast.__dataclass_fields__
)

# Auto classes, each with the class that reads an export for it.
READERS: tuple[tuple[Any, Any], ...] = (
    (AutoModel, TransmlaModel),
    (AutoModelForCausalLM, TransmlaForCausalLM),
    (AutoModelForSequenceClassification, TransmlaForSequenceClassification),
    (AutoModelForTokenClassification, TransmlaForTokenClassification),
)


class _Registering(TransmlaConfig):
    """Config reader that also registers the config class of each family it reads with the Auto classes."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config, after registering its class."""
        for auto, reader in READERS:
            auto.register(config_class(config_dict["source_model_type"]), reader, exist_ok=True)
        return super().from_dict(config_dict, **kwargs)


def register() -> None:
    """Register the transmla format with ``AutoConfig`` and the Auto classes of ``READERS``."""
    AutoConfig.register(MODEL_TYPE, _Registering, exist_ok=True)
