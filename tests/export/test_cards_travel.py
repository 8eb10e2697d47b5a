"""Licences and the metadata of model cards travel from the source to the export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.edit_json import edit_json
from helpers.tiny_gguf import FIELDS, MODEL, rewrite_gguf, write_gguf

from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.guard.folder import is_licence
from transmla.source.card import read_card
from transmla.source.locate import resolve_source


def card(folder: Path, **metadata: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n", encoding="utf-8")
    return read_card(folder)


def test_no_local_path_of_a_card_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "llama").mkdir(parents=True)
    source = tmp_path / "source"
    for base in ("/home/me/llama", "./outputs/llama", "../x/y", "outputs/llama", "~/models/llama"):
        assert card(source, base_model=base) == {}
    assert card(source, base_model=["org/a", "/home/me/b", "org/c"]) == {"base_model": ["org/a", "org/c"]}
    for link in ("/home/me/LICENSE", "file:///home/me/LICENSE", "~/LICENSE", "../LICENSE", "https://me:pw@host/L"):
        assert card(source, license_link=link) == {}


def test_links_to_licences(tmp_path: Path) -> None:
    source = tmp_path / "source"
    assert card(source, license_link="https://host/terms") == {"license_link": "https://host/terms"}
    assert card(source, license_link="LICENSE") == {}
    (source / "LICENSE").touch()
    assert card(source, license_link="LICENSE") == {"license_link": "LICENSE"}
    cached = tmp_path / "models--org--name" / "snapshots" / "0123"
    address = "https://huggingface.co/org/name/blob/main/terms.pdf"
    expected = {"license": "mit", "license_link": address, "base_model": "org/name"}
    assert card(cached, license="mit", license_link="terms.pdf", base_model="org/older") == expected


def test_the_licence_of_a_gguf_file_travels(tmp_path: Path, assets: Path) -> None:
    """Of a file that is unpacked, and of one that is read as it is."""
    write_gguf(tmp_path)
    terms = {"general.license": "apache-2.0", "general.license.link": "/home/me/LICENSE"}
    edit_json(tmp_path / FIELDS, **terms)
    rewrite_gguf(tmp_path)
    unpacked = resolve_source(str(tmp_path / MODEL))
    assert unpacked.is_dir()
    assert read_card(unpacked) == read_card(tmp_path / MODEL) == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# A model\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit", {}),
        ("---\n---\n", {}),
        ("---\nlicense:\nlanguage: null\n---\n", {}),
        ("---\nlicense: {a: b}\nlanguage: [[en], 5, no]\n---\n", {"language": ["5", "no"]}),
        ("\ufeff---\r\nlicense: mit\r\nlanguage: no\r\n---\r\ntext", {"license": "mit", "language": "no"}),
        ("---\nlicense: 2026-01-01\n---", {"license": "2026-01-01"}),
    ],
)
def test_metadata_of_cards(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    (tmp_path / "README.md").write_bytes(text.encode() + b"\xff latin-1 below")
    if text == "---\n---\n" or "2026" in text:
        (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path) == expected


@pytest.mark.parametrize("text", ["---\n- a\n---\n", "---\na: [\n---\n", "---\na: !!python/object:os.system {}\n---\n"])
def test_damaged_metadata_is_refused_by_the_name_of_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(TransmlaError, match=r"cannot read the metadata at the beginning of '.*README\.md'"):
        read_card(tmp_path)


def test_licences_and_cards_outside_the_folder_are_refused(
    make_source: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    source = make_source(num_hidden_layers=3)
    (tmp_path / "secret").write_text("a token")
    for name in ("LICENSE", "NOTICE.md", "README.md", "additional_chat_templates/rag.jinja", "LICENSES/MIT.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).symlink_to(tmp_path / "secret")
        with pytest.raises(TransmlaError, match="is a link to a place outside its folder"):
            convert(make_recipe(source, cache_ratio=0.5))
        (source / name).unlink()


def test_names_of_licences() -> None:
    for name in (
        "LICENSE",
        "LICENSE.txt",
        "LICENCE.md",
        "NOTICE",
        "USE_POLICY.md",
        "COPYING.LESSER",
        "license-apache",
        "LICENSE.Apache-2.0",
        "Llama2 LICENSE.txt",
        "Notice.txt",
        "UNLICENSE",
    ):
        assert is_licence(name), name
    for name in ("license.json", "licensed.txt", "noticed.md", "config.json", "license_check.py", "README.md", "x.txt"):
        assert not is_licence(name), name
