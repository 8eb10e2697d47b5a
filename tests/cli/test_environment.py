"""Permissions, disks, names, streams and limits: one line, exit code 2, no traceback."""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command_line import CALIBRATION, Run, refuses
from helpers.edit_json import edit_json
from helpers.forked import become_nobody, folder_for_all, forked, refused

OFF = ["--reconstruct", "off", "--heal", "off", "--device", "cpu", *CALIBRATION]
CONVERT = ["convert", "source", "-o", "out", *OFF]
PLAN = ["plan", "source", *OFF]
EVAL = ["eval", "source", "--text", "text.txt", "--window", "32", "--max-windows", "1", "--device", "cpu"]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.fixture
def shared_place(place: Path) -> Path:
    """``place``, which every user may enter and write to."""
    folder_for_all(place)
    place.chmod(0o777)
    return place


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read_is_named(shared_place: Path, name: str) -> None:
    Path("source", name).chmod(0)
    for argv in (CONVERT, EVAL):
        assert refused(forked(*argv, prepare=become_nobody), "no permission for")
    assert not Path("out").exists()


def test_folders_that_may_not_be_entered_are_named(shared_place: Path) -> None:
    closed = shared_place / "closed"
    (closed / "source").mkdir(parents=True)
    closed.chmod(0)
    for argv in (
        ["plan", "closed/source", *OFF],
        ["eval", "closed/source", *EVAL[2:]],
        ["convert", "source", "-o", "closed/out", *OFF],
        ["plan", "closed/recipe.yaml"],
        ["verify", "closed/source"],
        ["convert", "source", "-o", "out", "--calibration", "closed/text.txt", *OFF[:-6]],
    ):
        ended = forked(*argv, prepare=become_nobody)
        assert ended.code == 2, argv
        assert len(ended.errors) == 1, ended.text


@pytest.mark.parametrize("name", ["/", "//", "x" * 300, "x" * 250, "~nosuchuser/x", "a\0b", "out.partial", "\udcff"])
def test_an_output_that_cannot_be_a_folder_is_refused(place: Path, run: Run, name: str) -> None:
    refuses(run, "convert", "source", "-o", name, *OFF, says="")


@pytest.mark.parametrize("name", ["x" * 300, "~nosuchuser/x", "/dev/null", "a\0b/c", "x" * 300 + ".yaml"])
def test_a_source_that_cannot_be_a_path_is_refused(place: Path, run: Run, name: str) -> None:
    assert run("plan", name)[0] == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(place: Path, run: Run, name: str) -> None:
    Path("source", name).unlink()
    os.mkfifo(Path("source", name))
    refuses(run, *CONVERT, says=f"{name}' is not a file")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_a_pointer_of_git_lfs_is_named(place: Path, run: Run, name: str) -> None:
    Path("source", name).write_text(POINTER)
    for argv in (CONVERT, EVAL):
        refuses(run, *argv, says=f"{name}' is a pointer of git-lfs, not the file itself")


def pipe_without_reader(name: str) -> Callable[[], None]:
    def prepare() -> None:
        read, write = os.pipe()
        os.close(read)
        setattr(sys, name, io.TextIOWrapper(os.fdopen(write, "wb")))

    return prepare


def full(name: str) -> Callable[[], None]:
    return lambda: setattr(sys, name, open("/dev/full", "w"))


def nothing(name: str) -> Callable[[], None]:
    return lambda: setattr(sys, name, None)


def ascii_only(name: str) -> Callable[[], None]:
    return lambda: setattr(sys, name, io.TextIOWrapper(os.fdopen(2 if name == "stderr" else 1, "wb"), "ascii"))


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", [pipe_without_reader, full, nothing, ascii_only])
def test_a_stream_that_fails_ends_no_conversion(
    place: Path, kind: Callable[..., Callable[[], None]], stream: str
) -> None:
    ended = forked(*CONVERT, prepare=kind(stream))
    assert "Traceback" not in ended.text
    assert "Exception ignored" not in ended.text
    assert Path("out/transmla.json").is_file()
    assert ended.code == 0 or stream == "stdout"
    assert forked("families", prepare=kind(stream)).text.count("Traceback") == 0


def test_output_that_is_lost_is_an_error(place: Path) -> None:
    assert refused(forked(*PLAN, "--json", prepare=full("stdout")), "the disk is full")


def test_the_working_folder_may_be_gone(place: Path) -> None:
    def leave() -> None:
        os.chdir(folder := tempfile.mkdtemp())
        os.rmdir(folder)

    assert refused(forked(*PLAN, prepare=leave), "")
    assert forked("plan", str(place / "source"), "--calibration", str(place / "text.txt"), prepare=leave).code in (0, 2)


def limited(kind: int, most: int) -> Callable[[], None]:
    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(kind, (most, most))

    return prepare


@pytest.mark.parametrize("most", [100, 5_000, 50_000])
def test_files_may_not_be_larger_than_the_limit(place: Path, most: int) -> None:
    # The output of a forked command is a file too.
    ended = forked(*CONVERT, prepare=limited(resource.RLIMIT_FSIZE, most))
    assert ended.code == 2
    assert "Traceback" not in ended.text


@pytest.mark.parametrize("most", [8, 12])
def test_too_many_open_files_are_one_line(place: Path, most: int) -> None:
    ended = forked(*EVAL, prepare=limited(resource.RLIMIT_NOFILE, most))
    assert "Traceback" not in ended.text
    assert ended.code in (0, 2)


def test_a_bug_shows_its_traceback_and_says_where_to_report_it(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise AssertionError("impossible")

    monkeypatch.setattr("transmla.convert.prepare.open_source", bug)
    code, _, err = run(*PLAN)
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert "This is a bug of transmla" in err


def test_the_last_bar_and_the_next_line_are_two_lines(place: Path) -> None:
    lines = forked(*CONVERT).text.splitlines()
    assert [line for line in lines if "wrote out" in line] == ["wrote out; next: transmla verify out"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000; the weights can hold at most"),
        ({"head_dim": 10**9}, "head_dim is 1,000,000,000; the weights can hold at most"),
        ({"vocab_size": 10**12}, "vocab_size is"),
        ({"num_labels": 10**8}, "num_labels is"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"pad_token_id": 10**6}, "transformers cannot build a llama model"),
        ({"text_config": {}}, "is a multimodal model"),
    ],
)
def test_a_config_that_no_weights_can_hold_is_refused_at_once(
    place: Path, run: Run, changes: dict[str, object], says: str
) -> None:
    edit_json(Path("source/config.json"), **changes)
    refuses(run, *CONVERT, says=says)
