"""Programs of others that never import dynaexq: they load its checkpoints as soon as it is installed."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ports import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynaexq
from dynaexq.hf.convert import annotate_checkpoint, quantize_checkpoint

EMBEDDED = Path(__file__).parents[2] / "examples" / "tiny-moe"
SECONDS = 120
KINDS = ("packed", "annotated")

needs_hook = pytest.mark.skipif(
    find_spec("_dynaexq_startup") is None, reason="dynaexq is not installed here: no hook runs when Python starts"
)
needs_server = pytest.mark.skipif(
    find_spec("fastapi") is None or find_spec("uvicorn") is None, reason="needs transformers[serving]"
)
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model, packed and annotated at two bits, at which it speaks otherwise than in 16."""
    directory = tmp_path_factory.mktemp("checkpoints")
    options = dynaexq.DynaExqConfig(tiers=("int2",), hbm_budget="64MiB")
    convert = {"packed": quantize_checkpoint, "annotated": annotate_checkpoint}
    return {kind: convert[kind](EMBEDDED, directory / kind, options) for kind in KINDS}


def environment() -> dict[str, str]:
    """Without what leads to this working tree but the installation itself, and without a hub."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def server(checkpoint: Path, log: Path) -> Iterator[str]:
    """The address of a `transformers serve` of others."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(checkpoint), "--port", str(port)]
    with open(log, "w") as out, subprocess.Popen(command, env=environment(), stdout=out, stderr=out) as process:
        try:
            deadline = time.monotonic() + SECONDS
            while True:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def asked(address: str, path: str, question: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        address + path, json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)


def greedy(model: Any, tokenizer: Any, text: str) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@needs_hook
@needs_server
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_serve_answers_as_dynaexq_does(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = checkpoints[kind]
    with server(path, tmp_path / "log") as address:
        question = {"model": str(path), "prompt": "def ", "max_tokens": 24, "temperature": 0}
        answer = asked(address, "/v1/completions", question)["choices"][0]["text"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert answer == greedy(AutoModelForCausalLM.from_pretrained(path), tokenizer, "def ")
    assert answer != greedy(AutoModelForCausalLM.from_pretrained(EMBEDDED), tokenizer, "def ")


TASK = """\
task: pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{directory}/pages.jsonl"}}, cache_dir: "{directory}/cache"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


def byte_perplexity(model: Path, tasks: Path, log: Path) -> float:
    """What `lm_eval` finds."""
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=auto"),
        *("--tasks", "pages", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "1"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment() | offline, capture_output=True, text=True, timeout=3 * SECONDS)
    log.write_text(done.stdout + done.stderr)
    found = re.search(r"byte_perplexity\|[^|]*\|\s*([\d.]+)", done.stdout)
    assert found, log.read_text()
    return float(found[1])


@needs_hook
@needs_lm_eval
def test_lm_eval_measures_what_dynaexq_loads(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pages = ["def add(a, b):\n    return a + b\n", "The quick brown fox jumps over the lazy dog. " * 4]
    (tmp_path / "pages.jsonl").write_text("\n".join(json.dumps({"page": page}) for page in pages))
    (tmp_path / "pages.yaml").write_text(TASK.format(directory=tmp_path))
    found = {kind: byte_perplexity(path, tmp_path, tmp_path / kind) for kind, path in checkpoints.items()}
    plain = byte_perplexity(EMBEDDED, tmp_path, tmp_path / "plain")
    np.testing.assert_allclose(found["packed"], found["annotated"], rtol=1e-3)
    assert found["packed"] > 1.01 * plain
