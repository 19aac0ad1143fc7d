"""What the bits mean: number formats, packing, and the quantiser. No device logic and no kernel lives here."""

from dynaexq.formats.codec import Encoded, ExpertCodec, ExpertWeights
from dynaexq.formats.ladders import offered, pieces, rebase
from dynaexq.formats.quantizer import check_representable

__all__ = ["Encoded", "ExpertCodec", "ExpertWeights", "check_representable", "offered", "pieces", "rebase"]
