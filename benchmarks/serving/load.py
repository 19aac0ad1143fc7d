"""`dynaexq serve` under a bounded load on loopback: requests of three kinds interleaved, with control on and off.

    python benchmarks/serving/load.py [--model DIR] [--clients 8] [--requests 200] [--json FILE]

Two servers of the same packed model, one that follows the traffic and one that stands still, get the same requests in
turns of a quarter each. No request may fail, and memory is looked at throughout. At the end the first server is killed
without a warning and started again; what it has learned must still be there.
"""

import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any
from urllib.request import urlopen

import numpy as np
import openai
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import dynaexq
from dynaexq.cli.demo import embedded_model
from dynaexq.cli.demo_corpus import DOMAINS, documents
from dynaexq.hf.convert import quantize_checkpoint
from dynaexq.server.hotness_keeper import SECONDS_BETWEEN

TURNS = 4
PROMPT_CHARACTERS, NEW_TOKENS = 400, 32
SECONDS_TO_START = 180
SHARE_UPGRADED = 0.25


class Server:
    """`dynaexq serve` in a process of its own."""

    def __init__(self, model: Path, budget: int, hotness: str, *options: str):
        self._command = [sys.executable, "-m", "dynaexq.cli.app", "serve", str(model), *options]
        self._command += ["--hbm-budget", f"{budget}B", "--hotness", hotness]
        self._model, self.highest = str(model), 0
        self.start()

    def start(self) -> None:
        """Start it on a free port, and wait until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [*self._command, "--port", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0)
        end = time.monotonic() + SECONDS_TO_START
        while not self._answers():
            if time.monotonic() > end or self._process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} does not answer")
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            self.snapshot()
        except OSError:
            return False
        return True

    def snapshot(self) -> dict[str, Any]:
        with urlopen(f"{self.url}/dynaexq/snapshot", timeout=30) as answer:
            return json.load(answer)

    def seconds_for(self, prompt: str) -> float:
        """Seconds until one request is answered whole; infinite where it failed."""
        begun = time.perf_counter()
        try:
            self._client.completions.create(model=self._model, prompt=prompt, max_tokens=NEW_TOKENS)
        except openai.OpenAIError:
            return float("inf")
        return time.perf_counter() - begun

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at its memory meanwhile, ten times a second."""
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(0.1):
                self.highest = max(self.highest, self.snapshot()["memory"]["total"])

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()

    def end(self, signal_number: int = signal.SIGTERM) -> None:
        self._process.send_signal(signal_number)
        self._process.wait(60)


def prompts(count: int) -> list[str]:
    """So many beginnings of held-out text, of three kinds in turn."""
    texts = [
        [text[:PROMPT_CHARACTERS] for text in islice(documents(domain, "held-out", 3), -(-count // len(DOMAINS)))]
        for domain in DOMAINS
    ]
    longest = max(map(len, texts))
    return [kind[index % len(kind)] for index in range(longest) for kind in texts][:count]


def load(server: Server, requests: list[str], clients: int) -> tuple[list[float], float]:
    """Send all of `requests`; seconds of each, and of all together."""
    begun = time.perf_counter()
    with server.watched(), ThreadPoolExecutor(clients) as pool:
        seconds = list(pool.map(server.seconds_for, requests))
    return seconds, time.perf_counter() - begun


def row(name: str, server: Server, seconds: list[float], total: float) -> dict[str, Any]:
    """One line of the table."""
    answered = [second for second in seconds if second < float("inf")]
    snapshot = server.snapshot()
    return {
        "control": name,
        "requests": len(seconds),
        "failed": len(seconds) - len(answered),
        "tokens per second": len(answered) * NEW_TOKENS / total,
        "median seconds": float(np.median(answered)),
        "P99 seconds": float(np.quantile(answered, 0.99)),
        "coverage": snapshot["stats"]["hot_coverage"],
        "promotions": snapshot["stats"]["promotions"],
        "highest memory": server.highest,
        "budget": snapshot["memory"]["budget"],
    }


def budget_of(packed: Path) -> int:
    """Bytes with a quarter of the experts upgraded."""
    from transformers import AutoModelForCausalLM

    config = dynaexq.DynaExqConfig(hbm_budget="1TiB")
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=config)
    memory = model.dynaexq.memory()
    return memory["total"] - round((1 - SHARE_UPGRADED) * memory["upgrade"])


def main(
    model: Annotated[
        Path | None, typer.Option(help="16-bit checkpoint directory; the embedded one by default.")
    ] = None,
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 8,
    requests: Annotated[int, typer.Option(help="Requests to each server.")] = 200,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Load both servers, kill one, and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        packed, hotness = Path(scratch) / "packed", Path(scratch) / "hotness.safetensors"
        quantize_checkpoint(model or embedded_model(), packed, dynaexq.DynaExqConfig(tiers=("int2", "int4")))
        budget = budget_of(packed)
        servers = {
            "on": Server(packed, budget, str(hotness)),
            "off": Server(packed, budget, "none", "--policy", "frozen"),
        }
        texts, found = prompts(requests), {name: ([], 0.0) for name in servers}
        for turn in tqdm(range(TURNS), unit="turn"):
            part = texts[turn * requests // TURNS : (turn + 1) * requests // TURNS]
            for name, server in servers.items():
                seconds, total = load(server, part, clients)
                found[name] = found[name][0] + seconds, found[name][1] + total
        rows = [row(name, server, *found[name]) for name, server in servers.items()]
        kept = _killed_and_restarted(servers["on"], hotness)
        for server in servers.values():
            server.end()
    table = Table(*rows[0], title=f"{clients} clients, {NEW_TOKENS} new tokens each; hotness kept: {kept:.2f}")
    for found_row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else f"{v}" for v in found_row.values()))
    Console(width=170).print(table)
    if json_path:
        json_path.write_text(json.dumps({"clients": clients, "rows": rows, "kept": kept}, indent=2) + "\n")


def _killed_and_restarted(server: Server, hotness: Path) -> float:
    """Correlation of the hotness after the restart with what was last kept before the kill."""
    end = time.monotonic() + 3 * SECONDS_BETWEEN
    while not hotness.exists():
        if time.monotonic() > end:
            raise RuntimeError(f"the server has kept nothing in {hotness}")
        time.sleep(1.0)
    server.end(signal.SIGKILL)
    from safetensors.numpy import load_file

    before = load_file(hotness)["hotness"]
    server.start()
    return float(np.corrcoef(before.ravel(), np.array(server.snapshot()["hotness"]).ravel())[0, 1])


if __name__ == "__main__":
    typer.run(main)
