"""deit_video.py: its equations, what a teacher alone teaches, arms, kills, processes, mistakes."""
import json
import re
import runpy
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import deit_video
import spatial_kd
from common import BadInput, FusionHead, build_action_clip, one_vector, read_data
from deit_video import ARMS, TwoHeaded, class_scores, main, soft_loss

FAST = ("--teacher", "toy-small:random", "--student", "toy-small:random", "--epochs", 2,
        "--workers", 0, "--batch-size", 16, "--frames", 4)


@pytest.fixture(autouse=True, scope="module")
def timed_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deit_video, "milliseconds", lambda function: float(len(function())))
        yield


def go(*flags):
    return main([str(flag) for flag in flags])


def weights(folder, arm):
    saved = torch.load(next(folder.rglob(f"{arm}-last.pt")), weights_only=True)
    return [*saved["model_state_dict"].values(), *saved["fusion_model_state_dict"].values()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def rows(folder):
    lines = next(folder.rglob("metrics.jsonl")).read_text().splitlines()
    return [json.loads(line) | {"clips_per_s": 0} for line in lines]


@pytest.fixture(scope="module")
def every(toy, tmp_path_factory):
    """A teacher and all arms -> their numbers, and the folder of the run"""
    out = tmp_path_factory.mktemp("every")
    return go("--data", toy, *FAST, "--out", out, "--arms", *ARMS), out


# ---- the equations


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def unit(x):
    return F.normalize(x, dim=-1)


def test_the_token_stands_before_the_frames_and_both_are_read_at_their_places():
    f, heads, found = draw(5, 7, 48), [], []
    for token in (False, True):
        torch.manual_seed(0)
        heads.append(FusionHead(48, 3, layers=2, std=.1, position_std=.5, token=token).double())
        found.append(heads[-1].read(f))
    one, two = heads
    assert same(list(one.parameters()), [*two.parameters()][2:])  # the same but for the token
    x = f + one.frame_position_embeddings.weight[:7]
    assert found[0][0] is None
    torch.testing.assert_close(found[0][1], (one.transformer(x) + f).mean(1))
    torch.testing.assert_close(found[0][1], one(f))
    z = two.transformer(torch.cat([(two.token + two.token_position).expand(5, 1, 48), x], 1))
    torch.testing.assert_close(found[1][0], z[:, 0] + f.mean(1))
    torch.testing.assert_close(found[1][1], (z[:, 1:] + f).mean(1))
    torch.testing.assert_close(two(f), (unit(found[1][0]) + unit(found[1][1])) / 2)


def test_logits_of_the_one_vector_are_the_mean_of_both_heads_logits():
    a, b, t = draw(6, 16), draw(6, 16, seed=1), unit(draw(5, 16, seed=2))
    h = one_vector(a, b)
    torch.testing.assert_close(h @ t.T, (unit(a) @ t.T + unit(b) @ t.T) / 2)
    of_length_1 = one_vector(a, b) / h.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(unit(unit(a) + unit(b)), of_length_1)


@pytest.mark.parametrize("tau", [1., 3.])
def test_soft_loss_and_its_gradient_in_closed_form(tau):
    h, t, z_t = draw(6, 16).requires_grad_(), draw(5, 16, seed=1), 5 * draw(6, 5, seed=2)
    z = 20 * unit(h) @ unit(t).T
    p, q = (z / tau).softmax(1), (z_t / tau).softmax(1)
    loss = soft_loss(h, t, z_t, 20., tau)
    torch.testing.assert_close(loss, tau ** 2 * (q * (q / p).log()).sum(1).mean())
    wanted, = torch.autograd.grad(z, h, tau * (p - q).detach() / 6, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, h)[0], wanted)
    deits = F.kl_div((z / tau).log_softmax(1), (z_t / tau).log_softmax(1), reduction="sum",
                     log_target=True) * tau ** 2 / z.numel()  # as its code has it
    torch.testing.assert_close(loss, 5 * deits)
    torch.testing.assert_close(soft_loss(h.repeat(2, 1), t, z_t.repeat(2, 1), 20., tau), loss)
    assert soft_loss(h, t, z_t, 1e4, tau).isfinite()


