"""Measure the decoding speed of whole models, before and after conversion. All weights are random.

    python scripts/decode_bench.py llama-3-8b --batch 32 --context 16384 --roles ours source
    python scripts/decode_bench.py llama-2-7b --batch 224 --context 8192 --roles ours
    python scripts/decode_bench.py gemma-2-9b --roles growing dynamic --backend auto
    torchrun --nproc_per_node 2 scripts/decode_bench.py llama-3-8b --roles growing eager

Roles:
    ours     the MLA model of --shape under transmla.accelerate, compiled, static cache
    stock    the same MLA model in transformers' code, compiled, static cache
    source   the model before conversion, compiled, static cache. Flash attention reads the whole cache without a mask,
             which is the fastest way to run it.
    growing  the MLA model under transmla.accelerate as plain generate() runs it: growing cache, from CUDA graphs
    eager    the same without CUDA graphs
    dynamic  the model before conversion as plain generate() runs it: not compiled, growing cache

"Compiled" models are compiled into CUDA graphs. Random weights decode as fast as trained weights.
``generate_time.py`` explains the fields of ``--generate``.

The processes of torchrun share their caches (context_parallel) in the roles growing and eager. Each holds the whole
model. Time, cache and memory are those of the first process.
"""

from __future__ import annotations

import argparse
import gc
from itertools import product
from pathlib import Path
from typing import Any

import torch
from generate_time import generate_times
from provenance import RESULTS, peak_bytes, reset_peak, write_result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from transmla.evaluate.bench import measure, prefill_seconds
from transmla.formats.base import format_named
from transmla.modeling.registration import register
from transmla.plan.make_plan import make_plan
from transmla.ranks import launched, leave
from transmla.recipe import parse_recipe
from transmla.runtime.load import accelerate
from transmla.source.describe import describe

