"""Who does what when: forwards, layers, ticks, copies and moves of a patched model on one clock.

It looks on from outside: hooks on modules, and wrappers round the methods through which a move passes. The library
does not know that it is watched.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynaexq.runtime.experts import MixedPrecisionExperts
from dynaexq.types import Transition

Stamp = Any
"""A moment: seconds, or a CUDA event that has yet to be read."""


class Clock:
    """Seconds since it was made, on the host or on a stream; one zero for both."""

    def __init__(self, device: torch.device):
        self._origin: Any = None
        if device.type == "cuda":
            self._origin = torch.cuda.Event(enable_timing=True)
            self._origin.record()
            self._origin.synchronize()
        self._start = time.perf_counter()

    def host(self) -> Stamp:
        """Now, on the host."""
        return time.perf_counter() - self._start

    def queued(self, stream: Any = None) -> Stamp:
        """The moment when `stream` (the current one, if None) gets here; on a CPU that is now."""
        if self._origin is None:
            return self.host()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream) if stream is not None else event.record()
        return event

    def seconds(self, stamp: Stamp) -> float:
        """A stamp as seconds; the device must have got there."""
        return stamp if isinstance(stamp, float) else self._origin.elapsed_time(stamp) / 1e3


@dataclass
class Move:
    """One move: when it was decided, when its bytes travelled (promotions only), when readers could find it."""

    transition: Transition
    decided: Stamp
    copy_begin: Stamp = None
    copy_end: Stamp = None
    published: Stamp = None


class Timeline:
    """Watches a patched `model` on one device, from now to `finish`.

    Attributes:
        label: what to call the forwards that follow.
        slot_nbytes: bytes of one promotion.
    """

    def __init__(self, model: Any):
        self.model, self.label = model, ""
        self._pipeline = model.dynaexq.devices[0].pipeline
        self._device = model.dynaexq.devices[0].device
        self.slot_nbytes = self._pipeline.pool.slot_nbytes
        self._clock = Clock(self._device)
        self._spans: dict[str, list[tuple[str, Stamp, Stamp]]] = {"forward": [], "layer": [], "tick": []}
        self._moves: list[Move] = []
        self._waiting: dict[tuple[int, int], Move] = {}
        self._of_slot: dict[int, Move] = {}
        self._watch_modules()
        self._watch_moves()

    def finish(self) -> tuple[dict[str, list[tuple[str, float, float]]], list[dict[str, Any]]]:
        """Publish what is on its way. Returns spans (name, begin, end) by kind, and moves, all in seconds."""
        self.model.dynaexq.drain()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        read = self._clock.seconds
        spans = {kind: [(name, read(a), read(b)) for name, a, b in found] for kind, found in self._spans.items()}
        return spans, [self._figures(move) for move in self._moves if move.published is not None]

    def _figures(self, move: Move) -> dict[str, Any]:
        layer, expert = move.transition.layer, move.transition.expert
        moments = ("decided", "copy_begin", "copy_end", "published")
        stamps = {name: getattr(move, name) for name in moments}
        return {
            "name": f"layer {layer}, expert {expert}",
            "promote": move.transition.promote,
            **{name: self._clock.seconds(stamp) for name, stamp in stamps.items() if stamp is not None},
        }

    def _watch_modules(self) -> None:
        self._watch("forward", self.model, lambda: self.label)
        for name, module in self.model.named_modules():
            if isinstance(module, MixedPrecisionExperts):
                layer, number = _decoder_layer(self.model, name)
                self._watch("layer", layer, lambda number=number: number)

    def _watch(self, kind: str, module: nn.Module, name: Callable[[], str]) -> None:
        begun: list[Stamp] = []
        module.register_forward_pre_hook(lambda *_: begun.append(self._clock.queued()))
        module.register_forward_hook(lambda *_: self._spans[kind].append((name(), begun.pop(), self._clock.queued())))

    def _watch_moves(self) -> None:
        pipeline = self._pipeline
        _wrap(self.model.dynaexq.devices[0], "_try_tick", self._tick)
        _wrap(pipeline, "submit", self._submit)
        _wrap(pipeline.copier, "start", self._start_copy)
        _wrap(pipeline.table, "publish", self._publish)
        _wrap(pipeline.table, "unpublish", self._publish)
        if self._device.type == "cuda":
            _wrap(pipeline.copier, "_queue", self._queue_copy)

    def _tick(self, tick: Callable[..., Any], *arrival: Any) -> Any:
        begin = self._clock.host()
        ran = tick(*arrival)
        if ran:
            self._spans["tick"].append(("", begin, self._clock.host()))
        return ran

    def _submit(self, submit: Callable[..., Any], transition: Transition) -> Any:
        move = Move(transition, self._clock.host())
        self._waiting[transition.layer, transition.expert] = move
        begun = submit(transition)
        if begun:
            self._moves.append(move)
        return begun

    def _start_copy(self, start: Callable[..., Any], store: Any, index: int, out: torch.Tensor) -> Any:
        move = self._waiting[divmod(index, self._pipeline.upgraded.shape[1])]
        if self._device.type == "cuda":  # only queued here, or not even that
            self._of_slot[out.data_ptr()] = move
            return start(store, index, out)
        move.copy_begin = self._clock.host()
        copy = start(store, index, out)
        move.copy_end = self._clock.host()
        return copy

    def _queue_copy(self, queue: Callable[..., Any], source: torch.Tensor, out: torch.Tensor) -> Any:
        move, stream = self._of_slot[out.data_ptr()], self._pipeline.copier._stream
        move.copy_begin = self._clock.queued(stream)
        event = queue(source, out)
        move.copy_end = self._clock.queued(stream)
        return event

    def _publish(self, publish: Callable[..., Any], layer: int, expert: int, *entry: int) -> None:
        publish(layer, expert, *entry)
        move = self._waiting.pop((layer, expert), None)
        if move is not None:
            move.published = self._clock.host()


def _decoder_layer(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The decoder layer that holds the experts at `path`, and its number."""
    parts = path.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit())
    return model.get_submodule(".".join(parts[: last + 1])), parts[last]


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Have `around(method, *args)` called instead of the method of that name."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *args: around(method, *args))
