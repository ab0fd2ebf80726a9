"""tinyclip_swap.py: the plain command, controls, --compare, resume, two processes, bad input."""
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import predicted_top1
from torchvision.transforms.v2 import functional as TF

import common
import tinyclip_swap
from tinyclip_swap import affinity_loss, class_probabilities, main, parse

SMALL = ("--large", "toy-large:random", "--small", "toy-small:random", "--epochs", 2, "--workers",
         0, "--batch-size", 16, "--frames", 4, "--test-every", 2)


def run(*flags):
    return main([str(flag) for flag in flags])


def weights(folder, variant):
    saved = torch.load(next(folder.rglob(f"{variant}-last.pt")), weights_only=True)
    return [*saved["model_state_dict"].values(), *saved["fusion_model_state_dict"].values()]


def record(folder):
    return json.loads(next(folder.rglob("results.json")).read_text())


def history(folder, variants=("large", "small", "small_affinity")):
    """The metrics of each epoch, without speeds"""
    epochs = [metrics for metrics in record(folder)["epochs"] if metrics["variant"] in variants]
    return [{**metrics, "videos_per_s": 0} for metrics in epochs]


@torch.no_grad()
def predict(model, videos, classes):
    text = model.encode_classes(classes)
    return class_probabilities(model.encode_video(videos), text).argmax(1)


# ---- the plain command and its controls


def test_plain_command_learns_and_prints_result(plain):
    printed, checkpoint = plain
    result = re.fullmatch(r"RESULT tinyclip_swap data=moves split=1 seed=0 large=(\S+) small=\S+ "
                          r"gmac_ratio=0\.48\d\d seconds=\d+", printed.splitlines()[-1])
    assert float(result[1]) >= .9  # chance is .25
    assert printed.startswith(f"run: {checkpoint.parent}\nmoves: 4 classes, 400 training videos")
    assert "\nnever flipped: moving left, moving right; 4 frames" in printed
    saved = json.loads(checkpoint.with_name("results.json").read_text())
    assert float(result[1]) == pytest.approx(saved["results"]["large"]["top1"])
    assert {"flags", "machine", "versions", "seconds"} <= saved.keys()
    assert len(saved["epochs"]) == 8


def test_the_toy_clip_is_trained_once_and_finds_captions_of_new_stills(plain, cache):
    clip, tokenizer, _ = common.build_clip_model("toy-large", cache)
    before = {path: path.stat().st_mtime_ns for path in cache.glob("toy-large*")}
    again = common.build_clip_model("toy-large", cache)[0]
    assert all(map(torch.equal, clip.state_dict().values(), again.state_dict().values()))
    assert {path: path.stat().st_mtime_ns for path in cache.glob("toy-large*")} == before
    assert len(before) == 1
    rng = np.random.default_rng(99)
    truths = [common.sample_toy_attributes(rng, "growing", str(rng.choice(common.SCENES)))
              for _ in range(64)]
    stills = np.stack([common.render_video(truth, 3, 32)[1] for truth in truths])
    captions = [common.toy_caption(truth) for truth in truths]
    pixels = TF.normalize(torch.from_numpy(stills).permute(0, 3, 1, 2) / 255,
                          clip.visual.image_mean, clip.visual.image_std)
    with torch.no_grad():
        image = clip.encode_image(pixels, normalize=True)
        text = clip.encode_text(tokenizer(captions), normalize=True)
    found = (image @ text.T).argmax(1)
    right = [captions[j] == caption for j, caption in zip(found, captions, strict=True)]
    assert np.mean(right) > .6  # chance is about 1 in 60


def test_trained_model_uses_the_order_of_frames(plain, moving):
    """A video played backwards shows the opposite action, one repeated frame shows none."""
    model = common.build_actionclip("toy-large", checkpoint=plain[1])
    (videos, labels), classes = moving[0]["test"], moving[1]
    assert classes == ["moving down", "moving left", "moving right", "moving up"]
    opposite = torch.tensor([3, 2, 1, 0])[labels]
    backwards = predict(model, videos.flip(1), classes)
    assert (backwards == opposite).float().mean() > .8
    still = predict(model, videos[:, 2:3].expand_as(videos), classes)
    assert (still == labels).float().mean() < .35


