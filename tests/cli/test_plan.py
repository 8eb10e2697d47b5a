"""What `transmla plan` says of a conversion, as a table and as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.command_line import Run
from helpers.llama_8b import LLAMA_8B

from transmla.cli import console
from transmla.plan.estimate import summary
from transmla.plan.make_plan import make_plan
from transmla.recipe import parse_recipe

# Keys of ``summary`` with the weights of the source and of the export.
SIDES = {"before": "source_parameters", "after": "parameters"}


def test_plan_prints_json(place: Path, run: Run) -> None:
    code, out, err = run("plan", "source", "--cache-ratio", "0.4", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert {"spec", "shape", "rotary", "method", "dtype", "rope_parameters", "notes"} <= set(found)
    assert {"cache_values", "cache_bytes_per_token", "cache_ratio", "contexts", "runtimes"} <= set(found)
    assert {"parameters", "memory_bytes", "disk_bytes", "seconds", "device"} <= set(found)
    after = found["shape"]["kv_lora_rank"] + found["shape"]["qk_rope_head_dim"]
    assert found["cache_values"] == {"before": 96, "after": after}
    assert found["cache_ratio"] == after / 96 <= 0.4
    assert found["cache_bytes_per_token"] == {"before": 96 * 2 * 4, "after": after * 2 * 4}
    assert found["healing"].startswith("not healed, for want of a GPU")
    assert not list(Path().glob("unused*"))


def test_plan_says_how_the_conversion_ends(place: Path, run: Run) -> None:
    _, out, _ = run("plan", "source", "--heal", "3")
    assert "ends with a healing of 3 minutes, all weights" in " ".join(out.split())
    _, out, _ = run("plan", "source", "--heal", "off", "--json")
    assert json.loads(out)["healing"] is None


def test_the_plan_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"source": "s", "output": "o", "pad_for": "vllm", "cache_ratio": 0.3}
    plan = make_plan(LLAMA_8B, parse_recipe(values, "test"), "bfloat16")
    console.show_plan(plan, summary(plan, 64 * 512, None) | {"seconds": 60.0, "device": "cpu"})
    out = capsys.readouterr().out
    for row in (
        "│ attention +│ 32 q / 8 kv × 128 │ latent 512 \\+ rotary 64 │",
        "│ cache values per token, layer │ +2048 │ +576 \\(28.1%\\) │",
        "│ cache bytes per token +│ +131,072 │ +36,864 │",
        "│ tokens on a 141 GB GPU +│ +[\\d,]+ │ +[\\d,]+ │",
    ):
        assert re.search(row, out), row


def test_a_share_of_some_layers_is_named_as_theirs(place: Path, run: Run) -> None:
    _, out, _ = run("plan", "source", "--layers", "0")
    assert "cache values, converted layers" in out


def test_the_plan_of_an_8b_llama() -> None:
    """Llama-3.1-8B's shape, without its weights: 2048 cached values become vLLM's 512 + 64."""
    for ratio in (0.29, 0.3):
        values = {"source": "s", "output": "o", "pad_for": "vllm", "cache_ratio": ratio}
        plan = make_plan(LLAMA_8B, parse_recipe(values, "test"), "bfloat16")
        found = summary(plan, 64 * 512, None)
        assert found["cache_values"] == {"before": 2048, "after": 576}
        shape = found["shape"]
        assert (shape["qk_nope_head_dim"], shape["qk_rope_head_dim"], shape["v_head_dim"]) == (128, 64, 128)
        assert all(runtime["accepts"] for runtime in found["runtimes"])
        assert 7.5e9 < found["parameters"] < 9e9
        assert found["contexts"]["24"]["after"] > 3 * found["contexts"]["24"]["before"] > 0
        # Each model has its own weights beside its cache.
        free = {side: 0.9 * 80e9 - 2 * found[name] for side, name in SIDES.items()}
        assert found["contexts"]["80"]["before"] == int(free["before"] / (2048 * 32 * 2))
        assert found["contexts"]["80"]["after"] == int(free["after"] / (576 * 32 * 2))
        assert found["source_parameters"] == 8_030_261_248
        assert found["memory_bytes"] < found["disk_bytes"] < 20e9
        assert found["export_bytes"] == 2 * found["parameters"] < found["disk_bytes"]


def test_what_the_source_holds_does_not_depend_on_the_target() -> None:
    def contexts(**values: object) -> dict[str, int]:
        recipe = parse_recipe({"source": "s", "output": "o", **values}, "test")
        found = summary(make_plan(LLAMA_8B, recipe, "bfloat16"), 64 * 512, None)
        return {gb: held["before"] for gb, held in found["contexts"].items()}

    assert contexts(cache_ratio=0.5) == contexts(cache_ratio=0.125) == contexts(format="transmla")


def test_the_plan_says_what_the_disk_is_needed_for(place: Path, run: Run) -> None:
    _, out, _ = run("plan", "source")
    text = " ".join(out.split())
    assert re.search(r"disk: \d+ MB for the export; \d+ MB while it is converted, with the state for --resume", text)
    assert "while it is healed" not in text
    _, out, _ = run("plan", "source", "--heal", "3")
    assert "while it is healed, with the unhealed copy and the state of the training" in " ".join(out.split())
    found = json.loads(run("plan", "source", "--heal", "3", "--json")[1])
    assert found["export_bytes"] < found["disk_bytes"]
    assert found["export_bytes"] < found["healing_disk_bytes"]
    assert json.loads(run("plan", "source", "--json")[1])["healing_disk_bytes"] is None
