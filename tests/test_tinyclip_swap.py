"""tinyclip_swap.py as a user meets it: the plain command, controls, kills, processes, mistakes."""
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tinyclip_swap
from common import MOTIONS, BadInput, build_action_clip
from tinyclip_swap import affinity_loss, class_scores, main

FAST = ("--large", "toy-large:random", "--small", "toy-small:random", "--epochs", 2, "--workers", 0,
        "--batch-size", 16, "--frames", 4)


@pytest.fixture(autouse=True, scope="module")
def timed_once():
    """Tests do not time: one call instead of a second's worth. Processes of their own still do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinyclip_swap, "median_ms", lambda function, device: bool([function()]))
        yield


def go(*flags):
    return main([str(flag) for flag in flags])


def weights(folder, arm="small"):
    return torch.load(next(folder.rglob(f"{arm}-last.pt")), weights_only=True)


def same(a, b):
    return all(torch.equal(a[half][key], b[half][key]) for half in
               ("model_state_dict", "fusion_model_state_dict") for key in a[half])


def trained(out, arm, cache):
    name = {"large": "toy-large", "small": "toy-small"}[arm]
    file = out / "tinyclip_swap" / "toy-s1-seed0" / f"{arm}-last.pt"
    return build_action_clip(f"{name}:{file}", cache=cache).eval()


@torch.no_grad()
def predict(model, videos, classes):
    text = model.encode_text(model.prompts(classes))
    return torch.cat([class_scores(model.encode_video(part), text) for part in videos.split(100)]
                     ).argmax(1)


# ---- the plain command and its controls


def test_plain_command_ends_in_a_result(plain, out):
    result = re.fullmatch(r"RESULT tinyclip_swap data=toy split=1 seed=0 large=(\S+) small=(\S+) "
                          r"gmac_ratio=(\S+) seconds=\d+", plain.splitlines()[-1])
    assert float(result[1]) >= .9
    assert float(result[2]) >= .7  # chance is .167
    run = out / "tinyclip_swap" / "toy-s1-seed0"
    record = json.loads((run / "run.json").read_text())
    assert record["results"]["large"]["clips"] == 300
    assert {"argv", "flags", "commit", "machine", "versions", "seconds"} <= record.keys()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 12
    assert (run / "run.png").stat().st_size > 10_000


@pytest.mark.parametrize("text", [
    tinyclip_swap.__doc__, Path(tinyclip_swap.__file__).with_name("README.md").read_text()],
    ids=["docstring", "README"])
def test_texts_quote_a_plain_run(plain, text):
    quoted = re.search(r"^RESULT tinyclip_swap data=toy .*large=(\S+) small=(\S+)", text, re.M)
    found = re.search(r"large=(\S+) small=(\S+)", plain.splitlines()[-1])
    for arm in (1, 2):  # another machine sums in another order, so not to the last clip
        assert abs(float(quoted[arm]) - float(found[arm])) < .06


def test_one_frame_repeated_is_at_chance(toys, out, cache):
    (videos, labels), classes = toys[0]["test"], toys[1]
    still = videos[:, 4:5].expand_as(videos)
    assert (predict(trained(out, "large", cache), still, classes) == labels).float().mean() < .3


def test_reversed_clips_are_the_opposite_actions(toys, out, cache):
    (videos, labels), classes = toys[0]["test"], toys[1]
    opposite = {name: next(other for other in MOTIONS if np.allclose(
        np.add(MOTIONS[name], MOTIONS[other]), 0)) for name in MOTIONS}
    wanted = torch.tensor([classes.index(opposite[name]) for name in classes])[labels]
    said = predict(trained(out, "large", cache), videos.flip(1), classes)
    assert (said == wanted).float().mean() > .8


@pytest.mark.parametrize("untrained", [False, True])
def test_affinity_alone_takes_a_student_to_its_teacher(toys, out, cache, untrained):
    """Without labels: texts of shuffled classes, no kl_pair. A swap of the roles cannot pass, and a
    teacher that knows nothing leaves the student at chance."""
    (videos, _), (tests, labels), classes = *toys[0].values(), toys[1]
    torch.manual_seed(0)
    teacher = trained(out, "large", cache)
    if untrained:
        teacher.fusion.apply(lambda module: [w.data.normal_(std=.1) for w in module.parameters()])
    student = build_action_clip("toy-small", cache=cache)
    steps = (3 if untrained else 8) * 37
    optimizer, schedule = tinyclip_swap.make_optimizer(student, 4e-4, steps)
    with torch.no_grad():
        v_all = torch.cat([teacher.encode_video(part) for part in videos.split(100)])
        t_all = teacher.encode_text(teacher.prompts(classes)[12])               # (K, D)
    tokens, rng = student.prompts(classes)[12], np.random.default_rng(0)
    for step in range(steps):
        if step % 37 == 0:
            order = torch.from_numpy(rng.permutation(len(videos)))
        pick, words = order[step % 37 * 32:][:32], torch.from_numpy(rng.integers(6, size=32))
        v, t, scale = student(videos[pick], tokens)
        affinity_loss(v, t[words], v_all[pick], t_all[words], scale, 50.).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    student.eval()
    right = (predict(student, tests, classes) == labels).float().mean()
    assert right < .35 if untrained else right > .8, right


# ---- the same numbers again


def test_same_command_gives_the_same_numbers(toy, tmp_path):
    first, second = (go("--data", toy, *FAST, "--out", tmp_path / name) for name in "ab")
    assert [r["top1"] for r in first.values()] == [r["top1"] for r in second.values()]
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_seed_changes_the_run(toy, tmp_path):
    for seed in (0, 1):
        go("--data", toy, *FAST, "--out", tmp_path / str(seed), "--seed", seed)
    assert not same(weights(tmp_path / "0"), weights(tmp_path / "1"))


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The folder of a run of three arms."""
    out = tmp_path_factory.mktemp("whole")
    go("--data", toy, *FAST, "--recover", "affinity", "--out", out)
    return out


