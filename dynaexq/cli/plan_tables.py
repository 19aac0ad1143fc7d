"""What `dynaexq plan` found, as tables for people and as JSON for programs. It decides nothing."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dynaexq.planning.budget import RESERVED_SHARE
from dynaexq.planning.estimate import CardEstimate, ModelSize, TierEstimate, least_card
from dynaexq.planning.hardware import DISK_RATE, DRIVER_BYTES, ENCODE_RATE
from dynaexq.types import MemoryPlan

INDEX_TOLERANCE = 0.01  # of the weights; beyond it, the index and the configuration count different things
PRICE = ("upgrades wait", "start: packed", "16 bit")


def show_card(size: ModelSize, found: CardEstimate) -> None:
    """Print all ladders that fit on one card."""
    columns = ("", "ladder", "hot a layer", "share", "base", "upgrade", "weights", "loss", *PRICE)
    table = _table(columns, names=("", "ladder"))
    for estimate in found.estimates:
        plan, mark = estimate.plan, "*" if estimate.is_auto else ""
        parts = map(gib, (plan.base_bytes, plan.upgrade_bytes, plan.total))
        table.add_row(mark, *_ladder(estimate), *parts, f"{estimate.loss:.4f}", *_price(estimate))
    taken = (
        f"{amount(found.card)} less driver {amount(found.driver)}, reserve {amount(found.reserve)}, KV cache "
        f"{amount(found.cache)}, activations {amount(found.activations)}: hbm_budget {amount(found.budget)}, with "
        f"dense weights {amount(size.dense)}, workspace {amount(size.workspace)}"
    )
    _show(size, taken, table, ['* what tiers="auto" takes', *_notes(size, [found])])


def show_cards(size: ModelSize, estimates: Mapping[str, CardEstimate]) -> None:
    """Print what `tiers="auto"` takes on each of several cards."""
    table = _table(("card", "hbm_budget", "ladder", "hot a layer", "share", "weights", "loss", *PRICE), ("ladder",))
    for name, found in estimates.items():
        estimate, budget = found.auto, gib(max(found.budget, 0))
        if estimate is None:
            table.add_row(name, budget, "nothing fits", style="dim")
            continue
        figures = gib(estimate.plan.total), f"{estimate.loss:.4f}"
        table.add_row(name, budget, *_ladder(estimate), *figures, *_price(estimate))
    least, base = least_card(size)
    taken = (
        f"less driver {amount(DRIVER_BYTES)}, reserve {RESERVED_SHARE:.0%}, KV cache {amount(size.cache)}, "
        f"activations {amount(size.activations)}; dense weights {amount(size.dense)}, workspace "
        f"{amount(size.workspace)}"
    )
    smallest = f"The least card, with all experts at {base}, has {amount(least)}."
    _show(size, taken, table, [smallest, *_notes(size, estimates.values())])


def write_json(size: ModelSize, estimates: Mapping[str, CardEstimate], target: str) -> None:
    """Everything in the tables, in bytes and seconds and not rounded, to a file, or to the standard output for `-`."""
    model = {key: figure for key, figure in asdict(size).items() if key not in ("ladders", "eligible")}
    record = {
        "model": model | {"least_card": least_card(size)[0]},
        "rates": {"disk": DISK_RATE, "weights_quantized_per_core": ENCODE_RATE[size.quantizer]},
        "cards": {
            name: asdict(found) | {"estimates": list(map(_record, found.estimates))}
            for name, found in estimates.items()
        },
    }
    text = json.dumps(record, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text)


def amount(nbytes: int) -> str:
    """Bytes in the largest unit that they fill."""
    power = max(0, min(3, (nbytes.bit_length() - 1) // 10))
    return f"{nbytes / 1024**power:.{0 if power < 3 else 1}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def gib(nbytes: int) -> str:
    """Bytes in GiB, to a tenth, or to two digits where that would show nothing."""
    size = nbytes / 2**30
    return f"{size:.1f}" if size >= 0.95 or not nbytes else f"{size:.2g}"


def duration(seconds: float) -> str:
    """Seconds, or minutes from two of them on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _table(columns: tuple[str, ...], names: tuple[str, ...]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in names else "right", no_wrap=True)
    return table


def _ladder(estimate: TierEstimate) -> tuple[str, str, str]:
    """Ladder, upgraded experts a layer, their share."""
    plan = estimate.plan
    if plan.upgrade is None:
        return plan.base.precision, "", ""
    return " + ".join(plan.tiers), f"{estimate.hot_per_layer:.1f} of {plan.num_experts}", f"{plan.share_upgraded:.0%}"


def _price(estimate: TierEstimate) -> tuple[str, str, str]:
    """Where the upgrades wait, start from a packed checkpoint, start from 16 bit."""
    waiting = f"{gib(estimate.waiting)} {estimate.waits_in}" if estimate.waits_in else ""
    if estimate.start_reading is None or estimate.start_quantizing is None:
        return waiting, duration(estimate.start_packed), ""
    return waiting, duration(estimate.start_packed), duration(estimate.start_reading + estimate.start_quantizing)


def _show(size: ModelSize, taken: str, table: Table, notes: list[str]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    experts, whole = amount(size.experts), amount(size.experts + size.dense)
    headline = f"{size.name}: {size.num_layers} layers of {size.num_experts} experts, {experts} of {whole}"
    console.print(f"{headline} in {size.dtype}", style="bold", markup=False)
    console.print(taken)
    if not console.is_terminal:
        console.width = 120  # of a file or a pipe nobody knows the width
    console.print(table)
    for note in notes:
        console.print(note, style="dim")


def _notes(size: ModelSize, estimates: Iterable[CardEstimate]) -> list[str]:
    waits_in = {estimate.waits_in for found in estimates for estimate in found.estimates}
    whole, rate = size.experts + size.dense, ENCODE_RATE[size.quantizer] / 1e6
    start = f"Start: a disk of {DISK_RATE / 1e9:.0f} GB/s (assumed)"
    if not size.packed:
        start += f"; from 16 bit, one CPU core at {rate:.0f} million weights a second (measured; a GPU is not)"
    notes = ["Bytes in GiB. Loss was measured on the embedded model: only its order counts here.", f"{start}."]
    if "disk" in waits_in:
        notes.append('Upgrades that wait on disk are more than --host-ram: set host_copy="disk".')
    if not size.packed and size.index is not None and abs(size.index - whole) > INDEX_TOLERANCE * whole:
        notes.append(f"The index counts {amount(size.index)} of weights, the configuration {amount(whole)}.")
    return notes


def _record(estimate: TierEstimate) -> dict[str, Any]:
    plan: MemoryPlan = estimate.plan
    return {
        "tiers": plan.tiers,
        "hot_per_layer": estimate.hot_per_layer,
        "share_upgraded": plan.share_upgraded,
        "slots": plan.num_slots,
        "base_bytes": plan.base_bytes,
        "upgrade_bytes": plan.upgrade_bytes,
        "weights": plan.total,
    } | {key: figure for key, figure in asdict(estimate).items() if key != "plan"}
