"""How often a model finds a pass key in a long text, by length of the text and depth of the key."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.evaluate.open_model import context_of, for_each_model
from transmla.evaluate.retrieval_prompts import PAIRS, Prompt, PromptWriter
from transmla.evaluate.settings import RetrievalSettings
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.reporter import Reporter
from transmla.source.device import pick_device
from transmla.source.load import eval_mode
from transmla.source.locate import resolve_source

# Lengths that are measured by default, in tokens, where the context allows.
LENGTHS = (1024, 2048, 4096)
# Prompt tokens in one batch: few enough for the attention scores of a small GPU.
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Cell:
    """Answers of one model to the prompts of one kind, length and depth.

    Attributes:
        kind: a key of ``PAIRS``.
        length: tokens of prompt and answer.
        depth: position of the pass key in the text, from 0 to 1.
        correct: prompts that the model continued with all digits.
        prompts: number of prompts.
    """

    kind: str
    length: int
    depth: float
    correct: int
    prompts: int


@dataclass(frozen=True)
class Rate:
    """Share of correct answers, with the standard error of a mean of independent prompts."""

    correct: int
    prompts: int

    @property
    def value(self) -> float:
        """Share of correct answers."""
        return self.correct / self.prompts

    @property
    def stderr(self) -> float | None:
        """Standard error of ``value``; None for a single prompt."""
        return math.sqrt(self.value * (1 - self.value) / (self.prompts - 1)) if self.prompts > 1 else None

    def to_dict(self) -> dict[str, float | None]:
        """Return plain values for JSON."""
        return {"value": self.value, "stderr": self.stderr}


@dataclass(frozen=True)
class RetrievalRow:
    """The rates at one kind and length, over all depths; None for a model that was not measured there.

    Attributes:
        kind: a key of ``PAIRS``.
        length: tokens of prompt and answer.
        model: rate of the model.
        baseline: rate of the baseline.
    """

    kind: str
    length: int
    model: Rate | None
    baseline: Rate | None

    @property
    def kept(self) -> float | None:
        """The model's rate divided by the baseline's; None if one is missing or the baseline's is 0."""
        if self.model is None or self.baseline is None or self.baseline.correct == 0:
            return None
        return self.model.value / self.baseline.value


@dataclass(frozen=True)
class Retrieval:
    """Result of ``evaluate_retrieval``.

    Attributes:
        model: name of the model.
        baseline: name of the baseline, or None.
        depths: depths of the pass key, from 0 to 1.
        samples: prompts per kind, length and depth.
        seed: seed of the prompts.
        cells: the answers under "model" and, if given, "baseline", except at lengths that did not fit into memory.
        seconds: time of the evaluation, loading included.
    """

    model: str
    baseline: str | None
    depths: tuple[float, ...]
    samples: int
    seed: int
    cells: dict[str, tuple[Cell, ...]]
    seconds: float

    @property
    def lengths(self) -> list[int]:
        """Measured lengths in tokens, ascending."""
        return sorted({cell.length for cells in self.cells.values() for cell in cells})

    def rows(self) -> list[RetrievalRow]:
        """Return one row per kind and length."""
        return [
            RetrievalRow(kind, length, self._rate("model", kind, length), self._rate("baseline", kind, length))
            for kind in PAIRS
            for length in self.lengths
        ]

    def _rate(self, role: str, kind: str, length: int) -> Rate | None:
        cells = [cell for cell in self.cells.get(role, ()) if (cell.kind, cell.length) == (kind, length)]
        return Rate(sum(c.correct for c in cells), sum(c.prompts for c in cells)) if cells else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        rows = [
            {
                "kind": row.kind,
                "length": row.length,
                "model": row.model and row.model.to_dict(),
                "baseline": row.baseline and row.baseline.to_dict(),
                "kept": row.kept,
            }
            for row in self.rows()
        ]
        return asdict(self) | {"rows": rows}


def choose_lengths(model: str, baseline: str | None, settings: RetrievalSettings) -> tuple[int, ...]:
    """Return the lengths to measure, ascending, after reading the models' configs and before loading weights.

    Raises:
        TransmlaError: if a length exceeds a context, no default length fits, or a config cannot be read.
    """
    names = [model] if baseline is None else [model, baseline]
    contexts = {name: context_of(resolve_source(name)) for name in names}
    known = {name: context for name, context in contexts.items() if context is not None}
    shortest = min(known, key=known.__getitem__) if known else model
    most = known.get(shortest)
    wanted = settings.retrieval_length or [n for n in LENGTHS if most is None or n <= most] or LENGTHS[:1]
    if most is not None and max(wanted) > most:
        raise TransmlaError(
            f"a retrieval length of {max(wanted)} tokens is longer than the context of '{shortest}'",
            limit=f"max_position_embeddings is {most}",
            remedy=f"choose --retrieval-length up to {most}",
        )
    return tuple(sorted(set(wanted)))


