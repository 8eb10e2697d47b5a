"""Compare the memory that a conversion needs with what is free, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from transmla.convert.prepare import AMOUNTS, Prepared
from transmla.errors import TransmlaError
from transmla.plan.estimate import device_bytes, memory_bytes
from transmla.plan.fit_settings import FITS, OFF, FitSettings, fit_settings
from transmla.ranks import counted, local_size
from transmla.source.memory import free_memory, free_memory_of, resident_memory

# Hidden states go to the disk if the estimate of everything exceeds this share of the memory.
HELD = 0.9
# A conversion is refused if this share of its estimate exceeds the memory. Measured peaks on CPUs were 0.79 (a fit of
# SmolLM2's sizes) to 1.18 of the estimate (closed forms; docs/scale.md). On a GPU, 50 GiB with all hidden states there
# stand beside an estimate of 37 GiB without them (Llama-3-8B's sizes, one H200): too little to be as sure.
CERTAIN, CERTAIN_ON_GPU = 0.75, 0.6
# The fewest calibration sequences, and tokens per sequence, that a remedy proposes.
FEWEST, SHORTEST = 16, 256


@dataclass(frozen=True)
class Work:
    """The settings of a conversion on which its memory depends.

    Attributes:
        device: the device that converts.
        reconstruct: name of the fit, or ``off``.
        fit: settings of the fit; None if layers are not fitted.
        sequences: number of calibration sequences.
        length: tokens per sequence.
        processes: number of processes on this computer.
    """

    device: torch.device
    reconstruct: str
    fit: FitSettings | None
    sequences: int
    length: int
    processes: int = 1


def holds_streams(prepared: Prepared, tokens: int) -> bool:
    """Return whether the computer's memory holds the hidden states of ``tokens`` calibration tokens with all else.

    Each process holds them.
    """
    needed = memory_bytes(prepared.plan, tokens, prepared.fit, prepared.device, processes=prepared.processes)
    return needed <= HELD * _within_reach()


def check_memory(prepared: Prepared, sequences: int, length: int) -> None:
    """Check that the memory of the computer and of the GPU may hold a conversion.

    Raises:
        TransmlaError: if it certainly does not, with the first change of settings that helps.
    """
    error = memory_shortage(prepared, sequences, length)
    if error is not None:
        raise error


def memory_shortage(prepared: Prepared, sequences: int, length: int) -> TransmlaError | None:
    """Return the refusal of a conversion that the memory certainly does not hold; None if it may.

    Args:
        prepared: the conversion.
        sequences: number of calibration sequences.
        length: tokens per sequence.
    """
    recipe, processes = prepared.recipe, prepared.processes
    work = Work(prepared.device, recipe.reconstruct, prepared.fit, sequences, length, processes)
    lacking = _lacking(prepared, work)
    if lacking is None:
        return None
    place, needed, free = lacking
    return TransmlaError(
        f"the conversion needs about {needed / 1e9:.1f} GB of {place}",
        limit=f"{free / 1e9:.1f} GB are free",
        remedy=_remedy(prepared, work),
    )


def _lacking(prepared: Prepared, work: Work) -> tuple[str, int, int] | None:
    """Return which memory certainly does not hold ``work``, its estimate and the free bytes; None if all may."""
    tokens = work.sequences * work.length
    # Hidden states that the memory does not hold go to the disk.
    needed, in_all = (
        memory_bytes(prepared.plan, tokens, work.fit, work.device, streams=streams, processes=work.processes)
        for streams in (False, True)
    )
    place = "memory" if work.processes == 1 else f"memory for {work.processes} processes"
    hidden = f"{(in_all - needed) / 1e9:.1f}"
    if hidden != "0.0":  # `plan` counts them too
        place += f", and {hidden} GB for hidden states, which can lie on the disk"
    places = [(place, needed, _within_reach(), CERTAIN)]
    if work.device.type == "cuda":
        on_device = device_bytes(prepared.plan, work.sequences, work.length, work.fit)
        places.append((f"memory on {work.device}", on_device, free_memory_of(work.device), CERTAIN_ON_GPU))
    return next(((name, size, free) for name, size, free, share in places if share * size > free), None)


def _within_reach() -> int:
    """Return the bytes that the processes of this launch may hold here: what they have, and what is free."""
    return free_memory() + local_size() * resident_memory()


def _remedy(prepared: Prepared, work: Work) -> str:
    """Return the first change of settings with which the memory holds the conversion."""
    for changed in _changes(prepared, work):
        if _lacking(prepared, changed) is None:
            options = _options(work, changed)
            # Launchers name their number of processes differently.
            fewer = [f"start {counted(changed.processes)}"] if changed.processes != work.processes else []
            return ", and ".join(fewer + (["use " + " ".join(options)] if options else []))
    return "use a computer with more memory, or end other programs"


def _changes(prepared: Prepared, work: Work) -> Iterator[Work]:
    """Yield other settings, from those that cost the least quality: fewer processes cost none."""
    alone = work
    while alone.processes > 1:
        alone = replace(alone, processes=alone.processes // 2)
        yield alone
    for changed in _smaller(prepared, work):
        yield changed
        # Fewer processes do not help where a GPU's memory is too small.
        if work.processes > 1:
            yield replace(changed, processes=1)


def _smaller(prepared: Prepared, work: Work) -> Iterator[Work]:
    """Yield settings that need less memory in each process, from those that cost the least quality."""
    smaller = list(_less_text(work))
    fits = [name for name in (*reversed(FITS), OFF) if _rank(name) > _rank(work.reconstruct)]
    yield from smaller
    for name in fits:
        yield _with_fit(prepared, work, name)
    for name in fits:
        yield from (_with_fit(prepared, less, name) for less in smaller)
    if work.device.type == "cuda":
        sequences, length = AMOUNTS["cpu"]
        sequences, length = min(work.sequences, sequences), min(work.length, length)
        on_cpu = replace(work, device=torch.device("cpu"), sequences=sequences, length=length)
        for name in (work.reconstruct, *fits):
            yield _with_fit(prepared, on_cpu, name)


def _less_text(work: Work) -> Iterator[Work]:
    """Yield the same work with fewer sequences, then also with shorter ones."""
    while work.sequences // 2 >= FEWEST:
        work = replace(work, sequences=work.sequences // 2)
        yield work
    while work.length // 2 >= SHORTEST:
        work = replace(work, length=work.length // 2)
        yield work


def _with_fit(prepared: Prepared, work: Work, name: str) -> Work:
    """Return ``work`` with the fit called ``name``."""
    spec, ratio = prepared.plan.spec, prepared.plan.cache_ratio
    fit = fit_settings(name, ratio, layer_parameters=spec.layer_parameters, experts=bool(spec.experts))
    return replace(work, reconstruct=name, fit=fit)


def _rank(reconstruct: str) -> int:
    """Return the place of a fit in the order from the largest memory to the smallest."""
    return [*reversed(FITS), OFF].index(reconstruct)


def _options(work: Work, changed: Work) -> list[str]:
    """Return the options of the command line that change ``work`` to ``changed``."""
    named = {
        "--device": (work.device.type, changed.device.type),
        "--reconstruct": (work.reconstruct, changed.reconstruct),
        "--calibration-sequences": (work.sequences, changed.sequences),
        "--calibration-length": (work.length, changed.length),
    }
    return [f"{option} {after}" for option, (before, after) in named.items() if before != after]
