"""Convert one decoder layer after the other, and carry the hidden states from each to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerWeights
from transmla.convert.factorize import factorize
from transmla.convert.prepare import Prepared
from transmla.convert.reconstruct import Reconstruction, held_out, reconstruct
from transmla.convert.source_layer import NormRatio, Observations, SourceLayer, steps
from transmla.convert.streams import Streams
from transmla.core.fused_attention import fused_attention
from transmla.core.methods.base import method_named
from transmla.core.reference_attention import source_attention
from transmla.errors import TransmlaError
from transmla.formats.base import AttentionExport, format_named
from transmla.source.decoder_layer import embedded
from transmla.source.open_source import runs_in_bfloat16

# The streams stay on a GPU if its free memory holds this many copies of them: those that enter and leave each layer of
# a window, the copies that a fit reads, and as much again for the fit.
STREAM_COPIES = 16


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer's tensors as they are written, its record for the manifest, and the streams that leave it."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    streams: Streams


@dataclass(frozen=True)
class _Opened:
    """A layer of the source with its weights, its closed form, and the streams that leave it (none converted)."""

    layer: SourceLayer
    seen: Observations
    factors: LayerFactors
    leaving: Streams


class LayerConverter:
    """Converts the layers of one source in order."""

    def __init__(self, prepared: Prepared) -> None:
        self.source, self.plan, self.device = prepared.source, prepared.plan, prepared.device
        self.fit, self.seed = prepared.fit, prepared.recipe.seed
        self.format = format_named(self.plan.format)
        self.first_pass = method_named(self.plan.method).first_pass
        self.dtype: torch.dtype = getattr(torch, self.plan.dtype)
        half = runs_in_bfloat16(self.source, self.device)
        self.layers = [
            SourceLayer(
                self.source.model,
                self.source.family,
                self.source.spec,
                self.device,
                half=half,
                norm_eps=self.format.norm_eps,
            )
            for _ in range(1 if self.fit is None else self.fit.window)
        ]
        self._ahead: dict[int, _Opened] = {}

    def start(self, tokens: Tensor, embedding: Tensor) -> Streams:
        """Return the streams that enter the first layer, for ``tokens`` [N, T] and ``embedding`` [V, D]."""
        hidden = embedded(self.source.model, tokens, embedding)
        first_pass = hidden if self.first_pass is not None else None
        return self.place(Streams(hidden, first_pass, converted=hidden if self.fit is not None else None))

    def place(self, streams: Streams) -> Streams:
        """Move ``streams`` to the GPU, if that leaves most of its memory free."""
        return streams.nearest(self.device, STREAM_COPIES)

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor outside the attention as it is written."""
        return self.format.cast(tensor, self.dtype, getattr(torch, self.source.dtype))

    def convert(self, index: int, streams: Streams) -> ConvertedLayer:
        """Convert layer ``index``, which the ``streams`` enter.

        Raises:
            TransmlaError: if a GPU has too little memory.
        """
        try:
            return self._keep(index, streams) if index in self.plan.kept else self._convert(index, streams)
        except torch.OutOfMemoryError as error:
            raise TransmlaError(
                f"not enough GPU memory to convert layer {index}",
                limit=str(error).splitlines()[0],
                remedy="start again with --reconstruct fast or off, shorter calibration sequences, or --device cpu",
            ) from error

    def final_norm(self, streams: Streams) -> float:
        """Factor on the last norm's weight that makes up for the export's eps, for the ``streams`` that leave."""
        if self.format.norm_eps is None:
            return 1.0
        ratio = NormRatio(self.plan.spec.rms_norm_eps, self.format.norm_eps)
        for _, hidden in steps(streams.source):
            ratio.add(hidden.to(self.device))
        return ratio.correction

    def _convert(self, index: int, streams: Streams) -> ConvertedLayer:
        window = self._window(index, streams)
        here, fit = window[0], self._fit(index, window, streams)
        factors, ahead = here.factors, dict[int, dict[str, Tensor]]()
        if fit is not None:
            factors = fit.factors[0]
            for k, fitted in enumerate(fit.factors[1:], start=1):
                ahead[index + k] = {name: t.float().contiguous() for name, t in _fitted_tensors(fitted).items()}
        export = self._export(index, factors, here, streams)
        converted = streams.converted
        if converted is not None:
            converted = here.layer.run_stream(converted, export.factors)[1]
        judged = streams.source[-held_out(len(streams.source)) :]
        record = {"layer": index, "relative_error": relative_error(here.layer, export.factors, judged)}
        record |= export.record
        if self.format.norm_eps is not None:
            record["norm_residual"] = max(here.seen.input_norm.residual, here.seen.output_norm.residual)
        if fit is not None:
            record |= {"held_out_before": fit.before[0], "held_out_after": fit.after[0]}
        prefix = self._prefix(index)
        tensors = {f"{prefix}self_attn.{name}": tensor for name, tensor in export.tensors.items()}
        tensors |= self._outside_attention(prefix, here.seen)
        return ConvertedLayer(tensors, record, replace(here.leaving, converted=converted, ahead=ahead))

    def _fit(self, index: int, window: list[_Opened], streams: Streams) -> Reconstruction | None:
        """Fit the layers of a ``window`` that begins at ``index``."""
        if self.fit is None:
            return None
        assert streams.converted is not None
        starts = [_with_fitted(opened.factors, streams.ahead.get(index + k, {})) for k, opened in enumerate(window)]
        return reconstruct(
            [opened.layer for opened in window],
            starts,
            streams.source,
            streams.converted,
            self.fit,
            seed=self.seed * 1_000_003 + index,
        )

    def _export(self, index: int, factors: LayerFactors, here: _Opened, streams: Streams) -> AttentionExport:
        """The attention as it is written; its calibration inputs are the export's own, where it has a stream."""
        stream = streams.source if streams.converted is None else streams.converted
        return self.format.attention(
            factors,
            self.plan.at(index),
            here.layer.view,
            lambda: (here.layer.features(hidden) for _, hidden in steps(stream)),
        )

    def _keep(self, index: int, streams: Streams) -> ConvertedLayer:
        """Write layer ``index`` as it is in the source."""
        layer = self._load(index)
        leaving = streams.map(lambda stream: layer.run_stream(stream, None)[1])
        prefix = self._prefix(index)
        names = [name for name in self.source.checkpoint.shapes if name.startswith(prefix)]
        tensors = {name: self.cast(self.source.checkpoint.read(name)) for name in names}
        return ConvertedLayer(tensors, {"layer": index, "relative_error": 0.0, "kept": True}, leaving)

    def _window(self, index: int, streams: Streams) -> list[_Opened]:
        """Open layer ``index`` and those that are fitted together with it."""
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
        seen = layer.observe(streams.source)
        stats, leaving = seen.stats, Streams(seen.hidden)
        if self.first_pass is not None:
            assert streams.first_pass is not None
            halfway = self.first_pass(layer.weights().to(torch.float64), stats.to(torch.float64), plan)
            moment, hidden = layer.run_stream(streams.first_pass, halfway.to(torch.float32))
            stats, leaving = replace(stats, converted_moment=moment), replace(leaving, first_pass=hidden)
        return _Opened(layer, seen, factorize(layer.weights(), stats, plan), leaving)

    def _load(self, index: int) -> SourceLayer:
        layer = self.layers[index % len(self.layers)]
        layer.load(self.source.checkpoint.layer(self._prefix(index)), index)
        return layer

    def _prefix(self, index: int) -> str:
        return self.source.family.tensors["layer"].format(i=index)

    def _outside_attention(self, prefix: str, seen: Observations) -> dict[str, Tensor]:
        """The layer's tensors outside the attention, its norms corrected where the export's eps is another."""
        corrections = {}
        if self.format.norm_eps is not None:
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
                    self.cast(tensor) if correction is None else (tensor.double() * correction).to(self.dtype)
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


def _fitted_tensors(factors: LayerFactors) -> dict[str, Tensor]:
    """The tensors that a fit may change."""
    return {name: t for name, t in vars(factors).items() if isinstance(t, Tensor) and name != "inv_freq"}


def _with_fitted(closed: LayerFactors, fitted: Mapping[str, Tensor]) -> LayerFactors:
    """The ``closed`` form with the tensors that an earlier window ``fitted``."""
    return replace(closed, **{name: t.to(closed.latent) for name, t in fitted.items()})  # type: ignore[arg-type]
