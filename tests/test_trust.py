"""What fails ends in one line, and leaves what was there before."""
import contextlib
import math
import os
import re
import resource
import signal
import subprocess
import sys

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
    common.save(big, path)
    with pytest.raises(BadInput, match="b of w is not finite"):
        common.save({"w": {"b": torch.tensor(math.inf)}}, path)
    for write in (lambda: common.save({"w": torch.ones(100_000)}, path),
                  lambda: common.cached(tmp_path, "toys", common.make_toy_folder),
                  lambda: common.coded_copy(str(toy / "train/0000.mp4"), tmp_path / "copies")):
        match = f"{tmp_path}/.* cannot be written: File too large"
        with pytest.raises(BadInput, match=match), full(2_000):
            write()
    assert torch.equal(common.read_saved(path, "w")["w"], big["w"])
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["a.pt"]


@pytest.mark.parametrize("content", [b"", b"cut", b"PK\3\4"])
def test_what_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.pt was cut off.*remove it"):
        common.read_saved(tmp_path / "a.pt")
    common.save({"flags": {}}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match=r"another kind of file"):
        common.read_saved(tmp_path / "a.pt", "flags", "rows")


@pytest.mark.parametrize(("error", "code", "line"), [
    (BadInput("--views: one"), 2, "--views: one"), (KeyboardInterrupt(), 130, "interrupted; .*"),
    (PermissionError(13, "Permission denied", "out"), 2, ".*Permission denied: 'out'"),
    (BadInput("Caught in a worker\nTraceback ...\ncommon.BadInput: a.mp4 cannot be written"), 2,
     "a.mp4 cannot be written"),
    (RuntimeError("DataLoader timed out"), 2, "DataLoader timed out")])
def test_a_mistake_is_one_line(monkeypatch, capsys, error, code, line):
    def fail():
        raise error

    monkeypatch.setattr(sys, "argv", ["/some/script.py"])
    with pytest.raises(SystemExit) as stop:
        common.run(fail)
    assert stop.value.code == code
    assert re.fullmatch(f"script.py: {line}\n", capsys.readouterr().err)


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
        assert process.wait() == 130
    assert last.startswith("tinyclip_swap.py: interrupted; --resume goes on")
    assert not [line for line in before if "Traceback" in line]


def test_a_record_and_a_checkpoint_of_the_run_before_stay_where_the_disk_is_full(toy, tmp_path):
    flags = ["--data", str(toy), "--out", str(tmp_path), *SMALL]
    tinyclip_swap.main(flags)
    files = [file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".json")]
    before = {file: file.read_bytes() for file in files}
    with pytest.raises(BadInput, match="cannot be written: File too large"), full(100_000):
        tinyclip_swap.main(flags)
    assert before == {file: file.read_bytes() for file in files}


def test_a_batch_needs_few_file_handles(coded):
    """Not one for each of the three tensors of a clip."""
    data, (soft, hard) = common.read_data(str(coded)), resource.getrlimit(resource.RLIMIT_NOFILE)
    loader = common.ClipLoader(common.Clips(data.train * 3, 1, None, "coded"), 144, 1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert sum(len(batch.label) for batch in loader) == 144
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("damage", [
    {"model_state_dict": None}, {"model_state_dict": {}}, {"model_state_dict": "x"},
    {"fusion_model_state_dict": {"a": torch.ones(1)}}, {"optimizer": {"state": 3}}], ids=str)
def test_resume_of_a_damaged_checkpoint_is_refused(toy, tmp_path, damage):
    flags = ["--data", str(toy), "--out", str(tmp_path), *SMALL]
    tinyclip_swap.main(flags)
    file = next(tmp_path.rglob("large-last.pt"))
    torch.save({**common.read_saved(file), **damage}, file)
    with pytest.raises(BadInput, match=rf"{file} does not fit {next(iter(damage))}"):
        tinyclip_swap.main([*flags, "--resume"])


# ---- numbers


def test_a_loss_that_is_not_finite_ends_the_run_and_names_clips(toy, tmp_path, monkeypatch):
    """In the second step of the second epoch; the checkpoint of the first stays."""
    loss, calls, flags = tinyclip_swap.kl_pair, [], ["--data", str(toy), "--out", str(tmp_path)]

    def broken(*given):
        calls.append(given)
        return loss(*given) * (math.nan if len(calls) == 3 + 2 else 1)

    monkeypatch.setattr(tinyclip_swap, "kl_pair", broken)
    with pytest.raises(BadInput, match=rf"epoch 2, batch 2 of 3.* clips, {toy}/train/\d+\.mp4"):
        tinyclip_swap.main([*flags, *SMALL])
    saved = common.read_saved(next(tmp_path.rglob("large-last.pt")), "rows")
    assert len(saved["rows"]) == 1
    assert all(w.isfinite().all() for w in saved["model_state_dict"].values())


@pytest.mark.parametrize(("script", "flags"), [
    (script, f"{flag} {value}") for script, flag, value in [
        *[(script, flag, value)
          for script in (tinyclip_swap, spatial_kd, deit_video, pkd_compressed)
          for flag, value in (("--seed", -1), ("--workers", -1), ("--lr", "nan"), ("--lr", 0),
                              ("--lr", "inf"), ("--epochs", 0), ("--batch-size", 0))],
        (spatial_kd, "--lambda", "nan"), (deit_video, "--lambda", "nan"),
        (deit_video, "--tau", "nan"), (deit_video, "--alpha", "nan"),
        (pkd_compressed, "--tau", "nan"), (pkd_compressed, "--holdout", "nan"),
        (pkd_compressed, "--exit-epochs", 0), (tinyclip_swap, "--fps", "nan"),
        (wise_infer, "--l1", "nan"), (wise_infer, "--theta", "nan"),
        (wise_infer, "--max-loss", "nan")]], ids=str)
def test_flags_that_cannot_be(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse(flags.split())
    assert stop.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_few_steps_an_epoch_are_told(toy, capsys):
    clips = common.Clips(common.read_data(str(toy)).train, 2, train=True)
    for batch in (32, 4):
        common.ClipLoader(clips, batch)
    assert capsys.readouterr().err == "only 1 steps an epoch: lower --batch-size\n"


def test_several_splits_and_seeds(toy, tmp_path, capsys):
    """Each run is that of the command with its own --split and --seed."""
    for name, (part, split) in {"train1": ("train", 1), "test1": ("test", 1), "train2":
                                ("test", 1), "test2": ("train", 1), "train3": ("train", 1),
                                "test3": ("test", 2)}.items():
        rows = (toy / f"{part}{split}.csv").read_text()
        (tmp_path / f"{name}.csv").write_text(re.sub(r"^(?=\w+/)", f"{toy}/", rows, flags=re.M))
    flags = ["--data", str(tmp_path), *SMALL[:-6], "--epochs", "1", "--batch-size", "12",
             "--workers", "0", "--out", str(tmp_path / "runs"), "--frames", "2"]
    found = tinyclip_swap.main([*flags, "--split", "all", "--seed", "3"])
    assert capsys.readouterr().out.count("RESULT") == 3
    alone = tinyclip_swap.main([*flags, "--split", "2", "--seed", "3"])
    assert found["small"][1] == alone["small"]["top1"]
    assert len(list(tmp_path.glob("runs/tinyclip_swap/*"))) == 3
