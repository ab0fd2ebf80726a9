"""deit_video.py: equations, what a teacher alone teaches, variants, resume, processes, bad input"""
import collections
import csv
import json
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import predicted_top1

import common
import deit_video
import spatial_kd
from common import BadInput, FusionHead, build_actionclip
from deit_video import (
    VARIANTS,
    TokenFusionHead,
    actionclip_loss,
    class_probabilities,
    main,
    token_loss,
)

FAST = ("--teacher", "toy-small:random", "--student", "toy-small:random", "--epochs", 2,
        "--workers", 0, "--batch-size", 16, "--frames", 4, "--test-every", 2)


def run(*flags):
    return main([str(flag) for flag in flags])


def weights(folder, variant):
    saved = torch.load(next(folder.rglob(f"{variant}-last.pt")), weights_only=True)
    return [*saved["model_state_dict"].values(), *saved["fusion_model_state_dict"].values()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def epochs(folder):
    """The metrics of each epoch of a run, without speeds"""
    record = json.loads(next(folder.rglob("results.json")).read_text())
    return [{**metrics, "videos_per_s": 0} for metrics in record["epochs"]]


@pytest.fixture(scope="module")
def all_variants(toy, tmp_path_factory):
    """A teacher and all variants -> results, and the --out folder"""
    out = tmp_path_factory.mktemp("all")
    return run("--data", toy, *FAST, "--out", out, "--variants", *VARIANTS), out


# ---- equations


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def unit(x):
    return F.normalize(x, dim=-1)


def soft_loss(h, text, teacher_logits, scale, tau):
    return token_loss("soft", h, text, None, teacher_logits, scale, tau)


def test_token_fusion_head_is_eq_3_and_eq_8():
    f = normal(5, 7, 48)
    heads = []
    for head in (FusionHead, TokenFusionHead):
        torch.manual_seed(0)
        heads.append(head(48, 3, layers=2, std=.1, position_std=.5).double())
    one, two = heads
    assert list(two.state_dict())[:2] == ["token", "token_position"]
    assert same(list(one.parameters()), [*two.parameters()][2:])  # the same but for the token
    x = f + one.frame_position_embeddings.weight[:7]
    z = two.transformer(torch.cat([(two.token + two.token_position).expand(5, 1, 48), x], 1))
    h_token, h_frame = two.forward_heads(f)
    torch.testing.assert_close(h_token, z[:, 0] + f.mean(1))
    torch.testing.assert_close(h_frame, (z[:, 1:] + f).mean(1))
    torch.testing.assert_close(two(f), (unit(h_token) + unit(h_frame)) / 2)


def test_linear_fusion_head_starts_as_actionclip():
    f = normal(5, 7, 48)
    torch.manual_seed(0)
    one = FusionHead(48, 3, layers=2).double()
    torch.manual_seed(0)
    two = deit_video.LinearFusionHead(48, 3, 2).double()
    h_token, h_frame = two.forward_heads(f)
    torch.testing.assert_close(h_token, one(f))
    torch.testing.assert_close(h_frame, one(f))
    torch.testing.assert_close(two(f), unit(one(f)))


def test_merged_logits_are_the_mean_of_both_heads_logits():
    a, b, t = normal(6, 16), normal(6, 16, seed=1), unit(normal(5, 16, seed=2))
    h = deit_video.merge_heads(a, b)
    torch.testing.assert_close(h @ t.T, (unit(a) @ t.T + unit(b) @ t.T) / 2)
    torch.testing.assert_close(unit(unit(a) + unit(b)), h / h.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("tau", [1., 3.])
def test_soft_loss_and_its_gradient_in_closed_form(tau):
    h, t, z_t = normal(6, 16).requires_grad_(), normal(5, 16, seed=1), 5 * normal(6, 5, seed=2)
    z = 20 * unit(h) @ unit(t).T
    p, q = (z / tau).softmax(1), (z_t / tau).softmax(1)
    loss = soft_loss(h, t, z_t, 20., tau)
    torch.testing.assert_close(loss, tau ** 2 * (q * (q / p).log()).sum(1).mean())
    expected, = torch.autograd.grad(z, h, tau * (p - q).detach() / 6, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, h)[0], expected)
    # DeiT's code divides by the number of elements
    official = F.kl_div((z / tau).log_softmax(1), (z_t / tau).log_softmax(1), reduction="sum",
                        log_target=True) * tau ** 2 / z.numel()
    torch.testing.assert_close(loss, 5 * official)
    torch.testing.assert_close(soft_loss(h.repeat(2, 1), t, z_t.repeat(2, 1), 20., tau), loss)
    assert soft_loss(h, t, z_t, 1e4, tau).isfinite()


def test_labels_loss_hard_loss_and_deit_loss():
    h, t, texts = normal(3, 4, 8)
    z_t, labels = normal(4, 3), torch.tensor([0, 1, 0, 2])
    loss = token_loss("labels", h, t, labels, None, 9., 1.)
    assert loss == actionclip_loss(h, t, labels, 9.)
    loss = token_loss("hard", h, texts, labels, z_t, 9., 1.)
    assert loss == actionclip_loss(h, texts, z_t.argmax(1), 9.)
    assert [deit_video.deit_loss(2., 10., alpha) for alpha in (0, .25, 1)] == [2, 4, 10]


def test_class_logits_average_the_templates_before_the_softmax():
    v, text = normal(3, 8), normal(16, 2, 8, seed=1)
    expected = 7 * torch.einsum("bd,pkd->bpk", unit(v), unit(text)).mean(1)
    torch.testing.assert_close(deit_video.class_logits(v, text, 7.), expected)


@torch.no_grad()
def test_token_attention_is_that_of_the_network():
    """Hooks on the layers compute it from their weights while the network runs."""
    torch.manual_seed(0)
    model = build_actionclip("toy-small:random", TokenFusionHead).eval()
    layers = []

    def hook(attn, args, kwargs):
        x = args[0] if args else kwargs["query"]
        query, key, _ = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(
            -1, (3, attn.num_heads, -1)).unbind(2)
        z = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** .5
        layers.append(z.softmax(-1)[:, :, 0, 1:].mean(1))

    for block in model.fusion.transformer.resblocks:
        block.attn.register_forward_pre_hook(hook, with_kwargs=True)
    video = torch.rand(2, 4, 3, model.crop_size, model.crop_size)
    model.encode_video(video)
    assert len(layers) == 6
    mean = torch.stack(layers).mean(0)
    torch.testing.assert_close(deit_video.token_attention(model, video),
                               mean / mean.sum(1, keepdim=True))


# ---- what the teacher alone teaches


@pytest.mark.parametrize("trained", [True, False])
def test_soft_loss_alone_teaches_the_token(plain, moving, cache, trained):
    """Without labels, and without a loss on h_frame. A random teacher leaves the student at chance.
    From a good one the token, but not h_frame, learns the direction of time."""
    (videos, _), (tests, labels), classes = *moving[0].values(), moving[1]
    torch.manual_seed(0)
    checkpoint = plain[1] if trained else None
    teacher = build_actionclip("toy-large", cache=cache, checkpoint=checkpoint).eval()
    with torch.no_grad():
        v, _, scale = teacher(videos, None)
        z_t = deit_video.class_logits(v, teacher.encode_classes(classes), scale)
    model = build_actionclip("toy-large", TokenFusionHead, cache)
    rng = np.random.default_rng(0)
    optimizer, schedule = deit_video.make_optimizer(model, 4e-4, 3 * 25)
    prompts = model.tokenize_classes(classes)
    for _ in range(3):
        for batch in torch.from_numpy(rng.permutation(len(videos))).split(16):
            text = model.encode_text(prompts[rng.integers(16)])
            h_token, _ = model.fusion.forward_heads(model.encode_frames(videos[batch]))
            scale = model.clip_model.logit_scale.exp()
            soft_loss(h_token, text, z_t[batch], scale, 1.).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    text = model.encode_classes(classes)
    opposite = torch.tensor([3, 2, 1, 0])[labels]
    accuracies = []
    for clips, truth in ((tests, labels), (tests.flip(1), opposite)):
        with torch.no_grad():
            heads = model.eval().fusion.forward_heads(model.encode_frames(clips))
        accuracies += [(class_probabilities(h, text).argmax(1) == truth).float().mean()
                       for h in heads]
    token, frame, backwards, _ = accuracies
    if trained:
        assert min(token, backwards) > .85, accuracies
        assert frame < token - .2, accuracies
    else:
        assert token < .35, accuracies


# ---- runs


def test_every_variant_runs_and_reports_its_heads(all_variants):
    results, out = all_variants
    assert list(results) == ["teacher", *VARIANTS, "ensemble"]
    one_head = ("teacher", "one_head", "one_head_soft", "second_one_head", "ensemble")
    for name, x in results.items():
        heads = (x["frame"], x["token"])
        assert (heads == (None, None)) == (name in one_head)
        assert "ms/video" in x
    one, two = results["one_head"], results["two_heads"]
    assert two["params M"] - one["params M"] == pytest.approx(96e-6)
    assert two["GMAC/video"] > one["GMAC/video"]
    assert next(out.rglob("attention.png")).stat().st_size > 10_000
    scores = json.loads(next(out.rglob("results.json")).read_text())["results"]["scores"]
    assert results["ensemble"]["GMAC/video"] == 2 * one["GMAC/video"]
    for name, x in results.items():
        if name not in one_head:
            assert (scores.pop(f"{name}_frame"), scores.pop(f"{name}_token")) == (
                x["frame"], x["token"])
    assert scores == {name: x["top1"] for name, x in results.items()}
    del scores["ensemble"]
    for name, top1 in scores.items():
        path = next(out.rglob(f"{name}-predictions.csv"))
        assert predicted_top1(path) == pytest.approx(top1)
    log = epochs(out)
    assert [metrics["variant"] for metrics in log[::2]] == ["teacher", *VARIANTS]
    assert [metrics.get("top1") for metrics in log[:2]] == [None, results["teacher"]["top1"]]
    for metrics in log:
        name = metrics["variant"]
        expected = {"variant", "epoch", "frame_loss"}
        if name in VARIANTS and VARIANTS[name].token_loss:
            expected.add(f"{VARIANTS[name].token_loss}_loss")
        assert metrics.keys() - {"top1"} == {*expected, "videos_per_s"}


def test_ensemble_is_the_mean_of_two_networks_with_different_seeds(all_variants, toy, tmp_path):
    results, out = all_variants
    teacher = next(out.rglob("teacher-last.pt"))
    run("--data", toy, *FAST, "--out", tmp_path, "--teacher-checkpoint", teacher, "--variants",
        "one_head", "--seed", 1)
    assert same(weights(tmp_path, "one_head"), weights(out, "second_one_head"))
    sums = {}  # of probabilities; the files leave out one of six classes, the least probable
    for name in ("one_head", "second_one_head"):
        with open(next(out.rglob(f"{name}-predictions.csv")), newline="") as file:
            for row in csv.DictReader(file):
                p = sums.setdefault((row["video"], row["truth"]), collections.Counter())
                for k in range(1, 6):
                    p[row[f"class{k}"]] += float(row[f"p{k}"] or 0)
    correct = [p.most_common(1)[0][0] == truth for (_, truth), p in sums.items()]
    assert np.mean(correct) == pytest.approx(results["ensemble"]["top1"])


@pytest.mark.parametrize("variant", ["two_heads", "two_frame_heads", "one_head_soft"])
def test_eval_only_repeats_the_top1_of_training(all_variants, toy, tmp_path, variant):
    file = next(all_variants[1].rglob(f"{variant}-last.pt"))
    shutil.copytree(toy / "test", tmp_path / "only" / "test")
    shutil.copy(toy / "test1.csv", tmp_path / "only")  # and no training list
    results = run("--data", tmp_path / "only", "--workers", 0, "--out", tmp_path,
                  "--eval-only", file)
    expected = all_variants[0][variant]
    for name in ("top1", "frame", "token", "params M", "GMAC/video"):
        assert results["eval_only"][name] == expected[name]
    assert not list(tmp_path.rglob("*-last.pt"))


@pytest.mark.parametrize("variant", ["two_heads", "two_frame_heads", "one_head"])
def test_watch_predicts_what_the_offline_model_predicts(all_variants, toy, capsys, monkeypatch,
                                                        variant):
    file = next(all_variants[1].rglob(f"{variant}-last.pt"))
    video = next(toy.rglob("test/*.mp4"))
    step, probabilities = deit_video.stream_step, []
    monkeypatch.setattr(deit_video, "stream_step",
                        lambda *given: probabilities.append(step(*given)) or probabilities[-1])
    run("--watch", video, "--labels", ",".join(common.MOTIONS), "--fps", 6, "--no-drop",
        "--eval-only", file)
    model = deit_video.load_model(file, deit_video.parse([]))
    sampled = common.read_frames(video, np.arange(0, 16, 4), model.resize_to)
    assert len(probabilities) == 4
    with torch.no_grad():
        v = model.encode_video(common.center_crop([sampled], model.crop_size))
    offline = class_probabilities(v, model.encode_classes(list(common.MOTIONS)))[0]
    torch.testing.assert_close(probabilities[-1], offline, rtol=0, atol=1e-5)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"RESULT deit_video watch={video} frames=4 ")


