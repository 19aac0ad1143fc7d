"""Where bytes live and how they move: slots, tables, counters, copies. Bytes are opaque here; nothing is decided."""

from dynaexq.memory.copiers import CudaCopier, EagerCopier, ManualCopier, copier_for, leave_captures_alone
from dynaexq.memory.counter import RoutingCounter
from dynaexq.memory.device import DeviceMemory
from dynaexq.memory.echo import EchoFence
from dynaexq.memory.fence import Fence, ManualFence, ReaderFence, StreamFence
from dynaexq.memory.host import DiskStore, HostStore, RamStore
from dynaexq.memory.pinned import on_device
from dynaexq.memory.slab import SlabPool, allocate_bytes
from dynaexq.memory.swap import SwapPipeline
from dynaexq.memory.table import ExpertTable
from dynaexq.memory.words import Exchange, HostWords

__all__ = [
    "CudaCopier",
    "DeviceMemory",
    "DiskStore",
    "EagerCopier",
    "EchoFence",
    "Exchange",
    "ExpertTable",
    "Fence",
    "HostStore",
    "HostWords",
    "ManualCopier",
    "ManualFence",
    "RamStore",
    "ReaderFence",
    "RoutingCounter",
    "SlabPool",
    "StreamFence",
    "SwapPipeline",
    "allocate_bytes",
    "copier_for",
    "leave_captures_alone",
    "on_device",
]
