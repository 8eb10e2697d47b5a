"""An export in its natural coordinates: latents of their own size, without the norms that do nothing, and balanced.

A native export scales its latents down until their norm is a constant (``core/norm_identity.py``). Rows of one tensor
then differ in size by many orders of magnitude, which no optimiser's step fits; so healing takes the scale and the norm
out, balances what is left (``balance.py``), and puts a scale and a norm back at the end. Those of the own format are
only balanced: their latents have no norm, or one that they learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transmla.core.norm_identity import norm_identity
from transmla.formats.native import RMS_NORM_EPS
from transmla.heal.balance import balance
from transmla.modeling.modeling_transmla import TransmlaAttention

# (projection, norm, reader) of the latents that a layer may have.
_LATENTS = [("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"), ("q_a_proj", "q_a_layernorm", "q_b_proj")]


class Latent(nn.Module):
    """Stands where a latent norm stood: passes latents on, and remembers how large they were when asked to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.watching = False
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self.total, self.count, self.largest = 0.0, 0, 0.0

    def forward(self, latent: Tensor) -> Tensor:
        """``latent`` [..., r], as it is."""
        if self.watching:
            squares = latent.detach().float().square().mean(-1)
            self.total += float(squares.sum())
            self.count += squares.numel()
            self.largest = max(self.largest, float(squares.max()))
        return latent


def attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the MLA layers."""
    for name, module in model.named_modules():
        if hasattr(module, "kv_b_proj") and hasattr(module, "kv_a_layernorm"):
            yield name, module


@torch.no_grad()
def enter(model: nn.Module) -> None:
    """Take scale and norm out of an export's latents (float32), and balance it, in place; what it computes stays."""
    own = any(isinstance(module, TransmlaAttention) for module in model.modules())
    for _, attention in attentions(model):
        for projection, norm, _ in _LATENTS:
            if not own and getattr(attention, norm, None) is not None:
                weight = getattr(attention, norm).weight
                rows = getattr(attention, projection).weight[: len(weight)]
                rows.mul_((weight / RMS_NORM_EPS**0.5)[:, None])
                setattr(attention, norm, Latent(len(weight)))
        balance(attention, interleaved=not own)


def watch(model: nn.Module, *, watching: bool) -> None:
    """Begin, or end, to remember the size of latents."""
    for module in model.modules():
        if isinstance(module, Latent):
            module.watching = watching
            if watching:
                module.reset()


@torch.no_grad()
def leave(model: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of an export from natural ``weights``, by the sizes of latents that ``model`` remembers.

    ``weights`` are some of the model's, whole layers' attentions among them; others pass unchanged but for ``dtype``.
    """
    found = dict(weights)
    for name, attention in attentions(model):
        for projection, norm, reader in _LATENTS:
            seen = getattr(attention, norm, None)
            if not isinstance(seen, Latent) or f"{name}.{projection}.weight" not in weights:
                continue
            identity = norm_identity(seen.total / max(seen.count, 1), seen.largest, RMS_NORM_EPS, dtype)
            rows = weights[f"{name}.{projection}.weight"].double()
            rows = torch.cat([rows[: seen.width] * identity.scale, rows[seen.width :]])
            found[f"{name}.{projection}.weight"] = rows
            found[f"{name}.{norm}.weight"] = torch.full((seen.width,), identity.weight, dtype=torch.float64)
            found[f"{name}.{reader}.weight"] = weights[f"{name}.{reader}.weight"].double() * identity.readout
    return {name: tensor.to("cpu", dtype).contiguous() for name, tensor in found.items()}
