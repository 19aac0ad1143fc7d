"""What the native kernel is handed; the structures mirror `src/interface.h`, and every field is 64 bits wide."""

import ctypes

import torch

from dynaexq.kernels.cpu import threads
from dynaexq.kernels.cpu.team import team

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
KINDS = {
    ("top2",): 0,
    ("top2", "third1"): 1,
    ("top2", "third1", "fourth1"): 2,
    ("top2", "middle2"): 3,
    ("top2", "middle2", "low4"): 4,
    ("top4",): 5,
    ("top4", "fifth2"): 6,
    ("top4", "low4"): 7,
    ("weight",): 8,
}
DENSE = KINDS["weight",]
ROLES = {"top2": 0, "top4": 0, "weight": 0, "middle2": 1, "third1": 1, "fourth1": 2, "fifth2": 2, "low4": 2}
GROUP = 64  # of a matrix that has none
WHOLE, UP_ONLY, DOWN_ONLY, DOWN_BACK, UP_BACK = range(5)
INT8, INT16, FLOATS = range(3)
MASKS = {torch.bool: 1, torch.bfloat16: 2, torch.float32: 3}
PRECISIONS = {"auto": (INT8, INT16), "int8": (INT8, INT8), "int16": (INT16, INT16)}
"""What rows are rounded to where they meet codes of at most four bits, and of more."""


def _fields(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


class Part(ctypes.Structure):
    _fields_ = _fields("offset", "in_upgrade")


NOWHERE = Part(-1, 0)


class Reading(ctypes.Structure):
    _fields_ = [*_fields("kind"), ("planes", Part * 3), ("meta", Part), ("unit", Part), ("bias", Part)]


class Matrix(ctypes.Structure):
    _fields_ = [*_fields("rows", "columns", "padded", "group"), ("readings", Reading * 2)]


class Layer(ctypes.Structure):
    _fields_ = [
        ("up", Matrix),
        ("down", Matrix),
        *_fields("num_experts", "base", "base_nbytes", "dtype", "transposed", "gated", "activation"),
    ]


class Team(ctypes.Structure):
    _fields_ = _fields("num_threads", "parallel", "took", "lost")


class Call(ctypes.Structure):
    _fields_ = [
        *_fields("hidden_states", "top_k_index", "top_k_weights", "entries", "output"),
        *_fields("num_tokens", "top_k", "dtype", "stage", "precision", "deep_precision"),
        *_fields("counts", "unit", "largest"),
        ("team", Team),
    ]


class NormKind(ctypes.Structure):
    _fields_ = [*_fields("weight", "columns", "added", "rounded"), ("epsilon", ctypes.c_double)]


class Norm(ctypes.Structure):
    _fields_ = [("kind", NormKind), *_fields("rows", "output", "num_rows")]


class Attention(ctypes.Structure):
    _fields_ = [
        *_fields("query", "key", "value", "mask", "output"),
        *_fields("batch", "heads", "groups", "queries", "keys", "width", "value_width", "mask_kind"),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("query", "key", "value")),
        ("mask_strides", ctypes.c_int64 * 4),
        ("scale", ctypes.c_double),
        ("team", Team),
    ]


class Product(ctypes.Structure):
    _fields_ = _fields("layer", "precision", "deep_precision")


class BeforeAttention(ctypes.Structure):
    _fields_ = [
        *_fields("rows", "num_rows"),
        ("norm", NormKind),
        ("products", Product * 3),
        ("outputs", ctypes.c_int64 * 3),
        ("head_norms", NormKind * 2),
        *_fields("width", "cosine", "sine", "positions"),
        ("team", Team),
    ]


class AfterAttention(ctypes.Structure):
    _fields_ = [
        *_fields("attended", "residual", "output", "num_rows"),
        ("out", Product),
        ("norm", NormKind),
        ("router", Product),
        *_fields("top_k", "normalized", "rounded"),
        ("experts", Product),
        *_fields("entries", "counts", "unit", "largest"),
        ("team", Team),
    ]


class DecoderStep(ctypes.Structure):
    _fields_ = [("before", BeforeAttention), ("attention", Attention), ("after", AfterAttention)]


class DecoderSteps(ctypes.Structure):
    _fields_ = _fields("steps", "count")


def our_team() -> Team:
    """The threads that there are now."""
    return Team(team.size, threads.parallel())


def observe(done: Team) -> None:
    """Tell the team what a call has cost."""
    if done.took:
        team.observe(done.took * 1e-9, done.lost * 1e-9)
