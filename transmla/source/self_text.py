"""Sample calibration text from the source model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmla.errors import TransmlaError
from transmla.source.load import eval_mode


@torch.inference_mode()
def sample_self(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int,
    length: int,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample token sequences from the model's distribution, at temperature 1, without top-k or top-p.

    A sequence is a start token and ``length`` - 1 samples. The start token is BOS, or else EOS or padding. Sampling
    continues after EOS. A batch depends only on the seed, its index and its number of sequences. The global random
    state does not change.

    Args:
        model: causal LM to sample from; its training flags are restored afterwards.
        tokenizer: the model's tokenizer.
        sequences: number of sequences.
        length: tokens in a sequence.
        seed: seed of the samples.
        batch_size: sequences that are sampled together.
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
    starts = (
        tokenizer.bos_token_id,
        model.config.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise TransmlaError("the tokenizer has no BOS, EOS or padding token to start a sample from")
    blocks = []
    with eval_mode(model):
        for index, first in enumerate(range(0, sequences, batch_size)):
            rows = min(batch_size, sequences - first)
            generator = torch.Generator(model.device).manual_seed(seed * 1_000_003 + index)
            blocks.append(_sample_batch(model, start, rows, length, generator))
            if progress:
                progress(first + rows, sequences)
    return torch.cat(blocks)


def _sample_batch(model: PreTrainedModel, start: int, rows: int, length: int, generator: torch.Generator) -> Tensor:
    from transmla.modeling.transformers_api import CACHE_ARGUMENT

    # Not model.generate, which adds the checkpoint's generation settings (top_k, penalties) to the given ones.
    tokens = torch.full((rows, length), start, dtype=torch.int64, device=model.device)
    cache = None
    for position in range(1, length):
        output = model(tokens[:, position - 1 : position], use_cache=True, **{CACHE_ARGUMENT: cache})
        cache = output[CACHE_ARGUMENT]
        probabilities = output.logits[:, -1].float().softmax(dim=-1).to(model.device)
        tokens[:, position] = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return tokens.cpu()
