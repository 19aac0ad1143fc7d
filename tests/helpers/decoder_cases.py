"""Decoder layers of random parts behind a kernel, and the same step by step, with the kernel's products alone."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from kernel_cases import EXPERTS, Case, fused
from torch import Tensor

from dynaexq.kernels import DecoderParts, NormKind, RoutingKind, rms_norm, rotated, top_k_routing
from dynaexq.kernels.cpu.native import NativeLayer, NativeLinear, NativeProduct
from dynaexq.kernels.cpu.native_decoder import NativeDecoderLayer, NativeNorm
from dynaexq.quantization import IN_STRIPS, LinearCodec
from dynaexq.types import ExpertShape

SHAPE = ExpertShape(hidden_size=192, intermediate_size=96, up_rows=192, has_bias=False, transposed=False)
HEADS, GROUPS, WIDTH, TOP_K = 6, 2, 32, 3
CACHED = 70
"""Tokens before those that are new."""
KINDS = [NormKind(1e-6, 0, True), NormKind(1e-5, 1, False)]


class Options(NamedTuple):
    """What cases differ in; `dense` is the tier of the linear layers, None for 16 bit."""

    dense: str | None = None
    head_norms: bool = True
    norm: NormKind = KINDS[0]
    routing: RoutingKind = RoutingKind(True, True)
    tiers: tuple[str, ...] = ("int4", "int8")


OPTIONS = [
    Options(),
    Options("int8", routing=RoutingKind(False, True)),
    Options("int4", False, KINDS[1], RoutingKind(True, False), ("int2", "int4")),
]


@dataclass
class DecoderCase:
    """One layer, its inputs, and what it was made of."""

    native: NativeDecoderLayer
    experts: Case
    linears: dict[str, NativeLinear]
    norms: dict[str, tuple[Tensor, NormKind]]
    layer: NativeLayer
    options: Options
    router: Tensor
    kept: list[Any]

    def before(self, rows: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, ...]:
        """As `NativeDecoderLayer.before_attention`."""
        batch, length, _ = rows.shape
        normal = rms_norm(rows, *self.norms["norm"]).view(batch * length, -1)
        found = []
        for name in ("query", "key", "value"):
            heads = self.linears[name](normal).view(batch, length, -1, WIDTH)
            if f"{name}_norm" in self.norms:
                heads = rms_norm(heads, *self.norms[f"{name}_norm"])
            heads = heads.transpose(1, 2)
            found.append(heads if name == "value" else rotated(heads, cosine[:, None], sine[:, None]))
        return tuple(found)

    def after(self, attended: Tensor, rows: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """As `NativeDecoderLayer.after_attention`, and the experts that were chosen."""
        flat = rows.view(-1, rows.shape[-1])
        between = self.linears["out"](attended.reshape(len(flat), -1)) + flat
        normal = rms_norm(between, *self.norms["block_norm"])
        weights, ids = top_k_routing(self.linears["router"](normal), TOP_K, self.options.routing)
        return (between + self.layer(normal, ids, weights, entries)).view_as(rows), ids


def decoder_case(kernel: Any, options: Options, num_tokens: int = 1) -> DecoderCase:
    """A random layer behind `kernel`, which has the functions of `Library`."""
    torch.manual_seed(11)
    hidden, kept = SHAPE.hidden_size, []
    sizes = {
        "query": (HEADS * WIDTH, hidden),
        "key": (GROUPS * WIDTH, hidden),
        "value": (GROUPS * WIDTH, hidden),
        "out": (hidden, HEADS * WIDTH),
        "router": (EXPERTS, hidden),
    }

    def linear(name: str, rows: int, columns: int) -> NativeLinear:
        weight = (torch.randn(rows, columns) * columns**-0.5).bfloat16()
        kept.append(weight)
        if options.dense is None or name == "router":
            return NativeProduct(weight, kernel.forward, 16)
        codec = LinearCodec(rows, columns, torch.bfloat16, options.dense, arrangement=IN_STRIPS)
        block, _ = codec.encode(weight)
        kept.append(block)
        return NativeLinear(codec, block, torch.bfloat16, kernel.forward)

    def norm(columns: int) -> tuple[Tensor, NormKind]:
        return (torch.randn(columns) * 0.2 + 1 - options.norm.added).bfloat16(), options.norm

    linears = {name: linear(name, *size) for name, size in sizes.items()}
    norms = {"norm": norm(hidden), "block_norm": norm(hidden)}
    if options.head_norms:
        norms |= {"query_norm": norm(WIDTH), "key_norm": norm(WIDTH)}
    native_norms = {name: NativeNorm(*of, kernel=None) for name, of in norms.items()}
    experts = fused(options.tiers, torch.bfloat16, SHAPE, num_tokens, activations="auto")
    layer = NativeLayer(experts.layer, torch.bfloat16, kernel.forward)
    parts = DecoderParts(
        **({"query_norm": None, "key_norm": None} | native_norms),
        **linears,
        width=WIDTH,
        routing=options.routing,
        top_k=TOP_K,
        experts=experts.layer,
    )
    router = kept[-1]
    native = NativeDecoderLayer(parts, list(linears.values()), layer, kernel, 16, 64)
    return DecoderCase(native, experts, linears, norms, layer, options, router, kept)


def decoder_inputs(batch: int, length: int, per_row: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, cosines and sines of all rows or of each, and what was attended to."""
    angles = torch.rand(batch if per_row else 1, length, WIDTH) * 6
    rows = torch.randn(batch, length, SHAPE.hidden_size).bfloat16()
    attended = torch.randn(batch, length, HEADS, WIDTH).bfloat16()
    return rows, angles.cos().bfloat16(), angles.sin().bfloat16(), attended


def decoder_cache(batch: int, length: int) -> Tensor:
    """Keys and values `[2, batch, groups, CACHED + length, width]` in memory with room for more."""
    return torch.randn(2, batch, GROUPS, CACHED + length + 3, WIDTH).bfloat16()[..., : CACHED + length, :]
