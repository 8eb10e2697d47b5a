"""Exact rescaling of a native export, so that every type of GGUF can store its weights.

The latent norm of a native export is an identity because the latent is tiny (``core/norm_identity.py``). The rows that
compute the latent are tiny too, about 1e-7. GGUF's block types keep a float16 scale for each block, which would be
zero there. llama.cpp takes the eps of all norms, the latent's included, from one field. So all norms may see larger
inputs under a larger eps, and their outputs stay the same:

- the residual stream and the latents times 2^k: embedding, ``o_proj``, ``down_proj`` and the latent rows times 2^k;
- eps times 4^k.

A second rescaling moves a factor 2^j of each layer from ``input_layernorm`` to the projections that read it. It makes
the latent rows larger, so a smaller k suffices. The residual stream must stay far below float16's largest number,
65,504, because some GPU kernels write matrix products in float16. All factors are powers of two, which change no bit
of a significand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Size of the latent rows: their root mean square is at least this. Q8_0's float16 scale of a block is then about 2^-16,
# which rounds the block's values by 0.1 %. The step of Q8_0 itself is 0.8 %.
ROW_SIZE = 2.0**-11
# Size of an input_layernorm's weight: its root mean square is at most this. llama.cpp stores the products' inputs as
# float16, or as int8 with float16 scales. Inputs of this size are 256 times the smallest normal float16.
NORM_SIZE = 2.0**-6
# Largest weight of a projection that reads an input_layernorm, half of float16's largest number.
LARGEST = 2.0**15
# Largest k. The residual streams of some models reach 1,000; times 2^k this must stay a float32 of ordinary size.
MOST = 24

EMBEDDING = "model.embed_tokens.weight"
NORM = "input_layernorm.weight"
READERS = ("self_attn.q_proj.weight", "self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight")
WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True)
class Scales:
    """Powers of two by which the tensors of a native export are multiplied.

    Attributes:
        rank: width r of the key/value latent.
        residual: k, the exponent of the residual stream and the latents.
        norms: the exponent j of each layer's move out of ``input_layernorm``.
    """

    rank: int
    residual: int
    norms: tuple[int, ...]

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor ``name`` of the export, rescaled, in float32."""
        tensor = tensor.float()
        if name == EMBEDDING:
            return tensor * 2.0**self.residual
        if not name.startswith("model.layers."):
            return tensor
        _, _, layer, part = name.split(".", 3)
        move = self.norms[int(layer)]
        if part == NORM:
            return tensor * 2.0**-move
        if part in WRITERS:
            return tensor * 2.0**self.residual
        if part in READERS:
            latent = latent_rows(part, tensor, self.rank)
            return tensor.mul(2.0**move).index_copy(0, latent, tensor[latent] * 2.0 ** (move + self.residual))
        return tensor

    def eps(self, eps: float) -> float:
        """Return the eps of all norms; ``eps`` is the export's."""
        return eps * 4.0**self.residual


def latent_rows(part: str, tensor: Tensor, rank: int) -> Tensor:
    """Return the indices of the rows of a projection that compute a latent."""
    import torch

    rows = {"self_attn.kv_a_proj_with_mqa.weight": rank, "self_attn.q_a_proj.weight": len(tensor)}
    return torch.arange(rows.get(part, 0))


def choose_scales(layers: int, rank: int, names: set[str], read: Callable[[str], Tensor]) -> Scales:
    """Choose the smallest k that gives all latent rows the size ``ROW_SIZE``, with the largest moves j that are safe.

    An export whose ``input_layernorm`` was already moved, by whatever power of two, gets the same tensors.

    Args:
        layers: number of layers.
        rank: width r of the key/value latent.
        names: names of the export's tensors.
        read: returns the tensor with a given name.
    """
    moves, sizes = [], []
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        norm = _size(read(prefix + NORM))
        readers = {part: read(prefix + part).float() for part in READERS if prefix + part in names}
        room = min(math.floor(math.log2(LARGEST / max(float(t.abs().max()), 1e-30))) for t in readers.values())
        moves.append(min(math.ceil(math.log2(norm / NORM_SIZE)), room) if norm > 0 else 0)
        latents = (tensor[latent_rows(part, tensor, rank)] for part, tensor in readers.items())
        sizes += [_size(rows) * 2.0 ** moves[-1] for rows in latents if rows.any()]
    needed = max((math.ceil(math.log2(ROW_SIZE / size)) for size in sizes), default=0)
    return Scales(rank, min(max(needed, 0), MOST), tuple(moves))


def _size(tensor: Tensor) -> float:
    """Return the root mean square of the values that are not zero, such as those of padding."""
    used = tensor[tensor != 0].double()
    return float(used.square().mean().sqrt()) if used.numel() else 0.0
