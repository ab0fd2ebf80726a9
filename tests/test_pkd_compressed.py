"""pkd_compressed.py: its equations, what stays frozen, what a teacher alone teaches, kills."""
import itertools
import json
import math
import re
import shutil
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import pkd_compressed
from common import BadInput, exit_logits, read_compressed, write_video
from pkd_compressed import (
    ORDERS,
    STREAMS,
    Exits,
    FixedCrops,
    Kept,
    Streams,
    exits_loss,
    hold_out,
    main,
    parse,
    see,
    soft_cross_entropy,
    teacher_at,
    train_exits,
)

CPU = torch.device("cpu")
HERE = (CPU, 0, 1)
NETS = ("--networks", "toy", "toy", "toy", "--size", 32)
FAST = (*NETS, "--segments", 1, "--epochs", 2, "--exit-epochs", 3, "--workers", 0,
        "--batch-size", 12)
FLOATS = 16 * 8 * 8 + 32 * 4 * 4 + 64 * 2 * 2  # of the toy network's three maps at 32 pixels


@pytest.fixture(autouse=True, scope="module")
def timed_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pkd_compressed, "median_ms", lambda function, device: bool([function()]))
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "small-pairs"
    common.make_toy_folder(folder, train=48, test=24, pairs=True)
    return folder


def go(*flags):
    return main([str(flag) for flag in flags])


def last(folder):
    return torch.load(next(folder.rglob("last.pt")), weights_only=True)


def log(folder):
    rows = map(json.loads, next(folder.rglob("metrics.jsonl")).read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "clips_per_s"} for row in rows]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_exits(a, b):
    return a.keys() == b.keys() and all(same(a[order], b[order]) for order in a)


