"""Write the shards of an export, and now and then the state that a resumed run needs."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from transmla.convert.finite import check_tensors
from transmla.convert.layers import ConvertedLayer
from transmla.convert.phases import Phases
from transmla.convert.streams import Streams
from transmla.export.workspace import Progress, Workspace

# Seconds between saves of the hidden states (hundreds of MB each); as many for every half second that a save takes, if
# it takes longer, so that saves take at most a fortieth of the time. A killed run loses at most this much work and the
# current layer. The first save is assumed to write SAVE_RATE bytes a second.
SAVE_SECONDS, SAVE_RATE = 20.0, 1e9


class ShardWriter:
    """Writes shards, and now and then the state that a resumed run needs.

    A shard is written and hashed while the next layer is converted.
    """

    def __init__(self, workspace: Workspace, progress: Progress, phases: Phases, pool: ThreadPoolExecutor) -> None:
        """Write into ``workspace`` in a thread of ``pool``; keep ``progress`` and the phase "write" up to date."""
        self.workspace, self.progress, self.phases, self.pool = workspace, progress, phases, pool
        self._writing: tuple[str, Future[str]] | None = None

    def start(self, streams: Streams) -> None:
        """Begin to count the seconds until the hidden states are saved for the first time."""
        self.saved, self.pause = time.monotonic(), _pause(streams.nbytes() / SAVE_RATE)

    def embedding(self, tensors: dict[str, Tensor]) -> None:
        """Check and write the first shard."""
        check_tensors("the embedding", tensors)
        self._shard(0, tensors)

    def layer(self, index: int, converted: ConvertedLayer) -> None:
        """Write the shard of a layer; if it is time, save the progress and the hidden states after the layer."""
        with self.phases.measure("write"):
            self._shard(index + 1, converted.tensors)
        self.progress.layers.append(converted.record)
        if (began := time.monotonic()) - self.saved >= self.pause:
            with self.phases.measure("write"):
                self.settle()
                self.progress.checksum = self.workspace.save_streams(index + 1, converted.streams.to_tensors())
                self.progress.next_layer = index + 1
                self.workspace.save_progress(self.progress)
                self.workspace.drop_streams(keep=index + 1)
            self.saved = time.monotonic()
            self.pause = _pause(self.saved - began)

    def settle(self) -> None:
        """Wait for the last shard, and add its hash to the progress; raises what its writing raised."""
        if self._writing is not None:
            name, written = self._writing
            self.progress.hashes[name] = written.result()
            self._writing = None

    def _shard(self, index: int, tensors: dict[str, Tensor]) -> None:
        self.settle()
        # The thread never touches the GPU, where the next fit may be captured as a graph meanwhile.
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        written = self.pool.submit(self.workspace.write_shard, index, on_cpu)
        self._writing = self.workspace.shard_name(index), written


def _pause(seconds: float) -> float:
    """Return the seconds until the next save of the hidden states, if one takes ``seconds``."""
    return SAVE_SECONDS * max(1.0, 2 * seconds)
