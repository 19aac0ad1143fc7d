"""Layers of experts and single matrices as the native kernel sees them: where their parts lie, and one call each."""

import ctypes

import torch
from torch import Tensor

from dynaexq.errors import InputError
from dynaexq.kernels.cpu import interface
from dynaexq.kernels.cpu.build import Kernel
from dynaexq.kernels.expert_layer import ExpertLayer
from dynaexq.quantization.codec import MATRICES
from dynaexq.quantization.layout import BlockLayout, MatrixLayout
from dynaexq.quantization.linear_codec import WEIGHT, LinearCodec
from dynaexq.types import LARGEST_MASS, MASS_UNIT


def precisions(activations: str, dtype: torch.dtype) -> tuple[int, int]:
    """As in `PRECISIONS`; rows of float32 stay what they are."""
    return (interface.FLOATS, interface.FLOATS) if dtype == torch.float32 else interface.PRECISIONS[activations]


def check_words(words: Tensor, count: int) -> None:
    """Raise an InputError unless the kernel may take `words` for so many int64 in a row."""
    if words.shape != (count,) or words.dtype != torch.int64 or not (words.is_contiguous() and words.is_cpu):
        raise InputError(f"expected int64 [{count}] in a row on the CPU, got {words.dtype} {list(words.shape)}")


