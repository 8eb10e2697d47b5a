"""The vLLM plugin without vLLM: padding, names, refusals, configs and the comparison with the signature."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.served_kind import KIND
from helpers.uncut_exports import make_source, uncut
from torch import Tensor

from transmla.formats.serve_limits import SERVED, Widths, refuses, served_widths
from transmla.modeling.configuration_transmla import TransmlaConfig
from transmla.modeling.modeling_transmla import model_class
from transmla.serve.family_config import OPTION, architecture, widths_of
from transmla.serve.self_check import SignedLogits, compare_served, refusal, signed_logits
from transmla.serve.vllm_plugin import CHECKED_WORKER, check_settings, register, served_config
from transmla.serve.widen import RENAMED, rotary_table, widened
from transmla.signature.probe import project_logits

LAYERS = 3
CONFIG: dict[str, Any] = {
    "source_model_type": "llama",
    "hidden_size": 48,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "mla": {"layers": [0] * LAYERS, "kinds": [KIND]},
}


@pytest.fixture(scope="module", params=sorted(SERVED))
def export(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uncut export with three layers, of each served family."""
    folder = tmp_path_factory.mktemp(request.param)
    changes: dict[str, Any] = {"num_hidden_layers": LAYERS, "sliding_window": None}
    model = make_source(request.param, folder / "source", **changes)
    return uncut(model, folder / "source", folder / "export")


