"""Backend for Hopper GPUs: tile sizes and launch of the kernel in ``hopper_kernel``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.kernels import Backend, DecodeShape, as_int32, int32_lengths, ragged, triton_decode
from transmla.kernels.hopper_mask import BOUND_WARPS, find_bounds
from transmla.kernels.hopper_tiles import ROWS, gluon
from transmla.kernels.rows import Rows, Scores
from transmla.kernels.splits import allocate_results, best_splits, longest_queue, merge_pieces, merge_splits

if gluon is not None:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from transmla.kernels import hopper_float8_kernel, hopper_kernel

# Compute capability of H100 and H200.
CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
# Largest r for which ``choose_tiles`` has a tile.
MAX_RANK = 512
# Columns of a tile of rotary keys. A tile of weights has as many rows, because it reuses the memory of the keys.
ROPE = 64
# Values of a cache tile whose queries do not fit in registers.
SPILLING = 512 * 64
# Registers per thread of the warps that add up values. The other registers go to the warps that compute weights.
VALUE_REGISTERS = 160
# Least columns of a tile of float8 latents: narrower ones go to the Triton backend.
WIDE_FLOAT8 = 256
# Tiles that a multiprocessor reads, one after another, from which on a division of the batch is worth its time of
# about ten microseconds and its launches.
LONG_QUEUE = 32


def decode(q_latent: Tensor, q_pe: Tensor, rows: Rows, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attend to the latent rows; arguments and results as in ``Decode``.

    The kernels need rows aligned to 16 bytes, a distance of whole rows between sequences, and pages of whole tiles.
    Any other layout, narrow float8 latents and soft-capped scores go to the Triton backend.
    """
    kv_c, k_pe, page, total = rows.kv_c, rows.k_pe, rows.page, rows.total
    batch, new, heads, rank = q_latent.shape
    queries, width = new * heads, q_pe.shape[-1]
    float8 = rows.scale is not None
    tiles = choose_float8_tiles(rank) if float8 else choose_tiles(rank, queries, page)
    if total == 0 or scores.softcap is not None or not _fetchable(rows, tiles):
        return triton_decode.decode(q_latent, q_pe, rows, scores)
    lengths, block_table = int32_lengths(rows.lengths), as_int32(rows.block_table)
    q_latent, q_pe = q_latent.contiguous(), q_pe.contiguous()
    mask = None if scores.mask is None else scores.mask.expand(batch, 1, new, total).view(torch.int8)
    blocks, count = math.ceil(queries / ROWS), math.ceil(total / tiles.tokens)
    splits = best_splits(batch * blocks, count, q_latent.device)
    grid = blocks, splits, batch
    bounds = division = None
    if (
        ragged.differ(batch, lengths, mask)
        and longest_queue(batch * blocks, count, splits, q_latent.device) >= LONG_QUEUE
    ):
        bounds = None if mask is None else _bounds(mask, lengths)
        division = ragged.divide(batch, blocks, tiles.tokens, total, lengths, bounds)
        grid = blocks, len(division.slots), 1
    out, lse, parts, part_lse = allocate_results(q_latent, splits, None if division is None else division.parts)
    if rows.scale is not None:
        kernel: Any = hopper_float8_kernel.attend
        own = {
            "kv": _descriptor(kv_c.view(torch.uint8), tiles.tokens, tiles.columns),
            "kv_scale": rows.scale,
            "scale_token": rows.scale.stride(1),
            "RAWS": tiles.raws,
            "WIDES": tiles.wides,
        }
    else:
        kernel, own = hopper_kernel.attend, {"kv": _descriptor(kv_c, tiles.tokens, tiles.columns)}
    kernel[grid](
        q_latent=q_latent,
        q_pe=q_pe,
        pe=_descriptor(k_pe, tiles.tokens, ROPE),
        mask=q_latent if mask is None else mask,
        lengths=q_latent if lengths is None else lengths,
        table=q_latent if block_table is None else block_table,
        slots=q_latent if division is None else division.slots,
        bounds=q_latent if bounds is None else bounds,
        out=out,
        lse=lse,
        parts=parts,
        part_lse=part_lse,
        scale=scores.scaling * math.log2(math.e),
        heads=heads,
        rows=queries,
        total=total,
        splits=splits,
        capacity=kv_c.stride(0) // kv_c.stride(1),
        pe_capacity=k_pe.stride(0) // k_pe.stride(1),
        lengths_batch=0 if lengths is None else lengths.stride(0),
        mask_batch=0 if mask is None else mask.stride(0),
        mask_query=0 if mask is None else mask.stride(2),
        mask_token=0 if mask is None else mask.stride(3),
        table_batch=0 if block_table is None else block_table.stride(0),
        NEW=new,
        RANK=rank,
        WIDTH=width,
        RANK_BLOCK=tiles.columns,
        TOKENS=tiles.tokens,
        STAGES=tiles.stages,
        SPILL=tiles.columns * tiles.tokens == SPILLING,
        PAGE=page,
        MASKED=mask is not None,
        RAGGED=lengths is not None,
        DIVIDED=division is not None,
        LOG=math.log(2) if splits == 1 or division is not None else 1.0,
        REGISTERS=VALUE_REGISTERS,
        num_warps=4,
        **own,
    )
    if division is not None:
        merge_pieces(parts, part_lse, division.pieces, out, lse)
    elif splits > 1:
        merge_splits(parts, part_lse, out, lse)
    return out, lse


