"""List the files of a source that travel into its export as they are."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transmla.boundary import read_json_object
from transmla.guard.folder import GENERATION, LICENCES, TEMPLATE_FOLDERS, is_licence

# Files by which tokenizers of all classes, and those of other runtimes, are stored.
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "*.tiktoken", "tiktoken.model", "tekken.json", "spiece.model"),
    *("sentencepiece*.model", "chat_template.jinja", "chat_template.json", GENERATION),
)


def travelling_files(source: Path, tokenizer: Any) -> list[str]:
    """Return the files of a source that travel: tokenizer, chat templates, generation config and licences.

    Processors of images and sounds do not travel, as exports read texts.

    Args:
        source: folder of the source.
        tokenizer: its tokenizer, whose class may name further files.

    Returns:
        Sorted paths relative to ``source``.
    """
    settings = read_json_object(source / "tokenizer_config.json") or {}
    # A tokenizer may have a file for each range of versions of transformers.
    versions = settings.get("fast_tokenizer_files")
    named = {str(name) for name in (*getattr(tokenizer, "vocab_files_names", {}).values(), *(versions or ()))}
    files = [
        file.name
        for file in source.iterdir()
        if file.name in named or is_licence(file.name) or any(fnmatchcase(file.name, name) for name in _TOKENIZERS)
    ]
    files += [f"{folder}/{file.name}" for folder in TEMPLATE_FOLDERS for file in (source / folder).glob("*.jinja")]
    files += [f"{LICENCES}/{file.name}" for file in (source / LICENCES).glob("*.txt")]
    return sorted(name for name in files if (source / name).is_file())
