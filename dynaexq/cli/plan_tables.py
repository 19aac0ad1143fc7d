"""What `dynaexq plan` found, as tables of 80 columns for people and as JSON for programs. It decides nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from dynaexq.planning.budget import RESERVED_SHARE, ModelSpec
from dynaexq.planning.estimate import Card, CardEstimate, Remedy, TierEstimate, least_card
from dynaexq.planning.hardware import DISK_RATE, DRIVER_BYTES, ENCODE_RATE
from dynaexq.views.tables import print_table
from dynaexq.views.words import size

WIDTH = 80
INDEX_TOLERANCE = 0.01  # of the weights; beyond it, the index and the configuration count different things


def show(spec: ModelSpec, estimates: Sequence[CardEstimate], source: str, options: Mapping[str, Any]) -> None:
    """Print what was found for one card, or for each of several; `source` and `options` are for the call to paste."""
    if len(estimates) == 1:
        show_card(spec, estimates[0], source, options)
    else:
        show_cards(spec, estimates)


def show_card(spec: ModelSpec, found: CardEstimate, source: str, options: Mapping[str, Any]) -> None:
    """Print all tiers that fit on one card, and the call that takes the best.

    Args:
        source: where the model is, for the call to paste.
        options: those that are not defaults, for the call to paste.
    """
    columns = ("", "tiers", "hot/layer", "share", "base", "upgr.", "total", "loss", "upgrades wait")
    table = _table(columns, names=("", "tiers"))
    for estimate in found.estimates:
        plan, mark = estimate.plan, "*" if estimate.is_auto else ""
        parts = map(gib, (plan.base_bytes, plan.upgrade_bytes, plan.total))
        table.add_row(mark, *_tiers(estimate), *parts, f"{estimate.loss:.4f}", _waiting(estimate))
    less = (
        f"{size(found.card.nbytes)} less driver {size(found.card.driver)}, reserve {size(found.reserve)}, "
        f"KV cache {size(found.cache)}, activations {size(found.activations)}"
        f"{f', upgrades that wait {size(found.waiting)}' if found.waiting else ''}: "
    )
    taken = (
        f"{'' if found.card.weights_only else less}hbm_budget {size(found.budget)}, "
        f"with dense weights {size(spec.dense)}, workspace {size(spec.workspace)}"
    )
    notes = ["* what patch takes", *_notes(spec, [found])]
    if found.auto is not None:
        notes[1:1] = [_start(spec, found.auto), *_speed(found.card, found.auto)]
    console = _console()
    _show(console, spec, taken, table, notes)
    if found.auto is not None:
        console.print("\n".join(["", *calls(found.auto, source, options)]), style="bold", markup=False, soft_wrap=True)


def show_cards(spec: ModelSpec, estimates: Iterable[CardEstimate]) -> None:
    """Print what `patch` takes on each of several cards."""
    estimates = list(estimates)
    columns = ("card", "hbm_budget", "tiers", "hot/layer", "share", "total", "loss", "upgrades wait")
    table = _table(columns, ("tiers",))
    for found in estimates:
        estimate, budget = found.auto, gib(max(found.budget, 0))
        if estimate is None:
            table.add_row(found.card.name, budget, "nothing fits", style="dim")
            continue
        figures = gib(estimate.plan.total), f"{estimate.loss:.4f}"
        table.add_row(found.card.name, budget, *_tiers(estimate), *figures, _waiting(estimate))
    least, base = least_card(spec, spec.choices)
    taken = (
        f"less driver {size(DRIVER_BYTES)}, reserve {RESERVED_SHARE:.0%}, KV cache {size(spec.cache)}, "
        f"activations {size(spec.activations)}; dense weights {size(spec.dense)}, workspace "
        f"{size(spec.workspace)}"
    )
    smallest = f"The least card, with all experts at {base}, has {size(least)}."
    _show(_console(), spec, taken, table, [smallest, *_notes(spec, estimates)])


def no_fit(
    spec: ModelSpec, found: CardEstimate, remedies: Sequence[Remedy], source: str, options: Mapping[str, Any]
) -> str:
    """Why nothing fits on a card, and what would, each with the call to paste; `source` and `options` as above."""
    lines = [_too_small(spec, found)]
    if not remedies:
        lines.append("No other tiers, group size, dense= or context makes it fit.")
    for remedy in remedies:
        changes = ", ".join(f"{name}={value!r}" for name, value in remedy.changes.items())
        assert remedy.found.auto is not None, "a remedy is a fit"
        lines += [f"It fits with {changes}:", *calls(remedy.found.auto, source, {**options, **remedy.changes})]
    return "\n".join(lines)


def calls(estimate: TierEstimate, source: str, options: Mapping[str, Any]) -> list[str]:
    """The two calls that take an estimate: on a loaded model, and from a checkpoint."""
    chosen = {"hbm_budget": _size_to_paste(estimate), "tiers": estimate.plan.tiers}
    named = chosen | {name: value for name, value in options.items() if name not in chosen}
    common = {name: value for name, value in named.items() if name in ("hbm_budget", "tiers", "device", "dense")}
    others = {name: value for name, value in named.items() if name not in common}
    config = f", config=dynaexq.DynaExqConfig({_arguments(others)})" if others else ""
    loading = f"quantization_config=dynaexq.DynaExqConfig({_arguments(named)})"
    return [
        f"dynaexq.patch(model, {_arguments(common)}{config})",
        f'AutoModelForCausalLM.from_pretrained("{source}", {loading})',
    ]


def figures(spec: ModelSpec, estimates: Iterable[CardEstimate]) -> dict[str, Any]:
    """Everything in the tables, in bytes and seconds and not rounded, for JSON."""
    model = {key: figure for key, figure in asdict(spec).items() if key not in ("choices", "offered")}
    return {
        "model": model | {"least_card": least_card(spec)[0]},
        "rates": {"disk": DISK_RATE, "weights_quantized_per_core": ENCODE_RATE[spec.quantizer]},
        "cards": {
            found.card.name: asdict(found) | {"estimates": list(map(_record, found.estimates))} for found in estimates
        },
    }


def gib(nbytes: int) -> str:
    """Bytes in GiB, to a tenth, or to two digits where that would show nothing."""
    amount = nbytes / 2**30
    return f"{amount:.1f}" if amount >= 0.95 or not nbytes else f"{amount:.2g}"


def duration(seconds: float) -> str:
    """Seconds, or minutes from two of them on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _too_small(spec: ModelSpec, found: CardEstimate) -> str:
    card = found.card
    if card.weights_only:
        least, base = spec.least()
        taken = f"{card.name} of {card.nbytes:,} bytes is too small for {spec.name}: dense weights take {spec.dense:,}"
    else:
        least, base = least_card(spec, spec.choices, card.driver, card.holds_upgrades(spec))
        taken = (
            f"{card.name} with {card.nbytes:,} bytes is too small for {spec.name}: {card.driver:,} for the driver, "
            f"{max(found.reserve, 0):,} of reserve ({RESERVED_SHARE:.0%}), {found.cache:,} of cache and "
            f"{found.activations:,} of activations leave {max(found.budget, 0):,} for weights"
        )
    waits = card.holds_upgrades(spec) and all(upgrade for _, upgrade in spec.choices)
    beside = ", and with the upgrades that wait there," if waits else ""
    return f"{taken}; with all experts at {base}{beside} it takes at least {least:,} ({size(least)})"


