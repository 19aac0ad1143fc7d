"""Text that a model writes by itself, to be calibrated on where there is no other."""

from typing import Any

import torch
from torch import Tensor

from dynaexq.errors import UnsupportedModelError

WINDOWS, LENGTH, AT_ONCE = 64, 512, 16
"""What `calibrate` asks for: 32,768 tokens, 16 windows at a time."""


@torch.no_grad()
def own_words(model: Any, count: int = WINDOWS, length: int = LENGTH, seed: int = 0) -> list[Tensor]:
    """`count` windows of `length` token ids, sampled from the model's own distribution, nothing cut off.

    They start at the token that begins a text, or else at one that ends it. The random state of the caller stays as
    it is.

    Raises:
        UnsupportedModelError: the model has no `generate`.
    """
    if not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"expected a model that generates text, so that it can write its own to be calibrated on, got a "
            f"{type(model).__name__}; pass windows of token ids"
        )
    start = torch.full((1, 1), _first_token(model), device=next(model.parameters()).device)
    windows: list[Tensor] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while len(windows) < count:
            prompt = start.expand(min(AT_ONCE, count - len(windows)), 1)
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
            )
            windows += written.cpu()
    return windows


def _first_token(model: Any) -> int:
    config = model.config.get_text_config()
    for token in (config.bos_token_id, config.eos_token_id):
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return 0
