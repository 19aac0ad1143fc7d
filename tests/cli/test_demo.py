"""The embedded model and the demo on it: what the README promises, at a smaller size."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dynaexq.cli.app import app
from dynaexq.cli.demo import embedded_model, run
from dynaexq.cli.demo_corpus import DOMAINS, documents
from dynaexq.evaluate import kl_divergence, windows_of


@pytest.fixture(scope="module")
def outcomes():
    return {outcome.name: outcome for outcome in run(windows=8, quiet=True)}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


def test_the_embedded_model_is_small_and_has_enough_experts():
    weights = sum(path.stat().st_size for path in embedded_model().glob("*.safetensors"))
    assert weights <= 16e6
    assert AutoConfig.from_pretrained(embedded_model()).num_experts >= 32


def test_its_greedy_text_looks_like_its_domain(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16)
    prompts = {
        "    def __init__(self, name": r"self\.\w+ = \w+",
        "(12 + 7) * 3 = ": r"\d+ \* \d+ = \d+\n",
        "If the argument is omitted, ": r"\b(the|is|a)\b",
    }
    for prompt, expected in prompts.items():
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=40, do_sample=False)
        text = tokenizer.decode(output[0, ids["input_ids"].shape[1] :])
        assert re.search(expected, text), f"{prompt!r} went on with {text!r}"


def test_no_copy_takes_more_than_its_budget(outcomes):
    assert all(outcome.total_bytes <= outcome.budget for outcome in outcomes.values())
    assert outcomes["dynamic"].total_bytes == outcomes["frozen start"].total_bytes


def test_precision_buys_quality_in_the_expected_order(outcomes):
    low, frozen, dynamic, high = (np.mean(outcome.kl) for outcome in outcomes.values())
    assert high < dynamic < frozen < low
    assert low > 10 * high, "two bits must cost something that can be measured"


def test_the_upgrades_follow_the_workload(outcomes):
    for phase in range(len(DOMAINS)):
        assert outcomes["dynamic"].overlap[phase] > outcomes["frozen start"].overlap[phase] + 0.2
    assert outcomes["dynamic"].hot_coverage > outcomes["frozen start"].hot_coverage
    assert outcomes["frozen start"].demotions == 0
    assert outcomes["dynamic"].demotions > 0


def test_windows_have_the_length_that_was_asked_for(tokenizer):
    windows = windows_of(tokenizer, documents("code"), 5, 64)
    assert [len(window) for window in windows] == [64] * 5


def test_the_divergence_of_a_model_from_itself_is_zero_and_never_negative():
    logits = torch.randn(4, 50)
    assert kl_divergence(logits, logits).abs().max() < 1e-6
    assert (kl_divergence(logits, torch.randn(4, 50)) > 0).all()


def test_the_divergence_agrees_with_a_sum_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    by_hand = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(by_hand, rel=1e-6)


def test_the_command_line_prints_versions_and_refuses_what_it_does_not_know():
    assert "torch" in CliRunner().invoke(app, ["version"]).stdout
    assert CliRunner().invoke(app, ["demo", "--windows", "0"]).exit_code != 0


def test_a_wrong_tier_on_the_command_line_is_a_sentence(monkeypatch, capsys):
    from dynaexq.cli import app

    monkeypatch.setattr("sys.argv", ["dynaexq", "demo", "--upgrade", "int5"])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 1
    assert "int5" in capsys.readouterr().err
