"""Pad the tensors of an export with zeros to the widths of a runtime's kernels, which changes no output.

Shapes: H heads; r, d_r, d_n, d_v the export's widths of latent, rotary key, other key channels and value. Capitals R,
D_R, D_N, D_V are the padded widths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transmla.formats.serve_limits import Widths

# Names in vLLM for the projections of queries, keys and values. vLLM would fuse tensors that keep the family's names.
RENAMED = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_PLACE = re.compile(r"(.*\blayers\.(\d+)\.self_attn\.)(\w+)(\..+)?")


def widened(
    tensors: Iterable[tuple[str, Tensor]],
    mla: Mapping[str, Any],
    widths: Widths,
    *,
    normed: bool,
    names: Mapping[str, str] = RENAMED,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an export with the names and shapes that the served model has.

    Args:
        tensors: names and tensors of the export.
        mla: the config's ``mla``, with the widths of each layer.
        widths: the widths to pad to.
        normed: whether the family normalises queries and keys.
        names: new names of modules in ``self_attn``; the default is vLLM's.
    """
    kinds: Sequence[Widths] = [Widths.of(kind) for kind in mla["kinds"]]
    for name, tensor in tensors:
        place = _PLACE.fullmatch(name)
        if place is None:
            yield name, tensor
            continue
        before, layer, part, after = place.groups()
        kind = kinds[mla["layers"][int(layer)]]
        yield f"{before}{names.get(part, part)}{after or ''}", widen(part, tensor, kind, widths, normed=normed)


def widen(part: str, tensor: Tensor, kind: Widths, widths: Widths, *, normed: bool) -> Tensor:
    """Pad one weight or bias of an attention.

    Args:
        part: name of the module in ``self_attn``.
        tensor: a weight [rows, columns] or a bias [rows].
        kind: the export's widths.
        widths: the widths to pad to.
        normed: whether ``q_proj`` is the family's own, which keeps its shape.
    """
    pad = _PADDINGS.get(part)
    if pad is None or (part == "q_proj" and normed) or (part == "o_proj" and tensor.dim() == 1):
        return tensor
    return pad(tensor, kind, widths)


def _query(tensor: Tensor, kind: Widths, widths: Widths) -> Tensor:
    """Pad [H · (d_n + d_r), ..] to [H · (D_N + D_R), ..]."""
    nope, rope = tensor.unflatten(0, (-1, kind.nope + kind.rotary)).split([kind.nope, kind.rotary], 1)
    return torch.cat([_to(nope, 1, widths.nope), _rotary(rope, 1, widths.rotary)], 1).flatten(0, 1)


def _row(tensor: Tensor, kind: Widths, widths: Widths) -> Tensor:
    """Pad [r + d_r, ..] to [R + D_R, ..]."""
    latent, rope = tensor.split([kind.latent, kind.rotary])
    return torch.cat([_to(latent, 0, widths.latent), _rotary(rope, 0, widths.rotary)])


def _expand(tensor: Tensor, kind: Widths, widths: Widths) -> Tensor:
    """Pad [H · (d_n + d_v), r] to [H · (D_N + D_V), R]."""
    wide = _to(tensor, 1, widths.latent).unflatten(0, (-1, kind.nope + kind.value))
    nope, value = wide.split([kind.nope, kind.value], 1)
    return torch.cat([_to(nope, 1, widths.nope), _to(value, 1, widths.value)], 1).flatten(0, 1)


def _output(tensor: Tensor, kind: Widths, widths: Widths) -> Tensor:
    """Pad [D, H · d_v] to [D, H · D_V]."""
    return _to(tensor.unflatten(1, (-1, kind.value)), 2, widths.value).flatten(1)


_PADDINGS: dict[str, Callable[[Tensor, Widths, Widths], Tensor]] = {
    "q_proj": _query,
    "q_b_proj": _query,
    "kv_a_proj_with_mqa": _row,
    "kv_b_proj": _expand,
    "o_proj": _output,
}


def _to(tensor: Tensor, dim: int, width: int) -> Tensor:
    """Append zeros to dimension ``dim`` until it has ``width`` entries."""
    missing = width - tensor.shape[dim]
    zeros = tensor.new_zeros(*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :])
    return torch.cat([tensor, zeros], dim) if missing else tensor


def _rotary(tensor: Tensor, dim: int, width: int) -> Tensor:
    """Pad rotary channels to ``width``. Channels i and i + width / 2 are a pair, so each half is padded."""
    return torch.cat([_to(half, dim, width // 2) for half in tensor.chunk(2, dim)], dim)


def rotary_table(inv_freq: Sequence[float], width: int) -> Tensor:
    """Return the frequencies [width / 2] of padded rotary channels in float32; padded channels do not rotate."""
    return _to(torch.tensor(inv_freq, dtype=torch.float32), 0, width // 2)


def rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``rows`` [.., D_R] by cosines and sines [.., D_R / 2], computed in float32."""
    real, imaginary = rows.float().chunk(2, -1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).to(rows.dtype)
