"""What fails ends in one line, and leaves what was there before."""
import contextlib
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import common
import deit_video
import pkd_compressed
import spatial_kd
import tinyclip_swap
import wise_infer
from common import BadInput

SMALL = ("--large", "toy-small:random", "--small", "toy-small:random", "--frames", "2", "--epochs",
         "3", "--batch-size", "16", "--workers", "0")


@contextlib.contextmanager
def full(size):
    """No file may grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- files


def test_a_full_disk_is_told_and_leaves_the_file_before(tmp_path, toy):
    path, big = tmp_path / "a.pt", {"w": torch.rand(100_000)}
    common.save_checkpoint(big, path)
    with pytest.raises(BadInput, match="b of w is not finite"):
        common.save_checkpoint({"w": {"b": torch.tensor(math.inf)}}, path)
    for write in (lambda: common.save_checkpoint({"w": torch.ones(100_000)}, path),
                  lambda: common.make_once(tmp_path, "toys", common.make_toy_dataset),
                  lambda: common.reencoded_copy(str(toy / "train/0000.mp4"), tmp_path / "copies")):
        match = f"{tmp_path}/.* cannot be written: File too large"
        with pytest.raises(BadInput, match=match), full(2_000):
            write()
    assert torch.equal(common.read_checkpoint(path, "w")["w"], big["w"])
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["a.pt"]


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path):
    for name, hours in (("unfinished-old", 25), ("unfinished-new", 23), ("other", 99)):
        (tmp_path / name / "part").mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)
    common.save_checkpoint({}, tmp_path / "a.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"unfinished-new", "other", "a.pt"}


@pytest.mark.parametrize("content", [b"", b"cut", b"PK\3\4"])
def test_what_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.pt is damaged, or is not"):
        common.read_checkpoint(tmp_path / "a.pt")
    common.save_checkpoint({"flags": {}}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="is not a checkpoint of this kind"):
        common.read_checkpoint(tmp_path / "a.pt", "flags", "rows")


@pytest.mark.parametrize(("error", "line"), [
    (BadInput("--views: one"), "script.py: --views: one"),
    (KeyboardInterrupt(), "interrupted; --resume RUN continues .*"),
    (torch.cuda.OutOfMemoryError("no memory"), "out of GPU memory; try a smaller --batch-size .*"),
    (PermissionError(13, "Permission denied", "out"), "script.py: .*Permission denied: 'out'"),
    (BadInput("Caught in a worker\nTraceback ...\ncommon.BadInput: a.mp4 cannot be written"),
     "script.py: common.BadInput: a.mp4 cannot be written")])
def test_a_mistake_is_one_line(monkeypatch, error, line):
    def fail():
        raise error

    monkeypatch.setattr(sys, "argv", ["/some/script.py"])
    with pytest.raises(SystemExit, match=f"^{line}$"):
        tinyclip_swap.run_cli(fail)


def test_ctrl_c_in_training_is_one_line_in_all_processes(toy, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with subprocess.Popen(
            [sys.executable, tinyclip_swap.__file__, "--data", toy, "--out", tmp_path, *SMALL,
             "--epochs", "99", "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, text=True) as process:
        while "epoch 1 " not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        *before, last = process.stderr.read().splitlines()
        assert process.wait() == 1
    assert last.startswith("interrupted; --resume RUN continues")
    assert not [line for line in before if "Traceback" in line]


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """The folder of a finished run"""
    out = tmp_path_factory.mktemp("finished")
    tinyclip_swap.main(["--data", str(toy), "--out", str(out), *SMALL])
    return next(out.glob("tinyclip_swap/*"))


def test_results_and_checkpoint_survive_a_full_disk(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    files = [file for file in folder.iterdir() if file.suffix in (".pt", ".json")]
    before = {file: file.read_bytes() for file in files}
    saved = common.read_checkpoint(folder / "large-last.pt")
    common.save_checkpoint({**saved, "history": saved["history"][:1]}, folder / "large-last.pt")
    before[folder / "large-last.pt"] = (folder / "large-last.pt").read_bytes()
    with pytest.raises(BadInput, match="cannot be written: File too large"), full(100_000):
        tinyclip_swap.main(["--resume", str(folder)])
    assert before == {file: file.read_bytes() for file in files}


def test_a_batch_needs_few_file_handles(coded):
    """Not one for each of the three tensors of a clip."""
    data, (soft, hard) = common.load_dataset(str(coded)), resource.getrlimit(resource.RLIMIT_NOFILE)
    loader = common.VideoLoader(common.CompressedDataset(data.train * 3, 1), 144, 1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert sum(len(batch.label) for batch in loader) == 144
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("damage", [
    {"model_state_dict": None}, {"model_state_dict": {}}, {"model_state_dict": "x"},
    {"fusion_model_state_dict": {"a": torch.ones(1)}}, {"optimizer": {"state": 3}}], ids=str)
def test_resume_of_a_damaged_checkpoint_is_refused(finished, tmp_path, damage):
    file = shutil.copytree(finished, tmp_path / "run") / "large-last.pt"
    torch.save({**common.read_checkpoint(file), **damage}, file)
    with pytest.raises(BadInput, match=rf"{file} does not fit {next(iter(damage))}"):
        tinyclip_swap.main(["--resume", str(file.parent)])


# ---- numbers


def test_a_loss_that_is_not_finite_ends_the_run(toy, tmp_path, monkeypatch):
    """In the second step of the second epoch; the checkpoint of the first stays."""
    loss, calls = tinyclip_swap.actionclip_loss, []

    def broken(*args):
        calls.append(args)
        return loss(*args) * (math.nan if len(calls) == 3 + 2 else 1)

    monkeypatch.setattr(tinyclip_swap, "actionclip_loss", broken)
    with pytest.raises(BadInput, match="epoch 2, batch 2: the loss is not finite"):
        tinyclip_swap.main(["--data", str(toy), "--out", str(tmp_path), *SMALL])
    saved = common.read_checkpoint(next(tmp_path.rglob("large-last.pt")), "history")
    assert len(saved["history"]) == 1
    assert all(w.isfinite().all() for w in saved["model_state_dict"].values())


@pytest.mark.parametrize(("script", "flags"), [
    (script, f"{flag} {value}") for script, flag, value in [
        *[(script, flag, value)
          for script in (tinyclip_swap, spatial_kd, deit_video, pkd_compressed)
          for flag, value in (("--seed", -1), ("--seed", 2**63), ("--lr", "nan"), ("--lr", 0),
                              ("--lr", "inf"), ("--epochs", 0), ("--batch-size", 0))],
        (spatial_kd, "--lambda", "nan"), (deit_video, "--lambda", "nan"),
        (deit_video, "--tau", "nan"), (deit_video, "--alpha", "nan"),
        (pkd_compressed, "--tau", "nan"), (pkd_compressed, "--holdout", "nan"),
        (pkd_compressed, "--exit-epochs", 0), (tinyclip_swap, "--fps", "nan"),
        (wise_infer, "--l1", "nan"), (wise_infer, "--theta", "nan"),
        (wise_infer, "--max-drop", "nan"), (deit_video, "--watch", "0")]], ids=str)
def test_flags_that_cannot_be(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse(flags.split())
    assert stop.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_few_steps_an_epoch_are_told(toy, capsys):
    clips = common.VideoDataset(common.load_dataset(str(toy)).train, 2, train=True)
    for batch in (32, 4):
        common.VideoLoader(clips, batch)
    assert capsys.readouterr().err == "only 1 steps per epoch: lower --batch-size\n"
