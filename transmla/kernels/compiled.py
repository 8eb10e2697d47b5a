"""Decode kernels as operators that torch.compile takes for one step, without looking inside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from transmla.kernels import Backend, backends


@dataclass(frozen=True)
class Compilable:
    """A backend's ``decode`` that may be called in compiled code; without compilation, nothing is between."""

    name: str

    def __call__(self, *tensors: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return _operator(self.name)(*tensors, **settings)  # type: ignore[no-any-return]
        return backends()[self.name].decode(*tensors, **settings)


def compilable(backend: Backend) -> Any:
    """What a model calls to decode with ``backend``."""
    if not backend.by_hand:
        return backend.decode
    _operator(backend.name)
    return Compilable(backend.name)


@cache
def _operator(name: str) -> Any:
    decode = backends()[name].decode

    def run(
        q_latent: Tensor,
        q_pe: Tensor,
        kv_c: Tensor,
        k_pe: Tensor,
        scaling: float,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        block_table: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return decode(q_latent, q_pe, kv_c, k_pe, scaling=scaling, mask=mask, lengths=lengths, block_table=block_table)

    def shapes(q_latent: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q_latent, memory_format=torch.contiguous_format), q_latent.new_empty(
            q_latent.shape[:3], dtype=torch.float32
        )

    operator = torch.library.custom_op(f"transmla::decode_{name}", run, mutates_args=(), schema=_SCHEMA)
    operator.register_fake(shapes)
    return operator


_SCHEMA = (
    "(Tensor q_latent, Tensor q_pe, Tensor kv_c, Tensor k_pe, float scaling, Tensor? mask=None, "
    "Tensor? lengths=None, Tensor? block_table=None) -> (Tensor, Tensor)"
)
