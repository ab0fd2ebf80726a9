"""wise_infer.py: its equations and their optimum, early exits that are really run, and that nothing
is chosen on videos that were trained on or are tested on."""
import functools
import itertools
import json
import re
import runpy
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import predicted_top1
from torch import nn

import common
import pkd_compressed
import wise_infer
from common import BadInput
from wise_infer import (
    STREAMS,
    Cascade,
    cheapest_theta,
    choose_weights,
    cross_fit,
    evaluate,
    first_confident,
    fixed_weights,
    main,
    mean_cost,
    theta_for_cost,
    weighted_logits,
)

MV_R_I = ["mv", "r", "i"]
R_MV_I = ["r", "mv", "i"]  # the order of the authors' code
EXITS = list(itertools.product(MV_R_I, (1, 2, 3, 4)))
SUM = torch.ones(12, 12).double().tril()  # more confident with every exit
NAMES = ("last_exit", "uniform", "late_fusion", "wise", "wise_fusion_prior", "wise_at_fusion_cost",
         "wise_early", "late_fusion_early", "late_fusion_gmac", "wise_gmac", "wise_early_gmac")


def run(*flags):
    return main([str(flag) for flag in flags])


def make_problem(E, N, K, signal=1., seed=0):
    """Logits of exits that know the more, the later they come, and labels"""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(E, N, K, generator=generator).double()
    labels = torch.arange(N) % K
    for e in range(E):
        z[e, torch.arange(N), labels] += signal * (e + 1) / E
    return z, labels


