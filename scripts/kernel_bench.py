"""Measure decode kernels on one GPU, on a grid of batches, contexts and numbers of heads.

    python scripts/kernel_bench.py
    python scripts/kernel_bench.py --shape 96+32 --heads 32
    python scripts/kernel_bench.py --ragged --heads 16 128 --result ragged.json

Every time is the median over replays of a CUDA graph of several calls. A time includes everything that a call needs,
such as the merge of splits in this project's kernels. The plans of FlashMLA and FlashInfer are made outside the timing,
because their users make them once for all layers. GB/s counts each cached row once. TFLOP/s counts 2 H (2 r + d_r) for
each cached row. The result also says how fast the device copies and reads memory.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.evaluate.bench import copy_bandwidth
from transmla.kernels import Backend, DecodeShape, backends, choose_backend, flashinfer
from transmla.kernels import reference as plain
from transmla.kernels.rows import Rows, Scores
from transmla.runtime.head_widths import one_width
from transmla.runtime.prefix_cache import attend, merge

# (batch, context) of the points.
GRID = [(128, 8192), (32, 16384), (32, 8192), (8, 32768), (128, 1024), (1, 65536), (1, 1024)]
SCALING = 0.1
# With --prefix: tokens of the shared prefix, tokens that every sequence adds, and width of an expanded head.
PREFIX, SUFFIX, HEAD = 8192, 256, 128
# Batches of --prefix.
BATCHES = (16, 32, 64, 128, 256)
# With --ragged: sequences of a batch, and tokens of the shortest and of the longest one.
SEQUENCES, SHORTEST, LONGEST = 32, 1024, 131072


def replay_seconds(call: Callable[[], Any], calls: int, replays: int = 7) -> float:
    """Return the median seconds of one call, over ``replays`` of a CUDA graph of ``calls`` calls."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / calls)
    return statistics.median(times)


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
        if reason is None and arguments.masked and name in VENDORS:
            reason = f"{name} takes no mask"
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
            lengths = torch.full((batch,), context, dtype=torch.int32, device=buffer.device)
            rows, mask = Rows(*cache.split([rank, width], -1), lengths=lengths), None
            if arguments.masked:
                rows = replace(rows, lengths=None)
                mask = torch.ones(batch, 1, 1, context, dtype=torch.bool, device=buffer.device)
            step = q_latent, q_pe, rows

            def call(backend: Backend = backend, step: Any = step, mask: Tensor | None = mask) -> Any:
                return backend.decode(*step, Scores(SCALING, mask))

            if name in VENDORS:
                call = VENDORS[name](q_latent, q_pe, Rows(rows.kv_c, rows.k_pe))
            first = Rows(*(part.float() for part in cache[:1].split([rank, width], -1)))
            expected = plain.decode(q_latent[:1].float(), q_pe[:1].float(), first, Scores(SCALING))[0]
            error = (call()[0][:1].float() - expected).abs().max() / expected.abs().max()
            seconds = replay_seconds(call, 5 if batch * context >= 2**20 else 20)
            yield {
                "backend": name,
                "heads": heads,
                "shape": f"{rank}+{width}",
                "masked": arguments.masked,
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


def measure_ragged(arguments: argparse.Namespace, heads: int, buffer: Tensor) -> Iterator[dict[str, Any]]:
    """Yield one row for lengths and one for left padding: a ragged batch, and a uniform one with as many cached tokens.

    The lengths of the ragged batch are spread geometrically. The uniform batch is measured twice: with lengths that
    are known to be equal, and with the same lengths as values on the device. The ratio compares with the former.

    Args:
        arguments: the command line.
        heads: number of query heads.
        buffer: random values that all caches are views of.
    """
    rank, width = arguments.shape
    decode = choose_backend("hopper", DecodeShape(heads, rank, width, buffer.dtype, buffer.device)).decode
    growth = (LONGEST / SHORTEST) ** (1 / (SEQUENCES - 1))
    spread = [round(SHORTEST * growth**i) for i in range(SEQUENCES)]
    mean = sum(spread) // SEQUENCES
    queries = torch.randn(SEQUENCES, 1, heads, rank + width, dtype=buffer.dtype, device=buffer.device) / 8
    q_latent, q_pe = (part.contiguous() for part in queries.split([rank, width], -1))

    def measured(lengths: Tensor, masked: bool) -> tuple[float, float]:
        """Return seconds, and the largest error among the shortest and the longest sequence."""
        total = int(lengths.max())
        cache = buffer[: SEQUENCES * total * (rank + width)].view(SEQUENCES, total, rank + width)
        rows, mask = Rows(*cache.split([rank, width], -1), lengths=None if masked else lengths), None
        if masked:
            padding = total - (lengths[:1] if lengths.stride(0) == 0 else lengths)
            keys = torch.arange(total, device=buffer.device)
            mask = keys >= padding[:, None, None, None]

        def call() -> Any:
            return decode(q_latent, q_pe, rows, Scores(SCALING, mask))

        out, errors = call()[0], []
        for b in (0, SEQUENCES - 1):
            visible = cache[b : b + 1, total - int(lengths[b]) :] if masked else cache[b : b + 1, : int(lengths[b])]
            own = Rows(*visible.float().split([rank, width], -1))
            expected = plain.decode(q_latent[b : b + 1].float(), q_pe[b : b + 1].float(), own, Scores(SCALING))[0]
            errors.append(float((out[b : b + 1].float() - expected).abs().max() / expected.abs().max()))
        return replay_seconds(call, 5), max(errors)

    for masked in (False, True):
        ragged_lengths = torch.tensor(spread, dtype=torch.int32, device=buffer.device)
        equal = torch.full((SEQUENCES,), mean, dtype=torch.int32, device=buffer.device)
        uniform, _ = measured(equal[:1].expand(SEQUENCES), masked)
        unknown, _ = measured(equal, masked)
        ragged, error = measured(ragged_lengths, masked)
        size = (rank + width) * buffer.element_size() / 1e9
        yield {
            "heads": heads,
            "shape": f"{rank}+{width}",
            "masked": masked,
            "tokens": sum(spread),
            "uniform GB/s": round(mean * SEQUENCES * size / uniform),
            "uniform, lengths unknown GB/s": round(mean * SEQUENCES * size / unknown),
            "ragged GB/s": round(sum(spread) * size / ragged),
            "ragged microseconds": round(ragged * 1e6, 1),
            "ratio": round(sum(spread) / ragged / (mean * SEQUENCES / uniform), 3),
            "error": round(error, 5),
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
