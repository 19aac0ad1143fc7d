"""Giving back what CUDA knows of when garbage is collected, which happens anywhere: not inside a capture of a graph.

Unlocking memory and waiting for a stream are among the calls that make a capture invalid. PyTorch does not collect
garbage before one begins, so a model that was forgotten long ago may be found in the middle of it. What is given back
is of no interest here.
"""

from collections import deque
from collections.abc import Callable

import torch

_put_off: deque[Callable[[], object]] = deque()


def release(act: Callable[[], object]) -> None:
    """Call `act`, and what was put off before; put it off, until the next call, while this thread captures a graph."""
    _put_off.append(act)
    while _put_off and not torch.cuda.is_current_stream_capturing():
        _put_off.popleft()()
