"""A draft head of the EAGLE-3 kind: its layers, its training loss, and decoding with it.

Li et al., "EAGLE-3", arXiv 2503.01840. The head reads hidden states of a low, a middle and a high layer of a target
model, and drafts a chain of tokens one by one. The target then verifies the chain in one step. Differences from the
paper: the draft is a chain instead of a tree, and hidden states and embeddings are normalised before the projections.

Shapes: B sequences, T tokens, n new tokens, d the hidden width, v the size of the draft vocabulary.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from transmla.modeling.transformers_api import CACHE_ARGUMENT

# Fields of the target's config that give the head's decoder layer its shape.
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
)
# Weight of a step's loss, relative to the step before.
DECAY = 0.8


def read_layers(layers: int) -> tuple[int, int, int]:
    """Return which hidden states of a model with so many ``layers`` the head reads; state i is behind layer i."""
    return min(2, layers // 3), layers // 2, max(layers - 3, 2 * layers // 3)


def read_states(model: Any, hidden_states: tuple[Tensor, ...]) -> Tensor:
    """Return the states [B, n, 3, d] that the head reads, from all ``hidden_states`` of ``model``."""
    return torch.stack([hidden_states[i] for i in read_layers(model.config.num_hidden_layers)], 2)


class DraftHead(LlamaPreTrainedModel):
    """Projections of hidden states and embeddings, one Llama decoder layer, and a norm.

    Attributes:
        vocabulary: token ids that the head can draft, [v].
    """

    def __init__(self, config: LlamaConfig) -> None:
        """Build a head with random weights; ``config.draft_vocabulary`` is v."""
        super().__init__(config)
        width = config.hidden_size
        self.state_norms = nn.ModuleList(LlamaRMSNorm(width, config.rms_norm_eps) for _ in range(3))
        self.fuse = nn.Linear(3 * width, width, bias=False)
        self.feature_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.embedding_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.combine = nn.Linear(2 * width, width, bias=False)
        self.layer = LlamaDecoderLayer(config, 0)
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(config)
        self.register_buffer("vocabulary", torch.zeros(config.draft_vocabulary, dtype=torch.int64))
        self.post_init()

    def fused(self, states: Tensor) -> Tensor:
        """Return features [B, n, d] of the target's ``states`` [B, n, 3, d]."""
        parts = [norm(state) for norm, state in zip(self.state_norms, states.unbind(2), strict=True)]
        return self.fuse(torch.cat(parts, -1))

    def forward(self, features: Tensor, embeddings: Tensor, cache: Any, mask: Tensor, first: int) -> Tensor:
        """Return the features that follow.

        Args:
            features: features of n tokens, [B, n, d]: fused states, or what the head returned for the token before.
            embeddings: embeddings of the tokens that follow them, [B, n, d].
            cache: cache of the head's layer; receives n rows.
            mask: whether a row of the cache may be attended to, boolean [1, 1, n, rows].
            first: position of the first of the n tokens.
        """
        joined = torch.cat([self.feature_norm(features), self.embedding_norm(embeddings)], -1)
        positions = torch.arange(first, first + features.shape[1], device=features.device)[None]
        turned = self.rotary(joined, positions)
        arguments = {"attention_mask": mask, "position_ids": positions, "position_embeddings": turned}
        return self.layer(self.combine(joined), **arguments, **{CACHE_ARGUMENT: cache})


def new_head(config: Any, vocabulary: Tensor) -> DraftHead:
    """Return a random head for a target with ``config`` that drafts tokens of ``vocabulary`` [v]."""
    shape = {name: getattr(config, name) for name in SHAPE}
    head = DraftHead(LlamaConfig(**shape, draft_vocabulary=len(vocabulary), attn_implementation="sdpa"))
    head.vocabulary.copy_(vocabulary)
    return head