@pytest.mark.parametrize("trained", [True, False])
def test_affinity_loss_alone_transfers_what_the_teacher_knows(plain, moving, cache, trained):
    """Without labels: texts of random classes, no eq. (1). Swapped roles cannot pass, and an
    untrained teacher leaves the student at chance."""
    (videos, _), (test_videos, labels), classes = *moving[0].values(), moving[1]
    torch.manual_seed(0)
    checkpoint = plain[1] if trained else None
    teacher = common.build_actionclip("toy-large", cache=cache, checkpoint=checkpoint).eval()
    student = common.build_actionclip("toy-large", cache=cache)
    rng = np.random.default_rng(0)
    optimizer, schedule = tinyclip_swap.make_optimizer(student, 4e-4, 4 * 25)
    with torch.no_grad():
        teacher_v = teacher.encode_video(videos)
        teacher_t = teacher.encode_classes(classes)[12]
    tokens = student.tokenize_classes(classes)[12]
    for _ in range(4):
        for batch in torch.from_numpy(rng.permutation(len(videos))).split(16):
            labels_of_texts = rng.integers(4, size=len(batch))
            v, t, scale = student(videos[batch], tokens)
            affinity_loss(v, t[labels_of_texts], teacher_v[batch], teacher_t[labels_of_texts],
                          scale, 50.).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    top1 = (predict(student, test_videos, classes) == labels).float().mean()
    assert top1 > .8 if trained else top1 < .35, top1


# ---- the same numbers again


@pytest.fixture(scope="module")
def three_variants(toy, tmp_path_factory):
    """The folder of a run with --affinity, and its results"""
    out = tmp_path_factory.mktemp("three")
    return out, run("--data", toy, *SMALL, "--affinity", "--out", out)


@pytest.mark.parametrize("batch", [4, 8], ids=["between epochs", "in the second variant"])
def test_resume_gives_the_same_weights(toy, three_variants, tmp_path, monkeypatch, batch):
    augment, calls = common.augment, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return augment(*args)

    monkeypatch.setattr(common, "augment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--data", toy, *SMALL, "--out", tmp_path)
    monkeypatch.undo()
    results = run("--resume", next(tmp_path.glob("tinyclip_swap/*")))
    assert len(list(tmp_path.glob("tinyclip_swap/*"))) == 1
    assert list(results) == ["large", "small"]
    for variant in results:
        assert results[variant]["top1"] == three_variants[1][variant]["top1"]
        assert all(map(torch.equal, weights(three_variants[0], variant),
                       weights(tmp_path, variant)))
    log = history(tmp_path)
    assert log == history(three_variants[0], variants=("large", "small"))
    assert [metrics.get("top1") for metrics in log] == [
        None, results["large"]["top1"], None, results["small"]["top1"]]  # --test-every 2


def test_two_processes_follow_the_losses_of_one(three_variants, two_processes):
    folder = two_processes[1] / "tinyclip_swap"
    for variant, top1 in record(folder)["results"]["scores"].items():
        if variant != "gmac_ratio":
            path = next(folder.rglob(f"{variant}-predictions.csv"))
            assert predicted_top1(path) == pytest.approx(top1)
            assert path.read_text().count(",") == 11 * 25
    both = history(folder)
    for one, two in zip(history(three_variants[0]), both, strict=True):
        assert one.keys() == two.keys()
        for name in {"actionclip_loss", "affinity_loss"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=2e-3)
    assert "affinity_loss" in one
    assert "affinity_loss" not in both[0]


