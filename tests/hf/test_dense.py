"""Dense layers in 4 and 8 bits beside packed experts, by whichever door, saved and reloaded, and within the budget."""

from pathlib import Path

import bitsandbytes
import patching
import peft
import pytest
import tiny
import torch
from models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

import dynaexq
from dynaexq.cli.app import app
from dynaexq.errors import PatchError, QuantizationError, SettingsError, UnpatchError
from dynaexq.hf.convert import quantize_checkpoint
from dynaexq.hf.model_size import inspect_checkpoint
from dynaexq.runtime.linear import PackedLinear

AMPLE = 10**6
OPTIONS = {"hbm_budget": AMPLE, "tiers": ("int2", "int4")}
LINEAR = {
    "bnb-4bit": bitsandbytes.nn.Linear4bit,
    "bnb-8bit": bitsandbytes.nn.Linear8bitLt,
    "int4": PackedLinear,
    "int6": PackedLinear,
    "int8": PackedLinear,
}
OWN = ("int4", "int6", "int8")

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
    doors = {"patched": patched, "loaded": loaded}
    for name, make in (doors if dense in OWN else {**doors, "first": loaded_by_bitsandbytes_first}).items():
        model = make(source, dense)
        assert torch.equal(tiny.logits(model), answer)
        assert type(model.model.layers[0].self_attn.q_proj) is LINEAR[dense]
        assert type(model.lm_head) is (PackedLinear if dense in OWN else nn.Linear)
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
    assert found == weights + scales if scales or dense in OWN else found > weights
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
    with pytest.raises(
        SettingsError, match="dense must be one of 'auto', 'int8', 'int6', 'int4', 'bnb-8bit', 'bnb-4bit', got 'int2'"
    ):
        loaded(source, "int2")


@pytest.mark.parametrize(
    ("dense", "head", "expected"),
    [("int4", "int4", "int4"), ("int4", "int8", "int8"), ("int6", "int4", "int6"), ("int8", "int6", "int8")],
)
def test_a_head_has_the_precision_that_was_asked_for_and_no_less_than_the_others(
    source: Path, tmp_path: Path, dense: str, head: str, expected: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    patching.patch(model, dense=dense, head=head, **OPTIONS)
    assert model.lm_head.codec.tiers == (expected,)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.lm_head.codec.tiers == (expected,)
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_a_head_that_was_tied_gets_bytes_of_its_own_and_the_plan_knows(tmp_path: Path) -> None:
    tiny.tiny_qwen3_moe(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    model = patched(tmp_path / "tied", "int4")
    plan = inspect_checkpoint(tmp_path / "tied", dynaexq.DynaExqConfig(dense="int4", **OPTIONS))
    assert plan.dense == model.dynaexq.memory()["dense"]
    assert model.lm_head.codec.tiers == ("int6",)
    assert torch.equal(tiny.logits(loaded(tmp_path / "tied", "int4")), tiny.logits(model))
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert type(again.model.embed_tokens) is nn.Embedding
    assert again.dynaexq.memory()["dense"] == plan.dense


@pytest.mark.parametrize("dense", OWN)
def test_routers_and_what_is_tiny_stay_in_16_bit(dense: str) -> None:
    model = tiny.tiny_qwen3_next()
    patching.patch(model, dense=dense, **OPTIONS)
    kinds = {path: type(module) for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kinds["model.layers.0.mlp.shared_expert_gate"] is nn.Linear
    assert kinds["model.layers.0.mlp.shared_expert.up_proj"] is PackedLinear
    assert kinds["model.layers.0.linear_attn.in_proj_qkvz"] is PackedLinear
    assert kinds["model.layers.1.self_attn.q_proj"] is PackedLinear


def test_routers_that_are_linear_layers_stay_in_16_bit() -> None:
    model = tiny_model("jamba")
    dynaexq.patch(model, "1GiB", dense="int4", tiers=("int4",))
    routers = [module for path, module in model.named_modules() if path.endswith(".router")]
    assert routers
    assert not any(isinstance(router, PackedLinear) for router in routers)


def test_a_weight_that_no_code_represents_is_named_and_the_model_stays_as_it_was(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[1].self_attn.o_proj.weight.data[3, 5] = torch.inf
    before = tiny.anatomy(model)
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.self_attn\.o_proj: expected finite weights"):
        patching.patch(model, dense="int8", **OPTIONS)
    assert tiny.anatomy(model) == before


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("dense", OWN)
def test_an_adapter_learns_on_packed_dense_layers(dense: str) -> None:
    model = tiny.tiny_qwen3_moe(torch.float32)
    patching.patch(model, dense=dense, **OPTIONS)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    ids, losses = tiny.prompt(), []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(PatchError, match="it is packed; merge adapters, tie or resize it before packing"):
        adapted.merge_and_unload()
    with pytest.raises(PatchError, match="it is packed"):
        model.resize_token_embeddings(80)


@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "a tied head"])
@pytest.mark.parametrize("dense", OWN)
def test_the_command_packs_what_a_patched_model_saves(tmp_path: Path, dense: str, tied: bool) -> None:
    tiny.tiny_qwen3_moe(tie_word_embeddings=tied).save_pretrained(tmp_path / "source")
    options = ["--tiers", "int2,int4", "--dense", dense, "--device", "cpu"]
    result = CliRunner().invoke(app, ["quantize", str(tmp_path / "source"), str(tmp_path / "packed"), *options])
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", quantization_config=dynaexq.DynaExqConfig(hbm_budget=AMPLE)
    )
    expected = patched(tmp_path / "source", dense)
    assert torch.equal(tiny.logits(model), tiny.logits(expected))
    assert model.dynaexq.memory()["dense"] == expected.dynaexq.memory()["dense"]
    found = inspect_checkpoint(tmp_path / "packed", dynaexq.DynaExqConfig())
    assert found.dense == expected.dynaexq.memory()["dense"]


def test_a_checkpoint_is_not_packed_with_what_bitsandbytes_does_when_it_is_loaded(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="and dense='bnb-4bit' was asked for; leave it out here"):
        quantize_checkpoint(source, tmp_path / "out", dynaexq.DynaExqConfig(tiers=("int4",), dense="bnb-4bit"))
    assert not (tmp_path / "out").exists()


def test_a_packed_layer_says_its_sizes_and_its_precision() -> None:
    model = tiny.tiny_qwen3_moe()
    dynaexq.patch(model, "1GiB", tiers=("int4",), dense="int4", device="cpu")
    assert repr(model.model.layers[0].self_attn.q_proj).endswith(", int4)")
    assert repr(model.lm_head).endswith(", int6)")
