"""SGLang's model classes with latent attention inside, one for each served family. Only SGLang imports this file.

Each class derives from SGLang's own class of the family and replaces the attention of its layers by SGLang's attention
of DeepSeek-V3, which chooses the kernels.

Shapes: T tokens, D hidden size, H heads of one device, F features that a row of the cache is computed from. R, D_R,
D_N, D_V are the padded widths of latent, rotary key, other key channels and value.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA
from sglang.srt.runtime_context import get_parallel
from torch import Tensor, nn

from transmla.formats.serve_limits import SERVED
from transmla.serve.family_config import architecture, widths_of
from transmla.serve.modules import PerHead, Rotary
from transmla.serve.widen import widened

# Places in a served attention of the modules of a family that normalises queries and keys.
NORMED_NAMES = {
    "q_proj": "q_proj.plain",
    "q_norm": "q_proj.norm",
    "q_b_proj": "q_proj.expand",
    "k_proj": "kv_a_proj_with_mqa.key",
    "k_norm": "kv_a_proj_with_mqa.norm",
    "v_proj": "kv_a_proj_with_mqa.value",
    "kv_a_proj_with_mqa": "kv_a_proj_with_mqa.rows",
}


class NormedQuery(nn.Module):
    """Queries of a family that normalises them, [T, D] → [T, H · (D_N + D_R)].

    Args:
        plain: the family's projection of the queries.
        norm: the family's norm of one head's query.
        expand: map from one head's normed query to its latent query.
    """

    def __init__(self, plain: Any, norm: Any, expand: PerHead) -> None:
        super().__init__()
        self.plain, self.norm, self.expand = plain, norm, expand

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """Return the queries [T, H · (D_N + D_R)] of ``hidden_states`` [T, D]."""
        query = self.plain(hidden_states)[0].unflatten(-1, (self.expand.heads, -1))
        return self.expand(self.norm(query)).flatten(1), None


class NormedRows(nn.Module):
    """Cached rows of a family that normalises keys, [T, D] → [T, R + D_R].

    Args:
        key, value: the family's projections of keys and values, for all heads.
        norm: the family's norm of one head's key.
        width: channels of one head's key.
        rows: map from normed keys and values [T, F] to the rows.
    """

    def __init__(self, key: Any, value: Any, norm: Any, width: int, rows: Any) -> None:
        super().__init__()
        self.key, self.value, self.norm, self.rows = key, value, norm, rows
        self.width = width

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """Return the rows [T, R + D_R] of ``hidden_states`` [T, D]."""
        key = self.key(hidden_states)[0].unflatten(-1, (-1, self.width))
        features = torch.cat([self.norm(key).flatten(1), self.value(hidden_states)[0]], -1)
        return self.rows(features)[0], None


class LatentAttention(DeepseekV2AttentionMLA):  # type: ignore[misc]
    """DeepSeek-V3's attention with an export's biases, norms, rotary frequencies and scale.

    Args:
        plain: SGLang's attention of the family.
        kind: the layer's entry in the config's ``mla["kinds"]``.
        config: the config of ``served_config``.
        layer: index of the layer.
        quant_config: SGLang's quantisation of the weights.
    """

    def __init__(self, plain: Any, kind: Mapping[str, Any], config: Any, layer: int, quant_config: Any) -> None:
        widths, prefix = widths_of(config), f"model.layers.{layer}.self_attn"
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=plain.total_num_heads,
            qk_nope_head_dim=widths.nope,
            qk_rope_head_dim=widths.rotary,
            v_head_dim=widths.value,
            q_lora_rank=None,
            kv_lora_rank=widths.latent,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=quant_config,
            reduce_results=plain.o_proj.reduce_results,
            layer_id=layer,
            prefix=prefix,
            skip_rope=True,
        )
        self.scaling = self.attn_mqa.scaling = self.attn_mha.scaling = plain.scaling
        self.rotary_emb = Rotary(kind, widths.rotary)
        self.kv_a_layernorm = nn.Identity()
        parallel = get_parallel()
        shared = {"tp_rank": parallel.attn_tp_rank, "tp_size": parallel.attn_tp_size}

        def options(name: str, bias: bool) -> dict[str, Any]:
            return {"bias": bias, "quant_config": quant_config, "prefix": f"{prefix}.{name}"}

        hidden, heads, biased = config.hidden_size, plain.total_num_heads, plain.qkv_proj.bias is not None
        head, row = widths.nope + widths.rotary, widths.latent + widths.rotary
        if hasattr(plain, "q_norm"):
            width, keys = plain.head_dim, plain.total_num_kv_heads * plain.head_dim
            self.q_proj = NormedQuery(
                ColumnParallelLinear(hidden, heads * width, **options("q_proj.plain", biased), **shared),
                plain.q_norm,
                PerHead(self.num_local_heads, width, head, lambda: parallel.attn_tp_rank),
            )
            self.kv_a_proj_with_mqa = NormedRows(
                ReplicatedLinear(hidden, keys, **options("kv_a_proj_with_mqa.key", biased)),
                ReplicatedLinear(hidden, keys, **options("kv_a_proj_with_mqa.value", biased)),
                plain.k_norm,
                width,
                ReplicatedLinear(2 * keys, row, **options("kv_a_proj_with_mqa.rows", False)),
            )
        elif biased:
            self.q_proj = ColumnParallelLinear(hidden, heads * head, **options("q_proj", True), **shared)
            self.kv_a_proj_with_mqa = ReplicatedLinear(hidden, row, **options("kv_a_proj_with_mqa", True))
        if plain.o_proj.bias is not None:
            reduced = {"reduce_results": plain.o_proj.reduce_results}
            self.o_proj = RowParallelLinear(
                heads * widths.value, hidden, **options("o_proj", True), **reduced, **shared
            )

    def absorb(self) -> None:
        """Split the loaded ``kv_b_proj`` into the two factors that SGLang multiplies queries and outputs with."""
        heads = self.kv_b_proj.weight.unflatten(0, (self.num_local_heads, -1))
        keys, values = heads.split([self.qk_nope_head_dim, self.v_head_dim], 1)
        # The memory layouts of SGLang's own loader: [H, D_N, R] with D_N contiguous, [H, R, D_V] with R contiguous.
        self.w_kc = keys.transpose(1, 2).contiguous().transpose(1, 2)
        self.w_vc = values.contiguous().transpose(1, 2)

    def forward(self, positions: Tensor, hidden_states: Tensor, forward_batch: Any) -> Tensor:
        """Attend with the tokens of ``hidden_states`` [T, D] at ``positions`` [T] to the cache."""
        # Only weights in float8 need SGLang's allocator of zeros.
        return super().forward(positions, hidden_states, forward_batch, zero_allocator=None)  # type: ignore[no-any-return]


class Latent:
    """Mixin placed before SGLang's class of a family; replaces the attention of the layers once the model is built."""

    def __init__(self, config: Any, quant_config: Any = None, **kwargs: Any) -> None:
        super().__init__(config, quant_config=quant_config, **kwargs)  # type: ignore[call-arg]
        self.latent: list[LatentAttention] = []
        self.normed = False
        for i, layer in enumerate(self.model.layers):  # type: ignore[attr-defined]
            plain = getattr(layer, "self_attn", None)
            if plain is None:  # a layer of another pipeline stage
                continue
            kind = config.mla["kinds"][config.mla["layers"][i]]
            layer.self_attn = LatentAttention(plain, kind, config, i, quant_config)
            self.latent.append(layer.self_attn)
            self.normed = hasattr(plain, "q_norm")
        self.mla, self.widths = config.mla, widths_of(config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        """Load the tensors of an export, padded to the served widths."""
        names = NORMED_NAMES if self.normed else {}
        padded = widened(weights, self.mla, self.widths, normed=self.normed, names=names)
        loaded = super().load_weights(self._others(padded), *args, **kwargs)  # type: ignore[misc]
        for attention in self.latent:
            attention.absorb()
        return loaded

    def _others(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Load the tensors of the attention, and yield the others. SGLang's loaders would fuse queries and keys."""
        parameters = dict(self.named_parameters())  # type: ignore[attr-defined]
        for name, tensor in tensors:
            if ".self_attn." not in name:
                yield name, tensor
            elif name in parameters:  # not in another pipeline stage
                parameter = parameters[name]
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)


@cache
def model_classes() -> dict[str, type[nn.Module]]:
    """Return SGLang's model classes with latent attention, by architecture."""
    made = {}
    for family, (module, name) in SERVED.items():
        plain = getattr(importlib.import_module(f"sglang.srt.models.{module}"), name)
        made[architecture(family)] = type(architecture(family), (Latent, plain), {"__module__": __name__})
    return made
