"""The text that every Python carries: three domains, two splits, always the same."""

import ast
import itertools
import re

import pytest

from dynaexq.cli.demo_corpus import DOMAINS, Corpus, documents


def first(domain, split="held-out", seed=0, count=20):
    return list(itertools.islice(documents(domain, split, seed), count))


@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_are_the_same_every_time_and_another_seed_shuffles_them(domain):
    assert first(domain) == first(domain)
    assert first(domain) != first(domain, seed=1)


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A standard library of sixty modules, so that nobody has to parse the real one twice."""
    for number in range(60):
        (tmp_path / f"module{number}.py").write_text(
            f'"""{f"Module {number} explains itself. " * 10}"""\nx = {number}\n'
        )
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})


@pytest.mark.parametrize("domain", ["prose", "code"])
def test_what_is_held_out_is_never_trained_on(domain, small_library):
    train, held_out = (set(first(domain, split, count=1000)) for split in ("train", "held-out"))
    assert train
    assert held_out
    assert not train & held_out


def test_code_parses_and_has_lost_its_docstrings():
    for text in first("code", count=5):
        assert '"""' not in text.split("\n")[0]
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue  # a body that was nothing but a docstring
        assert ast.get_docstring(tree) is None


def test_every_sum_of_the_arithmetic_is_right():
    for text in first("arithmetic", count=10):
        for line in text.splitlines():
            terms = re.findall(r"[\d+*/() -]+", line)
            for left, right in itertools.pairwise(part for term in terms for part in [term.strip()] if term.strip()):
                if f"{left} = {right}" in line:
                    assert eval(left) == eval(right), line


def test_an_unknown_domain_is_refused_by_name():
    with pytest.raises(ValueError, match="poetry"):
        next(documents("poetry"))


def test_a_directory_of_text_is_a_corpus_whose_parts_share_nothing(tmp_path):
    for kind in ("one", "other"):
        (tmp_path / f"{kind}.txt").write_text("".join(f"{kind} {number:07d}\n" for number in range(60_000)))
    corpus = Corpus(tmp_path)
    assert corpus.kinds == ("one", "other")
    train, held_out = (set("".join(corpus.documents("one", split)).split("\n")) for split in ("train", "held-out"))
    whole = {line for line in held_out if len(line) == len("one 0000000")}
    assert len(whole) > 3000
    assert not whole & train
    assert list(corpus.documents("one")) == list(corpus.documents("one"))
    assert Corpus().kinds == DOMAINS
    with pytest.raises(FileNotFoundError, match=r"KIND\.txt"):
        _ = Corpus(tmp_path / "empty").kinds
