"""Measure the perplexity of GGUF files, of an export and of its source, in llama.cpp on a CPU.

    pip install xllamacpp gguf
    python scripts/gguf_quality.py EXPORT SOURCE --text test.raw.txt --result serve/gguf.json

The source is a Llama. Its files are written by the same quantisers and the same rules for types, so that only the
architecture differs. llama.cpp is called through the shared library of the ``xllamacpp`` wheel (Linux, x86-64). The
cache is float32. ``loss`` is the change of the mean negative log-likelihood against the F32 file of the same model;
its standard error is taken over windows.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from provenance import RESULTS, write_result
from torch import Tensor

from transmla.reporter import Silent
from transmla.serve.gguf_fields import add_vocabulary
from transmla.serve.gguf_file import write_gguf, write_tensors
from transmla.serve.gguf_tensors import GgufTensor, tensor_type
from transmla.serve.gguf_tokenizer import describe_tokenizer
from transmla.serve.request import FILE_TYPES
from transmla.source.checkpoint import open_checkpoint
from transmla.source.load import load_tokenizer

# Tokens in a window.
WINDOW = 512
# Offsets in llama_context_params (llama.cpp b11434 to b11549), which main() checks by the default values.
N_CTX, N_BATCH, N_UBATCH, N_THREADS, N_THREADS_BATCH, FLASH, TYPE_K, TYPE_V = 0, 4, 8, 28, 32, 52, 104, 108
LLAMA = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


class Opaque(ctypes.Structure):
    """A struct of llama.cpp's that is passed by value, and larger than any of them."""

    _fields_ = (("data", ctypes.c_byte * 512),)


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class LlamaCpp:
    """The C functions of llama.cpp that a forward pass needs."""

    def __init__(self, threads: int) -> None:
        spec = importlib.util.find_spec("xllamacpp")
        assert spec is not None, "pip install xllamacpp"
        assert spec.origin is not None
        library = next(Path(spec.origin).parent.glob("xllamacpp*.so"))
        self.c, self.threads, self.silent = ctypes.CDLL(str(library)), threads, LOG(lambda *_: None)
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory"):
            getattr(self.c, name).restype = ctypes.c_void_p
        self.c.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
        self.c.llama_model_default_params.restype = self.c.llama_context_default_params.restype = Opaque
        self.c.llama_batch_init.restype = Batch
        self.c.llama_log_set(self.silent, None)
        self.c.llama_backend_init()

    def losses(self, file: Path, windows: Tensor) -> Tensor:
        """Return the negative log-likelihood [n, WINDOW - 1] of ``windows`` [n, WINDOW] of tokens."""
        model = self.c.llama_model_load_from_file(str(file).encode(), self.c.llama_model_default_params())
        assert model, f"llama.cpp cannot load {file}"
        params = self.c.llama_context_default_params()
        numbers = (ctypes.c_int32 * 128).from_buffer(params)
        assert (numbers[N_CTX // 4], numbers[TYPE_K // 4], numbers[TYPE_V // 4]) == (512, 1, 1), "another llama.cpp"
        values = {N_CTX: WINDOW, N_BATCH: WINDOW, N_UBATCH: WINDOW, FLASH: 0, TYPE_K: 0, TYPE_V: 0}
        for offset, value in (values | {N_THREADS: self.threads, N_THREADS_BATCH: self.threads}).items():
            numbers[offset // 4] = value
        context = ctypes.c_void_p(self.c.llama_init_from_model(ctypes.c_void_p(model), params))
        memory = ctypes.c_void_p(self.c.llama_get_memory(context))
        size = self.c.llama_vocab_n_tokens(ctypes.c_void_p(self._vocab(model)))
        batch = self.c.llama_batch_init(WINDOW, 0, 1)
        rows = []
        for window in windows:
            self.c.llama_memory_clear(memory, True)
            batch.n_tokens = WINDOW
            for i, token in enumerate(window.tolist()):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
                batch.seq_id[i][0] = 0
            assert self.c.llama_decode(context, batch) == 0
            found = self.c.llama_get_logits(context)
            logits = torch.frombuffer(
                (ctypes.c_float * (WINDOW * size)).from_address(ctypes.addressof(found.contents)), dtype=torch.float32
            ).view(WINDOW, size)
            rows.append(torch.nn.functional.cross_entropy(logits[:-1].double(), window[1:], reduction="none"))
        self.c.llama_free(context)
        self.c.llama_model_free(ctypes.c_void_p(model))
        return torch.stack(rows)

    def _vocab(self, model: int) -> int:
        self.c.llama_model_get_vocab.restype = ctypes.c_void_p
        return int(self.c.llama_model_get_vocab(ctypes.c_void_p(model)))


def write_source(folder: Path, output: Path, file_type: str) -> None:
    """Write a Llama in ``folder`` as a GGUF file of llama.cpp's ``llama`` architecture."""
    config = json.loads((folder / "config.json").read_text())
    checkpoint, tokenizer = open_checkpoint(folder), load_tokenizer(folder)
    writer = GGUFWriter(output, "llama")
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    add_vocabulary(writer, describe_tokenizer(tokenizer, config["vocab_size"], [config["eos_token_id"]]))
    write_tensors(writer, list(source_tensors(config, dict(checkpoint.shapes), checkpoint.read, file_type)), Silent())
    writer.close()


def source_tensors(
    config: dict[str, Any], shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], file_type: str
) -> Iterator[GgufTensor]:
    """List the tensors of a Llama. The rows of queries and keys are interleaved; a tied embedding serves as head."""
    layers, d = config["num_hidden_layers"], config["head_dim"]

    def tensor(source: str, target: str, layer: int = 0, rule: str = "") -> GgufTensor:
        def make() -> Tensor:
            weight = read(source).float()
            if source.endswith(("q_proj.weight", "k_proj.weight")):
                weight = weight.view(-1, 2, d // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
            return weight

        kind = tensor_type(rule or target, shapes[source], file_type, layer, layers)
        return GgufTensor(target, shapes[source], kind, make)

    tied = "lm_head.weight" not in shapes
    yield tensor("model.embed_tokens.weight", "token_embd.weight", rule="output.weight" if tied else "")
    yield tensor("model.norm.weight", "output_norm.weight")
    if not tied:
        yield tensor("lm_head.weight", "output.weight")
    for i in range(layers):
        for part, target in LLAMA.items():
            # llama-quantize treats attn_v as it treats attn_v_b.
            rule = "attn_v_b.weight" if target == "attn_v.weight" else ""
            yield tensor(f"model.layers.{i}.{part}", f"blk.{i}.{target}", i, rule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="a native export")
    parser.add_argument("source", type=Path, help="its source, a Llama")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--windows", type=int, default=24, help=f"windows of {WINDOW} tokens, spread over the text")
    parser.add_argument("--types", nargs="+", default=list(FILE_TYPES), choices=list(FILE_TYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="folder for the files, which are deleted")
    parser.add_argument("--result", type=Path, help="JSON file under scripts/results")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    types = ["f32", *(name for name in arguments.types if name != "f32")]
    tokens = load_tokenizer(arguments.source)(arguments.text.read_text(encoding="utf-8"))["input_ids"]
    starts = torch.linspace(0, len(tokens) - WINDOW, arguments.windows).long()
    windows = torch.stack([torch.tensor(tokens[start : start + WINDOW]) for start in starts])
    llama, rows = LlamaCpp(arguments.threads), []
    references: dict[str, Tensor] = {}
    for file_type in types:
        for model in ("export", "source"):
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
                file = Path(folder) / f"{model}-{file_type}.gguf"
                if model == "export":
                    write_gguf(arguments.export, file, file_type, check=False)
                else:
                    write_source(arguments.source, file, file_type)
                losses, size = llama.losses(file, windows).mean(1), file.stat().st_size
            change = losses - references.setdefault(model, losses)
            rows.append(
                {
                    "model": model,
                    "type": file_type,
                    "bytes": size,
                    "perplexity": float(losses.mean().exp()),
                    "loss": float(change.mean()),
                    "standard_error": float(change.std() / len(change) ** 0.5),
                    "tokens": windows.numel() - len(windows),
                }
            )
            print(rows[-1], flush=True)
            if arguments.result:
                write_result(RESULTS / arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
