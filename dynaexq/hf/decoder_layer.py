"""Decoder layers that few tokens pass natively on a CPU: around the model's attention, or many of them in one call.

A decoded token of a 30B model is a dozen modules in every layer, and Python takes as long for them as half of the
kernels. Here a layer does itself what its modules would do, rounded where they round; decision 20 has the reasons.
Which layers may do so is found by trying: their modules are those of `_MODULES`, and what they make of a few rows is,
bit for bit, what the formulas here make of them. Many tokens, gradients, compilers, padding, and a module inside that
has a hook, a wrapped forward or a successor, bring the layer's own forward back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynaexq.hf.compat import captures_outputs, is_capturing_hook
from dynaexq.hf.decode_attention import NATIVE, SdpaOfFew, is_formula
from dynaexq.hf.growing_cache import RoomyLayer
from dynaexq.hf.pending_rows import PendingRows, computed
from dynaexq.kernels import DecoderLayer, DecoderParts, Step, decoder_layer, rotated
from dynaexq.runtime.door import CACHE_NAMES, tokens_among
from dynaexq.runtime.experts import MixedPrecisionExperts, in_backward, in_function_transform, must_be_operators
from dynaexq.runtime.few_rows import FewRowsLinear, FewRowsNorm, FewRowsRouter
from dynaexq.runtime.linear import PackedLinear

_LINEAR, _NORM = (PackedLinear, FewRowsLinear), (FewRowsNorm,)
_MODULES: dict[str, dict[str, tuple[type[nn.Module], ...]]] = {
    "": {"input_layernorm": _NORM, "self_attn": (), "post_attention_layernorm": _NORM, "mlp": ()},
    "self_attn": dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), _LINEAR),
    "mlp": {"gate": (FewRowsRouter,), "experts": (MixedPrecisionExperts,)},
}
"""The modules of a layer, of its attention and of its sparse block, and what they have to be."""
_HEAD_NORMS = dict.fromkeys(("q_norm", "k_norm"), _NORM)
"""What attention may have as well."""

OWN = ("_inside", "_addresses", "_decoder", "_following")
"""Attributes that a layer has only while the mixin is in its place."""

TRIED, LARGE = 4, 1e4
"""Rows that a layer is tried with, and what some of them are multiplied with, to meet what is clipped."""


class _Inside(NamedTuple):
    """What a layer has inside, found once.

    Attributes:
        modules: all of them, whose forwards the native calls stand for.
    """

    modules: tuple[nn.Module, ...]
    attention: Any
    experts: MixedPrecisionExperts
    top_k: int


class _Work:
    """What some layers, one after the other, have yet to compute; called, it computes it."""

    def __init__(self, native: DecoderLayer, top_k: int):
        self._native, self._top_k = native, top_k
        self._layers: list[MixedPrecisionExperts] = []
        self._steps: list[Any] = []

    def takes(self, experts: MixedPrecisionExperts, top_k: int) -> bool:
        """Whether a layer of these may be the next."""
        return self._top_k == top_k and all(layer.memory is experts.memory for layer in self._layers[:1])

    def add(self, experts: MixedPrecisionExperts, step: Any) -> None:
        self._layers.append(experts)
        self._steps.append(step)

    def __call__(self) -> None:
        if self._layers:
            run = partial(self._native.run, self._steps)
            MixedPrecisionExperts.pass_through(self._layers, self._top_k, run)
            self._layers, self._steps = [], []


class FewTokensDecoderLayer(nn.Module):
    """Mixin that takes the place of a decoder layer (`hf.model_patch`), of those that `passes_natively` finds."""

    _inside: _Inside
    _addresses: list[int] | None = None
    _decoder: DecoderLayer | None = None
    _following: tuple[nn.Module, ...] = ()
    """The next layer, if the work may be left to it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = hidden_states.memory if isinstance(hidden_states, PendingRows) else hidden_states
        native = None if args else self._native_for(rows, kwargs)
        if native is None:
            return super().forward(computed(hidden_states), *args, **kwargs)
        step = self._step(native, rows, kwargs)
        if step is None:
            return self._in_two_calls(native, computed(hidden_states), kwargs)
        return self._with_others(native, step, hidden_states)

    def _with_others(self, native: DecoderLayer, step: Step, hidden_states: Tensor) -> Tensor:
        """The layer after what has been left to do for its rows; left to do itself, if another layer follows."""
        _, _, experts, top_k = self._inside
        work: Any = hidden_states.work if isinstance(hidden_states, PendingRows) else _Work(native, top_k)
        if not work.takes(experts, top_k):
            work()
            work = _Work(native, top_k)
        experts.about_to_pass(step.output.shape[0] * step.output.shape[1])
        work.add(experts, native.step(step))
        if self._following and all(map(_is_plain, (self, *self._following))):
            return PendingRows.of(step.output, work)
        work()
        return step.output

    def _step(self, native: DecoderLayer, rows: Tensor, kwargs: dict[str, Any]) -> Step | None:
        """The whole layer for these rows, attention included; None where that has to be the model's."""
        attention = self._inside.attention
        mask = kwargs.get("attention_mask")
        layer = _roomy_layer(kwargs, attention.layer_idx)
        if layer is None or layer.keys is None or layer.values is None:
            return None
        if NATIVE not in vars(attention) or not isinstance(ALL_ATTENTION_FUNCTIONS["sdpa"], SdpaOfFew):
            return None
        if not is_formula(rows.shape[1], mask, kwargs) or not native.attends(rows, layer.keys, layer.values, mask):
            return None
        longer = layer.extended(rows.shape[1])
        if longer is None:
            return None
        cosine, sine = (angles.contiguous() for angles in kwargs["position_embeddings"])
        return Step(rows, torch.empty_like(rows), cosine, sine, *longer, mask, attention.scaling)

    def _in_two_calls(self, native: DecoderLayer, rows: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The layer around the model's attention."""
        _, attention, experts, top_k = self._inside
        heads = native.before_attention(rows, *kwargs.pop("position_embeddings"))
        attended = _attend(attention, heads, kwargs)
        experts.about_to_pass(rows.shape[0] * rows.shape[1])
        after = partial(native.after_attention, attended, rows)
        output: Tensor = experts.pass_through([experts], top_k, lambda published: after(*published[0]))
        return output

    def _native_for(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> DecoderLayer | None:
        """What computes this layer for these rows; None where that is the layer's own forward."""
        if hidden_states.ndim != 3 or hidden_states.dtype != torch.bfloat16 or not hidden_states.is_cpu:
            return None
        if must_be_operators(hidden_states, hidden_states) or in_function_transform() or in_backward():
            return None
        attention = self._inside.attention
        if self.training or attention.config._attn_implementation != "sdpa" or not self._is_untouched():
            return None
        native = self._current()
        rows = hidden_states.shape[0] * hidden_states.shape[1]
        if native is None or not 0 < rows <= native.most_rows or not hidden_states.is_contiguous():
            return None
        if not _are_angles(kwargs.get("position_embeddings"), hidden_states, attention.head_dim):
            return None
        return native if tokens_among(hidden_states.view(rows, -1)) is None else None

    def _is_untouched(self) -> bool:
        """Whether the modules inside are those that were tried, and no hook waits for one of them to be called."""
        if captures_outputs() or torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
            return False
        modules = self._inside.modules
        return _modules_inside(self) == modules and all(map(_is_plain, modules))

    def _current(self) -> DecoderLayer | None:
        """What computes this layer, where its weights are now."""
        parameters = (module._parameters.values() for module in self._inside.modules)
        addresses = [weight.data_ptr() for weight in chain.from_iterable(parameters) if weight is not None]
        if addresses != self._addresses:
            parts = _parts_of(self)
            self._decoder = parts and decoder_layer(parts)
            self._addresses = addresses
        return self._decoder


def link(model: nn.Module) -> None:
    """Tell the layers of a model which of them are followed by another, to which they may leave their work."""
    for modules in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for layer, following in pairwise(modules):
            if isinstance(layer, FewTokensDecoderLayer):
                layer._following = (following,) if isinstance(following, FewTokensDecoderLayer) else ()


@torch.no_grad()
def passes_natively(module: Any) -> bool:
    """Whether `module` is a decoder layer that the mixin can stand for; if so, it gets what the mixin needs."""
    if not _has_its_modules(module):
        return False
    gate, experts = module.mlp.gate, module.mlp.experts
    if not 1 < gate.top_k <= len(gate.weight) == experts.layer.num_experts:
        return False
    try:
        if not (_is_as_formula(module) and _attends_as_formula(module.self_attn) and _routes_as_formula(module.mlp)):
            return False
    except Exception:  # it wants something else, or is not on a CPU
        return False
    module._inside = _Inside(_modules_inside(module), module.self_attn, experts, gate.top_k)
    return True


def forgotten(module: nn.Module) -> None:
    """Take away what `passes_natively` and the mixin have left with a module."""
    for name in OWN:
        module.__dict__.pop(name, None)


def _has_its_modules(module: nn.Module) -> bool:
    for path, expected in _MODULES.items():
        owner = getattr(module, path, None) if path else module
        found = dict(owner._modules) if isinstance(owner, nn.Module) else {}
        wanted = expected | (_HEAD_NORMS if path == "self_attn" and "q_norm" in found else {})
        if found.keys() != wanted.keys():
            return False
        if not all(isinstance(found[name], kinds) for name, kinds in wanted.items() if kinds):
            return False
    linears = (getattr(module.self_attn, name) for name in _MODULES["self_attn"])
    return all(linear.bias is None for linear in linears) and hasattr(module.self_attn, "head_dim")


def _is_as_formula(layer: Any) -> bool:
    """Whether a layer adds its attention, and then its block, each of a norm of what is there."""
    rows = _rows(len(layer.input_layernorm.weight))

    def attention(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return 0.5 * hidden_states, None

    with _stubbed(layer.self_attn, attention), _stubbed(layer.mlp, lambda hidden_states: 0.25 * hidden_states):
        found = layer.forward(rows, position_embeddings=None, attention_mask=None)
    between = rows + 0.5 * layer.input_layernorm(rows)
    return _are_equal(found, between + 0.25 * layer.post_attention_layernorm(between))


def _attends_as_formula(attention: Any) -> bool:
    """Whether attention projects, normalizes and rotates its heads and attends to them as here."""
    rows, width = _rows(attention.q_proj.in_features), attention.head_dim
    cosine, sine = _rows(width), _rows(width).flip(1)
    mask = torch.ones(1, 1, TRIED, TRIED, dtype=torch.bool).tril()
    found = attention.forward(rows, position_embeddings=(cosine, sine), attention_mask=mask)

    def heads(name: str) -> Tensor:
        projection: Tensor = getattr(attention, f"{name}_proj")(rows).view(1, TRIED, -1, width)
        norm = getattr(attention, f"{name}_norm", None)
        return (projection if norm is None else norm(projection)).transpose(1, 2)

    rotations = [rotated(heads(name), cosine, sine) for name in "qk"]
    attended = _attend(attention, (*rotations, heads("v")), {"attention_mask": mask})
    return isinstance(found, tuple) and _are_equal(found[0], attention.o_proj(attended.reshape(1, TRIED, -1)))


def _routes_as_formula(block: Any) -> bool:
    """Whether a block hands its experts what its router says of the same rows, and returns what they do."""
    rows, seen = _rows(block.gate.weight.shape[1]), list[Tensor]()

    def experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        seen.extend((hidden_states, top_k_weights, top_k_index))
        return 0.5 * hidden_states

    with _stubbed(block.experts, experts):
        found = block.forward(rows)
    expected = rows[0], *block.gate(rows[0])[1:]
    routed = len(seen) == 3 and all(map(_are_equal, seen, expected))
    return routed and _are_equal(found, 0.5 * rows)


def _cache_in(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def _roomy_layer(kwargs: dict[str, Any], index: int) -> RoomyLayer | None:
    """The layer of a cache that grows in place, if it is one."""
    cache = _cache_in(kwargs)
    layers = getattr(cache, "layers", ())
    if len(layers) <= index or type(layers[index]) is not RoomyLayer or getattr(cache, "offloading", False):
        return None
    layer: RoomyLayer = layers[index]
    return layer


def _attend(attention: Any, heads: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Tensor:
    """What `attention` makes of heads `[batch, heads, length, width]`, `[batch, length, heads, width]`.

    Keys and values join the cache first, where there is one.
    """
    query, key, value = heads
    if (cache := _cache_in(kwargs)) is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    mask, scale = kwargs.get("attention_mask"), attention.scaling
    others = {name: other for name, other in kwargs.items() if name not in (*CACHE_NAMES, "attention_mask")}
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    attended: Tensor = attend(attention, query, key, value, mask, dropout=0.0, scaling=scale, **others)[0]
    return attended


def _parts_of(layer: Any) -> DecoderParts | None:
    """The parts of a layer as they are now; None where one is no longer native."""
    attention, gate, experts = layer.self_attn, layer.mlp.gate, layer.mlp.experts
    modules = {**layer._modules, **attention._modules, "gate": gate}
    native = {name: module.current() for name, module in modules.items() if name not in ("self_attn", "mlp")}
    if any(part is None for part in native.values()):
        return None
    return DecoderParts(
        norm=native["input_layernorm"],
        query=native["q_proj"],
        key=native["k_proj"],
        value=native["v_proj"],
        query_norm=native.get("q_norm"),
        key_norm=native.get("k_norm"),
        width=attention.head_dim,
        out=native["o_proj"],
        block_norm=native["post_attention_layernorm"],
        router=native["gate"],
        routing=gate._kind,
        top_k=gate.top_k,
        experts=experts.layer,
    )


def _modules_inside(layer: Any) -> tuple[nn.Module, ...]:
    own = layer._modules
    return (*own.values(), *own["self_attn"]._modules.values(), *own["mlp"]._modules.values())


def _is_plain(module: nn.Module) -> bool:
    """Whether calling `module` is no more than its class's forward."""
    own = module.__dict__
    if own["_forward_pre_hooks"] or "forward" in own:
        return False
    hooks = own["_forward_hooks"]
    return not hooks or all(map(is_capturing_hook, hooks.values()))


def _are_angles(angles: Any, hidden_states: Tensor, width: int) -> bool:
    """Whether these are the cosines and sines `[1 or batch, length, width]` of the tokens."""
    if not isinstance(angles, tuple) or len(angles) != 2:
        return False
    batch, length, _ = hidden_states.shape
    shapes = (1, length, width), (batch, length, width)
    return all(
        type(one) is Tensor and one.shape in shapes and one.dtype == torch.bfloat16 and one.is_cpu for one in angles
    )


def _rows(columns: int) -> Tensor:
    """Rows `[1, TRIED, columns]` to try a module with, of which some are large."""
    rows = torch.randn(1, TRIED, columns, generator=torch.Generator().manual_seed(columns))
    return (rows * torch.tensor([1, LARGE]).repeat(TRIED // 2)[:, None]).bfloat16()


@contextmanager
def _stubbed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def _are_equal(found: Any, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
