"""One decoder layer after the other, from the source's tensors to the export's, and the streams between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerWeights, Plan
from transmla.convert.factorize import factorize
from transmla.convert.reconstruct import held_out, reconstruct
from transmla.convert.source_layer import NormRatio, Observations, SourceLayer, steps
from transmla.core.factors import pad_factors
from transmla.core.fused_attention import fused_attention
from transmla.core.methods.base import method_named
from transmla.core.reference_attention import source_attention
from transmla.errors import TransmlaError
from transmla.formats import transmla as own
from transmla.formats.base import OWN
from transmla.formats.native import export_tensors, layer_factors
from transmla.formats.transmla import restricted
from transmla.plan.effort import attention_alone, effort_for
from transmla.source.decoder_layer import embedded
from transmla.source.open_source import Source, computes_in_bfloat16

# What enters a layer. Hidden states [N, T, D]: of the source; of a method's first phase; of the export. And, as
# "fitted.7.latent", the factors that a window of layers left for those that it did not finish.
SOURCE, FIRST_PHASE, CONVERTED, FITTED = "source", "first_phase", "converted", "fitted"
Streams = dict[str, Tensor]

# A GPU has room for the streams if it has for so many of them: those that enter and leave each layer of a window, the
# copies that a fit reads, and as much again for the fit.
STREAM_COPIES = 16


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer's tensors as they are written, what the manifest says of it, and the streams that leave it."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    streams: Streams


@dataclass(frozen=True)
class _Opened:
    """A layer of the source with its weights, its closed form, and the streams that leave it there."""

    layer: SourceLayer
    seen: Observations
    factors: LayerFactors
    leaving: Streams


class Layerwise:
    """The conversion of layers one after the other; ``effort`` names how long each is fitted, or is ``off``."""

    def __init__(self, source: Source, plan: Plan, effort: str, device: torch.device, *, seed: int) -> None:
        self.source, self.plan, self.seed = source, plan, seed
        self.device, self.effort = device, effort_for(effort, plan.cache_ratio)
        if self.effort is not None and source.spec.experts:
            self.effort = attention_alone(self.effort)
        self.first_phase = method_named(plan.method).first_phase
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        half = computes_in_bfloat16(source, device)
        self.layers = [
            SourceLayer(source.model, source.family, source.spec, device, half=half)
            for _ in range(1 if self.effort is None else self.effort.window)
        ]
        self._ahead: dict[int, _Opened] = {}

    def start(self, tokens: Tensor, embedding: Tensor) -> Streams:
        """The streams that enter the first layer."""
        hidden = embedded(self.source.model, tokens, embedding)
        wanted = {SOURCE: True, FIRST_PHASE: self.first_phase is not None, CONVERTED: self.effort is not None}
        return self.place({name: hidden for name, there in wanted.items() if there})

    def place(self, streams: Streams) -> Streams:
        """The ``streams`` where they are read fastest: on the GPU, if they leave most of it free."""
        size = sum(stream.nbytes for stream in streams.values())
        if self.device.type == "cuda" and size * STREAM_COPIES < torch.cuda.mem_get_info(self.device)[0]:
            return {name: stream.to(self.device) for name, stream in streams.items()}
        return streams

    def convert(self, index: int, streams: Streams) -> ConvertedLayer:
        """Convert layer ``index``, which the ``streams`` enter.

        Raises:
            TransmlaError: if a GPU has too little memory.
        """
        try:
            return self._convert(index, streams)
        except torch.OutOfMemoryError as error:
            raise TransmlaError(
                f"not enough GPU memory to convert layer {index}",
                limit=str(error).splitlines()[0],
                remedy="start again with --reconstruct fast or off, shorter calibration sequences, or --device cpu",
            ) from error

    def _convert(self, index: int, streams: Streams) -> ConvertedLayer:
        if index in self.plan.kept:
            return self._keep(index, streams)
        window = self._window(index, streams)
        here, leaving = window[0], dict(window[0].leaving)
        factors, fit = here.factors, None
        if self.effort is not None:
            fit = reconstruct(
                [opened.layer for opened in window],
                [_fitted(streams, index + k, opened.factors) for k, opened in enumerate(window)],
                streams[SOURCE],
                streams[CONVERTED],
                self.effort,
                seed=self.seed * 1_000_003 + index,
            )
            factors = fit.factors[0]
            for k, ahead in enumerate(fit.factors[1:], start=1):
                leaving |= {
                    f"{FITTED}.{index + k}.{name}": t.float().contiguous() for name, t in _tensors(ahead).items()
                }
        attention, shipped, told = self._shipped(index, factors, here, streams)
        if CONVERTED in streams:
            leaving[CONVERTED] = here.layer.follow(streams[CONVERTED], shipped)[1]
        error = relative_error(here.layer, shipped, streams[SOURCE][-held_out(len(streams[SOURCE])) :])
        prefix = self._prefix(index)
        tensors = {f"{prefix}self_attn.{name}": tensor for name, tensor in attention.items()}
        tensors |= self._untouched(prefix, here.seen)
        record = {"layer": index, "relative_error": error} | told
        if fit is not None:
            record |= {"held_out_before": fit.before[0], "held_out_after": fit.after[0]}
        return ConvertedLayer(tensors, record, leaving)

    def _shipped(
        self, index: int, factors: LayerFactors, here: _Opened, streams: Streams
    ) -> tuple[dict[str, Tensor], LayerFactors, dict[str, Any]]:
        """The tensors of a layer's attention, the factors that they are once rounded, and what to tell of them."""
        plan = self.plan.at(index)
        if plan.format == OWN:
            whole = restricted(pad_factors(factors, plan.shape), here.layer.front)
            tensors = own.layer_tensors(whole, here.layer.front, self.dtype)
            return tensors, whole.to(self.dtype).to(torch.float32), {}
        tensors, scale = export_tensors(factors, plan, partial(self._attention_inputs, here.layer, streams))
        placed = {name: tensor.to(here.layer.device) for name, tensor in tensors.items()}
        shipped = layer_factors(placed, plan.spec.num_attention_heads, plan.shape, factors.inv_freq, factors.rope_gain)
        told = {
            "latent_mean_square": scale.mean_square,
            "latent_max_square": scale.max_square,
            "norm_residual": max(here.seen.input_norm.residual, here.seen.output_norm.residual),
        }
        return tensors, shipped.to(torch.float32), told

    def _keep(self, index: int, streams: Streams) -> ConvertedLayer:
        """Layer ``index`` as it is in the source."""
        layer = self._load(index)
        leaving = {name: layer.follow(stream, None)[1] for name, stream in streams.items()}
        prefix = self._prefix(index)
        names = [name for name in self.source.checkpoint.shapes if name.startswith(prefix)]
        tensors = {name: self.as_written(self.source.checkpoint.read(name)) for name in names}
        return ConvertedLayer(tensors, {"layer": index, "relative_error": 0.0, "kept": True}, leaving)

    def as_written(self, tensor: Tensor) -> Tensor:
        """A tensor that no one touches, as it is written: cast where the whole model is."""
        whole = self.plan.format != OWN or str(tensor.dtype) == f"torch.{self.source.dtype}"
        return tensor.to(self.dtype) if whole else tensor

    def _window(self, index: int, streams: Streams) -> list[_Opened]:
        """Layer ``index`` and those that are fitted together with it."""
        window: list[_Opened] = []
        for i in range(index, min(index + len(self.layers), self.source.spec.num_hidden_layers)):
            if i in self.plan.kept:
                break
            window.append(self._ahead.pop(i) if i in self._ahead else self._open(i, streams))
            streams = window[-1].leaving
        self._ahead = {index + k: opened for k, opened in enumerate(window) if k}
        return window

    def _open(self, index: int, streams: Streams) -> _Opened:
        """Load layer ``index``, run the source's ``streams`` through it, and factor it in closed form."""
        layer, plan = self._load(index), self.plan.at(index)
        seen = layer.observe(streams[SOURCE])
        stats, leaving = seen.stats, {SOURCE: seen.hidden}
        if self.first_phase is not None:
            halfway = self.first_phase(layer.weights().to(torch.float64), stats.to(torch.float64), plan)
            moment, hidden = layer.follow(streams[FIRST_PHASE], halfway.to(torch.float32))
            stats, leaving = replace(stats, converted_moment=moment), leaving | {FIRST_PHASE: hidden}
        return _Opened(layer, seen, factorize(layer.weights(), stats, plan), leaving)

    def _load(self, index: int) -> SourceLayer:
        layer = self.layers[index % len(self.layers)]
        layer.load(self.source.checkpoint.layer(self._prefix(index)), index)
        return layer

    def _prefix(self, index: int) -> str:
        return self.source.family.tensors["layer"].format(i=index)

    def final_norm(self, streams: Streams) -> float:
        """Correction of the last norm's weight for the export's eps."""
        ratio = NormRatio(self.plan.spec.rms_norm_eps)
        for _, hidden in steps(streams[SOURCE]):
            ratio.add(hidden.to(self.device))
        return ratio.correction

    def _attention_inputs(self, layer: SourceLayer, streams: Streams) -> Any:
        """What the export's attention will read: its own stream where there is one."""
        return (layer.features(hidden) for _, hidden in steps(streams.get(CONVERTED, streams[SOURCE])))

    def _untouched(self, prefix: str, seen: Observations) -> dict[str, Tensor]:
        """The layer's tensors outside the attention, its norms corrected where the export's eps is another."""
        corrections = {}
        if self.plan.format != OWN:
            corrections = {
                "input_layernorm.weight": seen.input_norm.correction,
                "post_attention_layernorm.weight": seen.output_norm.correction,
            }
        tensors = {}
        for name in self.source.checkpoint.shapes:
            if name.startswith(prefix) and not name.startswith(prefix + "self_attn."):
                tensor = self.source.checkpoint.read(name)
                correction = corrections.get(name.removeprefix(prefix))
                tensors[name] = (
                    self.as_written(tensor) if correction is None else (tensor.double() * correction).to(self.dtype)
                )
        return tensors


@torch.no_grad()
def relative_error(layer: SourceLayer, factors: LayerFactors, stream: Tensor) -> float:
    """‖MLA − source‖²/‖source‖² of the attention output on a few sequences of the source's stream [n, T, D]."""
    spec = layer.spec
    weights: LayerWeights = layer.weights()
    difference = energy = 0.0
    for hidden in stream:
        x = layer.features(hidden[None])
        target = source_attention(x, weights, layer.inv_freq, scaling=spec.scaling, gain=spec.attention_factor**2)
        difference += float((fused_attention(x, factors) - target).square().sum())
        energy += float(target.square().sum())
    return difference / max(energy, 1e-30)


def _tensors(factors: LayerFactors) -> dict[str, Tensor]:
    """What a fit may change."""
    return {name: t for name, t in vars(factors).items() if isinstance(t, Tensor) and name != "inv_freq"}


def _fitted(streams: Streams, index: int, closed: LayerFactors) -> LayerFactors:
    """What an earlier window made of layer ``index``, or its ``closed`` form."""
    left = {name: streams.get(f"{FITTED}.{index}.{name}") for name in _tensors(closed)}
    return replace(closed, **{name: t.to(closed.latent) for name, t in left.items() if t is not None})  # type: ignore[arg-type]
