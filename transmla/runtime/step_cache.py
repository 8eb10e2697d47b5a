"""Cache and inputs of a decode step that runs on fixed memory, so that it can be captured once and replayed.

A step with n new tokens reads its tokens, positions and number of cached rows from tensors. Each layer writes the new
rows into the buffer of a ``LatentLayer``, at an index that is computed on the device, and attends to the whole buffer
with lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.ranks import Ranks
from transmla.runtime.decode_request import STATES
from transmla.runtime.known_masks import Prompt
from transmla.runtime.latent_cache import LatentLayer
from transmla.runtime.packed_rows import pack


class StepInputs:
    """Tensors from which a step reads what changes between steps.

    Attributes:
        tokens: token ids [B, n].
        positions: positions [B, n].
        cached: number of cached tokens of each sequence before the step, [1].
        index: rows that the step writes, [n].
        lengths: number of rows of each sequence after the step, [B] with stride 0: all are equal. If several processes
            share the rows, those of this process.
        visible: whether a row may be attended to, boolean [B, 1, 1, capacity].
        masked: whether ``visible`` hides any cached row.
    """

    def __init__(
        self, batch: int, new: int, capacity: int, device: torch.device, *, masked: bool, ranks: Ranks
    ) -> None:
        """Allocate the tensors for ``batch`` sequences with ``new`` tokens and buffers of ``capacity`` rows.

        If several ``ranks`` share the rows, there is one new token, and the last row of each buffer is spare.
        """
        self.tokens = torch.zeros(batch, new, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.cached = torch.zeros(1, dtype=torch.int64, device=device)
        self.index = torch.zeros(new, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(1, dtype=torch.int32, device=device).expand(batch)
        self.visible = torch.ones(batch, 1, 1, capacity, dtype=torch.bool, device=device)
        self.masked = masked
        self._offsets = torch.arange(new, device=device)
        self._shown: Prompt | None = None
        self._ranks = ranks

    def fill(self, tokens: Tensor, positions: Tensor | None, cached: int) -> None:
        """Write the inputs of the next step.

        If there are m < n tokens, the last one is repeated. Tokens see the rows up to their own, so the repeated ones
        change nothing; the next step overwrites their rows.

        Args:
            tokens: token ids [B, m].
            positions: positions [B, m] or [1, m]; None: they follow the cached rows.
            cached: number of cached tokens of each sequence.
        """
        new = tokens.shape[1]
        if positions is None:
            positions = (self._offsets[:new] + cached)[None]
        self.cached.fill_(cached)
        for kept, given in ((self.tokens, tokens), (self.positions, positions)):
            if new == kept.shape[1]:
                kept.copy_(given)
                continue
            kept[:, :new].copy_(given)
            kept[:, new:].copy_(kept[:, new - 1 : new])

    def show(self, mask: Tensor, prompt: Prompt) -> None:
        """Write ``mask`` [B, T] to ``visible``, unless this holds a mask with the same ``prompt``: only ones follow."""
        if prompt is self._shown:
            return
        self._shown = None
        own = mask[:, None, None, self._ranks.rank :: self._ranks.size]
        self.visible[..., : own.shape[-1]].copy_(own)
        self.visible[..., own.shape[-1] :] = True
        self._shown = prompt

    def locate(self) -> None:
        """Compute ``index`` and ``lengths`` from ``cached``, on the device."""
        torch.add(self._offsets, self.cached, out=self.index)
        total, rank, size = self.cached + len(self._offsets), self._ranks.rank, self._ranks.size
        if size > 1:
            # The row of another process's token is written to the spare row, which no length reaches.
            own = self.index % size == rank
            self.index.copy_(torch.where(own, self.index // size, self.visible.shape[-1] - 1))
            total = (total + size - 1 - rank) // size
        self.lengths[:1].copy_(total)


class StepLayer(CacheLayerMixin):
    """Buffer [B, 1, capacity, r + d_r] of one layer, to which a step writes its rows.

    Methods that would return a number of the host raise an error: a captured step would repeat that number.

    Attributes:
        rows: the buffer.
        lengths: number of valid rows of each sequence during the step, [B].
        mask: boolean [B, 1, 1, capacity]; None if no cached row is hidden.
        ranks: the processes that share the rows.
        pe_dtype: dtype of the rotary keys in packed rows; None if rows are plain.
    """

    is_sliding = False

    def __init__(self, layer: LatentLayer, inputs: StepInputs) -> None:
        super().__init__()
        self.rows, self.ranks = layer.buffer(), layer.ranks
        self.pe_dtype = layer.pe_dtype if layer.packed else None
        self.lengths = inputs.lengths
        self.mask = inputs.visible if inputs.masked else None
        self.is_initialized = True
        self._index = inputs.index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write latents [B, 1, n, r] and rotary keys [B, 1, n, d_r], and return both parts of the whole buffer.

        Packed rows are one part, and the other part has no columns.
        """
        if self.pe_dtype is not None:
            key_states = pack(key_states, value_states.to(self.pe_dtype))
            value_states = key_states[..., :0]
        latents, rotary = self.rows.split([key_states.shape[-1], value_states.shape[-1]], -1)
        latents.index_copy_(2, self._index, key_states.to(latents.dtype))
        rotary.index_copy_(2, self._index, value_states.to(rotary.dtype))
        return latents, rotary

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the buffer exists."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Raise an error: the mask is an input of the step."""
        raise RuntimeError("the model builds its own mask in a decode step")

    def get_seq_length(self) -> int:
        """Raise an error: the number of rows is on the device."""
        raise RuntimeError("the model reads the length of the cache in a decode step")

    def get_max_length(self) -> int:
        """Return the capacity of the buffer."""
        return self.rows.shape[2]


