"""What users of Transformers ask of any quantized model: its size, its upload, its way back to plain modules."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from models import tiny_model
from numerics import assert_close
from transformers import AutoModelForCausalLM

import dynaexq
from dynaexq.errors import ClosedError, PatchError
from dynaexq.hf import hub

TIERS = [("int4",), ("int2", "int8"), ("int4", "fp16"), ("fp16",)]
each_pair = pytest.mark.parametrize("tiers", TIERS, ids="+".join)


def patched(*tiers: str) -> Any:
    model = tiny.tiny_qwen3_moe(torch.float32)
    dynaexq.patch(model, "1GiB", tiers=tiers)
    return model


def test_the_footprint_counts_the_experts_where_they_are():
    model = tiny.tiny_qwen3_moe()
    plain = model.get_memory_footprint()
    runtime = dynaexq.patch(model, "1GiB", tiers=("int4",))
    assert model.get_memory_footprint() == runtime.memory()["total"] < plain
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint(return_buffers=False) == runtime.memory()["total"] - buffers
    assert tiny.tiny_qwen3_moe().get_memory_footprint() == plain


@pytest.mark.parametrize("exclude_embeddings", [False, True])
def test_packed_weights_are_parameters_that_are_not_trained(exclude_embeddings: bool):
    model = tiny.tiny_qwen3_moe()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    all_of_them = model.num_parameters(exclude_embeddings=exclude_embeddings)
    trained = model.num_parameters(True, exclude_embeddings)
    dynaexq.patch(model, "1GiB", tiers=("int4",))
    assert model.num_parameters(exclude_embeddings=exclude_embeddings) == all_of_them
    assert model.num_parameters(only_trainable=True, exclude_embeddings=exclude_embeddings) == trained - experts


@each_pair
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("loaded", [False, True], ids=["patched", "loaded"])
def test_a_dequantized_model_is_plain_and_answers_as_before(
    tiers: tuple[str, ...], family: str, loaded: bool, tmp_path: Path
):
    model = tiny_model(family)
    names = set(dict(model.named_parameters()))
    dynaexq.patch(model, "1GiB", tiers=tiers)
    if loaded:
        model.save_pretrained(tmp_path / "packed")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    model.dynaexq.freeze()
    runtime, answer = model.dynaexq, tiny.logits(model)
    assert model.dequantize() is model
    assert set(dict(model.named_parameters())) == names
    assert not hasattr(model, "dynaexq")
    assert not hasattr(model.config, "quantization_config")
    assert_close("logits", answer, tiny.logits(model), 1e-5)
    with pytest.raises(ClosedError):
        runtime.tick()
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert_close("logits of what was saved", answer, tiny.logits(again), 1e-5)


def test_a_model_whose_runtime_was_closed_can_be_dequantized():
    model = patched("int4", "int8")
    answer = tiny.logits(model)
    model.dynaexq.close()
    assert_close("logits", answer, tiny.logits(model.dequantize()), 1e-5)


def test_a_dequantized_model_comes_in_the_dtype_that_was_asked_for():
    model = patched("int4").dequantize(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


class Hub:
    """A repository that keeps what is uploaded, in the place of huggingface_hub."""

    def __init__(self, place: Path, has_card: bool = False):
        self.place, self.has_card, self.calls = place, has_card, []

    def __call__(self, token: Any = None) -> "Hub":
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, private: Any, exist_ok: bool) -> SimpleNamespace:
        self.calls.append(("create_repo", private))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
        self.calls.append(("branch", branch))

    def file_exists(self, repo_id: str, name: str, revision: Any) -> bool:
        return self.has_card

    def upload_folder(self, repo_id: str, folder_path: Any, allow_patterns: list[str], **commit: Any) -> str:
        self.calls.append(("commit", commit["commit_message"]))
        self.place.mkdir()
        for name in allow_patterns:
            (self.place / name).write_bytes((Path(folder_path) / name).read_bytes())
        return f"https://hub/{repo_id}"


@pytest.mark.parametrize("by", ["method", "argument"])
def test_what_is_pushed_is_a_whole_checkpoint_with_a_card(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", repository)
    model = patched("int4", "int8")
    options = {"private": True, "token": "secret", "commit_message": "First"}
    if by == "method":
        assert model.push_to_hub("me/tiny", tags=["small"], revision="main", **options) == "https://hub/me/tiny"
        assert ("branch", "main") in repository.calls
    else:
        directory = tmp_path / "tiny"
        directory.mkdir()
        (directory / "optimizer.pt").write_text("not ours")
        model.save_pretrained(directory, push_to_hub=True, repo_id="me/tiny", tags=["small"], **options)
        assert not (repository.place / "optimizer.pt").exists()
    assert {("token", "secret"), ("create_repo", True), ("commit", "First")} <= set(repository.calls)
    card = ModelCard.load(repository.place / "README.md")
    assert card.data.tags == ["dynaexq", "mixture-of-experts", "small"]
    assert 'from_pretrained("me/tiny")' in card.text
    assert "at int4 + int8 (als, groups of 64 weights)" in card.text
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(repository.place)), tiny.logits(model))


def test_a_card_of_others_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, directory = patched("int4"), tmp_path / "model"
    model.save_pretrained(directory)
    assert "at int4 (" in (directory / "README.md").read_text()
    other = patched("int2", "int8")
    other.save_pretrained(directory)
    assert "at int2 + int8 (" in (directory / "README.md").read_text()
    (directory / "README.md").write_text("mine")
    monkeypatch.setattr(hub, "HfApi", Hub(tmp_path / "hub", has_card=True))
    other.save_pretrained(directory, push_to_hub=True)
    assert (directory / "README.md").read_text() == "mine"
    assert not (tmp_path / "hub" / "README.md").exists()


def test_variants_are_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(PatchError, match="has no variants"):
        patched("int4").save_pretrained(tmp_path / "model", variant="fp16")
    assert not (tmp_path / "model").exists()
