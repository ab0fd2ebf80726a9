"""wise_infer.py: its equations and their optimum, exits that are really taken, clips of its own."""
import csv
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import pkd_compressed
import wise_infer
from common import BadInput, exit_logits, read_data, write_video
from wise_infer import (
    STREAMS,
    Looker,
    all_logits,
    choose_theta,
    controls,
    exit_costs,
    exit_table,
    expected_cost,
    fit,
    fit_wise,
    held_out,
    leave_at,
    load,
    main,
    operate,
    parse,
    point_table,
    run_clip,
    run_for_real,
    theta_of_cost,
    weighted_logits,
)

CPU, CODES = torch.device("cpu"), ("r", "mv", "i")  # the order of the paper's code


def go(*flags):
    return main([str(flag) for flag in flags])


def exits_in(order):
    return [(stream, k) for stream in order for k in (1, 2, 3, 4)]


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
    u = sum(w_e * z_e for w_e, z_e in zip(w, z, strict=True))
    u = u - u.max(1, keepdims=True)
    log_p = u - np.log(np.exp(u).sum(1, keepdims=True))
    error, size = np.exp(log_p), np.sqrt(w ** 2 + 1e-8)
    error[n, labels] -= 1
    return (l1 * (size - 1e-4).sum() - log_p[n, labels].mean(),
            np.array([(error * z_e).sum() / len(n) for z_e in z]) + l1 * w / size)


def no_worse(W, z, labels, l1, others):
    for j in range(len(z)):
        own = by_hand(W[j, :j + 1], z[:j + 1], labels, l1)[0]
        for other in others:
            assert own <= by_hand(other[j, :j + 1], z[:j + 1], labels, l1)[0] + 1e-9


def rivals(E):
    one_hot = [torch.eye(E).double()[e].expand(E, E).tril() for e in range(E)]
    return [*controls(exits_in(STREAMS)[:E]).values(), *one_hot]


# ---- the equations


def test_weighted_logits_by_numpy():
    z, W = torch.randn(4, 5, 3).double(), torch.randn(4, 4).double().tril()
    u = weighted_logits(z, W)
    for j, n, c in itertools.product(range(4), range(5), range(3)):
        assert u[j, n, c].item() == pytest.approx(np.dot(W[j], z[:, n, c]))
    torch.testing.assert_close(weighted_logits(z, torch.eye(4).double()[[2, 2, 0, 3]]),
                               z[[2, 2, 0, 3]])
    z[2:] = 9.
    torch.testing.assert_close(weighted_logits(z, W)[:2], u[:2])  # later exits are not heard


@pytest.mark.parametrize(("E", "N", "K", "l1"), [
    (12, 60, 12, 1e-3), (5, 80, 3, .05), (6, 90, 4, 0.), (2, 50, 2, 1e-3), (3, 1, 3, 1e-3)])
def test_weights_are_the_optimum(E, N, K, l1):
    z, labels = problem(E, N, K)
    W = fit_wise(z, labels, l1)
    assert W.isfinite().all()
    assert not W.triu(1).any()
    for j in range(E):
        assert np.abs(by_hand(W[j, :j + 1], z[:j + 1], labels, l1)[1]).max() < 1e-6
    no_worse(W, z, labels, l1, rivals(E))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fit_wise(z[:, order], labels[order], l1), W, rtol=0, atol=1e-6)


def test_sgd500_is_500_steps_from_ones_and_no_better():
    """Weights that stay away from 0: there, steps of .1 jump over the kink of l1."""
    z, labels = problem(3, 40, 4, signal=2)
    steps, exact = fit_wise(z, labels, 1e-3, "sgd500"), fit_wise(z, labels, 1e-3)
    for j in range(3):
        w = np.ones(j + 1)
        for _ in range(500):
            w = w - .1 * by_hand(w, z[:j + 1], labels, 1e-3)[1]
        np.testing.assert_allclose(steps[j, :j + 1], w, atol=1e-6)
    assert not steps.triu(1).any()
    no_worse(exact, z, labels, 1e-3, [steps])
    losses = [by_hand(W[2], z, labels, 1e-3)[0] for W in (exact, steps)]
    assert losses[0] < losses[1] < 1.1 * losses[0]


