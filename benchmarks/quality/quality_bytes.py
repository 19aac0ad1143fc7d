"""Equal bytes: a mix of precisions against the best that one precision for all experts makes of the same bytes."""

import copy
from dataclasses import dataclass
from typing import Any

from streams import WEIGHTS_ALONE, Hotness, Stream
from tqdm import tqdm

import dynaexq

BITS_A_WEIGHT = (2.75, 3.0, 3.25, 3.5, 4.5, 5.0)
UNIFORM = [(tier, group) for tier in ("int2", "int3", "int4") for group in (128, 64, 32)] + [("int8", 64)]
MIXES = (
    ("int2", "int3"),
    ("int2", "int4"),
    ("int2", "int8"),
    ("int3", "int4"),
    ("int4", "int6"),
    ("int4", "int8"),
    ("int4", "fp16"),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Assignment:
    """Some way to spend bytes on the experts, and what it costs in KL."""

    name: str
    bits: float
    kl: float
    tiers: tuple[str, ...] | None = None


def uniform(stream: Stream, tier: str, group_size: int) -> Assignment:
    """Every expert at one precision."""
    model, runtime = stream.patched(0.0, tiers=(tier,), group_size=group_size)
    outcome = stream.send(model, runtime)
    return Assignment(f"{tier} g{group_size}", bits_a_weight(runtime, outcome.nbytes), outcome.mean_kl, (tier,))


def mix(
    stream: Stream, tiers: tuple[str, str], bits: float, hotness: Hotness, oracle: bool = False, **options: Any
) -> Assignment | None:
    """Hot experts upgraded while the stream runs, as many as `bits` a weight allow; None where the base is larger.

    Args:
        oracle: the best set for each phase's traffic instead, put in place before it begins.
        options: of dynaexq, such as `group_size` and `calibration`.
    """
    model, runtime = stream.patched(0.0, tiers=tiers, **options)
    base = bits_a_weight(runtime, runtime.memory()["base"])
    upgrade = runtime.plan.upgrade.nbytes * 8 / runtime.devices[0].codec.shape.num_weights
    share = min(1.0, (bits - base) / upgrade)
    if share <= 0:
        return None
    model, runtime = stream.patched(share, tiers=tiers, **options)
    runtime.warm_start(hotness.calibrated)
    if oracle:
        runtime.freeze()
    outcome = stream.send(
        model, runtime, lambda index: runtime.warm_start(hotness.foreseen[index]) if oracle else None
    )
    name = f"{tiers[0]} + {share:.0%} {tiers[1]}"
    return Assignment(name, bits_a_weight(runtime, outcome.nbytes), outcome.mean_kl, tiers)


def bits_a_weight(runtime: dynaexq.Runtime, nbytes: int) -> float:
    """Bits that each weight of the experts takes where all of them take `nbytes`."""
    plan = runtime.plan
    return nbytes * 8 / (plan.num_layers * plan.num_experts * runtime.devices[0].codec.shape.num_weights)


def chosen_by_auto(stream: Stream, bits: float) -> tuple[str, ...]:
    """The pair that `tiers="auto"` takes for that many bits per weight of experts."""
    model = copy.deepcopy(stream.model)
    config = dynaexq.DynaExqConfig(quantizer="rtn", **WEIGHTS_ALONE)
    with dynaexq.patch(model, "1TiB", tiers=("int2",), config=config) as runtime:
        memory, plan = runtime.memory(), runtime.plan
        experts = plan.num_layers * plan.num_experts * runtime.devices[0].codec.shape.num_weights
    budget = memory["total"] - memory["base"] + int(experts * bits / 8)
    model = copy.deepcopy(stream.model)
    with dynaexq.patch(model, budget, config=dynaexq.DynaExqConfig(quantizer="rtn", **WEIGHTS_ALONE)) as runtime:
        return runtime.plan.tiers


def equal_bytes(stream: Stream, hotness: Hotness) -> tuple[list[Row], list[Assignment]]:
    """One row for each of `BITS_A_WEIGHT`, and everything that was uniform."""
    uniforms = [uniform(stream, tier, group) for tier, group in tqdm(UNIFORM, desc="uniform", unit="precision")]
    rows = []
    for bits in tqdm(BITS_A_WEIGHT, desc="equal bytes", unit="budget"):
        fitting = [assignment for assignment in uniforms if assignment.bits <= bits + 1e-6]
        mixes = [found for tiers in MIXES if (found := mix(stream, tiers, bits, hotness)) is not None]
        offered = mixes + [assignment for assignment in fitting if assignment.tiers and "g64" in assignment.name]
        best_uniform, best_mix, best = (min(group, key=lambda a: a.kl) for group in (fitting, mixes, offered))
        assert best_mix.tiers is not None, "a mix is a pair"
        foreseen = mix(stream, best_mix.tiers, bits, hotness, oracle=True)
        rows.append(
            {
                "bits per weight": bits,
                "best uniform": best_uniform.name,
                "its KL": best_uniform.kl,
                "best mix": best_mix.name,
                "KL of the mix": best_mix.kl,
                "ratio": best_mix.kl / best_uniform.kl,
                "of an oracle": foreseen.kl / best_uniform.kl,
                "winner": min(best_uniform, best_mix, key=lambda a: a.kl).name,
                "best that is offered": " + ".join(best.tiers or ()),
                "tiers='auto' takes": " + ".join(chosen_by_auto(stream, bits)),
                "mixes": {a.name: a.kl for a in mixes},
            }
        )
    return rows, uniforms
