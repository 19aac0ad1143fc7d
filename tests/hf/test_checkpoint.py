"""From a checkpoint to a model and back: the same bits whichever way, what was stored and what is asked for now, and
what happens when somebody loads a packed directory without dynaexq."""

import filecmp
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import patching
import pytest
import tiny
import torch
from files import copied, damage
from models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeForCausalLM

import dynaexq
from dynaexq.errors import BudgetError, CheckpointError, SettingsError, UnpatchError, UnsupportedModelError
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.convert import annotate_checkpoint, quantize_checkpoint
from dynaexq.hf.load import CheckpointLoad
from dynaexq.memory import DiskStore, RamStore
from dynaexq.quantization import ExpertCodec, offered
from dynaexq.weights.quantize_experts import SourceStore

AMPLE = 10**6
TIER_CHOICES = [
    ("fp16",),
    ("int8",),
    ("int2",),
    ("int2", "int4"),
    ("int2", "int8"),
    ("int4", "int8"),
    ("int4", "fp16"),
]

each_pair = pytest.mark.parametrize("tiers", TIER_CHOICES, ids="-".join)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit checkpoint of two layers in three shards."""
    directory = tmp_path_factory.mktemp("source") / "model"
    tiny.tiny_qwen3_moe().save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) >= 3
    return directory


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same packed as int2 that can be refined to int8, with room for half the upgrades when it was saved."""
    directory = tmp_path_factory.mktemp("packed") / "model"
    model = load(source, tiers=("int2", "int8"))
    memory = model.dynaexq.memory()
    model.dynaexq.set_budget(memory["total"] - memory["upgrade"] // 2)
    model.save_pretrained(directory)
    return directory


def load(directory: Path, device_map: Any = None, **options: Any) -> nn.Module:
    config = dynaexq.DynaExqConfig(**{"hbm_budget": AMPLE} | options)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map=device_map)


def reload(directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory)


def patched(directory: Path, **options: Any) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(directory)
    patching.patch(model, **{"hbm_budget": AMPLE} | options)
    return model


def differing(one: Path, other: Path) -> list[str]:
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    return [name for name in sorted(names) if not filecmp.cmp(one / name, other / name, shallow=False)]


@each_pair
def test_patched_loaded_and_reloaded_models_answer_with_the_same_bits(
    source: Path, tmp_path: Path, tiers: tuple[str, ...]
) -> None:
    live, loaded = patched(source, tiers=tiers), load(source, tiers=tiers)
    answer = tiny.logits(live)
    assert torch.equal(tiny.logits(loaded), answer)
    assert loaded.dynaexq.memory() == live.dynaexq.memory()
    live.save_pretrained(tmp_path / "live")
    loaded.save_pretrained(tmp_path / "loaded")
    again = reload(tmp_path / "live")
    assert torch.equal(tiny.logits(again), answer)
    again.save_pretrained(tmp_path / "again")
    assert not differing(tmp_path / "live", tmp_path / "loaded")
    assert not differing(tmp_path / "live", tmp_path / "again")


def test_a_packed_checkpoint_is_the_same_from_the_command_and_from_a_model(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "by command", DynaExqConfig(tiers=("int2", "int4")))
    load(source, tiers=("int2", "int4")).save_pretrained(tmp_path / "by model")
    for path in (tmp_path / "by model").glob("experts-*"):
        assert filecmp.cmp(path, tmp_path / "by command" / path.name, shallow=False)
    assert torch.equal(tiny.logits(reload(tmp_path / "by command")), tiny.logits(reload(tmp_path / "by model")))


def test_a_model_in_another_dtype_gets_its_experts_in_that_dtype(source: Path) -> None:
    config = dynaexq.DynaExqConfig(hbm_budget=AMPLE, tiers=("fp16",))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager")
    assert torch.equal(tiny.logits(model), tiny.logits(plain))


def test_a_plain_dict_will_do(source: Path) -> None:
    config = {"quant_method": "dynaexq", "hbm_budget": AMPLE, "tiers": ["int4"]}
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert torch.equal(tiny.logits(model), tiny.logits(load(source, tiers=("int4",))))


def test_generation_works_on_a_loaded_model_and_precision_follows(packed: Path) -> None:
    model = load(packed, hbm_budget=120_000, update_interval=1)
    assert len(tiny.generated(model, new_tokens=12)[0]) == 24
    assert model.dynaexq.stats()["ticks"] >= 12


# What was stored, and what is asked for now


