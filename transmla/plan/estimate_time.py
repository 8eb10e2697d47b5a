"""Estimate the time of a conversion and of its healing, from the rates of the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from transmla.artifacts import AttentionSpec, Plan, value_bytes
from transmla.core.methods.base import method_named
from transmla.plan.estimate import projections
from transmla.plan.fit_settings import SHORT, WHOLE_EVERY, FitSettings, parts_of_step

# Bytes per token and channel that a step of a fit moves on a GPU outside its matrix products and attention: what one
# H200 needed beyond these was 1,500 to 2,200 (SmolLM2-135M, Qwen2.5-Coder-0.5B, and a model twice as wide). A forward
# pass alone moves a quarter. On a CPU, matrix products take most of the time.
CHANNEL_BYTES = 1700
# Attention's share of the rate of matrix products: its deterministic kernels reached 147 to 170 TFLOP/s on an H200.
ATTENTION_SHARE = 0.35
# How many times slower attention is through a mask (windows, softcaps): what Gemma-3-270M took on an H200.
MASKED = 7.0
# Passes of attention in a step of a fit: of the source, of the export, and a backward pass.
STEP_PASSES = 4.5
# Passes of the calibration text through a layer while it is measured: those of source and export, and the errors.
PASSES = 2.5
# Seconds that the host of a GPU needs to measure a layer on one step of the text, and tokens in such a step at least.
OBSERVING_SECONDS, TOKENS_PER_STEP = 7e-3, 4096
# Seconds that a GPU's host needs for one expert of a layer, on one step of the text; and seconds for each byte of a
# layer that is read, checked, hashed and written. From layers of Qwen3-30B-A3B, Mixtral-8x7B and gpt-oss-20b; an H200.
EXPERT_SECONDS, BYTE_SECONDS = 2.5e-4, 2.6e-9
# Time of the pass that measures what sizes of the cache cost, in conversions in closed form (SmolLM2-135M on one thread
# of a CPU: four); trial conversions at most.
MEASURING_PASSES, TRIALS = 4.0, 3
# Of a healing: share of the rate of matrix products, bytes moved for each logit, seconds that the host takes for a step
# of one layer, and seconds for compilation, evaluation and saving.
HEALING_SHARE, LOGIT_BYTES, HOST_SECONDS, AROUND_HEALING = 0.9, 50, 2.6e-3, 25.0
# Share of each part's time on one GPU that several GPUs do not divide: work that each of them repeats, and exchanges.
# From two GPUs beside one. Observing and fitting: 3.08 and 1.99 s, 21.48 and 12.53 s for a layer of Llama-3-8B's sizes
# (docs/scale.md). Healing: 78 and 132 thousand tokens a second, and with FSDP2, measured with the small SmolLM2-135M
# only, 214 and 240 thousand (docs/healing.md).
OBSERVING_UNDIVIDED, FITTING_UNDIVIDED, HEALING_UNDIVIDED, SHARDED_UNDIVIDED = 0.29, 0.17, 0.18, 0.78


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        device: type of the device, cpu or cuda.
        matrix: floating-point operations of matrix products in the precision of a conversion.
        exact: the same in float64.
        memory: bytes read and written by a copy.
    """

    device: str
    matrix: float
    exact: float
    memory: float


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the rates of ``device`` in a fraction of a second; ``dtype`` is the precision of a conversion."""
    gpu = device.type == "cuda"
    size, values = (8192, 2**28) if gpu else (1024, 2**23)
    # Zeros take less power than other numbers, and a GPU multiplies them faster.
    big = torch.randn(size, size, device=device).to(dtype)
    exact = torch.randn(1024, 1024, dtype=torch.float64, device=device)
    copied = torch.zeros(values, device=device)
    return Rates(
        device.type,
        2 * size**3 / _fastest(lambda: big @ big, device),
        2 * 1024**3 / _fastest(lambda: exact @ exact, device),
        2 * copied.nbytes / _fastest(copied.clone, device),
    )


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of four calls of ``run``."""
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def divided(seconds: float, parts: float, undivided: float) -> float:
    """Return the time of work that several GPUs share, in seconds.

    Args:
        seconds: its time on one GPU.
        parts: number of equal parts, which GPUs compute at the same time.
        undivided: share of ``seconds`` that does not fall with the number of parts.
    """
    return seconds * (undivided + (1 - undivided) / parts)


