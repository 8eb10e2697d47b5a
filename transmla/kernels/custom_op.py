"""Decode kernels wrapped as operators, each of which torch.compile records as one step without tracing into it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from transmla.kernels import Backend, backends
from transmla.kernels.rows import Rows, Scores

_SCHEMA = (
    "(Tensor q_latent, Tensor q_pe, float scaling, Tensor? mask, float? softcap, "
    "Tensor kv_c, Tensor k_pe, Tensor? scale, Tensor? lengths, Tensor? block_table) -> (Tensor, Tensor)"
)


class Compilable:
    """``Decode`` function of the backend called ``name``, usable in compiled code.

    Compiled code calls one operator. Eager code calls the backend's ``decode`` directly.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.decode = backends()[name].decode
        self.operator = _operator(name)

    def __call__(self, q_latent: Tensor, q_pe: Tensor, rows: Rows, scores: Scores) -> tuple[Tensor, Tensor]:
        """Attend with ``q_latent`` [B, n, H, r] and ``q_pe`` [B, n, H, d_r] to ``rows``, as ``Decode`` defines."""
        if torch.compiler.is_compiling():
            parts = rows.kv_c, rows.k_pe, rows.scale, rows.lengths, rows.block_table
            return self.operator(q_latent, q_pe, scores.scaling, scores.mask, scores.softcap, *parts)
        with current_device(q_latent.device):
            return self.decode(q_latent, q_pe, rows, scores)

    def __reduce__(self) -> Any:
        return Compilable, (self.name,)


def compilable(backend: Backend) -> Any:
    """Return the ``Decode`` function of ``backend`` in a form that torch.compile can handle."""
    return Compilable(backend.name) if backend.opaque_to_compile else backend.decode


def current_device(device: torch.device) -> Any:
    """Context in which ``device`` is the current one: kernels launch there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _operator(name: str) -> Any:
    """Register the operator ``transmla::decode_<name>`` and return it."""
    decode = backends()[name].decode

    def run(
        q_latent: Tensor, q_pe: Tensor, scaling: float, mask: Tensor | None, softcap: float | None, *rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        with current_device(q_latent.device):
            return decode(q_latent, q_pe, Rows(*rows), Scores(scaling, mask, softcap))

    def shapes(q_latent: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        lse = q_latent.new_empty(q_latent.shape[:3], dtype=torch.float32)
        return torch.empty_like(q_latent, memory_format=torch.contiguous_format), lse

    operator = torch.library.custom_op(f"transmla::decode_{name}", run, mutates_args=(), schema=_SCHEMA)
    operator.register_fake(shapes)
    return getattr(torch.ops.transmla, f"decode_{name}").default
