"""Every family through every door, and the table of it in docs/compatibility.md.

`python tests/helpers/doors.py` prints the table anew, for the installed Transformers.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from models import TINY_FAMILIES, is_known, tiny_model, tokens
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

import dynaexq
from dynaexq.hf.convert import annotate_checkpoint, quantize_checkpoint

OPTIONS = {"tiers": ("int4", "int8"), "hbm_budget": "1GiB", "quantizer": "rtn"}
YES = "yes"

KNOWN_REASONS = {
    "has no head": "a model without a head generates nothing",
    "too small": "Transformers itself writes nothing with so small a vocabulary",
    "cannot be saved": "Transformers itself cannot save so small a model of this family",
    "not in float16": "Transformers keeps weights of the family in float32, and does not run it in float16",
}
"""What may stand in the table instead of `yes`, and why it does."""


class Family:
    """One tiny model in memory and on disk, and what it answers."""

    def __init__(self, name: str, directory: Path):
        self.name, self.directory = name, directory
        self.plain = tiny_model(name)
        self.source = directory / "source"
        try:
            self.plain.save_pretrained(self.source)
            self.is_saved = True
        except Exception:
            self.is_saved = False

    def loaded(self, path: Path, **options: Any) -> PreTrainedModel:
        return type(self.plain).from_pretrained(path, **options).eval()

    def packed(self) -> Path:
        path = self.directory / "packed"
        if not path.exists():
            model = self.loaded(self.source, quantization_config=dynaexq.DynaExqConfig(**OPTIONS))
            model.save_pretrained(path)
        return path


@torch.no_grad()
def answer(model: PreTrainedModel) -> Tensor:
    return model(tokens())[0].float()


def near(family: Family, model: PreTrainedModel) -> str:
    """Whether `model` is packed, and answers about as the plain one does."""
    assert model.dynaexq.plan.tiers == OPTIONS["tiers"]
    expected = answer(family.plain)
    distance = float((answer(model) - expected).norm() / expected.norm())
    assert distance < 0.5, f"{family.name} is {distance:.2f} away"
    return YES


def patch(family: Family) -> str:
    model = tiny_model(family.name)
    dynaexq.patch(model, config=OPTIONS)
    return near(family, model)


def train(family: Family) -> str:
    model = tiny_model(family.name).train()
    dynaexq.patch(model, config=OPTIONS)
    model(tokens())[0].float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    return YES


def generate(family: Family) -> str:
    if not family.plain.can_generate():
        return "has no head"
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    try:
        family.plain.generate(tokens(), **options)
    except IndexError:
        return "too small"
    model = tiny_model(family.name)
    dynaexq.patch(model, config=OPTIONS)
    assert model.generate(tokens(), **options).shape[1] == tokens().shape[1] + 3
    return YES


def dequantize(family: Family) -> str:
    model = tiny_model(family.name)
    dynaexq.patch(model, config=OPTIONS)
    before = answer(model)
    torch.testing.assert_close(answer(model.dequantize()), before, rtol=1e-3, atol=1e-3)
    return YES


def from_pretrained(family: Family) -> str:
    return near(family, family.loaded(family.source, quantization_config=dynaexq.DynaExqConfig(**OPTIONS)))


def packed(family: Family) -> str:
    return near(family, family.loaded(family.packed()))


def quantize(family: Family) -> str:
    path = quantize_checkpoint(family.source, family.directory / "quantized", dynaexq.DynaExqConfig(**OPTIONS))
    return near(family, family.loaded(path))


def annotate(family: Family) -> str:
    path = annotate_checkpoint(family.source, family.directory / "annotated", dynaexq.DynaExqConfig(**OPTIONS))
    return near(family, family.loaded(path))


def base_model(family: Family) -> str:
    plain = AutoModel.from_pretrained(family.source).eval()
    model = AutoModel.from_pretrained(family.packed()).eval()
    expected = answer(plain)
    assert float((answer(model) - expected).norm() / expected.norm()) < 0.5
    return YES


def float16(family: Family) -> str:
    try:
        answer(family.loaded(family.source, dtype=torch.float16))
    except RuntimeError:
        return "not in float16"
    model = family.loaded(family.packed(), dtype=torch.float16)
    assert model.dynaexq.devices[0].codec.dtype == torch.float16
    return near(family, model)


IN_MEMORY: tuple[Callable[[Family], str], ...] = (patch, generate, train, dequantize)
ON_DISK: tuple[Callable[[Family], str], ...] = (from_pretrained, packed, quantize, annotate, base_model, float16)
DOORS = IN_MEMORY + ON_DISK


def walk(name: str) -> list[str]:
    """What every door says to a family."""
    with tempfile.TemporaryDirectory() as directory:
        family = Family(name, Path(directory))
        return [door(family) if family.is_saved or door in IN_MEMORY else "cannot be saved" for door in DOORS]


def row(name: str, cells: list[str]) -> str:
    return "| " + " | ".join([f"`{name}`", *cells]) + " |"


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(row("family", [f"`{door.__name__}`" for door in DOORS]).replace("`family`", "family"))
    print("|" + "---|" * (1 + len(DOORS)))
    for name in sorted(filter(is_known, TINY_FAMILIES)):
        print(row(name, walk(name)), flush=True)


if __name__ == "__main__":
    main()
