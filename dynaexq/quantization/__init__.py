"""What the bits mean: number formats, packing, and the quantizer. No device logic and no kernel lives here."""

from dynaexq.quantization.codec import Encoded, ExpertCodec, ExpertWeights, tier_layout, tier_sizes
from dynaexq.quantization.moments import BLOCK, ExpertInputs, Inputs, Moments
from dynaexq.quantization.quantize import check_representable
from dynaexq.quantization.tier_conversion import offered, pieces, rebase

__all__ = [
    "BLOCK",
    "Encoded",
    "ExpertCodec",
    "ExpertInputs",
    "ExpertWeights",
    "Inputs",
    "Moments",
    "check_representable",
    "offered",
    "pieces",
    "rebase",
    "tier_layout",
    "tier_sizes",
]
