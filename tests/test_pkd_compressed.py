"""pkd_compressed.py: its equations, what stays frozen, what a teacher alone teaches, kills."""
import dataclasses
import functools
import itertools
import json
import shutil
import sys
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import pkd_compressed
import wise_infer
from pkd_compressed import (
    ORDERS,
    STREAMS,
    Exits,
    Streams,
    adamw,
    evaluate,
    exits_loss,
    main,
    minimum,
    parse,
    phases,
    soft_cross_entropy,
    teacher_at,
    train_exits,
)

FAST = ("--networks", "toy", "toy", "toy", "--size", 32, "--workers", 0, "--batch-size", 12,
        "--segments", 1, "--epochs", 2, "--exit-epochs", 3)


def go(*flags):
    return main([str(flag) for flag in flags])


def state(out, name="last.pt"):
    return torch.load(next(out.rglob(name)), weights_only=True)


def log(out):
    rows = []
    for line in next(out.rglob("metrics.jsonl")).read_text().splitlines():
        row = json.loads(line)
        rows.append({key: x for key, x in row.items() if key not in ("stage", "clips_per_s")})
    return rows


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def networks(streams=None, exits=None, orders=ORDERS):
    """Networks and exits with these weights, or as they start"""
    torch.manual_seed(0)
    nets = Streams(["toy"] * 3, 12, False, None)
    heads = Exits(nets, orders, 12, 0)
    if streams:
        nets.load_state_dict(streams)
    if exits:
        heads.load_state_dict(exits)
    return nets.eval(), heads.eval()


@pytest.fixture(scope="module")
def base(coded, tmp_path_factory):
    """One run of all orders, and the files that it read before it came to the test."""
    out, read, real = tmp_path_factory.mktemp("base"), set(), common.read_compressed
    noted = SimpleNamespace(out=out)

    def reads(path, *more):
        read.add(path)
        return real(path, *more)

    def tests(*given):
        noted.training = set(read)
        found = evaluate(*given)
        read.intersection_update(noted.training)  # what tests read is another matter
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "read_compressed", reads)
        patch.setattr(pkd_compressed, "evaluate", tests)
        noted.top1 = go("--data", coded, *FAST, "--order", "all", "--out", out)["top1"]
    return noted


# ---- the equations


@pytest.mark.parametrize("tau", [1, 2, 5])
def test_losses_and_their_gradients_in_closed_form(tau):
    """Mean over B, sum over K and over the exits, no tau^2; a gradient stays in its exit."""
    generator = torch.Generator().manual_seed(tau)
    z = 2 * torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    labels, (z_t, *own) = torch.tensor([0, 1, 2, 3, 4, 0]), z
    own = [z_k.requires_grad_() for z_k in own]
    p, truth = (z_t / tau).softmax(1), F.one_hot(labels, 5)
    for target, temperature, teacher in ((p, tau, z_t), (truth, 1, None)):
        loss, wanted = exits_loss(own, labels, teacher, tau), 0.
        for z_k in own:
            e = np.exp(z_k.detach().numpy() / temperature)
            wanted -= (target.numpy() * np.log(e / e.sum(1, keepdims=True))).sum() / 6
        assert loss.item() == pytest.approx(wanted, abs=1e-12)
        for z_k, found in zip(own, torch.autograd.grad(loss, own), strict=True):
            slope = ((z_k / temperature).softmax(1) - target) / (temperature * 6)
            torch.testing.assert_close(found, slope.detach(), rtol=0, atol=1e-12)
    alone = [soft_cross_entropy(z_k, z_t, tau) for z_k in own]
    torch.testing.assert_close(exits_loss(own, 0 * labels, z_t, tau), sum(alone))


