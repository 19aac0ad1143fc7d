"""Our codes and mixes beside what others would make of the same experts at the same size.

    python benchmarks/quality/peers.py [--model DIR --text DIR] [--ggml libggml-base.so] [--json FILE] [--picture FILE]

KL divergence from the model in its own dtype, nats per token, on a stream of held-out text; only experts are
quantized. What is calibrated was calibrated on 20,480 tokens of each kind from the part that training saw: GPTQ and
dynaexq on each expert's own second moments, llama.cpp's codes on their diagonal, which it calls the importance matrix.
A mix follows the stream from what the calibration text routes to; the others stand still.

llama.cpp's K and IQ codes are made and read by its own library, which `pip install llama-cpp-python` brings along as
`llama_cpp/lib/libggml-base.so`. RTN, HQQ and GPTQ are ours, in `quantizers.py` and `peer_codes.py`.
"""

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peer_codes import Ggml, Matrices, Reading, gptq_codes, plain_codes
from quality_bytes import bits_a_weight, mix
from rich.console import Console
from rich.table import Table
from streams import Hotness, Stream, use_one_thread
from tqdm import tqdm

import dynaexq
from dynaexq import plots
from dynaexq.cli.demo import embedded_model
from dynaexq.cli.demo_corpus import Corpus
from dynaexq.hf.calibration import calibration_for
from dynaexq.hf.discovery import find_sparse_layers
from dynaexq.settings import Settings

CALIBRATION_WINDOWS = 160
STATIC = (("int2", 64), ("int2", 32), ("int3", 64), ("int3", 32), ("int4", 64), ("int4", 32))
MIXED_BITS = {
    ("int2", "int3"): (2.5, 3.0),
    ("int2", "int4"): (2.5, 3.0, 3.25, 3.5),
    ("int3", "int4"): (3.5, 4.0),
}
MIX_GROUP = 64
Row = dict[str, Any]


def calibrated_on(stream: Stream) -> Path:
    """What the calibration text makes the experts meet, in a file."""
    path = Path(tempfile.mkdtemp()) / "calibration.safetensors"
    dynaexq.calibrate(stream.model, path, stream.calibration(CALIBRATION_WINDOWS))
    return path


def experts_of(stream: Stream, calibration: Path) -> Matrices:
    """Each expert's weights, and the second moments of what they are multiplied by."""
    layers = find_sparse_layers(stream.model)
    known = calibration_for(Settings(calibration=calibration), layers)
    assert known is not None, "it has just been written"
    return [
        (layer.weights(), list(known.of_experts(index, 0, layer.weights(), layer.shape())))
        for index, layer in enumerate(layers)
    ]


def others(experts: Matrices, ggml: Path | None) -> Iterator[Reading]:
    """What static quantizers of others make of the experts."""
    yield from plain_codes(experts)
    yield from gptq_codes(experts)
    if ggml is not None:
        yield from Ggml(ggml).codes(experts)


def kl_of(stream: Stream, reading: Reading) -> float:
    """KL of the model with its experts as `reading` has them."""
    model = copy.deepcopy(stream.model)
    for layer, (up, down) in zip(find_sparse_layers(model), reading.matrices, strict=True):
        layer.weights().up.data.copy_(up)
        layer.weights().down.data.copy_(down)
    return stream.kl(model)


def statics(stream: Stream, calibration: Path | None) -> Iterator[Row]:
    """Every expert at one of our precisions."""
    for tier, group_size in tqdm(STATIC, desc="dynaexq", unit="code"):
        options = {"group_size": group_size, "calibration": calibration and str(calibration)}
        model, runtime = stream.patched(0.0, tiers=(tier,), **options)
        bits = bits_a_weight(runtime, runtime.memory()["base"])
        yield row("dynaexq", f"{tier} g{group_size}", calibration, bits, stream.send(model, runtime).mean_kl)


def mixes(stream: Stream, hotness: Hotness, calibration: Path | None) -> Iterator[Row]:
    """The experts that the traffic needs a step above the others."""
    options = {"group_size": MIX_GROUP, "calibration": calibration and str(calibration)}
    for tiers, bits in tqdm([(tiers, b) for tiers, all_bits in MIXED_BITS.items() for b in all_bits], unit="mix"):
        found = mix(stream, tiers, bits, hotness, **options)
        if found is not None:
            yield row("dynaexq, mixed", f"{found.name}, g{MIX_GROUP}", calibration, found.bits, found.kl)


def row(who: str, code: str, calibration: object, bits: float, kl: float) -> Row:
    """One line of the table."""
    return {"who": who, "code": code, "calibrated": bool(calibration), "bits per weight": bits, "KL": kl}


@torch.no_grad()
def main(
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory; the embedded model by default.")] = None,
    text: Annotated[Path | None, typer.Option(help="A directory of files KIND.txt; the demo's by default.")] = None,
    ggml: Annotated[
        Path | None, typer.Option(help="llama.cpp's libggml-base.so; without it those are left out.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each phase of the stream.")] = 5_000,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw KL against bits here (PNG).")] = None,
) -> None:
    """Measure everybody on one stream, and print the table by size."""
    use_one_thread()
    stream = Stream(model or embedded_model(), tokens, cycles=1, corpus=Corpus(text))
    calibration, hotness = calibrated_on(stream), stream.hotness()
    rows = [
        row(reading.who, reading.code, reading.calibrated, reading.bits, kl_of(stream, reading))
        for reading in others(experts_of(stream, calibration), ggml)
    ]
    for file in (None, calibration):
        rows += [*statics(stream, file), *mixes(stream, hotness, file)]
    rows.sort(key=lambda r: r["bits per weight"])
    table = Table("who", "code", "calibrated", "bits", "KL", title=f"{len(stream.phases)} kinds of {tokens:,} tokens")
    for r in rows:
        calibrated = "yes" if r["calibrated"] else ""
        table.add_row(r["who"], r["code"], calibrated, f"{r['bits per weight']:.2f}", f"{r['KL']:.4f}")
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps({"tokens_a_phase": stream.tokens_a_phase, "rows": rows}, indent=2) + "\n")
    if picture:
        plots.kl_by_bits(rows).savefig(picture, dpi=150)


if __name__ == "__main__":
    typer.run(main)
