"""The table of an evaluation, as the terminal, the model card and the report show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table_columns(result: Mapping[str, Any]) -> list[str]:
    """Return the headings of ``table_rows``."""
    # Short headings: the table must fit into 80 characters.
    compared = ["baseline's", "KL", "same top-1"]
    return ["text", "perplexity", *(compared if result["baseline"] is not None else [])]


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per text, and their mean if there are several. Numbers are followed by ± their standard error.

    Args:
        result: the result of ``evaluate.compare.evaluate_models``.
    """
    rows = [[text_label(text), *_cells(text)] for text in result["texts"]]
    return rows if len(rows) == 1 else [*rows, ["mean", *_cells(result["mean"])]]


def text_label(text: Mapping[str, Any]) -> str:
    """Return the name of a text, with its split if it has one."""
    return f"{text['text']} ({text['split']})" if text["split"] else str(text["text"])


def caption(result: Mapping[str, Any]) -> str:
    """Return sentences that explain the table: its windows, its units and its standard errors."""
    texts = result["texts"]
    cuts = [_windows(text) for text in texts]
    per_text = "; ".join(f"{text_label(text)}: {cut}" for text, cut in zip(texts, cuts, strict=True))
    several = len(texts) > 1
    windows = per_text if len(set(cuts)) > 1 else f"{cuts[0]} per text" if several else cuts[0]
    bos = "Every window starts with BOS." if result["starts_with_bos"] else "Windows do not start with BOS."
    sentences = [f"Windows: {windows}.", bos, "± is the standard error over windows; a single window has none."]
    if result["baseline"] is not None:
        sentences.append("The baseline's perplexity is beside the model's; KL(baseline ‖ model) is in nats per token.")
    if several:
        sentences.append("All texts have equal weight in the mean; its perplexity is the geometric mean.")
    return " ".join(sentences)


def _windows(text: Mapping[str, Any]) -> str:
    """Return the number and size of a text's windows, and their stride if they overlap."""
    overlap = text["stride"] < text["window"] - text["starts_with_bos"]
    stride = f", stride {text['stride']:,}" if overlap else ""
    return f"{text['windows']:,} × {text['window']:,} tokens{stride}"


def _cells(values: Mapping[str, Any]) -> list[str]:
    """Return the numbers of one row."""
    cells = [_number(values, "perplexity", 2)]
    if values["kl"] is not None:
        cells += [_number(values, "baseline_perplexity", 2), _number(values, "kl", 4)]
        cells.append(f"{_number(values, 'top1_agreement', 1, 100)} %")
    return cells


def _number(values: Mapping[str, Any], name: str, digits: int, scale: float = 1) -> str:
    """Return a value and its standard error, if there is one, with a number of digits after the point."""
    value, error = values[name] * scale, values[f"{name}_stderr"]
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error * scale:.{digits}f}"
