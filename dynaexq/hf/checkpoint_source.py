"""The 16-bit experts of a checkpoint, read from its shards a few at a time, through Transformers' own converters.

A checkpoint stores experts one by one or stacked, as gate and up or fused, transposed or not, under names of its own;
the `WeightConverter`s that Transformers loads it with know all that. Every operation of theirs keeps the experts'
dimension first, so a few experts are converted as well as all of them.
"""

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from dynaexq.checkpoint import INDEX, MARK, Entry, Shard, read_index
from dynaexq.errors import CheckpointError
from dynaexq.hf.discovery import FLOAT_DTYPES, SparseLayer
from dynaexq.quantization import ExpertWeights
from dynaexq.weights.fingerprints import Fingerprints

_NO_PICKLES = "pickles are never opened: convert the checkpoint with safetensors"


class TensorFile(Protocol):
    """A file of tensors to read rows from: a `Shard`, or what stands for one."""

    @property
    def path(self) -> Path: ...

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    @property
    def close(self) -> Callable[[], object]: ...

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor: ...


def checkpoint_files(source: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint directory that Transformers reads: a single one, or those of the index.

    Args:
        variant: "fp16" for `model.fp16.safetensors`, as in `from_pretrained`.

    Raises:
        CheckpointError: there are none, the index cannot be read, or it points out of the directory.
    """
    single, index = (of_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, INDEX))
    if (source / single).exists():
        return [source / single]
    if not (source / index).exists():
        others = sorted(file.name for file in source.glob("*.safetensors*"))
        raise CheckpointError(
            f"expected {single} or {index} in {source}, found neither; "
            + (f"it has {', '.join(others[:3])}: name the variant, or leave it out" if others else _NO_PICKLES)
        )
    return [source / name for name in sorted(set(read_index(source, index).values()))]


def of_variant(name: str, variant: str | None) -> str:
    """The name that a file has in a checkpoint's `variant`."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def open_shards(files: Sequence[str | Path] | None) -> list[Shard]:
    """The shards of a checkpoint, open for reading.

    Raises:
        CheckpointError: one is missing, truncated or not safetensors; or there are none.
    """
    if not files:
        raise CheckpointError("expected a checkpoint with safetensors shards to read the experts from, found none")
    for file in files:
        if Path(file).parent != Path(files[0]).parent:
            raise CheckpointError(f"the index names {file}, which lies outside its directory; do not trust it")
    shards: list[Shard] = []
    try:
        shards.extend(map(Shard, files))
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return shards


def stored_names(model: Any, layers: Sequence[SparseLayer], shards: Sequence[Shard]) -> tuple[str, ...]:
    """What the packed experts of each layer are called in a checkpoint that another class may have saved.

    A base model, a causal model and the text model of a vision model call the same layer by different paths.
    Transformers renames keys from one to the other; a layer that it does not find keeps its own name.
    """
    packed = {key.partition(MARK)[0] for shard in shards for key in shard.entries if MARK in key}
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    names, found = model.state_dict(), {}
    for stored in packed:
        name, _ = rename_source_key(f"{stored}.down_proj", renamings, [], model.base_model_prefix, names)
        found[name.removesuffix(".down_proj")] = stored
    return tuple(layer.name if layer.name in packed else found.get(layer.name, layer.name) for layer in layers)


def parameter_names(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """The parameters of `model` that tensors of a checkpoint are, as they are, by key.

    What is made of several tensors, or of a part of one, is not among them.
    """
    names = model.state_dict()
    return {key: name for key, name, pattern, _ in _renamed(model, keys) if pattern is None and name in names}


def _renamed(model: Any, keys: Iterable[str]) -> Iterator[tuple[str, str, str | None, WeightConverter | None]]:
    """Each key of a checkpoint, what it is of in `model`, and the pattern and the converter that it goes through."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names = model.state_dict()
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:
            name, pattern = key, None
        yield key, name, pattern, converter_of.get(pattern)


class _Skeleton:
    """What converters see of the model: the parameters of `num_experts` experts, with shapes and no bytes.

    Some compare a tensor with the whole parameter that it is for, which is not in the model any more, and of which
    only a few experts are converted at once.
    """

    def __init__(self, model: Any, parameters: dict[str, Tensor], num_experts: int):
        self._model, self._parameters, self._num_experts = model, parameters, num_experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        """One of the parameters, on the meta device; one that is no expert's is the model's own."""
        known = self._parameters.get(name)
        if known is None:
            return cast(Tensor, self._model.get_parameter(name))
        return known.new_empty(self._num_experts, *known.shape[1:])


class _Recipe:
    """How one parameter of a layer's experts is made of tensors in the shards."""

    def __init__(self, name: str, parameter: nn.Parameter, converter: WeightConverter | None):
        self.name, self.shape, self.dtype = name, tuple(parameter.shape), parameter.dtype
        self.skeleton = parameter.detach().to("meta")
        self.converter = converter
        self.tensors: dict[str, list[tuple[TensorFile, str]]] = defaultdict(list)

    def check(self, model: _Skeleton, config: Any) -> None:
        """Raise a CheckpointError unless the tensors are there and have the shapes that the model asks for."""
        if not self.tensors:
            raise CheckpointError(f"the checkpoint has no tensor for {self.name}; is a shard missing?")
        for sources in self.tensors.values():
            shapes = {shard.entries[key].shape for shard, key in sources}
            if len(shapes) > 1 or not self._is_complete(sources):
                raise CheckpointError(
                    f"expected {self.shape[0]} experts of one shape for {self.name}, found {len(sources)} tensors of "
                    f"{sorted(str(list(shape)) for shape in shapes)}; the checkpoint is incomplete or damaged"
                )
            quantized = ((key, shard.entries[key].dtype) for shard, key in sources)
            key, dtype = next((found for found in quantized if found[1] not in FLOAT_DTYPES), ("", None))
            if dtype is not None:
                raise CheckpointError(
                    f"the experts of this checkpoint are quantized already ({key} is {dtype}), and their "
                    "packing cannot be taken over exactly; give the 16-bit checkpoint they were made from"
                )
        wanted = (1, *self.shape[1:])
        try:
            found = tuple(self._convert(self._entries(0, 1, on_meta=True), model, config).shape)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{self.name} cannot be made of the tensors in the checkpoint: {error}") from error
        if found != wanted:
            raise CheckpointError(
                f"expected experts of shape {list(wanted[1:])} for {self.name} from config.json, the checkpoint gives "
                f"{list(found[1:])}; the configuration and the weights do not belong together"
            )

    def read(self, first: int, last: int, model: _Skeleton, config: Any) -> Tensor:
        """Experts `first` to `last` (exclusive), in the dtype of the parameter."""
        return self._convert(self._entries(first, last), model, config)

    @property
    def files(self) -> str:
        """The shards that it is read from, for error messages."""
        return ", ".join(sorted({str(shard.path) for sources in self.tensors.values() for shard, _ in sources}))

    def _is_complete(self, sources: list[tuple[TensorFile, str]]) -> bool:
        shard, key = sources[0]
        if self._is_stacked(sources):
            return shard.entries[key].shape[0] == self.shape[0]
        return len(sources) == self.shape[0]

    def _is_stacked(self, sources: list[tuple[TensorFile, str]]) -> bool:
        """Whether one tensor holds all experts; else there is one per expert."""
        shard, key = sources[0]
        return len(sources) == 1 and len(shard.entries[key].shape) == len(self.shape)

    def _entries(self, first: int, last: int, on_meta: bool = False) -> dict[str, list[Tensor]]:
        entries = {}
        for pattern, sources in self.tensors.items():
            rows = (first, last) if self._is_stacked(sources) else (0, None)
            wanted = sources if self._is_stacked(sources) else sources[first:last]
            if on_meta:
                entries[pattern] = [_shape_only(shard.entries[key], *rows) for shard, key in wanted]
            else:
                entries[pattern] = [shard.read(key, *rows).to(self.dtype) for shard, key in wanted]
        return entries

    def _convert(self, entries: dict[str, list[Tensor]], model: _Skeleton, config: Any) -> Tensor:
        if self.converter is None:
            (tensors,) = entries.values()
            return tensors[0] if tensors[0].ndim == len(self.shape) else torch.stack(tensors)
        converter = copy.deepcopy(self.converter)
        for pattern, tensors in entries.items():
            converter.collected_tensors[pattern] = list(tensors)
        converted = next(iter(converter.convert(self.name, model=model, config=config).values()))
        return converted[0] if isinstance(converted, list) else converted


class CheckpointSource:
    """The experts of `layers` in a checkpoint; see `sources.ExpertSource`.

    Args:
        model: on the meta device, its experts' parameters still in place.

    Raises:
        CheckpointError: tensors are missing, or their shapes are not those that the model asks for.
    """

    host_nbytes = 0
    is_lasting = True

    def __init__(self, model: Any, layers: Sequence[SparseLayer], shards: Sequence[TensorFile]):
        self.num_layers, self.num_experts = len(layers), layers[0].num_experts
        self.first_expert = 0
        self._fingerprints = Fingerprints()
        self._model = weakref.ref(model)  # which holds the runtime that may hold this
        self._config, self._shards = model.config, shards
        self._layers = [
            (
                layer.name,
                [_Recipe(f"{layer.name}.{name}", layer.parameters[name], None) for name in layer.parameter_names],
            )
            for layer in layers
        ]
        self._find_tensors(model)
        for _, recipes in self._layers:
            for recipe in recipes:
                recipe.check(self._skeleton(recipes, 1), model.config)

    @property
    def keys(self) -> set[str]:
        """The keys of all tensors in the shards that experts are made of."""
        return {
            key
            for _, recipes in self._layers
            for recipe in recipes
            for sources in recipe.tensors.values()
            for _, key in sources
        }

    def name(self, layer: int) -> str:
        return self._layers[layer][0]

    def read(self, layer: int, first: int, last: int) -> ExpertWeights:
        """See `sources.ExpertSource`; a CheckpointError if they are not what was read before."""
        _, recipes = self._layers[layer]
        model = self._skeleton(recipes, last - first)
        first, last = self.first_expert + first, self.first_expert + last
        weights = ExpertWeights(*(recipe.read(first, last, model, self._config) for recipe in recipes))
        self._fingerprints.check(self.name(layer), first, weights, recipes[0].files)
        return weights

    def select(self, layers: Sequence[int], first_expert: int, num_experts: int) -> "CheckpointSource":
        """The same source for some of the layers and a run of their experts only, both counted from 0 there."""
        part = copy.copy(self)
        part._layers = [self._layers[index] for index in layers]
        part.num_layers, part.first_expert, part.num_experts = len(layers), first_expert, num_experts
        return part

    def close(self) -> None:
        for shard in self._shards:
            shard.close()

    def _skeleton(self, recipes: list[_Recipe], num_experts: int) -> _Skeleton:
        return _Skeleton(self._model(), {recipe.name: recipe.skeleton for recipe in recipes}, num_experts)

    def _find_tensors(self, model: Any) -> None:
        recipes = {recipe.name: recipe for _, layer in self._layers for recipe in layer}
        places = sorted(
            ((key, shard) for shard in self._shards for key in shard.entries),
            key=lambda place: dot_natural_key(place[0]),
        )
        renamed = _renamed(model, (key for key, _ in places))
        for (_, shard), (key, name, pattern, converter) in zip(places, renamed, strict=True):
            if name in recipes:
                recipe = recipes[name]
                recipe.tensors[pattern or key].append((shard, key))
                recipe.converter = converter


def _shape_only(entry: Entry, first: int, last: int | None) -> Tensor:
    """The shape and dtype that those rows have, on the meta device."""
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")[first:last]
