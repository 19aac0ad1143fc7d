"""What the bits mean: number formats, packing, and the quantiser. No device logic and no kernel lives here."""

from dynaexq.formats.codec import Encoded, ExpertCodec, ExpertWeights
from dynaexq.formats.ladders import offered, pieces, rebase
from dynaexq.formats.moments import BLOCK, ExpertInputs, Inputs, Moments
from dynaexq.formats.quantizer import check_representable

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
]
