"""PEFT on a patched model: adapters learn, are saved and merged; those of experts are refused, never left out."""

from pathlib import Path

import peft
import pytest
import tiny
import torch
from transformers import PreTrainedModel

import dynaexq
from dynaexq.errors import PatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def lora(**options: object) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | options)


def model_at(*tiers: str) -> PreTrainedModel:
    """A tiny float32 model, patched if tiers are named."""
    model = tiny.tiny_qwen3_moe(torch.float32)
    model.set_experts_implementation("eager")
    if tiers:
        dynaexq.patch(model, "1GiB", tiers=tiers)
    return model


def test_an_adapter_learns_on_a_patched_model_and_is_the_same_on_the_plain_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = peft.get_peft_model(model_at("int4", "fp16"), lora(init_lora_weights=True))
    ids, losses = tiny.prompt(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(model_at(), tmp_path / "adapter").eval()
    torch.testing.assert_close(tiny.logits(plain), tiny.logits(model), rtol=1e-4, atol=1e-4)
    again = peft.PeftModel.from_pretrained(model_at("int4", "fp16"), tmp_path / "adapter").eval()
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_a_peft_model_is_patched_from_outside_saves_its_adapter_and_is_saved_whole_once_merged(tmp_path: Path) -> None:
    adapted = peft.get_peft_model(model_at(), lora()).eval()
    runtime = dynaexq.patch(adapted, "1GiB", tiers=("int4", "int8"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(PatchError, match="adapters are attached to the model"):
        adapted.get_base_model().save_pretrained(tmp_path / "model")
    merged = adapted.merge_and_unload()
    assert merged.dynaexq is runtime
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(tiny.logits(type(merged).from_pretrained(tmp_path / "merged")), tiny.logits(merged))


@pytest.mark.parametrize("parameter", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
def test_adapters_of_experts_are_refused_where_they_are_attached(parameter: str, tmp_path: Path) -> None:
    config = lora(target_parameters=[parameter])
    with pytest.raises(PatchError, match="put adapters on experts, or change them, before patching"):
        peft.get_peft_model(model_at("fp16"), config)
    peft.get_peft_model(model_at(), config).save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="before patching"):
        peft.PeftModel.from_pretrained(model_at("fp16"), tmp_path)


def test_experts_are_not_loaded_into_a_patched_model_from_a_state_dict() -> None:
    with pytest.raises(PatchError, match="would be left out"):
        model_at("fp16").load_state_dict(model_at().state_dict(), strict=False)
