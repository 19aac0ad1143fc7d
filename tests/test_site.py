"""The documentation builds as a site: every page has its place, every link leads somewhere, every notebook runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import ROOT

pytest.importorskip("mkdocs")

NOTEBOOKS = sorted(path.stem for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"))


def entries(nav: object) -> list[str]:
    if isinstance(nav, dict):
        nav = list(nav.values())
    return [nav] if isinstance(nav, str) else [found for part in nav for found in entries(part)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as a gate would build it: what is to be warned of is an error, and nothing is remembered."""
    place = tmp_path_factory.mktemp("site")
    settings = f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {ROOT / 'docs'}\nsite_dir: {place / 'built'}\n"
    settings += "plugins:\n  mkdocs-jupyter:\n    cache: false\n"
    (place / "mkdocs.yml").write_text(settings)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(place / "mkdocs.yml")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return place / "built"


def test_every_page_has_its_place(site: Path) -> None:
    pages = entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    folders = {page.rpartition(".")[0].removesuffix("index").rstrip("/") for page in pages}
    assert all((site / folder / "index.html").is_file() for folder in folders)
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in written if not page.startswith("decisions/0")} <= set(pages)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_notebook_has_run_and_shows_a_picture(site: Path, name: str) -> None:
    page = (site / "notebooks" / name / "index.html").read_text()
    assert "data:image/png;base64" in page
    assert "Traceback" not in page


def test_there_are_the_three_notebooks() -> None:
    assert NOTEBOOKS == ["budget-sweep", "quickstart", "shifting-workload"]


def test_the_reference_has_what_users_call(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    for name in ("hf.patcher.patch", "runtime.runtime.Runtime.set_budget", "plots.kl_by_bits", "errors.BudgetError"):
        assert f'id="dynaexq.{name}"' in page
    assert "hysteresis" in page
