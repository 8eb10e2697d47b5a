"""Write the tokenizer, chat templates, generation config and licence of an export."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from transmla.boundary import boundary, read_json_object
from transmla.errors import TransmlaError
from transmla.export.source_files import travelling_files
from transmla.files import write_json
from transmla.guard.folder import GENERATION

SETTINGS = "tokenizer_config.json"
# What a tokenizer holds besides its vocabulary and its rules.
_ATTRIBUTES = (
    *("special_tokens_map", "added_tokens_decoder", "chat_template", "padding_side", "truncation_side"),
    *("model_max_length", "model_input_names", "clean_up_tokenization_spaces"),
)


def write_tokenizer(folder: Path, source: Path, tokenizer: Any, *, copy: bool, generation: Any) -> None:
    """Write the tokenizer, the chat templates, the generation config and the licence of an export.

    The source's files are copied. If transformers then loads another tokenizer from ``folder`` than from ``source``,
    because the two models have other types, the source's tokenizer is saved instead.

    The class and the special tokens are named as transformers 4 knows them, where it does.

    Args:
        folder: folder of the export, which holds its config.json.
        source: folder of the source checkpoint.
        tokenizer: the source's tokenizer.
        copy: whether to copy the source's files. Otherwise ``tokenizer`` and ``generation`` are saved, as for a GGUF
            source, which has no such files.
        generation: the source's generation config, as its model would get it.

    Raises:
        TransmlaError: if the tokenizer of the export is another one than the source's.
    """
    files = travelling_files(source, tokenizer) if copy else []
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    if GENERATION not in files:
        fields = generation.to_diff_dict()
        write_json(folder / GENERATION, {name: value for name, value in fields.items() if not name.startswith("_")})
    if not copy:
        tokenizer.save_pretrained(folder)
    loaded = _load(folder)
    if type(loaded) is not type(tokenizer):
        _record_class(folder, tokenizer)
        loaded = _load(folder)
    if difference(loaded, tokenizer):
        tokenizer.save_pretrained(folder)
        _record_class(folder, tokenizer)
        loaded = _load(folder)
    if not difference(loaded, tokenizer):
        loaded = _name_as_before(folder, loaded)
    if part := difference(loaded, tokenizer):
        raise TransmlaError(
            f"the tokenizer that transformers loads from '{folder}' is not the source's",
            limit=f"its {part} differs",
            remedy="load the source's tokenizer with transformers, save it into the source's folder, and convert again",
        )


def difference(left: Any, right: Any) -> str:
    """Name a part in which two tokenizers differ; empty if they are equal in all of it."""
    if type(left) is not type(right):
        return "class"
    for name in _ATTRIBUTES:
        if getattr(left, name, None) != getattr(right, name, None):
            return name
    if left.get_vocab() != right.get_vocab():
        return "vocabulary"
    rules = [t.backend_tokenizer.to_str() if hasattr(t, "backend_tokenizer") else None for t in (left, right)]
    return "" if rules[0] == rules[1] else "backend_tokenizer"


def _load(folder: Path) -> Any:
    """Load the tokenizer of an export."""
    from transformers import AutoTokenizer

    from transmla.modeling.registration import register

    register()
    with boundary(f"cannot load the tokenizer in '{folder}'", remedy="correct the files of the source's tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _name_as_before(folder: Path, loaded: Any) -> Any:
    """Write names that transformers 4 knows into the settings in ``folder``, if transformers 5 reads the same.

    Returns:
        The tokenizer in ``folder``, which does what ``loaded`` did.
    """
    file = folder / SETTINGS
    settings = read_json_object(file) or {}
    older = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    if older == settings:
        return loaded
    before = file.read_bytes()
    write_json(file, older)
    with contextlib.suppress(TransmlaError):
        again = _load(folder)
        if not difference(again, loaded):
            return again
    file.write_bytes(before)
    return loaded


def _record_class(folder: Path, tokenizer: Any) -> None:
    """Write the tokenizer's class into its settings in ``folder``."""
    file = folder / SETTINGS
    settings = read_json_object(file) or {}
    write_json(file, settings | {"tokenizer_class": type(tokenizer).__name__})
