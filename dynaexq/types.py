"""The small frozen records that pass between rooms. They carry facts and no behavior beyond arithmetic on them."""

from dataclasses import dataclass, replace

BITS = {"int2": 2, "int3": 3, "int4": 4, "int6": 6, "int8": 8, "fp16": 16}
"""Code bits of a weight at each precision. `fp16` stands for the model's own floating dtype, stored as it is."""

UPGRADES = {
    "int2": ("int3", "int4", "int8", "fp16"),
    "int3": ("int4", "fp16"),
    "int4": ("int6", "int8", "fp16"),
    "int6": ("fp16",),
    "int8": ("fp16",),
    "fp16": (),
}
"""What experts at each precision may be upgraded to."""

ALL_TIERS = (
    *((base,) for base in UPGRADES),
    *((base, upgrade) for base, upgrades in UPGRADES.items() for upgrade in upgrades),
)
"""All tiers that there are, the base first."""

MASS_UNIT = 2**20
"""Routing mass is counted in integers: this many units for a weight of one."""

LARGEST_MASS = 256
"""What a routing weight counts for at most, so that an absurd one cannot overflow a sum."""

KIND_MASK = 0xFF
"""The low bits of a table entry `address | kind`; addresses are multiples of 256."""

EPOCH, FOUND, FETCHED, SEEN, STEPS = range(5)
"""Places of five words in the memory that host and device share; see `memory.words`."""

WORDS_AHEAD = 8
"""Words before the table in that memory: the five, and room to the end of their cache line."""


def split_entry(entry: int) -> tuple[int, int]:
    """(address, kind) of an entry of the expert table; kind 0 means that there is no upgrade."""
    return entry & ~KIND_MASK, entry & KIND_MASK


@dataclass(frozen=True)
class ExpertShape:
    """One expert of a model: `hidden -> up_rows -> (gate) -> intermediate -> hidden`.

    Qwen3-30B-A3B, whose experts have a gate:

    >>> ExpertShape(2048, 768, up_rows=1536, has_bias=False, transposed=False).num_weights
    4718592

    Attributes:
        hidden_size: H, columns of the first matrix and rows of the second.
        intermediate_size: I, columns of the second matrix.
        up_rows: rows of the first matrix; 2 I with a gate, I without.
        has_bias: both matrices are followed by a bias, kept in the model's dtype.
        transposed: the source stores `[in, out]`; kept so at 16 bit, turned round when quantized.
    """

    hidden_size: int
    intermediate_size: int
    up_rows: int
    has_bias: bool
    transposed: bool

    @property
    def num_weights(self) -> int:
        """Weights of one expert, biases not counted."""
        return self.hidden_size * (self.up_rows + self.intermediate_size)


@dataclass(frozen=True)
class Tier:
    """One precision an expert may have, and the bytes of its block or slot.

    >>> Tier("int4", nbytes=2_654_208).bits
    4
    """

    precision: str
    nbytes: int

    @property
    def bits(self) -> int:
        return BITS[self.precision]


@dataclass(frozen=True)
class MemoryPlan:
    """How the device budget is spent. Bytes unless the name says otherwise.

    >>> base, upgrade = Tier("int4", 2_654_208), Tier("int8", 2_359_296)
    >>> plan = MemoryPlan(20_100_000_000, 3_000_000_000, 98_304, 48, 128, base, upgrade, num_slots=294)
    >>> plan.tiers, plan.base_bytes, plan.upgrade_bytes, plan.total
    (('int4', 'int8'), 16307453952, 693633024, 20001185280)

    Attributes:
        base: the precision every expert always has, and the bytes of its block.
        upgrade: what a hot expert holds besides, and the bytes of its slot; None for a single tier.
        num_slots: upgrade slots, at most one an expert.
    """

    budget: int
    dense: int
    workspace: int
    num_layers: int
    num_experts: int
    base: Tier
    upgrade: Tier | None
    num_slots: int

    def filled(self, budget: int) -> "MemoryPlan":
        """The same tiers in `budget` bytes, with as many slots as fit there; none where not even the rest fits."""
        if self.upgrade is None:
            return replace(self, budget=budget)
        left = max(0, budget - (self.total - self.upgrade_bytes)) // self.upgrade.nbytes
        return replace(self, budget=budget, num_slots=min(self.num_layers * self.num_experts, left))

    @property
    def base_bytes(self) -> int:
        return self.num_layers * self.num_experts * self.base.nbytes

    @property
    def upgrade_bytes(self) -> int:
        return self.num_slots * self.upgrade.nbytes if self.upgrade else 0

    @property
    def share_upgraded(self) -> float:
        """Upgrade slots per expert."""
        return self.num_slots / (self.num_layers * self.num_experts)

    @property
    def total(self) -> int:
        return self.dense + self.workspace + self.base_bytes + self.upgrade_bytes

    def __add__(self, other: "MemoryPlan") -> "MemoryPlan":
        """Both plans as one: the layers of one model on two devices, at the same tiers."""
        names = ("budget", "dense", "workspace", "num_layers", "num_slots")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers as `Settings.tiers` writes them, the base first."""
        return (self.base.precision,) + ((self.upgrade.precision,) if self.upgrade else ())


@dataclass(frozen=True)
class Transition:
    """One decided move: give an expert the upgrade, or take it away.

    `Transition(layer=3, expert=17, promote=True)` copies the upgrade of expert 17 of layer 3 into a slot.
    """

    layer: int
    expert: int
    promote: bool
