"""Convert between factors and the attention tensors of a dense DeepSeek-V3.

In these tensors rotary rows are interleaved, and the latent norms are identities (``core/norm_identity.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, MLAShape, Plan
from transmla.core.factors import pad_factors
from transmla.core.norm_identity import NormIdentity, norm_identity
from transmla.core.rope import halves_to_interleaved

# eps of every RMSNorm in a native export. transformers hard-codes this value in the latent norms, while other runtimes
# use the config's rms_norm_eps there. The config must therefore have the same value.
RMS_NORM_EPS = 1e-6
# Factor on the weight of every input norm; the projections that read the norm undo it. An identity norm needs tiny
# latents (``core/norm_identity.py``). With this factor, the inputs are small instead of the rows of
# ``kv_a_proj_with_mqa``, which int8 and low-rank updates could not represent. A power of two loses no bits. Chosen so
# that the first gradient of low-rank updates is about as large as the source's (8 times, on SmolLM2-135M).
INPUT_SCALE = 2.0**-17
# Projections that read the input norm.
INPUT_PROJECTIONS = ("q_proj.weight", "q_a_proj.weight", "kv_a_proj_with_mqa.weight")


def layer_tensors(
    factors: LayerFactors,
    shape: MLAShape,
    kv_norm: NormIdentity,
    q_norm: NormIdentity | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return the tensors of one ``self_attn`` in DeepSeek-V3's names and layout, rounded to ``dtype``, on the CPU.

    A DeepSeek-V3 runtime multiplies scores by (d_n + d_r)^{-1/2}. The ratio of the source's scale to this one is
    multiplied into the query weights. The tensors read inputs that were multiplied by INPUT_SCALE.

    Args:
        factors: the layer's factors, padded to ``shape``, for inputs without that scale.
        shape: the export's widths.
        kv_norm: scale and norm weight of the key/value latent [r].
        q_norm: scale and norm weight of the query latent; None if queries are not compressed.
        dtype: the export's precision.
    """
    order = halves_to_interleaved(shape.qk_rope_head_dim).to(factors.rope.device)
    query = torch.cat([factors.q_nope, factors.q_pe[:, order]], 1) * (factors.scaling * shape.qk_head_dim**0.5)
    cached = torch.cat([factors.latent * kv_norm.scale, factors.rope[order]])
    expand = torch.cat([factors.k_up, factors.v_up], 1) * kv_norm.readout
    tensors = {
        "kv_a_proj_with_mqa.weight": cached / INPUT_SCALE,
        "kv_a_layernorm.weight": torch.full((shape.kv_lora_rank,), kv_norm.weight),
        "kv_b_proj.weight": expand.flatten(0, 1),
        "o_proj.weight": factors.o.transpose(0, 1).flatten(1),
    }
    if factors.q_latent is None or q_norm is None:
        tensors["q_proj.weight"] = query.flatten(0, 1) / INPUT_SCALE
    else:
        tensors["q_a_proj.weight"] = factors.q_latent * (q_norm.scale / INPUT_SCALE)
        tensors["q_a_layernorm.weight"] = torch.full((factors.q_latent.shape[0],), q_norm.weight)
        tensors["q_b_proj.weight"] = query.flatten(0, 1) * q_norm.readout
    return {name: tensor.to("cpu", dtype).contiguous() for name, tensor in sorted(tensors.items())}


def export_shape(config: Any) -> MLAShape:
    """Return the MLA widths of a DeepSeek-V3 ``config`` of transformers."""
    return MLAShape(
        config.kv_lora_rank,
        config.qk_rope_head_dim,
        config.qk_nope_head_dim,
        config.v_head_dim,
        config.q_lora_rank,
    )