def test_resume_refuses_other_flags_and_other_videos(toy, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    flags = vars(parse(["--data", str(toy), *map(str, SMALL), "--out", str(tmp_path)]))
    (folder / "results.json").write_text(json.dumps({"flags": flags}))
    common.save_checkpoint({"history": [], "digest": 1}, folder / "large-last.pt")
    with pytest.raises(common.BadInput, match="the videos have changed"):
        run("--resume", folder)
    with pytest.raises(SystemExit):
        run("--resume", folder, "--lr=.1", "--workers", 3)
    assert "leave out --lr\n" in capsys.readouterr().err
    resumed = parse(["--resume", str(folder), "--workers", "3"])
    assert vars(resumed) == {**flags, "resume": str(folder), "workers": 3}
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        run("--resume", tmp_path)


# ---- --compare


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
    """The folder of a run with --compare, and its results"""
    out = tmp_path_factory.mktemp("compared")
    return out, run("--data", toy, *SMALL, "--compare", "--out", out)


def test_compare_trains_the_towers_that_it_names(toy, three_variants, compared):
    out, results = compared
    assert list(results) == ["actionclip", "vifi_clip", "text4vis", "zero_shot"]
    gmacs = {variant: row["GMAC/video"] for variant, row in results.items()}
    assert gmacs["vifi_clip"] == gmacs["zero_shot"] < gmacs["text4vis"]
    assert all(map(torch.equal, weights(out, "actionclip"), weights(three_variants[0], "large")))
    args = parse([*map(str, SMALL), "--data", str(toy), "--compare"])
    for variant, text_moves in (("vifi_clip", True), ("text4vis", False)):
        first = tinyclip_swap.build_model(variant, args).clip_model.state_dict()
        saved = torch.load(next(out.rglob(f"{variant}-last.pt")), weights_only=True)
        moved = {name for name, x in saved["model_state_dict"].items()
                 if not torch.equal(x, first[name])}
        assert {"visual.proj", "logit_scale"} <= moved
        moved_text = [name for name in moved if not name.startswith(("visual.", "logit_scale"))]
        assert bool(moved_text) == text_moves
    assert not list(out.rglob("zero_shot-last.pt"))


@pytest.mark.parametrize("variant", ["vifi_clip", "text4vis"])
def test_checkpoints_know_head_frames_and_templates(toy, compared, tmp_path, monkeypatch, variant):
    num_templates, tokenize = set(), common.ActionCLIP.tokenize_classes

    def spy(model, classes, templates=None):
        num_templates.add(len(templates or model.templates))
        return tokenize(model, classes, templates)

    monkeypatch.setattr(common.ActionCLIP, "tokenize_classes", spy)
    out, results = compared
    alone = run("--data", toy, "--workers", 0, "--out", tmp_path, "--eval-only",
                next(out.rglob(f"{variant}-last.pt")))["eval_only"]
    assert num_templates == {1}
    for key in ("top1", "top5", "GMAC/video", "params M"):
        assert alone[key] == results[variant][key]
    assert record(tmp_path)["flags"]["frames"] == 4  # the flag's default is 8


# ---- --eval-only


def test_eval_only_of_a_clip_is_zero_shot(toy, compared, tmp_path):
    alone = run("--data", toy, *SMALL, "--out", tmp_path, "--eval-only", "toy-large:random")
    for key in ("top1", "top5", "GMAC/video", "params M"):
        assert alone["eval_only"][key] == compared[1]["zero_shot"][key]


def test_eval_only_of_the_plain_checkpoint_gives_its_number(plain, moves, out):
    results = run("--data", moves, "--out", out, "--workers", 0, "--eval-only", plain[1])
    saved = json.loads(plain[1].with_name("results.json").read_text())["results"]["large"]
    assert results["eval_only"]["top1"] == saved["top1"]
    assert results["eval_only"]["GMAC/video"] == saved["GMAC/video"]


def test_eval_only_needs_no_training_list(plain, moves, tmp_path, capsys):
    """A list of test videos is enough, and so are their class folders."""
    data = common.load_dataset(moves)
    rows = ["path,label"]
    for path, label in data.test:
        rows.append(f"{path},{data.classes[label]}")
        folder = tmp_path / "folders" / "test" / data.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / Path(path).name).symlink_to(path)
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "test.csv").write_text("\n".join(rows))
    saved = json.loads(plain[1].with_name("results.json").read_text())["results"]["large"]
    for name in ("listed", "folders"):
        flags = ("--data", tmp_path / name, "--workers", 0, "--out", tmp_path)
        results = run(*flags, "--eval-only", plain[1])
        assert results["eval_only"]["top1"] == saved["top1"]
        assert f"{name}: 4 classes, 0 training videos, 80 test" in capsys.readouterr().out
        with pytest.raises(common.BadInput, match="there is no data set with a split 1"):
            run(*flags)


