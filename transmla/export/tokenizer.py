"""Write the tokenizer, chat template and generation config of an export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transmla.boundary import boundary, read_json_object
from transmla.files import write_json

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

TEMPLATES = "chat_templates"


def write_tokenizer(folder: Path, source: Path, tokenizer: Any, *, copy: bool, generation: Any) -> None:
    """Write the tokenizer, the chat template and the generation config of an export.

    Args:
        folder: folder of the export.
        source: folder of the source checkpoint.
        tokenizer: the source's tokenizer.
        copy: whether to copy the source's files. Otherwise ``tokenizer`` and ``generation`` are saved, as for a GGUF
            source, which has no such files.
        generation: the source's generation config.
    """
    if copy:
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        for template in sorted((source / TEMPLATES).glob("*.jinja")):
            if template.is_file():
                (folder / TEMPLATES).mkdir(exist_ok=True)
                shutil.copyfile(template, folder / TEMPLATES / template.name)
        _record_class(folder, tokenizer)
    else:
        tokenizer.save_pretrained(folder)
        generation.save_pretrained(folder)


def _record_class(folder: Path, tokenizer: Any) -> None:
    """Write the tokenizer's class into ``folder`` if transformers would choose another class for the export."""
    from transformers import AutoTokenizer

    from transmla.modeling.transformers_api import register

    register()
    with boundary(f"cannot load the tokenizer in '{folder}'", remedy="correct the files of the source's tokenizer"):
        chosen = type(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    if chosen is not type(tokenizer):
        file = folder / "tokenizer_config.json"
        settings = read_json_object(file) or {}
        write_json(file, settings | {"tokenizer_class": type(tokenizer).__name__})
