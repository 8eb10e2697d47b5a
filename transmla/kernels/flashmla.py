"""FlashMLA's dense decode for Hopper, where its shape is met: 512 + 64 in bfloat16, pages of 64 tokens.

It takes no mask: a step that needs one (padding on the left, a static cache) goes to the `hopper` kernel.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from transmla.kernels import Backend, DecodeShape
from transmla.kernels import hopper as masked
from transmla.modeling.rows import Rows

RANK, WIDTH, PAGE = 512, 64, 64
HOPPER = (9, 0)


@cache
def _library() -> Any:
    import flash_mla

    return flash_mla


def decode(
    q_latent: Tensor, q_pe: Tensor, rows: Rows, *, scaling: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to the latent rows; shapes as ``Backend`` says."""
    batch, new = q_latent.shape[:2]
    kv_c, lengths, block_table = rows.kv_c, rows.lengths, rows.block_table
    pages = None if mask is not None or rows.scale is not None else _pages(rows)
    if pages is None:
        return masked.decode(q_latent, q_pe, rows, scaling=scaling, mask=mask)
    if block_table is None:
        each = pages.shape[0] // batch
        block_table = torch.arange(batch * each, dtype=torch.int32, device=kv_c.device).view(batch, each)
    ragged = lengths is not None
    if lengths is None:
        lengths = torch.full((batch,), kv_c.shape[1], dtype=torch.int32, device=kv_c.device)
    library = _library()
    output, lse = library.flash_mla_with_kvcache(
        torch.cat([q_latent, q_pe], -1),
        pages[:, :, None],
        block_table,
        lengths,
        RANK,
        library.get_mla_metadata()[0],
        softmax_scale=scaling,
        causal=ragged and new > 1,
        use_legacy=True,
    )
    lse = lse.transpose(1, 2).contiguous()
    # What sees nothing has no weight in a merge.
    return output, lse.masked_fill(lse == float("inf"), float("-inf"))


def _pages(rows: Rows) -> Tensor | None:
    """The buffer [pages, PAGE, RANK + WIDTH] that both lie in, as ``LatentLayer`` and paged caches keep them."""
    kv_c, k_pe = rows.kv_c, rows.k_pe
    room = rows.page or kv_c.stride(0) // (RANK + WIDTH)
    together = k_pe.data_ptr() - kv_c.data_ptr() == RANK * kv_c.element_size()
    if not together or kv_c.stride(1) != RANK + WIDTH or room % PAGE or kv_c.stride(0) != room * (RANK + WIDTH):
        return None
    count = kv_c.shape[0] * room // PAGE
    return kv_c.as_strided((count, PAGE, RANK + WIDTH), (PAGE * (RANK + WIDTH), RANK + WIDTH, 1))


def refuses(shape: DecodeShape) -> str | None:
    """Why FlashMLA cannot serve a shape."""
    try:
        _library()
    except ImportError as error:
        return f"FlashMLA cannot be imported ({error}): pip install --no-deps sgl-flash-mla"
    reason = masked.refuses(shape)
    if reason is not None:
        return f"steps with a mask need `hopper`: {reason}"
    if torch.cuda.get_device_capability(shape.device) != HOPPER:
        return "it runs on Hopper GPUs (H100, H200)"
    if (shape.kv_lora_rank, shape.qk_rope_head_dim) != (RANK, WIDTH):
        return f"rows of {shape.kv_lora_rank} + {shape.qk_rope_head_dim}: it takes {RANK} + {WIDTH}"
    if shape.dtype != torch.bfloat16:
        return f"dtype {shape.dtype}: it takes bfloat16"
    return None


# Not chosen by itself: it has not run yet.
BACKEND = Backend(
    "flashmla", "FlashMLA's dense decode for Hopper", preference=-1, refuses=refuses, decode=decode, by_hand=True
)
