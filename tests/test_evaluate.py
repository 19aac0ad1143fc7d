"""Quality on a stream: every token weighs the same, and a model is no distance from itself."""

import math

import pytest
import tiny
import torch

from dynaexq.evaluate import Quality, evaluate, kl_divergence, reference_logits, windows_of


class Words:
    """A tokenizer that gives every word its length; the end of a text is 0."""

    eos_token = "|"

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [0 if word == "|" else len(word) for word in text.replace("|", " |").split()]}


def test_windows_are_cut_from_texts_that_end_with_the_end_of_text() -> None:
    windows = windows_of(Words(), ["a bb", "ccc", "dddd eeeee f"], count=3, length=3)
    assert [window.tolist() for window in windows] == [[1, 2, 0], [3, 0, 4], [5, 1, 0]]
    assert len(windows_of(Words(), ["a bb", "ccc"], count=3, length=3)) == 1, "what is left over makes no window"


def test_a_model_is_no_distance_from_itself_and_loss_is_cross_entropy() -> None:
    model = tiny.tiny_qwen3_moe(torch.float32)
    windows = list(torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0)))
    quality = evaluate(model, windows, reference_logits(model, windows))
    expected = model(torch.stack(windows), labels=torch.stack(windows)).loss.item()
    assert quality == Quality(24, pytest.approx(expected, rel=1e-5), pytest.approx(0.0, abs=1e-6))
    assert quality.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert evaluate(model, windows).kl is None


def test_every_token_weighs_the_same_however_long_its_window() -> None:
    model, other = tiny.tiny_qwen3_moe(torch.float32), tiny.tiny_qwen3_moe(torch.float32, rms_norm_eps=0.1)
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(3, 60, (length,), generator=generator) for length in (4, 12)]
    reference = reference_logits(model, windows)
    whole = evaluate(other, windows, reference)
    short, long = (evaluate(other, [w], [r]) for w, r in zip(windows, reference, strict=True))
    assert 0 < short.kl != pytest.approx(long.kl)
    assert whole.kl == pytest.approx((4 * short.kl + 12 * long.kl) / 16)
    assert whole.loss == pytest.approx((3 * short.loss + 11 * long.loss) / 14)


def test_the_divergence_is_that_of_the_definition() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close(kl_divergence(p.log() + 3, q.log()), expected)
