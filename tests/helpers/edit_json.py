"""Change fields of a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edit_json(file: Path, **changes: Any) -> None:
    """Replace or add fields of the object in ``file``."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
