"""Push an export with the real Hub client to a local server that implements the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_server import TOKEN, HubServer
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, http_backoff

from transmla.errors import TransmlaError
from transmla.export.hashes import check_hashes, export_fingerprint, file_sha256
from transmla.export.push import PushFile, PushResult, list_files, push

REPO_ID = "someone/model-mla"
CONTENTS = {
    "config.json": b'{"model_type": "deepseek_v3"}',
    "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 2000,
    "model-00002-of-00002.safetensors": bytes(range(255, -1, -1)) * 1500,
    "nested/tokenizer.json": b"{}" * 50,
}
SHARDS = {path: hashlib.sha256(data).hexdigest() for path, data in CONTENTS.items() if "safetensors" in path}
FIRST, SECOND = SHARDS.values()
SENT_ONCE = {FIRST: 1, SECOND: 1}
CLIENT_TRIES = http_backoff.__kwdefaults__["max_retries"] + 1


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server. The client uses LFS instead of Xet and waits only 10 ms between retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setitem(http_backoff.__kwdefaults__, "base_wait_time", 0.01)
    monkeypatch.setitem(http_backoff.__kwdefaults__, "max_wait_time", 0.01)
    disable_progress_bars()
    with HubServer() as server:
        yield server
    enable_progress_bars()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A finished and verified export."""
    folder = tmp_path / "export"
    for path, data in CONTENTS.items():
        write(folder / path, data)
    hashes = {path: file_sha256(folder / path) for path in CONTENTS if path != "README.md"}
    write_json(folder / "transmla.json", {"hashes": hashes})
    write_json(folder / "verification.json", {"passed": True, "fingerprint": export_fingerprint(hashes)})
    return folder


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    write(path, json.dumps(value).encode())


def push_to(hub: HubServer, folder: Path, **options: object) -> PushResult:
    return push(folder, REPO_ID, **{"token": TOKEN, "endpoint": hub.url, **options})  # type: ignore[arg-type]


def visible_files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(".")}


def test_a_pushed_export_downloads_byte_for_byte(hub: HubServer, export: Path, tmp_path: Path) -> None:
    result = push_to(hub, export)

    downloaded = snapshot_download(REPO_ID, local_dir=tmp_path / "downloaded", endpoint=hub.url, token=TOKEN)
    assert visible_files(Path(downloaded)) == visible_files(export)
    assert {path for path, blob in hub.repos[REPO_ID].tree().items() if blob.lfs} == SHARDS.keys()
    assert len(hub.repos[REPO_ID].messages) == 2  # the initial commit and one for the whole push
    assert result == PushResult(
        REPO_ID,
        f"{hub.url}/{REPO_ID}",
        hub.repos[REPO_ID].branches["main"],
        tuple(list_files(export)),
        dry_run=False,
    )


def test_a_second_push_of_the_same_export_sends_and_commits_nothing(hub: HubServer, export: Path) -> None:
    first = push_to(hub, export)
    assert push_to(hub, export) == first
    assert hub.puts == SENT_ONCE
    assert len(hub.repos[REPO_ID].messages) == 2


def test_hidden_and_temporary_files_are_not_uploaded(hub: HubServer, export: Path) -> None:
    for path in (".cache/x", ".hidden", "config.json.tmp", "shard.incomplete", "notes~", "__pycache__/m.pyc"):
        write(export / path, b"x")
    push_to(hub, export)
    expected = {*CONTENTS, "transmla.json", "verification.json"}
    assert [file.path for file in list_files(export)] == sorted(expected)
    assert hub.repos[REPO_ID].tree().keys() == expected | {".gitattributes"}


