"""Model specs made of the sizes that a test names."""

from dynaexq.planning.budget import ModelSpec, TierPair


def spec(
    choices: list[TierPair],
    num_layers: int,
    num_experts: int,
    dense: int = 0,
    workspace: int = 0,
    offered: list[TierPair] | None = None,
) -> ModelSpec:
    """What planning knows of a model with these choices of tiers."""
    sizes = {"experts": 0, "num_weights": 0, "dense": dense, "workspace": workspace, "quantizer": "als"}
    return ModelSpec(
        "a model", "bfloat16", num_layers, num_experts, choices=tuple(choices), offered=tuple(offered or ()), **sizes
    )
