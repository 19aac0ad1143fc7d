"""How large a model is, from its configuration and index alone: experts, dense weights, cache. No weights are read."""

import json
from pathlib import Path
from typing import Any

from dynaexq.errors import CheckpointError
from dynaexq.hf.checkpoint_source import INDEX
from dynaexq.hf.config import METHOD, DynaExqConfig
from dynaexq.hf.discovery import SparseLayer, find_sparse_layers
from dynaexq.hf.meta_model import build_meta_model, quantization_method, read_config
from dynaexq.hf.planning import context_bytes, dense_bytes, make_codec, tier_choices
from dynaexq.memory import DeviceMemory
from dynaexq.planning.budget import TIER_CHOICES
from dynaexq.planning.estimate import Ladder, ModelSize
from dynaexq.quantization import offered
from dynaexq.settings import Settings


def model_size(source: Path, config: DynaExqConfig) -> ModelSize:
    """The sizes of the model at `source`: a checkpoint directory, a config.json, or a repository on the Hub.

    Args:
        config: its `max_context` and `max_batch` say what the cache must hold.

    Raises:
        SettingsError: an option has a value it cannot take.
        CheckpointError: there is no configuration, or the weights are quantised by somebody else.
        UnsupportedModelError: the model has no experts that dynaexq could take over.
    """
    model_config = read_config(source)
    stored, settings = _stored(source, model_config, config)
    model = build_meta_model(model_config)
    layers = find_sparse_layers(model, on_meta=True)
    first, num_layers = layers[0], len(layers)
    context = context_bytes(model, layers, settings.max_context, settings.max_batch)
    eligible = tier_choices(settings, stored)
    return ModelSize(
        name=type(model).__name__ if source.is_file() else source.resolve().name,
        dtype=str(first.dtype).removeprefix("torch."),
        num_layers=num_layers,
        num_experts=first.num_experts,
        experts=sum(parameter.nbytes for layer in layers for parameter in layer.parameters.values()),
        num_weights=num_layers * first.num_experts * first.shape().num_weights,
        dense=dense_bytes(model, layers),
        workspace=DeviceMemory.workspace_bytes(num_layers, first.num_experts),
        cache=context.cache,
        activations=context.activations,
        ladders=_tiers(first, offered(stored) if stored else TIER_CHOICES, settings),
        eligible=_tiers(first, eligible, settings),
        quantizer=settings.quantizer,
        packed=stored is not None,
        index=_indexed(source),
    )


def _stored(source: Path, model_config: Any, config: DynaExqConfig) -> tuple[tuple[str, ...] | None, Settings]:
    """The ladder of a packed checkpoint, None for 16-bit weights; and the options, those kept with it among them."""
    method = quantization_method(model_config)
    if method is None:
        return None, config.settings()
    if method != METHOD:
        raise CheckpointError(
            f"{source} is quantised already (quant_method={method!r}), and its packing cannot be taken over exactly; "
            "give the 16-bit checkpoint it was made from, or its config.json"
        )
    kept = DynaExqConfig.from_dict(model_config.quantization_config)
    for name, value in config.get_loading_attributes().items():
        setattr(kept, name, value)
    settings = kept.settings(stored=True)
    if settings.dense is not None:
        raise CheckpointError(
            f"the dense weights of {source} are kept with dense={settings.dense!r}, whose bytes no configuration "
            "tells; load it and see runtime.memory()"
        )
    return kept.stored_tiers(), settings


def _tiers(layer: SparseLayer, ladders: tuple[tuple[str, ...], ...], settings: Settings) -> tuple[Ladder, ...]:
    codecs = [make_codec(layer, ladder, settings) for ladder in ladders]
    return tuple((codec.base, codec.upgrade) for codec in codecs)


def _indexed(source: Path) -> int | None:
    """Bytes of all weights as the index beside the configuration has them."""
    directory = source.parent if source.is_file() else source
    try:
        return int(json.loads((directory / INDEX).read_text())["metadata"]["total_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
