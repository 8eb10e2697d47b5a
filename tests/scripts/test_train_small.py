"""scripts/train_small.py trains the small models that conversions are compared on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_small.py"


def test_the_script_writes_a_model_with_large_norms_and_its_tokenizer(tmp_path: Path) -> None:
    few = ["--steps", "2", "--windows", "8"]
    command = [sys.executable, str(SCRIPT), "qwen3", str(tmp_path), *few, "--large", "--commit", "none"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "A list is a mutable sequence."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    norm = model.model.layers[0].self_attn.k_norm.weight
    assert norm.max() > 2
    assert norm.min() < 0.5
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["held-out perplexity"] > 1
    assert record["steps"] == 2
    assert not list(tmp_path.glob("checkpoint-*"))
