"""tinyclip_swap.py as a user meets it: the plain command, controls, kills, processes, mistakes."""
import json
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import tinyclip_swap
from tinyclip_swap import affinity_loss, class_cross_entropy, class_scores, main

SMALL = ("--large", "toy-large:random", "--small", "toy-small:random", "--epochs", 2, "--workers",
         0, "--batch-size", 16, "--frames", 4)


@pytest.fixture(autouse=True, scope="module")
def timed_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinyclip_swap, "milliseconds", lambda function: float(len(function())))
        yield


def go(*flags):
    return main([str(flag) for flag in flags])


def weights(folder, arm):
    saved = torch.load(next(folder.rglob(f"{arm}-last.pt")), weights_only=True)
    return [*saved["model_state_dict"].values(), *saved["fusion_model_state_dict"].values()]


def rows(folder):
    lines = next(folder.rglob("metrics.jsonl")).read_text().splitlines()
    return [json.loads(line) for line in lines]


@torch.no_grad()
def predict(model, videos, classes):
    return class_scores(model.encode_video(videos), model.embed_classes(classes)).argmax(1)


# ---- the plain command and its controls


def test_the_plain_command_learns_and_ends_in_a_result(plain):
    printed, checkpoint = plain
    result = re.fullmatch(r"RESULT tinyclip_swap data=moves split=1 seed=0 large=(\S+) small=\S+ "
                          r"gmac_ratio=0\.48\d seconds=\d+", printed.splitlines()[-1])
    assert float(result[1]) >= .9  # chance is .25
    record = json.loads(checkpoint.with_name("run.json").read_text())
    assert float(result[1]) == pytest.approx(record["results"]["large"]["top1"])
    assert {"flags", "machine", "versions", "seconds"} <= record.keys()
    assert len(rows(checkpoint.parent)) == 8
    assert checkpoint.with_name("accuracy.png").stat().st_size > 10_000


def test_order_is_what_the_model_has_learned(plain, moving):
    """A clip played backwards is the opposite action; one frame repeated is none."""
    model = common.build_action_clip("toy-large", checkpoint=plain[1])
    (videos, labels), classes = moving[0]["test"], moving[1]
    assert classes == ["moving down", "moving left", "moving right", "moving up"]
    opposite = torch.tensor([3, 2, 1, 0])[labels]
    backwards = predict(model, videos.flip(1), classes)
    assert (backwards == opposite).float().mean() > .8
    still = predict(model, videos[:, 2:3].expand_as(videos), classes)
    assert (still == labels).float().mean() < .35


@pytest.mark.parametrize("trained", [True, False])
def test_affinity_alone_takes_a_student_to_its_teacher(plain, moving, cache, trained):
    """Without labels: texts of shuffled classes, no kl_pair. A swap of the roles cannot pass, and a
    teacher that knows nothing leaves the student at chance."""
    (videos, _), (tests, labels), classes = *moving[0].values(), moving[1]
    torch.manual_seed(0)
    checkpoint = plain[1] if trained else None
    teacher = common.build_action_clip("toy-large", 6, cache, checkpoint=checkpoint).eval()
    student, rng = common.build_action_clip("toy-large", 6, cache), np.random.default_rng(0)
    optimizer, schedule = tinyclip_swap.make_optimizer(student, 4e-4, 4 * 25)
    with torch.no_grad():
        v_t, t_t = teacher.encode_video(videos), teacher.embed_classes(classes)[12]
    tokens = student.prompts(classes)[12]
    for _ in range(4):
        for pick in torch.from_numpy(rng.permutation(len(videos))).split(16):
            words = rng.integers(4, size=len(pick))
            v, t, scale = student(videos[pick], tokens)
            affinity_loss(v, t[words], v_t[pick], t_t[words], scale, 50.).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    right = (predict(student, tests, classes) == labels).float().mean()
    assert right > .8 if trained else right < .35, right


