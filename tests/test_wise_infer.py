"""wise_infer.py: its equations and their optimum, exits that are really taken, clips of its own."""
import dataclasses
import functools
import itertools
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import common
import pkd_compressed
import wise_infer
from common import BadInput
from wise_infer import (
    STREAMS,
    Cascade,
    baselines,
    choose_theta,
    expected_cost,
    fit_wise,
    leave_at,
    main,
    operate,
    theta_of_cost,
    weighted_logits,
)

CODES = ("r", "mv", "i")  # the order of the paper's code
EXITS = list(itertools.product(STREAMS, (1, 2, 3, 4)))
SUM = torch.ones(12, 12).double().tril()  # surer with every exit


def go(*flags):
    return main([str(flag) for flag in flags])


def problem(E, N, K, signal=1., seed=0):
    """Logits of exits that know the more, the later they come, and labels."""
    generator = torch.Generator().manual_seed(seed)
    z, labels = torch.randn(E, N, K, generator=generator).double(), torch.arange(N) % K
    for e in range(E):
        z[e, torch.arange(N), labels] += signal * (e + 1) / E
    return z, labels


def softmax(u):
    p = np.exp(u - u.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def by_hand(w, z, labels, l1):
    """Eq. (2) and its gradient in numpy. w (E,), z (E, N, K)"""
    w, z, n = np.asarray(w), z.numpy(), np.arange(len(labels))
    u = np.einsum("e,enk->nk", w, z)
    u = u - u.max(1, keepdims=True)
    log_p = u - np.log(np.exp(u).sum(1, keepdims=True))
    error, size = np.exp(log_p), np.sqrt(w ** 2 + 1e-8)
    error[n, labels] -= 1
    loss = l1 * (size - 1e-4).sum() - log_p[n, labels].mean()
    return loss, np.einsum("nk,enk->e", error, z) / len(n) + l1 * w / size


def no_worse(W, z, labels, l1):
    """As good as each exit alone, the mean of all so far and that of the finished networks"""
    E = len(z)
    rivals = list(baselines(EXITS[:E]).values())
    rivals += [torch.eye(E).double()[e].expand(E, E).tril() for e in range(E)]
    for j in range(E):
        own = by_hand(W[j, :j + 1], z[:j + 1], labels, l1)[0]
        for other in rivals:
            assert own <= by_hand(other[j, :j + 1], z[:j + 1], labels, l1)[0] + 1e-9


# ---- the equations


def test_weighted_logits_by_numpy():
    z, W = torch.randn(4, 5, 3).double(), torch.randn(4, 4).double().tril()
    u = weighted_logits(z, W)
    for j, n, c in itertools.product(range(4), range(5), range(3)):
        assert u[j, n, c].item() == pytest.approx(np.dot(W[j], z[:, n, c]))
    z[2:] = 9.
    torch.testing.assert_close(weighted_logits(z, W)[:2], u[:2])  # later exits are not heard


@pytest.mark.parametrize(("E", "N", "K", "l1"), [
    (12, 60, 12, 1e-3), (5, 80, 3, .05), (6, 90, 4, 0.), (3, 1, 3, 1e-3)])
def test_weights_are_the_optimum(E, N, K, l1):
    z, labels = problem(E, N, K)
    W = fit_wise(z, labels, l1)
    assert not W.triu(1).any()
    for j in range(E):
        assert np.abs(by_hand(W[j, :j + 1], z[:j + 1], labels, l1)[1]).max() < 1e-6
    no_worse(W, z, labels, l1)


@pytest.mark.parametrize(("factor", "gap", "off"), [(1e4, 0, 0), (1, 200, 0), (1, 200, 1)])
def test_extreme_logits_stay_finite(factor, gap, off):
    """off=1: the gap is in favour of a wrong class"""
    z, labels = problem(3, 24, 3)
    z *= factor
    z[1:, torch.arange(24), (labels + off) % 3] += gap
    W = fit_wise(z, labels, .01)
    assert W.isfinite().all()
    no_worse(W, z, labels, .01)


def test_a_clip_leaves_at_the_first_sure_exit_and_costs_what_ran():
    z, labels = problem(5, 70, 4, signal=4)
    W, costs = fit_wise(z, labels, 1e-3), torch.tensor([1., 2., 4., 5., 9.]).double()
    sure = softmax(weighted_logits(z, W).numpy()).max(-1)                       # (E, N)
    for theta in np.linspace(0, 1.1, 23):
        left = leave_at(z, W, theta)
        for n in range(70):
            hits = [j for j in range(5) if sure[j, n] > theta]
            assert left[n] == (hits[0] if hits else 4)
        cost = expected_cost(left, costs)
        assert cost.item() == pytest.approx(np.mean([costs[j] for j in left]))
    assert (leave_at(0 * z, W, .25) == 4).all()  # as sure as theta is not sure enough
    assert (leave_at(0 * z, W, .2499) == 0).all()


@pytest.mark.parametrize("max_loss", [0., 5., 100.])
def test_theta_costs_least_of_those_that_lose_no_more(max_loss):
    """By brute force over a grid; the largest theta is taken where several cost the same."""
    z, labels = problem(4, 45, 3, signal=3)
    costs, W = torch.tensor([1., 3., 4., 9.]).double(), baselines(EXITS[:4])["uniform"]

    def run(theta):
        return operate(z, labels, W, theta, costs)[0]

    grid = [run(theta) for theta in np.linspace(0, 1.001, 1002)]
    least = run(2.)["top1"] - max_loss / 100 - 1e-9
    found = run(choose_theta(z, labels, W, costs, max_loss))
    assert found["top1"] >= least
    assert found["GMAC"] <= min(r["GMAC"] for r in grid if r["top1"] >= least) + 1e-12
    assert (found["GMAC"] == 1) == (max_loss == 100)
    for gmac in (.5, 1., 2.5, 6., 20.):
        spent = run(theta_of_cost(z, labels, W, costs, gmac))["GMAC"]
        assert spent <= max(gmac, 1.) + 1e-9
        assert spent >= max([r["GMAC"] for r in grid if r["GMAC"] <= gmac], default=1.) - 1e-12


@pytest.mark.parametrize("order", [STREAMS, CODES])
def test_baselines_are_what_they_are_called(order):
    found = baselines(list(itertools.product(order, (1, 2, 3, 4))))
    for j in range(12):
        ends = [e for e in (3, 7, 11) if e <= j] or [j]
        for name, among in (("alone", [j]), ("uniform", range(j + 1)), ("fusion", ends)):
            wanted = np.array([(e in among) / len(among) for e in range(12)])
            np.testing.assert_allclose(found[name][j], wanted, err_msg=name)


# ---- a checkpoint, and clips that are really run


@pytest.fixture(scope="module")
def trained(coded, tmp_path_factory):
    """A short run of pkd_compressed.py that holds out half of the training clips, the files it
    decoded, and the logits of the test clips"""
    out, decoded, real = tmp_path_factory.mktemp("pkd"), set(), common.read_compressed

    def spy(path, *more):
        decoded.add(path)
        return real(path, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "read_compressed", spy)
        pkd_compressed.main([
            "--data", str(coded), "--out", str(out), "--networks", "toy", "toy", "toy", "--size",
            "32", "--segments", "2", "--epochs", "3", "--exit-epochs", "3", "--crops", "1",
            "--holdout", "0.5", "--workers", "0"])
    file, data = next(out.rglob("last.pt")), common.read_data(coded)
    saved = torch.load(file, weights_only=True)
    z, labels = Cascade(saved, "progressive", STREAMS, {}).logits(data.test, {})
    return SimpleNamespace(folder=coded, out=out, file=file, saved=saved, data=data, z=z,
                           labels=labels, decoded=decoded,
                           held=common.hold_out(data, .5, saved["flags"]["seed"])[1])


@pytest.fixture(scope="module")
def base(trained):
    """The plain command: results, and the logits and labels on which something was chosen"""
    asked = {}

    def spied(name, function):
        def call(z, labels, *more):
            asked.setdefault(name, (z, labels))
            return function(z, labels, *more)
        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fit_wise", "choose_theta", "theta_of_cost"):
            patch.setattr(wise_infer, name, spied(name, getattr(wise_infer, name)))
        results = go("--data", trained.folder, "--out", trained.out)
    return SimpleNamespace(results=results, asked=asked)


def scattering(z, W):
    """A theta that sends clips to many exits, and is not close to any confidence"""
    sure = weighted_logits(z, W).softmax(-1).amax(-1).flatten().sort().values
    middles = ((sure[1:] + sure[:-1]) / 2)[sure.diff() > 1e-9].tolist()
    return max(middles, key=lambda theta: len(leave_at(z, W, theta).unique()))


def watch(cascade):
    """-> lists that fill with the layers and the exits of a cascade that run, and with the
    multiplications of its networks and of its exits"""
    layers, exits, macs = [], [], {"nets": [], "heads": []}

    def note(to, at, *_):
        to.append(at)

    def count(to, module, x, y):
        to.append(y.numel() * module.weight[0].numel() / 1e9)

    for stream, k in EXITS:
        net, heads = cascade.nets[stream], cascade.heads[stream]
        exit = net.fc if k == 4 else heads[k - 1]
        net.layers[k - 1].register_forward_hook(functools.partial(note, layers, (stream, k)))
        exit.register_forward_hook(functools.partial(note, exits, (stream, k)))
    for name, to in macs.items():
        for module in getattr(cascade, name).modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(functools.partial(count, to))
    return layers, exits, macs


@pytest.mark.parametrize(("order", "segments", "reads"), [
    (STREAMS, {}, [False, True, True]), (CODES, {"mv": 1, "i": 3}, [True, False, True])])
def test_a_real_early_exit_is_that_of_the_table(trained, monkeypatch, order, segments, reads):
    """Exit and class of every clip; what lies behind the exit neither runs nor is decoded; the cost
    is the sum of what runs. reads: with pictures or motion alone, in turn; one read serves all
    streams of as many segments."""
    read, real = [], common.read_compressed

    def spy(path, indices, pictures):
        read.append((len(indices), pictures))
        return real(path, indices, pictures)

    monkeypatch.setattr(common, "read_compressed", spy)
    cascade = Cascade(trained.saved, "progressive", order, segments)
    (costs, whole), test = cascade.costs(), trained.data.test
    z, labels = cascade.logits(test, {})
    counts = [cascade.segments[stream] for stream in order]
    due = list(dict.fromkeys(zip(counts, reads, strict=True)))
    layers, exits, macs = watch(cascade)
    for theta in (0., scattering(z, SUM), 2.):
        _, said, left = operate(z, labels, SUM, theta, costs)
        for n, (path, _) in enumerate(test):
            for noted in (read, layers, exits, *macs.values()):
                noted.clear()
            j = left[n].item()
            z_n, p = cascade.run(cascade.look(path), SUM, theta)
            assert torch.equal(z_n, z[:j + 1, n])
            assert p.argmax() == said[n]
            assert layers == exits == cascade.exits[:j + 1]
            assert read == due[:1 + j // 4]
            assert sum(macs["nets"] + macs["heads"]) == pytest.approx(costs[j].item())
        assert len(left.unique()) > 2 or theta in (0, 2)
    assert (left == 11).all()
    assert sum(macs["nets"]) == pytest.approx(sum(whole.values()))


def test_motion_alone_gives_the_same_logits_to_the_bit(trained):
    cascade = Cascade(trained.saved, "progressive", STREAMS, {})
    alone, both = (cascade.look(trained.data.test[3][0]) for _ in range(2))
    both("r")
    assert torch.equal(alone("mv"), both("mv"))


# ---- clips of its own


def test_everything_is_chosen_on_clips_that_nothing_was_trained_or_is_tested_on(trained, base):
    held = {path for path, _ in trained.held}
    assert len(held) == 24
    assert trained.decoded == {path for path, _ in trained.data.train + trained.data.test} - held
    cascade = Cascade(trained.saved, "progressive", STREAMS, {})
    z, labels = cascade.logits(trained.held, {})
    for own in base.asked.values():
        assert torch.equal(own[0], z)
        assert torch.equal(own[1], labels)
    assert list(base.asked) == ["fit_wise", "choose_theta", "theta_of_cost"]
    W = torch.tensor(base.results["weights"], dtype=torch.float64)
    assert np.abs(by_hand(W[11], z, labels, 1e-3)[1]).max() < 1e-6
    assert base.results["theta"] == choose_theta(z, labels, W, cascade.costs()[0], .5)


def test_bad_clips_count_as_wrong_and_teach_nothing_and_other_data_are_refused(
        trained, tmp_path, capsys, monkeypatch):
    """The bad test clip is of class 0, which is what logits of 0 would say. Clips of other sizes
    are other data, unless the checkpoint says so."""
    folder, taught, fit = tmp_path / trained.folder.name, [], wise_infer.fit_wise
    shutil.copytree(trained.folder, folder)
    lost = next(n for n, (_, label) in enumerate(trained.data.test) if label == 0)
    bad = [f"{folder}/{Path(trained.held[1][0]).relative_to(trained.folder)}",
           f"{folder}/{Path(trained.data.test[lost][0]).relative_to(trained.folder)}"]
    for path in bad:
        Path(path).write_text("no video")
    saved = torch.load(trained.file, weights_only=True)
    saved["flags"]["data"] = str(folder)
    torch.save(saved, tmp_path / "last.pt")
    flags = ("--checkpoint", tmp_path / "last.pt", "--out", tmp_path)
    with pytest.raises(BadInput, match="was trained on other clips"):
        go(*flags)

    saved["flags"]["clips"] = common.read_data(folder).digest()
    torch.save(saved, tmp_path / "last.pt")

    def fits(z, labels, l1):
        taught.append(labels.tolist())
        return fit(z, labels, l1)

    monkeypatch.setattr(wise_infer, "fit_wise", fits)
    found, printed = go(*flags, "--theta", .2), capsys.readouterr()
    assert taught == [[label for path, label in trained.held if path != trained.held[1][0]]]
    read = np.arange(24) != lost
    z, labels = trained.z.numpy()[:, read], trained.labels.numpy()[read]
    u = np.einsum("je,enk->jnk", np.array(found["weights"]), z)
    at = [np.argmax([*(softmax(u[:11, n]).max(1) > .2), True]) for n in range(23)]
    said = np.array([u[j, n].argmax() for n, j in enumerate(at)])
    assert found["points"]["WISE, early exit"]["top1"] == (said == labels).sum() / 24
    assert found["points"]["WISE"]["top1"] == (u[11].argmax(1) == labels).sum() / 24
    for row, z_e, u_j in zip(found["exits"], z, u, strict=True):
        assert row["alone"] == (z_e.argmax(1) == labels).sum() / 24
        assert row["WISE"] == (u_j.argmax(1) == labels).sum() / 24
    assert found["same"] == 1
    assert "NOTE 2 clips cannot be decoded; test clips among them count as wrong" in printed.out
    for path in bad:
        assert printed.err.count(f"cannot decode {path}: no readable video") == 1


def test_more_than_ten_clips_that_cannot_be_decoded_stop_the_run(trained, tmp_path):
    cascade = Cascade(trained.saved, "progressive", STREAMS, {})
    lost, clips = [(str(tmp_path / f"{n}.mp4"), 0) for n in range(11)], trained.data.test[:2]
    assert (cascade.logits([*lost[:10], *clips], {})[1] < 0).tolist() == [True] * 10 + [False] * 2
    with pytest.raises(BadInput, match="11 of 13 clips cannot be decoded"):
        cascade.logits([*lost, *clips], {})
    with pytest.raises(BadInput, match="1 of 1 clips"):
        cascade.logits(lost[:1], {})


# ---- what is printed and left


def test_record_and_result_agree_and_theta_2_goes_to_the_end(trained, base, tmp_path, capsys):
    r = go("--data", trained.folder, "--checkpoint", trained.file, "--out", tmp_path, "--theta", 2,
           "--exit-order", *CODES, "--order", "ce")
    record = json.loads(next(tmp_path.rglob("run.json")).read_text())
    assert record["results"] == r
    assert next(tmp_path.rglob("run.png")).stat().st_size > 10_000
    exits = itertools.product(CODES, (1, 2, 3, 4))
    assert [row["exit"] for row in r["exits"]] == [f"{stream}{k}" for stream, k in exits]
    points = r["points"]
    assert points["WISE, early exit"].items() >= points["WISE"].items()
    assert points["WISE"]["leave"] == [0.] * 11 + [1.]
    numbers = {"last": r["last"], "last_gmac": r["last_gmac"], "fusion": r["fusion"],
               "fusion_gmac": r["fusion_gmac"], "wise": points["WISE"]["top1"],
               "wise_gmac": points["WISE"]["GMAC"], "early": points["WISE, early exit"]["top1"],
               "early_gmac": points["WISE, early exit"]["GMAC"]}
    scores = " ".join(f"{key}={x:.4f}" for key, x in numbers.items())
    printed = capsys.readouterr().out
    assert re.fullmatch(rf"RESULT wise_infer data={trained.folder.name} split=1 seed=0 {scores} "
                        r"seconds=\d+", printed.splitlines()[-1])
    assert r["same"] == base.results["same"] == 1
    assert r["last"] == r["exits"][11]["alone"]
    assert r["fusion"] == r["exits"][11]["fusion"]
    assert points["WISE"]["GMAC"] == r["exits"][11]["GMAC"]


def test_sweep_marks_the_pareto_front(trained, tmp_path, monkeypatch):
    """With a third of the clips, no fit and fewer thetas, to spare time"""
    some = dataclasses.replace(trained.data, test=trained.data.test[::3]), trained.held[::3]
    monkeypatch.setattr(wise_infer, "read_clips", lambda *_: some)
    monkeypatch.setattr(wise_infer, "fit_wise", lambda *_: SUM)
    points = functools.partial(wise_infer.operating_points, most=20)
    monkeypatch.setattr(wise_infer, "operating_points", points)
    found = go("--checkpoint", trained.file, "--out", tmp_path, "--sweep")
    rows, auto = found["sweep"], found["points"]["WISE, early exit"]
    segments = [tuple(row[stream] for stream in STREAMS) for row in rows]
    assert set(segments) == set(itertools.product((1, 2), repeat=3))
    assert len(rows) == 40
    pairs, front = {(row["GMAC"], row["top1"]) for row in rows}, set()
    for gmac, top1 in pairs:
        cheaper = [b for a, b in pairs - {(gmac, top1)} if a <= gmac]
        if top1 > max(cheaper, default=-1.):
            front.add((gmac, top1))
    marked = [(row["GMAC"], row["top1"]) for row in rows if row["Pareto"]]
    assert marked == sorted(front)
    own = next(row for row, each in zip(rows, segments, strict=True)
               if each == (2, 2, 2) and row["max_loss"] == .5)
    for key in ("theta", "GMAC", "top1"):
        assert own[key] == auto[key]


def test_video_says_what_the_test_says_and_reencodes_what_it_must(trained, base, tmp_path, capsys):
    W = torch.tensor(base.results["weights"], dtype=torch.float64)
    theta, clip = scattering(trained.z, W), trained.data.test[5][0]
    frames = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), np.uint8)
    common.write_video(tmp_path / "h.mp4", frames.repeat(8, 1).repeat(8, 2), codec="libx264",
                       qmax="51")
    (tmp_path / "broken.mp4").write_text("no video")
    files = (clip, tmp_path / "broken.mp4", tmp_path / "h.mp4")
    flags = ("--data", trained.folder, "--out", trained.out, "--theta", theta, "--video")
    lines, printed = go(*flags, *files)["video"], capsys.readouterr()
    u = weighted_logits(trained.z, W)[:, 5]
    j = leave_at(trained.z, W, theta)[5]
    said, p = trained.data.classes[u[j].argmax()], u[j].softmax(-1).max()
    exit = "{}{}".format(*EXITS[j])
    assert re.fullmatch(rf"{clip}: {said}, {p:.3f}, exit {exit}, \S+ ms", lines[0])
    assert re.fullmatch(rf"{files[2]}: (circle|cross) .*, exit .* ms.*codec is h264.*", lines[1])
    assert printed.out.splitlines()[-2:] == lines
    assert f"cannot decode {files[1]}: no readable video" in printed.err
    with pytest.raises(BadInput, match="none of the files"):
        go(*flags, files[1], tmp_path / "gone.mp4")


