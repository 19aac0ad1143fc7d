"""How much routing mass each expert received, summed on the device and read without waiting.

The sums are int64 fixed point and only ever grow; the host takes differences. (Sums of floats would depend on the
order of atomic additions, and with them every decision.)
"""

import numpy as np
import torch
from torch import Tensor

from dynaexq.memory.graph_sync import HostMailbox
from dynaexq.safeguards.call_lock import CallLock
from dynaexq.types import LARGEST_MASS, MASS_UNIT


class RoutingCounter:
    """Sums `[num_layers, num_experts + 2]`: mass of each expert, mass of foreign ids, tokens seen.

    Ids outside `[0, num_experts)` belong to other ranks (expert parallelism) and are counted apart.

    Args:
        words: where forwards report the sums to as they end.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device, words: HostMailbox | None = None):
        self.num_experts = num_experts
        self.top_k = 1
        """Experts per token is routed to, as last seen."""
        self.sums: Tensor = torch.zeros(num_layers, num_experts + 2, dtype=torch.int64, device=device)
        self._drained = np.zeros((num_layers, num_experts + 2), dtype=np.int64)
        self._lock = CallLock("counting what is routed")
        self._reported = None if words is None else words.counts
        self._pinned: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, experts)."""
        return len(self._drained), self.num_experts

    def observe(
        self, layer: int, top_k_index: Tensor, top_k_weights: Tensor, tokens: Tensor | int | None = None
    ) -> None:
        """Add the routing of N tokens, ids and weights `[N, k]`. Device work only; never waits.

        Args:
            tokens: how many of them are tokens, where the others are padding, with weights of 0.
        """
        self.top_k = top_k_index.shape[-1]
        ids = top_k_index.reshape(-1)
        ids = torch.where((ids >= 0) & (ids < self.num_experts), ids, self.num_experts)
        mass = top_k_weights.reshape(-1).float().nan_to_num(0.0, 0.0, 0.0).clamp_(0.0, LARGEST_MASS)
        fixed = mass.mul_(MASS_UNIT).round_().to(torch.int64)
        with self._lock.turn():
            self.sums[layer].index_add_(0, ids.to(torch.int64), fixed)
            self.sums[layer, -1] += top_k_index.shape[0] if tokens is None else tokens

    def drain(self) -> tuple[np.ndarray, np.ndarray]:
        """Mass `[L, E]` and tokens `[L]` since the last drain; on a GPU, up to an earlier drain or the last report."""
        latest = self._latest()
        if latest is None:
            return np.zeros((len(self._drained), self.num_experts)), np.zeros(len(self._drained), dtype=np.int64)
        grown = latest - self._drained
        self._drained = latest
        return grown[:, : self.num_experts] / MASS_UNIT, grown[:, -1]

    def totals(self) -> np.ndarray:
        """Mass `[L, E]` since the start. Waits for the device."""
        return self.sums[:, : self.num_experts].cpu().numpy() / MASS_UNIT

    def row(self, layer: int, top_k: int) -> Tensor:
        """The sums of one layer, int64 `[num_experts + 2]`, for a kernel that counts by itself as `observe` does."""
        self.top_k = top_k
        return self.sums[layer]

    @property
    def nbytes(self) -> int:
        return self.sums.untyped_storage().nbytes()

    def _latest(self) -> np.ndarray | None:
        if self._reported is not None:
            return self._reported.copy()  # perhaps in the middle of a report: every sum is one that was true
        if self.sums.device.type != "cuda":  # PyTorch waits for what was queued on others
            with self._lock.turn():
                return self.sums.cpu().numpy().copy()
        latest = None
        if self._copied is not None and self._pinned is not None:
            if not self._copied.query():
                return None
            latest = self._pinned.numpy().copy()
        if self._pinned is None:
            self._pinned = torch.empty(self.sums.shape, dtype=torch.int64, pin_memory=True)
        self._pinned.copy_(self.sums, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(self.sums.device))  # which need not be the current device
        return latest
