"""Quantise rows for GGUF files.

The ``gguf`` package quantises Q8_0 and Q5_0, and only decodes Q4_K and Q6_K. The two K types are made here, for the
block layouts of the GGUF specification. Each scale is searched on a grid around the range of its sub-block. For every
candidate, weighted least squares give the best scale (and minimum) for the rounded codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy

# Values in a super-block of the K types.
SUPER = 256
# Largest float16.
HALF_MAX = 65504.0
# Steps of the search, in codes: how many more codes than the type has the range of a sub-block is divided into.
STEPS_4 = tuple(step / 5 for step in range(-8, 6))
STEPS_6 = tuple(step / 2 for step in range(-4, 5))
# Values that are quantised at a time: the fastest on two CPU cores, whose caches hold the tensors of the search.
CHUNK = 2**18


def quantise(rows: Tensor, kind: str) -> numpy.ndarray[Any, Any]:
    """Return ``rows`` [..., n] as the data of a GGUF tensor.

    Args:
        rows: float32 rows.
        kind: name of a type of GGUF: F32, BF16, F16, Q8_0, Q5_0, Q6_K or Q4_K.

    Returns:
        An array [..., n] for F32 and F16, and an array of bytes [..., bytes of a row] for the other types.
    """
    from gguf import GGMLQuantizationType, quants

    if kind == "F32":
        return rows.float().contiguous().numpy()
    if kind == "F16":
        return rows.to(torch.float16).contiguous().numpy()
    if kind not in ENCODERS:
        return quants.quantize(rows.float().contiguous().numpy(), GGMLQuantizationType[kind])
    blocks = rows.float().reshape(-1, SUPER)
    coded = torch.cat([ENCODERS[kind](chunk) for chunk in _chunks(blocks)])
    return coded.reshape(*rows.shape[:-1], -1).numpy()


def _chunks(blocks: Tensor) -> Iterator[Tensor]:
    yield from blocks.split(CHUNK // SUPER)


def encode_q4_k(x: Tensor) -> Tensor:
    """Return blocks ``x`` [n, 256] as Q4_K [n, 144] bytes: x ≈ d·s·q - d_min·m with 4-bit q and 6-bit s and m."""
    x = x.reshape(-1, 8, 32)
    scale, low = _affine(x, _weights(x))
    d, d_min = _half(scale.amax(1, keepdim=True) / 63), _half(low.amax(1, keepdim=True) / 63)
    s, m = _codes(scale, d, 63), _codes(low, d_min, 63)
    q = _codes(x + (d_min * m)[..., None], (d * s)[..., None], 15)
    # The codes are fixed now. Least squares over the super-block correct d and d_min for the rounding of s and m.
    d, d_min = _refit(x, _weights(x), s[..., None] * q, m[..., None].expand_as(q), d, d_min)
    q = _codes(x + (d_min * m)[..., None], (d * s)[..., None], 15)
    s, m, q = s.to(torch.uint8), m.to(torch.uint8), q.to(torch.uint8)
    packed = [
        s[:, :4] | (s[:, 4:] >> 4) << 6,
        m[:, :4] | (m[:, 4:] >> 4) << 6,
        (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        (q[:, 0::2] | q[:, 1::2] << 4).flatten(1),
    ]
    return torch.cat([_bytes(d), _bytes(d_min), *packed], 1)


def encode_q6_k(x: Tensor) -> Tensor:
    """Return blocks ``x`` [n, 256] as Q6_K [n, 210] bytes: x ≈ d·s·q with q from -32 to 31 and 8-bit s."""
    x = x.reshape(-1, 16, 16)
    scale = _symmetric(x)
    largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = _half(largest / -128)
    s = torch.where(d == 0, 0.0, (scale / d.where(d != 0, 1.0)).round().clamp(-128, 127))
    step = (d * s)[..., None]
    q = torch.where(step == 0, 0.0, (x / step.where(step != 0, 1.0)).round().clamp(-32, 31))
    code = (q + 32).to(torch.uint8).reshape(-1, 2, 4, 32)
    low, high = code & 15, code >> 4
    ql = low[:, :, :2] | low[:, :, 2:] << 4
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return torch.cat([ql.flatten(1), qh.flatten(1), s.to(torch.int8).view(torch.uint8), _bytes(d)], 1)


ENCODERS = {"Q4_K": encode_q4_k, "Q6_K": encode_q6_k}


def _weights(x: Tensor) -> Tensor:
    """Weights of the squared errors of ``x`` [n, b, 32]: large values count more."""
    return x.square().mean(-1, keepdim=True).sqrt() + x.abs()


def _affine(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Search (scale, low) [n, b], both ≥ 0, so that scale·q - low fits ``x`` [n, b, 32] with codes q from 0 to 15."""
    start = x.amin(-1).clamp(max=0)
    span = (x.amax(-1) - start).clamp(min=0)
    total, total_x = weights.sum(-1), (weights * x).sum(-1)
    # The range itself, also for a sub-block of equal values, whose codes are all 0.
    scale, low = span / 15, -start
    q = _codes(x - start[..., None], scale[..., None], 15)
    best = (weights * (scale[..., None] * q - low[..., None] - x).square()).sum(-1)
    for step in STEPS_4:
        q = _codes(x - start[..., None], (span / (15 + step))[..., None], 15)
        weighted = weights * q
        sum_q, sum_qq, sum_qx = weighted.sum(-1), (weighted * q).sum(-1), (weighted * x).sum(-1)
        determinant = total * sum_qq - sum_q.square()
        m = (sum_q * sum_qx - sum_qq * total_x) / determinant
        s = (total * sum_qx - sum_q * total_x) / determinant
        # Without a minimum where it would be negative, and where all codes are equal.
        plain = ~(m > 0) | ~(determinant > 0)
        m = m.where(~plain, 0.0)
        s = s.where(~plain, sum_qx / sum_qq)
        error = (weights * (s[..., None] * q - m[..., None] - x).square()).sum(-1)
        better = (error < best) & (s > 0)
        best, scale, low = error.where(better, best), s.where(better, scale), m.where(better, low)
    return scale, low


