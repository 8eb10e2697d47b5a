"""The verbs that use an export: chat and serve."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transmla.cli.early import load_libraries, refuse_backend, refuse_dtype, refuse_models
from transmla.cli.options import DeviceOption, DtypeOption, PickleOption

if TYPE_CHECKING:
    from transmla.serve.chat import Answer, Sampling


def chat(
    model: Annotated[str, typer.Argument(metavar="DIR", help="An export, or any causal LM: a folder or a Hub id.")],
    *,
    prompt: Annotated[str | None, typer.Option(help="Answer this message alone, and end.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens in an answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Temperature of sampling; 0 for greedy decoding (default: 0.7 in a conversation, 0 for one message).",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of the probability to sample from; samples one message too (default: 0.95)."
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Decode kernels: auto, torch, triton, hopper, flashmla or flashinfer.")
    ] = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
) -> None:
    """Chat with a model in the terminal. Below each answer stand its speed and the size of the cache.

    Ctrl-D ends the chat. Without a terminal, standard input is one message. One message (`--prompt` or standard input)
    is decoded greedily, so the same command prints the same answer; a conversation is sampled. A model without a chat
    template continues the message.

    Example: transmla chat llama-mla --prompt "Why is the sky blue?"
    """
    refuse_dtype(dtype)
    refuse_backend(backend)
    refuse_models(model)
    load_libraries()
    from transmla.cli import console
    from transmla.evaluate.open_model import open_model
    from transmla.runtime.load import accelerate, mla_layers, require_backend
    from transmla.serve.chat import converse
    from transmla.source.device import pick_device
    from transmla.source.locate import resolve_source

    place = pick_device(device)
    path = resolve_source(model, allow_pickle=allow_pickle)
    opened, tokenizer = open_model(path, dtype=dtype, device=place, allow_pickle=allow_pickle)
    if backend != "auto" and mla_layers(opened):
        require_backend(opened, backend)
        accelerate(opened, backend=backend)
    context = getattr(opened.config.get_text_config(), "max_position_embeddings", None)
    sampling = _sampling(max_new_tokens, temperature, top_p, one=prompt is not None or not sys.stdin.isatty())
    for given in converse(opened, tokenizer, _questions(prompt), sampling, _write, system=system):
        print(flush=True)
        console.say(_speed_and_cache(given, path))
        if context is not None and given.prompt_tokens + given.new_tokens > context:
            console.note(
                f"the conversation has {given.prompt_tokens + given.new_tokens} tokens, and the model reads up to"
                f" {context}: answers beyond that are poor; start a new chat"
            )


def _sampling(max_new_tokens: int, temperature: float | None, top_p: float | None, *, one: bool) -> Sampling:
    """Return how to sample; ``one`` message is decoded greedily unless an option of sampling is given."""
    from transmla.serve.chat import Sampling

    default = Sampling(max_new_tokens)
    if temperature is None:
        temperature = 0.0 if one and top_p is None else default.temperature
    return Sampling(max_new_tokens, temperature, default.top_p if top_p is None else top_p)


def _speed_and_cache(given: Answer, path: Path) -> str:
    """Return one line on an answer: tokens, speed, and the cache beside that of the source."""
    from rich.filesize import decimal

    from transmla.export.hashes import MANIFEST
    from transmla.export.manifest import Manifest

    rate = "" if given.tokens_per_second is None else f", {given.tokens_per_second:.1f} tokens/s"
    cache = f"cache {decimal(given.cache_bytes)}"
    if (path / MANIFEST).is_file():
        source = given.cache_bytes / Manifest.read(path).plan.cache_ratio
        cache += f", the source's would be {decimal(round(source))}"
    return f"[{given.new_tokens} tokens{rate}, first after {given.prefill_seconds:.1f} s; {cache}]"


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _questions(prompt: str | None) -> Iterator[str]:
    """Yield the user's messages: ``prompt`` alone, all of standard input, or line by line from a terminal."""
    if prompt is not None or not sys.stdin.isatty():
        yield prompt if prompt is not None else sys.stdin.read()
        return
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def serve(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export.")],
    *,
    runtime: Annotated[
        str, typer.Option(help="auto (vLLM where it is installed and serves it), vllm, sglang or transformers.")
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    self_check: Annotated[
        bool,
        typer.Option(help="In vLLM and SGLang, compare the export's logits with its signature before it is served."),
    ] = True,
    dry_run: Annotated[bool, typer.Option(help="Print the command, and start nothing.")] = False,
) -> None:
    """Serve an export with an OpenAI-compatible API, by vLLM, SGLang or transformers' own server.

    An export that the runtime cannot serve is refused before the server starts. Arguments after `--` go to the server.

    In requests, the model has the name of the folder.

    Example: transmla serve llama-mla --port 8000

    Example: curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json"
    -d '{"model": "llama-mla", "messages": [{"role": "user", "content": "Hello"}]}'

    Example: transmla serve llama-mla --runtime vllm -- --max-model-len 8192
    """
    import os
    import shlex

    from transmla.serve.request import check_runtime, read_config

    check_runtime(runtime)
    read_config(folder)
    load_libraries()
    from transmla.cli import console
    from transmla.serve.launch import choose_server

    server = choose_server(folder, runtime, host, port, context.args, check=self_check)
    if server.reason:
        console.say(server.reason)
    console.say(f"{'would start' if dry_run else 'starting'} {server.name}: {shlex.join(server.command)}")
    if server.model:
        be = "would be " if dry_run else ""
        console.say(f"the model '{server.model}' {be}at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
    if not dry_run:
        sys.stdout.flush()
        os.execv(server.command[0], server.command)