@pytest.mark.parametrize("gap", [200., 1e4])
def test_soft_loss_is_finite_where_the_logits_are_far_apart(gap):
    z = torch.tensor([[gap, 0., 0.], [0., gap, 0.]], requires_grad=True)
    loss = soft_cross_entropy(z, z.detach().flip(0), 1.)
    loss.backward()
    assert loss.item() == pytest.approx(gap)
    torch.testing.assert_close(z.grad, torch.tensor([[.5, -.5, 0.], [-.5, .5, 0.]]))
    assert soft_cross_entropy(z, z, 1.).item() == 0


def test_teachers_change_at_a_sixth_and_a_third():
    for stream, third, steps in itertools.product(STREAMS, ("self", "i"), (1, 2, 5, 6, 7, 300)):
        final, wanted = {"self": stream, "i": "i"}[third], []
        for t in range(steps):
            early = "mv" if Fraction(t, steps) < Fraction(1, 6) else "r"
            wanted.append(early if Fraction(t, steps) < Fraction(1, 3) else final)
        found = {}
        for order in ORDERS:
            found[order] = [teacher_at(t, steps, order, stream, third) for t in range(steps)]
        assert found == {"ce": [None] * steps, "progressive": wanted, "anti": wanted[::-1],
                         "iframe": ["i"] * steps, "self": [stream] * steps}
    assert wanted == ["mv"] * 50 + ["r"] * 50 + ["i"] * 200  # epochs of the paper's code


# ---- training


def test_exit_training_leaves_the_networks_alone_and_moves_every_exit(base):
    end, fresh = state(base.out), networks()[1].state_dict()
    assert same(end["streams"], state(base.out, "streams-last.pt")["streams"])
    assert any("running_mean" in key for key in end["streams"])  # BatchNorm's statistics, too
    for key, start in fresh.items():
        assert torch.equal(start, fresh[f"heads.ce.{key.split('.', 2)[2]}"])  # all start alike
        assert not torch.equal(start, end["exits"][key]), key


def test_no_held_out_and_no_test_clip_is_read_in_training(base, coded):
    data = common.read_data(coded)
    rest, held = common.hold_out(data, .2, 0)
    assert len(held) == 12
    assert base.training == {path for path, _ in rest.train}
    assert not base.training & {path for path, _ in held + data.test}


def test_held_out_clips_are_counted_at_the_ends_of_phases(base, coded):
    """Of three epochs: after sixths 2 and 4 or 5, and at the end, where last.pt repeats it."""
    rows = log(base.out)[2:]
    for row in rows:
        assert list(row["held-out"]) == list(base.top1)
    _, held = common.hold_out(common.read_data(coded), .2, 0)
    right = recount(state(base.out), held)
    for stream, k in itertools.product(STREAMS, (1, 2, 3)):
        wanted = pytest.approx(right[f"{stream}{k}"] / 12)
        assert rows[-1]["held-out"][f"progressive-{stream}{k}"] == wanted
    picture = next(base.out.rglob("phases.png"))
    found = phases(log(base.out), SimpleNamespace(order=ORDERS), picture)
    for (stream, order), line in zip(itertools.product(STREAMS, ORDERS), found, strict=True):
        wanted = {"exits of": stream, "order": order}
        for row in rows:
            right = [row["held-out"][f"{order}-{stream}{k}"] for k in (1, 2, 3)]
            wanted[f"epoch {row['epoch']}"] = sum(right) / 3
        assert line == wanted
    assert picture.stat().st_size > 10_000


def test_without_the_cache_the_losses_are_the_same(base, coded, tmp_path, capsys, monkeypatch):
    """But for the rounding of feature maps to fp16. The third epoch sees crops for the second time.
    The networks, trained a second time by the same command, are the same to the bit."""
    monkeypatch.setattr(pkd_compressed, "CACHE_GB", 0)
    go("--data", coded, *FAST, "--order", "all", "--out", tmp_path)
    assert "GB: every epoch decodes anew" in capsys.readouterr().out
    assert same(state(tmp_path)["streams"], state(base.out)["streams"])
    for own, row in zip(log(tmp_path), log(base.out), strict=True):
        assert own.pop("held-out", {}) == pytest.approx(row.get("held-out", {}), rel=2e-3)
        assert own == pytest.approx({k: row[k] for k in own}, rel=2e-3)


