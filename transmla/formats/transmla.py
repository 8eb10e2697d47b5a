"""The own format: the source family's own classes, factors of any attention as the tensors of ``modeling_transmla``."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerKind, Plan
from transmla.modeling.configuration_transmla import converted_config
from transmla.modeling.modeling_transmla import NORMED
from transmla.source.attention_view import FrontEnd


def own_config(source: Any, plan: Plan) -> dict[str, Any]:
    """The ``config.json`` of the export of a model of the ``source`` config."""
    source = copy.deepcopy(source)
    if getattr(source, "quantization_config", None) is not None:
        del source.quantization_config
    kinds: list[dict[str, Any]] = []
    layers: list[int | None] = []
    for i in range(plan.spec.num_hidden_layers):
        kind = layer_kind(plan.at(i), plan.spec.kind(i))
        if i not in plan.kept and kind not in kinds:
            kinds.append(kind)
        layers.append(None if i in plan.kept else kinds.index(kind))
    fields: dict[str, Any] = converted_config(source, {"layers": layers, "kinds": kinds}).to_dict()
    return fields | {"dtype": plan.dtype}


def layer_kind(plan: Plan, kind: LayerKind) -> dict[str, Any]:
    """What the config says of a layer of this ``kind``, and of a ``plan`` for it alone."""
    shape, slots = plan.shape, plan.rotary.slots
    told: dict[str, Any] = {
        "kv_lora_rank": shape.kv_lora_rank,
        "qk_rope_head_dim": shape.qk_rope_head_dim,
        "qk_nope_head_dim": shape.qk_nope_head_dim,
        "v_head_dim": shape.v_head_dim,
        "inv_freq": [kind.inv_freq[slot] for slot in slots],
        "attention_factor": kind.attention_factor,
        "latent_norm": False,
    }
    if kind.long_inv_freq is not None:
        told["long_inv_freq"] = [kind.long_inv_freq[slot] for slot in slots]
        told["original_max_position_embeddings"] = kind.short_length
    return told


def restricted(factors: LayerFactors, front: FrontEnd) -> LayerFactors:
    """``factors`` that read what their heads may: of normed features, a head's queries and all keys and values."""
    masks = front.masks()
    return replace(factors, **{name: getattr(factors, name) * mask.to(factors.latent) for name, mask in masks.items()})


def layer_tensors(factors: LayerFactors, front: FrontEnd, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one ``self_attn``: factors of the features of ``front``, whose own parts stay as they are."""
    attention, h = front.attention, front.heads
    query, cached = torch.cat([factors.q_nope, factors.q_pe], 1), torch.cat([factors.latent, factors.rope])
    tensors = {
        "kv_b_proj.weight": torch.cat([factors.k_up, factors.v_up], 1).flatten(0, 1),
        "o_proj.weight": factors.o.transpose(0, 1).flatten(1),
    }
    if attention.o_proj.bias is not None:
        tensors["o_proj.bias"] = attention.o_proj.bias
    if front.rules.sinks is not None:
        tensors["sinks"] = front.rules.sinks
    if front.normed:
        # A head reads its own normed queries, what is cached the keys and values behind all of them.
        own = query.unflatten(-1, (-1, h.width))[:, :, : h.queries]
        tensors["q_b_proj.weight"] = torch.stack([own[i, :, i] for i in range(h.queries)]).flatten(0, 1)
        tensors["kv_a_proj_with_mqa.weight"] = cached[:, h.queries * h.width :]
        for part in NORMED:
            tensors |= {f"{part}.{name}": t for name, t in getattr(attention, part).state_dict().items()}
    else:
        columns = front.projection.shape[1]
        for name, rows in (("q_proj", query.flatten(0, 1)), ("kv_a_proj_with_mqa", cached)):
            tensors[f"{name}.weight"] = rows[:, :columns]
            if front.bias is not None:
                tensors[f"{name}.bias"] = rows[:, columns]
    return {name: t.detach().to("cpu", dtype).contiguous() for name, t in sorted(tensors.items())}
