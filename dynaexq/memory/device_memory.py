"""All that one runtime owns on the device: base slab, upgrade slots, expert table, routing counter, their fence."""

import logging
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dynaexq.errors import StoreError
from dynaexq.memory.expert_table import ExpertTable
from dynaexq.memory.fences import Fence, ReaderFence, StreamFence
from dynaexq.memory.graph_sync import EpochFence, Exchange, HostMailbox
from dynaexq.memory.routing_counter import RoutingCounter
from dynaexq.memory.slab_pool import SlabPool, allocate_bytes

logger = logging.getLogger(__name__)


class DeviceMemory:
    """Memory for `num_layers * num_experts` base blocks and `num_slots` upgrades.

    Args:
        base: the base slab, if it was prefetched; else it is allocated.
        exchange: how the device exchanges words with the host, where graphs may be captured; see `memory.words`.

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
        exchange: Exchange | None = None,
    ):
        self._words = _mailbox(num_layers, num_experts, device) if exchange else None
        self._exchange, self._last_layer = exchange if self._words else None, num_layers - 1
        self.table = ExpertTable(num_layers, num_experts, device, self._words)
        self.counter = RoutingCounter(num_layers, num_experts, device, self._words)
        self.fence: Fence = StreamFence(device) if device.type == "cuda" else ReaderFence()
        if self._exchange is not None and self._words is not None:
            fetch = partial(self._exchange.fetch, self._words.words, self.table.entries)
            self.fence = EpochFence(self._words, self.fence, fetch, self._synchronizer(device, self.fence))
        if base is None:
            base = allocate_bytes(num_layers * num_experts * base_nbytes, device)
        self.base: Tensor = base.view(num_layers, num_experts, base_nbytes)
        self.pool = SlabPool(upgrade_nbytes, device, self.fence)
        if num_slots:
            self.pool.grow(num_slots)

    @property
    def follows_replays(self) -> bool:
        """Whether graphs that were captured find what is published after that, and report what they route."""
        return self._words is not None

    @property
    def reported_steps(self) -> int:
        """Forwards that have ended, replays of graphs among them; 0 where they do not report."""
        return self._words.steps if self._words else 0

    def layer_begins(self, layer: int) -> None:
        """Called inside `fence.reading()`, before a layer of a forward looks at the table."""
        if self._exchange is not None and self._words is not None and layer == 0:
            self._exchange.fetch(self._words.words, self.table.entries)

    def layer_ends(self, layer: int, observed: bool) -> None:
        """Called inside `fence.reading()`, when all that a layer reads has been queued."""
        if self._exchange is not None and self._words is not None and layer == self._last_layer:
            self._exchange.report(self._words.words, self.counter.sums, int(observed))

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

    @staticmethod
    def _synchronizer(device: torch.device, order: Fence) -> Callable[[], None]:
        """What returns when all that is queued on `device` has ended. It must not lead back to the memory it frees."""
        if device.type == "cuda":
            return partial(torch.cuda.synchronize, device)
        return lambda: order.wait(order.mark())


def _mailbox(num_layers: int, num_experts: int, device: torch.device) -> HostMailbox | None:
    """The words to exchange, or None and a sentence where the system lets no memory be locked, as some containers."""
    try:
        return HostMailbox(num_layers, num_experts, device)
    except StoreError as error:
        logger.warning(
            "precision follows the traffic of forwards that Python runs, and stands still while CUDA graphs are "
            "replayed: %s", error,
        )  # fmt: skip
        return None


_PROBE_BYTES = 32 * 2**20


def bytes_per_second(limit: int | float | str | None, device: torch.device) -> float | None:
    """The rate that `Settings.copy_rate_limit` allows on `device`; for a share of the link, that is measured."""
    if isinstance(limit, float):
        return limit * measure_link(device)
    return None if limit is None else float(limit)


def measure_link(device: torch.device) -> float:
    """Bytes per second from host memory to `device`, best of three copies of 32 MiB."""
    source = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = allocate_bytes(_PROBE_BYTES, device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        best = min(best, time.perf_counter() - start)
    return _PROBE_BYTES / best


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second that `device` reads of its own memory, best of five sums of 256 MiB."""
    numbers = torch.ones(2**26, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum().item()  # which waits for it
        best = min(best, time.perf_counter() - start)
    return numbers.nbytes / best
