"""Tools that users apply to an export in transformers: quantisers, adapters, Trainer, lm-eval and transformers' server.

The exports are small random models of three layers, in both formats. The source is measured beside them.
"""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.conversions import write_text
from helpers.tiny_sources import build_model, build_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import transmla
from transmla.convert.pipeline import convert
from transmla.formats.native import NOT_QUANTISED
from transmla.modeling.registration import register
from transmla.recipe import parse_recipe
from transmla.source.load import load_tokenizer

FORMS = ("native", "transmla")
SHAPE = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 3}
# Largest change of a log-probability of an export under a quantiser, in units of its source's.
ALLOWED = 2.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a source and its exports by format, each in bfloat16."""
    folder = tmp_path_factory.mktemp("tools")
    found = {"source": folder / "source"}
    build_model("llama", "gqa", **SHAPE).to(torch.bfloat16).save_pretrained(found["source"])
    build_tokenizer(found["source"])
    write_text(folder / "text.txt")
    for form in FORMS:
        values = {"source": str(found["source"]), "output": str(folder / form), "format": form, "device": "cpu"}
        values |= {"calibration": {"source": str(folder / "text.txt"), "sequences": 4, "length": 32}}
        found[form] = convert(parse_recipe(values | {"reconstruct": "off", "heal": "off"}, "test"))
    register()
    return found


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 128, (2, 48), generator=torch.Generator().manual_seed(0))


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.no_grad()
def log_probs(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits.float().log_softmax(-1)


def int8_weights(folder: Path) -> Any:
    """Load a model and quantise its linear layers with torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(folder, torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def int8_bitsandbytes(folder: Path) -> Any:
    """Load a model through bitsandbytes, without the modules that its card names."""
    skip = NOT_QUANTISED if folder.name == "native" else None
    return load(
        folder,
        torch.bfloat16,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quantised", [int8_weights, int8_bitsandbytes])
def test_a_quantiser_changes_an_export_as_little_as_its_source(
    folders: dict[str, Path], ids: Tensor, form: str, quantised: Callable[[Path], Any]
) -> None:
    changes = {
        name: float((log_probs(quantised(folders[name]), ids) - log_probs(load(folders[name]), ids)).abs().mean())
        for name in ("source", form)
    }
    assert 0 < changes[form] <= ALLOWED * changes["source"]


@pytest.mark.parametrize("rate", [1e-4, 1e-3])
@pytest.mark.parametrize("form", FORMS)
def test_adapters_on_all_linear_layers_train(folders: dict[str, Path], ids: Tensor, form: str, rate: float) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(load(folders[form]), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] == max(losses)


@pytest.mark.parametrize("form", FORMS)
def test_the_trainer_trains_all_weights(folders: dict[str, Path], ids: Tensor, form: str, tmp_path: Path) -> None:
    arguments = {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-3, "report_to": [], "use_cpu": True}
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(load(folders[form]), TrainingArguments(str(tmp_path), **arguments), train_dataset=rows)
    trainer.train()
    losses = [point["loss"] for point in trainer.state.log_history if "loss" in point]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("form", FORMS)
def test_lm_eval_reads_an_export_by_itself(
    folders: dict[str, Path], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data.json").write_text("\n".join(json.dumps({"text": "sense " * n}) for n in range(3, 8)))
    (tmp_path / "words.yaml").write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.json'}}}}}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    loaded = HFLM(pretrained=transmla.load(folders[form], dtype=torch.float32), tokenizer=load_tokenizer(folders[form]))
    models = (("hf", f"pretrained={folders[form]},dtype=float32"), (loaded, ""))
    scores = [
        lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=["words"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            device="cpu",
        )["results"]["words"]["word_perplexity,none"]
        for model, arguments in models
    ]
    assert math.log(scores[0]) == pytest.approx(math.log(scores[1]), rel=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_transformers_serves_an_export(folders: dict[str, Path], form: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", str(folders[form]), "--runtime", "transformers", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "transmla", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        # The model has the name of its folder.
        answer = ask(server, port, folders[form].name)
        server.send_signal(signal.SIGINT)
        server.wait(60)
    finally:
        server.kill()
        output, _ = server.communicate()
    assert answer, output[-2000:]
    assert json.loads(answer)["choices"][0]["message"]["role"] == "assistant"
    assert f"the model '{folders[form].name}' at http://127.0.0.1:{port}/v1" in output
    # Ctrl-C ends the server without an error.
    assert output.endswith("\nstopped\n")
    assert "Aborted" not in output
    assert server.returncode == 130


def test_a_wrong_option_of_transformers_server_is_one_line(folders: dict[str, Path]) -> None:
    command = ["serve", str(folders["native"]), "--runtime", "transformers", "--", "--colour", "red"]
    done = subprocess.run([sys.executable, "-m", "transmla", *command], capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    where = "arguments after -- go to `transformers serve`; see `transformers serve --help`"
    assert re.fullmatch(rf"error: No such option:? '?--colour'?; {re.escape(where)}", last)


def ask(server: subprocess.Popen[str], port: int, model: str) -> str:
    """Return the server's answer to a chat request; an empty text if the server ends or is silent for two minutes."""
    body = {"model": model, "messages": [{"role": "user", "content": "sense"}], "max_tokens": 4, "stream": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    ends = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < ends:
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return str(reply.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return ""
