"""Register exports of the transmla format in vLLM. vLLM calls ``register`` in each of its processes when it starts.

vLLM recognises MLA models by their ``model_type``. So the config that vLLM reads is the source family's, with the
widths of the latent cache and DeepSeek-V3's ``model_type`` added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transmla.formats.serve_limits import SERVED, refuses, served_widths
from transmla.serve.family_config import MODEL_TYPE, OPTION, architecture, check_served, family_config

# A ``model_type`` for which vLLM caches one latent row a token.
MLA_MODEL_TYPE = "deepseek_v3"
MODELS = "transmla.serve.vllm_model"
CHECKED_WORKER = "transmla.serve.vllm_worker.CheckedWorker"


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
    problem = refuses(config)
    if problem is not None:
        raise ValueError(problem)
    made = family_config(config, served_widths(config, cpu=cpu), **kwargs)
    served: Any = made[0] if isinstance(made, tuple) else made
    served.model_type = MLA_MODEL_TYPE
    return made


def check_settings(vllm_config: Any) -> None:
    """Check vLLM's settings for an export, and select the worker that compares the model with its signature.

    Raises:
        ValueError: if a setting does not fit the export.
    """
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    check_served(config, parallel.tensor_parallel_size, "vLLM", adapters=vllm_config.lora_config is not None)
    checked = (vllm_config.additional_config or {}).get(OPTION, True)
    if checked and parallel.worker_cls == "auto":
        parallel.worker_cls = CHECKED_WORKER
