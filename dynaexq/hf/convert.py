"""From a 16-bit checkpoint directory to a packed one, experts a few at a time, dense weights as they are.

No model is loaded: its configuration, on the meta device, says where the experts are. What was done is kept beside the
target until it is complete, so an interrupted conversion goes on where it stopped.
"""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_NAME

from dynaexq.checkpoint import INDEX, PackedWriter, ShardWriter, link_or_copy, replaced, write_index
from dynaexq.errors import CheckpointError, SettingsError
from dynaexq.hf.calibration import calibration_for
from dynaexq.hf.checkpoint_source import (
    CheckpointSource,
    TensorFile,
    checkpoint_files,
    of_variant,
    open_shards,
    parameter_names,
)
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.dense import dense_codecs
from dynaexq.hf.discovery import SparseLayer, find_sparse_layers
from dynaexq.hf.hub import checkpoint_directory
from dynaexq.hf.meta_model import meta_model, quantization_of
from dynaexq.hf.packed_dense import packed_weight
from dynaexq.hf.planning import inspect_model, make_codec, plan, resolve_device, with_dense_chosen
from dynaexq.hf.quantized_source import PACKINGS, open_checkpoint
from dynaexq.hf.save import SHARD_METADATA, packed_config, refuse_foreign_weights, write_guard
from dynaexq.quantization import ExpertCodec, LinearCodec
from dynaexq.settings import Settings, parse_bytes
from dynaexq.weights.calibration import Calibration
from dynaexq.weights.packed_experts import packed_shape
from dynaexq.weights.quantize_experts import encode_all

MODEL_WEIGHTS = re.compile(
    r"(model|pytorch_model|consolidated|tf_model|flax_model)\b.*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack)(\.index\.json)?$"
    r"|.*\.gguf$"
)
"""Names of files with the weights of a model, in any format, and of their indexes."""

COPIED_AT_ONCE = 2**26  # bytes of a dense tensor


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    config: DynaExqConfig,
    max_shard_size: int | str = "5GB",
    *,
    revision: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
) -> Path:
    """Write the packed checkpoint of `source` to `target`; it appears there complete, or not at all.

    Args:
        source: a directory with config.json and safetensors shards in 16 (or 32) bit, or quantized by one of the
            methods in `quantized_source.PACKINGS`: those are dequantized as they are read. Or the name of such a
            repository on the Hub.
        config: `tiers`, or an `hbm_budget` to choose them by, must be named.
        max_shard_size: bytes of a shard, as in Transformers.
        revision, subfolder, variant: as in `from_pretrained`.

    Returns:
        The target directory.

    Raises:
        SettingsError: neither tiers nor a budget.
        CheckpointError: the source is incomplete, damaged or quantized by another method, or the target
            cannot be written.
        QuantizationError: an expert holds NaN, infinity, or a weight beyond 32768.
    """
    target, settings = Path(target), config.settings()
    refuse_foreign_weights(target)
    source = checkpoint_directory(source, revision, subfolder)
    model = meta_model(source, PACKINGS)
    layers = find_sparse_layers(model, on_meta=True)
    shards = open_checkpoint(source, model.config, variant)
    experts = CheckpointSource(model, layers, shards)
    if settings.dense == "auto" and isinstance(settings.hbm_budget, str):
        raise SettingsError(
            'dense="auto" is chosen for a budget: give hbm_budget, or dense="int8", "int6", "int4" or None'
        )
    settings = with_dense_chosen(settings, model, layers, torch.device("cpu"))
    codec = _choose_codec(model, layers, settings)
    budget = None if isinstance(settings.hbm_budget, str) else settings.hbm_budget
    calibration = calibration_for(settings, layers)
    dense = _DenseLayers(model, dense_codecs(model, layers, settings), shards, resolve_device(settings), calibration)
    made_from = quantization_of(model.config).get("quant_method")
    stored = packed_config(config, codec, budget, settings.dense, settings.head, made_from)
    shape = packed_shape(codec, tuple(layer.name for layer in layers), experts.num_experts)
    keys = experts.keys
    others = sum(entry.nbytes for shard in shards for key, entry in shard.entries.items() if key not in keys)
    with replaced(target, _fingerprint(shards, stored, calibration), shape.nbytes + others) as staging:
        writer = PackedWriter(staging, shape, parse_bytes(max_shard_size, "max_shard_size"), SHARD_METADATA)
        try:
            device = resolve_device(settings)
            for layer, first, encoded in encode_all(experts, codec, device, writer.first_layer, calibration):
                writer.write(layer, first, encoded.base, encoded.upgrade, encoded.errors)
            files = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        files |= _copy_dense(shards, keys | dense.keys, staging) | dense.write(staging)
        write_index(staging, files | write_guard(staging, layers))
        _copy_others(source, staging, stored)
    return target


