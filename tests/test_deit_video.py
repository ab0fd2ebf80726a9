"""deit_video.py: its equations, what a teacher alone can teach, kills, processes, mistakes."""
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deit_video
import spatial_kd
import tinyclip_swap
from common import MOTIONS, BadInput, FusionHead, build_action_clip
from deit_video import ARMS, TwoHeaded, deit_loss, main, one_vector, token_loss, two_heads

FAST = ("--teacher", "toy-large:random", "--student", "toy-small:random", "--epochs", 1,
        "--workers", 0, "--batch-size", 16, "--frames", 4)


@pytest.fixture(autouse=True, scope="module")
def timed_once():
    with pytest.MonkeyPatch.context() as patch:
        for script in (deit_video, tinyclip_swap):
            patch.setattr(script, "median_ms", lambda function, device: bool([function()]))
        yield


def go(*flags):
    return main([str(flag) for flag in flags])


def weights(folder, arm):
    return torch.load(next(folder.rglob(f"{arm}-last.pt")), weights_only=True)


def same(a, b):
    return all(torch.equal(a[part][key], b[part][key]) for part in
               ("model_state_dict", "fusion_model_state_dict", "beside") for key in a[part])


def numbers(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


# ---- the equations


def head_and_frames(token):
    torch.manual_seed(0)
    head = FusionHead(48, 3, layers=2, std=.1, position_std=.5, token=token).double()
    return head, *numbers(1, (5, 7, 48))


def read(head, f):
    token = f.new_zeros(0, 48) if head.token is None else (head.token + head.token_position)[None]
    return two_heads(f, token, head.frame_position_embeddings.weight, head.transformer)


def test_without_the_token_the_frame_head_is_actionclips():
    head, f = head_and_frames(token=False)
    torch.testing.assert_close(read(head, f)[1], head(f), rtol=0, atol=1e-12)


def test_with_the_token_the_builder_deploys_the_one_vector():
    head, f = head_and_frames(token=True)
    torch.testing.assert_close(one_vector(*read(head, f)), head(f), rtol=0, atol=1e-12)


def test_the_token_is_read_from_its_own_place():
    """Layers that change nothing: z is what went in."""
    f, token, positions = numbers(0, (2, 3, 4), (1, 4), (9, 4))
    h_token, h_frame = two_heads(f, token, positions, nn.Identity())
    torch.testing.assert_close(h_token, token + f.mean(1))
    torch.testing.assert_close(h_frame, (2 * f + positions[:3]).mean(1))


def test_token_starts_from_the_same_fusion_head():
    torch.manual_seed(0)
    one = build_action_clip("toy-small:random").state_dict()
    torch.manual_seed(0)
    two = build_action_clip("toy-small:random", token=True).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert sum(w.numel() for w in two.values()) - sum(w.numel() for w in one.values()) == 2 * 48


def test_logits_of_the_one_vector_are_the_mean_of_both_heads_logits():
    a, b, text = numbers(2, (6, 16), (6, 16), (5, 16))
    text = F.normalize(text, dim=-1)
    both = (F.normalize(a, dim=-1) @ text.T + F.normalize(b, dim=-1) @ text.T) / 2
    torch.testing.assert_close(100 * one_vector(a, b) @ text.T, 100 * both, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tau", [1., 3., 10.])
def test_gradient_of_the_soft_loss(tau):
    h, text, z_t = numbers(3, (6, 16), (5, 16), (6, 5))
    h.requires_grad_()
    logits = 20 * F.normalize(h, dim=-1) @ F.normalize(text, dim=-1).T
    wanted = tau * ((logits / tau).softmax(1) - (z_t * 5 / tau).softmax(1)) / 6
    expected, = torch.autograd.grad(logits, h, wanted.detach())
    found, = torch.autograd.grad(token_loss("soft", h, text, z_t * 5, 20., tau), h)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_soft_loss_is_K_times_deits():
    """DeiT's code: kl_div(..., reduction="sum", log_target=True) * tau^2 / number of elements."""
    h, text, z_t = numbers(4, (6, 16), (5, 16), (6, 5))
    logits = 20 * F.normalize(h, dim=-1) @ F.normalize(text, dim=-1).T
    deits = F.kl_div((logits / 3).log_softmax(1), (z_t / 3).log_softmax(1), reduction="sum",
                     log_target=True) * 9 / logits.numel()
    torch.testing.assert_close(token_loss("soft", h, text, z_t, 20., 3.), 5 * deits)


def test_soft_loss_by_numpy():
    h, text, z_t = (x.numpy() for x in numbers(5, (6, 16), (5, 16), (6, 5)))

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(1, keepdims=True)

    cosines = (h / np.linalg.norm(h, axis=1, keepdims=True)) @ (
        text / np.linalg.norm(text, axis=1, keepdims=True)).T
    p, q = softmax(20 * cosines / 3), softmax(z_t / 3)
    found = token_loss("soft", *map(torch.from_numpy, (h, text, z_t)), 20., 3.)
    assert found.item() == pytest.approx(9 * (q * np.log(q / p)).sum(1).mean())


def test_losses_do_not_change_when_the_batch_is_repeated_and_stay_finite():
    h, text, z_t = numbers(6, (6, 16), (5, 16), (6, 5))
    once = token_loss("soft", h, text, z_t, 20., 3.)
    torch.testing.assert_close(once, token_loss("soft", h.repeat(3, 1), text, z_t.repeat(3, 1),
                                                20., 3.))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    for kind in ("gt", "hard"):
        one = token_loss(kind, h, text[labels], labels, 20., 3.)
        two = token_loss(kind, h.repeat(2, 1), text[labels].repeat(2, 1), labels.repeat(2), 20., 3.)
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, deit_video.kl_pair(h, text[labels], labels, 20.))
    h.requires_grad_()
    loss = token_loss("soft", h, text, 1e4 * z_t, 100., .1)
    loss.backward()
    assert loss.isfinite()
    assert h.grad.isfinite().all()


def test_alpha_goes_from_the_frame_head_to_the_token():
    assert [deit_loss(2., 10., alpha) for alpha in (0, .25, 1)] == [2, 4, 10]


def test_teachers_logits_are_the_mean_over_templates_before_the_softmax(toy):
    model = build_action_clip("toy-small:random").eval()
    videos, text = torch.rand(3, 2, 3, 32, 32), model.encode_text(model.prompts(["a", "b"]))
    v, t = F.normalize(model.encode_video(videos), dim=-1), F.normalize(text, dim=-1)
    wanted = model.clip.logit_scale.exp() * torch.einsum("bd,pkd->bpk", v, t).mean(1)
    torch.testing.assert_close(deit_video.class_logits(model, videos, text, torch.device("cpu")),
                               wanted)


def test_attention_in_the_picture_is_that_of_the_network():
    """The layers by hand, as draw_attention goes through them, end where the head ends."""
    head, f = head_and_frames(token=True)
    x = torch.cat([(head.token + head.token_position).expand(5, 1, 48),
                   f + head.frame_position_embeddings.weight[:7]], 1)
    z = head.transformer(x)
    for block in head.transformer.resblocks:
        n = block.ln_1(x)
        shares = block.attn(n, n, n)[1]
        assert shares.shape == (5, 8, 8)
        torch.testing.assert_close(shares.sum(-1), torch.ones(5, 8).double())
        x = block(x)
    torch.testing.assert_close(x, z)


# ---- what a teacher alone teaches


def say(read, text, videos):
    with torch.no_grad():
        return torch.cat([deit_video.class_scores(read(part), text).argmax(1)
                          for part in videos.split(100)])


@pytest.fixture(scope="session")
def teacher(plain, out):
    """The large model of tinyclip_swap.py's plain run."""
    file = out / "tinyclip_swap" / "toy-s1-seed0" / "large-last.pt"
    return build_action_clip(f"toy-large:{file}").eval().requires_grad_(False)


def fit(module, videos, epochs, loss, prompts, model):
    optimizer, schedule = deit_video.make_optimizer(module, 4e-4, epochs * 37)
    rng = np.random.default_rng(0)
    for step in range(epochs * 37):
        if step % 37 == 0:
            order = torch.from_numpy(rng.permutation(len(videos)))
        loss(order[step % 37 * 32:][:32], model.encode_text(prompts[rng.integers(16)])).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.parametrize("trained", [True, False])
def test_soft_loss_alone_takes_the_token_to_the_teacher(toys, cache, teacher, trained):
    """alpha 1: no labels, and nothing reaches the frame head. From a teacher that knows nothing
    the student stays at chance; from a good one it has learned the direction of time."""
    (videos, _), (tests, labels), classes = *toys[0].values(), toys[1]
    torch.manual_seed(0)
    if not trained:
        teacher = build_action_clip("toy-large", cache=cache).eval()
    with torch.no_grad():
        text = teacher.encode_text(teacher.prompts(classes))
        z_t = torch.cat([deit_video.class_logits(teacher, part, text, torch.device("cpu"))
                         for part in videos.split(100)])
    model = build_action_clip("toy-small", cache=cache, token=True)
    student = TwoHeaded(model, ARMS["soft"], [])
    fit(student, videos, 7 if trained else 2, lambda pick, text: token_loss(
        "soft", student.read(videos[pick])[0], text, z_t[pick], model.clip.logit_scale.exp(), 1.),
        model.prompts(classes), model)
    student.eval()
    own = model.encode_text(model.prompts(classes)).detach()
    right = (say(lambda x: student.read(x)[0], own, tests) == labels).float().mean()
    if not trained:
        assert right < .35, right
        return
    teachers = (say(teacher.encode_video, text, tests) == labels).float().mean()
    assert teachers > .9
    assert right >= .95 * teachers, (right, teachers)
    opposite = [next(classes.index(b) for b in MOTIONS if np.allclose(
        np.add(MOTIONS[a], MOTIONS[b]), 0)) for a in classes]
    backwards = say(lambda x: student.read(x)[0], own, tests.flip(1))
    assert (backwards == torch.tensor(opposite)[labels]).float().mean() > .8
    frame = (say(lambda x: student.read(x)[1], own, tests) == labels).float().mean()
    assert frame < right - .2  # the token has learned it, not the frame head


# ---- runs


def test_every_arm_runs_and_is_read_out_three_ways(toy, tmp_path, capsys):
    found = go("--data", toy, *FAST, "--out", tmp_path, "--arms", *ARMS)
    assert list(found) == ["teacher", *ARMS]
    assert {r["clips"] for r in found.values()} == {24}
    for name, r in found.items():
        two = name in ("gt", "hard", "soft", "two-frame-heads")
        assert all((x == x) == two for x in (r["token"], r["mean"], r["cosine"]))  # else nan
        assert r["top1"] == (r["mean"] if two else r["frame"])
    assert found["gt"]["gmac"] > found["one-head"]["gmac"]
    assert found["gt"]["parameters"] - found["one-head"]["parameters"] == pytest.approx(96e-6)
    run = tmp_path / "deit_video" / "small-toy-s1-seed0"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 7
    assert all({"frame", "token", "agreement", "cosine"} <= row.keys() for row in rows)
    assert (run / "run.png").stat().st_size > 10_000
    assert re.fullmatch(r"RESULT deit_video data=small-toy split=1 seed=0 teacher=\S+ one-head=\S+ "
                        r"gt=\S+ hard=\S+ soft=\S+ two-frame-heads=\S+ teacher-on-frame=\S+ "
                        r"seconds=\d+", capsys.readouterr().out.splitlines()[-1])


def test_an_exported_student_is_a_plain_actionclip(toy, tmp_path):
    found = go("--data", toy, *FAST, "--out", tmp_path, "--arms", "gt", "--epochs", 3)
    file = next(tmp_path.rglob("gt-last.pt"))
    model = build_action_clip(f"toy-small:{file}").eval()
    assert model.fusion.token is not None
    student = TwoHeaded(model, ARMS["gt"], []).eval()
    video = torch.rand(2, 8, 3, 32, 32)
    torch.testing.assert_close(model.encode_video(video), one_vector(*student.read(video)))
    again = tinyclip_swap.main(["--data", str(toy), "--small", "toy-small:random", "--eval-only",
                                str(file), "--workers", "0", "--frames", "4", "--out",
                                str(tmp_path)])
    assert again["small"]["top1"] == found["gt"]["mean"]


def test_teacher_is_frozen_batchnorm_too(toy, tmp_path, monkeypatch):
    build, made = deit_video.build_action_clip, []

    def with_norm(spec, *more, **other):
        model = build(spec, *more, **other)
        if spec.startswith("toy-large"):
            visual, model.clip.visual = model.clip.visual, nn.Sequential(nn.BatchNorm2d(3))
            model.clip.visual.append(visual)
            made.append(model)
        return model

    monkeypatch.setattr(deit_video, "build_action_clip", with_norm)
    go("--data", toy, *FAST, "--out", tmp_path, "--arms", "soft", "hard")
    end, teacher = weights(tmp_path, "teacher"), made[-1]
    assert end["model_state_dict"]["visual.0.num_batches_tracked"] > 0  # it moved in its training
    for key, value in teacher.clip.state_dict().items():
        assert torch.equal(value, end["model_state_dict"][key])
    assert all(w.grad is None and not w.requires_grad for w in teacher.parameters())


def test_teacher_of_another_width_size_and_number_of_frames(toy, tmp_path):
    go("--data", toy, *FAST, "--out", tmp_path, "--arms", "one-head")
    file = next(tmp_path.rglob("teacher-last.pt"))
    found = go("--data", toy, *FAST, "--out", tmp_path / "b", "--arms", "soft", "hard",
               "--teacher-checkpoint", file, "--teacher-frames", 4, "--frames", 6)
    assert found["teacher"]["clips"] == 24
    assert not list((tmp_path / "b").rglob("teacher-last.pt"))  # nothing was trained
    before, = (r["frame"] for r in [json.loads(next(tmp_path.glob("deit_video/*/run.json"))
                                               .read_text())["results"]["teacher"]])
    assert found["teacher"]["frame"] == before


def test_the_teacher_of_the_run_before_can_teach_again(toy, tmp_path):
    flags = ("--data", toy, *FAST, "--out", tmp_path, "--arms", "soft")
    first = go(*flags)
    file = next(tmp_path.rglob("teacher-last.pt"))
    before = file.read_bytes()
    again = go(*flags, "--teacher-checkpoint", file)
    assert file.read_bytes() == before
    assert again["teacher"]["frame"] == first["teacher"]["frame"]
    assert again["soft"]["mean"] == first["soft"]["mean"]


def test_cached_scores_are_those_of_the_fixed_crops(toy, tmp_path, monkeypatch):
    found = go("--data", toy, *FAST, "--out", tmp_path, "--arms", "soft", "--cache-teacher")
    assert found["soft"]["clips"] == 24
    calls, real = [], deit_video.class_logits
    monkeypatch.setattr(deit_video, "class_logits", lambda *x: calls.append(0) or real(*x))
    go("--data", toy, *FAST, "--out", tmp_path, "--arms", "soft", "hard", "--cache-teacher",
       "--epochs", 3)
    assert len(calls) == 3  # 48 clips in batches of 16, once for both arms and all epochs


def test_same_command_gives_the_same_numbers(toy, tmp_path):
    for name in "ab":
        go("--data", toy, *FAST, "--out", tmp_path / name, "--arms", "soft")
    assert same(weights(tmp_path / "a", "soft"), weights(tmp_path / "b", "soft"))


def test_killed_and_resumed_ends_the_same(toy, tmp_path, monkeypatch):
    flags = ("--data", toy, *FAST, "--epochs", 2, "--arms", "two-frame-heads", "soft")
    go(*flags, "--out", tmp_path / "whole")
    augment, calls = deit_video.augment, []

    def killed(*given):
        calls.append(0)
        if len(calls) == 20:  # in the second epoch of soft
            raise KeyboardInterrupt
        return augment(*given)

    monkeypatch.setattr(deit_video, "augment", killed)
    with pytest.raises(KeyboardInterrupt):
        go(*flags, "--out", tmp_path / "cut")
    monkeypatch.undo()
    go(*flags, "--out", tmp_path / "cut", "--resume")
    for arm in ("teacher", "two-frame-heads", "soft"):
        assert same(weights(tmp_path / "whole", arm), weights(tmp_path / "cut", arm))


def test_two_processes_follow_the_loss_curve_of_one(toy, tmp_path, run_script):
    spatial_kd.main(["--data", str(toy), "--labeller", "toy-small:random", "--student",
                     "toy-small:random", "--label-only", "--workers", "0", "--out", str(tmp_path)])
    flags = ("--data", toy, *FAST, "--arms", "hard", "soft", "--spatial-targets",
             next(tmp_path.rglob("targets.pt")), "--floor", 0)
    go(*flags, "--out", tmp_path / "one")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = run_script("deit_video.py", *flags, "--out", tmp_path / "two", OMP_NUM_THREADS="1",
                      python=torchrun)
    assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in next((tmp_path / name).rglob("metrics.jsonl")).open()]
                for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in ("frame", "token", "cosine"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-6)
        assert a["spatial"] == pytest.approx(b["spatial"], rel=2e-3)


