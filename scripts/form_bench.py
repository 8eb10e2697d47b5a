"""Measure three forms of attention to a latent cache, for one layer with random weights.

    python scripts/form_bench.py --shapes llama-3-8b qwen2.5-0.5b
    python scripts/form_bench.py --shapes smollm2 --new 1 2 4 8 16 32 64 128 256

Forms:
    absorbed   attend to the latents with W_UK folded into the queries and W_UV into the output, by ``attend_to_latent``
    rebuilt    rebuild the keys and values of all heads from the latents, then SDPA, as ``latent_attention`` does
    groups     the keys and values of the source's KV groups lie in the cache (GQLA, arXiv 2605.15250), and the heads of
               a group attend to them. The fastest of several kernels counts. It needs weights W_UK and W_UV that are
               equal in a group: the layer has such weights, so that all forms compute the same output.
    rebuild, attend: the two parts of "rebuilt", each alone

Every point is one batch, context and number of new tokens per sequence. The new tokens are the last of the context.
Times are medians of replays of a CUDA graph, or of calls on a CPU. A call
that is repeated finds a small cache in the GPU's L2 cache, from which other layers would have removed it in a model.

Each row of the result has microseconds, the products of the form in TFLOP/s, the cache bytes of a token, the kernel,
and the error relative to the absorbed form. Rows "rate of" are medians of TFLOP/s over the points that fill a GPU: with
FULL_TOKENS cached tokens or more in all sequences and, unless latents are rebuilt, FULL_QUERIES query rows n H or more.
Points that do not begin within ``--seconds`` are left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from prefill_bench import seconds
from provenance import RESULTS, write_result
from replay_time import replay_seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from transmla.kernels.rows import Rows
from transmla.runtime.absorbed import attend_to_latent
from transmla.runtime.decode_request import MOST_NEW
from transmla.runtime.family_attention import attend_expanded
from transmla.runtime.head_widths import one_width
from transmla.runtime.load import accelerate
from transmla.runtime.prefix_cache import attend, merge

# A graph holds one call of those that take longer than this, in seconds.
GRAPH_SECONDS = 0.001
# Shorter calls in one CUDA graph, and timed replays; on a CPU, timed calls.
GRAPH_CALLS, REPEATS = 5, 3
# Keys of a row that name its point.
POINT = ("shape", "batch", "context", "new")
# Forms of the table.
FORMS = ("absorbed", "rebuilt", "groups")
# Smallest numbers of cached tokens in all sequences, and of query rows n H, of points that fill a GPU.
FULL_TOKENS, FULL_QUERIES = 2**17, 128


@dataclass(frozen=True)
class Shape:
    """Shape of one attention layer of an export: H query heads, G groups of the source, widths r, d_r, d_n and d_v."""

    heads: int
    groups: int
    rank: int
    rope: int
    nope: int
    value: int

    def products(self, form: str, new: int) -> int:
        """Return the multiplications of ``form`` for one cached token and ``new`` tokens."""
        attend = self.heads * new * (self.nope + self.rope + self.value)
        rebuild = self.heads * self.rank * (self.nope + self.value)
        absorbed = self.heads * new * (2 * self.rank + self.rope)
        return {"absorbed": absorbed, "rebuild": rebuild, "rebuilt": rebuild + attend}.get(form, attend)


SHAPES = {
    "llama-3-8b": Shape(heads=32, groups=8, rank=512, rope=64, nope=128, value=128),
    "llama-3-70b": Shape(heads=64, groups=8, rank=512, rope=64, nope=128, value=128),
    "qwen2.5-0.5b": Shape(heads=14, groups=2, rank=96, rope=32, nope=64, value=64),
    "smollm2": Shape(heads=9, groups=3, rank=64, rope=32, nope=64, value=64),
    "tiny": Shape(heads=4, groups=2, rank=16, rope=8, nope=8, value=8),
}


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """Return an accelerated MLA layer of ``shape``, whose heads of one group have equal W_UK and W_UV."""
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, kv_lora_rank=shape.rank, q_lora_rank=None,
        qk_rope_head_dim=shape.rope, head_dim=shape.rope, qk_nope_head_dim=shape.nope, v_head_dim=shape.value,
        first_k_dense_replace=1,
    )  # fmt: skip
    model = accelerate(AutoModelForCausalLM.from_config(config).to(device, dtype).eval())
    layer = model.model.layers[0].self_attn
    weight = torch.randn(shape.groups, 1, shape.nope + shape.value, shape.rank) / shape.rank**0.5
    weight = weight.expand(-1, shape.heads // shape.groups, -1, -1).reshape(-1, shape.rank)
    layer.kv_b_proj.weight.copy_(weight)
    return layer


def cudnn(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attend as ``prefix_cache.attend`` does, by cuDNN."""
    output, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scaling)[:2]
    return output, lse.reshape(output.shape[:-1])


