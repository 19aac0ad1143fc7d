"""From one layer's arguments to four launches: what two products need, the two, and a sum over choices.

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
from dynaexq.kernels.triton.preparation import Sums, prepare
from dynaexq.kernels.triton.reductions import group_sums, weighted_sum
from dynaexq.kernels.triton.routing import Routing, add_routing
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
    if not top_k_index.numel():
        if counts is not None:
            add_routing(counts, top_k_index, top_k_weights)
        return torch.zeros_like(hidden_states)
    tensors = hidden_states.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
    with torch.cuda.device_of(hidden_states):  # Triton launches on the current device, wherever its arguments are
        return _expert_mlp(*tensors, layer, upgrades.entries, counts)


def counts_routing(hidden_states: Tensor, layer: ExpertLayer) -> bool:
    """True: one launch counts, in the place of a dozen operators."""
    return True


def _expert_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    layer: ExpertLayer,
    entries: Tensor,
    counts: Tensor | None,
) -> Tensor:
    pairs, choices = top_k_index.numel(), top_k_index.shape[1]
    up, down = matrices_of(layer)
    fused = is_swiglu(layer) and up.bias < 0
    plan = tuning.plan_for(pairs, layer.num_experts, up, down, fused, tuning.multiprocessor_of(hidden_states.device))
    wanted = sums_wanted(hidden_states, up, plan.up)
    routing, sums = prepare(top_k_index, top_k_weights, layer.num_experts, plan.block_m, wanted, counts)
    experts = Experts(routing, layer.base, entries)

    hidden, sums = experts.product(up, hidden_states, sums, plan.up, choices)
    if not fused:
        hidden = layer.activation(hidden)
        sums = sums_for(hidden, down, plan.down)
    results, _ = experts.product(down, hidden, sums, plan.down)
    if layer.post_norm is not None:
        results = layer.post_norm(results)
    return weighted_sum(results, top_k_index, top_k_weights, layer.num_experts)


def is_swiglu(layer: ExpertLayer) -> bool:
    """Whether the activation is silu(gate) * up, which the first product may end in."""
    shape = layer.codec.shape
    return layer.activation_name == "silu" and shape.up_rows == 2 * shape.intermediate_size


def matrices_of(layer: ExpertLayer) -> tuple[Matrix, Matrix]:
    """Both matrices of a layer's experts, kept with the layer."""
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


def sums_wanted(x: Tensor, matrix: Matrix, launches: Sequence[tuning.Launch]) -> Sums | None:
    """The sums of activations that `launches` want."""
    width = launches[0].tiling.sum_width
    return Sums(x, matrix.padded, width) if width else None


def sums_for(x: Tensor, matrix: Matrix, launches: Sequence[tuning.Launch]) -> Tensor | None:
    """Sums of activations as `launches` want them."""
    wanted = sums_wanted(x, matrix, launches)
    return None if wanted is None else group_sums(*wanted)


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
            options = {"num_warps": launch.num_warps, "num_stages": launch.tiling.stages, "enable_fp_fusion": True}
            expert_gemm[grid](*pointers, choices, matrix, launch.tiling, **options)
        return output, output_sums
