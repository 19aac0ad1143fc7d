"""Heat profiles: what was hot survives a restart, and another model's profile changes nothing."""

from pathlib import Path

import numpy as np
import patching
import pytest
import tiny
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file

import dynaexq
from dynaexq.checkpoint import write_tensors
from dynaexq.errors import HotnessError, SettingsError
from dynaexq.runtime.hotness_snapshot import Snapshot, read_snapshot, write_snapshot


def patched(slots: int = 4, **options: object) -> dynaexq.Runtime:
    model = tiny.tiny_qwen3_moe(torch.float32)
    runtime = patching.patch(
        model, "1GiB", **{"tiers": ("int2", "int4"), "update_interval": 1, "quantizer": "rtn"} | options
    )
    runtime.set_budget(runtime.memory()["total"] - (16 - slots) * runtime.plan.upgrade.nbytes)
    runtime.model = model  # kept alive by its runtime
    return runtime


def heat(*hot: tuple[int, int]) -> np.ndarray:
    hotness = np.full((2, 8), 0.01)
    for layer, expert in hot:
        hotness[layer, expert] = 1.0
    return hotness


HOT = ((0, 1), (0, 7), (1, 2), (1, 3))


@pytest.mark.parametrize("policy", ["topn", "frozen"])
def test_a_snapshot_is_a_warm_start(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "heat.safetensors"
    before = patched()
    before.warm_start(heat(*HOT))
    before.save_hotness(path)

    runtime = patched(policy=policy)
    runtime.load_hotness(path)
    assert {(int(a), int(b)) for a, b in np.argwhere(runtime.tiers() == 4)} == set(HOT)
    np.testing.assert_array_equal(runtime.hotness(), heat(*HOT))
    assert runtime.memory()["total"] <= runtime.plan.budget


def test_choosing_anew_gives_the_weights_that_are_published() -> None:
    runtime = patched()
    runtime.warm_start(heat((0, 0), (0, 1), (0, 2), (0, 3)))
    first = tiny.logits(runtime.model)
    runtime.warm_start(heat(*HOT))
    assert not torch.equal(tiny.logits(runtime.model), first)
    runtime.freeze()
    runtime.warm_start(heat((0, 0), (0, 1), (0, 2), (0, 3)))
    torch.testing.assert_close(tiny.logits(runtime.model), first)


def test_a_profile_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path, runtime = tmp_path / "heat.safetensors", patched()
    other = tiny.tiny_qwen3_moe(torch.float32, num_experts=4)
    with dynaexq.patch(other, "1GiB") as small:
        small.save_hotness(path)
    tiers = runtime.tiers()
    with pytest.raises(HotnessError, match="layers of 4 experts, expected a Qwen3MoeForCausalLM with 8 experts"):
        runtime.load_hotness(path)
    np.testing.assert_array_equal(runtime.tiers(), tiers)


def test_what_is_no_profile_is_refused_by_name(tmp_path: Path) -> None:
    path, runtime = tmp_path / "heat.safetensors", patched()
    with pytest.raises(FileNotFoundError):
        runtime.load_hotness(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(HotnessError, match="cannot be read"):
        runtime.load_hotness(path)
    save_file({"hotness": heat()}, path)
    with pytest.raises(HotnessError, match="no dynaexq hotness snapshot"):
        runtime.load_hotness(path)
    metadata = {"kind": "dynaexq hotness snapshot", "version": "2", "model": "M", "layers": "[]"}
    write_tensors(path, {"hotness": torch.from_numpy(heat())}, metadata)
    with pytest.raises(HotnessError, match=r"heat\.safetensors is no hotness snapshot of version 1"):
        runtime.load_hotness(path)
    layers = [f"model.layers.{i}.mlp" for i in (0, 1)]
    write_snapshot(path, "Qwen3MoeForCausalLM", layers, Snapshot(np.full((2, 8), np.nan)))
    with pytest.raises(HotnessError, match="no hotness"):
        runtime.load_hotness(path)
    for hotness in (heat()[:1], heat() - 1, heat() * np.nan):
        with pytest.raises(SettingsError, match="finite and not negative"):
            runtime.warm_start(hotness)


@pytest.mark.parametrize(
    ("model", "layers", "num_experts"),
    [("Other", ["a", "b"], 4), ("Model", ["a", "c"], 4), ("Model", ["a", "b"], 5)],
    ids=["another class", "another layer", "more experts"],
)
def test_each_difference_alone_is_refused(tmp_path: Path, model: str, layers: list[str], num_experts: int) -> None:
    write_snapshot(tmp_path / "heat", "Model", ["a", "b"], Snapshot(np.ones((2, 4))))
    assert read_snapshot(tmp_path / "heat", "Model", ["b"], 4).hotness.shape == (1, 4)
    with pytest.raises(HotnessError, match="belongs to a Model with 2 layers of 4 experts"):
        read_snapshot(tmp_path / "heat", model, layers, num_experts)


def test_a_snapshot_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = patched()
    before.warm_start(heat(*HOT))
    before.save_hotness(tmp_path / "hotness.safetensors")
    asked = []

    def fetch(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        return str(tmp_path / name)

    monkeypatch.setattr("dynaexq.checkpoint.hub_files.hf_hub_download", fetch)
    runtime = patched()
    runtime.load_hotness("me/hot", revision="v2")
    assert asked == [("me/hot", "hotness.safetensors", "v2")]
    np.testing.assert_array_equal(runtime.hotness(), heat(*HOT))


def test_what_is_not_to_be_had_from_the_hub_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("dynaexq.checkpoint.hub_files.hf_hub_download", fail)
    runtime = patched()
    before = runtime.hotness()
    with pytest.raises(HotnessError, match=r"there is no file me/hot, and hotness\.safetensors .* offline"):
        runtime.load_hotness("me/hot")
    for missing in ("heat.safetensors", "runs/heat.safetensors", "/nowhere/heat"):
        with pytest.raises(FileNotFoundError, match="there is no hotness snapshot"):
            runtime.load_hotness(missing)
    np.testing.assert_array_equal(runtime.hotness(), before)
