"""Least-squares read-out of the rotated keys from the values that MLA caches.

A query head must recover k_f e^{−iθ_fΔ} from the latent c, which has no position, and from the rotary channels
z_s e^{−iθ_sΔ}. Weight tokens and distances by attention, and assume that keys are independent of the distance Δ. Every
moment is then a product of a moment of the data and one of the distances:

    E[k_f e^{−iθ_fΔ} · conj(z_s e^{−iθ_sΔ})] = E[k_f z_sᴴ] · φ(θ_f − θ_s).

The joint optimum over both kinds of channels is therefore one linear solve per head. Without slots the solution is the
calibrated phase; without rotation it is plain regression. It also includes all corrections between neighbouring
frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.core.linalg import regress
from transmla.core.phase import characteristic

# Ridge, as a fraction of the diagonal: slots of similar frequency are nearly collinear, and slow slots also with c.
RIDGE = 1e-6


@dataclass(frozen=True)
class Distances:
    """Characteristic functions φ of one layer's heads at the frequencies of key channels f and slots s, t.

    Attributes:
        channel: φ(θ_f) [H, p].
        slot: φ(θ_s) [H, s].
        channel_slot: φ(θ_f − θ_s) [H, p, s].
        slot_slot: φ(θ_s − θ_t) [H, s, s].
        has_slot: whether slot s has the frequency of channel f, [p, s].
        is_unrotated: whether channel f is not rotated (θ_f = 0), [p].
    """

    channel: Tensor
    slot: Tensor
    channel_slot: Tensor
    slot_slot: Tensor
    has_slot: Tensor
    is_unrotated: Tensor

    @classmethod
    def measure(cls, distance_mass: Tensor, frequencies: Tensor, slots: Tensor) -> Distances:
        """Compute φ for one layer.

        Args:
            distance_mass: attention mass [H, T] at each distance.
            frequencies: the source's frequencies [p], in radians per position.
            slots: the slots' frequencies [s], in radians per position.
        """
        return cls(
            characteristic(distance_mass, frequencies),
            characteristic(distance_mass, slots),
            characteristic(distance_mass, frequencies[:, None] - slots),
            characteristic(distance_mass, slots[:, None] - slots),
            frequencies[:, None] == slots,
            frequencies == 0,
        )


def joint_readout(
    kappa: Tensor, latent: Tensor, z: Tensor, mix: Tensor, moment: Tensor, distances: Distances
) -> tuple[Tensor, Tensor]:
    """Return the coefficients with which each head reads its rotated keys from the latent and the rotary channels.

    The solve starts from ``mix`` for slots of the channel's frequency, and from plain regression on the latent for
    channels that are not rotated. Keys that the slots or the latent hold completely are then exact despite the ridge.

    Args:
        kappa: complex keys [G, p, D]; head h reads group h // (H/G).
        latent: W_c [r, D], real; r may be 0.
        z: rotary channels [s, D], complex.
        mix: coefficients [s, G, p] of the keys on the rotary channels (``core.concentrate``).
        moment: E[x xᵀ] [D, D] of the attended tokens.
        distances: characteristic functions of the layer's H heads.

    Returns:
        Coefficients [H, p, r] on the latent and [H, p, s] on the rotary channels.
    """
    heads, rank = distances.channel.shape[0], latent.shape[0]
    group = heads // kappa.shape[0]
    dtype = kappa.dtype
    features = torch.cat([latent.to(dtype), z])
    gram = features @ moment.to(dtype) @ features.mH
    cross = kappa @ moment.to(dtype) @ features.mH
    ones = torch.ones(rank, rank, dtype=dtype, device=z.device)
    unrotated = kappa.new_zeros(*kappa.shape[:2], rank)
    if rank and bool(distances.is_unrotated.any()):
        still = distances.is_unrotated
        unrotated[:, still] = regress(kappa[:, still], latent.to(dtype), moment.to(dtype))
    coefficients = []
    for head in range(heads):
        slot = distances.slot[head]
        # Latent rows have frequency 0.
        feature_phi = torch.cat(
            [
                torch.cat([ones, slot.conj().expand(rank, -1)], 1),
                torch.cat([slot[:, None].expand(-1, rank), distances.slot_slot[head]], 1),
            ]
        )
        rotated_gram = gram * feature_phi
        target_phi = torch.cat([distances.channel[head][:, None].expand(-1, rank), distances.channel_slot[head]], 1)
        base = torch.cat([unrotated[head // group], torch.where(distances.has_slot, mix[:, head // group].mT, 0)], 1)
        remaining = cross[head // group] * target_phi - base @ rotated_gram
        ridge = rotated_gram.diagonal().real * RIDGE
        ridge = ridge + ridge.mean().clamp_min(torch.finfo(ridge.dtype).tiny)
        ridged = torch.linalg.lu_factor(rotated_gram + torch.diag(ridge).to(dtype))
        correction = torch.linalg.lu_solve(*ridged, remaining, left=False)
        # A second solve restores nearly all of the well-determined part that the ridge removed.
        correction = correction + torch.linalg.lu_solve(*ridged, remaining - correction @ rotated_gram, left=False)
        coefficients.append(correction + base)
    stacked = torch.stack(coefficients)
    return stacked[..., :rank], stacked[..., rank:]
