"""The runtimes that read an export, and the kernels that they run it with."""

from __future__ import annotations

from dataclasses import dataclass

from transmla.artifacts import Plan

# Shapes with fast kernels in vLLM 0.24–0.33 on Hopper: (kv_lora_rank, qk_rope_head_dim) for decode, and
# (qk_nope_head_dim, qk_rope_head_dim, v_head_dim) for prefill.
VLLM_DECODE = ((256, 64), (512, 64))
VLLM_PREFILL = ((64, 64, 128), (128, 64, 128), (192, 64, 256))


@dataclass(frozen=True)
class Runtime:
    """One runtime's support for an export.

    Attributes:
        name: the runtime.
        accepts: whether the runtime reads the export.
        note: how the runtime runs this shape, or why it does not.
    """

    name: str
    accepts: bool
    note: str


def native_runtimes(plan: Plan) -> list[Runtime]:
    """List the runtimes for a dense DeepSeek-V3 of the plan's shape."""
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
    sglang = why if not plain else ("latent cache" if decode else "supports only latent 512 or 256 with rotary 64")
    return [
        Runtime("transformers", True, "latent cache; its DeepSeek-V3 code expands the cache at every step"),
        Runtime("vLLM", plain, vllm),
        Runtime("SGLang", plain and decode, sglang),
        Runtime(
            "llama.cpp",
            plain,
            why or "latent cache; `transmla gguf` writes the file",
        ),
    ]


def transmla_runtimes() -> list[Runtime]:
    """List the runtimes for an export that contains its modelling code (the transmla format)."""
    transformers = Runtime("transformers", True, "latent cache; loads the export's code; fast with transmla.load")
    return [
        transformers,
        *(Runtime(name, False, "reads native exports only") for name in ("vLLM", "SGLang", "llama.cpp")),
    ]
