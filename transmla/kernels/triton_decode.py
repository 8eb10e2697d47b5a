"""Split-KV flash decoding over one shared latent row, in Triton.

Every cached row [kv_c | k_pe] is read once and serves all heads, as key and as value. The cache of a sequence is cut
into splits that run in parallel (Flash-Decoding, Dao et al. 2023). A second kernel merges their results by
log-sum-exp.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from transmla.kernels import Backend, DecodeShape, as_int32, int32_lengths
from transmla.kernels import reference as plain
from transmla.kernels.rows import Rows, Scores
from transmla.kernels.splits import allocate_results, best_splits, merge_splits

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch has no Triton
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Largest r. A wider row and its queries do not fit the registers of one program.
MAX_RANK = 512
# Shared memory, in bytes, of a program with 64 query rows at r = MAX_RANK: 112 KiB. Ada and consumer Ampere have
# 99 KiB.
WIDE_BYTES = 114688
# The same for tiles of 64 float8 latents: 176.25 KiB. With 512 + 64 and 32 × 16,384 tokens on an H200, they take 477
# instead of 494 µs for 16 heads, 475 instead of 719 µs for 32, and 924 instead of 1,337 µs for 128.
FLOAT8_BYTES = 180480
# Factor on the products of weights and scales in float16. Without it, those of latents of a thousandth are subnormal,
# and lose digits. The scale of the largest latents in float16, 147, does not overflow.
RAISE = 2.0**8
# Lowest compute capability whose kernels read float8 latents (Ada).
FLOAT8_FROM = (8, 9)

if triton is not None:
    # These arguments change while a cache grows, and must not trigger recompilation.
    @triton.jit(do_not_specialize=["total", "splits"])
    def _attend(
        q_latent,
        q_pe,
        kv_c,
        k_pe,
        kv_scale,
        mask,
        lengths,
        table,
        out,
        lse,
        scale,
        cap,
        heads,
        rows,
        total,
        splits,
        kv_batch,
        kv_page,
        kv_token,
        pe_batch,
        pe_page,
        pe_token,
        scale_batch,
        scale_page,
        scale_token,
        lengths_batch,
        mask_batch,
        mask_query,
        mask_token,
        table_batch,
        new: tl.constexpr,
        RANK: tl.constexpr,
        WIDTH: tl.constexpr,
        RANK_BLOCK: tl.constexpr,
        WIDTH_BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        PAGE: tl.constexpr,
        MASKED: tl.constexpr,
        RAGGED: tl.constexpr,
        SCALED: tl.constexpr,
        CAPPED: tl.constexpr,
        PRECISION: tl.constexpr,
        STAGES: tl.constexpr,
        LOG: tl.constexpr,
        RAISE: tl.constexpr,
    ):
        """Attend with one block of query rows (token, head) of one sequence to one split of its cache."""
        block, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        row = block * ROWS + tl.arange(0, ROWS)
        rank = tl.arange(0, RANK_BLOCK)
        width = tl.arange(0, WIDTH_BLOCK)
        held = row < rows
        token = row // heads
        length = total
        if RAGGED:
            length = tl.load(lengths + batch * lengths_batch)
        # Every split has whole tiles, so that only the last tile of a sequence can be partly empty.
        share = tl.cdiv(tl.cdiv(length, TOKENS), splits) * TOKENS
        start = split * share
        stop = tl.maximum(start, tl.minimum(start + share, length))
        if MASKED:
            # Read only the range of tokens that some query attends to.
            first, last = stop, start
            for at in range(start, stop, TOKENS):
                keys = at + tl.arange(0, TOKENS)
                for query in tl.static_range(new):
                    place = mask + batch * mask_batch + query * mask_query + keys.to(tl.int64) * mask_token
                    seen = tl.load(place, mask=keys < stop, other=0) != 0
                    first = tl.minimum(first, tl.min(tl.where(seen, keys, stop)))
                    last = tl.maximum(last, tl.max(tl.where(seen, keys + 1, start)))
            start = first // TOKENS * TOKENS
            stop = last
        rows_at = batch * rows + row.to(tl.int64)
        q = tl.load(q_latent + rows_at[:, None] * RANK + rank, mask=held[:, None] & (rank < RANK), other=0.0)
        qr = tl.load(q_pe + rows_at[:, None] * WIDTH + width, mask=held[:, None] & (width < WIDTH), other=0.0)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, RANK_BLOCK], tl.float32)
        kv_base, pe_base = kv_c + batch * kv_batch, k_pe + batch * pe_batch
        for at in tl.range(start, stop, TOKENS, num_stages=STAGES):
            keys = at + tl.arange(0, TOKENS)
            there = keys < stop
            if PAGE:
                page = tl.load(table + batch * table_batch + keys // PAGE, mask=there, other=0).to(tl.int64)
                kv_at, pe_at = page * kv_page + keys % PAGE * kv_token, page * pe_page + keys % PAGE * pe_token
                scale_at = page * scale_page + keys % PAGE * scale_token
            else:
                kv_at, pe_at = keys.to(tl.int64) * kv_token, keys.to(tl.int64) * pe_token
                scale_at = keys.to(tl.int64) * scale_token
            kv = tl.load(kv_base + kv_at[:, None] + rank, mask=there[:, None] & (rank < RANK), other=0.0)
            pe = tl.load(pe_base + pe_at[:, None] + width, mask=there[:, None] & (width < WIDTH), other=0.0)
            if SCALED:
                kv = kv.to(q.dtype)
                unit = tl.load(kv_scale + batch * scale_batch + scale_at, mask=there, other=0.0)
            scores = tl.dot(q, tl.trans(kv), input_precision=PRECISION)
            if SCALED:
                scores = scores * unit[None, :]
            scores = tl.dot(qr, tl.trans(pe), scores, input_precision=PRECISION) * scale
            if CAPPED:
                # cap · tanh(s / cap), written with a sigmoid because it does not overflow.
                scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
            seen = there[None, :]
            if MASKED:
                place = batch * mask_batch + token[:, None] * mask_query + keys[None, :].to(tl.int64) * mask_token
                seen = seen & (tl.load(mask + place, mask=held[:, None] & seen, other=0) != 0)
            if RAGGED and new > 1:
                seen = seen & (keys[None, :] < length - new + 1 + token[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            # A query row that has attended to no token yet has no maximum to subtract.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(best - shift)
            p = tl.exp2(scores - shift[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            if SCALED:
                p = p * (unit * RAISE)[None, :]
            mixed = tl.dot(p.to(kv.dtype), kv, mixed * shrink[:, None], input_precision=PRECISION)
            best = higher
        some = weight > 0
        mixed = mixed / (tl.where(some, weight, 1.0) * RAISE)[:, None]
        at = (batch * splits + split) * rows + row.to(tl.int64)
        total_lse = (best + tl.log2(tl.where(some, weight, 1.0))) * LOG
        tl.store(lse + at, tl.where(some, total_lse, float("-inf")), mask=held)
        tl.store(
            out + at[:, None] * RANK + rank,
            mixed.to(out.dtype.element_ty),
            mask=held[:, None] & (rank < RANK),
        )


def decode(q_latent: Tensor, q_pe: Tensor, rows: Rows, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attend to the latent rows; arguments and results as in ``Decode``.

    Rows may have any stride between them. Rows whose values are not contiguous are copied first. The kernel reads
    float8 latents on Ada, Hopper and newer GPUs. Older GPUs decode them with the ``torch`` backend.
    """
    if rows.scale is not None and q_latent.is_cuda and torch.cuda.get_device_capability(q_latent.device) < FLOAT8_FROM:
        return plain.decode(q_latent, q_pe, rows, scores)
    kv_c, k_pe, page, total = _dense(rows.kv_c), _dense(rows.k_pe), rows.page, rows.total
    lengths, block_table = int32_lengths(rows.lengths), as_int32(rows.block_table)
    batch, new, heads, rank = q_latent.shape
    width, queries = q_pe.shape[-1], new * heads
    q_latent, q_pe = q_latent.contiguous(), q_pe.contiguous()
    shared = _shared_bytes(q_latent.device)
    block, tokens, warps, stages = _tiles(queries, rank, q_latent.dtype, shared, float8=rows.scale is not None)
    blocks = math.ceil(queries / block)
    splits = best_splits(batch * blocks, math.ceil(total / tokens), q_latent.device)
    out, lse, parts, part_lse = allocate_results(q_latent, splits)
    seen = q_latent if scores.mask is None else scores.mask.expand(batch, 1, new, total).view(torch.int8)
    units = q_latent if rows.scale is None else rows.scale
    _attend[(blocks, splits, batch)](
        q_latent=q_latent,
        q_pe=q_pe,
        kv_c=kv_c,
        k_pe=k_pe,
        kv_scale=units,
        mask=seen,
        lengths=q_latent if lengths is None else lengths,
        table=q_latent if block_table is None else block_table,
        out=parts,
        lse=part_lse,
        scale=scores.scaling * math.log2(math.e),
        cap=(scores.softcap or 0.0) * math.log2(math.e),
        heads=heads,
        rows=queries,
        total=total,
        splits=splits,
        kv_batch=0 if page else kv_c.stride(0),
        kv_page=kv_c.stride(0),
        kv_token=kv_c.stride(1),
        pe_batch=0 if page else k_pe.stride(0),
        pe_page=k_pe.stride(0),
        pe_token=k_pe.stride(1),
        scale_batch=0 if page else units.stride(0),
        scale_page=units.stride(0),
        scale_token=units.stride(1),
        lengths_batch=0 if lengths is None else lengths.stride(0),
        mask_batch=seen.stride(0),
        mask_query=seen.stride(2),
        mask_token=seen.stride(3),
        table_batch=0 if block_table is None else block_table.stride(0),
        new=new,
        RANK=rank,
        WIDTH=width,
        RANK_BLOCK=max(16, triton.next_power_of_2(rank)),
        WIDTH_BLOCK=max(16, triton.next_power_of_2(width)),
        ROWS=block,
        TOKENS=tokens,
        PAGE=page,
        MASKED=scores.mask is not None,
        RAGGED=lengths is not None,
        SCALED=rows.scale is not None,
        CAPPED=scores.softcap is not None,
        PRECISION="ieee",
        STAGES=stages,
        LOG=math.log(2) if splits == 1 else 1.0,
        RAISE=RAISE if rows.scale is not None and q_latent.dtype == torch.float16 else 1.0,
        num_warps=warps,
    )
    if splits > 1:
        merge_splits(parts, part_lse, out, lse)
    return out, lse


