"""From settings and a model to a device, codecs for the ladders in question, and a memory plan; touching nothing."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dynaexq.errors import SettingsError
from dynaexq.hf.capacity import auto_budget
from dynaexq.hf.discovery import SparseLayer
from dynaexq.memory import DeviceMemory
from dynaexq.planning.budget import LADDERS, plan_memory
from dynaexq.quantization import ExpertCodec, offered
from dynaexq.settings import Settings
from dynaexq.types import MemoryPlan
from dynaexq.weights.quantize_experts import weight_bytes

Ladder = tuple[str, ...]


def resolve_device(settings: Settings) -> torch.device:
    """The device that `settings` names, or the accelerator if there is one, else the CPU; a SettingsError if none."""
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise SettingsError(f'device must be "cpu" or "cuda[:index]", got {name!r}') from error
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f'device must be "cpu" or "cuda[:index]", got {name!r}: no kernels for it')
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f'device {name!r} was asked for, but this PyTorch finds no CUDA device; use device="cpu"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device {name!r} was asked for, but there are {torch.cuda.device_count()}, numbered from 0"
        )
    if settings.host_copy == "pinned" and device.type != "cuda":
        raise SettingsError('host_copy="pinned" serves a CUDA device; on a CPU use host_copy="ram" or "disk"')
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def choose_ladders(settings: Settings, stored: Ladder | None = None) -> tuple[Ladder, ...]:
    """The ladders to choose from: the user's, all that there are, or what a packed checkpoint holds.

    Raises:
        SettingsError: the user's ladder is not among those that the `stored` planes allow.
    """
    if stored is None:
        return LADDERS if isinstance(settings.tiers, str) else (settings.tiers,)
    if isinstance(settings.tiers, str):
        return (stored,)
    if settings.tiers not in offered(stored):
        allowed = ", ".join(map(str, offered(stored)))
        raise SettingsError(
            f"tiers={settings.tiers} cannot be read from a checkpoint packed as {stored}; it allows {allowed}; choose "
            "one of them, or quantise the 16-bit source again"
        )
    return (settings.tiers,)


def make_codec(layer: SparseLayer, tiers: Ladder, settings: Settings) -> ExpertCodec:
    """The codec of one ladder for the experts of `layer`."""
    return ExpertCodec(layer.shape(), layer.dtype, tiers, settings.group_size, settings.quantizer)


def make_codecs(layer: SparseLayer, ladders: Iterable[Ladder], settings: Settings) -> dict[Ladder, ExpertCodec]:
    """The codec of each of several ladders."""
    return {tiers: make_codec(layer, tiers, settings) for tiers in ladders}


def make_plan(
    model: nn.Module,
    layers: Sequence[SparseLayer],
    codecs: dict[Ladder, ExpertCodec],
    settings: Settings,
    device: torch.device,
    dense: int,
    num_experts: int,
) -> MemoryPlan:
    """How `hbm_budget` is spent on `device`, on the best of the ladders in `codecs`.

    Args:
        dense: bytes there of all weights that are not experts.
        num_experts: experts of a layer on this device.

    Raises:
        BudgetError: nothing fits.
    """
    budget = settings.hbm_budget
    if isinstance(budget, str):
        in_memory = settings.host_copy in ("ram", "pinned", "auto")
        largest = max(codec.upgrade_layout.nbytes for codec in codecs.values())
        budget = auto_budget(model, settings, device, in_memory * largest * len(layers) * num_experts)
    others = {tiers: make_codec(layers[0], tiers, settings) for tiers in LADDERS}
    return plan_memory(
        [(codec.base, codec.upgrade) for codec in codecs.values()],
        len(layers),
        num_experts,
        dense=dense,
        workspace=DeviceMemory.workspace_bytes(len(layers), num_experts),
        budget=budget,
        alternatives=[(codec.base, codec.upgrade) for codec in others.values()],
    )


def dense_bytes(model: nn.Module, layers: Iterable[SparseLayer], device: torch.device | None = None) -> int:
    """Bytes of all weights and buffers but the experts' own; with `device`, of those that lie there."""
    experts = {id(p) for layer in layers for p in layer.experts._parameters.values()}
    tied = getattr(model, "all_tied_weights_keys", {})  # on the meta device they are not tied yet
    tensors: list[Tensor] = [t for name, t in model.named_parameters() if not (t.is_meta and name in tied)]
    tensors += model.buffers()
    return weight_bytes(t for t in tensors if id(t) not in experts and device in (None, t.device))
