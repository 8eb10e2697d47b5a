"""Run a GGUF file in llama.cpp: ``python -m transmla.serve.llama_cpp_run FILE``, with a request on standard input.

The request and the answer are JSON. This is a program of its own because llama.cpp ends the process if a file is wrong.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any


def answer(file: str, request: dict[str, Any]) -> dict[str, Any]:
    """Tokenise a text, and compute the log-probs of given tokens after a prompt.

    The cache is float32 and flash attention is off. llama.cpp's float16 cache alone changes log-probs by up to 0.005.

    Args:
        file: path of the GGUF file.
        request: ``text`` to tokenise; ``prompt`` and ``chosen``, ids of tokens; ``candidates``, the number of most
            likely tokens to look at.

    Returns:
        ``text``, the ids of the text's tokens; ``best``, the most likely token at the place of each chosen one;
        ``log_probs`` of the chosen tokens.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx = len(request["prompt"]) + len(request["chosen"]) + 8
    parameters.n_gpu_layers = 0
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.warmup = parameters.fit_params = False
    server = xllamacpp.Server(parameters)
    found: dict[str, Any] = {"text": _tokenise(server.listening_address, request["text"]), "best": [], "log_probs": []}
    tokens = list(request["prompt"])
    settings = {"n_predict": 1, "temperature": 0.0, "n_probs": request["candidates"], "cache_prompt": True}
    for chosen in request["chosen"]:
        reply = server.handle_completions({"prompt": tokens, **settings})
        top = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found["best"].append(top[0]["id"])
        found["log_probs"].append(next((one["logprob"] for one in top if one["id"] == chosen), top[-1]["logprob"]))
        tokens.append(chosen)
    return found


def _tokenise(address: str, text: str) -> list[int]:
    """Return the ids of the tokens of ``text``, special tokens at its ends included."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        tokens: list[int] = json.load(reply)["tokens"]
    return tokens


if __name__ == "__main__":
    print(json.dumps(answer(sys.argv[1], json.load(sys.stdin))))
