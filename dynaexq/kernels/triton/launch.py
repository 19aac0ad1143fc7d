"""From one layer's arguments to launches: two products, and around them the routing, sums and a sum over choices.

Nothing here looks at the device: grids follow from shapes alone, so nothing waits and everything can be captured.

Shapes: T tokens, k choices, P = T k pairs, H hidden, I intermediate.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades
from dynaexq.kernels.triton import tuning
from dynaexq.kernels.triton.grouped_gemm import expert_gemm
from dynaexq.kernels.triton.reductions import group_sums, weighted_sum
from dynaexq.kernels.triton.routing import Routing, add_routing, route
from dynaexq.kernels.triton.specs import Matrix
from dynaexq.quantization import ExpertCodec

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def expert_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    layer: ExpertLayer,
    upgrades: Upgrades,
    counts: Tensor | None = None,
) -> Tensor:
    """The same sum as `reference.expert_mlp`, for 16-bit models; activations are rounded between the products.

    `counts` as in `dispatch.expert_mlp`.
    """
    if counts is not None:
        add_routing(counts, top_k_index, top_k_weights)
    if not top_k_index.numel():
        return torch.zeros_like(hidden_states)
    with torch.cuda.device_of(hidden_states):  # Triton launches on the current device, wherever its arguments are
        return _expert_mlp(
            hidden_states.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous(), layer, upgrades.entries
        )


def counts_routing(hidden_states: Tensor, layer: ExpertLayer) -> bool:
    """True: one launch counts, in the place of a dozen operators."""
    return True


def _expert_mlp(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, layer: ExpertLayer, entries: Tensor
) -> Tensor:
    pairs, choices = top_k_index.numel(), top_k_index.shape[1]
    up, down = _matrices_of(layer)
    fused = _is_swiglu(layer) and up.bias < 0
    plan = tuning.plan_for(pairs, layer.num_experts, up, down, fused)
    experts = Experts(route(top_k_index, layer.num_experts, plan.block_m), layer.base, entries)

    hidden, sums = experts.product(up, hidden_states, sums_for(hidden_states, up, plan.up), plan.up, choices)
    if not fused:
        hidden = layer.activation(hidden)
        sums = sums_for(hidden, down, plan.down)
    results, _ = experts.product(down, hidden, sums, plan.down)
    if layer.post_norm is not None:
        results = layer.post_norm(results)
    return weighted_sum(results, top_k_index, top_k_weights, layer.num_experts)


def _is_swiglu(layer: ExpertLayer) -> bool:
    """Whether the activation is silu(gate) * up, which the first product may end in."""
    shape = layer.codec.shape
    return layer.activation_name == "silu" and shape.up_rows == 2 * shape.intermediate_size


def _matrices_of(layer: ExpertLayer) -> tuple[Matrix, Matrix]:
    if "triton" not in layer.prepared:
        layer.prepared["triton"] = matrices(layer.codec)
    found: tuple[Matrix, Matrix] = layer.prepared["triton"]
    return found


def matrices(codec: ExpertCodec) -> tuple[Matrix, Matrix]:
    """Both matrices of an expert as the kernels are compiled for them."""
    return Matrix.of(codec, "up", *operands(codec.dtype)), Matrix.of(codec, "down", *operands(codec.dtype))


def operands(dtype: torch.dtype) -> tuple[tl.dtype, tl.dtype]:
    """What 16-bit numbers are in memory, and in matrix instructions."""
    return DTYPES[dtype], tl.float32 if triton.knobs.runtime.interpret else DTYPES[dtype]


def sums_for(x: Tensor, matrix: Matrix, launches: Sequence[tuning.Launch]) -> Tensor | None:
    """Sums of activations as `launches` want them."""
    width = launches[0].tiling.sum_width
    return group_sums(x, matrix.padded, width) if width else None


class Experts(NamedTuple):
    """The routed experts of one forward."""

    routing: Routing
    base: Tensor
    entries: Tensor

    def product(
        self, matrix: Matrix, x: Tensor, sums: Tensor | None, launches: Sequence[tuning.Launch], choices: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """Each pair's product with its expert, and the sums of its columns where the next product wants them."""
        order, blocks = self.routing
        tiling = launches[0].tiling
        columns, width = (matrix.rows // 2, tiling.block_n // 2) if tiling.swiglu else (matrix.rows, tiling.block_n)
        padded = triton.cdiv(columns, 64) * 64  # sums are stored of padding as well
        output, output_sums = x.new_empty(len(order), columns), None
        if tiling.next_sum_width:
            output_sums = x.new_empty(len(order), padded // tiling.next_sum_width, dtype=torch.float32)
        grid = (triton.cdiv(padded, width), blocks.shape[1])
        pointers = (x, sums, output, output_sums, blocks, blocks.shape[1], order, self.entries, self.base)
        for launch in launches:
            options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
            expert_gemm[grid](*pointers, choices, matrix, launch.tiling, **options)
        return output, output_sums
