"""Everything of the checkpoint travels: its tokenizer however it was saved, chat templates, settings and licence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from helpers.byte_tokenizer import byte_tokenizer
from helpers.edit_json import edit_json
from helpers.tiny_sources import build_model
from packaging.version import Version
from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import transmla
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.export.tokenizer import difference, write_tokenizer
from transmla.files import write_json
from transmla.formats.base import format_named
from transmla.plan.make_plan import make_plan
from transmla.recipe import parse_recipe
from transmla.source.describe import describe
from transmla.source.load import load_tokenizer

Make = Callable[..., Any]
TEXT = "Ünïcode, 12345 + x<extra>  and\ttabs\n<tool>call</tool></s>"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TEMPLATES = {
    "default": "D{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "tool_use": "T{{ messages[0]['content'] }}",
    "rag": "R{{ messages | length }}",
}


def rich_tokenizer(**options: Any) -> Any:
    """A tokenizer whose every attribute differs from the default of its class."""
    tokenizer = byte_tokenizer(
        ["the cat sat on the mat"], padding_side="left", truncation_side="left", model_max_length=777, **options
    )
    tokenizer.add_special_tokens(
        {"pad_token": "<pad>", "extra_special_tokens": [AddedToken("<tool>", lstrip=True, special=True)]}
    )
    tokenizer.add_tokens([AddedToken("<extra>", rstrip=True, normalized=False)])
    return tokenizer


def saved(template: Any, *, jinja: bool) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        tokenizer = rich_tokenizer(template="x")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder, save_jinja_files=jinja)

    return save


def save_fast_file_alone(folder: Path) -> None:
    rich_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))


def save_legacy_files(folder: Path) -> None:
    """vocab.json and merges.txt, with special and added tokens in files of their own, as before tokenizer.json."""
    model = json.loads(byte_tokenizer(["the cat sat on the mat"]).backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": len(model["vocab"])}))
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 99, "chat_template": TEMPLATES["default"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_versions(folder: Path) -> None:
    """A tokenizer with a file for newer versions of transformers, which differs from tokenizer.json."""
    saved(TEMPLATES["default"], jinja=True)(folder)
    (folder / "tokenizer.json").rename(folder / "tokenizer.4.0.0.json")
    byte_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"])


def save_class_in_config(folder: Path) -> None:
    """The class of the tokenizer stands in config.json alone."""
    saved(TEMPLATES, jinja=True)(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    edit_json(folder / "config.json", tokenizer_class="Qwen2Tokenizer")


def save_with_other_runtimes_files(folder: Path) -> None:
    """The files of mistral-common and of sentencepiece beside tokenizer.json, as on the Hub."""
    saved(TEMPLATES["default"], jinja=True)(folder)
    for name in ("tokenizer.model.v3", "tiktoken.model", "spiece.model"):
        (folder / name).write_bytes(name.encode())


WAYS: dict[str, Callable[[Path], None]] = {
    "one template in a file": saved(TEMPLATES["default"], jinja=True),
    "one template in the settings": saved(TEMPLATES["default"], jinja=False),
    "named templates in files": saved(TEMPLATES, jinja=True),
    "named templates in the settings": saved(TEMPLATES, jinja=False),
    "named templates without a default": saved(
        {"rag": TEMPLATES["rag"], "tool_use": TEMPLATES["tool_use"]}, jinja=True
    ),
    "no template": saved(None, jinja=True),
    "tokenizer.json alone": save_fast_file_alone,
    "vocab.json and merges.txt": save_legacy_files,
    "a file for newer versions": save_versions,
    "the class in config.json": save_class_in_config,
    "files of other runtimes": save_with_other_runtimes_files,
}


@pytest.fixture(params=[("native", "llama"), ("transmla", "qwen3")], ids=lambda param: param[0])
def bare(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a source and its export that hold a config.json alone."""
    form, family = request.param
    source, export = tmp_path / "source", tmp_path / "out"
    config = build_model(family, num_hidden_layers=3).config
    config.save_pretrained(source)
    export.mkdir()
    recipe = parse_recipe({"source": str(source), "output": str(export), "format": form}, "test")
    plan = make_plan(describe(config), recipe, "float32")
    write_json(export / "config.json", format_named(form).config(config, plan))
    return source, export


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def load(folder: Path) -> Any:
    transmla.register()
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check_tokenizers(source: Path, export: Path) -> None:
    """Check that stock transformers loads equal tokenizers from both folders, by what they are and by what they do."""
    left, right = load(source), load(export)
    assert difference(right, left) == ""
    assert left(TEXT)["input_ids"] == right(TEXT)["input_ids"]
    assert left.decode(left(TEXT)["input_ids"]) == right.decode(left(TEXT)["input_ids"])
    for name in left.chat_template if isinstance(left.chat_template, dict) else ():
        arguments = {"chat_template": name, "tokenize": False}
        assert left.apply_chat_template(CHAT, **arguments) == right.apply_chat_template(CHAT, **arguments)


# Ways that older transformers, here 5.17, cannot read from the folder of a DeepSeek-V3 model: they are refused.
UNREADABLE = ("vocab.json and merges.txt", "the class in config.json")