def test_the_endpoint_defaults_to_the_clients(hub: HubServer, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    assert push_to(hub, export, endpoint=None).url == f"{hub.url}/{REPO_ID}"
    assert REPO_ID in hub.repos


@pytest.mark.parametrize("private", [False, True])
def test_a_new_repository_is_private_when_asked(hub: HubServer, export: Path, private: bool) -> None:
    push_to(hub, export, private=private)
    assert hub.repos[REPO_ID].private is private
    push_to(hub, export, private=private)


def test_private_refuses_an_existing_public_repository(hub: HubServer, export: Path) -> None:
    hub.create(REPO_ID)
    with pytest.raises(TransmlaError, match="exists and is public"):
        push_to(hub, export, private=True)
    assert not hub.puts


def test_a_revision_is_a_branch_that_is_created_if_missing(hub: HubServer, export: Path) -> None:
    for message in ("first", "second"):
        write(export / "README.md", message.encode())
        result = push_to(hub, export, revision="rank/128", commit_message=message)
        assert result.commit == hub.repos[REPO_ID].branches["rank/128"]
        assert result.url == f"{hub.url}/{REPO_ID}/tree/rank/128"
    assert hub.repos[REPO_ID].tree().keys() == {".gitattributes"}
    assert hub.repos[REPO_ID].messages == ["initial commit", "first", "second"]


def test_a_revision_that_cannot_be_a_branch_is_refused(hub: HubServer, export: Path) -> None:
    with pytest.raises(TransmlaError, match="does not accept a commit to revision refs/pr/7") as error:
        push_to(hub, export, revision="refs/pr/7")
    assert "branch" in error.value.remedy
    assert not hub.puts


def test_a_dry_run_opens_no_connection(hub: HubServer, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    result = push_to(hub, export, dry_run=True)
    assert hub.requests == []
    assert (result.dry_run, result.commit, result.files) == (True, None, tuple(list_files(export)))
    assert PushFile("config.json", len(CONTENTS["config.json"])) in result.files


@pytest.mark.parametrize("route", ["preupload", "batch", "put", "verify"])
def test_the_client_retries_after_a_temporary_503(hub: HubServer, export: Path, route: str) -> None:
    hub.fail(route)
    push_to(hub, export)
    assert hub.repos[REPO_ID].tree().keys() > CONTENTS.keys()
    assert hub.puts == SENT_ONCE


@pytest.mark.parametrize("route", ["create", "branch", "commit"])
def test_a_second_push_completes_after_a_503_that_the_client_does_not_retry(
    hub: HubServer, export: Path, route: str
) -> None:
    hub.fail(route)
    with pytest.raises(TransmlaError, match=r"HTTP 503.*again") as error:
        push_to(hub, export, revision="draft")
    assert "\n" not in str(error.value)
    push_to(hub, export, revision="draft")
    assert hub.repos[REPO_ID].tree("draft").keys() > CONTENTS.keys()
    assert hub.puts == SENT_ONCE


def test_a_permanent_503_of_a_file_upload_is_named_in_the_error(hub: HubServer, export: Path) -> None:
    hub.fail("put", times=CLIENT_TRIES * len(SHARDS))
    with pytest.raises(TransmlaError, match="HTTP 503"):
        push_to(hub, export)
    assert not hub.puts


def test_the_client_repeats_an_upload_that_was_interrupted_once(hub: HubServer, export: Path) -> None:
    hub.cut_upload(FIRST, after=100_000)
    push_to(hub, export)
    assert hub.requests.count("put") == 3
    assert hub.puts == SENT_ONCE
    assert hub.objects[FIRST] == CONTENTS["model-00001-of-00002.safetensors"]


def test_a_second_push_sends_only_the_files_that_the_first_did_not(hub: HubServer, export: Path) -> None:
    hub.cut_upload(FIRST, after=100_000, times=CLIENT_TRIES)
    with pytest.raises(TransmlaError, match="was interrupted") as error:
        push_to(hub, export)
    assert "\n" not in str(error.value)
    assert "`transmla push` again" in error.value.remedy
    assert hub.puts == {SECOND: 1}
    assert hub.repos[REPO_ID].tree().keys() == {".gitattributes"}

    push_to(hub, export)
    assert hub.puts == SENT_ONCE
    assert hub.repos[REPO_ID].tree().keys() > CONTENTS.keys()


def test_a_wrong_token_is_refused_in_one_line(hub: HubServer, export: Path) -> None:
    with pytest.raises(TransmlaError, match=r"refused the token.*HTTP 401.*hf auth login") as error:
        push_to(hub, export, token="hf_wrong")
    assert "\n" not in str(error.value)
    assert "hf_wrong" not in str(error.value)
    assert not hub.repos
    assert not hub.puts


@pytest.mark.parametrize("token", ["", "hf_two\nlines", "hf_naïve"])
def test_a_malformed_token_is_refused_and_not_shown(hub: HubServer, export: Path, token: str) -> None:
    with pytest.raises(TransmlaError, match="token is malformed") as error:
        push_to(hub, export, token=token)
    assert not token or token not in str(error.value)
    assert hub.requests == []


def test_an_unreachable_hub_is_an_error_of_one_line(hub: HubServer, export: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(TransmlaError, match=r"was interrupted.*check the network") as error:
            push_to(hub, export, endpoint=f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("repo_id", ["model-mla", "a/b/c", "someone/model--mla", "someone/", "../x", ""])
def test_an_invalid_repository_id_is_refused(hub: HubServer, export: Path, repo_id: str) -> None:
    with pytest.raises(TransmlaError, match="NAMESPACE/NAME"):
        push(export, repo_id, token=TOKEN, endpoint=hub.url)
    assert hub.requests == []


def refused(hub: HubServer, folder: Path) -> TransmlaError:
    """Push ``folder`` with and without a dry run, and return the error. The server must receive no request."""
    for dry_run in (True, False):
        with pytest.raises(TransmlaError) as error:
            push_to(hub, folder, dry_run=dry_run)
    assert hub.requests == []
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize(
    ("repo_id", "says"),
    [
        ("export", "'export' is not a repository id; it is a path on this machine, and a push goes to the Hub; write"),
        ("{0}/export", "it is a path on this machine"),
        ("./export", "it is a path on this machine"),
        ("model-mla", "'model-mla' is not a repository id; it has no namespace; write it as NAMESPACE/NAME"),
        ("https://huggingface.co/someone/model", "it is an address"),
        ("someone/some/model", "an id is two names of letters"),
        ("someone/-model", "an id is two names of letters"),
    ],
)
def test_the_refusal_of_a_repository_id_is_in_our_words(
    export: Path, monkeypatch: pytest.MonkeyPatch, repo_id: str, says: str
) -> None:
    monkeypatch.chdir(export.parent)
    with pytest.raises(TransmlaError) as refused:
        push(export, repo_id.format(export.parent), dry_run=True)
    assert says in str(refused.value)
    assert "repo_type" not in str(refused.value)


def test_a_missing_folder_is_refused(hub: HubServer, tmp_path: Path) -> None:
    assert "is not a folder" in refused(hub, tmp_path / "absent").what


def test_an_unfinished_conversion_is_refused(hub: HubServer, export: Path) -> None:
    partial = export.rename(export.with_name("export.partial"))
    assert "no finished conversion" in refused(hub, partial).what

    export = partial.rename(export)
    for text in (b"{", b"[]"):
        write(export / "transmla.json", text)
        assert "no finished conversion" in refused(hub, export).what
    (export / "transmla.json").unlink()
    assert "no finished conversion" in refused(hub, export).what


@pytest.mark.parametrize("hashes", [None, {}, ["config.json"], {"config.json": 1}])
def test_an_export_without_file_hashes_is_refused(hub: HubServer, export: Path, hashes: object) -> None:
    write_json(export / "transmla.json", {"hashes": hashes})
    assert "lists no file hashes" in refused(hub, export).what


@pytest.mark.parametrize("changed", [{"passed": False}, {"passed": None}, {"fingerprint": "0" * 64}, None])
def test_an_export_without_a_matching_verification_is_refused(
    hub: HubServer, export: Path, changed: dict[str, object] | None
) -> None:
    verification = export / "verification.json"
    if changed is None:
        verification.unlink()
    else:
        write_json(verification, json.loads(verification.read_bytes()) | changed)
    error = refused(hub, export)
    assert "is not verified" in error.what
    assert error.remedy == f"run `transmla verify {export}`"


def test_a_changed_or_missing_file_is_refused(hub: HubServer, export: Path) -> None:
    shard = export / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    (export / "config.json").unlink()
    what = refused(hub, export).what
    assert "model-00001-of-00002.safetensors has changed" in what
    assert what.count("config.json") == 1
    assert "config.json is missing" in what
    assert "00002-of-00002" not in what


@pytest.mark.parametrize("path", ["model.safetensors", "adapter_config.json", "nested/README.md"])
def test_a_file_that_the_conversion_did_not_write_is_refused(hub: HubServer, export: Path, path: str) -> None:
    write(export / path, b"{}")
    assert f"{path} was not written by the conversion; remove it" in refused(hub, export).what


@pytest.mark.parametrize("path", ["config.json", *SHARDS])
def test_hashes_that_cover_no_model_are_a_problem(export: Path, path: str) -> None:
    hashes = {name: file_sha256(export / name) for name in (path, "nested/tokenizer.json")}
    problem = "no safetensors file has a hash" if path == "config.json" else "config.json has no hash"
    assert check_hashes(export, hashes)[0] == problem


def test_a_verified_file_that_would_not_be_uploaded_is_refused(hub: HubServer, export: Path) -> None:
    write(export / ".hidden", b"x")
    hashes = json.loads((export / "transmla.json").read_bytes())["hashes"]
    hashes[".hidden"] = file_sha256(export / ".hidden")
    write_json(export / "transmla.json", {"hashes": hashes})
    write_json(export / "verification.json", {"passed": True, "fingerprint": export_fingerprint(hashes)})
    assert ".hidden would not be uploaded" in refused(hub, export).what


def test_the_fingerprint_covers_the_sorted_paths_and_hashes() -> None:
    expected = hashlib.sha256(b"a\x0001\nb/c\x0002\n").hexdigest()
    assert export_fingerprint({"b/c": "02", "a": "01"}) == expected
    assert export_fingerprint({"a": "02", "b/c": "01"}) != expected


def test_hashes_are_not_read_outside_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "secret", b"x")
    folder = tmp_path / "export"
    folder.mkdir()
    outside = [str(tmp_path / "secret"), "../secret"]
    problems = check_hashes(folder, dict.fromkeys(outside, file_sha256(tmp_path / "secret")))
    assert [f"{path} is not a path inside the folder" for path in sorted(outside)] == problems[-2:]
