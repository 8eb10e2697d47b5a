"""Measure decode kernels on one GPU, on a grid of batches, contexts and numbers of heads.

    python scripts/kernel_bench.py
    python scripts/kernel_bench.py --shape 96+32 --heads 32
    python scripts/kernel_bench.py --float8 --backends hopper triton --result float8.json
    python scripts/kernel_bench.py --ragged --heads 16 128 --result ragged.json

Every time is the median over replays of a CUDA graph of several calls. A time includes everything that a call needs,
such as the merge of splits in this project's kernels. The plans of FlashMLA and FlashInfer are made outside the timing,
because their users make them once for all layers. GB/s counts each cached row once. TFLOP/s counts 2 H (2 r + d_r) for
each cached row. The result also says how fast the device copies and reads memory.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, write_result
from ragged_batches import LONGEST, SEQUENCES, measure_ragged
from replay_time import replay_seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.evaluate.bench import copy_bandwidth
from transmla.kernels import Backend, DecodeShape, backends, choose_backend, flashinfer
from transmla.kernels import reference as plain
from transmla.kernels.rows import Rows, Scores
from transmla.runtime.head_widths import one_width
from transmla.runtime.packed_rows import pack, unpack
from transmla.runtime.prefix_cache import attend, merge

# (batch, context) of the points.
GRID = [(128, 8192), (32, 16384), (32, 8192), (8, 32768), (128, 1024), (1, 65536), (1, 1024)]
SCALING = 0.1
# With --prefix: tokens of the shared prefix, tokens that every sequence adds, and width of an expanded head.
PREFIX, SUFFIX, HEAD = 8192, 256, 128
# Batches of --prefix.
BATCHES = (16, 32, 64, 128, 256)


def flashmla_call(q_latent: Tensor, q_pe: Tensor, rows: Rows) -> Callable[[], Any]:
    """Return a call of FlashMLA's decode kernel, with its queries and plan prepared."""
    import flash_mla

    paged, rank, size = rows.paged(64), q_latent.shape[-1], rows.kv_c.stride(1)
    pages = paged.kv_c.as_strided((len(paged.kv_c), 64, 1, size), (64 * size, size, size, 1))
    queries, plan = torch.cat([q_latent, q_pe], -1), flash_mla.get_mla_metadata()[0]
    settings = {"softmax_scale": SCALING, "causal": False, "use_legacy": True}
    return lambda: flash_mla.flash_mla_with_kvcache(
        queries, pages, paged.block_table, paged.lengths, rank, plan, **settings
    )


def flashinfer_call(q_latent: Tensor, q_pe: Tensor, rows: Rows) -> Callable[[], Any]:
    """Return a call of FlashInfer's decode kernel, with its plan prepared."""
    plans = flashinfer.Planner(q_latent.device)
    pages = plans.plan(q_latent, rows, q_pe.shape[-1], SCALING)
    return lambda: plans.run(q_latent, q_pe, pages)


VENDORS = {"flashmla": flashmla_call, "flashinfer": flashinfer_call}


def measure(arguments: argparse.Namespace, heads: int, buffer: Tensor) -> Iterator[dict[str, Any]]:
    """Yield one row for each backend and each point of the grid.

    Args:
        arguments: the command line.
        heads: number of query heads.
        buffer: random values that all caches are views of.
    """
    rank, width = arguments.shape
    shape = DecodeShape(heads, rank, width, buffer.dtype, buffer.device)
    for name in arguments.backends:
        backend: Backend = backends()[name]
        reason = backend.refuses(shape)
        if reason is None and (arguments.masked or arguments.float8) and name in VENDORS:
            reason = f"{name} is measured without a mask and with rows in 16 bits"
        if reason is not None:
            yield {"backend": name, "heads": heads, "refused": reason}
            continue
        for batch, context in GRID:
            cache = buffer[: batch * context * (rank + width)].view(batch, context, rank + width)
            generator = torch.Generator(buffer.device).manual_seed(0)
            queries = torch.randn(
                batch, 1, heads, rank + width, dtype=buffer.dtype, device=buffer.device, generator=generator
            )
            q_latent, q_pe = (part.contiguous() for part in (queries / 8).split([rank, width], -1))
            # Lengths that are known to be equal, as decode steps pass them.
            lengths = torch.tensor([context], dtype=torch.int32, device=buffer.device).expand(batch)
            rows, mask = Rows(*cache.split([rank, width], -1), lengths=lengths), None
            if arguments.float8:
                cache = pack(rows.kv_c, rows.k_pe)
                rows = replace(unpack(cache, rank, width, buffer.dtype), lengths=lengths)
            if arguments.masked:
                rows = replace(rows, lengths=None)
                mask = torch.ones(batch, 1, 1, context, dtype=torch.bool, device=buffer.device)
            step = q_latent, q_pe, rows

            def call(backend: Backend = backend, step: Any = step, mask: Tensor | None = mask) -> Any:
                return backend.decode(*step, Scores(SCALING, mask))

            if name in VENDORS:
                call = VENDORS[name](q_latent, q_pe, Rows(rows.kv_c, rows.k_pe))
            one = Rows(rows.kv_c[:1], rows.k_pe[:1], None if rows.scale is None else rows.scale[:1])
            first = Rows(*(part.float() for part in one.full()))
            expected = plain.decode(q_latent[:1].float(), q_pe[:1].float(), first, Scores(SCALING))[0]
            error = (call()[0][:1].float() - expected).abs().max() / expected.abs().max()
            seconds = replay_seconds(call, 5 if batch * context >= 2**20 else 20)
            yield {
                "backend": name,
                "heads": heads,
                "shape": f"{rank}+{width}",
                "masked": arguments.masked,
                "float8": arguments.float8,
                "batch": batch,
                "context": context,
                "microseconds": round(seconds * 1e6, 2),
                "GB/s": round(cache.nbytes / seconds / 1e9),
                "TFLOP/s": round(2 * batch * context * heads * (2 * rank + width) / seconds / 1e12, 1),
                "error": round(float(error), 5),
            }


