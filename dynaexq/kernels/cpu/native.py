"""Layers as the native kernel sees them: where the parts of their matrices lie, and one call for a forward.

The structures mirror `src/interface.h`; every field is 64 bits wide.
"""

import ctypes

import torch
from torch import Tensor

from dynaexq.errors import InputError
from dynaexq.kernels.cpu import threads
from dynaexq.kernels.cpu.build import Kernel
from dynaexq.kernels.cpu.team import team
from dynaexq.kernels.expert_layer import ExpertLayer
from dynaexq.kernels.row_norm import NormKind
from dynaexq.quantization.codec import MATRICES
from dynaexq.quantization.layout import BlockLayout, MatrixLayout
from dynaexq.quantization.linear_codec import WEIGHT, LinearCodec
from dynaexq.types import LARGEST_MASS, MASS_UNIT

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
DENSE = 5
KINDS = {
    ("top2",): 0,
    ("top4",): 1,
    ("top2", "middle2"): 2,
    ("top4", "low4"): 3,
    ("top2", "middle2", "low4"): 4,
    ("weight",): DENSE,
}
ROLES = {"top2": 0, "top4": 0, "weight": 0, "middle2": 1, "low4": 2}
GROUP = 64  # of a matrix that has none
ATTENTION_WIDTH = 32
"""Of which the widths of keys and of values are multiples."""
WHOLE, UP_ONLY, DOWN_ONLY, DOWN_BACK, UP_BACK = range(5)
INT8, INT16, FLOATS = range(3)
MASKS = {torch.bool: 1, torch.bfloat16: 2, torch.float32: 3}
PRECISIONS = {"auto": (INT8, INT16), "int8": (INT8, INT8), "int16": (INT16, INT16)}
"""What rows are rounded to where they meet codes of at most four bits, and of eight."""


def _fields(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


class _Part(ctypes.Structure):
    _fields_ = _fields("offset", "in_upgrade")


_NOWHERE = _Part(-1, 0)


class _Reading(ctypes.Structure):
    _fields_ = [*_fields("kind"), ("planes", _Part * 3), ("meta", _Part), ("unit", _Part), ("bias", _Part)]


class _Matrix(ctypes.Structure):
    _fields_ = [*_fields("rows", "columns", "padded", "group"), ("readings", _Reading * 2)]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("up", _Matrix),
        ("down", _Matrix),
        *_fields("num_experts", "base", "base_nbytes", "dtype", "transposed", "gated", "activation"),
    ]


class _Call(ctypes.Structure):
    _fields_ = _fields(
        *("hidden_states", "top_k_index", "top_k_weights", "entries", "output"),
        *("num_tokens", "top_k", "dtype", "stage", "num_threads", "parallel", "precision", "deep_precision"),
        *("counts", "unit", "largest", "took", "lost"),
    )


class _Norm(ctypes.Structure):
    _fields_ = [
        *_fields("rows", "weight", "output", "num_rows", "columns", "added", "rounded"),
        ("epsilon", ctypes.c_double),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *_fields("query", "key", "value", "mask", "output"),
        *_fields("batch", "heads", "groups", "queries", "keys", "width", "value_width", "mask_kind"),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("query", "key", "value")),
        ("mask_strides", ctypes.c_int64 * 4),
        ("scale", ctypes.c_double),
        *_fields("num_threads", "parallel", "took", "lost"),
    ]


def precisions(activations: str, dtype: torch.dtype) -> tuple[int, int]:
    """As in `PRECISIONS`; rows of float32 stay what they are."""
    return (FLOATS, FLOATS) if dtype == torch.float32 else PRECISIONS[activations]


