"""What the plugins for vLLM and SGLang serve: families, features and widths, read from ``config.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transmla.errors import TransmlaError
from transmla.formats.runtimes import VLLM_DECODE, VLLM_PREFILL

# Families whose classes the plugins change, by ``model_type``: module and class, the same in vLLM and SGLang.
SERVED = {
    "granite": ("granite", "GraniteForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
# Families whose attention has learned sinks, which ``config.json`` does not mention otherwise.
WITH_SINKS = ("gpt_oss",)
# Rotary width of the MLA kernels, and the latent widths that they take beside it; on CPUs, vLLM takes 512 alone.
ROTARY = 64
LATENTS, CPU_LATENTS = tuple(latent for latent, rotary in VLLM_DECODE if rotary == ROTARY), (512,)
# Widths (d_n, d_v) of a head for which GPUs have prefill kernels.
HEADS = tuple((nope, value) for nope, rotary, value in VLLM_PREFILL if rotary == ROTARY)
REMEDY = "run this export with transformers or transmla.load"


@dataclass(frozen=True)
class Widths:
    """Widths of one latent attention.

    Attributes:
        latent: width r of the latent.
        rotary: width d_r of the rotary key.
        nope: other width d_n of a head's query and key.
        value: width d_v of a head's value.
    """

    latent: int
    rotary: int
    nope: int
    value: int

    @property
    def cached(self) -> int:
        """Number of values that one layer caches for a token."""
        return self.latent + self.rotary

    @classmethod
    def of(cls, kind: Mapping[str, Any]) -> Widths:
        """Read the widths of an entry of the config's ``mla["kinds"]``."""
        return cls(*(kind[k] for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")))


def served_widths(config: Mapping[str, Any], *, cpu: bool) -> Widths:
    """Return the widths to which all layers of an export are padded.

    The runtime's cache has one width, so layers of different widths are all padded to the largest.

    Args:
        config: content of ``config.json``, which ``refuses`` accepts.
        cpu: whether the model runs on a CPU.
    """
    latent, nope, value = _largest(config)
    if not cpu:
        nope, value = min(head for head in HEADS if head[0] >= nope and head[1] >= value)
    return Widths(min(width for width in (CPU_LATENTS if cpu else LATENTS) if width >= latent), ROTARY, nope, value)


def _largest(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the largest widths r, d_n and d_v of an export's layers."""
    kinds = [Widths.of(kind) for kind in config["mla"]["kinds"]]
    return max(k.latent for k in kinds), max(k.nope for k in kinds), max(k.value for k in kinds)


def refuses(config: Mapping[str, Any], tensor_parallel: int = 1, runtime: str = "vLLM") -> str | None:
    """Return why the plugin for ``runtime`` does not serve an export; None if it does.

    Args:
        config: content of ``config.json`` of an export in the transmla format.
        tensor_parallel: number of devices that share the heads.
        runtime: the runtime's name, for the words of the refusal; both plugins have the same limits.

    Returns:
        One line: what is not served, the limit, and a remedy.
    """
    problem = refusal(config, tensor_parallel, runtime)
    return None if problem is None else str(problem)


def refusal(config: Mapping[str, Any], tensor_parallel: int = 1, runtime: str = "vLLM") -> TransmlaError | None:
    """Return ``refuses`` as an error, whose parts can be read one by one."""
    mla, family = config.get("mla"), config.get("source_model_type")
    if not isinstance(mla, Mapping) or not mla.get("kinds") or not mla.get("layers") or not family:
        return TransmlaError(
            "config.json has no widths of a latent attention",
            limit="the plugin serves exports in the transmla format",
            remedy="convert the model with `transmla convert --format transmla`",
        )
    feature = _feature(config, str(family))
    if feature is not None:
        return TransmlaError(f"the export has {feature}", limit=f"{runtime}'s MLA does not support this", remedy=REMEDY)
    if family not in SERVED:
        limit = f"it serves {', '.join(sorted(SERVED))}"
        return TransmlaError(f"the plugin does not serve the family {family}", limit=limit, remedy=REMEDY)
    latent, nope, value = _largest(config)
    rotary = max(Widths.of(kind).rotary for kind in mla["kinds"])
    for name, width, most, option in (
        ("rotary key", rotary, ROTARY, "--qk-rope-head-dim"),
        ("latent", latent, max(LATENTS), "--kv-lora-rank"),
    ):
        if width > most:
            limit, remedy = f"{runtime}'s MLA takes at most {most}", f"convert again with {option} {most}, or less"
            return TransmlaError(f"the export's {name} is {width} wide", limit=limit, remedy=remedy)
    if not any(head[0] >= nope and head[1] >= value for head in HEADS):
        limit = f"{runtime}'s prefill takes at most {max(n for n, _ in HEADS)} and {max(v for _, v in HEADS)}"
        return TransmlaError(f"the export's heads are {nope} and {value} wide", limit=limit, remedy=REMEDY)
    return heads_refusal(config, tensor_parallel)


def heads_refusal(config: Mapping[str, Any], tensor_parallel: int) -> TransmlaError | None:
    """Return why the heads of a model cannot be divided among ``tensor_parallel`` devices; None if they can."""
    heads = config.get("num_attention_heads", 0)
    if heads % tensor_parallel == 0:
        return None
    return TransmlaError(
        f"{heads} attention heads cannot be divided among {tensor_parallel} devices",
        limit="tensor parallelism gives each device the same number of heads",
        remedy="use a divisor of the heads for --tensor-parallel-size",
    )


def _feature(config: Mapping[str, Any], family: str) -> str | None:
    """Name a feature of the export's attention that the runtimes' MLA lacks; None if there is none."""
    mla = config["mla"]
    features = {
        "layers that kept the source's attention": None in mla["layers"],
        "sliding windows": _slides(config),
        "soft-capped scores": config.get("attn_logit_softcapping") is not None,
        "attention sinks": family in WITH_SINKS,
        "latent norms": any(kind.get("latent_norm") for kind in mla["kinds"]),
        "rotary frequencies that depend on the text's length (longrope)": any(
            "long_inv_freq" in kind for kind in mla["kinds"]
        ),
        "quantised weights": config.get("quantization_config") is not None,
    }
    return next((name for name, has in features.items() if has), None)


def _slides(config: Mapping[str, Any]) -> bool:
    """Return whether a sliding window is shorter than the longest text in some layer."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    slides = types is None or "sliding_attention" in types
    return slides and window is not None and window < config.get("max_position_embeddings", 0)