def test_teacher_checkpoint_is_frozen_and_used_as_it_is(all_variants, toy, tmp_path, monkeypatch):
    file = next(all_variants[1].rglob("teacher-last.pt"))
    flags = ("--data", toy, *FAST, "--frames", 6, "--out", tmp_path, "--teacher-checkpoint", file)
    students, load_model = [], deit_video.load_model
    monkeypatch.setattr(deit_video, "load_model",
                        lambda *given: students.append(load_model(*given)) or students[-1])
    class_logits = deit_video.class_logits

    def checked(*given):  # frozen, also norms and dropout
        assert not students[0].training
        assert not any(weight.requires_grad for weight in students[0].parameters())
        return class_logits(*given)

    monkeypatch.setattr(deit_video, "class_logits", checked)
    results = run(*flags, "--variants", "two_heads_soft")
    assert not list(tmp_path.rglob("teacher-last.pt"))
    assert results["teacher"]["top1"] == all_variants[0]["teacher"]["top1"]
    assert same(weights(tmp_path, "two_heads_soft"), weights(all_variants[1], "two_heads_soft"))


def test_resume_after_a_kill_ends_the_same(all_variants, toy, tmp_path, monkeypatch):
    augment, calls = common.augment, []

    def killed(*given):
        calls.append(given)
        if len(calls) == 15:  # in the second epoch of two_heads_soft
            raise KeyboardInterrupt
        return augment(*given)

    monkeypatch.setattr(common, "augment", killed)
    with pytest.raises(KeyboardInterrupt):
        run("--data", toy, *FAST, "--out", tmp_path, "--variants", "two_heads_soft",
            "two_frame_heads")
    monkeypatch.undo()
    folder, = tmp_path.glob("deit_video/*")
    results = run("--resume", folder, "--workers", 0)
    for variant, x in results.items():
        assert x["top1"] == all_variants[0][variant]["top1"]
        assert same(weights(tmp_path, variant), weights(all_variants[1], variant))
    assert epochs(tmp_path) == [metrics for metrics in epochs(all_variants[1])
                                if metrics["variant"] in results]


