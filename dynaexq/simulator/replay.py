"""A trace through the control of a real model: every decision is `control`'s own, and only memory is imagined.

It stands beside four sets that no rule had to find: the choice made at the start, the best for the trace as a whole,
for each phase, and for each window. The last three know the future. With several replicas, requests go to one after
the other, each decides by what it has seen itself, and now and then all may be told what the others have seen.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dynaexq.errors import TraceError
from dynaexq.policy import Verdict, slots_per_row, top_n
from dynaexq.policy.controller import ControlLoop, Window
from dynaexq.policy.rate_limit import CopyRateLimiter
from dynaexq.settings import Settings
from dynaexq.traces import Phase, Trace, TraceWindow
from dynaexq.types import Transition

YARDSTICKS = ("start", "average", "phase", "window")


@dataclass(frozen=True)
class Replicas:
    """Copies of a model that share the traffic.

    `Replicas(8, request_tokens=256, exchange_every=4096)`: eight, and sixteen requests between two exchanges.

    Attributes:
        count: how many there are.
        request_tokens: tokens after which the next one has its turn.
        exchange_every: tokens of all after which each is told the routing counts of the others since the last time;
            None where each is on its own.
    """

    count: int = 1
    request_tokens: int = 256
    exchange_every: int | None = None


@dataclass(frozen=True)
class Machine:
    """What a trace does not know of the machine it is replayed on.

    `Machine(1229, 1_179_648, 25e9, 50.0)`: a fifth of 48 x 128 experts of 1.2 MB over PCIe 4, at 50 tokens per second.

    Attributes:
        num_slots, slot_nbytes: upgrades that fit, and the bytes of one.
        link: bytes per second from host memory to the device.
        tokens_per_second: pace of the model, prompts included.
    """

    num_slots: int
    slot_nbytes: int
    link: float
    tokens_per_second: float


@dataclass
class Track:
    """One set of experts over the windows: the routing mass, and the removable error, that met an upgrade."""

    mass: list[float] = field(default_factory=list)
    removed: list[float] = field(default_factory=list)

    def add(self, window: TraceWindow, gain: np.ndarray, held: np.ndarray) -> None:
        """Count one window that met the experts `held [L, E]`."""
        mass = window.mass[held]
        self.mass.append(float(mass.sum()))
        self.removed.append(float((mass * gain[held]).sum()))


@dataclass(frozen=True)
class Replay:
    """What happened, window by window; arrays are `[W]`.

    Attributes:
        tokens: tokens of each window.
        routed: a track that meets everything; what the others are shares of.
        tracks: `policy` and the yardsticks.
        promotions: started in each window.
        paused: whether moves were paused.
    """

    machine: Machine
    phases: list[Phase]
    tokens: np.ndarray
    routed: Track
    tracks: dict[str, Track]
    promotions: np.ndarray
    paused: np.ndarray
    verdict: Verdict

    def coverage(self, name: str, first: int = 0, end: int | None = None) -> float:
        """Share of the routing mass of windows `first` to `end` that met an upgraded expert of a track."""
        return _share(self.tracks[name].mass, self.routed.mass, slice(first, end))

    def removed(self, name: str, first: int = 0, end: int | None = None) -> float:
        """Share of the removable error of those windows that a track removed."""
        return _share(self.tracks[name].removed, self.routed.removed, slice(first, end))

    def tokens_to(self, share: float, phase: Phase, over: int = 128) -> int:
        """Tokens of `phase` until the policy's coverage of the last `over` tokens reaches `share` of its final one.

        Final is the coverage of the phase's last quarter.
        """
        final = self.coverage("policy", phase.end - (phase.end - phase.first + 3) // 4, phase.end)
        seen = np.cumsum(self.tokens[phase.first : phase.end])
        for index, count in enumerate(seen):
            first = phase.first + int(np.searchsorted(seen, count - over, side="right"))
            if self.coverage("policy", first, phase.first + index + 1) >= share * final:
                return int(count)
        return int(seen[-1])


class ImaginedSlots:
    """Upgrade slots behind a link that copies one upgrade after another; see `policy.Slots`.

    No copy fails, and freed slots have no late readers.
    """

    allowance = None

    def __init__(self, machine: Machine, shape: tuple[int, int]):
        self.machine = machine
        self.now = 0.0
        self.upgraded, self.published, self.barred = (np.zeros(shape, dtype=bool) for _ in range(3))
        self._in_flight: deque[tuple[float, tuple[int, int]]] = deque()

    @property
    def num_slots(self) -> int:
        """All slots."""
        return self.machine.num_slots

    @property
    def num_free(self) -> int:
        """Slots without an owner."""
        return self.machine.num_slots - int(self.upgraded.sum())

    def submit(self, move: Transition) -> bool:
        """Begin one move; whether that was possible."""
        key = move.layer, move.expert
        if not move.promote:
            begun = bool(self.published[key])
            if begun:
                self.upgraded[key] = self.published[key] = False
            return begun
        if self.num_free == 0 or self.upgraded[key]:
            return False
        begins = max(self.now, self._in_flight[-1][0] if self._in_flight else 0.0)
        self._in_flight.append((begins + self.machine.slot_nbytes / self.machine.link, key))
        self.upgraded[key] = True
        return True

    def settle(self) -> None:
        """Publish what has arrived by now."""
        while self._in_flight and self._in_flight[0][0] <= self.now:
            self.published[self._in_flight.popleft()[1]] = True

    def tick(self) -> None:
        """Nothing: no copy fails, and none waits to be tried again."""

    def reclaim(self) -> None:
        """Nothing: freed slots are free at once."""

    def drain(self) -> None:
        """Wait for everything in flight and publish it, at a moment that no clock counts."""
        while self._in_flight:
            self.published[self._in_flight.popleft()[1]] = True


class _Replica:
    """One model: its control, and slots that begin filled."""

    def __init__(self, shape: tuple[int, int], gain: np.ndarray, machine: Machine, settings: Settings):
        self.slots = slots = ImaginedSlots(machine, shape)
        limit = settings.copy_rate_limit
        rate = limit * machine.link if isinstance(limit, float) else limit
        assert not isinstance(rate, str), "settings have turned sizes into bytes"
        limiter = CopyRateLimiter(rate, machine.slot_nbytes, lambda: slots.now)
        self.control = ControlLoop(shape, gain, limiter, settings)
        self.control.fill(slots)
        slots.drain()

    def step(self, window: TraceWindow, top_k: int) -> int:
        """Decide after one window; how many promotions that began."""
        self.slots.now += float(window.tokens.max()) / self.slots.machine.tokens_per_second
        seen = Window(*window, top_k=top_k, upgraded=self.slots.published.copy())
        return sum(move.promote for move in self.control.step(seen, self.slots))


class _Untold:
    """What each replica has seen since they told one another."""

    def __init__(self, fleet: Sequence[_Replica]):
        self._fleet = fleet
        self._seen: dict[_Replica, TraceWindow] = {}

    @property
    def tokens(self) -> int:
        """Of all."""
        return sum(int(window.tokens.max()) for window in self._seen.values())

    def add(self, replica: _Replica, window: TraceWindow) -> None:
        """One more window of one replica."""
        self._seen[replica] = self._seen[replica] + window if replica in self._seen else window

    def tell(self) -> None:
        """Let each take in what the others have seen."""
        for replica in self._fleet:
            others = [window for one, window in self._seen.items() if one is not replica]
            if others:
                replica.control.tracker.update(*sum(others[1:], start=others[0]))
        self._seen.clear()


def replay(
    trace: Trace, gain: np.ndarray, machine: Machine, settings: Settings, replicas: Replicas | None = None
) -> Replay:
    """Send `trace` through the control that `settings` ask for, one tick a window.

    Args:
        gain: `[L, E]`, the error that the upgrade removes from each expert.
        machine: that of each replica.

    Raises:
        TraceError: the trace is empty.
    """
    if not trace.num_windows:
        raise TraceError(f"{trace.path} holds no window: no tick fell into its recording; record for longer")
    replicas = replicas or Replicas()
    fleet = [_Replica(trace.header.shape, gain, machine, settings) for _ in range(replicas.count)]
    start = fleet[0].slots.published.copy()
    sets = _foreseen(trace, gain, machine.num_slots, settings) | {"start": start}
    routed, tracks = Track(), {name: Track() for name in ("policy", *YARDSTICKS)}
    everyone, rows = np.ones(trace.header.shape, dtype=bool), []
    seen, untold = 0, _Untold(fleet)
    phase_of = np.repeat(np.arange(len(trace.phases)), [phase.end - phase.first for phase in trace.phases])
    for index, window in enumerate(trace.windows()):
        sets["phase"] = sets[f"phase {phase_of[index]}"]
        sets["window"] = _best(window.mass * gain, machine.num_slots, settings)
        routed.add(window, gain, everyone)
        for name in YARDSTICKS:
            tracks[name].add(window, gain, sets[name])
        replica = fleet[seen // replicas.request_tokens % replicas.count]
        tracks["policy"].add(window, gain, replica.slots.published)
        begun, count = replica.step(window, trace.header.top_k), int(window.tokens.max())
        rows.append((count, begun, replica.control.auto_pause.paused))
        seen += count
        if replicas.exchange_every:
            untold.add(replica, window)
            if untold.tokens >= replicas.exchange_every:
                untold.tell()
    tokens, promotions, paused = (np.array(column) for column in zip(*rows, strict=True))
    verdict = Verdict.merged([one.control.verdict(one.slots.published) for one in fleet], [1] * len(fleet))
    return Replay(machine, trace.phases, tokens, routed, tracks, promotions, paused, verdict)


def _foreseen(trace: Trace, gain: np.ndarray, num_slots: int, settings: Settings) -> dict[str, np.ndarray]:
    """The best set for the trace as a whole, `average`, and for each phase, `phase 0` and so on."""
    mass = np.zeros((len(trace.phases), *trace.header.shape))
    ends = [phase.end for phase in trace.phases]
    for index, window in enumerate(trace.windows()):
        mass[np.searchsorted(ends, index, side="right")] += window.mass
    sets = {f"phase {index}": _best(total * gain, num_slots, settings) for index, total in enumerate(mass)}
    return sets | {"average": _best(mass.sum(0) * gain, num_slots, settings)}


def _best(score: np.ndarray, num_slots: int, settings: Settings) -> np.ndarray:
    slots = slots_per_row(settings.allocation, num_slots, len(score))
    rows = score.reshape(len(slots), -1)
    return top_n(rows, np.zeros(rows.shape, dtype=bool), slots, 0.0).reshape(score.shape)


def _share(part: list[float], whole: list[float], windows: slice) -> float:
    total = sum(whole[windows])
    return sum(part[windows]) / total if total else 0.0
