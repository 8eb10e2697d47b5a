"""A conversion that the memory does not hold is refused before it begins, with settings that fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.conversions import recipe
from helpers.interrupted import Killed, KilledAtLayer, files

from transmla.convert import memory, pipeline, room
from transmla.convert.memory import memory_shortage
from transmla.convert.pipeline import convert
from transmla.convert.prepare import Prepared, prepare
from transmla.errors import TransmlaError
from transmla.plan.estimate import device_bytes, disk_bytes, memory_bytes
from transmla.plan.fit_settings import fit_settings
from transmla.source import memory as free
from transmla.source.memory import free_memory_of

pytestmark = pytest.mark.usefixtures("single_thread")


def has(monkeypatch: pytest.MonkeyPatch, *, memory_free: float = 1e12, gpu_free: float = 1e12) -> None:
    """Let the computer and the GPU have so many free bytes, and this process hold none."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(memory_free)))
    monkeypatch.setattr(free, "_free_in_cgroups", list)
    monkeypatch.setattr(free, "_free_in_limits", list)
    monkeypatch.setattr(memory, "resident_memory", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(gpu_free), int(gpu_free)))


@pytest.fixture
def prepared(workdir: Path) -> Prepared:
    return prepare(recipe(reconstruct="off"))


def test_streams_on_the_disk_give_the_same_bytes(
    workdir: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    mapped = pipeline.LayerConverter.__init__
    monkeypatch.setattr(pipeline, "holds_streams", lambda *_: False)
    monkeypatch.setattr(
        pipeline.LayerConverter,
        "__init__",
        lambda self, prepared, ranks, folder=None: (made.append(folder), mapped(self, prepared, ranks, folder))[1],
    )
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(1))
    assert not [file for file in Path("out.partial").iterdir() if file.name.startswith(".tmp")]
    convert(recipe(), resume=True)
    assert made == [Path("out.partial")] * 2
    assert files(workdir / "out") == files(original / "out")


