"""Shelf of decode backends: attention of a few new tokens to a latent cache.

- ``rows``: the cached rows, the score settings and ``Decode``, the signature of every backend.
- ``reference``: plain PyTorch. It runs everywhere, and tests compare every kernel with it.
- ``triton_decode``: split-KV flash decoding in Triton.
- ``hopper``: the launch of the kernels for H100 and H200, in Gluon: ``hopper_kernel``, and ``hopper_float8_kernel`` for
  float8 latents. ``hopper_tiles``, ``hopper_mask``, ``hopper_weights`` and ``hopper_widen`` are their parts.
- ``flashmla``, ``flashinfer``: adapters to two optional packages.
- ``splits``: number of cache splits, and the kernel that merges their results (for Triton and Hopper).
- ``ragged``: division of a batch whose sequences have different lengths (for Hopper).
- ``custom_op``: wraps a backend as one operator for torch.compile.
- ``rms_norm``, ``pack_rows``: a norm, and the rows of a float8 cache, each in one Triton kernel.

To add a backend, put one file into this folder. The file defines ``decode`` and ``refuses`` and binds a ``Backend``
to ``BACKEND``; ``backends()`` then lists it. A test in ``tests/kernels/`` compares it with ``reference``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.kernels.rows import Decode
from transmla.registry import lookup, scan

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeShape:
    """Shape, dtype and device that a backend must serve.

    Attributes:
        heads: number of query heads H.
        kv_lora_rank: width r of a cached latent.
        qk_rope_head_dim: width d_r of a cached rotary key.
        dtype: dtype of queries and cached rows.
        device: device of queries and cached rows.
    """

    heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Backend:
    """One implementation of decoding.

    Attributes:
        name: name by which a user selects the backend.
        summary: short description for the log.
        preference: rank for ``auto``. The largest preference among the backends that serve a shape is chosen.
        refuses: returns one line with the reason why the backend cannot serve a shape, and the remedy if there is
            one; None if the backend serves the shape.
        decode: function with the signature of ``kernels.rows.Decode``.
        opaque_to_compile: True if ``decode`` launches kernels that torch.compile cannot trace.
    """

    name: str
    summary: str
    preference: int
    refuses: Callable[[DecodeShape], str | None]
    decode: Decode
    opaque_to_compile: bool = False


def as_int32(values: Tensor | None) -> Tensor | None:
    """Return ``values`` (lengths [B] or a block table [B, pages]) as contiguous int32, which kernels read."""
    return values if values is None else values.to(torch.int32).contiguous()


def int32_lengths(lengths: Tensor | None) -> Tensor | None:
    """Return ``lengths`` [B] as int32, for kernels that take their stride. A stride of 0 is kept: all are equal."""
    return lengths if lengths is None else lengths.to(torch.int32)


def backends() -> dict[str, Backend]:
    """Return all backends by name."""
    return scan("transmla.kernels", "BACKEND")


def choose_backend(name: str, shape: DecodeShape) -> Backend:
    """Return a backend that serves ``shape``.

    If the requested backend refuses ``shape``, the log warns with the reason and the next preferred backend is used.

    Args:
        name: name of a backend, or ``auto`` for the preferred one.
        shape: shape, dtype and device to serve.

    Raises:
        TransmlaError: if no backend has the name ``name``.
    """
    ranked = sorted(backends().values(), key=lambda backend: -backend.preference)
    if name != "auto":
        requested = lookup("transmla.kernels", "BACKEND", name, kind="backend")
        ranked = [requested, *(backend for backend in ranked if backend is not requested)]
    for backend in ranked:
        reason = backend.refuses(shape)
        if reason is None:
            break
        level = logging.WARNING if backend.name == name else logging.DEBUG
        _log.log(level, "backend '%s' cannot serve this model: %s", backend.name, reason)
    # The loop always ends at a backend that serves the shape: `torch` refuses no shape.
    return backend
