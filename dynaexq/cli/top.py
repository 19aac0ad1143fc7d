"""dynaexq top: what a running server shows of its precision, live in the terminal."""

import json
import time
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from rich.console import Console
from rich.live import Live

from dynaexq.errors import NoServerError
from dynaexq.views.terminal import SnapshotView

SECONDS_TO_ANSWER = 5.0


def snapshot_of(url: str) -> dict[str, Any]:
    """The snapshot of the server at `url`.

    Raises:
        NoServerError: there is none, or it is no server of dynaexq.
    """
    address = url if "://" in url else f"http://{url}"
    if urlsplit(address).scheme not in ("http", "https"):
        raise NoServerError(f"expected the address of a server such as http://127.0.0.1:8000, got {url}")
    try:
        with urlopen(f"{address.rstrip('/')}/dynaexq/snapshot", timeout=SECONDS_TO_ANSWER) as answer:
            found = json.load(answer)
    except (URLError, OSError, ValueError) as error:
        raise NoServerError(f"no server of dynaexq answers at {address}: {error}; see dynaexq serve") from error
    if not isinstance(found, dict) or "bits" not in found:
        raise NoServerError(f"what answers at {address} is no server of dynaexq")
    return found


def watch(url: str, seconds: float, once: bool) -> None:
    """Show the server at `url` every few seconds until interrupted, or `once`. Raises NoServerError."""
    console = Console()
    if once or not console.is_terminal:
        console.print(SnapshotView(snapshot_of(url)))
        return
    with Live(SnapshotView(snapshot_of(url)), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(SnapshotView(snapshot_of(url)), refresh=True)
                time.sleep(seconds)
        except KeyboardInterrupt:
            return
