"""The native format: a dense DeepSeek-V3 without custom code.

Every layer is dense (``first_k_dense_replace``), the latent norms are identities, and the rotary rows are interleaved.
transformers, vLLM, SGLang and llama.cpp load this layout as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transmla.artifacts import AttentionSpec, LayerFactors, LayerKind, MLAShape, Plan
from transmla.core.reference_attention import absorbed_attention
from transmla.export.card import CardWords
from transmla.formats.base import AttentionExport, Format
from transmla.formats.model_checks import TOLERANCE, Check, observe_layers, relative_difference
from transmla.formats.native_layout import INPUT_SCALE, RMS_NORM_EPS, export_shape, export_tensors, layer_factors
from transmla.formats.native_natural import from_natural, measure, to_natural
from transmla.formats.native_rotary import choose_slots, native_slots
from transmla.formats.runtimes import Runtime, native_runtimes
from transmla.source.attention_view import AttentionView
from transmla.source.open_source import Source

# Fields that the export's config copies from the source's config.
COPIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout")
# Largest allowed mean((s·c)²)/eps of a token's scaled latent s·c. At 0.01 the norm deviates from a constant by 0.5 %,
# which is bfloat16's rounding.
MAX_HEADROOM = 1e-2
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# Modules that bitsandbytes must leave out. It casts to float16, which overflows in the projections that hold the
# inverse of the input scale. It cannot run the expansion, whose input has four dimensions.
NOT_QUANTISED = ["q_proj", "q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "lm_head"]


class NativeFormat(Format):
    """A dense ``DeepseekV3ForCausalLM``."""

    name = "native"
    summary = "DeepSeek-V3's own layout, read by transformers, vLLM, SGLang and llama.cpp without custom code"
    preference = 10
    carries_record = True
    options = frozenset({"pad_for", "q_lora_rank", "custom_rope"})
    norm_eps = RMS_NORM_EPS
    input_scale = INPUT_SCALE
    interleaved = True
    signed = True

    def lacks(self, spec: AttentionSpec, kept: tuple[int, ...]) -> str | None:
        """Name what a dense DeepSeek-V3 cannot store of the source; None if it can store everything."""
        if spec.native_gap:
            return spec.native_gap
        return "layers that keep the source's attention" if kept else None

    def rotary(
        self, spec: AttentionSpec, kind: LayerKind, width: int, *, custom: bool
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Choose source frequencies that match the table which runtimes compute from a DeepSeek-V3 config.

        Raises:
            TransmlaError: if the table for this width is not a subset of the source's.
        """
        return choose_slots(spec, width, custom=custom)

    def holds_rotary(self, spec: AttentionSpec, width: int) -> bool:
        """Return whether the runtimes' table for ``width`` is a subset of the source's frequencies."""
        return native_slots(spec, width) is not None

    def notes(self, spec: AttentionSpec, shape: MLAShape, rope_parameters: Mapping[str, Any]) -> list[str]:
        """Return notes on sharing of the rotary key, padding, rotary scaling and the changed norm eps."""
        notes = []
        if spec.num_key_value_heads > 1 and rope_parameters.get("rope_type") != "longrope":
            notes.append(
                f"the native format stores each rotary frequency once, so {spec.num_key_value_heads} key heads share "
                "one rotary key: the conversion is not exact even at full width"
            )
        if shape.latent_rank < shape.kv_lora_rank:
            notes.append(
                f"{shape.kv_lora_rank - shape.latent_rank} of {shape.kv_lora_rank} latent channels are zero padding"
            )
        if rope_parameters.get("rope_type", "default") != "default":
            notes.append(
                f"only transformers reads rope_type '{rope_parameters['rope_type']}' from a DeepSeek-V3 config"
            )
        if spec.rms_norm_eps != 1e-6:
            notes.append(
                f"rms_norm_eps changes from {spec.rms_norm_eps:g} to 1e-06; calibration corrects the norm weights"
            )
        return notes

    def attention_parameters(self, plan: Plan) -> int:
        """Return the number of weights in one attention layer, the latent norm included."""
        return super().attention_parameters(plan) + plan.shape.kv_lora_rank

    def other_parameters(self, plan: Plan) -> int:
        """Return the number of weights outside the attention; a tied head counts twice, because it is written twice."""
        head = plan.spec.vocab_size * plan.spec.hidden_size if plan.spec.tie_word_embeddings else 0
        return plan.spec.other_parameters + head

    def runtimes(self, plan: Plan) -> list[Runtime]:
        """List the runtimes that read a dense DeepSeek-V3 of this shape."""
        return native_runtimes(plan)

    def target(self, spec: AttentionSpec) -> str:
        """Return the name of the architecture."""
        return "DeepSeek-V3"

    def config(self, source: Any, plan: Plan) -> dict[str, Any]:
        """Return the ``config.json`` of a dense ``DeepseekV3ForCausalLM``."""
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
            # SGLang 0.5.17 needs it, also where no layer has experts, and transformers' config class lacks it.
            "moe_layer_freq": 1,
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
            **_older_rope(plan.rope_parameters),
            "tie_word_embeddings": False,
            "use_cache": True,
            "v_head_dim": shape.v_head_dim,
            "vocab_size": spec.vocab_size,
        }

    def attention(
        self, factors: LayerFactors, plan: Plan, view: AttentionView, inputs: Callable[[], Iterable[Tensor]]
    ) -> AttentionExport:
        """Convert the factors of one layer to DeepSeek-V3's tensors; the record holds the size of the latent."""
        tensors, scale = export_tensors(factors, plan, inputs)
        on_device = {name: tensor.to(factors.latent.device) for name, tensor in tensors.items()}
        heads = plan.spec.num_attention_heads
        rounded = layer_factors(on_device, heads, plan.shape, factors.inv_freq, factors.rope_gain, INPUT_SCALE)
        record = {"latent_mean_square": scale.mean_square, "latent_max_square": scale.max_square}
        return AttentionExport(tensors, rounded.to(torch.float32), record)

    def cast(self, tensor: Tensor, dtype: torch.dtype, source_dtype: torch.dtype) -> Tensor:
        """Return ``tensor`` cast to ``dtype``; the native format has one precision."""
        return tensor.to(dtype)

    def last_tensors(self, source: Source, plan: Plan, norm_correction: float) -> dict[str, Tensor]:
        """Return the last norm's weight [D], corrected for the changed eps, and the head [V, D], tied or not."""
        names, read, dtype = source.family.tensors, source.checkpoint.read, getattr(torch, plan.dtype)
        head = names["embed"] if source.spec.tie_word_embeddings else names["head"]
        return {
            names["norm"]: (read(names["norm"]).double() * norm_correction).to(dtype),
            names["head"]: read(head).to(dtype),
        }

    def card_words(self, spec: AttentionSpec) -> CardWords:
        """Return the model card's text on this format."""
        return CardWords(
            layout="It is a dense `DeepseekV3ForCausalLM`: transformers loads it with no custom code.",
            precision=(
                "Use bfloat16 or float32: in float16 the latent norm underflows. With bitsandbytes, leave out these "
                "modules:\n"
                f"`BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules={json.dumps(NOT_QUANTISED)})`."
            ),
        )

    def checks(self, model: Any, tokens: Tensor, dtype: torch.dtype) -> Iterator[Check]:
        """Check that absorbed attention equals expanded attention, and that the latent norms are identities."""
        yield _absorbed_equals_expanded(model, tokens, dtype)
        yield _headroom(model, tokens)

    def untouched(self, plan: Plan, source: Iterable[str], export: Iterable[str], *, attention: bool) -> dict[str, str]:
        """Map the tensors that equal a source tensor: all except attention and norms; a tied head → embedding."""
        written = set(export)
        names = {n: n for n in source if ".self_attn." not in n and "norm" not in n and n in written}
        return names | ({HEAD: EMBEDDING} if plan.spec.tie_word_embeddings else {})

    def corrections(self, layers: Sequence[Mapping[str, Any]], final_norm: float) -> dict[str, float]:
        """Return the factor on each norm's weight; exports from before transmla recorded it have only the last."""
        norms = {"input_layernorm": "input_norm_correction", "post_attention_layernorm": "output_norm_correction"}
        factors = {
            f"model.layers.{i}.{norm}.weight": record[key]
            for i, record in enumerate(layers)
            for norm, key in norms.items()
            if key in record
        }
        return factors | {NORM: final_norm}

    @torch.no_grad()
    def is_natural(self, model: Any) -> bool:
        """Return whether a latent norm is no identity, as after a training of the latent's projection."""
        tokens = torch.arange(min(64, model.config.vocab_size), device=model.device)[None]
        return not _headroom(model, tokens).passed

    def measure(self, attention: nn.Module, *, watching: bool) -> None:
        measure(attention, watching=watching)

    def to_natural(self, attention: nn.Module, input_norm: nn.Module | None) -> None:
        """Fold the latent norms and the input's scale into the projections (``native_natural.to_natural``)."""
        to_natural(attention, input_norm)

    def from_natural(self, name: str, attention: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Restore latent norms and scales in ``weights``, in place (``native_natural.from_natural``)."""
        from_natural(name, attention, weights, dtype)


def _older_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters`` by the names that transformers 4, mlx-lm and ONNX exporters read.

    Without them, these would load the export with a base of 10,000. transformers 5 reads both, and finds the same.
    """
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    fields = {"rope_theta": parameters["rope_theta"]}
    return fields if scaling.get("rope_type", "default") == "default" else fields | {"rope_scaling": scaling}


@torch.no_grad()
def _absorbed_equals_expanded(model: Any, tokens: Tensor, dtype: torch.dtype) -> Check:
    """Compare transformers' expanded attention with float64 absorbed attention computed from the same tensors."""
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
    # Absorbed attention takes the norm as an exact identity; the export may deviate by half the allowed headroom.
    limit = TOLERANCE[dtype] + MAX_HEADROOM / 2
    return Check(
        "absorbed = expanded", worst <= limit, f"attention differs by {worst:.1e}, at most {limit:.0e} allowed"
    )


def _headroom(model: Any, tokens: Tensor) -> Check:
    """Check that the largest latent of any token and layer is small enough for its norm to be an identity."""
    norms = observe_layers(model, tokens, lambda layer: layer.self_attn.kv_a_layernorm)
    worst = max(float(x.float().square().mean(-1).max()) for x, _ in norms) / RMS_NORM_EPS
    detail = f"largest mean(c²) is {worst:.1e} of eps, at most {MAX_HEADROOM:.0e} allowed"
    return Check("latent norm is an identity", worst <= MAX_HEADROOM, detail)


FORMAT = NativeFormat()
