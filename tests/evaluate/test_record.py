"""An export whose folder cannot be written is verified all the same, and says that nothing was recorded."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.forked import become_nobody, folder_for_all, forked
from helpers.interrupted import files

from transmla.evaluate import record
from transmla.evaluate.verify import verify


def test_an_export_of_another_user_is_verified(pair: tuple[Path, Path]) -> None:
    export = pair[1]
    for path in (export, *export.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder_for_all(export.parent)
    before = files(export)
    ended = forked("verify", str(export), "--device", "cpu", prepare=become_nobody)
    assert ended.code == 0, ended.text
    assert "verified, not recorded" in ended.text
    assert "transmla push" not in ended.text
    assert files(export) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_disk_does_not_fail_a_verification(
    number: int, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number), str(pair[1]))

    monkeypatch.setattr(record, "write_json", full)
    *checks, last = verify(pair[1])
    assert all(check.passed for check in checks)
    assert (last.name, last.passed) == ("record", True)
    assert last.detail.startswith("verified, not recorded: ")
    assert "Errno" not in last.detail
    assert not (pair[1] / "verification.json").exists()
