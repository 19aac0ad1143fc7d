"""A model on its way from a checkpoint: experts hidden from Transformers' loader, then read into their places.

Before the weights are loaded the experts lose their (meta) parameters, so that the loader knows nothing of them; what
cannot work is refused then, before a byte is read. After the dense weights are there, each device gets a runtime.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dynaexq.checkpoint import MARK, PackedReader, PackedShape
from dynaexq.errors import SettingsError, UnsupportedModelError
from dynaexq.hf.calibration import moments_for
from dynaexq.hf.checkpoint_source import CheckpointSource, open_shards
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.discovery import SparseLayer, find_sparse_layers
from dynaexq.hf.distributed import check_distribution, edit_tensor_plan, share_of
from dynaexq.hf.model_patch import ModelPatch
from dynaexq.hf.planning import dense_bytes, make_codec, make_codecs, make_plan, tier_choices
from dynaexq.quantization import ExpertCodec
from dynaexq.runtime.device_runtime import DeviceRuntime
from dynaexq.runtime.runtime import Runtime
from dynaexq.settings import Settings
from dynaexq.weights.packed_experts import PackedLoader, PrefetchedBase, packed_shape
from dynaexq.weights.quantize_experts import QuantizingLoader
from dynaexq.weights.sources import ExpertLoader

GUARD = "dynaexq_must_be_imported"
"""A key in packed checkpoints that speaks to whoever loads one without dynaexq; see `saving`."""


class CheckpointLoad:
    """One `from_pretrained`, from the model on the meta device to the runtime.

    Args:
        files: the checkpoint's shards.
        device_map: as it is known before loading: a dict, or the name of a strategy.

    Raises:
        UnsupportedModelError, CheckpointError, BudgetError, SettingsError: what cannot work, before a byte is read.
    """

    def __init__(
        self, model: Any, config: DynaExqConfig, settings: Settings, files: Sequence[str] | None, device_map: Any
    ):
        self.model, self.settings = model, settings
        self.layers = find_sparse_layers(model, on_meta=True)
        check_distribution(model.config, self.layers, settings.dense)
        stored = config.stored_tiers()
        if stored and settings.calibration is not None:
            raise SettingsError(
                f"calibration={settings.calibration!r} was given, and the checkpoint is packed: its codes are fixed; "
                "leave it out, or quantise the 16-bit source again"
            )
        self._moments = moments_for(settings, self.layers)
        self._codecs = make_codecs(self.layers[0], tier_choices(settings, stored), settings)
        self._stored_codec = make_codec(self.layers[0], stored, settings) if stored else None
        shards = open_shards(files)
        self._source = None if stored else CheckpointSource(model, self.layers, shards)
        self._reader = PackedReader(shards, self._packed_shape(self._stored_codec)) if self._stored_codec else None
        self._check_budget(device_map)
        self._early = self._read_early(device_map)
        self._installation = ModelPatch(model, self.layers)
        self._installation.replace_modules(self._placeholders(device_map))
        for layer in self.layers:
            layer.experts._is_hf_initialized = True  # there is nothing that Transformers could initialise
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {_keys_of(model, self.layers), re.escape(MARK), GUARD}

    def device_map_is_known(self) -> None:
        """The stand-ins that gave every layer its size have served, unless ranks are still to share them out."""
        if not self._is_distributed:
            self._installation.drop_placeholders()

    def edit_tensor_plan(self, plan: dict[str, str]) -> None:
        """Keep experts whole under tensor parallelism; see `parallel`."""
        if self._is_distributed:
            edit_tensor_plan(plan, self.layers)

    @torch.inference_mode(False)  # what is allocated here outlives the caller's inference mode
    def finish(self, quantizer: Any, save: Any) -> None:
        """Read the experts onto the devices where their layers are, and join everything together."""
        rank, num_ranks = share_of(self.model, self.layers)
        self._installation.drop_placeholders()
        num_experts = self.layers[0].num_experts // num_ranks
        runtimes = []
        for device, indices in self._layers_by_device().items():
            layers = [self.layers[index] for index in indices]
            supply = self._supply(indices, rank * num_experts, num_experts)
            dense = dense_bytes(self.model, [], device)
            plan = make_plan(self.model, layers, self._codecs, self.settings, device, dense, num_experts)
            base = self._early.base if self._early else None
            codec = self._codecs[plan.tiers]
            runtime = DeviceRuntime(self.model, plan, codec, self.settings, device, supply, base)
            self._installation.connect(runtime, layers)
            runtimes.append((runtime, indices))
        self._installation.source = self._source
        self._installation.attach(Runtime(self.model, runtimes), quantizer, save)

    def _supply(self, indices: list[int], first_expert: int, num_experts: int) -> ExpertLoader:
        if self._source is not None:
            moments = self._moments and self._moments.select(indices, first_expert, num_experts)
            return QuantizingLoader(self._source.select(indices, first_expert, num_experts), moments)
        assert self._reader is not None, "experts are packed or they are not"
        assert self._stored_codec is not None, "likewise"
        reader = self._reader.select(indices, first_expert, num_experts)
        return PackedLoader(reader, self._stored_codec, self._early)

    @torch.inference_mode(False)  # likewise
    def _read_early(self, device_map: Any) -> PrefetchedBase | None:
        """Begin to read the base while Transformers loads the dense weights, if it can be read to where it stays."""
        whole = isinstance(device_map, dict) and set(map(str, device_map.values())) == {"cpu"}
        if self._reader is None or self._stored_codec is None or not whole or self._is_distributed:
            return None
        same_base = all(ladder[0] == self._stored_codec.tiers[0] for ladder in self._codecs)
        return PrefetchedBase(self._reader) if same_base else None

    def _packed_shape(self, codec: ExpertCodec) -> PackedShape:
        return packed_shape(codec, tuple(layer.name for layer in self.layers), self.layers[0].num_experts)

    def _check_budget(self, device_map: Any) -> None:
        """Refuse a budget that cannot hold before the dense weights are read, where one device gets them all."""
        devices = set(device_map.values()) if isinstance(device_map, dict) else set()
        if len(devices) != 1 or self.settings.dense is not None or isinstance(self.settings.hbm_budget, str):
            return
        dense = dense_bytes(self.model, self.layers)
        device = torch.device("cpu")  # any will do: the budget is given
        make_plan(self.model, self.layers, self._codecs, self.settings, device, dense, self.layers[0].num_experts)

    def _placeholders(self, device_map: Any) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters that show an automatic device map what a layer weighs, or ranks what there is to share."""
        if self._is_distributed:
            return {layer.name: layer.parameters for layer in self.layers}
        if not isinstance(device_map, str):
            return {}
        base = next(iter(self._codecs.values())).base.nbytes
        return {
            layer.name: {"down_proj": nn.Parameter(_meta(layer.num_experts, base), requires_grad=False)}
            for layer in self.layers
        }

    def _layers_by_device(self) -> dict[torch.device, list[int]]:
        found: dict[torch.device, list[int]] = {}
        for index, layer in enumerate(self.layers):
            found.setdefault(_device_of(self.model, layer), []).append(index)
        return found

    @property
    def _is_distributed(self) -> bool:
        return getattr(self.model.config, "distributed_config", None) is not None


def _device_of(model: nn.Module, layer: SparseLayer) -> torch.device:
    """The device that a layer computes on: where its router, or whatever else its block holds, has its weights."""
    path = layer.name.rpartition(".")[0]
    tensors = [*model.get_submodule(path).parameters(), *model.get_submodule(path).buffers()]
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    if device.type == "meta":
        raise UnsupportedModelError(
            f"{path} is offloaded, and experts stay on a device; give a device_map without 'cpu' or 'disk' beside "
            "accelerators, or a smaller hbm_budget"
        )
    return device


def _keys_of(model: Any, layers: Sequence[SparseLayer]) -> str:
    """A pattern of the keys that belong to experts, with or without the prefix of the base model."""
    prefix = f"{model.base_model_prefix}."
    names = "|".join(re.escape(layer.name.removeprefix(prefix)) for layer in layers)
    return rf"(?:^|\.)(?:{names})\."


def _meta(rows: int, columns: int) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=torch.uint8, device="meta")
