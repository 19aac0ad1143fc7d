"""What the bits mean: number formats, packing, and the quantizer. No device logic and no kernel lives here."""

from dynaexq.quantization.arrangement import IN_STRIPS, ROW_BY_ROW, Arrangement
from dynaexq.quantization.codec import Encoded, ExpertCodec, ExpertWeights, tier_layout, tier_sizes
from dynaexq.quantization.layout import BlockLayout
from dynaexq.quantization.linear_codec import LinearCodec
from dynaexq.quantization.moments import PRIOR_TOKENS, ExpertInputs, Inputs, blended
from dynaexq.quantization.quantize import LARGEST_WEIGHT, check_representable
from dynaexq.quantization.tier_conversion import convert, offered, pieces, rebase

__all__ = [
    "IN_STRIPS",
    "LARGEST_WEIGHT",
    "PRIOR_TOKENS",
    "ROW_BY_ROW",
    "Arrangement",
    "BlockLayout",
    "Encoded",
    "ExpertCodec",
    "ExpertInputs",
    "ExpertWeights",
    "Inputs",
    "LinearCodec",
    "blended",
    "check_representable",
    "convert",
    "offered",
    "pieces",
    "rebase",
    "tier_layout",
    "tier_sizes",
]
