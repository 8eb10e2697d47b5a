"""vLLM's model classes with latent attention inside, one for each served family. Only vLLM imports this file.

``TransmlaLlamaForCausalLM`` and the others are created when vLLM asks for them: each derives from vLLM's own class of
the family and replaces the attention of its layers.

Shapes: T tokens, D hidden size, H heads of one device, F features that a row of the cache is computed from. R, D_R,
D_N, D_V are the padded widths of latent, rotary key, other key channels and value.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.mla import MLAModules, MultiHeadLatentAttentionWrapper

from transmla.formats.serve_limits import SERVED, Widths
from transmla.serve.family_config import architecture, widths_of
from transmla.serve.modules import PerHead, Rotary
from transmla.serve.widen import widened


class LatentAttention(nn.Module):
    """Latent attention over vLLM's cache of latent rows; replaces the attention of one layer.

    Args:
        plain: vLLM's attention of the family.
        kind: the layer's entry in the config's ``mla["kinds"]``.
        vllm_config: vLLM's settings, with the config of ``served_config``.
        prefix: name of the module in the model.
    """

    def __init__(self, plain: Any, kind: Mapping[str, Any], vllm_config: Any, prefix: str) -> None:
        super().__init__()
        config, quant = vllm_config.model_config.hf_config, vllm_config.quant_config
        widths, hidden, heads = widths_of(config), config.hidden_size, plain.total_num_heads
        biased, width = plain.qkv_proj.bias is not None, plain.head_dim
        self.normed, self.heads, self.width = hasattr(plain, "q_norm"), plain.num_heads, width
        head, row = widths.nope + widths.rotary, widths.latent + widths.rotary

        def linear(kind: type, name: str, *sizes: int, bias: bool) -> Any:
            return kind(*sizes, bias=bias, quant_config=quant, prefix=f"{prefix}.{name}")

        column, replicated = partial(linear, ColumnParallelLinear), partial(linear, ReplicatedLinear)
        if self.normed:
            self.query = column("query", hidden, heads * width, bias=biased)
            self.key = replicated("key", hidden, plain.total_num_kv_heads * width, bias=biased)
            self.value = replicated("value", hidden, plain.total_num_kv_heads * width, bias=biased)
            self.q_norm, self.k_norm = plain.q_norm, plain.k_norm
            self.q_b_proj = PerHead(plain.num_heads, width, head, get_tensor_model_parallel_rank)
            features = 2 * plain.total_num_kv_heads * width
        else:
            self.query = column("query", hidden, heads * head, bias=biased)
            features = hidden
        self.kv_a_proj_with_mqa = replicated("kv_a_proj_with_mqa", features, row, bias=biased and not self.normed)
        self.kv_b_proj = column("kv_b_proj", widths.latent, heads * (widths.nope + widths.value), bias=False)
        self.o_proj = linear(
            RowParallelLinear, "o_proj", heads * widths.value, hidden, bias=plain.o_proj.bias is not None
        )
        self.latent = self._wrapped(Rotary(kind, widths.rotary), widths, plain.scaling, vllm_config, prefix)

    def _wrapped(self, rotary: Rotary, widths: Widths, scaling: float, vllm_config: Any, prefix: str) -> Any:
        """Return vLLM's MLA over the projections of this module."""
        modules = MLAModules(
            kv_a_layernorm=nn.Identity(),
            kv_b_proj=self.kv_b_proj,
            rotary_emb=rotary,
            o_proj=self.o_proj,
            fused_qkv_a_proj=None,
            kv_a_proj_with_mqa=self._rows if self.normed else self.kv_a_proj_with_mqa,
            q_a_layernorm=None,
            q_b_proj=None,
            q_proj=self._queries if self.normed else self.query,
            indexer=None,
            is_sparse=False,
            topk_indices_buffer=None,
        )
        return MultiHeadLatentAttentionWrapper(
            hidden_size=vllm_config.model_config.hf_config.hidden_size,
            num_heads=self.heads,
            scale=scaling,
            qk_nope_head_dim=widths.nope,
            qk_rope_head_dim=widths.rotary,
            v_head_dim=widths.value,
            q_lora_rank=None,
            kv_lora_rank=widths.latent,
            mla_modules=modules,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )

    def _queries(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """Return queries [T, H · (D_N + D_R)] of ``hidden_states`` [T, D] from the normed queries."""
        query = self.query(hidden_states)[0].unflatten(-1, (-1, self.width))
        return self.q_b_proj(self.q_norm(query)).flatten(1), None

    def _rows(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """Return cached rows [T, R + D_R] of ``hidden_states`` [T, D] from the normed keys and the values."""
        key = self.key(hidden_states)[0].unflatten(-1, (-1, self.width))
        features = torch.cat([self.k_norm(key).flatten(1), self.value(hidden_states)[0]], -1)
        return self.kv_a_proj_with_mqa(features)[0], None

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attend with the tokens of ``hidden_states`` [T, D] at ``positions`` [T] to the cache."""
        return self.latent(positions, hidden_states)  # type: ignore[no-any-return]


class Latent:
    """Mixin placed before vLLM's class of a family; replaces the attention of the layers once the model is built."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        built = vllm_config.compilation_config.static_forward_context
        self.normed = False
        for i, layer in enumerate(self.model.layers):  # type: ignore[attr-defined]
            plain = getattr(layer, "self_attn", None)
            if plain is None:  # a layer of another pipeline stage
                continue
            # vLLM allows one attention of a name.
            name = plain.attn.layer_name
            del built[name]
            kind = config.mla["kinds"][config.mla["layers"][i]]
            layer.self_attn = LatentAttention(plain, kind, vllm_config, name.removesuffix(".attn"))
            self.normed = layer.self_attn.normed
        self.mla, self.widths = config.mla, widths_of(config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the tensors of an export, padded to the served widths, and return the names that were loaded."""
        padded = widened(weights, self.mla, self.widths, normed=self.normed)
        return super().load_weights(padded)  # type: ignore[misc,no-any-return]


@cache
def model_class(family: str) -> type[nn.Module]:
    """Return vLLM's model class of ``family`` with latent attention."""
    module, name = SERVED[family]
    plain = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    return type(architecture(family), (Latent, plain), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """Return the model class that vLLM looks up by ``name``."""
    for family in SERVED:
        if architecture(family) == name:
            return model_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
