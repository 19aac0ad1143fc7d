"""Files are replaced whole, by one writer at a time, and leave nothing behind; what is read is a regular file."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dynaexq.checkpoint import replaced, write_tensors
from dynaexq.errors import CheckpointError
from dynaexq.runtime.hotness_snapshot import Snapshot, write_snapshot
from dynaexq.safeguards import durable_files
from dynaexq.safeguards.durable_files import replacing, write_text
from dynaexq.safeguards.outside_files import open_regular, parse_json, read_bytes, read_json
from dynaexq.traces.trace_file import TraceHeader, TraceWriter


def write_trace(path: Path) -> None:
    TraceWriter(path, TraceHeader(("a",), 4, 2)).close()


WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: write_text(path, "{}"),
    "hotness": lambda path: write_snapshot(path, "M", ["a"], Snapshot(np.ones((1, 4)))),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(4)}, {}),
    "trace": write_trace,
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@every_writer
def test_what_is_replaced_keeps_its_permissions_and_a_link_its_end(write, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write(link)
    assert link.is_symlink()
    assert real.read_bytes() != b"old"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    write(tmp_path / "new")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~mask
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "new"}


@every_writer
def test_a_place_that_cannot_be_written_to_is_refused_and_nothing_is_left(write, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    for name in ("directory", "dangling", "fifo", "missing/file"):
        with pytest.raises(OSError, match=r"write elsewhere|make it first"):
            write(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"directory", "dangling", "fifo"}


@every_writer
def test_a_full_disk_leaves_the_old_file(write, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limit[1]))
        with pytest.raises(OSError, match=r"cannot write|File too large"):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_synced_before_it_takes_its_place_and_its_directory_after(tmp_path: Path, monkeypatch) -> None:
    done: list[str] = []
    real_replace, real_sync = Path.replace, durable_files.sync
    monkeypatch.setattr(durable_files, "sync", lambda path: (done.append(f"sync {path.is_dir()}"), real_sync(path)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("replace"), real_replace(self, to))[1])
    write_text(tmp_path / "file", "text")
    assert done == ["sync False", "replace", "sync True"]


def test_a_block_that_fails_leaves_the_old_file_and_a_dead_writer_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path):
        _ = 1 / 0
    assert path.read_text() == "old"
    code = (
        "import os, signal, sys; from dynaexq.safeguards.durable_files import replacing\n"
        "with replacing(sys.argv[1]) as staging:\n    staging.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(list(tmp_path.iterdir())) == 3, "a lock and half a file"
    write_text(path, "new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "new"


def test_writers_of_one_place_take_turns(tmp_path: Path) -> None:
    path, inside = tmp_path / "file", []

    def write(number: int) -> None:
        with replacing(path) as staging:
            inside.append(number)
            assert len(inside) == 1
            time.sleep(0.002)
            staging.write_text(str(number))
            inside.remove(number)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(write, number) for number in range(24)]:
            done.result()
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "volume"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_mount_point_gets_its_files_one_by_one_the_index_last(mounted: Path) -> None:
    (mounted / "notes.txt").write_text("mine")
    for version in ("one", "two"):
        with replaced(mounted) as staging:
            (staging / f"{version}.safetensors").write_text(version)
            index = {"weight_map": {"a": f"{version}.safetensors"}}
            (staging / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {path.name for path in mounted.iterdir()} == {
        "notes.txt",
        "two.safetensors",
        "model.safetensors.index.json",
    }
    with (
        pytest.raises(CheckpointError, match=r"cannot write 1,000,000,000 bytes .* are free"),
        replaced(mounted, nbytes=10**9),
    ):
        raise AssertionError("found out before the work")


def test_a_directory_keeps_its_permissions_and_stale_ones_are_collected(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir(mode=0o750)
    (target / ".model-unfinished-dead").mkdir(mode=0o700)
    (tmp_path / ".other-unfinished-dead").mkdir(mode=0o700)
    with replaced(target) as staging:
        assert stat.S_IMODE(staging.stat().st_mode) == 0o700
        (staging / "a").write_text("new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert list(target.iterdir()) == [target / "a"]
    with replaced(tmp_path / "other") as staging:
        assert stat.S_IMODE(staging.stat().st_mode) == 0o700
    assert {path.name for path in tmp_path.iterdir()} == {"model", "other"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_an_unfinished_directory_of_another_user_is_not_gone_on_with(tmp_path: Path) -> None:
    planted = tmp_path / ".model-unfinished"
    planted.mkdir()
    (planted / "dynaexq-source.json").write_text("inputs")
    os.chown(planted, 12345, 12345)
    with pytest.raises(CheckpointError, match="made by another user"), replaced(tmp_path / "model", "inputs"):
        raise AssertionError
    planted.chmod(0o777)
    os.chown(planted, os.geteuid(), os.getegid())
    with pytest.raises(CheckpointError, match="can be written by others"), replaced(tmp_path / "model", "inputs"):
        raise AssertionError


def test_a_dangling_link_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="where there is nothing"), replaced(tmp_path / "model"):
        raise AssertionError


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "directory"])
def test_what_is_no_file_is_refused_at_once(make, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match="is a directory, a pipe or a device; go away"):
        open_regular(tmp_path / "x", CheckpointError, "go away")
    with pytest.raises(CheckpointError, match="device"):
        open_regular("/dev/zero", CheckpointError, "go away")


def test_what_is_read_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deep"):
        read_json(path, CheckpointError, "go away")
    with pytest.raises(CheckpointError, match="more than the 99,999 bytes"):
        read_bytes(path, CheckpointError, "go away", 99_999)
    with pytest.raises(ValueError, match=r"Exceeds the limit|integer string conversion"):
        parse_json("9" * 5000)