def test_grid_takes_targets_from_the_command_that_it_names(toy, tmp_path):
    folder = tmp_path / toy.name
    shutil.copytree(toy, folder)
    flags = ("--data", folder, *FAST, "--epochs", 1, "--teacher", "toy-large:random", "--out",
             tmp_path, "--grid", "soft")
    with pytest.raises(BadInput, match=r"^--grid needs targets: .* python spatial_kd") as error:
        run(*flags)
    command = str(error.value).partition("python spatial_kd.py ")[2].split()
    spatial_kd.main([*command, "--out", str(tmp_path), "--labeller", "toy-small:random",
                     "--workers", "0"])
    results = run(*flags)
    assert list(results) == ["base", "swap", "swap_spatial", "swap_two_heads", "all_three"]
    base, swap, spatial, two, three = ([x["params M"], x["GMAC/video"]] for x in results.values())
    assert swap == spatial < two == three < base
    for metrics in epochs(next(tmp_path.glob("deit_video/*"))):
        has_tasks = {"colour", "shape", "place", "scene"} <= metrics.keys()
        assert has_tasks == (metrics["variant"] in ("swap_spatial", "all_three"))
    rows = (folder / "train1.csv").read_text().splitlines()
    (folder / "train1.csv").write_text("\n".join(rows[:-1]))
    with pytest.raises(BadInput, match=r"^--grid needs targets"):  # of these videos
        run(*flags)


