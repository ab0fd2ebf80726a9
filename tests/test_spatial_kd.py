"""spatial_kd.py: its equations, what the labels teach, which clips get which labels, kills,
processes, mistakes. Networks are random where nothing is to be learned."""
import itertools
import json
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch

import common
import spatial_kd
from common import BadInput, Task, build_action_clip, read_data
from spatial_kd import ARMS, Student, read_truth, spatial_loss, spatial_targets, toy_vocabulary

FAST = ("--student", "toy-small:random", "--labeller", "toy-small:random", "--epochs", 2,
        "--workers", 0, "--batch-size", 16, "--frames", 4)


def go(*flags):
    return spatial_kd.main([str(flag) for flag in flags])


def weights(folder, arm="spatial"):
    """Tensors of a checkpoint, those of its heads last"""
    saved = torch.load(next(folder.rglob(f"{arm}-last.pt")), weights_only=True)
    parts = [saved[part] for part in ("model_state_dict", "fusion_model_state_dict")]
    return [w for part in [*parts, saved.get("spatial_heads", {})] for w in part.values()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def rows(folder):
    lines = next(folder.rglob("metrics.jsonl")).read_text().splitlines()
    return [json.loads(line) | {"clips_per_s": 0} for line in lines]


def targets(folder):
    path, = [path for path in folder.rglob("*-targets.pt") if path.name[:6] != "shown-"]
    saved = torch.load(path, weights_only=True)
    return [Task(**task) for task in saved["tasks"]]


@pytest.fixture(scope="module")
def every(toy, tmp_path_factory):
    """All arms -> their numbers, and the folder of the run"""
    out = tmp_path_factory.mktemp("every")
    return go("--data", toy, *FAST, "--out", out, "--arms", *ARMS), out


# ---- the equations


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_targets_are_a_mean_of_softmaxes_over_frames_in_any_order():
    frames, bank = draw(3, 4, 8), draw(5, 8, seed=1)
    f, b = (x / x.norm(dim=-1, keepdim=True) for x in (frames, bank))
    e = (100 * torch.einsum("btd,ld->btl", f, b)).exp()
    q = spatial_targets(frames, bank)
    torch.testing.assert_close(q, (e / e.sum(-1, keepdim=True)).mean(1))
    torch.testing.assert_close(spatial_targets(7 * frames[:, [2, 0, 3, 1]], .1 * bank), q)


def test_spatial_loss_and_its_gradient_in_closed_form():
    """Of five clips the second is below the floor and the fourth has no targets."""
    z, q = draw(5, 4).requires_grad_(), draw(5, 4, seed=1).mul(2).softmax(1)
    q[1], q[3] = .25, 0
    sure = [0, 2, 4]
    loss, wanted = spatial_loss(z, q), torch.zeros(5, 4, dtype=torch.float64)
    p, t = z.detach().softmax(1)[sure], q[sure]
    wanted[sure] = (p - t) / 3
    torch.testing.assert_close(loss, (t * (t / p).log()).sum(1).mean())
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], wanted)
    torch.testing.assert_close(spatial_loss(z.repeat(2, 1), q.repeat(2, 1)), loss)
    assert spatial_loss(z, 0 * q) == 0
    assert spatial_loss(1e4 * z, q).isfinite()


def test_total_loss_takes_the_mean_over_tasks():
    assert spatial_kd.total_loss(2., [1., 5.], .5) == 3.5
    assert spatial_kd.total_loss(2., [], .5) == 2


def test_heads_start_as_the_identity():
    torch.manual_seed(0)
    tasks = toy_vocabulary()
    student = Student(build_action_clip("toy-small:random"), tasks)
    words = torch.cat([student.model.prompts(task.labels)[0] for task in tasks])
    tokens, video = student.model.prompts(["a"] * 4)[0], torch.rand(4, 2, 3, 32, 32)
    v, _, scale, logits = student(video, tokens, words)
    text = student.model.encode_text(words)
    cosine = torch.nn.functional.cosine_similarity(v[:, None], text, dim=-1)
    torch.testing.assert_close(torch.cat(logits, 1), scale * cosine)


# ---- what the labels teach


