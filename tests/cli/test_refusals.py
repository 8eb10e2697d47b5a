"""Bad input is one line that says what, limit and remedy; nothing is written."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import CALIBRATION, Run, refuses
from helpers.edit_json import edit_json
from safetensors.torch import load_file, save_file
from torch import Tensor

from transmla.evaluate import compare as after

QUERY = "model.layers.1.self_attn.q_proj.weight"
Edit = Callable[[Path], object]


def config(**changes: Any) -> Edit:
    def edit(source: Path) -> None:
        edit_json(source / "config.json", **changes)

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
    "mla": (config(model_type="deepseek_v3"), "attention is MLA already (model_type 'deepseek_v3')"),
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
    "no-config": (without("config.json"), "no config.json in 'source'; "),
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
    "too-wide-rope": ("--qk-rope-head-dim 32", "only divisors match; use one of 16, 8, 4, 2"),
    "rope-without-latent": (
        "--qk-rope-head-dim 64",
        "cannot hold a rotary key of 64; the latent needs at least 16 values more; lower --qk-rope-head-dim, or",
    ),
    "budget": (
        "--cache-ratio 0.05",
        "cannot hold a rotary key of 2; the latent needs at least 16 values more; raise --cache-ratio to 0.188",
    ),
    "no-ratio": ("--cache-ratio 0", "cache_ratio: input should be greater than 0"),
    "endless-ratio": ("--cache-ratio inf", "cache_ratio: input should be a finite number"),
    "no-number": ("--cache-ratio half", "cache_ratio: it must be auto, or a share above 0"),
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


@pytest.mark.parametrize(
    "argv",
    [
        "plan source",
        "inspect source",
        "convert source -o new --eval text.txt",
        "verify {export}",
        "eval source --text text.txt",
        "eval source --retrieval",
        "heal {export} --teacher source -o new",
        "bench source",
        "chat source",
    ],
)
def test_every_verb_refuses_a_device_before_it_opens_a_model(
    place: Path, converted: Path, run: Run, argv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for opened in ("transmla.convert.prepare.open_source", "transmla.evaluate.open_model.load_named"):
        monkeypatch.setattr(opened, None)
    verb, *arguments = argv.format(export=converted / "out").split()
    refuses(run, verb, *arguments, "--device", "cuda:99", says="device 'cuda:99' is not usable; ")


@pytest.mark.parametrize("verb", ["bench --baseline source", "chat --prompt hi"])
def test_a_backend_that_cannot_serve_the_model_is_refused_before_anything_is_measured(
    place: Path, converted: Path, run: Run, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transmla.evaluate.compare.bench", None)
    name, *arguments = verb.split()
    arguments += ["--backend", "hopper", "--device", "cpu"]
    says = "backend 'hopper' cannot serve this model; the kernel needs a Hopper GPU"
    refuses(run, name, str(converted / "out"), *arguments, says=says)


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
    refuses(run, "convert", "source", "-o", "text.txt", *CALIBRATION, says="output 'text.txt' exists")
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


@pytest.mark.parametrize("verb", ["eval", "convert", "calibration"])
def test_a_hub_out_of_reach_is_one_line_before_a_model_is_loaded(place: Path, verb: str) -> None:
    argv = {
        "eval": ["eval", "source", "--text", "text.txt", "--text", "wikitext"],
        "convert": ["convert", "source", "-o", "out", *CALIBRATION, "--eval", "text.txt", "--eval", "wikitext"],
        "calibration": ["convert", "source", "-o", "out", "--calibration", "wikitext", *CALIBRATION[2:]],
    }[verb]
    # Nothing listens at this port.
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "transmla", *argv], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: dataset wikitext: the Hugging Face Hub could not be reached; leave it out")
    assert done.stderr.count("\n") == 1
    assert not Path("out").exists()


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
