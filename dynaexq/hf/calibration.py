"""Gather the second moments of matrices' inputs from a 16-bit model and text; see `quantization.moments`.

The model runs as it is, with a hook before each layer of experts and each dense layer. Tokens are counted where they
are routed, so what is gathered is of the text's own traffic. On disk moments are a safetensors file that names the
layers it belongs to.
"""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynaexq.checkpoint import read_tensors, write_tensors
from dynaexq.errors import CheckpointError, UnsupportedModelError
from dynaexq.hf.checkpoint_source import checkpoint_files
from dynaexq.hf.discovery import SparseLayer, find_sparse_layers
from dynaexq.hf.meta_model import read_config
from dynaexq.hf.packed_dense import calibrated_linears
from dynaexq.quantization import BLOCK, Moments
from dynaexq.safeguards.outside_files import parse_json
from dynaexq.settings import Settings

WINDOW_TOKENS = 512


MOST_TOKENS = 2**17
"""What is read of a text; the moments of an expert that gets a fiftieth of them have settled by then."""


KIND = "dynaexq-moments"


def calibrate(model: nn.Module, path: str | Path, windows: Iterable[Tensor] | None = None) -> Moments:
    """Gather moments with `model` and write them to the safetensors file `path`, for `patch(..., calibration=path)`.

    Args:
        model: in 16 bit, not patched.
        windows: token ids `[T]` of text as mixed as the traffic will be, 10,000 tokens and more; what a narrow text
            does not show gets worse than without calibration. By default the model writes 32,768 tokens itself.

    Raises:
        UnsupportedModelError, PatchError: the model, or the state it is in; the message names the module.
        CheckpointError: there is no space.
    """
    find_sparse_layers(model)
    moments = gather_moments(model, generated_windows(model) if windows is None else windows)
    save_moments(moments, Path(path))
    return moments


def calibrate_checkpoint(
    source: Path, text: Path | None, path: Path, device: str | None = None, variant: str | None = None
) -> None:
    """`calibrate` with the 16-bit checkpoint `source`, loaded whole, and the text of a file, or the model's own.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, or larger than the memory at hand, the text is too
            short, or there is no space.
    """
    read_config(source)
    needed = sum(file.stat().st_size for file in checkpoint_files(source, variant))
    available = psutil.virtual_memory().available if device in (None, "cpu") else torch.cuda.mem_get_info(device)[0]
    if needed > available:
        raise CheckpointError(
            f"calibrating runs the whole model in 16 bit: {source} takes {needed:,} bytes and {available:,} are free; "
            "calibrate on a machine that holds it and pass the moments it writes, or leave calibration out"
        )
    windows: Iterable[Tensor] | None = None
    if text is not None:
        windows = tqdm(text_windows(AutoTokenizer.from_pretrained(source), text), desc="calibrating", unit="window")
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", device_map={"": device or "cpu"}, variant=variant
    ).eval()
    calibrate(model, path, windows)


