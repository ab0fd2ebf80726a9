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
import torch.nn.functional as F
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
    choose_weights,
    cross_fit,
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


def fit(z, labels, l1, prior=None):
    prior = torch.zeros(len(z), len(z)).double() if prior is None else prior
    return fit_wise(z, labels, prior, l1, prior)


def chosen(z, labels, prior="auto", l1=None, seed=0):
    return choose_weights(z, labels, EXITS[:len(z)], SimpleNamespace(prior=prior, l1=l1, seed=seed))


def by_hand(w, z, labels, l1, v=0.):
    """Eq. (2) and its gradient in numpy. w, v (E,), z (E, N, K)"""
    w, z, n = np.asarray(w), z.numpy(), np.arange(len(labels))
    d = w - np.asarray(v)
    u = np.einsum("e,enk->nk", w, z)
    u = u - u.max(1, keepdims=True)
    log_p = u - np.log(np.exp(u).sum(1, keepdims=True))
    error, size = np.exp(log_p), np.sqrt(d ** 2 + 1e-8)
    error[n, labels] -= 1
    loss = l1 * (size - 1e-4).sum() - log_p[n, labels].mean()
    return loss, np.einsum("nk,enk->e", error, z) / len(n) + l1 * d / size


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
def test_weights_are_the_optimum_whatever_the_prior_and_the_start(E, N, K, l1):
    z, labels = problem(E, N, K)
    for prior in (torch.zeros(E, E).double(), baselines(EXITS[:E])["fusion"]):
        W = fit(z, labels, l1, prior)
        assert not W.triu(1).any()
        for j in range(E):
            own = by_hand(W[j, :j + 1], z[:j + 1], labels, l1, prior[j, :j + 1])
            assert np.abs(own[1]).max() < 1e-6
        start = baselines(EXITS[:E])["uniform"]
        torch.testing.assert_close(fit_wise(z, labels, prior, l1, start), W, atol=1e-5, rtol=0)
    no_worse(fit(z, labels, l1), z, labels, l1)


def test_no_prior_without_l1_and_only_the_prior_with_much():
    z, labels = problem(12, 300, 4)
    fusion = baselines(EXITS)["fusion"]
    torch.testing.assert_close(fit(z, labels, 0.), fit(z, labels, 0., fusion), atol=1e-6, rtol=0)
    torch.testing.assert_close(fit(z, labels, 30., fusion), fusion, atol=1e-4, rtol=0)
    assert fit(z, labels, 30.).abs().max() < 1e-4
    one = fit(z[:1], labels, 0.)  # a single weight is a temperature: its slope is 0 there
    for step in (-.01, .01):
        assert F.cross_entropy(one * z[0], labels) < F.cross_entropy((one + step) * z[0], labels)


# ---- what is chosen on clips that are left out


def test_each_clip_is_judged_once_by_weights_fitted_without_it(monkeypatch):
    (z, labels), calls, real = problem(4, 40, 4), [], fit_wise

    def spy(z, *more):
        calls.append((set(z[0, :, 0].tolist()), real(z, *more)))
        return calls[-1][1]

    monkeypatch.setattr(wise_infer, "fit_wise", spy)
    prior = baselines(EXITS[:4])["uniform"]
    (W, u), times = cross_fit(z, labels, prior, .01, 3), torch.zeros(40)
    torch.testing.assert_close(W, fit(z, labels, .01, prior))
    for inside, own in calls[1:]:
        out = torch.tensor([x not in inside for x in z[0, :, 0].tolist()])
        assert torch.bincount(labels[out]).tolist() == [2] * 4
        torch.testing.assert_close(u[:, out], weighted_logits(z[:, out], own))
        times += out
    assert (times == 1).all()
    assert not torch.equal(u, cross_fit(z, labels, prior, .01, 4)[1])


def two_networks(N, seed, better):
    """Two equal networks that only know more together; exit 6, within the second, is `better`."""
    generator, labels = torch.Generator().manual_seed(seed), torch.arange(N) % 4
    z = torch.randn(8, N, 4, generator=generator).double()
    for e, signal in ((3, 2.), (7, 2.), (5, better)):
        z[e, torch.arange(N), labels] += signal
    return z, labels


