"""Stored planes at other tiers: what is offered can be had, and every reading is that of the stored code."""

import pytest
import torch

from dynaexq.quantization import ExpertCodec, ExpertWeights, offered, pieces, rebase
from dynaexq.quantization.plane_codec import REFINE_PLANES
from dynaexq.types import ExpertShape

SHAPE = ExpertShape(96, 80, 160, has_bias=False, transposed=False)


@pytest.mark.parametrize("stored", REFINE_PLANES, ids="+".join)
def test_every_offer_reads_the_bits_that_were_stored(stored):
    weights = ExpertWeights(torch.randn(3, 160, 96), torch.randn(3, 96, 80))
    codec = ExpertCodec(SHAPE, torch.float32, stored, method="rtn")
    encoded = codec.encode(weights)
    readings = {
        stored[0]: codec.decode(encoded.base, None, torch.float32),
        stored[1]: codec.decode(encoded.base, encoded.upgrade, torch.float32),
    }
    for tiers in offered(stored):
        wanted = ExpertCodec(SHAPE, torch.float32, tiers)
        base = rebase(codec, wanted, encoded.base, encoded.upgrade)
        found = wanted.decode(base, None, torch.float32)
        if tiers[0] in readings:
            assert torch.equal(found.up, readings[tiers[0]].up), tiers
            assert torch.equal(found.down, readings[tiers[0]].down), tiers
        if len(tiers) == 2:
            upgrade = torch.zeros(3, wanted.upgrade_layout.nbytes, dtype=torch.uint8)
            sources = list(codec.upgrade_layout.view(encoded.upgrade).values())
            parts = wanted.upgrade_layout.view(upgrade).values()
            for (index, _), part in zip(pieces(codec, wanted.upgrade_layout), parts, strict=True):
                part.copy_(sources[index])
            found = wanted.decode(base, upgrade, torch.float32)
            assert tiers[1] not in readings or torch.equal(found.up, readings[tiers[1]].up), tiers


def test_what_is_offered():
    assert offered(("int2", "int8")) == (
        ("int2",),
        ("int4",),
        ("int8",),
        ("int2", "int4"),
        ("int2", "int8"),
        ("int4", "int8"),
    )
    assert offered(("int2", "int3")) == (("int2",), ("int3",), ("int2", "int3"))
    assert offered(("int3", "int4")) == (("int2",), ("int3",), ("int4",), ("int3", "int4"))
    assert offered(("int4", "int6")) == (("int4",), ("int6",), ("int4", "int6"))
    assert offered(("int3", "fp16")) == (("int3",), ("fp16",), ("int3", "fp16"))
