"""The verb ``transmla gguf``: what it prints, and its refusals in one line."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from transmla import cli
from transmla.cli import gguf_verb
from transmla.serve import gguf_file
from transmla.serve.gguf_check import GgufCheck
from transmla.serve.gguf_file import WrittenGguf


def call(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr("sys.argv", ["transmla", "gguf", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (GgufCheck(16, 15, 0.0123, 0.2), "15 of 16 greedy tokens are equal, and log-probs differ by 0.012 on average"),
        (None, "not run: llama.cpp is not installed"),
    ],
)
def test_it_says_what_was_written_and_whether_it_runs(
    check: GgufCheck | None, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "" if check else "llama.cpp is not installed (pip install xllamacpp)"
    written = WrittenGguf(Path("x.gguf"), 2_000_000, {"Q8_0": 3, "F32": 2}, check, reason)
    monkeypatch.setattr(gguf_file, "write_gguf", lambda *_, **__: written)
    monkeypatch.setattr(gguf_verb, "refuse_unfinished", lambda _: None)
    assert call(monkeypatch, "dir", "-o", "x.gguf") == 0
    out = capsys.readouterr().out
    assert "wrote x.gguf, 2 MB: 3 Q8_0, 2 F32" in out
    assert says in out


def test_a_refusal_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert call(monkeypatch, str(tmp_path), "-o", str(tmp_path / "x.gguf")) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert 'pip install "gguf>=0.17"' in err
