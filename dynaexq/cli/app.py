"""The command line: `dynaexq demo`, `plan`, `quantize`, `serve`, `top`, `hotness`, `simulate`, `doctor`, `version`."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import dynaexq
from dynaexq.errors import DynaExqError, SettingsError


def _writable(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before the work is done whose figures are for it."""
    if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
        raise SettingsError(f"cannot write {path}: there is no directory {path.parent}; make it first")
    return path


Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else.")]


def _print_json(figures: Any) -> None:
    typer.echo(json.dumps(figures, indent=2))


def _tiers_of(text: str) -> tuple[str, ...]:
    return tuple(tier.strip() for tier in text.split(","))


app = typer.Typer(help="Mixture-of-experts models under a hard memory budget.", no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """Mixture-of-experts models under a hard memory budget."""


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="A checkpoint directory instead of the embedded model.", exists=True, file_okay=False),
    ] = None,
    base: Annotated[str, typer.Option(help="Precision that every expert has.")] = "int2",
    upgrade: Annotated[str, typer.Option(help="Precision of the hot experts.")] = "int4",
    windows: Annotated[int, typer.Option(help="Windows of 128 tokens in each phase.", min=1)] = 24,
    as_json: Json = False,
) -> None:
    """Generate text on the CPU while the workload moves from prose to code to arithmetic, and show what it cost."""
    from dynaexq.cli.demo import figures, run

    outcomes = run(model, (base, upgrade), windows, quiet=as_json)
    if as_json:
        _print_json(figures(outcomes))


@app.command()
def plan(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint directory, a config.json, or the name of a repository on the Hub.")
    ],
    gpu: Annotated[
        str | None, typer.Option(help="Memory of the card, such as 24GiB; several common ones if left out.")
    ] = None,
    hbm_budget: Annotated[
        str | None, typer.Option(help="Bytes for weights alone, such as 20GiB, as patch takes them; instead of --gpu.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu: plan for this machine's RAM; cuda: for its card, if it has one.")
    ] = None,
    tiers: Annotated[
        str | None, typer.Option(help="Base and upgrade, such as int4,int8; the best if left out.")
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(help="Dense layers in int8, int6, int4, bnb-8bit, bnb-4bit; auto: the best of ours for a card."),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = 64,
    context: Annotated[
        int, typer.Option("--max-context", "--context", help="Tokens of a sequence that the cache must hold.")
    ] = 4096,
    batch: Annotated[int, typer.Option("--max-batch", "--batch", help="Sequences at once.")] = 1,
    host_ram: Annotated[str | None, typer.Option(help="RAM that upgrades may wait in, such as 32GiB.")] = None,
    as_json: Json = False,
) -> None:
    """Show what of a model fits a card, from its configuration alone: no weights are read, and no GPU is needed."""
    named = {"tiers": tiers and _tiers_of(tiers), "dense": dense, "device": device}
    options: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    options |= {"group_size": group_size} if group_size != 64 else {}
    from dynaexq.cli.plan import run
    from dynaexq.cli.plan_tables import figures, show

    spec, estimates, options = run(source, gpu, hbm_budget, options, context, batch, host_ram)
    if as_json:
        _print_json(figures(spec, estimates))
    else:
        show(spec, estimates, str(source), options)


