"""Register exports of the transmla format in vLLM. vLLM calls ``register`` in each of its processes when it starts.

vLLM recognises MLA models by their ``model_type``. So the config that vLLM reads is the source family's, with the
widths of the latent cache and DeepSeek-V3's ``model_type`` added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transmla.errors import TransmlaError
from transmla.formats.vllm_limits import SERVED, Widths, refuses, served_widths

MODEL_TYPE = "transmla"
# A ``model_type`` for which vLLM caches one latent row a token.
MLA_MODEL_TYPE = "deepseek_v3"
MODELS = "transmla.serve.vllm_model"
CHECKED_WORKER = "transmla.serve.vllm_worker.CheckedWorker"
# Key of ``--additional-config`` that turns the check at start-up off.
OPTION = "transmla_self_check"


def architecture(family: str) -> str:
    """Return the name under which vLLM knows the served model class of ``family``."""
    return f"Transmla{SERVED[family][1]}"


def register() -> None:
    """Register the config class, the model classes and their hooks in vLLM."""
    from transformers import PretrainedConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.platforms import current_platform
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    class TransmlaConfig(PretrainedConfig):  # type: ignore[misc]
        """Reader of an export's ``config.json``; returns a config of the source's family."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Return the config that vLLM serves, as ``served_config`` makes it."""
            return served_config(config_dict, cpu=current_platform.is_cpu(), **kwargs)

    class Hooks(VerifyAndUpdateConfig):  # type: ignore[misc]
        """Functions that vLLM calls while it completes its settings for a model."""

        verify_and_update_config = staticmethod(check_settings)

    _CONFIG_REGISTRY[MODEL_TYPE] = TransmlaConfig
    for name in map(architecture, SERVED):
        ModelRegistry.register_model(name, f"{MODELS}:{name}")
        MODELS_CONFIG_MAP[name] = Hooks


def served_config(config: Mapping[str, Any], *, cpu: bool, **kwargs: Any) -> Any:
    """Return the config with which vLLM serves an export.

    Args:
        config: content of the export's ``config.json``.
        cpu: whether the model runs on a CPU.
        kwargs: options of ``from_dict`` of the family's config class.

    Returns:
        What the family's ``from_dict`` returns: a config, or a config and unused options.

    Raises:
        ValueError: if the plugin does not serve this export; vLLM shows the message.
    """
    from transformers import CONFIG_MAPPING

    problem = refuses(config)
    if problem is not None:
        raise ValueError(problem)
    family = config["source_model_type"]
    fields = {k: v for k, v in config.items() if k not in ("model_type", "auto_map", "architectures")}
    made = CONFIG_MAPPING[family].from_dict(fields, **kwargs)
    served: Any = made[0] if isinstance(made, tuple) else made
    widths = served_widths(config, cpu=cpu)
    served.kv_lora_rank, served.qk_rope_head_dim = widths.latent, widths.rotary
    served.qk_nope_head_dim, served.v_head_dim = widths.nope, widths.value
    served.q_lora_rank = None
    # ``refuses`` accepts only windows that no text exceeds.
    served.sliding_window = None
    served.architectures = [architecture(family)]
    served.model_type = MLA_MODEL_TYPE
    return made


def widths_of(config: Any) -> Widths:
    """Return the widths of a config from ``served_config``."""
    return Widths(config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)


def check_settings(vllm_config: Any) -> None:
    """Check vLLM's settings for an export, and select the worker that compares the model with its signature.

    Raises:
        ValueError: if a setting does not fit the export.
    """
    served, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    config = served.to_dict() | {"source_model_type": served.source_model_type}
    problem = refuses(config, parallel.tensor_parallel_size)
    if problem is not None:
        raise ValueError(problem)
    if vllm_config.lora_config is not None:
        limit, remedy = "vLLM's adapters name the source's projections", "merge the adapters into the export"
        raise ValueError(str(TransmlaError("the plugin serves no LoRA adapters", limit=limit, remedy=remedy)))
    checked = (vllm_config.additional_config or {}).get(OPTION, True)
    if checked and parallel.worker_cls == "auto":
        parallel.worker_cls = CHECKED_WORKER
