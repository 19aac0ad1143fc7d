"""The sparse block of a patched model. Router, shared expert and forward stay the family's own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

if TYPE_CHECKING:
    from dynaexq.memory import SlabPool, SwapPipeline
    from dynaexq.policy.controller import ControlLoop, PrecisionController
    from dynaexq.policy.hotness import HotnessTracker


@dataclass(frozen=True)
class LayerView:
    """One layer's row of what the model-wide runtime holds."""

    layer: int
    control: Callable[[], "ControlLoop"]
    pipeline: "SwapPipeline"
    base_bits: int


class DynaExqMoE(nn.Module):
    """Mixin that takes the place of a sparse block (`hf.model_patch`). Its `experts` are `MixedPrecisionExperts`."""

    _view: LayerView

    @property
    def layer(self) -> int:
        """Which of its runtime's layers this is."""
        return self._view.layer

    @property
    def tracker(self) -> "HotnessTracker":
        """The model's hotness tracker."""
        return self._view.control().tracker

    @property
    def controller(self) -> "PrecisionController":
        """The model's precision controller."""
        return self._view.control().controller

    @property
    def pipeline(self) -> "SwapPipeline":
        """The model's swap pipeline."""
        return self._view.pipeline

    @property
    def pool(self) -> "SlabPool":
        """The slab that upgrades of all layers live in."""
        return self._view.pipeline.pool

    @property
    def tiers(self) -> np.ndarray:
        """Published bits `[num_experts]` of this layer's experts: 2, 4, 8 or 16."""
        kinds = self._view.pipeline.table.kinds()[self._view.layer]
        return np.where(kinds > 0, kinds, self._view.base_bits)

    @property
    def hotness(self) -> np.ndarray:
        """Hotness `[num_experts]` of this layer's experts."""
        return self.tracker.hotness[self._view.layer].copy()


def layer_names(model: nn.Module | None, tracker: "HotnessTracker") -> list[str]:
    """Paths of the sparse blocks that `tracker` watches, in its order; a number for one that was not found."""
    modules = model.named_modules() if model is not None else ()
    blocks = ((name, block) for name, block in modules if isinstance(block, DynaExqMoE))
    names = {block.layer: name for name, block in blocks if block.tracker is tracker}
    return [names.get(layer, f"layer {layer}") for layer in range(len(tracker.hotness))]
