"""CUDA graphs of decode steps on a GPU: half precision, memory, threads, and captures that fail."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import relative
from helpers.graph_models import LONG, MODELS, longer, plain_model, prompts, with_graphs, written
from helpers.mla_models import tiny
from torch import Tensor
from transformers import DynamicCache

import transmla
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.fused_norms import FusedNorm, agrees
from transmla.runtime.graph_recorder import CudaRecorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("padded", [0, 5])
def test_half_precision_is_replayed(family: str, padded: int, tmp_path: Path) -> None:
    """With the kernel that ``auto`` chooses for the GPU."""
    model = plain_model(family, tmp_path, "cuda").to(torch.bfloat16)
    mask = torch.ones(2, LONG + 6, dtype=torch.int64, device="cuda")
    mask[0, :padded] = 0
    tokens, logits = longer(model, LONG + 6), []
    for graphed in (False, True):
        graphs = with_graphs(model) if graphed else None
        cache: Any = DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [
                model(
                    tokens[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, start:stop],
                    use_cache=True,
                    **{CACHE_ARGUMENT: cache},
                ).logits[:, -1]
                for start, stop in [(0, LONG), *((i, i + 1) for i in range(LONG, LONG + 6))]
            ]
        logits.append(torch.stack(parts, 1))
    assert relative(logits[1], logits[0]) < 0.1
    assert graphs is not None
    assert (graphs.captures, graphs.replays) == (1, 5)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "minicpm3", "youtu"])
def test_models_whose_step_may_wait_for_the_gpu_write_the_same_tokens(family: str) -> None:
    """Experts may read numbers on the host, which ends a capture."""
    model = transmla.accelerate(tiny(family, num_hidden_layers=3).cuda(), cuda_graphs=False)
    inputs = prompts(model.device, padded=5)
    expected = written(model, inputs)
    graphs = with_graphs(model)
    for _ in range(2):
        assert torch.equal(written(model, inputs), expected)
    assert graphs.replays > 0 or graphs.reason is not None
    print(f"{family}: {graphs.replays} replays, {graphs.reason}")


def test_graphs_are_freed_with_the_cache_and_the_model(tmp_path: Path) -> None:
    """Collecting garbage is not needed."""
    model = plain_model("llama", tmp_path, "cuda")
    inputs = prompts(model.device)
    with_graphs(model)
    written(model, inputs)
    used = torch.cuda.memory_allocated()
    for _ in range(3):
        written(model, inputs)
    assert torch.cuda.memory_allocated() <= used
    freed = weakref.ref(model)
    del model
    assert freed() is None


def test_threads_share_a_model(tmp_path: Path) -> None:
    """Each thread has its own cache and stream, and graphs share their memory."""
    model = plain_model("llama", tmp_path, "cuda")
    inputs = [prompts(model.device, batch) for batch in (1, 2, 3, 4)]
    expected = [written(model, one) for one in inputs]
    graphs = with_graphs(model)

    def run(one: dict[str, Tensor]) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            return written(model, one).cpu()

    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(run, inputs * 3)]
    assert graphs.reason is None
    for ours, theirs in zip(found, expected * 3, strict=True):
        assert torch.equal(ours, theirs.cpu())


def test_a_step_that_waits_for_the_gpu_is_never_captured() -> None:
    """The frequencies of a dynamic rope depend on the largest position, which the host reads."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny(num_hidden_layers=3, first_k_dense_replace=3, rope_parameters=rope)
    model = transmla.accelerate(model.cuda(), cuda_graphs=False)
    inputs = prompts(model.device, padded=5)
    settings = {"do_sample": True, "top_k": 20}
    expected = written(model, inputs, **settings)
    graphs = with_graphs(model)
    assert torch.equal(written(model, inputs, **settings), expected)
    assert graphs.captures == 0
    assert graphs.reason == "the step cannot be captured: an operation waits for the GPU"


def test_a_failed_capture_leaves_nothing_behind() -> None:
    device = torch.device("cuda", 0)
    recorder, total = CudaRecorder(), torch.zeros((), device=device)
    with recorder.turn(device):
        with pytest.raises(RuntimeError):
            recorder.record(lambda: total.add_(total.item()))
        assert torch.rand(3, device=device).shape == (3,)
        replay = recorder.record(lambda: total.add_(1))
        for _ in range(3):
            replay()
    assert total.item() == 3
    torch.cuda.empty_cache()


def test_norms_are_fused_in_captured_steps(tmp_path: Path) -> None:
    model = plain_model("qwen3", tmp_path, "cuda").to(torch.bfloat16)
    graphs = with_graphs(model)
    written(model, prompts(model.device))
    assert graphs.replays > 0
    assert sum(isinstance(module, FusedNorm) and agrees(module) for module in model.modules()) == 4 * 4 + 1
