"""README and docs agree with the code, with the recorded results and with each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_pages_made_from_the_code_are_current() -> None:
    script = ROOT / "scripts" / "generate_docs.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}: run python scripts/generate_docs.py"


def test_the_front_page_fits_in_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_recorded_result_is_in_the_index() -> None:
    results = ROOT / "scripts" / "results"
    index = (results / "README.md").read_text(encoding="utf-8")
    files = [file.relative_to(results).as_posix() for file in results.rglob("*.json")]
    assert files
    assert [file for file in files if file not in index] == []


def test_every_result_that_is_named_exists() -> None:
    named = re.compile(r"scripts/results/[\w./-]+\.json")
    sources = [*PAGES, *(ROOT / "transmla").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    missing = {
        name
        for file in sources
        for name in named.findall(file.read_text(encoding="utf-8"))
        if not (ROOT / name).is_file()
    }
    assert missing == set()