def copy(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def base(small, tmp_path_factory):
    """One run of all orders. Beside it: what was read in training, and the networks as stage 1 got
    them."""
    spied, out, read = SimpleNamespace(paths=[]), tmp_path_factory.mktemp("base"), read_compressed
    stage_one, test = pkd_compressed.train_exits, pkd_compressed.evaluate

    def reads(path, *more):
        spied.paths.append(path)
        return read(path, *more)

    def trains(streams, exits, *more):
        spied.before, spied.fresh = copy(streams), copy(exits)
        stage_one(streams, exits, *more)
        spied.grads = [w.grad for w in streams.parameters()]

    def tests(*given):
        spied.training = set(spied.paths)
        return test(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "read_compressed", reads)
        patch.setattr(pkd_compressed, "train_exits", trains)
        patch.setattr(pkd_compressed, "evaluate", tests)
        spied.results = go("--data", small, *FAST, "--order", "all", "--out", out)
    spied.out, spied.run = out, out / "pkd_compressed" / f"{small.name}-s1-seed0"
    return spied


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """The same run with one order alone, and with the flatness measured between its stages."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pkd_compressed.flatness, "__defaults__", (12, 2, (.01, .1)))
        return go("--data", small, *FAST, "--order", "ce", "--flatness", "--out", out), out


# ---- the equations


def numbers(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("tau", [1, 2, 5])
def test_gradient_of_the_soft_loss_has_no_square_of_tau(tau):
    z, z_t = numbers(0, (6, 5), (6, 5))
    found, = torch.autograd.grad(soft_cross_entropy(z.requires_grad_(), z_t, tau), z)
    wanted = ((z / tau).softmax(1) - (z_t / tau).softmax(1)) / (tau * 6)
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("tau", [1, 2, 5])
def test_soft_loss_by_numpy(tau):
    z, z_t = (x.numpy() / tau for x in numbers(1, (6, 5), (6, 5)))
    wanted = sum(-sum(math.exp(t[c]) / sum(map(math.exp, t)) * (
        s[c] - math.log(sum(map(math.exp, s)))) for c in range(5)) for s, t in zip(
            z, z_t, strict=True)) / 6
    found = soft_cross_entropy(*numbers(1, (6, 5), (6, 5)), tau)
    assert found.item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("gap", [200., 1e4])
def test_soft_loss_is_finite_where_the_logits_are_far_apart(gap):
    z = torch.tensor([[gap, 0., 0.], [0., gap, 0.]], requires_grad=True)
    loss = soft_cross_entropy(z, z.detach().flip(0), 1.)
    loss.backward()
    assert loss.item() == pytest.approx(gap)
    torch.testing.assert_close(z.grad, torch.tensor([[.5, -.5, 0.], [-.5, .5, 0.]]))
    assert soft_cross_entropy(z, z, 1.).item() == 0


def test_a_repeated_batch_has_the_same_loss():
    z, z_t = numbers(2, (6, 5), (6, 5))
    torch.testing.assert_close(soft_cross_entropy(z, z_t, 2), soft_cross_entropy(
        z.repeat(3, 1), z_t.repeat(3, 1), 2))


def test_no_student_does_better_than_its_teacher():
    z_t, *students = numbers(3, *[(6, 5)] * 50)
    entropy = torch.distributions.Categorical(logits=z_t / 2).entropy().mean()
    torch.testing.assert_close(soft_cross_entropy(z_t + 7, z_t, 2), entropy)
    for z in students:
        assert soft_cross_entropy(z, z_t, 2) > entropy
        assert soft_cross_entropy(z_t + 1e-2 * z, z_t, 2) > entropy


def test_exits_add_up():
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    *z, z_t = numbers(4, *[(6, 5)] * 4)
    torch.testing.assert_close(exits_loss(z, labels, None, 3.), F.cross_entropy(
        torch.cat(z), labels.repeat(3)) * 3)
    torch.testing.assert_close(exits_loss(z, labels, z_t, 3.),
                               sum(soft_cross_entropy(z_k, z_t, 3.) for z_k in z))
    torch.testing.assert_close(exits_loss(z, labels, z_t, 3.), exits_loss(z, 0 * labels, z_t, 3.))


@pytest.mark.parametrize("taught", [True, False])
def test_an_exits_gradient_does_not_see_the_other_exits(taught):
    z, other, more, z_t = numbers(5, *[(6, 5)] * 4)
    labels, found = torch.tensor([0, 1, 2, 3, 4, 0]), []
    for beside in ([other, more], [more, 9 * other], []):
        leaf = z.clone().requires_grad_()
        loss = exits_loss([leaf, *beside], labels, z_t if taught else None, 2.)
        found += torch.autograd.grad(loss, leaf)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 7, 12, 300])
@pytest.mark.parametrize("third", ["self", "i"])
@pytest.mark.parametrize("stream", STREAMS)
def test_teachers_change_at_a_sixth_and_a_third(stream, third, steps):
    final = {"self": stream, "i": "i"}[third]
    wanted = ["mv" if Fraction(t, steps) < Fraction(1, 6) else
              "r" if Fraction(t, steps) < Fraction(1, 3) else final for t in range(steps)]
    found = {order: [teacher_at(t, steps, order, stream, third) for t in range(steps)]
             for order in ORDERS}
    assert found == {"ce": [None] * steps, "progressive": wanted, "anti": wanted[::-1],
                     "iframe": ["i"] * steps}
    if steps == 300:  # epochs of the paper's code
        assert wanted == ["mv"] * 50 + ["r"] * 50 + [final] * 200
    if steps == 12:
        assert Counter(found["anti"][:8]) == {final: 8}


# ---- stage 1


@pytest.fixture(scope="module")
def data(small):
    return common.read_data(small)


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """Networks that know the training clips; no clip is held out."""
    saved = []
    with pytest.MonkeyPatch.context() as patch:  # nothing behind stage 0, and no file an epoch
        patch.setattr(pkd_compressed, "save", lambda state, path: saved.append(state))
        patch.setattr(pkd_compressed, "train_exits", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go("--data", small, *FAST, "--epochs", 16, "--holdout", 0, "--order", "ce", "--out",
               tmp_path_factory.mktemp("trained"))
    return saved[-1]["streams_state"]


def networks(state, seed=0):
    torch.manual_seed(seed)
    streams = Streams(["toy"] * 3, 12, False)
    if state:
        streams.load_state_dict(state)
    return streams


def stage_one(state, data, run, *flags, mirror=None):
    """-> networks, exits, record and arguments after stage 1 alone"""
    args = parse([str(flag) for flag in ("--data", "none", *FAST, *flags)])
    streams, rows = networks(state, args.seed), []
    exits = Exits(streams, args.order, 12, args.seed)
    train_exits(streams.train(), exits, None, data, mirror or common.mirrors(data.classes), args,
                HERE, run, rows, {}, lambda **state: None)
    return streams, exits, rows, args


def losses(rows):
    return torch.tensor([[list(order["loss"].values()) for order in row["order"].values()]
                         for row in rows])


def test_what_is_frozen_does_not_move(base):
    assert same(last(base.out)["streams_state"], base.before)  # BatchNorm's buffers, too
    assert any("running_mean" in key for key in base.before)
    assert base.grads == [None] * len(base.grads)


def test_every_exit_moves_and_all_orders_start_alike(base):
    ends = last(base.out)["exits_state"]
    assert list(ends) == list(ORDERS)
    for order, key in itertools.product(ORDERS, ends["ce"]):
        start = base.fresh[f"heads.{order}.{key}"]
        assert torch.equal(start, base.fresh[f"heads.ce.{key}"])
        assert not torch.equal(start, ends[order][key]), key


def test_networks_left_in_training_mode_are_frozen_all_the_same(trained, data, tmp_path):
    for gb in (16, 0):
        streams, *_ = stage_one(trained, data, tmp_path, "--exit-epochs", 1, "--cache-gb", gb,
                                "--segments", 2)  # two: one pixel is no batch for BatchNorm
        assert same(streams.state_dict(), trained)
        assert all(w.grad is None for w in streams.parameters())


def test_an_order_does_not_depend_on_those_beside_it(base, alone):
    found, out = alone
    assert found["top1"]["ce"] == base.results["top1"]["ce"]
    assert same(last(out)["exits_state"]["ce"], last(base.out)["exits_state"]["ce"])


def test_kept_or_not_the_losses_are_the_same(trained, data, tmp_path, monkeypatch, capsys):
    """A stream takes 2 crops x 48 clips x floats x 2 bytes: room for none, for 1.5, for all."""
    need, seen = 2 * 48 * FLOATS * 2, []
    look_up = Kept.look_up

    def spy(kept, keys, stream, device):
        seen.append((*kept.maps, sum(file.stat().st_size for file in kept.files)))
        return look_up(kept, keys, stream, device)

    monkeypatch.setattr(Kept, "look_up", spy)
    found = []
    for room, kept in ((0, None), (1.5, ("mv", need)), (99, (*STREAMS, 3 * need))):
        seen.clear()
        *_, rows, _ = stage_one(trained, data, tmp_path, "--order", "all", "--cache-gb",
                                f"{room * need / 1e9:.9f}")
        assert set(seen) == ({kept} if kept else set())
        assert capsys.readouterr().out.count("(not kept)") == (0, 2, 0)[len(found)]
        assert not list(tmp_path.glob("*.fp16"))  # nothing is left
        found.append(losses(rows))
    for more in found[1:]:
        torch.testing.assert_close(more, found[0], rtol=2e-3, atol=1e-4)


def test_printed_sizes_are_right(tmp_path, capsys, monkeypatch):
    args = parse(["--data", "none", *map(str, FAST), "--cache-gb", "0", "--segments", "3"])
    clips = FixedCrops([("none", 0)] * 50_000, 3, None, "coded", train=True)
    monkeypatch.setattr(pkd_compressed, "clip_loader", lambda *_: type(
        "Empty", (list,), {"batch_sampler": SimpleNamespace()})())
    Kept(networks(None).eval(), clips, [], args, HERE, tmp_path, {})
    size = f"{50_000 * 2 * 3 * FLOATS * 2 / 1e9:.2f} GB (not kept)"
    assert f"100000 x logits, and feature maps, at most 0 GB: mv {size}, r {size}, i {size}" in \
        capsys.readouterr().out


def test_what_is_kept_is_what_a_live_pass_gives(trained, data, tmp_path):
    """Also beyond the number of crops, and where one clip stands in for another."""
    (tmp_path / "bad.mp4").write_text("no video")
    train = [*data.train[:20], (str(tmp_path / "bad.mp4"), 3)]
    args = parse(["--data", "none", *map(str, FAST), "--crops", "3", "--seed", "5"])
    clips = FixedCrops(train, 1, None, "coded", train=True, seed=5)
    clips.crops, streams, mirror = 3, networks(trained).eval(), common.mirrors(data.classes)
    kept = Kept(streams, clips, mirror, args, HERE, tmp_path, {})
    assert len(kept.labels) == 63
    for epoch in (0, 1, 2, 3, 7):
        keys = [(epoch, i) for i in (0, 7, 20, 3)]
        batch = common._collate([clips[key] for key in keys])
        with torch.no_grad():
            live = streams(see(batch, 32, mirror, 5, CPU))
        at = kept.rows(keys)
        assert kept.labels[at].tolist() == batch.label
        for stream, (maps, z) in live.items():
            torch.testing.assert_close(kept.logits[stream][at], z, rtol=1e-4, atol=1e-5)
            for a, b in zip(kept.look_up(keys, stream, CPU), maps, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_fixed_crops_come_again_and_are_not_those_of_stage_0(data):
    fixed, free = (kind(data.train, 3, None, "coded", train=True) for kind in (
        FixedCrops, common.Clips))
    fixed.crops = 2

    def views(clips, epoch):
        batch = common._collate([clips[epoch, i] for i in range(6)])
        return see(batch, 32, common.mirrors(data.classes), 0, CPU)["i"]

    first, second, third, others = *(views(fixed, e) for e in (0, 1, 2)), views(free, 0)
    assert torch.equal(first, third)
    for other in (second, others, views(free, 1)):
        assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


# ---- what a teacher alone teaches


def shares(streams, exits, data, args, run):
    """Top-1 on what stage 1 trains on, (orders, streams, exits 1-4)"""
    clips = FixedCrops(data.train, args.segments, None, "coded", train=True, seed=args.seed)
    clips.crops = args.crops
    kept = Kept(streams, clips, [False] * 12, args, HERE, run, {})
    keys = [(crop, i) for crop in range(args.crops) for i in range(len(clips))]
    with torch.no_grad():
        z = exits.eval()({s: kept.look_up(keys, s, CPU) for s in STREAMS}, args.segments)
    right = [[[(z_k.argmax(1) == kept.labels).float().mean() for z_k in (
        *z[order][stream], kept.logits[stream])] for stream in STREAMS] for order in z]
    return torch.tensor(right)


def test_exits_learn_from_a_teacher_alone(trained, data, tmp_path):
    """Labels are shuffled, so all that is known of the classes comes from the teachers."""
    labels = np.random.default_rng(0).permutation([label for _, label in data.train]).tolist()
    mixed = data._replace(train=[(path, label) for (path, _), label in zip(
        data.train, labels, strict=True)])
    streams, exits, _, args = stage_one(trained, mixed, tmp_path, "--exit-epochs", 25,
                                        mirror=[False] * 12)
    ce, progressive = shares(streams, exits, data, args, tmp_path)
    assert progressive[:, 3].min() > .3
    reached = progressive[:, :3] / progressive[:, 3:]
    assert reached.mean() >= .9, reached
    assert reached.min() > .7, reached
    assert ce[:, :3].max() < .25, ce


def test_exits_of_an_untrained_teacher_stay_at_chance(data, tmp_path):
    streams, exits, _, args = stage_one(None, data, tmp_path, "--order", "progressive",
                                        "--exit-epochs", 10)
    top1 = shares(streams, exits, data, args, tmp_path)
    assert top1[..., :3].mean() < .15, top1


@pytest.mark.parametrize("gb", [0, 16])
def test_labels_are_not_read_where_a_teacher_is(trained, data, tmp_path, gb):
    mixed = data._replace(train=[(path, 11 - label) for path, label in data.train])
    (_, a, *_), (_, b, *_) = (stage_one(
        trained, part, tmp_path, "--order", "all", "--cache-gb", gb, "--exit-epochs", 2,
        mirror=[False] * 12) for part in (data, mixed))
    for order in ORDERS:
        assert same(a.heads[order].state_dict(), b.heads[order].state_dict()) == (order != "ce")


def test_a_clip_listed_twice_is_held_out_twice_or_not_at_all():
    train = [(name, k) for k in range(2) for name in f"{k}a {k}b {k}c {k}a {k}b".split()]
    rest, held = hold_out(train, .4, 0)
    assert not {path for path, _ in rest} & {path for path, _ in held}
    assert sorted(rest + held) == sorted(train)


def test_the_third_teacher_is_a_flag(trained, data, tmp_path):
    found = {}
    for third in ("self", "i"):
        _, exits, rows, _ = stage_one(trained, data, tmp_path, "--third-teacher", third,
                                      "--order", "progressive", "anti", "--exit-epochs", 3)
        found[third] = exits.heads
        own = {"self": list(STREAMS), "i": ["i"] * 3}[third]
        assert [list(row["order"]["progressive"]["teacher"].values()) for row in rows] == [
            ["r"] * 3, own, own]
        assert [list(row["order"]["anti"]["teacher"].values()) for row in rows] == [
            own, own, ["mv"] * 3]
    for stream in STREAMS:
        a, b = (found[third]["progressive"][stream].state_dict() for third in found)
        assert same(a, b) == (stream == "i")


# ---- what is held out, and the checkpoint


@pytest.mark.parametrize(("share", "count"), [(0, 0), (.2, 2), (.25, 2), (.5, 5), (.99, 9)])
def test_held_out_clips_are_a_share_of_every_class(share, count):
    train = [(f"{k}/{i}.mp4", k) for i in range(10) for k in range(4)] + [("last.mp4", 4)]
    rest, held = hold_out(train, share, 0)
    assert sorted(rest + held) == sorted(train)
    assert Counter(k for _, k in held) == (dict.fromkeys(range(4), count) if count else {})
    assert hold_out(train, share, 0) == (rest, held)
    assert not count or hold_out(train, share, 1)[1] != held


def test_no_held_out_and_no_test_clip_is_read_in_training(base, data):
    held = set(last(base.out)["holdout"])
    training = set(pkd_compressed.listed_names([(path, 0) for path in base.training]))
    assert len(held) == 12
    assert held | training == set(pkd_compressed.listed_names(data.train))
    assert not held & training
    assert not base.training & {path for path, _ in data.test}


def test_the_checkpoint_says_what_it_is_and_loads(base, data, small):
    state = last(base.out)
    assert {k: state[k] for k in ("networks", "classes", "data", "split", "seed", "size",
                                  "segments")} == {
        "networks": dict.fromkeys(STREAMS, "toy"), "classes": data.classes, "data": small.name,
        "split": 1, "seed": 0, "size": 32, "segments": 1}
    sizes = {f"{small.name}/train/{p.name} {p.stat().st_size}"
             for p in (small / "train").iterdir()}
    assert set(state["holdout"]) < sizes
    torch.manual_seed(9)
    streams = Streams(state["networks"].values(), len(state["classes"]), False)
    exits = Exits(streams, state["exits_state"], len(state["classes"]), 9)
    streams.load_state_dict(state["streams_state"])
    for order, heads in state["exits_state"].items():
        exits.heads[order].load_state_dict(heads)
    args = parse(["--data", "none", *map(str, FAST), "--order", "all"])
    top1, clips = pkd_compressed.evaluate(streams, exits, data, args, HERE, {})
    assert (top1, clips) == (base.results["top1"], 24)


# ---- testing


def recount(state, clips):
    """Right answers by hand, one clip after the other: {(order, stream): exits 1-4}"""
    streams, found = networks(state["streams_state"]).eval(), Counter()
    exits = Exits(streams, state["exits_state"], 12, 0).eval()
    for order, heads in state["exits_state"].items():
        exits.heads[order].load_state_dict(heads)
    for path, label in clips:
        at = common.p_frames(path)
        middle = at[common.segment_indices(len(at), state["segments"])]
        x = common.compressed_view([read_compressed(path, middle)], 32)
        with torch.no_grad():
            for order, stream in itertools.product(exits.heads, STREAMS):
                z = exit_logits(streams.nets[stream], exits.heads[order][stream], x[stream])
                found.update((order, stream, k) for k, z_k in enumerate(z)
                             if z_k.argmax() == label)
    return {order: {stream: [found[order, stream, k] for k in range(4)] for stream in STREAMS}
            for order in exits.heads}


def test_accuracies_are_those_of_a_count_by_hand(base, data):
    by_hand, results = recount(last(base.out), data.test), base.results
    assert results["clips"] == 24
    for order, stream in itertools.product(ORDERS, STREAMS):
        assert results["top1"][order][stream] == pytest.approx(
            [right / 24 for right in by_hand[order][stream]])
        assert results["top1"][order][stream][3] == results["top1"]["ce"][stream][3]
    rows = [line.split() for line in pkd_compressed.table(results).splitlines()[1:-1]]
    assert [row[:3] for row in rows] == [[s, "toy", str(k)] for s in STREAMS for k in range(1, 5)]
    for stream, _, k, _, _, *printed in rows:
        assert printed == [f"{by_hand[order][stream][int(k) - 1] / 24:.3f}" for order in ORDERS]


def test_a_clip_that_cannot_be_decoded_is_counted_and_named(small, tmp_path, capsys):
    folder = tmp_path / "some-bad"
    shutil.copytree(small, folder)
    broken = [folder / name for name in ("train/0003.mp4", "test/0004.mp4")]
    for path in broken:
        path.write_text("no video")
    found = go("--data", folder, *FAST, "--holdout", 0, "--epochs", 3, "--out", tmp_path)
    printed = capsys.readouterr()
    assert found["clips"] == 24
    good = [clip for clip in common.read_data(folder).test if clip[0] != str(broken[1])]
    by_hand = recount(last(tmp_path), good)
    for order, stream in itertools.product(("ce", "progressive"), STREAMS):
        assert found["top1"][order][stream] == pytest.approx(
            [right / 24 for right in by_hand[order][stream]])
    assert sum(map(sum, by_hand["ce"].values()))  # none right would prove nothing
    assert f"NOTE 1 training clips cannot be decoded, first {broken[0]}" in printed.out
    assert f"NOTE 1 test clips cannot be decoded and count as wrong, first {broken[1]}" in \
        printed.out
    assert printed.err.count("cannot decode ") == 2
    bad = json.loads(next(tmp_path.rglob("run.json")).read_text())["bad"]
    assert [list(bad[part]) for part in ("training", "test")] == [[str(path)] for path in broken]


def test_the_record_of_a_run(base):
    rows = log(base.out)
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("streams", 1), ("streams", 2), ("exits", 1), ("exits", 2), ("exits", 3)]
    assert [row["order"]["anti"]["teacher"]["r"] for row in rows[2:]] == ["r", "r", "mv"]
    record = json.loads((base.run / "run.json").read_text())
    assert record["results"]["top1"] == base.results["top1"]
    assert record["flags"]["order"] == list(ORDERS)


# ---- kills, seeds, processes


def test_the_same_command_gives_the_same_numbers_and_another_seed_others(base, small, tmp_path):
    found = go("--data", small, *FAST, "--order", "all", "--out", tmp_path)
    assert found["top1"] == base.results["top1"]
    assert log(tmp_path) == log(base.out)
    assert same(last(tmp_path)["streams_state"], base.before)
    go("--data", small, *FAST, "--order", "ce", "--seed", 1, "--out", tmp_path / "other")
    a, b = (last(folder) for folder in (tmp_path / "other", base.out))
    assert a["holdout"] != b["holdout"]
    assert not any(torch.equal(a["exits_state"]["ce"][key], b["exits_state"]["ce"][key])
                   for key in a["exits_state"]["ce"] if key.endswith("4.weight"))


@pytest.mark.parametrize(("name", "calls"), [
    ("see", 5), ("see", 8), ("exits_loss", 40)])
def test_killed_and_resumed_ends_the_same(base, small, tmp_path, monkeypatch, name, calls):
    """In the second epoch of stage 0, between the stages, and in the second epoch of stage 1."""
    flags = ("--data", small, *FAST, "--order", "all", "--out", tmp_path)
    real, left = getattr(pkd_compressed, name), [calls]

    def killed(*given, **more):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(pkd_compressed, name, killed)
        with pytest.raises(KeyboardInterrupt):
            go(*flags)
    found = go(*flags, "--resume")
    assert found["top1"] == base.results["top1"]
    assert log(tmp_path) == log(base.out)
    a, b = last(tmp_path), last(base.out)
    assert same(a["streams_state"], b["streams_state"])
    assert same_exits(a["exits_state"], b["exits_state"])
    assert not list(tmp_path.rglob("*.fp16"))


RANKS = """
import sys
import torch
import common
import pkd_compressed as pkd
read, evaluate, out = common.read_compressed, pkd.evaluate, sys.argv[-1]

def spy(streams, exits, data, args, place, bad):
    paths = []
    common.read_compressed = lambda path, *more: paths.append(path) or read(path, *more)
    found = evaluate(streams, exits, data, args, place, bad)
    torch.save({"streams": streams.state_dict(), "exits": exits.state_dict(), "paths": paths,
                "buffers": [key for module in (streams, exits) for key, _ in
                            module.named_buffers()], "found": found}, f"{out}/{place[1]}.pt")
    common.read_compressed = read
    return found

pkd.evaluate, pkd.median_ms = spy, lambda function, device: 0.
pkd.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def ranks(small, tmp_path_factory, run_script):
    """What two processes hold at their end, and the checkpoint."""
    out = tmp_path_factory.mktemp("two")
    (out / "ranks.py").write_text(RANKS)
    done = run_script(out / "ranks.py", "--data", small, *FAST, "--out", out, OMP_NUM_THREADS="1",
                      PYTHONPATH=str(Path(pkd_compressed.__file__).parent),
                      python=(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node",
                              "2"))
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)], last(out), done.stdout


