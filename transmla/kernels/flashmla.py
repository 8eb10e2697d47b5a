"""Adapter to FlashMLA's dense decode for Hopper GPUs: r = 512, d_r = 64, bfloat16, pages of 64 tokens.

FlashMLA supports neither masks nor soft-caps. Steps that need one of them (padding on the left, a static cache) go to
the `hopper` kernel.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from transmla.kernels import Backend, DecodeShape, as_int32
from transmla.kernels import hopper as masked
from transmla.kernels.rows import Rows, Scores

# r, d_r and rows per page that FlashMLA accepts.
RANK, WIDTH, PAGE = 512, 64, 64


@cache
def _library() -> Any:
    import flash_mla

    return flash_mla


def decode(q_latent: Tensor, q_pe: Tensor, rows: Rows, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attend to the latent rows; arguments and results as in ``Decode``."""
    pages = None if scores.mask is not None or scores.softcap is not None else rows.paged(PAGE)
    if pages is None or not _adjacent(pages):
        return masked.decode(q_latent, q_pe, rows, scores)
    library, size = _library(), RANK + WIDTH
    output, lse = library.flash_mla_with_kvcache(
        torch.cat([q_latent, q_pe], -1),
        pages.kv_c.as_strided((len(pages.kv_c), PAGE, 1, RANK + WIDTH), (PAGE * size, size, size, 1)),
        as_int32(pages.block_table),
        as_int32(pages.lengths),
        RANK,
        library.get_mla_metadata()[0],
        softmax_scale=scores.scaling,
        causal=rows.lengths is not None and q_latent.shape[1] > 1,
        use_legacy=True,
    )
    lse = lse.transpose(1, 2).contiguous()
    # FlashMLA returns +inf where a query attends to no row. -inf gives that result no weight in a merge.
    return output, lse.masked_fill(lse == float("inf"), float("-inf"))


def _adjacent(pages: Rows) -> bool:
    """Whether every row is [kv_c | k_pe] in one piece of memory, as in ``LatentLayer`` and in paged caches."""
    kv_c, k_pe = pages.kv_c, pages.k_pe
    adjacent = k_pe.data_ptr() - kv_c.data_ptr() == RANK * kv_c.element_size()
    return adjacent and kv_c.stride() == k_pe.stride() == (PAGE * (RANK + WIDTH), RANK + WIDTH, 1)


def refuses(shape: DecodeShape) -> str | None:
    """Return why FlashMLA cannot serve ``shape``, or None."""
    try:
        _library()
    except ImportError as error:
        return f"FlashMLA cannot be imported ({error}): pip install --no-deps sgl-flash-mla"
    reason = masked.refuses(shape)
    if reason is not None:
        return f"steps with a mask need `hopper`: {reason}"
    if (shape.kv_lora_rank, shape.qk_rope_head_dim) != (RANK, WIDTH):
        return f"rows of {shape.kv_lora_rank} + {shape.qk_rope_head_dim}: FlashMLA takes {RANK} + {WIDTH}"
    if shape.dtype != torch.bfloat16:
        return f"dtype {shape.dtype}: FlashMLA takes bfloat16"
    return None


# Below `torch`, so that `auto` never chooses FlashMLA. It is faster than `hopper` for large batches with 64 heads or
# more, but every step with a mask goes to `hopper`.
BACKEND = Backend(
    "flashmla",
    "FlashMLA's dense decode for Hopper",
    preference=-1,
    refuses=refuses,
    decode=decode,
    opaque_to_compile=True,
)