def test_the_ladder_and_the_last_budget_come_back(packed: Path) -> None:
    model, ample = reload(packed), load(packed)
    runtime = model.dynaexq
    assert runtime.plan.tiers == ("int2", "int8")
    assert runtime.stats()["slots"] == 8
    assert runtime.memory()["total"] <= runtime.plan.budget < ample.dynaexq.memory()["total"]


def test_a_budget_that_is_given_wins_over_the_environment_and_that_over_the_stored_one(
    packed: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAEXQ_HBM_BUDGET", "300KB")
    assert reload(packed).dynaexq.plan.budget == 300_000
    assert load(packed, hbm_budget="200KB").dynaexq.plan.budget == 200_000
    assert load(source, hbm_budget="200KB").dynaexq.plan.budget == 200_000
    assert patched(source, hbm_budget=None).dynaexq.plan.budget == 300_000
    assert patched(source, hbm_budget="auto").dynaexq.plan.budget > 300_000


@pytest.mark.parametrize("tiers", offered(("int2", "int8")), ids="-".join)
def test_any_ladder_that_the_planes_allow_reads_the_codes_that_were_stored(
    packed: Path, tiers: tuple[str, ...]
) -> None:
    model, stored = load(packed, tiers=tiers), load(packed)
    assert model.dynaexq.plan.tiers == tiers
    least = stored.dynaexq.memory()["total"] - stored.dynaexq.memory()["upgrade"]
    if tiers[-1] == "int8":
        assert torch.equal(tiny.logits(model), tiny.logits(stored))
    elif tiers == ("int2",):
        assert torch.equal(tiny.logits(model), tiny.logits(load(packed, hbm_budget=least)))
    else:
        assert torch.equal(tiny.logits(model), tiny.logits(load(packed, tiers=("int4",))))
    if len(tiers) == 2:
        gain = model.dynaexq.devices[0].control.controller.gain
        assert (gain > 0).all()


@pytest.mark.parametrize("tiers", [("int8", "fp16"), ("fp16",), ("int2", "fp16")], ids="-".join)
def test_a_ladder_whose_planes_are_not_there_is_refused_by_name(packed: Path, tiers: tuple[str, ...]) -> None:
    with pytest.raises(
        SettingsError, match=r"cannot be read from a checkpoint packed as \('int2', 'int8'\); it allows"
    ):
        load(packed, tiers=tiers)


@pytest.mark.parametrize(("option", "value"), [("group_size", 32), ("quantizer", "rtn")])
def test_what_is_settled_by_the_codes_cannot_be_asked_for_otherwise(packed: Path, option: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{option}={value!r} was asked for, and the checkpoint is packed with"):
        load(packed, **{option: value})


def test_a_configuration_shows_its_dials_and_refuses_others() -> None:
    config = dynaexq.DynaExqConfig(hbm_budget="1GiB")
    assert (config.hbm_budget, config.hysteresis) == ("1GiB", 0.75)
    config.hysteresis = 0.2
    assert config.settings(stored=False).hysteresis == 0.2
    assert config.to_dict() == {"quant_method": "dynaexq", "hbm_budget": "1GiB", "hysteresis": 0.2}
    with pytest.raises(SettingsError, match="unknown option budget"):
        dynaexq.DynaExqConfig(budget=1)


def test_a_policy_that_is_a_function_is_not_saved_and_that_is_said(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(source, policy=lambda score, upgraded, slots: upgraded, tiers=("int2", "int4")).save_pretrained(
        tmp_path / "m"
    )
    assert "policy is a function and is not saved" in caplog.text
    assert reload(tmp_path / "m").dynaexq.settings.policy == "topn"


# Where upgrades wait


@pytest.mark.parametrize(
    ("tiers", "host_copy", "store"),
    [
        (("int2", "int4"), "auto", RamStore),
        (("int2", "int4"), "disk", DiskStore),
        (("int4", "fp16"), "auto", SourceStore),
        (("int4", "fp16"), "disk", SourceStore),
        (("int4", "fp16"), "ram", RamStore),
    ],
)
def test_upgrades_of_a_16_bit_checkpoint_wait_where_they_are_told_to(
    source: Path, tiers: tuple[str, ...], host_copy: str, store: type
) -> None:
    model = load(source, tiers=tiers, host_copy=host_copy)
    assert type(model.dynaexq.devices[0].pipeline.store) is store
    assert torch.equal(tiny.logits(model), tiny.logits(patched(source, tiers=tiers)))


@pytest.mark.parametrize(("host_copy", "in_ram"), [("auto", False), ("disk", False), ("ram", True)])
def test_upgrades_of_a_packed_checkpoint_stay_in_its_files_unless_ram_is_asked_for(
    packed: Path, host_copy: str, in_ram: bool
) -> None:
    model = load(packed, host_copy=host_copy)
    assert isinstance(model.dynaexq.devices[0].pipeline.store, RamStore) == in_ram
    assert model.dynaexq.stats()["host_bytes"] == (16 * 6144 if in_ram else 0)
    assert torch.equal(tiny.logits(model), tiny.logits(load(packed)))


def test_a_full_disk_falls_back_to_ram_with_a_sentence(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = load(source, tiers=("int2", "int4"), host_copy="disk")
    assert "No space left on device" in caplog.text
    assert "wait in RAM instead" in caplog.text
    assert type(model.dynaexq.devices[0].pipeline.store) is RamStore


def test_a_damaged_upgrade_costs_quality_and_not_the_answer(packed: Path, tmp_path: Path) -> None:
    directory = copied(packed, tmp_path)
    damage(next(directory.glob("experts-upgrade-*")), b"\xff" * 64, at=-64)
    model = load(directory)
    assert model.dynaexq.stats()["upgraded"] == 15
    assert model.dynaexq.stats()["failed"] == 1
    assert tiny.logits(model).isfinite().all()
    with pytest.raises(OSError, match="does not match its checksum"):
        model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# Saving


def test_saving_over_a_packed_checkpoint_keeps_the_tokenizer_and_serves_the_model_that_reads_from_it(
    packed: Path, tmp_path: Path
) -> None:
    directory = copied(packed, tmp_path)
    (directory / "tokenizer.json").write_text("words")
    model = load(directory, hbm_budget=120_000, update_interval=1)
    answer = tiny.logits(model)
    model.save_pretrained(directory)
    assert (directory / "tokenizer.json").read_text() == "words"
    model.dynaexq.set_budget(AMPLE)  # from files that have lost their names
    assert model.dynaexq.stats()["upgraded"] == 16
    assert torch.equal(tiny.logits(load(directory, hbm_budget=120_000)), answer)


def test_saving_where_16_bit_weights_lie_is_refused(source: Path, tmp_path: Path) -> None:
    directory = copied(source, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds another model .*, which could not be loaded any more"):
        load(directory, tiers=("int4",)).save_pretrained(directory)
    assert not differing(source, directory)


def test_a_closed_runtime_cannot_be_saved(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    model.dynaexq.close()
    with pytest.raises(dynaexq.ClosedError):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_shards_are_kept_to_the_size_that_is_asked_for(source: Path, tmp_path: Path) -> None:
    load(source, tiers=("int2", "int4")).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 6
    assert all(shard.stat().st_size < 32_000 for shard in shards)
    assert torch.equal(tiny.logits(reload(tmp_path / "model")), tiny.logits(load(source, tiers=("int2", "int4"))))


def test_saved_here_and_loaded_in_another_process_a_model_answers_the_same(packed: Path, tmp_path: Path) -> None:
    torch.save(tiny.logits(reload(packed)), tmp_path / "logits.pt")
    done = in_another_process(
        f"""
        import dynaexq
        model = AutoModelForCausalLM.from_pretrained({str(packed)!r})
        with torch.no_grad():
            assert torch.equal(model(prompt).logits, torch.load({str(tmp_path / "logits.pt")!r}))
    """,
        has_dynaexq=True,
    )
    assert done.returncode == 0, done.stderr


def test_without_dynaexq_a_packed_directory_is_refused_and_says_why(packed: Path) -> None:
    for model_class in ("AutoModelForCausalLM", "Qwen3MoeForCausalLM"):
        done = in_another_process(f"""
            {model_class}.from_pretrained({str(packed)!r})
            print("loaded")
        """)
        assert done.returncode != 0
        assert "loaded" not in done.stdout
        assert "dynaexq_must_be_imported" in done.stderr
        assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in done.stderr


def test_an_annotated_directory_is_quantized_when_it_is_loaded_and_16_bit_without_dynaexq(
    source: Path, tmp_path: Path
) -> None:
    annotate_checkpoint(source, tmp_path / "annotated", DynaExqConfig(hbm_budget=AMPLE, tiers=("int4", "fp16")))
    for path in source.glob("*.safetensors"):
        assert (tmp_path / "annotated" / path.name).samefile(path)
    model = reload(tmp_path / "annotated")
    assert torch.equal(tiny.logits(model), tiny.logits(load(source, tiers=("int4", "fp16"))))
    assert reload(source).dtype == torch.bfloat16
    torch.save(tiny.logits(Qwen3MoeForCausalLM.from_pretrained(source)), tmp_path / "logits.pt")
    done = in_another_process(f"""
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "annotated")!r})
        with torch.no_grad():
            assert torch.equal(model(prompt).logits, torch.load({str(tmp_path / "logits.pt")!r}))
    """)
    assert done.returncode == 0, done.stderr


# Taking it back


@pytest.mark.parametrize("tiers", [("int2", "int4"), ("int4", "fp16"), ("fp16",)], ids="-".join)
def test_a_model_from_a_16_bit_checkpoint_can_be_unpatched_whatever_its_tiers(
    source: Path, tiers: tuple[str, ...]
) -> None:
    model = load(source, tiers=tiers)
    dynaexq.unpatch(model)
    plain = reload(source)
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert "quantization_config" not in model.config.to_dict()


def test_a_model_from_a_packed_checkpoint_cannot_be_unpatched_and_works_on(packed: Path) -> None:
    model = load(packed)
    before = tiny.logits(model)
    with pytest.raises(UnpatchError, match="the 16-bit experts are gone"):
        dynaexq.unpatch(model)
    assert torch.equal(tiny.logits(model), before)


def meta_model(source: Path, load_dense: bool = True) -> nn.Module:
    """The model of `source` with its experts on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16)
    if load_dense:
        for name, tensor in reload(source).state_dict().items():
            if ".experts." not in name:
                accelerate.utils.set_module_tensor_to_device(model, name, "cpu", tensor, dtype=tensor.dtype)
        for path, module in model.named_modules():
            if "rotary" in path:
                module.__init__(model.config)
    return model.eval()


def test_experts_on_the_meta_device_are_read_from_the_checkpoint_that_patch_is_told(source: Path) -> None:
    model = meta_model(source)
    dynaexq.patch(model, AMPLE, checkpoint=source, tiers=("int2", "int4"))
    assert torch.equal(tiny.logits(model), tiny.logits(load(source, tiers=("int2", "int4"))))
    dynaexq.unpatch(model)
    assert torch.equal(tiny.logits(model), tiny.logits(reload(source)))


@pytest.mark.parametrize(
    ("make", "checkpoint", "error", "match"),
    [
        (
            lambda s: meta_model(s, load_dense=False),
            True,
            UnsupportedModelError,
            "on the meta device, and patch reads",
        ),
        (meta_model, False, UnsupportedModelError, "on the meta device; load the weights first, or say where"),
        (reload, True, UnsupportedModelError, "is loaded already, on cpu; leave out checkpoint"),
    ],
    ids=["nothing loaded", "no checkpoint", "everything loaded"],
)
def test_patch_says_which_weights_it_expects_where(
    source: Path, make: Callable[[Path], nn.Module], checkpoint: bool, error: type, match: str
) -> None:
    model = make(source)
    before = tiny.anatomy(model)
    with pytest.raises(error, match=match):
        patching.patch(model, AMPLE, **{"checkpoint": source} if checkpoint else {})
    assert tiny.anatomy(model) == before


# Devices


def test_a_device_map_of_one_device_is_that_device(source: Path) -> None:
    for device_map in ("cpu", {"": "cpu"}, "auto", torch.device("cpu")):
        model = load(source, device_map=device_map, tiers=("int4",))
        assert model.dynaexq.devices[0].device == torch.device("cpu")


def test_a_device_and_a_device_map_that_may_differ_are_one_too_many(source: Path) -> None:
    with pytest.raises(SettingsError, match="expected device='cpu' or device_map='auto', got both"):
        load(source, device_map="auto", device="cpu")
    load(source, device_map={"": "cpu"}, device="cpu")


def test_a_layer_that_is_offloaded_to_disk_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    device_map = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu"}
    with pytest.raises(UnsupportedModelError, match=r"model.layers.1.mlp is offloaded, and experts stay on a device"):
        AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=dynaexq.DynaExqConfig(hbm_budget=AMPLE, tiers=("int4",)),
            device_map=device_map | {"lm_head": "cpu", "model.rotary_emb": "cpu"},
            offload_folder=tmp_path,
        )


def test_layers_on_two_devices_get_a_runtime_and_a_budget_each(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = {"model.layers.0.mlp.experts": torch.device("cpu", 0), "model.layers.1.mlp.experts": torch.device("cpu")}
    one = load(source, tiers=("int2", "int4"))
    monkeypatch.setattr("dynaexq.hf.load._device_of", lambda model, layer: devices[layer.name])
    two = load(source, tiers=("int2", "int4"))
    assert len(two.dynaexq.devices) == 2
    assert torch.equal(tiny.logits(two), tiny.logits(one))
    first, second = two.dynaexq.devices
    assert [runtime.plan.budget for runtime in (first, second)] == [AMPLE, AMPLE]
    assert (two.dynaexq.tiers() == one.dynaexq.tiers()).all()
    assert two.dynaexq.stats()["experts"] == 16
    assert two.dynaexq.tick()
    assert (two.dynaexq.hotness() > 0).any(1).all()
    two.dynaexq.set_budget(one.dynaexq.memory()["total"])
    two.dynaexq.freeze()
    two.dynaexq.thaw()
    two.dynaexq.drain()
    assert "experts at 4 bits" in str(two.dynaexq.report())
    dynaexq.unpatch(two)
    assert torch.equal(tiny.logits(two), tiny.logits(reload(source)))


def test_an_automatic_device_map_weighs_layers_by_their_packed_experts(source: Path) -> None:
    config = dynaexq.DynaExqConfig(hbm_budget=AMPLE, tiers=("int4",))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16)
    files = sorted(map(str, source.glob("*.safetensors")))
    load = CheckpointLoad(model, config, config.settings(stored=False), files, "auto")
    sizes = accelerate.utils.compute_module_sizes(model)
    base = ExpertCodec(load.layers[0].shape(), torch.bfloat16, ("int4",)).base.nbytes
    assert sizes["model.layers.0.mlp.experts"] == 8 * base
    assert not any(".experts." in name for name in model.state_dict())
    load.device_map_is_known()
    assert "model.layers.0.mlp.experts" not in accelerate.utils.compute_module_sizes(model)


# What is refused before a byte is read


def test_a_budget_that_cannot_hold_is_refused_before_the_dense_weights_are_read(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Qwen3MoeForCausalLM, "_load_pretrained_model", None)
    with pytest.raises(
        BudgetError, match=r"hbm_budget of 10,000 bytes is too small: [0-9,]+ of dense weights"
    ) as caught:
        load(source, hbm_budget=10_000)
    monkeypatch.undo()
    model = load(source, hbm_budget=caught.value.least)
    assert model.dynaexq.memory()["total"] == caught.value.least


def in_another_process(script: str, has_dynaexq: bool = False) -> subprocess.CompletedProcess[str]:
    absent = "" if has_dynaexq else "import sys; sys.modules['dynaexq'] = None"
    start = f"""
        {absent}
        import torch
        from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM
        torch.set_num_threads(1)
        prompt = torch.tensor({tiny.prompt().tolist()})
    """
    program = textwrap.dedent(start) + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tiers", [("fp16",), ("int4", "fp16"), ("int8",)], ids="-".join)
@pytest.mark.parametrize("host_copy", ["auto", "ram"])
def test_another_dtype_is_converted_and_not_read_as_it_is(
    source: Path, tmp_path: Path, tiers: tuple[str, ...], dtype: torch.dtype, host_copy: str
) -> None:
    """bfloat16 to float16 or float32 is exact for these weights, so the 16-bit source loaded so is the same model."""
    load(source, tiers=tiers).save_pretrained(tmp_path / "packed")
    options = {"hbm_budget": AMPLE, "host_copy": host_copy}
    want, got = (
        AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, quantization_config=dynaexq.DynaExqConfig(**options | more)
        )
        for directory, more in ((source, {"tiers": tiers}), (tmp_path / "packed", {}))
    )
    assert (got.dynaexq.tiers() == want.dynaexq.tiers()).all()
    assert torch.equal(tiny.logits(got), tiny.logits(want))
    got.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(tiny.logits(again), tiny.logits(got))


def test_biases_are_converted_too(tmp_path: Path) -> None:
    original = tiny_model("gpt_oss")
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if "bias" in name:
                parameter.normal_(0, 0.5)
    original.save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed", DynaExqConfig(tiers=("int8",)))
    wanted = tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32))
    for dtype in (torch.float16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype)
        assert (tiny.logits(model) - wanted).abs().max() < 0.3


def test_a_stored_dtype_that_there_is_not_is_refused(packed: Path, tmp_path: Path) -> None:
    directory = copied(packed, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["packed"]["dtype"] = "float8"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a dtype among float16, bfloat16, float32, got 'float8'"):
        reload(directory)
