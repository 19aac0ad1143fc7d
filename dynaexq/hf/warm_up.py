"""Kernels compiled while a model is patched, all at once, instead of one after the other in its first forward.

What there is to compile is known to `kernels`; on a CPU that is nothing. Compiled kernels stay on disk, so the next
process only reads them.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from torch import nn
from tqdm.auto import tqdm

from dynaexq.hf.compat import experts_per_token
from dynaexq.kernels import compilations, compiles_on
from dynaexq.runtime.experts import MixedPrecisionExperts
from dynaexq.runtime.linear import PackedLinear

logger = logging.getLogger(__name__)

SECONDS_UNSEEN = 1
"""What is read from disk shows no progress bar."""


def warm_up(model: nn.Module) -> None:
    """Compile all that `model` will launch. What fails is said, and tried again by the forward that needs it."""
    experts = [module.layer for module in model.modules() if isinstance(module, MixedPrecisionExperts)]
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    dense = [module.current() for module in packed if compiles_on(module.packed.device)]
    choices = experts_per_token(model)
    calls = compilations(experts, dense, choices) if choices else []  # a family that hides it compiles as it goes
    if not calls:
        return
    with ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1), "dynaexq-compiling") as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            done = tqdm(as_completed(futures), "compiling kernels", len(futures), delay=SECONDS_UNSEEN, disable=None)
            _warn([future.exception() for future in done])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _warn(errors: Sequence[BaseException | None]) -> None:
    failed = [error for error in errors if error is not None]
    if failed:
        logger.warning("%d kernels could not be compiled ahead: %s", len(failed), str(failed[0]).partition("\n")[0])
