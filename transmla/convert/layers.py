"""Convert the decoder layers in order, and carry the hidden states from each layer to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors
from transmla.convert.eps_correction import NormRatio
from transmla.convert.factorize import factorize, from_first
from transmla.convert.finite import check_hidden, check_numbers, check_tensors, decompositions
from transmla.convert.fit_layers import Reconstruction, held_out, reconstruct
from transmla.convert.observe import Observations, observe
from transmla.convert.phases import Phases
from transmla.convert.prepare import Prepared
from transmla.convert.relative_error import relative_error
from transmla.convert.source_layer import SourceLayer, steps
from transmla.convert.streams import Streams, mapped
from transmla.core.methods.base import method_named
from transmla.core.rope import match_slots
from transmla.errors import TransmlaError
from transmla.formats.base import AttentionExport, format_named
from transmla.plan.estimate import fit_bytes
from transmla.ranks import Ranks
from transmla.source.decoder_layer import embedded
from transmla.source.open_source import runs_in_bfloat16
from transmla.source.output_head import OutputHead

# Copies of the streams that a GPU must hold, beside a fit, to keep them. Three are needed: before and after each layer
# of a window, and as inputs of the fit.
STREAM_COPIES = 4


@dataclass(frozen=True)
class ConvertedLayer:
    """Result of converting one layer.

    Attributes:
        tensors: all tensors of the layer by their names in the export.
        record: the layer's entry in the manifest.
        streams: the streams that enter the next layer.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    streams: Streams


@dataclass(frozen=True)
class _OpenLayer:
    """A loaded source layer.

    Attributes:
        layer: the source layer, with its weights.
        observations: the layer's statistics on calibration text.
        factors: the layer's closed-form factors.
        leaving: the streams of the source and of the first pass after the layer.
    """

    layer: SourceLayer
    observations: Observations
    factors: LayerFactors
    leaving: Streams