@torch.no_grad()
def logits(config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """Return logits of an export's config and tensors, computed by transformers' classes in float64."""
    made: Any = TransmlaConfig.from_dict(copy.deepcopy(config))
    model = model_class(config["source_model_type"], "AutoModelForCausalLM")._from_config(
        made, attn_implementation="eager", dtype=torch.float64
    )
    # The other implementations of experts do not run in float64.
    model.config._experts_implementation = "eager"
    missing = model.load_state_dict({name: t.double() for name, t in tensors.items()}, strict=False)
    assert not missing.unexpected_keys
    assert all("lm_head" in name for name in missing.missing_keys)
    ids = torch.randint(0, config["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
    return model.eval()(ids).logits  # type: ignore[no-any-return]


def widen(config: dict[str, Any], tensors: dict[str, Tensor], widths: Widths) -> dict[str, Tensor]:
    """Return the tensors of an export padded to ``widths``, with the names that transformers' classes have."""
    normed = any("q_norm" in name for name in tensors)
    made = {}
    for name, tensor in widened(tensors.items(), config["mla"], widths, normed=normed):
        for part, served in RENAMED.items():
            name = name.replace(f".self_attn.{served}.", f".self_attn.{part}.")
        made[name] = tensor
    return made


def padded(config: dict[str, Any], tensors: dict[str, Tensor], widths: Widths) -> Tensor:
    """Return the logits of an export whose tensors and config are padded to ``widths``."""
    wide = widen(config, tensors, widths)
    config = copy.deepcopy(config)
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    sizes = dict(zip(names, (widths.latent, widths.rotary, widths.nope, widths.value), strict=True))
    for kind in config["mla"]["kinds"]:
        kind |= sizes | {"inv_freq": rotary_table(kind["inv_freq"], widths.rotary).tolist()}
    return logits(config, wide)


def loaded(export: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((export / "config.json").read_text())
    model = model_class(config["source_model_type"], "AutoModelForCausalLM").from_pretrained(export)
    return config, model.state_dict()


def test_padding_changes_no_logits(export: Path) -> None:
    config, tensors = loaded(export)
    expected = logits(config, tensors)
    for cpu in (True, False):
        widths = served_widths(config, cpu=cpu)
        assert widths.latent > max(kind["kv_lora_rank"] for kind in config["mla"]["kinds"])
        assert (padded(config, tensors, widths) - expected).abs().max() < 1e-10


def test_layers_of_several_widths_are_padded_to_one(export: Path) -> None:
    config, tensors = loaded(export)
    expected = logits(config, tensors)
    # Widen the middle layer alone.
    kind = config["mla"]["kinds"][config["mla"]["layers"][1]]
    now = Widths.of(kind)
    wider = Widths(now.latent + 8, now.rotary, now.nope + 3, now.value + 5)
    wide = widen(config, tensors, wider)
    tensors |= {name: tensor for name, tensor in wide.items() if ".layers.1.self_attn." in name}
    config["mla"] = {"kinds": [], "layers": list(range(LAYERS))}
    for i in range(LAYERS):
        widths = wider if i == 1 else now
        sizes = {"kv_lora_rank": widths.latent, "qk_nope_head_dim": widths.nope, "v_head_dim": widths.value}
        config["mla"]["kinds"].append(kind | sizes)
    served = served_widths(config, cpu=True)
    assert (served.nope, served.value) == (wider.nope, wider.value)
    assert (padded(config, tensors, served) - expected).abs().max() < 1e-10


def test_only_the_projections_of_queries_keys_and_values_get_new_names() -> None:
    names = ["model.layers.2.mlp.gate_proj.weight", "model.layers.2.self_attn.sinks", "model.norm.weight"]
    names += [f"model.layers.1.self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "q_norm")]
    names += ["model.layers.1.self_attn.q_proj.bias"]
    widths = served_widths(CONFIG, cpu=True)
    made = dict(widened(((name, torch.zeros(4, 4)) for name in names), CONFIG["mla"], widths, normed=True))
    changed = {name: new for name, new in zip(names, made, strict=True) if name != new}
    assert changed == {
        f"model.layers.1.self_attn.{old}": f"model.layers.1.self_attn.{new}"
        for old, new in (
            ("q_proj.weight", "query.weight"),
            ("k_proj.weight", "key.weight"),
            ("v_proj.weight", "value.weight"),
            ("q_proj.bias", "query.bias"),
        )
    }
    assert all(tensor.shape == (4, 4) for tensor in made.values())


REFUSED = {
    "sliding windows": {"sliding_window": 8},
    "soft-capped scores": {"attn_logit_softcapping": 50.0},
    "attention sinks": {"source_model_type": "gpt_oss"},
    "layers that kept the source's attention": {"mla": {"layers": [0, None, 0], "kinds": [KIND]}},
    "latent norms": {"mla": {"layers": [0, 0, 1], "kinds": [KIND, KIND | {"latent_norm": True}]}},
    "longrope": {"mla": {"layers": [0, 0, 1], "kinds": [KIND, KIND | {"long_inv_freq": [0.1] * 16}]}},
    "quantised weights": {"quantization_config": {"quant_method": "fp8"}},
    "the family olmo2": {"source_model_type": "olmo2"},
    "rotary key is 96 wide": {"mla": {"layers": [0, 0, 1], "kinds": [KIND, KIND | {"qk_rope_head_dim": 96}]}},
    "latent is 528 wide": {"mla": {"layers": [0, 0, 1], "kinds": [KIND, KIND | {"kv_lora_rank": 528}]}},
    "heads are 256 and 64 wide": {"mla": {"layers": [0], "kinds": [KIND | {"qk_nope_head_dim": 256}]}},
    "no widths of a latent attention": {"mla": None},
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_refusal_names_what_it_refuses(words: str) -> None:
    assert refuses(CONFIG) is None
    problem = refuses(CONFIG | REFUSED[words])
    assert problem is not None
    assert words in problem
    assert problem.count("; ") == 2
    assert "\n" not in problem
    with pytest.raises(ValueError, match=words):
        served_config(CONFIG | REFUSED[words], cpu=True)


def test_a_window_counts_if_a_text_can_exceed_it() -> None:
    assert refuses(CONFIG | {"sliding_window": 64}) is None
    assert refuses(CONFIG | {"sliding_window": 8, "layer_types": ["full_attention"] * LAYERS}) is None
    types = ["full_attention", "full_attention", "sliding_attention"]
    assert refuses(CONFIG | {"sliding_window": 8, "layer_types": types}) is not None


def test_tensor_parallelism_divides_the_heads() -> None:
    assert refuses(CONFIG, tensor_parallel=3) is None
    problem = refuses(CONFIG, tensor_parallel=4)
    assert problem is not None
    assert "6 attention heads cannot be divided among 4 devices" in problem


@pytest.mark.parametrize(("cpu", "expected"), [(True, (512, 64, 64, 64)), (False, (256, 64, 64, 128))])
def test_the_served_config_is_the_familys_with_the_widths_of_the_kernels(
    export: Path, cpu: bool, expected: tuple[int, ...]
) -> None:
    config = json.loads((export / "config.json").read_text())
    config["mla"] = CONFIG["mla"]
    made, unused = served_config(config, cpu=cpu, return_unused_kwargs=True, name_or_path="x")
    family = config["source_model_type"]
    assert type(made).__module__.startswith(f"transformers.models.{family}.")
    assert made.architectures == [architecture(family)]
    assert widths_of(made) == Widths(*expected)
    assert made.model_type == "deepseek_v3"
    assert made.hidden_size == config["hidden_size"]
    assert made.mla == CONFIG["mla"]
    assert unused == {}
    # The settings are checked against the served config, which vLLM keeps.
    check_settings(settings(made))


def settings(config: Any, devices: int = 1, **option: Any) -> Any:
    """Return a stand-in for vLLM's settings."""
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config),
        parallel_config=SimpleNamespace(tensor_parallel_size=devices, worker_cls="auto"),
        additional_config=option,
        lora_config=None,
    )


def test_the_checked_worker_is_chosen_unless_an_option_says_no() -> None:
    config = served_config(CONFIG, cpu=True)
    checked, unchecked = settings(config), settings(config, **{OPTION: False})
    check_settings(checked)
    check_settings(unchecked)
    assert checked.parallel_config.worker_cls == CHECKED_WORKER
    assert unchecked.parallel_config.worker_cls == "auto"
    with pytest.raises(ValueError, match="cannot be divided among 4 devices"):
        check_settings(settings(config, devices=4))
    adapted = settings(config)
    adapted.lora_config = "some"
    with pytest.raises(ValueError, match="no LoRA adapters"):
        check_settings(adapted)


def test_registration_names_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = ("vllm", "vllm.model_executor.models.config", "vllm.platforms", "vllm.transformers_utils.config")
    vllm, models, platforms, configs = (ModuleType(name) for name in modules)
    registered: dict[str, str] = {}
    vllm.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)  # type: ignore[attr-defined]
    models.MODELS_CONFIG_MAP, models.VerifyAndUpdateConfig = {}, object  # type: ignore[attr-defined]
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: True)  # type: ignore[attr-defined]
    configs._CONFIG_REGISTRY = {}  # type: ignore[attr-defined]
    for name, module in zip(modules, (vllm, models, platforms, configs), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    for parent in ("vllm.model_executor", "vllm.model_executor.models", "vllm.transformers_utils"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    register()
    assert set(registered) == set(models.MODELS_CONFIG_MAP) == {architecture(family) for family in SERVED}
    reader = configs._CONFIG_REGISTRY["transmla"]
    assert widths_of(reader.from_dict(CONFIG)).latent == 512
    assert models.MODELS_CONFIG_MAP["TransmlaLlamaForCausalLM"].verify_and_update_config is check_settings


def test_the_plugin_is_an_entry_point_that_imports_neither_vllm_nor_transformers() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["transmla"].partition(":")
    assert getattr(import_module(module), name) is register
    code = f"import sys, {module}; assert not {{'vllm', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_logits_are_refused_with_a_reason() -> None:
    decoded = torch.randn(32, 100, generator=torch.Generator().manual_seed(0))
    signed = SignedLogits(project_logits(decoded).rounded(), [0.01, 0.01, 0.1, 0.02])

    def passes(now: Tensor, prefilled: Tensor, dtype: torch.dtype = torch.float32) -> bool:
        return compare_served(now, prefilled, signed, dtype).passed

    assert passes(decoded, decoded[-1])
    assert not passes(decoded.roll(1, 0), decoded[-2])  # decoding
    assert not passes(decoded, decoded[0])  # prefill
    assert not passes(decoded * float("nan"), decoded[-1])
    assert not passes(decoded, decoded[-1] * float("nan"))
    assert not passes(decoded[1:], decoded[-1])
    assert not passes(decoded * 1.02, decoded[-1] * 1.02)
    assert passes(decoded * 1.02, decoded[-1] * 1.02, torch.bfloat16)
    wrong = torch.cat([decoded[:-4], decoded.roll(1, 0)[-4:]])
    assert not passes(wrong, wrong[-1], torch.bfloat16)
    words = refusal(compare_served(decoded, decoded[0], signed, torch.float32), "vLLM", f"--no {OPTION}")
    assert words.startswith("vLLM's logits differ from those that the export records; decoding deviates by ")
    assert OPTION in words


def test_an_unsigned_config_has_no_logits() -> None:
    assert signed_logits({}) is None
    assert signed_logits({"transmla": {"signature": None}}) is None
    assert signed_logits({"transmla": {"signature": {"logits": [1.0]}}}) is None
    signature = {"logits": [1.0], "rounding": [0.1]}
    assert signed_logits({"transmla": {"signature": signature}}) == SignedLogits([1.0], [0.1])


def test_the_tolerance_in_bfloat16_is_what_rounding_changes() -> None:
    signed = SignedLogits([1.0, 1.0], [0.001, 0.1])
    assert signed.tolerances(torch.float32) == [1e-2, 1e-2]
    assert signed.tolerances(torch.bfloat16) == [0.05, 0.5]
