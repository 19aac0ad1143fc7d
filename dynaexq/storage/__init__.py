"""What lies on disk: safetensors shards by position, packed experts in them, and directories replaced in one step."""

from dynaexq.storage.directory import is_weights, link_or_copy, replaced
from dynaexq.storage.packed import FORMAT_VERSION, MARK, PackedReader, PackedShape, PackedStore, PackedWriter
from dynaexq.storage.shards import Entry, Shard, ShardWriter

__all__ = [
    "FORMAT_VERSION",
    "MARK",
    "Entry",
    "PackedReader",
    "PackedShape",
    "PackedStore",
    "PackedWriter",
    "Shard",
    "ShardWriter",
    "is_weights",
    "link_or_copy",
    "replaced",
]
