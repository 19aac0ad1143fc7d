"""`dynaexq serve` in a process of its own, and OpenAI's client against it: answers, metrics, pages, restarts."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from pages import PAGES, blocks
from ports import free_port
from typer.testing import CliRunner

import dynaexq
from dynaexq.cli.app import app
from dynaexq.cli.demo import embedded_model
from dynaexq.hf.convert import quantize_checkpoint

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

BUDGET = 4_900_000
SECONDS_TO_START = 120
PROMPTS = ("def add(a, b):\n    return", "Ada has 12 coins and buys", "Return the number of items in the")


class Serving:
    """A server on a free port."""

    def __init__(self, model: Path, *options: str):
        self.port = free_port()
        command = [sys.executable, "-m", "dynaexq.cli.app", "serve", str(model), "--port", str(self.port), *options]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0)
        self.model = str(model)
        self._wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        with urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def snapshot(self) -> dict[str, Any]:
        return json.loads(self.get("/dynaexq/snapshot"))

    def complete(self, prompt: str, **options: Any) -> Any:
        return self.client.completions.create(model=self.model, prompt=prompt, **{"max_tokens": 12} | options)

    def end(self, signal_number: int = signal.SIGINT) -> str:
        """Tell it to end; what it has printed."""
        self.process.send_signal(signal_number)
        return self.process.communicate(timeout=60)[0]

    def _wait(self) -> None:
        end = time.monotonic() + SECONDS_TO_START
        while not self._answers():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end, "no answer"
            time.sleep(0.25)

    def _answers(self) -> bool:
        try:
            self.get("/health")
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("served") / "packed"
    quantize_checkpoint(embedded_model(), target, dynaexq.DynaExqConfig(tiers=("int2", "int4")))
    return target


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[Serving]:
    serving = Serving(packed, "--hbm-budget", f"{BUDGET // 1000}KB", "--hotness", "none")
    yield serving
    serving.end()


def test_chat_completions_responses_and_streams_are_answered(server: Serving) -> None:
    messages = [{"role": "user", "content": PROMPTS[0]}]
    chat = server.client.chat.completions.create(model=server.model, messages=messages, max_tokens=8)
    assert chat.usage.completion_tokens == 8
    stream = server.client.chat.completions.create(model=server.model, messages=messages, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert server.complete(PROMPTS[1]).choices[0].text
    assert server.client.responses.create(
        model=server.model, input=PROMPTS[2], max_output_tokens=8, stream=False
    ).output_text


def test_many_clients_of_several_kinds_at_once_stay_within_the_budget(server: Serving) -> None:
    before = server.snapshot()["stats"]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda i: server.complete(PROMPTS[i % 3]).choices[0].text, range(24)))
    assert all(answers)
    after = server.snapshot()
    assert after["stats"]["tokens"] > before["tokens"] + 24 * 8
    assert after["memory"]["total"] <= after["memory"]["budget"] == BUDGET


def test_a_client_that_leaves_and_a_prompt_that_is_too_long_harm_none(server: Serving) -> None:
    stream = server.complete(PROMPTS[0], max_tokens=400, stream=True)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    with suppress(openai.APIError):
        server.complete("x " * 3000)  # refused, or answered: either way the next one is
    assert server.complete(PROMPTS[1]).choices[0].text
    assert json.loads(server.get("/health"))["status"] == "ok"


def test_metrics_are_those_of_prometheus(server: Serving) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(server.get("/metrics"))}
    parts = {sample.labels["part"]: sample.value for sample in families["dynaexq_memory_bytes"].samples}
    assert parts["total"] <= parts["budget"] == BUDGET
    assert families["dynaexq_tokens"].type == "counter"
    states = {sample.labels["state"]: sample.value for sample in families["dynaexq_health"].samples}
    assert states == {"ok": 1, "degraded": 0, "standing still": 0}
    assert all(family.documentation for family in families.values())


def test_health_says_how_precision_is_doing(server: Serving) -> None:
    health = json.loads(server.get("/health"))
    assert (health["status"], health["precision"]["state"]) == ("ok", "ok")


def test_the_page_needs_nothing_from_elsewhere(server: Serving) -> None:
    page, report = server.get("/dynaexq"), server.get("/dynaexq/report")
    assert not re.findall(r"(?:src|href)=", page + report)
    assert "http" not in page + report
    assert "Qwen3MoeForCausalLM" in report


def test_top_shows_it(server: Serving) -> None:
    shown = CliRunner().invoke(app, ["top", server.url, "--once"])
    assert shown.exit_code == 0
    assert "hotness" in shown.output
    found = json.loads(CliRunner().invoke(app, ["top", server.url, "--json"]).output)
    assert found["tiers"] == ["int2", "int4"]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_what_was_learned_of_the_traffic_is_there_after_a_restart(packed: Path, tmp_path: Path, ending: int) -> None:
    hotness = tmp_path / "kept" / "hotness.safetensors"
    options = ("--hbm-budget", f"{BUDGET // 1000}KB", "--hotness", str(hotness), "--no-continuous-batching")
    first = Serving(packed, *options)
    for _ in range(4):
        first.complete(PROMPTS[0], max_tokens=40)
    first.end(ending)
    assert hotness.exists()
    second = Serving(packed, *options)
    started = second.snapshot()
    second.end()
    assert started["stats"]["tokens"] == 0
    rows = [sorted(row)[-3] / (sum(row) / len(row)) for row in started["hotness"]]
    assert min(rows) > 1.5, "an even start has no favorites"


def test_hotness_that_cannot_be_read_is_left_alone_and_said(packed: Path, tmp_path: Path) -> None:
    hotness = tmp_path / "hotness.safetensors"
    hotness.write_bytes(b"nothing of the kind")
    serving = Serving(packed, "--hbm-budget", f"{BUDGET // 1000}KB", "--hotness", str(hotness))
    assert "is neither used nor written" in serving.end()
    assert hotness.read_bytes() == b"nothing of the kind"


def test_what_cannot_be_served_is_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dynaexq.cli.app"]
    taken = socket.create_server(("127.0.0.1", 0))
    for arguments, sentence in (
        (["serve", str(embedded_model()), "--port", str(taken.getsockname()[1])], "choose another --port"),
        (["serve", str(tmp_path / "nowhere")], "there is no"),
        (["serve", str(tmp_path)], "cannot be served"),
        (["serve", str(embedded_model()), "--hbm-budget", "1KB"], "too small"),
        (["top", "127.0.0.1:9"], "no server of dynaexq answers"),
    ):
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 1, done
        assert sentence in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    taken.close()


def test_the_client_on_the_page_gets_its_answer(server: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for page in PAGES for block in blocks(page, "python") if "http://127.0.0.1" in block]
    here = block.replace("http://127.0.0.1:8000", server.url).replace('"packed"', repr(server.model))
    exec(compile(here, "serving", "exec"), {})
    assert len(capsys.readouterr().out) > 10
