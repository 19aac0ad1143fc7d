"""Files on disk: safetensors shards by position, packed experts in them, and directories replaced in one step."""

from dynaexq.checkpoint.atomic_directory import link_or_copy, replaced
from dynaexq.checkpoint.packed_format import (
    FORMAT_VERSION,
    MARK,
    QUANT_METHOD,
    READ_VERSIONS,
    PackedReader,
    PackedShape,
    PackedStore,
    PackedWriter,
)
from dynaexq.checkpoint.safetensors_io import Entry, Shard, ShardWriter, read_tensors, write_tensors
from dynaexq.checkpoint.shard_index import INDEX, read_index, write_index

__all__ = [
    "FORMAT_VERSION",
    "INDEX",
    "MARK",
    "QUANT_METHOD",
    "READ_VERSIONS",
    "Entry",
    "PackedReader",
    "PackedShape",
    "PackedStore",
    "PackedWriter",
    "Shard",
    "ShardWriter",
    "link_or_copy",
    "read_index",
    "read_tensors",
    "replaced",
    "write_index",
    "write_tensors",
]
