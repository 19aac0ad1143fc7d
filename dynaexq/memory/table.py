"""The published upgrade of every expert: the one word through which the slow path steers the fast one.

An entry is an int64, `address | kind`: the 256-byte aligned device address of the upgrade, and in the low 8 bits its
kind, here the bits a weight has with it; 0 says that the expert has its base only. An entry is one aligned 8-byte
store, so no reader ever sees half of it.

    layer 0:  [0, 0x7f00_1200 | 8, 0, 0]       expert 1 is refined to 8 bits by the slot at 0x7f001200
    layer 1:  [0, 0, 0, 0]
"""

import numpy as np
import torch
from torch import Tensor

from dynaexq.records import KIND_MASK


class ExpertTable:
    """Entries `[num_layers, num_experts]` on the device, with a mirror on the host. One writer, any readers."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device):
        self.entries: Tensor = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self._mirror = np.zeros((num_layers, num_experts), dtype=np.int64)

    def publish(self, layer: int, expert: int, address: int, kind: int) -> None:
        """Later readers find the upgrade at `address`. Written in stream order on the current stream."""
        assert address & KIND_MASK == 0, "an address is a multiple of 256"
        assert 0 < kind <= KIND_MASK, "kind 0 means no upgrade"
        self._write(layer, expert, address | kind)

    def unpublish(self, layer: int, expert: int) -> None:
        """Later readers find the base only."""
        self._write(layer, expert, 0)

    def kinds(self) -> np.ndarray:
        """Kinds `[num_layers, num_experts]` as published, 0 for base only."""
        return self._mirror & KIND_MASK

    def row(self, layer: int) -> Tensor:
        """A copy of one row of entries, int64 `[num_experts]` on the device, that later moves do not change."""
        return self.entries[layer].clone()

    @property
    def nbytes(self) -> int:
        return self.entries.untyped_storage().nbytes()

    def _write(self, layer: int, expert: int, entry: int) -> None:
        self._mirror[layer, expert] = entry
        self.entries[layer, expert].fill_(entry)  # as a kernel argument: no host buffer has to outlive the launch
