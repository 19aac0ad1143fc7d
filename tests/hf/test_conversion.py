"""`dynaexq quantize`: what it writes, and how it goes on after an interruption."""

import json
from pathlib import Path
from typing import Any

import patching
import pytest
import tiny
import torch
from files import copied
from huggingface_hub.errors import HFValidationError
from models import tiny_model, tokens
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import dynaexq
from dynaexq.cli.app import app
from dynaexq.errors import CheckpointError, SettingsError
from dynaexq.hf import hub
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.convert import annotate_checkpoint, quantize_checkpoint
from dynaexq.quantization import ExpertCodec


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    tiny.tiny_qwen3_moe(num_hidden_layers=4).save_pretrained(directory, max_shard_size="150KB")
    (directory / "tokenizer.json").write_text("{}")
    return directory


def logits(directory: Path) -> torch.Tensor:
    return tiny.logits(AutoModelForCausalLM.from_pretrained(directory))


def patched_logits(directory: Path, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory)
    patching.patch(model, "1MB", **options)
    return tiny.logits(model)


def test_the_command_packs_a_checkpoint_with_all_that_belongs_to_it(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "packed"
    result = CliRunner().invoke(
        app, ["quantize", str(source), str(target), "--tiers", "int4,int8", "--hbm-budget", "1MB"]
    )
    assert result.exit_code == 0, result.output
    assert f"from_pretrained('{target}')" in result.output.replace("\n", "")
    assert (target / "tokenizer.json").read_text() == "{}"
    assert not (target / "tokenizer.json").samefile(source / "tokenizer.json")
    assert [path.name for path in target.parent.iterdir()] == ["packed"]
    assert torch.equal(logits(target), patched_logits(source, tiers=("int4", "int8")))


def test_the_command_annotates_a_checkpoint(source: Path, tmp_path: Path) -> None:
    args = ["quantize", str(source), str(tmp_path / "a"), "--annotate", "--hbm-budget", "1MB", "--tiers", "int4"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert torch.equal(logits(tmp_path / "a"), patched_logits(source, tiers=("int4",)))


@pytest.mark.parametrize("shard_size", ["150KB", "1GB"])
@pytest.mark.parametrize("annotate", [[], ["--annotate"]], ids=["packed", "annotated"])
def test_a_variant_in_a_subfolder_is_taken_as_transformers_takes_it(
    tmp_path: Path, annotate: list[str], shard_size: str
) -> None:
    model = tiny.tiny_qwen3_moe()
    model.save_pretrained(tmp_path / "source" / "inner", variant="other", max_shard_size=shard_size)
    target = tmp_path / "target"
    options = ["--tiers", "int4,int8", "--subfolder", "inner", "--variant", "other", *annotate]
    result = CliRunner().invoke(app, ["quantize", str(tmp_path / "source"), str(target), *options])
    assert result.exit_code == 0, result.output
    model.save_pretrained(tmp_path / "plain")
    config = DynaExqConfig(tiers=("int4", "int8"), hbm_budget="1MB")
    loaded = AutoModelForCausalLM.from_pretrained(target, quantization_config=config)
    assert torch.equal(tiny.logits(loaded), patched_logits(tmp_path / "plain", tiers=("int4", "int8")))


def test_a_variant_that_is_missing_is_refused_with_what_is_there(source: Path, tmp_path: Path) -> None:
    for convert in (quantize_checkpoint, annotate_checkpoint):
        with pytest.raises(CheckpointError, match=r"expected model.fp16.safetensors or .* it has model-00001-of"):
            convert(source, tmp_path / "out", DynaExqConfig(tiers=("int4",)), variant="fp16")


def test_a_repository_is_fetched_without_other_formats(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        assert {"*.bin", "*.gguf"} <= set(options["ignore_patterns"])
        (tmp_path / "cache").mkdir()
        copied(source, tmp_path / "cache").rename(tmp_path / "cache" / "inner")
        return str(tmp_path / "cache")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    quantize_checkpoint(
        "them/model", tmp_path / "out", DynaExqConfig(tiers=("int4",)), revision="v2", subfolder="inner"
    )
    assert asked == [("them/model", "v2", "inner/*")]
    assert torch.equal(logits(tmp_path / "out"), patched_logits(source, tiers=("int4",)))


def test_what_is_neither_a_directory_nor_a_repository_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise HFValidationError("no such name\nand more")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    config = DynaExqConfig(tiers=("int4",))
    with pytest.raises(CheckpointError, match=r"no directory no/where, and as a repository .*: no such name$"):
        quantize_checkpoint("no/where", tmp_path / "out", config)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint directory with a config\.json"):
        quantize_checkpoint(tmp_path / "nothing", tmp_path / "out", config)
    with pytest.raises(SettingsError, match="revision='v2' is for repositories on the Hub"):
        quantize_checkpoint(source, tmp_path / "out", config, revision="v2")
    assert not (tmp_path / "out").exists()


def test_a_budget_alone_chooses_the_ladder_that_patch_would(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    runtime = dynaexq.patch(model, "300KB")
    quantize_checkpoint(source, tmp_path / "packed", DynaExqConfig(hbm_budget="300KB"))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dynaexq
    assert (packed.plan.tiers, packed.plan.budget) == (runtime.plan.tiers, 300_000)


class Stop(Exception):
    """The plug was pulled."""


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Encoding stops before call `count`; returns a list that grows with every call."""
    encode, calls = ExpertCodec.encode, []

    def counted(codec: ExpertCodec, weights: Any, inputs: Any = None) -> Any:
        if len(calls) == count:
            raise Stop
        calls.append(1)
        return encode(codec, weights, inputs)

    monkeypatch.setattr(ExpertCodec, "encode", counted)
    return calls


@pytest.mark.parametrize("done", range(4), ids=lambda n: f"{n} of 4 layers")
def test_an_interrupted_conversion_goes_on_where_it_stopped(
    source: Path, tmp_path: Path, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DynaExqConfig(tiers=("int2", "int4"))
    with monkeypatch.context() as patch:
        stop_after(done, patch)
        with pytest.raises(Stop):
            quantize_checkpoint(source, tmp_path / "packed", config, max_shard_size="20KB")
    assert not (tmp_path / "packed").exists()
    calls = stop_after(100, monkeypatch)
    quantize_checkpoint(source, tmp_path / "packed", config, max_shard_size="20KB")
    # A shard is complete once the next layer begins.
    assert len(calls) == 4 - max(0, done - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert torch.equal(logits(tmp_path / "packed"), patched_logits(source, tiers=("int2", "int4")))


@pytest.mark.parametrize("change", ["other tiers", "another source"])
def test_what_another_conversion_left_is_not_taken_for_this_one(
    source: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    tiny.tiny_qwen3_moe(num_hidden_layers=4, initializer_range=0.1).save_pretrained(other, max_shard_size="150KB")
    first = (other, ("int2", "int4")) if change == "another source" else (source, ("int4", "int8"))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stop):
            quantize_checkpoint(first[0], tmp_path / "packed", DynaExqConfig(tiers=first[1]), max_shard_size="20KB")
    quantize_checkpoint(source, tmp_path / "packed", DynaExqConfig(tiers=("int2", "int4")), max_shard_size="20KB")
    assert torch.equal(logits(tmp_path / "packed"), patched_logits(source, tiers=("int2", "int4")))


def test_a_failure_leaves_the_checkpoint_that_was_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(source, tmp_path / "packed", DynaExqConfig(tiers=("int4",)))
    before = logits(tmp_path / "packed")
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stop):
            quantize_checkpoint(source, tmp_path / "packed", DynaExqConfig(tiers=("int2",)), max_shard_size="20KB")
    assert torch.equal(logits(tmp_path / "packed"), before)


def test_all_but_weights_and_hidden_directories_is_carried_over(source: Path, tmp_path: Path) -> None:
    carried = ("model.py", "modeling_own.py", "chat/template.jinja", "adapter_model.safetensors", "model_card.md")
    weights = ("pytorch_model.bin", "consolidated.00.pth", "model.fp16.safetensors", "x.gguf")
    left = (*weights, ".cache/x", "original/model.safetensors")
    place = copied(source, tmp_path)
    for name in (*carried, *left):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("mine")
    quantize_checkpoint(place, tmp_path / "packed", DynaExqConfig(tiers=("int4",)))
    assert all((tmp_path / "packed" / name).read_text() == "mine" for name in carried)
    assert not any((tmp_path / "packed" / name).exists() for name in left)


def test_dense_weights_are_copied_bit_for_bit_also_where_they_are_large(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynaexq.hf.convert.COPIED_AT_ONCE", 1000)
    quantize_checkpoint(source, tmp_path / "packed", DynaExqConfig(tiers=("int4",)))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").state_dict()
    plain = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[name], plain[name]) for name in packed if ".experts." not in name)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "granitemoe", "nemotron_h", "deepseek_v3", "qwen3_next"])
def test_a_checkpoint_laid_out_otherwise_is_packed_as_well(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed", DynaExqConfig(tiers=("int4",)))
    dynaexq.patch(model, "1GiB", tiers=("int4",))
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path / "packed")(tokens())[0], model(tokens())[0])


def test_what_cannot_be_packed_is_refused_with_a_sentence(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="packed at one pair of tiers: give tiers"):
        quantize_checkpoint(source, tmp_path / "out", DynaExqConfig())
    with pytest.raises(CheckpointError, match=r"expected a checkpoint directory with a config.json, found none in"):
        quantize_checkpoint(tmp_path, tmp_path / "out", DynaExqConfig(tiers=("int4",)))
    with pytest.raises(CheckpointError, match=r"holds another model .*, which could not be loaded any more"):
        quantize_checkpoint(source, source, DynaExqConfig(tiers=("int4",)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(CheckpointError, match="found neither; pickles are never opened"):
        quantize_checkpoint(tmp_path / "empty", tmp_path / "out", DynaExqConfig(tiers=("int4",)))
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (tmp_path / "empty" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no file of its directory; do not trust it"):
        quantize_checkpoint(tmp_path / "empty", tmp_path / "out", DynaExqConfig(tiers=("int4",)))
    assert not (tmp_path / "out").exists()
