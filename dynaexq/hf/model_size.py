"""`inspect_checkpoint`: what planning must know of a model, from its configuration and index. No weights are read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynaexq.checkpoint import INDEX, QUANT_METHOD
from dynaexq.hf.compat import experts_per_token
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.dense import gathered_bytes
from dynaexq.hf.discovery import SparseLayer, find_sparse_layers
from dynaexq.hf.kv_cache_size import context_bytes
from dynaexq.hf.meta_model import build_meta_model, quantization_of, read_config, refuse_quantized
from dynaexq.hf.planning import inspect_model
from dynaexq.hf.quantized_source import PACKINGS
from dynaexq.planning.budget import ModelSpec
from dynaexq.settings import Settings


class InspectedCheckpoint:
    """A model on the meta device, built once, of which specs for several options can be had.

    Args:
        source: a checkpoint directory, a config.json, or a repository on the Hub.

    Raises:
        CheckpointError: there is no configuration, or the weights are quantized by another method.
        UnsupportedModelError: the model has no experts that dynaexq could take over.
    """

    def __init__(self, source: Path):
        self._source, self._config = source, read_config(source)
        self._kept = _kept_options(source, self._config)
        self._model = build_meta_model(self._config)
        self._layers: list[SparseLayer] = find_sparse_layers(self._model, on_meta=True)

    def settings(self, config: DynaExqConfig) -> Settings:
        """The options of `config`, over those that the checkpoint keeps."""
        if self._kept is None:
            return config.settings()
        kept = self._kept.updated()
        for name, value in config.get_loading_attributes().items():
            setattr(kept, name, value)
        return kept.settings(stored=True)

    def spec(self, config: DynaExqConfig) -> ModelSpec:
        """What planning must know under the options of `config`; `max_context` and `max_batch` size the context.

        Raises:
            SettingsError: an option has a value it cannot take.
        """
        settings, stored = self.settings(config), self._kept.stored_tiers() if self._kept else None
        context = context_bytes(self._model, self._layers, settings.max_context, settings.max_batch)
        spec = inspect_model(self._model, self._layers, settings, stored=stored, context=context)
        name = type(self._model).__name__ if self._source.is_file() else self._source.resolve().name
        experts = experts_per_token(self._model) or 0
        gathered = gathered_bytes(self._model, settings)
        return replace(spec, name=name, index=self._indexed(), experts_per_token=experts, gathered=gathered)

    def _indexed(self) -> int | None:
        """Bytes of all weights as the index beside the configuration has them; None where those are not 16 bit."""
        directory = self._source.parent if self._source.is_file() else self._source
        if self._kept is None and quantization_of(self._config):
            return None
        try:
            return int(json.loads((directory / INDEX).read_text())["metadata"]["total_size"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def inspect_checkpoint(source: Path, config: DynaExqConfig) -> ModelSpec:
    """The spec of the model at `source`; raises as `InspectedCheckpoint` and its `spec` do."""
    return InspectedCheckpoint(source).spec(config)


def _kept_options(source: Path, model_config: Any) -> DynaExqConfig | None:
    """The options kept with a packed or annotated checkpoint, None for 16-bit weights or what stands for them."""
    quantized = quantization_of(model_config)
    if quantized.get("quant_method") != QUANT_METHOD:
        refuse_quantized(source, quantized.get("quant_method"), PACKINGS)
        return None
    kept: DynaExqConfig = DynaExqConfig.from_dict(quantized)
    return kept
