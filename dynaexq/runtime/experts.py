"""The experts of one patched layer: observe, look up, multiply. They hold no policy and never see the runtime."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dynaexq.errors import InputError, PatchError
from dynaexq.kernels import (
    ExpertLayer,
    Upgrades,
    counts_routing,
    expert_gradients,
    expert_mlp,
    experts_operator,
    reference,
    register_layer,
)
from dynaexq.memory import DeviceMemory
from dynaexq.quantization import ExpertWeights
from dynaexq.runtime.door import tokens_among
from dynaexq.runtime.state_guard import AbsentExperts

_SAVED_APART: ContextVar[bool] = ContextVar("_SAVED_APART", default=False)


@contextmanager
def saved_apart() -> Iterator[None]:
    """Take a `state_dict` of what is not experts: those are saved by other means."""
    token = _SAVED_APART.set(True)
    try:
        yield
    finally:
        _SAVED_APART.reset(token)


@dataclass
class LayerPorts:
    """All that joins a layer to the rest: the table flows down to it, routing counts flow up from it.

    Attributes:
        before_forward: called with its tokens when a forward that counts reaches the layer, before it looks at the
            table.
        exchanges_tokens: whether ranks exchange tokens. One that gets none is then called with a single row of zeros
            for expert 0, which says nothing of the traffic.
    """

    index: int
    memory: DeviceMemory
    before_forward: Callable[[int], None] | None = None
    exchanges_tokens: bool = False


class MixedPrecisionExperts(nn.Module):
    """Mixin that takes the place of a family's experts (`hf.model_patch`). Weights live in slabs, outside the module.

    `forward(hidden_states [N, H], top_k_index [N, k], top_k_weights [N, k]) -> [N, H]`, as in Transformers.
    """

    _ports: LayerPorts
    _layer: ExpertLayer
    _handle: int
    _parameter_names: tuple[str, ...] = ()

    def connect(self, layer: ExpertLayer, ports: LayerPorts, parameter_names: tuple[str, ...]) -> None:
        """Join the adopted module, whose parameters had these names, to its bytes and to the tables."""
        self._layer, self._ports, self._parameter_names = layer, ports, parameter_names
        self._handle = register_layer(self)

    def disconnect(self) -> None:
        """Forget both, as far as they were joined; the module can then be released."""
        for name in ("_layer", "_ports", "_handle", "_parameter_names"):
            self.__dict__.pop(name, None)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        arguments = hidden_states, top_k_index, top_k_weights
        if in_function_transform():
            return self._transparent(*arguments)
        if must_be_operators(hidden_states, top_k_weights):
            return experts_operator(*arguments, self._handle)
        return self.compute(*arguments)  # an operator takes as long as a small layer

    def compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the operator runs. Raises an InputError for tensors that do not belong together."""
        self._layer.check(hidden_states, top_k_index, top_k_weights)
        ports, counts = self._ports, None
        counter, observe = ports.memory.counter, not in_backward()
        is_token = tokens_among(hidden_states) if observe else None
        tokens = None if is_token is None else is_token.sum()
        if observe and ports.before_forward is not None:
            # On a GPU a look at the number would wait for it.
            ports.before_forward(int(tokens) if tokens is not None and tokens.is_cpu else len(hidden_states))
        with ports.memory.fence.reading():
            ports.memory.layer_begins(ports.index)
            if is_token is not None:
                mass = self._mass(hidden_states, top_k_weights) * is_token[:, None]
                counter.observe(ports.index, top_k_index, mass, tokens)
            elif observe and not self._may_be_none(top_k_index) and counts_routing(hidden_states, self._layer):
                counts = counter.row(ports.index, top_k_index.shape[-1])
            elif observe:
                counter.observe(ports.index, top_k_index, self._mass(hidden_states, top_k_weights))
            output = expert_mlp(hidden_states, top_k_index, top_k_weights, self._layer, self._upgrades(), counts)
            ports.memory.layer_ends(ports.index, observe)
        return output

    def about_to_pass(self, num_tokens: int) -> None:
        """Let precision move, as before a forward of so many tokens; `pass_through` follows."""
        if self._ports.before_forward is not None:
            self._ports.before_forward(num_tokens)

    @staticmethod
    def pass_through(
        layers: "Sequence[MixedPrecisionExperts]", top_k: int, work: Callable[[list[tuple[Tensor, Tensor]]], Any]
    ) -> Any:
        """What `work` returns, which computes more than the experts of some layers, and counts their routing itself.

        Args:
            layers: that share a memory.
            work: given, for each layer, the entries of `Upgrades` and the counts as `dispatch.expert_mlp` takes them.
        """
        memory, indices = layers[0]._ports.memory, [layer._ports.index for layer in layers]
        with memory.fence.reading():
            for index in indices:
                memory.layer_begins(index)
            done = work([(memory.table.row(index), memory.counter.row(index, top_k)) for index in indices])
            for index in indices:
                memory.layer_ends(index, True)
        return done

    @property
    def layer(self) -> ExpertLayer:
        """The constant part."""
        return self._layer

    @property
    def memory(self) -> DeviceMemory:
        """What it is read through."""
        return self._ports.memory

    def gradients(
        self, grad: Tensor, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the inputs through the weights as they are published now; experts themselves are constants."""
        self._layer.check(hidden_states, top_k_index, top_k_weights)
        if (grad.shape, grad.device) != (hidden_states.shape, hidden_states.device):
            raise InputError(
                f"expected a gradient like the output, {list(hidden_states.shape)} on {hidden_states.device}, got "
                f"{list(grad.shape)} on {grad.device}"
            )
        with self._ports.memory.fence.reading():
            return expert_gradients(grad, hidden_states, top_k_index, top_k_weights, self._layer, self._upgrades())

    def dequantized(self) -> ExpertWeights:
        """All experts `[E, ...]` in their own dtype, each as it is read now."""
        layer, experts = self._layer, []
        with self._ports.memory.fence.reading():
            upgrades = self._upgrades()
            for expert, base in enumerate(layer.base):
                upgrade = upgrades.of(expert)
                blocks = base[None], None if upgrade is None else upgrade[None]
                experts.append(layer.codec.decode(*blocks, layer.codec.dtype))
            return ExpertWeights.stacked(experts)

    def _transparent(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The output in PyTorch's own operators, which `torch.func` can differentiate; nothing is counted."""
        memory = self._ports.memory
        with memory.fence.reading():
            # Copies: the gradient is taken later, when a slot may hold another expert.
            upgrades = Upgrades(memory.table.row(self._ports.index), lambda address: memory.pool.at(address).clone())
            return reference.expert_mlp(hidden_states, top_k_index, top_k_weights, self._layer, upgrades)

    def _may_be_none(self, choices: Tensor) -> bool:
        """Whether the only row may stand for a rank's lack of tokens."""
        return self._ports.exchanges_tokens and choices.numel() == 1

    def _mass(self, hidden_states: Tensor, top_k_weights: Tensor) -> Tensor:
        """The routing weights that count for hotness."""
        return top_k_weights * hidden_states.any() if self._may_be_none(top_k_weights) else top_k_weights

    @property
    def _is_connected(self) -> bool:
        return "_layer" in self.__dict__

    def _upgrades(self) -> Upgrades:
        memory = self._ports.memory
        return Upgrades(memory.table.row(self._ports.index), memory.pool.at)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Not even parameters that stand in for the experts while a checkpoint is loaded belong to the state.
        if self._is_connected and not _SAVED_APART.get():
            for name in self._parameter_names:
                destination[prefix + name] = AbsentExperts.stand_in()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._parameter_names:
            if isinstance(state_dict.get(prefix + name), AbsentExperts):
                del state_dict[prefix + name]
        foreign = next((name for name in state_dict if name.startswith(prefix)), None)
        if foreign is not None and self._is_connected:
            raise PatchError(
                f"the experts are packed, and {foreign} would be left out; load 16-bit experts or adapters of experts "
                "before patching, and merge the adapters"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that there are, and stand-ins for the experts.

        Those that look for parameters to put adapters on (PEFT's `target_parameters`) find them, and are refused when
        they ask for one, instead of leaving the experts out. A model that is asked for all its parameters does not
        come this way.
        """
        yield from super().named_parameters(*args, **kwargs)
        for name in self._parameter_names:
            yield name, AbsentExperts.stand_in()  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_parameter_names", ()):
            raise PatchError(
                f"expected {name}, but the experts are packed, outside the module; put adapters on experts, or change "
                "them, before patching, and merge the adapters"
            )
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.refuse_move(fn)
        return super()._apply(fn, recurse)

    def refuse_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise a PatchError if `fn`, as given to `nn.Module._apply`, changes device or dtype: slabs cannot follow."""
        if not self._is_connected:
            return
        here = torch.empty(0, dtype=self._layer.codec.dtype, device=self._layer.base.device)
        there = fn(here)
        if (there.device, there.dtype) != (here.device, here.dtype):
            raise PatchError(
                f"expected a patched model to stay in {here.dtype} on {here.device}, asked for {there.dtype} on "
                f"{there.device}; convert or move the model first and patch it then, with device=... if need be"
            )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:  # copy.deepcopy comes this way, too
        self.refuse_copy(protocol)

    @staticmethod
    def refuse_copy(protocol: Any) -> NoReturn:
        """Raise a PatchError."""
        raise PatchError(
            "a patched model can be neither copied nor pickled: its experts live in slabs outside the module; "
            "copy or save the original model, or its state_dict, before patching"
        )


def must_be_operators(tensor: Tensor, other: Tensor) -> bool:
    """Whether PyTorch must see each operator on these: to compile, trace, count or fake it, or to record it."""
    if torch.compiler.is_compiling():
        return True
    if type(tensor) is not Tensor or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return torch.is_grad_enabled() and (tensor.requires_grad or other.requires_grad)


def in_function_transform() -> bool:
    """Whether `torch.func` is at work here (grad, vjp, jacrev, ...), which cannot look into an opaque operator."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def in_backward() -> bool:
    """Whether autograd is at work here: a forward that it recomputes (checkpointing) sees its tokens once more."""
    return torch._C._current_graph_task_id() != -1
