"""Loading, packing and reloading a generated 1.2 GB Qwen3-MoE checkpoint: memory, start-up, quantising speed.

    python benchmarks/checkpoint.py [--dir DIR] [--json FILE]

Each measurement runs in a process of its own. Memory is sampled from outside, every two milliseconds: anonymous
resident bytes (what a process has allocated) above those it had after its imports. Files are dropped from the page
cache before each timed read, so that both sides of a ratio come from the disk.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, LAYERS, EXPERTS = 2048, 768, 2, 64  # experts of the shape of Qwen3-30B-A3B
EXPERTS_OF_30B = 48 * 128
RUNS = 5
THREADS = 2
MIB = 2**20


def generate(directory: Path) -> None:
    """A random Qwen3-MoE of 1.2 GB, in shards."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3MoeForCausalLM(config).save_pretrained(directory, max_shard_size="500MB")


def load(directory: str, dials: dict[str, Any] | None) -> dict[str, Any]:
    """What a measured process does: load, write one token, say what the model holds."""
    import torch
    from transformers import AutoModelForCausalLM

    import dynaexq

    torch.set_num_threads(THREADS)
    config = None if dials is None else dynaexq.DynaExqConfig(**dials)
    wait_for_turn("ready")
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    loaded = time.perf_counter() - start
    model.generate(torch.ones(1, 1, dtype=torch.int64), max_new_tokens=1, do_sample=False)
    first_token = time.perf_counter() - start
    memory = {"dense": model.get_memory_footprint()} if dials is None else model.dynaexq.memory()
    return {"load_s": loaded, "first_token_s": first_token, "memory": memory}


def wait_for_turn(word: str) -> None:
    print(json.dumps(word), flush=True)
    sys.stdin.readline()


class Measured:
    """A process that is watched from outside while it loads."""

    def __init__(self, directory: Path, dials: dict[str, Any] | None):
        args = [sys.executable, str(Path(__file__)), "--load", str(directory), json.dumps(dials)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(args, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline()) == "ready"
        self.baseline = self.peak = anonymous_bytes(self.process.pid)

    def run(self) -> dict[str, Any]:
        """Let it go; what it reports, and the most anonymous memory it had above its imports."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        sampler = threading.Thread(target=self._sample)
        sampler.start()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        report = json.loads(self.process.stdout.readline())
        self.process.stdin.close()
        self.process.wait()
        sampler.join()
        return report | {"peak_anonymous": self.peak - self.baseline}

    def _sample(self) -> None:
        while self.process.poll() is None:
            try:
                self.peak = max(self.peak, anonymous_bytes(self.process.pid))
            except (FileNotFoundError, ProcessLookupError, KeyError):
                return
            time.sleep(0.002)


def anonymous_bytes(pid: int) -> int:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def drop_from_cache(directory: Path) -> None:
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(files: list[Path]) -> float:
    """Seconds to read files from beginning to end into memory that is there."""
    buffer = memoryview(bytearray(max(file.stat().st_size for file in files)))
    buffer[::4096] = bytes(len(buffer[::4096]))
    start = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            position = 0
            while count := file.readinto(buffer[position:]):
                position += count
    return time.perf_counter() - start


def measure_memory(source: Path, packed: Path, least: int) -> dict[str, Any]:
    """Peak anonymous memory of the three ways to load, and what of it the model itself takes."""
    ways = {
        "plain Transformers": (source, None),
        "16 bit to int4": (source, {"hbm_budget": "2GiB", "tiers": ["int4"]}),
        "16 bit to int4 + int8": (source, {"hbm_budget": "2GiB", "tiers": ["int4", "int8"]}),
        "packed": (packed, {"hbm_budget": least}),
    }
    rows = {}
    for name, (directory, dials) in ways.items():
        report = Measured(directory, dials).run()
        held = sum(report["memory"].get(part, 0) for part in ("dense", "base", "upgrade"))
        if name.endswith("int8"):
            held += report["memory"]["upgrade"]  # the copy in RAM from which upgrades are fetched
        rows[name] = {
            "peak_mib": report["peak_anonymous"] / MIB,
            "held_mib": held / MIB,
            "above_mib": (report["peak_anonymous"] - held) / MIB,
            "load_s": report["load_s"],
        }
    return rows


def measure_start(packed: Path, least: int) -> dict[str, Any]:
    """Time from `from_pretrained` to the first token against reading the base once, in turn, each from the disk."""
    files = sorted(packed.glob("experts-base-*"))
    reading, starting = [], []
    for _ in range(RUNS):
        drop_from_cache(packed)
        reading.append(read_once(files))
        process = Measured(packed, {"hbm_budget": least})
        drop_from_cache(packed)
        starting.append(process.run()["first_token_s"])
    read, start = statistics.median(reading), statistics.median(starting)
    nbytes = sum(file.stat().st_size for file in files)
    return {
        "base_bytes": nbytes,
        "read_s": read,
        "read_bytes_per_s": nbytes / read,
        "first_token_s": start,
        "ratio": start / read,
        "reads_s": reading,
        "first_tokens_s": starting,
    }


def measure_quantising() -> dict[str, Any]:
    """Seconds an expert of the 30B shape on all cores, and what 6,144 of them would take."""
    import torch

    from dynaexq.formats import ExpertCodec, ExpertWeights
    from dynaexq.records import ExpertShape

    torch.set_num_threads(THREADS)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    shape = ExpertShape(HIDDEN, INTERMEDIATE, 2 * INTERMEDIATE, has_bias=False, transposed=False)
    rows = {}
    for device in devices:
        weights = ExpertWeights(
            torch.randn(1, 2 * INTERMEDIATE, HIDDEN, device=device).bfloat16(),
            torch.randn(1, HIDDEN, INTERMEDIATE, device=device).bfloat16(),
        )
        for tiers in (("int4",), ("int2", "int4"), ("int4", "int8")):
            codec = ExpertCodec(shape, torch.bfloat16, tiers)
            times = []
            for _ in range(RUNS + 1):
                start = time.perf_counter()
                codec.encode(weights)
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times[1:])
            rows[f"{device} {'+'.join(tiers)}"] = {
                "s_per_expert": seconds,
                "minutes_for_qwen3_30b": seconds * EXPERTS_OF_30B / 60,
            }
    return rows


def least_budget(directory: Path) -> int:
    """Bytes of the dense weights and every base: with it no upgrade is read at the start."""
    from transformers import AutoModelForCausalLM

    import dynaexq

    try:
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=dynaexq.DynaExqConfig(hbm_budget=1))
    except dynaexq.BudgetError as error:
        return error.least
    raise AssertionError("one byte is not enough for any model")


@contextmanager
def checkpoints(directory: str | None) -> Iterator[tuple[Path, Path]]:
    """The generated checkpoint and its packed form, made if they are not there."""
    from dynaexq.hf.conversion import quantize_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        home = Path(directory or temporary)
        source, packed = home / "source", home / "packed"
        if not source.is_dir():
            generate(source)
        if not packed.is_dir():
            quantize_checkpoint(source, packed, tiers=("int4", "int8"))
        yield source, packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", help="keep the checkpoints here, and use those that are there")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load[0], json.loads(args.load[1]))), flush=True)
        return
    with checkpoints(args.dir) as (source, packed):
        least = least_budget(packed)
        result = {
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "quantising": measure_quantising(),
            "memory": measure_memory(source, packed, least),
            "start": measure_start(packed, least),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
