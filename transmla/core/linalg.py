"""Weighted low-rank approximation and its helpers, in the dtype of the input (float64 in practice)."""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.artifacts import LayerWeights


def regularise(moment: Tensor, relative: float = 1e-6) -> Tensor:
    """Return ``moment`` [..., n, n] plus ``relative`` times its mean diagonal on the diagonal.

    Directions without any input get a small positive energy, so the matrix can be inverted.
    """
    mean_diagonal = moment.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(torch.finfo(moment.dtype).tiny)
    return moment + torch.diag_embed((relative * mean_diagonal).expand(moment.shape[:-1]))


def sqrtm_pair(moment: Tensor, floor: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a positive semi-definite matrix and its inverse, both [..., n, n].

    Eigenvalues below ``floor`` times the largest are raised to this value, so the inverse is finite.
    """
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(values[..., -1:] * floor).clamp_min(torch.finfo(moment.dtype).tiny)
    root = (vectors * values.sqrt()[..., None, :]) @ vectors.mT
    inverse = (vectors * values.rsqrt()[..., None, :]) @ vectors.mT
    return root, inverse


def latent_basis(target: Tensor, moment: Tensor, rank: int) -> Tensor:
    """Return the projection W_c [rank, D] whose latent c = W_c x approximates ``target`` best.

    Solves min over B and W_c of ‖(T − B·W_c) C^{1/2}‖_F by the singular value decomposition of T·C^{1/2}
    (Eckart–Young in the metric of the data). The latent is white: W_c C W_cᵀ = I.

    Args:
        target: T [n, D], the maps to approximate.
        moment: C = E[x xᵀ] [D, D].
        rank: width of the latent.
    """
    root, inverse = sqrtm_pair(moment)
    # The D×D Gram matrix has the size of C even if the target has many more rows.
    gram = root @ (target.mT @ target) @ root
    _, vectors = torch.linalg.eigh(gram)
    basis: Tensor = vectors.flip(-1)[:, :rank].mT @ inverse
    return basis


def regress(target: Tensor, basis: Tensor, moment: Tensor) -> Tensor:
    """Return the least-squares read-out B [..., n, r] of ``target`` [..., n, D] from a latent.

    B minimises E‖(``target`` − B·``basis``) x‖², with ``basis`` [r, D] and E[x xᵀ] = ``moment`` [D, D].
    """
    cross = target @ moment @ basis.mT
    gram = basis @ moment @ basis.mT
    readout: Tensor = torch.linalg.solve(gram, cross, left=False)
    return readout


def orthonormal_rows(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Factor ``basis`` [r, D] into T·R with orthonormal rows R; return R [r, D] and T [r, r]."""
    columns, triangle = torch.linalg.qr(basis.mT)
    return columns.mT, triangle.mT


def channel_norm(weight: Tensor, moment: Tensor) -> Tensor:
    """Return the root mean square [..., n] of each output of ``weight`` [..., n, D] for E[x xᵀ] = ``moment`` [D, D]."""
    return ((weight @ moment) * weight).sum(-1).clamp_min(0).sqrt()


def match_channel_norms(rest: Tensor, weights: LayerWeights, moment: Tensor) -> Tensor:
    """Return the scalar that scales ``rest`` to the values' mean channel norm.

    If the rotary key holds the keys completely, ``rest`` is only rounding error. Its norm therefore counts as at least
    a thousandth of the keys' norm, so that rounding errors take no channels of the latent.

    Args:
        rest: the part of the keys [..., n, D] that the rotary channels do not hold.
        weights: the layer's weights.
        moment: E[x xᵀ] [D, D].
    """
    keys, values = channel_norm(weights.k, moment).mean(), channel_norm(weights.v, moment).mean()
    rest_norm = torch.maximum(channel_norm(rest, moment).mean(), keys * 1e-3).clamp_min(1e-30)
    return torch.maximum(values, rest_norm * 1e-3) / rest_norm
