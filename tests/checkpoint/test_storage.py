"""What lies on disk: shards that are believed only as far as they can be, and directories that change in one step."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dynaexq.checkpoint import (
    FORMAT_VERSION,
    INDEX,
    READ_VERSIONS,
    PackedReader,
    PackedShape,
    PackedStore,
    PackedWriter,
    Shard,
    ShardWriter,
    link_or_copy,
    replaced,
)
from dynaexq.checkpoint.safetensors_io import DTYPES
from dynaexq.errors import CheckpointError, StoreError

SHAPE = PackedShape(("a.0", "b.1", "c.2"), 4, 512, 768, ((0, 256), (256, 512)), 2)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "bytes": torch.arange(24, dtype=torch.uint8).view(4, 6),
        "scalar": torch.tensor(3.5),
        "half": torch.randn(3, 5, 2).bfloat16(),
        "none": torch.empty(0, 4),
    }


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path / "a.safetensors"


def test_a_shard_of_the_library_is_read_as_the_library_reads_it(shard: Path) -> None:
    opened = Shard(shard)
    assert opened.metadata == {"format": "pt"}
    for name, tensor in tensors().items():
        torch.manual_seed(0)
        assert opened.entries[name].shape == tuple(tensor.shape)
        assert opened.read(name).dtype == tensor.dtype
    with safe_open(shard, "pt") as theirs:
        for name in tensors():
            assert torch.equal(opened.read(name), theirs.get_tensor(name))
        assert torch.equal(opened.read("half", 1, 3), theirs.get_tensor("half")[1:3])
    opened.close()


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), max_size=5))
def test_a_shard_that_was_written_by_position_is_one_for_the_library(arrays: list[tuple[str, list[int]]]) -> None:
    content = {f"t{i}": torch.randint(0, 2, shape).to(DTYPES[dtype]) for i, (dtype, shape) in enumerate(arrays)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "w.safetensors"
        writer = ShardWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in content.items()}, {"format": "pt"})
        for name, tensor in reversed(content.items()):
            for first in reversed(range(len(tensor) if tensor.ndim else 1)):
                writer.write(name, first, tensor[first : first + 1] if tensor.ndim else tensor)
        writer.close()
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0, "tensors begin at a multiple of eight"
        with safe_open(path, "pt") as theirs:
            assert set(theirs.keys()) == set(content)
            for name, tensor in content.items():
                found = theirs.get_tensor(name)
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def _header(change: dict) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change
    text = json.dumps({"w": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


BAD_FILES = {
    "empty": (b"", "was truncated to 0 bytes; pickles are never opened"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), "not a safetensors file"),
    "a zip of pickles": (b"PK\x03\x04" + bytes(100), "not a safetensors file"),
    "a header longer than the file": ((10**6).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "no JSON": ((4).to_bytes(8, "little") + b"{{{{" + bytes(8), "header cannot be read"),
    "a list": ((2).to_bytes(8, "little") + b"[]" + bytes(8), "header cannot be read"),
    "an unknown dtype": (_header({"dtype": "F4"}), "header cannot be read .*'F4'"),
    "a lie about the size": (_header({"shape": [3]}), "lies about the size of w"),
    "a size that no file has": (_header({"shape": [2**40, 2**40]}), "more elements than the file has bytes"),
    "one dimension too many": (_header({"shape": [1] * 65}), "at most 64 dimensions"),
    "a negative size": (_header({"shape": [-2, -1]}), "header cannot be read"),
    "a place inside the header": (_header({"data_offsets": [-8, 0]}), "header cannot be read"),
    "more than the file holds": (_header({"shape": [4], "data_offsets": [0, 16]}), "was truncated: w ends at byte"),
}


@pytest.mark.parametrize(("content", "match"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_sound_shard_is_refused_by_name(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"bad.safetensors.*{match}"):
        Shard(tmp_path / "bad.safetensors")


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot open .*gone.safetensors: No such file"):
        Shard(tmp_path / "gone.safetensors")


def test_a_shard_that_shrinks_while_it_is_open_is_an_error_and_not_the_end(shard: Path) -> None:
    opened = Shard(shard)
    os.truncate(shard, shard.stat().st_size - 8)
    last = max(opened.entries, key=lambda name: opened.entries[name].offset)
    with pytest.raises(CheckpointError, match="was truncated"):
        opened.read(last)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []

    def full(file: int, offset: int, nbytes: int) -> None:
        wanted.append(nbytes)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    said = r"cannot write (.*) bytes to .*No space left .*; free some space"
    with pytest.raises(CheckpointError, match=said) as refused:
        ShardWriter(tmp_path / "a", {"w": (torch.float32, (4,))}, {})
    assert re.search(said, str(refused.value))[1] == str(wanted[0])
    assert 16 < wanted[0] < 999


def blocks() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Base `[L, E, 512]`, upgrades `[L, E, 768]`, errors `[L, E, 2]`."""
    rng = np.random.default_rng(5)
    base = torch.from_numpy(rng.integers(0, 256, (3, 4, 512), dtype=np.uint8))
    upgrade = torch.from_numpy(rng.integers(0, 256, (3, 4, 768), dtype=np.uint8))
    return base, upgrade, rng.random((3, 4, 2))


