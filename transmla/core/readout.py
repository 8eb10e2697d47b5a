"""The least-squares read-out of rotated keys from what MLA caches.

A query head must recover k_f e^{−iθ_fΔ} from the latent c, which carries no position, and the rotary channels
z_s e^{−iθ_sΔ}. With the key independent of the distance Δ under the attention that is paid, every moment
factors into one of the data and one of the distances,

    E[k_f e^{−iθ_fΔ} · conj(z_s e^{−iθ_sΔ})] = E[k_f z_sᴴ] · φ(θ_f − θ_s),

so the joint optimum over both kinds of channel is one linear solve per head: it holds the calibrated phase
(no slot), the plain regression (no rotation) and every correction between neighbouring frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.core.linalg import regress
from transmla.core.phase import characteristic

# Relative ridge: slots that turn alike, or hardly at all, are nearly collinear with each other and with c.
RIDGE = 1e-6


@dataclass(frozen=True)
class Distances:
    """Characteristic functions of one layer's heads at the frequencies that matter.

    ``channel`` [H, p] at θ_f, ``slot`` [H, s] at θ_s, ``channel_slot`` [H, p, s] at θ_f − θ_s,
    ``slot_slot`` [H, s, s] at θ_s − θ_t; ``own`` [p, s] marks a slot that turns with the channel itself, ``still`` [p]
    a channel that never turns.
    """

    channel: Tensor
    slot: Tensor
    channel_slot: Tensor
    slot_slot: Tensor
    own: Tensor
    still: Tensor

    @classmethod
    def measure(cls, distance_mass: Tensor, frequencies: Tensor, slots: Tensor) -> Distances:
        """From ``distance_mass`` [H, T], the source's frequencies [p] and the slots' [s]."""
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
    """Coefficients on the latent [H, p, r] and on the rotary channels [H, p, s] of every rotated key channel.

    Args:
        kappa: complex keys [G, p, D]; head h reads group h // (H/G).
        latent: W_c [r, D], real; r may be 0.
        z: rotary channels [s, D], complex.
        mix: [s, G, p] with which the rotary channels rebuild the keys (``core.concentrate``).
        moment: E[x xᵀ] [D, D] of the attended tokens.
        distances: of the layer's H heads.

    The solve is for the correction to ``mix`` on each channel's own slots, and to the latent's plain regression of
    channels that never turn, so that keys the slots or the latent hold completely are read back exactly, whatever
    the ridge.
    """
    heads, rank = distances.channel.shape[0], latent.shape[0]
    group = heads // kappa.shape[0]
    dtype = kappa.dtype
    features = torch.cat([latent.to(dtype), z])
    gram = features @ moment.to(dtype) @ features.mH
    cross = kappa @ moment.to(dtype) @ features.mH
    ones = torch.ones(rank, rank, dtype=dtype, device=z.device)
    unturned = kappa.new_zeros(*kappa.shape[:2], rank)
    if rank and bool(distances.still.any()):
        unturned[:, distances.still] = regress(kappa[:, distances.still], latent.to(dtype), moment.to(dtype))
    coefficients = []
    for head in range(heads):
        slot = distances.slot[head]
        # φ of every pair of features: latent rows stand still, slots turn.
        pairs = torch.cat(
            [
                torch.cat([ones, slot.conj().expand(rank, -1)], 1),
                torch.cat([slot[:, None].expand(-1, rank), distances.slot_slot[head]], 1),
            ]
        )
        turned = gram * pairs
        phase = torch.cat([distances.channel[head][:, None].expand(-1, rank), distances.channel_slot[head]], 1)
        base = torch.cat([unturned[head // group], torch.where(distances.own, mix[:, head // group].mT, 0)], 1)
        remaining = cross[head // group] * phase - base @ turned
        level = turned.diagonal().real * RIDGE
        level = level + level.mean().clamp_min(torch.finfo(level.dtype).tiny)
        ridged = torch.linalg.lu_factor(turned + torch.diag(level).to(dtype))
        solved = torch.linalg.lu_solve(*ridged, remaining, left=False)
        # Once more for what the ridge held back: of what is well determined, nearly all.
        solved = solved + torch.linalg.lu_solve(*ridged, remaining - solved @ turned, left=False)
        coefficients.append(solved + base)
    stacked = torch.stack(coefficients)
    return stacked[..., :rank], stacked[..., rank:]
