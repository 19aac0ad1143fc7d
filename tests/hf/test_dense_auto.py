"""dense="auto": bytes go to dense layers or to upgrades, whichever loses less, and every door chooses the same."""

import json
import logging
from pathlib import Path

import patching
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import dynaexq
from dynaexq.cli.app import app
from dynaexq.errors import BudgetError, SettingsError
from dynaexq.hf.convert import quantize_checkpoint
from dynaexq.hf.model_size import inspect_checkpoint
from dynaexq.planning.budget import DENSE_LOSS, plan_memory, predicted_loss
from dynaexq.planning.hardware import CARDS
from dynaexq.runtime.linear import PackedLinear

TIERS = ("int2", "int4")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    tiny.tiny_qwen3_moe().save_pretrained(directory)
    return directory


def least(source: Path, dense: str | None) -> int:
    """Bytes with every expert at its base."""
    return inspect_checkpoint(source, dynaexq.DynaExqConfig(dense=dense, tiers=TIERS)).least()[0]


def best(source: Path, budget: int) -> str | None:
    """The format with the least predicted loss, found here by trying all."""
    losses = {}
    for dense in DENSE_LOSS:
        if least(source, dense) <= budget:
            spec = inspect_checkpoint(source, dynaexq.DynaExqConfig(dense=dense, tiers=TIERS))
            share = plan_memory(spec, budget).share_upgraded
            losses[dense] = predicted_loss("int2", "int4", share) + DENSE_LOSS[dense]
    return min(losses, key=lambda dense: losses[dense])


def budget_for(source: Path, dense: str | None) -> int:
    """The least budget, in steps, at which that format loses the least."""
    budgets = range(least(source, "int4"), 10**6, 2001)
    return next(budget for budget in budgets if best(source, budget) == dense)


def chosen(model: nn.Module) -> str | None:
    """The format of the dense layers, of what they are and not of what is said."""
    linear = model.model.layers[0].self_attn.q_proj
    return linear.codec.tiers[0] if isinstance(linear, PackedLinear) else None


def patched(source: Path, budget: int) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(source)
    patching.patch(model, hbm_budget=budget, tiers=TIERS, dense="auto", quantizer="rtn")
    return model


def loaded(source: Path, budget: int) -> nn.Module:
    config = dynaexq.DynaExqConfig(hbm_budget=budget, tiers=TIERS, dense="auto", quantizer="rtn")
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


@pytest.mark.parametrize("expected", [None, "int8", "int4"])
def test_every_door_takes_what_the_budget_asks_for(source: Path, tmp_path: Path, expected: str | None) -> None:
    budget = budget_for(source, expected)
    models = [patched(source, budget), loaded(source, budget)]
    assert [chosen(model) for model in models] == [expected] * 2
    assert models[0].dynaexq.settings.dense == expected
    assert models[0].dynaexq.memory()["total"] <= budget
    config = dynaexq.DynaExqConfig(hbm_budget=budget, tiers=TIERS, dense="auto", quantizer="rtn")
    quantize_checkpoint(source, tmp_path / "packed", config)
    kept = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert kept.get("dense") == expected
    models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))
    with torch.no_grad():
        for model in models:
            model.dynaexq.freeze()
        assert torch.equal(tiny.logits(models[0]), tiny.logits(models[1]))
    assert chosen(models[2]) == expected


def test_what_was_chosen_is_logged_and_what_fits_in_no_format_names_the_least(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    budget = budget_for(source, "int8")
    with caplog.at_level(logging.INFO, logger="dynaexq"):
        model = patched(source, budget)
    assert f'dense="auto" takes int8: {model.dynaexq.memory()["dense"]:,} bytes' in caplog.text
    with pytest.raises(BudgetError) as raised:
        patched(source, least(source, "int4") - 1)
    assert raised.value.least == least(source, "int4")


def test_a_packed_checkpoint_stays_as_it_was_packed(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    patching.patch(model, hbm_budget=10**6, tiers=TIERS, dense="int4", quantizer="rtn")
    model.save_pretrained(tmp_path / "packed")
    assert chosen(loaded(tmp_path / "packed", 10**6)) == "int4"


def test_it_is_chosen_for_one_budget_on_one_device(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="give hbm_budget"):
        quantize_checkpoint(source, tmp_path / "packed", dynaexq.DynaExqConfig(tiers=TIERS, dense="auto"))
    assert not (tmp_path / "packed").exists()
    config = dynaexq.DynaExqConfig(hbm_budget=10**6, tiers=TIERS, dense="auto")
    with pytest.raises(SettingsError, match="device_map names 2"):
        AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config, device_map={"model": "cpu", "lm_head": "disk"}
        )


def test_the_planner_shows_what_it_takes_on_one_card(source: Path) -> None:
    command = ["plan", str(source), "--tiers", "int2,int4", "--dense", "auto"]
    result = CliRunner().invoke(app, [*command, "--hbm-budget", f"{budget_for(source, 'int8')}B"])
    assert result.exit_code == 0, result.output
    assert "dense='int8'" in result.output or 'dense="int8"' in result.output
    assert len(CARDS) > 1
    result = CliRunner().invoke(app, command)
    assert result.exit_code
    assert "chosen for one card" in str(result.exception) + result.output
