"""A model on its way from a checkpoint: experts hidden from Transformers' loader, then read into their places.

Before the weights are loaded the experts lose their (meta) parameters, so that the loader knows nothing of them; what
cannot work is refused then, before a byte is read. After the dense weights are there, each device gets its experts.
An `ExpertCheckpoint` hides whether they are 16-bit or packed.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dynaexq.checkpoint import MARK, PackedReader
from dynaexq.errors import SettingsError, UnsupportedModelError
from dynaexq.hf.calibration import calibration_for
from dynaexq.hf.checkpoint_source import CheckpointSource, open_shards, stored_names
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.discovery import SparseLayer, find_sparse_layers
from dynaexq.hf.distributed import check_distribution, edit_tensor_plan, share_of, sizes_of
from dynaexq.hf.kv_cache_size import Context
from dynaexq.hf.model_patch import ModelPatch
from dynaexq.hf.planning import (
    context_for,
    dense_bytes,
    held_bytes,
    inspect_model,
    make_codec,
    plan,
    plan_together,
)
from dynaexq.hf.warm_up import warm_up
from dynaexq.runtime.device_runtime import DeviceRuntime
from dynaexq.runtime.runtime import Runtime
from dynaexq.settings import Settings
from dynaexq.weights.packed_experts import PackedCheckpoint, packed_shape
from dynaexq.weights.quantize_experts import SixteenBitCheckpoint
from dynaexq.weights.sources import ExpertCheckpoint

GUARD = "dynaexq_must_be_imported"
"""A key in packed checkpoints that tells a loader without dynaexq what is missing; see `save`."""


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
        self._stored, self._stored_dtype = config.stored_tiers(), config.stored_dtype()
        self._check_tiers_and_budget(device_map)
        self._experts = self._open(files)
        self._prefetch(device_map)
        self._patch = ModelPatch(model, self.layers)
        self._patch.replace_modules(self._placeholders(device_map))
        for layer in self.layers:
            layer.experts._is_hf_initialized = True  # there is nothing that Transformers could initialize
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {_keys_of(model, self.layers), re.escape(MARK), GUARD}

    def device_map_is_known(self) -> None:
        """Drop the placeholders that gave every layer its size, unless ranks are still to share them out."""
        if not self._is_distributed:
            self._patch.drop_placeholders()

    def edit_tensor_plan(self, plan: dict[str, str]) -> None:
        """Keep experts whole under tensor parallelism; see `distributed`."""
        if self._is_distributed:
            edit_tensor_plan(plan, self.layers)

    @torch.inference_mode(False)  # what is allocated here outlives the caller's inference mode
    def finish(self, quantizer: Any, answers: Any) -> None:
        """Load the experts onto the devices of their layers, and attach the runtime to the model."""
        rank, num_ranks = share_of(self.model, self.layers)
        self._patch.drop_placeholders()
        num_experts = self.layers[0].num_experts // num_ranks
        rows, context = self._layers_by_device(), context_for(self.model, self.settings)
        specs = {
            device: inspect_model(
                self.model,
                [self.layers[row] for row in rows[device]],
                self.settings,
                stored=self._stored,
                dense=dense_bytes(self.model, [], device),
                num_experts=num_experts,
                context=context,
            )
            for device in rows
        }
        held = {device: held_bytes(self.model, device) for device in rows}
        parts = []
        for device, planned in plan_together(specs, self.settings, held).items():
            layers = [self.layers[row] for row in rows[device]]
            codec = make_codec(layers[0], planned.tiers, self.settings, device=device)
            loader = self._experts.loader(rows[device], rank * num_experts, num_experts)
            part = DeviceRuntime(self.model, planned, codec, self.settings, device, loader, self._experts.base)
            self._patch.connect(part, layers)
            parts.append((part, rows[device]))
        warm_up(self.model)
        self._patch.source = self._experts.source
        self._patch.attach(Runtime(self.model, parts), quantizer, answers)

    def _open(self, files: Sequence[str] | None) -> ExpertCheckpoint:
        """The experts in `files`, checked against the model."""
        if self._stored is None:
            source = CheckpointSource(self.model, self.layers, open_shards(files))
            return SixteenBitCheckpoint(source, calibration_for(self.settings, self.layers))
        if self.settings.calibration is not None:
            raise SettingsError(
                f"calibration={self.settings.calibration!r} was given, and the checkpoint is packed: its codes are "
                "fixed; leave it out, or quantize the 16-bit source again"
            )
        codec = make_codec(self.layers[0], self._stored, self.settings, self._stored_dtype)
        shards = open_shards(files)
        names = stored_names(self.model, self.layers, shards)
        return PackedCheckpoint(PackedReader(shards, packed_shape(codec, names, self.layers[0].num_experts)), codec)

    def _check_tiers_and_budget(self, device_map: Any) -> None:
        """Refuse a budget that cannot hold before the dense weights are read, where one device gets them all."""
        self._spec = inspect_model(self.model, self.layers, self.settings, stored=self._stored, context=Context(0, 0))
        devices = set(device_map.values()) if isinstance(device_map, dict) else set()
        if len(devices) == 1 and isinstance(self.settings.hbm_budget, int) and self.settings.dense is None:
            tp_size, ep_size = sizes_of(self.model.config)
            # Dense weights that a rank has whole are found out later; no rank needs less than this.
            share = replace(
                self._spec, num_experts=self._spec.num_experts // ep_size, dense=self._spec.dense // tp_size
            )
            plan(share, self.settings, torch.device("cpu"))  # any device will do: the budget is given

    @torch.inference_mode(False)  # as above
    def _prefetch(self, device_map: Any) -> None:
        """Begin to read the base while Transformers loads the dense weights, if it can be read to where it stays."""
        whole = isinstance(device_map, dict) and set(map(str, device_map.values())) == {"cpu"}
        bases = {base.precision for base, _ in self._spec.choices}
        is_as_stored = self._stored_dtype in (None, self.layers[0].dtype)
        if self._stored and is_as_stored and whole and not self._is_distributed and bases == {self._stored[0]}:
            self._experts.prefetch()

    def _placeholders(self, device_map: Any) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters that show an automatic device map what a layer weighs, or ranks what there is to share."""
        if self._is_distributed:
            return {layer.name: layer.parameters for layer in self.layers}
        if not isinstance(device_map, str):
            return {}
        base, _ = self._spec.choices[0]
        return {
            layer.name: {"down_proj": nn.Parameter(_meta(layer.num_experts, base.nbytes), requires_grad=False)}
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
    """The device of a layer: where the router, or another module of its block, has its weights."""
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
