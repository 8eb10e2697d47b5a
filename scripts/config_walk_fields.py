"""Fields of ``config_walk.py``: the values that each field of a config gets, and which fields change together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from transmla.families.base import Family
from transmla.registry import scan

SHELF: dict[str, Family] = scan("transmla.families", "FAMILY")
# Sizes of every source, three layers deep.
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
WINDOW = 6
SLIDING, FULL = "sliding_attention", "full_attention"
# Base settings of single families, so that their other fields have an effect.
BASES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING], "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING]},
    "gpt_oss": {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING]},
    "olmo3": {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING]},
    "phi3": {"hidden_size": 32, "original_max_position_embeddings": 64},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "mistral": {"sliding_window": None},
}
# Fields without effect on logits, and the reason.
IDLE = {
    "initializer_range": "weights come from the file",
    "use_cache": "whether a forward returns its cache",
    "pad_token_id": "no token of a text",
    "bos_token_id": "the tokenizer's and generate's",
    "eos_token_id": "the tokenizer's and generate's",
    "attention_dropout": "training only",
    "residual_dropout": "training only",
    "embedding_dropout": "training only",
    "resid_pdrop": "training only",
    "embd_pdrop": "training only",
    "router_aux_loss_coef": "a loss of the training",
    "router_jitter_noise": "training only",
    "output_router_logits": "a further output",
    "output_hidden_states": "a further output",
    "return_dict": "the type of the output",
    "pretraining_tp": "a note on the training",
    "architectures": "AutoModelForCausalLM goes by model_type",
    "transformers_version": "a note on who saved the config",
    "id2label": "classifiers only",
    "label2id": "classifiers only",
    "problem_type": "classifiers only",
    "dtype": "a default of loaders; the conversion reads the stored precision",
    "chunk_size_feed_forward": "read by encoders only",
}


def rope(**settings: Any) -> dict[str, Any]:
    """Return ``rope_parameters`` with a base of 10,000."""
    return {"rope_type": "default", "rope_theta": 10_000.0, **settings}


_SCALED = {"factor": 4.0, "original_max_position_embeddings": 16}
_LONG = {"factor": 2.0, "original_max_position_embeddings": 32}
# The values that each field is changed to. A field of a config class that is neither here nor in IDLE is an error.
CHANGES: dict[str, tuple[Any, ...]] = {
    "vocab_size": (136,),
    "hidden_size": (48,),
    "intermediate_size": (64,),
    "num_hidden_layers": (4,),
    "num_attention_heads": (8, 2),
    "num_key_value_heads": (1, 4),
    "head_dim": (16, None),
    "max_position_embeddings": (32,),
    "hidden_act": ("gelu", "relu"),
    "hidden_activation": ("silu",),
    "rms_norm_eps": (0.1, 1e-5),
    "norm_epsilon": (0.1,),
    "tie_word_embeddings": (True, False),
    "attention_bias": (True, False),
    "mlp_bias": (True,),
    "qkv_bias": (False,),
    "use_bias": (True, False),
    "use_qk_norm": (True,),
    "rope_parameters": (
        rope(rope_theta=100.0),
        rope(rope_type="linear", factor=4.0),
        rope(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **_SCALED),
        rope(rope_type="yarn", **_SCALED),
        rope(rope_type="yarn", attention_factor=2.0, beta_fast=8.0, beta_slow=2.0, **_SCALED),
        rope(rope_type="yarn", mscale=0.5, mscale_all_dim=1.0, **_SCALED),
        rope(rope_type="yarn", truncate=False, **_SCALED),
        rope(rope_type="dynamic", factor=4.0),
        rope(rope_type="longrope", short_factor=[1.5] * 4, long_factor=[3.0] * 4, **_LONG),
        rope(rope_type="proportional", partial_rotary_factor=0.5),
        rope(partial_rotary_factor=0.5),
        rope(llama_4_scaling_beta=0.1),
        {SLIDING: rope(rope_theta=100.0), FULL: rope(rope_type="linear", factor=4.0)},
    ),
    "rope_scaling": (
        {"type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_SCALED},
    ),
    "rope_theta": (100.0,),
    "rope_local_base_freq": (100.0,),
    "partial_rotary_factor": (0.5, 1.0),
    "original_max_position_embeddings": (16,),
    "sliding_window": (WINDOW, None, 0),
    "use_sliding_window": (True, False),
    "max_window_layers": (1,),
    "layer_types": ([FULL, SLIDING, FULL], [SLIDING] * 3, [FULL] * 3, ["chunked_attention", FULL, FULL], [SLIDING]),
    "sliding_window_pattern": (2,),
    "attention_chunk_size": (4,),
    "no_rope_layers": ([0, 1, 0], [1, 1, 1], [0, 0, 0]),
    "no_rope_layer_interval": (2,),
    "query_pre_attn_scalar": (4,),
    "attn_logit_softcapping": (0.5, None),
    "final_logit_softcapping": (0.5, None),
    "use_bidirectional_attention": (True,),
    "is_causal": (False,),
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
    "add_cross_attention": (True,),
    "embedding_multiplier": (3.0,),
    "logits_scaling": (4.0,),
    "logit_scale": (4.0,),
    "residual_multiplier": (0.25,),
    "attention_multiplier": (0.7,),
    "clip_qkv": (0.5,),
    "decoder_sparse_step": (2,),
    "mlp_only_layers": ([1],),
    "moe_intermediate_size": (16,),
    "shared_expert_intermediate_size": (16,),
    "num_experts": (6,),
    "num_local_experts": (6,),
    "num_experts_per_tok": (1,),
    "norm_topk_prob": (True, False),
    "swiglu_alpha": (1.0,),
    "swiglu_limit": (0.1,),
    "transformers_weights": ("other.safetensors",),
    "cache_implementation": ("static",),
    "attn_implementation": ("sdpa",),
    "text_config": ({"model_type": "llama"},),
    "decoder": ({"model_type": "llama", "vocab_size": 8},),
    "fusion_config": ({"x": {}},),
    "tie_encoder_decoder": (True,),
}
# Fields that have an effect together, and in some families contradict each other.
TOGETHER: tuple[dict[str, Any], ...] = (
    {"sliding_window": WINDOW, "layer_types": [FULL, SLIDING, FULL]},
    {"sliding_window": WINDOW, "layer_types": [FULL] * 3},
    {"sliding_window": WINDOW, "layer_types": [SLIDING] * 3},
    {"sliding_window": WINDOW, "use_sliding_window": False},
    {"sliding_window": WINDOW, "use_sliding_window": False, "layer_types": [FULL, SLIDING, FULL]},
    {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 3},
    {"sliding_window": WINDOW, "use_sliding_window": True, "no_rope_layers": [0, 1, 1]},
    {"sliding_window": WINDOW, "sliding_window_pattern": 2, "layer_types": None},
    {"sliding_window": 64, "use_sliding_window": True},
    {"attention_chunk_size": 4, "layer_types": ["chunked_attention", FULL, FULL]},
    {"rope_parameters": rope(rope_theta=100.0), "rope_theta": 10.0},
    {"rope_parameters": None, "rope_theta": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_parameters": None, "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5},
    {"is_causal": False, "sliding_window": WINDOW},
    {"kv_sharing_modes": ["own", "reuse", "own"]},
    {"per_layer_config": {"1": {"num_key_value_heads": 4}}},
    {"per_layer_config": {"1": {"rms_norm_eps": 0.1}}},
)
# Fields that ``joint`` changes, besides windows and the rotary embedding.
JOINT = (
    *("vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("hidden_activation", "tie_word_embeddings", "attention_bias", "qkv_bias", "use_bias", "no_rope_layers"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "embedding_multiplier"),
    *("logits_scaling", "residual_multiplier", "attention_multiplier", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"),
    *("swiglu_alpha", "swiglu_limit"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A source with changed fields. ``own`` says whether the family's config class has all of them."""

    family: str
    format: str
    changes: dict[str, Any]
    own: bool