@pytest.fixture(scope="module")
def trained(coded, tmp_path_factory):
    """Networks that know all training clips"""
    out = tmp_path_factory.mktemp("trained")
    go("--data", coded, *FAST, "--epochs", 16, "--exit-epochs", 1, "--holdout", 0, "--order", "ce",
       "--out", out)
    return state(out)["streams"]


def taught(streams, data, labels, run, *flags):
    """Exits trained on the training clips with these labels -> their weights, and their top-1 on
    these clips with the true ones"""
    args = parse([str(flag) for flag in ("--data", "none", *FAST, *flags)])
    nets, exits = networks(streams, orders=args.order)
    train = [(path, k) for (path, _), k in zip(data.train, labels, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "mirrors", lambda _: [False] * 12)  # else flips depend on the label
        train_exits(nets.train(), exits, dataclasses.replace(data, train=train), [], args, run)
    return exits.state_dict(), evaluate(nets, exits, data.train, {}, args)


def of_exits(top1, order):
    """-> (3 streams, 3 exits)"""
    return np.array([top1[f"{order}-{s}{k}"] for s in STREAMS for k in (1, 2, 3)]).reshape(3, 3)


def test_exits_learn_from_a_teacher_alone(trained, coded, tmp_path, monkeypatch):
    """Whatever the labels are, the exits end the same to the bit, and know most of what the teacher
    knows, also of crops that no exit has seen; exits that labels teach know nothing where these are
    shuffled. An untrained teacher teaches nothing."""
    data, found = common.read_data(coded), []
    truth = [label for _, label in data.train]
    mixed = np.random.default_rng(0).permutation(truth).tolist()
    monkeypatch.setattr(pkd_compressed, "CROPS", 4)
    for labels in (truth, mixed):
        found.append(taught(trained, data, labels, tmp_path, "--exit-epochs", 12))
    (a, right), (b, wrong) = found
    for order in ("ce", "progressive"):
        alike = [torch.equal(a[key], b[key]) for key in a if order in key]
        assert all(alike) == (order == "progressive")
    learned = of_exits(wrong, "progressive")                                    # (3, 3)
    reached = learned / np.array([[wrong[f"{stream}4"]] for stream in STREAMS])
    assert learned.min() > .35, learned  # chance is 1/12
    assert reached.mean() > .75, reached
    assert reached.min() > .55, reached
    assert of_exits(right, "ce").mean() > .5, right
    assert of_exits(wrong, "ce").mean() < .2, wrong

    _, top1 = taught(None, data, truth, tmp_path, "--order", "progressive", "--exit-epochs", 5)
    assert of_exits(top1, "progressive").mean() < .15, top1


def test_learning_rates_of_streams_and_of_imagenet_weights():
    """The factors of CoViAR's code; without --imagenet a stream has one rate, toys always 3e-3."""
    nets, exits = networks()
    real = "--networks", "resnet18", "resnet18", "resnet50", "--imagenet"
    for flags, own, rates in (
            ((), (.003, .003, .003), (1, 1, 1)), (("--lr", .1, .2, .4), (.1, .2, .4), (1, 1, 1)),
            (("--imagenet",), (.003, .003, .003), (1, 1, 1)),
            (real, (.01, .005, .0003), (.1, .01, 1))):
        args = parse([str(flag) for flag in (*FAST, *flags)])
        optimizer, _ = adamw(nets, args, 1)  # the first step of warm-up is the whole rate
        found = {w: g for g in optimizer.param_groups for w in g["params"]}
        assert len(found) == len(list(nets.parameters()))
        for name, w in nets.named_parameters():
            _, stream, layer, *_ = name.split(".")
            first, rest, last = rates
            factor = {"fc": last, "layers": rest}.get(layer, rest if stream == "i" else first)
            assert found[w]["lr"] == pytest.approx(own[STREAMS.index(stream)] * factor), name
            assert found[w]["weight_decay"] == (.01 if w.ndim > 1 else 0), name
        optimizer, _ = adamw(exits, args, 1)
        own_lr = 1e-3 if "resnet50" in flags else 3e-3
        assert {group["lr"] for group in optimizer.param_groups} == {own_lr}


# ---- testing


def recount(saved, clips, order="progressive"):
    """Right answers by hand, one clip after the other: {"mv1": number, ...}"""
    found = Counter()
    nets, exits = networks(saved["streams"], saved["exits"], saved["flags"]["order"])
    for path, label in clips:
        at = common.p_frames(path)
        middle = at[common.segment_indices(len(at), saved["flags"]["segments"])]
        x = common.compressed_view([common.read_compressed(path, middle)], 32)
        for stream in STREAMS:
            z = common.exit_logits(nets.nets[stream], exits.heads[order][stream], x[stream])
            found.update(f"{stream}{k}" for k, z_k in enumerate(z, 1) if z_k.argmax() == label)
    return found


def test_accuracies_are_those_of_a_count_by_hand_and_bad_clips_are_wrong(coded, tmp_path, capsys):
    folder = tmp_path / "some-bad"
    shutil.copytree(coded, folder)
    broken = [folder / name for name in ("train/0003.mp4", "test/0004.mp4")]
    for path in broken:
        path.write_text("no video")
    found = go("--data", folder, *FAST, "--segments", 2, "--holdout", 0, "--out", tmp_path)
    printed = capsys.readouterr()
    good = [clip for clip in common.read_data(folder).test if clip[0] != str(broken[1])]
    right = recount(state(tmp_path), good)
    assert right.total()  # none would prove nothing
    for name in ("mv4", "r4", "i4"):
        assert found["top1"][name] == pytest.approx(right[name] / 24)
    for name in ("mv1", "mv2", "mv3", "r1", "r2", "r3", "i1", "i2", "i3"):
        assert found["top1"][f"progressive-{name}"] == pytest.approx(right[name] / 24)
    assert "NOTE 2 clips cannot be decoded; test clips among them count as wrong" in printed.out
    record = json.loads(next(tmp_path.rglob("run.json")).read_text())
    assert record["results"]["top1"] == found["top1"]
    for path in broken:
        assert printed.err.count(f"cannot decode {path}: no readable video") == 1
        assert str(path) in record["bad"]


def test_bad_training_clips_do_not_stop_the_test(coded):
    """Eleven may be few among many training clips, and yet be too many among the test clips."""
    data, args = common.read_data(coded), parse([str(f) for f in ("--data", "none", *FAST)])
    data.bad.update((f"{n}.mp4", "no readable video") for n in range(11))
    found = evaluate(*networks(orders=args.order), data.test, data.bad, args)
    assert len(found) == 3 + 2 * 9


# ---- flatness


class Constant(nn.Module):
    """Logits b + c, whatever the clip: at b = c = 1 and with as many clips of each of K classes the
    loss is log K, at a minimum; its Hessian has diag(p) - p p^, p = 1/K, once for each tensor."""

    def __init__(self):
        super().__init__()
        self.b, self.c = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(12))

    def forward(self, x, S=None):
        z = (self.b + self.c).expand(len(x), 12)
        return z if S else ([], z)  # an exit, or a network


