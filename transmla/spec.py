"""From a Hugging Face config to an ``AttentionSpec``, and the check that the tensors agree with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transmla.artifacts import AttentionSpec
from transmla.checkpoint import split_gguf
from transmla.errors import TransmlaError
from transmla.families.base import Family
from transmla.registry import lookup


def read_config(path: Path) -> Any:
    """The config of a source, as transformers reads it.

    Raises:
        TransmlaError: an unreadable config, or one that needs ``trust_remote_code``.
    """
    from transformers import AutoConfig

    folder, extra = split_gguf(path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **extra)
    except Exception as error:  # its readers and validators share no narrower class
        if "trust_remote_code" in str(error):
            raise TransmlaError(
                f"'{path}' needs code of its own (trust_remote_code)",
                limit="transmla runs no code from a checkpoint",
                remedy="convert a model whose class ships with transformers",
            ) from error
        raise TransmlaError(
            f"cannot read the config of '{path}'",
            limit=str(error) or type(error).__name__,
            remedy="check SOURCE",
        ) from error


def family_of(config: Any) -> Family:
    """The family of ``config``, after it has accepted every attribute of it."""
    family: Family = lookup("transmla.families", "FAMILY", config.model_type, kind="model family")
    family.check(config)
    return family


def skeleton(config: Any) -> Any:
    """The source's causal LM with a single decoder layer, on the meta device: structure without weights."""
    from transformers import AutoModelForCausalLM

    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    if getattr(single, "quantization_config", None) is not None:
        del single.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(single, dtype=torch.float32, attn_implementation="sdpa").eval()


def describe(config: Any) -> AttentionSpec:
    """What the project needs to know of a source, read off its config.

    Raises:
        TransmlaError: for a family or an attribute that cannot be converted, by name.
    """
    family = family_of(config)
    try:
        rotary = type(skeleton(config).model.rotary_emb)(config)
    except (KeyError, ValueError, TypeError) as error:  # an unknown activation, for one
        raise TransmlaError(
            f"transformers cannot build a {family.name} model from the source's config",
            limit=f"{type(error).__name__}: {error}",
            remedy="correct its config.json",
        ) from error
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return AttentionSpec(
        family=family.name,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        hidden_act=config.hidden_act,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        rope_parameters=dict(config.rope_parameters),
        inv_freq=tuple(rotary.inv_freq.double().tolist()),
        attention_factor=float(rotary.attention_scaling),
        scaling=head_dim**-0.5,
    )


def check_tensors(shapes: Mapping[str, tuple[int, ...]], config: Any, family: Family) -> None:
    """Compare every tensor the model needs with what the checkpoint holds.

    Raises:
        TransmlaError: naming the first tensors that are missing or of another shape.
    """
    state = skeleton(config).state_dict()
    prefix = family.tensors["layer"].format(i=0)
    wanted: dict[str, tuple[int, ...]] = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            for i in range(config.num_hidden_layers):
                wanted[family.tensors["layer"].format(i=i) + rest] = tuple(tensor.shape)
        elif name != family.tensors["head"] or not config.tie_word_embeddings:
            wanted[name] = tuple(tensor.shape)
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise TransmlaError(
            f"{len(missing)} tensors are missing, the first is '{missing[0]}'",
            limit=f"the config asks for {config.num_hidden_layers} layers of family {family.name}",
            remedy="download the checkpoint again, or correct its config.json",
        )
    extra = [name for name in shapes if name not in wanted and name != family.tensors["head"]]
    if extra:
        raise TransmlaError(
            f"the model has no place for tensor '{extra[0]}'" + (f" and {len(extra) - 1} more" if extra[1:] else ""),
            limit=f"family {family.name} with this config.json has no such weight, and nothing is dropped silently",
            remedy="use the config.json that belongs to these weights",
        )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise TransmlaError(
                f"tensor '{name}' has shape {list(shapes[name])}",
                limit=f"config.json asks for {list(shape)}",
                remedy="use the config.json that belongs to these weights",
            )
