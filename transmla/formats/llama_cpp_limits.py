"""Which native exports llama.cpp computes, read from their config or plan without llama.cpp.

The limits are those of llama.cpp's ``deepseek2`` graph, seen through xllamacpp.
"""

from __future__ import annotations

from transmla.errors import TransmlaError

# Numbers of layers of DeepSeek-V2-Lite and others. llama.cpp takes a file with one of them as such a model, and ignores
# that its queries are compressed.
LITE_DEPTHS = (26, 27, 48)


def llama_cpp_refusal(rope_type: str, activation: str, q_lora_rank: int | None, layers: int) -> TransmlaError | None:
    """Return why llama.cpp does not compute what a native export's config says; None if it does.

    Args:
        rope_type: type of the rotary frequencies.
        activation: activation function of the MLPs.
        q_lora_rank: rank of compressed queries, or None.
        layers: number of layers.
    """
    if rope_type != "default":
        return TransmlaError(
            f"llama.cpp cannot run rope_type '{rope_type}' in a DeepSeek model",
            limit="it computes the rotary frequencies from rope_theta alone",
            remedy="use the export with transformers",
        )
    if activation != "silu":
        return TransmlaError(
            f"llama.cpp cannot run a DeepSeek model with hidden_act '{activation}'",
            limit="its MLPs use silu",
            remedy="use the export with transformers",
        )
    if q_lora_rank and layers in LITE_DEPTHS:
        return TransmlaError(
            f"llama.cpp cannot run compressed queries in {layers} layers",
            limit="it takes a model of this depth as DeepSeek-V2-Lite, whose queries are not compressed",
            remedy="convert without q_lora_rank",
        )
    return None
