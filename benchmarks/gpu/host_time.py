"""What a layer of experts costs the host on the CUDA path: launches counted, Python timed, without a GPU.

    python benchmarks/gpu/host_time.py [--json FILE]

Triton compiles the kernels of Qwen3-30B-A3B's layer for compute capability 9.0 and goes all its way to a launch, which
does nothing: its driver is one that knows no device, and tensors lie on the CPU. So the figures are what eager
decoding pays for each layer besides Transformers' own share, on this machine's CPU.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades
from dynaexq.kernels.linear_layer import LinearLayer
from dynaexq.quantization import ExpertCodec, LinearCodec
from dynaexq.types import ExpertShape

EXPERTS, CHOICES = 128, 8
SHAPE = ExpertShape(2048, 768, 1536, False, False)
TOKENS = (1, 8, 32, 128)
CALLS, ROUNDS = 200, 7
ARCHITECTURE = 90


class Utilities:
    """What Triton asks of a device when it loads a kernel."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # a module, a function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Launcher:
    """Counts launches, and does nothing."""

    count = 0

    def __init__(self, source: Any, metadata: Any):
        pass

    def __call__(self, *arguments: Any) -> None:
        Launcher.count += 1


class Driver:
    """A GPU that is not here."""

    utils, launcher_cls = Utilities(), Launcher

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(ARCHITECTURE, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda


def experts_layer(tokens: int) -> Callable[[], object]:
    """One layer of experts, int4 + int8, counting its routing."""
    from dynaexq.kernels.triton import expert_mlp

    codec = ExpertCodec(SHAPE, torch.bfloat16, ("int4", "int8"))
    base = torch.zeros(EXPERTS, codec.base.nbytes, dtype=torch.uint8)
    layer = ExpertLayer(codec, base, torch.nn.functional.silu, activation_name="silu")
    upgrades = Upgrades(torch.zeros(EXPERTS, dtype=torch.int64), lambda address: base[0])
    counts = torch.zeros(EXPERTS + 2, dtype=torch.int64)
    rows = torch.zeros(tokens, SHAPE.hidden_size, dtype=torch.bfloat16)
    ids = torch.arange(tokens * CHOICES).view(tokens, CHOICES) % EXPERTS
    weights = torch.zeros(tokens, CHOICES, dtype=torch.bfloat16)
    return lambda: expert_mlp(rows, ids, weights, layer, upgrades, counts)


def dense_layer(tokens: int) -> Callable[[], object]:
    """One packed dense layer."""
    from dynaexq.kernels.triton import linear

    codec = LinearCodec(2048, 2048, torch.bfloat16, "int4")
    layer = LinearLayer(codec, torch.zeros(codec.nbytes, dtype=torch.uint8))
    rows = torch.zeros(tokens, 2048, dtype=torch.bfloat16)
    return lambda: linear(rows, layer)


def measured(call: Callable[[], object]) -> dict[str, float]:
    """Launches and microseconds of a call: the median of rounds."""
    call()  # compiles
    before = Launcher.count
    call()
    launches, rounds = Launcher.count - before, []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS)
    return {"launches": launches, "microseconds": 1e6 * statistics.median(rounds)}


@torch.no_grad()
def main(json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None) -> None:
    """Count and time, and print a line for each."""
    import triton  # only now: it is for Linux

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver())
    found = {
        f"{name}, {tokens} tokens": measured(build(tokens))
        for name, build in (("experts", experts_layer), ("dense", dense_layer))
        for tokens in TOKENS
    }
    for name, figures in found.items():
        typer.echo(f"{name:22} {figures['launches']} launches, {figures['microseconds']:.0f} us")
    if json_path:
        json_path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