# ---- the same numbers again


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The folder of a run of three arms, and its numbers."""
    out = tmp_path_factory.mktemp("whole")
    return out, go("--data", toy, *SMALL, "--recover", "affinity", "--out", out)


@pytest.mark.parametrize("batch", [2, 4, 8], ids=[
    "in the first epoch, so all of it is done again", "between epochs", "in the second arm"])
def test_a_killed_run_is_resumed_to_the_same_weights(toy, whole, tmp_path, monkeypatch, batch):
    flags = ("--data", toy, *SMALL, "--out", tmp_path)
    view, calls = common.training_view, []

    def killed(*given):
        calls.append(given)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return view(*given)

    monkeypatch.setattr(common, "training_view", killed)
    with pytest.raises(KeyboardInterrupt):
        go(*flags)
    monkeypatch.undo()
    found = go(*flags, "--resume")
    for arm, numbers in found.items():
        assert numbers["top1"] == whole[1][arm]["top1"]
        assert all(map(torch.equal, weights(whole[0], arm), weights(tmp_path, arm)))
    for a, b in zip(rows(whole[0]), rows(tmp_path), strict=False):  # that one has a third arm
        assert {**a, "clips_per_s": 0} == {**b, "clips_per_s": 0}


def test_two_processes_follow_the_loss_curve_of_one(toy, whole, tmp_path, run_script):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = run_script("tinyclip_swap.py", "--data", toy, *SMALL, "--recover", "affinity", "--out",
                      tmp_path, OMP_NUM_THREADS="1", python=torchrun)
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows(whole[0]), rows(tmp_path), strict=True):
        assert one["kl_pair"] == pytest.approx(two["kl_pair"], rel=2e-3)
        assert one["affinity"] == pytest.approx(two["affinity"], rel=2e-3)
    assert next(tmp_path.rglob("affinity.png")).stat().st_size > 1000


@pytest.mark.parametrize("what", ["flags", "data"])
def test_other_flags_or_clips_have_a_folder_of_their_own(toy, whole, tmp_path, capsys, what):
    folder, more = toy, ("--lr", .1)
    if what == "data":
        folder, more = tmp_path / toy.name, ()
        shutil.copytree(toy, folder)
        for file in folder.glob("*.csv"):
            file.write_text(file.read_text().replace("growing", "coming"))
    before = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}
    go("--data", folder, *SMALL, "--recover", "affinity", "--out", whole[0], "--resume", *more)
    assert "--resume: no run with these clips and flags" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}
    assert before.items() < after.items()
    shutil.rmtree({path.parent for path in after.keys() - before.keys()}.pop())  # others look there


# ---- --compare


def test_class_cross_entropy_is_that_of_vifi_clip_and_text4vis():
    """Their code, and the gradient in closed form."""
    torch.manual_seed(0)
    v, t = torch.randn(5, 7).double(), torch.randn(3, 7).double()
    labels, found = torch.tensor([0, 2, 1, 2, 2]), []
    for ours in (False, True):
        leaves = [x.clone().requires_grad_() for x in (v, t, torch.tensor(2.).double())]
        video, text, logit_scale = leaves
        if ours:
            loss = class_cross_entropy(video, text, labels, logit_scale.exp())
        else:
            video = video / video.norm(dim=-1, keepdim=True)
            text = text / text.norm(dim=-1, keepdim=True)
            z = logit_scale.exp() * video @ text.t()
            loss = F.cross_entropy(z, labels)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    dz = (z.softmax(1) - F.one_hot(labels)) / len(v)
    assert torch.allclose(found[1][3], (dz * z).sum(), rtol=1e-12)


def test_heads_are_those_of_vifi_clip_and_text4vis():
    f, head = torch.randn(2, 4, 64), common.FusionHead(64, 4, position_std=.5)
    x = f + head.frame_position_embeddings(torch.arange(4))
    for block in head.transformer.resblocks:
        n = block.ln_1(x)
        x = x + block.attn(n, n, n, need_weights=False)[0]
        x = x + block.mlp(block.ln_2(x))
    assert len(head.transformer.resblocks) == 6
    assert torch.allclose(head(f), (x + f).mean(1), atol=1e-5)
    assert torch.equal(common.MeanHead()(f), f.mean(1))


@pytest.fixture(scope="module")
def compared(toy, tmp_path_factory):
    """The folder of a run of four models, and its numbers."""
    out = tmp_path_factory.mktemp("compared")
    return out, go("--data", toy, *SMALL, "--compare", "--out", out)


def test_compare_trains_what_it_says(toy, whole, compared):
    out, found = compared
    assert list(found) == ["actionclip", "vifi-clip", "text4vis", "zero-shot"]
    assert found["vifi-clip"]["GMAC"] == found["zero-shot"]["GMAC"] < found["text4vis"]["GMAC"]
    assert all(map(torch.equal, weights(out, "actionclip"), weights(whole[0], "large")))
    args = tinyclip_swap.parse([*map(str, SMALL), "--data", str(toy), "--compare"])
    for arm, moves in (("vifi-clip", True), ("text4vis", False)):
        first = tinyclip_swap.build_arm(arm, args).clip.state_dict()
        saved = torch.load(next(out.rglob(f"{arm}-last.pt")), weights_only=True)
        moved = {name for name, x in saved["model_state_dict"].items()
                 if not torch.equal(x, first[name])}
        assert {"visual.proj", "logit_scale"} <= moved
        assert any(not name.startswith(("visual.", "logit_scale")) for name in moved) == moves
    untrained = tinyclip_swap.build_arm("zero-shot", args)
    alone = tinyclip_swap.evaluate(untrained, common.read_data(str(toy)), args)
    assert alone == [found["zero-shot"]["top1"], found["zero-shot"]["top5"]]
    assert not list(out.rglob("zero-shot-last.pt"))


@pytest.mark.parametrize("arm", ["vifi-clip", "text4vis"])
def test_its_checkpoints_know_head_and_sentence(toy, compared, tmp_path, monkeypatch, arm):
    """And a run that has finished is resumed to the same numbers."""
    asked, prompts = [], common.ActionCLIP.prompts

    def spied(model, classes, templates=None):
        asked.append(len(templates or model.templates))
        return prompts(model, classes, templates)

    monkeypatch.setattr(common.ActionCLIP, "prompts", spied)
    out, found = compared
    alone = go("--data", toy, "--workers", 0, "--out", tmp_path, "--eval-only",
               next(out.rglob(f"{arm}-last.pt")))["checkpoint"]
    assert set(asked) == {1}
    for key in ("top1", "top5", "GMAC", "M"):
        assert alone[key] == found[arm][key]
    if arm == "text4vis":
        again = go("--data", toy, *SMALL, "--compare", "--out", out, "--resume")
        assert again[arm]["top1"] == alone["top1"]


# ---- checkpoints


def test_eval_only_gives_the_number_of_the_run_with_its_frames(plain, moves, out):
    found = go("--data", moves, "--out", out, "--workers", 0, "--eval-only", plain[1])
    records = [json.loads(path.read_text()) for path in out.rglob("moves*/run.json")]
    record, = (r for r in records if "large" in r["results"])
    again, = (r for r in records if r["flags"]["checkpoint"])
    assert found["checkpoint"]["top1"] == record["results"]["large"]["top1"]
    assert found["checkpoint"]["GMAC"] == record["results"]["large"]["GMAC"]
    assert again["flags"]["frames"] == 4  # the flag's default is 8


def test_an_official_checkpoint_is_tested_with_its_own_class_names(toy, tmp_path, monkeypatch):
    """ActionCLIP's has no backbone in it; UCF101's names are in its own spelling."""
    model, root = common.build_action_clip("toy-small:random"), tmp_path / "UCF101"
    torch.save({f"{name}_state_dict": {f"module.{key}": x for key, x in part.state_dict().items()}
                for name, part in (("model", model.clip), ("fusion_model", model.fusion))},
               tmp_path / "official.pt")
    (root / "ucfTrainTestlist").mkdir(parents=True)
    for part in ("train", "test"):
        clips = [f"{name}/{part}.mp4" for name in ("ApplyEyeMakeup", "YoYo")]
        (root / "ucfTrainTestlist" / f"{part}list01.txt").write_text("\n".join(clips))
        for i, clip in enumerate(clips):
            (root / clip).parent.mkdir(exist_ok=True)
            shutil.copy(toy / part / f"000{i}.mp4", root / clip)
    asked, prompts = [], common.ActionCLIP.prompts

    def spied(model, classes, *more):
        asked.append(classes)
        return prompts(model, classes, *more)

    monkeypatch.setattr(common.ActionCLIP, "prompts", spied)
    found = go("--data", root, "--large", "toy-small", "--workers", 0, "--out", tmp_path,
               "--eval-only", tmp_path / "official.pt")
    assert found["checkpoint"]["backbone"] == "toy-small"
    assert set(map(tuple, asked)) == {("ApplyEyeMakeup", "YoYo")}


# ---- parts


def test_norms_biases_embeddings_and_scales_do_not_decay_and_new_layers_learn_faster():
    model = common.build_action_clip("toy-small:random")
    optimizer, _ = tinyclip_swap.make_optimizer(model, 1e-3, 10)
    names = {weight: name for name, weight in model.named_parameters()}
    groups = {names[w]: group for group in optimizer.param_groups for w in group["params"]}
    assert groups.keys() == set(names.values())
    for weight, name in names.items():
        spared = weight.ndim < 2 or "embedding" in name
        assert groups[name]["weight_decay"] == (0 if spared else .2)
        fast = name.startswith("fusion.")
        assert groups[name]["initial_lr"] == pytest.approx(1e-2 if fast else 1e-3)


def test_gmac_and_millions_are_those_of_the_tinyclip_page():
    """TinyCLIP-ViT-40M-32 has 39.7 M in its image tower, which takes 2.00 GMAC a frame, and 19.2 M
    in its text tower. Six layers of width 512 with 77 positions are added."""
    model = common.build_action_clip("TinyCLIP-ViT-40M-32-Text-19M:random")
    size = model.millions()
    assert size == pytest.approx(39.692 + 19.217 + 6 * 3.152 + .039, abs=.01)
    assert model.gmac(1) == pytest.approx(2.00 + .019, abs=.01)
    assert model.gmac(1) == model.requires_grad_(False).gmac(1)
    assert model.millions() == size


# ---- data


def test_bad_clips_are_named_once_and_counted_as_wrong(toy, tmp_path, capsys):
    """Here with three windows of a clip."""
    folder = tmp_path / "some-bad"
    shutil.copytree(toy, folder)
    for name in ("train/0003.mp4", "test/0004.mp4"):
        (folder / name).write_text("no video")
    found = go("--data", folder, *SMALL, "--out", tmp_path, "--sampling", "dense", "--views", 3)
    printed = capsys.readouterr()
    for name in ("train/0003.mp4", "test/0004.mp4"):
        assert printed.err.count(f"cannot decode {folder / name}") == 1
    assert "\n24 test clips;" in printed.out
    assert "NOTE 2 clips cannot be decoded; test clips among them count as wrong" in printed.out
    model = common.build_action_clip("toy-small", checkpoint=next(tmp_path.rglob("small-*.pt")))
    assert found["small"]["M"] == model.millions()
    assert found["small"]["GMAC"] == 3 * model.gmac(4)
    data = common.read_data(str(folder))
    batch = next(iter(common.ClipLoader(common.Clips(data.test, 4, model.side, "dense", 3), 24)))
    windows = common.centre_crop(batch.video, model.size).view(24 * 3, 4, 3, 32, 32)
    with torch.no_grad():
        p = class_scores(model.encode_video(windows), model.embed_classes(data.classes))
    right = p.view(24, 3, 6).mean(1).argmax(1) == torch.tensor(batch.label)
    assert batch.label[4] == -1
    assert found["small"]["top1"] == pytest.approx(right.float().mean().item())


def test_weizmann_runs_and_tests_every_clip(shared, tmp_path, capsys):
    found = go("--data", shared / "weizmann", *SMALL, "--epochs", 1, "--out", tmp_path)
    assert "\n30 test clips;" in capsys.readouterr().out
    assert (30 * found["small"]["top1"]) % 1 == pytest.approx(0, abs=1e-4)


def test_hmdb51_as_released_runs_on_the_clips_that_are_there(hmdb51, tmp_path, capsys):
    flags = ("--data", hmdb51, *SMALL, "--epochs", 1, "--out", tmp_path)
    with pytest.raises(common.BadInput, match="5097 of 5100 listed clips are missing"):
        go(*flags)
    go(*flags, "--allow-missing")
    printed = capsys.readouterr().out
    assert "\n1 test clips;" in printed
    assert "NOTE 5097 listed clips are missing" in printed
    assert "NOTE 49 classes have no training clip" in printed


def test_a_mistake_is_one_line_and_exit_code_two(toy, tmp_path, monkeypatch, capsys):
    """Before anything is trained."""
    flags = ("--data", toy, "--out", tmp_path, *SMALL, "--views", 2)
    monkeypatch.setattr(sys, "argv", ["tinyclip_swap.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(tinyclip_swap.__file__, run_name="__main__")
    assert stop.value.code == 2
    assert re.fullmatch(r"tinyclip_swap.py: --views: .* add --sampling dense\n",
                        capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.pt"))