@pytest.mark.parametrize("exits", [1, 3])
def test_flatness_in_closed_form_and_weights_are_put_back(exits):
    """Two tensors, each with the trace K (1/K) (1 - 1/K). A clip that cannot be decoded, -1, does
    not count."""
    args, labels = parse([*map(str, FAST)]), torch.tensor([*range(12), -1]).split(8)
    module = nn.ModuleList([Constant() for _ in range(3)]) if exits == 3 else Constant()
    batches = [(own, [own] * 3, own) for own in labels]
    row, wanted = minimum("", module, batches, args, probes=300), exits * 2 * 11 / 12
    assert row["loss"] == pytest.approx(exits * np.log(12))
    assert 0 < row["standard error"] < .1 * wanted
    assert abs(row["trace"] - wanted) < 4 * row["standard error"]
    assert all((w == 1).all() and w.grad is None for w in module.parameters())


# ---- kills and processes


@pytest.mark.parametrize(("owner", "name", "calls"), [
    (common, "compressed_view", 5), (pkd_compressed, "exits_loss", 50)])
def test_killed_and_resumed_ends_the_same(base, coded, tmp_path, owner, name, calls):
    """In the second epoch of the networks, and in that of the exits"""
    flags = ("--data", coded, *FAST, "--order", "all", "--out", tmp_path)
    real, left = getattr(owner, name), [calls]

    def killed(*given):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            go(*flags)
    assert go(*flags, "--resume")["top1"] == base.top1
    assert log(tmp_path) == log(base.out)
    for part in ("streams", "exits"):
        assert same(state(tmp_path)[part], state(base.out)[part])