def evaluate_retrieval(
    model: str,
    baseline: str | None,
    settings: RetrievalSettings,
    lengths: Sequence[int],
    *,
    dtype: str = "auto",
    device: str = "auto",
    allow_pickle: bool = False,
    reporter: Reporter,
) -> Retrieval:
    """Measure a model and a baseline on the same grid of prompts. Only one of them is in memory at a time.

    Args:
        model: folder, GGUF file or Hub name.
        baseline: the same for the baseline, or None.
        settings: depths, samples and seed.
        lengths: the result of ``choose_lengths``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: device name, or ``auto``.
        allow_pickle: whether pickled weights may be opened.
        reporter: receives the progress.

    Raises:
        TransmlaError: if a model cannot be loaded, a length is too short for the pairs, or no length fits into memory.
    """
    started, torch_device = time.perf_counter(), pick_device(device)

    def run(loaded: Any, tokenizer: Any, role: str) -> tuple[Cell, ...]:
        return tuple(find_keys(loaded, tokenizer, settings, lengths, name=role, reporter=reporter))

    cells = for_each_model(model, baseline, dtype=dtype, device=torch_device, run=run, allow_pickle=allow_pickle)
    if not all(cells.values()):
        raise TransmlaError(
            "no retrieval prompt fits into the device's memory",
            limit=f"the shortest prompt has {min(lengths)} tokens",
            remedy="choose shorter prompts by --retrieval-length",
        )
    return Retrieval(
        model=model,
        baseline=baseline,
        depths=depths_of(settings.retrieval_depths),
        samples=settings.retrieval_samples,
        seed=settings.retrieval_seed,
        cells=cells,
        seconds=time.perf_counter() - started,
    )


def depths_of(count: int) -> tuple[float, ...]:
    """Return ``count`` depths, evenly spaced from 0 to 1; a single depth is 0.5."""
    return (0.5,) if count == 1 else tuple(i / (count - 1) for i in range(count))


def find_keys(
    model: Any, tokenizer: Any, settings: RetrievalSettings, lengths: Sequence[int], *, name: str, reporter: Reporter
) -> Iterator[Cell]:
    """Yield the cells of a loaded model, one after the other.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer.
        settings: depths, samples and seed.
        lengths: tokens of prompt and answer.
        name: role of the model on the progress bar.
        reporter: receives the progress.

    Raises:
        TransmlaError: if a length is too short for the pairs.
    """
    writer = PromptWriter(tokenizer, max(lengths), settings.retrieval_seed)
    depths, samples = depths_of(settings.retrieval_depths), settings.retrieval_samples
    reporter.stage(f"{name}: retrieval", len(PAIRS) * len(lengths) * len(depths) * samples)
    done = 0
    for length in lengths:
        grid = [(kind, depth) for kind in PAIRS for depth in depths]
        prompts = [writer.write(kind, length, depth, i) for kind, depth in grid for i in range(samples)]
        right: list[bool] = []
        size = max(1, BATCH_TOKENS // length)
        with eval_mode(model):
            while len(right) < len(prompts) and size:
                try:
                    right += answer(model, tokenizer, prompts[len(right) : len(right) + size])
                except torch.OutOfMemoryError:
                    size //= 2
                    torch.cuda.empty_cache()
                reporter.advance(done + len(right), f"{length:,} tokens")
        done += len(prompts)
        if not size:
            reporter.message(f"a prompt of {length:,} tokens does not fit into the memory of {model.device}")
            continue
        for i, (kind, depth) in enumerate(grid):
            yield Cell(kind, length, depth, sum(right[i * samples : (i + 1) * samples]), samples)


def answer(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[bool]:
    """Return whether the model continues each prompt with its key. The prompts have equal lengths."""
    tokens = torch.tensor([prompt.tokens for prompt in prompts], device=model.device)
    found = tokenizer.batch_decode(greedy(model, tokens, max(prompt.answer_tokens for prompt in prompts)))
    return [text.strip().startswith(prompt.key) for text, prompt in zip(found, prompts, strict=True)]


@torch.inference_mode()
def greedy(model: Any, tokens: Tensor, steps: int) -> Tensor:
    """Return the most likely continuations [B, steps] of ``tokens`` [B, N], decoded over the model's cache."""
    output = model(tokens, use_cache=True, logits_to_keep=1)
    found = [output.logits[:, -1:].argmax(dim=-1)]
    while len(found) < steps:
        output = model(found[-1], use_cache=True, **{CACHE_ARGUMENT: output[CACHE_ARGUMENT]})
        found.append(output.logits[:, -1:].argmax(dim=-1))
    return torch.cat(found, dim=1)
