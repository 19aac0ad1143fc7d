"""What the command line refuses, in a sentence and before any work: never a traceback, never a silent choice."""

import json
import re
from pathlib import Path

import pytest
import tiny
import typer
from command_line import run_main
from typer.testing import CliRunner

from dynaexq.cli import app
from dynaexq.cli.demo import embedded_model

MADE_UP = ["simulate", "--generate", "flat", "--tokens", "64", "--phases", "1", "--tiers", "int2,int4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny 16-bit checkpoint without a tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    tiny.tiny_qwen3_moe().save_pretrained(path)
    return path


def said(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """What `dynaexq ...` writes to the terminal as it fails, on one line and without the frame."""
    assert run_main(arguments, monkeypatch) in (1, 2)
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return " ".join((found.out + found.err).replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["hotness", "merge", "{empty}", "-o", "/nowhere/a"], "there is no directory /nowhere; make it first"),
        ([*MADE_UP, "--upgraded", "0.2", "--seed", "-1"], "Invalid value for '--seed'"),
        ([*MADE_UP, "--upgraded", "0.2", "--budget", "15GB"], "--hbm-budget and --upgraded both say"),
        (["quantize", "{source}", "{target}", "--annotate", "--device", "cpu"], "with --annotate nothing is packed"),
        (["quantize", "{source}", "{target}", "--annotate", "--max-shard-size", "1GB"], "nothing is packed"),
        (["demo", "--model", "{empty}"], "error: expected a checkpoint directory with a config.json, found none in"),
        (["demo", "--model", "{source}"], "error: cannot read the tokenizer of"),
        (["plan", "{source}", "--gpu", "1MB"], "805,306,368 for the driver, 0 of reserve"),
    ],
)
def test_it_refuses(
    arguments: list[str],
    sentence: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"source": checkpoint, "target": tmp_path / "target", "empty": tmp_path / "empty"}
    assert sentence in said([argument.format(**places) for argument in arguments], monkeypatch, capsys)
    assert not (tmp_path / "target").exists()


def test_the_demo_takes_no_packed_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    packed = tmp_path / "packed"
    assert (
        CliRunner().invoke(app.app, ["quantize", str(embedded_model()), str(packed), "--tiers", "int2"]).exit_code == 0
    )
    assert "is quantized already" in said(["demo", "--model", str(packed)], monkeypatch, capsys)


def test_a_recorded_trace_is_not_replaced_by_one_that_is_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trace = tmp_path / "mine.npz"
    trace.write_bytes(b"weeks of traffic")
    arguments = ["simulate", str(trace), *MADE_UP[1:], "--upgraded", "0.2"]
    assert "what is made up would take its place" in said(arguments, monkeypatch, capsys)
    assert trace.read_bytes() == b"weeks of traffic"


def test_tiers_may_be_written_with_spaces(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(checkpoint), str(tmp_path / "packed"), "--tiers", "int2, int4", "--quantizer", "rtn"]
    result = CliRunner().invoke(app.app, arguments)
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert kept["tiers"] == ["int2", "int4"]


def test_who_interrupts_packing_is_told_that_it_can_go_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dynaexq.hf.convert.quantize_checkpoint", interrupted)
    assert run_main(["quantize", str(checkpoint), str(tmp_path / "a"), "--tiers", "int4"], monkeypatch) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


TRACED = [*MADE_UP, "--upgraded", "0.2"]
QUANTIZE = ["quantize", "{source}", "{target}", "--quantizer", "rtn"]


@pytest.mark.parametrize(
    ("arguments", "has"),
    [
        (["demo", "--windows", "1"], "kl"),
        (["plan", "{source}", "--gpu", "24GiB"], "cards"),
        (["plan", "{source}"], "cards"),
        ([*QUANTIZE, "--tiers", "int4,int8"], "weights"),
        ([*QUANTIZE, "--annotate"], "options"),
        (TRACED, "coverage"),
        (["doctor"], "findings"),
        (["version"], "torch"),
    ],
)
def test_figures_are_printed_alone_as_json(arguments: list[str], has: str, checkpoint: Path, tmp_path: Path) -> None:
    places = {"source": checkpoint, "target": tmp_path / "target"}
    result = CliRunner().invoke(app.app, [*(argument.format(**places) for argument in arguments), "--json"])
    found = json.loads(result.stdout)
    assert has in (found[0] if isinstance(found, list) else found)


def test_every_command_but_the_server_has_json() -> None:
    commands = typer.main.get_command(app.app).commands
    commands |= commands.pop("hotness").commands
    without = {name for name, command in commands.items() if "--json" not in str([p.opts for p in command.params])}
    assert without == {"serve"}


@pytest.mark.parametrize("columns", ["20", "60"])
@pytest.mark.parametrize("arguments", [["plan", "{source}", "--gpu", "24GiB"], ["plan", "{source}"], TRACED])
def test_no_figure_is_cut_off_in_a_narrow_terminal(
    arguments: list[str], columns: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    run = [argument.format(source=checkpoint) for argument in arguments]
    shown = CliRunner().invoke(app.app, run, catch_exceptions=False).output
    assert "…" not in shown
    monkeypatch.setenv("COLUMNS", "300")
    wide = CliRunner().invoke(app.app, run, catch_exceptions=False).output
    figures = re.findall(r"\d[\d,.]*%?", wide)
    assert len(figures) > 10
    assert set(figures) <= set(re.findall(r"\d[\d,.]*%?", shown))


def test_progress_is_shown_on_a_terminal_and_nowhere_else(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("dynaexq.weights.quantize_experts.PROGRESS_FROM", 0)
    for number, is_terminal in enumerate((False, True)):
        monkeypatch.setattr("sys.stderr.isatty", lambda found=is_terminal: found, raising=False)
        arguments = ["quantize", str(checkpoint), str(tmp_path / str(number)), "--tiers", "int4", "--dense", "int8"]
        assert run_main(arguments, monkeypatch) == 0
        shown = capsys.readouterr().err
        assert ("quantizing" in shown) is ("packing dense layers" in shown) is is_terminal