def test_two_processes_end_with_the_same_weights(ranks):
    (a, b), end, _ = ranks
    for part in ("streams", "exits"):
        for key in a[part].keys() - a["buffers"]:
            assert torch.equal(a[part][key], b[part][key]), key
    assert same(end["streams_state"], a["streams"])
    assert same_exits(end["exits_state"], {order: {
        key.removeprefix(f"heads.{order}."): value for key, value in a["exits"].items()
        if key.startswith(f"heads.{order}.")} for order in ("ce", "progressive")})


def test_two_processes_end_with_the_same_batchnorm(ranks):
    (a, b), _, _ = ranks
    for key in a["buffers"]:
        part = "exits" if key.startswith("heads") else "streams"
        assert torch.equal(a[part][key], b[part][key]), key


def test_two_processes_count_every_test_clip_once(ranks, data):
    (a, b), _, printed = ranks
    assert sorted(a["paths"] + b["paths"]) == sorted(path for path, _ in data.test)
    assert a["found"] == b["found"]
    assert a["found"][1] == 24
    assert "2 process(es)" in printed
    assert printed.count("RESULT") == 1


# ---- costs and flatness


def test_costs_are_those_of_the_papers_networks_with_every_earlier_head():
    args = parse(["--data", "none", "--segments", "1"])
    with torch.device("meta"):
        streams = Streams(args.networks, 101, False)
        exits = Exits(streams, ["ce"], 101, 0)
    found = pkd_compressed.costs(streams.eval(), exits.eval(), args, torch.device("meta"))
    assert {s: [round(gmac, 3) for gmac, _ in found[s]] for s in STREAMS} == {
        "mv": [1.084, 1.611, 2.138, 2.549], "r": [1.123, 1.650, 2.177, 2.588],
        "i": [1.248, 3.201, 6.517, 7.326]}


