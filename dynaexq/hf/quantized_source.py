"""Checkpoints that are quantized already, seen as the 16-bit ones they stand for: FP8, MXFP4, GPTQ, AWQ and others.

Several tensors of a file (codes, scales, zero points) make one of the model. A `DequantizedShard` shows that one,
under the name it has in a 16-bit checkpoint, and makes it when it is read: nothing is ever there twice. It does not
know which tensors are experts.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from dynaexq.checkpoint import Entry, Shard
from dynaexq.errors import CheckpointError
from dynaexq.hf.checkpoint_source import checkpoint_files, open_shards
from dynaexq.hf.meta_model import quantization_of

Pieces = dict[str, Any]
"""Entries, or tensors, of one weight by the endings of their keys."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column whose code lies in each of the eight nibbles of a word, from the lowest."""


class Packing(NamedTuple):
    """How one weight is stored in pieces.

    Attributes:
        mark: how the key of the piece ends that only a packed weight has.
        pieces: how the keys of all pieces may end, after what they have in common.
        ending: how the key of the weight ends in a 16-bit checkpoint.
        shape: of the weight, from the entries of its pieces and what their keys have in common.
        unpack: the weight, from its pieces and the same.
        unused: how the keys of tensors end that only kernels for the codes need.
    """

    mark: str
    pieces: tuple[str, ...]
    ending: str
    shape: Callable[[Pieces, str], tuple[int, ...]]
    unpack: Callable[[Pieces, str], Tensor]
    unused: tuple[str, ...] = ()


def packing_of(config: Mapping[str, Any]) -> Packing | None:
    """What a checkpoint with this `quantization_config` is packed as; None for a method that is not known here.

    Raises:
        CheckpointError: a variety of a known method that cannot be unpacked exactly, or its package is missing.
    """
    make = PACKINGS.get(str(config.get("quant_method")))
    return None if make is None else make(config)


