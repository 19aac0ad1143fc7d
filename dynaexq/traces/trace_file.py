"""A routing trace on disk: an ordinary `.npz` without pickles, written and read in chunks of bounded size.

L layers, E experts, T tiers. A *window* is what was routed between two ticks. Members of the archive:

| member | dtype and shape | meaning |
|---|---|---|
| `header` | text, `[]` | JSON: `version`, and the fields of `TraceHeader` but `errors` |
| `errors` | float32 `[L, E, T]` | relative squared error of every expert at each of `tiers`; only where known |
| `phases` | text `[P]` | names of the marked phases |
| `phase_starts` | int64 `[P]` | index of each one's first window |
| `00000.steps` | int32 `[W]` | forward passes of each window of chunk 0; the same for the other chunks |
| `00000.tokens` | int32 `[W, L]` | tokens that each layer saw |
| `00000.starts` | int64 `[W + 1]` | where each window's entries begin in the two below |
| `00000.index` | uint16 or uint32 | `layer * E + expert` of each entry, rising within a window |
| `00000.mass` | float32 | routing mass that this expert received in this window; absent experts received none |

The archive takes its place when it is closed; a recording that was cut off leaves none. Every member has a CRC-32.
"""

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from dynaexq.errors import TraceError
from dynaexq.safeguards.durable_files import replacing
from dynaexq.safeguards.outside_files import open_regular, parse_json
from dynaexq.types import ExpertShape

VERSION = 1
WINDOWS_A_CHUNK = 64


class TraceWindow(NamedTuple):
    """What was routed over `steps` forward passes: mass float `[L, E]` and tokens int `[L]`.

    `TraceWindow(np.array([[1.5, 0.5, 0.0]]), np.array([2]), 2)`: two decode steps, one layer of three experts.
    """

    mass: np.ndarray
    tokens: np.ndarray
    steps: int

    def __add__(self, later: "TraceWindow") -> "TraceWindow":  # type: ignore[override]
        """Both windows as one."""
        return TraceWindow(self.mass + later.mass, self.tokens + later.tokens, self.steps + later.steps)


class Phase(NamedTuple):
    """A workload's name, its first window and the one after its last."""

    name: str
    first: int
    end: int


@dataclass(frozen=True)
class TraceHeader:
    """What a trace says about the model that it was taken from.

    Attributes:
        layers: names of the L sparse layers in order.
        top_k: experts that each token is routed to.
        tiers: those that `errors` belongs to; empty where unknown.
        errors: float32 `[L, E, T]`, relative squared error at each tier, or None.
        expert: shape of one expert, or None.
        dtype: floating dtype of the model.
        dense: bytes of all weights that are not experts.
    """

    layers: tuple[str, ...]
    num_experts: int
    top_k: int
    tiers: tuple[str, ...] = ()
    errors: np.ndarray | None = None
    expert: ExpertShape | None = None
    dtype: str = "bfloat16"
    dense: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, experts)."""
        return len(self.layers), self.num_experts

    def to_json(self) -> str:
        """All but the errors."""
        fields: dict[str, object] = {n: value for n, value in vars(self).items() if n not in ("errors", "expert")}
        expert = asdict(self.expert) if self.expert else None
        return json.dumps({"version": VERSION, **fields, "expert": expert})


class _Abandoned(Exception):
    """What keeps an unfinished file from taking its place."""


class TraceWriter:
    """Writes a trace window by window and holds at most one chunk of it in memory. Close it, or use it in a `with`.

    The file appears when it is closed.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, header: TraceHeader):
        self.header = header
        self._place = ExitStack()
        self._archive = zipfile.ZipFile(
            self._place.enter_context(replacing(path)), "w", zipfile.ZIP_DEFLATED, compresslevel=1
        )
        self._pending: list[TraceWindow] = []
        self._phases: list[tuple[str, int]] = []
        self._num_windows = self._num_chunks = 0

    def add(self, window: TraceWindow) -> None:
        """Append one window."""
        self._pending.append(window)
        self._num_windows += 1
        if len(self._pending) == WINDOWS_A_CHUNK:
            self._flush()

    def mark(self, phase: str) -> None:
        """Let the phase of this name begin with the next window."""
        self._phases.append((phase, self._num_windows))

    def close(self) -> None:
        """Write what is pending, the header and the table of contents."""
        with self._place, self._archive:
            self._flush()
            self._write("header", np.array(self.header.to_json()))
            self._write("phases", np.array([name for name, _ in self._phases], dtype=str))
            self._write("phase_starts", np.array([start for _, start in self._phases], dtype=np.int64))
            if self.header.errors is not None:
                self._write("errors", self.header.errors.astype(np.float32))

    def abandon(self) -> None:
        """Remove what was written."""

        def leave() -> None:
            raise _Abandoned

        with suppress(_Abandoned, OSError), self._place, self._archive:
            leave()

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        mass = np.stack([window.mass.ravel() for window in self._pending])
        rows, index = np.nonzero(mass)
        narrow = mass.shape[1] <= np.iinfo(np.uint16).max
        parts: dict[str, np.ndarray] = {
            "steps": np.array([window.steps for window in self._pending], dtype=np.int32),
            "tokens": np.stack([window.tokens for window in self._pending]).astype(np.int32),
            "starts": np.searchsorted(rows, np.arange(len(mass) + 1)),
            "index": index.astype(np.uint16 if narrow else np.uint32),
            "mass": mass[rows, index].astype(np.float32),
        }
        for name, array in parts.items():
            self._write(f"{self._num_chunks:05}.{name}", array)
        self._pending.clear()
        self._num_chunks += 1

    def _write(self, name: str, array: np.ndarray) -> None:
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, array, allow_pickle=False)


