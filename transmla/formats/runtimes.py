"""Which runtimes take an export, and with which kernels."""

from __future__ import annotations

from dataclasses import dataclass

from transmla.artifacts import Plan

# (kv_lora_rank, qk_rope_head_dim) with fast decode kernels and (nope, rope, v) with fast prefill ones,
# vLLM 0.24–0.33 on Hopper.
VLLM_DECODE = ((256, 64), (512, 64))
VLLM_PREFILL = ((64, 64, 128), (128, 64, 128), (192, 64, 256))


@dataclass(frozen=True)
class Runtime:
    """Whether a runtime takes the export, and what it does with the shape."""

    name: str
    accepts: bool
    note: str


def native_runtimes(plan: Plan) -> list[Runtime]:
    """Which runtimes take a dense DeepSeek-V3 of the plan's shape."""
    shape = plan.shape
    rope_type = plan.rope_parameters.get("rope_type", "default")
    plain = rope_type == "default"
    why = "" if plain else f"its DeepSeek loader does not read rope_type '{rope_type}'"
    decode = (shape.kv_lora_rank, shape.qk_rope_head_dim) in VLLM_DECODE
    prefill = (shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim) in VLLM_PREFILL
    if not plain:
        vllm = why
    elif decode and prefill:
        kernels = "FlashMLA, FA3" if shape.kv_lora_rank == 512 else "FA3"
        vllm = f"latent cache, fast decode on Hopper ({kernels})"
    else:
        vllm = "no fast kernel for this shape (--pad-for vllm); VLLM_MLA_DISABLE=1 runs it with an expanded cache"
    sglang = why if not plain else ("latent cache" if decode else "its white list of shapes has 512+64 and 256+64")
    return [
        Runtime("transformers", True, "latent cache; stock code expands it at every step"),
        Runtime("vLLM", plain, vllm),
        Runtime("SGLang", plain and decode, sglang),
        Runtime(
            "llama.cpp",
            plain,
            why or "convert from a config with q_lora_rank 0; keep attn_kv_a_mqa in BF16 or F32",
        ),
    ]


def transmla_runtimes() -> list[Runtime]:
    """Which runtimes take an export that brings its own modelling code."""
    code = Runtime("transformers", True, "latent cache; with the code in the export, fast by transmla.load")
    return [code, *(Runtime(name, False, "reads native exports only") for name in ("vLLM", "SGLang", "llama.cpp"))]