def layer_factors(
    tensors: dict[str, Tensor],
    heads: int,
    shape: MLAShape,
    inv_freq: Tensor,
    rope_gain: float,
    input_scale: float = 1.0,
) -> LayerFactors:
    """Return the float64 factors of ``self_attn`` tensors; the inverse of ``layer_tensors``.

    The latent norms are taken as exact identities.

    Args:
        tensors: the tensors of ``self_attn``, by name without a prefix.
        heads: number H of query heads.
        shape: the export's widths.
        inv_freq: rotary frequencies [d_r/2], in radians per position.
        rope_gain: factor on the rotary part of the scores.
        input_scale: scale of the inputs of ``tensors``, relative to those of the returned factors.
    """
    t = {name: tensor.double() for name, tensor in tensors.items()}
    for name in INPUT_PROJECTIONS:
        if name in t:
            t[name] = t[name] * input_scale
    rank, d_r, d_n = shape.kv_lora_rank, shape.qk_rope_head_dim, shape.qk_nope_head_dim
    interleaved = halves_to_interleaved(d_r)
    halves = torch.empty_like(interleaved)
    halves[interleaved] = torch.arange(d_r)
    constant = RMS_NORM_EPS**0.5
    if "q_proj.weight" in t:
        query, q_latent = t["q_proj.weight"], None
    else:
        query = t["q_b_proj.weight"]
        q_latent = t["q_a_proj.weight"] * (t["q_a_layernorm.weight"] / constant)[:, None]
    query = query.view(heads, -1, query.shape[-1])
    expand = t["kv_b_proj.weight"].view(heads, -1, rank)
    latent, rope = t["kv_a_proj_with_mqa.weight"].split([rank, d_r])
    return LayerFactors(
        q_nope=query[:, :d_n],
        q_pe=query[:, d_n:][:, halves],
        latent=latent * (t["kv_a_layernorm.weight"] / constant)[:, None],
        rope=rope[halves],
        k_up=expand[:, :d_n],
        v_up=expand[:, d_n:],
        o=t["o_proj.weight"].view(-1, heads, shape.v_head_dim).transpose(0, 1),
        inv_freq=inv_freq,
        scaling=shape.qk_head_dim**-0.5,
        rope_gain=rope_gain,
        q_latent=q_latent,
    )


@dataclass(frozen=True)
class LatentScale:
    """Size of a latent c: mean and maximum, over the calibration tokens, of mean(c²) over channels."""

    mean_square: float
    max_square: float


def latent_scale(rows: Tensor, inputs: Iterable[Tensor], width: int) -> LatentScale:
    """Measure the size of the latent that ``rows`` [r, D] compute from attention ``inputs``, batches [n, T, D].

    ``width`` is the latent's width with padding, over which mean(c²) is taken.
    """
    total, largest, count = 0.0, 0.0, 0
    for x in inputs:
        energy = (x @ rows.mT.to(x)).square().sum(-1) / width
        total += float(energy.double().sum())
        largest = max(largest, float(energy.max()))
        count += energy.numel()
    return LatentScale(total / count, largest)


def export_tensors(
    factors: LayerFactors, plan: Plan, inputs: Callable[[], Iterable[Tensor]]
) -> tuple[dict[str, Tensor], LatentScale]:
    """Convert one layer's factors to tensors in the native layout, padded to the plan's shape.

    Args:
        factors: the layer's factors, unpadded.
        plan: the plan for this layer alone.
        inputs: returns the attention's calibration inputs, batches [n, T, D]; called once for each latent.

    Returns:
        The tensors of ``self_attn`` by name, and the size of the key/value latent.
    """
    dtype = getattr(torch, plan.dtype)
    factors = pad_factors(factors, plan.shape)

    def identity(rows: Tensor) -> tuple[NormIdentity, LatentScale]:
        scale = latent_scale(rows, inputs(), rows.shape[0])
        return norm_identity(scale.mean_square, scale.max_square, RMS_NORM_EPS, dtype), scale

    kv_norm, scale = identity(factors.latent)
    q_norm = None if factors.q_latent is None else identity(factors.q_latent)[0]
    return layer_tensors(factors, plan.shape, kv_norm, q_norm, dtype), scale
