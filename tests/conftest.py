"""Fixtures that several test files share. One thread: two beside another process are slower."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    """The --out folder of the session's runs; what is made once lies in its cache."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def cache(out):
    return out / "cache"


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small data set of toy clips, in the CSV format."""
    folder = tmp_path_factory.mktemp("data") / "small-toy"
    common.make_toy_dataset(folder, train=48, test=24)
    return folder


@pytest.fixture(scope="session")
def coded(tmp_path_factory):
    """A small data set for the compressed scripts: 4 training and 2 test clips of each class."""
    folder = tmp_path_factory.mktemp("data") / "small-pairs"
    common.make_toy_dataset(folder, train=48, test=24, pairs=True)
    return folder


def decoded(data, frames):
    """All clips in the test view of the toy CLIPs -> {part: (videos (N, T, 3, 32, 32), labels)},
    and the names of the classes."""
    parts = {}
    for part in ("train", "test"):
        dataset = common.VideoDataset(getattr(data, part), frames, 37)
        batches = list(common.VideoLoader(dataset, 100))
        labels = [label for batch in batches for label in batch.label]
        videos = torch.cat([common.center_crop(batch.video, 32) for batch in batches])
        parts[part] = videos, torch.tensor(labels)
    return parts, data.classes


def predicted_top1(path):
    """Top-1 of a file of predictions, whose every line is a test video"""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return sum(row["class1"] == row["truth"] for row in rows) / len(rows)


@pytest.fixture(scope="session")
def toys(cache):
    """All toy clips of split 1, 8 frames of each, decoded once."""
    return decoded(common.load_dataset("toy", cache=cache), 8)


@pytest.fixture(scope="session")
def moves(tmp_path_factory):
    """A data set of toy clips with four motions: they are learned sooner than all six."""
    folder = tmp_path_factory.mktemp("data") / "moves"
    common.make_toy_dataset(folder, train=400, test=80, motions=tuple(common.MOTIONS)[:4])
    return folder


@pytest.fixture(scope="session")
def moving(moves):
    """The clips of `moves`, 4 frames of each, decoded once."""
    return decoded(common.load_dataset(str(moves)), 4)


@pytest.fixture(scope="session")
def shared():
    """Real clips that are not part of the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real clips beside the checkout")
    return folder


@pytest.fixture
def hmdb51(shared, tmp_path):
    """HMDB51 as released, with the few clips of it that are there"""
    root = tmp_path / "HMDB51"
    root.mkdir()
    (root / "testTrainMulti_7030_splits").symlink_to(shared / "splits/testTrainMulti_7030_splits")
    for clip in (shared / "clips").glob("*.avi"):
        name = clip.name.removeprefix("hmdb51_")
        if not name.startswith("v_"):
            folder = root / ("cartwheel" if "cartwheel" in name else "wave")
            folder.mkdir(exist_ok=True)
            (folder / name).symlink_to(clip)
    return root


@pytest.fixture(scope="session")
def run_script():
    """run_script("name.py", flag, ...) runs a script as a process of its own; -> what it did."""
    def run(*command, python=(sys.executable,), **environment):
        return subprocess.run([*python, *map(str, command)], cwd=ROOT, capture_output=True,
                              text=True, timeout=600,
                              env={**os.environ, "HF_HUB_OFFLINE": "1", **environment})
    return run


@pytest.fixture(scope="session")
def plain(run_script, moves, out):
    """tinyclip_swap.py as a process, once, on the clips of four motions -> what it printed, and the
    checkpoint of its large model, which has learned them; it sees 4 frames."""
    common.build_clip_model("toy-large", out / "cache")  # once for all tests
    done = run_script("tinyclip_swap.py", "--data", moves, "--small", "toy-small:random",
                      "--frames", 4, "--epochs", 4, "--batch-size", 16, "--out", out)
    assert done.returncode == 0, done.stderr
    return done.stdout, next(out.glob("tinyclip_swap/moves-s1-seed0-*/large-last.pt"))
