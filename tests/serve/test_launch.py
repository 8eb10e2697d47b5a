"""`transmla serve` chooses an installed server, and refuses before it starts what the server cannot serve."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Run

from transmla.errors import TransmlaError
from transmla.serve import launch
from transmla.serve.launch import SERVING, Server, choose_server, sglang_problem, vllm_problem
from transmla.serve.vllm_plugin import CHECKED_WORKER


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes only the given modules seem to be installed."""

    def make(*names: str) -> None:
        monkeypatch.setattr(
            "transmla.serve.launch.find_spec",
            lambda name: importlib.util.find_spec("json") if name in names else None,
        )

    return make


def choose(folder: Path, runtime: str = "auto", *extra: str) -> Server:
    return choose_server(folder, runtime, "127.0.0.1", 8000, extra)


def test_transformers_serves_where_vllm_is_missing(installed: Callable[..., None], converted: Path) -> None:
    installed(*SERVING)
    server = choose(converted / "out", "auto", "--device", "cpu")
    assert server.name == "transformers"
    assert server.command[0] == sys.executable
    assert server.command[-7:] == (str(converted / "out"), "--host", "127.0.0.1", "--port", "8000", "--device", "cpu")


def test_a_missing_server_is_refused_with_the_command_that_installs_it(
    installed: Callable[..., None], converted: Path
) -> None:
    installed()
    with pytest.raises(TransmlaError, match=r'pip install "transformers\[serving\]"'):
        choose(converted / "out")
    with pytest.raises(TransmlaError, match="pip install vllm"):
        choose(converted / "source", "vllm")


def test_unknown_runtimes_and_folders_are_refused(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(TransmlaError, match="unknown runtime 'tgi'"):
        choose(converted / "out", "tgi")
    with pytest.raises(TransmlaError, match=r"has no config\.json"):
        choose(tmp_path)


@pytest.mark.parametrize("runtime", ["auto", "vllm", "sglang"])
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"model_type": "deepseek_v3", "transmla": {}, "rope_parameters": "default"}',
        '{"model_type": "transmla", "source_model_type": "llama", "mla": {"layers": [0], "kinds": [{}]}}',
        '{"model_type": "transmla", "source_model_type": "llama", "mla": {"layers": 5, "kinds": [1]}}',
    ],
)
def test_a_damaged_config_is_an_error_in_one_line(tmp_path: Path, runtime: str, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TransmlaError, match=r"cannot read the config|is not a valid JSON file"):
        choose(tmp_path, runtime)


def test_a_refusal_names_one_remedy(tmp_path: Path, installed: Callable[..., None]) -> None:
    installed("vllm", *SERVING)
    config = {"model_type": "transmla", "source_model_type": "gpt_oss", "mla": {"layers": [0], "kinds": [{}]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    limit = "the export has attention sinks; vLLM's MLA does not support this"
    with pytest.raises(TransmlaError) as refused:
        choose(tmp_path, "vllm")
    assert str(refused.value) == f"vLLM does not serve this export: {limit}; serve it with --runtime transformers"
    assert choose(tmp_path).reason == f"vLLM does not serve it: {limit}"


def test_an_export_that_vllm_does_not_serve_goes_to_transformers(
    installed: Callable[..., None], converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("vllm", *SERVING)
    server = choose(converted / "out")
    assert server.name == "transformers"
    assert "its latent cache takes" in server.reason
    with pytest.raises(TransmlaError, match="vLLM does not serve this export: its latent cache takes"):
        choose(converted / "out", "vllm")
    # With this option, vLLM expands the cache.
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    assert choose(converted / "out", "vllm").name == "vllm"
    # A model that is no export is vLLM's own business.
    assert choose(converted / "source").name == "vllm"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"kv_lora_rank": 256}, "takes 512 + 64 on CPUs"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type 'llama3'"),
        ({"transmla": None, "model_type": "llama"}, None),
    ],
)
def test_what_vllm_serves_of_native_exports(changes: dict[str, Any], problem: str | None) -> None:
    config = {"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "transmla": {}}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    found = vllm_problem(config | changes, 1, cpu=True)
    assert found is None if problem is None else problem in str(found)


@pytest.mark.parametrize(
    ("model_type", "check", "options"),
    [
        ("deepseek_v3", True, ("--worker-cls", CHECKED_WORKER)),
        ("deepseek_v3", False, ()),
        ("transmla", True, ()),
        ("transmla", False, ("--additional-config", '{"transmla_self_check": false}')),
    ],
)
def test_vllm_checks_an_export_before_it_serves(
    installed: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    check: bool,
    options: tuple[str, ...],
) -> None:
    installed("vllm")
    monkeypatch.setattr("transmla.serve.launch.vllm_problem", lambda config, devices, cpu: None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "transmla": {}}))
    server = choose_server(tmp_path, "vllm", "::1", 80, ("--max-model-len", "99"), check=check)
    address = ("--host", "::1", "--port", "80", "--served-model-name", tmp_path.name)
    assert server.command[3:] == ("--model", str(tmp_path), *address, *options, "--max-model-len", "99")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"kv_lora_rank": 160}, None),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type 'llama3'"),
        ({"model_type": "transmla"}, "no widths of a latent attention"),
        ({"transmla": None, "model_type": "llama"}, None),
    ],
)
def test_what_sglang_serves(changes: dict[str, Any], problem: str | None) -> None:
    config = {"model_type": "deepseek_v3", "kv_lora_rank": 512, "transmla": {}}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    found = sglang_problem(config | changes, 1)
    assert found is None if problem is None else problem in str(found)


