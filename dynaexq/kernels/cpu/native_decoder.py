"""What few tokens pass in a decoder layer, as the native kernel sees it: norms, attention, and all but attention."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynaexq.kernels.cpu import interface
from dynaexq.kernels.cpu.build import Kernel, Library
from dynaexq.kernels.cpu.native import NativeLayer, NativeLinear, check_words
from dynaexq.kernels.decoder_layer import DecoderParts, Step
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
        if query.dtype != torch.bfloat16 or query.ndim != 4 or not query.is_cpu or query.stride(-1) != 1:
            return False
        return takes((*query.shape, key.shape[2]), key, value, mask, self._most_rows)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        batch, heads, queries, _ = query.shape
        output = query.new_empty(batch, queries, heads, value.shape[-1])
        call = interface.Attention(query=query.data_ptr(), output=output.data_ptr(), team=interface.our_team())
        call.query_strides = query.stride()[:3]
        _fill(call, tuple(query.shape), key, value, mask, scale)
        if self._kernel(ctypes.byref(call)):
            raise MemoryError(f"the CPU kernel found no memory for attention over {call.keys:,} tokens")
        interface.observe(call.team)
        return output


def takes(shape: tuple[int, ...], key: Tensor, value: Tensor, mask: Tensor | None, most_rows: int) -> bool:
    """Whether the kernel attends from queries of this shape, so many of which may share a head of keys.

    Args:
        shape: batch, heads, queries, width, keys.
        key: of which there may be fewer so far, as of `value`.
    """
    if any(t.dtype != torch.bfloat16 or t.ndim != 4 or not t.is_cpu or t.stride(-1) != 1 for t in (key, value)):
        return False
    (batch, heads, queries, width, keys), (_, groups, so_far, _), value_width = shape, key.shape, value.shape[-1]
    if key.shape != (batch, groups, so_far, width) or value.shape != (batch, groups, so_far, value_width):
        return False
    if not groups or heads % groups or not keys or any(w % LANES for w in (width, value_width)):
        return False
    if mask is not None and (mask.dtype not in interface.MASKS or not mask.is_cpu or mask.ndim != 4):
        return False
    scores = batch, heads, queries, keys
    if mask is not None and any(size not in (1, wanted) for size, wanted in zip(mask.shape, scores, strict=True)):
        return False
    return 0 < heads // groups * queries <= most_rows


def _fill(
    call: interface.Attention,
    shape: tuple[int, ...],
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> None:
    """Tell a call all but where queries and output lie."""
    call.batch, call.heads, call.queries, call.width = shape
    call.groups, call.keys, call.value_width = key.shape[1], key.shape[2], value.shape[3]
    call.key, call.value = key.data_ptr(), value.data_ptr()
    call.key_strides, call.value_strides = key.stride()[:3], value.stride()[:3]
    if mask is not None:
        call.mask, call.mask_kind = mask.data_ptr(), interface.MASKS[mask.dtype]
        call.mask_strides = mask.expand(*shape[:3], call.keys).stride()
    call.scale = scale


class NativeStep(NamedTuple):
    """One layer of `NativeDecoderLayer.run`, and what its addresses are of."""

    call: interface.DecoderStep
    given: Step
    num_experts: int


class NativeDecoderLayer:
    """What few tokens pass besides attention, behind the kernel; see `decoder_layer.DecoderLayer`.

    Args:
        parts: of which all norms are `NativeNorm`.
        linears: its matrices: query, key, value, out, router.
        experts: whose activation the kernel knows.
        most_rows: up to which all of it is faster than PyTorch's.
        most_queries: as for `NativeAttention`.
    """

    def __init__(
        self,
        parts: DecoderParts,
        linears: Sequence[NativeLinear],
        experts: NativeLayer,
        library: Library,
        most_rows: int,
        most_queries: int,
    ):
        self.most_rows, self._library, self._num_experts = most_rows, library, parts.experts.num_experts
        self._kept = parts, linears, experts  # whose addresses are below
        *projections, out, router = linears
        self._heads = [linear.outputs // parts.width for linear in projections]
        self._most_queries = most_queries
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
        self._step = interface.DecoderStep(before=self._before, after=self._after)

    def before_attention(self, hidden_states: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        cosine, sine = cosine.contiguous(), sine.contiguous()
        call = interface.BeforeAttention.from_buffer_copy(self._before)  # threads may be in the same layer at once
        query, key, value = (hidden_states.new_empty(batch, length, heads, call.width) for heads in self._heads)
        call.rows, call.num_rows, call.positions = hidden_states.data_ptr(), batch * length, cosine.shape[0] * length
        call.cosine, call.sine, call.team = cosine.data_ptr(), sine.data_ptr(), interface.our_team()
        call.outputs[:] = query.data_ptr(), key.data_ptr(), value.data_ptr()
        self._run(self._library.before_attention, call, batch * length)
        interface.observe(call.team)
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
        self._run(self._library.after_attention, call, call.num_rows)
        interface.observe(call.team)
        return output

    def attends(self, hidden_states: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        batch, length, _ = hidden_states.shape
        heads, groups, _ = self._heads
        shape = batch, heads, length, self._before.width, key.shape[2] + length
        return key.shape[1] == groups and takes(shape, key, value, mask, self._most_queries)

    def step(self, given: Step) -> NativeStep:
        batch, length, _ = given.hidden_states.shape
        call = interface.DecoderStep.from_buffer_copy(self._step)
        before, attention, after = call.before, call.attention, call.after
        before.rows = after.residual = given.hidden_states.data_ptr()
        before.num_rows = after.num_rows = batch * length
        before.positions = given.cosine.shape[0] * length
        before.cosine, before.sine = given.cosine.data_ptr(), given.sine.data_ptr()
        heads, width = self._heads[0], before.width
        _fill(attention, (batch, heads, length, width), given.key, given.value, given.mask, given.scale)
        attention.query_strides = length * heads * width, width, heads * width
        after.output = given.output.data_ptr()
        return NativeStep(call, given, self._num_experts)

    def run(self, steps: Sequence[NativeStep], published: Sequence[tuple[Tensor, Tensor]]) -> None:
        calls = (interface.DecoderStep * len(steps))(*(step.call for step in steps))
        for call, step, (entries, counts) in zip(calls, steps, published, strict=True):
            check_words(entries, step.num_experts)
            check_words(counts, step.num_experts + 2)
            call.after.entries, call.after.counts = entries.data_ptr(), counts.data_ptr()
            call.before.team = call.attention.team = call.after.team = interface.our_team()
        whole = interface.DecoderSteps(ctypes.addressof(calls), len(calls))
        self._run(self._library.pass_layers, whole, calls[0].before.num_rows)
        for call in calls:
            for done in (call.before.team, call.attention.team, call.after.team):
                interface.observe(done)

    def _run(self, kernel: Kernel, call: ctypes.Structure, num_rows: int) -> None:
        if kernel(ctypes.byref(call)):
            raise MemoryError(f"the CPU kernel found no memory for {num_rows:,} tokens")


def _kind_of(norm: RowNorm | None) -> interface.NormKind:
    """All zeros where there is none."""
    return norm.kind if isinstance(norm, NativeNorm) else interface.NormKind()
