"""What of a model fits a card, and at what price: arithmetic on its sizes. It knows no model and touches no device."""

from collections.abc import Iterator
from dataclasses import dataclass

from dynaexq.errors import BudgetError
from dynaexq.planning.budget import RESERVED_SHARE, fitting_plans, least_available, loss_of, weights_budget
from dynaexq.planning.hardware import DISK_RATE, DRIVER_BYTES, ENCODE_RATE
from dynaexq.types import MemoryPlan, Tier

Ladder = tuple[Tier, Tier | None]


@dataclass(frozen=True)
class ModelSize:
    """What planning knows of a model. All figures are bytes unless the name says otherwise.

    Attributes:
        experts, num_weights: all experts in the model's own dtype, and how many weights they are.
        dense: all weights and buffers that are not experts.
        workspace: tables and counters on the device.
        cache, activations: what the context takes.
        ladders: those that the experts can be had at.
        eligible: those that `tiers="auto"` chooses from.
        packed: whether the checkpoint is packed, and its experts need no quantising.
        index: what the checkpoint's index says all weights take; None without an index.
    """

    name: str
    dtype: str
    num_layers: int
    num_experts: int
    experts: int
    num_weights: int
    dense: int
    workspace: int
    cache: int
    activations: int
    ladders: tuple[Ladder, ...]
    eligible: tuple[Ladder, ...]
    quantizer: str
    packed: bool
    index: int | None = None

    @property
    def context(self) -> int:
        return self.cache + self.activations


@dataclass(frozen=True)
class TierEstimate:
    """One ladder on one card.

    Attributes:
        loss: predicted KL from the 16-bit model; only its order means anything for another model than it was
            measured on.
        is_auto: whether `tiers="auto"` takes this ladder.
        waiting: bytes of all upgrades where they wait for their turn.
        waits_in: `"ram"`, `"disk"` (a temporary file), `"checkpoint"` (where the very bytes are), or None.
        start_packed: seconds to read base and dense weights of a packed checkpoint.
        start_reading: seconds to read a 16-bit checkpoint; None where the source is packed.
        start_quantizing: seconds of one CPU core to quantise it; None likewise.
    """

    plan: MemoryPlan
    loss: float
    is_auto: bool
    waiting: int
    waits_in: str | None
    start_packed: float
    start_reading: float | None
    start_quantizing: float | None

    @property
    def hot_per_layer(self) -> float:
        """Upgraded experts of a layer, on average."""
        return self.plan.num_slots / self.plan.num_layers


@dataclass(frozen=True)
class CardEstimate:
    """One card: where its bytes go before the weights come, and the ladders that fit then, the best first.

    Attributes:
        budget: bytes left for weights: what `hbm_budget="auto"` takes there; not positive where the context
            alone does not fit.
    """

    card: int
    driver: int
    reserve: int
    cache: int
    activations: int
    budget: int
    estimates: tuple[TierEstimate, ...]

    @property
    def auto(self) -> TierEstimate | None:
        """What `tiers="auto"` takes, if that fits."""
        return next((estimate for estimate in self.estimates if estimate.is_auto), None)


def estimate_card(size: ModelSize, card: int, host_ram: int | None = None) -> CardEstimate:
    """What fits on a card of `card` bytes beside `host_ram` bytes of host memory, None for any amount."""
    available = card - DRIVER_BYTES
    budget = weights_budget(available, size.context)
    reserve = available - budget - size.context
    estimates = tuple(_forecasts(size, budget, host_ram))
    return CardEstimate(card, DRIVER_BYTES, reserve, size.cache, size.activations, budget, estimates)


def require_fit(size: ModelSize, found: CardEstimate) -> None:
    """Raise a BudgetError that names the least card, if nothing fits on the one in `found`."""
    if found.estimates:
        return
    least, base = least_card(size)
    raise BudgetError(
        f"a GPU of {found.card:,} bytes is too small for {size.name}: {found.driver:,} for the driver, "
        f"{max(found.reserve, 0):,} of reserve ({RESERVED_SHARE:.0%}), {found.cache:,} of cache and "
        f"{found.activations:,} of activations leave {max(found.budget, 0):,} for weights; with all experts at {base} "
        f"it takes a GPU of at least {least:,}, or less with a shorter context",
        found.card,
        least,
    )


def least_card(size: ModelSize) -> tuple[int, str]:
    """Bytes of the least card that the model fits on, and the precision that all experts have there."""
    base = min((base for base, _ in size.ladders), key=lambda base: base.nbytes)
    weights = size.dense + size.workspace + size.num_layers * size.num_experts * base.nbytes
    return DRIVER_BYTES + least_available(weights, size.context), base.precision


def _forecasts(size: ModelSize, budget: int, host_ram: int | None) -> Iterator[TierEstimate]:
    sizes = (size.num_layers, size.num_experts, size.dense, size.workspace, budget)
    chosen = next((plan.tiers for plan in fitting_plans(size.eligible, *sizes)), None)
    for plan in fitting_plans(size.ladders, *sizes):
        waiting = plan.num_layers * plan.num_experts * plan.upgrade.nbytes if plan.upgrade else 0
        reading = (size.experts + size.dense) / DISK_RATE
        quantizing = 0.0 if plan.tiers == ("fp16",) else size.num_weights / ENCODE_RATE[size.quantizer]
        yield TierEstimate(
            plan,
            loss_of(plan),
            plan.tiers == chosen,
            waiting,
            _waits_in(size, plan, waiting, host_ram),
            start_packed=(plan.dense + plan.base_bytes) / DISK_RATE,
            start_reading=None if size.packed else reading,
            start_quantizing=None if size.packed else quantizing,
        )


def _waits_in(size: ModelSize, plan: MemoryPlan, waiting: int, host_ram: int | None) -> str | None:
    """Where `host_copy="auto"` lets upgrades wait, or `"disk"` where the RAM has not room for them."""
    if plan.upgrade is None:
        return None
    if size.packed or plan.upgrade.precision == "fp16":
        return "checkpoint"
    return "ram" if host_ram is None or waiting <= host_ram else "disk"
