"""Where experts come from, and what is known once they are placed: the interfaces that both kinds of source share."""

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from dynaexq.memory import HostStore
from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.settings import Settings


class ExpertSource(Protocol):
    """Where the 16-bit experts come from.

    Attributes:
        host_nbytes: host memory that the weights take for as long as the source lives; 0 where they lie in files.
        is_lasting: whether the weights can still be read after the model was patched, at no cost but that memory.
    """

    num_layers: int
    num_experts: int
    host_nbytes: int
    is_lasting: bool

    def name(self, layer: int) -> str:
        """What to call a layer's experts in an error message."""

    def read(self, layer: int, first: int, last: int) -> ExpertWeights:
        """Weights of experts `first` to `last` (exclusive), as the family stores them."""


class LoadResult(NamedTuple):
    """What is known once all experts are in their places: errors `[L, E, tiers]`, and where the upgrades wait."""

    errors: np.ndarray
    store: HostStore


class ExpertLoader(Protocol):
    """Whatever can fill a base slab with experts."""

    def place(self, codec: ExpertCodec, base: Tensor, settings: Settings) -> LoadResult:
        """Put the base block of every expert into `base`, uint8 `[L, E, nbytes]` on the device."""
