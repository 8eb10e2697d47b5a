"""One decoder layer at a time, from the source's tensors to the export's, and the streams between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerWeights, Plan
from transmla.calibrate import NormRatio, Observations, SourceLayer, steps
from transmla.core.absorb import source_attention
from transmla.core.fused import fused_attention
from transmla.effort import EFFORTS
from transmla.factorize import LatentScale, export_tensors, factorize
from transmla.native import layer_factors
from transmla.plan import method_named
from transmla.reconstruct import Reconstruction, reconstruct
from transmla.source import Source, computes_in_bfloat16
from transmla.spec import skeleton

# Sequences on which each layer's error is measured.
ERROR_SEQUENCES = 2

# The hidden states [N, T, D] that enter a layer: of the source; of a method's first phase; of the export.
SOURCE, FIRST_PHASE, CONVERTED = "source", "first_phase", "converted"
Streams = dict[str, Tensor]


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer's tensors as they are written, what the manifest says of it, and the streams that leave it."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    streams: Streams


class Layerwise:
    """The conversion of layers one after the other; ``effort`` names how long each is fitted, or is ``off``."""

    def __init__(self, source: Source, plan: Plan, effort: str, device: torch.device, *, seed: int) -> None:
        self.source, self.plan, self.seed = source, plan, seed
        self.effort = EFFORTS.get(effort)
        self.first_phase = method_named(plan.method).first_phase
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        half = computes_in_bfloat16(source, device)
        self.layer = SourceLayer(skeleton(source.config), source.config, source.spec, device, half=half)

    def start(self, tokens: Tensor, embedding: Tensor) -> Streams:
        """The streams that enter the first layer."""
        hidden = torch.nn.functional.embedding(tokens, embedding).float()
        wanted = {SOURCE: True, FIRST_PHASE: self.first_phase is not None, CONVERTED: self.effort is not None}
        return {name: hidden for name, there in wanted.items() if there}

    def convert(self, index: int, streams: Streams) -> ConvertedLayer:
        """Convert layer ``index``, which the ``streams`` enter."""
        prefix = self.source.family.tensors["layer"].format(i=index)
        layer = self.layer
        layer.load(self.source.checkpoint.layer(prefix))
        stream = streams[SOURCE]
        seen = layer.observe(stream)
        stats, leaving = seen.stats, {SOURCE: seen.hidden}
        if self.first_phase is not None:
            halfway = self.first_phase(layer.weights().to(torch.float64), stats.to(torch.float64), self.plan)
            moment, hidden = layer.follow(streams[FIRST_PHASE], halfway.to(torch.float32))
            stats, leaving = replace(stats, converted_moment=moment), leaving | {FIRST_PHASE: hidden}
        factors, fit = factorize(layer.weights(), stats, self.plan), None
        if self.effort is not None:
            seed = self.seed * 1_000_003 + index
            fit = reconstruct(layer, factors, stream, streams[CONVERTED], self.effort, seed=seed)
            factors = fit.factors
        attention, scale = export_tensors(factors, self.plan, partial(self._attention_inputs, streams))
        shipped = layer_factors(
            {name: tensor.to(layer.device) for name, tensor in attention.items()},
            self.plan.spec.num_attention_heads,
            self.plan.shape,
            factors.inv_freq,
            factors.rope_gain,
        ).to(torch.float32)
        if CONVERTED in streams:
            leaving[CONVERTED] = layer.follow(streams[CONVERTED], shipped)[1]
        error = relative_error(layer, shipped, stream[-ERROR_SEQUENCES:])
        tensors = {f"{prefix}self_attn.{name}": tensor for name, tensor in attention.items()}
        tensors |= self._untouched(prefix, seen)
        return ConvertedLayer(tensors, _record(index, error, scale, seen, fit), leaving)

    def final_norm(self, streams: Streams) -> float:
        """Correction of the last norm's weight for the export's eps."""
        ratio = NormRatio(self.plan.spec.rms_norm_eps)
        for _, hidden in steps(streams[SOURCE]):
            ratio.add(hidden)
        return ratio.correction

    def _attention_inputs(self, streams: Streams) -> Any:
        """What the export's attention will read: its own stream where there is one."""
        return (self.layer.attention_input(hidden) for _, hidden in steps(streams.get(CONVERTED, streams[SOURCE])))

    def _untouched(self, prefix: str, seen: Observations) -> dict[str, Tensor]:
        """The layer's tensors outside the attention, its norms corrected for the export's eps."""
        corrections = {
            "input_layernorm.weight": seen.input_norm.correction,
            "post_attention_layernorm.weight": seen.output_norm.correction,
        }
        tensors = {}
        for name in self.source.checkpoint.shapes:
            if name.startswith(prefix) and not name.startswith(prefix + "self_attn."):
                tensor = self.source.checkpoint.read(name)
                correction = corrections.get(name.removeprefix(prefix))
                tensors[name] = (tensor if correction is None else tensor.double() * correction).to(self.dtype)
        return tensors


@torch.no_grad()
def relative_error(layer: SourceLayer, factors: LayerFactors, stream: Tensor) -> float:
    """‖MLA − source‖²/‖source‖² of the attention output on a few sequences of the source's stream [n, T, D]."""
    spec = layer.spec
    weights: LayerWeights = layer.weights()
    difference = energy = 0.0
    for hidden in stream:
        x = layer.attention_input(hidden[None])
        target = source_attention(x, weights, layer.inv_freq, scaling=spec.scaling, gain=spec.attention_factor**2)
        difference += float((fused_attention(x, factors) - target).square().sum())
        energy += float(target.square().sum())
    return difference / max(energy, 1e-30)


def _record(
    index: int, error: float, scale: LatentScale, seen: Observations, fit: Reconstruction | None
) -> dict[str, Any]:
    """What the manifest says of a layer."""
    record = {
        "layer": index,
        "relative_error": error,
        "latent_mean_square": scale.mean_square,
        "latent_max_square": scale.max_square,
        "norm_residual": max(seen.input_norm.residual, seen.output_norm.residual),
    }
    return record if fit is None else record | {"held_out_before": fit.before, "held_out_after": fit.after}
