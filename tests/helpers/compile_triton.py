"""Compile the portable decode kernel for GPUs that need not be here; print the shared memory that it takes as JSON."""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from transmla.kernels import triton_decode

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Types of the arguments that are no 32-bit integers; those of queries and rows follow the dtype.
TYPES = {"kv_scale": "*fp32", "mask": "*i8", "lengths": "*i32", "table": "*i32", "out": "*fp32", "lse": "*fp32"}
TYPES |= {"scale": "fp32", "cap": "fp32"}
ALIGNED = ("kv_batch", "kv_page", "kv_token", "pe_batch", "pe_page", "pe_token")


def shared_bytes(target: list[object], limit: int, queries: int, rank: int, width: int, dtype: str) -> int:
    """Return the shared memory in bytes of the kernel with the tiles that a GPU with ``limit`` bytes gets."""
    rows, tokens, warps, stages = triton_decode._tiles(queries, rank, DTYPES[dtype], limit)
    constants = {
        "new": 1, "RANK": rank, "WIDTH": width, "RANK_BLOCK": max(16, triton.next_power_of_2(rank)),
        "WIDTH_BLOCK": max(16, triton.next_power_of_2(width)), "ROWS": rows, "TOKENS": tokens, "PAGE": 0,
        "MASKED": False, "RAGGED": True, "SCALED": False, "CAPPED": False, "PRECISION": "ieee", "STAGES": stages,
        "LOG": 1.0, "RAISE": 1.0,
    }  # fmt: skip
    kernel = triton_decode._attend
    types = TYPES | dict.fromkeys(("q_latent", "q_pe", "kv_c", "k_pe"), f"*{dtype}")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ALIGNED
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return int(triton.compile(source, target=GPUTarget(*target), options={"num_warps": warps}).metadata.shared)


if __name__ == "__main__":
    print("\n" + json.dumps([shared_bytes(*case) for case in json.loads(sys.argv[1])]))
