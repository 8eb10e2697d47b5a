"""The command line of a conversion that is given a loss instead of a size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_line import CALIBRATION, Run
from helpers.random_layer import make_spec, uncut

from transmla.cli import console
from transmla.export.manifest import Promise


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


@pytest.mark.parametrize(("measured", "said"), [(0.31, False), (0.33, False), (0.36, True)])
def test_a_missed_promise_is_said_with_its_remedy(
    measured: float, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = uncut(make_spec("gqa"), "mla")
    console.show_promise(plan, Promise(accepted=0.3, expected=0.29, measured=measured))
    err = capsys.readouterr().err
    assert ("missed by 20% on other text" in err) == said
    assert ("--max-kl 0.25" in err) == said


@pytest.mark.parametrize(("sequences", "fit"), [("1", False), ("2", True)])
def test_a_fit_is_advised_where_there_is_text_for_it(place: Path, run: Run, sequences: str, fit: bool) -> None:
    (place / "text.txt").write_text((place / "text.txt").read_text() * 3)
    options = ("--cache-ratio", "auto", "--max-kl", "1e-9", "--reconstruct", "off", "--heal", "off")
    text = ("--calibration", "text.txt", "--calibration-sequences", sequences, "--calibration-length", "32")
    code, _, err = run("convert", "source", "-o", "out", *options, *text)
    assert code == 2
    assert "or more" in err
    assert ("--reconstruct full" in " ".join(err.split())) == fit