def conversion_seconds(
    plan: Plan, sequences: int, length: int, fit: FitSettings | None, rates: Rates, processes: int = 1
) -> float:
    """Return the estimated time of all layers in seconds.

    Several processes divide observing and fitting. Every process reads and factorises each layer, and the first writes.

    Texts, samples and signatures are not counted. With rates assumed for an H200, the estimates of seven models are
    within 35 % of what one took (``tests/plan/test_estimate_time.py``).

    Args:
        plan: the conversion's plan.
        sequences: number of calibration sequences.
        length: tokens in each of them.
        fit: settings of the fit; None if layers are not fitted.
        rates: rates of the device of one process.
        processes: number of processes, each with a GPU of its own.
    """
    gpus = _gpus(processes, rates)
    spec, tokens = plan.spec, sequences * length
    attention, mlp = projections(spec), 3 * spec.hidden_size * spec.intermediate_size
    if spec.experts_per_token:
        mlp = spec.layer_parameters * spec.experts_per_token // spec.experts
    passes = PASSES + (method_named(plan.method).first_pass is not None)
    products = 2 * passes * tokens * (attention + mlp) + 2 * tokens * 2 * spec.features**2
    scores = passes * tokens * _attention(spec, length)
    observe = _pass_seconds(products, scores, passes * tokens * spec.hidden_size / 4, rates)
    if rates.device == "cuda":
        steps = tokens / max(TOKENS_PER_STEP, length)
        observe += steps * (OBSERVING_SECONDS + passes * spec.experts * EXPERT_SECONDS)
    # The process with the most sequences ends last.
    layer = divided(observe, sequences / -(-sequences // gpus), OBSERVING_UNDIVIDED)
    if fit is not None:
        # A step is a forward pass of the source, and a forward and a backward pass of the export. A backward pass costs
        # as much as two forward passes; through the MLP, whose weights are frozen, as much as one.
        for steps, row in _steps(fit, length):
            moved = fit.window * steps * max(row, fit.tokens // row * row)
            products = 2 * moved * (5 * attention + (3 * mlp if fit.through_mlp else 0))
            scores = STEP_PASSES * moved * _attention(spec, row)
            seconds = _pass_seconds(products, scores, moved * spec.hidden_size, rates)
            parts = parts_of_step(gpus, max(1, fit.tokens // row), row, spec.num_attention_heads)
            layer += divided(seconds, parts, FITTING_UNDIVIDED)
    heads = spec.num_attention_heads + spec.num_key_value_heads
    factor = 30 * spec.features**3 + 8 * spec.features**2 * spec.head_dim * heads
    layer += factor / rates.exact + BYTE_SECONDS * value_bytes(plan.dtype) * (attention + spec.layer_parameters)
    return spec.num_hidden_layers * layer


def choosing_seconds(closed: float, fitted: float) -> float:
    """Return the longest estimated time of the choice of a cache by an accepted loss, in seconds.

    One process chooses, while the others wait.

    Args:
        closed: time of a conversion in closed form by one process, in seconds.
        fitted: time of the conversion that is run, by one process, in seconds; a trial takes as long.
    """
    return MEASURING_PASSES * closed + TRIALS * fitted


def healing_seconds(
    weights: int,
    spec: AttentionSpec,
    tokens: int,
    batch: int,
    rates: Rates,
    processes: int = 1,
    *,
    sharded: bool = False,
) -> float:
    """Return the estimated time of a healing in seconds.

    Args:
        weights: weights of the export.
        spec: the source's attention.
        tokens: tokens that it is healed on.
        batch: tokens of one step, over all processes.
        rates: rates of the device of one process.
        processes: number of processes, each with a GPU of its own.
        sharded: whether the processes divide the student's weights (FSDP2).
    """
    # Six operations for each weight and token, and two of the teacher.
    step = 8 * weights * batch / (HEALING_SHARE * rates.matrix) + batch * spec.vocab_size * LOGIT_BYTES / rates.memory
    step = divided(step, _gpus(processes, rates), SHARDED_UNDIVIDED if sharded else HEALING_UNDIVIDED)
    return tokens / batch * max(step, spec.num_hidden_layers * HOST_SECONDS) + AROUND_HEALING


def _gpus(processes: int, rates: Rates) -> int:
    """Return how many processes work at full speed at the same time: those on one CPU share its cores."""
    return processes if rates.device == "cuda" else 1


def _pass_seconds(products: float, scores: float, channels: float, rates: Rates) -> float:
    """Return the seconds of passes through a layer.

    Args:
        products: operations of matrix products.
        scores: operations of attention.
        channels: tokens times channels that are moved.
        rates: rates of the device.
    """
    seconds = products / rates.matrix + scores / (ATTENTION_SHARE * rates.matrix)
    return seconds + (channels * CHANNEL_BYTES / rates.memory if rates.device == "cuda" else 0)


def _steps(fit: FitSettings, length: int) -> list[tuple[float, int]]:
    """Return the number of steps of each kind, and the tokens in one of its rows."""
    if length < 2 * SHORT:
        return [(fit.steps, length)]
    return [(fit.steps / WHOLE_EVERY, length), (fit.steps * (1 - 1 / WHOLE_EVERY), SHORT)]


def _attention(spec: AttentionSpec, length: int) -> float:
    """Return the operations of one token's attention in rows of ``length`` tokens, on average over the layers."""
    keys = 0.0
    for kind in (spec.kind(i) for i in range(spec.num_hidden_layers)):
        masked = kind.window is not None or kind.softcap is not None
        keys += MASKED * min(2 * (kind.window or length), length) if masked else length / 2
    return 4 * spec.num_attention_heads * spec.head_dim * keys / spec.num_hidden_layers