class NativeLayer:
    """One layer behind the kernel, for rows of one dtype.

    Where the layer names its activation, a forward is one call; else one call each side of the activation in Python,
    over the rows of all experts at once.
    """

    def __init__(self, layer: ExpertLayer, dtype: torch.dtype, kernel: Kernel):
        self._kernel, self._dtype = kernel, dtype
        self._activation, self._base = layer.activation, layer.base
        self._fused = layer.activation_name in ACTIVATIONS
        self._shape, self._num_experts = layer.codec.shape, layer.num_experts
        self._precisions = precisions(layer.activations, dtype)
        self._down_bias = layer.codec.base_layout.view(layer.base).get("down.bias")
        self._description = _describe(layer)

    def __call__(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        entries: Tensor,
        counts: Tensor | None = None,
    ) -> Tensor:
        """The layer's output `[N, H]`; arguments as in `dispatch.expert_mlp`, entries as in `Upgrades`."""
        self._check_words(entries, self._num_experts)
        if counts is not None:
            self._check_words(counts, self._num_experts + 2)
        rows = hidden_states.contiguous()
        routing = (top_k_index.to(torch.int64).contiguous(), top_k_weights.to(torch.float32).contiguous(), entries)
        output = torch.empty_like(rows)
        if self._fused:
            self._run(WHOLE, rows, routing, output, counts)
            return output
        # Choices of other ranks' experts leave their rows as they are, so these start as zeros.
        up = torch.zeros(top_k_index.numel(), self._shape.up_rows, dtype=self._dtype)
        self._run(UP_ONLY, rows, routing, up, counts)
        self._run(DOWN_ONLY, self._activation(up).to(self._dtype).contiguous(), routing, output)
        return output

    def gradients(
        self, grad: Tensor, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, entries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `hidden_states [N, H]` and of `top_k_weights [N, k]`, in float32, from that of the output.

        The first matrix is multiplied once more, and both are gone through backwards; no expert is ever decoded.
        """
        self._check_words(entries, self._num_experts)
        num_choices, shape, grad = top_k_index.numel(), self._shape, grad.float().contiguous()
        factors = top_k_weights.to(torch.float32).contiguous()
        routing = (top_k_index.to(torch.int64).contiguous(), factors, entries)
        # Choices of other ranks' experts leave their rows as they are, so these start as zeros.
        up = torch.zeros(num_choices, shape.up_rows, dtype=self._dtype)
        self._run(UP_ONLY, hidden_states.contiguous(), routing, up)
        grad_inner = torch.zeros(num_choices, shape.intermediate_size, dtype=torch.float32)
        self._run(DOWN_BACK, grad, routing, grad_inner)
        # Inside an operator autograd records nothing; `torch.func` brings its own.
        inner, pull_back, *_ = torch.func.vjp(self._activation, up.float())
        grad_weights = (inner * grad_inner).sum(-1).view_as(factors)
        if self._down_bias is not None:
            ours = (top_k_index >= 0) & (top_k_index < self._num_experts)
            of_bias = grad @ self._down_bias.float().T  # [N, E]
            grad_weights += of_bias.gather(1, routing[0].where(ours, 0)).where(ours, 0)
        (grad_up,) = pull_back(grad_inner * factors.view(-1, 1))
        grad_hidden = torch.empty_like(hidden_states, dtype=torch.float32, memory_format=torch.contiguous_format)
        self._run(UP_BACK, grad_up.contiguous(), routing, grad_hidden)
        return grad_hidden, grad_weights

    @staticmethod
    def _check_words(words: Tensor, count: int) -> None:
        """Raise an InputError unless the kernel may take `words` for so many int64 in a row."""
        if words.shape != (count,) or words.dtype != torch.int64 or not (words.is_contiguous() and words.is_cpu):
            raise InputError(f"expected int64 [{count}] in a row on the CPU, got {words.dtype} {list(words.shape)}")

    def _run(
        self,
        stage: int,
        rows: Tensor,
        routing: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        counts: Tensor | None = None,
    ) -> None:
        index, weights, entries = routing
        call = _Call(
            rows.data_ptr(),
            index.data_ptr(),
            weights.data_ptr(),
            entries.data_ptr(),
            output.data_ptr(),
            *index.shape,
            DTYPES[rows.dtype],
            stage,
            team.size,
            threads.parallel(),
            *self._precisions,
            0 if counts is None else counts.data_ptr(),
            MASS_UNIT,
            LARGEST_MASS,
        )
        _run(self._kernel, self._description, call)


class NativeLinear:
    """One matrix behind the kernel, for rows of one dtype: packed, or in 16 bit as PyTorch holds it.

    Args:
        codec: None where `block` is the matrix itself, `[rows, columns]` in the dtype of the rows.
        block: of the codec, or the matrix.
        activations: what rows are rounded to where they meet codes; see `settings.Options`.
    """

    def __init__(
        self, codec: LinearCodec | None, block: Tensor, dtype: torch.dtype, kernel: Kernel, activations: str = "auto"
    ):
        self._kernel, self._precisions = kernel, precisions(activations, dtype)
        self._entry = (ctypes.c_int64 * 1)()
        layout = codec.matrix if codec else MatrixLayout.of(block.shape[0], block.shape[1], GROUP)
        if codec is None:
            reading = _Reading(DENSE, (_Part * 3)(_Part(0, 0), _NOWHERE, _NOWHERE), _NOWHERE, _NOWHERE, _NOWHERE)
        else:
            reading = _reading(WEIGHT, [plane.name for plane in codec.planes], codec.layout)
        self._rows, self._columns = layout.rows, layout.columns
        matrix = _matrix(layout, reading, reading)
        # Only the first of the two is ever looked at, but for the room that the other would take.
        stored = DTYPES[codec.dtype if codec else dtype]
        self._description = _Layer(matrix, matrix, 1, block.data_ptr(), block.nbytes, stored, 0, 0, -1)

    def __call__(self, rows: Tensor) -> Tensor:
        """The product `[N, rows]` of `rows [N, columns]`, which lie in a row, in their dtype."""
        output = torch.empty(len(rows), self._rows, dtype=rows.dtype)
        self._go(UP_ONLY, rows, output)
        return output

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient `[N, columns]` of the rows, in float32, from that of the product."""
        output = torch.empty(len(grad), self._columns, dtype=torch.float32)
        self._go(UP_BACK, grad.float().contiguous(), output)
        return output

    def _go(self, stage: int, rows: Tensor, output: Tensor) -> None:
        call = _Call(
            hidden_states=rows.data_ptr(),
            entries=ctypes.addressof(self._entry),
            output=output.data_ptr(),
            num_tokens=len(rows),
            top_k=1,
            dtype=DTYPES[rows.dtype],
            stage=stage,
            num_threads=team.size,
            parallel=threads.parallel(),
            precision=self._precisions[0],
            deep_precision=self._precisions[1],
        )
        _run(self._kernel, self._description, call)


class NativeProduct(NativeLinear):
    """A bfloat16 matrix `[rows, columns]` as PyTorch holds it, behind the kernel; see `linear_layer.DenseProduct`."""

    def __init__(self, weight: Tensor, kernel: Kernel, most_rows: int):
        super().__init__(None, weight, weight.dtype, kernel)
        self.most_rows = most_rows
        self._address, self._shape = weight.data_ptr(), weight.shape

    @staticmethod
    def takes_columns(columns: int) -> bool:
        """Whether the kernel reads rows of so many columns where they lie."""
        return MatrixLayout.of(1, columns, GROUP).padded == columns

    def is_of(self, weight: Tensor) -> bool:
        same = weight.data_ptr() == self._address and weight.shape == self._shape
        return same and weight.dtype == torch.bfloat16 and weight.is_contiguous()


class NativeNorm:
    """A root mean square norm with a bfloat16 weight `[columns]`, behind the kernel; see `row_norm.RowNorm`."""

    def __init__(self, weight: Tensor, kind: NormKind, kernel: Kernel):
        self._address, self._columns, self._kernel = weight.data_ptr(), len(weight), kernel
        self._rest = len(weight), kind.added, kind.rounded, kind.epsilon

    @staticmethod
    def takes_columns(columns: int) -> bool:
        """Whether the kernel takes rows of so many columns."""
        return columns % 16 == 0

    def is_of(self, weight: Tensor) -> bool:
        return weight.data_ptr() == self._address and weight.dtype == torch.bfloat16 and len(weight) == self._columns

    def __call__(self, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        output = torch.empty_like(rows)
        num_rows = rows.numel() // self._columns
        call = _Norm(rows.data_ptr(), self._address, output.data_ptr(), num_rows, *self._rest)
        if self._kernel(ctypes.byref(call)):
            raise MemoryError(f"the CPU kernel found no memory for rows of {self._columns:,} columns")
        return output


class NativeAttention:
    """Attention of few queries in bfloat16 behind the kernel; see `decode_attention.DecodeAttention`.

    Args:
        most_rows: of queries, of all heads that share one of keys, up to which it is faster than PyTorch's.
    """

    def __init__(self, kernel: Kernel, most_rows: int):
        self._kernel, self._most_rows = kernel, most_rows

    def takes(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        tensors = query, key, value
        if any(t.dtype != torch.bfloat16 or t.ndim != 4 or not t.is_cpu or t.stride(-1) != 1 for t in tensors):
            return False
        (batch, heads, queries, width), (_, groups, keys, _), value_width = query.shape, key.shape, value.shape[-1]
        if key.shape != (batch, groups, keys, width) or value.shape != (batch, groups, keys, value_width):
            return False
        if not groups or heads % groups or width % ATTENTION_WIDTH or value_width % ATTENTION_WIDTH or not keys:
            return False
        if mask is not None and (mask.dtype not in MASKS or not mask.is_cpu or mask.ndim != 4):
            return False
        scores = batch, heads, queries, keys
        if mask is not None and any(size not in (1, wanted) for size, wanted in zip(mask.shape, scores, strict=True)):
            return False
        return 0 < heads // groups * queries <= self._most_rows

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        (batch, heads, queries, width), (_, groups, keys, _), value_width = query.shape, key.shape, value.shape[-1]
        output = query.new_empty(batch, queries, heads, value_width)
        strides = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, keys).stride()
        call = _Attention(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            output.data_ptr(),
            *(batch, heads, groups, queries, keys, width, value_width),
            0 if mask is None else MASKS[mask.dtype],
            *(tensor.stride()[:3] for tensor in (query, key, value)),
            strides,
            scale,
            team.size,
            threads.parallel(),
        )
        if self._kernel(ctypes.byref(call)):
            raise MemoryError(f"the CPU kernel found no memory for attention over {keys:,} tokens")
        if call.took:
            team.observe(call.took * 1e-9, call.lost * 1e-9)
        return output


def _run(kernel: Kernel, layer: _Layer, call: _Call) -> None:
    if kernel(ctypes.byref(layer), ctypes.byref(call)):
        raise MemoryError(f"the CPU kernel found no memory for {call.num_tokens:,} tokens")
    if call.took:
        team.observe(call.took * 1e-9, call.lost * 1e-9)


def _describe(layer: ExpertLayer) -> _Layer:
    codec = layer.codec
    up, down = (_matrix_of(layer, name) for name in MATRICES)
    return _Layer(
        up,
        down,
        layer.num_experts,
        layer.base.data_ptr(),
        codec.base.nbytes,
        DTYPES[codec.dtype],
        codec.shape.transposed,
        codec.shape.up_rows == 2 * codec.shape.intermediate_size,
        ACTIVATIONS.get(layer.activation_name or "", -1),
    )


def _matrix_of(layer: ExpertLayer, name: str) -> _Matrix:
    codec = layer.codec
    planes, refined = ([plane.name for plane in planes] for planes in (codec.planes, codec.refine_planes))
    base = _reading(name, planes, codec.base_layout)
    if codec.replaces:
        upgraded = _reading(name, ["weight"], None, codec.upgrade_layout)
    else:
        upgraded = _reading(name, planes + refined, codec.base_layout, codec.upgrade_layout)
    return _matrix(codec.matrices[name], base, upgraded)


def _matrix(layout: MatrixLayout, base: _Reading, upgraded: _Reading) -> _Matrix:
    readings = (_Reading * 2)(base, upgraded)
    return _Matrix(layout.rows, layout.columns, layout.padded, layout.group_size, readings)


def _reading(name: str, planes: list[str], base: BlockLayout | None, upgrade: BlockLayout | None = None) -> _Reading:
    """How matrix `name` is read from `planes`, whichever of the two blocks they lie in."""
    offsets = {
        part.name: _Part(part.offset, in_upgrade)
        for in_upgrade, layout in enumerate((base, upgrade))
        for part in (layout.parts if layout else ())
    }
    found = (_Part * 3)(_NOWHERE, _NOWHERE, _NOWHERE)
    for plane in planes:
        found[ROLES[plane]] = offsets[f"{name}.{plane}"]
    others = (offsets.get(f"{name}.{part}", _NOWHERE) for part in ("meta", "unit", "bias"))
    return _Reading(KINDS[tuple(planes)], found, *others)
