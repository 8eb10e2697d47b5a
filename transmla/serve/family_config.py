"""The config with which vLLM and SGLang serve an export: the source family's, with the padded widths added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transmla.errors import TransmlaError
from transmla.formats.serve_limits import SERVED, Widths, refuses

MODEL_TYPE = "transmla"
# Key that turns the check at start-up off: in vLLM's ``--additional-config``, in SGLang's overrides of the config.
OPTION = "transmla_self_check"


def architecture(family: str) -> str:
    """Return the name under which the runtimes know the served model class of ``family``."""
    return f"Transmla{SERVED[family][1]}"


def family_config(config: Mapping[str, Any], widths: Widths, **kwargs: Any) -> Any:
    """Return the config of the source's family with the served widths and model class.

    Args:
        config: content of ``config.json`` of an export that ``refuses`` accepts.
        widths: the widths that the weights are padded to.
        kwargs: options of ``from_dict`` of the family's config class.

    Returns:
        What the family's ``from_dict`` returns: a config, or a config and unused options.
    """
    from transformers import CONFIG_MAPPING

    family = config["source_model_type"]
    fields = {k: v for k, v in config.items() if k not in ("model_type", "auto_map", "architectures")}
    made = CONFIG_MAPPING[family].from_dict(fields, **kwargs)
    served: Any = made[0] if isinstance(made, tuple) else made
    served.kv_lora_rank, served.qk_rope_head_dim = widths.latent, widths.rotary
    served.qk_nope_head_dim, served.v_head_dim = widths.nope, widths.value
    served.q_lora_rank = None
    # ``refuses`` accepts only windows that no text exceeds.
    served.sliding_window = None
    served.architectures = [architecture(family)]
    return made


def widths_of(config: Any) -> Widths:
    """Return the widths of a config from ``family_config``."""
    return Widths(config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)


def check_served(config: Any, devices: int, runtime: str, *, adapters: bool) -> None:
    """Check a runtime's settings for an export.

    Args:
        config: a config from ``family_config``.
        devices: devices that share the heads.
        runtime: vLLM or SGLang.
        adapters: whether the runtime loads LoRA adapters.

    Raises:
        ValueError: if a setting does not fit the export; the runtime shows the message.
    """
    problem = refuses(config.to_dict() | {"source_model_type": config.source_model_type}, devices, runtime)
    if problem is not None:
        raise ValueError(problem)
    if adapters:
        limit, remedy = f"{runtime}'s adapters name the source's projections", "merge the adapters into the export"
        raise ValueError(str(TransmlaError("the plugin serves no LoRA adapters", limit=limit, remedy=remedy)))
