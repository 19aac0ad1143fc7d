"""How many small wrongs the tests notice: each mutant has one, and is killed by the first test that fails.

    python benchmarks/mutation.py [--sample 100] [--only memory] [--json FILE]

The suite runs once under coverage, and each mutant meets only the tests that execute its line, its package's own
first.
Mutants are forks of a process that has imported PyTorch and pytest already: a library that rewrites the files or wraps
the functions would import PyTorch anew each time, or put frames between a `CallLock` and its caller. All of it happens
in a copy of the tree, as what removes stale directories is among what goes wrong. C++ that does not compile counts as
no mutant; what is for other CPUs, and what is fetched ahead, is left alone.
"""

import ast
import contextlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PACKAGES = ("policy", "memory", "runtime", "checkpoint")
CPP = "kernels/cpu/src"
COPIED = (
    ".ci",
    "dynaexq",
    "tests",
    "examples",
    "benchmarks",
    "docs",
    "pyproject.toml",
    "mkdocs.yml",
    "Makefile",
    "README.md",
    "CONTRIBUTING.md",
)
OTHER_CPUS = ("avx2.h", "neon.h")
CPP_TESTS = (
    *(f"tests/kernels/test_{name}.py" for name in ("cpu_kernel", "team", "kernels", "linear")),
    "tests/runtime/test_few_rows.py",
)

MOST_TESTS = 200
"""Tests that a mutant meets at most."""
SECONDS = 240
"""A mutant that takes longer is killed: it hangs."""
MOST_MEMORY = 16 << 30
CHECKED = 2
"""Lines per package whose tests must pass without a wrong, before any is tried."""

OPPOSITES = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is not": "is", "is": "is not",
    "not in": "in", "in": "not in", "and": "or", "or": "and", "&&": "||", "||": "&&",
    "+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "+", "<<": ">>", ">>": "<<", "&": "|", "|": "&", "^": "&",
    "+=": "-=", "-=": "+=", "|=": "&=", "&=": "|=", "*=": "+=", "<<=": ">>=", ">>=": "<<=",
    "min": "max", "max": "min", "any": "all", "all": "any", "break": "continue", "continue": "break",
    "True": "False", "False": "True", "true": "false", "false": "true",
}  # fmt: skip


class Mutant(NamedTuple):
    """One wrong: `text[start:end]` of a file becomes `becomes`.

    `Mutant("dynaexq/memory/retries.py", 40, 1201, 1202, "<=")` has `<=` in line 40 where `<` was.

    Attributes:
        path: relative to the root of the tree.
        line: from 1.
        start, end: in characters of the file.
    """

    path: str
    line: int
    start: int
    end: int
    becomes: str

    def applied(self, text: str) -> str:
        return text[: self.start] + self.becomes + text[self.end :]

    def innocent(self) -> "Mutant":
        """The same place without a wrong."""
        return self._replace(end=self.start, becomes="")

    def described(self, text: str) -> dict[str, str | int]:
        was = " ".join(text[self.start : self.end].split())
        line = text.splitlines()[self.line - 1].strip()
        return {"file": self.path, "line": self.line, "code": line, "was": was[:80], "became": self.becomes}


