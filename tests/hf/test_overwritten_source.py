"""A 16-bit checkpoint that is overwritten while a model lives on it changes nothing: copies fail, and say why."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import dynaexq
from dynaexq.memory import DiskStore


def loaded(directory: Path, tiers: tuple[str, ...]) -> nn.Module:
    config = dynaexq.DynaExqConfig(hbm_budget="10MB", tiers=tiers, policy="frozen", quantizer="rtn")
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # away from the file that Transformers has mapped
    return model


def overwrite(directory: Path) -> None:
    """Put the weights of another model into the very file, as a download in place does."""
    shard = directory / "model.safetensors"
    with torch.no_grad():
        other = tiny.tiny_qwen3_moe()
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(directory / "other")
    with open(shard, "r+b") as file:
        file.write((directory / "other" / "model.safetensors").read_bytes())


def test_upgrades_of_another_model_are_not_published(tmp_path: Path) -> None:
    tiny.tiny_qwen3_moe().save_pretrained(tmp_path)
    model = loaded(tmp_path, ("int4", "fp16"))
    runtime = model.dynaexq
    memory = runtime.memory()
    runtime.set_budget(memory["total"] - memory["upgrade"] + 8)
    assert runtime.stats()["upgraded"] == 0
    before = tiny.logits(model)
    overwrite(tmp_path)
    runtime.set_budget("10MB")
    assert runtime.stats()["upgraded"] == 0
    assert torch.equal(tiny.logits(model), before)
    health = runtime.health()
    assert health.state == "standing still"
    assert "model.safetensors was overwritten or damaged since" in health.why


def test_unpatch_does_not_bring_back_another_model(tmp_path: Path) -> None:
    tiny.tiny_qwen3_moe().save_pretrained(tmp_path)
    model = loaded(tmp_path, ("int4", "int8"))
    before = tiny.logits(model)
    overwrite(tmp_path)
    with pytest.raises(dynaexq.UnpatchError, match=r"cannot be read any more: .* was overwritten or damaged since"):
        dynaexq.unpatch(model)
    assert torch.equal(tiny.logits(model), before)


def test_a_disk_that_damages_an_upgrade_is_a_failed_copy() -> None:
    store, block, out = DiskStore(2, 256), torch.arange(256).to(torch.uint8), torch.empty(256, dtype=torch.uint8)
    store.write(1, block[None])
    store.read_into(1, out)
    assert torch.equal(out, block)
    with open(f"/proc/self/fd/{store._file.fileno()}", "r+b") as file:
        file.seek(300)
        file.write(b"\xff")
    with pytest.raises(dynaexq.StoreError, match="upgrade of expert 1 does not match its checksum"):
        store.read_into(1, out)
    store.close()
