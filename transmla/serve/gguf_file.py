"""Write a native export as a GGUF file for llama.cpp."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transmla.boundary import boundary, read_json, read_json_object
from transmla.errors import TransmlaError
from transmla.export.manifest import Manifest
from transmla.files import temporary
from transmla.formats.llama_cpp_limits import llama_cpp_refusal
from transmla.reporter import Reporter, Silent
from transmla.serve.gguf_check import GgufCheck, check_file, refuse_check
from transmla.serve.gguf_fields import open_writer
from transmla.serve.gguf_quantise import HALF_MAX, quantise
from transmla.serve.gguf_scale import choose_scales
from transmla.serve.gguf_tensors import GgufTensor, count_bytes, export_shapes, list_tensors
from transmla.serve.gguf_tokenizer import describe_tokenizer
from transmla.serve.request import check_gguf
from transmla.source.checkpoint import open_checkpoint
from transmla.source.load import load_tokenizer

# Share of the disk that must stay free, in bytes of the file.
SLACK = 1.01
# Fields of config.json that are read, with their types.
FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"), int),
    **dict.fromkeys(("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), int),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), int),
    "q_lora_rank": (int, type(None)),
    "rms_norm_eps": (float, int),
    "hidden_act": str,
    "rope_parameters": dict,
}


@dataclass(frozen=True)
class WrittenGguf:
    """A GGUF file that was written.

    Attributes:
        path: the file.
        size: its bytes.
        types: number of tensors by type of GGUF.
        check: the comparison with transformers; None if the file was not run.
        unchecked: why the file was not run; empty if it was.
    """

    path: Path
    size: int
    types: dict[str, int]
    check: GgufCheck | None
    unchecked: str


def write_gguf(
    folder: Path, output: Path, file_type: str, *, check: bool = True, reporter: Reporter | None = None
) -> WrittenGguf:
    """Write the native export in ``folder`` as a GGUF file.

    Tensors are read, rescaled, quantised and written one at a time. The file gets its name at the end, after the
    comparison with transformers; until then it lies in a hidden folder beside ``output``.

    Args:
        folder: folder of the export.
        output: the file to write.
        file_type: f32, bf16, f16, q8_0 or q4_k_m.
        check: whether to run the file, if ``xllamacpp`` is installed, and compare it with transformers.
        reporter: receives the progress.

    Raises:
        TransmlaError: if llama.cpp cannot read such a model or tokenizer, if ``output`` exists or the disk lacks space,
            if ``gguf`` is missing, or if the file computes something else than the export.
    """
    reporter = reporter or Silent()
    check_gguf(output, file_type)
    manifest = Manifest.read(folder)
    _check_format(folder, manifest)
    config = _read_config(folder)
    check_config(config)
    tokenizer = load_tokenizer(folder)
    vocabulary = describe_tokenizer(tokenizer, config["vocab_size"], _ends(folder, config))
    checkpoint = open_checkpoint(folder)
    _check_tensors(config, checkpoint.shapes)
    layers = config["num_hidden_layers"]
    scales = choose_scales(layers, config["kv_lora_rank"], set(checkpoint.shapes), checkpoint.read)
    tensors = list(list_tensors(config, dict(checkpoint.shapes), checkpoint.read, scales, file_type))
    size = sum(count_bytes(tensor.shape, tensor.kind) for tensor in tensors)
    _check_disk(output, size)
    result, unchecked = None, refuse_check(checkpoint.size) if check else "the check is off"
    with temporary(output) as file:
        writer = open_writer(file, manifest, config, vocabulary, scales.eps(config["rms_norm_eps"]), file_type)
        with closing(writer):
            write_tensors(writer, tensors, reporter)
        if not unchecked:
            result = check_file(folder, file, tokenizer, file_type, reporter)
    types = Counter(tensor.kind for tensor in tensors)
    return WrittenGguf(output, output.stat().st_size, dict(types.most_common()), result, unchecked)


def _check_format(folder: Path, manifest: Manifest) -> None:
    if manifest.format == "native":
        return
    gap = manifest.plan.spec.native_gap
    raise TransmlaError(
        f"'{folder}' is an export in the {manifest.format} format",
        limit=f"llama.cpp runs MLA in DeepSeek's layout only, {f'without {gap}' if gap else 'the native format'}",
        remedy="use it with `transmla chat` or `transmla serve`" if gap else "convert the source with --format native",
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a native export's ``config.json``, after a check of the fields that are read."""
    config = read_json(folder / "config.json")
    fields = config if isinstance(config, dict) else {}
    wrong = [name for name, kind in FIELDS.items() if not isinstance(fields.get(name), kind)]
    if not wrong and not isinstance(fields["rope_parameters"].get("rope_theta"), float | int):
        wrong = ["rope_parameters.rope_theta"]
    if wrong:
        raise TransmlaError(
            f"cannot read the config of '{folder}'",
            limit=f"{wrong[0]} is missing or has the wrong type",
            remedy="correct its config.json, or convert the source again",
        )
    return fields


