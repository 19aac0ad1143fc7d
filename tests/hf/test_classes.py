"""A packed checkpoint loads into every class that its 16-bit source loads into, and answers the same there."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import dynaexq
from dynaexq.errors import CheckpointError
from dynaexq.hf.convert import quantize_checkpoint

TEXT = tiny.SIZES | {"vocab_size": 96, "intermediate_size": 64, "moe_intermediate_size": 48, "pad_token_id": 0}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "num_position_embeddings": 16,
}
TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


def qwen3_5_moe() -> PreTrainedModel:
    linear = {
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    config = Qwen3_5MoeConfig(text_config=TEXT | linear, vision_config=VISION, **TOKENS)
    return Qwen3_5MoeForConditionalGeneration._from_config(config, dtype=torch.bfloat16)


def qwen3_vl_moe() -> PreTrainedModel:
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 4, 4], "rope_theta": 1e4}}
    vision = VISION | {"deepstack_visual_indexes": [0]}
    config = Qwen3VLMoeConfig(text_config=TEXT | rope, vision_config=vision, **TOKENS)
    return Qwen3VLMoeForConditionalGeneration._from_config(config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One 16-bit checkpoint per directory."""
    place = tmp_path_factory.mktemp("sources")
    torch.manual_seed(3)
    tiny.tiny_qwen3_moe().save_pretrained(place / "causal")
    AutoModel.from_pretrained(place / "causal").save_pretrained(place / "base")
    qwen3_5_moe().save_pretrained(place / "vision")
    qwen3_vl_moe().save_pretrained(place / "as Transformers saves it")
    shutil.copytree(place / "as Transformers saves it", place / "as released")
    file = place / "as released" / "model.safetensors"
    weights = {key: w.transpose(1, 2).contiguous() if ".experts." in key else w for key, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return place


def states(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.prompt()).last_hidden_state


@pytest.mark.parametrize(
    ("source", "auto", "answer"),
    [
        ("causal", AutoModel, states),
        ("causal", AutoModelForCausalLM, tiny.logits),
        ("base", AutoModel, states),
        ("vision", AutoModelForCausalLM, tiny.logits),
        ("vision", AutoModelForImageTextToText, tiny.logits),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_packed_experts_are_found_whatever_class_saved_them(sources: Path, tmp_path: Path, source, auto, answer):
    """At fp16 nothing is rounded, so the packed model is the eager 16-bit model to the last bit."""
    quantize_checkpoint(sources / source, tmp_path / "packed", dynaexq.DynaExqConfig(tiers=("fp16",)))
    packed = auto.from_pretrained(tmp_path / "packed")
    plain = auto.from_pretrained(sources / source, experts_implementation="eager")
    assert type(packed.dynaexq) is dynaexq.Runtime
    assert torch.equal(answer(packed), answer(plain))


@pytest.mark.parametrize(
    ("source", "auto"), [("base", AutoModelForCausalLM), ("causal", AutoModelForSequenceClassification)]
)
def test_a_head_that_the_checkpoint_lacks_is_new_and_the_rest_is_there(sources: Path, tmp_path: Path, source, auto):
    quantize_checkpoint(sources / source, tmp_path / "packed", dynaexq.DynaExqConfig(tiers=("fp16",)))
    packed = auto.from_pretrained(tmp_path / "packed").base_model
    plain = AutoModel.from_pretrained(sources / source, experts_implementation="eager")
    assert torch.equal(states(packed), states(plain))
    with pytest.raises(CheckpointError, match="lacks"):
        AutoModel.from_pretrained(tmp_path / "packed", num_hidden_layers=3)


@pytest.mark.parametrize("layout", ["as Transformers saves it", "as released"])
def test_converters_that_look_at_whole_parameters_see_them(sources: Path, tmp_path: Path, layout: str):
    plain = tiny.logits(AutoModelForImageTextToText.from_pretrained(sources / layout, experts_implementation="eager"))
    config = dynaexq.DynaExqConfig(tiers=("fp16",), hbm_budget="1GiB")
    loaded = AutoModelForImageTextToText.from_pretrained(sources / layout, quantization_config=config)
    assert torch.equal(tiny.logits(loaded), plain)
    quantize_checkpoint(sources / layout, tmp_path / "packed", dynaexq.DynaExqConfig(tiers=("fp16",)))
    assert torch.equal(tiny.logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "packed")), plain)