class Drafter:
    """A head with the embeddings and the output rows of its target.

    Attributes:
        head: the head.
        embed: the target's embeddings.
        rows: rows of the target's output matrix for the draft vocabulary, [v, d].
    """

    def __init__(self, head: DraftHead, target: Any) -> None:
        self.head, self.embed = head, target.get_input_embeddings()
        self.rows = target.get_output_embeddings().weight.detach()[head.vocabulary]

    def extend(self, features: Tensor, tokens: Tensor, cache: DynamicCache) -> Tensor:
        """Return the features [1, n, d] that follow ``features`` [1, n, d] and the next ``tokens`` [1, n]."""
        new, cached = tokens.shape[1], cache.get_seq_length()
        mask = torch.ones(new, cached + new, dtype=torch.bool, device=tokens.device).tril(cached)
        return self.head(features, self.embed(tokens), cache, mask[None, None], cached)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [.., v] of the draft vocabulary for ``features`` [.., d]."""
        return self.head.norm(features) @ self.rows.T

    def draft(self, feature: Tensor, count: int, cache: DynamicCache) -> Tensor:
        """Return a chain of ``count`` tokens [count]. ``cache`` does not change.

        Args:
            feature: the last feature that ``extend`` returned, [1, 1, d].
            count: number of tokens.
            cache: cache of the head.
        """
        chain: list[Tensor] = []
        for _ in range(count):
            if chain:
                feature = self.extend(feature, chain[-1][None], cache)
            chain.append(self.head.vocabulary[self.logits(feature)[:, -1].argmax(-1)])
        cache.crop(1 - max(1, count))
        return torch.cat(chain) if chain else torch.zeros(0, dtype=torch.int64, device=feature.device)


def unrolled_loss(drafter: Drafter, states: Tensor, last: Tensor, tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the training loss, and how often each step's draft is the target's best token of the draft vocabulary.

    As in decoding, step 0 reads the target's states, and step i reads what step i - 1 returned for the token before
    (the paper's training-time test). The loss is the cross-entropy to the target's distribution.

    Args:
        drafter: the head with its target.
        states: the target's states, [B, T, 3, d].
        last: what the target's output matrix reads, [B, T, d].
        tokens: tokens, [B, T].
        steps: number of steps.

    Returns:
        Loss, and agreement [steps].
    """
    embeddings, features = drafter.embed(tokens[:, 1:]), drafter.head.fused(states[:, :-1])
    targets = (last[:, 1:] @ drafter.rows.T).softmax(-1)
    length = features.shape[1]
    distance = torch.arange(length, device=tokens.device)[:, None] - torch.arange(length, device=tokens.device)
    cache, loss, agreement = DynamicCache(), features.new_zeros(()), []
    for step in range(steps):
        # A token sees step 0 up to the place where its chain began, and in each later step the chain's own token.
        seen = [distance >= step] + [distance == step - other for other in range(1, step + 1)]
        features = drafter.head(features, embeddings, cache, torch.cat(seen, 1)[None, None], 0)
        # The first tokens have no chain of this length.
        logits, wanted = drafter.logits(features[:, step:]), targets[:, step:]
        loss = loss - DECAY**step * (wanted * logits.log_softmax(-1)).sum(-1).mean()
        agreement.append((logits.detach().argmax(-1) == wanted.argmax(-1)).float().mean())
        features = torch.cat([torch.zeros_like(features[:, :1]), features[:, :-1]], 1)
    return loss, torch.stack(agreement)


@torch.no_grad()
def write_drafted(
    model: Any, prompt: Tensor, tokens: int, *, drafter: Drafter, drafted: int
) -> tuple[Tensor, int, float]:
    """Decode greedily with verified drafts.

    Args:
        model: the target.
        prompt: tokens [1, T].
        tokens: largest number of new tokens. Decoding ends sooner behind a token that ends the text.
        drafter: the head, with ``model`` as its target.
        drafted: tokens of a draft; 0 decodes plainly.

    Returns:
        New tokens [n], steps of the target after the prompt's, and their seconds (see ``_now``).
    """
    ends, cache, drafts = _ends(model), DynamicCache(config=model.config), DynamicCache()
    given: dict[str, Any] = {"use_cache": True, "output_hidden_states": drafted > 0, CACHE_ARGUMENT: cache}
    output = model(prompt, logits_to_keep=1, **given)
    new = output.logits[0].argmax(-1)
    start, steps, feature = _now(model), 0, None
    known = prompt[0, 1:]
    while len(new) < tokens and int(new[-1]) not in ends:
        count = min(drafted, tokens - len(new) - 1)
        chain = new[:0]
        if drafted:
            # ``known`` are the tokens since the last step that the target has read, and ``new[-1]`` follows them.
            features = drafter.head.fused(read_states(model, output.hidden_states)[:, : len(known) + 1])
            feature = drafter.extend(features, torch.cat([known, new[-1:]])[None], drafts)[:, -1:]
            chain = drafter.draft(feature, count, drafts)
        output = model(torch.cat([new[-1:], chain])[None], **given)
        best, steps = output.logits[0].argmax(-1), steps + 1
        accepted = int((best[:-1] == chain).cumprod(0).sum())
        known = best[:accepted]
        cache.crop(accepted - len(chain))
        for token in best[: accepted + 1]:
            new = torch.cat([new, token[None]])
            if int(token) in ends:
                break
    return new, steps, _now(model) - start


def _ends(model: Any) -> set[int]:
    """Return the tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _now(model: Any) -> float:
    """Return the time in seconds when the device of ``model`` has finished its work.

    On a CPU, return the time that this process has computed, which other programs change little.
    """
    if model.device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
