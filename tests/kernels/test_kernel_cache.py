"""The cache of compiled kernels: nobody else's library is loaded, a damaged one is built anew, no home is needed."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dynaexq.kernels.cpu import cache
from dynaexq.kernels.cpu.cache import cache_directory, cached, is_whole


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNAEXQ_CACHE_DIR", str(tmp_path / "cache"))
    cache._temporary_directory.cache_clear()
    return tmp_path / "cache"


def build(path: Path) -> None:
    path.write_bytes(b"a library" * 1000)


def fail(path: Path) -> None:
    raise AssertionError("it is there already")


def test_a_library_is_built_once_kept_private_and_nothing_else_is_left(home: Path) -> None:
    library = cached("moe.so", build)
    assert library.parent == home
    assert stat.S_IMODE(library.stat().st_mode) == 0o700
    assert list(home.iterdir()) == [library]
    assert cached("moe.so", fail) == library


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: os.truncate(path, 4096),
    "empty": lambda path: os.truncate(path, 0),
    "noise": lambda path: path.write_bytes(path.read_bytes()[:100] + os.urandom(2000) + path.read_bytes()[2100:]),
    "another file": lambda path: path.write_bytes(Path(sys.executable).read_bytes()[:50_000]),
    "writable by others": lambda path: path.chmod(0o777),
    "a link": lambda path: (path.rename(path.with_name("elsewhere")), path.symlink_to(path.with_name("elsewhere"))),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_library_is_built_anew(damage: Callable[[Path], object], home: Path) -> None:
    library = cached("moe.so", build)
    damage(library)
    assert not is_whole(library)
    built = []
    cached("moe.so", lambda path: (built.append(path), build(path)))
    assert built
    assert is_whole(library)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_library_of_another_user_is_not_loaded(home: Path) -> None:
    library = cached("moe.so", build)
    os.chown(library, 12345, 12345)
    assert not is_whole(library)


def test_a_directory_that_others_may_write_to_is_not_used(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    home.mkdir()
    home.chmod(0o1777)
    directory = cache_directory()
    assert directory != home
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert cache_directory() == directory
    assert len(caplog.messages) == 1
    assert "others may write there; set DYNAEXQ_CACHE_DIR" in caplog.messages[0]


def test_without_a_home_a_temporary_directory_serves_and_is_removed(tmp_path: Path) -> None:
    code = (
        "import pathlib\n"
        "def no_home(): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = no_home\n"
        "from dynaexq.kernels.cpu.cache import cache_directory\n"
        "print(cache_directory())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "DYNAEXQ_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(tmp_path)), done.stderr
    assert "Could not determine home directory" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_build_that_fails_leaves_nothing(home: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        cached("moe.so", lambda path: 1 / 0)
    assert not list(home.iterdir())
