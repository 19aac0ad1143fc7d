"""Files on disk: safetensors shards by position, packed experts in them, and directories replaced in one step."""

from dynaexq.checkpoint.atomic_directory import INDEX, link_or_copy, replaced
from dynaexq.checkpoint.packed_format import (
    FORMAT_VERSION,
    MARK,
    QUANT_METHOD,
    PackedReader,
    PackedShape,
    PackedStore,
    PackedWriter,
)
from dynaexq.checkpoint.safetensors_io import Entry, Shard, ShardWriter, read_tensors, write_tensors

__all__ = [
    "FORMAT_VERSION",
    "INDEX",
    "MARK",
    "QUANT_METHOD",
    "Entry",
    "PackedReader",
    "PackedShape",
    "PackedStore",
    "PackedWriter",
    "Shard",
    "ShardWriter",
    "link_or_copy",
    "read_tensors",
    "replaced",
    "write_tensors",
]
