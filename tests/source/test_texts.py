"""The shelf of texts: splits of named texts, packages however installed, tables, packed files, chats and folders."""

from __future__ import annotations

import ast
import gzip
import importlib.metadata
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.byte_tokenizer import CHATML, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from transmla.errors import TransmlaError
from transmla.registry import scan
from transmla.source.text import load_tokens
from transmla.source.texts import packages
from transmla.source.texts.stdlib import LEFT_OUT, stdlib_files

CHATS = [
    [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
]
RENDERED = "<|user|>Hello?\n<|assistant|>Hi.\n\n\n<|system|>Be brief.\n<|user|>Why?\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def chatting() -> PreTrainedTokenizerFast:
    """A tokenizer whose chat template begins with BOS."""
    return byte_tokenizer(template="{{ bos_token }}" + CHATML)


def text_of(source: object, tokenizer: PreTrainedTokenizerFast, **options: Any) -> str:
    """Return the text that ``load_tokens`` reads, without BOS."""
    tokens = load_tokens(str(source), tokenizer, **options).tolist()
    assert tokens[0] == tokenizer.bos_token_id
    return tokenizer.decode(tokens[1:])


def refusal(source: object, tokenizer: PreTrainedTokenizerFast, **options: Any) -> str:
    """Return the one line with which a text is refused."""
    with pytest.raises(TransmlaError) as caught:
        load_tokens(str(source), tokenizer, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_named_text_has_two_splits_and_is_read_on_demand(tokenizer: PreTrainedTokenizerFast) -> None:
    named = scan("transmla.source.texts", "TEXT")
    assert set(named) == {"pydoc", "stdlib", "packages"}
    for name in named:
        train, test = (load_tokens(name, tokenizer, limit=400, split=split).tolist() for split in ("train", "test"))
        assert train != test
        assert train == load_tokens(name, tokenizer, limit=400).tolist()
        assert f"{name} has no split 'validation'; choose train or test" in refusal(name, tokenizer, split="validation")
        assert f"{name} has no column 'body'" in refusal(name, tokenizer, column="body")


def test_the_test_fifth_of_the_standard_library_is_never_in_train() -> None:
    train, test = stdlib_files("train"), stdlib_files("test")
    assert not set(train) & set(test)
    assert len(train) + len(test) == 5 * len(test) - (-len(train + test) % 5)
    assert (train, test) == (stdlib_files("train"), stdlib_files("test"))
    assert train != sorted(train)
    pieces = list(itertools.islice(scan("transmla.source.texts", "TEXT")["stdlib"].pieces("test"), 3))
    assert pieces == [file.read_text(errors="ignore") + "\n\n" for file in test[:3]]


def test_foreign_files_and_broken_links_are_no_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    for name in ("a.py", "deep/b.py", *(f"{folder}/c.py" for folder in sorted(LEFT_OUT))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#" * 2000)
    (tmp_path / "short.py").write_text("import a")
    (tmp_path / "broken.py").symlink_to(tmp_path / "nowhere.py")
    found = {file.name for split in ("train", "test") for file in stdlib_files(split)}
    assert found == {"a.py", "b.py"}


Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(name, description, **modules)`` writes a package, and only such packages are found."""
    monkeypatch.setattr(packages, "distributions", lambda: importlib.metadata.distributions(path=[str(tmp_path)]))

    def write(name: str, description: str = "", **modules: str) -> Path:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\n{description}")
        (tmp_path / name).mkdir()
        for module, source in modules.items():
            (tmp_path / name / f"{module}.py").write_text(source)
        (info / "RECORD").write_text("".join(f"{name}/{module}.py,,\n" for module in modules))
        return info

    return write


def module(marker: str, functions: int) -> str:
    """Return the source of a module with a long docstring in each of its functions."""
    return "\n".join(f'def f{i}():\n    """{f"{marker} {i} says so. " * 20}"""\n' for i in range(functions))


def pieces(split: str = "train") -> list[str]:
    return list(packages.TEXT.pieces(split))


def train_names(count: int) -> list[str]:
    """Return names of packages that belong to the train split."""
    names = (f"name{i}" for i in itertools.count())
    return list(itertools.islice((name for name in names if not packages._belongs_to_test(name)), count))


def test_packages_take_turns_and_are_read_on_demand(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = train_names(2)
    install(large, f"The description of {large}. " * 20, **{f"m{i}": module(f"{large} m{i}", 10) for i in range(20)})
    install(small, "too short to be prose", a=module(small, 3), tests=module("left out", 3))
    parsed = []
    parse = ast.parse
    monkeypatch.setattr(ast, "parse", lambda source: parsed.append(source) or parse(source))
    reader = packages.TEXT.pieces("train")
    assert next(reader).startswith(f"The description of {large}.")
    assert not parsed
    first = [text.split()[0] for text in itertools.islice(reader, 6)]
    assert sorted(first) == sorted([large, small] * 3)
    assert len(parsed) <= 3
    assert len([*first, *reader]) == 203
    assert "left out" not in "".join(pieces())


def test_a_package_keeps_its_split_when_others_are_installed(install: Install) -> None:
    names = [f"name{i}" for i in range(24)]
    for name in names[::2]:
        install(name, f"{name} is described here. " * 20)
    before = {split: set(pieces(split)) for split in ("train", "test")}
    assert not before["train"] & before["test"]
    assert all(before.values())
    for name in names[1::2]:
        install(name, f"{name} is described here. " * 20)
    after = {split: set(pieces(split)) for split in ("train", "test")}
    assert all(before[split] < after[split] for split in ("train", "test"))
    assert not after["train"] & after["test"]


def test_copies_of_other_packages_are_left_out(install: Install, tmp_path: Path) -> None:
    (name,) = train_names(1)
    info = install(name, a=module("own", 2))
    (tmp_path / name / "_vendor").mkdir()
    (tmp_path / name / "_vendor" / "b.py").write_text(module("copied", 2))
    (info / "RECORD").write_text(f"{name}/a.py,,\n{name}/_vendor/b.py,,\n")
    assert [piece.split()[0] for piece in pieces()] == ["own", "own"]


def test_odd_installs_do_not_stop_the_others(install: Install, tmp_path: Path) -> None:
    good, *odd = train_names(6)
    install(good, a=module("good", 3), broken="def (:", latin="x = 1", deep="(" * 300 + ")" * 300)
    (tmp_path / good / "latin.py").write_bytes(b'"""' + b"\xe9" * 300 + b'"""')
    no_record, no_metadata, latin, missing, editable = (install(name, a=module("odd", 1)) for name in odd)
    (no_record / "RECORD").unlink()
    (no_metadata / "METADATA").unlink()
    (latin / "METADATA").write_bytes(b"Name: caf\xe9\n\n" + b"\xe9" * 300)
    (missing / "RECORD").write_text("nowhere/a.py,,\n")
    (editable / "RECORD").write_text(f"__editable__.{odd[4]}.pth,,\n")
    (tmp_path / "~left-1.0.dist-info").mkdir()  # as pip leaves it behind
    assert [piece.split()[0] for piece in pieces()] == ["good"] * 3
    (tmp_path / f"{odd[0]}-1.0.dist-info" / "RECORD").write_bytes(b"\xff\xfe\x00")
    assert [piece.split()[0] for piece in pieces()] == ["good"] * 3


def test_a_package_found_twice_is_read_once(install: Install) -> None:
    name = next(n for n in (f"my-{i}" for i in itertools.count()) if not packages._belongs_to_test(n))
    for spelt in (name, name.replace("-", "_"), name.upper()):
        install(spelt, "The same description. " * 20)
    assert len(pieces()) == 1


def pack(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_csv_rows_are_joined(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = pack(tmp_path / name, 'id,text,body\n1,"one, and\ntwo",x\n2,,y\n3,three,\n')
    assert text_of(file, tokenizer) == "one, and\ntwo\n\nthree"
    assert text_of(file, tokenizer, column="body") == "x\n\ny"
    assert "has no column 'none'; its columns: id, text, body" in refusal(file, tokenizer, column="none")
    assert "has no split 'test'" in refusal(file, tokenizer, split="test")


def test_packed_files_read_like_plain_ones(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(4))
    assert text_of(pack(tmp_path / "a.jsonl.gz", lines), tokenizer) == "row 0\n\nrow 1\n\nrow 2\n\nrow 3"
    assert text_of(pack(tmp_path / "a.txt.gz", "plain\ntext, é"), tokenizer) == "plain\ntext, é"
    assert text_of(pack(tmp_path / "A.MD.GZ".replace(".GZ", ".gz"), "# Title"), tokenizer) == "# Title"
    assert "unknown file type; supported: .txt, .md" in refusal(pack(tmp_path / "a.tar.gz", "x"), tokenizer)
    assert "all but .parquet also as .gz" in refusal(pack(tmp_path / "a.parquet.gz", "x"), tokenizer)
    assert "no file" in refusal(tmp_path / "missing.txt.gz", tokenizer)
    assert "has no column 'x'" in refusal(tmp_path / "a.txt.gz", tokenizer, column="x")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz"])
@pytest.mark.parametrize("damage", ["not packed", "cut off", "damaged"])
def test_a_corrupt_gz_is_one_line(name: str, damage: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"{i * i * 7919}"}) + "\n" for i in range(3000))
    data = bytearray(gzip.compress(("text\n" if "csv" in name else "").encode() + rows.encode()))
    if damage == "damaged":
        data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
    file = tmp_path / name
    file.write_bytes({"not packed": rows.encode(), "cut off": bytes(data[:-99])}.get(damage, bytes(data)))
    assert "a." in (says := refusal(file, tokenizer))
    assert "cannot be read" in says
    assert "check the file" in says


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("style", ["messages", "conversations"])
def test_chats_go_through_the_chat_template(
    style: str, packed: bool, chatting: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The template's BOS is removed: the text has one BOS, at its start."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    rows: list[dict[str, Any]] = []
    for chat in CHATS:
        share_gpt = [{"from": names[m["role"]], "value": m["content"]} for m in chat]
        rows.append({"id": 1, style: chat if style == "messages" else share_gpt})
    rows.insert(1, {"id": 2, style: None})
    rows.insert(1, {"id": 3, style: []})
    file = pack(tmp_path / f"chats.jsonl{'.gz' if packed else ''}", "".join(json.dumps(row) + "\n" for row in rows))
    assert text_of(file, chatting) == RENDERED
    assert load_tokens(str(file), chatting).tolist().count(chatting.bos_token_id) == 1
    assert text_of(file, chatting, column=style) == RENDERED


def test_chats_of_a_parquet_file(chatting: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"content": chat} for chat in CHATS]).to_parquet(tmp_path / "chats.parquet")
    assert text_of(tmp_path / "chats.parquet", chatting) == RENDERED


def test_chats_that_cannot_be_rendered_are_one_line(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = pack(tmp_path / "chats.jsonl", "".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    assert "holds chats, but this model's tokenizer has no chat template" in refusal(file, tokenizer)
    for template, reason in (
        ("{{ raise_exception('roles must alternate\nalways') }}", "roles must alternate"),
        ("{{ raise_exception('') }}", "TemplateError"),
    ):
        strict = byte_tokenizer(template=template)
        assert f"the tokenizer's chat template refuses a chat; {reason}" in refusal(file, strict)
    lists = pack(tmp_path / "lists.jsonl", json.dumps({"content": ["a", "b"]}))
    assert "column 'content' holds lists that are not chats" in refusal(lists, tokenizer)


def test_a_folder_is_refused_and_its_files_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "weights.bin").touch()
    says = refusal(folder, tokenizer)
    assert f"'{folder}' is a folder, not a text; it holds no file of these kinds: .txt, .md, .jsonl" in says
    for name in ("b.txt", "a.csv", "c.jsonl.gz"):
        (folder / name).touch()
    assert "it holds a.csv, b.txt, c.jsonl.gz; name one of its files" in refusal(folder, tokenizer)
    for i in range(9):
        (folder / f"d{i}.md").touch()
    assert "it holds a.csv, b.txt, c.jsonl.gz, d0.md, d1.md, …; name one" in refusal(folder, tokenizer)