def save_released_checkpoint(path, model):
    """As ActionCLIP's code saves it: without backbone, frames and templates"""
    modules = {"model_state_dict": model.clip_model, "fusion_model_state_dict": model.fusion}
    torch.save({name: {f"module.{key}": x for key, x in module.state_dict().items()}
                for name, module in modules.items()}, path)
    return path


def test_released_checkpoint_gets_its_own_class_names(toy, tmp_path, monkeypatch, capsys):
    """UCF101's classes in the spelling of its lists; the number of frames is assumed, and said."""
    root = tmp_path / "UCF101"
    file = save_released_checkpoint(tmp_path / "released.pt",
                                    common.build_actionclip("toy-small:random"))
    (root / "ucfTrainTestlist").mkdir(parents=True)
    for split in ("train", "test"):
        videos = [f"{name}/{split}.mp4" for name in ("ApplyEyeMakeup", "YoYo")]
        (root / "ucfTrainTestlist" / f"{split}list01.txt").write_text("\n".join(videos))
        for i, video in enumerate(videos):
            (root / video).parent.mkdir(exist_ok=True)
            shutil.copy(toy / split / f"000{i}.mp4", root / video)
    class_names, tokenize = set(), common.ActionCLIP.tokenize_classes

    def spy(model, classes, *more):
        class_names.add(tuple(classes))
        return tokenize(model, classes, *more)

    monkeypatch.setattr(common.ActionCLIP, "tokenize_classes", spy)
    results = run("--data", root, "--workers", 0, "--out", tmp_path, "--eval-only",
                  f"toy-small:{file}")
    assert results["eval_only"]["backbone"] == "toy-small"
    assert class_names == {("ApplyEyeMakeup", "YoYo")}
    assert f"{file} does not say its number of frames; --frames 8" in capsys.readouterr().out
    with pytest.raises(common.BadInput, match=f"does not name its backbone: write NAME:{file}"):
        run("--data", toy, "--out", tmp_path, "--eval-only", file)


def test_two_headed_checkpoint_is_refused(toy, tmp_path):
    model = common.build_actionclip("toy-small:random")
    model.fusion.token = torch.nn.Parameter(torch.zeros(48))
    file = save_released_checkpoint(tmp_path / "token.pt", model)
    for flag in ("--eval-only", "--small"):
        with pytest.raises(common.BadInput, match=rf"{file} has two heads: use deit_video\.py"):
            run("--data", toy, "--large", "toy-large:random", "--out", tmp_path, flag,
                f"toy-small:{file}")


# ---- optimizer and costs


def test_optimizer_groups_and_schedule():
    """Norms, biases, embeddings and scales do not decay; new layers learn ten times as fast."""
    model = common.build_actionclip("toy-small:random")
    optimizer, schedule = tinyclip_swap.make_optimizer(model, 1e-3, 20)
    names = {weight: name for name, weight in model.named_parameters()}
    groups = {names[w]: group for group in optimizer.param_groups for w in group["params"]}
    assert groups.keys() == set(names.values())
    for weight, name in names.items():
        no_decay = weight.ndim < 2 or "embedding" in name
        assert groups[name]["weight_decay"] == (0 if no_decay else .2)
        lr = 1e-2 if name.startswith("fusion.") else 1e-3
        assert groups[name]["initial_lr"] == pytest.approx(lr)
        assert groups[name]["betas"] == (.9, .98)
    rates = []
    for _ in range(20):
        rates.append(groups["clip_model.logit_scale"]["lr"])
        optimizer.step()
        schedule.step()
    cosine = [5e-4 * (1 + np.cos(np.pi * step / 18)) for step in range(18)]
    np.testing.assert_allclose(rates, [5e-4, 7.5e-4, *cosine], rtol=1e-6)


