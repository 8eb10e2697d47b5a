"""Choice of the rotary slots of one layer from its statistics, for exports that may store any frequencies.

Let κ [n, D] be the complex key channels of all heads, c the channel's frequency and Δ the distance. A constant can
supply E[e^{−iθ_cΔ}] = φ(θ_c) of a rotation. The rotary slots must supply the rest, the fluctuation

    t_c = κ_c · (e^{−iθ_cΔ} − φ(θ_c)).

A slot of frequency θ_s stores z = w·κ, with w of one weight per channel, and supplies y = z · (e^{−iθ_sΔ} − φ(θ_s)).
If keys and distances are independent, all second moments are products of a moment of the keys and the kernel

    ψ(f, g) = φ(θ_f − θ_g) − φ(θ_f) conj(φ(θ_g)).

Slots are chosen one by one. Each step takes the frequency and the w whose y explains most of what the previous slots
leave of t. Slow frequencies, and channels that queries do not read, therefore get no slot. A frequency of several
strong channels gets several slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A slot combines the channels of its own frequency and of this many neighbours on each side. On Gemma-3-270M, 2 to 8
# give equal errors; with 15, slots rely on the independence of keys and distances, and one layer's error triples.
REACH = 4
# Ridge, as a fraction of the mean diagonal.
RIDGE = 1e-6


def choose_slots(covariance: Tensor, weight: Tensor, kernel: Tensor, count: int) -> tuple[Tensor, tuple[int, ...]]:
    """Choose rotary slots greedily.

    Args:
        covariance: E[κκᴴ] [G·p, G·p] of the key channels, complex. Channel g·p + f is frequency f of key head g.
        weight: importance [G, p] of an error on each channel.
        kernel: ψ [p, p], complex.
        count: number s of slots.

    Returns:
        The weights w [s, G·p] of the key channels in each slot, and the frequency index of each slot in ascending
        order.
    """
    heads, pairs = weight.shape
    band = _bands(heads, pairs).to(covariance.device)
    inside = band >= 0
    band = band.clamp_min(0)
    frequency = torch.arange(heads * pairs, device=band.device) % pairs
    root = weight.flatten().sqrt().to(covariance.dtype)
    variance = kernel.diagonal().real
    # Moments of the channels of each slot's band: with all channels [p, n, b], and with each other [p, b, b].
    with_all = covariance[:, band].transpose(0, 1) * inside[:, None]
    with_band = covariance[band[:, :, None], band[:, None]] * (inside[:, :, None] & inside[:, None])
    mix, slots = covariance.new_zeros(0, heads * pairs), list[int]()
    for _ in range(count):
        # Cross moment [p, n, b] of the target and each candidate's channels; moment [p, b, b] of these channels.
        cross = (root[:, None] * kernel[frequency]).mT[:, :, None] * with_all
        moment = variance[:, None, None] * with_band
        if slots:
            gram = (mix @ covariance @ mix.mH) * kernel[slots][:, slots]
            gram = gram + torch.diag(gram.diagonal().real * RIDGE).to(gram.dtype)
            explained = root[:, None] * (covariance @ mix.mH) * kernel[frequency][:, slots]
            shared = kernel[slots].mT[:, :, None] * (mix @ covariance)[:, band].transpose(0, 1) * inside[:, None]
            solved = torch.linalg.solve(gram, shared)
            cross, moment = cross - explained @ solved, moment - shared.mH @ solved
        slot, weights = _best(cross, moment + torch.diag_embed((~inside).to(moment.dtype)), variance)
        chosen = covariance.new_zeros(1, heads * pairs)
        chosen[0, band[slot][inside[slot]]] = weights.conj()[inside[slot]]
        mix = torch.cat([mix, chosen])
        slots.append(slot)
    order = sorted(range(count), key=lambda s: slots[s])
    return mix[order], tuple(slots[s] for s in order)


def _bands(heads: int, pairs: int) -> Tensor:
    """Return the channels [p, b] that a slot of each frequency may combine; −1 fills up at both ends."""
    near = torch.arange(pairs)[:, None] + torch.arange(-REACH, REACH + 1)
    channels = near + pairs * torch.arange(heads)[:, None, None]
    return channels.masked_fill((near < 0) | (near >= pairs), -1).transpose(0, 1).flatten(1)


def _best(cross: Tensor, moment: Tensor, variance: Tensor) -> tuple[int, Tensor]:
    """Return the frequency that explains most of the target, and the weights [b] of its channels.

    Args:
        cross: cross moments [p, n, b] of the target and each frequency's channels.
        moment: moments [p, b, b] of these channels.
        variance: ψ(f, f) [p]; a frequency without variance is not chosen.
    """
    ridge = moment.diagonal(dim1=1, dim2=2).real.mean(-1) * RIDGE + torch.finfo(variance.dtype).tiny
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    triangle = torch.linalg.cholesky(moment + ridge[:, None, None] * eye)
    white = torch.linalg.solve_triangular(triangle, cross.mH, upper=False)
    gains, vectors = torch.linalg.eigh(white @ white.mH)
    slot = int(torch.where(variance > RIDGE, gains[:, -1], -1).argmax())
    weights = torch.linalg.solve_triangular(triangle[slot].mH, vectors[slot, :, -1:], upper=True)
    return slot, weights[:, 0] / weights.abs().max()