def test_the_token_learns_from_labels_or_from_the_teachers_answers():
    (h, t, texts), z_t = draw(3, 4, 8).float(), draw(4, 3).float()
    labels, top = torch.tensor([0, 1, 0, 2]), z_t.argmax(1)
    given = h, t, labels, texts, z_t, 9., 1.
    assert deit_video.token_loss(None, *given) == 0
    assert deit_video.token_loss("gt", *given) == deit_video.kl_pair(h, t, labels, 9.)
    assert deit_video.token_loss("hard", *given) == deit_video.kl_pair(h, texts, top, 9.)
    assert [deit_video.deit_loss(2., 10., alpha) for alpha in (0, .25, 1)] == [2, 4, 10]
    prompts, rng = torch.arange(16 * 3).view(16, 3, 1), np.random.default_rng(0)
    draws = [0, 5, 15, 5]
    said = deit_video.token_texts("hard", z_t, prompts, draws, rng)
    assert said[:, 0].tolist() == [3 * p + k for p, k in zip(draws, top.tolist(), strict=True)]


@torch.no_grad()
def test_teachers_logits_are_the_mean_over_templates_before_the_softmax():
    model, videos = build_action_clip("toy-small:random").eval(), torch.rand(3, 2, 3, 32, 32)
    text = model.embed_classes(["a", "b"])
    z = torch.einsum("bd,pkd->bpk", unit(model.encode_video(videos)), unit(text))
    wanted = model.clip.logit_scale.exp() * z.mean(1)
    torch.testing.assert_close(deit_video.class_logits(model, videos, text), wanted)


