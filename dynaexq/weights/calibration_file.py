"""What calibration gathered, in a safetensors file: of layer i of the experts

    rows.i            [T, H]          what was routed, in the dtype of the model
    top_k_index.i     int16   [T, k]
    top_k_weights.i   float32 [T, k]

and `dense.j`, float16 `[K, K]`, second moments of dense layers. The metadata name the layers, say which `dense.j`
belongs to which dense layer, and have a checksum of every tensor. Files of earlier versions have moments of the
experts' layers instead.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from dynaexq.checkpoint import Shard, read_tensors, write_tensors
from dynaexq.errors import CheckpointError
from dynaexq.safeguards.outside_files import parse_json
from dynaexq.types import ExpertShape
from dynaexq.weights.calibration import Activation, Calibration, CalibrationSample, DenseMoments, LayerMoments, Met

KIND, KIND_OF_MOMENTS = "dynaexq-calibration", "dynaexq-moments"


def write_calibration(path: Path, met: Mapping[str, Met], dense: Mapping[str, Tensor]) -> None:
    """Put what was gathered in the place of the file `path`. Raises CheckpointError.

    Args:
        met: by the path of the experts.
        dense: moments by path; what several layers share is written once.
    """
    parts = {f"{name}.{i}": part for i, layer in enumerate(met.values()) for name, part in layer._asdict().items()}
    shared = {id(tensor): tensor for tensor in dense.values()}
    names = {key: f"dense.{number}" for number, key in enumerate(shared)}
    parts |= {names[key]: tensor for key, tensor in shared.items()}
    places = {layer: names[id(tensor)] for layer, tensor in dense.items()}
    write_tensors(path, parts, {"kind": KIND, "layers": json.dumps(list(met)), "dense": json.dumps(places)})


def read_calibration(
    path: Path, layers: Sequence[str], num_experts: int, shape: ExpertShape, activations: Sequence[Activation]
) -> Calibration:
    """What a file says of a model.

    Args:
        layers: paths of the model's experts.
        activations: of each layer, as `ExpertLayer` has it.

    Raises:
        CheckpointError: there is no such file, it is damaged, or of another model.
    """
    if not path.is_file():
        raise CheckpointError(
            f"expected what calibration found in a file, there is no {path}; dynaexq.calibrate(model, path) writes it"
        )
    shard = Shard(path)
    shard.close()
    try:
        if shard.metadata["kind"] == KIND_OF_MOMENTS:
            return _moments(path, shard, layers, num_experts, shape)
        if shard.metadata["kind"] != KIND:
            raise ValueError("some other kind")
        return _sample(path, shard, layers, shape, activations)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"expected what dynaexq's calibration writes, {path} is something else") from error


def _sample(
    path: Path, shard: Shard, layers: Sequence[str], shape: ExpertShape, activations: Sequence[Activation]
) -> CalibrationSample:
    names = tuple(parse_json(shard.metadata["layers"]))
    _check_model(path, (names, shard.entries["rows.0"].shape[1]), (tuple(layers), shape.hidden_size))
    for i in range(len(names)):
        rows, index, weights = (shard.entries[f"{name}.{i}"].shape for name in Met._fields)
        if len(index) != 2 or weights != index or rows != (index[0], shape.hidden_size):
            raise ValueError("parts that do not belong together")
    fingerprint = json.dumps(shard.metadata, sort_keys=True)  # the checksums of all parts are among them
    read, dense = partial(_read_layer, path, names), _dense(path, shard)
    return CalibrationSample(names, dict(zip(layers, activations, strict=True)), read, dense, fingerprint)


def _read_layer(path: Path, names: tuple[str, ...], layer: str) -> Met:
    i = names.index(layer)
    parts, _ = read_tensors(path, [KIND], [f"{name}.{i}" for name in Met._fields])
    met = Met(*parts.values())
    if not met.rows.isfinite().all() or not met.top_k_weights.isfinite().all():
        raise _not_finite(path)
    return met


def _moments(path: Path, shard: Shard, layers: Sequence[str], num_experts: int, shape: ExpertShape) -> LayerMoments:
    parts, metadata = read_tensors(path, [KIND_OF_MOMENTS], ["up", "down", "tokens"])
    if [part.ndim for part in parts.values()] != [3, 5, 2]:
        raise ValueError("parts that do not belong together")
    if not all(part.isfinite().all() for part in parts.values()) or not (parts["tokens"] >= 0).all():
        raise _not_finite(path)
    names, (up, down, tokens) = tuple(parse_json(metadata["layers"])), parts.values()
    blocks = -(-shape.intermediate_size // down.shape[-1])
    found = [len(up), *tokens.shape, up.shape[1], up.shape[2], len(down), *down.shape[1:3]]
    size, count = shape.hidden_size, len(layers)
    expected = [count, count, num_experts, size, size, count, num_experts, blocks]
    _check_model(path, (names, found), (tuple(layers), expected))
    return LayerMoments(names, up, down, tokens, _dense(path, shard), json.dumps(metadata, sort_keys=True))


def _dense(path: Path, shard: Shard) -> DenseMoments:
    places = parse_json(shard.metadata.get("dense", "{}"))
    shared, _ = read_tensors(path, [KIND, KIND_OF_MOMENTS], set(places.values()))
    if any(part.ndim != 2 for part in shared.values()):
        raise ValueError("dense moments that are no matrices")
    if not all(part.isfinite().all() for part in shared.values()):
        raise _not_finite(path)
    return DenseMoments({str(layer): shared[name] for layer, name in places.items()})


def _check_model(path: Path, found: tuple[tuple[str, ...], object], expected: tuple[tuple[str, ...], object]) -> None:
    if found == expected:
        return
    (names, sizes), (layers, wanted) = found, expected
    raise CheckpointError(
        f"calibration={str(path)!r} belongs to another model: expected layers {layers[0]} to {layers[-1]} and sizes "
        f"{wanted}, found {names[0]} to {names[-1]} and {sizes}; calibrate this model"
    )


def _not_finite(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} holds figures that are not finite; the model it came from has overflown")
