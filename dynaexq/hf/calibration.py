"""Gather what experts and dense layers meet while a 16-bit model reads a text; see `weights.calibration`.

The model runs as it is, with a hook before each layer of experts and each dense layer. Tokens are counted where they
are routed, so what is gathered is of the text's own traffic. On disk it is a safetensors file that names the layers it
belongs to. The experts of a model that is larger than the memory at hand are read layer by layer, by accelerate's
offloading: all of the text passes in one forward, so that each is read once.
"""

import inspect
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynaexq.errors import CheckpointError, UnsupportedModelError
from dynaexq.hf.checkpoint_source import checkpoint_files
from dynaexq.hf.discovery import SparseLayer, activation_of, find_sparse_layers
from dynaexq.hf.free_memory import free_bytes
from dynaexq.hf.meta_model import meta_model, read_config
from dynaexq.hf.packed_dense import calibrated_linears
from dynaexq.settings import Settings
from dynaexq.weights.calibration import Calibration, Met
from dynaexq.weights.calibration_file import read_calibration, write_calibration

WINDOW_TOKENS = 512

MOST_TOKENS, MOST_NBYTES = 2**17, 2**33
"""What is read of a text: the moments of an expert that gets a fiftieth of so many tokens have settled by then; and
what all rows together may take, 43,000 of Qwen3-30B-A3B."""


def calibrate(model: nn.Module, path: str | Path, windows: Iterable[Tensor] | None = None) -> None:
    """Gather what experts and dense layers meet and write it to the safetensors file `path`, for
    `patch(..., calibration=path)`.

    The file takes the bytes of every layer's inputs, 2 H a token: 32,768 tokens are 6.4 GB for Qwen3-30B-A3B.

    Args:
        model: in 16 bit, not patched.
        windows: token ids `[T]`, or several of one length `[B, T]`, of text as mixed as the traffic will be, 10,000
            tokens and more; what a narrow text does not show gets worse than without calibration. By default the
            model writes 32,768 tokens itself.

    Raises:
        UnsupportedModelError, PatchError: the model, or the state it is in; the message names the module.
        CheckpointError: there is no space.
    """
    find_sparse_layers(model)
    met, dense = gather(model, generated_windows(model) if windows is None else windows)
    write_calibration(Path(path), met, dense)


def calibrate_checkpoint(
    source: Path, text: Path | None, path: Path, device: str | None = None, variant: str | None = None
) -> None:
    """`calibrate` with the 16-bit checkpoint `source` and the text of a file, or the model's own.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, or too large to write a text of its own, the text is
            too short, or there is no space.
    """
    read_config(source)
    needed = sum(file.stat().st_size for file in checkpoint_files(source, variant))
    available = free_bytes(torch.device(device or "cpu"))
    load = partial(AutoModelForCausalLM.from_pretrained, source, dtype="auto", variant=variant)
    windows = None if text is None else text_windows(AutoTokenizer.from_pretrained(source), text)
    if needed <= available:
        calibrate(load(device_map={"": device or "cpu"}).eval(), path, windows)
    elif windows is not None:
        _calibrate_by_layers(load, meta_model(source), torch.stack(windows), path, device or "cpu")
    else:
        raise CheckpointError(
            f"the model would write its text token by token, {source} takes {needed:,} bytes and {available:,} are "
            "free; give a text, which it reads layer by layer, or calibrate on a machine that holds it"
        )


def _calibrate_by_layers(
    load: Callable[..., Any], skeleton: nn.Module, windows: Tensor, path: Path, device: str
) -> None:
    """`calibrate` with the experts beside `path` on the disk, where they take as much room as in memory."""
    experts = {layer.name for layer in find_sparse_layers(skeleton, on_meta=True)}
    places = dict(_places(skeleton, experts, device))
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as offloaded:
        model = load(device_map=places, offload_folder=offloaded, experts_implementation="eager").eval()
        write_calibration(path, *gather(model, [windows], on_disk=True))


def _places(module: nn.Module, experts: set[str], device: str, path: str = "") -> Iterator[tuple[str, str]]:
    """Where each part of a model goes, as a `device_map` says it: experts to the disk."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if below in experts or not any(place.startswith(f"{below}.") for place in experts):
            yield below, "disk" if below in experts else device
        else:
            yield from _places(child, experts, device, below)


@torch.no_grad()
def gather(
    model: nn.Module, windows: Iterable[Tensor], on_disk: bool = False
) -> tuple[dict[str, Met], dict[str, Tensor]]:
    """What each layer of experts met while `model` reads `windows`, token ids `[T]` or, of several texts at once,
    `[B, T]`; and the moments of dense layers, as `DenseMoments` has them.

    Args:
        on_disk: whether the experts are offloaded there.

    In memory it takes the bytes of the rows, and `K**2` float32 for dense layers of K inputs, once for those that meet
    the same: 6.4 and 4 GB for 32,768 tokens of Qwen3-30B-A3B. No more than `MOST_NBYTES` of rows are read.
    """
    layers = find_sparse_layers(model, on_meta=on_disk)
    device = torch.device("cpu") if on_disk else layers[0].device  # of an offloaded model, accelerate moves the inputs
    gathered = [_Gathered() for _ in layers]
    hooks = [
        layer.experts.register_forward_pre_hook(rows.before_forward, with_kwargs=True)
        for layer, rows in zip(layers, gathered, strict=True)
    ]
    dense = _GatheredDense()
    hooks += [
        linear.register_forward_pre_hook(partial(dense.before_forward, path), with_kwargs=True)
        for path, linear in calibrated_linears(model, layers)
    ]
    # The logits of all of a text would take more than all of its rows.
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    row_nbytes = len(layers) * layers[0].shape().hidden_size * layers[0].dtype.itemsize
    left = MOST_NBYTES // row_nbytes
    try:
        with tqdm(desc="calibrating", unit="token", unit_scale=True, disable=None) as progress:
            for window in windows:
                ids = (window if window.ndim == 2 else window[None])[: max(1, left // window.shape[-1])]
                model(ids.to(device), use_cache=False, **options)
                progress.update(ids.numel())
                left -= ids.numel()
                if left <= 0:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    met = {layer.name: rows.met() for layer, rows in zip(layers, gathered, strict=True)}
    return met, dense.moments()


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


def calibration_for(settings: Settings, layers: Sequence[SparseLayer]) -> Calibration | None:
    """What the file that `settings.calibration` names says of a model; None without it.

    Raises:
        CheckpointError: there is no such file, it is damaged, or of another model.
    """
    if settings.calibration is None:
        return None
    names, activations = [layer.name for layer in layers], [activation_of(layer.experts) for layer in layers]
    return read_calibration(Path(settings.calibration), names, layers[0].num_experts, layers[0].shape(), activations)


class _Gathered:
    """The rows that one layer of experts has met, and where they were routed."""

    def __init__(self) -> None:
        self._met: list[tuple[Tensor, Tensor, Tensor]] = []

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states, top_k_index, top_k_weights = (*args, *kwargs.values())
        self._met.append((hidden_states.cpu(), top_k_index.to("cpu", torch.int16), top_k_weights.float().cpu()))

    def met(self) -> Met:
        return Met(*map(torch.cat, zip(*self._met, strict=True)))


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


WINDOWS, LENGTH = 64, 512
"""What `calibrate` asks for: 32,768 tokens, all windows at a time."""


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
            prompt = start.expand(min(WINDOWS, count - len(windows)), 1)
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
