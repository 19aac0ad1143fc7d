"""A patched model knows requests: the right experts are there for a prompt, and what was learned outlives the run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from shifting import AMPLE
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import dynaexq
from dynaexq.cli.demo import embedded_model
from dynaexq.cli.demo_corpus import DOMAINS, documents
from dynaexq.evaluate import windows_of
from dynaexq.policy.kinds import Arrival
from dynaexq.runtime.door import arrival

SHARE = 0.2
PROMPT = 96


@pytest.fixture(scope="module")
def requests() -> list[Tensor]:
    """Held-out prompts of three kinds, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    found = [windows_of(tokenizer, documents(domain), 16, PROMPT) for domain in DOMAINS]
    return [window for windows in zip(*found, strict=True) for window in windows]


def served(**options: Any) -> nn.Module:
    """The embedded model with room to upgrade a fifth of its experts."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="auto")
    config = dynaexq.DynaExqConfig(tiers=("int2", "int4"), quantizer="rtn", auto_pause=False, **options)
    runtime = dynaexq.patch(model, AMPLE * 100, config=config)
    memory, slots = runtime.memory(), runtime.plan.num_slots
    slot = memory["upgrade"] // slots
    runtime.set_budget(memory["total"] - memory["upgrade"] + round(SHARE * slots) * slot)
    return model


@torch.no_grad()
def prompts_coverage(model: nn.Module, requests: list[Tensor]) -> float:
    """Share of the mass of the prompts that met an upgrade, seen in each layer as it ends."""
    met, total = 0.0, 0.0
    runtime = model.dynaexq

    def look(layer: int, args: tuple[Tensor, ...]) -> None:
        nonlocal met, total
        upgraded = torch.from_numpy(runtime.tiers()[layer] > runtime.plan.base.bits)
        mass = args[2].float()
        met += float(mass[upgraded[args[1]]].sum())
        total += float(mass.sum())

    hooks = [
        block.experts.register_forward_hook(lambda _, args, output, layer=layer: look(layer, args))
        for layer, block in enumerate(tiny.sparse_blocks(model))
    ]
    for request in requests:
        model(request[None])
    for hook in hooks:
        hook.remove()
    return met / total


def test_interleaved_prompts_find_their_experts_upgraded(requests: list[Tensor]) -> None:
    known, average = served(), served(num_kinds=1)
    learning = [prompts_coverage(model, requests[:24]) for model in (known, average)]
    found = [prompts_coverage(model, requests[24:]) for model in (known, average)]
    assert found[0] > found[1] + 0.1, (learning, found)
    assert found[0] > learning[0]


def test_what_was_learned_outlives_the_run(requests: list[Tensor], tmp_path: Path) -> None:
    taught, path = served(), tmp_path / "hotness.safetensors"
    prompts_coverage(taught, requests[:24])
    taught.dynaexq.tick()
    taught.dynaexq.save_hotness(path)
    fresh, ignorant = served(), served()
    fresh.dynaexq.load_hotness(path)
    assert prompts_coverage(fresh, requests[24:30]) > prompts_coverage(ignorant, requests[24:30]) + 0.05
    kept, before = (model.dynaexq.devices[0].control.tracker.learned for model in (fresh, taught))
    assert kept.profiles.shape[1:] == before.profiles.shape[1:]


class Door:
    """What a model's door says of each forward."""

    def __init__(self, model: nn.Module):
        self.seen: list[Arrival | None] = []
        block = tiny.sparse_blocks(model)[0]
        block.experts.register_forward_pre_hook(lambda *_: self.seen.append(arrival()))

    @property
    def tokens(self) -> list[int | None]:
        return [None if found is None else found.num_tokens for found in self.seen]


def small(**options: Any) -> nn.Module:
    model = tiny.tiny_qwen3_moe(torch.float32)
    dynaexq.patch(model, "1GiB", config=dynaexq.DynaExqConfig(tiers=("int4", "int8"), **options))
    return model


@torch.no_grad()
def test_a_request_begins_with_its_prompt_and_not_with_what_follows() -> None:
    model = small()
    door = Door(model)
    model.generate(tiny.prompt(2, 7), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert door.tokens == [14, None, None, None]
    assert all(found.bags.shape[0] == 2 and found.bags.sum() == 14 for found in door.seen[:1])


@torch.no_grad()
def test_the_second_part_of_a_prompt_begins_nothing() -> None:
    model = small()
    door, ids = Door(model), tiny.prompt(1, 12)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    model(ids[:, 8:], past_key_values=cache)
    assert door.tokens == [8, None]


@pytest.mark.filterwarnings("ignore")
def test_requests_of_continuous_batching_begin_one_by_one() -> None:
    model = small()
    door = Door(model)
    limits = ContinuousBatchingConfig(block_size=32, num_blocks=8, max_batch_tokens=32)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.generate_batch([[1, 2, 3], [4, 5, 6, 7]], config, limits, warmup=False)
    told = [found for found in door.seen if found is not None]
    assert sum(found.num_tokens for found in told) == 7
    assert sum(len(found.bags) for found in told) == 2
    assert len(door.seen) > len(told)


@torch.no_grad()
def test_padding_is_no_word_and_embeddings_have_none() -> None:
    model = small()
    door, ids = Door(model), tiny.prompt(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model(ids, attention_mask=mask)
    model(inputs_embeds=model.get_input_embeddings()(ids))
    assert door.tokens == [8, 12]
    assert door.seen[0].bags.sum(1).tolist() == [2, 6]
    assert len(door.seen[1].bags) == 0
    model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=2)


@torch.no_grad()
def test_each_prompt_gets_a_decision_where_kinds_are_told_apart() -> None:
    told, average = small(update_interval=1000), small(update_interval=1000, num_kinds=1)
    for model in (told, average):
        for _ in range(3):
            model.generate(tiny.prompt(1, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert told.dynaexq.stats()["ticks"] == 3
    assert average.dynaexq.stats()["ticks"] == 0
    np.testing.assert_array_equal(average.dynaexq.hotness(), 1 / 8)
