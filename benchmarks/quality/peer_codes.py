"""The codes of others, as experts read back: RTN, HQQ, GPTQ, and llama.cpp's through its own library.

GPTQ is Frantar, Ashkboos, Hoefler and Alistarh (2023) as it is commonly used: columns in order, one per cent of
damping, a grid that spans the range of each group when its first column comes.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from quantizers import METHODS
from torch import Tensor
from tqdm import tqdm

from dynaexq.quantization import ExpertWeights
from dynaexq.weights.calibration import Met

FORMATS = ((2, 64), (3, 64), (3, 128), (4, 64))
DAMPING = 0.01
SUPER_BLOCK = 256
GGML_TYPES = {
    "iq1_m": 29,
    "iq2_xxs": 16,
    "iq2_xs": 17,
    "iq2_s": 22,
    "q2_K": 10,
    "iq3_xxs": 18,
    "q3_K": 11,
    "iq3_s": 21,
    "iq4_xs": 23,
    "iq4_nl": 20,
    "q4_K": 12,
    "q5_K": 13,
}

Matrices = list[tuple[ExpertWeights, list[tuple[Met, Met]]]]
"""Of each layer the weights of all experts, and for each expert what its two matrices meet."""


@dataclass(frozen=True)
class Reading:
    """Experts as some code has them: of each layer both matrices `[E, N, K]`."""

    who: str
    code: str
    calibrated: bool
    bits: float
    matrices: list[tuple[Tensor, Tensor]]


def through(experts: Matrices, read: Callable[[Tensor, Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each expert's matrices read back, given their float32 weights `[N, K]` and moments `[K, K]`."""
    found = []
    for weights, known in experts:
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for expert, met in enumerate(known):
            for number, matrix in enumerate((weights.up[expert], weights.down[expert])):
                parts[number].append(read(matrix.float(), met[number].moments.float()))
        found.append((torch.stack(parts[0]), torch.stack(parts[1])))
    return found


def plain_codes(experts: Matrices) -> Iterator[Reading]:
    """Round to nearest, with whole zero points, and half-quadratic splitting, with zero points in 16 bits."""
    for bits, group_size in FORMATS:
        for who, overhead in (("RTN", 16 + bits), ("HQQ", 32)):
            matrices = through(experts, partial(_plain, who, bits, group_size))
            yield Reading(who, f"int{bits} g{group_size}", False, bits + overhead / group_size, matrices)


def gptq_codes(experts: Matrices) -> Iterator[Reading]:
    """Error feedback on each expert's own second moments."""
    for bits, group_size in tqdm(FORMATS, desc="GPTQ", unit="code"):
        matrices = through(experts, partial(gptq, bits=bits, group_size=group_size))
        yield Reading("GPTQ", f"int{bits} g{group_size}", True, bits + (16 + bits) / group_size, matrices)


def _plain(method: str, bits: int, group_size: int, weights: Tensor, moments: Tensor) -> Tensor:
    return METHODS[method](weights, bits, min(group_size, weights.shape[1]))


def gptq(weights: Tensor, moments: Tensor, bits: int, group_size: int) -> Tensor:
    """`weights [N, K]` as their codes read, each column's error passed on to those after it."""
    group_size = min(group_size, weights.shape[1])
    weights, most = weights.clone(), 2**bits - 1
    unmet = moments.diagonal() == 0
    moments = moments + torch.diag(unmet.float() + DAMPING * moments.diagonal().mean())
    feedback = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    read = torch.empty_like(weights)
    for column in range(weights.shape[1]):
        if column % group_size == 0:
            low, high = weights[:, column : column + group_size].aminmax(dim=1)
            low, high = low.clamp_max(0), high.clamp_min(0)
            scale = ((high - low) / most).clamp_min(1e-8).half().float()
            zero = (-low / scale).round()
        code = (weights[:, column] / scale + zero).round().clamp(0, most)
        read[:, column] = (code - zero) * scale
        error = (weights[:, column] - read[:, column]) / feedback[column, column]
        weights[:, column + 1 :] -= error[:, None] * feedback[column, column + 1 :]
    return read


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


class Ggml:
    """llama.cpp's codes; `library` is its `libggml-base.so`."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def codes(self, experts: Matrices) -> Iterator[Reading]:
        """Every code, with the importance matrix, and those without that can do without it."""
        for name, number in tqdm(GGML_TYPES.items(), desc="llama.cpp", unit="code"):
            for calibrated in (False, True):
                if not calibrated and self._library.ggml_quantize_requires_imatrix(number):
                    continue
                traits = self._library.ggml_get_type_traits(number).contents
                bits = 8 * traits.type_size / traits.blck_size
                matrices = through(experts, partial(self._read, number, calibrated))
                yield Reading("llama.cpp", name, calibrated, bits, matrices)

    def _read(self, number: int, calibrated: bool, weights: Tensor, moments: Tensor) -> Tensor:
        """`weights [N, K]` as their codes read. Rows shorter than a super-block share one."""
        columns = max(weights.shape[1], SUPER_BLOCK)
        source = np.ascontiguousarray(weights.reshape(-1, columns).numpy(), dtype=np.float32)
        importance = moments.diagonal() / moments.diagonal().mean().clamp_min(1e-20)
        repeated = importance.clamp_min(1e-6).repeat(columns // len(importance)).float().numpy()
        weight = np.ascontiguousarray(repeated) if calibrated else None
        traits = self._library.ggml_get_type_traits(number).contents
        packed = np.zeros(source.size // traits.blck_size * traits.type_size, dtype=np.uint8)
        written = self._library.ggml_quantize_chunk(
            number,
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_void_p(packed.ctypes.data),
            ctypes.c_int64(0),
            ctypes.c_int64(len(source)),
            ctypes.c_int64(columns),
            ctypes.c_void_p(None if weight is None else weight.ctypes.data),
        )
        if written != packed.nbytes:
            raise RuntimeError(f"expected {packed.nbytes} bytes of codes from llama.cpp, got {written}")
        read = np.empty_like(source)
        traits.to_float(packed.ctypes.data, read.ctypes.data, source.size)
        return torch.from_numpy(read).view_as(weights)
