"""Dense layers in 4 and 8 bits beside packed experts, by whichever door, saved and reloaded, and within the budget."""

from pathlib import Path

import bitsandbytes
import patching
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import dynaexq
from dynaexq.errors import SettingsError, UnpatchError

AMPLE = 10**6
OPTIONS = {"hbm_budget": AMPLE, "tiers": ("int2", "int4")}
LINEAR = {"bnb-4bit": bitsandbytes.nn.Linear4bit, "bnb-8bit": bitsandbytes.nn.Linear8bitLt}

each_format = pytest.mark.parametrize("dense", LINEAR)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    tiny.tiny_qwen3_moe().save_pretrained(directory)
    return directory


def patched(source: Path, dense: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(source)
    patching.patch(model, dense=dense, **OPTIONS)
    return model


def loaded(source: Path, dense: str) -> nn.Module:
    config = dynaexq.DynaExqConfig(dense=dense, **OPTIONS)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


def loaded_by_bitsandbytes_first(source: Path, dense: str) -> nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=dense == "bnb-4bit",
        load_in_8bit=dense == "bnb-8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    patching.patch(model, **OPTIONS)
    return model


@each_format
def test_every_door_gives_the_same_model_and_the_checkpoint_gives_it_again(
    source: Path, tmp_path: Path, dense: str
) -> None:
    answer = tiny.logits(patched(source, dense))
    for name, make in {"patched": patched, "loaded": loaded, "first": loaded_by_bitsandbytes_first}.items():
        model = make(source, dense)
        assert torch.equal(tiny.logits(model), answer)
        assert type(model.model.layers[0].self_attn.q_proj) is LINEAR[dense]
        assert type(model.lm_head) is nn.Linear
        model.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(tiny.logits(again), answer)
        assert type(again.model.layers[0].self_attn.q_proj) is LINEAR[dense]


@each_format
def test_what_bitsandbytes_keeps_beside_the_weights_is_in_the_budget(source: Path, dense: str) -> None:
    model = patched(source, dense)
    tiny.logits(model)
    found = model.dynaexq.memory()["dense"]
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    rows = sum(m.out_features for m in model.modules() if type(m) is LINEAR["bnb-8bit"])
    scales = 4 * rows if dense == "bnb-8bit" else 0
    assert found == weights + scales if scales else found > weights
    assert found < AutoModelForCausalLM.from_pretrained(source).get_memory_footprint()


def test_dense_layers_that_were_freed_cannot_be_unpatched_and_the_model_works_on(source: Path) -> None:
    model = patched(source, "bnb-4bit")
    before = tiny.logits(model)
    with pytest.raises(UnpatchError, match="the dense layers were quantized by patch, and the originals freed"):
        dynaexq.unpatch(model)
    assert torch.equal(tiny.logits(model), before)


def test_another_dense_format_than_the_one_that_was_saved_is_refused(source: Path, tmp_path: Path) -> None:
    loaded(source, "bnb-4bit").save_pretrained(tmp_path / "packed")
    with pytest.raises(SettingsError, match="dense='bnb-8bit' cannot be had from a checkpoint saved with 'bnb-4bit'"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", quantization_config=dynaexq.DynaExqConfig(dense="bnb-8bit")
        )


def test_dense_layers_of_a_packed_checkpoint_can_be_quantized_when_it_is_loaded(source: Path, tmp_path: Path) -> None:
    config = dynaexq.DynaExqConfig(**OPTIONS)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(tmp_path / "packed")
    assert torch.equal(tiny.logits(loaded(tmp_path / "packed", "bnb-4bit")), tiny.logits(patched(source, "bnb-4bit")))


def test_a_failure_gives_the_dense_layers_back(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    before = tiny.anatomy(model)

    def failing(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dynaexq.hf.model_patch.install_output_capturing", failing)
    with pytest.raises(KeyboardInterrupt):
        patching.patch(model, dense="bnb-4bit", **OPTIONS)
    assert tiny.anatomy(model) == before


def test_a_format_that_there_is_not_is_refused(source: Path) -> None:
    with pytest.raises(SettingsError, match="dense must be one of 'bnb-4bit', 'bnb-8bit', got 'int4'"):
        loaded(source, "int4")
