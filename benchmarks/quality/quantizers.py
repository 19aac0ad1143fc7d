"""What quantizers of the same bytes cost: error of the weights, error of the outputs, and distance from the model.

    python benchmarks/quality/quantizers.py [--model DIR] [--json FILE]

Weights are replaced by what their codes stand for. KL divergence from the model in its own dtype, nats per token, on
held-out prose, code and arithmetic of `dynaexq.cli.demo_corpus`, and its mean; the error of the outputs is relative,
of both matrices, for the inputs of that text. What is calibrated was calibrated on the part that training saw. `mix`
is the KL with the fifth of the experts that a text routes most to at the upgrade of a code that can be refined.

HQQ is half-quadratic splitting (Badri and Shaji, 2023), 20 rounds, p = 0.7.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynaexq.cli.demo import embedded_model
from dynaexq.cli.demo_corpus import DOMAINS, documents
from dynaexq.evaluate import kl_divergence
from dynaexq.hf.calibration import calibrate, calibration_for, generated_windows
from dynaexq.hf.discovery import find_sparse_layers
from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.settings import Settings
from dynaexq.weights.calibration import Calibration

WINDOW = 128
BATCH = 8
SHARE_UPGRADED = 0.2
FORMATS = ((2, 64), (2, 32), (3, 64), (4, 64), (4, 32), (8, 64))
TIER_CHOICES = (("int2",), ("int2", "int4"), ("int4",))

Matrices = list[tuple[Tensor, Tensor]]
"""Of each layer the first and second matrices of all experts."""


def half(x: Tensor) -> Tensor:
    return x.half().float()


def rounded(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and offset that span the range."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return half((high - low) / (2**bits - 1)), half(low)


def codes(groups: Tensor, grid: tuple[Tensor, Tensor], bits: int) -> Tensor:
    return ((groups - grid[1]) / grid[0].clamp_min(1e-12)).round().clamp(0, 2**bits - 1)


def half_quadratic(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (2**bits - 1) / (high - low).clamp_min(1e-7)
    zero, beta, best = -low * scale, 10.0, float("inf")
    for _ in range(20):
        code = (groups * scale + zero).round().clamp(0, 2**bits - 1)
        error = groups - (code - zero) / scale
        if (mean := float(error.abs().mean())) >= best:
            break
        best = mean
        sparse = error.sign() * (error.abs() - error.abs().pow(-0.3) / beta).clamp_min(0)
        zero, beta = (code - (groups - sparse) * scale).mean(-1, keepdim=True), beta * 1.01
    return half(1 / scale), half(-zero / scale)


def clip_search(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = groups.aminmax(dim=-1, keepdim=True)
    best, least = rounded(groups, bits), torch.full_like(low, float("inf"))
    for share in (1 - 0.04 * i for i in range(18)):
        step = half((high - low) * share / (2**bits - 1))
        grid = step, half((high + low) / 2 - step * (2**bits - 1) / 2)
        errors = (grid[1] + grid[0] * codes(groups, grid, bits) - groups).square().sum(-1, keepdim=True)
        best = tuple(torch.where(errors < least, new, old) for new, old in zip(grid, best, strict=True))
        least = torch.minimum(errors, least)
    return best


def least_squares(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    grid, mean = rounded(groups, bits), groups.mean(-1, keepdim=True)
    for _ in range(10):
        code = codes(groups, grid, bits)
        middle = code.mean(-1, keepdim=True)
        spread = (code - middle).square().sum(-1, keepdim=True).clamp_min(1e-6)
        step = half(((code - middle) * groups).sum(-1, keepdim=True) / spread)
        grid = step, half(mean - step * middle)
    return grid


def unshrink(groups: Tensor, reading: Tensor) -> Tensor:
    center, weights = reading.mean(-1, keepdim=True), groups - groups.mean(-1, keepdim=True)
    along = (weights * (reading - center)).sum(-1, keepdim=True).clamp_min(1e-12)
    return center + (reading - center) * (weights.square().sum(-1, keepdim=True) / along).clamp(1, 4) ** 0.7


def reading_of(fit: Callable, stretch: bool) -> Callable[[Tensor, int, int], Tensor]:
    def read(matrix: Tensor, bits: int, group_size: int) -> Tensor:
        groups = matrix.float().unflatten(-1, (-1, group_size))
        grid = fit(groups, bits)
        reading = grid[1] + grid[0] * codes(groups, grid, bits)
        return (unshrink(groups, reading) if stretch else reading).flatten(-2)

    return read


METHODS = {
    "RTN": reading_of(rounded, False),
    "HQQ": reading_of(half_quadratic, False),
    "clip search": reading_of(clip_search, False),
    "least squares": reading_of(least_squares, False),
    "least squares, un-shrunk": reading_of(least_squares, True),
}


class Study:
    """A model, what it says to held-out text, and what its experts meet there."""

    def __init__(self, path: Path, windows: int, calibration_windows: int):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", experts_implementation="eager").eval()
        self.layers = find_sparse_layers(self.model)
        self.originals = [(w.up.detach().clone(), w.down.detach().clone()) for w in self._weights()]
        self.windows = {domain: self._windows(domain, "held-out", windows) for domain in DOMAINS}
        seen = [w for domain in DOMAINS for w in self._windows(domain, "train", calibration_windows)]
        self.calibrations: dict[str, Calibration | None] = {
            "dynaexq": None,
            "dynaexq, on text": self._calibration(seen),
            "dynaexq, on its own words": self._calibration(generated_windows(self.model)),
        }
        self.met = self._calibration([window for windows in self.windows.values() for window in windows])
        self.routed = {domain: torch.zeros(len(self.layers), self.layers[0].num_experts) for domain in DOMAINS}
        self.reference = {domain: self._observed_logits(domain) for domain in DOMAINS}

    def _calibration(self, windows: list[Tensor]) -> Calibration:
        path = Path(tempfile.mkdtemp()) / "calibration.safetensors"
        calibrate(self.model, path, windows)
        return calibration_for(Settings(calibration=path), self.layers)

    def _weights(self) -> list[ExpertWeights]:
        return [layer.weights() for layer in self.layers]

    def _windows(self, domain: str, split: str, count: int) -> Tensor:
        ids: list[int] = []
        for text in documents(domain, split):
            ids += self.tokenizer(text + self.tokenizer.eos_token, verbose=False)["input_ids"]
            if len(ids) >= count * WINDOW:
                break
        return torch.tensor(ids[: count * WINDOW]).view(-1, WINDOW)

    def _logits(self, domain: str) -> Tensor:
        return torch.cat([self.model(ids, use_cache=False).logits for ids in self.windows[domain].split(BATCH)])

    def _observed_logits(self, domain: str) -> Tensor:
        """The logits, while `routed` adds up the weights that each expert is routed with."""

        def observe(layer: int, top_k_index: Tensor, top_k_weights: Tensor) -> None:
            self.routed[domain][layer].index_add_(0, top_k_index.flatten(), top_k_weights.float().flatten())

        hooks = [
            layer.experts.register_forward_pre_hook(lambda _, args, index=index: observe(index, *args[1:3]))
            for index, layer in enumerate(self.layers)
        ]
        logits = self._logits(domain)
        for hook in hooks:
            hook.remove()
        return logits

    def replace(self, matrices: Matrices, upgraded: Matrices | None = None, where: Tensor | None = None) -> None:
        """Put `matrices` in the place of the experts' own, and `upgraded` where `where [L, E]` is set."""
        for index, weights in enumerate(self._weights()):
            for own, new, number in ((weights.up, matrices[index][0], 0), (weights.down, matrices[index][1], 1)):
                own.data.copy_(new)
                if upgraded is not None and where is not None:
                    own.data[where[index]] = upgraded[index][number][where[index]].to(own.dtype)

    def _domain_kl(self, domain: str) -> float:
        return float(kl_divergence(self.reference[domain], self._logits(domain)).mean())

    def figures(self, matrices: Matrices) -> dict[str, float]:
        """Errors and KL of every expert replaced."""
        self.replace(matrices)
        kl = {domain: self._domain_kl(domain) for domain in DOMAINS}
        return self._errors(matrices) | kl | {"mean": sum(kl.values()) / len(kl)}

    def _errors(self, matrices: Matrices) -> dict[str, float]:
        weights, outputs = torch.zeros(2), torch.zeros(2)
        for index, (new, old) in enumerate(zip(matrices, self.originals, strict=True)):
            known = list(self.met.of_experts(index, 0, ExpertWeights(*old), self.layers[0].shape()))
            for number in range(2):
                for mine, exact, inputs in zip(new[number].float(), old[number].float(), known, strict=True):
                    parts = torch.stack([mine - exact, exact])
                    weights += parts.square().sum((1, 2)) / exact.square().sum()
                    through = (parts @ inputs[number].moments * parts).sum((1, 2))
                    outputs += through / through[1]
        return {
            name: float(sums[0] / sums[1]) ** 0.5
            for name, sums in (("weight error", weights), ("output error", outputs))
        }

    def mix(self, low: Matrices, high: Matrices) -> float:
        """KL with the experts that a text routes most to at `high`; mean over the texts."""
        total = 0.0
        for domain, mass in self.routed.items():
            where = torch.zeros(mass.numel(), dtype=torch.bool)
            where[mass.flatten().topk(round(SHARE_UPGRADED * mass.numel())).indices] = True
            self.replace(low, high, where.view_as(mass))
            total += self._domain_kl(domain) / len(self.routed)
        return total

    def coded(self, tiers: tuple[str, ...], group_size: int, calibration: Calibration | None) -> list[Matrices]:
        """The experts as dynaexq codes them, at each tier."""
        codec = ExpertCodec(self.layers[0].shape(), self.layers[0].dtype, tiers, group_size)
        found: list[Matrices] = [[] for _ in tiers]
        for index, (up, down) in enumerate(self.originals):
            weights = ExpertWeights(up, down)
            known = calibration and list(calibration.of_experts(index, 0, weights, codec.shape))
            base, upgrade, _ = codec.encode(weights, known)
            for matrices, block in zip(found, (None, upgrade), strict=False):
                reading = codec.decode(base, block, torch.float32)
                matrices.append((reading.up, reading.down))
        return found


