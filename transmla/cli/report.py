"""Write reports: one self-contained HTML page with tables and figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transmla.files import write_text

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.55 system-ui, sans-serif; color: #1f2328 }}
body {{ max-width: 1060px; margin: 2.5em auto; padding: 0 1.2em }}
h1 {{ font-size: 1.6em; margin-bottom: .6em }}
h2 {{ font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #d8dee4; padding-bottom: .25em }}
dl {{ display: grid; grid-template-columns: max-content auto; gap: .15em 1.2em; margin: 0 }}
dt {{ color: #59636e }}
dd {{ margin: 0; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .35em 1em; text-align: right; white-space: nowrap; border-bottom: 1px solid #d8dee4 }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; overflow-wrap: anywhere }}
thead th {{ border-bottom: 2px solid #afb8c1 }}
tr.total td {{ font-weight: 600; border-top: 2px solid #afb8c1 }}
p {{ color: #59636e; max-width: 75ch }}
img {{ max-width: 100% }}
</style>
</head>
<body>
<h1>{title}</h1>
{facts}
{sections}
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: heading, as plain text.
        html: content, as HTML.
    """

    title: str
    html: str


def write_report(path: Path, title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> None:
    """Write a report.

    Args:
        path: the .html file.
        title: title of the page, as plain text.
        facts: lines of the header: value by name, as plain text; may be empty.
        sections: content of the page, in order.
    """
    lines = [f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items()]
    header = "\n".join(["<dl>", *lines, "</dl>"]) if lines else ""
    parts = [f"<section>\n<h2>{html.escape(part.title)}</h2>\n{part.html}\n</section>" for part in sections]
    page = _PAGE.format(title=html.escape(title), facts=header, sections="\n".join(parts))
    write_text(path, page)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> str:
    """Return a table as HTML, from plain text. ``total``: whether the last row sums up the others."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = []
    for i, row in enumerate(rows):
        kind = ' class="total"' if total and i == len(rows) - 1 else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>")
    body = "\n".join(lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def paragraph(text: str) -> str:
    """Return plain text as a paragraph of HTML."""
    return f"<p>{html.escape(text)}</p>"


def picture(figure: Any, description: str) -> str:
    """Return a matplotlib figure as HTML with the image inside it.

    Args:
        figure: the figure.
        description: text for readers who cannot see the figure.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    width = round(figure.get_figwidth() * 100)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" width="{width}" src="data:image/png;base64,{data}">'