# ---- mistakes


def test_a_missing_checkpoint_is_one_line_and_exit_code_two(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wise_infer.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(wise_infer.__file__, run_name="__main__")
    assert left.value.code == 2
    assert re.fullmatch(r"wise_infer.py: .*toy-s1-seed0-[*]/last.pt is missing; make it with: "
                        r"python pkd_compressed.py --data toy --split 1 --seed 0 --out .*\n",
                        capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_mistakes_say_what_would_be_right(trained, tmp_path):
    flags, file, saved = ("--data", trained.folder, "--out", tmp_path), tmp_path / "a.pt", None
    for key, value, message in (("optimizer", {}, "is not finished.*--resume"),
                                ("flags", {"holdout": 0.}, r"pkd_compressed.py --holdout 0\.2"),
                                ("flags", {"order": ["ce"]}, "has exits of ce, none of --order a")):
        saved = torch.load(trained.file, weights_only=True)
        saved[key] = {**saved.get(key, {}), **value}
        torch.save(saved, file)
        with pytest.raises(BadInput, match=message):
            go(*flags, "--checkpoint", file, *(["--order", "anti"] if "order" in value else []))
    other = trained.file.with_name("streams-last.pt")
    file.write_text("no checkpoint")
    for path in (file, other):
        with pytest.raises(BadInput, match="was cut off, or is another kind of file"):
            go(*flags, "--checkpoint", path)
    for wrong in (("--exit-order", "mv", "mv", "i"), ("--segments", "nonsense"),
                  ("--segments", "mv=0"), ("--theta", "nan"), ("--l1", -1)):
        with pytest.raises(SystemExit) as left:
            go(*wrong)
        assert left.value.code == 2
