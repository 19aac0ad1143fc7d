"""Page-locked host memory, which a GPU fetches by itself while the processor does something else.

PyTorch's allocator of such memory rounds up to a power of two, a gigabyte for 600 MB; this takes what was asked for.

CUDA locks memory for all devices, but by a call to the current one, which it sets up where that has not been done:
some hundred megabytes of a card that the model may not even be on, and that may be full. Hence `on_device`.
"""

import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from dynaexq.errors import StoreError
from dynaexq.memory.slab_pool import allocate_bytes

_deferred: deque[Callable[[], object]] = deque()


def run_outside_capture(act: Callable[[], object]) -> None:
    """Call `act`, and what was deferred before; defer it to the next call while this thread captures a graph."""
    _deferred.append(act)
    while _deferred and not torch.cuda.is_current_stream_capturing():
        _deferred.popleft()()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Have CUDA calls that name no device go to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class PageLocked:
    """Uint8 `bytes [nbytes]`, page-locked until `close`, or until this object is gone; by the current device.

    Raises:
        StoreError: the system has no more memory to lock.
    """

    def __init__(self, nbytes: int):
        self.bytes = allocate_bytes(nbytes, torch.device("cpu"))
        if nbytes:
            status = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), nbytes, 0))
            if status:
                _forget_error()
                raise StoreError(
                    f"cannot page-lock {nbytes:,} bytes of host memory (CUDA error {status}); "
                    'free some, raise the limit on locked memory, or use host_copy="ram"'
                )
            self._unlock = weakref.finalize(
                self, run_outside_capture, partial(_unlock, self.bytes, torch.cuda.current_device())
            )

    def close(self) -> None:
        """Unlock the memory; no copy from it may be in flight."""
        if self.bytes.numel():
            self._unlock()


class Addressable:
    """Uint8 `bytes [nbytes]`, page-locked, that kernels address as the host does; by the current device.

    Where memory is locked after it was allocated, ROCm gives it another address on the device, so there PyTorch
    allocates it.

    Raises:
        StoreError: the system has no more memory to lock.
    """

    def __init__(self, nbytes: int):
        self._locked = None if torch.version.hip else PageLocked(nbytes)
        self.bytes = self._locked.bytes if self._locked else torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def close(self) -> None:
        """Unlock the memory; nothing on the device may use it any more."""
        if self._locked is not None:
            self._locked.close()


def _forget_error() -> None:
    """Clear what CUDA noted of a call that failed: PyTorch would lay it to the next kernel of this thread."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")  # a kernel, behind which PyTorch looks; cudaGetLastError has no binding


def _unlock(memory: Tensor, device: int) -> None:
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
