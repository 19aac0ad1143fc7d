"""Where bytes live and how they move: slots, tables, counters, copies. Bytes are opaque here; nothing is decided."""

from dynaexq.memory.copy_engine import CudaCopier, EagerCopier, ManualCopier, copier_for, leave_captures_alone
from dynaexq.memory.device_memory import DeviceMemory, bytes_per_second
from dynaexq.memory.expert_table import ExpertTable
from dynaexq.memory.fences import Fence, ManualFence, ReaderFence, StreamFence
from dynaexq.memory.graph_sync import EpochFence, Exchange, HostMailbox
from dynaexq.memory.host_store import DiskStore, HostStore, RamStore
from dynaexq.memory.pinned import on_device
from dynaexq.memory.routing_counter import RoutingCounter
from dynaexq.memory.slab_pool import SlabPool, allocate_bytes
from dynaexq.memory.swap_pipeline import SwapPipeline

__all__ = [
    "CudaCopier",
    "DeviceMemory",
    "DiskStore",
    "EagerCopier",
    "EpochFence",
    "Exchange",
    "ExpertTable",
    "Fence",
    "HostMailbox",
    "HostStore",
    "ManualCopier",
    "ManualFence",
    "RamStore",
    "ReaderFence",
    "RoutingCounter",
    "SlabPool",
    "StreamFence",
    "SwapPipeline",
    "allocate_bytes",
    "bytes_per_second",
    "copier_for",
    "leave_captures_alone",
    "on_device",
]