@pytest.mark.parametrize("kind", ["times 1e4", "gap of 200", "gap of 200 at the wrong class"])
def test_extreme_logits_stay_finite(kind):
    z, labels = problem(4, 60, 3)
    z = z * 1e4 if kind == "times 1e4" else z
    if "gap" in kind:
        z[1:, torch.arange(60), (labels + ("wrong" in kind)) % 3] += 200
        z[0] *= 100
    W = fit_wise(z, labels, 1e-3)
    assert W.isfinite().all()
    no_worse(W, z, labels, 1e-3, rivals(4))


def test_a_large_l1_leaves_no_weight_and_noise_gets_less_than_the_truth():
    z, labels = problem(3, 90, 3, signal=0)
    assert fit_wise(z, labels, 10.).abs().max() < 1e-4
    z[1] = torch.eye(3)[labels] * 3.
    W = fit_wise(z, labels, 1e-2)
    assert W[0].abs().max() < .2
    assert W[2, 1] > 1
    assert W[2, [0, 2]].abs().max() < .1 * W[2, 1]


def test_a_clip_leaves_at_the_first_sure_exit():
    z, labels = problem(5, 70, 4, signal=4)
    W, costs = fit_wise(z, labels, 1e-3), torch.tensor([1., 2., 4., 5., 9.]).double()
    p, before = softmax(weighted_logits(z, W).numpy()), 0.
    for theta in np.linspace(0, 1.1, 221):
        left = leave_at(z, W, theta)
        for n in range(70):
            hits = [j for j in range(5) if p[j, n].max() > theta]
            assert left[n] == (hits[0] if hits else 4)
        cost = expected_cost(left, costs)
        assert cost.item() == pytest.approx(np.mean([costs[j] for j in left]))
        assert cost >= before - 1e-12
        before = cost
    assert (leave_at(z, W, 0.) == 0).all()
    assert (leave_at(z, W, 1.1) == 4).all()
    assert (leave_at(0 * z, W, .25) == 4).all()  # as sure as theta is not sure enough
    assert (leave_at(0 * z, W, .2499) == 0).all()


@pytest.mark.parametrize("max_loss", [0., 2., 10., 100.])
def test_theta_costs_least_of_those_that_lose_no_more(max_loss):
    z, labels = problem(4, 45, 3, signal=3)  # 180 confidences: `thetas` has them all
    costs, whole = torch.tensor([1., 3., 4., 9.]).double(), torch.arange(45) != 7
    W = controls(exits_in(STREAMS)[:4])["uniform"]

    def run(theta):
        return operate(z, labels, whole, W, theta, costs)[0]

    found = run(choose_theta(z, labels, whole, W, costs, max_loss))
    least = run(2.)["top1"] - max_loss / 100 - 1e-9
    assert found["top1"] >= least
    grid = [run(theta) for theta in np.linspace(0, 1.001, 1002)]
    assert found["gmac"] <= min(r["gmac"] for r in grid if r["top1"] >= least) + 1e-12
    assert (found["gmac"] == 1) == (max_loss == 100)
    for gmac in (.5, 1., 2.5, 6., 20.):
        spent = run(theta_of_cost(z, labels, whole, W, costs, gmac))["gmac"]
        assert spent <= max(gmac, 1.) + 1e-9
        assert spent >= max([r["gmac"] for r in grid if r["gmac"] <= gmac], default=1.) - 1e-12


@pytest.mark.parametrize("order", [STREAMS, CODES])
def test_controls_are_what_they_are_called(order):
    found = controls(exits_in(order))
    for j in range(12):
        ends = [e for e in (3, 7, 11) if e <= j] or [j]
        for name, among in (("alone", [j]), ("uniform", range(j + 1)), ("fusion", ends)):
            wanted = np.array([(e in among) / len(among) for e in range(12)])
            np.testing.assert_allclose(found[name][j], wanted, err_msg=name)


