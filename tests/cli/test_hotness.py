"""Files of hotness are shown, merged and compared on the command line; what does not belong together is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dynaexq.cli.app import app
from dynaexq.errors import HotnessError
from dynaexq.policy.kinds import WORD_BUCKETS, LearnedKinds
from dynaexq.runtime.hotness_snapshot import Snapshot, open_snapshot, write_snapshot

LAYERS = ["a", "b"]


def written(path: Path, seed: int, kinds: int = 2, model: str = "M", layers: list[str] = LAYERS) -> Path:
    rng = np.random.default_rng(seed)
    profiles = rng.random((kinds, len(layers), 8)) ** 4
    learned = LearnedKinds(profiles, rng.random(kinds) * 100, np.ones((kinds, WORD_BUCKETS)), np.zeros(kinds))
    write_snapshot(path, model, layers, Snapshot(learned.average, learned))
    return path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["hotness", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_file_is_shown(tmp_path: Path) -> None:
    path = written(tmp_path / "one", 0)
    assert "2 kinds of traffic" in " ".join(run("show", path).split())
    found = json.loads(run("show", path, "--json"))
    hotness = open_snapshot(path)[2].hotness
    assert [found["layers"][name][0] for name in LAYERS] == hotness.argmax(1).tolist()
    assert (found["model"], found["experts"], found["kinds"]) == ("M", 8, 2)


def test_files_are_merged(tmp_path: Path) -> None:
    one, other, both = written(tmp_path / "one", 0), written(tmp_path / "other", 1, kinds=3), tmp_path / "both"
    run("merge", one, other, "--output", both)
    model, layers, found = open_snapshot(both)
    parts = [open_snapshot(path)[2] for path in (one, other)]
    assert (model, layers) == ("M", LAYERS)
    np.testing.assert_allclose(found.hotness, (parts[0].hotness + parts[1].hotness) / 2)
    assert len(found.learned.tokens) == 5


def test_files_are_compared(tmp_path: Path) -> None:
    one, other = written(tmp_path / "one", 0), written(tmp_path / "other", 1)
    same = json.loads(run("diff", one, one, "--json"))
    assert same["correlation"] == pytest.approx(1)
    assert same["covered by its own"] == same["covered by the other"]
    found = json.loads(run("diff", one, other, "--json"))
    assert all(a < b for a, b in zip(found["covered by the other"], found["covered by its own"], strict=True))
    assert "correlation" in run("diff", one, other)


@pytest.mark.parametrize("command", ["diff", "merge"])
def test_files_of_different_models_are_refused(tmp_path: Path, command: str) -> None:
    one = written(tmp_path / "one", 0)
    for other in (written(tmp_path / "other", 0, model="N"), written(tmp_path / "third", 0, layers=["a", "c"])):
        extra = ["--output", tmp_path / "both"] if command == "merge" else []
        with pytest.raises(HotnessError, match="expected files of one model"):
            run(command, one, other, *extra)
    assert not (tmp_path / "both").exists()
