"""The native kernel in a program of its own: under sanitizers, and for Arm under an emulator."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import attention_cases
import pytest
import torch
from decoder_cases import CACHED, OPTIONS, DecoderCase, decoder_cache, decoder_case, decoder_inputs
from kernel_cases import EXPERTS, TOLERANCE, UGLY, case, fused
from kernel_program import KernelProgram, compile_driver
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from dynaexq.kernels import Step, attention, reference
from dynaexq.kernels.cpu import build, interface, native, native_decoder
from dynaexq.kernels.gradients import expert_gradients
from dynaexq.quantization import IN_STRIPS, LinearCodec

SANITIZED = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
TIERS = [
    ("int2", "int4"),
    ("int2", "int8"),
    ("int3", "int4"),
    ("int4", "int6"),
    ("int4", "int8"),
    ("int4", "fp16"),
]
"""Every kind of code that is read from planes, and 16-bit weights."""


class Program(NamedTuple):
    """What starts it, and whether it takes bfloat16 alone."""

    command: list[str | Path]
    all_bfloat16: bool = False


def sanitized(directory: Path, all_bfloat16: bool) -> Program:
    """Any byte that is read or written out of place ends it."""
    targets = [target for target in build.INSTRUCTION_SETS if build.cpu_features().issuperset(target.features)]
    if not targets or (all_bfloat16 and targets[0] is not build.AVX512_BF16):
        pytest.skip("no instruction set of this CPU is served, or none that multiplies pairs of bfloat16")
    flags = [flag for flag in targets[0].flags if all_bfloat16 or not flag.startswith("-D")]
    try:
        return Program([compile_driver(directory, build.find_compiler(), [*flags, *SANITIZED])], all_bfloat16)
    except build.Unavailable as missing:
        pytest.skip(str(missing))
    except RuntimeError as error:
        if "cannot find -l" not in str(error):
            raise
        pytest.skip("the compiler comes without its sanitizers")


def emulated(directory: Path, target: build.InstructionSet) -> Program:
    if not shutil.which(CROSS_COMPILER) or not shutil.which(EMULATOR):
        pytest.skip(f"needs {CROSS_COMPILER} and {EMULATOR}")
    return Program([EMULATOR, compile_driver(directory, (CROSS_COMPILER,), [*target.flags, "-O3", "-static"])])


PROGRAMS = {
    "sanitizers": partial(sanitized, all_bfloat16=False),
    "sanitizers, pairs of bfloat16": partial(sanitized, all_bfloat16=True),
    build.NEON.name: partial(emulated, target=build.NEON),
    build.NEON_I8MM.name: partial(emulated, target=build.NEON_I8MM),
}


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return PROGRAMS[request.param](tmp_path_factory.mktemp("program"))


@pytest.fixture(autouse=True)
def _three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "team", SimpleNamespace(size=3, observe=lambda *seconds: None))


@pytest.mark.parametrize("tiers", TIERS, ids="+".join)
def test_a_layer_follows_the_reference(program, tmp_path, tiers):
    for name, shape in UGLY.items():
        for num_tokens, activations, bits in ((1, "int16", 8), (40, "int16", 16), (1, "int8", 16), (40, "int8", 8)):
            got = fused(tiers, torch.bfloat16, shape, num_tokens, activations=activations, scale_bits=bits)
            kernel = KernelProgram(program.command, tmp_path, got.upgrades)
            run = native.NativeLayer(got.layer, torch.bfloat16, kernel)
            output = run(got.hidden_states, got.top_k_index, got.top_k_weights, got.upgrades.entries)
            tolerance = TOLERANCE[torch.bfloat16] * (2 if activations == "int8" else 1)
            assert_close(f"{tiers} {name} {activations}", got.run(reference.expert_mlp), output, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tiers", TIERS, ids="+".join)
def test_so_do_other_dtypes_and_gradients(program, tmp_path, tiers, dtype):
    if program.all_bfloat16:
        pytest.skip("it takes bfloat16 alone")
    scale_bits = 8 if dtype == torch.float32 else 16
    got = case(tiers, dtype, UGLY["200 and 90, transposed, bias"], activation_name="silu", scale_bits=scale_bits)
    run = native.NativeLayer(got.layer, dtype, KernelProgram(program.command, tmp_path, got.upgrades))
    arguments = got.hidden_states, got.top_k_index, got.top_k_weights
    output = run(*arguments, got.upgrades.entries)
    assert_close(f"{tiers} {dtype}", got.run(reference.expert_mlp), output, TOLERANCE[dtype])
    grad = torch.randn(got.hidden_states.shape).to(dtype)
    expected = expert_gradients(grad, *arguments, got.layer, got.upgrades)
    found: tuple[Tensor, Tensor] = run.gradients(grad, *arguments, got.upgrades.entries)
    for name, one, other in zip(("hidden", "weights"), expected, found, strict=True):
        assert_close(f"{tiers} {dtype} {name}", one.float(), other, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["int4", "int6", "int8", None])
def test_and_dense_matrices(program, tmp_path, name):
    weight, rows = torch.randn(150, 200).bfloat16(), torch.randn(5, 200).bfloat16()
    codec, block = None, weight
    if name is not None:
        codec = LinearCodec(*weight.shape, torch.bfloat16, name, arrangement=IN_STRIPS)
        block, _ = codec.encode(weight)
        weight = codec.decode(block, torch.bfloat16)
    run = native.NativeLinear(
        codec, block, torch.bfloat16, KernelProgram(program.command, tmp_path), activations="int16"
    )
    assert_close(str(name), F.linear(rows, weight), run(rows), TOLERANCE[torch.bfloat16])


def test_attention_follows_the_formula(program, tmp_path):
    kernel = KernelProgram(program.command, tmp_path)
    run = native_decoder.NativeAttention(kernel.attend, 64)
    for shape in attention_cases.SHAPES[:4]:
        for mask in attention_cases.MASKS:
            tensors = [t if t is None else t.contiguous() for t in attention_cases.tensors(shape, mask)]
            assert run.takes(*tensors)
            assert_close(f"{shape} {mask}", attention(*tensors, 0.2), run(*tensors, 0.2), 2**-8)


@pytest.fixture(params=OPTIONS, ids=str)
def decoder(request: pytest.FixtureRequest, program: Program, tmp_path: Path) -> DecoderCase:
    kernel = KernelProgram(program.command, tmp_path)
    functions = {name: getattr(kernel, name) for name in ("before_attention", "after_attention", "pass_layers")}
    case = decoder_case(SimpleNamespace(forward=kernel, **functions), request.param, num_tokens=4)
    kernel.upgrades = case.experts.upgrades
    return case


def test_a_decoder_layer_is_that_of_its_steps(decoder):
    rows, cosine, sine, attended = decoder_inputs(2, 2)
    for one, other in zip(
        decoder.before(rows, cosine, sine), decoder.native.before_attention(rows, cosine, sine), strict=True
    ):
        assert_close("heads", one, other, 0)
    entries, counts = decoder.experts.upgrades.entries, torch.zeros(EXPERTS + 2, dtype=torch.int64)
    expected, _ = decoder.after(attended, rows, entries)
    assert_close("output", expected, decoder.native.after_attention(attended, rows, entries, counts), 2**-8)


def test_and_so_is_a_whole_one_over_a_cache(decoder):
    rows, cosine, sine, _ = decoder_inputs(2, 2)
    cache = decoder_cache(2, 2).contiguous()
    seen = torch.rand(2, 1, 2, CACHED + 2) < 0.8
    query, key, value = decoder.before(rows, cosine, sine)
    wanted = cache.clone()
    wanted[0, :, :, CACHED:], wanted[1, :, :, CACHED:] = key, value
    entries, counts = decoder.experts.upgrades.entries, torch.zeros(EXPERTS + 2, dtype=torch.int64)
    expected, _ = decoder.after(attention(query, *wanted, seen, 0.3), rows, entries)
    output = torch.empty_like(rows)
    step = decoder.native.step(Step(rows, output, cosine, sine, *cache, seen, 0.3))
    decoder.native.run([step], [(entries, counts)])
    assert_close("output", expected, output, 2**-6)  # attention rounds as well
    assert torch.equal(cache, wanted)
