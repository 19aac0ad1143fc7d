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

The archive gets its table of contents when it is closed, so a recording that was cut off cannot be read.
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from dynaexq.errors import TraceError
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


class TraceWriter:
    """Writes a trace window by window and holds at most one chunk of it in memory. Close it, or use it in a `with`.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, header: TraceHeader):
        self.header = header
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
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
        with self._archive:
            self._flush()
            self._write("header", np.array(self.header.to_json()))
            self._write("phases", np.array([name for name, _ in self._phases], dtype=str))
            self._write("phase_starts", np.array([start for _, start in self._phases], dtype=np.int64))
            if self.header.errors is not None:
                self._write("errors", self.header.errors.astype(np.float32))

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
        TraceError: not a trace, cut off, or of a later version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            # Opened here, because np.load does not close what it cannot read.
            with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                self.header = _read_header(archive, self.path)
                self._chunks = sorted({name.split(".")[0] for name in archive.files if name.endswith(".steps")})
                self.num_windows = sum(len(archive[f"{chunk}.steps"]) for chunk in self._chunks)
                names, starts = archive["phases"].tolist(), archive["phase_starts"].tolist()
        except TraceError:
            raise
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError, EOFError) as error:
            raise TraceError(
                f"{self.path} is not a routing trace, or its recording was cut off before it was closed; "
                "record one with runtime.trace()"
            ) from error
        ends = [*starts[1:], self.num_windows][: len(starts)]
        marked = [Phase(*phase) for phase in zip(names, starts, ends, strict=True) if phase[1] < phase[2]]
        unmarked = [Phase("start", 0, starts[0] if starts else self.num_windows)]
        self.phases = [phase for phase in unmarked if phase.end] + marked

    def windows(self) -> Iterator[TraceWindow]:
        """All windows in order."""
        num_layers, num_experts = self.header.shape
        with np.load(self.path, allow_pickle=False) as archive:
            for chunk in self._chunks:
                steps, tokens, starts, index, values = (
                    archive[f"{chunk}.{part}"] for part in ("steps", "tokens", "starts", "index", "mass")
                )
                for i in range(len(steps)):
                    mass = np.zeros(num_layers * num_experts)
                    entries = slice(starts[i], starts[i + 1])
                    mass[index[entries]] = values[entries]
                    yield TraceWindow(mass.reshape(num_layers, num_experts), tokens[i].astype(np.int64), int(steps[i]))


def _read_header(archive: np.lib.npyio.NpzFile, path: Path) -> TraceHeader:
    fields = json.loads(str(archive["header"]))
    version = fields.pop("version")
    if version > VERSION:
        raise TraceError(f"{path} has format version {version}, and this dynaexq reads up to {VERSION}; update it")
    expert = fields.pop("expert")
    fields |= {name: tuple(fields[name]) for name in ("layers", "tiers")}
    errors = archive["errors"] if "errors" in archive.files else None
    return TraceHeader(**fields, errors=errors, expert=ExpertShape(**expert) if expert else None)
