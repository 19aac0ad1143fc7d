"""`patch` for tests, which set options that users seldom do."""

from typing import Any

from torch import nn

import dynaexq


def patch(model: nn.Module, hbm_budget: Any = None, checkpoint: Any = None, **options: Any) -> dynaexq.Runtime:
    """`dynaexq.patch` with every option as a keyword argument."""
    return dynaexq.patch(model, hbm_budget, checkpoint=checkpoint, config=dynaexq.DynaExqConfig(**options))
