"""Hidden states stay on a GPU that has the memory for them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from transmla.convert.layers import STREAM_COPIES
from transmla.convert.prepare import AMOUNTS
from transmla.convert.streams import Streams
from transmla.plan.estimate import fit_bytes
from transmla.plan.fit_settings import FITS
from transmla.source.describe import describe

GPU = torch.device("cuda")


@pytest.mark.parametrize(("free", "moved"), [(4 * 240 + 100, True), (4 * 240 + 99, False)])
def test_streams_move_if_copies_and_fit_have_room(free: int, moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1000))
    monkeypatch.setattr(Streams, "map", lambda self, change: "moved")
    stream = torch.zeros(2, 3, 5)
    streams = Streams(stream, converted=stream)
    assert streams.nearest(GPU, 4, 100) == ("moved" if moved else streams)
    assert emptied == [True]
    assert streams.nearest(torch.device("cpu"), 4, 100) is streams


def test_a_model_of_1_5_billion_weights_stays_on_a_gpu_of_80_gb() -> None:
    """With streams in the computer's memory, half of the time of its conversion went to copies (one H200)."""
    widths = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}
    spec = describe(AutoConfig.for_model("qwen2", vocab_size=151936, **widths, **heads))
    sequences, length = AMOUNTS["cuda"]
    streams = 2 * 4 * sequences * length * spec.hidden_size
    assert STREAM_COPIES * streams + fit_bytes(spec, 0, length, FITS["full"]) < 0.9 * 80e9


def test_streams_that_are_one_tensor_are_moved_once() -> None:
    stream = torch.zeros(2, 3, 5)
    calls: list[torch.Tensor] = []

    def change(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        return tensor + 1

    changed = Streams(stream, converted=stream, ahead={1: {"latent": torch.ones(4)}}).map(change)
    assert changed.source is changed.converted
    assert len(calls) == 2
    assert torch.equal(changed.ahead[1]["latent"], torch.full((4,), 2.0))
