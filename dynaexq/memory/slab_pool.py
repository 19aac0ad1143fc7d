"""Equal slots in a few large allocations, so that precision can move for ever without fragmenting memory.

The pool hands out opaque bytes. It knows who owns a slot, not what is in it: a slot is free, owned, or retired (its
owner gave it back, but a kernel may still read it) until the fence says that the last reader has finished.
"""

import mmap
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dynaexq.memory.fences import Fence

SEGMENT_BYTES = 64 * 2**20
ADDRESSED = ("cpu", "cuda")
"""Devices whose kernels find bytes by address. On others an address is a name: theirs may be no numbers of 63 bits."""
LEAST_SEGMENTS = 8  # a small slab is cut as well, so that a smaller budget costs a part of it and not the whole


def allocate_bytes(nbytes: int, device: torch.device) -> Tensor:
    """Uint8 `[nbytes]` on `device`, aligned to 256 bytes, which any stream may write at once.

    CPU memory is mapped: freed, it goes back to the system. It is private: a forked process has its own.
    """
    if device.type == "cpu" and nbytes:
        return torch.frombuffer(mmap.mmap(-1, nbytes, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
    if device.type == "cuda":  # kernels queued for the last owner of a cached block may still be writing it
        torch.cuda.current_stream(device).synchronize()
    return memory


@dataclass(frozen=True, eq=False)
class Slot:
    """One fixed place in a slab: its address, or name, and its bytes, uint8 `[slot_nbytes]`.

    In a segment at 0x7F0000000000 of slots of 4,608 bytes, slot 2 has the address 0x7F0000002400.
    """

    address: int
    bytes: Tensor


class _Segment:
    """Slots beside each other, the first of which has the address `start`, or that of its bytes."""

    def __init__(self, num_slots: int, slot_nbytes: int, device: torch.device, start: int | None):
        self.bytes = allocate_bytes(num_slots * slot_nbytes, device)
        start = self.bytes.data_ptr() if start is None else start
        rows = self.bytes.view(num_slots, slot_nbytes)
        self.slots = [Slot(start + i * slot_nbytes, rows[i]) for i in range(num_slots)]


class SlabPool:
    """Slots of `slot_nbytes` (a multiple of 256), allocated in segments by `grow` and nowhere else."""

    def __init__(self, slot_nbytes: int, device: torch.device, fence: Fence):
        self.slot_nbytes = slot_nbytes
        self.device = device
        self.fence = fence
        self._segments: list[_Segment] = []
        self._at: dict[int, Slot] = {}
        self._free: list[Slot] = []
        self._retired: deque[tuple[object, Slot]] = deque()
        self._owned: set[int] = set()
        self._next_name = 256

    @property
    def num_slots(self) -> int:
        return len(self._at)

    @property
    def num_available(self) -> int:
        """Slots that are free, or will be once their last reader has finished."""
        return len(self._free) + len(self._retired)

    @property
    def nbytes(self) -> int:
        """Bytes really allocated."""
        return sum(segment.bytes.untyped_storage().nbytes() for segment in self._segments if segment.slots)

    def grow(self, num_slots: int) -> None:
        """Add `num_slots` free slots."""
        per_segment = min(SEGMENT_BYTES // self.slot_nbytes, num_slots // LEAST_SEGMENTS) or 1
        while num_slots > 0:
            segment = self._segment(min(per_segment, num_slots))
            self._segments.append(segment)
            self._at.update((slot.address, slot) for slot in segment.slots)
            self._free.extend(segment.slots)
            num_slots -= len(segment.slots)

    def allocate(self) -> Slot | None:
        """A free slot, owned by the caller from now on, or None."""
        self.reclaim()
        if not self._free:
            return None
        slot = self._free.pop()
        self._owned.add(slot.address)
        return slot

    def release(self, slot: Slot) -> None:
        """Give back a slot that no reader has ever seen."""
        self._disown(slot)
        self._free.append(slot)

    def retire(self, slot: Slot) -> None:
        """Give back a slot that readers which have begun may still read; later ones no longer find it."""
        self._disown(slot)
        self._retired.append((self.fence.mark(), slot))

    def reclaim(self) -> None:
        """Free the retired slots whose last reader has finished. Never waits."""
        passed: object = None
        while self._retired and (self._retired[0][0] is passed or self.fence.passed(self._retired[0][0])):
            passed, slot = self._retired.popleft()
            self._free.append(slot)

    def settle(self) -> None:
        """Free every retired slot; waits for their last readers."""
        for ticket, _ in self._retired:
            self.fence.wait(ticket)
        self.reclaim()

    def mend(self, owned: set[int]) -> None:
        """Put the books in order after a call that was cut short: the slots at `owned` have owners, and no others.

        Those are taken for retired now, whatever they were: a reader that has begun may have found any of them.
        """
        self._at = {slot.address: slot for segment in self._segments for slot in segment.slots}
        self._owned = set(owned)
        self._retired = deque()
        self._free = []
        ticket = self.fence.mark()
        self._retired.extend((ticket, slot) for address, slot in self._at.items() if address not in owned)
        self.reclaim()

    def slot(self, address: int) -> Slot:
        """The slot at `address`."""
        return self._at[address]

    def at(self, address: int) -> Tensor:
        """The bytes of the slot at `address`."""
        return self._at[address].bytes

    def surplus(self, num_slots: int, worth: Mapping[int, float]) -> set[int]:
        """Addresses of the slots in the segments to drop so that at most `num_slots` remain, least worth first."""
        ranked = sorted(
            range(len(self._segments)),
            key=lambda i: (sum(worth.get(slot.address, 0.0) for slot in self._segments[i].slots), -i),
        )
        excess, addresses = self.num_slots - num_slots, set[int]()
        for i in ranked:
            if len(addresses) >= excess:
                break
            addresses.update(slot.address for slot in self._segments[i].slots)
        return addresses

    def drop(self, addresses: set[int]) -> None:
        """Return the memory of segments all of whose slots are in `addresses`; waits for their last readers.

        None of the slots may be owned.
        """
        assert not addresses & self._owned, "a slot that is owned cannot be dropped"
        for ticket, slot in self._retired:
            if slot.address in addresses:
                self.fence.wait(ticket)
        self.reclaim()
        self._segments = [s for s in self._segments if not s.slots or s.slots[0].address not in addresses]
        self._free = [slot for slot in self._free if slot.address not in addresses]
        for address in addresses:
            del self._at[address]

    def _segment(self, num_slots: int) -> _Segment:
        start = None
        if self.device.type not in ADDRESSED:
            start = self._next_name
            self._next_name += num_slots * self.slot_nbytes
        return _Segment(num_slots, self.slot_nbytes, self.device, start)

    def _disown(self, slot: Slot) -> None:
        assert slot.address in self._owned, "a slot is given back once, by its owner"
        self._owned.remove(slot.address)
