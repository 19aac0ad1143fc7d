"""What of a model fits a card, and at what price: arithmetic on its spec. It touches no model and no device."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dynaexq.planning.budget import (
    ModelSpec,
    TierPair,
    budgets_within,
    fitting_plans,
    least_available,
    loss_of,
    weights_budget,
)
from dynaexq.planning.hardware import DISK_RATE, DRIVER_BYTES, ENCODE_RATE
from dynaexq.types import MemoryPlan


@dataclass(frozen=True)
class Card:
    """A device whose memory is to be planned.

    A card sold as 24 GB is `Card("24 GB", 25_757_220_864)`; RAM is `Card("RAM", nbytes, driver=0, is_cpu=True)`; a
    budget such as `patch` takes is `Card("hbm_budget", nbytes, driver=0, weights_only=True)`.

    Attributes:
        nbytes: its memory.
        driver: bytes that driver and context take.
        is_cpu: whether upgrades wait in the same memory.
        weights_only: whether cache, activations and reserve lie elsewhere.
        bandwidth: bytes per second that it reads, where that was measured.
    """

    name: str
    nbytes: int
    driver: int = DRIVER_BYTES
    is_cpu: bool = False
    weights_only: bool = False
    bandwidth: float | None = None

    def holds_upgrades(self, spec: ModelSpec) -> bool:
        """Whether upgrades of a model wait here."""
        return self.is_cpu and spec.waits_in_ram()


@dataclass(frozen=True)
class TierEstimate:
    """One pair of tiers on one card.

    Attributes:
        loss: predicted KL from the 16-bit model; only its order means anything for another model than it was
            measured on.
        is_auto: whether it is what `patch` would take.
        waiting: bytes of all upgrades where they wait for their turn.
        waits_in: `"ram"`, `"disk"` (a temporary file), `"checkpoint"` (where the very bytes are), or None.
        start_packed: seconds to read base and dense weights of a packed checkpoint.
        start_reading: seconds to read a 16-bit checkpoint; None where the source is packed.
        start_quantizing: seconds of one CPU core to quantize it; None where the source is packed.
        read: bytes of weights that one token reads with none of its experts upgraded, and with all; see
            `ModelSpec.read_by_token`.
    """

    plan: MemoryPlan
    loss: float
    is_auto: bool
    waiting: int
    waits_in: str | None
    start_packed: float
    start_reading: float | None
    start_quantizing: float | None
    read: tuple[int, int] | None = None

    @property
    def hot_per_layer(self) -> float:
        """Upgraded experts per layer, on average."""
        return self.plan.num_slots / self.plan.num_layers


@dataclass(frozen=True)
class CardEstimate:
    """One card: where its bytes go before the weights come, and the tiers that fit then, the best first.

    Attributes:
        waiting: of the upgrades that wait in the same memory.
        budget: bytes left for weights: what `hbm_budget="auto"` takes there; not positive where the context
            alone does not fit.
    """

    card: Card
    reserve: int
    cache: int
    activations: int
    waiting: int
    budget: int
    estimates: tuple[TierEstimate, ...]

    @property
    def auto(self) -> TierEstimate | None:
        """What `patch` would take, if that fits."""
        return next((estimate for estimate in self.estimates if estimate.is_auto), None)


@dataclass(frozen=True)
class Remedy:
    """Options under which a model fits where it did not.

    Attributes:
        changes: options and their new values, such as `{"dense": "bnb-4bit"}`.
    """

    changes: dict[str, object]
    found: CardEstimate


def estimate_card(spec: ModelSpec, card: Card, host_ram: int | None = None) -> CardEstimate:
    """What fits on `card` beside `host_ram` bytes of host memory, None for any amount."""
    estimates = tuple(_estimates(spec, card, host_ram))
    if card.weights_only:
        return CardEstimate(card, 0, 0, 0, 0, card.nbytes, estimates)
    chosen = next((estimate for estimate in estimates if estimate.is_auto), None)
    waiting = chosen.waiting if chosen and card.holds_upgrades(spec) else 0
    available = card.nbytes - card.driver - waiting
    budget = weights_budget(available, spec.context)
    reserve = available - budget - spec.context
    return CardEstimate(card, reserve, spec.cache, spec.activations, waiting, budget, estimates)


def find_remedies(
    specs: Callable[[dict[str, object]], ModelSpec], trials: Iterable[dict[str, object]], card: Card
) -> Iterator[Remedy]:
    """Of `trials`, those under which the model fits on `card`, in their order.

    Args:
        specs: the spec under changed options.
    """
    for changes in trials:
        found = estimate_card(specs(changes), card)
        if found.auto is not None:
            yield Remedy(changes, found)


def least_card(
    spec: ModelSpec, pairs: Iterable[TierPair] | None = None, driver: int = DRIVER_BYTES, holds_upgrades: bool = False
) -> tuple[int, str]:
    """Bytes of the least card that the model fits on, and the precision that all experts have there.

    Args:
        pairs: the tiers to choose from, all if left out.
        driver, holds_upgrades: of the card.
    """
    return min(
        (
            driver
            + least_available(spec.weights(pair[0]), spec.context)
            + (spec.waiting(pair) if holds_upgrades else 0),
            pair[0].precision,
        )
        for pair in pairs or spec.offered
    )


def _estimates(spec: ModelSpec, card: Card, host_ram: int | None) -> Iterator[TierEstimate]:
    def fitting(pairs: Iterable[TierPair]) -> list[MemoryPlan]:
        if card.weights_only:
            return fitting_plans(spec, dict.fromkeys(pairs, card.nbytes))
        return fitting_plans(spec, budgets_within(spec, pairs, card.nbytes - card.driver, card.holds_upgrades(spec)))

    chosen = next((plan.tiers for plan in fitting(spec.choices)), None)
    for plan in fitting(spec.offered):
        waiting = spec.waiting((plan.base, plan.upgrade))
        reading = (spec.experts + spec.dense) / DISK_RATE
        quantizing = 0.0 if plan.tiers == ("fp16",) else spec.num_weights / ENCODE_RATE[spec.quantizer]
        yield TierEstimate(
            plan,
            loss_of(plan),
            plan.tiers == chosen,
            waiting,
            _waits_in(spec, plan, waiting, host_ram),
            start_packed=(plan.dense + plan.base_bytes) / DISK_RATE,
            start_reading=None if spec.packed else reading,
            start_quantizing=None if spec.packed else quantizing,
            read=spec.read_by_token(plan),
        )


def _waits_in(spec: ModelSpec, plan: MemoryPlan, waiting: int, host_ram: int | None) -> str | None:
    """Where `host_copy="auto"` lets upgrades wait, or `"disk"` where the RAM has not room for them."""
    if plan.upgrade is None:
        return None
    if spec.packed or plan.upgrade.precision == "fp16":
        return "checkpoint"
    return "ram" if host_ram is None or waiting <= host_ram else "disk"
