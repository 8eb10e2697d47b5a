"""Weighted low-rank approximation and its helpers, in the dtype given (float64 in practice)."""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.artifacts import LayerWeights


def regularise(moment: Tensor, relative: float = 1e-6) -> Tensor:
    """Add ``relative`` times the mean diagonal, so that directions never seen keep a finite metric."""
    level = moment.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(torch.finfo(moment.dtype).tiny)
    return moment + torch.diag_embed((relative * level).expand(moment.shape[:-1]))


def sqrtm_pair(moment: Tensor, floor: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive semi-definite matrix and its inverse, both [..., n, n].

    Eigenvalues are raised to ``floor`` times the largest, so the inverse is finite.
    """
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(values[..., -1:] * floor).clamp_min(torch.finfo(moment.dtype).tiny)
    root = (vectors * values.sqrt()[..., None, :]) @ vectors.mT
    inverse = (vectors * values.rsqrt()[..., None, :]) @ vectors.mT
    return root, inverse


def latent_basis(target: Tensor, moment: Tensor, rank: int) -> Tensor:
    """The r-row projection W_c whose latent c = W_c x serves ``target`` [n, D] best under ``moment`` [D, D].

    Solves min ‖(T − B·W_c) C^{1/2}‖_F by the singular value decomposition of T·C^{1/2} (Eckart–Young in the
    data's metric); rows are whitened, W_c C W_cᵀ = I. Returns [rank, D].
    """
    root, inverse = sqrtm_pair(moment)
    # The D×D Gram matrix is no larger than C, however many rows the target has.
    gram = root @ (target.mT @ target) @ root
    _, vectors = torch.linalg.eigh(gram)
    basis: Tensor = vectors.flip(-1)[:, :rank].mT @ inverse
    return basis


def regress(target: Tensor, basis: Tensor, moment: Tensor) -> Tensor:
    """Least-squares read-out B [..., n, r] with B·``basis`` ≈ ``target`` [..., n, D] under ``moment``."""
    cross = target @ moment @ basis.mT
    gram = basis @ moment @ basis.mT
    read: Tensor = torch.linalg.solve(gram, cross, left=False)
    return read


def orthonormal_rows(basis: Tensor) -> tuple[Tensor, Tensor]:
    """``basis`` [r, D] as T·R with orthonormal rows R: returns R [r, D] and T [r, r]."""
    columns, triangle = torch.linalg.qr(basis.mT)
    return columns.mT, triangle.mT


def channel_norm(weight: Tensor, moment: Tensor) -> Tensor:
    """Root mean square [..., n] of every output channel of ``weight`` [..., n, D] under ``moment`` [D, D]."""
    return ((weight @ moment) * weight).sum(-1).clamp_min(0).sqrt()


def match_channel_norms(rest: Tensor, weights: LayerWeights, moment: Tensor) -> Tensor:
    """The factor that gives ``rest``, what the rotary channels left of the keys, the values' mean channel norm.

    Neither counts as less than a thousandth of the keys or values it comes from: rounding errors are all that is
    left where the rotary key holds everything, and they may claim no latent.
    """
    keys, values = channel_norm(weights.k, moment).mean(), channel_norm(weights.v, moment).mean()
    left = torch.maximum(channel_norm(rest, moment).mean(), keys * 1e-3).clamp_min(1e-30)
    return torch.maximum(values, left * 1e-3) / left
