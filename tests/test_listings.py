"""The docstring of every folder names the files in it, so that a reader finds them there."""

import ast
import re
from pathlib import Path

import pytest

import transmla

PACKAGE = Path(transmla.__file__).parent
# Files on these shelves are alike, and are found by their presence.
ALIKE = {"families", "core/methods", "source/texts"}
FOLDERS = sorted(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py"))


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder not in ALIKE])
def test_a_folder_lists_its_files(folder: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text("utf-8"))) or ""
    modules = {path.stem for path in (PACKAGE / folder).glob("*.py") if path.stem.strip("_") == path.stem}
    assert modules - set(re.findall(r"\w+", docstring)) == set()
