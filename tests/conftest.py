"""Fixtures that several test files share. One thread: two beside another process are slower."""
import csv
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import common
import deit_video
import tinyclip_swap

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="session")
def benchmark_once():
    """Benchmarks call what they measure once."""
    with pytest.MonkeyPatch.context() as patch:
        for script in (tinyclip_swap, deit_video):
            patch.setattr(script, "median_ms", lambda function: float(len(function())))
        yield


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


def run_process(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True, timeout=600,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                               "PYTHONPATH": str(ROOT)})


@pytest.fixture(autouse=True, scope="session")
def processes(request):
    """What `plain` and `two_processes` wait for starts before the first test, and runs beside the
    tests that do not need it -> {name: future}"""
    wanted = {name for item in request.session.items for name in item.fixturenames}
    pool = ThreadPoolExecutor(1)
    return {name: pool.submit(run_process, *request.getfixturevalue(f"{name}_command"))
            for name in ("plain", "two_processes") if name in wanted}


SAME = "--epochs 2 --workers 0 --batch-size 16 --frames 4 --grad-checkpointing --test-every 2"
PARALLEL = {  # flags of each training script beside --data and --out
    "tinyclip_swap.py": f"--large toy-large:random --small toy-small:random {SAME} --affinity",
    "spatial_kd.py": f"--student toy-small:random --labeller toy-small:random {SAME} "
                     "--variants spatial",
    "deit_video.py": f"--teacher toy-small:random --student toy-small:random {SAME} "
                     "--variants two_heads_soft two_heads_hard",
    "pkd_compressed.py": "--networks toy toy toy --size 32 --workers 0 --batch-size 12 "
                         "--segments 1 --epochs 2 --exit-epochs 3 --schedules progressive"}
ONE_AFTER_THE_OTHER = """
import functools, json, os, runpy, sys
import torch.distributed as dist
join, rank = dist.init_process_group, int(os.environ["RANK"])
for number, sys.argv in enumerate(json.loads(sys.argv[1])):
    runpy.run_path(sys.argv[0], run_name="__main__")
    # torchrun's own meeting place serves one group of processes: the next ones meet in a file
    dist.init_process_group = functools.partial(
        join, init_method=f"file://{__file__}.{number}", rank=rank, world_size=2)
"""


@pytest.fixture(scope="session")
def parallel(tmp_path_factory):
    """The --out folder of two_processes"""
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="session")
def two_processes_command(toy, coded, parallel):
    (parallel / "scripts.py").write_text(ONE_AFTER_THE_OTHER)
    commands = [[script, "--data", str(coded if "pkd" in script else toy), "--out", str(parallel),
                 *flags.split()] for script, flags in PARALLEL.items()]
    torchrun = "-m", "torch.distributed.run", "--nproc-per-node", "2"
    return *torchrun, parallel / "scripts.py", json.dumps(commands)


@pytest.fixture(scope="session")
def two_processes(processes, parallel):
    """The training scripts under one torchrun with two processes, which need to import PyTorch only
    once -> {script: what it printed}, and the --out folder"""
    done = processes["two_processes"].result()
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"^run: .*?\nRESULT [^\n]*$", done.stdout, re.M | re.S)
    assert "\n".join(printed) == done.stdout.strip()
    return dict(zip(PARALLEL, printed, strict=True)), parallel


@pytest.fixture(scope="session")
def plain_command(moves, out):
    return ("tinyclip_swap.py", "--data", moves, "--small", "toy-small:random", "--frames", 4,
            "--epochs", 4, "--batch-size", 16, "--out", out)


@pytest.fixture(scope="session")
def plain(processes, out):
    """tinyclip_swap.py as a process, once, on the clips of four motions -> what it printed, and the
    checkpoint of its large model, which has learned them; it sees 4 frames. It leaves the toy CLIP
    in the cache."""
    done = processes["plain"].result()
    assert done.returncode == 0, done.stderr
    return done.stdout, next(out.glob("tinyclip_swap/moves-s1-seed0-*/large-last.pt"))
