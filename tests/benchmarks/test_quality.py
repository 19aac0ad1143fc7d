"""The contestants of benchmarks/quality/quality.py: the paper's rule as the paper has it, and honest equal bytes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from specs import spec

from dynaexq.planning.budget import TIER_CHOICES, plan_memory
from dynaexq.quantization import tier_sizes
from dynaexq.types import ExpertShape

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks" / "quality"))

import quality_policies
import quality_three_tiers


def paper(delta: float, hotness: list[list[float]], upgraded: list[list[int]], slots: int) -> list[list[int]]:
    rule = quality_policies.PaperRule(delta)
    rule.runtime = SimpleNamespace(hotness=lambda: np.array(hotness))
    return rule(np.zeros((len(hotness), len(hotness[0]))), np.array(upgraded, dtype=bool), slots).astype(int).tolist()


def test_the_papers_rule_replaces_the_coldest_by_the_hottest_while_the_gap_exceeds_delta() -> None:
    hotness = [[0.1, 0.2, 0.35, 0.34]]
    assert paper(0.0, hotness, [[1, 1, 0, 0]], 2) == [[0, 0, 1, 1]]
    assert paper(0.2, hotness, [[1, 1, 0, 0]], 2) == [[0, 1, 1, 0]], "0.34 is not 0.2 hotter than 0.2"
    assert paper(0.3, hotness, [[1, 1, 0, 0]], 2) == [[1, 1, 0, 0]]


def test_the_papers_rule_gives_every_layer_its_share_whatever_the_others_have() -> None:
    hotness = [[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]]
    assert paper(0.0, hotness, [[0] * 4] * 2, 3) == [[1, 1, 0, 0], [0, 0, 0, 1]]
    assert paper(9.0, hotness, [[0] * 4, [1, 1, 1, 0]], 2) == [[1, 0, 0, 0], [0, 0, 1, 0]], "a surplus leaves"


@pytest.mark.parametrize("allowed", [(2, 4), (4, 8), (2, 8), (2, 4, 8)])
def test_an_oracle_spends_no_more_bits_than_it_has_and_on_the_hottest_first(allowed: tuple[int, ...]) -> None:
    mass = np.random.default_rng(0).dirichlet(np.ones(16), size=2)
    for bits in np.arange(allowed[0], allowed[-1] + 0.1, 0.3):
        depths = quality_three_tiers.assignment(mass, allowed, bits)
        assert set(np.unique(depths)) <= set(allowed)
        assert bits - 8 / mass.size < depths.mean() <= bits + 1e-9
        ranked = depths.flat[np.argsort(-mass, axis=None)]
        assert (np.diff(ranked) <= 0).sum() >= mass.size - 3, "a hotter expert is deeper, but for the last that fits"
    assert quality_three_tiers.assignment(mass, allowed, allowed[0] - 0.1) is None


RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "quality.json"


@pytest.mark.parametrize("row", json.loads(RESULTS.read_text())["bytes"], ids=lambda row: str(row["bits per weight"]))
def test_auto_takes_the_ladder_that_was_measured_best_of_these_bytes(row: dict[str, Any]) -> None:
    shape = ExpertShape(256, 64, 128, has_bias=False, transposed=False)  # the embedded model's
    pairs = tier_sizes(shape, torch.bfloat16, 64, 8, TIER_CHOICES)
    budget = int(4 * 32 * shape.num_weights * row["bits per weight"] / 8)
    plan = plan_memory(spec(pairs, 4, 32), budget)
    assert " + ".join(plan.tiers) == row["best that is offered"]


def test_a_share_of_the_gap_is_one_at_the_best_and_none_without_a_gap() -> None:
    assert quality_policies._covered(0.2, 0.3, 0.1) == pytest.approx(0.5)
    assert quality_policies._covered(0.1, 0.3, 0.1) == 1.0
    assert quality_policies._covered(0.1, 0.1, 0.1) is None
