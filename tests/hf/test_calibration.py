"""Calibration: what is gathered, what it is good for, and that every way of loading makes the same of it."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import patching
import pytest
import torch
from models import tiny_model, tokens
from numerics import assert_close
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import dynaexq
from dynaexq.checkpoint import write_tensors
from dynaexq.cli.app import app
from dynaexq.cli.demo import embedded_model
from dynaexq.cli.demo_corpus import documents
from dynaexq.errors import CheckpointError, QuantizationError, SettingsError, UnsupportedModelError
from dynaexq.evaluate import evaluate, reference_logits, windows_of
from dynaexq.hf.calibration import calibrate_checkpoint, calibration_for, gather, generated_windows
from dynaexq.hf.dense import quantized_linears
from dynaexq.hf.discovery import find_sparse_layers
from dynaexq.hf.packed_dense import calibrated_linears
from dynaexq.quantization import ExpertCodec, ExpertInputs, ExpertWeights, Inputs
from dynaexq.settings import Settings
from dynaexq.types import ExpertShape
from dynaexq.weights.calibration import CalibrationSample, DenseMoments, LayerMoments, Met
from dynaexq.weights.calibration_file import KIND_OF_MOMENTS, read_calibration, write_calibration

SHAPE = ExpertShape(hidden_size=96, intermediate_size=80, up_rows=160, has_bias=False, transposed=False)  # both padded
TEXT = 60_000  # characters


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    parts = [
        part for domain in ("code", "prose") for part, _ in zip(documents(domain, "train"), range(40), strict=False)
    ]
    path.write_text("".join(part[: TEXT // 80] for part in parts))
    return path


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moments of the embedded model on text that training saw."""
    model, path = original(), tmp_path_factory.mktemp("moments") / "moments.safetensors"
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    ids = [
        i for _, part in zip(range(60), documents("code", "train"), strict=False) for i in tokenizer(part)["input_ids"]
    ]
    dynaexq.calibrate(model, path, torch.tensor(ids[: 16 * 256]).view(16, 256))
    return path


def original() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(embedded_model(), experts_implementation="eager").eval()


