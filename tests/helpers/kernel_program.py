"""The native kernel in a program of its own, called like the library: what it reads is written to a file first."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynaexq.kernels import Upgrades
from dynaexq.kernels.cpu import build, native

DRIVER = Path(__file__).with_name("cpu_kernel_driver.cpp")
MASK_SIZES = {0: 0, **{number: dtype.itemsize for dtype, number in native.MASKS.items()}}
SIZES = {number: dtype.itemsize for dtype, number in native.DTYPES.items()}


def compile_driver(directory: Path, compiler: tuple[str, ...], flags: Sequence[str]) -> Path:
    """The program, compiled for one thread's test; raises a RuntimeError with what the compiler said."""
    driver = directory / "driver"
    kept = [flag for flag in build.FLAGS if flag not in ("-O3", "-shared", "-fPIC")]
    command = [*compiler, *kept, *flags, str(DRIVER), f"-I{build.SOURCES}", "-lpthread", "-o", str(driver)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return driver


class KernelProgram:
    """Stands where `Library.forward` does.

    Args:
        command: what starts the program, an emulator before it where it is for another CPU.
        upgrades: those that the entries of its calls point to, in the order of experts.
    """

    def __init__(self, command: Sequence[str | Path], directory: Path, upgrades: Upgrades | None = None):
        self._command, self._case, self._output = command, directory / "case", directory / "output"
        self._upgrades = upgrades

    def __call__(self, layer_reference: Any, call_reference: Any) -> int:
        layer, call = layer_reference._obj, call_reference._obj
        choices = call.num_tokens * call.top_k
        rows = {
            native.DOWN_ONLY: choices * layer.down.columns,
            native.DOWN_BACK: call.num_tokens * layer.down.rows,
            native.UP_BACK: choices * layer.up.rows,
        }.get(call.stage, call.num_tokens * layer.up.columns)
        written = {
            native.UP_ONLY: choices * layer.up.rows,
            native.DOWN_BACK: choices * layer.down.columns,
            native.UP_BACK: call.num_tokens * layer.up.columns,
        }.get(call.stage, call.num_tokens * layer.down.rows)
        entries = (ctypes.c_int64 * layer.num_experts).from_address(call.entries)
        upgraded = [expert for expert, entry in enumerate(entries) if entry & 0xFF]
        parts = [
            bytes(layer),
            bytes(call),
            ctypes.string_at(layer.base, layer.num_experts * layer.base_nbytes),
            bytes((ctypes.c_int64 * layer.num_experts)(*(entry & 0xFF for entry in entries))),
            ctypes.string_at(call.hidden_states, rows * SIZES[call.dtype]),
            ctypes.string_at(call.top_k_index, choices * 8) if call.top_k_index else b"",
            ctypes.string_at(call.top_k_weights, choices * 4) if call.top_k_weights else b"",
            *(self._upgrades.of(expert).numpy().tobytes() for expert in upgraded),
        ]
        ctypes.memmove(
            call.output, self.run("forward", parts, written * SIZES[call.dtype]), written * SIZES[call.dtype]
        )
        return 0

    def attend(self, call_reference: Any) -> int:
        """Stands where `Library.attend` does, for tensors that lie in a row and have no axis that is repeated."""
        call = call_reference._obj
        queries = call.batch * call.heads * call.queries
        keys = call.batch * call.groups * call.keys
        parts = [
            bytes(call),
            ctypes.string_at(call.query, 2 * queries * call.width),
            ctypes.string_at(call.key, 2 * keys * call.width),
            ctypes.string_at(call.value, 2 * keys * call.value_width),
            ctypes.string_at(call.mask, queries * call.keys * MASK_SIZES[call.mask_kind]),
        ]
        size = 2 * queries * call.value_width
        ctypes.memmove(call.output, self.run("attend", parts, size), size)
        return 0

    def run(self, function: str, parts: list[bytes], size: int) -> bytes:
        """What the program writes, so many bytes."""
        self._case.write_bytes(b"".join(len(part).to_bytes(8, "little") + part for part in parts))
        command = [*self._command, function, self._case, self._output, str(size)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return self._output.read_bytes()
