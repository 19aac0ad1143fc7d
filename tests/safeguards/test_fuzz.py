"""Damage to anything that is read from outside comes out as dynaexq's own error, in linear time, or is no damage.

Every reader gets valid files with bytes flipped, cut out, doubled and overwritten, and headers whose values were
exchanged for others. The damage that was once found to do worse is kept below, in `CORPUS`.
"""

import contextlib
import io
import json
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynaexq.checkpoint import Shard, write_tensors
from dynaexq.errors import CheckpointError, DynaExqError, HotnessError, SettingsError, TraceError
from dynaexq.hf.checkpoint_source import INDEX, checkpoint_files, open_shards
from dynaexq.policy.kinds import WORD_BUCKETS, LearnedKinds
from dynaexq.runtime.hotness_snapshot import Snapshot, read_snapshot, write_snapshot
from dynaexq.settings import parse_bytes
from dynaexq.traces.trace_file import Trace, TraceHeader, TraceWindow, TraceWriter
from dynaexq.types import ExpertShape
from dynaexq.weights.calibration import CalibrationSample, Met
from dynaexq.weights.calibration_file import KIND_OF_MOMENTS, read_calibration, write_calibration

LAYERS, EXPERTS = ["a", "b"], 8
EVENLY_HOT = np.ones((len(LAYERS), EXPERTS))
KINDS_OF_TRAFFIC = LearnedKinds(EVENLY_HOT[None], np.ones(1), np.ones((1, WORD_BUCKETS)), np.zeros(1))
SECONDS = 5.0


def read_whole_shard(path: Path) -> None:
    shard = Shard(path)
    try:
        for name in shard.entries:
            shard.read(name)
    finally:
        shard.close()


def read_index(path: Path) -> None:
    for shard in open_shards(checkpoint_files(path.parent)):
        shard.close()


def write_trace(path: Path) -> None:
    header = TraceHeader(tuple(LAYERS), EXPERTS, 2, ("int4", "int8"), np.ones((2, EXPERTS, 2), np.float32))
    with TraceWriter(path, header) as writer:
        writer.mark("start")
        for step in range(5):
            mass = np.zeros((2, EXPERTS))
            mass[:, step] = 1.0
            writer.add(TraceWindow(mass, np.array([1, 1]), 1))


def write_index(path: Path) -> None:
    torch_shard(path.with_name("x.safetensors"))
    path.write_text(json.dumps({"metadata": {"total_size": 64}, "weight_map": {"w": "x.safetensors"}}))


def torch_shard(path: Path) -> None:
    write_tensors(path, {"w": torch.arange(16.0), "v": torch.ones(2, 3, dtype=torch.bfloat16)}, {"format": "pt"})


def write_moments(path: Path) -> None:
    parts = {"up": torch.ones(2, 4, 4), "down": torch.ones(2, 8, 1, 64, 64), "tokens": torch.ones(2, 8).long()}
    write_tensors(path, parts, {"kind": KIND_OF_MOMENTS, "layers": json.dumps(LAYERS)})


def write_sample(path: Path) -> None:
    met = Met(torch.ones(3, 4), torch.zeros(3, 2).short(), torch.ones(3, 2))
    write_calibration(path, dict.fromkeys(LAYERS, met), {"q": torch.eye(4).half()})


def read_moments(path: Path) -> None:
    shape = ExpertShape(4, 64, 128, has_bias=False, transposed=False)
    found = read_calibration(path, LAYERS, EXPERTS, shape, [torch.relu] * len(LAYERS))
    if isinstance(found, CalibrationSample):
        for layer in LAYERS:
            found.read(layer)


class Kind:
    """One kind of file: its name, how it is written and read, and the one error of its reader."""

    def __init__(self, name: str, write: Callable, read: Callable, error: type[DynaExqError]):
        self.name, self.write, self.read, self.error = name, write, read, error


KINDS = {
    "shard": Kind("x.safetensors", torch_shard, read_whole_shard, CheckpointError),
    "index": Kind(INDEX, write_index, read_index, CheckpointError),
    "moments": Kind("m.safetensors", write_moments, read_moments, CheckpointError),
    "calibration": Kind("c.safetensors", write_sample, read_moments, CheckpointError),
    "hotness": Kind(
        "h.safetensors",
        lambda path: write_snapshot(path, "M", LAYERS, Snapshot(EVENLY_HOT, KINDS_OF_TRAFFIC)),
        lambda path: read_snapshot(path, "M", LAYERS, EXPERTS),
        HotnessError,
    ),
    "trace": Kind("t.npz", write_trace, lambda path: list(Trace(path).windows()), TraceError),
}

edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "double", "overwrite", "truncate"]), st.floats(0, 1), st.binary(max_size=8)
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, what in changes:
        at = int(where * max(0, len(content) - 1))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (what[0] if what else 1)]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at] + content[at + 1 + len(what) :]
        elif kind == "double":
            content = content[:at] + content[max(0, at - 32) :]
        elif kind == "overwrite":
            content = content[:at] + what + content[at + len(what) :]
        else:
            content = content[:at]
    return content


def read_damaged(kind: Kind, path: Path) -> None:
    """Read what is damaged: well, or with the error of its kind, and soon."""
    start = time.monotonic()
    with contextlib.suppress(kind.error):
        kind.read(path)
    assert time.monotonic() - start < SECONDS


