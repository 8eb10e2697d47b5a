"""Compare what vLLM generates from exports with transformers in float32: tokens and log-probs of greedy decoding.

vLLM usually has an environment of its own, so this script has two parts:

    python scripts/serve_vllm.py reference reference.json qwen2=exports/qwen native=exports/native
    python scripts/serve_vllm.py compare reference.json [--modes eager compiled]  # compiled models start in minutes
    python scripts/serve_vllm.py compare reference.json --dtype bfloat16  # GPUs have no MLA kernels for float32

The first part runs in the environment of transmla. The second part runs in vLLM's, where transmla is installed as well,
and writes results/serve/vllm.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, write_result

PROMPTS = (
    "def quicksort(items):\n",
    "The capital of France is",
    "A hash table stores pairs of keys and values. To look up a key, it",
)
TOKENS = 32
# Bytes of vLLM's cache, and its longest text; the prompts need far less.
CACHE, LONGEST = 2**29, 256
# Eager vLLM on CPUs rotates native exports wrongly with its own kernel.
NATIVE_EAGER = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}


@torch.no_grad()
def reference(folder: Path) -> list[dict[str, Any]]:
    """Return, for each prompt, its ids, the ``TOKENS`` greedy tokens of transformers, and their log-probs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import transmla

    transmla.register()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # Texts go on after an end token, as vLLM's do with ignore_eos.
    model.generation_config.eos_token_id = None
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(
            ids, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tokens = made.sequences[0, ids.shape[1] :]
        logprobs = torch.cat(made.logits).float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        rows.append({"prompt": ids[0].tolist(), "tokens": tokens.tolist(), "logprobs": logprobs.tolist()})
    return rows


def compare(entry: dict[str, Any], mode: str, dtype: str) -> dict[str, Any]:
    """Serve one export with vLLM, and return one row of the result.

    Args:
        entry: the export's name, folder and reference.
        mode: "eager" or "compiled".
        dtype: vLLM's precision.
    """
    import vllm

    config = json.loads((Path(entry["folder"]) / "config.json").read_text())
    native = config["model_type"] != "transmla"
    options = NATIVE_EAGER if native and mode == "eager" else {}
    llm = vllm.LLM(
        entry["folder"],
        dtype=dtype,
        max_model_len=LONGEST,
        kv_cache_memory_bytes=CACHE,
        enforce_eager=mode == "eager",
        **options,
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": row["prompt"]} for row in entry["rows"]], sampling, use_tqdm=False)
    equal, worst = 0, 0.0
    for row, output in zip(entry["rows"], outputs, strict=True):
        made = output.outputs[0]
        for i, (token, expected) in enumerate(zip(made.token_ids, row["tokens"], strict=True)):
            if token != expected:  # later tokens continue another text
                break
            equal += 1
            worst = max(worst, abs(made.logprobs[i][token].logprob - row["logprobs"][i]))
    return {
        "export": entry["name"],
        "family": config.get("source_model_type", config["model_type"]),
        "format": "native" if native else "transmla",
        "layers": config["num_hidden_layers"],
        "mode": mode,
        "dtype": dtype,
        "tokens": TOKENS * len(entry["rows"]),
        "tokens equal": equal,
        "largest difference of log-probs": worst,
        "vllm": vllm.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("reference", help="generate with transformers")
    first.add_argument("file", type=Path, help="JSON file to write")
    first.add_argument("exports", nargs="+", help="NAME=FOLDER of each export")
    second = parts.add_parser("compare", help="generate with vLLM and compare")
    second.add_argument("file", type=Path, help="JSON file of the first part")
    second.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    second.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="vLLM's precision")
    second.add_argument("--only", nargs="+", help="names of exports; default: all")
    second.add_argument("--output", type=Path, default=RESULTS / "serve" / "vllm.json")
    second.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    args = parser.parse_args()
    if args.part == "reference":
        named = [export.split("=", 1) for export in args.exports]
        entries = [{"name": name, "folder": folder, "rows": reference(Path(folder))} for name, folder in named]
        args.file.write_text(json.dumps(entries))
        return
    rows = []
    for mode in args.modes:
        for entry in json.loads(args.file.read_text()):
            if args.only is None or entry["name"] in args.only:
                rows.append(compare(entry, mode, args.dtype))
                print(rows[-1], flush=True)
                write_result(args.output, rows, args.commit)


if __name__ == "__main__":
    main()
