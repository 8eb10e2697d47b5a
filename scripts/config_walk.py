"""Walk every field of every family's config: an export changes as its source does, or the field is refused by name.

    python scripts/config_walk.py
    python scripts/config_walk.py --families llama mistral --fields sliding_window layer_types

Each case changes one field in the config.json of a tiny source with three layers, converts the source without a cut,
and compares the logits of export and source, both run by stock transformers: of whole texts, and decoded over the
cache. Besides the fields of its own config class, each family gets the fields of all other families, and the fields
that transformers' shared code reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

import torch  # noqa: E402
from helpers.tiny_sources import build_tokenizer  # noqa: E402
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, logging  # noqa: E402
from transformers.modeling_utils import PreTrainedModel  # noqa: E402

import transmla  # noqa: E402
from transmla.convert.pipeline import convert  # noqa: E402
from transmla.errors import TransmlaError  # noqa: E402
from transmla.families.base import Family  # noqa: E402
from transmla.modeling.transformers_api import CACHE_ARGUMENT  # noqa: E402
from transmla.recipe import parse_recipe  # noqa: E402
from transmla.registry import scan  # noqa: E402
from transmla.source.describe import describe  # noqa: E402

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
# Other words that a refusal may name a field by.
ALIASES = {
    "rope_parameters": ("rope_type", "partial_rotary_factor", "longrope", "mscale_all_dim", "llama_4_scaling_beta"),
    "rope_scaling": ("rope_type", "longrope"),
    "use_bidirectional_attention": ("non-causal",),
    "text_config": ("multimodal",),
    "layer_types": ("sliding_window", "unknown model family"),
}
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """A source with changed fields. ``own`` says whether the family's config class has all of them."""

    family: str
    format: str
    changes: dict[str, Any]
    own: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened to a case.

    Attributes:
        kind: "same", "refused", "stock refuses", "unlike" or "unnamed"; the last two are faults.
        changed: whether the field changed the source's logits.
        detail: the error's text, or the largest relative difference.
    """

    kind: str
    changed: bool
    detail: str


FAULTS = ("unlike", "unnamed")


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


def build(fields: dict[str, Any], folder: Path) -> Any:
    """Write a source whose config.json holds ``fields``, and return the model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    model = random_model(AutoConfig.from_pretrained(folder))
    edited = (folder / "config.json").read_text()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(edited)
    build_tokenizer(folder, 128)
    return model


def random_model(config: Any) -> Any:
    """Return a model of a config. The values of a tensor follow from its name."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.normal_(std=0.3, generator=generator)
            if parameter.dim() == 1 and "bias" not in name and "sinks" not in name:
                parameter.add_(0.0 if "gemma" in config.model_type else 1.0)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return logits [2, 24 + 4, V]: of a whole text, and of its last four tokens decoded over the cache."""
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    whole = model(tokens, use_cache=False).logits
    out = model(tokens[:, :20], use_cache=True)
    pieces = [whole]
    for i in range(20, 24):
        out = model(tokens[:, i : i + 1], use_cache=True, **{CACHE_ARGUMENT: out[CACHE_ARGUMENT]})
        pieces.append(out.logits)
    return torch.cat(pieces, 1).float()


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference in parts of the largest logit; infinite for other shapes or NaN."""
    if left.shape != right.shape or not bool(left.isfinite().all() and right.isfinite().all()):
        return float("inf")
    return float((left - right).abs().max() / right.abs().max())


def uncut(config: Any, form: str) -> dict[str, Any]:
    """Return recipe settings with which nothing of the attention is cut."""
    spec = describe(config)
    rotated = max(kind.rotary_pairs for kind in spec.kinds or (spec.kind(0),))
    groups, unrotated = spec.num_key_value_heads, spec.head_dim - 2 * max(rotated, 1)
    rank = min(groups * (spec.head_dim + unrotated) + 1, spec.features, 2 * groups * spec.head_dim)
    if form == "native":
        rank = min(2 * groups * spec.head_dim, spec.hidden_size)
    return {
        "kv_lora_rank": rank,
        "qk_rope_head_dim": 2 * max(rotated, 1) * groups,
        "allow_no_saving": True,
        "custom_rope": form == "native" and groups > 1,
    }


def walk(case: Case, folder: Path) -> Outcome:
    """Convert the source of a case in ``folder``, which must not exist, and compare both models."""
    before = _base_logits(case.family)
    try:
        model, stock = build(adapted(case), folder / "source"), ""
        expected = logits(load(folder / "source"))
    except Exception as error:  # config classes raise any type; what they refuse, transmla must refuse too
        model, stock = None, f"{type(error).__name__}: {error}"
    changed = model is not None and difference(expected, before) > TOLERANCE
    (folder / "text.txt").write_text("the cat sat on the mat and the dog ran " * 100)
    recipe = {"source": str(folder / "source"), "output": str(folder / "out"), "format": case.format}
    calibration = {"source": str(folder / "text.txt"), "sequences": 6, "length": 24}
    fixed = {"device": "cpu", "reconstruct": "off", "calibration": calibration}
    try:
        settings = {"cache_ratio": 0.9} if model is None else uncut(model.config, case.format)
        out = convert(parse_recipe({**recipe, **fixed, **settings}, "config_walk"))
    except TransmlaError as error:
        words = {word for field in case.changes for word in (field, *ALIASES.get(field, ()))}
        named = any(word in str(error) for word in words)
        return Outcome("stock refuses" if stock else "refused" if named else "unnamed", changed, str(error))
    if stock:
        return Outcome("unlike", changed, f"stock transformers refuses the source: {stock}")
    worst = difference(logits(load(out)), expected)
    # A native export's eps is 1e-6. A factor on the norms' weights makes up for another one, on average over tokens.
    tolerance = 1e-3 if case.format == "native" and "rms_norm_eps" in case.changes else TOLERANCE
    return Outcome("same" if worst <= tolerance else "unlike", changed, f"relative difference {worst:.1e}")


def load(folder: Path) -> Any:
    """Load a source or an export as stock transformers does, with eager attention."""
    transmla.register()
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@cache
def _base_logits(family: str) -> torch.Tensor:
    return logits(random_model(AutoConfig.for_model(**base(family))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(SHELF), choices=list(SHELF))
    parser.add_argument("--fields", nargs="+", default=list(CHANGES), help="fields to change")
    parser.add_argument("--verbose", action="store_true", help="print every case, not the faults alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    counts: Counter[str] = Counter()
    start = time.process_time()
    for family in arguments.families:
        native = describe(AutoConfig.for_model(family, **{k: v for k, v in base(family).items() if k != "model_type"}))
        for form in ("transmla", *([] if native.native_gap else ["native"])):
            for case in cases(family, form):
                if not set(case.changes) & set(arguments.fields):
                    continue
                folder = Path(tempfile.mkdtemp(prefix="config-walk-"))
                try:
                    outcome = walk(case, folder)
                finally:
                    shutil.rmtree(folder)
                counts[outcome.kind] += 1
                if arguments.verbose or outcome.kind in FAULTS:
                    print(
                        f"{outcome.kind:13} {family:12} {form:8} {'own' if case.own else 'foreign':7} "
                        f"{'changed' if outcome.changed else '       '} {case.changes}: {outcome.detail[:260]}",
                        flush=True,
                    )
    total = sum(counts.values())
    print(f"{total} cases: {dict(counts)}; {time.process_time() - start:.0f} CPU seconds")
    sys.exit(1 if any(counts[kind] for kind in FAULTS) else 0)


if __name__ == "__main__":
    main()
