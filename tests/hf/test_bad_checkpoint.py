"""A checkpoint that is damaged, incomplete, made up or of another kind is refused with a sentence: nothing in it is
executed, and nothing is half loaded."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from files import copied, damage, edit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

import dynaexq
from dynaexq.errors import CheckpointError, QuantizationError, UnsupportedModelError
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.convert import annotate_checkpoint, quantize_checkpoint

AMPLE = 10**6
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in 16 bit, in several shards, and packed."""
    directory = tmp_path_factory.mktemp("checkpoints")
    tiny.tiny_qwen3_moe().save_pretrained(directory / "16 bit", max_shard_size="100KB")
    quantize_checkpoint(directory / "16 bit", directory / "packed", DynaExqConfig(tiers=("int2", "int4")))
    return {kind: directory / kind for kind in ("16 bit", "packed")}


def load(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load without getting as far as the dense weights, if what is wrong is found in time."""
    monkeypatch.setattr(Qwen3MoeForCausalLM, "_load_pretrained_model", staticmethod(_too_late))
    config = dynaexq.DynaExqConfig(hbm_budget=AMPLE)
    AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)


def _too_late(*_: Any) -> None:
    raise AssertionError("the dense weights were about to be read")


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def shard_of(directory: Path, part: str) -> Path:
    """The shard that holds a tensor whose name contains `part`."""
    return next(path for path in shards(directory) if any(part in name for name in load_file(path)))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


class Trap:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def pickled(directory: Path) -> None:
    """Only pickles, and one that would run."""
    for path in shards(directory):
        path.unlink()
    (directory / INDEX).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(directory / "trace")))


def disguised(directory: Path) -> None:
    """A pickle that calls itself a shard."""
    shards(directory)[0].write_bytes(pickle.dumps(Trap(directory / "trace")) + bytes(1000))


def outside(directory: Path) -> None:
    stolen = shards(directory)[0]
    stolen.rename(directory.parent / stolen.name)
    edit(
        directory / INDEX,
        lambda index: index["weight_map"].update(
            {name: f"../{file}" for name, file in index["weight_map"].items() if file == stolen.name}
        ),
    )


def narrower(directory: Path) -> None:
    edit(directory / "config.json", lambda config: config.update(moe_intermediate_size=16))


def fewer(directory: Path) -> None:
    edit(directory / "config.json", lambda config: config.update(num_experts=4, num_local_experts=4))


def more(directory: Path) -> None:
    edit(directory / "config.json", lambda config: config.update(num_experts=9, num_local_experts=9))


def without_an_expert(directory: Path) -> None:
    path = shard_of(directory, "layers.1.mlp.experts.3.up_proj")
    save_file({k: t for k, t in load_file(path).items() if "experts.3.up_proj" not in k}, path, {"format": "pt"})


def in_eight_bits(directory: Path) -> None:
    for path in shards(directory):
        changed = {k: t.to(torch.float8_e4m3fn) if ".experts." in k else t for k, t in load_file(path).items()}
        save_file(changed, path, {"format": "pt"})


def of_another_version(directory: Path) -> None:
    edit(directory / "config.json", lambda config: config["quantization_config"]["packed"].update(format_version=7))


def without_a_version(directory: Path) -> None:
    edit(
        directory / "config.json",
        lambda config: config["quantization_config"]["packed"].pop("format_version") and None,
    )


def of_another_pair(directory: Path) -> None:
    def change(config: Any) -> None:
        config["quantization_config"]["packed"]["tiers"] = config["quantization_config"]["tiers"] = ["int4", "int8"]

    edit(directory / "config.json", change)


BOTH: dict[str, tuple[Callable[[Path], None], str]] = {
    "a truncated shard": (lambda d: shorten(shards(d)[-1]), "was truncated: .* ends at byte"),
    "a missing shard": (lambda d: shards(d)[0].unlink(), "cannot open .*; the checkpoint is incomplete"),
    "a shard from outside": (outside, "which lies outside its directory; do not trust it"),
    "pickles only": (pickled, "not a safetensors file.*pickles are never opened"),
    "a disguised pickle": (disguised, "not a safetensors file.*pickles are never opened"),
    "other sizes in the configuration": (narrower, "and the weights do not belong together"),
    "fewer experts in the configuration": (fewer, "do not belong together|incomplete or damaged"),
    "more experts in the configuration": (more, "do not belong together|incomplete or damaged"),
}
SIXTEEN_BIT = {
    "an expert too few": (without_an_expert, "expected 8 experts of one shape for .*gate_up_proj, found 7 tensors"),
    "experts in eight bits": (in_eight_bits, "quantized already .* is torch.float8_e4m3fn.*give the 16-bit"),
}
PACKED = {
    "another format version": (
        of_another_version,
        "packed in format version 7, and this dynaexq reads 1 to 3; install",
    ),
    "no format version": (without_a_version, "expected packed to hold format_version, group_size"),
    "another pair": (of_another_pair, r"expected .*packed.* to be .* from config.json, found"),
}
CASES = [(kind, name, *case) for kind in ("16 bit", "packed") for name, case in BOTH.items()]
CASES += [("16 bit", name, *case) for name, case in SIXTEEN_BIT.items()]
CASES += [("packed", name, *case) for name, case in PACKED.items()]


@pytest.mark.parametrize(
    ("kind", "spoil", "match"), [(k, s, m) for k, _, s, m in CASES], ids=[f"{k}: {n}" for k, n, *_ in CASES]
)
def test_a_spoilt_checkpoint_is_refused_before_anything_is_loaded(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    spoil: Callable[[Path], None],
    match: str,
) -> None:
    directory = copied(checkpoints[kind], tmp_path)
    spoil(directory)
    with pytest.raises(CheckpointError, match=match):
        load(directory, monkeypatch)
    assert not (directory / "trace").exists()


def test_a_damaged_base_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(checkpoints["packed"], tmp_path)
    damage(next(directory.glob("experts-base-*")), b"\xff" * 8, at=-200)
    with pytest.raises(CheckpointError, match=r"base of expert 7 in model.layers.1.mlp.experts does not match its"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_weight_that_no_code_represents_is_refused_by_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(checkpoints["16 bit"], tmp_path)
    path = shard_of(directory, "layers.1.mlp.experts.5.down_proj")
    tensors = load_file(path)
    tensors["model.layers.1.mlp.experts.5.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    match = r"model.layers.1.mlp.experts, second matrix, expert 5: expected finite weights"
    with pytest.raises(QuantizationError, match=match):
        AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=dynaexq.DynaExqConfig(hbm_budget=AMPLE, tiers=("int4",))
        )
    with pytest.raises(QuantizationError, match=match):
        quantize_checkpoint(directory, tmp_path / "out", DynaExqConfig(tiers=("int4",)))
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="in LlamaForCausalLM, found none; dense models need no dynaexq"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=dynaexq.DynaExqConfig())


@pytest.mark.parametrize("method", ["auto-round", "bitnet"])
def test_experts_that_are_quantized_otherwise_are_refused_by_name(
    checkpoints: dict[str, Path], tmp_path: Path, method: str
) -> None:
    directory = copied(checkpoints["16 bit"], tmp_path)
    stored = {"quant_method": method, "bits": 4, "group_size": 128}
    edit(directory / "config.json", lambda config: config.update(quantization_config=stored))
    match = rf"quantized already \(quant_method='{method}'\), and its packing cannot be taken over exactly; give the"
    for convert in (quantize_checkpoint, annotate_checkpoint):
        with pytest.raises(CheckpointError, match=match):
            convert(directory, tmp_path / "out", dynaexq.DynaExqConfig(tiers=("int4",)))
    with pytest.raises(ValueError, match="you are passing a DynaExqConfig config"):  # Transformers' own refusal
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=dynaexq.DynaExqConfig())
