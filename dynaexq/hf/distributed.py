"""A model spread over ranks: what distributed loading may do to its experts, and which of them are this rank's.

Under expert parallelism Transformers shards the parameters that stand in for the experts, so they show each rank its
share, and brings the experts their tokens. Under tensor parallelism alone experts are whole on every rank. This knows
the plans and styles of Transformers; it reads no weights, and what a rank does with its experts is not its business.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from dynaexq.errors import UnsupportedModelError
from dynaexq.hf.compat import has_parallel_plans, is_distributed
from dynaexq.hf.discovery import SparseLayer

SIZES = ("tp_size", "ep_size", "pp_size", "fsdp_size", "dp_replicate_size")
_FSDP = "FSDP shards and gathers parameters, and packed experts are none"
UNSUPPORTED_SIZES = {
    "pp_size": "pipeline parallelism gives each rank other layers, and precision is planned for all of them at once",
    "fsdp_size": _FSDP,
    "dp_replicate_size": _FSDP,
}
MEGAMOE = "deepgemm_megamoe"
WHOLE_EXPERTS = "dynaexq_whole_experts"


class WholeExperts(TensorParallelLayer):
    """The style of experts under tensor parallelism: every rank answers with what the first one computed.

    Ranks upgrade an expert when their own copies arrive, so for a while they hold it at different precisions. If they
    answered differently they would soon write different tokens, and wait for each other for ever.
    """

    def transform_output_post_forward(self, module: nn.Module, output: Tensor, mesh: Any) -> Tensor:
        dist.broadcast(output.detach(), group=mesh.get_group(), group_src=0)
        return output


ALL_PARALLEL_STYLES.register(WHOLE_EXPERTS, WholeExperts())


def sizes_of(config: Any) -> tuple[int, int]:
    """Ranks that split the dense weights, and ranks that share out the experts; (1, 1) in one process."""
    sizes = _sizes(config)
    return sizes["tp_size"], sizes["ep_size"]


def _sizes(config: Any) -> dict[str, int]:
    distribution = getattr(config, "distributed_config", None)
    return {name: getattr(distribution, name, None) or 1 for name in SIZES}


def check_distribution(config: Any, layers: Sequence[SparseLayer], dense: str | None) -> None:
    """Refuse what ranks cannot share correctly; does nothing for a model that is loaded in one process.

    Raises:
        UnsupportedModelError: the way of sharing, this Transformers, or a number that does not divide.
    """
    distribution, sizes = getattr(config, "distributed_config", None), _sizes(config)
    if all(size == 1 for size in sizes.values()):
        return
    if not has_parallel_plans():
        raise UnsupportedModelError(
            f"Transformers {transformers.__version__} does not let a quantizer edit the parallel plans of a model "
            "(HfQuantizer.update_parallel_plan), so packed experts would be split wrongly; upgrade to 5.21 or later, "
            "or load the model in one process"
        )
    for name, reason in UNSUPPORTED_SIZES.items():
        if sizes[name] > 1:
            raise UnsupportedModelError(f"{name}={sizes[name]}: {reason}; use tp_size and ep_size")
    if dense is not None:
        raise UnsupportedModelError(f"dense={dense!r}: layers of bitsandbytes cannot be split; leave it out")
    if layers[0].num_experts % sizes["ep_size"]:
        raise UnsupportedModelError(
            f"{layers[0].num_experts} experts cannot be shared out evenly among ep_size={sizes['ep_size']} ranks; "
            "choose a number that divides them"
        )
    _check_overrides(distribution, layers)


def _check_overrides(distribution: Any, layers: Sequence[SparseLayer]) -> None:
    """Refuse what would be applied on top of the plans as this module edits them."""
    rules = _rules_of_experts(distribution.tp_plan if isinstance(distribution.tp_plan, dict) else {}, layers)
    if rules:
        raise UnsupportedModelError(
            f"tp_plan has rules for experts ({', '.join(rules)}), and packed experts are not split inside; leave the "
            "rules out, or share whole experts out with ep_size"
        )
    experts_config = getattr(layers[0].experts, "config", None)
    implementations = (
        getattr(distribution, "ep_implementation", None),
        getattr(experts_config, "_experts_implementation", None),
    )
    if MEGAMOE in implementations:
        raise UnsupportedModelError(f"{MEGAMOE} exchanges tokens in a kernel that reads 16-bit experts; leave it out")


def edit_tensor_plan(plan: dict[str, str], layers: Sequence[SparseLayer]) -> None:
    """Drop the rules that split experts inside and sum what the parts answer: they are whole on every rank."""
    if not plan:  # Transformers refuses such a model, and must still see why
        return
    for rule in _rules_of_experts(plan, layers):
        del plan[rule]
    plan.update(dict.fromkeys(_paths(layers), WHOLE_EXPERTS))


def share_of(model: nn.Module, layers: Sequence[SparseLayer]) -> tuple[int, int]:
    """This rank's number among those that share out the experts, and how many they are; (0, 1) where all are whole.

    Raises:
        UnsupportedModelError: the parameters that stand in for the experts were sharded in any other way, or nothing
            was put round their forwards that makes ranks answer as one.
    """
    shares = {_share(parameter) for layer in layers for parameter in layer.experts._parameters.values()} or {(0, 1)}
    share = shares.pop()
    joined = not is_distributed(model) or all("forward" in vars(layer.experts) for layer in layers)
    if shares or share is None or not joined:
        raise UnsupportedModelError(
            f"the parallel plans neither share out {layers[0].name} and its like by whole experts, nor keep them "
            "whole; leave the rules for experts to the plans of the model"
        )
    return share


def _share(parameter: Any) -> tuple[int, int] | None:
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return 0, 1
    by_expert = len(parameter.placements) == 1 and parameter.placements[0].is_shard(0)
    return (mesh.get_local_rank(), mesh.size()) if by_expert else None


def _rules_of_experts(plan: dict[str, str], layers: Sequence[SparseLayer]) -> list[str]:
    paths = _paths(layers)
    return [rule for rule in plan if any(rule == path or rule.startswith(f"{path}.") for path in paths)]


def _paths(layers: Sequence[SparseLayer]) -> list[str]:
    """The layers' paths as plans write them, with a wildcard for the number."""
    return sorted({re.sub(r"\.\d+(?=\.|$)", ".*", layer.name) for layer in layers})
