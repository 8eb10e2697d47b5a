"""Write the tokenizer, chat template and generation config of an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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
        if (source / "chat_templates").is_dir():
            shutil.copytree(source / "chat_templates", folder / "chat_templates", dirs_exist_ok=True)
        _record_class(folder, tokenizer)
    else:
        tokenizer.save_pretrained(folder)
        generation.save_pretrained(folder)


def _record_class(folder: Path, tokenizer: Any) -> None:
    """Write the tokenizer's class into ``folder`` if transformers would choose another class for the export."""
    from transformers import AutoTokenizer

    from transmla.modeling.transformers_api import register

    register()
    if type(AutoTokenizer.from_pretrained(folder)) is not type(tokenizer):
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        write_json(file, settings | {"tokenizer_class": type(tokenizer).__name__})
