"""A tokenizer that encodes every text, byte by byte or with the words of the texts that it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"


def byte_tokenizer(
    texts: Sequence[str] = (), *, bos: bool = True, template: str | None = None, **options: Any
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer.

    Args:
        texts: texts whose words become tokens.
        bos: whether every text starts with BOS.
        template: chat template.
        options: further arguments of the tokenizer.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, *texts], trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", **options)
    tokenizer.chat_template = template
    return tokenizer
