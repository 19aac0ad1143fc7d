"""What pages show is what happens: every block of Python and every command is run, offline, on a small model."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import typer
from pages import PAGES, ROOT, blocks
from published import QWEN3_30B, saved
from typer.testing import CliRunner

import dynaexq
from dynaexq.cli.app import app
from dynaexq.cli.demo import embedded_model
from dynaexq.hf import calibration
from dynaexq.policy.kinds import WORD_BUCKETS, LearnedKinds
from dynaexq.runtime.hotness_snapshot import Snapshot, write_snapshot

NEEDS_A_SERVER = "http://127.0.0.1"  # run in tests/server


def named(language: str, wanted: Callable[[str], bool] = lambda _: True) -> Any:
    """A test for each block of a language, with the page that it stands on."""
    found = [(page, block) for page in PAGES for block in blocks(page, language) if wanted(block)]
    return pytest.mark.parametrize("block", [block for _, block in found], ids=[page.stem for page, _ in found])


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to work in, where models of the Hub are the embedded one."""
    monkeypatch.chdir(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: Any, **options: Any) -> Any:
        return load(embedded_model() if str(name).startswith("Qwen/") else name, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return tmp_path


def surroundings(block: str) -> dict[str, Any]:
    """What a page takes to be there: a model, patched if it is only looked at, a tokenizer, inputs, texts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16)
    if "model.dynaexq" in block and "from_pretrained" not in block:
        dynaexq.patch(model, "1GiB", tiers=("int4", "int8"), config={"quantizer": "rtn"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_model())
    inputs = tokenizer("def add(a, b):", return_tensors="pt") | {"max_new_tokens": 8}
    texts = ["The number of items in the list. " * 200]
    return {"model": model, "tokenizer": tokenizer, "inputs": inputs, "texts": texts, "dynaexq": dynaexq}


@named("python", lambda block: NEEDS_A_SERVER not in block)
def test_python_runs(block: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(calibration.generated_windows, count=8, length=64)  # of the model's own words
    monkeypatch.setattr(calibration, "generated_windows", few)
    exec(compile(block, "page", "exec"), surroundings(block))


def on_a_small_model(arguments: list[str]) -> list[str]:
    ours = ("Qwen/", "examples/tiny-moe")
    return [str(embedded_model()) if argument.startswith(ours) else argument for argument in arguments]


def commands(block: str) -> list[list[str]]:
    """The words of each line, without comments."""
    return [line.split("#")[0].split() for line in block.splitlines() if line.split("#")[0].split()]


@named("bash")
def test_commands_run(block: str, elsewhere: Path) -> None:
    for number, name in enumerate(("one", "two")):
        hotness = np.random.default_rng(number).random((2, 4))
        learned = LearnedKinds(hotness[None], np.ones(1), np.ones((1, WORD_BUCKETS)), np.zeros(1))
        write_snapshot(elsewhere / f"{name}.safetensors", "Model", ["a", "b"], Snapshot(hotness, learned))
    for program, *arguments in commands(block):
        program = program.removeprefix(".venv/bin/")
        if program == "dynaexq" and arguments[0] not in ("serve", "top"):  # those are in tests/server
            done = CliRunner().invoke(app, on_a_small_model(arguments), catch_exceptions=False)
            assert done.exit_code == 0, done.output
        elif program == "dynaexq":
            typer.main.get_command(app).make_context("dynaexq", arguments, resilient_parsing=False)
        elif program == "pip":
            extras = re.findall(r"dynaexq\[(\w+)\]", " ".join(arguments))
            assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
        elif program == "make":
            assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
        elif program in ("git", "cd", "curl", "python3"):
            pass  # what it takes to be here
        elif program in ("python", "torchrun"):
            assert (ROOT / next(word for word in arguments if word.endswith(".py"))).is_file()
        else:
            pytest.fail(f"nothing here runs {program!r}")


@named("text", lambda block: block.startswith("$ dynaexq"))
def test_what_a_command_is_shown_to_print_it_prints(block: str, elsewhere: Path) -> None:
    """Lines may be left out; figures of made-up traffic may differ by what machines round differently."""
    saved(QWEN3_30B, elsewhere / "Qwen3-30B-A3B")
    command, *shown = block.splitlines()
    done = CliRunner().invoke(app, command.split()[2:])
    printed = done.output + (f"error: {done.exception}" if done.exception else "")
    lines = [spread(line) for line in printed.splitlines()]
    for line in filter(None, map(spread, shown)):
        assert any(alike(line, other) for other in lines), f"{line}\nis not among\n{printed}"


def spread(line: str) -> list[str]:
    return re.sub("[│┃━┡╇┩┏┳┓└┴┘─]", " ", line).split()


def alike(line: list[str], other: list[str]) -> bool:
    if line[-1] == "...":
        line, other = line[:-1], other[: len(line) - 1]
    return len(line) == len(other) and all(map(same, line, other))


def same(word: str, other: str) -> bool:
    figures = [re.fullmatch(r"([\d,.]+)(%?)", text) for text in (word, other)]
    if word == other or None in figures:
        return word == other
    first, second = (float(figure[1].replace(",", "")) for figure in figures)
    return abs(first - second) <= 0.05 * first + 0.5


def test_a_shown_line_must_be_there_but_for_what_is_rounded() -> None:
    table = SimpleNamespace(printed=spread("│ text │ 4,000 │ 85.5% │ 224 │"))
    assert alike(spread(" text  4,000  85.6%  224"), table.printed)
    assert not alike(spread(" text  4,000  61.0%  224"), table.printed)
    assert not alike(spread(" code  4,000  85.6%  224"), table.printed)
    assert alike(spread("text 4,000 ..."), table.printed)
