"""Read what the model card of a source says of its licence, its languages and its base, for the card of the export."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from transmla.boundary import boundary, check_regular
from transmla.guard.folder import is_licence
from transmla.source.gguf_header import read_gguf_card

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Fields of a card's metadata that an export repeats: one text, or a list of texts.
REPEATED = ("license", "license_name", "license_link", "language")


def read_card(path: Path) -> dict[str, Any]:
    """Return the metadata that the card of an export takes over from its source.

    Args:
        path: folder of the source, or a GGUF file, whose header has the metadata.

    Returns:
        The fields ``license``, ``license_name``, ``license_link``, ``language`` and ``base_model``, as far as they are
        known. ``base_model`` is the source if it lies in the Hub's cache; otherwise it is the base of the source.

    Raises:
        TransmlaError: if the card's metadata cannot be read.
    """
    if path.is_file():
        return read_gguf_card(path)
    metadata, hub_id = _front_matter(path / "README.md"), _hub_id(path)
    card = {field: _texts(metadata.get(field)) for field in REPEATED}
    card["license_link"] = _public_link(card["license_link"], path, hub_id)
    bases = [name for name in _listed(metadata.get("base_model")) if HUB_ID.fullmatch(name) and not _local(name, path)]
    card["base_model"] = hub_id or (bases if len(bases) > 1 else next(iter(bases), None))
    return {field: value for field, value in card.items() if value}


def _front_matter(file: Path) -> Mapping[str, Any]:
    """Return the metadata at the beginning of a card; empty without a card or without metadata."""
    if not file.is_file():
        return {}
    with boundary(f"cannot read the metadata at the beginning of '{file}'", remedy="correct it, or remove the file"):
        check_regular(file)
        # Only the metadata must be UTF-8, which the Hub demands. Old cards may have other bytes below it.
        text = file.read_text(encoding="utf-8-sig", errors="replace")
        match = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
        if not match:
            return {}
        metadata = yaml.load(match[1], Loader=_Plain)
        if metadata is not None and not isinstance(metadata, dict):
            raise ValueError("it holds no mapping of names to values")
    return metadata or {}


class _Plain(yaml.SafeLoader):
    """Reads every plain value but null as a text: the language code ``no`` is no truth value."""


_Plain.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _listed(value: Any) -> list[str]:
    """Return the texts in a field that holds one text or a list of texts. Absolute paths of a machine are left out."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip() and not text.startswith(("/", "~"))]


def _texts(value: Any) -> str | list[str] | None:
    """Return a field as one text or a list of texts; None if it holds neither."""
    texts = _listed(value)
    return texts if isinstance(value, list) and texts else texts[0] if texts else None


def _hub_id(folder: Path) -> str | None:
    """Return the Hub id of a source in the Hub's cache; None for other folders."""
    model = folder.resolve().parent.parent.name
    return model.removeprefix("models--").replace("--", "/") if model.startswith("models--") else None


def _local(name: str, folder: Path) -> bool:
    """Return whether a name is a path on this machine."""
    return os.path.exists(name) or (folder / name).exists()


def _public_link(link: Any, folder: Path, hub_id: str | None) -> str | None:
    """Return a link to a licence that works in the export: an address, or a file that travels; None for other links."""
    if not isinstance(link, str):
        return None
    address = urlsplit(link)
    if address.scheme in ("http", "https"):
        return None if "@" in address.netloc else link
    if "/" not in link and is_licence(link) and (folder / link).is_file():
        return link
    inside = not address.scheme and not link.startswith(("/", "~", ".")) and ".." not in link
    return f"https://huggingface.co/{hub_id}/blob/main/{link}" if hub_id and inside else None
