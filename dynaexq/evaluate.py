"""How far a model is from its 16-bit self on a stream of text, with the control loop running as in serving.

    windows = windows_of(tokenizer, texts, count=100, length=128)
    reference = reference_logits(original, windows)
    print(evaluate(patched, windows, reference).kl)

Windows are sent through the model one after the other, one forward each, so decisions are made as they would be while
serving that stream. The KL divergence from the 16-bit model is the main measure: it needs no labels, and resolves
differences that perplexity cannot.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Quality:
    """How well a stream was predicted; every token weighs the same, however long its window.

    Attributes:
        tokens: positions seen.
        loss: cross entropy, nats for each token that has one before it in its window.
        kl: KL divergence from the reference, nats a position; None without a reference.
    """

    tokens: int
    loss: float
    kl: float | None

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return math.exp(self.loss)


def windows_of(tokenizer: Any, texts: Iterable[str], count: int, length: int) -> list[Tensor]:
    """The first `count` windows of `length` token ids in `texts`, each of which ends with the end-of-text token.

    Fewer where the texts end before.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text + (tokenizer.eos_token or ""), add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count * length:
            break
    return list(torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:count])


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL divergence of every position from the reference, in nats; logits `[..., vocab]`, result `[...]`."""
    reference = torch.log_softmax(reference_logits.float(), -1)
    return (reference.exp() * (reference - torch.log_softmax(logits.float(), -1))).sum(-1)


@torch.no_grad()
def stream_logits(model: nn.Module, windows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Logits `[1, T, vocab]` of each window of token ids `[T]`, one forward a window, in stream order."""
    device = next(model.parameters()).device
    for window in windows:
        yield model(window[None].to(device), use_cache=False).logits


def reference_logits(model: nn.Module, windows: Iterable[Tensor]) -> list[Tensor]:
    """Compute the 16-bit model's logits for each window, in its own dtype, and keep them in host memory.

    That takes `2 * vocab_size` bytes per token at 16 bit: 0.3 MB a token of a vocabulary of 150,000.
    """
    return [logits.cpu() for logits in stream_logits(model, windows)]


def evaluate(
    model: nn.Module,
    windows: Sequence[Tensor],
    reference: Sequence[Tensor] | None = None,
    after_window: Callable[[int], None] | None = None,
) -> Quality:
    """Send `windows` of token ids `[T]` through `model` in their order.

    Args:
        reference: logits `[1, T, vocab]` of the 16-bit model for each window, as `reference_logits` gives them.
        after_window: called with each window's index once the model has seen it.
    """
    divergence, loss, tokens, predicted = 0.0, 0.0, 0, 0
    for index, logits in enumerate(stream_logits(model, windows)):
        window = windows[index].to(logits.device)
        loss += float(nn.functional.cross_entropy(logits[0, :-1].float(), window[1:], reduction="sum"))
        if reference is not None:
            divergence += float(kl_divergence(reference[index].to(logits.device), logits).sum())
        tokens, predicted = tokens + len(window), predicted + len(window) - 1
        if after_window is not None:
            after_window(index)
    return Quality(tokens, loss / max(1, predicted), None if reference is None else divergence / max(1, tokens))