class StepCache(Cache):
    """Cache of one step: the buffers of ``layers``, and ``inputs`` that locate the new rows in them."""

    def __init__(self, layers: list[LatentLayer], inputs: StepInputs) -> None:
        super().__init__(layers=[StepLayer(layer, inputs) for layer in layers])


class Step:
    """One decode step on fixed memory: call ``inputs.fill``, then ``run``, then read ``output``.

    Attributes:
        rows: buffers of the layers; the step is valid as long as the cache has these.
        inputs: see ``StepInputs``.
        output: the model's output, whose cache is the step's own.
        replay: repeats the step; None before the capture.
    """

    def __init__(self, layers: list[LatentLayer], batch: int, new: int, *, masked: bool, states: bool = False) -> None:
        """Prepare a step for ``batch`` sequences with ``new`` tokens each.

        Args:
            layers: layers of the cache, with room for the new rows.
            batch: B.
            new: n.
            masked: whether the attention mask hides a cached row.
            states: whether the output has the hidden states of all layers.
        """
        self.rows = [layer.buffer() for layer in layers]
        buffer, ranks = self.rows[0], layers[0].ranks
        self.inputs = StepInputs(batch, new, buffer.shape[2], buffer.device, masked=masked, ranks=ranks)
        self._arguments: dict[str, Any] = {
            "input_ids": self.inputs.tokens,
            "position_ids": self.inputs.positions,
            # Models pass a mask with four dimensions on, and build one from any other.
            "attention_mask": self.inputs.visible,
            "use_cache": True,
            "return_dict": True,
            CACHE_ARGUMENT: StepCache(layers, self.inputs),
        }
        if states:
            self._arguments[STATES] = True
        self.output: Any = None
        self.replay: Any = None

    @property
    def capacity(self) -> int:
        """Rows of each sequence in the buffers."""
        return self.rows[0].shape[2]

    def run(self, forward: Any, model: Any) -> None:
        """Run ``forward`` of ``model`` on the fixed memory."""
        self.inputs.locate()
        self.output = forward(model, **self._arguments)

    def result(self, cache: Cache, new: int, keep: int) -> Any:
        """Return a copy of ``output`` with ``cache`` as its cache. The next run overwrites ``output``.

        Args:
            cache: the cache to return.
            new: number of tokens m that ``inputs.fill`` was given.
            keep: number of the last logits to return; 0 for all m.

        Raises:
            TypeError: if ``output`` holds more than the cache and tensors of all tokens.
        """
        fields: dict[str, Any] = {}
        width = self.inputs.tokens.shape[1]
        for name, value in self.output.items():
            if name == CACHE_ARGUMENT:
                fields[name] = cache
                continue
            parts = value if name == "hidden_states" else (value,)
            if not all(isinstance(part, Tensor) and part.ndim == 3 and part.shape[1] == width for part in parts):
                raise TypeError(f"the model's output has {name}")
            first = -keep if name == "logits" else 0
            copies = tuple(part[:, :new][:, first:].clone() for part in parts)
            fields[name] = copies if name == "hidden_states" else copies[0]
        return type(self.output)(**fields)