def _refit(x: Tensor, weights: Tensor, a: Tensor, b: Tensor, d: Tensor, d_min: Tensor) -> tuple[Tensor, Tensor]:
    """Return (d, d_min) [n, 1] in float16's values so that d·a - d_min·b fits ``x``; the given ones where they do."""

    def over(product: Tensor) -> Tensor:
        return (weights * product).sum((1, 2))[:, None]

    aa, ab, bb, ax, bx = over(a * a), over(a * b), over(b * b), over(a * x), over(b * x)
    determinant = aa * bb - ab.square()
    d_new, m_new = (bb * ax - ab * bx) / determinant, (ab * ax - aa * bx) / determinant
    single = ~(determinant > 1e-6 * aa * bb)
    d_new = _half(torch.where(single, (ax + d_min * ab) / aa, d_new))
    m_new = _half(torch.where(single, d_min, m_new))

    def error(d: Tensor, m: Tensor) -> Tensor:
        return over((d[..., None] * a - m[..., None] * b - x).square())

    better = (error(d_new, m_new) < error(d, d_min)) & (d_new > 0) & (m_new >= 0)
    return d_new.where(better, d), m_new.where(better, d_min)


def _symmetric(x: Tensor) -> Tensor:
    """Search the scale [n, b], of any sign, so that scale·q fits ``x`` [n, b, 16] with codes q from -32 to 31."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    weights = x.square()
    best, scale = torch.full_like(largest, -1.0), torch.zeros_like(largest)
    for step in STEPS_6:
        unit = largest / -(32 + step)
        q = (x / unit.where(unit != 0, 1.0)).round().clamp(-32, 31)
        weighted = weights * q
        sum_qx, sum_qq = (weighted * x).sum(-1, keepdim=True), (weighted * q).sum(-1, keepdim=True)
        s = sum_qx / sum_qq
        # The error is Σ w·x² - s·Σ w·q·x.
        gain = s * sum_qx
        better = gain > best
        best, scale = gain.where(better, best), s.where(better, scale)
    return scale[..., 0]


def _codes(x: Tensor, unit: Tensor, most: int) -> Tensor:
    """Return x/unit, rounded to 0 … most; 0 where the unit is 0."""
    return torch.where(unit > 0, (x / unit.where(unit > 0, 1.0)).round().clamp(0, most), 0.0)


def _half(x: Tensor) -> Tensor:
    """Return ``x`` rounded to float16's values."""
    return x.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).float()


def _bytes(x: Tensor) -> Tensor:
    """Return ``x`` [n, 1] as the bytes [n, 2] of float16."""
    return x.to(torch.float16).view(torch.uint8)
