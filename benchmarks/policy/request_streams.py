"""Who has the right experts upgraded when requests of several kinds come: coverage by policy, no memory involved.

    python benchmarks/policy/request_streams.py [--model DIR --text DIR] [--upgraded 0.2] [--json FILE]

A model in its own dtype reads held-out text; what it routes is then replayed through the control loop. `shifting`: one
kind of text after the other, twice, a window of 512 tokens after another, with a decision before and after each.
`interleaved`: requests of 128 tokens of prompt and 128 of answer in random order, with a decision before and after
each prompt and after every 32 tokens of the answer. Every policy starts from what a calibration text routes to, which
comes from elsewhere; `frozen` stays there. Oracles know what will be routed, and pay for no move.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynaexq.cli.demo import embedded_model
from dynaexq.cli.demo_corpus import Corpus
from dynaexq.evaluate import windows_of
from dynaexq.hf.discovery import find_sparse_layers
from dynaexq.policy import top_n
from dynaexq.policy.controller import ControlLoop, Window
from dynaexq.policy.kinds import Arrival
from dynaexq.policy.rate_limit import CopyRateLimiter
from dynaexq.settings import Settings
from dynaexq.simulator.replay import ImaginedSlots, Machine

REQUEST, PROMPT, STEP, WINDOW = 256, 128, 32, 512
CALIBRATION_SEED, ORDER_SEED = 5, 0
PAPER = {"alpha": 0.5, "allocation": "per_layer", "hysteresis": 0.0, "auto_pause": False}
POLICIES: dict[str, dict[str, Any]] = {
    "frozen": {"policy": "frozen"},
    "paper, alpha 0.5 a decision": PAPER,
    "paper, alpha 0.9 a decision": PAPER | {"alpha": 0.9},
    "moving average of 128 tokens": {"num_kinds": 1, "hysteresis": 0.5},
    "moving average of 32 tokens": {"num_kinds": 1, "hysteresis": 0.2, "half_life": 32},
    "dynaexq": {},
}


class Request(NamedTuple):
    """Token ids `[256]` of some text, and what they are routed to: mass `[256 / 32, L, E]`."""

    ids: np.ndarray
    mass: np.ndarray


class Part(NamedTuple):
    """What is decided about at once: routing mass `[L, E]` of some tokens.

    Attributes:
        words: of the prompt, where a request begins with it.
        unit: which set of parts the oracle of requests, or of phases, chooses for at once.
        name: what its coverage counts for.
    """

    mass: np.ndarray
    tokens: int
    words: np.ndarray | None
    unit: int
    name: str


@dataclass(frozen=True)
class Routing:
    """What a model routes: its calibration text, and held-out requests of each kind."""

    calibrated: np.ndarray
    requests: dict[str, list[Request]]
    top_k: int


@torch.no_grad()
def routing_of(path: Path, corpus: Corpus, count: int) -> Routing:
    """Let a model read `count` requests of each kind, and a quarter as many of the calibration text."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", experts_implementation="eager").eval()
    layers = find_sparse_layers(model)
    shape, routed = (len(layers), layers[0].num_experts), {}

    def read(ids: torch.Tensor) -> Request:
        model(ids[None], use_cache=False)
        mass = torch.stack([torch.zeros(len(ids), shape[1]).scatter_add_(1, *routed[i]) for i in range(shape[0])], 1)
        return Request(ids.numpy(), mass.unflatten(0, (-1, STEP)).sum(1).double().numpy())

    for index, layer in enumerate(layers):
        layer.experts.register_forward_pre_hook(
            lambda _, args, index=index: routed.__setitem__(index, (args[1], args[2].float()))
        )
    found: dict[str, dict[str, list[Request]]] = {}
    for split, windows, seed in (("train", count // 4, CALIBRATION_SEED), ("held-out", count, 0)):
        for kind in tqdm(corpus.kinds, desc=f"{split} text", unit="kind"):
            texts = corpus.documents(kind, split, seed)
            found.setdefault(split, {})[kind] = [read(w) for w in windows_of(tokenizer, texts, windows, REQUEST)]
    mass = np.mean([r.mass.sum(0) / REQUEST for requests in found["train"].values() for r in requests], 0)
    return Routing(mass, found["held-out"], routed[0][0].shape[1])


def interleaved(routing: Routing) -> list[Part]:
    """All requests in random order; a unit is a request."""
    requests = [request for kind in routing.requests.values() for request in kind]
    order = np.random.default_rng(ORDER_SEED).permutation(len(requests))
    parts = []
    for unit, index in enumerate(order):
        ids, mass = requests[index]
        prompt = PROMPT // STEP
        parts.append(Part(mass[:prompt].sum(0), PROMPT, ids[:PROMPT], unit, "prompts"))
        parts += [Part(step, STEP, None, unit, "answers") for step in mass[prompt:]]
    return parts


def shifting(routing: Routing, cycles: int = 2) -> list[Part]:
    """One kind after the other in windows of two requests; a unit is a phase."""
    parts, per_window = [], WINDOW // REQUEST
    kinds = list(routing.requests.values())
    for phase in range(cycles * len(kinds)):
        requests = kinds[phase % len(kinds)]
        share = len(requests) // cycles // per_window * per_window
        first = phase // len(kinds) * share
        for at in range(first, first + share, per_window):
            window = requests[at : at + per_window]
            ids = np.concatenate([request.ids for request in window])
            mass = np.sum([request.mass.sum(0) for request in window], 0)
            parts.append(Part(mass, WINDOW, ids, phase, "windows"))
    return parts


class Score:
    """Mass that met an upgrade, and all mass, by what it counts for."""

    def __init__(self) -> None:
        self._met: dict[str, float] = {}
        self._all: dict[str, float] = {}

    def add(self, part: Part, upgraded: np.ndarray) -> None:
        self._met[part.name] = self._met.get(part.name, 0.0) + float(part.mass[upgraded].sum())
        self._all[part.name] = self._all.get(part.name, 0.0) + float(part.mass.sum())

    @property
    def coverage(self) -> dict[str, float]:
        return {name: self._met[name] / total for name, total in self._all.items()}


def followed(parts: list[Part], routing: Routing, num_slots: int, options: dict[str, Any]) -> dict[str, Any]:
    """The coverage and the moves of one policy; what it decides is in force at once."""
    shape, settings = routing.calibrated.shape, Settings(**options)
    slots = ImaginedSlots(Machine(num_slots, 1, float("inf"), 1.0), shape)
    control = ControlLoop(shape, np.ones(shape), CopyRateLimiter(None, 1), settings)
    control.tracker.start_from(routing.calibrated)
    control.fill(slots)
    slots.drain()
    score, moves = Score(), 0
    nothing = Window(np.zeros(shape), np.zeros(shape[0], int), 0, routing.top_k, slots.published)
    for part in parts:
        if part.words is not None and control.tracker.knows_requests:
            moves += _promotions(control.step(nothing, slots, arrival=Arrival.of([part.words])))
            slots.drain()
        score.add(part, slots.published)
        tokens = np.full(shape[0], part.tokens)
        window = Window(part.mass, tokens, 1, routing.top_k, slots.published.copy())
        moves += _promotions(control.step(window, slots))
        slots.drain()
    return score.coverage | {"moves": moves}


def best(mass: np.ndarray, num_slots: int) -> np.ndarray:
    """The experts `[L, E]` that get most of `mass`."""
    row = mass.reshape(1, -1)
    return top_n(row, np.zeros(row.shape, dtype=bool), np.array([num_slots]), 0.0).reshape(mass.shape)


def oracles(parts: list[Part], num_slots: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The best set for each unit, and for each part."""
    units: dict[int, np.ndarray] = {}
    for part in parts:
        units[part.unit] = units.get(part.unit, 0.0) + part.mass
    sets = {unit: best(mass, num_slots) for unit, mass in units.items()}
    by_unit, by_part = Score(), Score()
    for part in parts:
        by_unit.add(part, sets[part.unit])
        by_part.add(part, best(part.mass, num_slots))
    of_requests = any(part.name == "prompts" for part in parts)
    yield f"oracle of each {'request' if of_requests else 'phase'}", by_unit.coverage
    yield "oracle of each decision", by_part.coverage


def measured(routing: Routing, upgraded: float) -> dict[str, list[dict[str, Any]]]:
    """A table for each stream, with the share of the way from the frozen map to the oracle."""
    num_slots = round(upgraded * routing.calibrated.size)
    tables = {}
    for name, parts in {"shifting": shifting(routing), "interleaved": interleaved(routing)}.items():
        rows = [{"policy": policy} | followed(parts, routing, num_slots, o) for policy, o in POLICIES.items()]
        rows += [{"policy": policy} | row | {"moves": None} for policy, row in oracles(parts, num_slots)]
        names = [key for key in rows[0] if key not in ("policy", "moves")]
        frozen, oracle = dict(rows[0]), dict(rows[-2])
        for row in rows:
            for part in names:
                row[f"{part}: of frozen to oracle"] = (row[part] - frozen[part]) / (oracle[part] - frozen[part])
        tables[name] = rows
    return tables


def _promotions(moves: list[Any]) -> int:
    return sum(move.promote for move in moves)


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print one table."""
    columns = list(rows[0])
    table = Table(*columns, title=title)
    for row in rows:
        cells = (row[column] for column in columns)
        table.add_row(*("" if v is None else f"{v:.3f}" if isinstance(v, float) else f"{v}" for v in cells))
    console.print(table)


def main(
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory; the embedded model by default.")] = None,
    text: Annotated[Path | None, typer.Option(help="A directory of files KIND.txt; the demo's by default.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of 256 tokens of each kind.")] = 80,
    upgraded: Annotated[float, typer.Option(help="Share of the experts with an upgrade.")] = 0.2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure both tables, and print them."""
    torch.set_num_threads(1)
    routing = routing_of(model or embedded_model(), Corpus(text), requests)
    tables = measured(routing, upgraded)
    for name, rows in tables.items():
        show(Console(width=160), f"{name}, {upgraded:.0%} upgraded", rows)
    if json_path:
        figures = {"upgraded": upgraded, "requests_a_kind": requests, "shape": routing.calibrated.shape, **tables}
        json_path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
