"""What two ranks find when they load and run models together, case by case. `test_distributed` starts them and judges.

Every case is called on both ranks, in the same order, because they wait for each other in it.
"""

import os
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.quantizers.base import HfQuantizer

import dynaexq
from dynaexq.hf.compat import has_parallel_plans

AMPLE = 10**6
SIZES = {"tp_size": 2, "ep_size": 2}
OPTIONS = {field.name for field in fields(DistributedConfig)}
LAYOUTS: dict[str, dict[str, Any]] = {"tp": {"tp_size": 2}, "ep by exchange": SIZES}
if "ep_implementation" in OPTIONS:  # before, tokens were always exchanged
    LAYOUTS["ep by exchange"] = SIZES | {"ep_implementation": "all_to_all"}
    LAYOUTS["ep by sum"] = SIZES
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp16": ("source", ("fp16",)),
    "int4": ("source", ("int4",)),
    "int2-int8": ("source", ("int2", "int8")),
    "packed": ("packed", ("int2", "int8")),
    "packed, base only": ("packed", ("int2",)),
    "gpt_oss": ("gpt_oss", ("int2", "int8")),
    "deepseek_v3": ("deepseek_v3", ("int2", "int8")),
}
"""The checkpoint and the pair of each; with this budget every expert is upgraded."""


def load(directory: Path, tiers: tuple[str, ...] | None, layout: dict[str, Any], **options: Any) -> Any:
    """A model from `directory`: stock without `tiers`, in one process with an empty `layout`."""
    kwargs: dict[str, Any] = {}
    if tiers is not None:
        kwargs["quantization_config"] = dynaexq.DynaExqConfig(**{"hbm_budget": AMPLE, "tiers": tiers} | options)
    if layout:
        kwargs["distributed_config"] = DistributedConfig(**layout)
    return AutoModelForCausalLM.from_pretrained(directory, **kwargs)


def observed(model: nn.Module) -> dict[str, Any]:
    """What there is to say about a patched model that has answered."""
    rt = model.dynaexq
    return {
        "logits": tiny.logits(model),
        "mass": rt.routed_mass(),
        "memory": rt.memory(),
        "dense": sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in [*model.parameters(), *model.buffers()]),
        "tiers": rt.tiers(),
        "tokens": tiny.generated(model),
    }


