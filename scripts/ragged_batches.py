"""Batches of sequences of different lengths, for ``kernel_bench.py --ragged``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from replay_time import replay_seconds
from torch import Tensor

from transmla.kernels import DecodeShape, choose_backend
from transmla.kernels import reference as plain
from transmla.kernels.rows import Rows, Scores

# Sequences of a batch, and tokens of the shortest and of the longest one.
SEQUENCES, SHORTEST, LONGEST = 32, 1024, 131072


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
    scaling = (rank + width) ** -0.5
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
            return decode(q_latent, q_pe, rows, Scores(scaling, mask))

        out, errors = call()[0], []
        for b in (0, SEQUENCES - 1):
            visible = cache[b : b + 1, total - int(lengths[b]) :] if masked else cache[b : b + 1, : int(lengths[b])]
            own = Rows(*visible.float().split([rank, width], -1))
            expected = plain.decode(q_latent[b : b + 1].float(), q_pe[b : b + 1].float(), own, Scores(scaling))[0]
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