def write_packed(directory: Path, max_shard_size: int, stop_before: int = 12) -> PackedWriter:
    base, upgrade, errors = blocks()
    writer = PackedWriter(directory, SHAPE, max_shard_size, {"format": "pt"})
    for layer, expert in list(np.ndindex(3, 4))[4 * writer.first_layer : stop_before]:
        rows = slice(expert, expert + 1)
        writer.write(layer, expert, base[layer, rows], upgrade[layer, rows], errors[layer, rows])
    return writer


def open_packed(directory: Path, shape: PackedShape = SHAPE) -> PackedReader:
    return PackedReader([Shard(path) for path in sorted(directory.glob("*.safetensors"))], shape)


@pytest.mark.parametrize("max_shard_size", [1, 7000, 10**6], ids=["a layer a file", "two layers a file", "one file"])
def test_packed_experts_are_read_as_they_were_written(tmp_path: Path, max_shard_size: int) -> None:
    files = write_packed(tmp_path, max_shard_size).finish()
    assert {path.name for path in tmp_path.iterdir()} == set(files.values())
    assert len(set(files.values())) == 2 * {1: 3, 7000: 2, 10**6: 1}[max_shard_size]
    base, upgrade, errors = blocks()
    reader = open_packed(tmp_path)
    assert np.array_equal(reader.errors, errors)
    store, out = PackedStore(reader, [(1, 0), (0, 512)]), torch.empty(768, dtype=torch.uint8)
    for layer in range(3):
        found = torch.empty(4, 512, dtype=torch.uint8)
        reader.read_base(layer, found)
        assert torch.equal(found, base[layer])
        for expert in range(4):
            store.read_into(4 * layer + expert, out)
            assert torch.equal(out, upgrade[layer, expert].roll(-256))
    store.close()


def test_a_part_of_the_layers_and_experts_is_counted_from_its_own_beginning(tmp_path: Path) -> None:
    write_packed(tmp_path, 1).finish()
    base, upgrade, errors = blocks()
    part = open_packed(tmp_path).select([2, 0], first_expert=1, num_experts=2)
    assert np.array_equal(part.errors, errors[[2, 0], 1:3])
    found = torch.empty(2, 512, dtype=torch.uint8)
    part.read_base(1, found)
    assert torch.equal(found, base[0, 1:3])
    out = torch.empty(256, dtype=torch.uint8)
    part.read_segment(0, 1, 0, out)
    assert torch.equal(out, upgrade[2, 2, :256])


