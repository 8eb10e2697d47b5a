"""The native format: a dense DeepSeek-V3, with no custom code anywhere.

Every layer is dense (``first_k_dense_replace``), the latent norms are identities, and the rotary rows are
interleaved: what transformers, vLLM, SGLang and llama.cpp all load as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transmla.artifacts import AttentionSpec, LayerFactors, LayerKind, MLAShape, Plan
from transmla.core.reference_attention import absorbed_attention
from transmla.export.card import CardWords
from transmla.formats.base import AttentionExport, Format
from transmla.formats.latent_scale import from_natural, to_natural
from transmla.formats.model_checks import TOLERANCE, Check, observe_layers, relative_difference
from transmla.formats.native_layout import RMS_NORM_EPS, export_shape, export_tensors, layer_factors
from transmla.formats.native_rotary import choose_slots, native_slots
from transmla.formats.runtimes import Runtime, native_runtimes
from transmla.source.attention_view import AttentionView
from transmla.source.open_source import Source

# Fields of the source's config that the export's repeats.
COPIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout")
# mean((s·c)²)/eps of the largest token: a hundredth bends the norm by half a percent, bf16's own rounding.
MAX_HEADROOM = 1e-2
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class NativeFormat(Format):
    """A dense ``DeepseekV3ForCausalLM``."""

    name = "native"
    summary = "DeepSeek-V3's own layout, read by transformers, vLLM, SGLang and llama.cpp without custom code"
    preference = 10
    options = frozenset({"pad_for", "q_lora_rank", "custom_rope"})
    norm_eps = RMS_NORM_EPS
    interleaved = True

    def lacks(self, spec: AttentionSpec, kept: tuple[int, ...]) -> str | None:
        if spec.native_gap:
            return spec.native_gap
        return "layers that keep the source's attention" if kept else None

    def rotary(
        self, spec: AttentionSpec, kind: LayerKind, width: int, *, custom: bool
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        return choose_slots(spec, width, custom=custom)

    def holds_rotary(self, spec: AttentionSpec, width: int) -> bool:
        return native_slots(spec, width) is not None

    def notes(self, spec: AttentionSpec, shape: MLAShape, rope_parameters: Mapping[str, Any]) -> list[str]:
        notes = []
        if spec.num_key_value_heads > 1 and rope_parameters.get("rope_type") != "longrope":
            notes.append(
                f"a native rotary table holds each frequency once, so the keys of {spec.num_key_value_heads} heads "
                "share one rotary key: even with nothing cut the conversion is not exact"
            )
        if shape.latent_rank < shape.kv_lora_rank:
            notes.append(
                f"{shape.kv_lora_rank - shape.latent_rank} of {shape.kv_lora_rank} latent channels are zero padding"
            )
        if rope_parameters.get("rope_type", "default") != "default":
            notes.append(
                f"rope_type '{rope_parameters['rope_type']}' in a DeepSeek-V3 config is read by transformers only"
            )
        if spec.rms_norm_eps != 1e-6:
            notes.append(
                f"rms_norm_eps changes from {spec.rms_norm_eps:g} to 1e-06; norm weights are corrected by calibration"
            )
        return notes

    def attention_parameters(self, plan: Plan) -> int:
        return super().attention_parameters(plan) + plan.shape.kv_lora_rank

    def other_parameters(self, plan: Plan) -> int:
        # A tied head is written once more.
        head = plan.spec.vocab_size * plan.spec.hidden_size if plan.spec.tie_word_embeddings else 0
        return plan.spec.other_parameters + head

    def runtimes(self, plan: Plan) -> list[Runtime]:
        return native_runtimes(plan)

    def target(self, spec: AttentionSpec) -> str:
        return "DeepSeek-V3"

    def config(self, source: Any, plan: Plan) -> dict[str, Any]:
        spec, shape = plan.spec, plan.shape
        copied = {key: getattr(source, key) for key in COPIED if getattr(source, key, None) is not None}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "attention_bias": False,
            **copied,
            "dtype": plan.dtype,
            "first_k_dense_replace": spec.num_hidden_layers,
            "hidden_act": spec.hidden_act,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "kv_lora_rank": shape.kv_lora_rank,
            "max_position_embeddings": spec.max_position_embeddings,
            "num_attention_heads": spec.num_attention_heads,
            "num_hidden_layers": spec.num_hidden_layers,
            "num_key_value_heads": spec.num_attention_heads,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": shape.q_lora_rank,
            "qk_nope_head_dim": shape.qk_nope_head_dim,
            "qk_rope_head_dim": shape.qk_rope_head_dim,
            "rms_norm_eps": RMS_NORM_EPS,
            "rope_interleave": True,
            "rope_parameters": plan.rope_parameters,
            "tie_word_embeddings": False,
            "use_cache": True,
            "v_head_dim": shape.v_head_dim,
            "vocab_size": spec.vocab_size,
        }

    def attention(
        self, factors: LayerFactors, plan: Plan, view: AttentionView, inputs: Callable[[], Iterable[Tensor]]
    ) -> AttentionExport:
        tensors, scale = export_tensors(factors, plan, inputs)
        placed = {name: tensor.to(factors.latent.device) for name, tensor in tensors.items()}
        heads = plan.spec.num_attention_heads
        read = layer_factors(placed, heads, plan.shape, factors.inv_freq, factors.rope_gain)
        record = {"latent_mean_square": scale.mean_square, "latent_max_square": scale.max_square}
        return AttentionExport(tensors, read.to(torch.float32), record)

    def cast(self, tensor: Tensor, dtype: torch.dtype, source_dtype: torch.dtype) -> Tensor:
        return tensor.to(dtype)

    def last_tensors(self, source: Source, plan: Plan, norm_correction: float) -> dict[str, Tensor]:
        names, read, dtype = source.family.tensors, source.checkpoint.read, getattr(torch, plan.dtype)
        head = names["embed"] if source.spec.tie_word_embeddings else names["head"]
        return {
            names["norm"]: (read(names["norm"]).double() * norm_correction).to(dtype),
            names["head"]: read(head).to(dtype),
        }

    def card_words(self, spec: AttentionSpec) -> CardWords:
        return CardWords(
            layout="It is a dense `DeepseekV3ForCausalLM`: transformers loads it with no custom code.",
            precision="Use bfloat16 or float32: in half precision the latent norm underflows.",
        )

    def checks(self, model: Any, tokens: Tensor, dtype: torch.dtype) -> Iterator[Check]:
        yield _absorbed_equals_expanded(model, tokens, dtype)
        yield _headroom(model, tokens)

    def untouched(self, source: Iterable[str], export: Iterable[str], *, tied: bool) -> dict[str, str]:
        written = set(export)
        names = {n: n for n in source if ".self_attn." not in n and "norm" not in n and n in written}
        return names | ({HEAD: EMBEDDING} if tied else {})

    def to_natural(self, attention: nn.Module) -> None:
        to_natural(attention)

    def from_natural(self, name: str, attention: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        from_natural(name, attention, weights, dtype)


@torch.no_grad()
def _absorbed_equals_expanded(model: Any, tokens: Tensor, dtype: torch.dtype) -> Check:
    """Compare transformers' expanded attention with absorbed attention in float64 from the same tensors."""
    rotary = model.model.rotary_emb
    gain = float(rotary.attention_scaling) ** 2
    worst = 0.0
    for layer, (x, output) in zip(
        model.model.layers, observe_layers(model, tokens, lambda layer: layer.self_attn), strict=True
    ):
        tensors = {name: p.detach().cpu() for name, p in layer.self_attn.named_parameters()}
        factors = layer_factors(
            tensors, model.config.num_attention_heads, export_shape(model.config), rotary.inv_freq.double().cpu(), gain
        )
        worst = max(worst, relative_difference(output.cpu(), absorbed_attention(x.double().cpu(), factors)))
    # Half a headroom's worth of latent norm is part of the export, not an error of it.
    limit = TOLERANCE[dtype] + MAX_HEADROOM / 2
    return Check("absorbed = expanded", worst <= limit, f"largest relative difference {worst:.1e}")


def _headroom(model: Any, tokens: Tensor) -> Check:
    """Measure how close the largest latent comes to bending its norm."""
    seen = observe_layers(model, tokens, lambda layer: layer.self_attn.kv_a_layernorm)
    worst = max(float(x.float().square().mean(-1).max()) for x, _ in seen) / RMS_NORM_EPS
    return Check("latent norm is an identity", worst <= MAX_HEADROOM, f"largest mean(c²) is {worst:.1e} of eps")


FORMAT = NativeFormat()