def _dense(part: Tensor) -> Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()


def _tiles(
    queries: int, rank: int, dtype: torch.dtype, shared: int, *, float8: bool = False
) -> tuple[int, int, int, int]:
    """Query rows and tokens of a tile, warps and pipeline stages, for ``shared`` bytes of shared memory."""
    block = min(64, max(16, triton.next_power_of_2(queries)))
    wide = rank > 256
    if dtype == torch.float32:
        return min(block, 16), 16 if wide else 32, 4, 1
    if wide and float8 and shared >= FLOAT8_BYTES:
        return 64, 64, 8, 2
    if wide and shared < WIDE_BYTES:
        block = min(block, 32)
    return block, 32 if wide else 64, 8 if block == 64 else 4, 2


@cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory, in bytes, that one program may use."""
    if device.type != "cuda":
        return WIDE_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", WIDE_BYTES))


def refuses(shape: DecodeShape) -> str | None:
    """Return why Triton cannot serve ``shape``, or None."""
    if triton is None:
        return "Triton is not installed: pip install triton"
    if shape.device.type != "cuda":
        return f"it runs on CUDA devices, not on '{shape.device.type}'"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype}: it takes bfloat16, float16 and float32"
    if shape.kv_lora_rank > MAX_RANK:
        return f"kv_lora_rank {shape.kv_lora_rank}: at most {MAX_RANK}"
    return None


BACKEND = Backend(
    "triton", "split-KV flash decoding in Triton", preference=10, refuses=refuses, decode=decode, opaque_to_compile=True
)
