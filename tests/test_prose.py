"""The prose rules that a machine can hold; CONTRIBUTING.md has all ten, with examples."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = (
    "dynaexq/**/*.py",
    "dynaexq/**/*.cpp",
    "dynaexq/**/*.h",
    "benchmarks/**/*.py",
    "examples/*.py",
    "docs/**/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)

_COUNTED = (
    "bytes|tokens|copies|nats|slots|bits|experts|forwards|moves|weights|rows|seconds|steps|ticks|milliseconds|launches"
)
_PER = "second|token|layer|expert|device|forward|tick|weight|step|group|slot|minute|run|core|call|window|model"
RULES = {
    "per, not a": rf"\b({_COUNTED}) an? ({_PER})\b",
    "no nobody, somebody, whoever": r"\b(nobody|somebody|anybody|whoever|whomever)\b",
    "say it again instead of likewise": r"\blikewise\b",
    "an option, not a dial": r"\bdials?\b",
    "tiers, not a ladder": r"\bladders?\b",
    "free, close or drop, not let go of": r"\b(let|lets|letting) go\b",
    "hotness, not heat": r"\b(heat|heats|heed|heeds|heeded)\b(?! ?map)",
    "American spelling": (
        r"\b(quanti|minimi|maximi|optimi|normali|recogni|initiali|speciali|vectori|summari|serial|synchroni|organi|"
        r"materiali|generali|prioriti|reali)s(e|es|ed|er|ers|ing|ation|ations)\b"
        r"|\b(colour|behaviour|neighbour|favour|honour)\w*\b|\b(centre|licence|catalogue|learnt|grey)\b"
    ),
}
BAD_EXAMPLE = "✗"
"""Marks the lines of CONTRIBUTING.md that show what not to write."""


def files() -> list[Path]:
    return sorted({path for place in PLACES for path in ROOT.glob(place)})


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_keeps_the_rules(path):
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {rule}: {match[0]!r}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BAD_EXAMPLE not in line
        for rule, pattern in RULES.items()
        for match in re.finditer(pattern, line, re.I)
    ]
    assert not hits, "\n" + "\n".join(hits)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("per, not a", "500 bytes a second"),
        ("per, not a", "one of the slots a layer"),
        ("no nobody, somebody, whoever", "nobody owns it"),
        ("say it again instead of likewise", "Likewise for experts"),
        ("an option, not a dial", "every dial"),
        ("tiers, not a ladder", "the best ladder"),
        ("free, close or drop, not let go of", "lets go of the slot"),
        ("hotness, not heat", "the heat of an expert"),
        ("American spelling", "experts are quantised"),
        ("American spelling", "the behaviour"),
    ],
)
def test_a_sentence_that_breaks_a_rule_is_found(rule, sentence):
    assert re.search(RULES[rule], sentence, re.I)