def own_fields(family: str) -> list[str]:
    """Return the names of all fields of the family's config class."""
    return [field.name for field in dataclasses.fields(CONFIG_MAPPING[family])]


def cases(family: str, form: str) -> Iterator[Case]:
    """Yield every case of a family in an export format."""
    own = [*own_fields(family), *CONFIG_MAPPING[family].attribute_map]
    unknown = [name for name in own if name not in CHANGES and name not in IDLE]
    if unknown:
        raise SystemExit(f"{family}: no value for {', '.join(unknown)}; add them to CHANGES or IDLE")
    single = ({field: value} for field, values in CHANGES.items() for value in values)
    for changes in (*single, *TOGETHER):
        if any(base(family).get(field, "") != value for field, value in changes.items()):
            yield Case(family, form, changes, set(changes) <= set(own))


def joint(family: str) -> dict[str, Any]:
    """Return new values for all fields of the family that have an effect and can change together."""
    start = base(family)
    model = AutoConfig.for_model(**start)
    kinds = isinstance((model.rope_parameters or {}).get(FULL), dict)
    values = {field: next(v for v in CHANGES[field] if v != getattr(model, field, None)) for field in JOINT}
    values["rope_parameters"] = CHANGES["rope_parameters"][-1 if kinds else 0]
    if getattr(model, "layer_types", None) and SLIDING in model.layer_types:
        values |= {"sliding_window": WINDOW - 2, "layer_types": [FULL, SLIDING, FULL]}
    return {field: value for field, value in values.items() if field in own_fields(family)}


@cache
def base(family: str) -> dict[str, Any]:
    """Return the fields of the config.json of a family's unchanged source."""
    tiny = {**SHELF[family].tiny, **SIZES, **BASES.get(family, {})}
    return {"model_type": family, **json.loads(json.dumps(tiny))}


def adapted(case: Case) -> dict[str, Any]:
    """Return the case's config.json. Lists with one entry a layer follow the number of layers."""
    fields = {**base(case.family), **case.changes}
    layers = fields["num_hidden_layers"]
    for name in ("layer_types", "no_rope_layers"):
        if name not in case.changes and fields.get(name):
            fields[name] = (fields[name] * layers)[:layers]
    return fields