def flash_with_groups(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attend by flash attention, whose queries of one group find their keys themselves; causal to the lower right."""
    causal, wide = query.shape[2] > 1, one_width(query, keys, values)
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*wide, 0.0, causal, scale=scaling)[0]
    return output


def groups_as_rows(kernel: Callable[..., Any], query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attend with all queries of a group as rows of one head; ``kernel`` is ``attend`` or ``cudnn``.

    ``query`` is [B, H, n, d_n + d_r], ``keys`` and ``values`` are [B, G, T, ·], the outputs [B, H, n, ·]. Old tokens
    need no mask, so ``kernel`` attends to them. The new tokens have a mask, and the two results are merged.
    """
    batch, heads, new, width = query.shape
    rows = query.reshape(batch, keys.shape[1], -1, width)
    old = keys.shape[2] - (new if new > 1 else 0)
    output, lse = kernel(rows, keys[:, :, :old], values[:, :, :old], scaling)
    if new > 1:
        hidden = torch.ones(new, new, dtype=torch.bool, device=query.device).triu(1)
        scores = (rows @ keys[:, :, old:, -width:].mT).float() * scaling
        scores = scores.view(*scores.shape[:2], -1, new, new).masked_fill(hidden, float("-inf")).view_as(scores)
        own_lse = scores.logsumexp(-1)
        own = (scores - own_lse[..., None]).exp().to(values.dtype) @ values[:, :, old:]
        output = merge(output[..., -own.shape[-1] :], lse, own, own_lse)
    return output.reshape(batch, heads, new, -1)


class Call(NamedTuple):
    """One way to attend: form, kernel, cache bytes of a token, and a function that returns outputs [B, n, H, d_v]."""

    form: str
    kernel: str
    cache_bytes: int
    run: Callable[[], Tensor]


def calls(layer: Any, shape: Shape, batch: int, context: int, new: int) -> Iterator[Call]:
    """Yield the calls of all forms at one point, "absorbed" first."""
    weight, extras = layer.kv_b_proj.weight, {"scaling": layer.scaling, "dropout": 0.0}
    made: Any = {"dtype": weight.dtype, "device": weight.device}
    kv_c, k_pe = (torch.randn(batch, context, width, **made) for width in (shape.rank, shape.rope))
    query = torch.randn(batch, shape.heads, new, shape.nope + shape.rope, **made)
    rows, mask = Rows(kv_c, k_pe), None
    if new > 1:
        mask = torch.ones(new, context, dtype=torch.bool, device=weight.device).tril(context - new)
        mask = mask.expand(batch, 1, -1, -1)
    # Captured steps count the rows of each sequence. Steps of more tokens run eagerly, with a mask.
    step = (rows, mask)
    if new <= MOST_NEW:
        step = (Rows(kv_c, k_pe, lengths=torch.full((batch,), context, dtype=torch.int32, device=weight.device)), None)
    latent = (shape.rank + shape.rope) * weight.element_size()
    yield Call("absorbed", layer.backend.name, latent, lambda: attend_to_latent(layer, query, *step, extras)[0])
    yield Call("rebuilt", "SDPA", latent, lambda: attend_expanded(layer, query, *layer.expanded(rows), mask, **extras))
    yield Call("rebuild", "", latent, lambda: layer.expanded(rows)[0])
    expanded = layer.expanded(rows)
    yield Call("attend", "SDPA", latent, partial(attend_expanded, layer, query, *expanded, mask, **extras))
    del expanded
    keys, values = group_cache(weight, shape, rows)
    kernels: dict[str, Callable[..., Tensor]] = {"rows": partial(groups_as_rows, attend)}
    if weight.is_cuda:
        kernels |= {"rows of cuDNN": partial(groups_as_rows, cudnn), "heads": flash_with_groups}
    for name, kernel in kernels.items():
        # Flash attention needs one width, so that a cache for it holds padded values. cuDNN needs no padding.
        held = values if name == "rows of cuDNN" else one_width(keys, values)[1]

        def run(kernel: Callable[..., Tensor] = kernel, held: Tensor = held) -> Tensor:
            return kernel(query, keys, held, layer.scaling)[..., -shape.value :].transpose(1, 2)

        size = (keys.shape[-1] + held.shape[-1]) * shape.groups * weight.element_size()
        yield Call("groups", name, size, run)


def group_cache(weight: Tensor, shape: Shape, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return keys [B, G, T, d_n + d_r] and values [B, G, T, d_v], expanded by the first head of each group."""
    first = weight.view(shape.groups, -1, shape.nope + shape.value, shape.rank)[:, 0].flatten(0, 1)
    expanded = (rows.kv_c @ first.mT).unflatten(-1, (shape.groups, -1)).transpose(1, 2)
    k_nope, values = expanded.split([shape.nope, shape.value], -1)
    return torch.cat([k_nope, rows.k_pe[:, None].expand(-1, shape.groups, -1, -1)], -1), values.contiguous()


def microseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of ``run()``, after one run that compiles kernels."""
    times = [seconds(run, device) for _ in range(REPEATS + 1)][1:]
    if device.type == "cuda":
        # A call on its own would be bound by the host, which takes a millisecond to launch its kernels.
        return replay_seconds(run, GRAPH_CALLS if times[-1] < GRAPH_SECONDS else 1, REPEATS) * 1e6
    return statistics.median(times) * 1e6


def measure(name: str, arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield one row for each call at each point of the shape called ``name``."""
    shape, stop = SHAPES[name], time.perf_counter() + arguments.seconds / len(arguments.shapes)
    layer = build(shape, getattr(torch, arguments.dtype), device)
    for context, batch, new in product(arguments.context, arguments.batch, arguments.new):
        if time.perf_counter() > stop:
            print(f"{name}: no time for batch {batch}, context {context}, {new} new tokens and the points after it")
            return
        torch.manual_seed(0)
        expected = None
        for call in calls(layer, shape, batch, context, new):
            # The time to rebuild does not depend on the new tokens.
            if call.form == "rebuild" and new != arguments.new[0]:
                continue
            names = {"form": call.form, "kernel": call.kernel, "cache bytes": call.cache_bytes}
            row = dict(zip(POINT, (name, batch, context, new), strict=True)) | names
            try:
                time_us = microseconds(call.run, device)
                if call.form == "absorbed":
                    expected = call.run().float()
                elif call.form != "rebuild" and expected is not None:
                    row["error"] = round(float((call.run() - expected).norm() / expected.norm()), 5)
            except (RuntimeError, NotImplementedError) as error:
                yield row | {"refused": str(error).strip().splitlines()[0]}
                continue
            products = shape.products(call.form, new) * batch * context
            yield row | {"microseconds": round(time_us, 1), "TFLOP/s": round(2 * products / time_us / 1e6, 4)}
        del expected
        if device.type == "cuda":
            torch.cuda.empty_cache()


def fastest(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """Return the fastest row of each form that was timed, by point."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in (row for row in rows if "microseconds" in row):
        of_point = found.setdefault(tuple(row[key] for key in POINT), {})
        best = of_point.get(row["form"])
        if best is None or row["microseconds"] < best["microseconds"]:
            of_point[row["form"]] = row
    return found


def rates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the median TFLOP/s of each shape and form, over the points that fill a GPU."""
    full: dict[tuple[str, str], list[float]] = {}
    for (name, batch, context, new), of_point in fastest(rows).items():
        for form, row in of_point.items():
            queries = FULL_QUERIES if form == "rebuild" else new * SHAPES[name].heads
            if form != "rebuilt" and batch * context >= FULL_TOKENS and queries >= FULL_QUERIES:
                full.setdefault((name, form), []).append(row["TFLOP/s"])
    return [
        {"shape": name, "rate of": form, "TFLOP/s": round(statistics.median(found), 4), "points": len(found)}
        for (name, form), found in full.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the microseconds of the fastest kernel of each form, by point."""
    table = Table(*POINT, "absorbed", "rebuilt", "groups", "kernel", "error")
    for point, of_point in fastest(rows).items():
        cells = [f"{of_point[form]['microseconds']:,.1f}" if form in of_point else "–" for form in FORMS]
        group = of_point.get("groups", {})
        table.add_row(*map(str, point), *cells, group.get("kernel", "–"), str(group.get("error", "–")))
    Console(width=120).print(table)
    for refused in sorted({f"{row['form']}, {row['kernel']}: {row['refused']}" for row in rows if "refused" in row}):
        print(refused)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-3-8b", "qwen2.5-0.5b"], help="layers")
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 32, 1], help="sequences")
    parser.add_argument("--context", nargs="+", type=int, default=[16384, 1024], help="cached tokens, the new included")
    parser.add_argument("--new", nargs="+", type=int, default=[1, 4, 16, 64, 256], help="new tokens of a sequence")
    parser.add_argument("--seconds", type=float, default=44, help="time in which points of all shapes begin")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of weights and cache")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    parser.add_argument("--result", type=Path, default=RESULTS / "form_bench/result.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    device, rows = torch.device(arguments.device), []
    for name in arguments.shapes:
        began, before = time.perf_counter(), len(rows)
        rows += measure(name, arguments, device)
        show(rows[before:])
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        # Written after each shape, so that a run that is cut off leaves the shapes before.
        write_result(arguments.result, [*rates(rows), *rows], arguments.commit)
    for row in rates(rows):
        print(*(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
