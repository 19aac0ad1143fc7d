"""dynaexq doctor says what is there, what is missing and what to do, and its exit code says whether all is well."""

import json

import pytest
from typer.testing import CliRunner

from dynaexq.cli import doctor
from dynaexq.cli.app import app
from dynaexq.kernels.cpu.build import Unavailable


def test_it_names_the_machine_and_what_is_chosen() -> None:
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 0, shown.output
    for area in ("Python", "torch", "memory", "CPU kernel", "GPU", "cache"):
        assert f"✓ {area}" in shown.output
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert found["healthy"]
    assert {finding["area"] for finding in found["findings"]} >= {"dynaexq", "cores"}


def test_what_is_missing_has_a_remedy_and_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> tuple[str, ...]:
        raise Unavailable("no C++ compiler found")

    monkeypatch.setattr(doctor, "shipped", lambda target: None)
    monkeypatch.setattr(doctor, "find_compiler", no_compiler)
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 1
    assert '→ pip install "dynaexq[compiler]"' in shown.output
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert not found["healthy"]


def test_another_machine_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAEXQ_CPU_KERNEL", "torch")
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 1
    assert "experts run through PyTorch" in shown.output
