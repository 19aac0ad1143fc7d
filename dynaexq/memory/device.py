"""All that one runtime owns on the device: base slab, upgrade slots, expert table, routing counter, their fence."""

import torch
from torch import Tensor

from dynaexq.memory.counter import RoutingCounter
from dynaexq.memory.fence import Fence, ReaderFence, StreamFence
from dynaexq.memory.slab import SlabPool, allocate_bytes
from dynaexq.memory.table import ExpertTable


class DeviceMemory:
    """Memory for `num_layers * num_experts` base blocks and `num_slots` upgrades.

    Args:
        base: the base slab, where somebody has begun to fill it already; else it is allocated.

    Attributes:
        base: uint8 `[num_layers, num_experts, base_nbytes]`; blocks that never move.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        base_nbytes: int,
        upgrade_nbytes: int,
        num_slots: int,
        device: torch.device,
        base: Tensor | None = None,
    ):
        self.fence: Fence = StreamFence(device) if device.type == "cuda" else ReaderFence()
        if base is None:
            base = allocate_bytes(num_layers * num_experts * base_nbytes, device)
        self.base: Tensor = base.view(num_layers, num_experts, base_nbytes)
        self.pool = SlabPool(upgrade_nbytes, device, self.fence)
        if num_slots:
            self.pool.grow(num_slots)
        self.table = ExpertTable(num_layers, num_experts, device)
        self.counter = RoutingCounter(num_layers, num_experts, device)

    @staticmethod
    def workspace_bytes(num_layers: int, num_experts: int) -> int:
        """Bytes of the table and the counter, known before they are allocated."""
        return 8 * num_layers * num_experts + 8 * num_layers * (num_experts + 2)

    def parts(self) -> dict[str, int]:
        """Bytes really allocated, by purpose. Copies land in their slot at once: nothing is staged on the device."""
        return {
            "base": self.base.untyped_storage().nbytes(),
            "upgrade": self.pool.nbytes,
            "staging": 0,
            "workspace": self.table.nbytes + self.counter.nbytes,
        }
