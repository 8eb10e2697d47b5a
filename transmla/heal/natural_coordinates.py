"""An export in natural coordinates: latents of their own size, without norms that are identities, and balanced.

Healing trains in these coordinates, because a tensor has one learning rate and its rows must be of similar size. The
format of the export says which scales to take out (``Format.to_natural``); ``balance.py`` equalises what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transmla.formats.base import Format
from transmla.formats.latent_scale import LatentMeter
from transmla.heal.balance import balance


def attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and modules of the MLA layers."""
    for name, module in model.named_modules():
        if hasattr(module, "kv_b_proj") and hasattr(module, "kv_a_layernorm"):
            yield name, module


@torch.no_grad()
def to_natural(model: nn.Module, form: Format) -> None:
    """Bring an export (float32) of the format ``form`` into natural coordinates, in place; its output stays."""
    for _, attention in attentions(model):
        form.to_natural(attention)
        balance(attention, interleaved=form.interleaved)


def measure_latents(model: nn.Module, *, watching: bool) -> None:
    """Start, or stop, measuring the size of latents."""
    for module in model.modules():
        if isinstance(module, LatentMeter):
            module.watching = watching
            if watching:
                module.reset()


@torch.no_grad()
def to_export(model: nn.Module, weights: dict[str, Tensor], form: Format, dtype: torch.dtype) -> dict[str, Tensor]:
    """Turn natural ``weights`` into the tensors of an export, by the latent sizes that ``model`` measured.

    ``weights`` are some of the model's, whole layers' attentions among them; others change only their ``dtype``.
    """
    tensors = dict(weights)
    for name, attention in attentions(model):
        form.from_natural(name, attention, tensors, dtype)
    return {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
