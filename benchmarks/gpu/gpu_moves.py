"""Promotions on a GPU: what the link carries, how long one takes, and what a stream of them does to decoding."""

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from clock import allocations, step_times, synchronize
from gpu_layers import Shape, routings, source_experts, swiglu
from torch import Tensor

from dynaexq.kernels import ExpertLayer, Upgrades, exchange_for, expert_mlp
from dynaexq.memory import DeviceMemory, RamStore, SwapPipeline, copier_for
from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.types import Transition

LAYERS, BATCH, TICK_EVERY, MOVES = 8, 8, 8, 64
TIERS = (("int2", "int4"), ("int4", "fp16"))
UPGRADED = 0.2


class Decoder:
    """Layers of experts that share one slab, and a pipeline that moves precision between them.

    Args:
        idle: whether no forwards run between moves; then slots come back in the order of the stream.
    """

    def __init__(self, shape: Shape, tiers: tuple[str, ...], pinned: bool, device: torch.device, idle: bool = False):
        codec = ExpertCodec(shape.expert, torch.bfloat16, tiers, method="rtn")
        assert codec.upgrade is not None, "a pair of two"
        count, slots = LAYERS * shape.num_experts, int(UPGRADED * LAYERS * shape.num_experts)
        self.shape, self.tiers, self.slot_nbytes = shape, tiers, codec.upgrade.nbytes
        self.memory = DeviceMemory(
            LAYERS,
            shape.num_experts,
            codec.base.nbytes,
            codec.upgrade.nbytes,
            slots + MOVES,
            device,
            exchange=None if idle else exchange_for(device, codec.dtype),
        )
        store = RamStore(count, codec.upgrade.nbytes, pinned)
        self._fill(codec, store, device)
        copier = copier_for(device, codec.upgrade.nbytes, staged=not pinned)
        self.pipeline = SwapPipeline(self.memory.table, self.memory.pool, store, copier, codec.upgrade.bits)
        self.layers = [
            ExpertLayer(codec, self.memory.base[layer], swiglu, activation_name="silu") for layer in range(LAYERS)
        ]
        self.upgraded = [divmod(i, shape.num_experts) for i in torch.randperm(count)[:slots].tolist()]
        for layer, expert in self.upgraded:
            self.pipeline.submit(Transition(layer, expert, promote=True))
        self.pipeline.drain()

    def step(self, arguments: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """One token of every sequence through all layers."""
        residual, ids, weights = arguments
        hidden = residual
        for index, layer in enumerate(self.layers):
            with self.memory.fence.reading():
                self.memory.layer_begins(index)
                upgrades = Upgrades(self.memory.table.row(index), self.memory.pool.at)
                hidden = residual + expert_mlp(hidden, ids, weights, layer, upgrades)
                self.memory.layer_ends(index, observed=True)
        return hidden

    def swap(self, moves: int) -> int:
        """Demote the oldest upgrades, promote as many others; how many copies were begun."""
        self.pipeline.settle()
        begun = 0
        for _ in range(min(moves, len(self.upgraded))):
            layer, expert = self.upgraded.pop(0)
            self.pipeline.submit(Transition(layer, expert, promote=False))
            other = int(torch.randint(self.shape.num_experts, ()))
            if self.pipeline.submit(Transition(layer, other, promote=True)):
                self.upgraded.append((layer, other))
                begun += 1
        return begun

    def _fill(self, codec: ExpertCodec, store: RamStore, device: torch.device) -> None:
        source, experts = source_experts(self.shape, device), self.shape.num_experts
        for expert in range(experts):
            weights = ExpertWeights(source.gate_up_proj.data[[expert]], source.down_proj.data[[expert]])
            encoded = codec.encode(weights)
            assert encoded.upgrade is not None
            for layer in range(LAYERS):  # the same weights in every layer: their bytes are what is measured
                self.memory.base[layer, expert] = encoded.base[0]
                store.write(layer * experts + expert, encoded.upgrade.cpu())


def link(shape: Shape, tiers: tuple[str, ...], pinned: bool, device: torch.device) -> dict[str, Any]:
    """Gigabytes a second of many promotions, microseconds of one, while nothing else runs."""
    decoder = Decoder(shape, tiers, pinned, device, idle=True)
    synchronize(device)
    start = time.perf_counter()
    begun = decoder.swap(MOVES)
    decoder.pipeline.drain()
    seconds = time.perf_counter() - start
    single = []
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        decoder.swap(1)
        decoder.pipeline.drain()
        synchronize(device)
        single.append((time.perf_counter() - start) * 1e6)
    decoder.pipeline.close()
    return {
        "model": shape.name,
        "pair": "+".join(tiers),
        "store": "pinned" if pinned else "ram",
        "gigabytes_a_second": begun * decoder.slot_nbytes / seconds / 1e9,
        "promotion_microseconds": statistics.median(single),
    }


def swapping(shape: Shape, tiers: tuple[str, ...], steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Step times with no moves, and with as many as a quarter of the link carries, all the time."""
    decoder = Decoder(shape, tiers, False, device)
    arguments = routings(shape, BATCH, device)
    for i in range(16):
        decoder.step(arguments[i % len(arguments)])
    quarter = min(MOVES, max(1, 16 * 2**20 // decoder.slot_nbytes))
    rows = [_swapped(decoder, arguments, steps, moves, device) for moves in (0, quarter)]
    decoder.pipeline.close()
    return rows


def _swapped(decoder: Decoder, arguments: list[Any], steps: int, moves: int, device: torch.device) -> dict[str, Any]:
    """Step times with so many moves for every few steps."""
    numbers, begun, before = itertools.count(), 0, allocations(device)

    def step() -> None:
        nonlocal begun
        number = next(numbers)
        if moves and number % TICK_EVERY == 0:
            begun += decoder.swap(moves)
        decoder.step(arguments[number % len(arguments)])

    times, seconds = step_times(step, steps, device)
    return {
        "model": decoder.shape.name,
        "pair": "+".join(decoder.tiers),
        "moves": begun,
        "megabytes_a_second": begun * decoder.slot_nbytes / seconds / 1e6,
        "tokens_a_second": steps * BATCH / seconds,
        "median_microseconds": statistics.median(times),
        "p99_microseconds": times[int(0.99 * len(times))],
        "allocations_a_step": (allocations(device) - before) / steps,
    }


def run(shape: Shape, steps: int, device: torch.device) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Everything that moves: titles, and rows below them."""
    stores = (True, False) if device.type == "cuda" else (False,)
    for tiers in TIERS:
        for pinned in stores:
            yield "link", [link(shape, tiers, pinned, device)]
        yield "swapping", swapping(shape, tiers, steps, device)