def python_mutants(path: str, text: str) -> Iterator[Mutant]:
    """Wrongs in what Python executes: not in annotations, docstrings, log lines or the words of messages."""
    starts = [0]
    for row in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))

    def at(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def whole(node: ast.AST, becomes: str) -> Mutant:
        return Mutant(path, node.lineno, *at(node), becomes)

    def between(left: ast.AST, right: ast.AST) -> Iterator[Mutant]:
        start, end = at(left)[1], at(right)[0]
        found = re.search(r"is not|not in|\b(?:is|in|and|or)\b|[-+*/%<>=!&|^]+", text[start:end])
        if found and found[0] in OPPOSITES:
            line = text.count("\n", 0, start + found.start()) + 1
            yield Mutant(path, line, start + found.start(), start + found.end(), OPPOSITES[found[0]])

    for node in executed(ast.parse(text)):
        match node:
            case ast.Compare():
                for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
                    yield from between(left, right)
            case ast.BoolOp():
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from between(left, right)
            case ast.BinOp() if not isinstance(node.left, ast.JoinedStr):
                yield from between(node.left, node.right)
            case ast.AugAssign():
                yield from between(node.target, node.value)
            case ast.UnaryOp(op=ast.Not()):
                yield whole(node, ast.unparse(node.operand))
            case ast.Constant(value=bool()):
                yield whole(node, str(not node.value))
            case ast.Constant(value=int() | float()):
                yield whole(node, repr(node.value + 1))
            case ast.If() | ast.IfExp() if isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
                yield whole(node.test, f"(not {ast.unparse(node.test)})")
            case ast.Expr(value=ast.Call()):
                yield whole(node, "pass")
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]) | ast.Raise():
                yield whole(node, "pass")
            case ast.Return(value=ast.AST()) if ast.unparse(node.value) != "None":
                yield whole(node, "return None")
            case ast.Break() | ast.Continue():
                yield whole(node, OPPOSITES[text[slice(*at(node))]])
            case ast.Call(func=ast.Name(id="min" | "max" | "any" | "all")):
                yield whole(node.func, OPPOSITES[node.func.id])


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, without annotations, decorators' arguments, log lines and `strict=`."""
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return
    if isinstance(node, ast.Expr) and ast.unparse(node).startswith("logger."):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from executed(child)


def cpp_mutants(path: str, text: str) -> Iterator[Mutant]:
    """Wrongs in C++ as clang-format lays it out: an operator of two operands stands between spaces."""
    code = re.sub(
        r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"|^#.*?$", lambda found: " " * len(found[0]), text, flags=re.S | re.M
    )
    operator = r"(?<= )(?:[<>]=?|[=!]=|[-+*/%&|^]=?|<<|>>|&&|\|\|)(?= )|\b(?:break|continue|true|false|min|max)\b"
    number = r"(?<![\w.'])\d+(?![\w.'])"
    statement = r"(?<=\n)[ ]+[\w.\[\]>-]+(?: [-+|]?= [^;{}]*|\([^;{}]*\));(?=\n)"
    for found in re.finditer(f"{statement}|{operator}|{number}", code):
        if "fetch" in text[: found.end()].splitlines()[-1]:
            continue  # a hint: wherever it points, results are the same
        line = code.count("\n", 0, found.start() + (len(found[0]) - len(found[0].lstrip()))) + 1
        becomes = str(int(found[0]) + 1) if found[0].isdigit() else OPPOSITES.get(found[0], "")
        yield Mutant(path, line, found.start(), found.end(), becomes)


def all_mutants(tree: Path, place: str) -> list[Mutant]:
    """Every mutant of a package of `tree`, or of the C++."""
    pattern, made = ("*", cpp_mutants) if place == CPP else ("*.py", python_mutants)
    files = [file for file in sorted((tree / "dynaexq" / place).glob(pattern)) if file.name not in OTHER_CPUS]
    return [mutant for file in files for mutant in made(str(file.relative_to(tree)), file.read_text())]


