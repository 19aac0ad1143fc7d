"""Strips by the native kernel's library: what comes from a file is rearranged about as fast as it is read."""

import ctypes
from dataclasses import dataclass

from torch import Tensor

from dynaexq.kernels.cpu.build import load
from dynaexq.quantization.arrangement import InStrips


class _Plane(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("words", "rows", "padded", "block", "bits", "to_strips")]


@dataclass(frozen=True)
class NativeStrips(InStrips):
    """As `InStrips`, for planes in host memory.

    Attributes:
        all_bfloat16: which library it is; see `build.load`.
    """

    all_bfloat16: bool

    def take_plane(self, part: Tensor, bits: int, block: int) -> None:
        if not self._rearranged(part, bits, block, to_strips=True):
            super().take_plane(part, bits, block)

    def give_plane(self, part: Tensor, bits: int, block: int) -> None:
        if not self._rearranged(part, bits, block, to_strips=False):
            super().give_plane(part, bits, block)

    def _rearranged(self, part: Tensor, bits: int, block: int, to_strips: bool) -> bool:
        """Whether the library did it; a model that was pickled elsewhere may have come without one."""
        library = load(self.all_bfloat16)
        if library is None:
            return False
        for words in part:
            rows, width = words.shape
            plane = _Plane(words.data_ptr(), rows, width * 32 // bits, block, bits, to_strips)
            if library.rearrange(ctypes.byref(plane)):
                raise MemoryError("found no memory to rearrange a strip of codes in")
        return True
