"""Registration of the transmla format with transformers' Auto classes.

Once registered, exports load without ``trust_remote_code``. An installed transmla registers when transformers is
imported (``transmla.autoload``).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import AutoConfig

from transmla.modeling.configuration_transmla import AUTO_MAP, MODEL_TYPE, TransmlaConfig, config_class

# Auto classes, each with the class that reads an export for it.
READERS = {auto: target.partition(".")[2] for auto, target in AUTO_MAP.items() if auto != "AutoConfig"}


class _Registering(TransmlaConfig):
    """Config reader that also registers the config class of each family it reads with the Auto classes."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config, after registering its class."""
        # The models are imported here, because importing them takes seconds.
        from transmla.modeling import modeling_transmla

        source = config_dict["source_model_type"]
        for auto, name in READERS.items():
            reader = getattr(modeling_transmla, name)
            made = reader
            # Pipelines look the name of the model's own class up. A decoder is looked up by classifiers alone.
            if auto != "AutoModel":
                with suppress(ValueError):  # transformers has no such head for the family; the reader says so
                    made = modeling_transmla.model_class(source, auto)
            getattr(transformers, auto).register(config_class(source), made, exist_ok=True)
            # ``transformers serve`` looks the architecture of a config up here.
            setattr(transformers, name, reader)
        return super().from_dict(config_dict, **kwargs)


def register() -> None:
    """Register the transmla format with ``AutoConfig``, and each family with the Auto classes when it is read."""
    AutoConfig.register(MODEL_TYPE, _Registering, exist_ok=True)
