"""Compile the Hopper kernels on any machine; print its shared memory and the assembler's log as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from transmla.kernels import hopper, hopper_float8_kernel, hopper_kernel

# Triton types of the kernel's pointer and 32-bit integer arguments.
POINTERS = {
    "mask": "*i8",
    **dict.fromkeys(("lengths", "table", "slots", "bounds"), "*i32"),
    **dict.fromkeys(("lse", "parts", "part_lse", "kv_scale"), "*fp32"),
}
NUMBERS = [
    "heads",
    "rows",
    "total",
    "splits",
    "capacity",
    "pe_capacity",
    "scale_token",
    "lengths_batch",
    "mask_batch",
    "mask_query",
    "mask_token",
    "table_batch",
]


def compile_kernel(
    rank: int,
    width: int,
    dtype: str,
    queries: int,
    new: int,
    page: int,
    masked: bool,
    divided: bool = False,
    float8: bool = False,
) -> dict[str, Any]:
    """Return the shared memory in bytes (``shared``) and the assembler's log (``log``) of one specialisation."""
    attend = hopper_float8_kernel.attend if float8 else hopper_kernel.attend
    tiles = hopper.choose_float8_tiles(rank) if float8 else hopper.choose_tiles(rank, queries, page)
    narrow, wide = (NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2) for bits in (8, 16))
    number, layout = ("u8", narrow) if float8 else (dtype, wide)
    types = {
        **dict.fromkeys(("q_latent", "q_pe", "out"), f"*{dtype}"),
        "kv": f"tensordesc<{number}[{tiles.tokens},{tiles.columns}],{layout}>",
        "pe": f"tensordesc<{dtype}[{tiles.tokens},{hopper.ROPE}],{wide}>",
        **POINTERS,
        "scale": "fp32",
        **dict.fromkeys(NUMBERS, "i32"),
    }
    names = attend.arg_names
    constants = {
        "NEW": new, "RANK": rank, "WIDTH": width, "RANK_BLOCK": tiles.columns, "TOKENS": tiles.tokens,
        "RAWS": tiles.raws, "WIDES": tiles.wides, "STAGES": tiles.stages,
        "SPILL": tiles.columns * tiles.tokens == hopper.SPILLING, "PAGE": page, "MASKED": masked, "RAGGED": not masked,
        "DIVIDED": divided, "LOG": 1.0, "REGISTERS": hopper.VALUE_REGISTERS,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in names}
    # A scale is found every few numbers, which need not be a multiple of 16.
    odd = {"scale", "scale_token"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types and name not in odd}
    signature = {name: types.get(name, "constexpr") for name in names}
    source = GluonASTSource(attend, signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(kernel.asm["ptx"])
        assembler = compiler.get_ptxas(90).path
        command = [assembler, "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {"shared": kernel.metadata.shared, "log": log}


if __name__ == "__main__":
    print(json.dumps([compile_kernel(**case) for case in json.loads(sys.argv[1])]))