def test_two_processes_follow_one(base, coded, tmp_path, run_script):
    """They count every test clip once, each with its own weights and BatchNorm: so these are the
    same in both. Losses differ from one process only by the batches that BatchNorm sees."""
    done = run_script("pkd_compressed.py", "--data", coded, *FAST, "--order", "all", "--out",
                      tmp_path, OMP_NUM_THREADS="1",
                      python=(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node",
                              "2"))
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    result = done.stdout.splitlines()[-1]
    assert result.startswith(f"RESULT pkd_compressed data={coded.name} split=1 seed=0 mv4=")
    assert done.stdout.count("RESULT") == 1
    saved, data = state(tmp_path), common.read_data(coded)
    args = parse([str(flag) for flag in ("--data", "none", *FAST, "--order", "all")])
    top1 = evaluate(*networks(saved["streams"], saved["exits"]), data.test, {}, args)
    assert top1 == json.loads(next(tmp_path.rglob("run.json")).read_text())["results"]["top1"]
    scores = {f"{name}={x:.4f}" for name, x in top1.items()}
    assert scores <= set(result.split())
    for own, row in zip(log(tmp_path), log(base.out), strict=True):
        assert own.keys() == row.keys()
        losses = [key for key in row if "held-out" not in key]
        assert [own[key] for key in losses] == pytest.approx([row[k] for k in losses], rel=.2)


def test_a_degraded_network_stops_after_one_epoch(coded, tmp_path, monkeypatch):
    """Its weights, not its BatchNorm; and after --resume, too"""
    weights, real = [], pkd_compressed.keep

    def spy(row, rows, epochs, path, about, parts):
        if row["stage"] == "streams":
            nets = parts["streams"].nets
            weights.append({s: nn.utils.parameters_to_vector(nets[s].parameters()).detach().clone()
                            for s in STREAMS})
            if len(rows) == 1 and len(weights) == 2:
                real(row, rows, epochs, path, about, parts)
                raise KeyboardInterrupt
        real(row, rows, epochs, path, about, parts)

    monkeypatch.setattr(pkd_compressed, "keep", spy)
    flags = ("--data", coded, *FAST, "--epochs", 3, "--order", "ce", "--degrade", "r", "--out",
             tmp_path)
    with pytest.raises(KeyboardInterrupt):
        go(*flags)
    go(*flags, "--resume")
    assert len(weights) == 3
    for stream in STREAMS:
        for after in weights[1:]:
            assert torch.equal(weights[0][stream], after[stream]) == (stream == "r")


