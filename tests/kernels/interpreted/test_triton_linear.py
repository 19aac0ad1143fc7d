"""A packed dense layer in Triton, interpreted, against the decoded matrix; see `test_triton_kernels`."""

import pytest
import torch
from numerics import assert_close

from dynaexq.kernels import LinearLayer, linear_layer
from dynaexq.kernels.triton import linear
from dynaexq.quantization import LinearCodec

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("tier", ["int4", "int6", "int8"])
@pytest.mark.parametrize(("num_rows", "shape"), [(1, (96, 256)), (5, (72, 200)), (18, (64, 128)), (70, (136, 64))])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_product_follows_the_decoded_matrix(tier, num_rows, shape, dtype):
    torch.manual_seed(num_rows)
    codec = LinearCodec(*shape, dtype, tier)
    layer = LinearLayer(codec, codec.encode(torch.randn(shape) / shape[1] ** 0.5)[0])
    rows = torch.randn(num_rows, shape[1]).to(dtype)
    for _ in range(2):  # what is kept of the first call serves the second
        assert_close(f"{shape}", linear_layer.linear(rows, layer), linear(rows, layer), TOLERANCE[dtype])


def test_no_rows_give_no_rows():
    codec = LinearCodec(96, 256, torch.float16, "int4")
    layer = LinearLayer(codec, codec.encode(torch.randn(96, 256))[0])
    assert linear(torch.empty(0, 256, dtype=torch.float16), layer).shape == (0, 96)