def test_few_clips_give_late_fusion_and_a_planted_exit_gives_learned_weights():
    fusion = baselines(EXITS[:8])["fusion"]
    for seed in range(2):
        W, _, pair = chosen(*two_networks(8, seed, 0.))
        assert pair == "fusion, l1 1"
        torch.testing.assert_close(W[7], fusion[7], atol=2e-3, rtol=0)
    (z, labels), (z_new, new) = two_networks(160, 0, 9.), two_networks(400, 1, 9.)
    W, u, pair = chosen(z, labels)
    top1 = [(weighted_logits(z_new, w)[7].argmax(-1) == new).double().mean() for w in (W, fusion)]
    assert top1[0] > .99 > .97 > top1[1]
    assert W[7].argmax() == 5
    assert (u[7].argmax(-1) == labels).double().mean() > .98
    for prior in ("fusion", "paper"):
        assert chosen(z, labels, prior)[2].startswith(prior)
    W, u, pair = chosen(z, labels, "paper", 1e-3)
    assert pair == "paper, l1 0.001"
    torch.testing.assert_close(W, fit(z, labels, 1e-3))


def test_theta_for_clips_left_out_is_not_that_of_clips_fitted():
    """Weights fitted to a handful of clips are sure of them, and of nothing else."""
    z, labels = problem(6, 24, 4, signal=2)
    costs, prior = torch.arange(1., 7).double(), torch.zeros(6, 6).double()
    W, u = cross_fit(z, labels, prior, 1e-3, 0)
    fitted = operate(weighted_logits(z, W), labels, 2., costs)["top1"]
    assert fitted > operate(u, labels, 2., costs)["top1"] + .1


@pytest.mark.parametrize(("factor", "gap", "off"), [(1e4, 0, 0), (1, 200, 0), (1, 200, 1)])
def test_extreme_logits_stay_finite(factor, gap, off):
    """off=1: the gap is in favour of a wrong class"""
    z, labels = problem(3, 24, 3)
    z *= factor
    z[1:, torch.arange(24), (labels + off) % 3] += gap
    W = fit(z, labels, .01)
    assert W.isfinite().all()
    no_worse(W, z, labels, .01)


def test_a_clip_leaves_at_the_first_sure_exit_and_costs_what_ran():
    z, labels = problem(5, 70, 4, signal=4)
    u = weighted_logits(z, fit(z, labels, 1e-3))
    costs = torch.tensor([1., 2., 4., 5., 9.]).double()
    sure = softmax(u.numpy()).max(-1)                                           # (E, N)
    for theta in np.linspace(0, 1.1, 23):
        left = leave_at(u, theta)
        for n in range(70):
            hits = [j for j in range(5) if sure[j, n] > theta]
            assert left[n] == (hits[0] if hits else 4)
        cost = expected_cost(left, costs)
        assert cost.item() == pytest.approx(np.mean([costs[j] for j in left]))
    assert (leave_at(0 * u, .25) == 4).all()  # as sure as theta is not sure enough
    assert (leave_at(0 * u, .2499) == 0).all()


