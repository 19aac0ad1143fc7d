"""Every benchmark: what it measures, how to run it, where its figures go. `make bench` lists them.

    python benchmarks/registry.py                        list them
    python benchmarks/registry.py layers/cpu [ARG ...]   run one, and write its figures to benchmarks/results

A script checks what it measures before it writes a figure.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results"


class Benchmark(NamedTuple):
    """One benchmark.

    `Benchmark("layers/cpu", "layers/cpu_layer.py", "one layer of experts on a CPU", "cpu_layer.json")` is run by
    `python benchmarks/layers/cpu_layer.py --json benchmarks/results/cpu_layer.json`.

    Attributes:
        script: below benchmarks/.
        measures: in a few words.
        result: the JSON that it writes to benchmarks/results.
        needs: what this machine must have besides, or nothing.
    """

    name: str
    script: str
    measures: str
    result: str
    needs: str = ""

    def command(self) -> list[str]:
        """How to run it with its figures where they belong."""
        target = ["--json", str(RESULTS / self.result)] if self.writes_json else ["--out", str(RESULTS)]
        return [sys.executable, str(HERE / self.script), *target]

    @property
    def writes_json(self) -> bool:
        """Whether it takes the file to write; else the directory, for figures and a picture."""
        return "--json" in (HERE / self.script).read_text()


BENCHMARKS = (
    Benchmark(
        "layers/cpu", "layers/cpu_layer.py", "one layer of experts on a CPU, beside Transformers", "cpu_layer.json"
    ),
    Benchmark(
        "layers/contention", "layers/contention.py", "one layer beside a program that uses a core", "contention.json"
    ),
    Benchmark(
        "serving/load",
        "serving/load.py",
        "a server under the load of eight clients, with control on and off",
        "load.json",
        "the extra serve, and openai",
    ),
    Benchmark(
        "serving/pictures",
        "serving/screenshots.py",
        "nothing: it takes the pictures of the live page, a notebook and dynaexq top",
        "pictures.json",
        "the extra serve, openai and a Chromium",
    ),
    Benchmark(
        "quality/peers",
        "quality/peers.py",
        "KL of our codes and mixes beside GPTQ, HQQ and llama.cpp's codes",
        "peers.json",
        "llama.cpp's libggml-base.so, for its codes",
    ),
    Benchmark(
        "policy/requests",
        "policy/request_streams.py",
        "who has the right experts upgraded when requests of several kinds come",
        "request_streams.json",
    ),
    Benchmark("quality/dense", "quality/dense.py", "KL and bytes of packed dense layers", "dense.json"),
    Benchmark(
        "quality/activations", "quality/activations.py", "KL of rounded activations on a CPU", "activations.json"
    ),
    Benchmark("layers/encode", "layers/encode_speed.py", "weights quantized per second", "encode_speed.json"),
    Benchmark(
        "layers/calibrated",
        "layers/calibrated_layer.py",
        "time and memory of calibrated quantizing at the 30B's shape",
        "calibrated_layer.json",
    ),
    Benchmark(
        "models/whole",
        "models/whole_model.py",
        "a model of the 30B's layers beside llama.cpp: decoding, prefill, parts of a token",
        "whole_model.json",
    ),
    Benchmark("models/cpu", "models/cpu_model.py", "tokens per second of whole models on a CPU", "cpu_model.json"),
    Benchmark(
        "quality/precision", "quality/precision_table.py", "KL by precision and share upgraded", "precision_table.json"
    ),
    Benchmark("quality/shift", "quality/quality.py", "KL while the traffic shifts, at equal bytes", "quality.json"),
    Benchmark(
        "quality/three_tiers",
        "quality/quality_three_tiers.py",
        "two tiers against three in one model",
        "quality_three_tiers.json",
    ),
    Benchmark("quality/quantizers", "quality/quantizers.py", "KL by quantizer and calibration", "quantizers.json"),
    Benchmark("checkpoints/start", "checkpoints/checkpoint.py", "memory and time of loading", "checkpoint.json"),
    Benchmark("training/lora", "training/lora.py", "LoRA on a patched model beside the plain one", "lora.json"),
    Benchmark("quality/padding", "quality/padding.py", "KL of padded batches and of their rows alone", "padding.json"),
    Benchmark("licenses", "licenses.py", "licenses of what is installed", "licenses.json"),
    Benchmark("mutation", "mutation.py", "small wrongs that the tests notice", "mutation.json"),
    Benchmark("start_up", "start_up.py", "seconds to import and of short commands", "start_up.json"),
    Benchmark("policy/speed", "policy/policy_speed.py", "milliseconds per tick", "policy_speed.json"),
    Benchmark("policy/simulate", "policy/simulate.py", "policies on made-up traffic", "simulate.json"),
    Benchmark("policy/replicas", "policy/replicas.py", "1 to 64 replicas of large models", "replicas.json"),
    Benchmark("figures/1", "figures/fig1_activation.py", "routing frequency by workload", "fig1_activation.json"),
    Benchmark("figures/3", "figures/fig3_timeline.py", "swap pipeline against compute", "fig3_timeline.json"),
    Benchmark("figures/4", "figures/fig4_perplexity.py", "perplexity by low-precision share", "fig4_perplexity.json"),
    Benchmark("figures/5", "figures/fig5_latency.py", "latency and throughput by batch", "fig5_latency.json"),
    Benchmark("figures/table1", "figures/table1_accuracy.py", "accuracy on tasks", "table1_accuracy.json", "lm_eval"),
    Benchmark("gpu/host", "gpu/host_time.py", "what a layer costs the host, without a GPU", "host_time.json"),
    Benchmark("gpu/predicted", "gpu/predicted.py", "a layer and a token by arithmetic", "predicted_gpu.json"),
    Benchmark("gpu", "gpu/gpu.py", "correctness and speed on one GPU", "gpu-CARD-CALL.json", "a CUDA device"),
    Benchmark("structure", "structure.py", "packages, floors, arrows; what a call passes through", "structure.json"),
)


def main(
    name: Annotated[str | None, typer.Argument(help="The benchmark to run; all are listed if left out.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Further arguments of its script.")] = None,
) -> None:
    """List the benchmarks, or run one."""
    if name is None:
        Console().print(listing())
        return
    found = next((benchmark for benchmark in BENCHMARKS if benchmark.name == name), None)
    if found is None:
        names = ", ".join(benchmark.name for benchmark in BENCHMARKS)
        raise typer.BadParameter(f"there is no benchmark {name!r}; there are {names}")
    raise typer.Exit(subprocess.run([*found.command(), *(arguments or [])], check=False).returncode)


def listing() -> Table:
    """All benchmarks as a table."""
    table = Table("name", "measures", box=None, header_style="bold")
    for benchmark in BENCHMARKS:
        needs = f" (needs {benchmark.needs})" if benchmark.needs else ""
        table.add_row(benchmark.name, benchmark.measures + needs)
    return table


if __name__ == "__main__":
    typer.run(main)
