"""The error of one layer's attention on held-out text, for the manifest."""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerWeights
from transmla.convert.source_layer import SourceLayer
from transmla.core.fused_attention import fused_attention, fused_source_attention


@torch.no_grad()
def relative_error(layer: SourceLayer, factors: LayerFactors, stream: Tensor) -> float:
    """Return ‖MLA − source‖² / ‖source‖² of a layer's attention output.

    Args:
        layer: the source layer, with its weights.
        factors: the layer's MLA factors, float32.
        stream: hidden states [n, T, D] of the source that enter the layer, a few sequences.
    """
    spec = layer.spec
    weights: LayerWeights = layer.weights()
    difference = energy = 0.0
    for hidden in stream[layer.ranks.share(len(stream))]:
        x = layer.features(hidden[None])
        target = fused_source_attention(x, weights, layer.inv_freq, scaling=spec.scaling, gain=spec.attention_factor**2)
        difference += float((fused_attention(x, factors) - target).square().sum())
        energy += float(target.square().sum())
    sums = torch.tensor([difference, energy], dtype=torch.float64, device=layer.device)
    layer.ranks.add_up(sums)
    difference, energy = sums.tolist()
    return difference / max(energy, 1e-30)