# ---- a checkpoint, and clips that are really run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of pkd_compressed.py, and the files that it decoded."""
    folder, out = tmp_path_factory.mktemp("data") / "small-pairs", tmp_path_factory.mktemp("pkd")
    common.make_toy_folder(folder, train=48, test=24, pairs=True)
    decoded, real = set(), common.read_compressed

    def spy(path, *more):
        decoded.add(str(path))
        return real(path, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pkd_compressed, "median_ms", lambda function, device: bool([function()]))
        patch.setattr(common, "read_compressed", spy)
        pkd_compressed.main([
            "--data", str(folder), "--out", str(out), "--networks", "toy", "toy", "toy", "--size",
            "32", "--segments", "2", "--epochs", "3", "--exit-epochs", "3", "--crops", "1",
            "--order", "ce", "progressive", "--holdout", "0.5", "--workers", "0", "--lr", "3e-3"])
    return SimpleNamespace(folder=folder, out=out, decoded=decoded,
                           file=next(out.rglob("last.pt")))


@pytest.fixture(scope="module")
def parts(trained):
    """What main works with, in both orders."""
    saved, nets, heads, path = load(parse(["--data", str(trained.folder), "--out",
                                           str(trained.out)]))
    for module in (*nets.values(), *heads.values()):
        module.eval().requires_grad_(False)
    data, segments = read_data(trained.folder, toys="toy-pairs"), dict.fromkeys(STREAMS, 2)
    held, looks = held_out(saved, data, path), {}
    for order in (STREAMS, CODES):
        exits = exits_in(order)
        looks[order] = (nets, heads, exits, segments, 32, CPU)
    z_t, labels, whole = all_logits(data.test, *looks[STREAMS], {})
    at = [exits_in(STREAMS).index(exit) for exit in exits_in(CODES)]
    return SimpleNamespace(
        saved=saved, nets=nets, heads=heads, path=path, data=data, held=held,
        paths=[path for path, _ in data.test], looks=looks,
        z={STREAMS: z_t, CODES: z_t[at]}, labels=labels, whole=whole,
        z_h=all_logits(held, *looks[STREAMS], {})[0],
        labels_h=torch.tensor([label for _, label in held]),
        costs={order: exit_costs(*look) for order, look in looks.items()})


@pytest.fixture(scope="module")
def base(trained, parts):
    """The plain command, and what was fitted and chosen on which logits."""
    asked = []

    def spied(name, real):
        return lambda *given: asked.append((name, given)) or real(*given)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fit_wise", "choose_theta", "theta_of_cost"):
            patch.setattr(wise_infer, name, spied(name, getattr(wise_infer, name)))
        found = go("--data", trained.folder, "--out", trained.out)
    return SimpleNamespace(results=found, asked=asked, run=next(trained.out.glob("wise_infer/*")))


def some_clips(trained, folder, held=6, broken=(), labels=()):
    """The same networks with fewer clips, some of them broken. -> flags, clips held out"""
    shutil.copytree(trained.folder, folder)
    lines = (folder / "test1.csv").read_text().splitlines()[:5]
    for n, label in enumerate(labels, start=1):
        lines[n] = f"{lines[n].split(',')[0]},{label}"
    (folder / "test1.csv").write_text("\n".join(lines))
    for name in broken:
        (folder / name).write_text("no video")
    saved = torch.load(trained.file, weights_only=True)
    train = read_data(folder, toys="toy-pairs").train
    names = {Path(name.split()[0]).name for name in saved["holdout"]}
    clips = [c for c in train if Path(c[0]).name in names][:held]
    saved |= {"folder": str(folder), "holdout": wise_infer.listed_names(clips)}
    torch.save(saved, folder / "last.pt")
    return ("--checkpoint", folder / "last.pt", "--out", folder / "out"), clips


@pytest.fixture
def quick(monkeypatch):
    """sgd500 without its 500 steps; -> the flags for it."""
    monkeypatch.setitem(wise_infer.SOLVERS, "sgd500", lambda objective, size: torch.full(
        (size,), 1., dtype=torch.float64))
    return "--solver", "sgd500"


