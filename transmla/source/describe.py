"""Read a source's Hugging Face config, and derive the model family and the ``AttentionSpec`` from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from transmla.artifacts import AttentionSpec, LayerKind
from transmla.boundary import boundary, read_json_object
from transmla.errors import TransmlaError
from transmla.families.base import Family
from transmla.modeling.configuration_transmla import MODEL_TYPE
from transmla.modeling.modeling_transmla import has_bias, refuse_unknown, window_of
from transmla.registry import lookup
from transmla.source.layer_rules import LayerRules, check_agreement, read_rules
from transmla.source.load import load_config, split_gguf


def read_config(path: Path) -> Any:
    """Read the config of a checkpoint folder or GGUF file with transformers.

    Raises:
        TransmlaError: if the config is missing or unreadable, needs ``trust_remote_code``, or belongs to a converted
            model.
    """
    folder, _ = split_gguf(path)
    if _is_export(folder):
        raise TransmlaError(
            f"'{path}' is already converted", limit="its attention is MLA", remedy="convert the original model"
        )
    if folder == path and not (folder / "config.json").is_file():
        raise TransmlaError(
            f"no config.json in '{path}'",
            limit="it describes the model's layers",
            remedy="check SOURCE, or add the file",
        )
    with boundary(f"cannot read the config of '{path}'", remedy="check SOURCE"):
        return load_config(path)


def _is_export(folder: Path) -> bool:
    """Return whether ``folder`` holds an export in the transmla format."""
    config = read_json_object(folder / "config.json")
    return config is not None and config.get("model_type") == MODEL_TYPE


def family_of(config: Any) -> Family:
    """Return the model family of ``config``, after the family has checked every attribute of the config.

    Raises:
        TransmlaError: if the family is unknown, the model is multimodal, or no export format can carry an attribute.
    """
    text = getattr(config, "text_config", None)
    if text is not None:
        of_type = f"of model_type '{text.model_type}', " if hasattr(text, "model_type") else ""
        raise TransmlaError(
            f"'{config.model_type}' is a multimodal model",
            limit="transmla converts causal language models",
            remedy=f"save its language model, {of_type}as a separate model, and convert that",
        )
    try:
        family: Family = lookup("transmla.families", "FAMILY", config.model_type, kind="model family")
    except TransmlaError:
        if not hasattr(config, "kv_lora_rank"):
            raise
        raise TransmlaError(
            f"the model's attention is MLA already (model_type '{config.model_type}')",
            limit="multi-head and grouped-query attention can be converted",
            remedy="give the model before its conversion",
        ) from None
    family.check(config)
    return family


def empty_model(config: Any) -> Any:
    """Build the source's causal LM without weights: parameters on the meta device, buffers with their values.

    Raises:
        TransmlaError: if transformers cannot build the model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    what = f"transformers cannot build a {config.model_type} model from the source's config"
    with boundary(what, remedy="correct its config.json"), init_empty_weights(include_buffers=False), _EmptyOnMeta():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


# Names in configs of the number of experts that a token passes.
PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_topk")
# Numbers in an empty tensor that is surely a weight. Buffers, which may be made empty and then filled, are smaller.
LARGE = 2**22


