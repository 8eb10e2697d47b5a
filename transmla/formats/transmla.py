"""The transmla format: the source family's own classes with latent attention inside.

Its code travels with the export (``modeling/``). It stores what DeepSeek-V3 has no place for: biases, q/k norms,
windows, sinks, soft-caps, experts, and layers that keep their attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import AttentionSpec, LayerFactors, LayerKind, Plan
from transmla.core.factors import pad_factors
from transmla.errors import TransmlaError
from transmla.export.card import CardWords
from transmla.formats.base import AttentionExport, Format
from transmla.formats.model_checks import Check, compare_decoding
from transmla.formats.runtimes import Runtime, transmla_runtimes
from transmla.modeling.configuration_transmla import converted_config, write_code
from transmla.modeling.modeling_transmla import NORMED
from transmla.runtime.load import accelerate
from transmla.source.attention_view import AttentionView


class TransmlaFormat(Format):
    """The source family's own classes, their attention replaced."""

    name = "transmla"
    summary = "the source's own classes with MLA inside, for what the native format cannot store"
    preference = 0

    def lacks(self, spec: AttentionSpec, kept: tuple[int, ...]) -> str | None:
        return None

    def rotary(
        self, spec: AttentionSpec, kind: LayerKind, width: int, *, custom: bool
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        return evenly_spread(kind, width), dict(spec.rope_parameters)

    def runtimes(self, plan: Plan) -> list[Runtime]:
        return transmla_runtimes()

    def target(self, spec: AttentionSpec) -> str:
        return f"{spec.family} with MLA, format transmla"

    def config(self, source: Any, plan: Plan) -> dict[str, Any]:
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

    def attention(
        self, factors: LayerFactors, plan: Plan, view: AttentionView, inputs: Callable[[], Iterable[Tensor]]
    ) -> AttentionExport:
        dtype: torch.dtype = getattr(torch, plan.dtype)
        whole = restricted(pad_factors(factors, plan.shape), view)
        return AttentionExport(layer_tensors(whole, view, dtype), whole.to(dtype).to(torch.float32))

    def write_code(self, folder: Path) -> None:
        write_code(folder)

    def card_words(self, spec: AttentionSpec) -> CardWords:
        return CardWords(
            layout=f"It keeps the classes of its family ({spec.family}); only their attention is another. Its code is "
            "in this repository, and in transmla: where that is installed, `transmla.load` reads the model without "
            "trusting remote code, and decodes over the latent itself.",
            load_arguments=", trust_remote_code=True",
            tags=("custom_code",),
        )

    def load_options(self) -> dict[str, Any]:
        # Other implementations leave out some of what families add to their scores.
        return {"attn_implementation": "eager"}

    @torch.no_grad()
    def checks(self, model: Any, tokens: Tensor, dtype: torch.dtype) -> Iterator[Check]:
        """Decode over the latent itself, the last quarter of ``tokens`` one by one. ``model`` stays accelerated."""
        expanded = model(tokens, use_cache=False).logits
        accelerate(model, backend="torch")
        yield compare_decoding("absorbed = expanded", model, tokens, expanded, prefill=3 * tokens.shape[1] // 4)


def evenly_spread(kind: LayerKind, width: int) -> tuple[int, ...]:
    """Source frequency of every rotary slot: evenly spread, or each repeated; the export carries its own table.

    Raises:
        TransmlaError: for a width that is neither.
    """
    count = width // 2
    if width % 2 == 0 and count and kind.turned % count == 0:
        return tuple(range(0, kind.turned, kind.turned // count))
    if width % 2 == 0 and count and count % kind.turned == 0:
        return tuple(i for i in range(kind.turned) for _ in range(count // kind.turned))
    raise TransmlaError(
        f"qk_rope_head_dim {width} does not fit the source's {kind.turned} rotary frequencies",
        limit="they are spread evenly over the rotary key, or all repeated in it",
        remedy=f"use a divisor of {2 * kind.turned} that is even, or a multiple",
    )


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


def restricted(factors: LayerFactors, view: AttentionView) -> LayerFactors:
    """``factors`` that read what their heads may: of normed features, a head's queries and all keys and values."""
    masks = view.masks()
    return replace(factors, **{name: getattr(factors, name) * mask.to(factors.latent) for name, mask in masks.items()})


def layer_tensors(factors: LayerFactors, view: AttentionView, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one ``self_attn``: factors of the features of ``view``, whose own parts stay as they are."""
    attention, h = view.attention, view.heads
    query, cached = torch.cat([factors.q_nope, factors.q_pe], 1), torch.cat([factors.latent, factors.rope])
    tensors = {
        "kv_b_proj.weight": torch.cat([factors.k_up, factors.v_up], 1).flatten(0, 1),
        "o_proj.weight": factors.o.transpose(0, 1).flatten(1),
    }
    if attention.o_proj.bias is not None:
        tensors["o_proj.bias"] = attention.o_proj.bias
    if view.rules.sinks is not None:
        tensors["sinks"] = view.rules.sinks
    if view.normed:
        # A head reads its own normed queries, what is cached the keys and values behind all of them.
        own = query.unflatten(-1, (-1, h.width))[:, :, : h.queries]
        tensors["q_b_proj.weight"] = torch.stack([own[i, :, i] for i in range(h.queries)]).flatten(0, 1)
        tensors["kv_a_proj_with_mqa.weight"] = cached[:, h.queries * h.width :]
        for part in NORMED:
            tensors |= {f"{part}.{name}": t for name, t in getattr(attention, part).state_dict().items()}
    else:
        columns = view.projection.shape[1]
        for name, rows in (("q_proj", query.flatten(0, 1)), ("kv_a_proj_with_mqa", cached)):
            tensors[f"{name}.weight"] = rows[:, :columns]
            if view.bias is not None:
                tensors[f"{name}.bias"] = rows[:, columns]
    return {name: t.detach().to("cpu", dtype).contiguous() for name, t in sorted(tensors.items())}


FORMAT = TransmlaFormat()
