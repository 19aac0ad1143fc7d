"""Where experts come from: the interfaces that 16-bit weights and packed checkpoints share."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from dynaexq.memory import HostStore
from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.settings import Settings


class ExpertSource(Protocol):
    """16-bit experts, readable a few at a time.

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


class SelectableSource(ExpertSource, Protocol):
    """16-bit experts of which any part can be had by itself."""

    def select(self, layers: Sequence[int], first_expert: int, num_experts: int) -> ExpertSource:
        """The same source for some of the layers and a run of their experts only, both counted from 0 there."""


class LoadResult(NamedTuple):
    """What is known once all experts are in their places.

    For 48 layers of 128 experts at two tiers, `errors` is `[48, 128, 2]`.

    Attributes:
        errors: float64 `[L, E, tiers]`, relative squared error of each expert's weights at each tier.
        store: where the upgrades wait.
    """

    errors: np.ndarray
    store: HostStore


class ExpertLoader(Protocol):
    """Fills a base slab with experts."""

    def place(self, codec: ExpertCodec, base: Tensor, settings: Settings) -> LoadResult:
        """Put the base block of every expert into `base`, uint8 `[L, E, nbytes]` on the device."""


class ExpertCheckpoint(Protocol):
    """The experts of a checkpoint, 16-bit or packed."""

    @property
    def source(self) -> ExpertSource | None:
        """The 16-bit weights, where it holds them; a patch can be undone with them."""

    @property
    def base(self) -> Tensor | None:
        """The base slab, uint8 `[L, E, nbytes]` in host memory, where it has been prefetched."""

    def prefetch(self) -> None:
        """Begin to read the base slab, if that can be read as it is."""

    def loader(self, layers: Sequence[int], first_expert: int, num_experts: int) -> ExpertLoader:
        """What loads some of the layers and a run of their experts."""
