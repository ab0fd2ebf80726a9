"""spatial_kd.py: equations, what the targets teach, which videos get which targets, resume, two
processes, bad input. Networks are random where nothing has to be learned."""
import itertools
import json
import re
import runpy
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import predicted_top1

import common
import deit_video
import spatial_kd
from common import BadInput, build_actionclip, load_dataset
from spatial_kd import (
    VARIANTS,
    SpatialTask,
    Student,
    spatial_loss,
    spatial_targets,
    toy_vocabulary,
    video_attributes,
)

FAST = ("--student", "toy-small:random", "--labeller", "toy-small:random", "--epochs", 2,
        "--workers", 0, "--batch-size", 16, "--frames", 4, "--test-every", 2)


def run(*flags):
    return spatial_kd.main([str(flag) for flag in flags])


def weights(out, variant="spatial"):
    """The tensors of a checkpoint, those of the heads last"""
    saved = torch.load(next(out.rglob(f"{variant}-last.pt")), weights_only=True)
    modules = ("model_state_dict", "fusion_model_state_dict", "spatial_heads")
    return list(itertools.chain(*[saved.get(name, {}).values() for name in modules]))


def read_results(out):
    return json.loads(next(out.glob("spatial_kd/*/results.json")).read_text())


def epochs(out):
    return [{**metrics, "videos_per_s": 0} for metrics in read_results(out)["epochs"]]


def read_targets(out):
    """-> what targets.pt holds, its tasks as a list of SpatialTask"""
    saved = torch.load(next(out.glob("spatial_kd/*/targets.pt")), weights_only=True)
    return {**saved, "tasks": [SpatialTask(**task) for task in saved["tasks"]]}


@pytest.fixture(scope="module")
def all_variants(toy, tmp_path_factory):
    """A run of all variants -> its results, its --out folder"""
    out = tmp_path_factory.mktemp("all-variants")
    return run("--data", toy, *FAST, "--out", out, "--variants", *VARIANTS), out


# ---- equations


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_targets_are_a_mean_of_softmaxes_and_ignore_the_order_of_frames():
    frames = normal(3, 4, 8)
    labels = normal(5, 8, seed=1)
    f = frames / frames.norm(dim=-1, keepdim=True)
    b = labels / labels.norm(dim=-1, keepdim=True)
    e = (100 * torch.einsum("btd,jd->btj", f, b)).exp()
    q = spatial_targets(frames, labels)
    torch.testing.assert_close(q, (e / e.sum(-1, keepdim=True)).mean(1))
    torch.testing.assert_close(spatial_targets(7 * frames[:, [2, 0, 3, 1]], .1 * labels), q)


def test_spatial_loss_and_its_gradient_in_closed_form():
    """Of five videos, the second is below MIN_CONFIDENCE and the fourth has no targets."""
    z = normal(5, 4).requires_grad_()
    q = normal(5, 4, seed=1).mul(2).softmax(1)
    q[1] = .25
    q[3] = 0
    confident = [0, 2, 4]
    loss = spatial_loss(z, q)
    gradient = torch.zeros(5, 4, dtype=torch.float64)
    p = z.detach().softmax(1)[confident]
    t = q[confident]
    gradient[confident] = (p - t) / 3
    torch.testing.assert_close(loss, (t * (t / p).log()).sum(1).mean())
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], gradient)
    torch.testing.assert_close(spatial_loss(z.repeat(2, 1), q.repeat(2, 1)), loss)
    assert spatial_loss(z, 0 * q) == 0
    assert spatial_loss(1e4 * z, q).isfinite()


def test_total_loss_takes_the_mean_over_tasks():
    assert spatial_kd.total_loss(2., [1., 5.], .5) == 3.5
    assert spatial_kd.total_loss(2., [], .5) == 2


def test_heads_start_as_the_identity():
    torch.manual_seed(0)
    tasks = toy_vocabulary()
    student = Student(build_actionclip("toy-small:random"), tasks)
    label_sentences = [student.model.tokenize_classes(task.labels)[0] for task in tasks]
    sentences = student.model.tokenize_classes(["a"] * 4)[0]
    v, _, scale, logits = student(torch.rand(4, 2, 3, 32, 32), sentences, label_sentences)
    u = student.model.encode_text(torch.cat(label_sentences))
    cosine = torch.nn.functional.cosine_similarity(v[:, None], u, dim=-1)
    torch.testing.assert_close(torch.cat(logits, 1), scale * cosine)


