"""The kernel that packs rows writes the bytes of the plain code, and compiled code packs the same rows.

Without a GPU, the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from transmla.kernels import pack_rows
from transmla.kernels.pack_rows import pack_into, triton
from transmla.runtime import packed_rows
from transmla.runtime.packed_rows import FLOAT8, LARGEST, LEAST, pack, row_bytes, unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter rounds bfloat16 towards zero.
HALF = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]


def plain(kv_c: Tensor, k_pe: Tensor) -> Tensor:
    """Pack on the CPU, where no kernel is used."""
    return pack(kv_c.cpu(), k_pe.cpu())


def packed(kv_c: Tensor, k_pe: Tensor) -> Tensor:
    """Pack with the kernel, into memory that holds zeros."""
    rank, width = kv_c.shape[-1], k_pe.shape[-1]
    rows = torch.zeros(*kv_c.shape[:-1], row_bytes(rank, width, k_pe.dtype), dtype=torch.uint8, device=kv_c.device)
    pack_into(unpack(rows, rank, width, k_pe.dtype), kv_c, k_pe, LEAST, LARGEST)
    return rows.cpu()


@pytest.mark.skipif(triton is None, reason="needs triton")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(1, 1, 512, 64), (3, 2, 96, 32), (2, 5, 40, 8), (7, 1, 9, 2), (2, 3, 4, 448, 64)])
def test_the_kernel_writes_the_same_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    *lead, rank, width = shape
    joined = torch.randn(*lead, rank + width) * torch.exp2(torch.randint(-9, 3, (*lead, 1)))
    if DEVICE == "cpu":
        # Triton's interpreter loses carries when it rounds to float8: float8 numbers, of which the largest is 448.
        joined[..., 0] = 448 * 2.0**-9
        joined = joined.mul(2**9).clamp(-448, 448).to(FLOAT8).float() / 2**9
    joined = joined.to(DEVICE, dtype)
    joined[..., 0, :rank] = 0
    kv_c, k_pe = joined.split([rank, width], -1)
    for latents, keys in ((kv_c, k_pe), (kv_c.contiguous(), k_pe.contiguous())):
        rows, expected = packed(latents, keys), plain(latents, keys)
        assert torch.equal(rows, expected) or _apart(rows, expected, rank) <= 0.001


def _apart(rows: Tensor, expected: Tensor, rank: int) -> float:
    """Return the share of different bytes; only float8 numbers may differ, by one unit in their last place."""
    assert torch.equal(rows[..., rank:], expected[..., rank:])
    distance = (rows[..., :rank].int() - expected[..., :rank].int()).abs()
    assert distance.max() <= 1
    return float((distance > 0).float().mean())


@pytest.mark.skipif(triton is None, reason="needs triton")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_latents_stay_broken(value: float) -> None:
    kv_c, k_pe = torch.full((1, 2, 16), LARGEST, device=DEVICE), torch.ones(1, 2, 4, device=DEVICE)
    kv_c[0, 1, 3] = value
    read = unpack(packed(kv_c, k_pe), 16, 4, torch.float32).full()[0]
    assert torch.equal(read[0, 0], torch.full((16,), LARGEST))
    assert not torch.isfinite(read[0, 1, 3])


@pytest.mark.skipif(triton is None, reason="needs triton")
def test_the_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may lie on several GPUs, of which one is the current one."""
    current: list[torch.device] = []

    @contextmanager
    def recorded(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.clear()

    monkeypatch.setattr(packed_rows, "packs", lambda *_: True)
    monkeypatch.setattr(packed_rows, "pack_into", lambda parts, kv_c, *_: seen.append(current == [kv_c.device]))
    monkeypatch.setattr(packed_rows, "current_device", recorded)
    seen: list[bool] = []
    pack(torch.ones(1, 2, 16, device=DEVICE), torch.ones(1, 2, 4, device=DEVICE))
    assert seen == [True]


def maps_views() -> bool:
    """Whether ``torch.vmap`` maps views as another dtype, as newer versions of torch do."""
    try:
        torch.vmap(lambda x: x.view(torch.uint8))(torch.ones(2, 2))
    except RuntimeError:
        return False
    return True


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each launch of the kernel, which does nothing here."""
    numbers: list[int] = []
    monkeypatch.setattr(pack_rows, "on_gpu", lambda x: True)
    monkeypatch.setattr(packed_rows, "pack_into", lambda *_: numbers.append(1))
    return numbers


@pytest.mark.skipif(not maps_views(), reason="this torch does not map views as another dtype")
def test_the_plain_code_packs_mapped_tensors(launched: list[int]) -> None:
    kv_c, k_pe = torch.randn(3, 2, 16, device=DEVICE), torch.randn(3, 2, 4, device=DEVICE)
    mapped = torch.vmap(pack)(kv_c, k_pe)
    assert not launched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_rows, "on_gpu", lambda x: False)
        assert torch.equal(mapped.cpu(), plain(kv_c, k_pe))


def test_the_plain_code_packs_tensors_without_memory(launched: list[int]) -> None:
    kv_c, k_pe = torch.randn(3, 2, 16, device=DEVICE), torch.randn(3, 2, 4, device=DEVICE)
    with FakeTensorMode() as mode:
        pack(mode.from_tensor(kv_c), mode.from_tensor(k_pe))
    assert not launched
    if triton is not None:
        pack(kv_c, k_pe)
        assert launched


@pytest.mark.parametrize("lead", [(4, 1), (1, 3), (2, 1, 1)])
def test_compiled_code_packs_the_same_rows(lead: tuple[int, ...]) -> None:
    """Code before the packing gives its inputs other strides."""

    def step(x: Tensor) -> Tensor:
        y = (x * 2).transpose(0, 1).contiguous().transpose(0, 1)
        return pack(y[..., :40], y[..., 40:])

    x = torch.randn(*lead, 56, device=DEVICE)
    compiled = torch.compile(step, fullgraph=True)(x)
    assert compiled.dtype == torch.uint8
    assert torch.equal(compiled, step(x))
    assert unpack(compiled, 40, 16, torch.float32).kv_c.dtype == FLOAT8
