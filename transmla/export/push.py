"""Push a verified export to the Hugging Face Hub, in one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from transmla.boundary import read_json_object
from transmla.errors import TransmlaError
from transmla.export.hashes import (
    MANIFEST,
    UNHASHED,
    VERIFICATION,
    check_hashes,
    export_files,
    export_fingerprint,
    finished_hashes,
    stays_behind,
)
from transmla.export.travel import is_resaved

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What the Hub allows as the id of a repository.
ID_RULE = (
    "an id is two names of letters, digits, '-', '_' and '.', at most 96 characters, that neither begin nor end in '-'"
    " or '.', nor hold '--' or '..', nor end with .git"
)
CORRECT = "correct the cause, then push again"
RETRY = "run the same `transmla push` again: large files already on the Hub are not sent twice"


@dataclass(frozen=True)
class PushFile:
    """A file to upload: its path relative to the folder, with forward slashes, and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class PushResult:
    """The result of a push, or of its dry run.

    Attributes:
        repo_id: the model repository, as NAMESPACE/NAME.
        url: address of the repository, or of its branch.
        commit: id of the new commit; None after a dry run.
        files: the uploaded files.
        dry_run: whether nothing was uploaded.
    """

    repo_id: str
    url: str
    commit: str | None
    files: tuple[PushFile, ...]
    dry_run: bool


def list_files(folder: Path) -> list[PushFile]:
    """Return the files of ``folder`` that a push uploads, sorted by path.

    Hidden files and folders, temporary files and Python bytecode are not uploaded.

    Raises:
        TransmlaError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise TransmlaError(f"{folder} is not a folder", remedy="pass a folder that `transmla convert` wrote")
    return [PushFile(path, (folder / path).stat().st_size) for path in export_files(folder)]


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
) -> PushResult:
    """Upload a finished, verified and unchanged export to a model repository on the Hub, in one commit.

    A push that was interrupted completes when it runs again.

    Args:
        folder: folder of the export.
        repo_id: the repository, as NAMESPACE/NAME; created if missing.
        private: whether a new repository is private. If False, the namespace's default on the Hub applies.
        revision: the branch to commit to; created if missing. None means the default branch.
        commit_message: message of the commit.
        token: access token; None means the token that huggingface_hub is configured with.
        endpoint: address of the Hub; None means the address that huggingface_hub is configured with.
        dry_run: check the folder, and do not connect to the Hub.

    Raises:
        TransmlaError: if the folder, the repository id or the token is not valid for a push, or if the Hub refuses the
            upload or cannot be reached.
    """
    from huggingface_hub import HfApi

    _check_repo_id(repo_id)
    # Do not pass a malformed token to the client: its error message would show the token.
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise TransmlaError("the token is malformed", limit="a token is one ASCII word", remedy="check --token")
    files = _checked_files(folder)
    api = HfApi(endpoint=endpoint.rstrip("/") if endpoint else None, token=token)
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")
    commit = None
    if not dry_run:
        with _hub_errors(repo_id, revision):
            _ensure_repo(api, repo_id, private=private)
            if revision is not None and not api.revision_exists(repo_id, revision):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = _upload(api, folder, files, repo_id, revision, commit_message)
    return PushResult(repo_id, url, commit, tuple(files), dry_run)


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    cause = None
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        cause = error
    if cause is None and "/" in repo_id:
        return
    if "://" in repo_id:
        limit = "it is an address"
    elif repo_id and os.path.exists(os.path.expanduser(repo_id)):
        limit = "it is a path on this machine, and a push goes to the Hub"
    elif "/" not in repo_id:
        limit = "it has no namespace"
    else:
        limit = ID_RULE
    raise TransmlaError(
        f"'{repo_id}' is not a repository id",
        limit=limit,
        remedy="write it as NAMESPACE/NAME, for example my-user/my-model-mla",
    ) from cause


def _checked_files(folder: Path) -> list[PushFile]:
    """Return the files to upload, after checking that the export is finished, verified and unchanged."""
    files = list_files(folder)
    # The verification of an export that other software has saved again writes its manifest.
    hashes = {} if is_resaved(folder) else finished_hashes(folder)
    verified = read_json_object(folder / VERIFICATION) or {}
    if not hashes or verified.get("passed") is not True or verified.get("fingerprint") != export_fingerprint(hashes):
        raise TransmlaError(
            f"{folder} is not verified",
            limit=f"a push needs a {VERIFICATION} that was written for exactly these files",
            remedy=f"run `transmla verify {folder}`",
        )
    problems = check_hashes(folder, hashes, free=UNHASHED)
    problems += [f"{path} would not be uploaded" for path in sorted(hashes) if stays_behind(PurePosixPath(path))]
    if problems:
        raise TransmlaError(
            f"{folder} has changed since it was verified: {', '.join(problems)}",
            limit=f"every file must match its hash in {MANIFEST}",
            remedy="restore the files, or run `transmla convert` again",
        )
    return files


def _ensure_repo(api: HfApi, repo_id: str, *, private: bool) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    # Look the repository up first: a token may have the right to write to it but not the right to create one.
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        # None, not False: False would override an organisation whose repositories are private by default.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        return
    if private and not info.private:
        raise TransmlaError(
            f"{repo_id} exists and is public",
            limit="--private applies only to a repository that the push creates",
            remedy="make the repository private in its settings on the Hub, or push to another one",
        )


def _upload(
    api: HfApi,
    folder: Path,
    files: list[PushFile],
    repo_id: str,
    revision: str | None,
    commit_message: str | None,
) -> str:
    from huggingface_hub import CommitOperationAdd

    # Not upload_folder, which splits a large folder into several commits: readers could load an incomplete model.
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=folder / file.path) for file in files],
        commit_message=commit_message or "Upload a model converted by transmla",
        revision=revision,
    )
    return commit.oid


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    # huggingface_hub 1 uses httpx and huggingface_hub 2 uses httpx2; HTTPError is the base class of either.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _explain(error, repo_id, revision) from error


def _explain(error: BaseException, repo_id: str, revision: str | None) -> TransmlaError:
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    # The client wraps the error of a file's upload in a RuntimeError that names only the file.
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, ValueError):
            return TransmlaError(f"the push to {repo_id} was refused: {_line(error)}", remedy=CORRECT)
        return TransmlaError(
            f"the push to {repo_id} was interrupted: {_line(error)}", remedy=f"check the network and {RETRY}"
        )

    status = error.response.status_code
    answer = f"HTTP {status}: {_line(error.server_message or error.response.reason_phrase)}"
    if status in (401, 403):
        return TransmlaError(
            f"the Hub refused the token for {repo_id} ({answer})",
            limit="a push needs a token with write access",
            remedy="log in with `hf auth login`, or pass one with --token",
        )
    if isinstance(error, RevisionNotFoundError) or (revision is not None and status == 400):
        return TransmlaError(
            f"{repo_id} does not accept a commit to revision {revision} ({answer})",
            remedy="pass the name of a branch as the revision",
        )
    if status == 404:
        return TransmlaError(
            f"the Hub has no repository {repo_id}, or this token cannot read it ({answer})",
            remedy="check the name and the token's access",
        )
    if status in (408, 429) or status >= 500:
        return TransmlaError(f"the Hub did not complete the push to {repo_id} ({answer})", remedy=RETRY)
    return TransmlaError(f"the push to {repo_id} was refused ({answer})", remedy=CORRECT)


def _line(message: object) -> str:
    return " ".join(str(message).split())
