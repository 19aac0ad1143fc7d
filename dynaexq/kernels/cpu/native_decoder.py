"""What few tokens pass in a decoder layer, as the native kernel sees it: norms, attention, and all but attention."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dynaexq.kernels.cpu import interface
from dynaexq.kernels.cpu.build import Kernel, Library
from dynaexq.kernels.cpu.native import NativeLayer, NativeLinear, check_words
from dynaexq.kernels.decoder_layer import DecoderParts
from dynaexq.kernels.row_norm import NormKind, RowNorm
from dynaexq.types import LARGEST_MASS, MASS_UNIT

LANES = 32
"""Of which the widths of keys and of values are multiples."""


class NativeNorm:
    """A root mean square norm with a bfloat16 weight `[columns]`, behind the kernel; see `row_norm.RowNorm`."""

    def __init__(self, weight: Tensor, kind: NormKind, kernel: Kernel):
        self._address, self._columns, self._kernel = weight.data_ptr(), len(weight), kernel
        self.kind = interface.NormKind(self._address, len(weight), kind.added, kind.rounded, kind.epsilon)

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
        call = interface.Norm(self.kind, rows.data_ptr(), output.data_ptr(), num_rows)
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
        if not groups or heads % groups or not keys or any(w % LANES for w in (width, value_width)):
            return False
        if mask is not None and (mask.dtype not in interface.MASKS or not mask.is_cpu or mask.ndim != 4):
            return False
        scores = batch, heads, queries, keys
        if mask is not None and any(size not in (1, wanted) for size, wanted in zip(mask.shape, scores, strict=True)):
            return False
        return 0 < heads // groups * queries <= self._most_rows

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        (batch, heads, queries, width), (_, groups, keys, _), value_width = query.shape, key.shape, value.shape[-1]
        output = query.new_empty(batch, queries, heads, value_width)
        strides = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, keys).stride()
        call = interface.Attention(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            output.data_ptr(),
            *(batch, heads, groups, queries, keys, width, value_width),
            0 if mask is None else interface.MASKS[mask.dtype],
            *(tensor.stride()[:3] for tensor in (query, key, value)),
            strides,
            scale,
            interface.our_team(),
        )
        if self._kernel(ctypes.byref(call)):
            raise MemoryError(f"the CPU kernel found no memory for attention over {keys:,} tokens")
        interface.observe(call.team)
        return output


class NativeDecoderLayer:
    """What few tokens pass besides attention, behind the kernel; see `decoder_layer.DecoderLayer`.

    Args:
        parts: of which all norms are `NativeNorm`.
        linears: its matrices: query, key, value, out, router.
        experts: whose activation the kernel knows.
        most_rows: up to which all of it is faster than PyTorch's.
    """

    def __init__(
        self,
        parts: DecoderParts,
        linears: Sequence[NativeLinear],
        experts: NativeLayer,
        library: Library,
        most_rows: int,
    ):
        self.most_rows, self._library, self._num_experts = most_rows, library, parts.experts.num_experts
        self._kept = parts, linears, experts  # whose addresses are below
        *projections, out, router = linears
        self._heads = [linear.outputs // parts.width for linear in projections]
        self._before = interface.BeforeAttention(
            norm=_kind_of(parts.norm),
            products=(interface.Product * 3)(*(linear.as_product() for linear in projections)),
            head_norms=(interface.NormKind * 2)(_kind_of(parts.query_norm), _kind_of(parts.key_norm)),
            width=parts.width,
        )
        self._after = interface.AfterAttention(
            out=out.as_product(),
            norm=_kind_of(parts.block_norm),
            router=router.as_product(),
            top_k=parts.top_k,
            normalized=parts.routing.normalized,
            rounded=parts.routing.rounded,
            experts=experts.as_product(),
            unit=MASS_UNIT,
            largest=LARGEST_MASS,
        )

    def before_attention(self, hidden_states: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        cosine, sine = cosine.contiguous(), sine.contiguous()
        call = interface.BeforeAttention.from_buffer_copy(self._before)  # threads may be in the same layer at once
        query, key, value = (hidden_states.new_empty(batch, length, heads, call.width) for heads in self._heads)
        call.rows, call.num_rows, call.positions = hidden_states.data_ptr(), batch * length, cosine.shape[0] * length
        call.cosine, call.sine, call.team = cosine.data_ptr(), sine.data_ptr(), interface.our_team()
        call.outputs[:] = query.data_ptr(), key.data_ptr(), value.data_ptr()
        self._run(self._library.before_attention, call)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def after_attention(
        self, attended: Tensor, hidden_states: Tensor, entries: Tensor, counts: Tensor | None
    ) -> Tensor:
        check_words(entries, self._num_experts)
        if counts is not None:
            check_words(counts, self._num_experts + 2)
        attended, output = attended.contiguous(), torch.empty_like(hidden_states)
        call = interface.AfterAttention.from_buffer_copy(self._after)
        call.attended, call.residual, call.output = attended.data_ptr(), hidden_states.data_ptr(), output.data_ptr()
        call.entries, call.counts = entries.data_ptr(), 0 if counts is None else counts.data_ptr()
        call.num_rows, call.team = hidden_states.shape[0] * hidden_states.shape[1], interface.our_team()
        self._run(self._library.after_attention, call)
        return output

    def _run(self, kernel: Kernel, call: interface.BeforeAttention | interface.AfterAttention) -> None:
        if kernel(ctypes.byref(call)):
            raise MemoryError(f"the CPU kernel found no memory for {call.num_rows:,} tokens")
        interface.observe(call.team)


def _kind_of(norm: RowNorm | None) -> interface.NormKind:
    """All zeros where there is none."""
    return norm.kind if isinstance(norm, NativeNorm) else interface.NormKind()
