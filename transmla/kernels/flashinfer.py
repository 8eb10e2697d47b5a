"""Adapter to FlashInfer's attention over latent pages, for NVIDIA GPUs from Ampere on.

FlashInfer compiles its kernel at first use, and plans each launch on the host. Rows that all have one length are
planned once for all layers of a step (behind a shared prefix: twice per layer). Lengths and block tables that are
tensors are copied to the host at every call.

Three kinds of steps go to this package's kernels instead: steps with a mask (padding on the left, a static cache),
steps with a soft-cap, and steps that are being captured into a CUDA graph.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from transmla.kernels import Backend, DecodeShape, hopper, triton_decode
from transmla.kernels.rows import Rows, Scores

# Lowest compute capability that FlashInfer serves.
OLDEST = (8, 0)
# Widths r that FlashInfer's kernels accept: on Hopper, and on other GPUs.
HOPPER_RANKS, RANKS = (128, 256, 512), (128, 256, 384, 512)
# Width d_r that FlashInfer's kernels accept.
WIDTH = 64
# Query rows (token, head) in FlashInfer's tile or half tile. FlashInfer cannot plan a token whose heads straddle tiles.
TILE = 64
# Page size, in rows, for a cache without a block table.
PAGE = 64
# Bytes of FlashInfer's scratch memory on each device.
WORKSPACE_BYTES = 2**27


@cache
def _library() -> Any:
    import flashinfer.mla

    return flashinfer.mla


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == hopper.CAPABILITY


class Planner:
    """FlashInfer's wrapper on one device, with the key of its last plan."""

    def __init__(self, device: torch.device) -> None:
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        kind = "fa3" if _is_hopper(device) else "fa2"
        self.wrapper = _library().BatchMLAPagedAttentionWrapper(workspace, backend=kind)
        self.planned: Any = None

    def plan(self, q_latent: Tensor, rows: Rows, width: int, scaling: float) -> Rows:
        """Plan the attention of queries shaped like ``q_latent`` to ``rows``.

        Args:
            q_latent: queries [B, n, H, r]; only their shape and dtype count.
            rows: latents [B, T, r] and rotary keys [B, T, d_r], or pages of them.
            width: d_r.
            scaling: factor on all scores.

        Returns:
            ``rows`` as pages, for ``run``.

        Raises:
            ValueError: if ``rows`` cannot be viewed as pages.
        """
        pages = _pages(rows)
        if pages is None:
            raise ValueError("the rows cannot be viewed as pages")
        key = (q_latent.shape, q_latent.dtype, pages.kv_c.shape, rows.total, width, scaling)
        if rows.lengths is None and key == self.planned:
            return pages
        # If FlashInfer refuses this plan, the next call must not reuse the previous one.
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
        in_use = torch.arange(table.shape[1]) < used[:, None]
        starts = torch.zeros(batch + 1, dtype=torch.int32)
        starts[1:] = used.cumsum(0)
        queries = torch.arange(batch + 1, dtype=torch.int32) * new
        self.wrapper.plan(
            metadata=_library().MLAPlanMetadata.csr(queries, starts, table[in_use], lengths),
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
            self.planned = key
        return pages

    def run(self, q_latent: Tensor, q_pe: Tensor, pages: Rows) -> tuple[Tensor, Tensor]:
        """Run the last plan for ``q_latent`` [B, n, H, r], ``q_pe`` [B, n, H, d_r] and the ``pages`` from ``plan``.

        Returns:
            Outputs [B, n, H, r] and log-sum-exps [B, n, H], to base e.
        """
        output, lse = self.wrapper.run(
            query=(q_latent.flatten(0, 1).contiguous(), q_pe.flatten(0, 1).contiguous()),
            kv_cache=(pages.kv_c, pages.k_pe),
            return_lse=True,
            return_lse_base_on_e=True,
        )
        return output.view(q_latent.shape), lse.view(q_latent.shape[:3])


@cache
def planner(device: torch.device) -> Planner:
    """Return the planner of ``device``, made at the first call."""
    return Planner(device)


def decode(q_latent: Tensor, q_pe: Tensor, rows: Rows, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attend to the latent rows; arguments and results as in ``Decode``."""
    new, heads = q_latent.shape[1:3]
    # Planning copies data to the host, which is forbidden while a CUDA graph is captured.
    supported = scores.mask is None and scores.softcap is None and not torch.cuda.is_current_stream_capturing()
    straddles = rows.lengths is not None and new > 1 and TILE % heads > 0
    if not supported or straddles or rows.total == 0 or _pages(rows) is None:
        other = hopper if _is_hopper(q_latent.device) else triton_decode
        return other.decode(q_latent, q_pe, rows, scores)
    plans = planner(q_latent.device)
    return plans.run(q_latent, q_pe, plans.plan(q_latent, rows, q_pe.shape[-1], scores.scaling))


def _pages(rows: Rows) -> Rows | None:
    return rows.paged(rows.page or PAGE)


def refuses(shape: DecodeShape) -> str | None:
    """Return why FlashInfer cannot serve ``shape``, or None."""
    try:
        library = _library()
    except ImportError as error:
        return f"FlashInfer cannot be imported ({error}): pip install flashinfer-python"
    if not hasattr(library, "MLAPlanMetadata"):
        return "this FlashInfer is too old: pip install 'flashinfer-python>=0.7'"
    if shape.device.type != "cuda" or torch.cuda.get_device_capability(shape.device) < OLDEST:
        return "FlashInfer needs an NVIDIA GPU, Ampere (A100) or newer"
    ranks = HOPPER_RANKS if _is_hopper(shape.device) else RANKS
    if shape.kv_lora_rank not in ranks or shape.qk_rope_head_dim != WIDTH:
        known = ", ".join(map(str, ranks))
        return f"rows of {shape.kv_lora_rank} + {shape.qk_rope_head_dim}: FlashInfer takes {known} + {WIDTH}"
    if shape.dtype not in hopper.DTYPES:
        return f"dtype {shape.dtype}: FlashInfer takes bfloat16 and float16"
    other = hopper if _is_hopper(shape.device) else triton_decode
    reason = other.refuses(shape)
    return None if reason is None else f"steps with a mask need `{other.BACKEND.name}`: {reason}"


# Below `torch`, so that `auto` never chooses FlashInfer: it compiles at first use, and planning takes host time at
# every step.
BACKEND = Backend(
    "flashinfer",
    "FlashInfer's attention to latent pages",
    preference=-1,
    refuses=refuses,
    decode=decode,
    opaque_to_compile=True,
)
