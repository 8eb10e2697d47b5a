"""Natural coordinates of an export: latents at their original size, no identity norms, balanced factors.

Healing trains in these coordinates, because each tensor has one learning rate and its rows must have similar sizes.
The export's format removes its latent scale (``Format.to_natural``); ``balance.py`` equalises the other factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transmla.formats.base import Format
from transmla.heal.balance import balance


def attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and module of each MLA layer."""
    for name, module in model.named_modules():
        if hasattr(module, "kv_b_proj") and hasattr(module, "kv_a_layernorm"):
            yield name, module


@torch.no_grad()
def to_natural(model: nn.Module, form: Format) -> None:
    """Bring an export (float32) of the format ``form`` into natural coordinates, in place; its output stays."""
    for name, attention in attentions(model):
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        form.to_natural(attention, getattr(layer, "input_layernorm", None))
        balance(attention, interleaved=form.interleaved)


def measure_latents(model: nn.Module, form: Format, *, watching: bool) -> None:
    """Start (``watching``) or stop measuring the sizes of the latents. A start clears earlier measurements."""
    for _, attention in attentions(model):
        form.measure(attention, watching=watching)


@torch.no_grad()
def to_export(model: nn.Module, weights: dict[str, Tensor], form: Format, dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert weights in natural coordinates into the tensors of an export.

    Args:
        model: the model in natural coordinates, which has measured its latents.
        weights: some of the model's weights by name. For each attention, all of its weights or none.
        form: the export's format.
        dtype: the export's precision.

    Returns:
        The export's tensors by name, contiguous, on the CPU, in ``dtype``.
    """
    tensors = dict(weights)
    for name, attention in attentions(model):
        form.from_natural(name, attention, tensors, dtype)
    return {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