def answers(directory: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every model in every layout."""
    return {
        (layout, name): observed(load(directory / checkpoint, tiers, LAYOUTS[layout]))
        for layout in LAYOUTS
        for name, (checkpoint, tiers) in MODELS.items()
    }


def stock_answers(directory: Path) -> dict[str, torch.Tensor]:
    return {layout: tiny.logits(load(directory / "source", None, LAYOUTS[layout])) for layout in LAYOUTS}


def whole_experts_at_two_precisions(directory: Path) -> dict[str, Any]:
    """Tensor parallel, the second rank without a single upgrade."""
    model = load(directory / "source", ("int2", "int8"), LAYOUTS["tp"])
    memory = model.dynaexq.memory()
    if dist.get_rank() == 1:
        model.dynaexq.set_budget(memory["total"] - memory["upgrade"])
    return observed(model)


def gradients(directory: Path) -> dict[str, list[torch.Tensor]]:
    """Of parameters before the experts and of the router, for each layout."""
    return {layout: gradients_of(load(directory / "source", ("int4",), LAYOUTS[layout])) for layout in LAYOUTS}


def gradients_of(model: Any) -> list[torch.Tensor]:
    ids = tiny.prompt()
    model.train()(ids, labels=ids).loss.backward()
    layer = model.model.layers[0]
    grads = [p.weight.grad for p in (model.model.embed_tokens, layer.self_attn.o_proj, layer.mlp.gate)]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def one_rank_idle(directory: Path) -> dict[str, Any]:
    """One token, exchanged, whose experts are both with the first rank."""
    model = load(directory / "source", ("int4",), LAYOUTS["ep by exchange"])
    tiny.steer(model, [[[0, 1]], [[0, 1]]])
    tiny.logits(model, tiny.prompt(batch=1, length=1))
    return {"mass": model.dynaexq.routed_mass()}


def traffic_on_cold_experts(directory: Path) -> dict[str, Any]:
    """Room for half the upgrades on each rank, and all traffic on one expert a rank and layer that has none."""
    model = load(directory / "source", ("int2", "int8"), SIZES, half_life=16, update_interval=4, auto_pause=False)
    rt = model.dynaexq
    memory = rt.memory()
    budget = memory["total"] - memory["upgrade"] // 2
    rt.set_budget(budget)
    cold = [[routes[0][0]] for routes in tiny.cold_routes(model)]
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, cold)
    tiny.steer(model, [[[first[0], 4 + second[0]]] for first, second in zip(*everywhere, strict=True)])
    for _ in range(8):
        tiny.logits(model)
        rt.drain()
    return {"cold": cold, "tiers": rt.tiers(), "memory": rt.memory(), "budget": budget, "logits": tiny.logits(model)}


def budget_below_the_base_of_all(directory: Path) -> dict[str, Any]:
    """What one rank holds at the least, and what it holds if it is given no more than that; of both checkpoints."""
    found = {}
    for source, tiers in (("source", ("int4", "int8")), ("packed", ("int2",))):
        model = load(directory / source, tiers, SIZES)
        memory = model.dynaexq.memory()
        least = memory["total"] - memory["upgrade"]
        tight = load(directory / source, tiers, SIZES, hbm_budget=least)
        found[source] = least, tight.dynaexq.memory()
    return found


def without_parallel_plans() -> AbstractContextManager[object]:
    """Transformers as it was before 5.21, when quantizers were not shown the plans."""
    if not has_parallel_plans():
        return nullcontext()
    kept = {name: value for name, value in vars(HfQuantizer).items() if name != "update_parallel_plan"}
    old = type("HfQuantizer", HfQuantizer.__bases__, kept)
    return patch("transformers.quantizers.base.HfQuantizer", old)


def loaded_by_an_old_transformers(directory: Path) -> object:
    with without_parallel_plans():
        return load(directory / "source", ("int4",), LAYOUTS["tp"])


EXPERTS = "model.layers.*.mlp.experts"
PREVENTED: dict[str, Callable[[Path], object]] = {
    "pipeline parallel": lambda at: load(at / "source", ("int4",), {"pp_size": 2}),
    "fsdp": lambda at: load(at / "source", ("int4",), {"fsdp_size": 2}),
    "uneven": lambda at: load(at / "uneven", ("int4",), SIZES),
    "split inside": lambda at: load(
        at / "source", ("int4",), {"tp_size": 2, "tp_plan": {f"{EXPERTS}.down_proj": "rowwise"}}
    ),
    "shared in two ways": lambda at: load(
        at / "source", ("int4",), SIZES | {"ep_plan": {f"{EXPERTS}.down_proj": "rowwise"}}
    ),
    "shared without exchange": lambda at: load(at / "source", ("int4",), SIZES | {"ep_plan": {EXPERTS: "replicate"}}),
    "dense": lambda at: load(at / "source", ("int4",), {"tp_size": 2}, dense="bnb-8bit"),
    "patch of experts shared out": lambda at: dynaexq.patch(load(at / "source", None, SIZES), AMPLE),
    "patch of experts split": lambda at: dynaexq.patch(load(at / "source", None, LAYOUTS["tp"]), AMPLE),
    "save of experts shared out": lambda at: load(at / "source", ("fp16",), SIZES).save_pretrained(at / "saved"),
    "save of whole experts": lambda at: load(at / "source", ("fp16",), LAYOUTS["tp"]).save_pretrained(at / "saved"),
    "unpatch": lambda at: dynaexq.unpatch(load(at / "source", ("fp16",), SIZES)),
}
if "dp_replicate_size" in OPTIONS:
    PREVENTED["replicas"] = lambda at: load(at / "source", ("int4",), {"dp_replicate_size": 2})
if "ep_implementation" in OPTIONS:
    PREVENTED["megamoe"] = lambda at: load(at / "source", ("int4",), SIZES | {"ep_implementation": "deepgemm_megamoe"})


def refusals(directory: Path) -> dict[str, str]:
    """How everything that must not work is refused."""
    return {name: refusal(attempt, directory) for name, attempt in PREVENTED.items()}


def refusal_of_an_old_transformers(directory: Path) -> str:
    return refusal(loaded_by_an_old_transformers, directory)


def refusal(attempt: Callable[[Path], object], directory: Path) -> str:
    try:
        attempt(directory)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


CASES: tuple[Callable[[Path], Any], ...] = (refusal_of_an_old_transformers,)
if has_parallel_plans():
    CASES += (
        answers,
        stock_answers,
        gradients,
        whole_experts_at_two_precisions,
        one_rank_idle,
        traffic_on_cold_experts,
        budget_below_the_base_of_all,
        refusals,
    )


def run(rank: int, directory: Path) -> None:
    """Run all cases as one of two ranks, and leave in `directory` what was found; of a case that failed, why."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    meeting = f"file://{directory / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save({case.__name__: outcome(case, directory) for case in CASES}, directory / f"found-{rank}.pt")
    dist.destroy_process_group()


def outcome(case: Callable[[Path], Any], directory: Path) -> Any:
    try:
        return case(directory)
    except Exception:
        return RuntimeError(traceback.format_exc())