def baseline_rows(study: Study) -> list[dict]:
    rows = []
    for bits, group_size in tqdm(FORMATS, unit="format"):
        for name, read in METHODS.items():
            matrices = [tuple(read(part, bits, group_size) for part in parts) for parts in study.originals]
            rows.append({"format": f"int{bits} g{group_size}", "method": name, **study.figures(matrices)})
    return rows


def coded_rows(study: Study) -> list[dict]:
    rows = []
    for tiers in tqdm(TIER_CHOICES, unit="pair"):
        for group_size in (64, 32) if len(tiers) == 1 else (64,):
            for method, calibration in study.calibrations.items():
                readings = study.coded(tiers, group_size, calibration)
                mix = study.mix(*readings) if len(tiers) == 2 else None
                for tier, matrices in zip(tiers, readings, strict=True):
                    name = f"{tier} of {'+'.join(tiers)}" if len(tiers) == 2 else f"{tier} g{group_size}"
                    rows.append({"format": name, "method": method, **study.figures(matrices), "mix": mix})
    return rows


def show(title: str, rows: list[dict]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right", no_wrap=True)
    for row in rows:
        cells = (
            "" if value is None else f"{value:.4f}" if isinstance(value, float) else value for value in row.values()
        )
        table.add_row(*cells)
    Console().print(table)


@torch.no_grad()
def main(
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory; the embedded model by default.")] = None,
    windows: Annotated[int, typer.Option(help="Held-out windows of 128 tokens a domain.")] = 40,
    calibration_windows: Annotated[int, typer.Option(help="Windows of 128 tokens a domain to calibrate on.")] = 80,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure both tables."""
    torch.set_num_threads(1)
    study = Study(model or embedded_model(), windows, calibration_windows)
    baselines, coded = baseline_rows(study), coded_rows(study)
    show("every expert in one format", baselines)
    show("as dynaexq codes them", coded)
    if json_path:
        results = {"torch": torch.__version__, "tokens_a_domain": windows * WINDOW, "others": baselines, "ours": coded}
        json_path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
