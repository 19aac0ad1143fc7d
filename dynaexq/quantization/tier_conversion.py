"""Serve stored planes at other tiers: which ones they allow, and how blocks are converted. Every step is exact.

16-bit parts can be had in another dtype besides, each number rounded once.

A code that was quantized for two tiers can be read at any number of bits whose planes are there, so a stored
(int2, int8) serves as (int2, int4), (int4, int8), int2, int4 or int8 as well.
"""

from functools import reduce

import torch
from torch import Tensor

from dynaexq.quantization.bitplanes import pack_plane, unpack_plane
from dynaexq.quantization.codec import MATRICES, ExpertCodec
from dynaexq.quantization.layout import BlockLayout
from dynaexq.quantization.plane_codec import BASE_PLANES, REFINE_PLANES
from dynaexq.types import ALL_TIERS

_TOP4_IN_PIECES = (("top2", "middle2"), ("top2", "third1", "fourth1"))
"""The planes that an int4 base may be stored as, where its code was made for a base of fewer bits."""


def offered(stored: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The tiers that an expert stored at `stored` can be read as, the stored ones among them.

    >>> offered(("int4", "fp16"))
    (('int4',), ('fp16',), ('int4', 'fp16'))
    """
    return tuple(tiers for tiers in ALL_TIERS if tiers == stored or (len(stored) == 2 and _holds(stored, tiers)))


def pieces(stored: ExpertCodec, wanted: BlockLayout) -> list[tuple[int, int]]:
    """Where the parts of `wanted` lie in an upgrade of `stored`: (index of the stored part, offset in the slot)."""
    index_of = {part.name: index for index, part in enumerate(stored.upgrade_layout.parts)}
    return [(index_of[part.name], part.offset) for part in wanted.parts]


def rebase(stored: ExpertCodec, wanted: ExpertCodec, base: Tensor, upgrade: Tensor | None) -> Tensor:
    """Base blocks of `wanted`, uint8 `[n, nbytes]`, from the blocks of n experts of `stored`.

    Args:
        upgrade: needed only where the tier of the base is another one.
    """
    parts = stored.base_layout.view(base)
    if upgrade is not None:
        parts = parts | stored.upgrade_layout.view(upgrade)
    blocks = base.new_zeros(len(base), wanted.base_layout.nbytes)
    for name, target in wanted.base_layout.view(blocks).items():
        target.copy_(parts[name] if name in parts else _merged(stored, parts, name))
    return blocks


def convert(stored: BlockLayout, wanted: BlockLayout, blocks: Tensor, out: Tensor) -> None:
    """Fill `out`, uint8 `[n, nbytes]`, with the parts of `blocks` in the dtypes that `wanted` has them in."""
    parts = stored.view(blocks)
    for name, target in wanted.view(out).items():
        target.copy_(parts[name])


def _merged(codec: ExpertCodec, parts: dict[str, Tensor], name: str) -> Tensor:
    """The `top4` plane of a matrix from the planes that it is stored as."""
    matrix = next(matrix for matrix in MATRICES if name == f"{matrix}.top4")
    block = codec.matrices[matrix].block
    codes = [
        unpack_plane(parts[f"{matrix}.{plane.name}"], plane.bits, block) << (plane.shift - 4)
        for plane in codec.planes + codec.refine_planes
        if plane.shift >= 4
    ]
    return pack_plane(reduce(torch.bitwise_or, codes), 4, block)


def _holds(stored: tuple[str, ...], tiers: tuple[str, ...]) -> bool:
    base, upgrade = tiers[0], tiers[1] if len(tiers) > 1 else None
    keeps_source = stored[1] == "fp16"
    if keeps_source and base not in stored:
        return False  # a code that is not refined is fitted to its own bits, and to no others
    refined = {plane.name for plane in REFINE_PLANES.get((stored[0], stored[1]), ())}
    planes = {plane.name for plane in BASE_PLANES[stored[0]]} | refined
    if any(planes.issuperset(pieces) for pieces in _TOP4_IN_PIECES):
        planes.add("top4")
    has_base = keeps_source if base == "fp16" else {plane.name for plane in BASE_PLANES[base]} <= planes
    if upgrade is None or upgrade == "fp16":
        return has_base and (upgrade is None or keeps_source)
    return has_base and {plane.name for plane in REFINE_PLANES[base, upgrade]} <= refined
