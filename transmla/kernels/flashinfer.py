"""FlashInfer's attention to latent pages, on GPUs from Ampere on, compiled by FlashInfer when it is first used.

Its plan needs the lengths on the host: rows all of one length are planned once for all layers of a step (behind a
shared prefix, twice a layer); lengths and pages given as tensors are read back at every call. A step with a mask
(padding on the left, a static cache) or a soft-cap and one that is being captured into a CUDA graph go to the kernels
of this package.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from transmla.kernels import Backend, DecodeShape, hopper, triton_decode
from transmla.kernels.rows import Rows, Scores

OLDEST = (8, 0)
# Latents that its kernel for Hopper takes, and those of the one for other GPUs.
HOPPER_RANKS, RANKS = (128, 256, 512), (128, 256, 384, 512)
WIDTH = 64
# Query rows (token, head) of a tile, or half of one; its plan refuses new tokens that straddle tiles.
TILE = 64
# Pages of a cache that has none.
PAGE = 64
WORKSPACE_BYTES = 2**27


@cache
def _library() -> Any:
    import flashinfer.mla

    return flashinfer.mla


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == hopper.CAPABILITY


class Planner:
    """FlashInfer's wrapper on a device, and what it was last planned for."""

    def __init__(self, device: torch.device) -> None:
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        kind = "fa3" if _is_hopper(device) else "fa2"
        self.wrapper = _library().BatchMLAPagedAttentionWrapper(workspace, backend=kind)
        self.planned: Any = None

    def plan(self, q_latent: Tensor, rows: Rows, width: int, scaling: float) -> Rows:
        """Plan for ``rows`` [B, T, r + ``width``] and queries like ``q_latent`` [B, n, H, r]; returns their pages."""
        pages = _pages(rows)
        if pages is None:
            raise ValueError("rows do not lie in pages")
        asked = (q_latent.shape, q_latent.dtype, pages.kv_c.shape, rows.total, width, scaling)
        if rows.lengths is None and asked == self.planned:
            return pages
        # A plan that is refused must not be taken for the one before it.
        self.planned = None
        batch, new, heads, rank = q_latent.shape
        page = pages.kv_c.shape[1]
        if rows.lengths is None:
            lengths = torch.full((batch,), rows.total, dtype=torch.int32)
            table = torch.arange(len(pages.kv_c), dtype=torch.int32).view(batch, -1)
        else:
            lengths = rows.lengths.to("cpu", torch.int32)
            table = cast(Tensor, pages.block_table).to("cpu", torch.int32)
        used = -(-lengths // page)
        held = torch.arange(table.shape[1]) < used[:, None]
        starts = torch.zeros(batch + 1, dtype=torch.int32)
        starts[1:] = used.cumsum(0)
        queries = torch.arange(batch + 1, dtype=torch.int32) * new
        self.wrapper.plan(
            metadata=_library().MLAPlanMetadata.csr(queries, starts, table[held], lengths),
            num_heads=heads,
            head_dim_ckv=rank,
            head_dim_kpe=width,
            page_size=page,
            causal=rows.lengths is not None and new > 1,
            sm_scale=scaling,
            q_data_type=q_latent.dtype,
            kv_data_type=q_latent.dtype,
            query_layout="split",
            kv_cache_layout="split",
            lse_mode="basee",
        )
        if rows.lengths is None:
            self.planned = asked
        return pages

    def run(self, q_latent: Tensor, q_pe: Tensor, pages: Rows) -> tuple[Tensor, Tensor]:
        """What was planned."""
        output, lse = self.wrapper.run(
            query=(q_latent.flatten(0, 1).contiguous(), q_pe.flatten(0, 1).contiguous()),
            kv_cache=(pages.kv_c, pages.k_pe),
            return_lse=True,
            return_lse_base_on_e=True,
        )
        return output.view(q_latent.shape), lse.view(q_latent.shape[:3])


@cache
def planner(device: torch.device) -> Planner:
    """The one of a device."""
    return Planner(device)


def decode(q_latent: Tensor, q_pe: Tensor, rows: Rows, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attention to the latent rows; shapes as ``Decode`` says."""
    new, heads = q_latent.shape[1:3]
    # A plan is made on the host, which a graph's capture forbids.
    told = scores.mask is None and scores.softcap is None and not torch.cuda.is_current_stream_capturing()
    straddles = rows.lengths is not None and new > 1 and TILE % heads > 0
    if not told or straddles or rows.total == 0 or _pages(rows) is None:
        other = hopper if _is_hopper(q_latent.device) else triton_decode
        return other.decode(q_latent, q_pe, rows, scores)
    plans = planner(q_latent.device)
    return plans.run(q_latent, q_pe, plans.plan(q_latent, rows, q_pe.shape[-1], scores.scaling))


def _pages(rows: Rows) -> Rows | None:
    return rows.paged(rows.page or PAGE)


def refuses(shape: DecodeShape) -> str | None:
    """Why FlashInfer cannot serve a shape."""
    try:
        library = _library()
    except ImportError as error:
        return f"FlashInfer cannot be imported ({error}): pip install flashinfer-python"
    if not hasattr(library, "MLAPlanMetadata"):
        return "this FlashInfer is too old: pip install 'flashinfer-python>=0.7'"
    if shape.device.type != "cuda" or torch.cuda.get_device_capability(shape.device) < OLDEST:
        return "it runs on NVIDIA GPUs from Ampere (A100) on"
    ranks = HOPPER_RANKS if _is_hopper(shape.device) else RANKS
    if shape.kv_lora_rank not in ranks or shape.qk_rope_head_dim != WIDTH:
        known = ", ".join(map(str, ranks))
        return f"rows of {shape.kv_lora_rank} + {shape.qk_rope_head_dim}: it takes {known} + {WIDTH}"
    if shape.dtype not in hopper.DTYPES:
        return f"dtype {shape.dtype}: it takes bfloat16 and float16"
    other = hopper if _is_hopper(shape.device) else triton_decode
    reason = other.refuses(shape)
    return None if reason is None else f"steps with a mask need `{other.BACKEND.name}`: {reason}"


# Not chosen by itself: it compiles at first use, and its plans cost the host time at every step.
BACKEND = Backend(
    "flashinfer",
    "FlashInfer's attention to latent pages",
    preference=-1,
    refuses=refuses,
    decode=decode,
    opaque_to_compile=True,
)
