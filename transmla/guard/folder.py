"""Check a model's folder before anything reads it: links, pipes, pointers of git-lfs, indices, pickled weights."""

from __future__ import annotations

import os
import re
from pathlib import Path

from transmla.boundary import boundary, check_regular, leaves, read_json
from transmla.errors import TransmlaError

# Suffixes of the files besides weights that transmla or transformers may read from a model's folder.
READ = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".vocab")
TEMPLATE_FOLDERS = ("chat_templates", "additional_chat_templates")
# Folder of licences by the REUSE specification, and the names of files that hold the terms of a model.
LICENCES = "LICENSES"
_LICENCE = re.compile(
    r"(.*[-_ .])?(un)?licen[cs]es?([-_ .].*)?|(copying|copyright|notice|patents|attribution)([-_ .].*)?"
    r"|(.*[-_ ])?use[-_ ]policy(\..*)?|third[-_ ]party.*",
    re.IGNORECASE,
)
# Suffixes of files that are no texts, whatever their names say.
_NO_TEXT = (".json", ".py", ".sh", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".zip", ".gz", ".tar")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"


def check_folder(folder: Path) -> None:
    """Check every file of a model's folder that may be read. Weights that no loader would choose are not checked.

    Raises:
        TransmlaError: if a file is a link that leads out of the folder, a pipe, unreadable, or a pointer of git-lfs; if
            an index names files elsewhere; or if the folder holds an adapter, whose weights some would read and others
            ignore.
    """
    with boundary(f"cannot read the folder '{folder}'", remedy="check the folder"):
        places = [folder, *(folder / name for name in (*TEMPLATE_FOLDERS, LICENCES) if (folder / name).is_dir())]
        for place in places:
            if leaves(folder, place):
                raise _outside(place)
            for file in sorted(place.iterdir()):
                if file.suffix in READ or file.name == "README.md" or is_licence(file.name):
                    _check_file(folder, file)
        for name in _weight_files(folder):
            _check_file(folder, folder / name)
        if (folder / ADAPTER).is_file() and (folder / "config.json").is_file():
            raise TransmlaError(
                f"'{folder}' holds an adapter beside its weights ({ADAPTER})",
                limit="the weights alone are another model than weights and adapter",
                remedy="merge the adapter into the weights, or move its files away",
            )


def is_licence(name: str) -> bool:
    """Return whether a file of this name holds the terms of a model, such as LICENSE, NOTICE.txt or USE_POLICY.md."""
    return _LICENCE.fullmatch(name) is not None and not name.lower().endswith(_NO_TEXT)


def _weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's weights: safetensors, otherwise pickles. The index of the weights is checked.

    Other copies of the weights are often not downloaded: they may stay pointers of git-lfs.
    """
    for single, index in ((WEIGHTS, INDEX), PICKLES):
        names = set(weight_map(folder / index).values()) if (folder / index).is_file() else set()
        if os.path.lexists(folder / single):
            names.add(single)
        if names:
            return sorted(names)
    return []


def _check_file(folder: Path, file: Path) -> None:
    if file.is_symlink() and leaves(folder, file):
        raise _outside(file)
    if file.exists() and not file.is_dir():
        check_regular(file)


def _outside(file: Path) -> TransmlaError:
    return TransmlaError(
        f"'{file}' is a link to a place outside its folder",
        limit=f"it leads to '{file.resolve()}'; by such links, a downloaded folder could read any file of this machine",
        remedy="use the folder that holds the file itself, or a copy of this one without links (`cp -rL FOLDER COPY`)",
    )


def weight_map(index: Path) -> dict[str, str]:
    """Return the file of every tensor that an index names, by the tensor's name.

    Raises:
        TransmlaError: if the file is no index, or names a file that does not lie beside it.
    """

    def wrong(limit: str) -> TransmlaError:
        return TransmlaError(f"'{index}' is not a valid shard index", limit=limit, remedy="download it again")

    try:
        value = read_json(index)
    except TransmlaError as error:
        raise wrong(str(error)) if "JSON" in str(error) else error from error
    files = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(files, dict) or not files:
        raise wrong("it has no mapping 'weight_map' of tensors to files")
    for name, file in files.items():
        if not isinstance(file, str):
            raise wrong(f"the file of tensor '{name}' is no text")
        if (
            not re.fullmatch(r"[^/\\\x00]{1,255}", file)
            or file in (".", "..")
            or len(file.encode(errors="replace")) > 255
        ):
            raise wrong(f"tensor '{name}' lies in '{file[:80]}', which is not the name of a file beside the index")
    return files


def check_pickles(folder: Path, *, allow: bool) -> list[str]:
    """Return the names of pickled weights in a folder without safetensors; an empty list if there are safetensors.

    Raises:
        TransmlaError: if there are pickled weights only, and ``allow`` is off.
    """
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return []
    pickles = [name for name in PICKLES if (folder / name).is_file()]
    if pickles and not allow:
        raise TransmlaError(
            f"'{folder}' holds pickled weights ({pickles[0]})",
            limit="a pickle can run code when it is opened",
            remedy="convert the weights to safetensors, or pass --allow-pickle if you trust them",
        )
    return pickles
