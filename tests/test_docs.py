"""Pages tell the truth: links lead somewhere, code compiles, commands exist, options are those that there are."""

import ast
import importlib
import importlib.util
import re

import pytest
import typer
from pages import PAGES, ROOT, blocks

from dynaexq.cli.app import app
from dynaexq.settings import OPTION_NAMES

HOME = "https://github.com/dynaexq/dynaexq/"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith(HOME):
            found = ROOT / re.sub(r"^(blob|tree)/main/?", "", path.removeprefix(HOME))
        elif "://" in path:
            continue
        else:
            found = page.parent / path if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor and found.suffix == ".md":
            headings = {
                re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in found.read_text().splitlines()
                if line.startswith("#")
            }
            assert anchor in headings, f"{page.name} links to {target}"


def test_the_readme_links_absolutely_as_a_package_index_shows_it():
    assert all("://" in target for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text()))
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


@each_page
def test_python_compiles_and_imports_what_there_is(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("dynaexq"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    found = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert found, f"{page.name}: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "dynaexq":
                assert hasattr(importlib.import_module("dynaexq"), node.attr), f"{page.name}: dynaexq.{node.attr}"


@each_page
def test_commands_take_the_options_that_they_are_shown_with(page):
    commands = typer.main.get_command(app).commands
    names = "|".join(commands)
    shown = re.findall(rf"(?:^|[`$] ?)dynaexq ((?:{names})\b[^`\n]*)", page.read_text(), re.M)
    for line in shown:
        name, *words = line.split()
        command = commands[name]
        if words and words[0] in getattr(command, "commands", ()):
            command = command.commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert options <= known, f"{page.name}: dynaexq {line}"


@each_page
def test_scripts_that_pages_name_are_there(page):
    for script in re.findall(r"python ((?:benchmarks|examples)/[\w/.-]+\.py)", page.read_text()):
        assert (ROOT / script).is_file(), f"{page.name} names {script}"


def test_the_table_of_options_is_complete():
    page = (ROOT / "docs" / "configuration.md").read_text()
    options = page[page.index("## Options") : page.index("## Who wins")]
    assert sorted(re.findall(r"^\| `(\w+)` \|", options, re.M)) == sorted(OPTION_NAMES)


def test_what_a_comment_names_with_its_module_is_there():
    """`module.Name` in backticks, in the words of the code: both are found outside of backticks."""
    sources = {p: p.read_text() for folder in ("dynaexq", "benchmarks") for p in (ROOT / folder).rglob("*.py")}
    plain = {path: re.sub(r"`[^`\n]*`", "", text) for path, text in sources.items()}
    known = {word for text in plain.values() for word in re.findall(r"\w+", text)} | {path.stem for path in sources}
    for path, text in sources.items():
        for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)+)`", text):
            lost = set(name.removesuffix(".py").split(".")) - known
            assert not lost, f"{path.relative_to(ROOT)} speaks of {name}, but nothing is called {', '.join(lost)}"


FOLDERS = ("dynaexq", "benchmarks", "examples", "tests", "docs")
SPOKEN_OF = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|md|json)\b")
SPEAKING = [*PAGES, *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SPEAKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_the_repository_that_are_spoken_of_are_there(path):
    for name in SPOKEN_OF.findall(path.read_text()):
        assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} speaks of {name}"