def _arguments(options: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, tuple):
            return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
        return f'"{value}"' if isinstance(value, str) else repr(value)

    return ", ".join(f"{name}={shown(value)}" for name, value in options.items())


def _size_to_paste(estimate: TierEstimate) -> int | str:
    """The budget to the tenth of a GiB below, or in bytes where so little would not do."""
    budget, plan = estimate.plan.budget, estimate.plan
    tenths = budget * 10 // 2**30
    enough = tenths * 2**30 // 10 >= plan.total - plan.upgrade_bytes
    return f"{tenths / 10:.1f}GiB" if enough and tenths >= 10 else budget


def _table(columns: tuple[str, ...], names: tuple[str, ...]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in names else "right", no_wrap=True)
    return table


def _tiers(estimate: TierEstimate) -> tuple[str, str, str]:
    """Tiers, upgraded experts per layer, their share."""
    plan = estimate.plan
    if plan.upgrade is None:
        return plan.base.precision, "", ""
    return " + ".join(plan.tiers), f"{estimate.hot_per_layer:.1f}/{plan.num_experts}", f"{plan.share_upgraded:.0%}"


def _waiting(estimate: TierEstimate) -> str:
    return f"{gib(estimate.waiting)} {estimate.waits_in}" if estimate.waits_in else ""


