"""Checkpoints quantized by other methods: packed as the 16-bit checkpoints are that they stand for, bit for bit."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from files import edit
from models import is_known, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import dynaexq
from dynaexq.checkpoint import read_index
from dynaexq.errors import CheckpointError
from dynaexq.hf.convert import annotate_checkpoint, quantize_checkpoint
from dynaexq.hf.model_size import inspect_checkpoint

Stored = tuple[dict[str, Tensor], Tensor]
"""The pieces of a weight by their keys, and the weight that they stand for."""

HEIGHT, WIDTH = 16, 24  # blocks that stand over the edges of the matrices
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
LINEAR = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16, "strategy": "group"}}}


def as_fp8(name: str, weight: Tensor) -> Stored:
    codes = (weight * 8).to(torch.float8_e4m3fn)
    rows, columns = weight.shape
    scales = torch.rand(-(-rows // HEIGHT), -(-columns // WIDTH)) / 8
    value = torch.tensor(
        [[codes[r, c].float() * scales[r // HEIGHT, c // WIDTH] for c in range(columns)] for r in range(rows)]
    )
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, value


def as_fp8_of_one_scale(name: str, weight: Tensor) -> Stored:
    codes, scale = (weight * 8).to(torch.float8_e4m3fn), torch.tensor(0.11)
    pieces = {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale, f"{name}.activation_scale": scale.clone()}
    return pieces, codes.float() * 0.11


def as_fp8_with_powers_of_two(name: str, weight: Tensor) -> Stored:
    codes = (weight * 8).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 126, (len(weight), 1), dtype=torch.uint8)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": exponents}, codes.float() * 2.0 ** (
        exponents.float() - 127
    )


def as_gptq(name: str, weight: Tensor, least: int = 1, act_order: bool = True) -> Stored:
    rows, columns = weight.shape
    groups = columns // 16
    codes, zeros = torch.randint(0, 16, (columns, rows)), torch.randint(1, 16, (groups, rows))
    scales = (torch.rand(groups, rows) / 32).half()
    group = torch.randperm(columns) % groups if act_order else torch.arange(columns) // 16
    value = torch.stack([(codes[c] - zeros[group[c]]) * scales[group[c]].float() for c in range(columns)])
    pieces = {
        f"{name}.qweight": words(codes.T).T.contiguous(),
        f"{name}.qzeros": words(zeros - least),
        f"{name}.scales": scales,
    }
    return pieces | ({f"{name}.g_idx": group.int()} if act_order else {}), value.T


def as_gptq_v2(name: str, weight: Tensor) -> Stored:
    return as_gptq(name, weight, least=0, act_order=False)


def as_awq(name: str, weight: Tensor) -> Stored:
    rows, columns = weight.shape
    codes, zeros = torch.randint(0, 16, (columns, rows)), torch.randint(0, 16, (columns // 16, rows))
    scales = (torch.rand(columns // 16, rows) / 32).half()
    value = torch.stack([(codes[c] - zeros[c // 16]) * scales[c // 16].float() for c in range(columns)])
    order = [8 * word + column for word in range(rows // 8) for column in (0, 2, 4, 6, 1, 3, 5, 7)]
    pieces = {
        f"{name}.qweight": words(codes[:, order]),
        f"{name}.qzeros": words(zeros[:, order]),
        f"{name}.scales": scales,
    }
    return pieces, value.T


def as_compressed_int4(name: str, weight: Tensor) -> Stored:
    rows, columns = weight.shape
    codes, scales = torch.randint(-8, 8, weight.shape), (torch.rand(rows, columns // 16) / 32).bfloat16()
    pieces = {
        f"{name}.weight_packed": words(codes + 8),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }
    return pieces, codes * scales.repeat_interleave(16, 1).float()


def as_compressed_fp8(name: str, weight: Tensor) -> Stored:
    codes, scales = (weight * 8).to(torch.float8_e4m3fn), (torch.rand(len(weight), 1) / 8).bfloat16()
    return {f"{name}.weight": codes, f"{name}.weight_scale": scales}, codes.float() * scales.float()


def words(codes: Tensor) -> Tensor:
    """Eight codes of a row in each word, the first in the lowest bits."""
    shifted = codes.long().reshape(len(codes), -1, 8) << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.int64).where(shifted.sum(-1) < 2**31, shifted.sum(-1) - 2**32).int()


METHODS: dict[str, tuple[Callable[[str, Tensor], Stored], dict[str, Any]]] = {
    "FP8 in blocks": (as_fp8, {"quant_method": "fp8", "weight_block_size": [HEIGHT, WIDTH]}),
    "FP8 with one scale": (as_fp8_of_one_scale, {"quant_method": "fp8", "weight_block_size": None}),
    "MXFP8": (as_fp8_with_powers_of_two, {"quant_method": "fp8", "weight_block_size": [1, 64]}),
    "GPTQ": (as_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}),
    "GPTQ v2": (as_gptq_v2, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
    "AWQ": (as_awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
    "compressed int4": (
        as_compressed_int4,
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": LINEAR},
    ),
    "compressed FP8": (
        as_compressed_fp8,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "attention and experts": {
                    "targets": ["re:.*proj$"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                }
            },
        },
    ),
}


def two_sources(tmp_path: Path, pack: Callable[[str, Tensor], Stored], config: dict[str, Any]) -> tuple[Path, Path]:
    """A checkpoint with all projections packed, the pieces in two files, and the 16-bit one that it stands for."""
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    tiny.tiny_qwen3_moe().save_pretrained(plain)
    tiny.tiny_qwen3_moe().save_pretrained(packed)
    torch.manual_seed(1)
    pieces, weights = {}, {}
    for key, weight in load_file(plain / "model.safetensors").items():
        if re.search(r"_proj\.weight$", key):
            parts, value = pack(key.removesuffix(".weight"), weight.float())
            pieces |= parts
            weights[key] = value.to(torch.bfloat16).contiguous()
        else:
            pieces[key] = weights[key] = weight
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    (packed / "model.safetensors").unlink()
    files = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(sorted(pieces))}
    for name in set(files.values()):
        save_file({key: pieces[key] for key in files if files[key] == name}, packed / name, {"format": "pt"})
    (packed / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    edit(packed / "config.json", lambda content: content.update(quantization_config=config))
    return packed, plain


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a checkpoint with an index."""
    return {
        key: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name in sorted(set(read_index(directory).values()))
        for key, tensor in load_file(directory / name).items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_what_is_packed_is_what_the_codes_stand_for(tmp_path: Path, method: str) -> None:
    sources = two_sources(tmp_path, *METHODS[method])
    config = dynaexq.DynaExqConfig(tiers=("int4", "int8"), device="cpu")
    packed, plain = (quantize_checkpoint(source, source.with_suffix(".out"), config) for source in sources)
    assert contents(packed) == contents(plain)
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(tiny.logits(model), tiny.logits(AutoModelForCausalLM.from_pretrained(plain)))
    made_from = METHODS[method][1]["quant_method"]
    assert model.hf_quantizer.quantization_config.packed["made_from"] == made_from
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["packed"] == {
        **json.loads((plain / "config.json").read_text())["quantization_config"]["packed"],
        "made_from": made_from,
    }
    assert f"quantized by {made_from} before" in (tmp_path / "again" / "README.md").read_text()
    spec, expected = (inspect_checkpoint(source, config) for source in sources)
    assert (spec.dense, spec.choices, spec.index) == (expected.dense, expected.choices, None)


def test_transformers_dequantizes_fp8_to_the_same_model(tmp_path: Path) -> None:
    packed, plain = two_sources(tmp_path, *METHODS["FP8 with one scale"])
    ours, theirs = (AutoModelForCausalLM.from_pretrained(source) for source in (plain, packed))
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name


@pytest.mark.skipif(not is_known("gpt_oss"), reason="needs gpt-oss")
def test_stacked_experts_in_mxfp4_are_dequantized_as_transformers_does(tmp_path: Path) -> None:
    source, plain = tmp_path / "source", tmp_path / "plain"
    tiny_model("gpt_oss", torch.bfloat16, hidden_size=64, intermediate_size=32).save_pretrained(source)
    weights, pieces = load_file(source / "model.safetensors"), {}
    torch.manual_seed(2)
    for key, weight in list(weights.items()):
        if not re.search(r"experts\.\w+_proj$", key):
            pieces[key] = weight
            continue
        num_experts, columns, rows = weight.shape
        codes = torch.randint(0, 16, (num_experts, rows, columns // 32, 32))
        exponents = torch.randint(120, 125, (num_experts, rows, columns // 32))
        pieces[f"{key}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        pieces[f"{key}_scales"] = exponents.to(torch.uint8)
        value = torch.tensor(FP4)[codes] * 2.0 ** (exponents[..., None] - 127)
        weights[key] = value.flatten(2).transpose(1, 2).bfloat16().contiguous()
    plain.mkdir()
    (plain / "config.json").write_text((source / "config.json").read_text())
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    save_file(pieces, source / "model.safetensors", {"format": "pt"})
    edit(source / "config.json", lambda content: content.update(quantization_config={"quant_method": "mxfp4"}))
    config = dynaexq.DynaExqConfig(tiers=("int4", "fp16"), device="cpu")
    outputs = [quantize_checkpoint(directory, directory.with_suffix(".out"), config) for directory in (source, plain)]
    assert contents(outputs[0]) == contents(outputs[1])
    theirs = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(plain).state_dict().items():
        assert torch.equal(weight, theirs[name]), name


def test_experts_that_are_still_missing_are_patched_in_from_codes(tmp_path: Path) -> None:
    packed, plain = two_sources(tmp_path, *METHODS["FP8 with one scale"])
    answers = []
    for source in (packed, plain):
        model = AutoModelForCausalLM.from_pretrained(plain)
        for block in tiny.sparse_blocks(model):
            block.experts.to("meta")
        dynaexq.patch(model, "1MB", checkpoint=source, tiers=("int4", "fp16"))
        answers.append(tiny.logits(model))
    assert torch.equal(*answers)


def without(ending: str, directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        dropped = [key for key in tensors if key.endswith(f"experts.3.up_proj{ending}")]
        save_file({key: tensor for key, tensor in tensors.items() if key not in dropped}, file, {"format": "pt"})


def configured(directory: Path, **changes: Any) -> None:
    edit(directory / "config.json", lambda content: content["quantization_config"].update(changes))


BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "codes without scales": (
        "FP8 in blocks",
        lambda at: without(".weight_scale_inv", at),
        "quantized already .* is torch.float8_e4m3fn",
    ),
    "scales without codes": (
        "FP8 in blocks",
        lambda at: without(".weight", at),
        r"experts\.3\.up_proj.weight of .* lacks a part .* incomplete",
    ),
    "no zero points": (
        "GPTQ",
        lambda at: without(".qzeros", at),
        "cannot be dequantized: .*qzeros.*; fetch it again",
    ),
    "other blocks": (
        "FP8 in blocks",
        lambda at: configured(at, weight_block_size=[8, 8]),
        "2 scales for 32 rows or columns in blocks of 8",
    ),
    "three bits": (
        "GPTQ",
        lambda at: configured(at, bits=3),
        "gptq with bits=3, and only 2, 4, 8 can be unpacked; give the",
    ),
    "another layout": (
        "AWQ",
        lambda at: configured(at, version="gemv"),
        "awq with version='gemv', and only 'gemm' can",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_unpacked_is_refused_and_nothing_is_written(tmp_path: Path, fault: str) -> None:
    method, damage, message = BROKEN[fault]
    packed, _ = two_sources(tmp_path, *METHODS[method])
    damage(packed)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(packed, tmp_path / "out", dynaexq.DynaExqConfig(tiers=("int4",)))
    assert not (tmp_path / "out").exists()


def test_what_only_links_the_shards_says_to_pack_them(tmp_path: Path) -> None:
    packed, _ = two_sources(tmp_path, *METHODS["AWQ"])
    with pytest.raises(CheckpointError, match="or pack it first: `dynaexq quantize` takes those of FP8, MXFP4"):
        annotate_checkpoint(packed, tmp_path / "out", dynaexq.DynaExqConfig(tiers=("int4",)))


def test_experts_of_two_float_dtypes_are_read_in_that_of_the_model(tmp_path: Path) -> None:
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    for directory in (plain, mixed):
        tiny.tiny_qwen3_moe().save_pretrained(directory)
    weights = load_file(mixed / "model.safetensors")
    for key in [key for key in weights if re.search(r"experts\.[135]\.", key)]:
        weights[key] = weights[key].float()
    save_file(weights, mixed / "model.safetensors", {"format": "pt"})
    config = dynaexq.DynaExqConfig(tiers=("int4", "fp16"), device="cpu")
    outputs = [quantize_checkpoint(directory, directory.with_suffix(".out"), config) for directory in (plain, mixed)]
    assert contents(outputs[0]) == contents(outputs[1])
