"""Compile the Triton kernels ahead of time, for GPUs that are not here, and say what came out.

    python tests/helpers/compile_kernels.py int2+int4/up/few/90 around/90 ...     -> one line of JSON a case

A process of its own, because Triton decides at import whether it interprets. Cases are pair/product/tiles/arch, at
the shape of Qwen3-30B-A3B in bfloat16, exactly as `launch` would launch them there; around/arch are the kernels around
the products. An architecture is a compute capability, such as 90, or one of AMD's, such as gfx942.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynaexq.kernels.triton import graph_sync, preparation, reductions, routing, tuning
from dynaexq.kernels.triton.grouped_gemm import expert_gemm
from dynaexq.kernels.triton.launch import matrices
from dynaexq.kernels.triton.specs import Matrix
from dynaexq.quantization import ExpertCodec
from dynaexq.types import EPOCH, FETCHED, FOUND, LARGEST_MASS, MASS_UNIT, SEEN, STEPS, WORDS_AHEAD, ExpertShape

SHAPE = ExpertShape(hidden_size=2048, intermediate_size=768, up_rows=1536, has_bias=False, transposed=False)
CHOICES, EXPERTS = 8, 128
PAIRS = {"single": CHOICES, "few": 32 * CHOICES, "many": 4096 * CHOICES}

MULTIPLES = "columns", "hidden", "num_experts", "num_groups"
"""Sizes that are multiples of 16 in the layer above, and that kernels are specialized for."""

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)")
LABEL = re.compile(r"\s*(\.L_[x\d]\w*):")


def main(cases: list[str]) -> None:
    for case in cases:
        *what, arch = case.split("/")
        found = around(arch) if what == ["around"] else products(*what, arch)
        print(json.dumps({"case": case, "kernels": found}), flush=True)  # noqa: T201 - it is read by a test


def products(pair: str, product: str, regime: str, arch: str) -> list[dict[str, Any]]:
    """Facts of every launch of a product of a layer, up or down."""
    found = []
    matrix, launches = product_of(tuple(pair.split("+")), product, PAIRS[regime], arch)
    for launch in launches:
        kernel = compiled_product(matrix, launch, arch)
        if is_amd(arch):
            found.append({"tiers": launch.tiling.tiers, **facts_of_amd(kernel)})
            continue
        codes = launch.tiling.block_n * matrix.codes / (32 * launch.num_warps)  # of a block, for one thread
        # Loops over 16-bit weights are far shorter than those over codes; a short one may be unrolled altogether.
        longest = max(map(len, inner_loops(kernel)), default=None)
        per_code = None if longest is None else round(longest / codes, 2)
        loops = [loop for loop in pipelines(kernel) if loop["in_flight"] is not None]
        found.append(
            {
                "tiers": launch.tiling.tiers,
                "instructions_per_code": per_code,
                "in_flight": min((loop["in_flight"] for loop in loops), default=None),
                "plain_loads": max((loop["plain_loads"] for loop in loops), default=None),
                **facts(kernel),
            }
        )
    return found


def around(arch: str) -> list[dict[str, Any]]:
    """Facts of the kernels around the products."""
    before = compiled(
        preparation._prepare,
        {"ids": "*i64", "weights": "*bf16", "order": "*i32", "blocks": "*i32", "counts": "*i64", "rows": "*bf16"}
        | {"sums": "*fp32"}
        | dict.fromkeys(("counting", "adding", "pairs", "tokens", "slots", "num_experts", "block_m"), "i32")
        | dict.fromkeys(("columns", "num_groups"), "i32"),
        {
            "PAIRS": routing.PAIRS_PER_PROGRAM,
            "OTHERS": routing.OTHERS_AT_A_TIME,
            "UNITS": MASS_UNIT,
            "LARGEST": LARGEST_MASS,
        }
        | {"COUNTED": routing.COUNTED_PER_PROGRAM, "WIDTH": 64, "GROUPS": reductions.GROUPS_PER_PROGRAM},
        arch,
    )
    sums = compiled(
        reductions._group_sums,
        {"rows": "*bf16", "sums": "*fp32", "columns": "i32", "num_groups": "i32"},
        {"GROUP": 64, "GROUPS": reductions.GROUPS_PER_PROGRAM},
        arch,
    )
    total = compiled(
        reductions._weighted_sum,
        {
            "results": "*bf16",
            "ids": "*i64",
            "weights": "*bf16",
            "output": "*bf16",
            "hidden": "i32",
            "num_experts": "i32",
        },
        {"CHOICES": CHOICES, "COLUMNS": reductions.COLUMNS_PER_PROGRAM},
        arch,
    )
    mass = compiled(
        routing.add_mass,
        {"sums": "*i64", "ids": "*i64", "weights": "*bf16", "pairs": "i32", "tokens": "i32", "num_experts": "i32"},
        {"first": 0, "UNITS": MASS_UNIT, "LARGEST": LARGEST_MASS, "PROGRAM": routing.COUNTED_PER_PROGRAM},
        arch,
    )
    fetch = compiled(
        graph_sync._fetch,
        {"words": "*i64", "entries": "*i64", "count": "i32"},
        {
            "EPOCH": EPOCH,
            "FOUND": FOUND,
            "FETCHED": FETCHED,
            "AHEAD": WORDS_AHEAD,
            "PROGRAM": graph_sync.WORDS_PER_PROGRAM,
        },
        arch,
    )
    report = compiled(
        graph_sync._report,
        {"words": "*i64", "sums": "*i64", "count": "i32", "start": "i32", "steps": "i32"},
        {"FETCHED": FETCHED, "SEEN": SEEN, "STEPS": STEPS, "PROGRAM": graph_sync.WORDS_PER_PROGRAM},
        arch,
    )
    kernels = before, sums, total, mass, fetch, report
    if is_amd(arch):
        return [facts_of_amd(kernel) for kernel in kernels]
    loads = re.findall(r"ld\S*\.volatile\S*\.(\w+)", fetch.asm["ptx"])
    assert set(loads) == {"b64"}, f"the host's words are loaded whole and from the host, not {loads}"
    return [facts(kernel) for kernel in kernels]


def product_of(
    tiers: tuple[str, ...], product: str, pairs: int, arch: str
) -> tuple[Matrix, tuple[tuning.Launch, ...]]:
    """The matrix and the launches of one product of a layer for `pairs` pairs."""
    codec = ExpertCodec(SHAPE, torch.bfloat16, tiers)
    up, down = matrices(codec)
    plan = tuning.plan_for(pairs, EXPERTS, up, down, swiglu=True, on=multiprocessor(arch))
    return (up, plan.up) if product == "up" else (down, plan.down)


def compiled_product(matrix: Matrix, launch: tuning.Launch, arch: str) -> Any:
    """The kernel of a launch."""
    tiling = launch.tiling
    constants = {"CHOICES": CHOICES if tiling.swiglu else 1, "matrix": matrix, "tiling": tiling}
    constants |= {} if tiling.sum_width else {"sums": None}
    constants |= {} if tiling.next_sum_width else {"output_sums": None}
    types = {"x": "*bf16", "output": "*bf16", "base": "*u8", "blocks": "*i32", "order": "*i32", "entries": "*i64"}
    types |= {"sums": "*fp32", "output_sums": "*fp32", "num_blocks": "i32"}
    options = {"num_warps": launch.num_warps, "num_stages": launch.tiling.stages}
    return compiled(expert_gemm, types, constants, arch, options)


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: str, options: dict[str, int] | None = None
) -> Any:
    """A kernel for `arch`, with the alignment of PyTorch's allocator, and of sizes as a launch has them."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (name in MULTIPLES and signature[name] == "i32")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target(arch), options={"enable_fp_fusion": True, **(options or {})})