@pytest.fixture(scope="module")
def few(trained, tmp_path_factory):
    return some_clips(trained, tmp_path_factory.mktemp("few") / "few")[0]


SUM = torch.ones(12, 12).double().tril()  # surer with every exit; `quick` gives it, too


def scattering(z, W, count=1):
    """The thetas that send clips to most different exits; no confidence nearby: real sums may
    differ from these in the last bit."""
    sure = weighted_logits(z, W).softmax(-1).amax(-1).flatten().sort().values
    found = ((sure[1:] + sure[:-1]) / 2)[sure.diff() > 1e-9].tolist()
    return sorted(found, key=lambda theta: -len(leave_at(z, W, theta).unique()))[:count]


@pytest.mark.parametrize("order", [STREAMS, CODES])
def test_real_exits_are_those_computed_afterwards(parts, order):
    z, costs = parts.z[order], parts.costs[order]
    for theta in (0., *scattering(z, SUM, 2), 2.) if order == STREAMS else scattering(z, SUM):
        r, said, left = operate(z, parts.labels, parts.whole, SUM, theta, costs)
        real, real_left, ms, gmac = run_for_real(parts.data.test, *parts.looks[order], SUM, theta)
        assert real == said.tolist()
        assert real_left == left.tolist()
        assert gmac == pytest.approx(r["gmac"]) == pytest.approx(costs[left].mean().item())
        assert ms > 0
        assert sum(r["shares"]) == pytest.approx(1)
        assert len(set(real_left)) > 1 or theta in (0, 2)
        assert theta or real_left == [0] * 24
        assert theta < 2 or real_left == [11] * 24


@pytest.mark.parametrize("order", [STREAMS, CODES])
def test_what_lies_behind_the_exit_neither_runs_nor_is_decoded(parts, monkeypatch, order):
    ran, macs, read, hooks, real = [], [], [], [], wise_infer.read_compressed
    monkeypatch.setattr(wise_infer, "read_compressed", lambda path, at, pictures: read.append(
        pictures) or real(path, at, pictures))

    def watch(module, name):
        hooks.append(module.register_forward_hook(lambda *_: ran.append(name)))

    for stream in STREAMS:
        net, heads = parts.nets[stream], parts.heads[stream]
        for k, layer in enumerate(net.layers, start=1):
            watch(layer, (stream, k, "layer"))
            watch([*heads, net.fc][k - 1], (stream, k, "exit"))
        for module in (*net.modules(), *heads.modules()):
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                hooks.append(module.register_forward_hook(
                    lambda module, x, y: macs.append(y.numel() * module.weight[0].numel())))
    exits, seen, z = exits_in(order), set(), parts.z[order]
    for theta, (path, _) in itertools.product((0., *scattering(z, SUM), 2.), parts.data.test):
        j = leave_at(z, SUM, theta)[parts.paths.index(path)].item()
        if j in seen:
            continue
        seen.add(j)
        for noted in (ran, macs, read):
            noted.clear()
        look = Looker(path, dict.fromkeys(STREAMS, 2), 32, CPU)
        run_clip(parts.nets, parts.heads, exits, look, SUM, theta)
        assert ran == [(*exit, what) for exit in exits[:j + 1] for what in ("layer", "exit")]
        assert sum(macs) / 1e9 == pytest.approx(parts.costs[order][j].item())
        assert read == ([True] if order == CODES else [False] if j < 4 else [False, True])
        assert look.decoded == [(2, pictures) for pictures in read]
    for hook in hooks:
        hook.remove()
    assert len(seen) > 3


def test_motion_alone_gives_the_same_logits_to_the_bit(parts):
    alone, both = (Looker(parts.data.test[3][0], dict.fromkeys(STREAMS, 2), 32, CPU)
                   for _ in range(2))
    both("r")
    assert torch.equal(alone("mv"), both("mv"))
    assert (alone.decoded, both.decoded) == ([(2, False)], [(2, True)])
    z = [torch.stack(list(exit_logits(parts.nets["mv"], parts.heads["mv"],
                                      look("mv")))) for look in (alone, both)]
    assert torch.equal(*z)


