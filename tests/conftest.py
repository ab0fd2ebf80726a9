"""Fixtures that several test files share. One thread: two beside another process are slower."""
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
    common.make_toy_folder(folder, train=48, test=24)
    return folder


@pytest.fixture(scope="session")
def toys(cache):
    """All toy clips of split 1 in the test view of the toy CLIPs, decoded once:
    {part: (videos (N, 8, 3, 32, 32), labels)}, and the names of the classes."""
    data, parts = common.read_data("toy", cache=cache), {}
    for part in ("train", "test"):
        clips = common.Clips(getattr(data, part), 8, 37)
        batches = list(common.clip_loader(clips, 100))
        parts[part] = (torch.cat([common.centre_crop(batch.video, 32) for batch in batches]),
                       torch.tensor([label for batch in batches for label in batch.label]))
    return parts, data.classes


@pytest.fixture(scope="session")
def shared():
    """Real clips that are not part of the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real clips beside the checkout")
    return folder


@pytest.fixture(scope="session")
def run_script():
    """run_script("name.py", flag, ...) runs a script as a process of its own; -> what it did."""
    def run(*command, python=(sys.executable,), **environment):
        return subprocess.run([*python, *map(str, command)], cwd=ROOT, capture_output=True,
                              text=True, timeout=600,
                              env={**os.environ, "HF_HUB_OFFLINE": "1", **environment})
    return run


@pytest.fixture(scope="session")
def plain(run_script, out):
    """The plain command of tinyclip_swap.py, once, as a process; what it printed. It leaves a large
    and a small model trained on the toy clips."""
    done = run_script("tinyclip_swap.py", "--out", out)
    assert done.returncode == 0, done.stderr
    return done.stdout
