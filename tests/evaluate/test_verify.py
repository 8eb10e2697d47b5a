"""``transmla verify`` passes intact exports and reports each kind of damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.edit_json import edit_json
from helpers.tiny_sources import build_model, build_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from transmla import cli
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.export import push as hub
from transmla.export.hashes import file_sha256
from transmla.export.manifest import Manifest
from transmla.recipe import parse_recipe

SHARD = "model-00002-of-00004.safetensors"  # layer 0
LATENT = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
EXPAND = "model.layers.0.self_attn.kv_b_proj.weight"
MLP = "model.layers.0.mlp.up_proj.weight"
CHECKS = [
    "hashes",
    "contents as signed",
    "layers as signed",
    "loads",
    "finite",
    "logits as signed",
    "cached decode = full forward",
    "cache size",
    "absorbed = expanded",
    "latent norm is an identity",
]
SOURCE_CHECKS = [
    "source",
    "config of the source",
    "files of the source",
    "untouched weights",
    "source layers as signed",
    "distance to the source as signed",
]


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """Use one thread: more threads slow down matrices of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a ``source`` and its export ``out``."""
    folder = tmp_path_factory.mktemp("pristine")
    build_model().save_pretrained(folder / "source")
    build_tokenizer(folder / "source")
    calibration = {"source": "self", "sequences": 8, "length": 48}
    values = {"source": str(folder / "source"), "output": str(folder / "out"), "calibration": calibration}
    convert(parse_recipe(values | {"device": "cpu"}, "test"))
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """Return a copy of the export that a test may damage."""
    return Path(shutil.copytree(pristine / "out", tmp_path / "out"))


def rehash(folder: Path) -> None:
    """Write the hashes of the current files into the manifest, as a careful forger would."""
    manifest = json.loads((folder / "transmla.json").read_text())
    manifest["hashes"] = {name: file_sha256(folder / name) for name in manifest["hashes"]}
    (folder / "transmla.json").write_text(json.dumps(manifest))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change tensors in the first layer's shard, and update the hashes to hide the change."""
    tensors = load_file(folder / SHARD)
    edit(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    rehash(folder)


def run(folder: Path, *options: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the exit code of ``transmla verify``."""
    monkeypatch.setattr("sys.argv", ["transmla", "verify", str(folder), "--device", "cpu", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def failures(folder: Path, **options: Any) -> list[str]:
    return [check.name for check in verify(folder, **options) if not check.passed]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_intact_export_passes_and_is_recorded(
    folder: Path,
    pristine: Path,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(TransmlaError, match="is not verified"):
        hub.push(folder, "org/name", dry_run=True)
    assert run(folder, "--source", str(pristine / "source"), "--dtype", dtype, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    assert all(f"pass  {name}:" in out for name in [*CHECKS, *SOURCE_CHECKS])
    record = json.loads((folder / "verification.json").read_text())
    assert record["passed"] is True
    assert record["dtype"] == dtype
    assert [check["name"] for check in record["checks"]] == [*CHECKS, *SOURCE_CHECKS]
    assert "verification.json" in {file.path for file in hub.push(folder, "org/name", dry_run=True).files}


def flip_byte(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[-7] ^= 4
    (folder / SHARD).write_bytes(bytes(data))


def cut_off(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


def lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def poison(value: float) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: t[EXPAND].view(-1)[5].fill_(value))


def bend_norm(folder: Path) -> None:
    """Make a latent 10,000 times larger, so that its norm is no longer an identity."""
    rank = json.loads((folder / "config.json").read_text())["kv_lora_rank"]
    edit_tensors(folder, lambda t: t[LATENT][:rank].mul_(1e4))


def drop_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop(EXPAND))


def add_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({EXPAND.replace("weight", "bias"): torch.zeros(3)}))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][EXPAND.replace("weight", "bias")] = SHARD
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    rehash(folder)


def wrong_rank(folder: Path) -> None:
    edit_json(folder / "config.json", kv_lora_rank=24)
    rehash(folder)


def wrong_class(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="nonsense")
    rehash(folder)


def wrong_plan(folder: Path) -> None:
    plan = json.loads((folder / "transmla.json").read_text())["plan"]
    plan["shape"]["kv_lora_rank"] -= 1
    edit_json(folder / "transmla.json", plan=plan)


def add_file(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copyfile(folder / SHARD, folder / name)


@pytest.mark.parametrize(
    ("damage", "caught_by"),
    [
        (add_file("model.safetensors"), "hashes"),
        (add_file("adapter_config.json"), "hashes"),
        (flip_byte, "hashes"),
        (cut_off, "hashes"),
        (lose_tokenizer, "hashes"),
        (poison(float("nan")), "finite"),
        (poison(float("inf")), "finite"),
        (bend_norm, "latent norm is an identity"),
        (drop_tensor, "loads"),
        (add_tensor, "loads"),
        (wrong_rank, "loads"),
        (wrong_class, "loads"),
        (wrong_plan, "cache size"),
    ],
    ids=[
        *("extra-weights", "extra-adapter", "flipped-byte", "cut-off", "lost-file", "nan", "inf", "bent-norm"),
        *("lost-tensor", "extra-tensor", "wrong-rank", "wrong-class", "wrong-plan"),
    ],
)
def test_damage_is_caught(
    folder: Path,
    damage: Callable[[Path], object],
    caught_by: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert failures(folder) == []
    assert (folder / "verification.json").is_file()
    damage(folder)
    assert run(folder, monkeypatch=monkeypatch) == 1
    out, err = capsys.readouterr()
    assert f"FAIL  {caught_by}:" in out
    assert "failed" in err
    assert "Traceback" not in err
    assert not (folder / "verification.json").exists()
    with pytest.raises(TransmlaError, match="is not verified"):
        hub.push(folder, "org/name", dry_run=True)


@pytest.mark.parametrize("name", [MLP, "model.embed_tokens.weight", "lm_head.weight"])
def test_a_changed_weight_outside_the_attention_differs_from_the_source(
    folder: Path, pristine: Path, name: str
) -> None:
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(folder / shard)
    tensors[name][1, 2] *= 1 + 2**-20
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    rehash(folder)
    assert failures(folder) == []  # without the source, the export is consistent
    assert failures(folder, source=str(pristine / "source")) == ["untouched weights"]
    assert not (folder / "verification.json").exists()


def test_another_model_as_the_source_is_named_and_no_layer_is_compared(pristine: Path, tmp_path: Path) -> None:
    build_model(num_hidden_layers=1).save_pretrained(tmp_path / "other")
    build_tokenizer(tmp_path / "other")
    checks = [check for check in verify(pristine / "out", source=str(tmp_path / "other")) if not check.passed]
    said = {check.name: check.detail for check in checks}
    assert said["source"] == "other weights were converted"
    assert "differ, first " in said["untouched weights"]
    assert said["distance to the source as signed"] == "no comparison: the layers have other shapes"
    assert not any("Error" in detail for detail in said.values())


def test_damage_after_verification_stops_the_push(folder: Path) -> None:
    assert failures(folder) == []
    flip_byte(folder)
    with pytest.raises(TransmlaError, match="has changed since it was verified"):
        hub.push(folder, "org/name", dry_run=True)


def test_an_unfinished_verification_records_nothing(folder: Path) -> None:
    checks = verify(folder)
    next(checks)
    checks.close()
    assert not (folder / "verification.json").exists()


def test_an_unfinished_or_missing_export_is_refused(
    folder: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = folder.rename(folder.with_name("out.partial"))
    for path in (pristine / "source", pristine / "nowhere", partial):
        assert run(path, monkeypatch=monkeypatch) == 2
    monkeypatch.chdir(partial)
    assert run(Path("."), monkeypatch=monkeypatch) == 2


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"hashes": {"config.json": 1}}', '{"hashes": {"a": "b"}, "plan": {}}']
)
def test_a_damaged_manifest_is_a_one_line_error(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "transmla.json").write_text(text)
    with pytest.raises(TransmlaError) as error:
        next(verify(folder))
    assert all((error.value.what, error.value.limit, error.value.remedy))
    assert run(folder, monkeypatch=monkeypatch) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("path", [".", "../out", "../out/"])
def test_a_relative_path_is_verified_and_pushed(folder: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert run(Path(path), monkeypatch=monkeypatch) == 0
    assert hub.push(Path(path), "org/name", dry_run=True).files


def test_a_pickled_and_tied_source_is_compared(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = build_model(tie_word_embeddings=True)
    model.save_pretrained(source)
    build_tokenizer(source)
    (source / "model.safetensors").unlink()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    torch.save(weights, source / "pytorch_model.bin")
    values = {"source": str(source), "output": str(out), "device": "cpu", "allow_pickle": True}
    calibration = {"source": "self", "sequences": 8, "length": 48}
    convert(parse_recipe(values | {"calibration": calibration}, "test"))
    with pytest.raises(TransmlaError, match="holds pickled weights"):
        failures(out, source=str(source))
    assert failures(out, source=str(source), allow_pickle=True) == []

    shard = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
    tensors = load_file(out / shard)
    tensors["lm_head.weight"][1, 2] *= 1 + 2**-20
    save_file(tensors, out / shard, metadata={"format": "pt"})
    rehash(out)
    assert failures(out, source=str(source), allow_pickle=True) == ["untouched weights"]


def test_an_older_manifest_says_only_whether_there_are_experts(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    build_model("mixtral").save_pretrained(source)
    build_tokenizer(source)
    calibration = {"source": "self", "sequences": 8, "length": 48}
    values = {"source": str(source), "output": str(out), "device": "cpu", "reconstruct": "off"}
    convert(parse_recipe(values | {"calibration": calibration}, "test"))
    plan = json.loads((out / "transmla.json").read_text())["plan"]
    assert plan["spec"]["experts"] > 1
    for experts, failed in ((True, []), (False, ["config of the source"])):
        del plan["spec"]["experts"]
        plan["spec"].pop("experts_per_token", None)
        plan["spec"]["experts"] = experts
        edit_json(out / "transmla.json", plan=plan)
        assert failures(out, source=str(source)) == failed


def test_the_source_is_loaded_at_its_recorded_commit(
    folder: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revisions = []

    def resolve(source: str, *, revision: str | None, **_: object) -> Path:
        revisions.append(revision)
        return Path(source)

    monkeypatch.setattr("transmla.evaluate.verify.resolve_source", resolve)
    recorded = json.loads((folder / "transmla.json").read_text())["source"]
    for commit in ("0" * 40, None):
        origin = recorded | {"name": "org/name", "revision": "main", "commit": commit}
        edit_json(folder / "transmla.json", source=origin)
        assert failures(folder, source=str(pristine / "source")) == []
    assert revisions == ["0" * 40, "main"]


def test_every_measured_number_stands_beside_its_limit(pristine: Path, folder: Path) -> None:
    checks = {check.name: check.detail for check in verify(folder, source=str(pristine / "source"))}
    number, limit = r"\d[\d.]*e[-+]\d+", r"at most \d[\d.e+-]* allowed"
    measured = [
        "layers as signed",
        "logits as signed",
        "cached decode = full forward",
        "absorbed = expanded",
        "latent norm is an identity",
        "source layers as signed",
        "distance to the source as signed",
    ]
    for name in measured:
        assert re.search(rf"{number}.*, {limit}$", checks[name]), checks[name]
        assert len(re.findall(r"e[-+]\d\d", checks[name])) == 2, checks[name]
    # The error on the signature's random inputs is no measure of quality, and is not shown.
    assert "differs from the source by" not in checks["distance to the source as signed"]
    assert "attention errors" not in checks["distance to the source as signed"]


@pytest.mark.parametrize("damaged", [False, True])
def test_logits_that_rounding_changes_are_judged_in_float64(
    damaged: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Massive activations magnify rounding beyond any limit in float32; here the limit is below it."""
    monkeypatch.setattr("transmla.evaluate.verify.LOGITS_TOLERANCE", 1e-7)
    if damaged:
        edit_tensors(folder, lambda tensors: tensors[MLP].mul_(1.03))
    checks = {check.name: check for check in verify(folder)}
    assert checks["logits as signed"].passed != damaged
    assert checks["logits as signed"].detail.endswith("in float64")


def test_the_cache_is_measured_in_the_precision_of_the_export(pristine: Path, tmp_path: Path) -> None:
    values = {"source": str(pristine / "source"), "output": str(tmp_path / "half"), "dtype": "bfloat16"}
    calibration = {"source": "self", "sequences": 8, "length": 48}
    export = convert(parse_recipe(values | {"device": "cpu", "calibration": calibration}, "test"))
    plan = Manifest.read(export).plan
    (detail,) = [check.detail for check in verify(export) if check.name == "cache size"]
    assert detail == f"{2 * plan.model_cache_values:,} bytes per token in bfloat16, as planned"
