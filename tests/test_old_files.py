"""Files that an earlier version wrote are still read, and mean what they meant."""

from pathlib import Path

import numpy as np
import patching
import pytest
import tiny
import torch
from numerics import assert_close
from transformers import AutoModelForCausalLM

from dynaexq import DynaExqConfig
from dynaexq.errors import SettingsError
from dynaexq.settings import Settings
from dynaexq.simulator.simulate import simulate
from dynaexq.traces import Trace

V0, V2 = (Path(__file__).parent / "data" / version for version in ("v0", "v2"))


@pytest.mark.parametrize("files", [V0, V2], ids=["version 1", "version 2, dense layers packed"])
def test_a_packed_checkpoint_answers_the_same(files):
    """Up to rounding: processors with and without bfloat16 arithmetic add up a matrix in different orders."""
    config = DynaExqConfig(activations="int16")  # with the int8 of "auto", the logits of version 2 would differ by 3 %
    model = AutoModelForCausalLM.from_pretrained(files / "packed", quantization_config=config)
    model.dynaexq.freeze()
    np.testing.assert_array_equal(model.dynaexq.tiers(), np.load(files / "tiers.npy"))
    assert_close("logits", torch.from_numpy(np.load(files / "logits.npy")), tiny.logits(model).float(), ratio=2**-6)


def test_a_head_that_was_packed_in_8_bits_stays_so(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(V2 / "packed")
    assert model.lm_head.codec.tiers == ("int8",)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.codec.tiers == ("int8",)
    with pytest.raises(SettingsError, match="head='int4' was asked for, and the checkpoint is packed with 'int8'"):
        AutoModelForCausalLM.from_pretrained(V2 / "packed", quantization_config=DynaExqConfig(head="int4"))


def test_options_kept_under_their_old_names_arrive_under_the_new():
    settings = AutoModelForCausalLM.from_pretrained(V0 / "packed").dynaexq.settings
    assert settings.hysteresis == 0.25
    assert settings.update_interval == 4
    assert settings.copy_rate_limit == 50_000_000
    assert settings.half_life == 64
    assert settings.hbm_budget == 2**20


def test_a_trace_opens_and_replays():
    trace = Trace(V0 / "trace.npz")
    assert trace.header.tiers == ("int2", "int8")
    assert [phase.name for phase in trace.phases][-1] == "second"
    outcome = simulate(trace, Settings(tiers=("int2", "int8")), upgraded=0.25)
    assert outcome.gains_known
    assert outcome.outcome.tokens.sum() > 0


def test_a_heat_profile_is_a_hotness_snapshot():
    model = tiny.tiny_qwen3_moe()
    runtime = patching.patch(model, "1MiB", tiers=("int2", "int8"), device="cpu", quantizer="rtn")
    before = runtime.hotness()
    runtime.load_hotness(V0 / "profile.safetensors")
    assert (runtime.hotness() != before).any()


def test_moments_calibrate_a_patch():
    model = tiny.tiny_qwen3_moe()
    patching.patch(model, "1MiB", tiers=("int2",), device="cpu", calibration=V0 / "moments.safetensors")
    assert tiny.logits(model).isfinite().all()