class NativeLayer:
    """One layer behind the kernel, for rows of one dtype.

    Where the layer names its activation, a forward is one call; else one call each side of the activation in Python,
    over the rows of all experts at once.

    Attributes:
        is_fused: whether a forward is one call.
    """

    def __init__(self, layer: ExpertLayer, dtype: torch.dtype, kernel: Kernel):
        self._kernel, self._dtype = kernel, dtype
        self._activation, self._base = layer.activation, layer.base
        self.is_fused = layer.activation_name in interface.ACTIVATIONS
        self._shape, self._num_experts = layer.codec.shape, layer.num_experts
        self._precisions = precisions(layer.activations, dtype)
        self._down_bias = layer.codec.base_layout.view(layer.base).get("down.bias")
        self._description = _describe(layer)

    def as_product(self) -> interface.Product:
        """The layer for another call, whose structures must not outlive this."""
        return interface.Product(ctypes.addressof(self._description), *self._precisions)

    def __call__(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        entries: Tensor,
        counts: Tensor | None = None,
    ) -> Tensor:
        """The layer's output `[N, H]`; arguments as in `dispatch.expert_mlp`, entries as in `Upgrades`."""
        check_words(entries, self._num_experts)
        if counts is not None:
            check_words(counts, self._num_experts + 2)
        rows = hidden_states.contiguous()
        routing = (top_k_index.to(torch.int64).contiguous(), top_k_weights.to(torch.float32).contiguous(), entries)
        output = torch.empty_like(rows)
        if self.is_fused:
            self._run(interface.WHOLE, rows, routing, output, counts)
            return output
        # Choices of other ranks' experts leave their rows as they are, so these start as zeros.
        up = torch.zeros(top_k_index.numel(), self._shape.up_rows, dtype=self._dtype)
        self._run(interface.UP_ONLY, rows, routing, up, counts)
        self._run(interface.DOWN_ONLY, self._activation(up).to(self._dtype).contiguous(), routing, output)
        return output

    def gradients(
        self, grad: Tensor, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, entries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `hidden_states [N, H]` and of `top_k_weights [N, k]`, in float32, from that of the output.

        The first matrix is multiplied once more, and both are gone through backwards; no expert is ever decoded.
        """
        check_words(entries, self._num_experts)
        num_choices, shape, grad = top_k_index.numel(), self._shape, grad.float().contiguous()
        factors = top_k_weights.to(torch.float32).contiguous()
        routing = (top_k_index.to(torch.int64).contiguous(), factors, entries)
        # Choices of other ranks' experts leave their rows as they are, so these start as zeros.
        up = torch.zeros(num_choices, shape.up_rows, dtype=self._dtype)
        self._run(interface.UP_ONLY, hidden_states.contiguous(), routing, up)
        grad_inner = torch.zeros(num_choices, shape.intermediate_size, dtype=torch.float32)
        self._run(interface.DOWN_BACK, grad, routing, grad_inner)
        # Inside an operator autograd records nothing; `torch.func` brings its own.
        inner, pull_back, *_ = torch.func.vjp(self._activation, up.float())
        grad_weights = (inner * grad_inner).sum(-1).view_as(factors)
        if self._down_bias is not None:
            ours = (top_k_index >= 0) & (top_k_index < self._num_experts)
            of_bias = grad @ self._down_bias.float().T  # [N, E]
            grad_weights += of_bias.gather(1, routing[0].where(ours, 0)).where(ours, 0)
        (grad_up,) = pull_back(grad_inner * factors.view(-1, 1))
        grad_hidden = torch.empty_like(hidden_states, dtype=torch.float32, memory_format=torch.contiguous_format)
        self._run(interface.UP_BACK, grad_up.contiguous(), routing, grad_hidden)
        return grad_hidden, grad_weights

    def _run(
        self,
        stage: int,
        rows: Tensor,
        routing: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        counts: Tensor | None = None,
    ) -> None:
        index, weights, entries = routing
        call = interface.Call(
            rows.data_ptr(),
            index.data_ptr(),
            weights.data_ptr(),
            entries.data_ptr(),
            output.data_ptr(),
            *index.shape,
            interface.DTYPES[rows.dtype],
            stage,
            *self._precisions,
            0 if counts is None else counts.data_ptr(),
            MASS_UNIT,
            LARGEST_MASS,
            interface.our_team(),
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
        layout = codec.matrix if codec else MatrixLayout.of(block.shape[0], block.shape[1], interface.GROUP)
        if codec is None:
            reading = interface.Reading(
                interface.DENSE,
                (interface.Part * 3)(interface.Part(0, 0), interface.NOWHERE, interface.NOWHERE),
                interface.NOWHERE,
                interface.NOWHERE,
                interface.NOWHERE,
            )
        else:
            reading = _reading(WEIGHT, [plane.name for plane in codec.planes], codec.layout)
        self._rows, self._columns = layout.rows, layout.columns
        matrix = _matrix(layout, reading, reading)
        # Only the first of the two is ever looked at, but for the room that the other would take.
        stored = interface.DTYPES[codec.dtype if codec else dtype]
        self._description = interface.Layer(matrix, matrix, 1, block.data_ptr(), block.nbytes, stored, 0, 0, -1)

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return self._rows

    def as_product(self) -> interface.Product:
        """The matrix for another call, whose structures must not outlive this."""
        return interface.Product(ctypes.addressof(self._description), *self._precisions)

    def __call__(self, rows: Tensor) -> Tensor:
        """The product `[N, rows]` of `rows [N, columns]`, which lie in a row, in their dtype."""
        output = torch.empty(len(rows), self._rows, dtype=rows.dtype)
        self._go(interface.UP_ONLY, rows, output)
        return output

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient `[N, columns]` of the rows, in float32, from that of the product."""
        output = torch.empty(len(grad), self._columns, dtype=torch.float32)
        self._go(interface.UP_BACK, grad.float().contiguous(), output)
        return output

    def _go(self, stage: int, rows: Tensor, output: Tensor) -> None:
        call = interface.Call(
            hidden_states=rows.data_ptr(),
            entries=ctypes.addressof(self._entry),
            output=output.data_ptr(),
            num_tokens=len(rows),
            top_k=1,
            dtype=interface.DTYPES[rows.dtype],
            stage=stage,
            precision=self._precisions[0],
            deep_precision=self._precisions[1],
            team=interface.our_team(),
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
        return MatrixLayout.of(1, columns, interface.GROUP).padded == columns

    def is_of(self, weight: Tensor) -> bool:
        same = weight.data_ptr() == self._address and weight.shape == self._shape
        return same and weight.dtype == torch.bfloat16 and weight.is_contiguous()


def _run(kernel: Kernel, layer: interface.Layer, call: interface.Call) -> None:
    if kernel(ctypes.byref(layer), ctypes.byref(call)):
        raise MemoryError(f"the CPU kernel found no memory for {call.num_tokens:,} tokens")
    interface.observe(call.team)


def _describe(layer: ExpertLayer) -> interface.Layer:
    codec = layer.codec
    up, down = (_matrix_of(layer, name) for name in MATRICES)
    return interface.Layer(
        up,
        down,
        layer.num_experts,
        layer.base.data_ptr(),
        codec.base.nbytes,
        interface.DTYPES[codec.dtype],
        codec.shape.transposed,
        codec.shape.up_rows == 2 * codec.shape.intermediate_size,
        interface.ACTIVATIONS.get(layer.activation_name or "", -1),
    )


def _matrix_of(layer: ExpertLayer, name: str) -> interface.Matrix:
    codec = layer.codec
    planes, refined = ([plane.name for plane in planes] for planes in (codec.planes, codec.refine_planes))
    base = _reading(name, planes, codec.base_layout)
    if codec.replaces:
        upgraded = _reading(name, ["weight"], None, codec.upgrade_layout)
    else:
        upgraded = _reading(name, planes + refined, codec.base_layout, codec.upgrade_layout)
    return _matrix(codec.matrices[name], base, upgraded)


def _matrix(layout: MatrixLayout, base: interface.Reading, upgraded: interface.Reading) -> interface.Matrix:
    readings = (interface.Reading * 2)(base, upgraded)
    return interface.Matrix(layout.rows, layout.columns, layout.padded, layout.group_size, readings)


def _reading(
    name: str, planes: list[str], base: BlockLayout | None, upgrade: BlockLayout | None = None
) -> interface.Reading:
    """How matrix `name` is read from `planes`, whichever of the two blocks they lie in."""
    offsets = {
        part.name: interface.Part(part.offset, in_upgrade)
        for in_upgrade, layout in enumerate((base, upgrade))
        for part in (layout.parts if layout else ())
    }
    found = (interface.Part * 3)(interface.NOWHERE, interface.NOWHERE, interface.NOWHERE)
    for plane in planes:
        found[interface.ROLES[plane]] = offsets[f"{name}.{plane}"]
    others = (offsets.get(f"{name}.{part}", interface.NOWHERE) for part in ("meta", "unit", "bias"))
    return interface.Reading(interface.KINDS[tuple(planes)], found, *others)