@pytest.mark.parametrize("max_loss", [0., 5., 100.])
def test_theta_costs_least_of_those_that_lose_no_more(max_loss):
    """By brute force over a grid; the largest theta is taken where several cost the same."""
    z, labels = problem(4, 45, 3, signal=3)
    costs = torch.tensor([1., 3., 4., 9.]).double()
    u = weighted_logits(z, baselines(EXITS[:4])["uniform"])

    def run(theta):
        return operate(u, labels, theta, costs)

    grid = [run(theta) for theta in np.linspace(0, 1.001, 1002)]
    least = run(2.)["top1"] - max_loss / 100 - 1e-9
    found = run(choose_theta(u, labels, costs, max_loss))
    assert found["top1"] >= least
    assert found["GMAC"] <= min(r["GMAC"] for r in grid if r["top1"] >= least) + 1e-12
    assert (found["GMAC"] == 1) == (max_loss == 100)
    for gmac in (.5, 1., 2.5, 6., 20.):
        spent = run(theta_of_cost(u, labels, costs, gmac))["GMAC"]
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
    evaluate = pkd_compressed.evaluate

    def spy(path, *more):
        decoded.add(path)
        return real(path, *more)

    def tests(streams, exits, clips, *more):
        before = set(decoded)
        found = evaluate(streams, exits, clips, *more)
        if "/train/" in clips[0][0]:  # held-out clips, read where teachers change
            decoded.intersection_update(before)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "read_compressed", spy)
        patch.setattr(pkd_compressed, "evaluate", tests)
        pkd_compressed.main([
            "--data", str(coded), "--out", str(out), "--networks", "toy", "toy", "toy", "--size",
            "32", "--segments", "2", "--epochs", "3", "--exit-epochs", "3",
            "--holdout", "0.5", "--workers", "0"])
    file, data = next(out.rglob("last.pt")), common.read_data(coded)
    saved = torch.load(file, weights_only=True)
    cascade = Cascade(saved, "progressive", STREAMS, None)
    z, labels = cascade.logits(data.test, {}, [2])
    z = cascade.join(z, cascade.segments)
    return SimpleNamespace(folder=coded, out=out, file=file, saved=saved, data=data, z=z,
                           labels=labels, decoded=decoded,
                           held=common.hold_out(data, .5, saved["flags"]["seed"])[1])


@pytest.fixture(scope="module")
def base(trained):
    """The plain command: results, and on which logits or sums and labels something was chosen"""
    asked = {}

    def spied(name, function):
        def call(z, labels, *more):
            asked.setdefault(name, []).append((z, labels))
            return function(z, labels, *more)
        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("cross_fit", "choose_theta", "theta_of_cost"):
            patch.setattr(wise_infer, name, spied(name, getattr(wise_infer, name)))
        results = go("--data", trained.folder, "--out", trained.out)
    return SimpleNamespace(results=results, asked=asked)


def scattering(u):
    """A theta that sends clips to many exits, and is not close to any confidence"""
    sure = u.softmax(-1).amax(-1).flatten().sort().values
    middles = ((sure[1:] + sure[:-1]) / 2)[sure.diff() > 1e-9].tolist()
    return max(middles, key=lambda theta: len(leave_at(u, theta).unique()))


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
    (STREAMS, (2, 2, 2), [False, True, True]), (CODES, (1, 2, 3), [True, False, True])])
