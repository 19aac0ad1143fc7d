"""A packed dense layer on CUDA: one expert, and every row is routed to it."""

import torch
from torch import Tensor

from dynaexq.kernels import linear_layer
from dynaexq.kernels.linear_layer import LinearLayer
from dynaexq.kernels.triton import tuning
from dynaexq.kernels.triton.launch import Experts, operands, sums_for
from dynaexq.kernels.triton.routing import Routing
from dynaexq.kernels.triton.specs import Matrix

MOST_ROWS_KEPT = 64
"""Rows of decoding, of which the same number comes again and again."""


def linear(rows: Tensor, layer: LinearLayer) -> Tensor:
    """As `linear_layer.linear`; codes are multiplied as they are, and rows in the dtype of the layer."""
    if not len(rows):
        return linear_layer.linear(rows, layer)
    with torch.cuda.device_of(rows):
        matrix = matrix_of(layer)
        block_m, launches = tuning.plan_for_linear(len(rows), matrix, tuning.multiprocessor_of(rows.device))
        rows = rows.contiguous()
        experts = Experts(_routing(layer, len(rows), block_m), layer.block[None], _no_upgrade(layer))
        return experts.product(matrix, rows, sums_for(rows, matrix, launches), launches)[0]


def matrix_of(layer: LinearLayer) -> Matrix:
    """The matrix as the kernels are compiled for it, kept with the layer."""
    if "triton" not in layer.prepared:
        layer.prepared["triton"] = Matrix.of_linear(layer.codec, *operands(layer.codec.dtype))
    found: Matrix = layer.prepared["triton"]
    return found


def _no_upgrade(layer: LinearLayer) -> Tensor:
    if "entries" not in layer.prepared:
        layer.prepared["entries"] = torch.zeros(1, dtype=torch.int64, device=layer.block.device)
    found: Tensor = layer.prepared["entries"]
    return found


def _routing(layer: LinearLayer, num_rows: int, block_m: int) -> Routing:
    """All rows in order, in blocks of `block_m`; made on the device, so that it can be captured."""
    key = "routing", num_rows, block_m
    found: Routing | None = layer.prepared.get(key)
    if found is None:
        order = torch.arange(num_rows, dtype=torch.int32, device=layer.block.device)
        begins = order[::block_m]
        blocks = torch.stack([torch.zeros_like(begins), begins, (num_rows - begins).clamp(max=block_m)])
        found = Routing(order, blocks)
        # What is made while a graph is captured lies in its pool, and is its own.
        if num_rows <= MOST_ROWS_KEPT and not (order.is_cuda and torch.cuda.is_current_stream_capturing()):
            layer.prepared[key] = found
    return found