@pytest.mark.parametrize("batch", [2, 5, 8])  # in the first arm, between its epochs, in the second
def test_killed_in_an_epoch_and_resumed_ends_the_same(toy, whole, tmp_path, monkeypatch, batch):
    flags = ("--data", toy, *FAST, "--recover", "affinity")
    augment, calls = tinyclip_swap.augment, []

    def killed(*given):
        calls.append(0)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return augment(*given)

    monkeypatch.setattr(tinyclip_swap, "augment", killed)
    with pytest.raises(KeyboardInterrupt):
        go(*flags, "--out", tmp_path / "cut")
    monkeypatch.undo()
    go(*flags, "--out", tmp_path / "cut", "--resume")
    for arm in ("large", "small", "small+affinity"):
        assert same(weights(whole, arm), weights(tmp_path / "cut", arm))
    rows = [[json.loads(line) for line in next(folder.rglob("metrics.jsonl")).open()]
            for folder in (whole, tmp_path / "cut")]
    assert [(r["arm"], r["epoch"], r["kl_pair"]) for r in rows[0]] == \
        [(r["arm"], r["epoch"], r["kl_pair"]) for r in rows[1]]


def test_two_processes_follow_the_loss_curve_of_one(toy, whole, tmp_path, run_script):
    flags = ("--data", toy, *FAST, "--recover", "affinity")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = run_script("tinyclip_swap.py", *flags, "--out", tmp_path / "two", OMP_NUM_THREADS="1",
                      python=torchrun)
    assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in next(folder.rglob("metrics.jsonl")).open()]
                for folder in (whole, tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert a["kl_pair"] == pytest.approx(b["kl_pair"], rel=2e-3)
        assert a["affinity"] == pytest.approx(b["affinity"], rel=2e-3)


# ---- flags


def test_eval_only_gives_the_number_of_the_run(plain, out):
    folder = out / "tinyclip_swap" / "toy-s1-seed0"
    before = json.loads((folder / "run.json").read_text())["results"]
    for arm in ("large", "small"):
        found = go("--out", out, "--workers", 0, "--eval-only", folder / f"{arm}-last.pt")
        assert found[arm]["top1"] == pytest.approx(before[arm]["top1"], abs=.007)  # threads differ
    assert (folder / "run.json").exists()


def test_mean_head_and_dense_windows(toy, tmp_path):
    found = go("--data", toy, *FAST, "--out", tmp_path, "--fusion-layers", 0, "--sampling", "dense",
               "--views", 3)
    assert found["large"]["fusion"] == 0
    assert found["large"]["clips"] == 24


def test_fixed_text_tower_stays(toy, tmp_path):
    go("--data", toy, *FAST, "--out", tmp_path, "--fix-text")
    torch.manual_seed(0)
    start, end = build_action_clip("toy-small:random").clip.state_dict(), weights(tmp_path)
    moved = {key for key, value in end["model_state_dict"].items()
             if not torch.equal(value, start[key])}
    assert moved
    assert all(key.startswith("visual.") or key == "logit_scale" for key in moved)


def test_missed_target_exits_with_one(toy, tmp_path):
    with pytest.raises(SystemExit) as stop:
        go("--data", toy, *FAST, "--out", tmp_path, "--target", 1.01)
    assert stop.value.code == 1


def test_optimizer_does_not_decay_norms_biases_embeddings_and_scales():
    model = build_action_clip("toy-small:random")
    optimizer, _ = tinyclip_swap.make_optimizer(model, 1e-3, 10)
    names = {weight: name for name, weight in model.named_parameters()}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            spared = weight.ndim < 2 or "embedding" in names[weight]
            assert group["weight_decay"] == (0 if spared else .2)
            assert (group["initial_lr"] > 2e-3) == names[weight].startswith("fusion.")


def test_gmac_are_those_of_the_tinyclip_page():
    """Image tower of TinyCLIP-ViT-40M-32: 2.00 GMAC a frame; the fusion head: .15 a clip."""
    args = tinyclip_swap.parse(["--frames", "1"])
    model = build_action_clip("TinyCLIP-ViT-40M-32-Text-19M:random")
    gmac, gflop = tinyclip_swap.count_operations(model, args, torch.device("cpu"))
    assert gmac == pytest.approx(2.00 + .15 / 8, abs=.01)
    assert gflop > 3 * 2 * gmac * .9  # a backward pass is two forward ones; and there is the text


# ---- real clips


def test_weizmann_reports_every_test_clip(shared, out):
    found = go("--data", shared / "weizmann", "--epochs", 1, "--workers", 0, "--out", out)
    assert {r["clips"] for r in found.values()} == {30}


def test_hmdb51_as_released_runs_on_the_clips_that_are_there(shared, tmp_path, out, capsys):
    root = tmp_path / "HMDB51"
    root.mkdir()
    (root / "testTrainMulti_7030_splits").symlink_to(shared / "splits/testTrainMulti_7030_splits")
    for clip in (shared / "clips").glob("*.avi"):
        name = clip.name.removeprefix("hmdb51_")
        if not name.startswith("v_"):
            folder = root / ("cartwheel" if "cartwheel" in name else "wave")
            folder.mkdir(exist_ok=True)
            (folder / name).symlink_to(clip)
    flags = ("--data", root, "--epochs", 1, "--workers", 0, "--out", out)
    with pytest.raises(BadInput, match="5097 of 5100 listed clips are missing"):
        go(*flags)
    found = go(*flags, "--allow-missing")
    assert found["large"]["clips"] == 1
    printed = capsys.readouterr().out
    assert "NOTE 5097 listed clips are missing" in printed
    assert "NOTE 49 classes have no training clip" in printed


def test_bad_clips_are_named_once_and_counted(toy, tmp_path, capsys):
    folder = tmp_path / "some-bad"
    shutil.copytree(toy, folder)
    for name in ("train/0003.mp4", "test/0004.mp4"):
        (folder / name).write_text("no video")
    found = go("--data", folder, *FAST, "--out", tmp_path)
    assert {r["clips"] for r in found.values()} == {24}
    printed = capsys.readouterr()
    for name in ("train/0003.mp4", "test/0004.mp4"):
        assert printed.err.count(f"cannot decode {folder / name}") == 1
    assert "NOTE 1 training clips cannot be decoded" in printed.out
    assert "NOTE 1 test clips cannot be decoded and count as wrong" in printed.out


# ---- mistakes: one line, exit code 2, nothing written over


def test_a_mistake_is_one_line_and_exit_code_two(run_script, tmp_path, cache, toys):
    (tmp_path / "cache").symlink_to(cache)
    done = run_script("tinyclip_swap.py", "--out", tmp_path, "--large", "toy-huge")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "tinyclip_swap").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (("--large", "ViT-B-33"), "nearest names"),
    (("--large", "ViT-B-32:laion9"), "laion2b_s34b_b79k"),
    (("--small", "TinyCLIP-ViT-40M-32-Text-19M:gone.pt"), "no file"),
    (("--small", "TinyCLIP-auto-ViT-63M-32-Text-31M"), "these six"),
    (("--eval-only", "gone.pt"), "no such file"),
    (("--data", "gone"), "no such folder"),
    (("--split", "3"), "split 3"),
    (("--resume",), "start one without"),
])
def test_mistakes_say_what_would_be_right(toy, tmp_path, flags, message):
    with pytest.raises(BadInput, match=message):
        go("--data", toy, *FAST, "--out", tmp_path, *flags)
    assert not list(tmp_path.rglob("run.json"))


def test_resume_with_other_flags_is_refused_and_harms_nothing(toy, tmp_path):
    go("--data", toy, *FAST, "--out", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match=r"--lr None, now 0\.1"):
        go("--data", toy, *FAST, "--out", tmp_path, "--resume", "--lr", .1)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_model_is_refused(toy, tmp_path):
    go("--data", toy, *FAST, "--out", tmp_path)
    file = next(tmp_path.rglob("small-last.pt"))
    with pytest.raises(BadInput, match="holds toy-small"):
        go("--data", toy, "--large", "ViT-B-32", "--small", "ViT-B-16", "--eval-only", file)
    with pytest.raises(BadInput, match="fusion head of 2 layers"):
        go("--data", toy, "--eval-only", file, "--fusion-layers", 2, "--out", tmp_path)