@torch.no_grad()
def test_attention_in_the_picture_is_that_of_the_network(toy):
    """By hooks on the layers as the network runs, from their weights."""
    torch.manual_seed(0)
    model, looks = build_action_clip("toy-small:random", token=True).eval(), []

    def look(attn, given, named):
        query, key, _ = F.linear(given[0] if given else named["query"], attn.in_proj_weight,
                                 attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        z = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** .5
        looks.append(z.softmax(-1)[0, :, 0, 1:].mean(0))

    for block in model.fusion.transformer.resblocks:
        block.attn.register_forward_pre_hook(look, with_kwargs=True)
    clips = read_data(str(toy)).test
    video = common.Clips(clips, 4, model.side)[0, 2].video
    pixels = common.centre_crop([video], model.size)
    model.encode_video(pixels)
    assert len(looks) == 6
    mean = torch.stack(looks).mean(0)
    torch.testing.assert_close(deit_video.attention(model, pixels), mean / mean.sum())


# ---- what a teacher alone teaches


@pytest.mark.parametrize("trained", [True, False])
def test_soft_loss_alone_takes_the_token_to_the_teacher(plain, moving, cache, trained):
    """Without labels, and without a loss on h_frame. From a teacher that knows nothing the student
    stays at chance; from a good one its token, and not h_frame, learns the direction of time."""
    (videos, _), (tests, labels), classes = *moving[0].values(), moving[1]
    torch.manual_seed(0)
    checkpoint = plain[1] if trained else None
    teacher = build_action_clip("toy-large", 6, cache, checkpoint=checkpoint).eval()
    z_t = deit_video.class_logits(teacher, videos, teacher.embed_classes(classes))
    model = build_action_clip("toy-large", 6, cache, token=True)
    student, rng = TwoHeaded(model, ARMS["soft"], []), np.random.default_rng(0)
    optimizer, schedule = deit_video.make_optimizer(student, 4e-4, 3 * 25)
    prompts = model.prompts(classes)
    for _ in range(3):
        for pick in torch.from_numpy(rng.permutation(len(videos))).split(16):
            text, scale = model.encode_text(prompts[rng.integers(16)]), model.clip.logit_scale.exp()
            soft_loss(student.read(videos[pick])[0], text, z_t[pick], scale, 1.).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    text, right = student.eval().model.embed_classes(classes), []
    opposite = torch.tensor([3, 2, 1, 0])[labels]
    for clips, wanted in ((tests, labels), (tests.flip(1), opposite)):
        with torch.no_grad():
            h_token, h_frame, _ = student.read(clips)
        right += [(class_scores(h, text).argmax(1) == wanted).float().mean()
                  for h in (h_token, h_frame)]
    token, frame, backwards, _ = right
    if trained:
        assert min(token, backwards) > .85, right
        assert frame < token - .2, right
    else:
        assert token < .35, right


# ---- runs


def test_every_arm_runs_and_is_read_out_three_ways(every, toy):
    found, out = every
    assert list(found) == ["teacher", *ARMS]
    for name, r in found.items():
        two = name not in ("teacher", "one-head", "teacher-on-frame")
        assert all((r[key] == r[key]) == two for key in ("token", "mean"))  # else nan
        assert r["top1"] == (r["mean"] if two else r["frame"])
        assert r["backbone"] == "toy-small"
        assert {"ms", "clips/s"} <= r.keys()
    assert found["gt"]["M"] - found["one-head"]["M"] == pytest.approx(96e-6)
    assert found["gt"]["GMAC"] > found["one-head"]["GMAC"] == found["two-frame-heads"]["GMAC"]
    log = rows(out)
    assert [row["arm"] for row in log[::2]] == list(found)
    for row in log:
        assert row["frame"] > 0
        assert (row["token"] == 0) == (row["arm"] in ("teacher", "one-head"))
        assert (row["cosine"] > 1 - 1e-4) == (row["arm"] in (
            "teacher", "one-head", "teacher-on-frame"))
    assert next(out.rglob("run.png")).stat().st_size > 10_000
    assert next(out.rglob("readouts.png")).stat().st_size > 2_000


@torch.no_grad()
def test_a_two_headed_checkpoint_is_an_action_clip(every, toy):
    found, out = every
    model = build_action_clip("", checkpoint=next(out.rglob("gt-last.pt"))).eval()
    assert (model.name, model.frames) == ("toy-small", 4)
    data = read_data(str(toy))
    batch, = common.ClipLoader(common.Clips(data.test, 4, model.side), 24)
    pixels = common.centre_crop(batch.video, model.size)
    v = model.encode_video(pixels)
    torch.testing.assert_close(v, TwoHeaded(model, ARMS["gt"], []).read(pixels)[2])
    top = class_scores(v, model.embed_classes(data.classes)).argmax(1)
    hits = (top == torch.tensor(batch.label)).float().mean()
    assert hits.item() == pytest.approx(found["gt"]["top1"])


def test_a_teacher_checkpoint_is_used_as_it_is(every, toy, tmp_path, monkeypatch):
    file, class_logits = next(every[1].rglob("teacher-last.pt")), deit_video.class_logits
    flags = ("--data", toy, *FAST, "--out", tmp_path, "--teacher-checkpoint", file)

    def asked(teacher, *given):  # frozen: norms and dropout, too
        assert not teacher.training
        assert not any(weight.requires_grad for weight in teacher.parameters())
        return class_logits(teacher, *given)

    monkeypatch.setattr(deit_video, "class_logits", asked)
    found = go(*flags, "--arms", "soft")
    assert not list(tmp_path.rglob("teacher-last.pt"))
    assert found["teacher"]["top1"] == every[0]["teacher"]["top1"]
    assert found["teacher"]["M"] == every[0]["teacher"]["M"]
    assert same(weights(tmp_path, "soft"), weights(every[1], "soft"))
    with pytest.raises(BadInput, match=r"has 4 frames, .* say --frames 4"):
        go(*flags, "--frames", 6)


def test_killed_and_resumed_ends_the_same(every, toy, tmp_path, monkeypatch):
    flags = ("--data", toy, *FAST, "--out", tmp_path, "--arms", "soft", "two-frame-heads")
    training_view, calls = common.training_view, []

    def killed(*given):
        calls.append(given)
        if len(calls) == 15:  # in the second epoch of soft
            raise KeyboardInterrupt
        return training_view(*given)

    monkeypatch.setattr(common, "training_view", killed)
    with pytest.raises(KeyboardInterrupt):
        go(*flags)
    monkeypatch.undo()
    found = go(*flags, "--resume")
    for arm, numbers in found.items():
        assert numbers["top1"] == every[0][arm]["top1"]
        assert same(weights(tmp_path, arm), weights(every[1], arm))
    assert rows(tmp_path) == [row for row in rows(every[1]) if row["arm"] in found]


def test_the_grid_of_the_thesis_is_labelled_by_the_command_that_it_names(toy, tmp_path):
    folder = tmp_path / toy.name
    shutil.copytree(toy, folder)
    flags = ("--data", folder, *FAST, "--epochs", 1, "--teacher", "toy-large:random", "--out",
             tmp_path, "--allow-missing", "--grid", "soft")
    with pytest.raises(BadInput, match=r"targets\.pt is missing; .*: python spatial_kd") as error:
        go(*flags)
    command = shlex.split(str(error.value).partition("python spatial_kd.py ")[2])
    assert spatial_kd.parse(command).allow_missing
    spatial_kd.main([*command, "--labeller", "toy-small:random", "--workers", "0"])
    found = go(*flags)
    names = ["base", "+swap", "+swap+spatial", "+swap+two-heads", "all-three"]
    assert list(found) == names
    base, swap, spatial, two, three = ([r["M"], r["GMAC"]] for r in found.values())
    assert swap == spatial < two == three < base
    for row in rows(tmp_path):
        told = {"colour", "shape", "place", "scene"} <= row.keys()
        assert told == (row["arm"] in ("+swap+spatial", "all-three"))
    lists = (folder / "train1.csv").read_text().splitlines()
    (folder / "train1.csv").write_text("\n".join(lists[:-1]))
    with pytest.raises(BadInput, match=r"targets\.pt is missing"):  # those of other clips
        go(*flags)


def test_two_processes_follow_the_loss_curve_of_one_and_end_in_a_result(every, toy, tmp_path,
                                                                        run_script):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = run_script("deit_video.py", "--data", toy, *FAST, "--out", tmp_path, "--arms", "hard",
                      "soft", OMP_NUM_THREADS="1", python=torchrun)
    assert done.returncode == 0, done.stderr
    one = [row for row in rows(every[1]) if row["arm"] in ("teacher", "hard", "soft")]
    for a, b in zip(one, rows(tmp_path), strict=True):
        assert a.pop("arm") == b.pop("arm")
        assert a == pytest.approx(b, rel=2e-3, abs=1e-6)
    assert re.fullmatch(r"RESULT deit_video data=small-toy split=1 seed=0 teacher=0\.\d{4} "
                        r"hard=0\.\d{4} soft=0\.\d{4} seconds=\d+", done.stdout.splitlines()[-1])


def test_unseen_classes_are_tested(toy, tmp_path):
    found = go("--data", toy, *FAST, "--out", tmp_path, "--unseen", 2, "--arms", "soft")
    assert {"top1", "top1_unseen", "top1_unseen_all"} <= found["soft"].keys()


# ---- mistakes


@pytest.mark.parametrize(("flags", "message"), [
    (("--teacher", "ViT-B-33"), "ViT-B-33 is no CLIP"),
    (("--student", "toy-small:gone.pt"), "toy-small:gone.pt: "),
    (("--teacher-checkpoint", "gone.pt"), "gone.pt: "),
    (("--data", "gone"), "--data gone: no such folder")])
def test_a_mistake_is_one_line_and_exit_code_two(toy, tmp_path, monkeypatch, capsys, flags,
                                                 message):
    given = ("deit_video.py", "--data", toy, *FAST, "--out", tmp_path, *flags)
    monkeypatch.setattr(sys, "argv", list(map(str, given)))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(deit_video.__file__, run_name="__main__")
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"deit_video.py: {message}")
    assert not list(tmp_path.rglob("*-last.pt"))