@app.command()
def quantize(
    source: Annotated[
        Path,
        typer.Argument(
            help="The checkpoint, a directory or a name on the Hub: config.json and safetensors in 16 bit, or in "
            "FP8, MXFP4, GPTQ, AWQ or compressed-tensors.",
            file_okay=False,
        ),
    ],
    target: Annotated[Path, typer.Argument(help="The directory to write.", file_okay=False)],
    tiers: Annotated[str | None, typer.Option(help="Base and upgrade, such as int4,int8.")] = None,
    hbm_budget: Annotated[
        str | None, typer.Option(help="Bytes, such as 20GiB: chooses the tiers, and is kept.")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Dense layers in int8, int6, int4, or auto; 16 bit if left out.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = 64,
    quantizer: Annotated[str, typer.Option(help="als, or the faster rtn.")] = "als",
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="self: calibrate on what the model writes by itself, which takes the memory of the whole 16-bit "
            "model; or a file of text such as it will meet; or what was found then (.safetensors)."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to quantize; the accelerator if there is one.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Bytes of a file; 5GB if left out.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    subfolder: Annotated[str, typer.Option(help="Folder of the source with the checkpoint.")] = "",
    variant: Annotated[str | None, typer.Option(help="fp16 for model.fp16.safetensors.")] = None,
    annotate: Annotated[
        bool, typer.Option(help="Link the 16-bit shards and only add the configuration; quantize when loading.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Pack a 16-bit checkpoint, so that it starts at the speed of the disk; an interrupted run is resumed."""
    from dynaexq.cli.packing import figures
    from dynaexq.hf.config import DynaExqConfig
    from dynaexq.hf.convert import annotate_checkpoint, quantize_checkpoint
    from dynaexq.hf.hub import checkpoint_directory

    source = checkpoint_directory(source, revision, subfolder)
    options: dict[str, Any] = {"group_size": group_size, "quantizer": quantizer}
    if tiers is not None:
        options["tiers"] = _tiers_of(tiers)
    if hbm_budget is not None:
        options["hbm_budget"] = hbm_budget
    if dense is not None:
        options["dense"] = dense
    if annotate:
        if calibrate is not None:
            raise typer.BadParameter("an annotated checkpoint is quantized when it is loaded; pass calibration= then")
        if device is not None or max_shard_size is not None:
            raise typer.BadParameter(
                "--device and --max-shard-size are for packing; with --annotate nothing is packed"
            )
        annotate_checkpoint(source, target, DynaExqConfig(**options), variant=variant)
    else:
        if calibrate is not None:
            options["calibration"] = _calibrated(source, calibrate, target, device, variant)
        try:
            config = DynaExqConfig(**options, device=device)
            quantize_checkpoint(source, target, config, max_shard_size or "5GB", variant=variant)
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on from here", err=True)
            raise
    if as_json:
        _print_json(figures(target))
    else:
        typer.echo(f"{target} is ready: from_pretrained({str(target)!r})")


def _calibrated(source: Path, calibrate: str, target: Path, device: str | None, variant: str | None) -> Path:
    """The file `calibrate` if it is what was found before, else what is gathered as it says, kept beside `target`."""
    from dynaexq.hf.calibration import calibrate_checkpoint

    text = None if calibrate == "self" else Path(calibrate)
    if text is not None and not text.is_file():
        raise typer.BadParameter(
            f"--calibrate takes self, a text or what was found, and there is no file {calibrate!r}"
        )
    if text is not None and text.suffix == ".safetensors":
        return text
    path = target.with_name(f"{target.name}.calibration.safetensors")
    calibrate_checkpoint(source, text, path, device, variant)
    typer.echo(
        f"{path} holds what calibration found; pass it to --calibrate or calibration= to use it again", err=True
    )
    return path


@app.command()
def simulate(
    trace: Annotated[
        Path | None, typer.Argument(help="A routing trace (.npz), as runtime.trace() writes it.", dir_okay=False)
    ] = None,
    generate: Annotated[
        str | None,
        typer.Option(help="Make the trace up first: qwen3-30b, qwen3-next-80b, qwen3-235b, deepseek-v3 or flat."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each made-up phase.", min=8)] = 4000,
    phases: Annotated[int, typer.Option(help="How many made-up phases.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of what is made up.", min=0)] = 0,
    hbm_budget: Annotated[
        str | None, typer.Option("--hbm-budget", "--budget", help="Bytes for all weights, such as 20GiB.")
    ] = None,
    upgraded: Annotated[float | None, typer.Option(help="Share of experts to upgrade, instead of a budget.")] = None,
    tiers: Annotated[str, typer.Option(help="Base and upgrade, such as int2,int4; or auto.")] = "auto",
    policy: Annotated[str, typer.Option(help="topn, threshold or frozen.")] = "topn",
    option: Annotated[list[str] | None, typer.Option(help="Another setting, such as half_life=256.")] = None,
    link: Annotated[str, typer.Option(help="Bytes per second to the device, such as 25GB (PCIe 4).")] = "25GB",
    copy_rate_limit: Annotated[
        float, typer.Option("--copy-rate-limit", "--link-share", help="Share of the link that moves may take.")
    ] = 0.1,
    tokens_per_second: Annotated[float, typer.Option(help="Pace of the model.", min=0.001)] = 50.0,
    replicas: Annotated[int, typer.Option(help="Copies of the model that share the traffic.", min=1)] = 1,
    request_tokens: Annotated[int, typer.Option(help="Tokens until the next replica has its turn.", min=1)] = 256,
    exchange_every: Annotated[
        int | None,
        typer.Option(help="Tokens until the replicas tell each other their routing counts; never if left out.", min=1),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay routing through the policy, without a model: coverage, moves, traffic, and whether it is worth it."""
    from dynaexq.settings import Settings, parse_bytes
    from dynaexq.simulator.replay import Replicas
    from dynaexq.simulator.simulate import parse_options, provided
    from dynaexq.simulator.simulate import simulate as run

    options = {"policy": policy, "copy_rate_limit": float(copy_rate_limit), **parse_options(option or [])}
    options |= {"hbm_budget": hbm_budget} if hbm_budget else {}
    options |= {"tiers": _tiers_of(tiers)} if tiers != "auto" else {}
    if hbm_budget and upgraded is not None:
        raise typer.BadParameter(
            "--hbm-budget and --upgraded both say how many experts are upgraded; give one of them"
        )
    settings = Settings(**options)
    with provided(trace, generate, tokens, phases, settings.update_interval, seed) as opened:
        fleet = Replicas(replicas, request_tokens, exchange_every)
        rate = parse_bytes(link, "link")
        simulation = run(opened, settings, upgraded, None, rate, tokens_per_second, fleet)
        if as_json:
            _print_json(simulation.figures())
        else:
            simulation.show()


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or a name on the Hub, packed or in 16 bit.")],
    hbm_budget: Annotated[
        str | None, typer.Option(help="Bytes for all weights, such as 20GiB; what the checkpoint says if left out.")
    ] = None,
    kv_reserve: Annotated[
        str | None, typer.Option(help="Bytes of the budget that the KV cache may take, such as 2GiB, or auto.")
    ] = None,
    tiers: Annotated[str | None, typer.Option(help="Base and upgrade, such as int4,int8.")] = None,
    dense: Annotated[str | None, typer.Option(help="Dense layers in int8, int6, int4, or auto.")] = None,
    policy: Annotated[str | None, typer.Option(help="topn, threshold or frozen.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    continuous_batching: Annotated[
        bool, typer.Option(help="Compute requests together as they come, or one after the other.")
    ] = True,
    max_context: Annotated[int, typer.Option(help="Tokens of a sequence that the cache has room for.", min=1)] = 4096,
    max_batch: Annotated[int, typer.Option(help="Sequences at once that the cache has room for.", min=1)] = 8,
    hotness: Annotated[
        str, typer.Option(help="File that keeps what is learned of the traffic between runs; none keeps nothing.")
    ] = "auto",
    log_level: Annotated[str, typer.Option(help="Of Transformers: debug, info, warning or error.")] = "warning",
) -> None:
    """Serve a model as OpenAI's API, by the server of Transformers; precision follows what is asked.

    Metrics for Prometheus are at /metrics, a live page at /dynaexq, the state of health at /health.
    """
    from dynaexq.cli.serving import start

    options = {"hbm_budget": hbm_budget, "kv_reserve": kv_reserve, "tiers": tiers and _tiers_of(tiers), "dense": dense,
               "policy": policy}  # fmt: skip
    start(model, options, hotness, host=host, port=port, device=device, continuous_batching=continuous_batching,
          max_context=max_context, max_batch=max_batch, log_level=log_level)  # fmt: skip


@app.command()
def top(
    url: Annotated[str, typer.Argument(help="Address of a server started by dynaexq serve.")] = "127.0.0.1:8000",
    seconds: Annotated[float, typer.Option(help="Between two looks.", min=0.1)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    as_json: Json = False,
) -> None:
    """Watch a running server: memory, precision and hotness of every expert, coverage, moves."""
    from dynaexq.cli.top import snapshot_of, watch

    if as_json:
        _print_json(snapshot_of(url))
    else:
        watch(url, seconds, once)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has for dynaexq, what is missing and what to do; the exit code is 1 if anything is."""
    from dynaexq.cli.doctor import figures, findings

    found = findings()
    if as_json:
        _print_json(figures(found))
    else:
        for area, said, remedy in found:
            typer.echo(f"{'✗' if remedy else '✓'} {area}: {said}" + (f"\n  → {remedy}" if remedy else ""))
    if any(finding.remedy for finding in found):
        raise typer.Exit(1)


hotness_app = typer.Typer(help="Look at hotness files, merge and compare them.", no_args_is_help=True)
app.add_typer(hotness_app, name="hotness")

HotnessFile = Annotated[
    Path, typer.Argument(help="As runtime.save_hotness or dynaexq serve writes it, or a repository on the Hub.")
]


@hotness_app.command("show")
def hotness_show(file: HotnessFile, as_json: Json = False) -> None:
    """Show whose traffic a file has: model, layers, kinds of traffic, and the hottest experts of each layer."""
    from dynaexq.cli.hotness import contents, show

    found = contents(file)
    if as_json:
        _print_json(found)
    else:
        show(found)


@hotness_app.command("merge")
def hotness_merge(
    files: Annotated[list[Path], typer.Argument(help="Files of one model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", callback=_writable)],
    as_json: Json = False,
) -> None:
    """Merge what several runs or replicas have learned into one file to start from."""
    from dynaexq.cli.hotness import contents, merge

    merge(files, output)
    if as_json:
        _print_json(contents(output))
    else:
        typer.echo(f"{output} holds the traffic of {len(files)} files")


@hotness_app.command("diff")
def hotness_diff(one: HotnessFile, other: HotnessFile, as_json: Json = False) -> None:
    """Compare two files: how much of the traffic of one the best fifth of the experts for the other would cover."""
    from dynaexq.cli.hotness import comparison, show_comparison

    found = comparison(one, other)
    if as_json:
        _print_json(found)
    else:
        show_comparison(found)


@app.command()
def version(as_json: Json = False) -> None:
    """Print the versions of dynaexq and of what it builds on."""
    from importlib.metadata import version as installed

    versions = {"dynaexq": dynaexq.__version__, **{name: installed(name) for name in ("torch", "transformers")}}
    if as_json:
        _print_json(versions)
    else:
        typer.echo(", ".join(f"{name} {number}" for name, number in versions.items()))


def main() -> None:
    """Entry point; an error of ours is a sentence, not a traceback.

    `plan` is short, and most of its time goes into importing PyTorch and Transformers: garbage collection, which has
    nothing to find there, is off, and the process ends without taking everything apart.
    """
    is_short = sys.argv[1:2] == ["plan"]
    if is_short:
        gc.disable()
    code: Any = 0
    try:
        app()
    except (DynaExqError, OSError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        code = 1
    except SystemExit as leaving:
        code = leaving.code
    if is_short and isinstance(code, int):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