def annotate_checkpoint(
    source: str | Path,
    target: str | Path,
    config: DynaExqConfig,
    *,
    revision: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
) -> Path:
    """Link the 16-bit checkpoint `source` into `target`, with a configuration that has it quantized when it is loaded.

    Without dynaexq it loads as the 16-bit model it is. Arguments and errors are those of `quantize_checkpoint`.
    """
    target = Path(target)
    refuse_foreign_weights(target)
    source = checkpoint_directory(source, revision, subfolder)
    files = checkpoint_files(source, variant)
    model = meta_model(source)
    CheckpointSource(model, find_sparse_layers(model, on_meta=True), open_shards(files)).close()
    with replaced(target) as staging:
        if files == [source / of_variant(SAFE_WEIGHTS_NAME, variant)]:
            link_or_copy(files[0], staging / SAFE_WEIGHTS_NAME)
        else:
            for file in files:
                link_or_copy(file, staging / file.name)
            shutil.copyfile(source / of_variant(INDEX, variant), staging / INDEX)
        _copy_others(source, staging, config)
    return target


def _choose_codec(model: Any, layers: list[SparseLayer], settings: Settings) -> ExpertCodec:
    if isinstance(settings.hbm_budget, str) and isinstance(settings.tiers, str):
        raise SettingsError(
            'a checkpoint is packed at one pair of tiers: give tiers, such as ("int4", "int8"), or hbm_budget'
        )
    tiers = settings.tiers
    if isinstance(tiers, str):
        tiers = plan(inspect_model(model, layers, settings), settings, torch.device("cpu")).tiers
    return make_codec(layers[0], tiers, settings)


def _fingerprint(shards: Iterable[TensorFile], config: DynaExqConfig, calibration: Calibration | None) -> str:
    """What a conversion depends on: the source's files as they are now, and how they are packed."""
    known = calibration and calibration.fingerprint
    files = [(shard.path.name, shard.path.stat().st_size, shard.path.stat().st_mtime_ns) for shard in shards]
    return json.dumps({"files": files, "packed": config.packed, "calibration": known}, sort_keys=True)


def _copy_dense(shards: Sequence[TensorFile], experts: set[str], staging: Path) -> dict[str, str]:
    """Copy all tensors that are no experts, shard by shard; returns the file of each."""
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        entries = {key: entry for key, entry in shard.entries.items() if key not in experts}
        if not entries:
            continue
        name = f"model-dense-{number:05d}-of-{len(shards):05d}.safetensors"
        writer = ShardWriter(
            staging / name, {key: (entry.dtype, entry.shape) for key, entry in entries.items()}, SHARD_METADATA
        )
        try:
            for key, entry in entries.items():
                step = max(1, COPIED_AT_ONCE // max(1, entry.row_nbytes))
                for first in range(0, entry.shape[0] if entry.shape else 1, step):
                    writer.write(key, first, shard.read(key, first, first + step) if entry.shape else shard.read(key))
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        files |= dict.fromkeys(entries, name)
    return files


class _DenseLayers:
    """The dense layers that are packed, and the tensors in the shards that they are made of.

    Args:
        codecs: by path; without any, nothing is packed.
        calibration: what is known of their inputs.
    """

    def __init__(
        self,
        model: Any,
        codecs: dict[str, LinearCodec],
        shards: Sequence[TensorFile],
        device: torch.device,
        calibration: Calibration | None,
    ):
        self._codecs, self._device, self._calibration = codecs, device, calibration
        places = {key: shard for shard in shards for key in shard.entries} if codecs else {}
        found = {name: (places[key], key) for key, name in parameter_names(model, places).items()}
        tied = getattr(model, "all_tied_weights_keys", {})
        self._sources: dict[str, tuple[TensorFile, str]] = {}
        for path in codecs:
            weight = f"{path}.weight"
            source = found.get(weight) or found.get(tied.get(weight, ""))
            if source is None:
                raise CheckpointError(f"the checkpoint has no tensor that is {weight}; leave dense out")
            self._sources[path] = source
        # What a head shares with the embedding stays there for that.
        self.keys = {found[f"{path}.weight"][1] for path in codecs if f"{path}.weight" in found}

    def write(self, staging: Path) -> dict[str, str]:
        """Write them, one after the other; returns the file of each."""
        if not self._codecs:
            return {}
        name = "model-packed-dense.safetensors"
        tensors = {f"{path}.packed": (torch.uint8, (codec.nbytes,)) for path, codec in self._codecs.items()}
        writer = ShardWriter(staging / name, tensors, SHARD_METADATA)
        try:
            for path, codec in tqdm(self._codecs.items(), desc="packing dense layers", unit="layer", disable=None):
                shard, key = self._sources[path]
                weight = shard.read(key).to(self._device, codec.dtype)
                writer.write(f"{path}.packed", 0, packed_weight(path, weight, codec, self._calibration))
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        return dict.fromkeys(tensors, name)


def _copy_others(source: Path, staging: Path, config: DynaExqConfig) -> None:
    """Everything but the model's weights in any format, and the configuration with `config` in it."""
    for file in sorted(source.rglob("*")):
        place = staging / file.relative_to(source)
        is_hidden = any(part.startswith(".") for part in file.relative_to(source).parts[:-1])
        if file.is_file() and not is_hidden and not MODEL_WEIGHTS.match(file.name):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    content = json.loads((source / "config.json").read_text()) | {"quantization_config": config.to_dict()}
    (staging / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