def gradient_of_shards(rank, folder, world_size=2):
    """The gradient of eq. (1) if each of the processes has a share of the videos -> a file"""
    tinyclip_swap.RANK, tinyclip_swap.WORLD_SIZE = rank, world_size
    init = f"file://{folder}/store{world_size}"
    torch.distributed.init_process_group("gloo", init, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(5, 4))
    x, labels = torch.randn(6, 5)[rank::world_size], torch.arange(6)[rank::world_size] % 3
    v, t = [tinyclip_swap.gather(model(x)) for x in (x, x.flip(1))]
    tinyclip_swap.actionclip_loss(v, t, tinyclip_swap.gather(labels), 9.).backward()
    torch.save(model.module.weight.grad, folder / f"{world_size}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_gradient_of_two_processes_is_that_of_one(tmp_path):
    for count in (1, 2):
        torch.multiprocessing.start_processes(gradient_of_shards, (tmp_path, count), count,
                                              start_method="fork")
    one, *two = [torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt")]
    for gradient in two:
        torch.testing.assert_close(gradient, one)


def test_a_step_of_training(toy, tmp_path, monkeypatch):
    """Both terms count once, the teacher's scale is 50, sentences are drawn from all 16 templates,
    and the learned scale stays below 100."""
    model, teacher = [common.build_actionclip("toy-small:random") for _ in range(2)]
    model.clip_model.logit_scale.data.fill_(5.)
    forward, sentences, gradients = model.forward, [], []

    def noted_forward(video, tokens):
        sentences.extend(tokens)
        return forward(video, tokens)

    def affinity(v, t, teacher_v, teacher_t, scale, teacher_scale):
        assert teacher_scale == 50
        return 2 * scale

    monkeypatch.setattr(model, "forward", noted_forward)
    monkeypatch.setattr(tinyclip_swap, "actionclip_loss", lambda v, t, labels, scale: scale)
    monkeypatch.setattr(tinyclip_swap, "affinity_loss", affinity)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda weights, norm: gradients.append(
        (model.clip_model.logit_scale.grad.item(), norm)))
    flags = "--data", toy, "--affinity", "--epochs", 1, "--batch-size", 48, "--frames", 2
    args, data = parse([*map(str, flags), "--workers", "0"]), common.load_dataset(toy)
    tinyclip_swap.train("small_affinity", model, teacher, data, args, tmp_path)
    assert gradients == [(pytest.approx(3 * np.exp(5.)), 1.)]
    assert model.clip_model.logit_scale.item() == pytest.approx(np.log(100))
    prompts = model.tokenize_classes(data.classes)                              # (16, K, length)
    drawn = {(prompts == tokens).all(-1).any(1).nonzero().item() for tokens in sentences}
    assert len(drawn) > 12


def test_gmacs_and_num_params_are_those_of_the_tinyclip_page():
    """TinyCLIP-ViT-40M-32 has 39.7 M in its image tower, which takes 2.00 GMAC per frame, and
    19.2 M in its text tower. Six layers of width 512 with 77 positions are added."""
    model = common.build_actionclip("TinyCLIP-ViT-40M-32-Text-19M:random")
    num_params = model.num_params_m()
    assert num_params == pytest.approx(39.692 + 19.217 + 6 * 3.152 + .039, abs=.01)
    assert model.gmacs(1) == pytest.approx(2.00 + .019, abs=.01)
    assert model.gmacs(1) == model.requires_grad_(False).gmacs(1)
    assert model.num_params_m() == num_params


def test_benchmark_stops_early_if_a_call_is_slow(monkeypatch):
    module = runpy.run_path(tinyclip_swap.__file__)
    seconds = iter(range(0, 1000, 3))  # a clock that moves by 3 s each time it is read
    monkeypatch.setattr(module["time"], "perf_counter", lambda: next(seconds))
    calls = []
    assert module["median_ms"](lambda: calls.append(1) or torch.zeros(1)) == 3000
    assert len(calls) == 2


# ---- data


def test_undecodable_videos_are_named_once_and_count_as_wrong(toy, tmp_path, capsys):
    """With three views per test video"""
    folder = tmp_path / "some-bad"
    shutil.copytree(toy, folder)
    for name in ("train/0003.mp4", "test/0004.mp4"):
        (folder / name).write_text("no video")
    results = run("--data", folder, *SMALL, "--out", tmp_path, "--sampling", "dense", "--views", 3)
    printed = capsys.readouterr()
    for name in ("train/0003.mp4", "test/0004.mp4"):
        assert printed.err.count(f"cannot decode {folder / name}") == 1
    assert "\ntop1: 24 test videos, chance 0.167\n" in printed.out
    assert "NOTE 2 videos cannot be decoded; in the test they count as wrong" in printed.out
    model = common.build_actionclip("toy-small", checkpoint=next(tmp_path.rglob("small-*.pt")))
    assert results["small"]["params M"] == model.num_params_m()
    assert results["small"]["GMAC/video"] == 3 * model.gmacs(4)
    data = common.load_dataset(str(folder))
    dataset = common.VideoDataset(data.test, 4, model.resize_to, "dense", 3)
    batch = next(iter(common.VideoLoader(dataset, 24)))
    views = common.center_crop(batch.video, model.crop_size).view(24 * 3, 4, 3, 32, 32)
    with torch.no_grad():
        p = class_probabilities(model.encode_video(views), model.encode_classes(data.classes))
    correct = p.view(24, 3, 6).mean(1).argmax(1) == torch.tensor(batch.label)
    assert batch.label[4] == -1
    assert results["small"]["top1"] == pytest.approx(correct.float().mean().item())
    for variant in results:
        path = next(tmp_path.rglob(f"{variant}-predictions.csv"))
        assert predicted_top1(path) == pytest.approx(results[variant]["top1"])
        lines = path.read_text().splitlines()
        assert len(lines) == 25
        assert lines[5] == f"{folder}/test/0004.mp4,growing"
    assert lines[1].split(",")[2] == data.classes[p.view(24, 3, 6).mean(1)[0].argmax()]


def test_three_crops_are_averaged(toy, compared, tmp_path):
    """The middle and both ends of the longer side; costs are those of three videos."""
    flags = ("--data", toy, *SMALL, "--out", tmp_path, "--eval-only", "toy-large:random")
    results = run(*flags, "--crops", 3)["eval_only"]
    assert results["GMAC/video"] == 3 * compared[1]["zero_shot"]["GMAC/video"]
    model = common.build_actionclip("toy-large:random")
    text = model.encode_classes(["moving up", "growing"])
    video = torch.randint(256, (4, 3, 40, 56), dtype=torch.uint8)
    p = tinyclip_swap.classify(model, [video], text, 2, 3)
    parts = [tinyclip_swap.classify(model, [video[half, ..., left:left + 32]], text)
             for left in (0, 12, 24) for half in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(p, sum(parts) / 6)


def test_weizmann_runs_and_counts_every_video(shared, tmp_path, capsys):
    results = run("--data", shared / "weizmann", *SMALL, "--epochs", 1, "--out", tmp_path)
    assert "\ntop1: 30 test videos" in capsys.readouterr().out
    assert (30 * results["small"]["top1"]) % 1 == pytest.approx(0, abs=1e-4)


def test_hmdb51_as_released_needs_allow_missing(hmdb51, tmp_path, capsys):
    flags = ("--data", hmdb51, *SMALL, "--epochs", 1, "--out", tmp_path)
    with pytest.raises(common.BadInput, match="5097 of 5100 listed videos are missing"):
        run(*flags)
    run(*flags, "--allow-missing")
    printed = capsys.readouterr().out
    assert "\ntop1: 1 test videos" in printed
    assert "NOTE 5097 listed videos are missing" in printed
    assert "NOTE 49 classes have no training video" in printed


def test_no_flip_reaches_training(toy, tmp_path, monkeypatch):
    can_flip = []
    monkeypatch.setattr(common, "augment", lambda batch, size, flips, *_: can_flip.append(flips))
    for flag in ([], ["--no-flip"]):
        with pytest.raises(TypeError):  # without a video
            run("--data", toy, *SMALL, "--out", tmp_path, *flag)
    assert any(can_flip[0])
    assert not any(can_flip[1])


def test_bad_input_is_one_line(toy, tmp_path, monkeypatch, capsys):
    """Before anything is trained"""
    flags = ("--data", toy, "--out", tmp_path, *SMALL, "--views", 2)
    monkeypatch.setattr(sys, "argv", ["tinyclip_swap.py", *map(str, flags)])
    with pytest.raises(SystemExit, match=r"^tinyclip_swap.py: --views: .* add --sampling dense$"):
        runpy.run_path(tinyclip_swap.__file__, run_name="__main__")
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("flags", [
    "--batch-size 1", "--frames 78", "--lr nan", "--fps inf", "--epochs 0", "--views 10000",
    "--seed 9223372036854775808", "--affinity --compare"])
def test_flags_out_of_range_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags.split())
    assert stop.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]