def test_costs_of_a_run_grow_from_exit_to_exit(base):
    for rows in base.results["cost"].values():
        gmacs = [gmac for gmac, _ in rows]
        assert gmacs == sorted(set(gmacs))


class Linear(nn.Module):
    """Softmax regression on a clip's mean colours: its Hessian can be written down, it is convex,
    and 12 classes in so few dimensions cannot be told apart, so that there is a minimum."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, 12)

    def forward(self, x):
        return [], self.fc(x.mean((1, 3, 4)) * 8)


def regressions(data):
    """-> a Linear for each stream, at its minimum, and what they see"""
    torch.manual_seed(0)
    streams = nn.Module()
    streams.nets = nn.ModuleDict({s: Linear(2 if s == "mv" else 3) for s in STREAMS})
    batch, = common.clip_loader(common.Clips(data.train, 1, None, "coded"), 48)
    views, labels = see(batch, 32, None, 0, CPU, train=False), torch.tensor(batch.label)
    for stream, net in streams.nets.items():
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, tolerance_grad=1e-7,
                                      tolerance_change=0, line_search_fn="strong_wolfe")

        def closure(net=net, stream=stream, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(views[stream])[1], labels)
            loss.backward()
            return loss

        optimizer.step(closure)
    return streams, views, labels


def test_flatness_is_the_trace_of_the_hessian_and_weights_are_put_back(data):
    args = parse(["--data", "none", *map(str, FAST)])
    streams, views, labels = regressions(data)
    before = copy(streams)
    found = pkd_compressed.flatness(streams, data, args, CPU, {}, probes=100,
                                    sizes=(.001, .01, .1))
    assert same(streams.state_dict(), before)
    for stream, net in streams.nets.items():
        mean, error = found[stream]["trace"]
        shapes = [w.shape for w in net.parameters()]

        def loss(*weights, net=net, stream=stream):
            named = dict(zip(dict(net.named_parameters()), weights, strict=True))
            return F.cross_entropy(torch.func.functional_call(net, named, views[stream])[1], labels)

        blocks = torch.autograd.functional.hessian(loss, tuple(w.detach() for w in
                                                               net.parameters()))
        traces = [blocks[n][n].reshape(shape.numel(), -1).trace().item()
                  for n, shape in enumerate(shapes)]
        exact = sum(traces)
        assert 0 < error < .2 * mean
        assert abs(mean - exact) < 3 * error, (stream, mean, exact, error)
        assert found[stream]["loss"] == pytest.approx(loss(*net.parameters()).item(), rel=1e-5)
        parabola = sum(.001 ** 2 / 2 * w.square().mean().item() * trace for w, trace in zip(
            net.parameters(), traces, strict=True))
        rises = list(found[stream]["rise"].values())
        assert abs(rises[0][0] - parabola) < 4 * rises[0][1] + .02 * parabola
        assert 0 < rises[0][0] < rises[1][0] < rises[2][0]


def test_flatness_of_a_run_is_recorded(alone):
    found, out = alone
    assert all(r["trace"][1] > 0 for r in found["flatness"].values())
    assert pkd_compressed.flatness_table(found["flatness"]).count("flatness by ") == 3
    record = json.loads(next(out.rglob("run.json")).read_text())
    assert record["results"]["flatness"] == json.loads(json.dumps(found["flatness"]))


@pytest.mark.parametrize(("mv", "r", "i", "verdict"), [
    (30., 20., 10., "holds here"), (22., 20., 10., "holds here, within the error"),
    (30., 20., 18., "holds here, within the error"), (30., 20., 25., "does not hold here"),
    (10., 20., 5., "does not hold here"), (20., 20., 10., "does not hold here")])
def test_the_table_says_whether_the_papers_order_holds(mv, r, i, verdict):
    found = {s: {"loss": 1., "parameters": 1., "trace": (x, 1.), "rise": {"0.1": (-x, 1.)}}
             for s, x in zip(STREAMS, (mv, r, i), strict=True)}
    trace, rise = pkd_compressed.flatness_table(found).splitlines()[-2:]
    assert trace == f"flatness by trace: the paper's order I < R < MV {verdict}"
    assert rise.endswith("does not hold here")  # the numbers are the other way round


# ---- pictures


def test_the_picture_has_a_row_of_four_for_each_clip(base, data, tmp_path, monkeypatch):
    assert (base.run / "run.png").stat().st_size > 10_000
    grids, make_grid = [], pkd_compressed.torchvision.utils.make_grid
    monkeypatch.setattr(pkd_compressed.torchvision.utils, "make_grid",
                        lambda rows, *more: grids.append(rows) or make_grid(rows, *more))
    args = parse(["--data", "none", *map(str, FAST), "--segments", "3"])
    pkd_compressed.draw_streams(data, args, tmp_path / "run.png")
    assert len(grids[0]) == 6 * 4
    for n, (path, _) in enumerate(data.test[::4]):
        at = common.p_frames(path)
        coded = read_compressed(path, [at[common.segment_indices(len(at), 3)][1]])
        for column, wanted in ((0, coded.intra), (3, coded.frame)):  # twice the size, below a name
            shown = grids[0][4 * n + column][:, 16:, 32:-32][:, ::2, ::2]
            assert torch.equal(shown[:, 10:-2], wanted[0][:, 10:-2])
    picture = pkd_compressed.torchvision.io.read_image(str(tmp_path / "run.png"))
    assert picture.shape == (3, 6 * 210 + 2, 4 * 258 + 2)


# ---- mistakes


def toy_files(folder, **options):
    """Four clips of training and two of testing; options: of the last one."""
    folder.mkdir()
    kind = options.pop("kind", "mp4")
    for part, count in (("train", 4), ("test", 2)):
        rows = ["path,label"]
        for i in range(count):
            odd = part == "test" and i == 1
            name = f"{part}{i}.{kind if odd else 'mp4'}"
            truth = common.toy_truth(np.random.default_rng(i), list(common.MOTIONS)[i % 2], "dots")
            write_video(folder / name, common.toy_clip(truth)[0], **(options if odd else {}))
            rows.append(f"{name},{'ab'[i % 2]}")
        (folder / f"{part}.csv").write_text("\n".join(rows))
    return folder / name


UNFIT = {
    "mjpeg": ("codec mjpeg", {"kind": "avi", "codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "hevc": ("codec hevc", {"codec": "libx265", "x265-params": "log-level=none"}),
    "av1": ("codec av1", {"codec": "libsvtav1", "svtav1-params": "preset=12"}),
    "b-frames": ("B-frames", {"bf": "2"})}


@pytest.mark.parametrize("name", UNFIT)
def test_clips_without_usable_vectors_are_refused_before_training(tmp_path, name, capfd):
    reason, options = UNFIT[name]
    odd = toy_files(tmp_path / name, **options)
    with pytest.raises(BadInput, match="1 of 6 clips cannot serve") as caught:
        go("--data", tmp_path / name, *FAST, "--out", tmp_path / "out")
    for word in (str(odd), reason, f"pkd_compressed.py --data {tmp_path / name} --reencode"):
        assert word in str(caught.value)
    assert not list(tmp_path.rglob("run.json"))


def test_re_encoding_makes_them_fit_and_leaves_the_source_alone(tmp_path):
    folder = tmp_path / "odd"
    toy_files(folder, **UNFIT["mjpeg"][1])
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    found = go("--data", folder, *FAST, "--batch-size", 2, "--out", tmp_path / "out", "--reencode")
    assert found["clips"] == 2
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.iterdir()} == before
    copies = {path.name: path for path in (tmp_path / "out" / "cache").rglob("*.*")}
    assert before.keys() == {folder / name for name in copies}
    assert not common.video_index(str(copies["test1.avi"])).unfit


@pytest.mark.parametrize(("flags", "message"), [
    (("--networks", "toy", "toy", "resnet19"), "unknown network resnet19"),
    (("--imagenet",), "no ImageNet weights"),
    (("--resume",), "start one without"),
    (("--data", "gone"), "no such folder")])
def test_mistakes_say_what_would_be_right(small, tmp_path, flags, message):
    with pytest.raises(BadInput, match=message):
        go("--data", small, *FAST, "--out", tmp_path, *flags)
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("flags", [
    ("--size", 16), ("--holdout", 1), ("--holdout", -.1), ("--tau", 0), ("--crops", 0),
    ("--cache-gb", -1), ("--reencode",), ("--order", "backwards"), ("--networks", "toy")])
def test_flags_out_of_range(flags):
    with pytest.raises(SystemExit) as caught:
        go("--data", "toy", *flags)
    assert caught.value.code == 2


def test_a_run_resumed_with_other_flags_is_one_line_and_exit_code_two(base, small, run_script):
    before = (base.run / "last.pt").read_bytes()
    done = run_script("pkd_compressed.py", "--data", small, *FAST, "--order", "all", "--out",
                      base.out, "--resume", "--tau", 2, "--lr", .5)
    assert done.returncode == 2
    line, = done.stderr.strip().splitlines()
    assert re.search(r"--tau 1.0, now 2.0; --lr 0.003, now 0.5", line)
    assert (base.run / "last.pt").read_bytes() == before


def test_a_target_that_is_missed_is_exit_code_one(small, tmp_path):
    with pytest.raises(SystemExit) as caught:
        go("--data", small, *FAST, "--epochs", 1, "--exit-epochs", 1, "--order", "ce", "--target",
           1.1, "--out", tmp_path)
    assert caught.value.code == 1


def test_real_clips_that_are_not_square(shared, tmp_path):
    folder = tmp_path / "three"
    for part, people in (("train", ("daria", "denis")), ("test", ("eli",))):
        for action, who in itertools.product(("bend", "jack"), people):
            (folder / part / action).mkdir(parents=True, exist_ok=True)
            clip = shared / "weizmann" / action / f"{who}_{action}.avi"
            (folder / part / action / clip.name).symlink_to(clip)
    found = go("--data", folder, *FAST, "--batch-size", 4, "--segments", 2, "--out", tmp_path)
    assert found["clips"] == 2