class Trace:
    """A trace on disk, read a chunk at a time, as often as one likes.

    Raises:
        TraceError: not a trace, cut off, damaged, or of a later version; also while its windows are read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._archive() as archive:
            self.header = _read_header(archive, self.path)
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            self._chunks = sorted(name.split(".")[0] for name in names if name.endswith(".steps"))
            self.num_windows = sum(len(self._array(archive, f"{chunk}.steps", 1)) for chunk in self._chunks)
            phases = self._array(archive, "phases", 1).tolist()
            starts = self._array(archive, "phase_starts", 1).tolist()
        ends = [*starts[1:], self.num_windows][: len(starts)]
        if len(phases) != len(starts) or sorted(starts) != starts or any(start < 0 for start in starts):
            raise self._damaged("its phases have no order")
        marked = [Phase(*phase) for phase in zip(phases, starts, ends, strict=True) if phase[1] < phase[2]]
        unmarked = [Phase("start", 0, starts[0] if starts else self.num_windows)]
        self.phases = [phase for phase in unmarked if phase.end] + marked

    def windows(self) -> Iterator[TraceWindow]:
        """All windows in order."""
        num_layers, num_experts = self.header.shape
        with self._archive() as archive:
            for chunk in self._chunks:
                steps, tokens, starts, index, values = (
                    self._array(archive, f"{chunk}.{part}", rank)
                    for part, rank in (("steps", 1), ("tokens", 2), ("starts", 1), ("index", 1), ("mass", 1))
                )
                self._check(steps, tokens, starts, index, values)
                for i in range(len(steps)):
                    mass = np.zeros(num_layers * num_experts)
                    entries = slice(starts[i], starts[i + 1])
                    mass[index[entries]] = values[entries]
                    yield TraceWindow(mass.reshape(num_layers, num_experts), tokens[i].astype(np.int64), int(steps[i]))

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        """The file, open; whatever is wrong with it is a TraceError."""
        remedy = "record one with runtime.trace()"
        try:
            with (
                os.fdopen(open_regular(self.path, TraceError, remedy), "rb") as file,
                zipfile.ZipFile(file) as archive,
            ):
                yield archive
        except _UNREADABLE as error:
            raise self._damaged(str(error)) from error

    def _array(self, archive: zipfile.ZipFile, name: str, rank: int) -> np.ndarray:
        return read_array(archive, name, rank)

    def _check(
        self, steps: np.ndarray, tokens: np.ndarray, starts: np.ndarray, index: np.ndarray, values: np.ndarray
    ) -> None:
        """Raise a TraceError unless the arrays of a chunk belong together and to the header."""
        num_layers, num_experts = self.header.shape
        if tokens.shape != (len(steps), num_layers) or len(starts) != len(steps) + 1 or len(index) != len(values):
            raise self._damaged("the arrays of a chunk have different lengths")
        if (np.diff(starts) < 0).any() or starts[0] != 0 or starts[-1] != len(index):
            raise self._damaged("its windows have no order")
        if len(index) and (index.min() < 0 or index.max() >= num_layers * num_experts):
            raise self._damaged("it names experts that its model does not have")
        if not np.isfinite(values).all() or (values < 0).any() or (steps < 0).any() or (tokens < 0).any():
            raise self._damaged("it holds figures that are no routing")

    def _damaged(self, problem: str) -> TraceError:
        return TraceError(
            f"{self.path} is not a routing trace, or its recording was cut off before it was closed ({problem}); "
            "record one with runtime.trace()"
        )


_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, KeyError, ValueError, TypeError, EOFError, OSError, NotImplementedError,
    RuntimeError, OverflowError,
)  # fmt: skip
"""What comes of reading an archive that is none, or is damaged."""

MOST_MEMBER = 2**30
"""Bytes of one array: 64 windows of 128 layers of 1024 experts have a thirtieth of it."""


def read_array(archive: zipfile.ZipFile, name: str, rank: int) -> np.ndarray:
    """One array of an archive, without pickles; what its header claims is compared with its bytes before it is made.

    Raises:
        ValueError, KeyError, zipfile.BadZipFile: it is missing, damaged, too large, or of another rank.
    """
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > MOST_MEMBER:
        raise ValueError(f"{name} would take {member.file_size:,} bytes")
    content = io.BytesIO(archive.read(member))
    np.lib.format.read_magic(content)
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(content)
    if dtype.hasobject or len(shape) != rank or (by_column and rank > 1):
        raise ValueError(f"{name} is no plain array of {rank} dimensions")
    data = content.read()
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{name} has not the bytes that its header claims")
    return np.frombuffer(data, dtype).reshape(shape)


def _read_header(archive: zipfile.ZipFile, path: Path) -> TraceHeader:
    fields = parse_json(str(read_array(archive, "header", 0)))
    version = fields.pop("version")
    if version > VERSION:
        raise TraceError(f"{path} has format version {version}, and this dynaexq reads up to {VERSION}; update it")
    expert = fields.pop("expert")
    fields |= {name: tuple(fields[name]) for name in ("layers", "tiers")}
    errors = read_array(archive, "errors", 3) if "errors.npy" in archive.namelist() else None
    header = TraceHeader(**fields, errors=errors, expert=ExpertShape(**expert) if expert else None)
    if not (type(header.num_experts) is int and 0 < header.num_experts <= MOST_EXPERTS and header.layers):
        raise ValueError(f"a model of {len(header.layers)} layers and {header.num_experts} experts")
    if errors is not None and (errors.shape != (*header.shape, len(header.tiers)) or not np.isfinite(errors).all()):
        raise ValueError("its errors are not those of its model")
    return header


MOST_EXPERTS = 2**20
"""Experts of a layer, far beyond any."""