@pytest.mark.parametrize("way", WAYS)
def test_the_exports_tokenizer_equals_the_sources(bare: tuple[Path, Path], way: str) -> None:
    source, export = bare
    WAYS[way](source)
    tokenizer = load_tokenizer(source)
    native = json.loads((export / "config.json").read_text())["model_type"] == "deepseek_v3"
    if native and way in UNREADABLE and Version(transformers.__version__) < Version("5.24"):
        with pytest.raises(TransmlaError, match="tokenizer"):
            write_tokenizer(export, source, tokenizer, copy=True, generation=GenerationConfig())
        return
    write_tokenizer(export, source, tokenizer, copy=True, generation=GenerationConfig(max_length=33))
    check_tokenizers(source, export)
    assert GenerationConfig.from_pretrained(export).max_length == 33
    copied = {
        name: data for name, data in files(export).items() if name not in ("config.json", "generation_config.json")
    }
    source_files = files(source)
    assert {name for name in source_files if name != "config.json"} <= set(copied)
    # The class may have to be written into the settings. All else is copied byte by byte.
    assert all(copied[name] == data for name, data in source_files.items() if name in copied and "_config" not in name)


def test_a_tokenizer_from_a_gguf_file_is_saved_with_all_its_templates(bare: tuple[Path, Path]) -> None:
    source, export = bare
    tokenizer = rich_tokenizer(template="x")
    tokenizer.chat_template = TEMPLATES
    write_tokenizer(export, source, tokenizer, copy=False, generation=GenerationConfig(temperature=0.5, do_sample=True))
    assert difference(load(export), tokenizer) == ""
    assert GenerationConfig.from_pretrained(export).temperature == 0.5


def test_a_tokenizer_that_transformers_corrects_for_the_source_alone_is_saved(bare: tuple[Path, Path]) -> None:
    """transformers replaces the regex of some tokenizers, and knows these by the model_type in config.json."""
    source, export = bare
    saved(TEMPLATES, jinja=True)(source)
    tokenizer = load_tokenizer(source)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[0-9]"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    write_tokenizer(export, source, tokenizer, copy=True, generation=GenerationConfig())
    assert difference(load(source), tokenizer) == "backend_tokenizer"
    assert difference(load(export), tokenizer) == ""


def test_a_tokenizer_that_cannot_be_stored_is_refused(bare: tuple[Path, Path]) -> None:
    source, export = bare
    saved(None, jinja=True)(source)
    tokenizer = load_tokenizer(source)
    tokenizer.padding_side, tokenizer.save_pretrained = "right", lambda folder: None
    with pytest.raises(TransmlaError, match="is not the source's; its padding_side differs"):
        write_tokenizer(export, source, tokenizer, copy=True, generation=GenerationConfig())


LICENCES = ("LICENSE", "LICENSE.txt", "LICENCE.md", "NOTICE", "USE_POLICY.md", "COPYING.LESSER", "MODEL_LICENSE")
CARD = {
    "language": ["en", "no"],
    "license": "other",
    "license_name": "some-licence",
    "license_link": "LICENSE.txt",
    "base_model": "org/base",
    "tags": ["a"],
}


@pytest.mark.parametrize("form", ["native", "transmla"])
def test_a_conversion_carries_settings_and_licence(make_source: Make, make_recipe: Make, form: str) -> None:
    source: Path = make_source(num_hidden_layers=3, vocab_size=300)
    for name in LICENCES:
        (source / name).write_text(f"the terms in {name}")
    (source / "LICENSES").mkdir()
    (source / "LICENSES" / "MIT.txt").write_text("MIT")
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\n# A model")
    GenerationConfig(temperature=0.6, do_sample=True, eos_token_id=[1, 5]).save_pretrained(source)
    saved(TEMPLATES, jinja=True)(source)
    export = convert(make_recipe(source, cache_ratio=0.5, format=form))
    left, right = files(source), files(export)
    kept = {*LICENCES, "LICENSES/MIT.txt", "generation_config.json", "additional_chat_templates/rag.jinja"}
    assert all(right[name] == left[name] for name in kept)
    assert {*kept, "chat_template.jinja"} <= set(json.loads(right["transmla.json"])["hashes"])
    check_tokenizers(source, export)
    metadata = yaml.safe_load(right["README.md"].decode().split("---\n")[1])
    assert {name: metadata[name] for name in CARD if name != "tags"} == {n: v for n, v in CARD.items() if n != "tags"}
    assert {"mla", "transmla"} <= set(metadata["tags"])
    assert all(check.passed for check in verify(export, source=str(source)))


@pytest.mark.parametrize("form", ["native", "transmla"])
def test_generation_settings_in_an_old_config_travel(make_source: Make, make_recipe: Make, form: str) -> None:
    source: Path = make_source(num_hidden_layers=3)
    (source / "generation_config.json").unlink()
    edit_json(source / "config.json", temperature=0.7, do_sample=True, repetition_penalty=1.3)
    export = convert(make_recipe(source, cache_ratio=0.5, format=form))
    transmla.register()
    left, right = (AutoModelForCausalLM.from_pretrained(folder).generation_config for folder in (source, export))
    assert left.repetition_penalty == 1.3
    differing = {n: (v, right.to_dict().get(n)) for n, v in left.to_dict().items() if v != right.to_dict().get(n)}
    assert set(differing) <= {"_from_model_config"}
