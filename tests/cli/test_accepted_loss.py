"""The command line of a conversion that is given a loss instead of a size."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.command_line import CALIBRATION, Run


def test_a_loss_instead_of_a_size(place: Path, run: Run) -> None:
    """``plan`` says that the cache is still to be chosen; ``convert`` ends with what was promised and measured."""
    (place / "text.txt").write_text((place / "text.txt").read_text() * 3)
    code, out, _ = run("plan", "source", "--cache-ratio", "auto", "--max-kl", "2", *CALIBRATION)
    text = " ".join(out.split())
    assert code == 0
    assert "the smallest that should keep the KL to the source at 2 nats per token before healing" in text
    assert "choosing the cache: at most about" in text
    options = ("--cache-ratio", "auto", "--max-kl", "2", "--reconstruct", "off", "--heal", "off")
    code, out, err = run("convert", "source", "-o", "out", "--format", "transmla", *options, *CALIBRATION)
    assert code == 0, err
    text = " ".join(out.split())
    assert "the smallest cache for a KL of 2" in text
    assert "KL promised, nats per token, before healing" in text
    assert "KL measured on other text" in text
    promise = json.loads((place / "out" / "transmla.json").read_text())["promise"]
    assert promise["accepted"] == 2
    assert promise["measured"] <= 2.2
