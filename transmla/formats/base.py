"""The contract of an export format.

A format decides how a converted model is stored: the names and layout of its tensors, its config, and which runtimes
read it. One file in this folder that defines ``FORMAT`` is one format. Code outside this folder never asks which it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transmla.artifacts import AttentionSpec, LayerFactors, LayerKind, MLAShape, Plan
from transmla.export.card import CardWords
from transmla.formats.model_checks import Check
from transmla.formats.runtimes import Runtime
from transmla.registry import lookup, scan

if TYPE_CHECKING:
    from transmla.source.attention_view import AttentionView
    from transmla.source.open_source import Source


@dataclass(frozen=True)
class AttentionExport:
    """One attention as it is written.

    ``tensors`` are those of ``self_attn``, named without a prefix. ``factors`` (float32) are the factors that these
    rounded tensors stand for. ``record`` holds numbers for the manifest.
    """

    tensors: dict[str, Tensor]
    factors: LayerFactors
    record: dict[str, float] = field(default_factory=dict)


class Format(ABC):
    """How exports are stored.

    Attributes:
        name: the value of ``--format``, and of ``format`` in plans and manifests.
        summary: one line for ``--help``.
        preference: ``--format auto`` takes the format with the highest preference that lacks nothing.
        options: fields of the recipe that this format can honour and others may not.
        norm_eps: the eps that every RMSNorm of the export uses; None if the norms keep the source's.
        interleaved: whether the two rows of a rotary frequency stand side by side in the export's tensors.
    """

    name: str
    summary: str
    preference: int
    options: frozenset[str] = frozenset()
    norm_eps: float | None = None
    interleaved: bool = False

    # --- before a weight is read

    @abstractmethod
    def lacks(self, spec: AttentionSpec, kept: tuple[int, ...]) -> str | None:
        """Name what the source has and this format cannot store; None if it can store everything.

        ``kept`` lists the layers that keep the source's attention.
        """

    @abstractmethod
    def rotary(
        self, spec: AttentionSpec, kind: LayerKind, width: int, *, custom: bool
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Choose the source frequency of each of the ``width`` / 2 rotary slots of a layer of this ``kind``.

        Returns the indices into ``kind.inv_freq``, and the ``rope_parameters`` of the export's config. ``custom``
        allows tables that only transformers reads.

        Raises:
            TransmlaError: if the format cannot hold a rotary key of this width.
        """

    def holds_rotary(self, spec: AttentionSpec, width: int) -> bool:
        """Whether the source's frequencies fit a rotary key of this width."""
        return True

    def notes(self, spec: AttentionSpec, shape: MLAShape, rope_parameters: Mapping[str, Any]) -> list[str]:
        """What a user should know of an export of this shape, one line each."""
        return []

    def attention_parameters(self, plan: Plan) -> int:
        """Number of weights in one attention of the export."""
        spec, shape = plan.spec, plan.shape
        heads, width = spec.num_attention_heads, spec.hidden_size
        query = heads * shape.qk_head_dim
        if spec.normed:
            # The source's projections stay; queries are read from their own heads, latents from keys and values.
            inputs = width * spec.features + query * spec.head_dim
            cached = 2 * spec.num_key_value_heads * spec.head_dim * shape.cache_values
        else:
            inputs = width * query if shape.q_lora_rank is None else shape.q_lora_rank * (width + query + 1)
            cached = width * shape.cache_values
        expand = shape.kv_lora_rank * heads * (shape.qk_nope_head_dim + shape.v_head_dim)
        return inputs + cached + expand + heads * shape.v_head_dim * width

    def other_parameters(self, plan: Plan) -> int:
        """Number of weights outside the attention."""
        return plan.spec.other_parameters

    @abstractmethod
    def runtimes(self, plan: Plan) -> list[Runtime]:
        """Which runtimes take the export, and how."""

    @abstractmethod
    def target(self, spec: AttentionSpec) -> str:
        """What the converted model is, in a few words."""

    # --- writing

    @abstractmethod
    def config(self, source: Any, plan: Plan) -> dict[str, Any]:
        """The ``config.json`` of the export; ``source`` is the source's transformers config."""

    @abstractmethod
    def attention(
        self, factors: LayerFactors, plan: Plan, view: AttentionView, inputs: Callable[[], Iterable[Tensor]]
    ) -> AttentionExport:
        """Turn the ``factors`` of one layer into the tensors of the export.

        Args:
            factors: of the layer, unpadded.
            plan: for this layer alone (``Plan.at``).
            view: the source's attention, whose biases, norms and sinks the export may need.
            inputs: yields the attention's calibration inputs [n, T, F]; may be called several times.
        """

    def cast(self, tensor: Tensor, dtype: torch.dtype, source_dtype: torch.dtype) -> Tensor:
        """A tensor outside the attention as it is written: cast only if it has the source's main dtype."""
        return tensor.to(dtype) if tensor.dtype == source_dtype else tensor

    def last_tensors(self, source: Source, plan: Plan, norm_correction: float) -> dict[str, Tensor]:
        """All tensors that belong neither to the embedding nor to a layer.

        ``norm_correction`` multiplies the last norm's weight in formats that set ``norm_eps``.
        """
        names, checkpoint = source.family.tensors, source.checkpoint
        layers = tuple(names["layer"].format(i=i) for i in range(source.spec.num_hidden_layers))
        dtypes = getattr(torch, plan.dtype), getattr(torch, source.dtype)
        rest = [name for name in checkpoint.shapes if name != names["embed"] and not name.startswith(layers)]
        return {name: self.cast(checkpoint.read(name), *dtypes) for name in rest}

    def write_code(self, folder: Path) -> None:
        """Write the modelling code that the export brings along, if any."""
        return

    @abstractmethod
    def card_words(self, spec: AttentionSpec) -> CardWords:
        """What the model card says of the format."""

    # --- reading back

    def load_options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` with which ``transmla verify`` loads the export."""
        return {}

    @abstractmethod
    def checks(self, model: Any, tokens: Tensor, dtype: torch.dtype) -> Iterator[Check]:
        """Checks of a loaded export that only this format has; ``tokens`` [B, T] is a prompt. May change ``model``."""

    def untouched(self, source: Iterable[str], export: Iterable[str], *, tied: bool) -> dict[str, str]:
        """Export tensors that equal a source tensor bit for bit after the cast, as export name → source name.

        ``tied``: the source's head is its embedding.
        """
        return {name: name for name in source if ".self_attn." not in name}

    def to_natural(self, attention: nn.Module) -> None:
        """Take scales out of an export's ``attention`` that no optimiser could train through, in place."""
        return

    def from_natural(self, name: str, attention: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Put these scales back into ``weights``, which holds the tensors of the attention called ``name``."""
        return


def formats() -> dict[str, Format]:
    """All formats by name."""
    return scan("transmla.formats", "FORMAT")


def format_named(name: str) -> Format:
    """The format called ``name``.

    Raises:
        TransmlaError: if there is none.
    """
    found: Format = lookup("transmla.formats", "FORMAT", name, kind="format")
    return found
