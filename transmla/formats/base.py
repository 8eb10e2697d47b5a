"""The contract of an export format.

A format decides how a converted model is stored: the names and layout of its tensors, its config, and the runtimes that
read it. Each file in this folder that defines ``FORMAT`` is one format. Code outside this folder calls the methods of
``Format`` and never compares format names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transmla.artifacts import AttentionSpec, LayerFactors, LayerKind, MLAShape, Plan
from transmla.export.card import CardWords
from transmla.formats.model_checks import Check, absorbed_decoding
from transmla.formats.runtimes import Runtime
from transmla.registry import lookup, scan

if TYPE_CHECKING:
    from transmla.source.attention_view import AttentionView
    from transmla.source.open_source import Source


@dataclass(frozen=True)
class AttentionExport:
    """One attention layer as it is written.

    Attributes:
        tensors: the tensors of ``self_attn``, by name without a prefix, in the export's precision.
        factors: float32 factors that compute the same attention as ``tensors`` do after rounding.
        record: numbers for this layer's entry in the manifest.
    """

    tensors: dict[str, Tensor]
    factors: LayerFactors
    record: dict[str, float] = field(default_factory=dict)


class Format(ABC):
    """Abstract base class of the export formats.

    Attributes:
        name: the value of ``--format``, and of ``format`` in plans and manifests.
        summary: one line for ``--help``.
        preference: rank for ``--format auto``, which takes the highest-ranked format that can store the source.
        options: recipe fields that this format supports and other formats may not.
        norm_eps: the eps of every RMSNorm in the export; None if the norms keep the source's eps.
        input_scale: factor on the weight of each layer's input norm, which the export's projections undo.
        interleaved: whether the two rows of a rotary frequency are adjacent in the export's tensors.
        signed: whether transformers builds the export's model, so that its layers can be run and signed.
        padded_by_runtimes: whether runtimes pad the export's tensors to their kernels' widths, so that ``--pad-for``
            only chooses widths, and the export has no zeros.
        shapes_by_layer: whether layers may have different widths.
        carries_record: whether ``config.json`` may hold the manifest, for when transformers saves the export again.
    """

    name: str
    summary: str
    preference: int
    options: frozenset[str] = frozenset()
    norm_eps: float | None = None
    input_scale: float = 1.0
    interleaved: bool = False
    signed: bool = False
    padded_by_runtimes: bool = False
    shapes_by_layer: bool = False
    carries_record: bool = False

    # --- before a weight is read

    @abstractmethod
    def lacks(self, spec: AttentionSpec, kept: tuple[int, ...]) -> str | None:
        """Name a feature of the source that this format cannot store.

        Args:
            spec: the source's attention.
            kept: indices of the layers that keep the source's attention.

        Returns:
            A noun phrase such as "sliding windows"; None if the format can store everything.
        """

    @abstractmethod
    def rotary(
        self, spec: AttentionSpec, kind: LayerKind, width: int, *, custom: bool
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Choose the source frequency of each of the ``width`` / 2 rotary slots of a layer.

        Args:
            spec: the source's attention.
            kind: the kind of layer.
            width: width d_r of the rotary key.
            custom: allow rotary tables that only transformers can read.

        Returns:
            The indices into ``kind.inv_freq``, one a slot, and the ``rope_parameters`` of the export's config.

        Raises:
            TransmlaError: if the format cannot hold a rotary key of this width.
        """

    def holds_rotary(self, spec: AttentionSpec, width: int) -> bool:
        """Return whether the format can hold a rotary key of ``width`` channels for this source."""
        return True

    def notes(self, spec: AttentionSpec, shape: MLAShape, rope_parameters: Mapping[str, Any]) -> list[str]:
        """Return notes for the user on an export of this shape, one line each."""
        return []

    def attention_parameters(self, plan: Plan) -> int:
        """Return the number of weights in one attention layer of the export."""
        spec, shape = plan.spec, plan.shape
        heads, width = spec.num_attention_heads, spec.hidden_size
        query = heads * shape.qk_head_dim
        if spec.normed:
            # The source's projections stay in the export. Each head's query reads that head's normed query features;
            # the latent reads the normed keys and the values.
            inputs = width * spec.features + query * spec.head_dim
            cached = 2 * spec.num_key_value_heads * spec.head_dim * shape.cache_values
        else:
            inputs = width * query if shape.q_lora_rank is None else shape.q_lora_rank * (width + query + 1)
            cached = width * shape.cache_values
        expand = shape.kv_lora_rank * heads * (shape.qk_nope_head_dim + shape.v_head_dim)
        return inputs + cached + expand + heads * shape.v_head_dim * width

    def other_parameters(self, plan: Plan) -> int:
        """Return the number of weights outside the attention."""
        return plan.spec.other_parameters

    @abstractmethod
    def runtimes(self, plan: Plan) -> list[Runtime]:
        """List the known runtimes, with whether and how each one runs the export."""

    @abstractmethod
    def target(self, spec: AttentionSpec) -> str:
        """Describe the converted model in a few words, for ``transmla plan``."""

    # --- writing

    @abstractmethod
    def config(self, source: Any, plan: Plan) -> dict[str, Any]:
        """Return the contents of the export's ``config.json``; ``source`` is the source's transformers config."""

    @abstractmethod
    def attention(
        self, factors: LayerFactors, plan: Plan, view: AttentionView, inputs: Callable[[], Iterable[Tensor]]
    ) -> AttentionExport:
        """Convert the factors of one layer to the tensors of the export.

        Args:
            factors: the layer's factors, unpadded.
            plan: the plan for this layer alone (``Plan.at``).
            view: the source's attention; the export may need its biases, norms and sinks.
            inputs: returns the attention's calibration inputs, batches [n, T, F]; may be called several times.
        """

    def cast(self, tensor: Tensor, dtype: torch.dtype, source_dtype: torch.dtype) -> Tensor:
        """Return a tensor outside the attention as it is written, with the same shape.

        By default only tensors of the source's main precision ``source_dtype`` are cast to ``dtype``.
        """
        return tensor.to(dtype) if tensor.dtype == source_dtype else tensor

    def last_tensors(self, source: Source, plan: Plan, norm_correction: float) -> dict[str, Tensor]:
        """Return the tensors that belong neither to the embedding nor to a layer, by their names in the export.

        Args:
            source: the opened source.
            plan: the conversion's plan.
            norm_correction: factor on the last norm's weight, used by formats that set ``norm_eps``.
        """
        names, checkpoint = source.family.tensors, source.checkpoint
        layers = tuple(names["layer"].format(i=i) for i in range(source.spec.num_hidden_layers))
        dtypes = getattr(torch, plan.dtype), getattr(torch, source.dtype)
        rest = [name for name in checkpoint.shapes if name != names["embed"] and not name.startswith(layers)]
        return {name: self.cast(checkpoint.read(name), *dtypes) for name in rest}

    def write_code(self, folder: Path) -> None:
        """Write the modelling code that the export needs into ``folder``; by default none."""
        return

    @abstractmethod
    def card_words(self, spec: AttentionSpec) -> CardWords:
        """Return the model card's text on this format."""

    # --- reading back

    def load_options(self) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` that ``transmla verify`` loads the export with."""
        return {}

    @abstractmethod
    def checks(self, model: Any, tokens: Tensor, dtype: torch.dtype) -> Iterator[Check]:
        """Yield the results of this format's checks of a loaded export.

        Args:
            model: the loaded export; a check may change the model.
            tokens: a prompt [B, T].
            dtype: the export's precision.
        """

    def changed_checks(self, model: Any, tokens: Tensor, dtype: torch.dtype) -> Iterator[Check]:
        """Yield the results of the checks of an export whose weights other software has changed.

        By default, absorbed decoding is compared with a full forward pass. ``model`` stays accelerated afterwards.
        """
        yield absorbed_decoding(model, tokens, changed=True)

    def untouched(self, plan: Plan, source: Iterable[str], export: Iterable[str], *, attention: bool) -> dict[str, str]:
        """Map the export tensors that must equal a source tensor bit for bit after the cast.

        Args:
            plan: plan of the conversion.
            source: names of the source's tensors.
            export: names of the export's tensors.
            attention: whether to include tensors of ``self_attn``, which a healing changes.

        Returns:
            Export name → source name.
        """
        return {name: name for name in source if ".self_attn." not in name}

    def corrections(self, layers: Sequence[Mapping[str, Any]], final_norm: float) -> dict[str, float]:
        """Return the factor on each norm's weight that the conversion has corrected, by tensor name; by default none.

        Args:
            layers: the manifest's records of the layers.
            final_norm: factor on the last norm's weight.
        """
        return {}

    def is_natural(self, model: Any) -> bool:
        """Return whether a loaded export has no scales that ``to_natural`` could fold."""
        return False

    def measure(self, attention: nn.Module, *, watching: bool) -> None:
        """Start or stop measuring in a natural ``attention`` what ``from_natural`` needs. A start clears the past."""
        return

    def to_natural(self, attention: nn.Module, input_norm: nn.Module | None) -> None:
        """Fold extreme scales out of the weights of one ``attention`` module, in place; its output does not change.

        ``input_norm`` is the norm whose output the attention reads; None in families without one.

        Healing calls this before training; the default has no scales to fold.
        """
        return

    def from_natural(self, name: str, attention: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Restore the scales that ``to_natural`` folded, in place.

        Args:
            name: prefix of the attention's tensors in ``weights``.
            attention: the trained attention module.
            weights: the tensors to be saved, by name.
            dtype: the export's precision.
        """
        return


def formats() -> dict[str, Format]:
    """Return all formats, by name."""
    return scan("transmla.formats", "FORMAT")


def format_named(name: str) -> Format:
    """Return the format called ``name``.

    Raises:
        TransmlaError: if no format has this name.
    """
    form: Format = lookup("transmla.formats", "FORMAT", name, kind="format")
    return form
