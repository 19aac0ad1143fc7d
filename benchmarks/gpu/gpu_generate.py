"""`generate()` itself on a GPU: tokens per second beside the 16-bit model, eager, captured and compiled.

What Python costs between two tokens is in these figures, and the cache grows. A second call is timed; the first one,
which compiles kernels and, where it is asked for, the model, is given in seconds.
"""

import gc
import time
from collections.abc import Iterator
from typing import Any

import torch
from clock import synchronize
from random_model import Rotation, build, build_plain
from transformers import CompileConfig, PreTrainedModel

STATIC = {"cache_implementation": "static"}
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "static cache": STATIC,
    "static cache, compiled": STATIC | {"compile_config": CompileConfig()},
}
"""Of a patched model a static cache is captured; of others Transformers compiles it, which is the third way again."""

PROMPT, PLAIN = 32, "Transformers, 16 bit"


def run(
    sizes: dict[str, Any],
    tiers: tuple[tuple[str, ...], ...],
    batches: tuple[int, ...],
    tokens: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Rows of every model: 16 bit if it fits, then each pair, with a precision that stands still and one that moves.

    Compiling comes last, as it takes minutes: of the first pair only, and the first batch.
    """
    if fits(sizes, device):
        yield from _of_plain(sizes, ("eager",), batches, tokens, device)
    else:
        yield {"model": PLAIN, "way": "does not fit this card"}
    for pair in tiers:
        yield from _of_patched(sizes, pair, (False, True), ("eager", "static cache"), batches, tokens, device)
    yield from _of_patched(sizes, tiers[0], (False,), ("static cache, compiled",), batches[:1], tokens, device)
    if fits(sizes, device):
        yield from _of_plain(sizes, ("static cache, compiled",), batches[:1], tokens, device)


def _of_plain(sizes: dict[str, Any], ways: Any, batches: Any, tokens: int, device: Any) -> Iterator[dict[str, Any]]:
    yield from _rates(build_plain(sizes, device), PLAIN, ways, batches, tokens)
    _forget(device)


def _of_patched(
    sizes: dict[str, Any], pair: tuple[str, ...], moving: Any, ways: Any, batches: Any, tokens: int, device: Any
) -> Iterator[dict[str, Any]]:
    policy = Rotation()
    model = build(sizes, pair, policy, device)
    for policy.moving in moving:
        what = f"{'+'.join(pair)}, {'dynamic' if policy.moving else 'static'}"
        yield from _rates(model, what, ways, batches, tokens)
    model.dynaexq.close()
    del model
    _forget(device)


def fits(sizes: dict[str, Any], device: torch.device) -> bool:
    """Whether the 16-bit model leaves a twentieth of the card for the rest."""
    if device.type != "cuda":
        return True
    nbytes = build_plain(sizes, torch.device("meta")).get_memory_footprint()
    return bool(nbytes < 0.95 * torch.cuda.mem_get_info(device)[0])


def _rates(
    model: PreTrainedModel, what: str, names: Any, batches: tuple[int, ...], tokens: int
) -> Iterator[dict[str, Any]]:
    for name in names:
        for batch in batches:
            ids = torch.randint(model.config.vocab_size, (batch, PROMPT), device=model.device)
            first = _seconds(model, ids, tokens, WAYS[name])
            again = _seconds(model, ids, tokens, WAYS[name])
            rate = batch * tokens / again
            yield {"model": what, "way": name, "batch": batch, "tokens_a_second": rate, "first_call_seconds": first}


def _seconds(model: PreTrainedModel, ids: torch.Tensor, tokens: int, way: dict[str, Any]) -> float:
    synchronize(ids.device)
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        **way,
    )
    synchronize(ids.device)
    return time.perf_counter() - start


def _forget(device: torch.device) -> None:
    """Give the memory of models back: Transformers' and PyTorch's compilers hold them in circles."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
