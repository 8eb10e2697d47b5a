"""Attention of a few new tokens to a latent cache: one file a backend, found by its presence."""

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
    """What a backend must serve: ``heads`` H, the widths r and d_r of a cached row, and where it runs."""

    heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Backend:
    """One way to decode.

    ``refuses(shape)`` says why it cannot serve a shape, in one line with what to do, or None. Among those that can,
    the largest ``preference`` is chosen.

    ``decode`` is what ``modeling.rows.Decode`` says.

    ``opaque_to_compile``: it launches kernels that torch.compile cannot look into.
    """

    name: str
    summary: str
    preference: int
    refuses: Callable[[DecodeShape], str | None]
    decode: Decode
    opaque_to_compile: bool = False


def as_int32(values: Tensor | None) -> Tensor | None:
    """Lengths and tables as kernels read them."""
    return values if values is None else values.to(torch.int32).contiguous()


def backends() -> dict[str, Backend]:
    """All backends by name."""
    return scan("transmla.kernels", "BACKEND")


def choose_backend(wanted: str, shape: DecodeShape) -> Backend:
    """The backend called ``wanted``, or for ``auto`` the preferred one, that serves ``shape``.

    One that was asked for and cannot is named once in the log, and the next is taken.

    Raises:
        TransmlaError: if no backend is called ``wanted``.
    """
    ranked = sorted(backends().values(), key=lambda backend: -backend.preference)
    if wanted != "auto":
        asked = lookup("transmla.kernels", "BACKEND", wanted, kind="backend")
        ranked = [asked, *(backend for backend in ranked if backend is not asked)]
    for backend in ranked:
        reason = backend.refuses(shape)
        if reason is None:
            break
        level = logging.WARNING if backend.name == wanted else logging.DEBUG
        _log.log(level, "backend '%s' cannot serve this model: %s", backend.name, reason)
    # `torch` refuses nothing.
    return backend