def test_a_real_early_exit_is_that_of_the_table(trained, monkeypatch, order, segments, reads):
    """Exit and class of every clip; what lies behind the exit neither runs nor is decoded; the cost
    is the sum of what runs. reads: with pictures or motion alone, in turn; one read serves all
    streams of as many segments."""
    read, real = [], common.read_compressed

    def spy(path, indices, pictures=True):
        read.append((len(indices), pictures))
        return real(path, indices, pictures)

    monkeypatch.setattr(common, "read_compressed", spy)
    cascade = Cascade(trained.saved, "progressive", order, segments)
    (costs, whole), test = cascade.costs(cascade.segments), trained.data.test
    z, labels = cascade.logits(test, {}, set(segments))
    z = cascade.join(z, cascade.segments)
    u = weighted_logits(z, SUM)
    counts = [cascade.segments[stream] for stream in order]
    due = list(dict.fromkeys(zip(counts, reads, strict=True)))
    layers, exits, macs = watch(cascade)
    for theta in (0., scattering(u), 2.):
        left = leave_at(u, theta)
        for n, (path, _) in enumerate(test):
            for noted in (read, layers, exits, *macs.values()):
                noted.clear()
            j = left[n].item()
            z_n, p = cascade.run(path, SUM, theta)
            assert torch.equal(z_n, z[:j + 1, n])
            assert p.argmax() == u[j, n].argmax()
            assert layers == exits == cascade.exits[:j + 1]
            assert read == due[:1 + j // 4]
            assert sum(macs["nets"] + macs["heads"]) == pytest.approx(costs[j].item())
        assert len(left.unique()) > 2 or theta in (0, 2)
    assert (left == 11).all()
    assert sum(macs["nets"]) == pytest.approx(sum(whole.values()))


# ---- clips of its own


def test_everything_is_chosen_on_clips_that_nothing_was_trained_or_is_tested_on(trained, base):
    held = {path for path, _ in trained.held}
    assert len(held) == 24
    assert trained.decoded == {path for path, _ in trained.data.train + trained.data.test} - held
    cascade = Cascade(trained.saved, "progressive", STREAMS, None)
    z, labels = cascade.logits(trained.held, {}, [2])
    z, costs = cascade.join(z, cascade.segments), cascade.costs(cascade.segments)[0]
    for asked in base.asked.values():
        assert all(torch.equal(own, labels) for _, own in asked)
    assert all(torch.equal(own, z) for own, _ in base.asked["cross_fit"])
    W, u, pair = chosen(z, labels)
    assert base.results["prior"] == pair
    assert base.results["weights"] == W.tolist()
    assert torch.equal(base.asked["choose_theta"][0][0], u)
    assert base.results["theta"] == choose_theta(u, labels, costs, .5)
    sums = [weighted_logits(z, w) for w in baselines(EXITS).values()]
    sums += [cross_fit(z, labels, torch.zeros_like(W), 1e-3, 0)[1], u]  # u: `equal`
    for (own, _), wanted in zip(base.asked["theta_of_cost"], sums, strict=True):
        assert torch.equal(own, wanted)
    gmac = operate(u, labels, base.results["theta"], costs)["GMAC"]
    fusion = theta_of_cost(sums[2], labels, costs, gmac)
    assert base.results["points"]["fusion"]["theta"] == fusion


def test_without_clips_held_out_training_clips_serve_and_are_named(trained, tmp_path, capsys):
    saved, taught = torch.load(trained.file, weights_only=True), []
    saved["flags"]["holdout"] = 0.
    torch.save(saved, tmp_path / "last.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wise_infer, "fit_wise", lambda z, y, *_: taught.append(len(y)) or SUM)
        go("--checkpoint", tmp_path / "last.pt", "--out", tmp_path, "--prior", "paper", "--l1", 1)
    assert max(taught) == len(trained.data.train)
    assert "NOTE no clips were held out" in capsys.readouterr().out


def test_bad_clips_count_as_wrong_and_teach_nothing_and_other_data_are_refused(
        trained, tmp_path, capsys, monkeypatch):
    """The bad test clip is of class 0, which is what logits of 0 would say. Clips of other sizes
    are other data, unless the checkpoint says so."""
    folder, taught, real = tmp_path / trained.folder.name, [], cross_fit
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

    def fits(z, labels, *more):
        taught.append(labels.tolist())
        return real(z, labels, *more)

    monkeypatch.setattr(wise_infer, "cross_fit", fits)
    found, printed = go(*flags, "--theta", .2, "--l1", 1), capsys.readouterr()
    assert taught == [[label for path, label in trained.held if path != trained.held[1][0]]] * 3
    read = np.arange(24) != lost
    z, labels = trained.z.numpy()[:, read], trained.labels.numpy()[read]
    u = np.einsum("je,enk->jnk", np.array(found["weights"]), z)
    at = [np.argmax([*(softmax(u[:11, n]).max(1) > .2), True]) for n in range(23)]
    said = np.array([u[j, n].argmax() for n, j in enumerate(at)])
    assert found["points"]["WISE"]["top1"] == (said == labels).sum() / 24
    assert found["wise"] == (u[11].argmax(1) == labels).sum() / 24
    for row, z_e, u_j in zip(found["exits"], z, u, strict=True):
        assert row["alone"] == (z_e.argmax(1) == labels).sum() / 24
        assert row["WISE"] == (u_j.argmax(1) == labels).sum() / 24
    assert "NOTE 2 clips cannot be decoded; test clips among them count as wrong" in printed.out
    for path in bad:
        assert printed.err.count(f"cannot decode {path}: no readable video") == 1


def test_more_than_ten_clips_that_cannot_be_decoded_stop_the_run(trained, tmp_path):
    cascade = Cascade(trained.saved, "progressive", STREAMS, None)
    lost, clips = [(str(tmp_path / f"{n}.mp4"), 0) for n in range(11)], trained.data.test[:2]
    labels = cascade.logits([*lost[:10], *clips], {}, [2])[1]
    assert (labels < 0).tolist() == [True] * 10 + [False] * 2
    with pytest.raises(BadInput, match="11 of 13 clips cannot be decoded"):
        cascade.logits([*lost, *clips], {}, [2])


# ---- what is printed and left


def test_record_and_result_agree_and_theta_2_goes_to_the_end(trained, base, tmp_path, capsys):
    r = go("--data", trained.folder, "--checkpoint", trained.file, "--out", tmp_path, "--theta", 2,
           "--exit-order", *CODES, "--order", "ce")
    record = json.loads(next(tmp_path.rglob("run.json")).read_text())
    assert record["results"] == r
    assert next(tmp_path.rglob("run.png")).stat().st_size > 10_000
    exits = itertools.product(CODES, (1, 2, 3, 4))
    assert [row["exit"] for row in r["exits"]] == [f"{stream}{k}" for stream, k in exits]
    assert [row["leave"] for row in r["exits"]] == [0.] * 11 + [1.]
    names = ("last", "last_gmac", "uniform", "fusion", "fusion_gmac", "paper", "wise", "wise_gmac",
             "equal", "equal_gmac", "early", "early_fusion", "early_gmac")
    scores = " ".join(f"{key}={r[key]:.4f}" for key in names)
    printed = capsys.readouterr().out
    assert re.fullmatch(rf"RESULT wise_infer data={trained.folder.name} split=1 seed=0 {scores} "
                        r"seconds=\d+", printed.splitlines()[-1])
    assert r["last"] == r["exits"][11]["alone"]
    assert r["fusion"] == r["exits"][11]["fusion"]
    assert r["early"] == r["wise"] == r["exits"][11]["WISE"] == r["points"]["WISE"]["top1"]
    assert r["early_gmac"] == r["wise_gmac"] == r["exits"][11]["GMAC"]


def test_sweep_marks_the_pareto_front(trained, tmp_path, monkeypatch):
    """With a third of the clips and no fit, to spare time. Clips are decoded once per number of
    segments, and once more for the early exits that are really run."""
    read, real = [], common.read_compressed

    def spy(path, indices, pictures=True):
        read.append((path, len(indices), pictures))
        return real(path, indices, pictures)

    monkeypatch.setattr(common, "read_compressed", spy)
    some = dataclasses.replace(trained.data, test=trained.data.test[::3]), trained.held[::3]
    monkeypatch.setattr(wise_infer, "read_clips", lambda *_: some)
    monkeypatch.setattr(wise_infer, "fit_wise", lambda *_: SUM)
    monkeypatch.setattr(wise_infer, "time_clips", lambda *_: 1.)
    found = go("--checkpoint", trained.file, "--out", tmp_path, "--sweep")
    wanted = [(path, S, True) for part in (some[0].test, some[1])
              for path, _ in part for S in (1, 2)]
    assert sorted(read) == sorted(wanted)
    rows, auto = found["sweep"], found["points"]["WISE"]
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
    sums, clip = weighted_logits(trained.z, W), trained.data.test[5][0]
    theta = scattering(sums)
    frames = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), np.uint8)
    common.write_video(tmp_path / "h.mp4", frames.repeat(8, 1).repeat(8, 2), codec="libx264",
                       qmax="51")
    (tmp_path / "broken.mp4").write_text("no video")
    files = (clip, tmp_path / "broken.mp4", tmp_path / "h.mp4")
    flags = ("--data", trained.folder, "--out", trained.out, "--theta", theta, "--video")
    lines, printed = go(*flags, *files)["video"], capsys.readouterr()
    u, j = sums[:, 5], leave_at(sums, theta)[5]
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
    assert re.fullmatch(r"wise_infer.py: .*toy-s1-seed0-[*]/last.pt is missing; run "
                        r"pkd_compressed.py first, .*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_mistakes_say_what_would_be_right(trained, tmp_path):
    flags, file, saved = ("--data", trained.folder, "--out", tmp_path), tmp_path / "a.pt", None
    for key, value, message in (("optimizer", {}, "is not finished.*--resume"),
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
                  ("--segments", 1, 0, 1), ("--theta", "nan"), ("--l1", -1), ("--prior", "0")):
        with pytest.raises(SystemExit) as left:
            go(*wrong)
        assert left.value.code == 2