class Coverage:
    """Which tests execute which lines, and how long each takes."""

    def __init__(self, tree: Path):
        from coverage import Coverage as Measured

        self._tree = tree
        self._coverage = Measured(str(tree / ".coverage"), config_file=str(tree / "pyproject.toml"))
        self._coverage.load()
        self._data = self._coverage.get_data()
        self._excluded: dict[str, set[int]] = {}
        cases = xml.parse(tree / "durations.xml").iter("testcase")
        self._seconds = {self._name(case): float(case.get("time", 0)) for case in cases}
        self._lines: dict[str, dict[int, list[str]]] = {}

    @staticmethod
    def _name(case: xml.Element) -> str:
        return f"{case.get('file')}::{case.get('name')}"

    def counts(self, mutant: Mutant) -> bool:
        """Whether a machine without a GPU can execute its line."""
        file = str(self._tree / mutant.path)
        if file not in self._excluded:
            self._excluded[file] = set(self._coverage.analysis2(file)[2])
        return mutant.line not in self._excluded[file]

    def tests(self, mutant: Mutant) -> list[str]:
        """Those that execute its line, those of its package first; the latter alone if only an import executes it.

        Read before a fork: in a child, coverage.py takes its data for those of the parent, and erases them.
        """
        if not mutant.path.endswith(".py"):
            return list(CPP_TESTS)
        file = str(self._tree / mutant.path)
        if file not in self._lines:
            self._lines[file] = self._data.contexts_by_lineno(file)
        names = {context.split("|")[0] for context in self._lines[file].get(mutant.line, ())}
        package = f"tests/{Path(mutant.path).parent.name}/"
        if names == {""}:
            names = {name for name in self._seconds if name.startswith(package)}
        known = [name for name in names if name in self._seconds]
        return sorted(known, key=lambda name: (not name.startswith(package), self._seconds[name]))[:MOST_TESTS]


def measure_coverage(tree: Path, jobs: int) -> None:
    """Run the suite of `tree` once, with a record of the lines that each test executes."""
    command = (
        *(sys.executable, "-m", "pytest", "-q", "-n", str(jobs), "--dist", "loadfile", "--junitxml=durations.xml"),
        *("-o", "junit_family=xunit1", "--cov=dynaexq", "--cov-context=test", "--cov-report=", "tests"),
        *("--ignore=tests/benchmarks", "--ignore=tests/examples", "--ignore=tests/test_prose.py"),
        "--ignore=tests/test_docs.py",
    )
    subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}, check=True)


def run_mutant(tree: Path, mutant: Mutant, tests: list[str]) -> int:
    """In a fork of its own: pytest's exit status with the mutant in the place of what it is of. 0: it survives."""
    text = mutant.applied((tree / mutant.path).read_text())
    if mutant.path.endswith(".py"):
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))  # sanitizers of C++ need more
        code_of = SourceFileLoader.get_code
        path = str(tree / mutant.path)

        def get_code(loader: SourceFileLoader, name: str) -> object:
            return compile(text, path, "exec") if loader.path == path else code_of(loader, name)

        SourceFileLoader.get_code = get_code
    else:
        compile_mutant(tree, mutant, text)
    import pytest

    if not tests:
        return SURVIVED
    without = (part for plugin in ("cacheprovider", "xdist", "pytest_cov") for part in ("-p", f"no:{plugin}"))
    early = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # the fork has plugins imported already
    return int(pytest.main(["-x", "-q", *without, *early, *tests]))


def compile_mutant(tree: Path, mutant: Mutant, text: str) -> None:
    """Let the kernel be compiled of the mutant, or leave if there is none."""
    place = Path(tempfile.mkdtemp())
    sources = place / "src"
    shutil.copytree(tree / "dynaexq" / CPP, sources)
    (sources / Path(mutant.path).name).write_text(text)
    os.environ["DYNAEXQ_CACHE_DIR"] = str(place / "cache")
    build = importlib.import_module("dynaexq.kernels.cpu.build")
    build.SOURCES, build.FLAGS = sources, tuple(flag.replace("-O3", "-O1") for flag in build.FLAGS)
    if build.load(True) is None or build.load(False) is None:
        os._exit(NO_MUTANT)


SURVIVED, NO_MUTANT, HUNG = 0, 77, -1