class _EmptyOnMeta(TorchFunctionMode):
    """Makes large empty tensors on the meta device.

    ``init_empty_weights`` allocates each parameter before it moves it to the meta device. All experts of a layer of a
    671B model are one parameter of 30 GB in float32, which many machines cannot even reserve.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            weight = func(*args, **{**kwargs, "device": "meta"})
            if weight.numel() >= LARGE:
                return weight
        return func(*args, **kwargs)


def describe(config: Any, model: Any = None) -> AttentionSpec:
    """Return the ``AttentionSpec`` of a source.

    Args:
        config: the source's transformers config.
        model: the source's causal LM without weights; built from ``config`` if None.

    Raises:
        TransmlaError: if the family, or an attribute of the config or the attention, cannot be converted.
    """
    family = family_of(config)
    model = empty_model(config) if model is None else model
    layers = model.model.layers
    attention = layers[0].self_attn
    what, remedy = f"transformers cannot run a {family.name} model of the source's config", "correct its config.json"
    with boundary(what, remedy=remedy):
        rules = read_rules(model)
    try:
        layer_kinds = [_layer_kind(model, i, rules[i]) for i in range(len(layers))]
    except ValueError as error:
        raise TransmlaError(
            f"{family.name}: {str(error).partition(';')[0]}",
            limit="nothing is dropped silently",
            remedy="convert a model without it",
        ) from error
    with boundary(what, remedy=remedy):
        check_agreement(model, rules, [kind.window for kind in layer_kinds])
    kinds = tuple(dict.fromkeys(layer_kinds))
    outside_attention = [
        sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("self_attn.")) for layer in layers
    ]
    inside_attention = sum(p.numel() for layer in layers for p in layer.self_attn.parameters())
    uniform = kinds == (LayerKind(kinds[0].inv_freq, kinds[0].attention_factor, kinds[0].scaling),)
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    experts = max(_experts(layer) for layer in layers)
    return AttentionSpec(
        family=family.name,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=getattr(config, "rms_norm_eps", 0.0),
        hidden_act=getattr(config, "hidden_act", ""),
        tie_word_embeddings=bool(config.tie_word_embeddings),
        rope_parameters=dict(config.rope_parameters or {}),
        inv_freq=kinds[0].inv_freq,
        attention_factor=kinds[0].attention_factor,
        scaling=kinds[0].scaling,
        layer_parameters=max(outside_attention),
        other_parameters=sum(p.numel() for p in model.parameters()) - inside_attention - _tied(config, model),
        normed=hasattr(attention, "q_norm"),
        biased=has_bias(attention),
        experts=experts,
        # Configs of models without experts may have these names too.
        experts_per_token=max(getattr(config, name, 0) or 0 for name in PER_TOKEN) if experts else 0,
        native_gap=family.native(config),
        kinds=() if uniform else kinds,
        layers=() if uniform else tuple(kinds.index(kind) for kind in layer_kinds),
    )


def _experts(layer: Any) -> int:
    """Return the number of experts of a decoder layer: the rows of their stacked weights, or 0."""
    return max((len(p) for name, p in layer.named_parameters() if ".experts." in name), default=0)


def _tied(config: Any, model: Any) -> int:
    """Return the number of weights that the model without weights counts twice: a tied head has its own there."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not config.tie_word_embeddings or head is None or head.weight is embedding.weight:
        return 0
    return int(head.weight.numel())


def _layer_kind(model: Any, layer: int, rules: LayerRules) -> LayerKind:
    """Return the kind of one layer with the observed ``rules``, read from the modules that its family built.

    Raises:
        ValueError: if MLA would leave out a part of the attention; the message names the part.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config, rotary, attention = model.config, model.model.rotary_emb, model.model.layers[layer].self_attn
    refuse_unknown(attention, config)
    types = getattr(config, "layer_types", None)
    layer_type = types[layer] if types and hasattr(rotary, f"{types[layer]}_inv_freq") else None
    prefix = f"{layer_type}_" if layer_type else ""
    table = (config.rope_parameters[layer_type] if layer_type else config.rope_parameters) or {}
    inv_freq = getattr(rotary, f"{prefix}inv_freq").double()
    factor, long = float(getattr(rotary, f"{prefix}attention_scaling")), None
    if not getattr(attention, "use_rope", True):
        inv_freq, factor, table = torch.zeros_like(inv_freq), 1.0, {}
    unrotated = attention.head_dim // 2 - len(inv_freq)
    short_length = table["original_max_position_embeddings"] if table.get("rope_type") == "longrope" else None
    if short_length is not None:
        of_type = {"layer_type": layer_type} if layer_type else {}
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=short_length + 1, **of_type)
    return LayerKind(
        inv_freq=(*inv_freq.tolist(), *[0.0] * unrotated),
        # With partial RoPE the factor scales the rotary channels only, so it cannot be a factor of the whole score.
        attention_factor=1.0 if unrotated else factor,
        scaling=rules.scaling,
        window=window_of(attention, config, layer),
        softcap=rules.softcap,
        rotary_factor=factor if unrotated else 1.0,
        long_inv_freq=None if long is None else (*long.double().tolist(), *[0.0] * unrotated),
        short_length=short_length,
    )