def moments_of(columns: int, seed: int = 0) -> Inputs:
    """Of inputs that go together, as those of real models do."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, 6, generator=generator) @ torch.randn(6, columns, generator=generator)
    inputs += 0.5 * torch.randn(4 * columns, columns, generator=generator)
    return Inputs(inputs.T @ inputs)


def some_experts(count: int) -> tuple[ExpertWeights, list[ExpertInputs]]:
    weights = ExpertWeights(torch.randn(count, 160, 96), torch.randn(count, 96, 80))
    up = moments_of(96)
    return weights, [ExpertInputs(up, moments_of(80, seed)) for seed in range(count)]


def known_of(model: torch.nn.Module, path: Path) -> CalibrationSample:
    return calibration_for(Settings(calibration=path), find_sparse_layers(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "granitemoe"])
@torch.no_grad()
def test_what_is_known_of_an_expert_is_what_its_matrices_meet(family, tmp_path):
    model, met = tiny_model(family), []
    layers = find_sparse_layers(model)
    layer, shape = layers[-1], layers[-1].shape()
    hook = layer.experts.register_forward_hook(lambda module, args, output: met.append((args, output)))
    dynaexq.calibrate(model, tmp_path / "c.safetensors", tokens(3, 90))
    hook.remove()
    up, down = (torch.zeros(layer.num_experts, size, size) for size in (shape.hidden_size, shape.intermediate_size))
    of_layer, seen = torch.zeros_like(up[0]), torch.zeros(layer.num_experts)
    for (rows, index, weights), output in met:
        expected = torch.zeros_like(output)
        for t in range(len(rows)):
            for expert, weight in zip(index[t].tolist(), weights[t], strict=True):
                units = units_of(layer, rows[t], expert)
                expected[t] += weight * output_of(layer, units, expert)
                units = units / units.square().mean().sqrt()
                up[expert] += weight**2 * rows[t].outer(rows[t])
                of_layer += weight**2 * rows[t].outer(rows[t])
                down[expert] += weight**2 * units.outer(units)
                seen[expert] += 1
        torch.testing.assert_close(expected, output, rtol=1e-3, atol=1e-5)  # the units are those of the model
    known = known_of(model, tmp_path / "c.safetensors")
    found = list(known.of_experts(len(layers) - 1, 2, layer.weights().map(lambda part: part[2:5]), shape))
    assert len(found) == 3
    for expert, inputs in enumerate(found, 2):
        for name, own, prior in (("up", up, of_layer), ("down", down, torch.eye(shape.intermediate_size))):
            blend = seen[expert] * in_units(own[expert]) + 64 * in_units(prior)
            assert_close(name, in_units(blend), getattr(inputs, name).moments, 2e-3)


def in_units(moments: Tensor) -> Tensor:
    """Of their mean square."""
    return moments / moments.diagonal().mean().clamp_min(1e-12)


@torch.no_grad()
def test_a_part_of_the_model_knows_the_same_of_its_experts(tmp_path):
    model = tiny_model("qwen3_moe")
    dynaexq.calibrate(model, tmp_path / "c.safetensors", tokens(3, 50))
    layer, known = find_sparse_layers(model)[1], known_of(model, tmp_path / "c.safetensors")
    of_all = list(known.of_experts(1, 0, layer.weights(), layer.shape()))
    of_part = known.select([1], 4, 4).of_experts(0, 1, layer.weights().map(lambda part: part[5:7]), layer.shape())
    for whole, part in zip(of_all[5:7], of_part, strict=True):
        assert torch.equal(whole.up.moments, part.up.moments)
        assert torch.equal(whole.down.moments, part.down.moments)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "qwen3_next"])
def test_dense_layers_are_known_by_what_they_meet_and_those_that_meet_the_same_share_it(family):
    model, met = tiny_model(family), {}
    layers = find_sparse_layers(model)
    expected = dict(calibrated_linears(model, layers))
    hooks = [
        linear.register_forward_hook(lambda module, args, output, path=path: met.setdefault(path, []).append(args[0]))
        for path, linear in expected.items()
    ]
    _, dense = gather(model, tokens(3, 9))
    for hook in hooks:
        hook.remove()
    assert dense.keys() == expected.keys()
    for path, inputs in met.items():
        rows = torch.cat([part.flatten(0, -2) for part in inputs]).float()
        moments = rows.T @ rows
        assert_close(path, moments / moments.diagonal().mean(), dense[path].float(), 1e-3)
    blocks = [path.removesuffix(".k_proj") for path in dense if path.endswith(".k_proj")]
    assert blocks
    assert all(dense[f"{block}.{name}_proj"] is dense[f"{block}.k_proj"] for block in blocks for name in "qv")
    assert not any(path.endswith("lm_head") for path in dense), "the head has 8 bits"


def units_of(layer, row: Tensor, expert: int) -> Tensor:
    weights = layer.weights()
    matrix = weights.up[expert].T if layer.shape().transposed else weights.up[expert]
    product = F.linear(row[None], matrix, None if weights.up_bias is None else weights.up_bias[expert])
    return (layer.experts._apply_gate(product) if layer.experts.has_gate else layer.experts.act_fn(product))[0]


def output_of(layer, units: Tensor, expert: int) -> Tensor:
    weights = layer.weights()
    matrix = weights.down[expert].T if layer.shape().transposed else weights.down[expert]
    return F.linear(units, matrix, None if weights.down_bias is None else weights.down_bias[expert])


@pytest.mark.parametrize("tiers", [("int2",), ("int2", "int4"), ("int4", "fp16")], ids="+".join)
def test_experts_that_are_coded_together_get_the_bits_they_get_alone(tiers):
    weights, inputs = some_experts(3)
    codec = ExpertCodec(SHAPE, torch.float32, tiers, 32)
    together = codec.encode(weights, inputs)
    for i in range(3):
        alone = codec.encode(weights.map(lambda part, i=i: part[i : i + 1]), inputs[i : i + 1])
        assert torch.equal(alone.base[0], together.base[i])
        assert together.upgrade is None or torch.equal(alone.upgrade[0], together.upgrade[i])


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("tiers", [("int2",), ("int2", "int4"), ("int4",)], ids="+".join)
def test_the_error_of_the_output_falls(tiers, group_size):
    weights, inputs = some_experts(2)
    codec = ExpertCodec(SHAPE, torch.float32, tiers, group_size)
    errors = []
    for known in (None, inputs):
        encoded = codec.encode(weights, known)
        readings = [codec.decode(encoded.base, None, torch.float32)]
        if encoded.upgrade is not None:
            readings.append(codec.decode(encoded.base, encoded.upgrade, torch.float32))
        errors.append([[output_error(r, weights, inputs, name) for name in ("up", "down")] for r in readings])
    for plain, aware in zip(*errors, strict=True):
        assert (torch.tensor(aware) < 0.75 * torch.tensor(plain)).all()


def output_error(reading: ExpertWeights, weights: ExpertWeights, inputs: list[ExpertInputs], name: str) -> float:
    off = getattr(reading, name) - getattr(weights, name)
    return sum(float((d @ getattr(known, name).moments * d).sum()) for d, known in zip(off, inputs, strict=True))


def test_a_ladder_that_leads_to_int8_stays_as_it_is():
    weights, inputs = some_experts(1)
    codec = ExpertCodec(SHAPE, torch.float32, ("int4", "int8"))
    plain, aware = codec.encode(weights), codec.encode(weights, inputs)
    assert torch.equal(plain.base, aware.base)
    assert torch.equal(plain.upgrade, aware.upgrade)


@pytest.mark.parametrize("tokens_seen", [0, 5])
def test_an_expert_that_was_hardly_ever_routed_is_quantized_no_worse_than_if_nothing_were_known(tokens_seen):
    shape = ExpertShape(96, 64, 128, has_bias=False, transposed=False)
    met = Met(torch.randn(500, 96), torch.ones(500, 1).short(), torch.ones(500, 1))
    met.top_k_index[:tokens_seen] = 0
    known = CalibrationSample(("l",), {"l": silu_gate}, lambda name: met, DenseMoments(), "")
    weights = ExpertWeights(torch.randn(1, 128, 96), torch.randn(1, 96, 64))
    codec = ExpertCodec(shape, torch.float32, ("int2",))
    inputs = list(known.of_experts(0, 0, weights, shape))
    assert (codec.encode(weights, inputs).errors <= 1.06 * codec.encode(weights).errors).all()


def test_a_model_without_a_head_is_calibrated_as_well(tmp_path):
    model = tiny_model("qwen3_moe").model
    dynaexq.calibrate(model, tmp_path / "c.safetensors", tokens(3, 20))
    assert known_of(model, tmp_path / "c.safetensors").layers[0] == "layers.0.mlp.experts"


def silu_gate(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return F.silu(gate) * up


def test_a_model_that_does_not_fit_is_read_layer_by_layer(text, tmp_path, monkeypatch):
    calibrate_checkpoint(embedded_model(), text, tmp_path / "whole.safetensors")
    available = 10 * 2**20  # of 15 MB
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    calibrate_checkpoint(embedded_model(), text, tmp_path / "by_layers.safetensors")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    whole, by_layers = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "by_layers"))
    assert whole.keys() == by_layers.keys()
    for name, part in whole.items():
        if name.startswith("rows"):
            assert_close(name, part.float(), by_layers[name].float(), 2e-2)
        elif name.startswith("dense"):
            assert_close(name, part.float(), by_layers[name].float(), 1e-2)


def test_a_calibrated_model_is_nearer_to_the_original_in_what_it_was_not_calibrated_on(calibrated):
    model = original()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    windows = windows_of(tokenizer, documents("code"), 4, 128)
    reference = reference_logits(model, windows)
    kl = {}
    for calibration in (None, calibrated):
        patched = original()
        dynaexq.patch(patched, "1GB", tiers=("int2",), calibration=calibration)
        kl[calibration] = evaluate(patched, windows, reference).kl
    assert kl[calibrated] < 0.95 * kl[None]


def test_so_are_dense_layers_in_4_bits(calibrated):
    model = original()
    windows = windows_of(AutoTokenizer.from_pretrained(embedded_model()), documents("code"), 4, 128)
    reference, kl = reference_logits(model, windows), {}
    for calibration in (None, calibrated):
        patched = original()
        layers = find_sparse_layers(patched)
        known = calibration_for(Settings(calibration=calibration), layers)
        settings = Settings(hbm_budget=1, dense="int4")
        for path, twin in quantized_linears(patched, layers, settings, torch.device("cpu"), known).items():
            patched.set_submodule(path, twin)
        kl[known is None] = evaluate(patched, windows, reference).kl
    assert kl[False] < 0.9 * kl[True]


def test_patch_the_loader_and_a_packed_checkpoint_give_the_same_bits(calibrated, tmp_path):
    options = {"hbm_budget": "1GB", "tiers": ("int2", "int4"), "dense": "int4"}
    ids = torch.arange(40)[None]
    model = original()
    patching.patch(model, **options, calibration=calibrated)
    config = dynaexq.DynaExqConfig(**options, calibration=str(calibrated))
    loaded = AutoModelForCausalLM.from_pretrained(embedded_model(), quantization_config=config)
    command = ["quantize", str(embedded_model()), str(tmp_path / "packed"), "--tiers", "int2,int4", "--dense", "int4"]
    result = CliRunner().invoke(app, [*command, "--hbm-budget", "1GB", "--calibrate", str(calibrated)])
    assert result.exit_code == 0, result.output
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert "calibration" not in (tmp_path / "packed" / "config.json").read_text()
    with torch.no_grad():
        answers = [m(ids).logits for m in (model, loaded, packed)]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_the_command_calibrates_on_a_text_and_keeps_what_it_found(text, tmp_path):
    command = ["quantize", str(embedded_model()), str(tmp_path / "packed"), "--tiers", "int2", "--hbm-budget", "1GB"]
    result = CliRunner().invoke(app, [*command, "--calibrate", str(text)])
    assert result.exit_code == 0, result.output
    found = load_file(tmp_path / "packed.calibration.safetensors")
    assert [f"rows.{i}" in found for i in range(5)] == [True] * 4 + [False]
    assert len(found["rows.0"]) % 512 == 0
    assert found["rows.0"].dtype == torch.bfloat16


def test_a_model_is_calibrated_on_its_own_words_where_there_are_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr("dynaexq.hf.calibration.generated_windows", partial(generated_windows, count=12, length=256))
    command = ["quantize", str(embedded_model()), str(tmp_path / "packed"), "--tiers", "int2", "--hbm-budget", "1GB"]
    result = CliRunner().invoke(app, [*command, "--calibrate", "self"])
    assert result.exit_code == 0, result.output
    tokenizer, model = AutoTokenizer.from_pretrained(embedded_model()), original()
    windows = windows_of(tokenizer, documents("code"), 4, 128)
    reference = reference_logits(model, windows)
    dynaexq.patch(model, "1GB", tiers=("int2",))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert evaluate(packed, windows, reference).kl < 0.95 * evaluate(model, windows, reference).kl


def test_own_words_are_the_same_again_and_leave_the_random_state_alone():
    model = tiny_model("qwen3_moe")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again = generated_windows(model, count=3, length=20), generated_windows(model, count=3, length=20)
    assert torch.equal(torch.get_rng_state(), before)
    assert [window.tolist() for window in first] == [window.tolist() for window in again]
    assert {len(window) for window in first} == {20}
    assert first[0].tolist() != first[1].tolist()
    with pytest.raises(UnsupportedModelError, match="pass windows of token ids"):
        generated_windows(torch.nn.Linear(2, 2))


SHAPE_OF_FILES = ExpertShape(8, 24, 48, has_bias=False, transposed=False)


def read(path: Path, layers: tuple[str, ...] = ("a.experts",)) -> CalibrationSample | LayerMoments:
    return read_calibration(path, layers, 3, SHAPE_OF_FILES, [silu_gate] * len(layers))


def some_met(count: int = 5) -> Met:
    return Met(torch.randn(count, 8).bfloat16(), torch.randint(0, 3, (count, 2)).short(), torch.rand(count, 2))


def write_moments(path: Path, **changes: Tensor) -> None:
    parts = {"up": torch.rand(1, 8, 8), "down": torch.rand(1, 3, 1, 64, 64), "tokens": torch.tensor([[1, 2, 3]])}
    write_tensors(path, parts | changes, {"kind": KIND_OF_MOMENTS, "layers": '["a.experts"]'})


def test_what_is_written_comes_back(tmp_path):
    shared, met, path = torch.rand(8, 8).half(), some_met(), tmp_path / "c.safetensors"
    dense = {"q": shared, "k": shared, "o": torch.rand(4, 4).half()}
    write_calibration(path, {"a.experts": met}, dense)
    found = read(path)
    assert found.layers == ("a.experts",)
    assert all(map(torch.equal, found.read("a.experts"), met))
    assert found.dense.of_path.keys() == dense.keys()
    assert all(torch.equal(found.dense.of_path[name], dense[name]) for name in dense)
    assert sum(name.startswith("dense.") for name in load_file(path)) == 2, "what is shared is written once"
    fingerprint = found.fingerprint
    write_calibration(path, {"a.experts": some_met()}, dense)
    assert read(path).fingerprint != fingerprint


def test_files_of_before_dense_layers_had_any_moments_still_serve(tmp_path):
    write_moments(tmp_path / "m.safetensors")
    found = read(tmp_path / "m.safetensors")
    assert found.of_dense("q", 8, torch.device("cpu")) is None
    weights = ExpertWeights(torch.randn(2, 48, 8), torch.randn(2, 8, 24))
    known = list(found.of_experts(0, 1, weights, SHAPE_OF_FILES))
    assert [(len(inputs.up.moments), len(inputs.down.moments)) for inputs in known] == [(8, 24)] * 2


def test_moments_of_another_width_are_refused_by_name():
    with pytest.raises(QuantizationError, match=r"a\.q_proj: expected moments of 8 inputs, calibration has 4"):
        DenseMoments({"a.q_proj": torch.eye(4).half()}).inputs("a.q_proj", 8, torch.device("cpu"))


def test_what_belongs_to_another_model_is_refused_by_name(calibrated, tmp_path):
    model = tiny_model("qwen3_moe")
    with pytest.raises(CheckpointError, match=r"belongs to another model.*mlp\.experts.*calibrate this model"):
        dynaexq.patch(model, "1GB", tiers=("int2",), calibration=calibrated)
    assert not hasattr(model, "dynaexq")
    write_moments(tmp_path / "m.safetensors", tokens=torch.tensor([[1, 2]]))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        read(tmp_path / "m.safetensors")


def test_a_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="what dynaexq's calibration writes"):
        read(embedded_model() / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"there is no .*; dynaexq\.calibrate"):
        read(embedded_model() / "calibration.safetensors")
    met = some_met()
    for wrong in (met._replace(rows=met.rows[:4]), met._replace(top_k_weights=met.top_k_weights[:, :1])):
        write_calibration(tmp_path / "c.safetensors", {"a.experts": wrong}, {})
        with pytest.raises(CheckpointError, match="is something else"):
            read(tmp_path / "c.safetensors")


def test_a_file_that_was_damaged_is_refused_where_it_is_read(tmp_path):
    path = tmp_path / "c.safetensors"
    write_calibration(path, {"a.experts": some_met()}, {})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        read(path).read("a.experts")


def test_figures_that_are_not_finite_are_refused(tmp_path):
    path, met = tmp_path / "c.safetensors", some_met()
    for wrong in (met._replace(rows=met.rows * torch.inf), met._replace(top_k_weights=met.top_k_weights / 0 * 0)):
        write_calibration(path, {"a.experts": wrong}, {})
        with pytest.raises(CheckpointError, match="not finite"):
            read(path).read("a.experts")
    write_calibration(path, {"a.experts": met}, {"q": torch.full((2, 2), torch.inf).half()})
    with pytest.raises(CheckpointError, match="not finite"):
        read(path)
    write_moments(path, up=torch.full((1, 8, 8), torch.nan))
    with pytest.raises(CheckpointError, match="not finite"):
        read(path)


def test_a_packed_checkpoint_cannot_be_calibrated_any_more(calibrated, tmp_path):
    model = original()
    dynaexq.patch(model, "1GB", tiers=("int2",))
    model.save_pretrained(tmp_path / "packed")
    config = dynaexq.DynaExqConfig(calibration=str(calibrated))
    with pytest.raises(SettingsError, match="packed: its codes are fixed"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=config)


def test_rounding_and_calibration_exclude_each_other():
    with pytest.raises(SettingsError, match="ignores a calibration"):
        dynaexq.Settings(quantizer="rtn", calibration="moments.safetensors")
    with pytest.raises(SettingsError, match="path of a file"):
        dynaexq.Settings(calibration=3)


def test_a_text_of_a_few_words_is_refused(tmp_path):
    (tmp_path / "short").write_text("a few words")
    command = ["quantize", str(embedded_model()), str(tmp_path / "packed"), "--tiers", "int2"]
    result = CliRunner().invoke(app, [*command, "--calibrate", str(tmp_path / "short")])
    assert isinstance(result.exception, CheckpointError)
    assert "expected at least 512 tokens" in str(result.exception)


def test_a_model_that_the_memory_cannot_hold_does_not_write_its_own_text(tmp_path, monkeypatch):
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr("dynaexq.hf.free_memory.psutil.virtual_memory", lambda: memory)
    command = ["quantize", str(embedded_model()), str(tmp_path / "packed"), "--tiers", "int2"]
    result = CliRunner().invoke(app, [*command, "--calibrate", "self"])
    assert isinstance(result.exception, CheckpointError)
    assert "1,000 are free; give a text, which it reads layer by layer" in str(result.exception)
