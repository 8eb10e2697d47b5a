"""Write the pages of docs/ that are made from the code: the command line and the table of families.

python scripts/generate_docs.py           # write them
python scripts/generate_docs.py --check   # exit with 1 if one is out of date
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path
from typing import Any

from typer.main import get_command

from transmla.cli.app import VERBS, build
from transmla.cli.options import Command
from transmla.plan import family_table

DOCS = Path(__file__).parent.parent / "docs"


def cli_page() -> str:
    """The reference of every verb: its purpose, an example, and one table of flags for each panel."""
    lines = [
        "# Command line",
        "",
        "Every setting of a conversion is also a key of a recipe (`transmla convert recipe.yaml`); flags win. "
        "This page is generated (`python scripts/generate_docs.py`).",
    ]
    group: Any = get_command(build())
    for verb in VERBS:
        command = group.commands[verb]
        assert isinstance(command, Command)
        command.list_plugins()
        lines += ["", f"## transmla {verb}", "", *_paragraphs(inspect.cleandoc(command.help or ""))]
        panels: dict[str, list[Any]] = {}
        for parameter in command.params:
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(parameter)
        for panel, parameters in panels.items():
            lines += ["", f"**{panel}**" if panel else "**Arguments and options**", "", "| | |", "|---|---|"]
            lines += [f"| {_names(parameter)} | {_cell(parameter.help or '')} |" for parameter in parameters]
    return "\n".join(lines) + "\n"


def families_page() -> str:
    """The table of families, read off the registry and each family's own tiny model."""
    return "\n\n".join(
        [
            "# Model families",
            "Each row is one file in `transmla/families/`. The format is the one that `--format auto` takes; the "
            "transmla format also stores the biases and windows that a config of another row may ask for.",
            family_table.markdown(),
            family_table.notes(),
            "With nothing cut, every family's tiny random model gives its source's logits to 1e-4, under every rope "
            "type of its row (`tests/formats/test_transmla_layers.py`, `tests/modeling/test_transmla_modeling.py`). "
            "`transmla families` prints the table in a terminal. This page is generated "
            "(`python scripts/generate_docs.py`).",
        ]
    ) + "\n"  # fmt: skip


PAGES = {"cli.md": cli_page, "families.md": families_page}


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring, its example as code."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        joined = " ".join(paragraph.split())
        example = joined.startswith("Example: ")
        lines += [f"```\n{joined.removeprefix('Example: ')}\n```" if example else joined, ""]
    return lines[:-1]


def _names(parameter: Any) -> str:
    """Flags of an option, or the name of an argument."""
    names = (*parameter.opts, *parameter.secondary_opts)
    flags = [name for name in names if name.startswith("-")]
    return ", ".join(f"`{name}`" for name in flags or [parameter.metavar])


def _cell(text: str) -> str:
    """Text for one cell: no rich escapes, no line breaks, no pipes."""
    return re.sub(r"\n+", "<br>", text.replace("\\[", "[")).replace("||", "&#124;&#124;").replace("|", "&#124;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args().check
    old = []
    for name, make in PAGES.items():
        page, file = make(), DOCS / name
        if not file.is_file() or file.read_text(encoding="utf-8") != page:
            old.append(name)
            if not check:
                file.write_text(page, encoding="utf-8")
    if old:
        print(f"{'out of date' if check else 'wrote'}: {', '.join(old)}")
    raise SystemExit(bool(old and check))


if __name__ == "__main__":
    main()
