"""Loading, packing and reloading a generated 1.2 GB Qwen3-MoE checkpoint: memory, start-up, quantizing speed.

    python benchmarks/checkpoints/checkpoint.py [--dir DIR] [--json FILE]

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

from dynaexq.hf.config import DynaExqConfig

HIDDEN, INTERMEDIATE, LAYERS, EXPERTS = 2048, 768, 2, 64  # experts of the shape of Qwen3-30B-A3B
EXPERTS_OF_30B = 48 * 128
RUNS = 9
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


def load(directory: str, options: dict[str, Any] | None, warm: bool) -> dict[str, Any]:
    """What a measured process does: load, write one token, say what the model holds.

    Args:
        warm: do the same with the embedded model first, so that nothing is left to import, or to set up once; then
            read the base once, for comparison.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import dynaexq
    from dynaexq.cli.demo import embedded_model

    torch.set_num_threads(THREADS)
    config = None if options is None else dynaexq.DynaExqConfig(**options)
    prompt = torch.ones(1, 1, dtype=torch.int64)
    if warm:
        small = dynaexq.DynaExqConfig(hbm_budget="1GiB", tiers=("int4",), quantizer="rtn")
        model = AutoModelForCausalLM.from_pretrained(embedded_model(), quantization_config=small)
        model.generate(prompt, max_new_tokens=1, do_sample=False)
    read, kept = read_once(directory) if warm else (0.0, [])
    wait_for_turn("ready")
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    loaded = time.perf_counter() - start
    model.generate(prompt, max_new_tokens=1, do_sample=False)
    first_token = time.perf_counter() - start
    memory = {"dense": model.get_memory_footprint()} if options is None else model.dynaexq.memory()
    del kept  # until now, so that the memory it took was new, and that of the model is, too
    return {"load_s": loaded, "first_token_s": first_token, "read_s": read, "memory": memory}


def wait_for_turn(word: str) -> None:
    print(json.dumps(word), flush=True)
    sys.stdin.readline()


class Measured:
    """A process that is watched from outside while it loads."""

    def __init__(self, directory: Path, options: dict[str, Any] | None, warm: bool = False):
        args = [sys.executable, str(Path(__file__)), "--load", str(directory), json.dumps(options), json.dumps(warm)]
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


def read_once(directory: str) -> tuple[float, list[bytes]]:
    """Seconds to read the base of every expert from the disk into new memory, as a slab is; and what was read."""
    files = sorted(Path(directory).glob("experts-base-*"))
    drop_from_cache(Path(directory))
    start = time.perf_counter()
    kept = [file.read_bytes() for file in files]
    return time.perf_counter() - start, kept


def measure_memory(source: Path, packed: Path, least: int) -> dict[str, Any]:
    """Peak anonymous memory of each way to load, and what of it packed experts take."""
    ways = {
        "plain Transformers": (source, None),
        "16 bit to int4": (source, {"hbm_budget": "2GiB", "tiers": ["int4"]}),
        "16 bit to int4 + int8": (source, {"hbm_budget": "2GiB", "tiers": ["int4", "int8"]}),
        "packed": (packed, {"hbm_budget": least}),
    }
    rows = {}
    for name, (directory, options) in ways.items():
        report = Measured(directory, options).run()
        memory = report["memory"]
        experts = memory.get("base", 0) + memory.get("upgrade", 0)
        if name.endswith("int8"):
            experts += memory["upgrade"]  # the copy in RAM from which upgrades are fetched
        rows[name] = {
            "peak_mib": report["peak_anonymous"] / MIB,
            "dense_mib": memory["dense"] / MIB,  # mapped from the files, so not anonymous
            "experts_mib": experts / MIB,
            "above_experts_mib": (report["peak_anonymous"] - experts) / MIB,
            "load_s": report["load_s"],
        }
    return rows


def measure_start(packed: Path, least: int) -> dict[str, Any]:
    """Time from `from_pretrained` to the first token against reading the base once, each from the disk.

    Both happen in one process, as what new memory costs depends on the process and its history.
    """
    reports = []
    for _ in range(RUNS):
        process = Measured(packed, {"hbm_budget": least}, warm=True)
        drop_from_cache(packed)
        reports.append(process.run())
    read, first_token = ([report[name] for report in reports] for name in ("read_s", "first_token_s"))
    nbytes = sum(file.stat().st_size for file in packed.glob("experts-base-*"))
    return {
        "base_bytes": nbytes,
        "read_s": statistics.median(read),
        "read_bytes_per_s": nbytes / statistics.median(read),
        "first_token_s": statistics.median(first_token),
        "ratio": statistics.median(one / other for one, other in zip(first_token, read, strict=True)),
        "reads_s": read,
        "first_tokens_s": first_token,
    }


def measure_quantizing() -> dict[str, Any]:
    """Seconds per expert of the 30B shape on all cores, and what 6,144 of them would take."""
    import torch

    from dynaexq.quantization import ExpertCodec, ExpertWeights
    from dynaexq.types import ExpertShape

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
    from dynaexq.hf.convert import quantize_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        home = Path(directory or temporary)
        source, packed = home / "source", home / "packed"
        if not source.is_dir():
            generate(source)
        if not packed.is_dir():
            quantize_checkpoint(source, packed, DynaExqConfig(tiers=("int4", "int8")))
        yield source, packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", help="keep the checkpoints here, and use those that are there")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load[0], *map(json.loads, args.load[1:]))), flush=True)
        return
    with checkpoints(args.dir) as (source, packed):
        least = least_budget(packed)
        result = {
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "quantizing": measure_quantizing(),
            "memory": measure_memory(source, packed, least),
            "start": measure_start(packed, least),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
