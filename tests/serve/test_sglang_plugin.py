"""The SGLang plugin without SGLang: configs, scale, refusals and registration. `test_vllm_plugin` tests the padding."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers.served_kind import KIND
from transformers import LlamaConfig

from transmla.formats.serve_limits import SERVED, Widths
from transmla.modeling.configuration_transmla import TransmlaConfig
from transmla.serve.family_config import architecture, widths_of
from transmla.serve.sglang_plugin import check_settings, register, served_config, set_scaling, start

MLA = {"layers": [0] * 3, "kinds": [KIND]}


def export(family: str = "llama", **changes: Any) -> Any:
    """Return the config of an export as transformers reads it."""
    fields = {"source_model_type": family, "hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3}
    return TransmlaConfig.from_dict(fields | {"mla": MLA, "sliding_window": None} | changes)


def settings(**changes: Any) -> Any:
    """Return a stand-in for SGLang's settings."""
    plain = {"tp_size": 1, "enable_lora": False, "lora_paths": None, "enable_dp_attention": False}
    return SimpleNamespace(**(plain | changes))


@pytest.mark.parametrize("family", sorted(SERVED))
def test_the_served_config_is_the_familys_and_an_mla_model_for_sglang(family: str) -> None:
    config = served_config(export(family), "a folder", trust_remote_code=False)
    assert config.model_type == family
    assert config.architectures == [architecture(family), "DeepseekV3ForCausalLM"]
    assert widths_of(config) == Widths(256, 64, 64, 128)
    assert config.mla == MLA
    assert config.sliding_window is None
    check_settings(config, settings())


def test_other_models_keep_their_config() -> None:
    config = LlamaConfig()
    assert served_config(config) is config
    made = SimpleNamespace(hf_config=config, scaling=0.5)
    set_scaling(None, made)
    assert made.scaling == 0.5


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("sliding windows", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}),
        ("layers that kept the source's attention", {"mla": {"layers": [0, None, 0], "kinds": [KIND]}}),
        (
            "latent is 528 wide; SGLang's MLA takes at most 512",
            {"mla": MLA | {"kinds": [KIND | {"kv_lora_rank": 528}]}},
        ),
        ("soft-capped scores; SGLang's MLA does not support this", {"attn_logit_softcapping": 50.0}),
        ("the family olmo2", {"source_model_type": "olmo2"}),
    ],
)
def test_a_refusal_names_what_sglang_does_not_serve(words: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=words):
        served_config(export(**changes))


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("cannot be divided among 4 devices", {"tp_size": 4}),
        ("no LoRA adapters", {"enable_lora": True}),
        ("no LoRA adapters", {"lora_paths": ["folder"]}),
        ("no data-parallel attention", {"enable_dp_attention": True}),
    ],
)
def test_settings_that_do_not_fit_the_export_are_refused(words: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=words):
        check_settings(served_config(export()), settings(**changes))


@pytest.mark.parametrize(
    ("family", "changes", "scale"),
    [
        ("llama", {"head_dim": 16}, 0.25),
        ("mixtral", {"hidden_size": 96, "head_dim": None}, 0.25),
        ("granite", {"attention_multiplier": 0.1}, 0.1),
    ],
)
def test_sglangs_scale_is_the_sources_not_that_of_padded_widths(
    family: str, changes: dict[str, Any], scale: float
) -> None:
    made = SimpleNamespace(hf_config=served_config(export(family, **changes)), scaling=1.0)
    set_scaling(None, made)
    assert made.scaling == scale


def test_registration_hooks_functions_of_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: dict[str, Any] = {}
    registry = ModuleType("sglang.srt.plugins.hook_registry")
    registry.HookType = SimpleNamespace(AFTER="after", AROUND="around")  # type: ignore[attr-defined]
    registry.HookRegistry = SimpleNamespace(  # type: ignore[attr-defined]
        register=lambda target, hook, kind: hooks.update({target.rsplit(".", 2)[-2:][0] + "." + kind: hook})
    )
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    register()
    assert hooks == {"config.after": served_config, "ModelConfig.after": set_scaling, "Scheduler.around": start}


def test_the_plugin_is_an_entry_point_that_imports_neither_sglang_nor_transformers() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["sglang.srt.plugins"]["transmla"].partition(":")
    assert getattr(import_module(module), name) is register
    code = f"import sys, {module}; assert not {{'sglang', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