class LayerConverter:
    """Converts the layers of one source in order.

    The converter holds as many source layers at once as are fitted together.
    """

    def __init__(self, prepared: Prepared, ranks: Ranks, folder: Path | None = None) -> None:
        """Build the empty source layers for a conversion.

        Args:
            prepared: the conversion.
            ranks: processes that share its work.
            folder: folder on the disk for the hidden states; None keeps them in memory.
        """
        self.folder = folder
        self.source, self.plan, self.device = prepared.source, prepared.plan, prepared.device
        self.fit, self.seed, self.ranks = prepared.fit, prepared.recipe.seed, ranks
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
                ranks=ranks,
                folder=folder,
            )
            for _ in range(1 if self.fit is None else self.fit.window)
        ]
        self._ahead: dict[int, _OpenLayer] = {}
        self.phases = Phases(self.device)

    def start(self, tokens: Tensor, embedding: Tensor, held: Tensor | None = None) -> Streams:
        """Return the streams [N, T, D] that enter the first layer.

        Args:
            tokens: calibration tokens [N, T].
            embedding: the source's embedding [V, D].
            held: held-out tokens [n, T], which run through the source's and the export's layers; None without any.

        Raises:
            TransmlaError: if they overflow.
        """
        into = None if self.folder is None else mapped((*tokens.shape, embedding.shape[1]), self.folder)
        hidden = embedded(self.source.model, tokens, embedding, into=into)
        check_hidden("the embedding", {"source": hidden})
        first_pass = hidden if self.first_pass is not None else None
        streams = Streams(hidden, first_pass, converted=hidden if self.fit is not None else None)
        if held is not None and len(held):
            outside = embedded(self.source.model, held, embedding)
            streams = replace(streams, held_source=outside, held_export=outside.clone())
        return self.place(streams)

    def place(self, streams: Streams) -> Streams:
        """Move ``streams`` to the GPU if its free memory holds STREAM_COPIES of them and the fit's own memory.

        Otherwise, hidden states that were loaded from a file stay in that file.
        """
        length = streams.source.shape[1]
        beside = 0 if self.fit is None else fit_bytes(self.source.spec, 0, length, self.fit)
        return streams.nearest(self.device, STREAM_COPIES, beside)

    def cast(self, tensor: Tensor) -> Tensor:
        """Return a tensor outside the attention in the precision in which it is written."""
        return self.format.cast(tensor, self.dtype, getattr(torch, self.source.dtype))

    def convert(self, index: int, streams: Streams) -> ConvertedLayer:
        """Convert one layer.

        Args:
            index: index of the layer.
            streams: the streams that enter this layer.

        Raises:
            TransmlaError: if the GPU has too little memory, or if a number overflows.
        """
        place = f"layer {index}"
        try:
            with decompositions(place):
                layer = self._keep(index, streams) if index in self.plan.kept else self._convert(index, streams)
        except torch.OutOfMemoryError as error:
            raise TransmlaError(
                f"not enough GPU memory to convert layer {index}",
                limit=str(error).splitlines()[0],
                remedy="start again with --reconstruct fast or off, shorter calibration sequences, or --device cpu",
            ) from error
        check_hidden(place, layer.streams.hidden())
        check_numbers(place, layer.record)
        check_tensors(place, layer.tensors)
        return layer

    def final_norm(self, streams: Streams) -> float:
        """Return the factor on the last norm's weight that corrects for the export's eps.

        ``streams`` are the streams after the last layer.
        """
        if self.format.norm_eps is None:
            return 1.0
        ratio = NormRatio(self.plan.spec.rms_norm_eps, self.format.norm_eps)
        for _, hidden in steps(streams.source):
            ratio.add(hidden.to(self.device))
        return ratio.correction

    def divergence(self, streams: Streams) -> float:
        """Return the KL to the source in nats per token on the held-out sequences, for ``streams`` after all layers."""
        assert streams.held_source is not None
        assert streams.held_export is not None
        head = OutputHead(self.source.model, self.source.checkpoint, self.source.family, self.device)
        return head.divergence(streams.held_source, streams.held_export)

    def _convert(self, index: int, streams: Streams) -> ConvertedLayer:
        """Convert layer ``index`` to latent attention."""
        window = self._window(index, streams)
        with self.phases.measure("fit"):
            current, fit = window[0], self._fit(index, window, streams)
        factors, ahead = current.factors, dict[int, dict[str, Tensor]]()
        if fit is not None:
            factors = fit.factors[0]
            for k, fitted in enumerate(fit.factors[1:], start=1):
                ahead[index + k] = {name: t.float().contiguous() for name, t in _fitted_tensors(fitted).items()}
        with self.phases.measure("factorise"):
            export = self._export(index, factors, current, streams)
        with self.phases.measure("observe"):
            converted = streams.converted
            if converted is not None:
                converted = current.layer.run_stream(converted, export.factors)[1]
            evaluated = streams.source[-held_out(len(streams.source)) :]
            error = relative_error(current.layer, export.factors, evaluated)
            held_source, held_export = streams.held_source, streams.held_export
            if held_source is not None and held_export is not None:
                held_source = current.layer.run_stream(held_source, None)[1]
                held_export = current.layer.run_stream(held_export, export.factors)[1]
        record: dict[str, Any] = {"layer": index, "relative_error": error, **export.record}
        if self.plan.at(index).rotary.measured:
            frequencies = torch.tensor(current.layer.spec.inv_freq, dtype=torch.float64)
            record["slots"] = list(match_slots(export.factors.inv_freq.double().cpu(), frequencies) or ())
        if self.format.norm_eps is not None:
            norms = current.observations.input_norm, current.observations.output_norm
            record["norm_residual"] = max(norm.residual for norm in norms)
            record |= {
                "input_norm_correction": norms[0].correction * self.format.input_scale,
                "output_norm_correction": norms[1].correction,
            }
        if fit is not None:
            record |= {"held_out_before": fit.before[0], "held_out_after": fit.after[0]}
            record["fit_attempts"] = fit.attempts
        prefix = self._prefix(index)
        tensors = {f"{prefix}self_attn.{name}": tensor for name, tensor in export.tensors.items()}
        tensors |= self._outside_attention(prefix, current.observations)
        leaving = replace(current.leaving, converted=converted, held_source=held_source, held_export=held_export)
        return ConvertedLayer(tensors, record, replace(leaving, ahead=ahead))

    def _fit(self, index: int, window: list[_OpenLayer], streams: Streams) -> Reconstruction | None:
        """Fit the layers of the ``window`` that begins at layer ``index``; None if layers are not fitted."""
        if self.fit is None:
            return None
        assert streams.converted is not None
        starts = [_with_fitted(item.factors, streams.ahead.get(index + k, {})) for k, item in enumerate(window)]
        return reconstruct(
            [item.layer for item in window],
            starts,
            streams.source,
            streams.converted,
            self.fit,
            seed=self.seed * 1_000_003 + index,
        )

    def _export(self, index: int, factors: LayerFactors, current: _OpenLayer, streams: Streams) -> AttentionExport:
        """Return layer ``index``'s attention as it is written.

        Its calibration inputs are the hidden states of the converted layers, or of the source if layers are not fitted.
        """
        stream = streams.source if streams.converted is None else streams.converted
        return self.format.attention(
            factors,
            self.plan.at(index),
            current.layer.view,
            lambda: (current.layer.features(hidden) for _, hidden in steps(stream)),
        )

    def _keep(self, index: int, streams: Streams) -> ConvertedLayer:
        """Copy layer ``index`` from the source."""
        layer = self._load(index)
        with self.phases.measure("observe"):
            leaving = streams.map(lambda stream: layer.run_stream(stream, None)[1])
        prefix = self._prefix(index)
        names = [name for name in self.source.checkpoint.shapes if name.startswith(prefix)]
        tensors = {name: self.cast(self.source.checkpoint.read(name)) for name in names}
        return ConvertedLayer(tensors, {"layer": index, "relative_error": 0.0, "kept": True}, leaving)

    def _window(self, index: int, streams: Streams) -> list[_OpenLayer]:
        """Open layer ``index`` and the following layers that are fitted together with it."""
        window: list[_OpenLayer] = []
        for i in range(index, min(index + len(self.layers), self.source.spec.num_hidden_layers)):
            if i in self.plan.kept:
                break
            window.append(self._ahead.pop(i) if i in self._ahead else self._open(i, streams))
            streams = window[-1].leaving
        self._ahead = {index + k: item for k, item in enumerate(window) if k}
        return window

    def _open(self, index: int, streams: Streams) -> _OpenLayer:
        """Load layer ``index``, run the source's ``streams`` through it, and factor it in closed form."""
        layer, plan = self._load(index), self.plan.at(index)
        with self.phases.measure("observe"):
            observations = observe(layer, streams.source)
        stats, leaving = observations.stats, Streams(observations.hidden)
        if self.first_pass is not None:
            assert streams.first_pass is not None
            first_factors = self.first_pass(layer.weights().to(torch.float64), stats.to(torch.float64), plan)
            first_factors = from_first(first_factors, self.ranks)
            with self.phases.measure("observe"):
                moment, hidden = layer.run_stream(streams.first_pass, first_factors.to(torch.float32))
            stats, leaving = replace(stats, converted_moment=moment), replace(leaving, first_pass=hidden)
        with self.phases.measure("factorise"):
            # In float64 from the start: no second copy in float32 beside it.
            factors = from_first(factorize(layer.weights().to(torch.float64), stats, plan), self.ranks)
        return _OpenLayer(layer, observations, factors, leaving)

    def _load(self, index: int) -> SourceLayer:
        """Load the weights of layer ``index`` into a source layer."""
        layer = self.layers[index % len(self.layers)]
        with self.phases.measure("read"):
            layer.load(self.source.checkpoint.layer(self._prefix(index)), index)
        return layer

    def _prefix(self, index: int) -> str:
        """Return the prefix of the tensor names of layer ``index``."""
        return self.source.family.tensors["layer"].format(i=index)

    def _outside_attention(self, prefix: str, observations: Observations) -> dict[str, Tensor]:
        """Return the layer's tensors outside the attention; norms are corrected if the export has another eps."""
        corrections = {}
        if self.format.norm_eps is not None:
            corrections = {
                "input_layernorm.weight": observations.input_norm.correction * self.format.input_scale,
                "post_attention_layernorm.weight": observations.output_norm.correction,
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


def _fitted_tensors(factors: LayerFactors) -> dict[str, Tensor]:
    """Return the tensors that a fit may change, by name."""
    return {name: t for name, t in vars(factors).items() if isinstance(t, Tensor) and name != "inv_freq"}


def _with_fitted(closed: LayerFactors, fitted: Mapping[str, Tensor]) -> LayerFactors:
    """Return the ``closed`` form's factors, with the tensors that an earlier window ``fitted`` in their stead."""
    return replace(closed, **{name: t.to(closed.latent) for name, t in fitted.items()})  # type: ignore[arg-type]
