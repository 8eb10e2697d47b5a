"""Run one source layer over the calibration hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import AttentionSpec, LayerFactors, LayerWeights, ScoreRules
from transmla.convert.streams import empty_like
from transmla.core.fused_attention import attended_heads, fused_attention
from transmla.families.base import Family
from transmla.ranks import Ranks
from transmla.source.attention_view import AttentionView, Heads, halves_order
from transmla.source.decoder_layer import attention_input, layer_with, run_layer
from transmla.token_split import TokenSplit

# Approximate number of tokens that a layer processes at once.
TOKENS_PER_STEP = 4096


class SourceLayer:
    """A decoder layer of the source, whose weights are loaded by ``load``.

    The layer runs with the source's attention or with MLA factors. Its hidden states are always float32.

    Attributes:
        module: transformers' decoder layer.
        view: the features and weights of its attention.
        spec: the source's attention at this layer.
        inv_freq: rotary frequencies [p], in radians per position.
        place: the layer in words, for errors.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        spec: AttentionSpec,
        device: torch.device,
        *,
        half: bool = False,
        norm_eps: float | None = None,
        ranks: Ranks | None = None,
        folder: Path | None = None,
    ) -> None:
        """Prepare for layers of one source.

        Args:
            model: the source's model without weights.
            family: the source's family.
            spec: the source's attention.
            device: the device that the layer runs on.
            half: multiply matrices in bfloat16.
            norm_eps: eps of the export's norms; None if the export keeps the source's eps.
            ranks: processes that share the calibration text; each runs the layer over its own sequences. None: one.
            folder: folder for the hidden states after a layer; None keeps them in memory (``streams.empty_like``).
        """
        self.norm_eps, self.folder = norm_eps, folder
        self.ranks = ranks or Ranks()
        self.model, self.family, self.source_spec = model, family, spec
        self.device, self.half = device, half

    def load(self, tensors: dict[str, Tensor], index: int) -> None:
        """Load the weights of layer ``index``.

        Args:
            tensors: the layer's tensors, by name without the layer's prefix.
            index: index of the layer.

        Raises:
            TransmlaError: if ``tensors`` are not exactly the tensors of this layer.
        """
        dtype = torch.bfloat16 if self.half else torch.float32
        # Before there are two layers in memory.
        self.__dict__.pop("module", None)
        self.__dict__.pop("view", None)
        on_device = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.module: Any = layer_with(self.model, index, on_device, dtype).to(self.device)
        for norm in self.module.modules():
            if isinstance(norm, torch.nn.LayerNorm):
                # Unlike the families' RMSNorms, LayerNorm refuses float32 inputs with bfloat16 weights.
                norm.float()
        self.place = f"layer {index}"
        self.spec, kind = self.source_spec.at(index), self.source_spec.kind(index)
        self.inv_freq = torch.tensor(kind.inv_freq, dtype=torch.float32, device=self.device)
        attention, spec = self.module.self_attn, self.spec
        order = halves_order(spec.head_dim, 2 * kind.rotary_pairs, interleaved=self.family.interleaved)
        rules = ScoreRules(kind.window, kind.softcap, getattr(attention, "sinks", None))
        counts = spec.num_attention_heads, spec.num_key_value_heads
        heads = Heads(*counts, spec.head_dim, order, 2 * kind.rotary_pairs, kind.rotary_factor)
        self.view = AttentionView(attention, heads, rules)

    def weights(self) -> LayerWeights:
        """Return the attention weights by head, float32, as maps of ``features``."""
        return self.view.weights()

    @torch.no_grad()
    def features(self, hidden: Tensor) -> Tensor:
        """Return the features that the attention's weights read, for ``hidden`` states; [N, T, D] → [N, T, F]."""
        return self._features(attention_input(self.module, hidden.to(self.device)))

    def run(
        self,
        hidden: Tensor,
        factors: LayerFactors | None = None,
        *,
        positions: Tensor | None = None,
        through_mlp: bool = True,
        split: TokenSplit | None = None,
    ) -> Tensor:
        """Run the layer; [N, T, D] → [N, T, D].

        Args:
            hidden: hidden states that enter the layer.
            factors: MLA factors for the attention; None runs the source's attention.
            positions: increasing positions [T] of the tokens; None means 0 to T − 1. A layer with a window reads no
                others, because its window counts tokens.
            through_mlp: run the whole layer; otherwise return the hidden states after the attention.
            split: which tokens of a sequence these are, if several processes share its tokens.
        """
        if self.view.rules.window is not None:
            positions = None
        if split is not None and positions is None:
            positions = split.positions(hidden.device)
        attend = partial(self._attend, factors=factors, positions=positions, split=split)
        with self.precision():
            return run_layer(self.module, hidden, attend, until=None if through_mlp else self.family.after_attention)

    def _attend(
        self, x: Tensor, factors: LayerFactors | None, positions: Tensor | None, split: TokenSplit | None
    ) -> Tensor:
        """Return the attention's output for its input ``x``; [N, T, D] → [N, T, D]."""
        features, output = self._features(x), self.module.self_attn.o_proj
        if factors is None:
            return self.source_output(features, positions, split)
        mixed = fused_attention(features, factors, positions, split, self.view.own)
        return mixed if output.bias is None else mixed + output.bias

    def source_output(
        self, features: Tensor, positions: Tensor | None = None, split: TokenSplit | None = None
    ) -> Tensor:
        """Return the source attention's output for its ``features``; [N, T, F] → [N, T, D]."""
        spec, (q, k, v) = self.spec, self.view.heads_of(features)
        gain = spec.attention_factor**2
        mixed = attended_heads(
            q,
            k,
            v,
            self.inv_freq,
            scaling=spec.scaling,
            gain=gain,
            rules=self.view.rules,
            positions=positions,
            split=split,
        )
        return self.module.self_attn.o_proj(mixed)  # type: ignore[no-any-return]

    def _features(self, x: Tensor) -> Tensor:
        """Return the features of the attention's input ``x``; [N, T, D] → [N, T, F]."""
        with self.precision():
            return self.view.features(x).to(x.dtype)

    def precision(self) -> torch.autocast:
        """Return a context that multiplies in bfloat16 if ``half`` is set."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    @torch.no_grad()
    def run_stream(self, stream: Tensor, factors: LayerFactors | None) -> tuple[Tensor, Tensor]:
        """Run the layer over hidden states, a few sequences at a time.

        Args:
            stream: hidden states [N, T, D] that enter the layer.
            factors: MLA factors for the attention; None runs the source's attention.

        Returns:
            E[x xᵀ] [F, F] of the attention's features, float64, and the hidden states [N, T, D] after the layer.
        """
        width = self.view.width
        moment = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        following = empty_like(stream, self.device, self.folder)
        for start, part in steps(stream, self.ranks):
            hidden = part.to(self.device)
            x = self.features(hidden).flatten(0, 1)
            moment += self.moment(x)
            following[start : start + len(hidden)].copy_(self.run(hidden, factors))
        self.ranks.add_up(moment)
        self.ranks.complete(following, self.device)
        return moment / (stream.shape[0] * stream.shape[1]), following

    def moment(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return Σ weight·x xᵀ [F, F] in float64, for features ``x`` [n, F] and, if not all are 1, weights [n]."""
        with self.fast_products():
            return ((x if weight is None else x * weight[:, None]).mT @ x).double()

    @contextmanager
    def fast_products(self) -> Iterator[None]:
        """Multiply float32 matrices in TF32 during the context, on a GPU that runs the source in bfloat16.

        TF32 is several times as fast as float32, and has three bits more than bfloat16.
        """
        precision = torch.get_float32_matmul_precision()
        if self.half and self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def steps(stream: Tensor, ranks: Ranks | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, sequences [n, T, ...]) for consecutive groups of ``stream`` [N, T, ...].

    Each group has about TOKENS_PER_STEP tokens, and at least one sequence. With ``ranks``, the groups are only those of
    this process's share of the sequences.
    """
    size, share = max(1, TOKENS_PER_STEP // stream.shape[1]), (ranks or Ranks()).share(len(stream))
    for start in range(share.start, share.stop, size):
        yield start, stream[start : min(start + size, share.stop)]