def check_config(config: dict[str, Any]) -> None:
    """Check that llama.cpp's ``deepseek2`` computes what a native export's ``config`` says.

    Raises:
        TransmlaError: if it does not.
    """
    rope_type = config["rope_parameters"].get("rope_type", "default")
    problem = llama_cpp_refusal(rope_type, config["hidden_act"], config.get("q_lora_rank"), config["num_hidden_layers"])
    if problem is not None:
        raise problem


def _check_tensors(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an export whose tensors are not those that its config describes."""
    expected = export_shapes(config)
    if other := sorted(set(shapes) - set(expected)):
        raise TransmlaError(
            f"llama.cpp's layout has no place for '{other[0]}'",
            limit=f"{len(other)} tensors of the export are not part of a dense DeepSeek-V3 with its config.json",
            remedy="convert the source again",
        )
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found = f"has shape {list(shapes[name])}" if name in shapes else "is missing"
            limit = f"config.json asks for shape {list(shape)}"
            raise TransmlaError(f"'{name}' {found}", limit=limit, remedy="convert the source again")


def _check_disk(output: Path, size: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < size * SLACK:
        raise TransmlaError(
            f"the disk that holds '{output.parent}' has {free / 1e9:.1f} GB free",
            limit=f"the file needs {size / 1e9:.1f} GB",
            remedy="free some space, or choose a smaller --type",
        )


def _ends(folder: Path, config: dict[str, Any]) -> list[int]:
    """Return the ids that end a text, from the generation config or else the config."""
    settings = read_json_object(folder / "generation_config.json") or {}
    ends = settings.get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(end, int) for end in ends):
        raise TransmlaError(
            f"cannot read the tokens that end a text in '{folder}'",
            limit="eos_token_id is no number, and no list of numbers",
            remedy="correct its generation_config.json or config.json",
        )
    return ends


def write_tensors(writer: Any, tensors: list[GgufTensor], reporter: Reporter) -> None:
    """Write the header and every tensor, one at a time."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    plain = {"F32": "float32", "F16": "float16"}
    for tensor in tensors:
        kind, size = GGMLQuantizationType[tensor.kind], count_bytes(tensor.shape, tensor.kind)
        stored = tensor.shape if tensor.kind in plain else quant_shape_to_byte_shape(tensor.shape, kind)
        dtype = getattr(torch, plain.get(tensor.kind, "uint8"))
        writer.add_tensor_info(tensor.name, stored, torch.empty(0, dtype=dtype).numpy().dtype, size, kind)
    with boundary("cannot write the GGUF file", remedy="check the disk that holds it"):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    reporter.stage("write tensors", len(tensors))
    for done, tensor in enumerate(tensors, start=1):
        values = tensor.make()
        _check_values(tensor, values)
        writer.write_tensor_data(quantise(values, tensor.kind))
        reporter.advance(done, tensor.kind)


def _check_values(tensor: GgufTensor, values: torch.Tensor) -> None:
    """Refuse values that the tensor's type cannot hold."""
    largest = float(values.abs().max())
    limit = torch.finfo(torch.float32).max if tensor.kind in ("F32", "BF16") else HALF_MAX
    if not largest <= limit:
        raise TransmlaError(
            f"'{tensor.name}' holds values up to {largest:.3g}",
            limit=f"{tensor.kind} holds at most {limit:,.0f}" if limit == HALF_MAX else "weights must be finite",
            remedy="write the file with --type bf16" if limit == HALF_MAX else "convert the source again",
        )
