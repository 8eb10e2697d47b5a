"""Where transmla is installed, exports of the transmla format load in the Auto classes without a call or an option."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers.conversions import recipe, write_text
from helpers.tiny_sources import build_model, build_tokenizer

from transmla.convert.pipeline import convert

ROOT = Path(__file__).parents[2]
START = "transmla_autoload.pth"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoload")
    source = folder / "source"
    build_model("qwen3", num_hidden_layers=3).save_pretrained(source)
    build_tokenizer(source)
    write_text(folder / "text.txt")
    calibration = {"source": str(folder / "text.txt")}
    return convert(recipe(source=str(source), output=str(folder / "export"), calibration=calibration))


def python(code: str, *arguments: Any) -> str:
    """Run ``code`` in a new process, after what an installed transmla runs when Python starts."""
    start = (ROOT / START).read_text()
    ended = subprocess.run(
        [sys.executable, "-c", start + code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_starting_python_imports_no_library() -> None:
    loaded = python("import sys; print(any(name in sys.modules for name in ('torch', 'transformers', 'pydantic')))")
    assert loaded == "False"


def test_importing_a_config_class_imports_no_model() -> None:
    code = (
        "import sys; from transformers import AutoConfig; print('transmla.modeling.modeling_transmla' in sys.modules)"
    )
    assert python(code) == "False"


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(p)",
        "import transformers; m = transformers.pipeline('text-generation', p).model",
        # What ``transformers serve`` does.
        "import transformers as t; m = getattr(t, t.AutoConfig.from_pretrained(p).architectures[0]).from_pretrained(p)",
        "import transformers.models.auto.modeling_auto as a; m = a.AutoModelForCausalLM.from_pretrained(p)",
        "import transmla; m = transmla.load(p)",
    ],
)
def test_an_export_loads(export: Path, code: str) -> None:
    program = f"import sys; p = sys.argv[1]; {code}; print(type(m).__name__, m.config.source_model_type)"
    name, family = python(program, export).splitlines()[-1].split()
    assert (name, family) == ("TransmlaQwen3ForCausalLM", "qwen3")


@pytest.mark.parametrize("task", ["text-generation", "text-classification", "token-classification"])
def test_pipelines_know_the_export(export: Path, task: str) -> None:
    """A pipeline lists hundreds of supported models for a class that the table of its task does not name."""
    program = f"import sys, transformers; transformers.pipeline({task!r}, sys.argv[1])"
    start = (ROOT / START).read_text()
    ended = subprocess.run(
        [sys.executable, "-c", start + program, str(export)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "is not supported" not in ended.stderr


def test_it_registers_where_transformers_was_imported_first(export: Path) -> None:
    code = (
        "import sys, transformers as t; t.AutoConfig; import importlib, transmla.autoload as a; importlib.reload(a)\n"
    )
    code += "print(t.AutoConfig.from_pretrained(sys.argv[1]).source_model_type)"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(export)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert ended.stdout.strip() == "qwen3"


def test_the_wheel_has_the_file_that_python_reads() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {START: START}
    assert (ROOT / START).read_text() == "import transmla.autoload\n"