# ---- what the targets teach


@pytest.mark.parametrize("shuffled", [False, True])
def test_spatial_loss_teaches_what_the_labeller_knows(plain, moves, moving, cache, shuffled):
    """No action labels here. The model of tinyclip_swap.py's run has learned motions and forgotten
    colours, of which the labeller is certain. Targets of other videos leave it at chance, 1/6."""
    (videos, _), (test_videos, _) = moving[0].values()
    task = toy_vocabulary()[0]
    labeller = build_actionclip("toy-large", common.MeanHead, cache)
    student = Student(build_actionclip("toy-large", checkpoint=plain[1]), [task])
    colours = [video_attributes(path)["colour"] for path, _ in load_dataset(str(moves)).test]
    truth = torch.tensor([task.labels.index(colour) for colour in colours])
    rng = np.random.default_rng(0)

    @torch.no_grad()
    def accuracy():
        v = student.eval().model.encode_video(test_videos)
        logits, = student.heads(v, [spatial_kd.embed_labels(student.model, task)])
        return (logits.argmax(1) == truth).float().mean()

    with torch.no_grad():
        b = spatial_kd.embed_labels(labeller, task)
        q = spatial_targets(labeller.encode_frames(videos), b)
        q_test = spatial_targets(labeller.encode_frames(test_videos), b)
    assert (q_test.argmax(1) == truth).float().mean() > .95
    assert accuracy() < .6
    q = q[torch.from_numpy(rng.permutation(len(q)))] if shuffled else q
    optimizer, schedule = spatial_kd.make_optimizer(student, 4e-4, 2 * 25)
    action = student.model.tokenize_classes(["a"])[0]
    label_prompts = student.model.tokenize_classes(task.labels)
    student.train()
    for _ in range(2):
        for rows in torch.from_numpy(rng.permutation(len(videos))).split(16):
            *_, (logits,) = student(videos[rows], action, [label_prompts[rng.integers(16)]])
            spatial_loss(logits, q[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert accuracy() < .35 if shuffled else accuracy() > .9


# ---- vocabulary and ground truth


@pytest.mark.parametrize(("name", "labels"), [
    ("RATRACE_wave_f_nm_np1_fr_goo_37.avi", ("full body", "one person", "front")),
    ("April_09_brush_hair_u_cm_np2_ba_med_3.avi", ("upper body", "two people", "back")),
    ("X_kick_h_nm_np0_le_bad_0.avi", ("face", "nobody", "left")),
    ("X_kick_l_nm_np5_ri_goo_12.avi", ("lower body", "a group", "right"))])
def test_hmdb51_file_names_tell_framing_people_and_viewpoint(name, labels):
    vocabulary = {task.name: task.labels for task in spatial_kd.VOCABULARY}
    attributes = video_attributes(f"/hmdb/wave/{name}")
    assert attributes == dict(zip(("framing", "people", "viewpoint"), labels, strict=True))
    assert all(label in vocabulary[task] for task, label in attributes.items())
    assert video_attributes("/ucf/v_Archery_g01_c01.avi") == {}


def test_labeller_is_compared_with_the_ground_truth(capsys):
    q = torch.tensor([[.8, .2], [.2, .8], [.9, .1], [0, 0]])
    attributes = [{"scene": "dots"}, {"scene": "dots"}, {"scene": "checks"}, {}]
    tasks = [SpatialTask(name, ["dots", "checks"], targets=q) for name in ("scene", "sky")]
    spatial_kd.print_labeller_accuracy(tasks, attributes)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
    assert rows == [["task", "confident", "labeller", "majority"],
                    ["scene", "0.7500", "0.3333", "0.6667"], ["sky", "0.7500", "-", "-"]]


# ---- targets


def test_label_only_labels_the_training_videos_and_prints_the_command_of_the_grid(
        toy, tmp_path, monkeypatch, capsys):
    paths = []
    read = common.VideoDataset.read

    def spy(dataset, path, rng):
        paths.append(path)
        return read(dataset, path, rng)

    monkeypatch.setattr(common.VideoDataset, "read", spy)
    data = load_dataset(str(toy))
    assert run("--data", toy, *FAST, "--out", tmp_path, "--label-only", "--label-noise", .5) == {}
    assert sorted(paths) == sorted(path for path, _ in data.train)
    saved = read_targets(tmp_path)
    assert [len(task.targets) for task in saved["tasks"]] == [48] * 4
    assert {task.targets.dtype for task in saved["tasks"]} == {torch.float16}
    assert (saved["digest"], saved["frames"]) == (data.digest(), 4)  # of the correct labels
    assert saved["labeller"] == "toy-small:random"
    assert not list(tmp_path.rglob("*-last.pt"))
    command = capsys.readouterr().out.splitlines()[-1].partition("deit_video.py")[2]
    args = deit_video.parse(shlex.split(command))
    assert (args.targets, args.data) == (str(next(tmp_path.rglob("targets.pt"))), str(toy))
    assert args.grid
    assert args.frames == 4


def test_shuffled_targets_are_those_of_other_videos():
    q = torch.stack([torch.linspace(.3, .49, 48), 1 - torch.linspace(.3, .49, 48)], 1).half()
    task = SpatialTask("scene", ["dots", "checks"], targets=q)
    first, second = spatial_kd.shuffle_targets([task, task], 0)
    assert (first.targets != q).any(1).all()
    assert torch.equal(first.targets.sort(0).values, q.sort(0).values)
    assert torch.equal(first.targets, second.targets)  # all tasks get those of the same video


def test_oracle_targets_are_the_ground_truth(toy):
    vocabulary = toy_vocabulary()
    train_attributes = [video_attributes(path) for path, _ in load_dataset(str(toy)).train]
    tasks = spatial_kd.oracle_tasks(vocabulary, train_attributes)
    assert [task.name for task in tasks] == ["colour", "shape", "place", "scene"]
    for task, words in zip(tasks, vocabulary, strict=True):
        labels = [task.labels[j] for j in task.targets.argmax(1)]
        assert set(task.labels) <= set(words.labels)
        assert labels == [attributes[task.name] for attributes in train_attributes]
        largest = task.targets.sort(1).values[:, -2:]
        assert torch.equal(largest, torch.tensor([[0., 1.]] * 48).half())


def test_oracle_without_ground_truth_fails_before_labelling(toy, tmp_path):
    folder = tmp_path / "unknown"
    shutil.copytree(toy, folder, ignore=shutil.ignore_patterns("*.json"))
    with pytest.raises(BadInput, match="--variants oracle: these videos have no ground truth"):
        run("--data", folder, *FAST, "--out", tmp_path / "runs", "--variants", "oracle")
    assert not (tmp_path / "runs/spatial_kd").exists()


def test_targets_that_are_not_confident_are_refused(toy, tmp_path, monkeypatch):
    tasks = [SpatialTask("shape", ["a", "b", "c", "d"], targets=torch.full((48, 4), .25).half())]
    monkeypatch.setattr(spatial_kd, "label_videos", lambda *_: tasks)
    with pytest.raises(BadInput, match=r"no video has a target of at least 0\.3"):
        run("--data", toy, *FAST, "--out", tmp_path, "--variants", "spatial")


def test_each_video_is_trained_on_its_own_targets(toy, tmp_path, monkeypatch, capsys):
    """Also: a training video that cannot be decoded is replaced, a test video counts as wrong, and
    no video is flipped, since labels tell left from right."""
    folder = tmp_path / "some-bad"
    shutil.copytree(toy, folder)
    for name in ("train/0003.mp4", "test/0004.mp4"):
        (folder / name).write_text("no video")
    vocabulary = [SpatialTask("things", ["a circle", "a cross"]),
                  SpatialTask("place", ["left", "right", "top", "bottom"], ["at the {}"])]
    monkeypatch.setattr(spatial_kd, "toy_vocabulary", lambda: vocabulary)
    augment = common.augment
    loss = spatial_kd.spatial_loss
    indices = []
    targets_by_size = {2: [], 4: []}

    def spy_augment(batch, size, can_flip, *more):
        assert not any(can_flip)
        indices.extend(index for _, index in batch.rng_key)
        return augment(batch, size, can_flip, *more)

    def spy_loss(logits, q):
        targets_by_size[q.shape[1]].append(q)
        return loss(logits, q)

    monkeypatch.setattr(common, "augment", spy_augment)
    monkeypatch.setattr(spatial_kd, "spatial_loss", spy_loss)
    results = run("--data", folder, *FAST, "--out", tmp_path, "--variants", "spatial")
    assert len(indices) == 96
    assert 3 not in indices
    for task in read_targets(tmp_path)["tasks"]:
        assert (task.targets.amax(1) > 0).tolist() == [index != 3 for index in range(48)]
        trained_on = torch.cat(targets_by_size[len(task.labels)])
        assert torch.equal(trained_on, task.targets[indices].float())
    printed = capsys.readouterr()
    assert "flipped: no class" in printed.out
    assert printed.err.count(f"cannot decode {folder / 'train/0003.mp4'}") == 1
    assert "NOTE 2 videos cannot be decoded; in the test they count as wrong" in printed.out
    correct = 24 * results["spatial"]["top1"]
    assert correct == pytest.approx(round(correct))


# ---- runs


def test_variants_differ_in_their_weights_and_only_heads_are_added(all_variants):
    results, out = all_variants
    assert list(results) == list(VARIANTS)
    saved = read_results(out)["results"]
    assert all(saved["scores"][variant] == row["top1"] for variant, row in results.items())
    assert {variant: saved[variant] for variant in results} == results
    for variant, row in results.items():
        for name in ("top1", "top1_swapped"):
            path = next(out.rglob(f"{variant}{name.removeprefix('top1')}-predictions.csv"))
            assert predicted_top1(path) == pytest.approx(row[name])
    assert results["baseline"]["colour"] is None
    assert 0 <= results["spatial"]["colour"] <= 1
    assert len(weights(out)) - len(weights(out, "baseline")) == 9  # four heads and their scales
    for variant, other in itertools.combinations(VARIANTS, 2):
        pairs = zip(weights(out, variant), weights(out, other), strict=False)
        assert not all(torch.equal(a, b) for a, b in pairs)
    assert next(out.rglob("words.png")).stat().st_size > 10_000


def test_picture_colours_labels_by_the_ground_truth(toy, tmp_path, monkeypatch):
    """Green: right, red: wrong, gray: the truth is not known, black: names and the truth"""
    data = load_dataset(str(toy))
    draw_table = spatial_kd.draw_table
    tables = []

    def spy(rows):
        tables.append(rows)
        return draw_table(rows)

    monkeypatch.setattr(spatial_kd, "draw_table", spy)
    args = spatial_kd.parse([*map(str, FAST), "--out", str(tmp_path)])
    tasks = [toy_vocabulary()[0], SpatialTask("people", ["nobody", "one person"])]
    predictions = {i: (data.classes[i % 2], "red", "nobody") for i in range(24)}
    spatial_kd.save_picture("spatial", tasks, predictions, data, args, tmp_path / "words.png")
    rows = tables[0]
    assert len(rows) == 8 * 4
    assert "zero-shot" in str(tables[1])
    for n, i in enumerate(range(0, 24, 3)):
        path, k = data.test[i]
        colour = video_attributes(path)["colour"]
        header, action, colours, people = rows[4 * n:4 * n + 4]
        assert header == [(name, "black") for name in ("", "truth", "labeller", "spatial")]
        assert action[:2] == [("action", "black"), (data.classes[k], "black")]
        assert action[3] == (data.classes[i % 2], "green" if k == i % 2 else "red")
        assert colours[:2] == [("colour", "black"), (colour, "black")]
        assert colours[3] == ("red", "green" if colour == "red" else "red")
        assert people[1:] == [("-", "black"), (people[2][0], "gray"), ("nobody", "gray")]
        for row in (action, colours):
            assert row[2][1] == ("green" if row[2][0] == row[1][0] else "red")


@pytest.mark.parametrize("frames", [1, 4])
def test_picture_has_no_empty_half(toy, tmp_path, monkeypatch, frames):
    """The frames and the table beside them fill the width, whatever T is."""
    monkeypatch.setattr(spatial_kd, "save_image", lambda page, _: pages.append(page))
    pages = []
    data = load_dataset(str(toy))
    args = spatial_kd.parse([*map(str, FAST), "--out", str(tmp_path), "--frames", str(frames)])
    tasks = toy_vocabulary()
    predictions = dict.fromkeys(range(3), ("growing", "white", "square", "top left", "dots"))
    spatial_kd.save_picture("spatial", tasks, predictions, data, args, "words.png")
    columns = (pages[0][:, 110:] < .9).any(0).any(0)  # below the title
    assert columns.nonzero().max() > .8 * len(columns)


def test_heads_do_not_change_the_prediction_of_the_action(plain, moves, tmp_path):
    """The accuracy is that of tinyclip_swap.py's run, whatever the heads predict."""
    data = load_dataset(str(moves))
    args = spatial_kd.parse(["--workers", "0", "--frames", "4"])
    model = build_actionclip("toy-large", checkpoint=plain[1])
    path = tmp_path / "a-predictions.csv"
    accuracy, predictions = spatial_kd.evaluate(Student(model, toy_vocabulary()), data, args, path)
    record = json.loads(plain[1].with_name("results.json").read_text())
    assert accuracy["action"] == pytest.approx(record["results"]["large"]["top1"])
    assert list(accuracy) == ["action", "colour", "shape", "place", "scene"]
    assert predicted_top1(path) == accuracy["action"]
    without_heads, actions = spatial_kd.evaluate(Student(model, []), data, args, path)
    assert without_heads == {"action": accuracy["action"]}
    assert {i: labels[:1] for i, labels in predictions.items()} == actions


def test_resumed_run_equals_an_undisturbed_one(toy, all_variants, tmp_path, monkeypatch):
    augment = common.augment
    calls = []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 11:  # in the second epoch of the second variant
            raise KeyboardInterrupt
        return augment(*given)

    monkeypatch.setattr(common, "augment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--data", toy, *FAST, "--out", tmp_path, "--variants", "spatial", "shuffled")
    monkeypatch.undo()
    folder, = tmp_path.glob("spatial_kd/*")
    results = run("--resume", folder)
    assert list(tmp_path.glob("spatial_kd/*")) == [folder]
    for variant, row in results.items():
        assert row == all_variants[0][variant]
        pairs = zip(weights(tmp_path, variant), weights(all_variants[1], variant), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    undisturbed = [row for row in epochs(all_variants[1]) if row["variant"] in results]
    assert epochs(tmp_path) == undisturbed


def test_two_processes_equal_one(all_variants, two_processes):
    printed, out = two_processes
    one = [row for row in epochs(all_variants[1]) if row["variant"] == "spatial"]
    for a, b in zip(one, epochs(out), strict=True):
        assert a.pop("variant") == b.pop("variant")
        assert a == pytest.approx(b, rel=2e-3)
    assert re.fullmatch(r"RESULT spatial_kd data=small-toy split=1 seed=0 spatial=0\.\d{4} "
                        r"spatial_swapped=0\.\d{4} seconds=\d+",
                        printed["spatial_kd.py"].splitlines()[-1])
    record = read_results(out)
    assert {"flags", "machine", "versions", "seconds", "results", "undecodable"} <= record.keys()
    for task in read_targets(out)["tasks"]:
        assert (task.targets.amax(1) > 0).all()  # of both processes


def test_hmdb51_with_missing_videos(hmdb51, tmp_path, capsys):
    results = run("--data", hmdb51, *FAST, "--out", tmp_path, "--allow-missing", "--variants",
                  "spatial", "oracle")
    printed = capsys.readouterr().out
    assert ("NOTE toy-small:random was trained on toy images; its labels for HMDB51 are "
            "meaningless") in printed
    assert "1 test videos" in printed
    assert "NOTE 5097 listed videos are missing" in printed
    assert {"framing", "people", "viewpoint"} <= results["spatial"].keys()


# ---- bad input


@pytest.mark.parametrize(("flags", "message"), [
    (("--labeller", "toy-small:gone.pt"), "toy-small:gone.pt: "),
    (("--student", "toy-huge"), "toy-huge is not a CLIP"),
    (("--data", "gone"), "--data gone: there is no such folder")])
def test_bad_input_is_one_line(toy, tmp_path, monkeypatch, flags, message):
    argv = ("spatial_kd.py", "--data", toy, *FAST, "--out", tmp_path, *flags)
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    with pytest.raises(SystemExit, match=f"^spatial_kd.py: {message}[^\n]*$"):
        runpy.run_path(spatial_kd.__file__, run_name="__main__")
    assert not list(tmp_path.rglob("*-last.pt"))


@pytest.mark.parametrize(("flags", "message"), [
    ("--resume runs/x --workers 2 --epochs 3", "leave out --epochs"),
    ("--batch-size 1", "--batch-size must be 2 to"), ("--frames 78", "--frames must be 1 to 77"),
    ("--label-noise 1.5", "--label-noise must be 0 to 1"), ("--lambda -1", "--lambda must be 0")])
def test_flags_that_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        spatial_kd.parse(flags.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