# ---- clips that need another form, and mistakes


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Of each class a clip to train on, one to hold out, one to test; H.264 in training, B-frames
    and a broken file among the test clips"""
    folder = tmp_path_factory.mktemp("odd") / "odd"
    common.make_toy_folder(folder, 8, 4, pairs=True, motions=("growing", "moving up"))
    truths = json.loads((folder / "toy_truth.json").read_text())
    for name, options in (("train/0000.mp4", {"codec": "libx264", "qmax": "51"}),
                          ("test/0000.mp4", {"bf": "2"})):
        common.write_video(folder / name, common.toy_clip(truths[name], 24, 96), **options)
    (folder / "test" / "0001.mp4").write_text("no video")
    return folder


def test_clips_in_another_form_are_refused_before_training(odd, tmp_path):
    with pytest.raises(common.BadInput, match="add --reencode") as caught:
        go("--data", odd, *FAST, "--out", tmp_path)
    assert str(caught.value).startswith(f"{odd}/train/0000.mp4: its codec is h264")
    assert not list(tmp_path.rglob("*.pt"))


def test_reencoding_works_on_copies_and_so_does_inference(odd, tmp_path, monkeypatch):
    read, real = set(), common.read_compressed

    def reads(path, *more):
        read.add(path)
        return real(path, *more)

    monkeypatch.setattr(common, "read_compressed", reads)
    monkeypatch.setattr(pkd_compressed, "minimum", functools.partial(minimum, probes=2))
    monkeypatch.setattr(wise_infer, "fit_wise", lambda *given: given[2])  # the prior
    before = {path: path.read_bytes() for path in odd.rglob("*.*")}
    flags = ("--data", odd, "--out", tmp_path)
    found = go(*flags, *FAST, "--epochs", 1, "--exit-epochs", 1, "--holdout", .5, "--reencode",
               "--flatness")
    trained = set(read)
    results = wise_infer.main([str(flag) for flag in (*flags, "--l1", 1)])
    copies = {str(path) for path in (tmp_path / "cache").rglob("*.mp4")}
    assert trained == copies
    assert read == copies
    assert len(copies) == 4 + 4 + 3
    assert {path: path.read_bytes() for path in odd.rglob("*.*")} == before
    own = [f"{order}-{stream}" for order in ("ce", "progressive") for stream in STREAMS]
    assert [row["minimum"] for row in found["flatness"]] == [*STREAMS, *own]
    assert results["last"] == pytest.approx(found["top1"]["i4"])


def test_mistakes_say_what_would_be_right(coded, tmp_path):
    for flags, message in ((("--networks", "toy", "toy", "resnet19"), "network resnet19: there"),
                           (("--data", "gone"), "no such folder")):
        with pytest.raises(common.BadInput, match=message):
            go("--data", coded, *FAST, "--out", tmp_path, *flags)
    for flags in (("--size", 16), ("--holdout", 1), ("--tau", 0), ("--order", "backwards"),
                  ("--networks", "toy"), ("--lr", 1, 2)):
        with pytest.raises(SystemExit) as caught:
            go("--data", coded, *flags)
        assert caught.value.code == 2
    assert not list(tmp_path.iterdir())


def test_real_clips_that_are_not_square(shared, tmp_path):
    folder = tmp_path / "few"
    for part, people in (("train", ("daria", "denis")), ("test", ("eli",))):
        for action, who in itertools.product(("bend", "jack"), people):
            (folder / part / action).mkdir(parents=True, exist_ok=True)
            clip = shared / "weizmann" / action / f"{who}_{action}.avi"
            (folder / part / action / clip.name).symlink_to(clip)
    top1 = go("--data", folder, *FAST, "--epochs", 1, "--exit-epochs", 1, "--batch-size", 4,
              "--segments", 2, "--out", tmp_path)["top1"]
    assert len(top1) == 3 + 2 * 9
    assert next(tmp_path.rglob("run.png")).stat().st_size > 10_000