def _start(spec: ModelSpec, estimate: TierEstimate) -> str:
    start = f"  starts in {duration(estimate.start_packed)} from a packed checkpoint"
    if estimate.start_reading is not None and estimate.start_quantizing is not None:
        start += f", {duration(estimate.start_reading + estimate.start_quantizing)} from 16 bit"
    rate = f", one CPU core at {ENCODE_RATE[spec.quantizer] / 1e6:.0f} million weights per second"
    return f"{start} (a disk of {DISK_RATE / 1e9:.0f} GB/s assumed{'' if spec.packed else rate})"


def _speed(card: Card, estimate: TierEstimate) -> list[str]:
    """What the memory allows at best, as a sentence of its own; none where it is not known what a token reads."""
    if estimate.read is None:
        return []
    least, most = estimate.read
    reads = f"  one token reads {least / 1e9:.2f} GB of weights"
    if most > least:
        reads += f", {most / 1e9:.2f} with all its experts upgraded"
    rate, where = 1e12, "for each TB/s of the memory"
    if card.bandwidth is not None:
        rate, where = card.bandwidth, f"at the {card.bandwidth / 1e9:.0f} GB/s measured here"
    rates = " to ".join(dict.fromkeys(f"{rate / nbytes:.0f}" for nbytes in (most, least)))
    return [f"{reads}: at most {rates} tokens/s {where}"]


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH  # a file or a pipe has no width of its own
    return console


def _show(console: Console, spec: ModelSpec, taken: str, table: Table, notes: list[str]) -> None:
    experts, whole = size(spec.experts), size(spec.experts + spec.dense)
    headline = f"{spec.name}: {spec.num_layers} layers of {spec.num_experts} experts, {experts} of {whole}"
    console.print(f"{headline} in {spec.dtype}", style="bold", markup=False)
    console.print(taken)
    print_table(console, table)
    for note in notes:
        console.print(note, style="dim")


def _notes(spec: ModelSpec, estimates: Iterable[CardEstimate]) -> list[str]:
    waits_in = {estimate.waits_in for found in estimates for estimate in found.estimates}
    whole = spec.experts + spec.dense
    notes = ["Bytes in GiB. Loss was measured on the embedded model: only its order counts here."]
    if "disk" in waits_in:
        notes.append('Upgrades that wait on disk are more than --host-ram: set host_copy="disk".')
    if not spec.packed and spec.index is not None and abs(spec.index - whole) > INDEX_TOLERANCE * whole:
        notes.append(f"The index counts {size(spec.index)} of weights, the configuration {size(whole)}.")
    return notes


def _record(estimate: TierEstimate) -> dict[str, Any]:
    plan = estimate.plan
    return {
        "tiers": plan.tiers,
        "hot_per_layer": estimate.hot_per_layer,
        "share_upgraded": plan.share_upgraded,
        "slots": plan.num_slots,
        "base_bytes": plan.base_bytes,
        "upgrade_bytes": plan.upgrade_bytes,
        "weights": plan.total,
    } | {key: figure for key, figure in asdict(estimate).items() if key != "plan"}