def test_two_processes_follow_the_losses_of_one(all_variants, two_processes):
    printed, out = two_processes
    one = [metrics for metrics in epochs(all_variants[1])
           if metrics["variant"] in ("teacher", "two_heads_hard", "two_heads_soft")]
    for a, b in zip(one, epochs(out / "deit_video"), strict=True):
        assert a.pop("variant") == b.pop("variant")
        assert a == pytest.approx(b, rel=2e-3, abs=1e-6)
    assert re.fullmatch(r"RESULT deit_video data=small-toy split=1 seed=0 teacher=0\.\d{4} "
                        r"(two_heads_(soft|hard)(_frame|_token)?=0\.\d{4} ){6}seconds=\d+",
                        printed["deit_video.py"].splitlines()[-1])


# ---- bad input


@pytest.mark.parametrize(("flags", "message"), [
    (("--teacher", "ViT-B-33"), "ViT-B-33 is not a CLIP"),
    (("--student", "toy-small:gone.pt"), "toy-small:gone.pt: "),
    (("--teacher-checkpoint", "gone.pt"), "gone.pt: there is no such file"),
    (("--eval-only", "gone.pt"), "gone.pt: there is no such file"),
    (("--data", "gone"), "--data gone: there is no such folder")])
def test_bad_input_is_one_line(toy, tmp_path, monkeypatch, capsys, flags, message):
    given = ("deit_video.py", "--data", toy, *FAST, "--out", tmp_path, *flags)
    monkeypatch.setattr(sys, "argv", list(map(str, given)))
    with pytest.raises(SystemExit, match=f"^deit_video.py: {message}[^\n]*$"):
        runpy.run_path(deit_video.__file__, run_name="__main__")
    assert not list(tmp_path.rglob("*-last.pt"))


@pytest.mark.parametrize(("flags", "message"), [
    ("--watch a.mp4 --labels a,b", "--watch needs --eval-only"),
    ("--resume RUN --grid", "leave out --grid"),
    ("--alpha 2", "--alpha must be 0 to 1")])
def test_refused_flags(capsys, flags, message):
    with pytest.raises(SystemExit):
        deit_video.parse(flags.split())
    assert message in capsys.readouterr().err