def is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


def target(arch: str) -> GPUTarget:
    """What Triton calls it."""
    if is_amd(arch):
        return GPUTarget("hip", arch, 32 if arch.startswith(tuning.NARROW_AMD) else 64)
    return GPUTarget("cuda", int(arch), 32)


def multiprocessor(arch: str) -> tuning.Multiprocessor:
    """What tiles depend on."""
    return tuning.multiprocessor_of_amd(arch) if is_amd(arch) else tuning.multiprocessor(divmod(int(arch), 10))


def facts_of_amd(kernel: Any) -> dict[str, Any]:
    """Registers a lane, those that found no room, matrix instructions, shared memory."""
    code = kernel.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        "spilled": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1]),
        "products": len(re.findall(r"\bv_mfma|\bv_wmma", code)),
        "shared": kernel.metadata.shared,
    }


def facts(kernel: Any) -> dict[str, Any]:
    """What limits a kernel: registers, bytes parked on the stack, accesses to it inside loops, shared memory."""
    usage = of_cubin(kernel, "cuobjdump", "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    ptx, code = kernel.asm["ptx"], disassembled(kernel)
    return {
        "registers": registers,
        "parked": stack + local,
        "spills_in_loops": sum(name.startswith(("LDL", "STL")) for loop in inner_loops(kernel) for name in loop),
        "shared": kernel.metadata.shared,
        "widest_load": max(map(int, re.findall(r"\bLDG\.E\.(?:\w+\.)*?(64|128)\b", code)), default=32),
        "wide_loads": len(re.findall(r"cp\.async[^;]*, (?:0x10|16)\b", ptx)),
        "wgmma": "wgmma" in ptx,
        "stores": len(re.findall(r"\bSTG\b", code)),
    }


def pipelines(kernel: Any) -> list[dict[str, Any]]:
    """Of each loop: the copies that go on while one is waited for, None where none is; loads that nothing overlaps."""
    lines, found = kernel.asm["ttgir"].splitlines(), []
    for start, line in enumerate(lines):
        if "scf.for" in line:
            closing = line[: len(line) - len(line.lstrip())] + "}"
            end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(closing))
            body = "\n".join(lines[start:end])
            waits = [int(number) for number in re.findall(r"async_wait[^{]*\{num = (\d+)", body)]
            in_flight = min(waits, default=None)
            found.append({"in_flight": in_flight, "plain_loads": len(re.findall(r"tt\.load", body))})
    return found


def of_cubin(kernel: Any, binary: str, option: str) -> str:
    """What one of Triton's own binaries says of the compiled code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(BINARIES / binary), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def disassembled(kernel: Any) -> str:
    """The instructions of a kernel."""
    return of_cubin(kernel, "nvdisasm", "-c")


@cache
def inner_loops(kernel: Any) -> list[list[str]]:
    """Names of the instructions of each loop that has none inside."""
    places, branches, names = {}, [], []
    for line in disassembled(kernel).splitlines():
        if label := LABEL.match(line):
            places[label[1]] = len(names)
        elif instruction := INSTRUCTION.match(line):
            if instruction[1].startswith("BRA") and (target := re.search(r"\.L_\w+", instruction[2])):
                branches.append((target[0], len(names)))
            names.append(instruction[1])
    loops = [(places[target], end) for target, end in branches if places.get(target, end) < end]
    return [
        names[start : end + 1]
        for start, end in loops
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