class DequantizedShard:
    """A shard whose packed weights look, and are read, as the `dtype` ones that they stand for.

    Args:
        shard: the file with the codes.
        others: all files of the checkpoint, by key: the scales may be in another.
        recent: the last matrix that any of the files has dequantized, as its rows may be read in turn.
    """

    def __init__(
        self,
        shard: Shard,
        others: Mapping[str, Shard],
        packing: Packing,
        dtype: torch.dtype,
        recent: dict[str, Tensor],
    ):
        self.path, self.close = shard.path, shard.close
        self._shard, self._packing, self._dtype = shard, packing, dtype
        self._pieces: dict[str, tuple[str, dict[str, tuple[Shard, str]]]] = {}
        self._recent = recent
        self.entries: dict[str, Entry] = {}
        stems = [key.removesuffix(packing.mark) for key in others if key.endswith(packing.mark)]
        taken = {f"{stem}{piece}" for stem in stems for piece in packing.pieces}
        for key, entry in shard.entries.items():
            if key not in taken and not key.endswith(packing.unused or ("\0",)):
                self.entries[key] = entry
        for stem in stems:
            keys = {end: f"{stem}{end}" for end in packing.pieces}
            pieces = {end: (others[key], key) for end, key in keys.items() if key in others}
            if next(iter(pieces.values()))[0] is shard:
                self._add(stem, pieces)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last` (exclusive) of tensor `name`, dequantized."""
        if name not in self._pieces:
            return self._shard.read(name, first, last)
        if len(self.entries[name].shape) > 2:  # every piece has its part for each row of a stack
            return self._unpacked(name, first, last)
        weight = self._recent.get(name)
        if weight is None:
            weight = self._unpacked(name, 0, None)
            self._recent.clear()
            self._recent[name] = weight
        return weight[first:last]

    def _add(self, stem: str, pieces: dict[str, tuple[Shard, str]]) -> None:
        try:
            shape = self._packing.shape({end: shard.entries[key] for end, (shard, key) in pieces.items()}, stem)
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{stem} of {self.path} lacks a part of what its codes mean ({error}); the checkpoint is incomplete: "
                "fetch it again"
            ) from error
        name = f"{stem}{self._packing.ending}"
        self._pieces[name] = stem, pieces
        self.entries[name] = Entry(self._dtype, shape, -1)

    def _unpacked(self, name: str, first: int, last: int | None) -> Tensor:
        stem, pieces = self._pieces[name]
        expected = self.entries[name].shape
        rows = (first, last) if len(expected) > 2 else (0, None)
        read = {
            end: shard.read(key, *rows if shard.entries[key].shape else ()) for end, (shard, key) in pieces.items()
        }
        try:
            weight = self._packing.unpack(read, stem).to(self._dtype)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(f"{stem} of {self.path} cannot be dequantized: {error}; fetch it again") from error
        if weight.shape[1:] != expected[1:]:
            raise CheckpointError(
                f"expected {name} of {self.path} to be {list(expected)}, its codes make {list(weight.shape)}; fetch "
                "it again"
            )
        return weight


def open_checkpoint(directory: Path, config: Any, variant: str | None = None) -> list[Shard] | list[DequantizedShard]:
    """The files of the checkpoint in `directory`, whose model has the configuration `config`, as 16-bit ones.

    Raises:
        CheckpointError: one is missing or damaged, or its codes cannot be unpacked.
    """
    packing = packing_of(quantization_of(config))
    shards = open_shards(checkpoint_files(directory, variant))
    if packing is None:
        return shards
    others = {key: shard for shard in shards for key in shard.entries}
    dtype, recent = config.dtype or torch.bfloat16, dict[str, Tensor]()
    return [DequantizedShard(shard, others, packing, dtype, recent) for shard in shards]


def _fp8(config: Mapping[str, Any]) -> Packing:
    blocks = config.get("weight_block_size") or (None, None)

    def unpack(pieces: Pieces, _: str) -> Tensor:
        weight, scale = pieces[""].float(), _as_factor(pieces["_scale_inv"])
        scale = scale.view(*scale.shape, *[1] * (weight.ndim - scale.ndim))
        for dim, block in zip((-2, -1), blocks, strict=True):
            scale = _spread(scale, dim, block, weight.shape[dim])
        return weight.mul_(scale)

    unused = ("activation_scale", "input_scale")
    return Packing("_scale_inv", ("", "_scale_inv"), "", lambda entries, _: entries[""].shape, unpack, unused)


def _spread(scale: Tensor, dim: int, block: int | None, size: int) -> Tensor:
    """Scales of blocks as scales of their `size` rows or columns; the last block may stand over the edge."""
    if scale.shape[dim] in (1, size):
        return scale
    if block is None or scale.shape[dim] != -(-size // block):
        raise ValueError(f"{scale.shape[dim]} scales for {size} rows or columns in blocks of {block}")
    return scale.repeat_interleave(block, dim).narrow(dim, 0, size)


def _as_factor(scale: Tensor) -> Tensor:
    """A scale in float32; a byte is the exponent of a power of two, biased by 127 (OCP Microscaling, E8M0)."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def _mxfp4(_: Mapping[str, Any]) -> Packing:
    def shape(entries: Pieces, _: str) -> tuple[int, ...]:
        num_experts, rows, groups, nbytes = entries["_blocks"].shape
        return num_experts, groups * nbytes * 2, rows

    def unpack(pieces: Pieces, _: str) -> Tensor:
        return convert_moe_packed_tensors(pieces["_blocks"], pieces["_scales"], dtype=torch.bfloat16)

    return Packing("_blocks", ("_blocks", "_scales"), "", shape, unpack)


def _gptq(config: Mapping[str, Any]) -> Packing:
    bits = int(config.get("bits", 0))
    _require("gptq", "bits", bits, (2, 4, 8))
    # Its first version stores zero points less one.
    added = 0 if config.get("checkpoint_format") == "gptq_v2" else 1

    def shape(entries: Pieces, _: str) -> tuple[int, ...]:
        words, rows = entries[".qweight"].shape
        return rows, words * 32 // bits

    def unpack(pieces: Pieces, _: str) -> Tensor:
        codes = _codes(pieces[".qweight"].T, bits).T  # [columns, rows]
        zeros = _codes(pieces[".qzeros"], bits) + added
        return _scaled(codes, zeros, pieces[".scales"], pieces.get(".g_idx"))

    return Packing(".qweight", (".qweight", ".qzeros", ".scales", ".g_idx"), ".weight", shape, unpack)


def _awq(config: Mapping[str, Any]) -> Packing:
    bits = config.get("bits", config.get("w_bit"))
    _require("awq", "bits", bits, (4,))
    _require("awq", "version", str(config.get("version", "gemm")).lower(), ("gemm",))

    def shape(entries: Pieces, _: str) -> tuple[int, ...]:
        columns, words = entries[".qweight"].shape
        return words * 8, columns

    def unpack(pieces: Pieces, _: str) -> Tensor:
        codes, zeros = (_awq_codes(pieces[name]) for name in (".qweight", ".qzeros"))
        return _scaled(codes, zeros, pieces[".scales"])

    return Packing(".qweight", (".qweight", ".qzeros", ".scales"), ".weight", shape, unpack)


def _awq_codes(words: Tensor) -> Tensor:
    nibbles = _codes(words, 4).view(len(words), -1, 8)
    return torch.empty_like(nibbles).index_copy_(-1, torch.tensor(AWQ_ORDER), nibbles).flatten(1)


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor | None = None) -> Tensor:
    """The weight `[rows, columns]` of codes `[columns, rows]`; the group of each column, if they are not in order."""
    if group is None:
        group = torch.arange(len(codes)) // (len(codes) // len(scales))
    return ((codes - zeros[group]) * scales.float()[group]).T


def _codes(words: Tensor, bits: int) -> Tensor:
    """The codes in int32 `words [rows, n]`, the lowest bits first: int32 `[rows, n * 32 / bits]`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def _compressed(config: Mapping[str, Any]) -> Packing:
    """The schemes of compressed-tensors, by its own decompressors."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError as error:
        raise CheckpointError(
            "the checkpoint is quantized by compressed-tensors, and that package is not installed; "
            "pip install compressed-tensors"
        ) from error
    settings = QuantizationConfig.model_validate({**config, "quant_method": "compressed-tensors"})
    schemes = list(settings.config_groups.values())

    def scheme_of(stem: str) -> Any:
        patterns = [(target, scheme) for scheme in schemes for target in scheme.targets]
        by_name = [scheme for target, scheme in patterns if target.startswith("re:") and re.match(target[3:], stem)]
        return (by_name or [scheme for target, scheme in patterns if not target.startswith("re:")] or schemes)[0]

    def shape(entries: Pieces, stem: str) -> tuple[int, ...]:
        if ".weight" in entries:
            return tuple(entries[".weight"].shape)
        rows, words = entries[".weight_packed"].shape
        return rows, words * entries[".weight_packed"].dtype.itemsize * 8 // scheme_of(stem).weights.num_bits

    def unpack(pieces: Pieces, stem: str) -> Tensor:
        scheme = scheme_of(stem)
        compressor = BaseCompressor.get_value_from_registry(scheme.format or settings.format)
        weight: Tensor = compressor.decompress({end[1:]: piece for end, piece in pieces.items()}, scheme)["weight"]
        return weight

    endings = ("", "_packed", "_scale", "_zero_point", "_shape", "_g_idx", "_global_scale")
    return Packing(
        ".weight_scale", tuple(f".weight{end}" for end in endings), ".weight", shape, unpack, (".input_scale",)
    )


def _require(method: str, name: str, found: Any, possible: Iterable[Any]) -> None:
    if found not in possible:
        raise CheckpointError(
            f"the checkpoint is quantized by {method} with {name}={found!r}, and only "
            f"{', '.join(map(repr, possible))} can be unpacked; give the 16-bit checkpoint it was made from"
        )


PACKINGS: dict[str, Callable[[Mapping[str, Any]], Packing]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
"""The methods whose checkpoints are taken, by the names that Transformers has for them."""
