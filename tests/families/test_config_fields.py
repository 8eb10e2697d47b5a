"""scripts/config_walk.py: fields of a config change the export as they change the source, or are refused by name.

The script changes every field of every family by itself. Here, all fields of a family change at once, and the fields
that once made silent faults change by themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from transmla.registry import scan

SCRIPTS = Path(__file__).parents[2] / "scripts"
FAMILIES = tuple(scan("transmla.families", "FAMILY"))
NATIVE = ("llama", "mistral")


@pytest.fixture(scope="module")
def walk() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("config_walk")


@pytest.fixture(scope="module")
def fields(walk: ModuleType) -> ModuleType:
    return importlib.import_module("config_walk_fields")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_config_class_is_walked_or_named_as_idle(fields: ModuleType, family: str) -> None:
    walked = {field for case in fields.cases(family, "transmla") for field in case.changes}
    assert set(fields.own_fields(family)) <= walked | set(fields.IDLE)


@pytest.mark.parametrize(("family", "form"), [(f, "transmla") for f in FAMILIES] + [(f, "native") for f in NATIVE])
def test_fields_changed_together_change_the_export_as_the_source(
    walk: ModuleType, fields: ModuleType, family: str, form: str, tmp_path: Path
) -> None:
    changes = {name: value for name, value in fields.joint(family).items() if form != "native" or "bias" not in name}
    assert len(changes) >= 7
    outcome = walk.walk(walk.Case(family, form, changes, own=True), tmp_path / "case")
    assert (outcome.kind, outcome.changed) == ("same", True), outcome.detail


SLIDING, FULL = "sliding_attention", "full_attention"
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "a softcap that the attention ignores": ("gemma3_text", "transmla", {"attn_logit_softcapping": 0.5}, "same"),
    "softcaps of another family": ("llama", "native", {"attn_logit_softcapping": 0.5}, "same"),
    "a cap of logits of another family": ("llama", "native", {"final_logit_softcapping": 0.5}, "same"),
    "multipliers of another family": ("llama", "native", {"attention_multiplier": 0.7, "logits_scaling": 4.0}, "same"),
    "a window that only the cache has": ("llama", "native", {"sliding_window": 6}, "refused"),
    "chunks that only the cache has": ("granite", "transmla", {"attention_chunk_size": 4}, "refused"),
    "a window of the whole context": ("llama", "native", {"sliding_window": 64}, "same"),
    "a window switched off": ("qwen2", "transmla", {"sliding_window": 6, "use_sliding_window": False}, "same"),
    "a window in the last layers": (
        "qwen3",
        "transmla",
        {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
        "same",
    ),
    "types of layers that the mask ignores": ("starcoder2", "transmla", {"layer_types": [FULL, FULL, FULL]}, "same"),
    "types of layers of which only the cache knows": (
        "mixtral",
        "transmla",
        {"layer_types": [FULL, SLIDING, FULL]},
        "stock refuses",
    ),
    "a mask that the attention does not know of": (
        "smollm3",
        "transmla",
        {"sliding_window": 6, "use_sliding_window": False, "layer_types": [SLIDING, FULL, SLIDING]},
        "refused",
    ),
    "no causal mask": ("llama", "native", {"is_causal": False}, "refused"),
    "shared caches": ("llama", "native", {"kv_sharing_modes": ["own", "reuse", "own"]}, "stock refuses"),
    "layers that differ": ("llama", "native", {"per_layer_config": {"1": {"rms_norm_eps": 0.1}}}, "stock refuses"),
    "weights in another file": ("llama", "native", {"transformers_weights": "other.safetensors"}, "stock refuses"),
    "fused modules": ("llama", "native", {"fusion_config": {"x": {}}}, "stock refuses"),
    "an eps that no weight makes up for": ("llama", "native", {"rms_norm_eps": 0.1}, "refused"),
    "clipped projections": ("olmo2", "transmla", {"clip_qkv": 0.5}, "refused"),
}


@pytest.mark.parametrize("name", CASES)
def test_fields_that_parts_of_transformers_ignore(walk: ModuleType, name: str, tmp_path: Path) -> None:
    family, form, changes, kind = CASES[name]
    outcome = walk.walk(walk.Case(family, form, changes, own=False), tmp_path / "case")
    assert outcome.kind == kind, outcome.detail
