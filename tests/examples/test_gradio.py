"""A chat in the browser: answers are streamed to several at once, and precision is shown."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

ROOT = Path(__file__).parents[2]
SECONDS_TO_START = 120


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    port = free_port()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"PORT": str(port), "PYTHONPATH": path, "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "gradio_chat.py")], env=os.environ | environment
    )
    try:
        wait_for(port, process)
        yield gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
    finally:
        process.terminate()
        process.wait(30)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return when something listens at `port`."""
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.5)


def test_several_are_answered_at_once_as_the_words_come(client: Any) -> None:
    def ask(message: str) -> list[str]:
        return [str(part) for part in client.submit(message, api_name="/chat")]

    with ThreadPoolExecutor(3) as people:
        answers = list(people.map(ask, ["def add(a, b):", "Ada has 12 coins", "Return the number"]))
    for parts in answers:
        assert len(parts) > 3
        assert len(parts[-1]) > len(parts[0])


def test_precision_is_shown_on_the_page(client: Any) -> None:
    assert "experts at 2 bits" in client.predict(api_name="/report")