@pytest.mark.parametrize("shuffled", [False, True])
def test_spatial_loss_alone_takes_a_student_to_its_labeller(plain, moves, moving, cache, shuffled):
    """No action labels here. The model of tinyclip_swap.py's run has learned motions and forgotten
    colours, of which the labeller is sure. Targets of other clips leave it at chance, 1/6."""
    (videos, _), (tests, _) = moving[0].values()
    task, data = toy_vocabulary()[0], read_data(str(moves))
    labeller = build_action_clip("toy-large", 0, cache)
    student = Student(build_action_clip("toy-large", checkpoint=plain[1]), [task])
    colours, rng = [read_truth(path)["colour"] for path, _ in data.test], np.random.default_rng(0)
    truth = torch.tensor(list(map(task.labels.index, colours)))

    @torch.no_grad()
    def right():
        v = student.eval().model.encode_video(tests)
        logits, = student.heads(v, [spatial_kd.embed_labels(student.model, task)])
        return (logits.argmax(1) == truth).float().mean()

    with torch.no_grad():
        bank = spatial_kd.embed_labels(labeller, task)
        q, seen = (spatial_targets(labeller.encode_frames(x), bank) for x in (videos, tests))
    assert (seen.argmax(1) == truth).float().mean() > .95
    assert right() < .6
    q = q[torch.from_numpy(rng.permutation(len(q)))] if shuffled else q
    optimizer, schedule = spatial_kd.make_optimizer(student, 4e-4, 2 * 25)
    action, words = student.model.prompts(["a"])[0], student.model.prompts(task.labels)
    student.train()
    for _ in range(2):
        for pick in torch.from_numpy(rng.permutation(len(videos))).split(16):
            *_, (logits,) = student(videos[pick], action, words[rng.integers(16)])
            spatial_loss(logits, q[pick]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    found = right()
    assert found < .35 if shuffled else found > .9, found


# ---- vocabularies and ground truth


@pytest.mark.parametrize(("name", "truth"), [
    ("RATRACE_wave_f_nm_np1_fr_goo_37.avi", ("full body", "one person", "front")),
    ("April_09_brush_hair_u_cm_np2_ba_med_3.avi", ("upper body", "two people", "back")),
    ("X_kick_h_nm_np0_le_bad_0.avi", ("face", "nobody", "left")),
    ("X_kick_l_nm_np5_ri_goo_12.avi", ("lower body", "a group", "right"))])
def test_names_of_hmdb51_tell_framing_people_and_viewpoint(name, truth):
    tasks = {task.name: task.labels for task in spatial_kd.VOCABULARY}
    found = read_truth(f"/hmdb/wave/{name}")
    assert found == dict(zip(("framing", "people", "viewpoint"), truth, strict=True))
    assert all(label in tasks[task] for task, label in found.items())
    assert read_truth("/ucf/v_Archery_g01_c01.avi") == {}


def test_the_report_compares_the_labeller_with_the_ground_truth(capsys):
    q = torch.tensor([[.8, .2], [.2, .8], [.9, .1], [0, 0]])
    truths = [{"scene": "dots"}, {"scene": "dots"}, {"scene": "checks"}, {}]
    spatial_kd.look_at_labels([Task("scene", ["dots", "checks"], q=q)], truths)
    said = re.search(r"\n *scene +(\S+) +(\S+) +(\S+)\n", capsys.readouterr().out)
    assert said.groups() == ("0.75", "0.3333", "0.6667")  # sure, right, constant


# ---- labels of clips


def test_training_clips_alone_are_labelled(toy, tmp_path, monkeypatch):
    read, read_frames = [], common.read_frames
    monkeypatch.setattr(common, "read_frames", lambda *given: (
        read.append(given[0]), read_frames(*given))[1])
    assert go("--data", toy, *FAST, "--out", tmp_path, "--label-only") == {}
    assert sorted(read) == sorted(path for path, _ in read_data(str(toy)).train)
    assert [len(task.q) for task in targets(tmp_path)] == [48] * 4
    assert not list(tmp_path.rglob("*-last.pt"))


def test_every_arm_has_its_own_targets(toy):
    q = torch.stack([torch.linspace(.3, .49, 48), 1 - torch.linspace(.3, .49, 48)], 1).half()
    tasks, vocabulary = [Task("scene", ["dots", "checks"], q=q)], toy_vocabulary()
    truths = [read_truth(path) for path, _ in read_data(str(toy)).train]
    found = {arm: spatial_kd.tasks_of(arm, tasks, vocabulary, truths, 0) for arm in ARMS}
    assert found["alone"] == []
    assert found["spatial"] == tasks
    shuffled = found["shuffled"][0].q
    assert (shuffled != q).any(1).all()
    assert torch.equal(shuffled.sort(0).values, q.sort(0).values)
    assert [task.name for task in found["oracle"]] == ["colour", "shape", "place", "scene"]
    for task, words in zip(found["oracle"], vocabulary, strict=True):
        assert set(task.labels) <= set(words.labels)
        assert [task.labels[k] for k in task.q.argmax(1)] == [t[task.name] for t in truths]
        assert torch.equal(task.q.sort(1).values[:, -2:], torch.tensor([[0., 1.]] * 48).half())
    unsure = [task._replace(q=.2 * task.q) for task in tasks]
    for arm, given in (("oracle", [{}] * 48), ("spatial", truths)):
        with pytest.raises(BadInput, match=f"--arms {arm}: no clip has a target with q >= 0.3"):
            spatial_kd.tasks_of(arm, unsure, vocabulary, given, 0)


def test_targets_go_with_clips_and_a_bad_clip_is_replaced_by_another(toy, tmp_path, monkeypatch,
                                                                     capsys):
    """Also: no clip is flipped, since some labels tell left from right; a bad test clip counts as
    wrong."""
    folder, keys, used = tmp_path / "some-bad", [], {2: [], 4: []}
    shutil.copytree(toy, folder)
    for name in ("train/0003.mp4", "test/0004.mp4"):
        (folder / name).write_text("no video")
    words = [Task("things", ["a circle", "a cross"]),
             Task("place", ["left", "right", "top", "bottom"], ["at the {}"])]
    monkeypatch.setattr(spatial_kd, "toy_vocabulary", lambda: words)
    view, loss = common.training_view, spatial_kd.spatial_loss

    def seen(batch, size, mirror, *given):
        assert not any(mirror)
        keys.extend(i for _, i in batch.key)
        return view(batch, size, mirror, *given)

    def asked(logits, q):
        used[q.shape[1]].append(q)
        return loss(logits, q)

    monkeypatch.setattr(common, "training_view", seen)
    monkeypatch.setattr(spatial_kd, "spatial_loss", asked)
    found = go("--data", folder, *FAST, "--out", tmp_path, "--arms", "spatial")
    assert len(keys) == 96
    assert 3 not in keys
    for task in targets(tmp_path):
        assert (task.q.amax(1) > 0).tolist() == [i != 3 for i in range(48)]
        assert torch.equal(torch.cat(used[len(task.labels)]), task.q[keys].float())
    printed = capsys.readouterr()
    assert printed.err.count(f"cannot decode {folder / 'train/0003.mp4'}") == 1
    assert "NOTE 2 clips cannot be decoded; test clips among them count as wrong" in printed.out
    assert 24 * found["spatial"]["top1"] == pytest.approx(round(24 * found["spatial"]["top1"]))


# ---- runs


def test_arms_differ_in_their_weights_and_not_in_their_networks(every):
    found, out = every
    assert list(found) == list(ARMS)
    assert len({(r["M"], r["GMAC"]) for r in found.values()}) == 1
    assert len(weights(out)) - len(weights(out, "alone")) == 9  # four heads and their scales
    for arm, other in itertools.combinations(ARMS, 2):
        shared = zip(weights(out, arm), weights(out, other), strict=False)
        assert not all(torch.equal(a, b) for a, b in shared)
    assert next(out.rglob("run.png")).stat().st_size > 10_000


def test_the_picture_colours_words_by_truth(toy, tmp_path, monkeypatch):
    """Green: as drawn, red: not, gray: not known; black: names and the truth itself."""
    data, drawn = read_data(str(toy)), []
    monkeypatch.setattr(common, "contact_sheet", lambda *given: drawn.append(given))
    args = spatial_kd.parse(list(map(str, [*FAST, "--out", tmp_path])))
    tasks = [toy_vocabulary()[0], Task("people", ["nobody", "one person"])]
    said = {i: (data.classes[i % 2], "red", "nobody") for i in range(24)}
    spatial_kd.draw_words("spatial", tasks, said, data, args, tmp_path / "run.png")
    (clips, texts, frames, _), = drawn
    assert (clips, frames, list(texts)) == (data.test, 4, list(range(0, 24, 3)))
    for i, text in texts.items():
        path, k = data.test[i]
        colour, rows = read_truth(path)["colour"], [[], [], [], []]
        for x, y, word, paint in sorted(text):
            if y >= 0 and x:
                rows[y].append((word, paint))
        assert rows[0] == [(name, "black") for name in ("action", "colour", "people")]
        assert rows[1] == [(word, "black") for word in (data.classes[k], colour, "-")]
        right = [{True: "green", False: "red"}[good] for good in (colour == "red", k == i % 2)]
        assert rows[3] == [(data.classes[i % 2], right[1]), ("red", right[0]), ("nobody", "gray")]
        for (word, paint), truth in zip(rows[2][:2], (data.classes[k], colour), strict=True):
            assert paint == ("green" if word == truth else "red")


def test_heads_do_not_change_what_is_said_of_the_action(plain, moves):
    """The number is that of tinyclip_swap.py's run, whatever the heads say."""
    data, args = read_data(str(moves)), spatial_kd.parse(["--workers", "0", "--frames", "4"])
    model, tasks = build_action_clip("toy-large", checkpoint=plain[1]), toy_vocabulary()
    right, said = spatial_kd.evaluate(Student(model, tasks), data, args)
    record = json.loads(plain[1].with_name("run.json").read_text())
    assert right["action"] == pytest.approx(record["results"]["large"]["top1"])
    assert list(right) == ["action", "colour", "shape", "place", "scene"]
    alone, same_said = spatial_kd.evaluate(Student(model, []), data, args)
    assert alone == {"action": right["action"]}
    assert {i: words[:1] for i, words in said.items()} == same_said


def test_describe_prints_a_line(toy, every, tmp_path, capsys):
    flags = ("--data", toy, *FAST, "--out", every[1], "--describe")
    capsys.readouterr()
    go(*flags, toy / "test/0003.mp4")
    line, = capsys.readouterr().out.splitlines()
    action, *words = line.split("; ")
    assert action in common.MOTIONS
    assert all(word in task.labels for word, task in zip(words, toy_vocabulary(), strict=True))
    with pytest.raises(BadInput, match=r"--describe gone\.mp4: no such file"):
        go(*flags, "gone.mp4")
    with pytest.raises(BadInput, match="train it first"):
        go(*flags, "gone.mp4", "--out", tmp_path)


def test_killed_and_resumed_ends_the_same(toy, every, tmp_path, monkeypatch):
    flags = ("--data", toy, *FAST, "--out", tmp_path, "--arms", "spatial", "shuffled")
    view, calls = common.training_view, []

    def killed(*given):
        calls.append(given)
        if len(calls) == 11:  # in the second epoch of the second arm
            raise KeyboardInterrupt
        return view(*given)

    monkeypatch.setattr(common, "training_view", killed)
    with pytest.raises(KeyboardInterrupt):
        go(*flags)
    monkeypatch.undo()
    found = go(*flags, "--resume")
    for arm, numbers in found.items():
        assert numbers == every[0][arm]
        assert same(weights(tmp_path, arm), weights(every[1], arm))
    assert rows(tmp_path) == [row for row in rows(every[1]) if row["arm"] in found]


def test_two_processes_follow_the_loss_curve_of_one_and_end_in_a_result(toy, every, tmp_path,
                                                                        run_script):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = run_script("spatial_kd.py", "--data", toy, *FAST, "--out", tmp_path, "--arms", "spatial",
                      "oracle", OMP_NUM_THREADS="1", python=torchrun)
    assert done.returncode == 0, done.stderr
    one = [row for row in rows(every[1]) if row["arm"] in ("spatial", "oracle")]
    for a, b in zip(one, rows(tmp_path), strict=True):
        assert a.pop("arm") == b.pop("arm")
        assert a == pytest.approx(b, rel=2e-3)
    assert re.fullmatch(r"RESULT spatial_kd data=small-toy split=1 seed=0 spatial=0\.\d{4} "
                        r"spatial_swapped=0\.\d{4} oracle=0\.\d{4} "
                        r"oracle_swapped=0\.\d{4} seconds=\d+", done.stdout.splitlines()[-1])
    record = json.loads(next(tmp_path.rglob("run.json")).read_text())
    assert {"flags", "machine", "versions", "seconds", "results", "bad"} <= record.keys()
    shown = torch.load(next(tmp_path.rglob("shown-*-targets.pt")), weights_only=True)
    assert all((task["q"].amax(1) > 0).all() for task in shown["tasks"])  # by process 0, alone


def test_unseen_classes_are_tested(toy, tmp_path):
    found = go("--data", toy, *FAST, "--out", tmp_path, "--unseen", 2, "--arms", "spatial")
    assert {"top1", "top1_unseen", "top1_unseen_all", "top1_swapped"} <= found["spatial"].keys()


def test_hmdb51_runs_on_the_clips_that_are_there(hmdb51, tmp_path, capsys):
    found = go("--data", hmdb51, *FAST, "--out", tmp_path, "--allow-missing", "--arms", "spatial",
               "oracle")
    printed = capsys.readouterr()
    assert "its labels of HMDB51 are noise" in printed.err
    assert "1 test clips" in printed.out
    assert "NOTE 5097 listed clips are missing" in printed.out
    assert {"framing", "people", "viewpoint"} <= found["spatial"].keys()


# ---- mistakes


@pytest.mark.parametrize(("flags", "message"), [
    (("--labeller", "toy-small:gone.pt"), "toy-small:gone.pt: "),
    (("--student", "toy-huge"), "toy-huge is no CLIP"),
    (("--data", "gone"), "--data gone: no such folder")])
def test_a_mistake_is_one_line_and_exit_code_two(toy, tmp_path, monkeypatch, capsys, flags,
                                                 message):
    given = ("spatial_kd.py", "--data", toy, *FAST, "--out", tmp_path, *flags)
    monkeypatch.setattr(sys, "argv", list(map(str, given)))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(spatial_kd.__file__, run_name="__main__")
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"spatial_kd.py: {message}")
    assert not list(tmp_path.rglob("*-last.pt"))
