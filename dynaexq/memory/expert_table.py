"""The published upgrade of every expert: the one word through which the slow path steers the fast one.

An entry is an int64, `address | kind`: the 256-byte aligned device address of the upgrade, and in the low 8 bits its
kind, here the bits per weight has with it; 0 says that the expert has its base only. An entry is one aligned 8-byte
store, so no reader ever sees half of it.

    layer 0:  [0, 0x7f00_1200 | 8, 0, 0]       expert 1 is refined to 8 bits by the slot at 0x7f001200
    layer 1:  [0, 0, 0, 0]

The table is written where the host keeps it, which on a CPU is all there is. From there it comes to the device at
once, by a store in the order of the readers; or, where there is a `HostMailbox`, with the next forward that fetches.
"""

import numpy as np
import torch
from torch import Tensor

from dynaexq.memory.graph_sync import HostMailbox
from dynaexq.types import KIND_MASK


class ExpertTable:
    """Entries `[num_layers, num_experts]` on the device; the truth about them is on the host. One writer, any readers.

    Args:
        words: where the device fetches them from.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device, words: HostMailbox | None = None):
        self.entries: Tensor = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self._is_fetched = words is not None
        if words is not None:
            self._published = words.table
        elif device.type == "cpu":
            self._published = self.entries.numpy()
        else:
            self._published = np.zeros((num_layers, num_experts), dtype=np.int64)

    def publish(self, layer: int, expert: int, address: int, kind: int) -> None:
        """Later readers find the upgrade at `address`. Where it is not fetched: in order on the current stream."""
        assert address & KIND_MASK == 0, "an address is a multiple of 256"
        assert 0 < kind <= KIND_MASK, "kind 0 means no upgrade"
        self._write(layer, expert, address | kind)

    def unpublish(self, layer: int, expert: int) -> None:
        """Later readers find the base only."""
        self._write(layer, expert, 0)

    def addresses(self) -> dict[tuple[int, int], int]:
        """(layer, expert) -> where its published upgrade lies."""
        where = np.argwhere(self._published).tolist()
        return {(layer, expert): int(self._published[layer, expert]) & ~KIND_MASK for layer, expert in where}

    def mend(self) -> None:
        """Have the device find what the host says, after a write that was cut short between the two."""
        if not self._is_fetched:
            self.entries.copy_(torch.from_numpy(self._published))

    def kinds(self) -> np.ndarray:
        """Kinds `[num_layers, num_experts]` as published, 0 for base only."""
        return self._published & KIND_MASK

    def row(self, layer: int) -> Tensor:
        """A copy of one row of entries, int64 `[num_experts]` on the device, that later moves do not change."""
        return self.entries[layer].clone()

    @property
    def nbytes(self) -> int:
        return self.entries.untyped_storage().nbytes()

    def _write(self, layer: int, expert: int, entry: int) -> None:
        self._published[layer, expert] = entry  # one aligned 8-byte store
        if not self._is_fetched and not self.entries.is_cpu:
            self.entries[layer, expert].fill_(entry)  # as a kernel argument: no host buffer has to outlive the launch
