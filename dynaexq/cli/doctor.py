"""dynaexq doctor: what this machine has for dynaexq, what is missing, and what to do about it. It changes nothing."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from dynaexq.kernels.cpu.build import Unavailable, find_compiler, instruction_set, shipped
from dynaexq.kernels.cpu.cache import cache_directory
from dynaexq.kernels.cpu.team import team
from dynaexq.views.words import size

PACKAGES = ("dynaexq", "torch", "transformers", "accelerate", "safetensors", "bitsandbytes", "triton")
EXTRAS = {
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "plots": ("matplotlib",),
}


class Finding(NamedTuple):
    """One line.

    Attributes:
        area: what it is about.
        found: in words.
        remedy: what to do where something is missing; empty where all is well.
    """

    area: str
    found: str
    remedy: str = ""


def findings() -> list[Finding]:
    """All there is to say."""
    return [*_software(), *_machine(), *_gpus(), *_cpu_kernel(), *_optional()]


def figures(found: list[Finding]) -> dict[str, Any]:
    """The same as plain data, for JSON."""
    return {"healthy": not any(finding.remedy for finding in found), "findings": [f._asdict() for f in found]}


def _software() -> Iterator[Finding]:
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        found = _version(name)
        needed = found is None and name != "triton"
        yield Finding(name, found or "not installed", f"pip install {name}" if needed else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding("memory", f"{size(memory.total)}, {size(memory.available)} available")
    yield Finding("cores", f"{os.cpu_count()}, PyTorch uses {torch.get_num_threads()}, kernels {team}")
    directory = cache_directory()
    yield Finding("cache", f"{directory}, {size(shutil.disk_usage(directory).free)} free")


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"PyTorch is built for CUDA {built}, and finds no device" if built else "PyTorch is built without CUDA"
        yield Finding("GPU", f"none: {why}; models run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        yield Finding(f"GPU {index}", f"{properties.name}, {size(properties.total_memory)}, {capability}")
    if find_spec("triton") is None:
        yield Finding("GPU kernels", "Triton is missing", "pip install triton")


def _cpu_kernel() -> Iterator[Finding]:
    try:
        target = instruction_set()
    except Unavailable as error:
        remedy = "use a Linux machine with AVX2 or Arm's dot products, or a GPU"
        yield Finding("CPU kernel", f"none: {error}; experts run through PyTorch, slower", remedy)
        return
    if shipped(target) is not None:
        yield Finding("CPU kernel", f"{target.name}, compiled in this wheel")
        return
    try:
        compiler = " ".join(find_compiler())
    except Unavailable as error:
        yield Finding("CPU kernel", f"{target.name} has to be compiled: {error}", 'pip install "dynaexq[compiler]"')
        return
    yield Finding("CPU kernel", f"{target.name}, compiled when first needed by {compiler}")


def _optional() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        said = f'without {", ".join(missing)}: pip install "dynaexq[{extra}]"' if missing else "installed"
        yield Finding(f"extra: {extra}", said)
    startup = Path(sys.prefix).rglob("dynaexq.pth")
    hook = next(startup, None)
    yield Finding("found without import", "yes" if hook else "no: `import dynaexq` before loading a model")
