"""Exact operations on the factors of a layer: padding, query compression, orthonormal latents."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from transmla.artifacts import LayerFactors, LayerStats, MLAShape
from transmla.core.linalg import latent_basis, orthonormal_rows, regress, regularise


def compress_queries(factors: LayerFactors, stats: LayerStats, rank: int) -> LayerFactors:
    """Queries of rank ``rank`` that serve all heads best under the calibration data."""
    moment = regularise(stats.second_moment)
    rows = torch.cat([factors.q_nope, factors.q_pe], 1)
    # Orthonormal rows keep the query latent's norm an identity on any input.
    basis, _ = orthonormal_rows(latent_basis(rows.flatten(0, 1), moment, rank))
    read = regress(rows, basis, moment)
    d_n = factors.q_nope.shape[1]
    return replace(factors, q_nope=read[:, :d_n], q_pe=read[:, d_n:], q_latent=basis)


def pad_factors(f: LayerFactors, shape: MLAShape) -> LayerFactors:
    """Zero-pad latent, position-free width and value width up to ``shape``; exact by construction."""
    rank = shape.kv_lora_rank - f.latent.shape[0]
    nope = shape.qk_nope_head_dim - f.q_nope.shape[1]
    value = shape.v_head_dim - f.v_up.shape[1]
    return replace(
        f,
        q_nope=pad(f.q_nope, (0, 0, 0, nope)),
        latent=pad(f.latent, (0, 0, 0, rank)),
        k_up=pad(f.k_up, (0, rank, 0, nope)),
        v_up=pad(f.v_up, (0, rank, 0, value)),
        o=pad(f.o, (0, value)),
    )


def orthonormal_latents(f: LayerFactors) -> LayerFactors:
    """The same layer with orthonormal rows in its latents.

    No input, however unlike the calibration text, then has a latent larger than itself, and the latent norm
    stays an identity.
    """
    rows, triangle = orthonormal_rows(f.latent)
    f = replace(f, latent=rows, k_up=f.k_up @ triangle, v_up=f.v_up @ triangle)
    if f.q_latent is None:
        return f
    rows, triangle = orthonormal_rows(f.q_latent)
    return replace(f, q_latent=rows, q_nope=f.q_nope @ triangle, q_pe=f.q_pe @ triangle)
