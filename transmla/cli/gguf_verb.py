"""The verb that writes an export for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transmla.cli.early import load_libraries, refuse_unfinished


def gguf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export in the native format.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    file_type: Annotated[
        str, typer.Option("--type", help="Type of the weights: f32, bf16, f16, q8_0 or q4_k_m.")
    ] = "q8_0",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run the file in llama.cpp (pip install xllamacpp).")
    ] = True,
) -> None:
    """Write an export as a GGUF file for llama.cpp and the programs built on it.

    The file is compared with transformers before it gets its name: tokens of a text, and log-probs of a greedy
    continuation. Needs `pip install gguf`.

    Example: transmla gguf llama-mla -o llama-mla-q8_0.gguf --type q8_0
    """
    from transmla.serve.request import check_gguf

    check_gguf(output, file_type)
    refuse_unfinished(folder)
    load_libraries()
    from transmla.cli import console
    from transmla.cli.bars import Bars
    from transmla.serve.gguf_file import write_gguf

    with Bars() as bars:
        written = write_gguf(folder, output, file_type, check=check, reporter=bars)
    kinds = ", ".join(f"{count} {kind}" for kind, count in written.types.items())
    console.say(f"wrote {written.path}, {console.gigabytes(written.size)}: {kinds}")
    if written.check is None:
        console.say(f"not run: {written.unchecked}")
        return
    found = written.check
    console.say(
        f"run in llama.cpp and compared with transformers: {found.equal} of {found.tokens} greedy tokens are equal, and"
        f" log-probs differ by {found.mean:.2g} on average, {found.largest:.2g} at most"
    )
