"""Register exports of the transmla format in SGLang. SGLang calls ``register`` in each of its processes when it starts.

SGLang recognises MLA models by their ``architectures``. The config that it reads is the source family's, with the
widths of the latent cache, and with DeepSeek-V3's architecture behind the served one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transmla.errors import TransmlaError
from transmla.export.travel import KEY
from transmla.formats.serve_limits import refuses, served_widths
from transmla.serve.family_config import MODEL_TYPE, check_served, family_config

# An architecture for which SGLang caches one latent row a token. The model's class is that of the first architecture.
MLA_ARCHITECTURE = "DeepseekV3ForCausalLM"
GET_CONFIG = "sglang.srt.utils.hf_transformers.config.get_config"
MODEL_CONFIG = "sglang.srt.configs.model_config.ModelConfig.__init__"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler.__init__"


def register() -> None:
    """Register the transmla format in transformers, and hooks on three functions of SGLang."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # Registers the format where transmla's start-up file is not installed.
    import transmla.autoload  # noqa: F401

    HookRegistry.register(GET_CONFIG, served_config, HookType.AFTER)
    HookRegistry.register(MODEL_CONFIG, set_scaling, HookType.AFTER)
    HookRegistry.register(SCHEDULER, start, HookType.AROUND)


def served_config(config: Any, *_: Any, **__: Any) -> Any:
    """Return the config with which SGLang serves a model; called with the result of SGLang's ``get_config``.

    Raises:
        ValueError: if the model is an export that the plugin does not serve.
    """
    if config.model_type != MODEL_TYPE:
        return config
    fields = config.to_dict()
    problem = refuses(fields, runtime="SGLang")
    if problem is not None:
        raise ValueError(problem)
    served = family_config(fields, served_widths(fields, cpu=False))
    served.architectures.append(MLA_ARCHITECTURE)
    return served


def set_scaling(_: None, model_config: Any, *__: Any, **___: Any) -> None:
    """Give SGLang's settings the scale of an export's scores; called after they are made.

    Some kernels take the scale from these settings, where it is computed from the padded widths.
    """
    config = model_config.hf_config
    if is_export(config):
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        model_config.scaling = getattr(config, "attention_multiplier", width**-0.5)


def start(create: Callable[..., None], scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Start SGLang's scheduler with the served model classes, then compare an export with its signature.

    Raises:
        ValueError: if a setting does not fit the export, or if its logits differ from those signed.
    """
    from sglang.srt.models.registry import ModelRegistry

    from transmla.serve.sglang_check import check
    from transmla.serve.sglang_model import model_classes

    config = server_args.get_model_config().hf_config
    if is_export(config):
        check_settings(config, server_args)
        ModelRegistry.models.update(model_classes())
    create(scheduler, server_args, *args, **kwargs)
    if KEY in config.to_dict():
        check(scheduler, server_args)


def is_export(config: Any) -> bool:
    """Return whether ``config`` is one of ``served_config`` for an export in the transmla format."""
    return hasattr(config, "mla") and hasattr(config, "source_model_type")


def check_settings(config: Any, server_args: Any) -> None:
    """Check SGLang's settings for an export.

    Raises:
        ValueError: if a setting does not fit the export.
    """
    adapters = bool(server_args.enable_lora or server_args.lora_paths)
    check_served(config, server_args.tp_size, "SGLang", adapters=adapters)
    if server_args.enable_dp_attention:
        limit, remedy = "its layers expect every device to hold all tokens", "leave --enable-dp-attention out"
        raise ValueError(str(TransmlaError("the plugin serves no data-parallel attention", limit=limit, remedy=remedy)))