def test_costs_add_up_stream_by_stream(parts):
    def steps(order, **segments):
        costs = exit_costs(parts.nets, parts.heads, exits_in(order), segments, 32, CPU)
        each = torch.diff(costs, prepend=costs.new_zeros(1))
        assert (each > 0).all()
        return dict(zip(exits_in(order), each.tolist(), strict=True))

    one, other = (steps(order, mv=1, r=2, i=3) for order in (STREAMS, CODES))
    ones = steps(STREAMS, mv=1, r=1, i=1)
    for (stream, k), cost in one.items():
        assert cost == pytest.approx(other[stream, k])
        last = parts.heads[stream][k - 1][-1].weight.numel() / 1e9 if k < 4 else 0.
        S = {"mv": 1, "r": 2, "i": 3}[stream]
        assert cost - last == pytest.approx(S * (ones[stream, k] - last))  # last: behind the mean


# ---- clips of its own


def test_held_out_clips_are_those_that_nothing_was_trained_or_is_tested_on(trained, parts):
    assert parts.held == pkd_compressed.hold_out(parts.data.train, .5, 0)[1]
    held = {path for path, _ in parts.held}
    assert len(held) == 24
    assert trained.decoded == {path for path, _ in parts.data.train + parts.data.test} - held
    assert not held & {path for path, _ in parts.data.test}


def test_everything_is_chosen_on_held_out_clips(base, parts):
    assert [name for name, _ in base.asked] == ["fit_wise", "choose_theta", *["theta_of_cost"] * 3]
    for _, given in base.asked:
        assert torch.equal(given[0], parts.z_h)
        assert torch.equal(given[1], parts.labels_h)
    W = torch.tensor(base.results["weights"], dtype=torch.float64)
    for j in range(12):
        slope = by_hand(W[j, :j + 1], parts.z_h[:j + 1], parts.labels_h, 1e-3)[1]
        assert np.abs(slope).max() < 1e-6
    assert base.results["theta"] == choose_theta(parts.z_h, parts.labels_h, parts.whole, W,
                                                 parts.costs[STREAMS], .5)


def test_held_out_clips_on_the_test_list_are_refused(parts):
    test = [*parts.data.test, parts.held[2]]
    with pytest.raises(BadInput, match="1 held-out clips are test clips"):
        held_out(parts.saved, parts.data._replace(test=test), parts.path)
    train = [clip for clip in parts.data.train if clip != parts.held[2]]
    with pytest.raises(BadInput, match="of 24 held-out clips 23 are on the training list"):
        held_out(parts.saved, parts.data._replace(train=train), parts.path)
    with pytest.raises(BadInput, match=r"holds no clips out.*--holdout 0\.2"):
        held_out({**parts.saved, "holdout": []}, parts.data, parts.path)


