"""Ctrl-C at every line of dynaexq that a call executes, one after the other."""

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import dynaexq

PACKAGE = str(Path(dynaexq.__file__).parent)


def interrupted_at(number: int, act: Callable[[], Any], error: type[BaseException] = KeyboardInterrupt) -> str | None:
    """Call `act` with an exception at the line of this number of those of dynaexq that it executes, on this thread.

    Returns:
        The line; None if there are not so many.
    """
    seen, where = -1, None
    before = sys.gettrace()

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen, where
        if event == "line" and where is None:
            seen += 1
            if seen == number:
                where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise error
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    gc.disable()  # what it would finalize in between is another test's
    sys.settrace(trace)
    try:
        act()
    except error:
        pass
    finally:
        sys.settrace(before)
        gc.enable()
    return where


def interrupts(prepare: Callable[[], Any], act: Callable[[], Any], every: int = 1) -> Iterator[str]:
    """`act` again and again, each time after `prepare`, interrupted at one line after the other; yields the lines."""
    number = 0
    while True:
        prepare()
        where = interrupted_at(number, act)
        if where is None:
            return
        yield where
        number += every
