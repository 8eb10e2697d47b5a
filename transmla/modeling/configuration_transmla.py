"""Config of the transmla format: the fields of the source family's config, and the shapes of the latent attention."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

MODEL_TYPE = "transmla"
# ``auto_map`` of an export: the classes that ``trust_remote_code`` loads from the files beside its weights.
AUTO_MAP = {
    "AutoConfig": "configuration_transmla.TransmlaConfig",
    "AutoModel": "modeling_transmla.TransmlaModel",
    "AutoModelForCausalLM": "modeling_transmla.TransmlaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_transmla.TransmlaForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_transmla.TransmlaForTokenClassification",
}


class TransmlaConfig(PretrainedConfig):  # type: ignore[misc,no-untyped-call]
    """Reader of a ``config.json`` in the transmla format; returns a subclass of the source family's config.

    Besides the family's fields, a config has ``source_model_type`` (the family) and ``mla``, a dict of two lists:

    - ``layers``: for each layer, the index of its entry in ``kinds``, or None if it kept the source's attention.
    - ``kinds``: one dict for each distinct kind of latent attention. Its keys are:

      - ``kv_lora_rank``, ``qk_rope_head_dim``, ``qk_nope_head_dim``, ``v_head_dim``: widths r, d_r, d_n, d_v.
      - ``inv_freq``: frequencies [d_r / 2] of the rotary slots, in radians per position.
      - ``attention_factor``: factor on cosines and sines.
      - ``latent_norm``: whether the latent has an RMSNorm.
      - ``long_inv_freq``, ``original_max_position_embeddings`` (longrope only): frequencies [d_r / 2] for texts that
        are longer than this number of positions.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of the family in ``source_model_type``.

        Raises:
            ValueError: if ``config_dict`` has no ``source_model_type``.
        """
        if "source_model_type" not in config_dict:
            raise ValueError(
                "this config.json has no source_model_type, so it is not a transmla export; read it with AutoConfig"
            )
        return config_class(config_dict["source_model_type"]).from_dict(config_dict, **kwargs)


class _Converted:
    """Mixin that ``config_class`` places before a family's config class."""

    architectures: list[str] | None
    source_model_type: str

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the config, and beside it the code that ``auto_map`` names."""
        self.architectures = [_reader((self.architectures or ["TransmlaForCausalLM"])[0])]
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_code(Path(save_directory))

    def __reduce__(self) -> Any:
        """Pickle the family's name instead of this class, which ``config_class`` creates at run time."""
        return _bare, (self.source_model_type,), self.__dict__


def _reader(architecture: str) -> str:
    """The class of ``AUTO_MAP`` that loads a model of the class ``architecture``, such as TransmlaLlamaModel."""
    readers = [target.partition(".")[2] for task, target in AUTO_MAP.items() if task != "AutoConfig"]
    fitting = [reader for reader in readers if architecture.endswith(reader.removeprefix("Transmla"))]
    return fitting[0] if fitting else "TransmlaForCausalLM"


def _bare(family: str) -> Any:
    """A config of ``family`` without state, for unpickling."""
    made = config_class(family)
    return made.__new__(made)


def write_code(folder: Path, beside: Path = Path(__file__).parent) -> None:
    """Copy the code files that ``AUTO_MAP`` names from the folder ``beside`` into ``folder``.

    A missing file is skipped. The file of the model is missing if transformers fetched a checkpoint's code only for the
    config; the model's ``save_pretrained`` then copies it.
    """
    for name in ("configuration_transmla.py", "modeling_transmla.py"):
        if (beside / name).is_file():
            shutil.copy(beside / name, folder)


@cache
def config_class(family: str) -> Any:
    """Return the config class of ``family`` (a ``model_type`` of transformers) in the transmla format."""
    source = CONFIG_MAPPING[family]
    # The family's plan for tensor parallelism does not fit the new attention, so its attention entries are left out.
    plan = {name: how for name, how in (source.base_model_tp_plan or {}).items() if ".self_attn." not in name}
    body = {
        "model_type": MODEL_TYPE,
        "base_model_tp_plan": plan or None,
        "__module__": __name__,
        "__doc__": source.__doc__,
    }
    # All families share one class name: transformers compares the name with that of the registered config class.
    return type(TransmlaConfig.__name__, (_Converted, source), body)


def converted_config(source: Any, mla: dict[str, Any]) -> Any:
    """Return the config of a converted model, from the ``source`` config and ``mla`` (see ``TransmlaConfig``)."""
    fields = source.to_dict() | {"model_type": MODEL_TYPE, "source_model_type": source.model_type, "mla": mla}
    return TransmlaConfig.from_dict(fields | {"architectures": ["TransmlaForCausalLM"], "auto_map": AUTO_MAP})