def test_the_grid_of_the_thesis_labels_what_it_needs(toy, tmp_path, monkeypatch):
    asked = []

    def label(command, **_):
        asked.append(command)
        spatial_kd.main([*command[2:], "--labeller", "toy-small:random", "--student",
                         "toy-small:random", "--workers", "0"])
        return type("done", (), {"returncode": 0})

    with monkeypatch.context() as patch:
        patch.setattr(deit_video.subprocess, "run", lambda *given, real=deit_video.subprocess.run,
                      **more: label(*given) if "--label-only" in given[0] else real(*given, **more))
        found = go("--data", toy, *FAST, "--out", tmp_path, "--grid", "thesis", "--floor", 0)
    assert list(found) == ["base", "+swap", "+swap+spatial", "+swap+two-heads", "all-three"]
    assert len(asked) == 1
    assert asked[0][1].endswith("spatial_kd.py")
    small = found["+swap"]
    assert found["+swap+spatial"]["gmac"] == small["gmac"] < found["base"]["gmac"]
    assert found["+swap+spatial"]["parameters"] == small["parameters"]
    assert found["all-three"]["parameters"] == found["+swap+two-heads"]["parameters"]
    assert all({"ms", "clips_per_s"} <= r.keys() for r in found.values())
    assert {row["arm"]: bool(row["spatial"]) for row in map(
        json.loads, next(tmp_path.rglob("metrics.jsonl")).open())} == {
        "base": False, "+swap": False, "+swap+spatial": True, "+swap+two-heads": False,
        "all-three": True}
    go("--data", toy, *FAST, "--out", tmp_path, "--grid", "thesis", "--floor", 0)  # asks no more


