"""scripts/generate_time.py splits the time of a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from helpers.graph_models import Repeating, plain_model

from transmla.runtime.decode_graphs import DecodeGraphs
from transmla.runtime.graphed_model import use_graphs


@pytest.mark.parametrize("graphed", [False, True])
def test_the_time_of_a_token(load_script: Callable[[str], ModuleType], graphed: bool, tmp_path: Path) -> None:
    script, model = load_script("generate_time"), plain_model("llama", tmp_path)
    if graphed:
        use_graphs(model, DecodeGraphs())
    found = script.generate_times(model, 2, 40, 12, Repeating())
    assert found["generate() tokens/s"] > 0 < found["first generate() tokens/s"]
    parts = [found.get(f"ms {name}") for name in ("graph", "host", "rest")]
    if graphed:
        assert sum(parts) == pytest.approx(found["ms a token"], abs=0.01)
    else:
        assert parts == [None] * 3
    assert script.AGAIN not in model.__dict__


def test_a_source_has_no_parts(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("generate_time")
    bench = load_script("decode_bench")
    model = bench.build("tiny", "dynamic", "32+16", "auto", "cpu")
    assert "ms graph" not in script.generate_times(model, 1, 16, 4)
