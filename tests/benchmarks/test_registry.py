"""The list of benchmarks is whole, on disk and in the documentation, and what it runs answers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

import registry

PAGE = registry.HERE.parent / "docs" / "benchmarks.md"


def test_every_script_is_listed_and_every_listed_one_is_there():
    runnable = {
        str(path.relative_to(registry.HERE))
        for path in registry.HERE.rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert {benchmark.script for benchmark in registry.BENCHMARKS} == runnable - {"registry.py"}


def test_the_page_lists_them_all():
    page = PAGE.read_text()
    assert not [benchmark.name for benchmark in registry.BENCHMARKS if f"`{benchmark.name}`" not in page]


def test_what_needs_no_more_than_a_cpu_has_its_figures_in_the_repository():
    on_a_cpu = [benchmark for benchmark in registry.BENCHMARKS if benchmark.name != "gpu"]
    assert not [benchmark.result for benchmark in on_a_cpu if not (registry.RESULTS / benchmark.result).exists()]


@pytest.mark.parametrize("benchmark", registry.BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_a_listed_option_is_one_of_the_script(benchmark):
    *_, script, option, _ = benchmark.command()
    text = Path(script).read_text()
    assert option in text or re.search(rf"^    {option.lstrip('-')}: ", text, re.M)


def test_an_unknown_name_is_answered_with_those_that_there_are():
    done = subprocess.run([sys.executable, registry.__file__, "layer"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no benchmark 'layer'" in done.stderr