def softmax(u):
    p = np.exp(u - u.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def fit(z, labels, l1, prior=None, start=None):
    prior = torch.zeros(len(z), len(z)).double() if prior is None else prior
    W, converged = wise_infer.fit_weights(z, labels, prior, l1, prior if start is None else start)
    assert converged
    return W


def numpy_loss(w, z, labels, l1, prior=0.):
    """Eq. (2) and its gradient in numpy. w, prior (E,), z (E, N, K)"""
    w = np.asarray(w)
    z = z.numpy()
    n = np.arange(len(labels))
    d = w - np.asarray(prior)
    u = np.einsum("e,enk->nk", w, z)
    u = u - u.max(1, keepdims=True)
    log_p = u - np.log(np.exp(u).sum(1, keepdims=True))
    error = np.exp(log_p)
    error[n, labels] -= 1
    size = np.sqrt(d ** 2 + 1e-8)
    loss = l1 * (size - 1e-4).sum() - log_p[n, labels].mean()
    return loss, np.einsum("nk,enk->e", error, z) / len(n) + l1 * d / size


def assert_no_worse(W, z, labels, l1):
    """As good as each exit alone, the mean of all so far and that of the finished networks"""
    E = len(z)
    rivals = list(fixed_weights(EXITS[:E]).values())
    rivals += [torch.eye(E).double()[e].expand(E, E).tril() for e in range(E)]
    for j in range(E):
        fitted = numpy_loss(W[j, :j + 1], z[:j + 1], labels, l1)[0]
        for rival in rivals:
            assert fitted <= numpy_loss(rival[j, :j + 1], z[:j + 1], labels, l1)[0] + 1e-9


# ---- the equations


def test_weighted_logits_equal_numpy():
    z = torch.randn(4, 5, 3).double()
    W = torch.randn(4, 4).double().tril()
    u = weighted_logits(z, W)
    np.testing.assert_allclose(u, np.einsum("je,enk->jnk", W.numpy(), z.numpy()))
    z[2:] = 9.
    torch.testing.assert_close(weighted_logits(z, W)[:2], u[:2])  # later exits do not matter


@pytest.mark.parametrize(("E", "N", "K", "l1"), [
    (12, 60, 12, 1e-3), (5, 80, 3, .05), (6, 90, 4, 0.), (3, 1, 3, 1e-3)])
def test_weights_are_the_optimum_for_any_prior_and_start(E, N, K, l1):
    z, labels = make_problem(E, N, K)
    for prior in (torch.zeros(E, E).double(), fixed_weights(EXITS[:E])["late_fusion"]):
        W = fit(z, labels, l1, prior)
        assert not W.triu(1).any()
        for j in range(E):
            n = j + 1
            _, gradient = numpy_loss(W[j, :n], z[:n], labels, l1, prior[j, :n])
            assert np.abs(gradient).max() < 1e-6
        other = fit(z, labels, l1, prior, start=fixed_weights(EXITS[:E])["uniform"])
        torch.testing.assert_close(other, W, atol=1e-5, rtol=0)
    assert_no_worse(fit(z, labels, l1), z, labels, l1)


def test_l1_zero_ignores_prior():
    z, labels = make_problem(12, 300, 4)
    fusion = fixed_weights(EXITS)["late_fusion"]
    torch.testing.assert_close(fit(z, labels, 0.), fit(z, labels, 0., fusion), atol=1e-6, rtol=0)
    one = fit(z[:1], labels, 0.)  # a single weight is an inverse temperature
    for change in (-.01, .01):
        changed = (one + change) * z[0]
        assert F.cross_entropy(one * z[0], labels) < F.cross_entropy(changed, labels)


def test_large_l1_gives_the_prior():
    z, labels = make_problem(12, 300, 4)
    fusion = fixed_weights(EXITS)["late_fusion"]
    torch.testing.assert_close(fit(z, labels, 30., fusion), fusion, atol=1e-4, rtol=0)
    assert fit(z, labels, 30.).abs().max() < 1e-4


@pytest.mark.parametrize("factor", [1e-3, 1e3, 1e8])
def test_fit_survives_logits_of_any_size(factor):
    """From late fusion's weights, where the softmax may be saturated, without any curvature. Exits
    2 and 3 agree, so that the Hessian is singular."""
    z, labels = make_problem(4, 40, 4)
    z[3] = z[2]
    z = z * factor
    zero = torch.zeros(4, 4).double()
    fusion = fixed_weights(EXITS[:4])["late_fusion"]
    for l1 in (0., .01):
        for prior in (zero, fusion):
            W = fit(z, labels, l1, prior, start=fusion)
            for j in range(4):
                n = j + 1
                loss, gradient = numpy_loss(W[j, :n], z[:n], labels, l1, prior[j, :n])
                assert loss <= numpy_loss(zero[j, :n], z[:n], labels, l1, prior[j, :n])[0] + 1e-9
                assert np.abs(gradient).max() < 1e-6 * max(1, factor)


@pytest.mark.parametrize(("gap", "wrong"), [(200, 0), (200, 1)])
def test_weights_stay_finite_where_exits_are_certain(gap, wrong):
    """wrong=1: certain of a wrong class"""
    z, labels = make_problem(3, 24, 3)
    z[1:, torch.arange(24), (labels + wrong) % 3] += gap
    W = fit(z, labels, .01)
    assert W.isfinite().all()
    assert_no_worse(W, z, labels, .01)


def test_a_fit_that_has_not_converged_is_named(monkeypatch, capsys):
    z, labels = make_problem(4, 40, 4)
    unfinished = fixed_weights(EXITS[:4])["uniform"]
    monkeypatch.setattr(wise_infer, "fit_weights", lambda *_: (unfinished, False))
    choose_weights(z, labels, EXITS[:4], "zero", .1, 0)
    printed = capsys.readouterr().out
    assert printed == "NOTE the weights of wise with l1 0.1 have not converged\n"


def test_first_confident_and_mean_cost_equal_a_loop():
    z, labels = make_problem(5, 70, 4, signal=4)
    u = weighted_logits(z, fit(z, labels, 1e-3))
    costs = torch.tensor([1., 2., 4., 5., 9.]).double()
    confidence = softmax(u.numpy()).max(-1)                                     # (E, N)
    for theta in np.linspace(0, 1.1, 23):
        taken = first_confident(u, theta)
        for n in range(70):
            confident = [j for j in range(5) if confidence[j, n] > theta]
            assert taken[n] == (confident[0] if confident else 4)
        cost = mean_cost(taken, costs)
        assert cost.item() == pytest.approx(np.mean([costs[j] for j in taken]))
    assert (first_confident(0 * u, .25) == 4).all()  # equal to theta is not enough
    assert (first_confident(0 * u, .2499) == 0).all()


@pytest.mark.parametrize("order", [MV_R_I, R_MV_I])
def test_fixed_weights_are_what_they_are_called(order):
    weights = fixed_weights(list(itertools.product(order, (1, 2, 3, 4))))
    for j in range(12):
        finished = [e for e in (3, 7, 11) if e <= j] or [j]
        averaged = {"single_exit": [j], "uniform": range(j + 1), "late_fusion": finished}
        for name, exits in averaged.items():
            expected = np.array([(e in exits) / len(exits) for e in range(12)])
            np.testing.assert_allclose(weights[name][j], expected, err_msg=name)


# ---- what is chosen by cross-validation


def test_each_video_is_scored_once_by_weights_fitted_without_it(monkeypatch):
    z, labels = make_problem(4, 40, 4)
    calls = []
    fit_weights = wise_infer.fit_weights

    def spy(z, *more):
        W, converged = fit_weights(z, *more)
        calls.append((set(z[0, :, 0].tolist()), W))
        return W, converged

    monkeypatch.setattr(wise_infer, "fit_weights", spy)
    prior = fixed_weights(EXITS[:4])["uniform"]
    W, u, converged = cross_fit(z, labels, prior, .01, 3)
    assert converged
    torch.testing.assert_close(W, calls[0][1])
    times = torch.zeros(40)
    for fitted, W_fold in calls[1:]:
        outside = torch.tensor([x not in fitted for x in z[0, :, 0].tolist()])
        assert torch.bincount(labels[outside]).tolist() == [2] * 4
        torch.testing.assert_close(u[:, outside], weighted_logits(z[:, outside], W_fold))
        times += outside
    assert (times == 1).all()
    assert not torch.equal(u, cross_fit(z, labels, prior, .01, 4)[1])


@pytest.mark.parametrize(("excess", "fusion_l1"), [(.02, .1), (.1, .01)])
def test_l1_is_the_best_for_prior_zero_and_the_largest_good_one_for_fusion(
        monkeypatch, excess, fusion_l1):
    """l1 .01 has the lowest cross-entropy. That of .1 is `excess` above it, standard error .028."""
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    noise = .4 * (noise - noise.mean()) / noise.std()
    losses = {1.: 3 + noise, .1: 2 + excess + noise, .01: 2 + 0 * noise, .001: 2.5 + 0 * noise}

    def crafted(z, labels, prior, l1, seed):
        logit = -torch.log(torch.expm1(losses[l1]))  # of two classes, at a cross-entropy of losses
        u = torch.stack([logit, torch.zeros(200).double()], -1)
        return prior, u.expand(4, -1, -1), True

    monkeypatch.setattr(wise_infer, "cross_fit", crafted)
    problem = torch.zeros(4, 200, 2).double(), torch.zeros(200).long(), EXITS[:4]
    assert choose_weights(*problem, "zero", None, 0)[2] == .01
    assert choose_weights(*problem, "fusion", None, 0)[2] == fusion_l1


def two_networks(N, seed, signal):
    """Two equal networks that only know more together; exit 6, within the second, has `signal`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % 4
    z = torch.randn(8, N, 4, generator=generator).double()
    for e, strength in ((3, 2.), (7, 2.), (5, signal)):
        z[e, torch.arange(N), labels] += strength
    return z, labels


def test_few_videos_give_late_fusion():
    fusion = fixed_weights(EXITS[:8])["late_fusion"]
    for seed in range(2):
        W, _, l1 = choose_weights(*two_networks(8, seed, 0.), EXITS[:8], "fusion", None, 0)
        assert l1 == 1
        torch.testing.assert_close(W[7], fusion[7], atol=2e-3, rtol=0)


@pytest.mark.parametrize("prior", ["zero", "fusion"])
def test_weights_find_an_exit_that_is_better(monkeypatch, prior):
    monkeypatch.setattr(wise_infer, "L1_GRID", (.1, .01))
    z, labels = two_networks(160, 0, 9.)
    z_new, labels_new = two_networks(400, 1, 9.)
    fusion = fixed_weights(EXITS[:8])["late_fusion"]
    W, u, _ = choose_weights(z, labels, EXITS[:8], prior, None, 0)
    top1 = []
    for weights in (W, fusion):
        correct = weighted_logits(z_new, weights)[7].argmax(-1) == labels_new
        top1.append(correct.double().mean())
    assert top1[0] > .99 > .97 > top1[1]
    assert W[7].argmax() == 5
    assert (u[7].argmax(-1) == labels).double().mean() > .98
    W, _, l1 = choose_weights(z, labels, EXITS[:8], prior, 1e-3, 0)
    assert l1 == 1e-3
    torch.testing.assert_close(W, fit(z, labels, 1e-3, fusion if prior == "fusion" else None))


def test_fitted_videos_would_make_theta_too_optimistic():
    z, labels = make_problem(6, 24, 4, signal=2)
    costs = torch.arange(1., 7).double()
    W, u, _ = cross_fit(z, labels, torch.zeros(6, 6).double(), 1e-3, 0)
    fitted = evaluate(weighted_logits(z, W), labels, 2., costs)["top1"]
    assert fitted > evaluate(u, labels, 2., costs)["top1"] + .1


@pytest.mark.parametrize("max_drop", [0., 5., 100.])
def test_theta_is_the_cheapest_that_drops_no_more(max_drop):
    """By brute force over a grid"""
    z, labels = make_problem(4, 45, 3, signal=3)
    costs = torch.tensor([1., 3., 4., 9.]).double()
    u = weighted_logits(z, fixed_weights(EXITS[:4])["uniform"])
    grid = [evaluate(u, labels, theta, costs) for theta in np.linspace(0, 1.001, 1002)]
    required = grid[-1]["top1"] - max_drop / 100 - 1e-9
    chosen = evaluate(u, labels, cheapest_theta(u, labels, costs, max_drop), costs)
    assert chosen["top1"] >= required
    cheapest = min(point["GMAC"] for point in grid if point["top1"] >= required)
    assert chosen["GMAC"] <= cheapest + 1e-12
    assert (chosen["GMAC"] == 1) == (max_drop == 100)
    for gmac in (.5, 1., 2.5, 6., 20.):
        cost = evaluate(u, labels, theta_for_cost(u, labels, costs, gmac), costs)["GMAC"]
        assert cost <= max(gmac, 1.) + 1e-9
        affordable = [point["GMAC"] for point in grid if point["GMAC"] <= gmac]
        assert cost >= max(affordable, default=1.) - 1e-12


# ---- a checkpoint, and videos that really exit early


@pytest.fixture(scope="module")
def trained(coded, tmp_path_factory):
    """A short run of pkd_compressed.py that holds out half of the training videos, the files it
    trained on, and the logits of the test videos"""
    out = tmp_path_factory.mktemp("pkd")
    decoded = set()
    read_compressed = common.read_compressed

    def spy(path, *more):
        if recording:
            decoded.add(path)
        return read_compressed(path, *more)

    recording = True
    evaluate_exits = pkd_compressed.evaluate

    def test(*args):
        nonlocal recording
        recording = False
        top1 = evaluate_exits(*args)
        recording = True
        return top1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "read_compressed", spy)
        patch.setattr(pkd_compressed, "evaluate", test)
        pkd_compressed.main([
            "--data", str(coded), "--out", str(out), "--networks", "toy", "toy", "toy", "--size",
            "32", "--segments", "2", "--epochs", "3", "--exit-epochs", "3",
            "--holdout", "0.5", "--workers", "0"])
    file = next(out.rglob("last.pt"))
    checkpoint = torch.load(file, weights_only=True)
    data = common.load_dataset(coded)
    cascade = Cascade(checkpoint, "progressive", MV_R_I)
    z, labels = cascade.logits(data.test, None)
    _, held_out = common.hold_out_videos(data, .5, checkpoint["flags"]["seed"])
    return SimpleNamespace(folder=coded, out=out, file=file, checkpoint=checkpoint, data=data, z=z,
                           labels=labels, decoded=decoded, held_out=held_out)


@pytest.fixture(scope="module")
def base(trained):
    """The plain command: its results; which videos and logits each function was given"""
    calls = {}

    def spied(name, function):
        def call(*args):
            calls.setdefault(name, []).append(args)
            return function(*args)
        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wise_infer, "L1_GRID", (.1, .01))
        for name in ("cross_fit", "cheapest_theta", "theta_for_cost"):
            patch.setattr(wise_infer, name, spied(name, getattr(wise_infer, name)))
        results = run("--data", trained.folder, "--out", trained.out)
    return SimpleNamespace(results=results, calls=calls)


def scattering_theta(u):
    """A theta that sends videos to many exits, and is not close to any confidence"""
    confidence = u.softmax(-1).amax(-1).flatten().sort().values
    middles = ((confidence[1:] + confidence[:-1]) / 2)[confidence.diff() > 1e-9].tolist()
    return max(middles, key=lambda theta: len(first_confident(u, theta).unique()))


def watch(cascade):
    """-> lists that fill with the layers and the exits of a cascade that run, and with the
    multiplications of its networks and of its exits"""
    layers = []
    exits = []
    macs = {"nets": [], "heads": []}

    def note(to, where, *_):
        to.append(where)

    def count(to, module, x, y):
        to.append(y.numel() * module.weight[0].numel() / 1e9)

    for stream, k in EXITS:
        net = cascade.nets[stream]
        head = net.fc if k == 4 else cascade.heads[stream][k - 1]
        net.layers[k - 1].register_forward_hook(functools.partial(note, layers, (stream, k)))
        head.register_forward_hook(functools.partial(note, exits, (stream, k)))
    for name, to in macs.items():
        for module in getattr(cascade, name).modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(functools.partial(count, to))
    return layers, exits, macs


@pytest.mark.parametrize(("order", "segments", "pixels"), [
    (MV_R_I, [2], [False, True, True]), (R_MV_I, [1, 2, 3], [True, False, True])])
def test_early_exit_of_a_file_equals_the_table(trained, monkeypatch, order, segments, pixels):
    """Exit and class of every video. What lies behind the exit neither runs nor is decoded, and the
    cost is the sum of what runs. pixels: which reads need more than motion. One read serves all
    networks with as many segments."""
    reads = []
    read_compressed = common.read_compressed

    def spy(path, indices, pixels=True):
        reads.append((len(indices), pixels))
        return read_compressed(path, indices, pixels)

    monkeypatch.setattr(common, "read_compressed", spy)
    cascade = Cascade(trained.checkpoint, "progressive", order, segments)
    costs, network_costs = cascade.costs()
    test = trained.data.test[::2]
    z, labels = cascade.logits(test, None)
    assert labels.tolist() == [label for _, label in test]
    u = weighted_logits(z, SUM)
    counts = [cascade.segments[stream] for stream in order]
    assert counts == ([2, 2, 2] if len(segments) == 1 else [2, 1, 3])
    expected_reads = list(dict.fromkeys(zip(counts, pixels, strict=True)))
    layers, exits, macs = watch(cascade)
    for theta in (0., scattering_theta(u), 2.):
        taken = first_confident(u, theta)
        for n, (path, _) in enumerate(test):
            for noted in (reads, layers, exits, *macs.values()):
                noted.clear()
            j, p = cascade.predict(path, SUM, theta)
            assert j == taken[n]
            torch.testing.assert_close(p, u[j, n].softmax(-1))
            assert layers == exits == cascade.exits[:j + 1]
            assert reads == expected_reads[:1 + j // 4]
            assert sum(macs["nets"] + macs["heads"]) == pytest.approx(costs[j].item())
        assert len(taken.unique()) > 2 or theta in (0, 2)
    assert (taken == 11).all()
    assert sum(macs["nets"]) == pytest.approx(sum(network_costs.values()))
    _, p = cascade.predict(path, SUM, 0.)
    assert cascade.predict(path, SUM, p.max())[0] > 0  # equal to theta is not enough


# ---- which videos serve for what


def test_everything_is_chosen_on_held_out_videos(trained, base, monkeypatch):
    """And these are not what pkd_compressed.py trained on."""
    monkeypatch.setattr(wise_infer, "L1_GRID", (.1, .01))
    held_out = {path for path, _ in trained.held_out}
    assert len(held_out) == 24
    train = {path for path, _ in trained.data.train}
    assert trained.decoded & train == train - held_out
    cascade = Cascade(trained.checkpoint, "progressive", MV_R_I)
    z, labels = cascade.logits(trained.held_out, None)
    costs, _ = cascade.costs()
    for calls in base.calls.values():
        assert all(torch.equal(args[1], labels) for args in calls)
    assert all(torch.equal(args[0], z) for args in base.calls["cross_fit"])
    W, u, l1 = choose_weights(z, labels, EXITS, "zero", None, 0)
    _, u_fusion, l1_fusion = choose_weights(z, labels, EXITS, "fusion", None, 0)
    assert base.results["l1"] == {"wise": l1, "wise_fusion_prior": l1_fusion}
    assert base.results["weights"] == W.tolist()
    assert torch.equal(base.calls["cheapest_theta"][0][0], u)
    assert base.results["theta"] == cheapest_theta(u, labels, costs, .5)
    sums = [weighted_logits(z, weights) for weights in fixed_weights(EXITS).values()]
    sums = [u, *sums, u_fusion]  # the first one at the cost of late fusion
    for args, expected in zip(base.calls["theta_for_cost"], sums, strict=True):
        assert torch.equal(args[0], expected)
    gmac = evaluate(u, labels, base.results["theta"], costs)["GMAC"]
    theta = theta_for_cost(sums[3], labels, costs, gmac)
    assert base.results["early_exit"]["late_fusion"]["theta"] == theta


def test_without_held_out_videos_training_videos_serve_and_a_note_says_so(
        trained, tmp_path, capsys, monkeypatch):
    checkpoint = torch.load(trained.file, weights_only=True)
    checkpoint["flags"]["holdout"] = 0.
    torch.save(checkpoint, tmp_path / "last.pt")
    counts = []
    monkeypatch.setattr(wise_infer, "time_early_exit", lambda *_: 1.)
    monkeypatch.setattr(wise_infer, "fit_weights", lambda z, labels, *_: (
        counts.append(len(labels)) or SUM, True))
    run("--checkpoint", tmp_path / "last.pt", "--out", tmp_path, "--l1", 1)
    assert max(counts) == len(trained.data.train)
    assert "NOTE no videos were held out" in capsys.readouterr().out


def test_undecodable_videos_are_wrong_in_the_test_and_left_out_of_the_fit(
        trained, tmp_path, capsys, monkeypatch):
    """The broken test video is of class 0, which logits of 0 would predict. Files of other sizes
    are other data, which are refused unless the checkpoint knows them."""
    folder = tmp_path / trained.folder.name
    shutil.copytree(trained.folder, folder)
    lost = next(n for n, (_, label) in enumerate(trained.data.test) if label == 0)
    broken = []
    for path in (trained.held_out[1][0], trained.data.test[lost][0]):
        broken.append(folder / Path(path).relative_to(trained.folder))
        broken[-1].write_text("no video")
    checkpoint = torch.load(trained.file, weights_only=True)
    checkpoint["flags"]["data"] = str(folder)
    torch.save(checkpoint, tmp_path / "last.pt")
    flags = ("--checkpoint", tmp_path / "last.pt", "--out", tmp_path)
    with pytest.raises(BadInput, match="was trained on other videos"):
        run(*flags)

    checkpoint["digest"] = common.load_dataset(folder).digest()
    torch.save(checkpoint, tmp_path / "last.pt")
    fitted = []

    def spy(z, labels, *more):
        fitted.append(labels.tolist())
        return cross_fit(z, labels, *more)

    monkeypatch.setattr(wise_infer, "cross_fit", spy)
    monkeypatch.setattr(wise_infer, "time_early_exit", lambda *_: 1.)
    results = run(*flags, "--theta", .2, "--l1", 1)
    printed = capsys.readouterr()
    others = trained.held_out[:1] + trained.held_out[2:]
    assert fitted == [[label for _, label in others]] * 2
    decodable = np.arange(24) != lost
    z = trained.z.numpy()[:, decodable]
    labels = trained.labels.numpy()[decodable]
    u = np.einsum("je,enk->jnk", np.array(results["weights"]), z)
    confident = softmax(u).max(-1) > .2
    confident[11] = True
    predictions = u.argmax(-1)[confident.argmax(0), range(23)]
    assert results["early_exit"]["wise"]["top1"] == (predictions == labels).sum() / 24
    assert results["wise"] == (u[11].argmax(1) == labels).sum() / 24
    for row, z_e, u_j in zip(results["exits"], z, u, strict=True):
        assert row["single_exit"] == (z_e.argmax(1) == labels).sum() / 24
        assert row["wise"] == (u_j.argmax(1) == labels).sum() / 24
    assert "NOTE 2 videos cannot be decoded; in the test they count as wrong" in printed.out
    for path in broken:
        assert printed.err.count(str(path)) == 1


# ---- what is printed and saved


def test_results_file_and_result_line_agree(trained, base, tmp_path, capsys, monkeypatch):
    """And theta 2 sends every video to the last exit."""
    monkeypatch.setattr(wise_infer, "time_early_exit", lambda *_: 1.)
    r = run("--checkpoint", trained.file, "--out", tmp_path, "--theta", 2, "--exit-order", *R_MV_I,
            "--schedule", "labels", "--l1", .1)
    printed = capsys.readouterr().out
    record = json.loads(next(tmp_path.rglob("results.json")).read_text())
    assert record["results"] == r
    assert printed.startswith(f"run: {next(tmp_path.rglob('results.json')).parent}\n")
    exits = itertools.product(R_MV_I, (1, 2, 3, 4))
    assert [row["exit"] for row in r["exits"]] == [f"{STREAMS[stream]} {k}" for stream, k in exits]
    assert [row["leave_here"] for row in r["exits"]] == [0.] * 11 + [1.]
    scores = " ".join(f"{name}={r[name]:.4f}" for name in NAMES)
    assert re.fullmatch(rf"RESULT wise_infer data={trained.folder.name} split=1 seed=0 {scores} "
                        r"seconds=\d+", printed.splitlines()[-1])
    for name in ("late_fusion", "wise_early"):
        assert predicted_top1(next(tmp_path.rglob(f"{name}-predictions.csv"))) == r[name]
    assert r["last_exit"] == r["exits"][11]["single_exit"]
    assert r["late_fusion"] == r["exits"][11]["late_fusion"]
    assert r["wise_early"] == r["wise"] == r["exits"][11]["wise"]
    assert r["wise_early_gmac"] == r["wise_gmac"] == r["exits"][11]["GMAC"]


def test_prior_fusion_deploys_the_other_weights_by_their_own_name(
        trained, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wise_infer, "time_early_exit", lambda *_: 1.)
    flags = ("--checkpoint", trained.file, "--out", tmp_path, "--l1", .1)
    r = run(*flags, "--prior", "fusion")
    names = list(NAMES)
    for name in ("wise_at_fusion_cost", "wise_early", "wise_early_gmac"):
        names[names.index(name)] = name.replace("wise", "wise_fusion_prior")
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.findall(r"(\w+)=", line) == ["data", "split", "seed", *names, "seconds"]
    for name in ("last_exit", "uniform", "late_fusion"):
        assert r[name] == base.results[name]
    u = weighted_logits(trained.z, torch.tensor(r["weights"]).double())
    top1 = (u.argmax(-1) == trained.labels).double().mean(1).tolist()
    assert [row["wise_fusion_prior"] for row in r["exits"]] == top1
    assert r["early_exit"]["wise_fusion_prior"]["top1"] == r["wise_fusion_prior_early"]


def test_picture_names_every_curve_and_dot_once(base, trained):
    first_run = min(trained.out.glob("wise_infer/*"))
    picture = ElementTree.parse(first_run / "accuracy.svg")
    words = [element.text for element in picture.iter() if element.tag.endswith("text")]
    for name in ("single_exit", "uniform", "late_fusion", "wise", "wise_fusion_prior",
                 "late fusion without exits", "wise_early", "wise_at_fusion_cost", "100 %"):
        assert words.count(name) == 1


def test_video_prints_what_the_test_predicts_and_reencodes_other_codecs(
        trained, base, tmp_path, capsys):
    W = torch.tensor(base.results["weights"], dtype=torch.float64)
    u = weighted_logits(trained.z, W)
    video = trained.data.test[5][0]
    theta = scattering_theta(u)
    frames = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), np.uint8)
    h264 = tmp_path / "h.mp4"
    common.write_video(h264, frames.repeat(8, 1).repeat(8, 2), codec="libx264", qmax="51")
    (tmp_path / "broken.mp4").write_text("no video")
    flags = ("--data", trained.folder, "--out", trained.out, "--theta", theta,
             "--l1", base.results["l1"]["wise"], "--video")
    lines = run(*flags, video, tmp_path / "broken.mp4", h264)["video"]
    printed = capsys.readouterr()
    j = first_confident(u, theta)[5]
    prediction = trained.data.classes[u[j, 5].argmax()]
    stream, k = EXITS[j]
    assert re.fullmatch(rf"{video}: {prediction}, {u[j, 5].softmax(-1).max():.3f}, exit {k} of "
                        rf"{STREAMS[stream]}, \S+ ms", lines[0])
    assert re.fullmatch(rf"{h264}: .*, exit . of .* ms \(re-encoded: .*codec is h264.*\)", lines[1])
    assert printed.out.splitlines()[-2:] == lines
    assert f"cannot decode {tmp_path / 'broken.mp4'}: " in printed.err
    with pytest.raises(BadInput, match="none of the files"):
        run(*flags, tmp_path / "broken.mp4", tmp_path / "gone.mp4")


def test_the_second_video_takes_the_choice_of_the_first(trained, tmp_path, monkeypatch, capsys):
    """Without a pass over the held-out videos, unless the checkpoint or a flag is another one."""
    file = tmp_path / "last.pt"
    shutil.copy(trained.file, file)
    video = trained.data.test[5][0]
    flags = ("--out", tmp_path, "--checkpoint", file, "--l1", .1)
    run(*flags)
    passes = []
    logits = Cascade.logits

    def spy(*args):
        passes.append(1)
        return logits(*args)

    monkeypatch.setattr(Cascade, "logits", spy)
    capsys.readouterr()
    run(*flags, "--video", video)
    line = capsys.readouterr().out.splitlines()
    assert line[1] == f"weights and theta: from {tmp_path / 'wise.json'}"
    run(*flags, "--theta", 2, "--video", video)
    assert len(passes) == 1
    chosen = capsys.readouterr().out.splitlines()
    run(*flags, "--theta", 2, "--video", video)
    assert len(passes) == 1
    kept = capsys.readouterr().out.splitlines()
    assert kept[-1].rpartition(", ")[0] == chosen[-1].rpartition(", ")[0]  # without the time
    run(*flags, "--prior", "fusion", "--theta", 2, "--video", video)
    assert len(passes) == 2
    torch.save({**trained.checkpoint, "new": 1}, file)
    run(*flags, "--prior", "fusion", "--theta", 2, "--video", video)
    assert len(passes) == 3


# ---- which checkpoint is taken, and mistakes


def test_the_newest_run_of_data_split_and_seed_is_taken_whatever_its_flags(trained, tmp_path):
    name = trained.folder.name
    folders = [f"{name}-s1-seed0-1", f"{name}-s1-seed0-2", f"{name}-s2-seed0-3",
               f"{name}-s1-seed1-4", f"other-{name}-s1-seed0-5"]
    for n, folder in enumerate(folders):
        file = tmp_path / "pkd_compressed" / folder / "last.pt"
        file.parent.mkdir(parents=True)
        flags = {**trained.checkpoint["flags"], "shots": n}
        torch.save({**trained.checkpoint, "flags": flags}, file)
    args = wise_infer.parse(["--data", str(trained.folder), "--out", str(tmp_path)])
    checkpoint, path = wise_infer.load_checkpoint(args)
    assert path.parent.name == folders[1]
    assert checkpoint["flags"]["shots"] == 1


def test_a_missing_checkpoint_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wise_infer.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^wise_infer.py: .*toy-s1-seed0-[*]/last.pt does not "
                                         r"exist; run pkd_compressed.py first, .*$"):
        runpy.run_path(wise_infer.__file__, run_name="__main__")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_explained(trained, tmp_path):
    flags = ("--data", trained.folder, "--out", tmp_path)
    file = tmp_path / "last.pt"
    torch.save({**trained.checkpoint, "optimizer": {}}, file)
    with pytest.raises(BadInput, match=r"training has not finished; .*--resume"):
        run(*flags, "--checkpoint", file)
    reason = "--schedule anti: the exits of .* were trained by labels, progressive"
    with pytest.raises(BadInput, match=reason):
        run(*flags, "--checkpoint", trained.file, "--schedule", "anti")
    file.write_text("no checkpoint")
    for path in (file, trained.file.with_name("networks-last.pt")):
        with pytest.raises(BadInput, match="is not a checkpoint of this kind"):
            run(*flags, "--checkpoint", path)
    for wrong in (["--exit-order", "mv", "mv", "i"], ["--segments", "many"], ["--segments", 1, 2],
                  ["--segments", 1, 0, 1], ["--theta", "nan"], ["--l1", -1], ["--prior", "0"]):
        with pytest.raises(SystemExit) as stop:
            run(*wrong)
        assert stop.value.code == 2