def fuzz(kind: Kind, path: Path, examples: int) -> None:
    kind.write(path)
    content = path.read_bytes()
    options = {"deadline": None, "max_examples": examples, "suppress_health_check": list(HealthCheck)}

    @settings(**options)
    @given(edits)
    def bytes_damaged(changes: list[tuple[str, float, bytes]]) -> None:
        path.write_bytes(damaged(content, changes))
        read_damaged(kind, path)

    bytes_damaged()
    if content[8:9] != b"{":
        return
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]

    @settings(**options)
    @given(st.data())
    def header_damaged(data: st.DataObject) -> None:
        text = json.dumps(exchanged(header, data)).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        read_damaged(kind, path)

    header_damaged()


odd = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4), st.just([]), st.just({}),
    st.lists(st.integers(-3, 2**65), max_size=5),
)  # fmt: skip


def exchanged(value: Any, data: st.DataObject) -> Any:
    """`value` with one of its parts exchanged for something odd, or removed."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.integers(0, 4)) == 0:
            return {name: part for name, part in value.items() if name != key}
        return value | {key: exchanged(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(value) - 1))
        return [*value[:at], exchanged(value[at], data), *value[at + 1 :]]
    return data.draw(odd)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_damage_comes_out_as_the_error_of_its_kind(kind: Kind, tmp_path: Path) -> None:
    fuzz(kind, tmp_path / kind.name, 150)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_much_damage_comes_out_as_the_error_of_its_kind(kind: Kind, tmp_path: Path) -> None:
    fuzz(kind, tmp_path / kind.name, 5000)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_whole_is_read(kind: Kind, tmp_path: Path) -> None:
    kind.write(tmp_path / kind.name)
    kind.read(tmp_path / kind.name)


def safetensors(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


HOTNESS = {"dtype": "F64", "shape": [2, 8], "data_offsets": [0, 128]}
ABOUT = {"kind": "dynaexq heat profile", "version": "1", "model": "M", "layers": '["a","b"]'}
FIGURES = {
    name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
    for i, name in enumerate(("up", "down", "tokens"))
}


def hotness(body: bytes = bytes(128), **changes: Any) -> bytes:
    about = {name: value for name, value in (ABOUT | changes).items() if value is not None}
    return safetensors({"__metadata__": about, "hotness": HOTNESS}, body)


CORPUS = {
    "a shape of infinity": ("shard", safetensors(b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}', b"x")),
    "a deep header": ("shard", safetensors(b"[" * 100_000)),
    "forty thousand dimensions": (
        "shard", safetensors({"a": {"dtype": "U8", "shape": [2**62] * 40_000, "data_offsets": [0, 1]}}, b"x")
    ),
    "sixty-four huge dimensions": (
        "shard", safetensors({"a": {"dtype": "U8", "shape": [2**62] * 64, "data_offsets": [0, 1]}}, b"x")
    ),
    "a deep index": ("index", b"[" * 100_000),
    "an index that names ..": ("index", b'{"weight_map":{"a":".."}}'),
    "an index that names a NUL": ("index", b'{"weight_map":{"a":"x\\u0000"}}'),
    "no layers": ("hotness", hotness(layers=None)),
    "no model": ("hotness", hotness(model=None)),
    "layers that are no JSON": ("hotness", hotness(layers="[")),
    "layers that are 7": ("hotness", hotness(layers="7")),
    "layers that are lists": ("hotness", hotness(layers="[[],1]")),
    "hotness that is not finite": ("hotness", hotness(struct.pack("<16d", *[float("nan")] * 16))),
    "moments without layers": (
        "moments", safetensors({"__metadata__": {"kind": KIND_OF_MOMENTS}, **FIGURES}, bytes(12))
    ),
    "metadata that is text": ("moments", safetensors({"__metadata__": "x", **FIGURES}, bytes(12))),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "content"), CORPUS.values(), ids=CORPUS)
def test_damage_that_was_found_is_refused(kind: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / KINDS[kind].name
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(KINDS[kind].error):
        KINDS[kind].read(path)
    assert time.monotonic() - start < 1


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array)
    return content.getvalue()


TRACES: dict[str, Callable[[np.ndarray], bytes]] = {
    "00000.index": lambda array: npy(array * 0 + 999),
    "00000.mass": lambda array: npy(array[:3]),
    "00000.starts": lambda array: npy(array[::-1].copy()),
    "00000.tokens": lambda array: npy(array[:, :1]),
    "00000.steps": lambda array: npy(-array),
    "errors": lambda array: npy(array * np.nan),
    "phase_starts": lambda array: npy(array - 5),
    "phases": lambda array: b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (2**60,)}",
    "header": lambda array: npy(np.array('{"version": 1, "num_experts": 1e30}')),
}


@pytest.mark.parametrize("member", TRACES)
def test_a_trace_whose_arrays_do_not_belong_together_is_refused(member: str, tmp_path: Path) -> None:
    whole, bad = tmp_path / "t.npz", tmp_path / "bad.npz"
    write_trace(whole)
    arrays = np.load(whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            changed = name == f"{member}.npy"
            target.writestr(name, TRACES[member](arrays[member]) if changed else source.read(name))
    with pytest.raises(TraceError, match=r"bad\.npz is not a routing trace"):
        list(Trace(bad).windows())


@pytest.mark.parametrize("size", ["9" * 5000 + "GiB", "9" * 5000 + "B", "1" + "." + "0" * 5000 + "GB"])
def test_a_size_of_five_thousand_digits_is_none(size: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_bytes(size)
    assert len(str(refused.value)) < 400