QWEN3 = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
GEMMA2 = {
    "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "intermediate_size": 14336, "vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096,
}  # fmt: skip
QWEN25 = {
    "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA3 = {
    "hidden_size": 640, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "intermediate_size": 2048, "vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512,
    "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_MOE = {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
MIXTRAL = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    "max_position_embeddings": 32768,
}  # fmt: skip
GPT_OSS = {
    "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
    "vocab_size": 201088, "max_position_embeddings": 131072,
}  # fmt: skip
TINY_MOE = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 128, "max_position_embeddings": 4096,
}  # fmt: skip
WIDE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 131072}
TINY = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 256, "vocab_size": 128, "max_position_embeddings": 4096,
}  # fmt: skip
# Name: (model_type, settings of its config).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": ("llama", {**WIDE, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}),
    "llama-2-7b": ("llama", {**WIDE, "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}),
    "qwen2.5-0.5b": ("qwen2", QWEN25),
    "qwen3-8b": ("qwen3", QWEN3),
    "gemma-2-9b": ("gemma2", GEMMA2),
    "gemma-3-270m": ("gemma3_text", GEMMA3),
    "qwen3-30b-a3b": ("qwen3_moe", QWEN3_MOE),
    "mixtral-8x7b": ("mixtral", MIXTRAL),
    "gpt-oss-20b": ("gpt_oss", GPT_OSS),
    "tiny": ("llama", TINY),
    "tiny-moe": ("qwen3_moe", TINY_MOE),
    "tiny-gemma2": ("gemma2", TINY | {"head_dim": 64, "sliding_window": 64}),
}


# Roles of accelerated models, roles that several processes may run, and roles that decode as plain generate() does.
MLA_ROLES, SHARED_ROLES = ("ours", "growing", "eager"), ("growing", "eager")
PLAIN_ROLES = (*SHARED_ROLES, "dynamic")


def whole_cache(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
    """Attend to the whole cache with flash attention. A mask would make SDPA choose a slower kernel."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        output = scaled_dot_product_attention(
            query, key, value, scale=scaling, is_causal=query.shape[2] > 1, enable_gqa=True
        )
    return output.transpose(1, 2), None


AttentionInterface.register("whole_cache", whole_cache)
AttentionMaskInterface.register("whole_cache", lambda *_, **__: None)


def build(
    name: str,
    role: str,
    shape: str,
    backend: str,
    device: str,
    layers: int | None = None,
    *,
    cache_dtype: str | None = None,
) -> Any:
    """Return a model with random weights in bfloat16, set up for its role.

    Args:
        name: a key of MODELS.
        role: see the module's docstring.
        shape: ``kv_lora_rank+qk_rope_head_dim`` of the converted model.
        backend: decode kernel of ``MLA_ROLES``.
        device: where to create the model.
        layers: number of layers; None for all.
        cache_dtype: dtype of the cached latents of ``MLA_ROLES``; None for that of the model.
    """
    family, settings = MODELS[name]
    settings = settings if layers is None else settings | {"num_hidden_layers": layers}
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    source = AutoConfig.for_model(family, **settings, pad_token_id=0, rope_parameters=rope)
    if role in ("source", "dynamic"):
        config: Any = source
    else:
        rank, width = (int(part) for part in shape.split("+"))
        recipe = parse_recipe(
            {"source": name, "output": "none", "kv_lora_rank": rank, "qk_rope_head_dim": width}, "decode_bench.py"
        )
        spec = describe(source)
        plan = make_plan(spec, recipe, "bfloat16")
        written = format_named(plan.format).config(source, plan)
        register()
        config = type(AutoConfig.for_model(written["model_type"])).from_dict(written)
    # Processes that share a cache have the same weights.
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if role in MLA_ROLES:
        graphs, shares = role == "growing", role in SHARED_ROLES
        accelerate(model, backend=backend, cache_dtype=cache_dtype, cuda_graphs=graphs, context_parallel=shares)
    if role == "source":
        model.set_attn_implementation("whole_cache")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS, help="config of the model before conversion")
    parser.add_argument("--shape", default="512+64", help="kv_lora_rank+qk_rope_head_dim of the converted model")
    parser.add_argument("--roles", nargs="*", default=["ours", "source"], help="roles to measure, see above")
    parser.add_argument("--batch", nargs="*", type=int, default=[32], help="sequences, one number per point")
    parser.add_argument("--context", nargs="*", type=int, default=[16384], help="tokens, one number per point")
    parser.add_argument("--backend", default="hopper", help="decode kernel of ours, growing and eager")
    parser.add_argument("--cache-dtype", help="dtype of cached latents of ours, growing and eager")
    parser.add_argument("--new-tokens", nargs="*", type=int, default=[1], help="tokens of a step, per sequence")
    parser.add_argument("--generate", type=int, help="also time generate() of this many tokens, in plain roles")
    parser.add_argument("--steps", type=int, default=16, help="decode steps to time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    parser.add_argument("--result", type=Path, default=RESULTS / "decode_bench/llama.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    ranks = launched(arguments.device)
    if ranks.size > 1 and not {*arguments.roles} <= {*SHARED_ROLES}:
        parser.error(f"several processes share caches only in the roles {' and '.join(SHARED_ROLES)}")
    rows: list[dict[str, Any]] = []
    for role in arguments.roles:
        how = arguments.shape, arguments.backend, arguments.device
        model = build(arguments.model, role, *how, cache_dtype=arguments.cache_dtype)
        sizes, static = zip(arguments.batch, arguments.context, strict=True), role not in PLAIN_ROLES
        prefill = {context: prefill_seconds(model, context) for context in {*arguments.context}}
        for (batch, context), new in product(sizes, arguments.new_tokens):
            reset_peak(model.device)
            point = measure(model, batch, context, arguments.steps, prefill[context], new=new, static=static)
            rows.append(
                {
                    "model": arguments.model,
                    "weights": "random",
                    "role": role,
                    "shape": "source" if role in ("source", "dynamic") else arguments.shape,
                    **({} if arguments.cache_dtype is None else {"cache dtype": arguments.cache_dtype}),
                    "batch": batch,
                    "context": context,
                    "new tokens": new,
                    "way": point.way if point.reason is None else f"{point.way}: {point.reason}",
                    "tokens/s": round(point.tokens_per_second, 1),
                    "ms a step": round(point.step_seconds * 1e3, 3),
                    "prefill s": round(point.prefill_seconds, 3),
                    "processes": ranks.size,
                    "cache MiB": round(point.cache_bytes / 2**20),
                    "peak GiB": round(peak_bytes(model.device) / 2**30, 2),
                    "GB/s": round(point.bytes_per_second / 1e9),
                }
            )
            if arguments.generate and not static:
                rows[-1] |= generate_times(model, batch, context, arguments.generate)
            if ranks.first:
                print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
                write_result(arguments.result, rows, arguments.commit)
        del model
        gc.collect()
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    leave()


if __name__ == "__main__":
    main()
