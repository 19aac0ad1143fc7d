"""A long run on a GPU: does memory grow, and is every upgrade the one that it should be, after minutes of moves."""

import time
from typing import Any

import psutil
import torch
from clock import allocated_bytes, synchronize
from random_model import Rotation, build

from dynaexq.runtime.runtime import Runtime

TOKENS, WARM_UP = 64, 3
MOST_GROWTH = 2**20  # bytes of the device, over hundreds of calls


def run(sizes: dict[str, Any], tiers: tuple[str, ...], seconds: float, device: torch.device) -> dict[str, Any]:
    """Generate with a static cache while all precision moves; raise AssertionError where something is not right."""
    policy = Rotation()
    policy.moving = True
    model = build(sizes, tiers, policy, device)
    runtime, process = model.dynaexq, psutil.Process()
    before, rounds, began = (0, 0), 0, time.monotonic()
    while rounds <= WARM_UP or time.monotonic() - began < seconds:
        ids = torch.randint(sizes["vocab_size"], (1 + rounds % 2, 16), device=device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            cache_implementation="static",
            do_sample=False,
            pad_token_id=0,
        )
        rounds += 1
        if rounds == WARM_UP:
            before = allocated_bytes(device), process.memory_info().rss
    runtime.freeze()
    synchronize(device)
    grown = allocated_bytes(device) - before[0], process.memory_info().rss - before[1]
    wrong, stats = wrong_upgrades(runtime), runtime.stats()
    runtime.close()
    assert not wrong, f"the bytes of {len(wrong)} upgrades are not those of their experts, {wrong[0]} first"
    assert grown[0] <= MOST_GROWTH, f"{grown[0]:,} bytes more of the device are held after {rounds} calls of generate"
    return {
        "pair": "+".join(tiers),
        "calls": rounds,
        "seconds": time.monotonic() - began,
        "promotions": stats["promotions"],
        "failed": stats["failed"],
        "upgrades_compared": stats["upgraded"],
        "device_bytes_grown": grown[0],
        "host_megabytes_grown": grown[1] / 1e6,
    }


def wrong_upgrades(runtime: Runtime) -> list[tuple[int, int]]:
    """Published upgrades whose bytes on the device are not those of their expert in the store."""
    found = []
    for part in runtime.devices:
        pipeline = part.pipeline
        expected = torch.empty(pipeline.pool.slot_nbytes, dtype=torch.uint8)
        for (layer, expert), address in pipeline.table.addresses().items():
            pipeline.store.read_into(layer * part.plan.num_experts + expert, expected)
            if not torch.equal(pipeline.pool.at(address).cpu(), expected):
                found.append((layer, expert))
    return found
