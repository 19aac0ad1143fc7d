"""Two replicas behind one endpoint under load, and one of them killed: what it was not at work on is answered."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from ports import free_port

pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
PROMPTS = ("def add(a, b):\n    return", "Ada has 12 coins and buys", "Return the number of items in the")
CLIENTS, REQUESTS, KILLED_AFTER = 4, 60, 15
SECONDS_TO_START = 150


def ask(port: int, number: int) -> dict[str, Any] | None:
    """One answer, or None where the replica has died of it."""
    body = json.dumps({"prompt": PROMPTS[number % 3], "max_tokens": 16}).encode()
    try:
        with urlopen(Request(f"http://127.0.0.1:{port}", body), timeout=60) as answer:
            return json.load(answer)
    except URLError:
        return None


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    number = free_port()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"PORT": str(number), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    log = tmp_path_factory.mktemp("ray") / "log"
    with log.open("w") as output:
        command = [sys.executable, str(ROOT / "examples" / "ray_serve.py")]
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + SECONDS_TO_START
    while "\nready" not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)
    yield number
    process.send_signal(signal.SIGINT)
    process.wait(60)


@pytest.mark.timeout(400)
def test_a_replica_that_is_killed_takes_no_answer_with_it_but_the_one_it_was_at(port: int) -> None:
    killed: list[int] = []

    def send(number: int) -> dict[str, Any] | None:
        found = ask(port, number)
        if number == KILLED_AFTER and found is not None:
            killed.append(found["replica"])
            os.kill(found["replica"], signal.SIGKILL)
        return found

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(send, range(REQUESTS)))
    lost = [number for number, answer in enumerate(answers) if answer is None]
    found = [answer for answer in answers if answer is not None]
    assert len(lost) <= 1, f"a replica is at work on one request at a time, and {lost} were lost"
    assert len(killed) == 1
    assert all(answer["bytes"] <= answer["budget"] for answer in found)
    assert {len(answer["text"]) > 0 for answer in found} == {True}
    deadline = time.monotonic() + 60
    while True:  # Ray starts another in its place
        replicas = {answer["replica"] for answer in map(ask, [port] * 8, range(8)) if answer is not None}
        if len(replicas - set(killed)) == 2:
            break
        assert time.monotonic() < deadline, replicas
