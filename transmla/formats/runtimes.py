"""The runtimes that read an export, and the kernels that they run it with."""

from __future__ import annotations

from dataclasses import dataclass

from transmla.artifacts import Plan
from transmla.formats.llama_cpp_limits import llama_cpp_refusal

# Shapes that vLLM's MLA serves, read in 0.32 and run on a CPU: (kv_lora_rank, qk_rope_head_dim) for decode (on CPUs 512
# + 64 alone; other rows end the server at its first request), and (qk_nope_head_dim, qk_rope_head_dim, v_head_dim) with
# fast kernels for prefill on Hopper.
VLLM_DECODE = ((256, 64), (512, 64))
VLLM_CPU_DECODE = ((512, 64),)
VLLM_PREFILL = ((64, 64, 128), (128, 64, 128), (192, 64, 256))
# Option of vLLM that expands the latent cache, so that any width is served.
VLLM_EXPANDED = "VLLM_MLA_DISABLE=1"
# mlx-lm 0.32 takes tensors of layer 61 and above for a multi-token predictor, and drops them.
MLX_LAYERS = 61


@dataclass(frozen=True)
class Runtime:
    """One runtime's support for an export.

    Attributes:
        name: the runtime.
        accepts: whether the runtime reads the export.
        note: how the runtime runs this shape, or why it does not.
        flag: an option of the runtime without which it does not run the export; empty if there is none.
    """

    name: str
    accepts: bool
    note: str
    flag: str = ""


def native_runtimes(plan: Plan) -> list[Runtime]:
    """List the runtimes for a dense DeepSeek-V3 of the plan's shape."""
    rope_type = plan.rope_parameters.get("rope_type", "default")
    layers = plan.spec.num_hidden_layers
    runtimes = [
        Runtime("transformers", True, "latent cache, expanded at every step; with transmla.load never expanded")
    ]
    if rope_type != "default":
        why = f"its DeepSeek loader does not read rope_type '{rope_type}'"
        return runtimes + [Runtime(name, False, why) for name in ("vLLM", "SGLang", "llama.cpp", "MLX")]
    return [
        *runtimes,
        _vllm(plan),
        Runtime("SGLang", True, "latent cache (run in 0.5.17 on a CPU; any width)"),
        _llama_cpp(plan),
        Runtime("MLX", True, "latent cache (mlx-lm 0.32)")
        if layers <= MLX_LAYERS
        else Runtime("MLX", False, f"mlx-lm 0.32 drops layers from {MLX_LAYERS} on, and this model has {layers}"),
    ]


def _vllm(plan: Plan) -> Runtime:
    """Return vLLM's support for a native export."""
    shape, spec = plan.shape, plan.spec
    problem = vllm_refuses(shape.kv_lora_rank, shape.qk_rope_head_dim, cpu=False)
    if problem is None:
        on_cpu = vllm_refuses(shape.kv_lora_rank, shape.qk_rope_head_dim, cpu=True)
        note = "latent cache on GPUs" + (" and CPUs" if on_cpu is None else "; on CPUs it takes 512 + 64 alone")
        fast = (shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim) in VLLM_PREFILL
        return Runtime("vLLM", True, note + ("" if fast else "; no fast prefill for these heads (--pad-for vllm)"))
    expanded = spec.num_attention_heads * (shape.qk_head_dim + max(shape.qk_head_dim, shape.v_head_dim))
    share = expanded / spec.cache_values
    note = f"{problem}; this option expands the cache to {share:.1f} × the source's (--pad-for vllm avoids it)"
    return Runtime("vLLM", True, note, flag=VLLM_EXPANDED)


def _llama_cpp(plan: Plan) -> Runtime:
    """Return llama.cpp's support for a native export."""
    rope_type = plan.rope_parameters.get("rope_type", "default")
    problem = llama_cpp_refusal(rope_type, plan.spec.hidden_act, plan.shape.q_lora_rank, plan.spec.num_hidden_layers)
    if problem is not None:
        return Runtime("llama.cpp", False, str(problem))
    note = "after `transmla gguf`, if it knows the tokenizer's rules: latent cache, also quantised"
    return Runtime("llama.cpp", True, note)


def vllm_refuses(rank: int, rotary: int, *, cpu: bool) -> str | None:
    """Return why vLLM does not serve a native export with rows of ``rank`` + ``rotary``; None if it does."""
    served = VLLM_CPU_DECODE if cpu else VLLM_DECODE
    if (rank, rotary) in served:
        return None
    shapes = " or ".join(f"{latent} + {width}" for latent, width in served)
    return f"its latent cache takes {shapes}{' on CPUs' if cpu else ''}, not {rank} + {rotary}"


def transmla_runtimes(plugins: list[Runtime]) -> list[Runtime]:
    """List the runtimes for an export that contains its modelling code (the transmla format).

    Args:
        plugins: vLLM's and SGLang's support, which depends on the export.
    """
    return [
        Runtime("transformers", True, "latent cache; loads the export's code; fast with transmla.load"),
        *plugins,
        *(Runtime(name, False, "reads native exports only") for name in ("llama.cpp", "MLX")),
    ]
