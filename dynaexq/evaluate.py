"""How far a model is from its 16-bit self on a stream of text, with the control loop running as in serving."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL divergence of every position from the reference, in nats; logits `[..., vocab]`, result `[...]`.

    It needs no labels and resolves differences that perplexity cannot.
    """
    reference = torch.log_softmax(reference_logits.float(), -1)
    return (reference.exp() * (reference - torch.log_softmax(logits.float(), -1))).sum(-1)


@torch.no_grad()
def stream_logits(model: nn.Module, windows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Logits `[1, T, vocab]` of each window of token ids `[T]`, one forward a window, in stream order."""
    for window in windows:
        yield model(window[None], use_cache=False).logits


def stream_kl(
    model: nn.Module, windows: list[Tensor], reference: list[Tensor], after_window: Callable[[int], None] | None = None
) -> float:
    """Mean KL divergence, nats a token, of `model` from `reference` logits over `windows` in stream order.

    Args:
        after_window: called with each window's index once the model has seen it.
    """
    total, tokens = 0.0, 0
    for index, logits in enumerate(stream_logits(model, windows)):
        total += float(kl_divergence(reference[index], logits).sum())
        tokens += len(windows[index])
        if after_window is not None:
            after_window(index)
    return total / max(1, tokens)
