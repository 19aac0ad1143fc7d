"""`dynaexq plan`: the figures of published models, agreement with `patch` to the byte, and sentences for the rest."""

import ast
import json
import re
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import patching
import psutil
import pytest
import tiny
import torch
from command_line import run_main
from published import QWEN3_30B, QWEN3_NEXT_80B, saved
from transformers import PreTrainedModel, Qwen3MoeConfig
from typer.testing import CliRunner

from dynaexq.cli import app
from dynaexq.errors import BudgetError, CheckpointError, SettingsError, UnsupportedModelError
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.dense import bytes_saved, quantized_linears
from dynaexq.hf.discovery import find_sparse_layers
from dynaexq.hf.meta_model import meta_twin
from dynaexq.hf.model_size import inspect_checkpoint
from dynaexq.hf.planning import dense_bytes, inspect_model
from dynaexq.memory.tensor_bytes import held_tensors, weight_bytes
from dynaexq.planning.budget import TIER_CHOICES, ModelSpec, plan_memory
from dynaexq.planning.estimate import Card, CardEstimate, TierEstimate, find_remedies, least_card
from dynaexq.planning.estimate import estimate_card as estimate_on
from dynaexq.planning.hardware import CARDS, DISK_RATE, DRIVER_BYTES, ENCODE_RATE
from dynaexq.quantization import ExpertCodec
from dynaexq.settings import parse_bytes

GIB = 2**30
SMALL = Qwen3MoeConfig.from_dict(QWEN3_30B.to_dict() | {"num_hidden_layers": 4, "vocab_size": 1000})
PUBLISHED = {"30B": QWEN3_30B, "80B": QWEN3_NEXT_80B}


def saved_of(model: PreTrainedModel, directory: Path) -> Path:
    """The same for a model in memory, in its own dtype."""
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    return saved(model.config, directory)


def card_with(budget: int, size: ModelSpec) -> int:
    """The card on which `budget` bytes, or a few more, are left for weights."""
    return DRIVER_BYTES + int((budget + size.context) / 0.9) + 1


def estimate_card(spec: ModelSpec, nbytes: int, host_ram: int | None = None) -> CardEstimate:
    return estimate_on(spec, Card("card", nbytes), host_ram)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    root = tmp_path_factory.mktemp("published")
    return {
        name: inspect_checkpoint(saved(config, root / name), DynaExqConfig()) for name, config in PUBLISHED.items()
    }


def by_pair(size: ModelSpec, card: int, host_ram: int | None = None) -> dict[tuple[str, ...], TierEstimate]:
    return {estimate.plan.tiers: estimate for estimate in estimate_card(size, card, host_ram).estimates}


def test_qwen3_30b_has_the_published_figures(sizes: dict[str, ModelSpec]) -> None:
    size = sizes["30B"]
    assert (size.num_layers, size.num_experts, size.dtype) == (48, 128, "bfloat16")
    assert size.experts / GIB == pytest.approx(54.0, abs=0.05)
    assert (size.experts + size.dense) / GIB == pytest.approx(56.9, abs=0.05)
    assert size.experts / (48 * 128) / 1e6 == pytest.approx(9.44, abs=0.005)
    assert size.cache == 48 * 2 * 4 * 128 * 2 * 4096


def test_qwen3_next_80b_has_the_published_figures(sizes: dict[str, ModelSpec], tmp_path: Path) -> None:
    size = sizes["80B"]
    assert (size.num_layers, size.num_experts) == (48, 512)
    assert size.experts / (48 * 512) / 1e6 == pytest.approx(6.29, abs=0.005)
    assert 0.955 < size.experts / (size.experts + size.dense) < 0.975
    longer = inspect_checkpoint(saved(QWEN3_NEXT_80B, tmp_path), DynaExqConfig(max_context=5096, max_batch=3))
    state = size.cache - 12 * 2 * 2 * 256 * 2 * 4096  # only every fourth layer has keys and values
    assert 0 < state < 10**8
    assert longer.cache == 3 * (state + 12 * 2 * 2 * 256 * 2 * 5096)


