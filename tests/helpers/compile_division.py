"""Compile the kernels that divide a ragged batch and merge its pieces, for Hopper GPUs; print their spills as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from transmla.kernels import hopper_mask, ragged, splits

POINTERS = {
    "mask": "*i8",
    **dict.fromkeys(("lengths", "bounds", "slots", "pieces"), "*i32"),
    **dict.fromkeys(("parts", "part_lse", "lse"), "*fp32"),
    "log": "fp32",
    "out": "*bf16",
}


def spilled_bytes(source: Any, kernel: Any, warps: int, **constants: Any) -> int:
    """Return the bytes of spill stores of one specialisation of ``kernel``, compiled from a ``source`` class."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    compiled = triton.compile(
        source(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        command = [compiler.get_ptxas(90).path, "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.findall(r"(\d+) bytes spill stores", log)[-1])


def all_spills() -> dict[str, int]:
    """Return the spills of every kernel and specialisation by name."""
    spills = {}
    for new, by_length in ((1, False), (2, True)):
        spills[f"bounds of {new}"] = spilled_bytes(
            GluonASTSource, hopper_mask.find_bounds, hopper_mask.BOUND_WARPS, mask_token=1, NEW=new, RAGGED=by_length
        )
    for batch, bounded in ((16, True), (32, False), (ragged.MAX_BATCH, True)):
        settings = {"TOKENS": 64, "ROUNDS": ragged.ROUNDS, "BOUNDED": bounded, **ragged.launch_sizes(batch)}
        spills[f"division of {batch}"] = spilled_bytes(ASTSource, ragged._divide, settings.pop("num_warps"), **settings)
    for divided in (False, True):
        spills[f"merge, {divided=}"] = spilled_bytes(
            ASTSource, splits._merge, 4, RANK=512, COLUMNS=512, SPLITS=8, DIVIDED=divided, EARLY=True
        )
    return spills


if __name__ == "__main__":
    print("\n" + json.dumps(all_spills()))
