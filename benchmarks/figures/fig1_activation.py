"""The paper's figure 1: how often each expert of an early and of a late layer is chosen, under several workloads.

    python benchmarks/figures/fig1_activation.py [--model DIR] [--device cpu] [--text chat=chat.txt]

The model is unpatched; what is counted is the choices of its own routers, as shares of the tokens.
"""

import itertools
from typing import Annotated, Any

import figure_helpers as figures
import numpy as np
import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

from dynaexq import plots
from dynaexq.evaluate import stream_logits
from dynaexq.hf.discovery import find_sparse_layers

TOP_SHARE = 0.2


class Choices:
    """Counts the choices `[L, E]` of every sparse layer of an unpatched model."""

    def __init__(self, model: nn.Module):
        layers = find_sparse_layers(model)
        self.counts = np.zeros((len(layers), layers[0].num_experts), dtype=np.int64)
        self.names = [layer.name for layer in layers]
        self.top_k = 0
        for index, layer in enumerate(layers):
            layer.experts.register_forward_pre_hook(self._hook(index), with_kwargs=True)

    def _hook(self, layer: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            chosen = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            self.top_k = chosen.shape[-1]
            self.counts[layer] += torch.bincount(chosen.flatten(), minlength=self.counts.shape[1]).cpu().numpy()

        return count

    def of(self, model: nn.Module, windows: list[Tensor]) -> np.ndarray:
        """Share of the tokens of `windows` that chose each expert, `[L, E]`."""
        before = self.counts.copy()
        for _ in tqdm(stream_logits(model, windows), total=len(windows), unit="window"):
            pass
        grown = self.counts - before
        return grown * self.top_k / np.maximum(1, grown.sum(1, keepdims=True))


def top(frequency: np.ndarray) -> set[int]:
    """The most frequent fifth of one layer's experts."""
    return set(np.argsort(-frequency, kind="stable")[: max(1, round(TOP_SHARE * len(frequency)))].tolist())


def rows_of(frequencies: dict[str, np.ndarray], layers: list[int]) -> list[dict[str, Any]]:
    """How uneven each workload is, layer by layer, and which share of its top fifth each other one has as well."""
    rows = []
    for layer, (name, frequency) in itertools.product(layers, frequencies.items()):
        here, best = frequency[layer], top(frequency[layer])
        shared = {f"shared_with_{other}": len(best & top(f[layer])) / len(best) for other, f in frequencies.items()}
        share = float(here[sorted(best)].sum() / here.sum())
        rows.append(
            {"workload": name, "layer": layer, "most": float(here.max()), "choices_of_top_fifth": share, **shared}
        )
    return rows


def main(
    model: figures.Model = figures.EMBEDDED,
    device: figures.Device = figures.DEVICE,
    text: figures.Texts = None,
    layer: Annotated[list[int] | None, typer.Option(help="Number among the sparse layers; first and last.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of a workload.")] = 24,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 128,
    threads: figures.Threads = 1,
    out: figures.Out = figures.RESULTS,
) -> None:
    """Count which experts are chosen."""
    torch.set_num_threads(threads)
    texts = figures.workloads(model, text, windows, length, device)
    unpatched = figures.original(model, device)
    choices = Choices(unpatched)
    layers = layer or [0, len(choices.names) - 1]
    if not all(0 <= number < len(choices.names) for number in layers):
        raise typer.BadParameter(f"expected layers from 0 to {len(choices.names) - 1}, got {layers}")
    frequencies = {name: choices.of(unpatched, found) for name, found in texts.items()}
    rows = rows_of(frequencies, layers)
    results = {
        "machine": figures.machine(device),
        "model": model.name,
        "tokens": windows * length,
        "top_k": choices.top_k,
        "layers": layers,
        "names": [choices.names[number] for number in layers],
        "rows": rows,
        "frequencies": {name: found[layers].round(5).tolist() for name, found in frequencies.items()},
    }
    figures.show(f"{model.name}: choices of {windows * length:,} tokens a workload", rows)
    title = f"{model.name}: how often each expert is chosen (dashed: if all were alike)"
    figures.save(
        out, "fig1_activation", results, lambda: plots.choices(results["frequencies"], layers, choices.top_k), title
    )


if __name__ == "__main__":
    typer.run(main)