def test_the_30b_fits_a_24_gb_card_with_an_upgrade_for_some(sizes: dict[str, ModelSpec]) -> None:
    found = estimate_card(sizes["30B"], CARDS["24 GB"])
    best = found.auto
    assert best is found.estimates[0]
    assert best.plan.tiers == ("int4", "int6")
    assert 40 < best.hot_per_layer < 80
    # 4 bits, 16 for each group of 64, and room for two units.
    assert best.plan.base_bytes == 48 * 128 * (2048 * 3 * 768 * 4.25 / 8 + 256)
    assert best.waiting == 48 * 128 * 2048 * 3 * 768 // 4
    losses = [estimate.loss for estimate in found.estimates]
    assert losses == sorted(losses)
    assert ("fp16",) not in by_pair(sizes["30B"], CARDS["24 GB"])
    assert estimate_card(sizes["30B"], CARDS["80 GB"]).auto.plan.tiers == ("fp16",)


def test_what_a_token_reads_is_what_is_multiplied_for_it(sizes: dict[str, ModelSpec]) -> None:
    size = sizes["30B"]
    embedding = 2 * 151936 * 2048
    assert (size.experts_per_token, size.gathered) == (8, embedding)
    plans = {estimate.plan.tiers: estimate for estimate in estimate_card(size, CARDS["32 GB"]).estimates}
    for tiers, (least, most) in {("int4", "int8"): (4.27, 8.27), ("int2", "int4"): (2.27, 4.27)}.items():
        bits = [8 * (nbytes - size.dense + embedding) / (48 * 8 * 4718592) for nbytes in plans[tiers].read]
        assert bits == pytest.approx([least, most], abs=0.02), f"{tiers}, bits per routed weight"
    replaced = plans["int4", "fp16"].read
    assert replaced[1] - (size.dense - embedding) == 48 * 8 * 4718592 * 2, "16 bits take the place of 4"
    alone = plans["int4",].read
    assert alone[0] == alone[1] == plans["int4", "int8"].read[0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_reads_all_of_an_embedding_that_it_shares(tied: bool, tmp_path: Path) -> None:
    model = tiny.tiny_qwen3_moe(tie_word_embeddings=tied)
    source, embedding = saved_of(model, tmp_path), model.get_input_embeddings().weight.nbytes
    assert inspect_checkpoint(source, DynaExqConfig()).gathered == (0 if tied else embedding)
    assert inspect_checkpoint(source, DynaExqConfig(dense="int8")).gathered == embedding, "a head of its own"


def test_how_fast_a_token_can_be_is_said_for_the_memory_at_hand(tmp_path: Path) -> None:
    source = saved(QWEN3_30B, tmp_path)

    def said(*arguments: str) -> str:
        return " ".join(CliRunner().invoke(app.app, ["plan", *arguments]).output.split())

    card = said(str(source), "--gpu", "24GiB")
    assert (
        "one token reads 3.42 GB of weights, 3.88 with all its experts upgraded: at most 258 to 292 tokens/s" in card
    )
    assert "for each TB/s of the memory" in card
    ram = said(str(saved(SMALL, tmp_path)), "--device", "cpu")
    assert re.search(
        r"one token reads 0\.\d\d GB of weights.*: at most [\d to]+ tokens/s at the \d+ GB/s measured here", ram
    )


def test_every_byte_of_a_card_is_accounted_for(sizes: dict[str, ModelSpec]) -> None:
    for card in CARDS.values():
        found = estimate_card(sizes["30B"], card)
        assert card == found.card.driver + found.reserve + found.cache + found.activations + found.budget
        assert all(estimate.plan.total <= found.budget for estimate in found.estimates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gpt_oss"])
def test_the_plan_is_the_one_that_patch_makes_to_the_byte(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    size = inspect_checkpoint(saved_of(models.tiny_model(family, dtype), tmp_path), DynaExqConfig())
    smallest = size.dense + size.workspace + size.num_layers * size.num_experts * size.offered[0][0].nbytes
    seen = set()
    for share in (1.0, 1.3, 1.6, 2.2, 4.0):
        found = estimate_card(size, card_with(int(share * smallest), size))
        model = models.tiny_model(family, dtype)
        runtime = patching.patch(model, found.budget, device="cpu", quantizer="rtn")
        assert runtime.plan == found.auto.plan
        assert runtime.memory()["total"] == found.auto.plan.total
        seen.add(runtime.plan.tiers)
        runtime.close()
    assert len(seen) >= 3


def test_a_card_leaves_what_auto_finds_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_qwen3_moe()
    size = inspect_checkpoint(saved_of(model, tmp_path), DynaExqConfig(max_context=300, max_batch=2))
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    card = DRIVER_BYTES + 2**22
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=2**22 - held))
    runtime = patching.patch(model, "auto", tiers=("int4",), device="cpu", max_context=300, max_batch=2)
    assert runtime.plan.budget == estimate_card(size, card).budget


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gemma4_text", "nemotron_h", "minimax", "qwen3_next"])
def test_the_skeleton_weighs_what_the_model_does(family: str, tied: bool) -> None:
    if not models.is_known(family):
        pytest.skip(f"this Transformers has no {family} with the experts interface")
    model = models.tiny_model(family, torch.bfloat16, tie_word_embeddings=tied)
    meta_model = meta_twin(model)
    ours, theirs = find_sparse_layers(meta_model, on_meta=True), find_sparse_layers(model)
    assert dense_bytes(meta_model, ours) == dense_bytes(model, theirs)
    assert [layer.shape() for layer in ours] == [layer.shape() for layer in theirs]


def test_neither_weights_nor_a_directory_are_needed(tmp_path: Path) -> None:
    directory = saved(QWEN3_30B, tmp_path / "model")
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"not weights")
    from_directory, from_file = (
        inspect_checkpoint(directory, DynaExqConfig()),
        inspect_checkpoint(directory / "config.json", DynaExqConfig()),
    )
    assert from_directory.name == "model"
    assert from_file.name == "Qwen3MoeForCausalLM"
    assert (from_file.experts, from_file.dense, from_file.cache) == (
        from_directory.experts,
        from_directory.dense,
        from_directory.cache,
    )


