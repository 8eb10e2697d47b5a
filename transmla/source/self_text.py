"""Sample text from the source model: continuations of given openings, or whole texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmla.errors import TransmlaError
from transmla.modeling.sdpa import without_cudnn
from transmla.source.load import eval_mode

# A sample is repetitive if fewer than this share of its runs of GRAM tokens are different.
DISTINCT, GRAM = 0.5, 4
# Base in which the tokens of a run are digits.
BASE = 6364136223846793005
# Samples drawn in addition, as a share, to replace repetitive ones.
SPARE = 0.1


@torch.inference_mode()
def sample_self(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int,
    length: int,
    seed: int = 0,
    batch_size: int = 32,
    openings: Sequence[Sequence[int]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample token sequences from the model's distribution, at temperature 1, without top-k or top-p.

    A sequence is an opening and samples that continue it; ``openings`` are taken in turn. Without openings, a sequence
    begins with a start token: BOS, or else EOS or padding. Sampling continues after EOS. A batch depends only on the
    seed, its index and its number of sequences. The global random state does not change.

    Args:
        model: causal LM to sample from; its training flags are restored afterwards.
        tokenizer: the model's tokenizer.
        sequences: number of sequences.
        length: tokens in a sequence.
        seed: seed of the samples.
        batch_size: sequences that are sampled together.
        openings: token ids that sequences begin with; longer ones are cut to half the length.
        progress: called after each batch with the number of sequences done and the number of all sequences.

    Returns:
        Token ids [sequences, length], int64, on the CPU.

    Raises:
        TransmlaError: if a number is below 1, or if the tokenizer has no token that can start a text.
    """
    if sequences < 1 or length < 1 or batch_size < 1:
        raise TransmlaError(
            f"{sequences} sequences of {length} tokens in batches of {batch_size}", limit="all must be at least 1"
        )
    if not openings:
        openings = [[_start(model, tokenizer)]]
    blocks = []
    with eval_mode(model), without_cudnn():
        for index, first in enumerate(range(0, sequences, batch_size)):
            rows = min(batch_size, sequences - first)
            generator = torch.Generator(model.device).manual_seed(seed * 1_000_003 + index)
            begin = [openings[(first + row) % len(openings)] for row in range(rows)]
            blocks.append(_sample_batch(model, begin, length, generator))
            if progress:
                progress(first + rows, sequences)
    return torch.cat(blocks)


def _start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that a sample without an opening starts with."""
    starts = (
        tokenizer.bos_token_id,
        model.config.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise TransmlaError("the tokenizer has no BOS, EOS or padding token to start a sample from")
    return int(start)


def _sample_batch(
    model: PreTrainedModel, openings: Sequence[Sequence[int]], length: int, generator: torch.Generator
) -> Tensor:
    """Return rows [len(openings), length] that continue the openings.

    Raises:
        TransmlaError: if the model's logits are NaN or infinite.
    """
    from transmla.modeling.transformers_api import CACHE_ARGUMENT

    # Not model.generate, which adds the checkpoint's generation settings (top_k, penalties) to the given ones.
    tokens = torch.zeros(len(openings), length, dtype=torch.int64)
    given = torch.zeros(len(openings), length, dtype=torch.bool)
    for row, opening in enumerate(openings):
        part = torch.tensor(opening[: max(1, length // 2)])
        tokens[row, : len(part)], given[row, : len(part)] = part, True
    # Every opening is given up to this position, so the model reads it in one pass.
    begin = int(given.sum(1).min())
    tokens, given = tokens.to(model.device), given.to(model.device)
    cache, read = None, 0
    finite = torch.ones((), dtype=torch.bool, device=model.device)
    for position in range(begin, length):
        output = model(tokens[:, read:position], use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        cache, read = output[CACHE_ARGUMENT], position
        probabilities = output.logits[:, -1].float().softmax(dim=-1).to(model.device)
        valid = probabilities.isfinite()
        finite &= valid.all()
        # On a GPU, an invalid probability would end the process.
        probabilities = torch.where(valid, probabilities, 1.0)
        sampled = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        tokens[:, position] = torch.where(given[:, position], tokens[:, position], sampled)
    if not bool(finite):
        raise TransmlaError(
            "the model's logits are NaN or infinite while it writes text",
            limit="weights, or numbers that follow from them, overflow",
            remedy="check that weights and config belong together",
        )
    return tokens.cpu()


def without_repetition(rows: Tensor, count: int) -> Tensor:
    """Return the ``count`` rows that repeat themselves least, in order.

    Rows in which at least ``DISTINCT`` of the runs of ``GRAM`` tokens differ are all equally good; the first are taken.

    Args:
        rows: sampled sequences [N, length], N at least ``count``.
        count: number of rows to return.
    """
    if rows.shape[1] <= GRAM:
        return rows[:count]
    shares = _distinct(rows).clamp_max(DISTINCT)
    chosen = torch.sort(shares, descending=True, stable=True).indices[:count]
    return rows[chosen.sort().values]


def _distinct(rows: Tensor) -> Tensor:
    """Return the share [N] of different runs of ``GRAM`` tokens in each row [N, length].

    A run is one number: its tokens are the digits of a base that is a large odd number, modulo 2^64. Two different runs
    of a row have the same number with a probability of about 1e-14.
    """
    runs = torch.zeros_like(rows[:, GRAM - 1 :])
    for token in rows.unfold(1, GRAM, 1).unbind(-1):
        runs = runs * BASE + token
    ordered = runs.sort(dim=1).values
    return (1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)) / runs.shape[1]
