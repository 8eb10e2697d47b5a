"""Operations on the factors of a layer after the method: query compression, padding, orthonormal latents."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from transmla.artifacts import LayerFactors, LayerStats, MLAShape
from transmla.core.linalg import latent_basis, orthonormal_rows, regress, regularise


def compress_queries(factors: LayerFactors, stats: LayerStats, rank: int) -> LayerFactors:
    """Replace the query projections by the best approximation of rank ``rank`` over all heads together.

    The error is measured on the calibration inputs. The result has ``q_latent`` [rank, D], and its ``q_nope``
    [H, d_n, rank] and ``q_pe`` [H, d_r, rank] read this latent.
    """
    moment = regularise(stats.second_moment)
    rows = torch.cat([factors.q_nope, factors.q_pe], 1)
    # With orthonormal rows, no input has a latent larger than itself, so the query latent's norm stays an identity.
    basis, _ = orthonormal_rows(latent_basis(rows.flatten(0, 1), moment, rank))
    readout = regress(rows, basis, moment)
    d_n = factors.q_nope.shape[1]
    return replace(factors, q_nope=readout[:, :d_n], q_pe=readout[:, d_n:], q_latent=basis)


def pad_factors(f: LayerFactors, shape: MLAShape) -> LayerFactors:
    """Zero-pad r, d_n and d_v up to the widths in ``shape``. The attention's output does not change."""
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
    """Return the same layer with orthonormal rows in ``latent`` and ``q_latent``.

    No input then has a latent larger than itself, even if the input is unlike the calibration text. The latent norms
    therefore stay identities (``core.norm_identity``).
    """
    rows, triangle = orthonormal_rows(f.latent)
    f = replace(f, latent=rows, k_up=f.k_up @ triangle, v_up=f.v_up @ triangle)
    if f.q_latent is None:
        return f
    rows, triangle = orthonormal_rows(f.q_latent)
    return replace(f, q_latent=rows, q_nope=f.q_nope @ triangle, q_pe=f.q_pe @ triangle)