def _bounds(mask: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the bounds of each sequence's ``mask`` [B, 1, n, T] as ``find_bounds`` writes them, [B, 4] in int32."""
    batch, _, new, total = mask.shape
    bounds = torch.empty(batch, 4, dtype=torch.int32, device=mask.device)
    find_bounds[(batch,)](
        mask=mask,
        lengths=mask if lengths is None else lengths,
        bounds=bounds,
        total=total,
        lengths_batch=0 if lengths is None else lengths.stride(0),
        mask_batch=mask.stride(0),
        mask_query=mask.stride(2),
        mask_token=mask.stride(3),
        NEW=new,
        RAGGED=lengths is not None,
        num_warps=BOUND_WARPS,
    )
    return bounds


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles of a cache.

    Attributes:
        columns: columns of a tile of latents, at least r.
        tokens: tokens of a tile.
        stages: buffers of tiles; of float8 latents: of their rotary keys.
        raws: buffers of tiles of float8 latents.
        wides: buffers of tiles of float8 latents that were widened.
    """

    columns: int
    tokens: int
    stages: int
    raws: int = 0
    wides: int = 0


def choose_tiles(rank: int, queries: int, page: int) -> Tiles:
    """Return the sizes of the tiles.

    Args:
        rank: width r of a latent.
        queries: query rows n·H of a sequence.
        page: tokens of a page of the cache; 0 if there are no pages.
    """
    if rank > 256:
        # Tensor cores multiply tiles of 32 tokens at half their rate. It is what few queries need.
        few = queries <= ROWS // 2 or page % 64
        return Tiles(512, 32, 6) if few else Tiles(512, 64, 3)
    if rank > 128:
        return Tiles(256, 64, 5)
    return Tiles(128, 128, 4) if rank > 64 else Tiles(64, 128, 6)


def choose_float8_tiles(rank: int) -> Tiles:
    """Return the sizes of the tiles of float8 latents with width r = ``rank``."""
    if rank > 256:
        return Tiles(512, 64, stages=2, raws=2, wides=2)
    return Tiles(256, 64, stages=4, raws=4, wides=3)


def _fetchable(rows: Rows, tiles: Tiles) -> bool:
    """Whether TMA can fetch tiles of all parts of ``rows``, each as rows of one matrix."""
    parts = all(_fetchable_part(part, tiles.tokens, rows.page) for part in (rows.kv_c, rows.k_pe))
    if rows.scale is None or not parts:
        return parts
    # The kernel finds a scale by the number of its row in the matrix.
    kv_c, scale = rows.kv_c, rows.scale
    return kv_c.shape[-1] > WIDE_FLOAT8 // 2 and scale.stride(0) * kv_c.stride(1) == kv_c.stride(0) * scale.stride(1)


def _fetchable_part(part: Tensor, tokens: int, page: int) -> bool:
    """Whether TMA can fetch tiles of ``part`` [B, T, width] or [pages, page, width] as rows of one matrix."""
    row_stride = part.stride(1)
    aligned = part.data_ptr() % 16 == 0 and row_stride * part.element_size() % 16 == 0 and part.stride(2) == 1
    whole_rows = row_stride > 0 and part.stride(0) % row_stride == 0
    if page:
        whole_rows = whole_rows and page % tokens == 0 and part.stride(0) == page * row_stride
    return aligned and whole_rows


def _descriptor(cache: Tensor, tokens: int, columns: int) -> Any:
    """TMA descriptor of ``cache`` as one matrix with the rows of all sequences or pages, in tiles [tokens, columns]."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * cache.element_size(), rank=2)
    count = (cache.shape[0] - 1) * (cache.stride(0) // cache.stride(1)) + cache.shape[1]
    shape, strides = [count, cache.shape[2]], [cache.stride(1), 1]
    return TensorDescriptor(cache, shape, strides, [tokens, columns], layout)


def refuses(shape: DecodeShape) -> str | None:
    """Return why the Hopper kernel cannot serve ``shape``, or None."""
    if gluon is None:
        return "Triton with Gluon is not installed: pip install 'triton>=3.6'"
    if shape.device.type != "cuda" or torch.cuda.get_device_capability(shape.device) != CAPABILITY:
        return "the kernel needs a Hopper GPU (H100, H200)"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype}: the kernel takes bfloat16 and float16"
    if shape.kv_lora_rank > MAX_RANK or shape.kv_lora_rank % 8:
        return f"kv_lora_rank {shape.kv_lora_rank}: the kernel takes multiples of 8 up to {MAX_RANK}"
    if shape.qk_rope_head_dim > ROPE or shape.qk_rope_head_dim % 8:
        return f"qk_rope_head_dim {shape.qk_rope_head_dim}: the kernel takes multiples of 8 up to {ROPE}"
    return None


BACKEND = Backend(
    "hopper",
    "warp-specialised decoding for Hopper, in Gluon",
    preference=20,
    refuses=refuses,
    decode=decode,
    opaque_to_compile=True,
)
