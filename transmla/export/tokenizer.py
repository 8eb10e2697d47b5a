"""Write the tokenizer, chat template and generation config of an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transmla.export.files import write_json

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
    """Tokenizer, chat template and generation config: the source's files, or made from a GGUF's metadata."""
    if copy:
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if (source / "chat_templates").is_dir():
            shutil.copytree(source / "chat_templates", folder / "chat_templates", dirs_exist_ok=True)
        _keep_class(folder, tokenizer)
    else:
        tokenizer.save_pretrained(folder)
        generation.save_pretrained(folder)


def _keep_class(folder: Path, tokenizer: Any) -> None:
    """Name the class of ``tokenizer`` in ``folder``, where transformers would take another for a model of this type."""
    from transformers import AutoTokenizer

    from transmla.modeling.transformers_api import register

    register()
    if type(AutoTokenizer.from_pretrained(folder)) is not type(tokenizer):
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        write_json(file, settings | {"tokenizer_class": type(tokenizer).__name__})
