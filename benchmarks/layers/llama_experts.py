"""A contestant of `cpu_layer.py`: a layer of experts as llama.cpp multiplies it. It knows nothing of dynaexq.

Needs the source tree of llama.cpp with its static libraries in `build`
(cmake -B build -DBUILD_SHARED_LIBS=OFF -DCMAKE_POSITION_INDEPENDENT_CODE=ON).
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARIES = ("ggml/src/libggml.a", "ggml/src/libggml-cpu.a", "ggml/src/libggml-base.a")


def build(llama: Path) -> ctypes.CDLL:
    """The program behind its C interface, compiled against a tree of llama.cpp."""
    library = Path(tempfile.mkdtemp()) / "llama_experts.so"
    archives = [str(llama / "build" / name) for name in LIBRARIES]
    linked = ["-Wl,--start-group", *archives, "-Wl,--end-group", "-fopenmp", "-lpthread", "-ldl"]
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{llama / 'ggml/include'}"]
    subprocess.run(["c++", *flags, str(SOURCE), *linked, "-o", str(library)], check=True)
    found = ctypes.CDLL(str(library))
    found.experts_new.restype = ctypes.c_void_p
    found.experts_nbytes.restype = ctypes.c_int64
    return found


class LlamaExperts:
    """Experts of one of its types, such as `q4_K`, with float32 rows. Keeps its memory until the process ends."""

    def __init__(self, library: ctypes.CDLL, kind: str, model):
        self._library = library
        sizes = (model.experts_here, model.hidden_size, model.intermediate_size, model.top_k, torch.get_num_threads())
        experts = library.experts_new(kind.encode(), *sizes)
        if experts is None:
            raise ValueError(f"llama.cpp has no type {kind}")
        self._experts = ctypes.c_void_p(experts)
        self._nbytes = library.experts_nbytes(self._experts)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows, ids, weights = hidden_states.float(), top_k_index.int().contiguous(), top_k_weights.float()
        output = torch.empty_like(rows)
        addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (rows, ids, weights, output)]
        self._library.experts_run(self._experts, len(rows), *addresses)
        return output

    def bytes_read(self, top_k_index: Tensor) -> int:
        return len(top_k_index.unique()) * self._nbytes