def test_weizmann_reports_every_test_clip(shared, out):
    found = go("--data", shared / "weizmann", *FAST, "--out", out, "--arms", "soft")
    assert {r["clips"] for r in found.values()} == {30}


def test_a_clip_that_cannot_be_decoded_is_counted(toy, tmp_path, capsys):
    folder = tmp_path / "some-bad"
    shutil.copytree(toy, folder)
    for name in ("train/0003.mp4", "test/0004.mp4"):
        (folder / name).write_text("no video")
    for more in ((), ("--cache-teacher",)):
        found = go("--data", folder, *FAST, "--out", tmp_path, "--arms", "soft", *more)
        assert {r["clips"] for r in found.values()} == {24}
        printed = capsys.readouterr().out
        assert "NOTE 1 training clips cannot be decoded" in printed
        assert "NOTE 1 test clips cannot be decoded and count as wrong" in printed


# ---- mistakes


def test_a_mistake_is_one_line_and_exit_code_two(run_script, toy, tmp_path):
    done = run_script("deit_video.py", "--data", toy, "--out", tmp_path, "--teacher", "toy-huge")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "deit_video").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (("--teacher", "ViT-B-33"), "nearest names"),
    (("--student", "TinyCLIP-ViT-40M-32-Text-19M:gone.pt"), "no file"),
    (("--teacher-checkpoint", "gone.pt"), "gone.pt is no file"),
    (("--spatial-targets", "gone.pt"), "no file of targets"),
    (("--data", "gone"), "no such folder"),
    (("--resume",), "start one without"),
])
def test_mistakes_say_what_would_be_right(toy, tmp_path, flags, message):
    with pytest.raises(BadInput, match=message):
        go("--data", toy, *FAST, "--out", tmp_path, *flags)
    assert not list(tmp_path.rglob("run.json"))


def test_targets_of_other_clips_are_refused(toy, tmp_path):
    torch.save({"clips": ["train/other.mp4 100"], "tasks": []}, tmp_path / "targets.pt")
    with pytest.raises(BadInput, match="targets of other clips"):
        go("--data", toy, *FAST, "--out", tmp_path, "--spatial-targets", tmp_path / "targets.pt")


@pytest.mark.parametrize("flags", [("--alpha", 2), ("--tau", 0), ("--frames", 78), ("--arms", "x")])
def test_flags_out_of_range(flags):
    with pytest.raises(SystemExit):
        go(*flags)