def test_sglang_is_given_the_field_that_older_exports_lack(installed: Callable[..., None], tmp_path: Path) -> None:
    installed("sglang")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "transmla": {}}))
    server = choose_server(tmp_path, "sglang", "::1", 80, (), check=False)
    assert server.command[-2] == "--json-model-override-args"
    assert json.loads(server.command[-1]) == {"transmla_self_check": False, "moe_layer_freq": 1}


def test_sglang_checks_an_export_unless_an_option_says_no(installed: Callable[..., None], converted: Path) -> None:
    installed("sglang")
    server = choose(converted / "out", "sglang", "--tp", "2")
    command = ("-m", "sglang.launch_server", "--model-path", str(converted / "out"))
    address = ("--host", "127.0.0.1", "--port", "8000", "--served-model-name", "out")
    assert server.command[1:] == (*command, *address, "--tp", "2")
    unchecked = choose_server(converted / "out", "sglang", "::1", 80, (), check=False)
    assert unchecked.command[-2:] == ("--json-model-override-args", '{"transmla_self_check": false}')
    installed()
    with pytest.raises(TransmlaError, match="pip install sglang"):
        choose(converted / "out", "sglang")


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
@pytest.mark.parametrize("option", ["--served-model-name mine", "--served-model-name=mine", "--served_model_name mine"])
def test_the_user_may_name_the_model(
    installed: Callable[..., None],
    converted: Path,
    monkeypatch: pytest.MonkeyPatch,
    runtime: str,
    option: str,
) -> None:
    installed(runtime)
    monkeypatch.setattr("transmla.serve.launch.vllm_problem", lambda config, devices, cpu: None)
    server = choose(converted / "out", runtime, *option.split())
    assert sum("served" in argument for argument in server.command) == 1
    assert server.model is None


def test_a_model_has_the_name_of_its_folder_however_that_is_typed(
    installed: Callable[..., None], converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(*SERVING)
    monkeypatch.chdir(converted / "out")
    assert [choose(Path(typed)).model for typed in (".", "../out/", str(converted / "out"))] == ["out"] * 3


def test_the_command_runs_what_it_prints(
    run: Run, converted: Path, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(*SERVING)
    started: list[Any] = []
    monkeypatch.setattr("os.execv", lambda path, command: started.append((path, command)))
    folder = str(converted / "out")
    code, out, _ = run("serve", folder, "--dry-run")
    assert code == 0
    assert not started
    assert "would start transformers" in out
    assert "would be at http://127.0.0.1:8000/v1" in out
    run("serve", folder, "--port", "9000", "--", "--device", "cpu")
    path, command = started[0]
    assert path == sys.executable
    assert command[-4:] == ("--port", "9000", "--device", "cpu")
    assert json.loads((converted / "out/config.json").read_text())["model_type"] == "deepseek_v3"


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
@pytest.mark.parametrize("option", ["--tensor-parallel-size 4", "--tp 4", "-tp 4", "--tp-size=4"])
def test_heads_that_devices_cannot_share_are_refused(
    installed: Callable[..., None], converted: Path, runtime: str, option: str
) -> None:
    installed("vllm", "sglang")
    folder = converted / "out"
    shape = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 6}
    config = json.loads((folder / "config.json").read_text()) | shape
    assert config["model_type"] == "deepseek_v3"
    problem = {"vllm": vllm_problem(config, 4, cpu=True), "sglang": sglang_problem(config, 4)}[runtime]
    assert problem is not None
    assert "6 attention heads cannot be divided among 4 devices" in str(problem)
    assert launch._devices(["--max-model-len", "8", *option.split()]) == 4


@pytest.mark.parametrize(
    "extra", [[], ["--tp"], ["--tp", "many"], ["--tp", "0"], ["--enable-dp-attention", "--tp", "4"]]
)
def test_other_arguments_leave_the_heads_together(extra: list[str]) -> None:
    assert launch._devices(extra) == 1


def test_the_plugin_needs_the_latent_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    found = vllm_problem({"model_type": "transmla"}, 1, cpu=True)
    assert found is not None
    assert "unset VLLM_MLA_DISABLE" in str(found)
