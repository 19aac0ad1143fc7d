"""The main job on the embedded model: text generation under a hard byte budget while the workload moves.

Prose, code and arithmetic follow one another. The 16-bit model answers first and is the reference; then the same
stream goes through four patched copies: all experts low, the start-up choice frozen, dynamic, all experts high.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynaexq.cli.demo_corpus import DOMAINS, documents
from dynaexq.errors import CheckpointError
from dynaexq.evaluate import evaluate, reference_logits, windows_of
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.meta_model import meta_model
from dynaexq.hf.patcher import patch
from dynaexq.runtime.runtime import Runtime
from dynaexq.views.tables import print_table

SHARE_UPGRADED = 0.2
PROMPT_TOKENS = 24
NEW_TOKENS = 40


@dataclass
class Outcome:
    """One way to spend the bytes, over the whole stream.

    Attributes:
        kl: nats per token from the 16-bit model, one figure a phase.
        overlap: share of a phase's own top experts that were upgraded when it ended, one figure a phase.
    """

    name: str
    total_bytes: int = 0
    budget: int = 0
    promotions: int = 0
    demotions: int = 0
    hot_coverage: float = 0.0
    kl: list[float] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)


def embedded_model() -> Path:
    """The directory of the embedded model: inside an installed package, or in the repository it was cloned from.

    Raises:
        FileNotFoundError: neither is there.
    """
    here = Path(__file__).parent.parent
    for place in (here / "tiny-moe", here.parent / "examples" / "tiny-moe"):
        if (place / "model.safetensors").is_file():
            return place
    raise FileNotFoundError("the embedded model is missing; train it with: python examples/tiny-moe/train.py")


def run(
    model_dir: Path | None = None,
    tiers: tuple[str, str] = ("int2", "int4"),
    windows: int = 24,
    length: int = 128,
    quiet: bool = False,
) -> list[Outcome]:
    """Run the demo and print its table, unless it is to be `quiet`; returns what the table shows.

    Args:
        model_dir: another checkpoint with the same tokenizer conventions; the embedded model by default.
        windows, length: windows a phase, and tokens per window.
    """
    with _one_thread():
        return _run(model_dir or embedded_model(), tiers, windows, length, Console(quiet=quiet))


def figures(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """The same as plain data, for JSON."""
    return [asdict(outcome) for outcome in outcomes]


def _run(path: Path, tiers: tuple[str, str], windows: int, length: int, console: Console) -> list[Outcome]:
    meta_model(path)  # refuses in a sentence what is no 16-bit checkpoint
    tokenizer = _tokenizer_of(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, experts_implementation="eager").eval()
    phases = {domain: windows_of(tokenizer, documents(domain), windows, length) for domain in DOMAINS}
    least, slot, experts = _budgets(model, tiers)
    shares = {"all low": 0.0, "frozen start": SHARE_UPGRADED, "dynamic": SHARE_UPGRADED, "all high": 1.0}
    outcomes = []
    with _progress(console) as progress:
        task = progress.add_task("16-bit reference", total=(1 + len(shares)) * windows * len(phases))
        reference = {}
        for domain, phase in phases.items():
            reference[domain] = reference_logits(model, phase)
            progress.advance(task, windows)
        for name, share in shares.items():
            progress.update(task, description=name)
            copied = copy.deepcopy(model)
            policy = "frozen" if name == "frozen start" else "topn"
            budget = least + slot * round(share * experts)
            runtime = patch(
                copied, budget, tiers=tiers, device="cpu", policy=policy, config=DynaExqConfig(update_interval=1)
            )
            outcome = Outcome(name, runtime.memory()["total"], runtime.plan.budget)
            for domain, phase in phases.items():
                _see(outcome, copied, runtime, phase, reference[domain], lambda _: progress.advance(task))
                if name == "dynamic":
                    text = _generated(copied, tokenizer, phase[0], domain)
                    progress.console.print(text, highlight=False, soft_wrap=True)
            outcomes.append(outcome)
    print_table(console, _table(outcomes, experts, tiers))
    return outcomes


def _tokenizer_of(path: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer("words").input_ids:
            return tokenizer
        reason = "it knows no words"  # Transformers makes up an empty one where a family has a default
    except Exception as error:  # of whatever kind, one for each way in which a tokenizer can be missing
        reason = str(error).partition("\n")[0]
    raise CheckpointError(f"cannot read the tokenizer of {path}: {reason}; put its files beside the model")


def _see(
    outcome: Outcome,
    model: nn.Module,
    runtime: Runtime,
    phase: list[Tensor],
    reference: list[Tensor],
    after_window: Callable[[int], None],
) -> None:
    """Send one phase through a patched model and add its cost to `outcome`."""
    before = runtime.routed_mass()
    quality = evaluate(model, phase, reference, after_window)
    assert quality.kl is not None, "there is a reference"
    outcome.kl.append(quality.kl)
    outcome.overlap.append(_overlap(runtime, runtime.routed_mass() - before))
    stats = runtime.stats()
    outcome.promotions, outcome.demotions = stats["promotions"], stats["demotions"]
    outcome.hot_coverage = stats["hot_coverage"]


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<18}"), BarColumn(), TextColumn("{task.completed}/{task.total} windows"))
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices as small as the embedded model's are multiplied faster by one thread than by several that must meet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _budgets(model: nn.Module, tiers: tuple[str, str]) -> tuple[int, int, int]:
    """Bytes with no expert upgraded, bytes of one upgrade, and the number of experts."""
    copied = copy.deepcopy(model)
    runtime = patch(copied, "1TiB", tiers=tiers, device="cpu", config=DynaExqConfig(quantizer="rtn"))
    memory, experts = runtime.memory(), runtime.plan.num_slots
    return memory["total"] - memory["upgrade"], memory["upgrade"] // experts, experts


def _overlap(runtime: Runtime, mass: np.ndarray) -> float:
    """Share of the experts with the most routing mass, as many as there are slots, that are upgraded now."""
    slots = runtime.plan.num_slots
    if not slots:
        return 0.0
    top = np.argsort(-mass, axis=None, kind="stable")[:slots]
    return float((runtime.tiers() > runtime.plan.base.bits).ravel()[top].mean())


def _generated(model: Any, tokenizer: Any, window: Tensor, domain: str) -> str:
    prompt = window[None, :PROMPT_TOKENS]
    output = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(prompt))
    before, after = (tokenizer.decode(part) for part in (output[0, :PROMPT_TOKENS], output[0, PROMPT_TOKENS:]))
    quoted = "\n".join(f"  {line}" for line in f"{before}⟨{after}⟩".splitlines())
    return f"[bold]{domain}[/bold]\n{escape(quoted)}\n"


def _table(outcomes: list[Outcome], experts: int, tiers: tuple[str, str]) -> Table:
    base, upgrade = tiers
    slots = round(SHARE_UPGRADED * experts)
    table = Table(title=f"{experts} experts, {base} refined to {upgrade}; a fifth ({slots}) upgraded at a time")
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        table.add_column(outcome.name, justify="right")

    def row(title: str, form: str, values: list[Any]) -> None:
        table.add_row(title, *(format(value, form) for value in values))

    row("bytes", ",", [o.total_bytes for o in outcomes])
    row("budget", ",", [o.budget for o in outcomes])
    row("promotions", ",", [o.promotions for o in outcomes])
    row("demotions", ",", [o.demotions for o in outcomes])
    row("hot coverage", ".1%", [o.hot_coverage for o in outcomes])
    for title, form, figures in (("KL", ".4f", "kl"), ("top experts held", ".0%", "overlap")):
        table.add_section()
        for phase, domain in enumerate(DOMAINS):
            row(f"{title}, {domain}", form, [getattr(o, figures)[phase] for o in outcomes])
    row_mean = [float(np.mean(o.kl)) for o in outcomes]
    table.add_section()
    row("KL, mean (nats per token)", ".4f", row_mean)
    low, _, dynamic, high = row_mean
    recovered, spent = (low - dynamic) / (low - high), slots / experts
    table.caption = f"{recovered:.0%} of the distance between low and high, in {spent:.0%} of the upgrade bytes"
    return table
