"""The native kernel in a program of its own, called like the library: what it reads is written to a file first."""

import ctypes
import subprocess
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from dynaexq.kernels import Upgrades
from dynaexq.kernels.cpu import build, interface

DRIVER = Path(__file__).with_name("cpu_kernel_driver.cpp")
MASK_SIZES = {0: 0, **{number: dtype.itemsize for dtype, number in interface.MASKS.items()}}
SIZES = {number: dtype.itemsize for dtype, number in interface.DTYPES.items()}


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
        self.upgrades = upgrades

    def __call__(self, layer_reference: Any, call_reference: Any) -> int:
        layer, call = layer_reference._obj, call_reference._obj
        choices = call.num_tokens * call.top_k
        rows = {
            interface.DOWN_ONLY: choices * layer.down.columns,
            interface.DOWN_BACK: call.num_tokens * layer.down.rows,
            interface.UP_BACK: choices * layer.up.rows,
        }.get(call.stage, call.num_tokens * layer.up.columns)
        written = {
            interface.UP_ONLY: choices * layer.up.rows,
            interface.DOWN_BACK: choices * layer.down.columns,
            interface.UP_BACK: call.num_tokens * layer.up.columns,
        }.get(call.stage, call.num_tokens * layer.down.rows)
        parts = [
            *_layer(layer),
            bytes(call),
            ctypes.string_at(call.hidden_states, rows * SIZES[call.dtype]),
            ctypes.string_at(call.top_k_index, choices * 8) if call.top_k_index else b"",
            ctypes.string_at(call.top_k_weights, choices * 4) if call.top_k_weights else b"",
            *self._entries(call.entries, layer.num_experts),
        ]
        self._fill(call.output, "forward", parts, written * SIZES[call.dtype])
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
        self._fill(call.output, "attend", parts, 2 * queries * call.value_width)
        return 0

    def before_attention(self, call_reference: Any) -> int:
        """Stands where `Library.before_attention` does."""
        call = call_reference._obj
        layers = [interface.Layer.from_address(product.layer) for product in call.products]
        angles = 2 * call.positions * call.width
        parts = [
            bytes(call),
            ctypes.string_at(call.rows, 2 * call.num_rows * call.norm.columns),
            ctypes.string_at(call.cosine, angles),
            ctypes.string_at(call.sine, angles),
            *(ctypes.string_at(norm.weight, 2 * norm.columns) for norm in (call.norm, *call.head_norms)),
            *chain.from_iterable(map(_layer, layers)),
        ]
        sizes = [2 * call.num_rows * layer.up.rows for layer in layers]
        written = self._run("before_attention", parts, sum(sizes))
        for output, size, end in zip(call.outputs, sizes, accumulate(sizes), strict=True):
            ctypes.memmove(output, written[end - size : end], size)
        return 0

    def after_attention(self, call_reference: Any) -> int:
        """Stands where `Library.after_attention` does; what it counts is lost."""
        call = call_reference._obj
        products = call.out, call.router, call.experts
        out, router, experts = (interface.Layer.from_address(product.layer) for product in products)
        size = 2 * call.num_rows * out.up.rows
        parts = [
            bytes(call),
            ctypes.string_at(call.attended, 2 * call.num_rows * out.up.columns),
            ctypes.string_at(call.residual, size),
            ctypes.string_at(call.norm.weight, 2 * call.norm.columns),
            *chain.from_iterable(map(_layer, (out, router, experts))),
            ctypes.string_at(call.counts, 8 * (experts.num_experts + 2)) if call.counts else b"",
            *self._entries(call.entries, experts.num_experts),
        ]
        self._fill(call.output, "after_attention", parts, size)
        return 0

    def pass_layers(self, steps_reference: Any) -> int:
        """Stands where `Library.pass_layers` does, for one layer over keys and values that lie in a row."""
        step = interface.DecoderStep.from_address(steps_reference._obj.steps)
        before, attention, after = step.before, step.attention, step.after
        rows, angles = 2 * before.num_rows * before.norm.columns, 2 * before.positions * before.width
        cached = 2 * attention.batch * attention.groups * attention.keys * attention.width
        scores = attention.batch * attention.queries * attention.keys
        norms = (before.norm, *before.head_norms, after.norm)
        products = (*before.products, after.out, after.router)
        experts = interface.Layer.from_address(after.experts.layer)
        parts = [
            bytes(step),
            ctypes.string_at(before.rows, rows),
            ctypes.string_at(before.cosine, angles),
            ctypes.string_at(before.sine, angles),
            *(ctypes.string_at(norm.weight, 2 * norm.columns) for norm in norms),
            *chain.from_iterable(_layer(interface.Layer.from_address(product.layer)) for product in products),
            ctypes.string_at(attention.key, cached),
            ctypes.string_at(attention.value, cached),
            ctypes.string_at(attention.mask, scores * MASK_SIZES[attention.mask_kind]),
            *_layer(experts),
            ctypes.string_at(after.counts, 8 * (experts.num_experts + 2)),
            *self._entries(after.entries, experts.num_experts),
        ]
        written = self._run("pass_layers", parts, rows + 2 * cached)
        for to, begin, size in (
            (after.output, 0, rows),
            (attention.key, rows, cached),
            (attention.value, rows + cached, cached),
        ):
            ctypes.memmove(to, written[begin : begin + size], size)
        return 0

    def _entries(self, address: int, num_experts: int) -> list[bytes]:
        """Kinds, and an upgrade for each that is not 0."""
        entries = (ctypes.c_int64 * num_experts).from_address(address)
        upgraded = [expert for expert, entry in enumerate(entries) if entry & 0xFF]
        kinds = bytes((ctypes.c_int64 * num_experts)(*(entry & 0xFF for entry in entries)))
        return [kinds, *(self.upgrades.of(expert).numpy().tobytes() for expert in upgraded)]

    def _fill(self, output: int, function: str, parts: list[bytes], size: int) -> None:
        ctypes.memmove(output, self._run(function, parts, size), size)

    def _run(self, function: str, parts: list[bytes], size: int) -> bytes:
        """What the program writes, so many bytes."""
        self._case.write_bytes(b"".join(len(part).to_bytes(8, "little") + part for part in parts))
        command = [*self._command, function, self._case, self._output, str(size)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return self._output.read_bytes()


def _layer(layer: Any) -> tuple[bytes, bytes]:
    """Its description, and its base blocks."""
    return bytes(layer), ctypes.string_at(layer.base, layer.num_experts * layer.base_nbytes)
