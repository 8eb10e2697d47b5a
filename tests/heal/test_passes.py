"""The passes of a step give the same gradients and losses from a CUDA graph, in parts, and run eagerly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.mla_models import tiny
from helpers.tiny_sources import build_model

from transmla.heal.attention import attend_to_whole_sequences
from transmla.heal.losses import Distiller
from transmla.heal.passes import Whole

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, BATCH, LENGTH = 7, 4, 24


def trained(*, graphed: bool, parts: int) -> tuple[list[torch.Tensor], list[float], list[str]]:
    """Train a few steps, and return the weights, the losses and the reasons why no graph was captured."""
    student = tiny(num_hidden_layers=3, first_k_dense_replace=3, vocab_size=128).to(DEVICE)
    teacher = build_model("llama", num_hidden_layers=3).to(DEVICE)
    assert all([attend_to_whole_sequences(student), attend_to_whole_sequences(teacher)])
    distiller = Distiller(student, teacher, kl=1.0, cross_entropy=0.1, hidden=0.0, temperature=1.0)
    refused: list[str] = []
    optimiser = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    accelerator = Accelerator(cpu=DEVICE == "cpu")
    passes = Whole(accelerator, distiller, optimiser, graphs=refused.append if graphed else None)
    generator, losses = torch.Generator().manual_seed(0), list[float]()
    for _ in range(STEPS):
        rows = torch.randint(0, 128, (BATCH, LENGTH), generator=generator).to(DEVICE)
        passes.model.train()
        losses.append(float(passes.gradients(rows, parts)))
        passes.optimiser.step()
        passes.clear()
    return [p.detach().cpu() for p in distiller.parameters()], losses, refused


@pytest.mark.parametrize("parts", [1, 2])
def test_a_graph_trains_as_eager_passes_do(parts: int) -> None:
    expected: Any = trained(graphed=False, parts=1)
    weights, losses, refused = trained(graphed=True, parts=parts)
    assert not refused
    assert losses == pytest.approx(expected[1], rel=1e-4)
    for weight, other in zip(weights, expected[0], strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("largest", [1e-3, 1e3])
def test_gradients_are_clipped_as_by_torch(largest: float) -> None:
    student, teacher = tiny(num_hidden_layers=3, first_k_dense_replace=3, vocab_size=128), build_model("llama")
    distiller = Distiller(student, teacher, kl=1.0, cross_entropy=0.1, hidden=0.0, temperature=1.0)
    passes = Whole(Accelerator(cpu=True), distiller, torch.optim.AdamW(distiller.parameters()))
    passes.gradients(torch.arange(64).view(2, 32), 1)
    parameters = [p for p in distiller.parameters() if p.grad is not None]
    expected = [p.grad.clone().requires_grad_() for p in parameters]
    for gradient in expected:
        gradient.grad = gradient.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(expected, largest)
    torch.testing.assert_close(passes.clip(largest), norm)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient.grad)
