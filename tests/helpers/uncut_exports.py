"""Tiny sources of every family, and their uncut exports in the transmla format, made by selecting channels.

Each rotary key channel becomes a rotary channel of the export with a separate frequency slot. Each value channel, and
each key channel without rotation, becomes a channel of the latent. All new weights are products with rows of the unit
matrix, which are exact in any precision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from transmla.artifacts import ScoreRules
from transmla.families.base import TINY, TINY_WINDOW, Family
from transmla.modeling.configuration_transmla import converted_config, write_code
from transmla.modeling.modeling_transmla import NORMED
from transmla.registry import scan
from transmla.source.attention_view import AttentionView, Heads, halves_order

# Config fields of every source.
COMMON = {**TINY, "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "pad_token_id": 0}
COMMON |= {"bos_token_id": 1, "eos_token_id": 2}
WINDOW = TINY_WINDOW
# Features that a family's models may have, but its tiny config leaves out.
MORE = {"llama": {"attention_bias": True}, "qwen3": {"attention_bias": True}, "mistral": {"sliding_window": WINDOW}}
SHELF: dict[str, Family] = scan("transmla.families", "FAMILY")
FAMILIES: dict[str, dict[str, Any]] = {name: {**family.tiny, **MORE.get(name, {})} for name, family in SHELF.items()}
INTERLEAVED = tuple(name for name, family in SHELF.items() if family.interleaved)


def make_source(family: str, folder: Path, **changes: Any) -> Any:
    """Save a random model with large biases, norms and sinks to ``folder``, and return the model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(FAMILIES[family] | COMMON | changes))
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


def rotary_table(model: Any, layer: int) -> tuple[Tensor, float]:
    """Return the rotary frequencies [pairs] of a source's layer (0 without rotation) and its factor on cosines."""
    rotary, kind = model.model.rotary_emb, (getattr(model.config, "layer_types", None) or [""] * (layer + 1))[layer]
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    inv_freq = getattr(rotary, f"{prefix}inv_freq")
    if not getattr(model.model.layers[layer].self_attn, "use_rope", True):
        inv_freq = torch.zeros_like(inv_freq)
    return inv_freq, float(getattr(rotary, f"{prefix}attention_scaling"))


def attention_view(model: Any, layer: int) -> AttentionView:
    """Return a layer's attention with its features, read from the config; ``describe`` reads the modules instead."""
    config, attention = model.config, model.model.layers[layer].self_attn
    types = getattr(config, "layer_types", None)
    slides = types is None or types[layer] == "sliding_attention"
    rules = ScoreRules(
        getattr(config, "sliding_window", None) if slides else None,
        getattr(attention, "attn_logit_softcapping", None),
        getattr(attention, "sinks", None),
    )
    width, rotary = attention.head_dim, 2 * len(rotary_table(model, layer)[0])
    order = halves_order(width, rotary, interleaved=config.model_type in INTERLEAVED)
    return AttentionView(attention, Heads(config.num_attention_heads, config.num_key_value_heads, width, order), rules)


def uncut(model: Any, source: Path, folder: Path, *, keep: tuple[int, ...] = ()) -> Path:
    """Write the uncut export of ``model`` to ``folder`` and return ``folder``.

    Args:
        model: a model from ``make_source``.
        source: folder of the saved model.
        folder: folder to create.
        keep: layers that keep the source's attention.
    """
    config, kinds, layers = model.config, [], []
    tensors = load_file(source / "model.safetensors")
    for i, layer in enumerate(model.model.layers):
        if i in keep:
            layers.append(None)
            continue
        inv_freq, factor = rotary_table(model, i)
        for name in [n for n in tensors if n.startswith(f"model.layers.{i}.self_attn.")]:
            del tensors[name]
        selected, shape = select(layer.self_attn, config, len(inv_freq))
        tensors |= {f"model.layers.{i}.self_attn.{name}": t.detach().contiguous() for name, t in selected.items()}
        slots = inv_freq.repeat(config.num_key_value_heads).tolist()
        kinds.append(shape | {"inv_freq": slots, "attention_factor": factor, "latent_norm": False})
        layers.append(len(kinds) - 1)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    export = converted_config(config, {"layers": layers, "kinds": kinds}).to_dict()
    (folder / "config.json").write_text(json.dumps(export | {"dtype": "float32"}))
    write_code(folder)
    return folder


def select(attention: Any, config: Any, pairs: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return tensors and widths of one layer in which ``pairs`` pairs of each head's channels are rotated."""
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    share, fixed, unit = heads // groups, d - 2 * pairs, torch.eye(attention.head_dim)
    d_n, rank, d_r = max(fixed, 1), groups * (d + fixed), 2 * pairs * groups
    rotated = unit[: 2 * pairs]
    if config.model_type in INTERLEAVED:
        rotated = torch.cat([rotated[0::2], rotated[1::2]])
    query, cached = torch.zeros(heads, d_n + d_r, d), torch.zeros(rank + d_r, 2 * groups, d)
    expand = torch.zeros(heads, d_n + d, rank)
    for g in range(groups):
        values, keys = slice(g * d, (g + 1) * d), slice(groups * d + g * fixed, groups * d + (g + 1) * fixed)
        cached[values, groups + g] = unit
        cached[keys, g] = unit[2 * pairs :]
        for part in range(2):
            slots = slice(part * d_r // 2 + g * pairs, part * d_r // 2 + (g + 1) * pairs)
            rows = rotated[part * pairs : (part + 1) * pairs]
            cached[rank:][slots, g] = rows
            query[g * share : (g + 1) * share, d_n:][:, slots] = rows
        expand[g * share : (g + 1) * share, d_n:, values] = unit
        expand[g * share : (g + 1) * share, :fixed, keys] = torch.eye(fixed)
    query[:, :fixed] = unit[2 * pairs :]
    cached = cached.flatten(1)
    tensors = {"kv_b_proj.weight": expand.flatten(0, 1)}
    tensors |= {f"o_proj.{name}": t for name, t in attention.o_proj.state_dict().items()}
    if hasattr(attention, "sinks"):
        tensors["sinks"] = attention.sinks
    if hasattr(attention, "q_norm"):
        for part in NORMED:
            tensors |= {f"{part}.{name}": t for name, t in getattr(attention, part).state_dict().items()}
        tensors |= {"q_b_proj.weight": query.flatten(0, 1), "kv_a_proj_with_mqa.weight": cached}
    else:
        for name in ("weight", "bias"):
            q, k, v = projections(attention, name, heads * d, groups * d)
            if q is not None:
                tensors[f"q_proj.{name}"] = torch.einsum("hnd,hd...->hn...", query, q.unflatten(0, (heads, d))).flatten(
                    0, 1
                )
                tensors[f"kv_a_proj_with_mqa.{name}"] = cached @ torch.cat([k, v])
    return tensors, {"kv_lora_rank": rank, "qk_rope_head_dim": d_r, "qk_nope_head_dim": d_n, "v_head_dim": d}


def projections(attention: Any, name: str, wide: int, narrow: int) -> tuple[Any, Any, Any]:
    """Return the weights or biases (``name``) of queries, keys and values; None for a missing bias.

    ``wide`` and ``narrow`` are the rows of queries, and of keys and values, in a joint ``qkv_proj``.
    """
    if not hasattr(attention, "qkv_proj"):
        return tuple(getattr(getattr(attention, f"{part}_proj"), name) for part in "qkv")  # type: ignore[return-value]
    joint = getattr(attention.qkv_proj, name)
    return (None,) * 3 if joint is None else joint.split([wide, narrow, narrow])