def test_clips_that_cannot_be_decoded_count_as_wrong_and_teach_nothing(
        trained, parts, tmp_path, quick, capsys, monkeypatch):
    """The broken test clip is of class 0, which is what logits of 0 would say; whole networks and
    late fusion are right about one clip at least."""
    z = parts.z[STREAMS][:, 1:4].numpy()
    fusion = z[[3, 7, 11]].mean(0).argmax(1)
    labels = np.array([fusion[0], z[11, 1].argmax(), 0])
    taught, real = [], wise_infer.fit_wise
    monkeypatch.setattr(wise_infer, "fit_wise",
                        lambda *given: taught.append(given[1]) or real(*given))
    held = Path(parts.held[1][0]).name
    flags, clips = some_clips(trained, tmp_path / "few", broken=("test/0000.mp4", f"train/{held}"),
                              labels=[parts.data.classes[label] for label in (0, *labels)])
    found = go(*flags, *quick, "--theta", .3)
    assert (found["clips"], found["held_out"]) == (4, 6)
    printed = capsys.readouterr()
    assert "NOTE 2 clips cannot be decoded" in printed.out
    for name in (f"train/{held}", "test/0000.mp4"):
        assert printed.err.count(f"{name}: no readable video") == 1
    assert [*found["bad"]] == [f"{tmp_path}/few/train/{held}", f"{tmp_path}/few/test/0000.mp4"]
    assert taught[0].tolist() == [label for path, label in clips if not path.endswith(held)]

    W = {**controls(exits_in(STREAMS)), "WISE": torch.tensor(found["weights"])}
    sums = {name: np.einsum("je,enk->jnk", w, z) for name, w in W.items()}
    for name, u in sums.items():
        assert found["top1"][name] == [(u_j.argmax(1) == labels).sum() / 4 for u_j in u]
    points = found["points"]
    assert points["i alone, no exits"]["top1"] == (z[11].argmax(1) == labels).sum() / 4 > 0
    assert points["late fusion, no exits"]["top1"] == (fusion == labels).sum() / 4 > 0
    for name, r in points.items():
        if "no exits" not in name:
            u = sums[name.split(" at")[0] if " at" in name else "WISE"]
            said = [next((u_j[n] for u_j in u if softmax(u_j[n]).max() > r["theta"]), u[-1][n])
                    .argmax() for n in range(3)]
            assert r["top1"] == (said == labels).sum() / 4, name
            assert r.get("same_labels", 1) == 1


# ---- runs


def test_the_record_holds_what_was_returned(base):
    record = json.loads((base.run / "run.json").read_text())
    assert record["results"] == base.results
    assert (base.run / "run.png").stat().st_size > 10_000
    r, points = base.results, base.results["points"]
    assert (r["clips"], r["held_out"], len(r["costs"])) == (24, 24, 12)
    full, early = points["WISE, no early exit"], points["WISE, theta auto"]
    assert full["gmac"] == pytest.approx(full["gmac_counted"]) == pytest.approx(r["costs"][-1])
    assert early["gmac"] == pytest.approx(early["gmac_counted"])
    assert full["top1"] == r["top1"]["WISE"][-1]
    assert full["same_labels"] == early["same_labels"] == 1
    assert r["saved"] == pytest.approx(1 - early["gmac"] / full["gmac"])
    assert points["late fusion, no exits"]["top1"] == r["top1"]["fusion"][-1]


def test_tables_have_every_exit_and_every_operating_point(base):
    r, exits = base.results, exits_in(STREAMS)
    lines = exit_table(exits, r["costs"], r["top1"]).splitlines()
    for j, (stream, k) in enumerate(exits):
        cells = lines[1 + j].split()
        assert cells[0] == f"{stream}{k}"
        assert [float(cell) for cell in cells[1:]] == pytest.approx([r["costs"][j], *[
            r["top1"][name][j] for name in ("alone", "uniform", "fusion", "WISE")]], abs=6e-4)
    lines = point_table(r["points"], exits).splitlines()[1:]
    for line, (name, point) in zip(lines, r["points"].items(), strict=False):
        assert line.startswith(name)
        assert f" {point['top1']:.3f} " in line
        for (stream, k), share in zip(exits, point.get("shares", []), strict=False):
            assert (f" {stream}{k} " in line[len(name):]) == (share > 0)
    assert len(r["points"]) == 7


def test_theta_0_leaves_at_once_and_divide_changes_no_class(few, quick):
    found = go(*few, *quick, "--theta", 0, "--divide")
    at_once = found["points"]["WISE, theta given"]
    assert at_once["shares"] == [1, *[0] * 11]
    assert at_once["gmac"] == pytest.approx(found["costs"][0])
    assert at_once["gmac_counted"] == pytest.approx(found["costs"][0])
    assert found["top1"]["WISE"] == found["top1"]["uniform"]
    torch.testing.assert_close(torch.tensor(found["weights"], dtype=torch.float64),
                               SUM / torch.arange(1, 13)[:, None])


