"""A dense layer whose weight is packed in one of our formats; the same calls as `nn.Linear`, constant weights."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynaexq.errors import PatchError
from dynaexq.kernels import LinearLayer, arrangement_on, linear, linear_gradient, linear_operator, register_matrix
from dynaexq.quantization import ROW_BY_ROW, Arrangement, LinearCodec
from dynaexq.runtime.experts import in_function_transform, must_be_operators
from dynaexq.runtime.state_guard import PackedWeight

_ARRANGING = threading.Lock()
"""Held while a packed weight and its codec change together; threads of a server may meet a layer at once."""


class PackedLinear(nn.Linear):
    """`rows [..., in_features] -> [..., out_features]`, in the dtype of the rows.

    The parameter is `packed`, uint8 `[codec.nbytes]`, and `weight` only says what it stands for. Neither that nor the
    bias is trained. Where it is multiplied the codes lie as the device wants them, and in a `state_dict` as in files.

    Args:
        activations: what rows may be rounded to; see `settings.Options`.
        packed: left out, there is room on the meta device, for a checkpoint to fill.
    """

    def __init__(
        self,
        codec: LinearCodec,
        packed: Tensor | None = None,
        bias: Tensor | None = None,
        activations: str = "auto",
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = codec.matrix.columns, codec.matrix.rows
        if packed is None:
            packed = torch.empty(codec.nbytes, dtype=torch.uint8, device="meta")
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.codec, self.activations = codec, activations
        self._layer: LinearLayer | None = None
        self._handle = register_matrix(self)
        self._is_hf_initialized = True  # nothing here could be drawn at random

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        if in_function_transform():  # which cannot look into an opaque operator
            layer = self.current()
            output = F.linear(rows, layer.codec.decode(layer.block, rows.dtype))
        elif must_be_operators(rows, rows):
            output = linear_operator(rows, self._handle)
        else:
            output = self.compute(rows)
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)
        return output.view(*input.shape[:-1], self.out_features)

    def compute(self, rows: Tensor) -> Tensor:
        """What the operator runs, on rows `[N, in_features]`; an InputError if they are anything else."""
        layer = self.current()
        layer.check(rows, self.in_features)
        return linear(rows, layer)

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the rows, from that of the product `[N, out_features]`."""
        layer = self.current()
        layer.check(grad, self.out_features)
        return linear_gradient(grad.contiguous(), layer)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.codec.tiers[0]}"

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            shape = self.out_features, self.in_features
            return PackedWeight.like(shape, self.codec.dtype, self.packed.device)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise PatchError(PackedWeight.refusal)
        super().__setattr__(name, value)

    def current(self) -> LinearLayer:
        """The layer where the packed weight is now: a model may be moved, and a checkpoint read into it."""
        layer = self._layer
        if layer is None or layer.block.data_ptr() != self.packed.data_ptr():
            with _ARRANGING:
                self._arrange(arrangement_on(self.packed.device, self.codec.dtype))
                self._layer = layer = LinearLayer(self.codec, self.packed.detach(), self.activations)
        return layer

    def _arrange(self, arrangement: Arrangement) -> None:
        """Give the packed weight an arrangement, in memory of its own: the old may be a file's, or another's."""
        if self.codec.arrangement != arrangement:
            block = self.codec.arranged_by_rows(self.codec.layout, self.packed.data[None]).clone()
            codec = self.codec.arranged(arrangement)
            codec.arrange(codec.layout, block)
            self.packed.data, self.codec = block[0], codec

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedLinear":
        self._arrange(ROW_BY_ROW)  # devices differ in what they want
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.codec.arrangement != ROW_BY_ROW:
            by_rows = self.codec.arranged_by_rows(self.codec.layout, self.packed.data[None])[0]
            destination[f"{prefix}packed"] = nn.Parameter(by_rows, requires_grad=False) if keep_vars else by_rows

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._arrange(ROW_BY_ROW)
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {"_layer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = register_matrix(self)