def test_streams_lie_on_the_disk_if_the_memory_holds_all_but_them(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 10**6
    needed = memory_bytes(prepared.plan, tokens, None)
    has(monkeypatch, memory_free=needed / memory.HELD + 1)
    assert memory.holds_streams(prepared, tokens)
    has(monkeypatch, memory_free=needed / memory.HELD - 1)
    assert not memory.holds_streams(prepared, tokens)
    assert memory_shortage(prepared, 1000, 1000) is None


def test_a_memory_too_small_is_refused_before_anything_is_written(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, memory_free=1e8)
    with pytest.raises(
        TransmlaError, match=r"needs about 0\.7 GB of memory; 0\.1 GB are free; use a computer with more"
    ):
        convert(recipe())
    assert not Path("out.partial").exists()


def test_the_remedy_is_the_first_that_fits(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit holds the differences of all hidden states: half of the text, or no fit, may be all that is needed."""
    spec, plan = prepared.plan.spec, prepared.plan
    fit = fit_settings("fast", plan.cache_ratio, layer_parameters=spec.layer_parameters)
    fitted = Prepared(recipe(reconstruct="fast"), prepared.source, prepared.device, None, fit, plan)
    half, closed = (memory_bytes(plan, 2**26, f, streams=False) for f in (fit, None))
    for enough, remedy in ((half, "use --calibration-sequences 4096"), (closed, "use --reconstruct off")):
        has(monkeypatch, memory_free=memory.CERTAIN * enough + 1)
        if remedy.endswith("off"):
            monkeypatch.setattr(memory, "_less_text", lambda _: iter(()))
        error = memory_shortage(fitted, 8192, 2**14)
        assert error is not None
        assert error.remedy == remedy


def test_a_gpu_too_small_is_refused_with_what_fits(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fit_settings("full", prepared.plan.cache_ratio)
    on_gpu = Prepared(recipe(reconstruct="full"), prepared.source, torch.device("cuda"), None, fit, prepared.plan)
    needed = device_bytes(prepared.plan, 64, 8192, fit)
    has(monkeypatch, gpu_free=needed)
    assert memory_shortage(on_gpu, 64, 8192) is None
    has(monkeypatch, gpu_free=memory.CERTAIN_ON_GPU * needed - 1)
    error = memory_shortage(on_gpu, 64, 8192)
    assert error is not None
    assert "of memory on cuda" in error.what
    assert error.remedy == "use --calibration-sequences 32"
    has(monkeypatch, gpu_free=1000)
    error = memory_shortage(on_gpu, 64, 8192)
    assert error is not None
    assert error.remedy == "use --device cpu --calibration-length 512"


def test_fewer_processes_are_no_remedy_for_a_gpu_too_small(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has a GPU of its own, whose memory the number of processes does not change."""
    fit = fit_settings("full", prepared.plan.cache_ratio)
    on_gpus = Prepared(recipe(reconstruct="full"), prepared.source, torch.device("cuda"), None, fit, prepared.plan, 4)
    has(monkeypatch, gpu_free=memory.CERTAIN_ON_GPU * device_bytes(prepared.plan, 64, 8192, fit) - 1)
    error = memory_shortage(on_gpus, 64, 8192)
    assert error is not None
    assert error.remedy == "use --calibration-sequences 32"
    # The memory of the computer lacks room for more than one process, and that of the GPU for all sequences.
    has(monkeypatch, memory_free=memory_bytes(prepared.plan, 0, fit, on_gpus.device), gpu_free=1e5)
    monkeypatch.setattr(memory, "_less_text", lambda work: iter([replace(work, sequences=2, length=2)]))
    monkeypatch.setattr(memory, "device_bytes", lambda _, sequences, *__: sequences * 10**4)
    error = memory_shortage(on_gpus, 64, 8192)
    assert error is not None
    assert error.remedy == "start 1 process, and use --calibration-sequences 2 --calibration-length 2"


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free, "CGROUPS", tmp_path)
    root = tmp_path / "memory" if version == 1 else tmp_path
    group = root / "outer" / "inner"
    group.mkdir(parents=True)
    limit, usage, statistics = free._FILES[version]
    for folder, most, used in ((group, "max" if version == 2 else "900", 300), (group.parent, "500", 400)):
        (folder / limit).write_text(most)
        (folder / usage).write_text(str(used))
        (folder / statistics).write_text(
            "inactive_file 10\nactive_file 20\ntotal_inactive_file 30\ntotal_active_file 20\n"
        )
    line = "4:memory:/outer/inner\n0::/elsewhere\n" if version == 1 else "0::/outer/inner\n"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self: line if str(self) == "/proc/self/cgroup" else read(self))
    assert free.free_memory() == (500 - 400 + (50 if version == 1 else 30))


def test_what_an_earlier_run_reserved_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 5)
    assert free_memory_of(torch.device("cuda")) == 75


def test_a_disk_too_small_is_told_the_text_that_fits(
    workdir: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch)
    plan = prepared.plan

    def refusal(free: int, text: tuple[int, int], written: int = 0) -> str | None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        try:
            room.check_room(prepared, Path("out"), text, written=written)
        except TransmlaError as error:
            return str(error)
        return None

    enough = disk_bytes(plan, 300 * 2048, None)
    for text, fits, option in (
        ((1000, 2048), (300, 2048), "--calibration-sequences 300"),
        ((1000, 38400), (16, 38400), "--calibration-sequences 16"),
        ((1000, 76800), (16, 38400), "--calibration-sequences 16 --calibration-length 38400"),
        ((16, 76800), (16, 38400), "--calibration-length 38400"),
    ):
        said = refusal(enough, text)
        assert said is not None
        assert f"free some disk space, use {option}, or choose another --output" in said
        assert refusal(enough, fits) is None
    # Not even the smallest text fits, or the run has its text already.
    for said in (refusal(disk_bytes(plan, 0, None), (64, 512)), refusal(0, (1000, 2048), written=1)):
        assert said is not None
        assert said.endswith("free; free some disk space, or choose another --output")
