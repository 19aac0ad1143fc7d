"""One interface for every family: patched at 16 bits, a model gives the bits it gave; below that it comes near;
unpatched, it is what it was. Families that do not offer the seam are refused by name.

A family that the installed Transformers lacks is skipped; at least 25 must be there.
"""

from pathlib import Path

import patching
import pytest
import torch
import transformers
from models import TINY_FAMILIES, is_known, tiny_model, tokens
from numerics import assert_close
from tiny import anatomy
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import dynaexq

PLENTY = "1GiB"

# bfloat16 tells orders and widths of summation apart. In it nemotron_h adds experts up in float32, which no flag of
# the interface says, and inkling2_text does not run at all.
DTYPES = {"nemotron_h": torch.float32, "inkling2_text": torch.float32}

# Transformers 5.17 reads some of their weights as float32, whatever was saved.
DTYPES_IN_FILES = DTYPES | dict.fromkeys(("deepseek_v4", "hy_v4", "inkling_text"), torch.float32)


@pytest.fixture(params=TINY_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    if not is_known(request.param):
        pytest.skip(f"Transformers {transformers.__version__} has no {request.param} with the experts interface")
    return request.param


@torch.no_grad()
def answer(model: PreTrainedModel) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    return model(tokens())[0]


def patch(model: PreTrainedModel, *tiers: str) -> dynaexq.Runtime:
    return dynaexq.patch(model, PLENTY, tiers=tiers, device="cpu")


def expert_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that experts hold themselves, as against a norm of theirs."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if hasattr(module, "has_gate")
        for name in module._parameters
    }


def test_at_least_25_families_are_tested_with_this_version_of_transformers():
    assert len([family for family in TINY_FAMILIES if is_known(family)]) >= 25


def test_at_16_bits_a_family_answers_with_the_same_bits_and_again_once_unpatched(family):
    model = tiny_model(family, DTYPES.get(family, torch.bfloat16))
    before, keys = answer(model), model.state_dict().keys()
    patch(model, "fp16")
    assert torch.equal(answer(model), before)
    dynaexq.unpatch(model)
    assert torch.equal(answer(model), before)
    assert model.state_dict().keys() == keys


def test_only_the_experts_leave_a_family_and_unpatching_brings_them_back(family):
    model = tiny_model(family)
    paths = [path for path, _ in model.named_modules()]
    parameters, keys, experts = dict(model.named_parameters()), list(model.state_dict()), expert_parameters(model)
    assert experts
    patch(model, "int4", "fp16")
    assert [path for path, _ in model.named_modules()] == paths
    assert [name for name, _ in model.named_parameters()] == [name for name in parameters if name not in experts]
    assert list(model.state_dict()) == keys
    dynaexq.unpatch(model)
    assert [path for path, _ in model.named_modules()] == paths
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_nemotron_h_is_met_within_one_rounding_where_it_adds_up_in_float32():
    model = tiny_model("nemotron_h", torch.bfloat16)
    experts = next(module for module in model.modules() if hasattr(module, "has_gate"))
    rows, index = torch.randn(32, 64, dtype=torch.bfloat16), torch.rand(32, 8).argsort(1)[:, :3]
    args = rows, index, torch.rand(32, 3)
    with torch.no_grad():
        before = experts(*args)
        patch(model, "fp16")
        assert_close("nemotron_h", before, experts(*args), torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize("tiers", [("int2", "int4"), ("int4", "fp16")], ids="+".join)
def test_with_half_of_its_experts_upgraded_a_family_answers_near_by_and_its_routing_is_observed(family, tiers):
    model = tiny_model(family)
    before = answer(model)
    runtime = patch(model, *tiers)
    memory = runtime.memory()
    runtime.set_budget(memory["total"] - memory["upgrade"] // 2)
    after = answer(model)
    runtime.tick()
    stats = runtime.stats()
    assert stats["upgraded"] == stats["experts"] // 2
    assert stats["tokens"] == tokens().numel()
    assert after.isfinite().all()
    assert 0 < (after - before).norm() / before.norm() < 1


def test_each_step_down_the_ladder_costs_accuracy():
    families = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
    error = dict.fromkeys(("int2", "int4", "int8"), 0.0)
    for family in families:
        before = answer(tiny_model(family))
        for tier in error:
            model = tiny_model(family)
            patch(model, tier)
            error[tier] += float((answer(model) - before).norm() / before.norm())
    # A bit halves the step between two codes, so two bits are worth about 4 and four bits about 16.
    assert error["int2"] > 2 * error["int4"], error
    assert error["int4"] > 8 * error["int8"], error


@pytest.mark.parametrize(
    ("family", "found", "sizes"),
    [
        ("llama4_text", "found Llama4TextExperts", {}),
        ("jetmoe", "found JetMoeParallelExperts", {"kv_channels": 16}),
        ("dbrx", "found DbrxExpertGLU, DbrxExperts", {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}}),
        (
            "switch_transformers",
            "found SwitchTransformersExperts, which do not follow it; experts of this kind are not",
            {},
        ),
        ("llama", "found none; dense models need no dynaexq", {}),
    ],
)
def test_a_family_without_the_interface_is_refused_by_name_and_left_alone(family, found, sizes):
    model = tiny_model(family, **sizes)
    before = anatomy(model)
    with pytest.raises(dynaexq.UnsupportedModelError, match=f"in {type(model).__name__}, {found}"):
        patch(model, "fp16")
    assert anatomy(model) == before


# inkling2_text cannot be saved by Transformers itself with so small a vocabulary.
UNSAVABLE = {"inkling2_text"}


def test_a_family_is_loaded_saved_and_reloaded_to_the_same_bits_and_guarded_against_others(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family in UNSAVABLE:
        pytest.skip("Transformers cannot save it")
    model = tiny_model(family, DTYPES_IN_FILES.get(family, torch.bfloat16))
    model.save_pretrained(tmp_path / "source")
    config = dynaexq.DynaExqConfig(hbm_budget=PLENTY, tiers=("int2", "int4"), quantizer="rtn")
    loaded = type(model).from_pretrained(tmp_path / "source", quantization_config=config).eval()
    patching.patch(model, PLENTY, tiers=("int2", "int4"), quantizer="rtn")
    assert torch.equal(answer(loaded), answer(model))
    loaded.save_pretrained(tmp_path / "packed")
    assert torch.equal(answer(type(model).from_pretrained(tmp_path / "packed").eval()), answer(model))
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "dynaexq")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path / "packed")
