"""What 16-bit experts were when they were read first, so that what is read later is known to be the same.

Upgrades in 16 bit, and the weights that undo a patch, are read from files again and again, for as long as a model
lives. If such a file is overwritten meanwhile, the model must not change. A CRC-32 an expert is kept: 4 GB/s on one
core, and 4 bytes. It knows no file and no format.
"""

import zlib
from collections.abc import Hashable

import torch

from dynaexq.errors import CheckpointError
from dynaexq.quantization import ExpertWeights


class Fingerprints:
    """Checksums of experts, each taken when it is read first; any number of sources may share one."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, int] = {}

    def check(self, layer: str, first: int, weights: ExpertWeights, where: str) -> None:
        """Compare experts `first`, `first + 1` ... of a layer with what they were; a CheckpointError names `where`."""
        for index in range(len(weights.up)):
            key, found = (layer, first + index), _checksum(weights, index)
            if self._sums.setdefault(key, found) != found:
                raise CheckpointError(
                    f"expert {first + index} of {layer} is not what it was when the model was loaded: {where} was "
                    "overwritten or damaged since; put the original back, or load the model again"
                )


def _checksum(weights: ExpertWeights, index: int) -> int:
    total = 0
    for part in (weights.up, weights.down, weights.up_bias, weights.down_bias):
        if part is not None:
            block = part[index].detach().contiguous().cpu().view(-1).view(torch.uint8)
            total = zlib.crc32(block.numpy().data, total)
    return total
