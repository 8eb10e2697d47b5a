"""Run one process of several without the others, to time its share of the work on a machine with one GPU.

    python scripts/one_of_many.py 2 scripts/layer_speed.py llama-3-8b --layers 4
    python scripts/one_of_many.py 2 -m transmla.heal EXPORT --teacher SOURCE --data text.txt -o HEALED

The process is the first of a launch of that size, as torchrun starts it. Exchanges take no time: sums hold its own
part alone, factors of others stay as they were, and what others would have sent is random or a copy of its own. The
results are therefore useless; the times are those of a launch whose exchanges cost nothing.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from transmla import ranks

# What torchrun sets for the first process of a launch, whose other processes are on other computers.
FIRST = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def receive(tensor: Tensor, src: int, *_: object, **__: object) -> None:
    """Stand for ``distributed.broadcast``, which would leave a received tensor as uninitialised memory."""
    if src != 0 and tensor.is_floating_point():
        tensor.normal_()


def gather(rows: Tensor, own: Tensor) -> None:
    """Stand for ``ranks._all_gather``: leave ``rows`` as they are if ``own`` is one of them, else copy it to each."""
    if rows.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
        rows.view(-1, own.numel()).copy_(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processes", type=int, help="number of processes, of which one runs")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a script, or -m and a module, with its arguments")
    arguments = parser.parse_args()
    os.environ |= FIRST | {"WORLD_SIZE": str(arguments.processes)}
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=arguments.processes)
    distributed.broadcast, ranks._all_gather = receive, gather
    if arguments.command[0] == "-m":
        sys.argv = arguments.command[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments.command
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
