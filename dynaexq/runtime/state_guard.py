"""What stands in a patched model for weights that are packed: tensors that can be passed around, and not saved.

Experts are packed, outside the modules. A `state_dict` without them, saved by whatever means, would load as a model
with random experts. So under the name of each expert parameter stands an `AbsentExperts`: to save it raises, and where
that is got round, its shape fits no model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dynaexq.errors import PatchError

_ALLOWED = {
    "__get__", "clone", "contiguous", "copy_", "cpu", "cuda", "detach", "dim", "element_size", "is_contiguous",
    "is_floating_point", "numel", "numpy", "requires_grad_", "size", "stride", "to", "view", "__repr__", "__format__",
    "__hash__", "__len__", "is_complex", "nelement", "is_pinned", "get_device",
}  # fmt: skip
"""What passes a tensor around or asks what it is; all else would make something of it."""


class AbsentExperts(Tensor):
    """A single zero in the place of an expert parameter. Raises a PatchError when it is saved or computed with."""

    refusal = (
        "expected the experts in this state_dict, but the model is patched by dynaexq and they are packed, outside of "
        "it; save with save_pretrained of the Transformers model that was patched, or dynaexq.unpatch it first"
    )

    @staticmethod
    def stand_in() -> "AbsentExperts":
        return torch.zeros(1).as_subclass(AbsentExperts)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.__name__ not in _ALLOWED:
            raise PatchError(cls.refusal)
        return super().__torch_function__(func, types, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickles, and with them torch.save and copy.deepcopy
        raise PatchError(self.refusal)


class PackedWeight(AbsentExperts):
    """What a packed dense layer shows as its weight: the device, the dtype and the shape of it, and no numbers."""

    refusal = (
        "expected the weight of a dense layer in 16 bit, but it is packed; merge adapters, tie or resize it before "
        "packing, or leave dense out"
    )

    @staticmethod
    def like(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> "PackedWeight":
        """One that takes no memory to speak of."""
        return torch.zeros(1, dtype=dtype, device=device).expand(shape).as_subclass(PackedWeight)
