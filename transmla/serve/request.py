"""Check requests to serve an export or to write it for llama.cpp, before torch is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transmla.boundary import read_json
from transmla.errors import TransmlaError, missing_package

VLLM, SGLANG, TRANSFORMERS = "vllm", "sglang", "transformers"
# Types of files, with the number that the field general.file_type has for each (GGUF's LlamaFileType).
FILE_TYPES = {"f32": 0, "bf16": 32, "f16": 1, "q8_0": 7, "q4_k_m": 15}


def check_runtime(runtime: str) -> None:
    """Check the name of a runtime that serves.

    Raises:
        TransmlaError: if it is not ``auto``, ``vllm``, ``sglang`` or ``transformers``.
    """
    if runtime not in ("auto", VLLM, SGLANG, TRANSFORMERS):
        limit = "auto, vllm, sglang or transformers"
        raise TransmlaError(f"unknown runtime '{runtime}'", limit=limit, remedy="choose one")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json`` in ``folder``, which names a model type.

    Raises:
        TransmlaError: if the file is missing or damaged.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise TransmlaError(
            f"'{folder}' has no config.json", limit="serve takes a local folder", remedy="give the folder of an export"
        )
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        limit, remedy = "it names no model_type", "correct its config.json"
        raise TransmlaError(f"cannot read the config of '{folder}'", limit=limit, remedy=remedy)
    return config


def check_gguf(output: Path, file_type: str) -> None:
    """Check what ``write_gguf`` is asked for, before the export is read.

    Raises:
        TransmlaError: if the type is unknown, ``gguf`` is not installed, or ``output`` exists or has no folder.
    """
    if file_type not in FILE_TYPES:
        raise TransmlaError(
            f"unknown type '{file_type}'", limit=f"supported: {', '.join(FILE_TYPES)}", remedy="choose one with --type"
        )
    if importlib.util.find_spec("gguf") is None:
        raise missing_package("writing a GGUF file needs the 'gguf' package", "gguf")
    if output.exists():
        raise TransmlaError(f"'{output}' exists", limit="nothing is overwritten", remedy="choose another --output")
    if not output.parent.is_dir():
        raise TransmlaError(f"there is no folder '{output.parent}'", remedy="create it, or choose another --output")
