"""Sample calibration text from a model itself."""

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
    """Texts drawn from the model's own distribution: temperature 1, nothing cut off, EOS a token like others.

    Every row is the start token (BOS; EOS or padding where there is none) and `length - 1` samples. A batch
    depends on (seed, its index, its rows) alone, and no global random state is touched. `progress` gets
    (sequences done, sequences) after each batch. Returns int64 [sequences, length] on the CPU.
    Raises TransmlaError when nothing can start a text.
    """
    if sequences < 1 or length < 1 or batch_size < 1:
        raise TransmlaError(
            f"{sequences} sequences of {length} tokens in batches of {batch_size}", limit="all at least 1"
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

    # Not model.generate: it merges the checkpoint's own settings (top_k, penalties) into any it is given.
    tokens = torch.full((rows, length), start, dtype=torch.int64, device=model.device)
    cache = None
    for position in range(1, length):
        output = model(tokens[:, position - 1 : position], use_cache=True, **{CACHE_ARGUMENT: cache})
        cache = output[CACHE_ARGUMENT]
        probabilities = output.logits[:, -1].float().softmax(dim=-1).to(model.device)
        tokens[:, position] = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return tokens.cpu()