@torch.no_grad()
def gather_moments(model: nn.Module, windows: Iterable[Tensor]) -> Moments:
    """Gather the second moments of the inputs of experts and dense layers while `model` reads `windows`.

    The sums take `H**2` float32 per layer, 64 per unit of every expert and `K**2` per dense layer of K inputs: 2 and
    4 GB for Qwen3-30B-A3B.
    """
    layers = find_sparse_layers(model)
    gathered = [_Gathered(layer) for layer in layers]
    hooks = [
        layer.experts.register_forward_pre_hook(sums.before_forward, with_kwargs=True)
        for layer, sums in zip(layers, gathered, strict=True)
    ]
    dense = _GatheredDense()
    hooks += [
        linear.register_forward_pre_hook(partial(dense.before_forward, path), with_kwargs=True)
        for path, linear in calibrated_linears(model, layers)
    ]
    try:
        for window in windows:
            model(window[None].to(layers[0].device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    up, down, tokens = (torch.stack(parts) for parts in zip(*(sums.means() for sums in gathered), strict=True))
    return Moments(tuple(layer.name for layer in layers), up, down, tokens, dense.moments())


def text_windows(tokenizer: Any, text: Path) -> list[Tensor]:
    """Windows of token ids from the file `text`, up to 131,072 tokens; a CheckpointError if it makes not even one."""
    ids = tokenizer(text.read_text(encoding="utf-8", errors="replace"), verbose=False)["input_ids"]
    if len(ids) < WINDOW_TOKENS:
        raise CheckpointError(
            f"expected at least {WINDOW_TOKENS} tokens to calibrate on, {text} has {len(ids)}; a few hundred thousand "
            "characters of what the model will meet serve best"
        )
    whole = min(len(ids), MOST_TOKENS) // WINDOW_TOKENS * WINDOW_TOKENS
    return list(torch.tensor(ids[:whole]).view(-1, WINDOW_TOKENS))


def save_moments(moments: Moments, path: Path) -> None:
    """Put `moments` in the place of the safetensors file `path`. Raises CheckpointError."""
    shared = {id(tensor): tensor for tensor in moments.dense.values()}
    names = {key: f"dense.{number}" for number, key in enumerate(shared)}
    parts = {"up": moments.up, "down": moments.down, "tokens": moments.tokens}
    parts |= {names[key]: tensor for key, tensor in shared.items()}
    dense = {layer: names[id(tensor)] for layer, tensor in moments.dense.items()}
    write_tensors(path, parts, {"kind": KIND, "layers": json.dumps(moments.layers), "dense": json.dumps(dense)})


def load_moments(path: Path) -> Moments:
    """The moments that `save_moments` wrote; a CheckpointError if `path` is anything else."""
    if not path.is_file():
        raise CheckpointError(
            f"expected moments in a file, there is no {path}; dynaexq.calibrate(model, path) writes it"
        )
    parts, metadata = read_tensors(path, [KIND], ["up", "down", "tokens"])
    try:
        layers, places = parse_json(metadata["layers"]), parse_json(metadata.get("dense", "{}"))
        expected = [(len(layers), *part.shape[1:]) for part in parts.values()]
        shared, _ = read_tensors(path, [KIND], set(places.values()))
        dense = {str(layer): shared[name] for layer, name in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"expected moments as dynaexq's calibration writes them, {path} is something else"
        ) from error
    ranks = [part.ndim for part in (*parts.values(), *shared.values())]
    named = isinstance(layers, list) and all(isinstance(name, str) for name in layers)
    fits = ranks == [3, 5, 2] + [2] * len(shared) and expected == [tuple(part.shape) for part in parts.values()]
    if not named or not fits:
        raise CheckpointError(f"expected moments as dynaexq's calibration writes them, {path} is something else")
    finite = all(part.isfinite().all() for part in (parts["up"], parts["down"], *shared.values()))
    if not finite or not (parts["tokens"] >= 0).all():
        raise CheckpointError(f"{path} holds moments that are not finite; the model it came from has overflown")
    return Moments(tuple(layers), **parts, dense=dense)


def moments_for(settings: Settings, layers: Sequence[SparseLayer]) -> Moments | None:
    """Load the moments that `settings.calibration` names; None without it.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    if settings.calibration is None:
        return None
    moments, shape = load_moments(Path(settings.calibration)), layers[0].shape()
    names = tuple(layer.name for layer in layers)
    blocks = -(-shape.intermediate_size // BLOCK)
    expected = (len(names), layers[0].num_experts, shape.hidden_size, blocks)
    found = (len(moments.layers), moments.num_experts, moments.up.shape[-1], moments.down.shape[2])
    if moments.layers != names or found != expected:
        raise CheckpointError(
            f"calibration={settings.calibration!r} belongs to another model: expected moments of layers {names[0]} to "
            f"{names[-1]} and (layers, experts, hidden size, blocks) {expected}, found {moments.layers[0]} to "
            f"{moments.layers[-1]} and {found}; calibrate this model"
        )
    return moments


class _Gathered:
    """Sums over the tokens that one layer of experts has seen."""

    def __init__(self, layer: SparseLayer):
        self.layer, self.shape = layer, layer.shape()
        hidden, blocks = self.shape.hidden_size, -(-self.shape.intermediate_size // BLOCK)
        self.up = torch.zeros(hidden, hidden, dtype=torch.float32, device=layer.device)
        self.down = torch.zeros(layer.num_experts, blocks, BLOCK, BLOCK, dtype=torch.float32, device=layer.device)
        self.mass = torch.zeros(1 + layer.num_experts, dtype=torch.float32, device=layer.device)
        self.tokens = torch.zeros(layer.num_experts, dtype=torch.int64, device=layer.device)

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states, top_k_index, top_k_weights = (*args, *kwargs.values())
        weights = top_k_weights.float().square()
        rows = hidden_states.float()
        self.up += rows.T @ (rows * weights.sum(-1, keepdim=True))
        self.mass[-1] += weights.sum()
        for expert in top_k_index.unique().tolist():
            if 0 <= expert < self.layer.num_experts:
                token, choice = torch.where(top_k_index == expert)
                self._add(expert, self._units(hidden_states[token], expert).float(), weights[token, choice])

    def _units(self, rows: Tensor, expert: int) -> Tensor:
        """The inputs of an expert's second matrix, `[n, I]`."""
        weights, experts = self.layer.weights(), self.layer.experts
        matrix = weights.up[expert].T if self.shape.transposed else weights.up[expert]
        bias = None if weights.up_bias is None else weights.up_bias[expert]
        product = F.linear(rows, matrix, bias)
        return experts._apply_gate(product) if experts.has_gate else experts.act_fn(product)

    def _add(self, expert: int, units: Tensor, weights: Tensor) -> None:
        # A few tokens have units a hundred times as long as others; what an error does to those says little of the
        # rest, so that all count at one length.
        units = units / units.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        blocks = F.pad(units, (0, -units.shape[1] % BLOCK)).view(len(units), -1, BLOCK).transpose(0, 1)
        self.down[expert] += (blocks * weights[:, None]).transpose(1, 2) @ blocks
        self.mass[expert] += weights.sum()
        self.tokens[expert] += len(units)

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments `[H, H]` and `[E, B, 64, 64]`, and tokens `[E]`, on the CPU."""
        mass = self.mass.clamp_min(1e-12)
        return (self.up / mass[-1]).cpu(), (self.down / mass[:-1, None, None, None]).cpu(), self.tokens.cpu()


class _GatheredDense:
    """Sums over the inputs of dense layers. Those that meet the same tensor, such as q, k and v, share the first's."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._owners: dict[str, str] = {}
        self._latest: tuple[Tensor | None, str] = None, ""

    def before_forward(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (inputs,) = (*args, *kwargs.values())
        latest, owner = self._latest
        if self._owners.setdefault(path, owner if inputs is latest else path) != path:
            return
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self._sums[path] = self._sums.get(path, 0) + rows.T @ rows
        self._latest = inputs, path

    def moments(self) -> dict[str, Tensor]:
        """Float16 `[K, K]` on the CPU, in units of their mean square, of which none can be more than K."""
        shared = {
            path: (sums / sums.diagonal().mean().clamp_min(1e-12)).half().cpu() for path, sums in self._sums.items()
        }
        return {path: shared[owner] for path, owner in self._owners.items()}


WINDOWS, LENGTH, AT_ONCE = 64, 512, 16
"""What `calibrate` asks for: 32,768 tokens, 16 windows at a time."""


@torch.no_grad()
def generated_windows(model: Any, count: int = WINDOWS, length: int = LENGTH, seed: int = 0) -> list[Tensor]:
    """`count` windows of `length` token ids, sampled from the model's own distribution, nothing cut off.

    They start at the token that begins a text, or else at one that ends it. The random state of the caller stays as
    it is.

    Raises:
        UnsupportedModelError: the model has no `generate`.
    """
    if not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"expected a model that generates text, so that it can write its own to be calibrated on, got a "
            f"{type(model).__name__}; pass windows of token ids"
        )
    start = torch.full((1, 1), _first_token(model), device=next(model.parameters()).device)
    windows: list[Tensor] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while len(windows) < count:
            prompt = start.expand(min(AT_ONCE, count - len(windows)), 1)
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
            )
            windows += written.cpu()
    return windows


def _first_token(model: Any) -> int:
    config = model.config.get_text_config()
    for token in (config.bos_token_id, config.eos_token_id):
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return 0