def test_divide_changes_how_sure_it_is(parts, quick):
    W = [fit(parts.z_h, parts.labels_h, parse([*quick, *more])) for more in ((), ("--divide",))]
    whole, divided = (weighted_logits(parts.z[STREAMS], w) for w in W)
    assert torch.equal(whole.argmax(-1), divided.argmax(-1))
    assert (divided.softmax(-1).amax(-1)[1:] < whole.softmax(-1).amax(-1)[1:]).all()


def test_theta_2_goes_to_the_end_in_any_order(few, quick):
    found = go(*few, *quick, "--theta", 2, "--exit-order", *CODES, "--order", "ce")
    assert found["exits"] == [f"{stream}{k}" for stream, k in exits_in(CODES)]
    never, given = (found["points"][f"WISE, {name}"] for name in ("no early exit", "theta given"))
    assert {**given, "ms": 0} == {**never, "ms": 0}
    assert given["shares"] == [*[0] * 11, 1]
    assert given["gmac_counted"] == pytest.approx(found["costs"][-1])


def test_sweep_marks_the_pareto_front_and_fewer_segments_cost_half(trained, few, quick, parts):
    found = go(*few, *quick, "--sweep", "--segments", "mv=1,r=1,i=1")
    rows = found["sweep"]
    assert {(r["mv"], r["r"], r["i"]) for r in rows} == set(itertools.product((1, 2), repeat=3))
    assert len(rows) == 40
    for row in rows:
        best = max(r["top1"] for r in rows if r["gmac"] <= row["gmac"])
        least = min(r["gmac"] for r in rows if r["top1"] >= row["top1"])
        assert row["pareto"] == (row["top1"] == best and row["gmac"] == least)
    assert any(row["pareto"] for row in rows)
    with open(next(few[3].rglob("tradeoff.csv"))) as file:
        written = list(csv.DictReader(file))
    assert written == [{key: str(value) for key, value in row.items()} for row in rows]
    own = next(r for r in rows if r["mv"] == r["r"] == r["i"] == 1 and r["max_loss"] == .5)
    auto = found["points"]["WISE, theta auto"]
    assert (own["theta"], own["gmac"], own["top1"]) == pytest.approx(
        (auto["theta"], auto["gmac"], auto["top1"]))
    linear = itertools.accumulate(0 if k == 4 else parts.heads[stream][k - 1][-1].weight.numel()
                                  for stream, k in exits_in(STREAMS))
    for one, two, once in zip(found["costs"], parts.costs[STREAMS].tolist(), linear, strict=True):
        assert one == pytest.approx((two + once / 1e9) / 2)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Files that --video has to re-encode, and one that it cannot."""
    folder = tmp_path_factory.mktemp("odd")
    frames = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), np.uint8)
    frames = frames.repeat(8, 1).repeat(8, 2)
    write_video(folder / "b.mp4", frames, bf="2")
    write_video(folder / "m.avi", frames, codec="mjpeg", pix_fmt="yuvj420p")
    (folder / "broken.mp4").write_text("no video")
    return folder


def test_video_says_what_the_test_says(few, quick, parts, odd, capsys):
    z, clip = parts.z[STREAMS], parts.data.test[5][0]
    theta, = scattering(z, SUM)
    files = (clip, odd / "broken.mp4", odd / "b.mp4", odd / "m.avi")
    first, broken, *others = go(*few, *quick, "--theta", theta, "--video", *files)["video"]
    _, said, left = operate(z, parts.labels, parts.whole, SUM, theta, parts.costs[STREAMS])
    assert first["label"] == parts.data.classes[said[5]]
    assert (first["exit"], first["note"]) == ("{}{}".format(*exits_in(STREAMS)[left[5]]), "")
    p = softmax(weighted_logits(z, SUM)[left[5], 5].numpy())
    assert first["confidence"] == pytest.approx(p.max())
    printed = capsys.readouterr()
    assert f"cannot decode {odd / 'broken.mp4'}: no readable video" in printed.err
    assert broken["error"].startswith("no readable video")
    for row, why in zip(others, ("it has B-frames", "codec mjpeg"), strict=True):
        assert row["label"] in parts.data.classes
        assert re.search(rf"re-encoded in \S+ s: {why}", row["note"])
        assert f"{row['file']}: {row['label']}" in printed.out


def test_video_of_broken_files_alone_is_a_mistake(few, odd, quick):
    with pytest.raises(BadInput, match="none of the files"):
        go(*few, *quick, "--video", odd / "broken.mp4", odd / "gone.mp4")


def test_real_files_get_a_label(shared, few, quick, parts):
    files = sorted((shared / "clips").glob("*_med_*.avi"))[:1]
    row, = go(*few, *quick, "--video", *files)["video"]
    assert row["label"] in parts.data.classes


# ---- mistakes


def test_more_than_ten_clips_that_cannot_be_decoded_stop_the_run(parts, tmp_path, capsys):
    lost, clips = [(str(tmp_path / f"{n}.mp4"), 0) for n in range(11)], parts.data.test[:2]
    whole = all_logits([*lost[:10], *clips], *parts.looks[STREAMS], {})[2]
    assert whole.tolist() == [False] * 10 + [True] * 2
    bad = {}
    with pytest.raises(BadInput, match="11 of 13 clips cannot be decoded"):
        all_logits([*lost, *clips], *parts.looks[STREAMS], bad)
    assert list(bad) == [path for path, _ in lost]
    with pytest.raises(BadInput, match="1 of 1 clips"):
        all_logits(lost[:1], *parts.looks[STREAMS], bad)
    assert capsys.readouterr().err.count(f"{lost[0][0]}:") == 2  # named once a run


def test_clips_of_one_name_and_size_in_training_and_test_are_different_clips(parts, tmp_path):
    rows = []
    for part in ("train", "test"):  # as in data/train/run/0.mp4 and data/test/run/0.mp4
        path = tmp_path / part / "run" / "0.mp4"
        path.parent.mkdir(parents=True)
        path.write_text(part[:2])
        rows.append([(str(path), 0)])
    data = parts.data._replace(train=rows[0], test=rows[1])
    saved = {**parts.saved, "holdout": wise_infer.listed_names(rows[0])}
    assert held_out(saved, data, parts.path) == rows[0]


def test_a_missing_checkpoint_is_one_line_and_exit_code_two(run_script, tmp_path):
    done = run_script("wise_infer.py", "--out", tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"wise_infer.py: .*toy-s1-seed0/last.pt is missing; make it with: python "
                        r"pkd_compressed.py --data toy --split 1 --seed 0 --out .*\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_mistakes_say_what_would_be_right(trained, parts, tmp_path):
    flags = ("--data", trained.folder, "--out", tmp_path)
    with pytest.raises(BadInput, match=f"python pkd_compressed.py --data {trained.folder} --split "
                                       f"1 --seed 3 --out {tmp_path}"):
        go(*flags, "--seed", 3)
    file = tmp_path / "last.pt"
    saved = torch.load(trained.file, weights_only=True)
    for state, message in (({k: v for k, v in saved.items() if k != "exits_state"}, "--resume"),
                           ({**saved, "exit_epochs": 99}, "--resume"),  # killed on the way
                           ({**saved, "holdout": []}, "pkd_compressed.py --holdout 0.2"),
                           ({**saved, "classes": [*saved["classes"][:-1], "else"]}, "classes")):
        torch.save(state, file)
        with pytest.raises(BadInput, match=message):
            go(*flags, "--checkpoint", file)
    with pytest.raises(BadInput, match="exits of ce, progressive, none of --order anti"):
        go(*flags, "--checkpoint", trained.file, "--order", "anti")
    file.write_text("no checkpoint")
    with pytest.raises(BadInput, match="no finished checkpoint"):
        go(*flags, "--checkpoint", file)


@pytest.mark.parametrize("flags", [
    ("--exit-order", "mv", "mv", "i"), ("--segments", "nonsense"), ("--segments", "mv=0"),
    ("--segments", "x=1"), ("--theta", "nonsense"), ("--theta", "nan"), ("--l1", -1),
    ("--max-loss", -1)])
def test_flags_out_of_range(flags):
    with pytest.raises(SystemExit) as left:
        go(*flags)
    assert left.value.code == 2
