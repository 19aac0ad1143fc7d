"""Experts shared out among two ranks, or whole on both: they answer as one process does, or refuse to start.

Two processes run all cases of `ranks` once, over gloo; what they found is judged here.
"""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tiny
import torch
import transformers
from models import tiny_model
from ranks import AMPLE, LAYOUTS, MODELS, PREVENTED

import dynaexq
from dynaexq.errors import BudgetError
from dynaexq.hf.compat import has_parallel_plans

TIME_LIMIT = 120  # seconds

# Of logits up to 5. Ranks add up attention in another order; stock Transformers is as far from one process.
TOLERANCE = 1e-5

needs_plans = pytest.mark.skipif(
    not has_parallel_plans(), reason=f"Transformers {transformers.__version__} loads nothing packed on several ranks"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints that the ranks load."""
    directory = tmp_path_factory.mktemp("ranks")
    tiny.tiny_qwen3_moe(torch.float32, num_key_value_heads=2).save_pretrained(directory / "source")
    tiny.tiny_qwen3_moe(torch.float32, num_key_value_heads=2, num_experts=7).save_pretrained(directory / "uneven")
    ranks.load(directory / "source", ("int2", "int8"), {}).save_pretrained(directory / "packed")
    for family in ("gpt_oss", "deepseek_v3"):
        tiny_model(family).save_pretrained(directory / family)
    return directory


@pytest.fixture(scope="module")
def alone(directory: Path) -> dict[str, dict[str, Any]]:
    """What one process finds."""
    return {name: ranks.observed(ranks.load(directory / at, tiers, {})) for name, (at, tiers) in MODELS.items()}


@pytest.fixture(scope="module")
def found(directory: Path, alone: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What each of the two ranks found; `alone` has compiled the kernel before they wait for each other."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=ranks.run, args=(rank, directory), daemon=True) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIME_LIMIT)
        assert [process.exitcode for process in processes] == [0, 0], "a rank fell, or was not done in time"
    finally:
        for process in processes:
            process.kill()
    return [torch.load(directory / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


def both(found: list[dict[str, Any]], case: str) -> list[Any]:
    """What both ranks found in `case`."""
    for rank in found:
        if isinstance(rank[case], Exception):
            raise rank[case]
    return [rank[case] for rank in found]


each_model = pytest.mark.parametrize("name", MODELS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@needs_plans
@each_layout
def test_stock_transformers_keeps_the_tolerance_and_has_use_for_it(
    found: list[dict[str, Any]], directory: Path, layout: str
) -> None:
    expected = tiny.logits(ranks.load(directory / "source", None, {}))
    for answer in both(found, "stock_answers"):
        assert TOLERANCE / 100 < distance(answer[layout], expected) < TOLERANCE


@needs_plans
@each_model
@each_layout
def test_two_ranks_answer_and_write_as_one_process_does(
    found: list[dict[str, Any]], alone: dict[str, dict[str, Any]], layout: str, name: str
) -> None:
    for answers in both(found, "answers"):
        ours, expected = answers[layout, name], alone[name]
        assert distance(ours["logits"], expected["logits"]) < TOLERANCE
        assert ours["tokens"] == expected["tokens"]


@needs_plans
@each_layout
def test_gradients_flow_through_experts_as_in_one_process(
    found: list[dict[str, Any]], directory: Path, layout: str
) -> None:
    expected = ranks.gradients_of(ranks.load(directory / "source", ("int4",), {}))
    for gradients in both(found, "gradients"):
        for ours, theirs in zip(gradients[layout], expected, strict=True):
            assert distance(ours, theirs) < TOLERANCE * float(theirs.abs().max())


@needs_plans
def test_a_distribution_over_one_rank_changes_nothing(
    directory: Path, tmp_path: Path, alone: dict[str, dict[str, Any]]
) -> None:
    model = ranks.load(directory / "source", ("int2", "int8"), {"tp_size": 1})
    assert torch.equal(tiny.logits(model), alone["int2-int8"]["logits"])
    model.save_pretrained(tmp_path)
    dynaexq.unpatch(model)
    assert torch.equal(tiny.logits(model), tiny.logits(ranks.load(directory / "source", None, {})))


@needs_plans
def test_what_fits_on_each_rank_is_loaded_though_no_rank_could_hold_all(
    found: list[dict[str, Any]], directory: Path
) -> None:
    for sources in both(found, "budget_below_the_base_of_all"):
        for source, (least, memory) in sources.items():
            assert memory["total"] == least == memory["budget"]
            with pytest.raises(BudgetError, match="is too small"):
                ranks.load(directory / source, ("int4",) if source == "source" else ("int2",), {}, hbm_budget=least)


@needs_plans
@each_model
@each_layout
def test_each_rank_keeps_its_own_share_within_its_own_budget(
    found: list[dict[str, Any]], alone: dict[str, dict[str, Any]], layout: str, name: str
) -> None:
    shares = 1 if layout == "tp" else 2
    for answers in both(found, "answers"):
        ours, expected = answers[layout, name], alone[name]
        assert ours["tiers"].shape == (len(expected["tiers"]), 8 // shares)
        for part in ("base", "upgrade"):
            assert ours["memory"][part] * shares == expected["memory"][part]
        assert ours["memory"]["dense"] == ours["dense"] < expected["memory"]["dense"]
        assert ours["memory"]["total"] <= ours["memory"]["budget"] == AMPLE


@needs_plans
def test_only_routes_to_experts_of_the_rank_count_as_heat(
    found: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    answers = both(found, "answers")
    if "ep by sum" in LAYOUTS:
        summed = np.concatenate([rank["ep by sum", "int4"]["mass"] for rank in answers], axis=1)
        np.testing.assert_allclose(summed, alone["int4"]["mass"], rtol=1e-4)
    exchanged = np.concatenate([rank["ep by exchange", "int4"]["mass"] for rank in answers], axis=1)
    assert (exchanged.sum(axis=1) == 2 * tiny.prompt().numel()).all(), "one for each route, wherever its token was"
    for rank in answers:
        np.testing.assert_allclose(rank["tp", "int4"]["mass"], alone["int4"]["mass"], rtol=1e-4)


@needs_plans
def test_the_row_of_zeros_that_an_idle_rank_is_called_with_is_no_heat(found: list[dict[str, Any]]) -> None:
    first, second = both(found, "one_rank_idle")
    assert first["mass"].tolist() == [[1, 1, 0, 0]] * 2
    assert not second["mass"].any()


@needs_plans
def test_whole_experts_answer_alike_on_ranks_that_hold_them_at_different_precisions(
    found: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    first, second = both(found, "whole_experts_at_two_precisions")
    assert (first["tiers"] == 8).all()
    assert (second["tiers"] == 2).all()
    assert torch.equal(first["logits"], second["logits"])
    assert first["tokens"] == second["tokens"] == alone["int2-int8"]["tokens"]
    assert distance(first["logits"], alone["int2-int8"]["logits"]) < TOLERANCE


@needs_plans
def test_precision_follows_the_traffic_on_each_rank_within_its_budget(found: list[dict[str, Any]]) -> None:
    results = both(found, "traffic_on_cold_experts")
    for rank in results:
        for layer, (expert,) in enumerate(rank["cold"]):
            assert rank["tiers"][layer, expert] == 8
        assert (rank["tiers"] == 8).sum() == rank["tiers"].size // 2
        assert rank["memory"]["total"] <= rank["memory"]["budget"] == rank["budget"]
    assert torch.equal(results[0]["logits"], results[1]["logits"])


REFUSALS = {
    "pipeline parallel": "UnsupportedModelError: pp_size=2: pipeline parallelism gives each rank other layers",
    "fsdp": "UnsupportedModelError: fsdp_size=2: FSDP shards and gathers",
    "replicas": "UnsupportedModelError: dp_replicate_size=2: FSDP shards and gathers",
    "uneven": "UnsupportedModelError: 7 experts cannot be shared out evenly among ep_size=2 ranks",
    "split inside": "UnsupportedModelError: tp_plan has rules for experts (model.layers.*.mlp.experts.down_proj)",
    "shared in two ways": "UnsupportedModelError: the parallel plans neither share out model.layers.0.mlp.experts",
    "shared without exchange": "UnsupportedModelError: the parallel plans neither share out model.layers.0.mlp.exp",
    "megamoe": "UnsupportedModelError: deepgemm_megamoe exchanges tokens in a kernel",
    "dense": "UnsupportedModelError: dense='bnb-8bit': layers of bitsandbytes cannot be split",
    "patch of experts shared out": "UnsupportedModelError: the model is spread over ranks already; pass quantization_",
    "patch of experts split": "UnsupportedModelError: the model is spread over ranks already; pass quantization_",
    "save of experts shared out": "PatchError: the model is spread over ranks, and none has all of it; load it in one",
    "save of whole experts": "PatchError: the model is spread over ranks, and none has all of it; load it in one",
    "unpatch": "UnpatchError: the model is spread over ranks, and was never whole; load it again",
}


@needs_plans
@pytest.mark.parametrize("name", PREVENTED)
def test_what_would_be_wrong_on_several_ranks_is_refused_on_all(
    found: list[dict[str, Any]], directory: Path, name: str
) -> None:
    for refusals in both(found, "refusals"):
        assert refusals[name].startswith(REFUSALS[name])
    assert not (directory / "saved").exists()


def test_a_transformers_that_shows_no_plans_loads_nothing_on_several_ranks(found: list[dict[str, Any]]) -> None:
    for refusal in both(found, "refusal_of_an_old_transformers"):
        assert refusal.startswith(f"UnsupportedModelError: Transformers {transformers.__version__} does not let")
        assert "upgrade to 5.21" in refusal