def measure_prefix(arguments: argparse.Namespace, heads: int, buffer: Tensor) -> Iterator[dict[str, Any]]:
    """Yield one row for each batch, with the times of three ways to hold a prefix that all sequences share.

    The prefix is held once and expanded, held once as a latent, or held by every sequence.

    Args:
        arguments: the command line.
        heads: number of query heads.
        buffer: random values that all tensors are views of.
    """
    rank, width = arguments.shape
    shape = DecodeShape(heads, rank, width, buffer.dtype, buffer.device)
    decode = choose_backend("hopper", shape).decode
    for batch in BATCHES:

        def rows(*sizes: int) -> Tensor:
            return buffer[: math.prod(sizes)].view(sizes)

        def latent(queries: int, sequences: int, tokens: int) -> Callable[[], Any]:
            cache, q = rows(sequences, tokens, rank + width), rows(sequences, queries, heads, rank + width) / 8
            latent_rows = Rows(*cache.split([rank, width], -1))
            return lambda: decode(*q.split([rank, width], -1), latent_rows, Scores(SCALING))

        query, own = rows(1, heads, batch, HEAD + width) / 8, latent(1, batch, SUFFIX)
        keys, values = one_width(rows(1, heads, PREFIX, HEAD + width), rows(1, heads, PREFIX, HEAD))
        out, lse = rows(batch, heads, HEAD), torch.zeros(batch, heads, device=buffer.device)

        def expanded(query: Tensor = query, keys: Tensor = keys, values: Tensor = values) -> Any:
            return attend(query, keys, values, SCALING)

        def shared(own: Any = own, expanded: Any = expanded, out: Tensor = out, lse: Tensor = lse) -> Any:
            own()
            expanded()
            return merge(out, lse, out, lse)

        # The prefix is the same for all sequences, so their queries are passed as the queries of one sequence.
        together = latent(batch, 1, PREFIX)
        times = {
            "each its own": replay_seconds(latent(1, batch, PREFIX + SUFFIX), 3),
            "shared, expanded": replay_seconds(shared, 10),
            "prefix expanded": replay_seconds(expanded, 10),
            "prefix as latent": replay_seconds(together, 10),
            "suffixes": replay_seconds(own, 10),
        }
        yield {"heads": heads, "batch": batch, "prefix": PREFIX, "suffix": SUFFIX} | {
            name: round(seconds * 1e6, 1) for name, seconds in times.items()
        }


def show(rows: list[dict[str, Any]]) -> None:
    """Print GB/s (and microseconds) by point, one line for each backend and number of heads."""
    table = Table("backend", "heads", *(f"{batch} x {context}" for batch, context in GRID), "error")
    keys = dict.fromkeys((row["backend"], row["heads"]) for row in rows if "refused" not in row)
    for backend, heads in keys:
        selected = [row for row in rows if (row["backend"], row["heads"]) == (backend, heads)]
        cells = [f"{row['GB/s']} ({row['microseconds']:.1f})" for row in selected]
        table.add_row(backend, str(heads), *cells, f"{max(row['error'] for row in selected):.1e}")
    Console(width=200).print(table, *{row["refused"] for row in rows if "refused" in row})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="512+64", help="kv_lora_rank+qk_rope_head_dim")
    parser.add_argument("--heads", nargs="*", type=int, default=[16, 32, 64, 128], help="numbers of query heads")
    parser.add_argument("--masked", action="store_true", help="pass the mask of a static cache instead of lengths")
    parser.add_argument("--float8", action="store_true", help="rows with float8 latents, as cache_dtype packs them")
    parser.add_argument("--prefix", action="store_true", help="measure a shared prefix instead of the grid")
    parser.add_argument("--ragged", action="store_true", help="measure batches of different lengths, Hopper kernel")
    parser.add_argument(
        "--backends", nargs="*", default=["hopper", "triton", "flashmla", "flashinfer"], help="kernels to measure"
    )
    parser.add_argument("--result", type=Path, default=RESULTS / "kernel_bench/512-64.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    arguments.shape = [int(part) for part in arguments.shape.split("+")]
    if not torch.cuda.is_available():
        raise TransmlaError(
            "no GPU", limit="decode kernels are timed on a GPU", remedy="run the script where torch sees CUDA"
        )
    tokens = max(batch * context for batch, context in GRID)
    if arguments.prefix:
        tokens = max(BATCHES) * (PREFIX + SUFFIX)
    if arguments.ragged:
        tokens = SEQUENCES * LONGEST
    buffer = torch.randn(tokens * sum(arguments.shape), dtype=torch.bfloat16, device="cuda")
    copied = copy_bandwidth(buffer.device) / 1e9
    read = buffer.nbytes / replay_seconds(lambda: buffer.view(torch.float32).sum(), 3) / 1e9
    print(f"the device copies {copied:.0f} GB/s and reads {read:.0f} GB/s")
    if arguments.prefix or arguments.ragged:
        measure_special = measure_prefix if arguments.prefix else measure_ragged
        special = [row for heads in arguments.heads for row in measure_special(arguments, heads, buffer)]
        for row in special:
            print(*(f"{key}={value}" for key, value in row.items()))
        write_result(arguments.result, special, arguments.commit)
        return
    rows: list[dict[str, Any]] = [{"copy GB/s": round(copied), "read GB/s": round(read)}]
    for heads in arguments.heads:
        rows += measure(arguments, heads, buffer)
    show(rows[1:])
    write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
