"""The command line: `dynaexq demo`, `dynaexq version`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Mixture-of-experts models under a hard memory budget.", no_args_is_help=True)


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="A checkpoint directory instead of the embedded model.", exists=True, file_okay=False),
    ] = None,
    base: Annotated[str, typer.Option(help="Precision that every expert has.")] = "int2",
    upgrade: Annotated[str, typer.Option(help="Precision of the hot experts.")] = "int4",
    windows: Annotated[int, typer.Option(help="Windows of 128 tokens in each phase.", min=1)] = 24,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file as well.")] = None,
) -> None:
    """Generate text on the CPU while the workload moves from prose to code to arithmetic, and show what it cost."""
    from dynaexq.demo import run, write_json

    outcomes = run(model, (base, upgrade), windows)
    if json is not None:
        write_json(outcomes, json)


@app.command()
def version() -> None:
    """Print the versions of dynaexq and of what it builds on."""
    import torch
    import transformers

    import dynaexq

    typer.echo(f"dynaexq {dynaexq.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")


def main() -> None:
    """Entry point; an error of ours is a sentence, not a traceback."""
    from dynaexq.errors import DynaExqError

    try:
        app()
    except (DynaExqError, FileNotFoundError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