def test_a_packed_checkpoint_offers_what_its_planes_allow_and_starts_without_quantizing(tmp_path: Path) -> None:
    model = models.tiny_model("qwen3_moe", torch.bfloat16)
    runtime = patching.patch(model, "1MiB", tiers=("int2", "int8"), group_size=32, device="cpu", quantizer="rtn")
    model.save_pretrained(tmp_path)
    size = inspect_checkpoint(tmp_path, DynaExqConfig())
    found = by_pair(size, DRIVER_BYTES + 2**30)
    assert found.keys() == {("int2",), ("int4",), ("int8",), ("int2", "int4"), ("int2", "int8"), ("int4", "int8")}
    stored = found["int2", "int8"]
    assert [estimate.plan.tiers for estimate in found.values() if estimate.is_auto] == [("int2", "int8")]
    assert (stored.plan.base, stored.plan.upgrade) == (runtime.plan.base, runtime.plan.upgrade)
    assert stored.plan.total == runtime.plan.total
    assert stored.waits_in == "checkpoint"
    assert stored.start_packed == (size.dense + stored.plan.base_bytes) / DISK_RATE
    assert stored.start_reading is stored.start_quantizing is None


def test_start_and_waiting_place_follow_from_the_source(sizes: dict[str, ModelSpec]) -> None:
    size = sizes["30B"]
    found = by_pair(size, CARDS["96 GB"], host_ram=14 * GIB)
    assert found["fp16",].start_quantizing == 0
    assert found["fp16",].waits_in is None
    assert found["int4", "int8"].start_quantizing == size.num_weights / ENCODE_RATE["als"]
    assert found["int4", "int8"].start_reading == (size.experts + size.dense) / DISK_RATE
    assert found["int4", "int8"].waits_in == "ram"
    assert found["int2", "int8"].waits_in == "disk"
    assert found["int4", "fp16"].waits_in == "checkpoint"
    assert by_pair(size, CARDS["96 GB"])["int2", "int8"].waits_in == "ram"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_least_card_is_the_least_that_fits(sizes: dict[str, ModelSpec], name: str) -> None:
    size = sizes[name]
    least, _ = least_card(size)
    assert estimate_card(size, least).estimates
    assert not estimate_card(size, least - 1).estimates


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("no json", CheckpointError, "cannot read the configuration"),
        ("{}", CheckpointError, "model_type"),
        ('{"model_type": "qwen3_moe", "hidden_size": "wide"}', CheckpointError, "hidden_size"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}', CheckpointError, "cannot read"),
        ('{"model_type": "qwen3_moe", "hidden_size": -4}', UnsupportedModelError, "cannot build a qwen3_moe"),
        ('{"model_type": "qwen3_moe", "num_hidden_layers": 0}', UnsupportedModelError, "expected sparse layers"),
        ('{"model_type": "llama", "num_hidden_layers": 1}', UnsupportedModelError, "dense models need no dynaexq"),
        ('{"model_type": "clip"}', UnsupportedModelError, "cannot build a clip"),
        ('{"model_type": "mixtral", "quantization_config": {"quant_method": "bitnet"}}', CheckpointError, "'bitnet'"),
    ],
)
def test_a_configuration_of_no_use_is_a_sentence(
    text: str, error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    for source in (config, tmp_path):
        with pytest.raises(error, match=sentence) as caught:
            inspect_checkpoint(source, DynaExqConfig())
        assert "\n" not in str(caught.value)


def test_a_missing_path_and_a_wrong_option_are_sentences(tmp_path: Path) -> None:
    for missing in (tmp_path / "none", tmp_path / "none.json", Path("none.json"), tmp_path):
        with pytest.raises(CheckpointError, match=r"expected a checkpoint directory .*config\.json"):
            inspect_checkpoint(missing, DynaExqConfig())
    with pytest.raises(CheckpointError, match="cannot read the configuration of nobody/nothing"):
        inspect_checkpoint(Path("nobody/nothing"), DynaExqConfig())
    with pytest.raises(SettingsError, match="max_context"):
        inspect_checkpoint(saved(QWEN3_30B, tmp_path), DynaExqConfig(max_context=0))


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app.app, ["plan", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_shows_all_tiers_of_one_card(tmp_path: Path) -> None:
    source = saved(QWEN3_30B, tmp_path / "Qwen3-30B-A3B")
    text = run(source, "--gpu", "24GiB", "--host-ram", "8GiB")
    assert text.startswith("Qwen3-30B-A3B: 48 layers of 128 experts, 54.0 GiB of 56.9 GiB in bfloat16\n")
    shown = [tuple(line[2:13].strip().split(" + ")) for line in text.splitlines()]
    assert [tiers for tiers in shown if tiers in TIER_CHOICES] == list(
        by_pair(inspect_checkpoint(source, DynaExqConfig()), 24 * GIB)
    )
    starred = next(line for line in text.splitlines() if line.startswith("* int"))
    assert starred.split()[1:6] == ["int4", "+", "int6", "58.5/128", "46%"]
    assert 'dynaexq.patch(model, hbm_budget="20.3GiB", tiers=("int4", "int6"))' in text
    assert 'host_copy="disk"' in text


def test_the_command_shows_known_cards_and_says_where_nothing_fits(tmp_path: Path) -> None:
    text = run(saved(QWEN3_30B, tmp_path))
    lines = {name: next(line for line in text.splitlines() if line.strip().startswith(name)) for name in CARDS}
    assert "nothing fits" in lines["8 GB"]
    assert "int4 + int6" in lines["24 GB"]
    assert "int4 + int8" in lines["32 GB"]
    assert "The least card, with all experts at int2, has 13.1 GiB." in text


def test_the_figures_are_there_for_programs(tmp_path: Path) -> None:
    source = saved(SMALL, tmp_path / "model")
    size = inspect_checkpoint(source, DynaExqConfig())
    printed = json.loads(run(source, "--json"))
    assert printed["cards"].keys() == CARDS.keys()
    assert printed["model"]["least_card"] == least_card(size)[0]
    found = estimate_card(size, 3 * GIB)
    card = json.loads(run(source, "--gpu", "3GiB", "--json"))["cards"]["3GiB"]
    assert card["budget"] == found.budget
    assert [tuple(pair["tiers"]) for pair in card["estimates"]] == [f.plan.tiers for f in found.estimates]
    for pair, expected in zip(card["estimates"], found.estimates, strict=True):
        assert pair["weights"] == expected.plan.total
        assert pair["slots"] == expected.plan.num_slots
        assert pair["is_auto"] == expected.is_auto


def test_an_index_that_counts_something_else_is_pointed_out(tmp_path: Path) -> None:
    source = saved(SMALL, tmp_path)
    size = inspect_checkpoint(source, DynaExqConfig())
    index = source / "model.safetensors.index.json"
    for total, remark in ((size.experts + size.dense, False), (70 * GIB, True)):
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": {}}))
        assert inspect_checkpoint(source / "config.json", DynaExqConfig()).index == total
        assert ("The index counts 70.0 GiB of weights, the configuration" in run(source)) == remark


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere.json",), "found nothing at nowhere.json"),
        (("{model}", "--gpu", "24"), "--gpu must be a positive number of bytes"),
        (("{model}", "--gpu", "1GiB"), "is too small for"),
        (("{model}", "--hbm-budget", "6GB"), "with all experts at int2 it takes at least 11,237,"),
        (("{model}", "--gpu", "1GiB"), "No other tiers, group size, dense= or context makes it fit."),
        (("{model}", "--hbm-budget", "20GiB", "--gpu", "24GiB"), "give one"),
    ],
)
def test_errors_of_the_command_are_sentences(
    arguments: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(saved(QWEN3_30B, tmp_path))
    assert run_main(["plan", *(word.format(model=model) for word in arguments)], monkeypatch) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tiers": ("int2", "int4")},
        {"tiers": ("int4",), "group_size": 32},
        {"dense": "bnb-4bit"},
        {"dense": "bnb-8bit", "tiers": ("int4", "int8")},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_plan_and_patch_agree_to_the_byte_under_the_same_options(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    spec = inspect_checkpoint(saved_of(models.tiny_model(family, torch.bfloat16), tmp_path), DynaExqConfig(**options))
    budget = spec.weights(spec.choices[0][0]) + 20_000
    found = estimate_card(spec, card_with(budget, spec))
    model = models.tiny_model(family, torch.bfloat16)
    runtime = patching.patch(model, found.budget, device="cpu", quantizer="rtn", **options)
    assert runtime.plan == found.auto.plan
    given = Card("hbm_budget", found.budget, driver=0, weights_only=True)
    assert estimate_on(spec, given).auto.plan == runtime.plan
    runtime.close()


def test_the_bytes_of_quantized_dense_layers_are_those_that_are_allocated() -> None:
    model = models.tiny_model("qwen3_next", torch.bfloat16)
    layers = find_sparse_layers(model)
    for dense in ("int4", "int8", "bnb-4bit", "bnb-8bit"):
        settings = DynaExqConfig(dense=dense).settings()
        twins = quantized_linears(model, layers, settings, torch.device("cpu"))
        before = sum(weight_bytes(model.get_submodule(path).parameters()) for path in twins)
        after = sum(weight_bytes(held_tensors(twin)) for twin in twins.values())
        assert twins
        assert bytes_saved(model, layers, settings) == before - after
    assert bytes_saved(model, layers, DynaExqConfig().settings()) == 0


def test_a_patch_makes_the_one_codec_that_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    create = ExpertCodec.__init__

    def counted(codec: ExpertCodec, *args: Any, **kwargs: Any) -> None:
        made.append(args)
        create(codec, *args, **kwargs)

    monkeypatch.setattr(ExpertCodec, "__init__", counted)
    patching.patch(tiny.tiny_qwen3_moe(), "300KB", device="cpu", quantizer="rtn")
    assert len(made) == 1


@pytest.mark.parametrize(
    "arguments",
    [(), ("--gpu", "24GiB"), ("--gpu", "80GB", "--tiers", "int4,fp16"), ("--hbm-budget", "24GiB")],
    ids=str,
)
def test_the_tables_are_whole_at_80_columns(arguments: tuple[str, ...], tmp_path: Path) -> None:
    text = run(saved(QWEN3_30B, tmp_path / "Qwen3-30B-A3B"), *arguments)
    shown = [line for line in text.splitlines() if "dynaexq." not in line]
    assert max(map(len, shown)) <= 80
    assert "…" not in text
    assert any("int4 + " in line for line in shown)


def test_where_nothing_fits_it_names_what_does_and_that_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(saved(SMALL, tmp_path / "model"))
    spec = inspect_checkpoint(Path(source), DynaExqConfig(tiers=("int8",), max_context=8192))
    card = least_card(spec, spec.choices)[0] - 1
    assert run_main(["plan", source, "--gpu", f"{card}B", "--tiers", "int8", "--context", "8192"], monkeypatch) == 1
    said = capsys.readouterr().err
    assert "is too small for model" in said
    assert "It fits with tiers='auto':" in said
    call = re.search(r'dynaexq\.patch\(model, hbm_budget=("[^"]+"|\d+), tiers=(\([^)]+\))', said)
    assert call
    budget, tiers = (ast.literal_eval(part) for part in call.groups())
    assert (
        plan_memory(inspect_checkpoint(Path(source), DynaExqConfig(tiers=tiers)), parse_bytes(budget)).tiers == tiers
    )


def test_the_remedies_are_fits_and_come_in_the_order_of_their_trials(sizes: dict[str, ModelSpec]) -> None:
    small, large = replace(sizes["30B"], dense=10**6), sizes["30B"]
    card = Card("card", least_card(small, small.choices)[0])
    found = list(find_remedies(lambda changes: small if changes else large, [{"a": 1}, {}, {"b": 2}], card))
    assert [remedy.changes for remedy in found] == [{"a": 1}, {"b": 2}]
    assert all(remedy.found.auto is not None for remedy in found)


def test_on_a_cpu_the_upgrades_of_the_tiers_that_are_chosen_wait_beside_them(sizes: dict[str, ModelSpec]) -> None:
    spec = sizes["30B"]
    gpu = estimate_on(spec, Card("gpu", 24 * GIB, driver=0))
    ram = estimate_on(spec, Card("ram", 24 * GIB, driver=0, is_cpu=True))
    assert gpu.auto.plan.tiers == ("int4", "int6")
    assert ram.auto.plan.tiers == ("int4",)
    for estimate in ram.estimates:
        assert estimate.plan.total + estimate.waiting + spec.context <= 24 * GIB
    mixed = next(estimate for estimate in ram.estimates if estimate.plan.tiers == ("int2", "int4"))
    alone = next(estimate for estimate in gpu.estimates if estimate.plan.tiers == ("int2", "int4"))
    assert mixed.plan.budget == pytest.approx(alone.plan.budget - 0.9 * mixed.waiting, abs=2)
    assert mixed.plan.num_slots < alone.plan.num_slots


@pytest.mark.parametrize("tiers", ["auto", ("int2", "int4"), ("int4", "int8")], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["16 bit", "packed"])
def test_what_plan_finds_in_ram_is_what_auto_takes_on_a_cpu(
    tiers: str | tuple[str, ...], packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = tmp_path / "source", tiny.tiny_qwen3_moe()
    if packed:
        patching.patch(model, "1MB", tiers=("int2", "int8") if tiers == "auto" else tiers, device="cpu")
    model.save_pretrained(source)
    sizes = {"hbm_budget": "auto", "device": "cpu", "max_context": 64}
    config = DynaExqConfig(tiers=tiers, quantizer="rtn", **sizes) if not packed else DynaExqConfig(**sizes)
    spec = inspect_checkpoint(source, config)
    free = 500_000 - spec.dense  # the dense weights are there already when the experts are planned
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=free))
    loaded = type(model).from_pretrained(source, quantization_config=config)
    assert loaded.dynaexq.plan == estimate_on(spec, Card("RAM", 500_000, driver=0, is_cpu=True)).auto.plan


def test_upgrades_that_have_no_room_to_wait_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_qwen3_moe()
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    context = inspect_model(model, find_sparse_layers(model), DynaExqConfig(max_context=16).settings()).context
    room = int((115_000 + context) / 0.9) + 1  # enough for int2, and not for upgrades besides
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=room - held))
    options: dict[str, Any] = {"tiers": ("int2", "int4"), "device": "cpu", "max_context": 16, "quantizer": "rtn"}
    with pytest.raises(BudgetError, match=r'wait in the same memory; set host_copy="disk", or take tiers=\("int2",\)'):
        patching.patch(model, "auto", **options)
    assert patching.patch(model, "auto", host_copy="disk", **options).plan.tiers == ("int2", "int4")