def test_writing_goes_on_behind_the_shards_that_are_complete(tmp_path: Path) -> None:
    write_packed(tmp_path / ".", 1, stop_before=10).abandon()
    complete = sorted(path.name for path in tmp_path.iterdir())
    assert complete == [f"experts-{kind}-0000{i}-of-00003.safetensors" for kind in ("base", "upgrade") for i in (1, 2)]
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in complete}
    writer = write_packed(tmp_path, 1)
    assert len(writer.finish()) == 3 * 5
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in complete} == times
    assert np.array_equal(open_packed(tmp_path).errors, blocks()[2])


def test_a_flipped_bit_in_the_error_figures_is_noticed(tmp_path: Path) -> None:
    write_packed(tmp_path, 10**6).finish()
    path = next(tmp_path.glob("experts-base-*"))
    entry = Shard(path).entries["c.2.packed.errors"]
    content = bytearray(path.read_bytes())
    content[entry.offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"error figures of c.2 do not match their checksums"):
        open_packed(tmp_path)


@pytest.mark.parametrize("kind", ["base", "upgrade"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, kind: str) -> None:
    write_packed(tmp_path, 10**6).finish()
    path = next(tmp_path.glob(f"experts-{kind}-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    reader = open_packed(tmp_path)
    if kind == "base":
        with pytest.raises(CheckpointError, match=r"base of expert 3 in c.2 does not match its checksum"):
            reader.read_base(2, torch.empty(4, 512, dtype=torch.uint8))
    else:
        store = PackedStore(reader, [(1, 0)])
        store.read_into(10, torch.empty(512, dtype=torch.uint8))
        with pytest.raises(StoreError, match=r"upgrade of expert 3 in c.2 does not match its checksum"):
            store.read_into(11, torch.empty(512, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers": ("a.0", "d.3")}, "lacks d.3.packed.errors"),
        ({"num_experts": 5}, r"expected a.0.packed.errors to be torch.float64 \[5, 2\] from config.json, found"),
        ({"base_nbytes": 256}, r"expected a.0.packed.base to be torch.uint8 \[4, 256\]"),
        ({"upgrade_nbytes": 256}, r"expected a.0.packed.upgrade to be torch.uint8 \[4, 256\]"),
        ({"segments": ((0, 768),)}, r"expected a.0.packed.checksums to be torch.int64 \[4, 2\]"),
    ],
    ids=["another layer", "more experts", "smaller blocks", "smaller upgrades", "other segments"],
)
def test_files_that_hold_something_else_are_refused(tmp_path: Path, change: dict, match: str) -> None:
    write_packed(tmp_path, 10**6).finish()
    with pytest.raises(CheckpointError, match=match):
        open_packed(tmp_path, PackedShape(**vars(SHAPE) | change))


def write_checkpoint(target: Path, content: str, *shards: str) -> None:
    with replaced(target) as staging:
        for shard in shards:
            (staging / shard).write_text(content)
        (staging / "config.json").write_text(content)
        (staging / INDEX).write_text(json.dumps({"weight_map": {shard: shard for shard in shards}}))


def read_checkpoint(target: Path) -> set[str]:
    """What the shards hold that the index names."""
    names = json.loads((target / INDEX).read_text())["weight_map"].values()
    return {(target / name).read_text() for name in names}


def test_only_files_of_the_old_checkpoint_are_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_checkpoint(target, "old", "a.safetensors", "b.safetensors")
    assert target.stat().st_mode & 0o777 == 0o777 & ~os.umask(os.umask(0o022))
    foreign = ("optimizer.pt", "adapter_model.safetensors", "runs/mine.safetensors", "tokenizer.json")
    (target / "runs").mkdir()
    for name in foreign:
        (target / name).write_text("mine")
    (target / "config.json").chmod(0o640)
    before = target.stat()
    write_checkpoint(target, "new", "a.safetensors", "c.safetensors")
    assert target.stat().st_ino == before.st_ino
    assert (target / "config.json").read_text() == "new"
    assert (target / "config.json").stat().st_mode & 0o777 == 0o640
    assert read_checkpoint(target) == {"new"}
    assert {name: (target / name).read_text() for name in foreign} == dict.fromkeys(foreign, "mine")
    assert not (target / "b.safetensors").exists()
    assert len(list(target.iterdir())) == len(foreign) + 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_shard_whose_name_is_taken_arrives_under_another_and_directories_with_their_files(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_checkpoint(target, "old", "a.safetensors")
    with replaced(target) as staging:
        (staging / "a.safetensors").write_text("new")
        (staging / INDEX).write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
        (staging / "deep" / "er").mkdir(parents=True)
        for name in ("one", "two"):
            (staging / "deep" / "er" / name).write_text(name)
    (shard,) = json.loads((target / INDEX).read_text())["weight_map"].values()
    assert shard != "a.safetensors"
    assert read_checkpoint(target) == {"new"}
    assert {path.read_text() for path in (target / "deep" / "er").iterdir()} == {"one", "two"}


def test_a_writer_that_dies_in_the_middle_leaves_one_checkpoint_and_the_next_tidies_up(tmp_path: Path) -> None:
    """`os.replace` is where files arrive: the process ends before the first, the second ... of them."""
    arrivals, seen = 0, set()
    while True:
        target = tmp_path / f"model{arrivals}"
        write_checkpoint(target, "old", "a.safetensors", "b.safetensors")
        script = f"""
            import os, pathlib
            left, replace = {arrivals}, pathlib.Path.replace
            def dying(path, other):
                global left
                left -= 1
                os._exit(9) if left < 0 else replace(path, other)
            pathlib.Path.replace = dying
            import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
            from test_storage import write_checkpoint
            write_checkpoint(pathlib.Path({str(target)!r}), "new", "a.safetensors", "b.safetensors")
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
        found = read_checkpoint(target)
        assert found in ({"old"}, {"new"})
        seen |= found
        write_checkpoint(target, "last", "a.safetensors")
        assert read_checkpoint(target) == {"last"}
        assert len(list(target.iterdir())) == 3, sorted(target.iterdir())
        if done.returncode == 0:
            break
        arrivals += 1
    assert seen == {"old", "new"}
    assert arrivals == 5, "a journal, two shards, config.json, the index"


def test_an_index_that_points_elsewhere_removes_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": "../mine.safetensors"}}))
    write_checkpoint(tmp_path / "model", "new", "a.safetensors")
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_a_list_of_arrivals_that_was_planted_removes_no_file_of_others(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_checkpoint(target, "old", "a.safetensors")
    (tmp_path / "mine.safetensors").write_text("mine")
    (target / "optimizer.pt").write_text("mine")
    planted = ["../mine.safetensors", str(tmp_path / "mine.safetensors"), "optimizer.pt", "..", "", 7, None]
    (target / ".model-arriving.json").write_text(json.dumps(planted))
    write_checkpoint(target, "new", "a.safetensors")
    assert read_checkpoint(target) == {"new"}
    assert (tmp_path / "mine.safetensors").read_text() == (target / "optimizer.pt").read_text() == "mine"
    (target / ".model-arriving.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"arriving.json cannot be read as JSON .*; remove it"):
        write_checkpoint(target, "newer", "a.safetensors")
    assert read_checkpoint(target) == {"new"}


def test_where_the_index_is_damaged_no_shard_that_it_may_have_named_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_checkpoint(target, "old", "a.safetensors")
    (target / ".model-arriving.json").write_text('["a.safetensors"]')
    (target / INDEX).write_text("{")
    with pytest.raises(ZeroDivisionError), replaced(target):
        _ = 1 / 0
    assert (target / "a.safetensors").read_text() == "old"


def test_the_working_directory_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("."), "new", "a.safetensors")
    assert Path.cwd() == tmp_path
    assert read_checkpoint(Path(".")) == {"new"}
    with pytest.raises(CheckpointError, match=r'"\." is the working directory'), replaced(""):
        raise AssertionError


def test_an_error_leaves_the_old_directory_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")

    def interrupted() -> None:
        with replaced(tmp_path / "model") as staging:
            (staging / "config.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("is_there", [True, False])
def test_what_a_conversion_depends_on_is_not_part_of_the_checkpoint(tmp_path: Path, is_there: bool) -> None:
    target = tmp_path / "model"
    if is_there:
        target.mkdir()
    with replaced(target, journal="of the source") as staging:
        (staging / "config.json").write_text("new")
    assert {path.name for path in target.iterdir() if not path.name.endswith(".lock")} == {"config.json"}


def test_an_error_is_told_even_where_what_was_done_is_gone_already(tmp_path: Path) -> None:
    def interrupted() -> None:
        with replaced(tmp_path / "model") as staging:
            staging.rmdir()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        interrupted()


def test_a_shard_without_tensors_ends_with_its_header(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors", {"kind": "none"})
    found = Shard(tmp_path / "empty.safetensors")
    assert (found.entries, found.metadata) == ({}, {"kind": "none"})
    found.close()


def test_files_of_every_version_so_far_are_read() -> None:
    assert READ_VERSIONS == (1, 2, 3), "a new version has to read the old ones; tests/data has those of 1 and 2"
    assert READ_VERSIONS[-1] == FORMAT_VERSION


def test_a_process_that_is_killed_leaves_the_old_directory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    script = f"""
        import os, signal
        from dynaexq.checkpoint import replaced
        with replaced({str(tmp_path / "model")!r}) as staging:
            (staging / "config.json").write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_a_file_in_the_place_of_the_directory_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with (
        pytest.raises(CheckpointError, match="expected a directory to save in, found the file"),
        replaced(tmp_path / "model"),
    ):
        pass
    assert (tmp_path / "model").read_text() == "mine"


def test_a_shape_counts_the_bytes_of_all_blocks() -> None:
    shape = PackedShape(("a", "b"), 3, 256, 512, ((0, 512),), 2)
    assert shape.nbytes == 2 * 3 * (256 + 512)


def test_a_writer_that_finds_everything_done_has_nothing_left_to_do(tmp_path: Path) -> None:
    files = write_packed(tmp_path, 10**6).finish()
    again = PackedWriter(tmp_path, SHAPE, 10**6, {})
    assert again.first_layer == len(SHAPE.layers)
    assert again.finish() == files


def test_a_group_of_which_one_file_is_missing_is_written_again(tmp_path: Path) -> None:
    files = write_packed(tmp_path, 1).finish()
    (tmp_path / "experts-upgrade-00002-of-00003.safetensors").unlink()
    assert PackedWriter(tmp_path, SHAPE, 1, {}).first_layer == 1
    assert write_packed(tmp_path, 1).finish() == files
    base, found = blocks()[0], torch.empty(4, 512, dtype=torch.uint8)
    for layer in range(3):
        open_packed(tmp_path).read_base(layer, found)
        assert torch.equal(found, base[layer])


def test_where_nothing_can_be_linked_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    (tmp_path / "source").write_text("content")
    link_or_copy(tmp_path / "source", tmp_path / "linked")
    assert (tmp_path / "linked").stat().st_ino == (tmp_path / "source").stat().st_ino
    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "source", tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "content"
    assert (tmp_path / "copied").stat().st_ino != (tmp_path / "source").stat().st_ino


def test_an_upgrade_that_has_become_too_short_is_an_error_of_the_store(tmp_path: Path) -> None:
    write_packed(tmp_path, 10**6).finish()
    path = next(tmp_path.glob("experts-upgrade-*"))
    store = PackedStore(open_packed(tmp_path), [(1, 0)])
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(StoreError, match="it was truncated"):
        store.read_into(11, torch.empty(512, dtype=torch.uint8))
