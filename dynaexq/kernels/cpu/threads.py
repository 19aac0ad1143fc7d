"""The threads of the kernel are PyTorch's own: its OpenMP runtime, found by address. See docs/decisions/0005."""

import ctypes
import logging
import os
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def _find_parallel() -> int:
    """Address of `GOMP_parallel` in the runtime that PyTorch is linked to, or 0."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        logger.warning("PyTorch's OpenMP threads were not found; the CPU kernel runs on one")
        return 0


_address: int | None = None


def parallel() -> int:
    """Address of the function that runs another on several threads; 0 without OpenMP."""
    global _address
    if _address is None:
        _address = _find_parallel()
    return _address


def _forget() -> None:
    global _address
    if _address:
        _address = 0
        torch.set_num_threads(1)  # PyTorch's own operators would ask for them as well


# The threads of an OpenMP runtime do not survive a fork, and a child that asks for them waits for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
