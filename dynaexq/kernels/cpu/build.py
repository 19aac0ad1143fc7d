"""The native kernel for this machine: one that came with the package, or compiled when it is first needed and kept.

It knows no layer. Wheels for Linux carry it for every instruction set (`.ci/wheels`); everything else carries its
source. A machine that is not served, or without a compiler where one is needed, gets None and a sentence in the log,
and so does one whose compiler fails or does not end. Set DYNAEXQ_CPU_KERNEL to `torch` to go without, or to the name
of an instruction set to choose a lesser one. `cache` has where what is compiled is kept.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dynaexq.kernels.cpu.cache import cached

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
SHIPPED = Path(__file__).parent / "lib"
"""Where a wheel has what was compiled for it."""
COMPILERS = ("c++", "g++", "clang++")
ZIG = (sys.executable, "-m", "ziglang", "c++")
"""A compiler that comes as a package."""
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-shared", "-fPIC")

SECONDS_TO_ANSWER, SECONDS_TO_COMPILE = 5.0, 300.0
"""What a compiler is given: to say its version, and to compile, which takes ten to sixty, and more beside others."""

Kernel = Callable[..., int]


class Library(NamedTuple):
    """What a compiled kernel offers: the functions of `src/moe.cpp`, without their prefix."""

    forward: Kernel
    rearrange: Kernel
    normalize: Kernel
    attend: Kernel
    before_attention: Kernel
    after_attention: Kernel
    pass_layers: Kernel


class InstructionSet(NamedTuple):
    """What a kernel is compiled for: the CPU's features as Linux names them, and the compiler's flags."""

    name: str
    features: tuple[str, ...]
    flags: tuple[str, ...]


AVX2 = InstructionSet("avx2", ("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c"))
AVX512 = InstructionSet(
    "avx512",
    (*AVX2.features, "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    (*AVX2.flags, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
)
AVX512_VNNI = InstructionSet("avx512vnni", (*AVX512.features, "avx512_vnni"), (*AVX512.flags, "-mavx512vnni"))
AVX512_BF16 = InstructionSet(
    "avx512bf16", (*AVX512_VNNI.features, "avx512_bf16"), (*AVX512_VNNI.flags, "-mavx512bf16", "-DDYNAEXQ_BFLOAT16")
)

NEON = InstructionSet("neon", ("asimd", "asimddp"), ("-march=armv8.2-a+dotprod",))
NEON_I8MM = InstructionSet("neoni8mm", (*NEON.features, "i8mm"), ("-march=armv8.2-a+dotprod+i8mm",))

INSTRUCTION_SETS = (AVX512_BF16, AVX512_VNNI, AVX512, AVX2, NEON_I8MM, NEON)
"""The best first."""


class Unavailable(Exception):
    """There is no native kernel on this machine; the message says why."""


@functools.cache
def load(all_bfloat16: bool) -> Library | None:
    """The native kernel of this machine, or None. Compiles, which takes ten to sixty seconds, where it must.

    Args:
        all_bfloat16: rows and 16-bit weights are bfloat16, which some machines multiply directly; else the kernel
            works in float32, whatever the dtypes.
    """
    try:
        target = instruction_set()
        if target is AVX512_BF16 and not all_bfloat16:
            target = AVX512_VNNI
        return open_library(shipped(target) or compiled(target))
    except (Unavailable, OSError, AttributeError) as error:
        logger.warning("no native CPU kernel, experts run through PyTorch instead, slower: %s", error)
        return None


def open_library(path: Path) -> Library:
    """The functions of a compiled library."""
    library = ctypes.CDLL(str(path))
    functions = [getattr(library, f"dynaexq_{name}") for name in Library._fields]
    for function in functions:
        function.argtypes = (ctypes.c_void_p,) * (2 if function is functions[0] else 1)
    return Library(*functions)


def instruction_set() -> InstructionSet:
    """The best this CPU has, or the one that DYNAEXQ_CPU_KERNEL names."""
    wanted = os.environ.get("DYNAEXQ_CPU_KERNEL", "")
    if wanted == "torch":
        raise Unavailable("DYNAEXQ_CPU_KERNEL=torch")
    features = cpu_features()
    for candidate in INSTRUCTION_SETS:
        if features.issuperset(candidate.features) and wanted in ("", candidate.name):
            return candidate
    names = ", ".join(candidate.name for candidate in INSTRUCTION_SETS)
    raise Unavailable(f"expected a Linux machine with {wanted or 'one of ' + names}")


@functools.cache
def cpu_features() -> frozenset[str]:
    """Features of the CPU in Linux's words; none elsewhere."""
    key = {"x86_64": "flags", "AMD64": "flags", "aarch64": "Features"}.get(platform.machine())
    if key is None:
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith(key)), "").split())


def shipped(target: InstructionSet) -> Path | None:
    """The library for `target` that came with the package, unless CXX names a compiler to do it here."""
    library = SHIPPED / f"moe-{target.name}.so"
    return library if library.is_file() and not os.environ.get("CXX") else None


def compiled(target: InstructionSet, extra_flags: tuple[str, ...] = ()) -> Path:
    """The shared library for `target`, from the cache or compiled into it.

    Raises:
        Unavailable: no compiler, or it failed, or the cache cannot be written.
    """
    compiler = find_compiler()
    flags = (*flags_for(target, compiler), *extra_flags)
    name = f"moe-{target.name}-{_fingerprint(compiler, flags)}.so"
    try:
        return cached(name, lambda library: _compile(compiler, flags, library))
    except OSError as error:
        raise Unavailable(f"cannot compile and keep {name}: {error}; set DYNAEXQ_CACHE_DIR") from error


def find_compiler() -> tuple[str, ...]:
    """What calls a C++ compiler: $CXX before all, and the package ziglang after all."""
    candidates = filter(None, (os.environ.get("CXX"), *COMPILERS))
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is not None:
        return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return ZIG
    names = ", ".join(COMPILERS)
    raise Unavailable(f"no C++ compiler found, looked for {names}; set CXX, or install one, or pip install ziglang")


def flags_for(target: InstructionSet, compiler: tuple[str, ...]) -> tuple[str, ...]:
    """What tells `compiler` to make the library for `target`."""
    flags = target.flags
    if compiler == ZIG:
        flags = tuple(flag.replace("-march=armv8.2-a", "-mcpu=generic+v8_2a") for flag in flags)
    return (*FLAGS, *flags)


def _fingerprint(compiler: tuple[str, ...], flags: tuple[str, ...]) -> str:
    """Changes with the source, the compiler, the flags and the CPU."""
    digest = hashlib.sha256()
    version = _run((*compiler, "--version"), SECONDS_TO_ANSWER)
    for part in (version, *flags, *(path.read_text() for path in sorted(SOURCES.iterdir()))):
        digest.update(part.encode() + b"\0")
    digest.update(" ".join(sorted(cpu_features())).encode())
    return digest.hexdigest()[:16]


def _compile(compiler: tuple[str, ...], flags: tuple[str, ...], library: Path) -> None:
    logger.info("compiling the CPU kernel for this machine with %s, once", " ".join(compiler))
    _run((*compiler, *flags, str(SOURCES / "moe.cpp"), "-o", str(library)), SECONDS_TO_COMPILE)


def _run(command: tuple[str, ...], seconds: float) -> str:
    """What the compiler says; it and all that it has started are ended after `seconds`, or with this call."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        said, complaint = process.communicate(timeout=seconds)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Unavailable(f"{command[0]} did not end within {seconds:g} seconds") from error
        raise
    if process.returncode:
        raise Unavailable(f"{command[0]} failed: {complaint.strip()[:400]}")
    return said
