"""`dynaexq plan`: inspect a model, estimate cards, search for a fit where there is none, and show what was found."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from dynaexq.cli.plan_tables import no_fit
from dynaexq.errors import BudgetError, SettingsError
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.free_memory import free_bytes
from dynaexq.hf.model_size import InspectedCheckpoint
from dynaexq.hf.planning import resolve_device
from dynaexq.memory.device_memory import measure_bandwidth
from dynaexq.planning.budget import DENSE_LOSS, ModelSpec, least_loss
from dynaexq.planning.estimate import Card, CardEstimate, estimate_card, find_remedies
from dynaexq.planning.hardware import CARDS
from dynaexq.settings import parse_bytes

REMEDIES_SHOWN = 2
SHORTEST_CONTEXT = 1024  # tokens
ROOM_TO_MEASURE = 2**30  # bytes; the memory's speed is measured with a quarter of them


class Planned(NamedTuple):
    """What was found for each card, and the options that it holds for, `dense="auto"` being decided."""

    spec: ModelSpec
    estimates: list[CardEstimate]
    options: dict[str, Any]


def run(
    source: Path,
    gpu: str | None,
    hbm_budget: str | None,
    options: dict[str, Any],
    context: int,
    batch: int,
    host_ram: str | None,
) -> Planned:
    """Plan for one card if a budget, `gpu` or a device is named, for this machine's card and the common ones else.

    Raises:
        BudgetError: nothing fits on the one card; names what would.
        SettingsError: a size or an option that cannot be, or two sizes.
    """
    transformers.logging.set_verbosity_error()  # which kernels a forward would use is of no interest here
    room = None if host_ram is None else parse_bytes(host_ram, "--host-ram")
    sizes = {"max_context": context, "max_batch": batch}
    checkpoint = InspectedCheckpoint(source)

    def spec(changes: dict[str, Any]) -> ModelSpec:
        return checkpoint.spec(DynaExqConfig(**{**sizes, **options, **changes}))

    cards = _cards(gpu, hbm_budget, options.get("device"))
    if options.get("dense") == "auto":
        options = options | {"dense": _chosen_dense(spec, cards, room)}
    asked = spec({})
    estimates = [estimate_card(asked, card, room) for card in cards]
    if len(cards) == 1 and estimates[0].auto is None:
        trials = _trials(options, context, batch)
        remedies = list(islice(find_remedies(spec, trials, cards[0]), REMEDIES_SHOWN))
        least, _ = asked.least()
        raise BudgetError(no_fit(asked, estimates[0], remedies, str(source), options), cards[0].nbytes, least)
    return Planned(asked, estimates, options)


def _chosen_dense(spec: Callable[[dict[str, Any]], ModelSpec], cards: Sequence[Card], room: int | None) -> str | None:
    """What `dense="auto"` takes on the one card; what packs the most where nothing fits."""
    if len(cards) > 1:
        raise SettingsError("--dense auto is chosen for one card; name it with --gpu, --hbm-budget or --device")
    found = {dense: estimate_card(spec({"dense": dense}), cards[0], room).auto for dense in DENSE_LOSS}
    plans = {dense: estimate.plan for dense, estimate in found.items() if estimate is not None}
    return least_loss(plans) if plans else "int4"


def _cards(gpu: str | None, hbm_budget: str | None, device: str | None) -> list[Card]:
    """What was named, this machine's memory, or this machine's card before the common ones."""
    if gpu is not None and hbm_budget is not None:
        raise SettingsError("--gpu is the memory of a card and --hbm-budget what of it weights may take; give one")
    if hbm_budget is not None:
        return [Card("hbm_budget", parse_bytes(hbm_budget, "--hbm-budget"), driver=0, weights_only=True)]
    if gpu is not None:
        return [Card(gpu, parse_bytes(gpu, "--gpu"))]
    if device is not None:
        return [_here(resolve_device(DynaExqConfig(device=device).settings()))]
    here = [_here(torch.device("cuda"))] if torch.cuda.is_available() else []
    return here + [Card(name, nbytes) for name, nbytes in CARDS.items()]


def _here(device: torch.device) -> Card:
    """The memory of this machine that is free now."""
    name, is_cpu = ("RAM", True) if device.type == "cpu" else ("here", False)
    free = free_bytes(device)
    bandwidth = measure_bandwidth(device) if free >= ROOM_TO_MEASURE else None
    return Card(name, free, driver=0, is_cpu=is_cpu, bandwidth=bandwidth)


def _trials(options: dict[str, Any], context: int, batch: int) -> list[dict[str, Any]]:
    """Changed options to try where nothing fits, what costs least first, and at last all of them together."""
    tiers: list[dict[str, Any]] = [{"tiers": "auto"}] if "tiers" in options else []
    groups: list[dict[str, Any]] = [{"group_size": 128}] if options.get("group_size", 64) < 128 else []
    dense: list[dict[str, Any]] = [] if "dense" in options else [{"dense": "int8"}, {"dense": "int4"}]
    alone = {"max_batch": 1} if batch > 1 else {}
    shorter: list[dict[str, Any]] = [alone] if alone else []
    while context > SHORTEST_CONTEXT:
        context = max(SHORTEST_CONTEXT, context // 2)
        shorter.append({"max_context": context, **alone})
    kinds = [kind for kind in (tiers, groups, dense, shorter) if kind]
    together = {name: value for kind in kinds for name, value in kind[-1].items()}
    return [trial for kind in kinds for trial in kind] + [together]
