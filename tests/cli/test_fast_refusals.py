"""Cheap refusals and help come before torch and transformers are imported, which takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from transmla.registry import scan, summaries

HEAVY = ("torch", "transformers", "datasets")
# Print, when the process ends, which heavy libraries were imported.
PROGRAM = (
    "import atexit, sys; atexit.register(lambda: print('heavy:', *(n for n in {heavy} if n in sys.modules), "
    "file=sys.stderr)); from transmla.cli import main; main()"
)


def heavy_imports(place: Path, *argv: str) -> tuple[int, str, str]:
    """Return exit code, error, and the heavy libraries that ``transmla ARGV`` imported in a new process."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *argv]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    said, _, heavy = done.stderr.rpartition("heavy:")
    return done.returncode, said, heavy.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with an empty model folder, a text, and a folder that is taken."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    "argv", ["--help", "--version", "convert --help", "plan --help", "eval --help", "heal --help", "serve --help"]
)
def test_help_is_fast(folder: Path, argv: str) -> None:
    assert heavy_imports(folder, *argv.split())[::2] == (0, "")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("fly", "No such command 'fly'"),
        ("convert source --colour red", "No such option: --colour"),
        ("convert source -o out --cache-ratio half", "cache_ratio: it must be auto, or a share above 0"),
        ("convert source -o out --max-kl 0.1", "--max-kl 0.1 was given with no cache ratio"),
        ("convert source -o out --max-kl 0.1 --cache-ratio 0.5", "with a cache ratio of 0.5; a largest KL chooses"),
        ("convert source -o out --cache-ratio auto --max-kl 0", "max_kl: input should be greater than 0"),
        ("plan source --cache-ratio auto --kv-lora-rank 8", "--kv-lora-rank was given with --cache-ratio auto"),
        ("plan source --cache-ratio auto --pad-for vllm", "--pad-for was given with --cache-ratio auto"),
        ("convert source -o out --cache-ratio 0", "cache_ratio: input should be greater than 0"),
        ("convert source -o out --method magic", "unknown method 'magic'; supported: calibrated, care"),
        ("convert source -o out --format magic", "unknown format 'magic'; supported: native, transmla"),
        ("convert ./nowhere -o out", "source './nowhere' does not exist"),
        ("convert nowhere.gguf -o out", "source 'nowhere.gguf' does not exist"),
        ("convert package:nowhere/x.gguf -o out", "package 'nowhere' is not installed"),
        ("convert nowhere.yaml", "cannot read recipe 'nowhere.yaml'"),
        ("convert source -o taken", "output 'taken' is not empty"),
        ("convert source --output=", "the output is an empty name; an export is a new folder; give --output"),
        ("convert source -o text.txt/out", "cannot write to"),
        ("convert source -o out --calibration nowhere.txt", "no file nowhere.txt"),
        ("convert source -o out --eval nowhere.txt", "no file nowhere.txt"),
        ("convert source -o out --eval text.txt --eval-window 32 --eval-stride 33", "stride 33 is larger"),
        ("plan source --revision main", "'source' is a local path, and has no revision 'main'"),
        ("plan https://huggingface.co/org/name", "does not exist; a source is"),
        ("plan https://huggingface.co/org/name/tree/main", "; give the Hub id 'org/name'"),
        ("convert source -o out --calibration pydoc:abc", "'pydoc:abc' is no text; 'abc' is not the weight"),
        ("eval source --text pydoc:abc", "'pydoc:abc' is no text"),
        ("plan ./nowhere", "source './nowhere' does not exist"),
        ("inspect ./nowhere", "source './nowhere' does not exist"),
        ("inspect source --report x.pdf", "cannot draw 'x.pdf'"),
        ("verify nowhere", "'nowhere' does not exist; an export is a folder"),
        ("verify source --dtype float16", "dtype 'float16' is not supported"),
        ("eval ./nowhere", "source './nowhere' does not exist"),
        ("eval source --baseline ./nowhere", "source './nowhere' does not exist"),
        ("eval source --text nowhere.txt", "no file nowhere.txt"),
        ("eval source --text self", "no text to evaluate on"),
        ("eval source --window 1", "window: input should be greater than or equal to 2"),
        ("eval source --dtype float16", "dtype 'float16' is not supported"),
        ("heal nowhere --teacher source -o out", "'nowhere' does not exist; an export is a folder"),
        ("heal source -o out", "Missing option '--teacher'"),
        ("bench ./nowhere", "source './nowhere' does not exist"),
        ("bench source --backend magic", "unknown backend 'magic'; supported: flashinfer"),
        ("chat ./nowhere", "source './nowhere' does not exist"),
        ("chat source --backend magic", "unknown backend 'magic'"),
        ("serve nowhere", "'nowhere' has no config.json"),
        ("serve source --runtime magic", "unknown runtime 'magic'"),
        ("serve source --colour red", "No such option: --colour"),
        ("gguf nowhere -o x.gguf", "'nowhere' does not exist; an export is a folder"),
        ("gguf source -o x.gguf --type magic", "unknown type 'magic'"),
        ("push nowhere org/name", "'nowhere' does not exist; an export is a folder"),
    ],
)
def test_a_cheap_refusal_imports_no_heavy_library(folder: Path, argv: str, says: str) -> None:
    code, said, heavy = heavy_imports(folder, *argv.split())
    assert (code, heavy) == (2, ""), said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said


@pytest.mark.parametrize(
    ("package", "attribute"),
    [("transmla.core.methods", "METHOD"), ("transmla.formats", "FORMAT"), ("transmla.kernels", "BACKEND")],
)
def test_names_that_are_read_without_an_import_are_right(package: str, attribute: str) -> None:
    imported = {name: plugin.summary for name, plugin in scan(package, attribute).items()}
    assert summaries(package, attribute) == imported
