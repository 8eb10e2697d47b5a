"""The config of a converted model of any family: the source's own fields, and what its latent attention is."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

MODEL_TYPE = "transmla"
# What a checkpoint names the code by that it brings along.
AUTO_MAP = {
    "AutoConfig": "configuration_transmla.TransmlaConfig",
    "AutoModel": "modeling_transmla.TransmlaModel",
    "AutoModelForCausalLM": "modeling_transmla.TransmlaForCausalLM",
}


class TransmlaConfig(PretrainedConfig):  # type: ignore[misc,no-untyped-call]
    """Reads a ``config.json``; what it returns is of a subclass of the source family's config.

    Beside the family's fields there are ``source_model_type``, the family, and ``mla``, of two entries. ``layers``
    gives each layer the index of its kind, or None where the source's attention stayed. ``kinds`` lists
    ``kv_lora_rank``, ``qk_rope_head_dim``, ``qk_nope_head_dim``, ``v_head_dim``, ``inv_freq`` (radians per position of
    the qk_rope_head_dim / 2 rotary slots), ``attention_factor`` (of cosines and sines) and ``latent_norm`` (whether
    the latent has an RMSNorm); those of longrope also ``long_inv_freq`` and ``original_max_position_embeddings``,
    behind which it holds.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of the family that ``config_dict`` names."""
        if "source_model_type" not in config_dict:
            raise ValueError(
                "this config.json names no source_model_type, as those of the format transmla do; read it by AutoConfig"
            )
        return config_class(config_dict["source_model_type"]).from_dict(config_dict, **kwargs)


class _Converted:
    """Mixed in before a family's config."""

    architectures: list[str] | None
    source_model_type: str

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As ever, with the code that ``auto_map`` names."""
        self.architectures = ["TransmlaForCausalLM"]
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_code(Path(save_directory))

    def __reduce__(self) -> Any:
        """Pickled by its family: its class is made when it is needed."""
        return _bare, (self.source_model_type,), self.__dict__


def _bare(family: str) -> Any:
    """A config of ``family`` without its state."""
    found = config_class(family)
    return found.__new__(found)


def write_code(folder: Path, beside: Path = Path(__file__).parent) -> None:
    """Put what ``AUTO_MAP`` names into ``folder``, as far as it is ``beside``: this file and the model's.

    Where a checkpoint's code was fetched for its config alone, the model's is elsewhere; models save it themselves.
    """
    for name in ("configuration_transmla.py", "modeling_transmla.py"):
        if (beside / name).is_file():
            shutil.copy(beside / name, folder)


@cache
def config_class(family: str) -> Any:
    """The config of ``family`` (a ``model_type`` of transformers) under this format's name."""
    source = CONFIG_MAPPING[family]
    # A plan for tensor parallelism splits the attention that was there before.
    plan = {name: how for name, how in (source.base_model_tp_plan or {}).items() if ".self_attn." not in name}
    body = {
        "model_type": MODEL_TYPE,
        "base_model_tp_plan": plan or None,
        "__module__": __name__,
        "__doc__": source.__doc__,
    }
    # One name for all: transformers registers a model under configs of the name that it was written for.
    return type(TransmlaConfig.__name__, (_Converted, source), body)


def converted_config(source: Any, mla: dict[str, Any]) -> Any:
    """The config of what is made from a model of the ``source`` config; ``mla`` as ``TransmlaConfig`` says."""
    fields = source.to_dict() | {"model_type": MODEL_TYPE, "source_model_type": source.model_type, "mla": mla}
    return TransmlaConfig.from_dict(fields | {"architectures": ["TransmlaForCausalLM"], "auto_map": AUTO_MAP})