class Forks:
    """Children that run at once, `jobs` of them."""

    def __init__(self, jobs: int):
        self._jobs = jobs
        self._running: dict[int, tuple[Mutant, float]] = {}

    def statuses(self, runs: dict[Mutant, Callable[[], int]]) -> Iterator[tuple[Mutant, int]]:
        """Each mutant with what became of it, in the order in which they end."""
        waiting = list(reversed(runs.items()))
        while waiting or self._running:
            while waiting and len(self._running) < self._jobs:
                mutant, run = waiting.pop()
                self._running[self._fork(run)] = mutant, time.monotonic()
            time.sleep(0.02)
            yield from self._ended()

    @staticmethod
    def _fork(run: Callable[[], int]) -> int:
        process = os.fork()
        if process:
            return process
        os.setsid()
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(silence, stream)
        status = 1
        try:
            status = run()
        finally:
            os._exit(status)

    def _ended(self) -> Iterator[tuple[Mutant, int]]:
        for process, (mutant, start) in list(self._running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended and time.monotonic() - start < SECONDS:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            if not ended:
                os.waitpid(process, 0)
            del self._running[process]
            yield mutant, os.waitstatus_to_exitcode(status) if ended else HUNG


def main(
    sample: Annotated[int, typer.Option(help="mutants per package; 0 for all")] = 100,
    only: Annotated[str, typer.Option(help=f"one of {', '.join(PACKAGES)}, {CPP}")] = "",
    seed: int = 0,
    jobs: int = len(os.sched_getaffinity(0)),
    tree: Annotated[Path | None, typer.Option(help="a copy that an earlier run has left here, or makes")] = None,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    console = Console()
    tree = (tree or Path(tempfile.mkdtemp(prefix="mutation-"))).resolve()
    if not (tree / "durations.xml").exists():
        copy_tree(tree)
        measure_coverage(tree, jobs)
    os.chdir(tree)
    sys.path[0] = str(tree)
    os.environ |= {"OMP_NUM_THREADS": "1", "TMPDIR": tempfile.mkdtemp(prefix="mutants-")}
    for name in ("torch", "transformers", "pytest", "hypothesis"):
        importlib.import_module(name)
    coverage = Coverage(tree)

    def runs(mutants: list[Mutant]) -> dict[Mutant, Callable[[], int]]:
        return {mutant: partial(run_mutant, tree, mutant, coverage.tests(mutant)) for mutant in mutants}

    counts: dict[str, Counter[str]] = {}
    survivors = []
    for place in [only] if only else (*PACKAGES, CPP):
        mutants = all_mutants(tree, place)
        if place != CPP:
            mutants = list(filter(coverage.counts, mutants))
        chosen = random.Random(seed).sample(mutants, min(sample or len(mutants), len(mutants)))
        require_innocence(Forks(jobs), runs([mutant.innocent() for mutant in chosen[:CHECKED]]))
        counts[place] = Counter(mutants=len(mutants))
        for mutant, status in Forks(jobs).statuses(runs(chosen)):
            fate = {SURVIVED: "survived", NO_MUTANT: "not compiled"}.get(status, "killed")
            counts[place][fate] += 1
            if fate == "survived":
                survivors.append(mutant.described((tree / mutant.path).read_text()))
                console.print(survivors[-1])
    table = Table("package", "mutants", "tried", "killed", "survived", "% killed")
    for place, count in counts.items():
        tried = count["killed"] + count["survived"]
        share = f"{100 * count['killed'] / max(1, tried):.1f}"
        table.add_row(place, *map(str, (count["mutants"], tried, count["killed"], count["survived"])), share)
    console.print(table)
    if json_path is not None:
        result = {"seed": seed, "counts": counts, "survivors": sorted(survivors, key=lambda row: str(row["file"]))}
        json_path.write_text(json.dumps(result, indent=2) + "\n")


def require_innocence(forks: Forks, runs: dict[Mutant, Callable[[], int]]) -> None:
    """Raise where tests fail without a wrong: they would kill every mutant."""
    for innocent, status in forks.statuses(runs):
        if status != SURVIVED:
            raise SystemExit(f"tests of {innocent.path}:{innocent.line} fail as it stands (status {status})")


def copy_tree(tree: Path) -> None:
    """What the suite needs of this repository."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, tree / name)


if __name__ == "__main__":
    typer.run(main)
