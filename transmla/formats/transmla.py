"""The transmla format: the source family's classes with latent attention inside.

The export contains its modelling code, a copy of ``modeling/``. This format stores what a dense DeepSeek-V3 cannot:
biases, q/k norms, sliding windows, sinks, soft-capped scores, experts, and layers that keep the source's attention.
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
from transmla.formats.model_checks import Check, absorbed_decoding
from transmla.formats.runtimes import Runtime, transmla_runtimes
from transmla.formats.serve_limits import refuses, served_widths
from transmla.modeling.configuration_transmla import converted_config, write_code
from transmla.modeling.modeling_transmla import NORMED
from transmla.source.attention_view import AttentionView


class TransmlaFormat(Format):
    """The source family's classes with latent attention in place of their attention."""

    name = "transmla"
    summary = "the source family's classes with MLA inside, for sources that the native format cannot store"
    preference = 0
    options = frozenset({"pad_for"})
    signed = True
    padded_by_runtimes = True
    shapes_by_layer = True
    carries_record = True

    def lacks(self, spec: AttentionSpec, kept: tuple[int, ...]) -> str | None:
        """Return None: this format can store every supported source."""
        return None

    def rotary(
        self, spec: AttentionSpec, kind: LayerKind, width: int, *, custom: bool
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Choose evenly spread source frequencies; the export's config stores its frequencies itself.

        Raises:
            TransmlaError: if the source's frequencies neither spread evenly over this width nor all repeat in it.
        """
        return evenly_spread(kind, width), dict(spec.rope_parameters)

    def runtimes(self, plan: Plan) -> list[Runtime]:
        """List the runtimes that read exports with modelling code; vLLM and SGLang need transmla's plugins."""
        return transmla_runtimes([_plugin(plan, name) for name in ("vLLM", "SGLang")])

    def target(self, spec: AttentionSpec) -> str:
        """Return the family's name, and that its attention is MLA."""
        return f"{spec.family} with MLA, format transmla"

    def config(self, source: Any, plan: Plan) -> dict[str, Any]:
        """Return the source's config with the widths and frequencies of each kind of layer under ``mla``."""
        source = copy.deepcopy(source)
        if getattr(source, "quantization_config", None) is not None:
            del source.quantization_config
        if all(plan.spec.kind(i).softcap is None for i in range(plan.spec.num_hidden_layers)):
            # Some families have the field, and ignore it. Latent attention would not.
            source.attn_logit_softcapping = None
        fields: dict[str, Any] = converted_config(source, all_kinds(plan)).to_dict()
        return fields | {"dtype": plan.dtype}

    def attention(
        self, factors: LayerFactors, plan: Plan, view: AttentionView, inputs: Callable[[], Iterable[Tensor]]
    ) -> AttentionExport:
        """Convert the factors of one layer to tensors; ``inputs`` is not read, because the latent has no norm."""
        dtype: torch.dtype = getattr(torch, plan.dtype)
        padded = restricted(pad_factors(factors, plan.shape), view)
        return AttentionExport(layer_tensors(padded, view, dtype), padded.to(dtype).to(torch.float32))

    def write_code(self, folder: Path) -> None:
        """Write the configuration and modelling code into ``folder``."""
        write_code(folder)

    def card_words(self, spec: AttentionSpec) -> CardWords:
        """Return the model card's text on this format."""
        return CardWords(
            layout=f"It keeps the classes of its family ({spec.family}) and replaces only their attention. This "
            "repository contains the code, which is not needed where transmla is installed.",
            load_arguments=", trust_remote_code=True",
            tags=("custom_code",),
        )

    def load_options(self) -> dict[str, Any]:
        """Return the option that selects transformers' eager attention."""
        # Other attention implementations ignore some families' changes of the scores.
        return {"attn_implementation": "eager"}

    def untouched(self, plan: Plan, source: Iterable[str], export: Iterable[str], *, attention: bool) -> dict[str, str]:
        """Map the tensors that equal a source tensor; of an attention, the parts that ``layer_tensors`` copies."""
        names = super().untouched(plan, source, export, attention=attention)
        kept = tuple(f"model.layers.{i}." for i in plan.kept)
        if attention:
            names |= {name: name for name in source if name.startswith(kept) or _is_copied(name, plan.spec)}
        return names

    @torch.no_grad()
    def checks(self, model: Any, tokens: Tensor, dtype: torch.dtype) -> Iterator[Check]:
        """Check that absorbed decoding equals a full forward pass with expanded keys and values.

        The last quarter of ``tokens`` [B, T] is decoded one by one. ``model`` stays accelerated afterwards.
        """
        yield absorbed_decoding(model, tokens)


def _is_copied(name: str, spec: AttentionSpec) -> bool:
    """Return whether a source's tensor in ``self_attn`` is copied: norms with their projections, and what lies last."""
    part = name.partition(".self_attn.")[2]
    return part in ("o_proj.bias", "sinks") or (spec.normed and part.partition(".")[0] in NORMED)


def evenly_spread(kind: LayerKind, width: int) -> tuple[int, ...]:
    """Choose the source frequency of each of the ``width`` / 2 rotary slots.

    The frequencies are every n-th of the source's for a narrow width, or all of them repeated for a wide one.

    Returns:
        The indices [width/2] into ``kind.inv_freq``.

    Raises:
        TransmlaError: if ``width`` is odd, or is neither a divisor nor a multiple of the source's rotary width.
    """
    count = width // 2
    if width % 2 == 0 and count and kind.rotary_pairs % count == 0:
        return tuple(range(0, kind.rotary_pairs, kind.rotary_pairs // count))
    if width % 2 == 0 and count and count % kind.rotary_pairs == 0:
        return tuple(i for i in range(kind.rotary_pairs) for _ in range(count // kind.rotary_pairs))
    raise TransmlaError(
        f"qk_rope_head_dim {width} does not fit the source's {kind.rotary_pairs} rotary frequencies",
        limit="every n-th frequency is kept, or each is repeated n times",
        remedy=f"use an even divisor of {2 * kind.rotary_pairs}, or a multiple",
    )


def all_kinds(plan: Plan) -> dict[str, Any]:
    """Return the config's ``mla``: all kinds of latent attention, and each layer's index; None for a kept layer."""
    kinds: list[dict[str, Any]] = []
    layers: list[int | None] = []
    for i in range(plan.spec.num_hidden_layers):
        kind = layer_kind(plan.at(i), plan.spec.kind(i))
        if i not in plan.kept and kind not in kinds:
            kinds.append(kind)
        layers.append(None if i in plan.kept else kinds.index(kind))
    return {"layers": layers, "kinds": kinds}


def _plugin(plan: Plan, runtime: str) -> Runtime:
    """Return the support that transmla's plugin gives ``runtime``, vLLM or SGLang, for the export of a plan."""
    spec, shape = plan.spec, plan.shape
    kinds = [spec.kind(i) for i in range(spec.num_hidden_layers)]
    # The fields of config.json that decide about this.
    config = {
        "source_model_type": spec.family,
        "num_attention_heads": spec.num_attention_heads,
        "max_position_embeddings": spec.max_position_embeddings,
        "sliding_window": min((kind.window for kind in kinds if kind.window is not None), default=None),
        "attn_logit_softcapping": next((kind.softcap for kind in kinds if kind.softcap is not None), None),
        "mla": all_kinds(plan),
    }
    problem = refuses(config, runtime=runtime)
    if problem is not None:
        return Runtime(runtime, False, problem)
    widths = served_widths(config, cpu=False)
    note = f"latent cache, rows of {widths.latent} + {widths.rotary}, with transmla installed beside it"
    if (shape.kv_lora_rank, shape.qk_rope_head_dim) != (widths.latent, widths.rotary):
        note += f"; this shape is padded, its cache is {100 * widths.cached / spec.cache_values:.0f} % of the source's"
    return Runtime(runtime, True, note)


def layer_kind(plan: Plan, kind: LayerKind) -> dict[str, Any]:
    """Return the config entry of one kind of layer: its widths, rotary frequencies and attention factor.

    Args:
        plan: the plan for one layer of this kind (``Plan.at``).
        kind: the source's kind of layer.
    """
    shape, slots = plan.shape, plan.rotary.slots
    entry: dict[str, Any] = {
        "kv_lora_rank": shape.kv_lora_rank,
        "qk_rope_head_dim": shape.qk_rope_head_dim,
        "qk_nope_head_dim": shape.qk_nope_head_dim,
        "v_head_dim": shape.v_head_dim,
        "inv_freq": [kind.inv_freq[slot] for slot in slots],
        "attention_factor": kind.attention_factor,
        "latent_norm": False,
    }
    if kind.long_inv_freq is not None:
        entry["long_inv_freq"] = [kind.long_inv_freq[slot] for slot in slots]
        entry["original_max_position_embeddings"] = kind.short_length
    return entry


def restricted(factors: LayerFactors, view: AttentionView) -> LayerFactors:
    """Set weights of ``factors`` to zero where a head may not read a feature.

    With q/k norms, a head's query reads only that head's normed query, and the latent reads only keys and values.
    """
    masks = view.masks()
    return replace(factors, **{name: getattr(factors, name) * mask.to(factors.latent) for name, mask in masks.items()})


def layer_tensors(factors: LayerFactors, view: AttentionView, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of one ``self_attn``, rounded to ``dtype``, on the CPU.

    Args:
        factors: factors [.., F] of the attention's features, already ``restricted``.
        view: the source's attention, whose norms, output bias and sinks are copied.
        dtype: the export's precision.
    """
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
        # The features are the normed queries of all heads, then keys and values. Head i reads its queries alone.
        by_head = query.unflatten(-1, (-1, h.width))[:, :, : h.queries]
        tensors["q_b_proj.weight"] = torch.stack([by_head[i, :, i] for i in range(h.queries)]).flatten(0, 1)
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
