"""KL of padded batches, and of the same rows sent one by one: padding must neither be counted nor decide anything.

    python benchmarks/quality/padding.py [--rounds 8] [--json FILE]

The embedded model at int2 + int8, a quarter upgraded, on held-out prose, code and arithmetic in turn. A round is one
batch of eight rows; it is sent as one padded batch or as eight forwards, and precision is decided after each round. So
requests are not recognized (`num_kinds=1`): that decides once for a batch, and eight times for its rows alone, padded
or not. Nats per token, over tokens that are no padding.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from streams import Stream, leave_slots, use_one_thread
from torch import Tensor

import dynaexq
from dynaexq.cli.demo import embedded_model
from dynaexq.evaluate import kl_divergence

ROWS = {"0 %": (72,) * 8, "44 %": (128, 100, 80, 72, 64, 56, 44, 32), "79 %": (128, 12, 12, 12, 12, 12, 14, 14)}
"""Tokens of the rows of a batch, by the share of padding."""
SHARE = 0.25


def padded(model: Any, rows: list[Tensor]) -> list[Tensor]:
    """Logits of each row, all sent as one batch padded on the left."""
    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return [logits[i, -len(row) :] for i, row in enumerate(rows)]


def alone(model: Any, rows: list[Tensor]) -> list[Tensor]:
    return [model(row[None], use_cache=False).logits[0] for row in rows]


@torch.no_grad()
def kl(stream: Stream, sizes: tuple[int, ...], send: Callable[[Any, list[Tensor]], list[Tensor]]) -> float:
    model = copy.deepcopy(stream.model)
    options = {"tiers": ("int2", "int8"), "update_interval": 10**6, "auto_pause": False, "num_kinds": 1}
    runtime = dynaexq.patch(model, "1TiB", config=options)
    leave_slots(runtime, SHARE)
    total, tokens = 0.0, 0
    for phase in stream.phases:
        for first in range(0, len(phase.windows), len(sizes)):
            rows, truth = (part[first : first + len(sizes)] for part in (phase.windows, phase.reference))
            for reference, logits in zip(truth, send(model, rows), strict=True):
                total += float(kl_divergence(reference[0], logits).sum())
            tokens += sum(map(len, rows))
            runtime.tick()
            runtime.drain()
    return total / tokens


def main(
    rounds: Annotated[int, typer.Option(help="Batches of each workload.")] = 8,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    use_one_thread()
    found = {}
    for share, sizes in ROWS.items():
        stream = Stream(embedded_model(), rounds * sum(sizes), lengths=sizes)
        found[share] = {"padded": kl(stream, sizes, padded), "alone": kl(stream, sizes, alone)}
    table = Table("padding", "KL of the batch", "KL of its rows alone")
    for share, row in found.items():
        table.add_row(share, f"{row['padded']:.4f}", f"{row['alone']:.4f}")
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
