"""Record in an export's folder that its checks have passed, where the folder can be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from transmla.boundary import explain
from transmla.evaluate.adopt import adopt
from transmla.export.hashes import MANIFEST, VERIFICATION, export_fingerprint
from transmla.export.manifest import Manifest
from transmla.files import write_json
from transmla.formats.model_checks import Check

# Name of the check that says that a pass could not be recorded.
RECORD = "record"


def forget(folder: Path) -> None:
    """Delete the record of an earlier verification. In a folder that this user cannot change, it stays."""
    try:
        (folder / VERIFICATION).unlink(missing_ok=True)
    except OSError as error:
        if explain(error) is None:
            raise


def record(folder: Path, manifest: Manifest, dtype: torch.dtype, checks: Sequence[Check]) -> Check | None:
    """Write ``verification.json``, which ``transmla push`` asks for; ``adopt`` an export that was saved again.

    Args:
        folder: the export.
        manifest: its manifest.
        dtype: precision of the checks.
        checks: the checks, which have all passed.

    Returns:
        None; or, for a folder that cannot be written, a check that says why nothing is recorded.
    """
    try:
        if not (folder / MANIFEST).is_file():
            manifest = adopt(folder, manifest)
        values = {
            "passed": True,
            "fingerprint": export_fingerprint(manifest.hashes),
            "dtype": str(dtype).removeprefix("torch."),
            "checks": [asdict(check) for check in checks],
        }
        write_json(folder / VERIFICATION, values)
    except OSError as error:
        explained = explain(error)
        return Check(RECORD, True, f"verified, not recorded: {explained or error}")
    return None
