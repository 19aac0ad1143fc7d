"""Every way to generate gives the tokens it gave before the patch, as long as experts keep their 16 bits."""

from typing import Any

import patching
import pytest
import torch
from models import tiny_model, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline
from transformers.generation import BaseStreamer

import dynaexq

NEW_TOKENS = {"min_new_tokens": 8, "max_new_tokens": 8}

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beam search": {"num_beams": 3, "do_sample": False},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
}


@pytest.fixture(params=["qwen3_moe", "qwen3_next"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def patch(model: PreTrainedModel) -> dynaexq.Runtime:
    return patching.patch(model, "1GiB", tiers=("fp16",), device="cpu", update_interval=1)


def generated(model: PreTrainedModel, **kwargs: Any) -> list[list[int]]:
    torch.manual_seed(0)
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    return model.generate(**inputs | NEW_TOKENS | kwargs).tolist()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_generate_gives_the_same_tokens(model, way):
    before = generated(model, **way)
    runtime = patch(model)
    assert generated(model, **way) == before
    assert runtime.stats()["steps"] == runtime.stats()["ticks"] == NEW_TOKENS["max_new_tokens"]


def test_a_left_padded_batch_gives_the_same_tokens(model):
    mask = torch.ones_like(tokens())
    mask[0, :3] = 0
    padded = {"input_ids": tokens() * mask, "attention_mask": mask}
    before = generated(model, **padded)
    patch(model)
    assert generated(model, **padded) == before


def test_a_streamer_receives_the_same_tokens_one_by_one(model):
    class Collected(BaseStreamer):
        def __init__(self) -> None:
            self.steps: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.steps.append(value.flatten().tolist())

        def end(self) -> None:
            self.steps.append([])

    before, after = Collected(), Collected()
    generated(model, input_ids=tokens(1), attention_mask=None, streamer=before)
    patch(model)
    generated(model, input_ids=tokens(1), attention_mask=None, streamer=after)
    assert after.steps == before.steps
    assert len(after.steps) == 1 + NEW_TOKENS["max_new_tokens"] + 1, "the prompt, every token, the end"


def test_assisted_decoding_gives_the_same_tokens_with_either_model_patched():
    prompt = {"input_ids": tokens(1), "attention_mask": torch.ones_like(tokens(1)), "do_sample": False}
    model, assistant = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    before = generated(model, **prompt)
    for patched in (model, assistant):
        patch(patched)
        assert generated(model, **prompt, assistant_model=assistant) == before


def test_a_pipeline_writes_the_same_text():
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters = Tokenizer(models.BPE(alphabet, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token=letters.id_to_token(0))
    model = tiny_model("qwen3_moe", vocab_size=len(alphabet))

    def written() -> str:
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        return write("precision follows the traffic", do_sample=False, **NEW_TOKENS)[0]["generated_text"]

    before = written()
    assert before.startswith("precision follows the traffic")
    patch(model)
    assert written() == before
