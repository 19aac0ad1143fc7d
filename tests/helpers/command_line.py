"""The command line as it is started, in the test's own process."""

import sys
from typing import NoReturn

import pytest

from dynaexq.cli import app


def run_main(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Run `dynaexq ARGUMENTS`; returns its exit code. The process that it would end goes on."""

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(app.os, "_exit", leave)
    monkeypatch.setattr(app.gc, "disable", lambda: None)
    monkeypatch.setattr(sys, "argv", ["dynaexq", *arguments])
    with pytest.raises(SystemExit) as ended:
        app.main()
    return ended.value.code
