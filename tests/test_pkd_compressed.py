"""pkd_compressed.py: equations, what is frozen, exits that learn from a teacher alone, resume."""
import dataclasses
import functools
import json
import shutil
from collections import Counter
from fractions import Fraction
from itertools import product
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
from pkd_compressed import (
    EXITS,
    SCHEDULES,
    STREAMS,
    Exits,
    Streams,
    build_optimizer,
    evaluate,
    exits_loss,
    hessian_trace,
    main,
    parse,
    soft_cross_entropy,
    teacher_for_step,
    train_exits,
    train_networks,
)

FAST = ("--networks", "toy", "toy", "toy", "--size", 32, "--workers", 0, "--batch-size", 12,
        "--segments", 1, "--epochs", 2, "--exit-epochs", 3, "--test-every", 3, "--schedules",
        "labels", "progressive")
TRAINED = "labels", "progressive", "anti"  # schedules of the fixture base


def run_main(*flags):
    return main([str(flag) for flag in flags])


def parse_fast(*flags):
    return parse([str(flag) for flag in ("--data", "none", *FAST, *flags)])


def checkpoint(out, name="last.pt"):
    return torch.load(next(out.rglob(name)), weights_only=True)


def record(out):
    return json.loads(next(out.rglob("results.json")).read_text())


def history(out):
    """The numbers of each epoch"""
    return [numbers(row) for row in record(out)["epochs"]]


def numbers(row):
    return {key: x for key, x in row.items() if key != "variant"}


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def networks(streams=None, exits=None, schedules=TRAINED):
    """Networks and exits with these weights, or with their initial ones"""
    torch.manual_seed(0)
    nets = Streams(["toy"] * 3, 12)
    heads = Exits(nets, schedules, 12, 0)
    if streams:
        nets.load_state_dict(streams)
    if exits:
        heads.load_state_dict(exits)
    return nets.eval(), heads.eval()


def correct_by_hand(saved, videos, schedule="progressive"):
    """Correct predictions, counted one video after the other: {"motion1": number, ...}"""
    correct = Counter()
    nets, exits = networks(saved["streams"], saved["exits"], saved["flags"]["schedules"])
    for path, label in videos:
        indices = common.p_frame_indices(path)
        middle = indices[common.tsn_indices(len(indices), saved["flags"]["segments"])]
        x = common.compressed_inputs([common.read_compressed(path, middle)], 32)
        for stream, name in STREAMS.items():
            heads = exits.heads[schedule][stream]
            logits = common.exit_logits(nets.nets[stream], heads, x[stream])
            correct.update(f"{name}{k}" for k, z in enumerate(logits, 1) if z.argmax() == label)
    return correct


@pytest.fixture(scope="module")
def base(coded, tmp_path_factory):
    """A run of three schedules, and the files that it read before the test"""
    out = tmp_path_factory.mktemp("base")
    read_compressed, files = common.read_compressed, set()
    run = SimpleNamespace(out=out)

    def noted_read(path, *more, **flags):
        files.add(path)
        return read_compressed(path, *more, **flags)

    def noted_evaluate(*given):
        run.files_of_training = set(files)
        results = evaluate(*given)
        files.intersection_update(run.files_of_training)  # what a test reads does not count
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "read_compressed", noted_read)
        patch.setattr(pkd_compressed, "evaluate", noted_evaluate)
        run.results = run_main("--data", coded, *FAST, "--schedules", *TRAINED, "--out", out)
    return run


# ---- equations


@pytest.mark.parametrize("tau", [1, 2, 5])
def test_losses_and_gradients_in_closed_form(tau):
    """Mean over B, sum over K and over the exits, no tau^2; a gradient stays in its exit."""
    generator = torch.Generator().manual_seed(tau)
    logits = 2 * torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    labels, (z_t, *z) = torch.tensor([0, 1, 2, 3, 4, 0]), logits
    z = [z_k.requires_grad_() for z_k in z]
    for target, temperature, teacher_logits in (
            ((z_t / tau).softmax(1), tau, z_t), (F.one_hot(labels, 5), 1, None)):
        loss, expected = exits_loss(z, labels, teacher_logits, tau), 0.
        for z_k in z:
            e = np.exp(z_k.detach().numpy() / temperature)
            expected -= (target.numpy() * np.log(e / e.sum(1, keepdims=True))).sum() / 6
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        for z_k, gradient in zip(z, torch.autograd.grad(loss, z), strict=True):
            expected = ((z_k / temperature).softmax(1) - target) / (temperature * 6)
            torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=1e-12)
    sum_over_exits = sum(soft_cross_entropy(z_k, z_t, tau) for z_k in z)
    torch.testing.assert_close(exits_loss(z, 0 * labels, z_t, tau), sum_over_exits)


@pytest.mark.parametrize("gap", [200., 1e4])
def test_soft_cross_entropy_is_finite_for_distant_logits(gap):
    z = torch.tensor([[gap, 0., 0.], [0., gap, 0.]], requires_grad=True)
    loss = soft_cross_entropy(z, z.detach().flip(0), 1.)
    loss.backward()
    assert loss.item() == pytest.approx(gap)
    torch.testing.assert_close(z.grad, torch.tensor([[.5, -.5, 0.], [-.5, .5, 0.]]))
    assert soft_cross_entropy(z, z, 1.).item() == 0


def test_teachers_change_after_one_and_two_sixths():
    for stream, steps in product(STREAMS, (1, 2, 5, 6, 7, 300)):
        starts = [Fraction(step, steps) for step in range(steps)]
        first_two = [("mv" if x < Fraction(1, 6) else "r") for x in starts if x < Fraction(1, 3)]
        others = steps - len(first_two)
        progressive = first_two + [stream] * others
        teachers = {}
        for schedule in SCHEDULES:
            teachers[schedule] = [teacher_for_step(step, steps, schedule, stream)
                                  for step in range(steps)]
        assert teachers == {
            "labels": [None] * steps, "progressive": progressive, "anti": progressive[::-1],
            "progressive_iframe": first_two + ["i"] * others,
            "iframe": ["i"] * steps, "self": [stream] * steps}
    assert progressive == ["mv"] * 50 + ["r"] * 50 + ["i"] * 200  # epochs of the paper's code


# ---- training


def test_training_of_exits_freezes_the_networks_and_changes_every_exit(base):
    last, initial = checkpoint(base.out), networks()[1].state_dict()
    assert same_weights(last["streams"], checkpoint(base.out, "networks-last.pt")["streams"])
    assert any("running_mean" in key for key in last["streams"])  # statistics of BatchNorm, too
    for key, start in initial.items():
        labels_key = f"heads.labels.{key.split('.', 2)[2]}"
        assert torch.equal(start, initial[labels_key])  # schedules start from the same weights
        assert not torch.equal(start, last["exits"][key]), key


def test_checkpoint_has_what_wise_infer_reads(base, coded):
    last = checkpoint(base.out)
    assert last["digest"] == common.load_dataset(coded).digest()
    assert {"classes", "streams", "exits"} < set(last)
    assert {"data", "split", "seed", "holdout", "shots", "label_noise", "segments", "size",
            "networks", "copies", "schedules"} < set(last["flags"])
    assert "optimizer" not in last


def test_training_reads_no_held_out_and_no_test_video(base, coded):
    data = common.load_dataset(coded)
    rest, held_out = common.hold_out_videos(data, .2, 0)
    assert len(held_out) == 12
    assert base.files_of_training == {path for path, _ in rest.train}
    assert not base.files_of_training & {path for path, _ in held_out + data.test}


def test_held_out_accuracy_is_reported_when_teachers_change(base, coded):
    """Three epochs: after sixths 2, 4 and 6; the last one is that of last.pt."""
    rows = history(base.out)[2:]
    for row, schedule in product(rows, TRAINED):
        assert 0 <= row[f"held_out_{schedule}"] <= 1
    _, held_out = common.hold_out_videos(common.load_dataset(coded), .2, 0)
    correct = correct_by_hand(checkpoint(base.out), held_out)
    mean = sum(correct[name] for name in EXITS) / 9 / 12
    assert rows[-1]["held_out_progressive"] == pytest.approx(mean)


def test_losses_are_the_same_without_the_feature_cache(base, coded, tmp_path, capsys, monkeypatch):
    """Except for the rounding of feature maps to fp16. The third epoch repeats the first crops."""
    monkeypatch.setattr(pkd_compressed, "CACHE_GB", 0)
    data, held_out = common.hold_out_videos(common.load_dataset(coded), .2, 0)
    metadata = {"digest": data.digest()}
    nets = networks(checkpoint(base.out)["streams"], schedules=["progressive"])
    rows = train_exits(*nets, data, held_out, metadata, tmp_path,
                       parse_fast("--schedules", "progressive"))
    assert "features exceed CACHE_GB" in capsys.readouterr().out
    for row, cached in zip(rows, history(base.out)[2:], strict=True):
        expected = {name: cached[name] for name in numbers(row)}
        assert numbers(row) == pytest.approx(expected, rel=5e-4)


@pytest.fixture(scope="module")
def trained(coded, tmp_path_factory):
    """Networks that have learned all training videos"""
    streams, _ = networks()
    train_networks(streams, common.load_dataset(coded), {"digest": 0},
                   tmp_path_factory.mktemp("trained"), parse_fast("--epochs", 16))
    return streams.state_dict()


def train_exits_on(labels, streams, data, folder, *flags):
    """Train exits on the training videos with these labels -> weights, top-1 with true labels"""
    args = parse_fast(*flags)
    nets, exits = networks(streams, schedules=args.schedules)
    train = [(path, k) for (path, _), k in zip(data.train, labels, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "flippable", lambda _: [False] * 12)  # else flips depend on labels
        train_exits(nets.train(), exits, dataclasses.replace(data, train=train), [],
                    {"digest": 0}, folder, args)
    shutil.rmtree(folder)
    folder.mkdir()
    return exits.state_dict(), evaluate(nets, exits, data.train, {}, args)[0]


def exits_top1(results, schedule):
    """-> (3 streams, 3 exits)"""
    return np.array([results[f"{schedule}_{name}"] for name in EXITS]).reshape(3, 3)


def test_exits_learn_from_a_teacher_alone(trained, coded, tmp_path, monkeypatch):
    """Labels do not matter to them, to the bit. They reach most of their teacher's accuracy, also
    on crops that no exit has seen. Exits that learn from shuffled labels, or from an untrained
    teacher, stay at chance."""
    data = common.load_dataset(coded)
    labels = [label for _, label in data.train]
    shuffled = np.random.default_rng(0).permutation(labels).tolist()
    monkeypatch.setattr(pkd_compressed, "NUM_FIXED_CROPS", 4)
    flags = trained, data, tmp_path, "--exit-epochs", 12
    weights, results = train_exits_on(labels, *flags)
    shuffled_weights, shuffled_results = train_exits_on(shuffled, *flags)
    for schedule in ("labels", "progressive"):
        equal = [torch.equal(weights[key], shuffled_weights[key])
                 for key in weights if schedule in key]
        assert all(equal) == (schedule == "progressive")
    top1 = exits_top1(shuffled_results, "progressive")                          # (3, 3)
    teachers = np.array([[shuffled_results[name]] for name in STREAMS.values()])
    assert top1.min() > .35, top1  # chance is 1/12
    assert (top1 / teachers).mean() > .75, top1
    assert (top1 / teachers).min() > .55, top1
    assert exits_top1(results, "labels").mean() > .5, results
    assert exits_top1(shuffled_results, "labels").mean() < .2, shuffled_results

    _, untrained = train_exits_on(labels, None, data, tmp_path, "--schedules", "progressive",
                                  "--exit-epochs", 5)
    assert exits_top1(untrained, "progressive").mean() < .15, untrained


def test_learning_rates_of_networks_exits_and_imagenet_weights():
    """--imagenet: the factors of CoViAR's code. Otherwise, one rate for all networks."""
    nets, exits = networks()
    imagenet = "--networks", "resnet18", "resnet18", "resnet50", "--imagenet"
    for flags, lrs, (first, middle), eps, exit_lr in (
            ((), (.003, .003, .003), (1, 1), 1e-8, 3e-3),
            (("--lr", .1), (.1, .1, .1), (1, 1), 1e-8, 3e-3),
            (imagenet, (.01, .005, .0003), (.1, .01), 1e-3, 1e-3)):
        args = parse_fast(*flags)
        optimizer, _ = build_optimizer(nets, 1, args)  # 1 step: warm-up starts at the full lr
        groups = {w: group for group in optimizer.param_groups for w in group["params"]}
        assert len(groups) == len(list(nets.parameters()))
        for name, w in nets.named_parameters():
            _, stream, layer, *_ = name.split(".")
            first_factor = middle if stream == "i" else first
            factor = {"fc": 1, "layers": middle}.get(layer, first_factor)
            lr = lrs[list(STREAMS).index(stream)]
            assert groups[w]["lr"] == pytest.approx(lr * factor), name
            assert groups[w]["weight_decay"] == (.01 if w.ndim > 1 else 0), name
            assert groups[w]["eps"] == eps
        optimizer, _ = build_optimizer(exits, 1, args)
        groups = optimizer.param_groups
        assert {(group["lr"], group["eps"]) for group in groups} == {(exit_lr, 1e-8)}
        assert {group["betas"] for group in groups} == {(.9, .999)}
    optimizer, schedule = build_optimizer(exits, 20, parse_fast())
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [rates[n] for n in (0, 1, 2, 11)] == pytest.approx([1.5e-3, 2.25e-3, 3e-3, 1.5e-3])


# ---- testing


def test_accuracies_equal_a_count_by_hand_and_undecodable_videos_are_wrong(coded, tmp_path, capsys):
    folder = tmp_path / "some-bad"
    shutil.copytree(coded, folder)
    broken = [folder / name for name in ("train/0003.mp4", "test/0004.mp4")]
    for path in broken:
        path.write_text("no video")
    results = run_main("--data", folder, *FAST, "--epochs", 1, "--exit-epochs", 1,
                       "--segments", 2, "--holdout", 0, "--out", tmp_path)
    printed = capsys.readouterr()
    decodable = [x for x in common.load_dataset(folder).test if x[0] != str(broken[1])]
    correct = correct_by_hand(checkpoint(tmp_path), decodable)
    assert correct.total()  # none would prove nothing
    for name in STREAMS.values():
        assert results[name] == pytest.approx(correct[f"{name}4"] / 24)
        path = next(tmp_path.rglob(f"{name}-predictions.csv"))
        assert predicted_top1(path) == pytest.approx(results[name])
    for name in EXITS:
        assert results[f"progressive_{name}"] == pytest.approx(correct[name] / 24)
    mean = np.mean([results[f"progressive_{name}"] for name in EXITS])
    assert results["progressive_mean"] == pytest.approx(mean)
    line = printed.out.splitlines()[-1]
    names = *STREAMS.values(), "labels_mean", "progressive_mean"
    assert results["scores"] == {name: results[name] for name in names}
    cells = " ".join([f"{name}={results[name]:.4f}" for name in names])
    assert line.startswith(f"RESULT pkd_compressed data=some-bad split=1 seed=0 {cells} seconds=")
    assert record(tmp_path)["results"] == results
    for path in broken:
        assert printed.err.count(f"cannot decode {path}: ") == 1
        assert str(path) in record(tmp_path)["undecodable"]
    assert "2 videos cannot be decoded" in printed.out
    picture = next(tmp_path.rglob("modalities.png"))
    assert picture.stat().st_size > 10_000


def test_undecodable_training_videos_do_not_stop_the_test(coded):
    """Eleven may be few of the training videos, but too many for the few test videos."""
    data, args = common.load_dataset(coded), parse_fast()
    data.undecodable.update((f"{n}.mp4", "no readable video") for n in range(11))
    data.undecodable.total = 2000
    results, _ = evaluate(*networks(schedules=args.schedules), data.test, data.undecodable, args)
    assert len(results) == 3 + 2 * (9 + 1)


# ---- flatness


class Constant(nn.Module):
    """Logits b + c for every video. With b = 1, c = 3 and equally many videos of each of K classes,
    the loss is log K, a minimum. Its Hessian is diag(p) - p p^T, p = 1/K, once for each tensor."""

    def __init__(self):
        super().__init__()
        self.b, self.c = nn.Parameter(torch.ones(12)), nn.Parameter(3 * torch.ones(12))

    def forward(self, x, S=None):
        z = (self.b + self.c).expand(len(x), 12)
        return z if S else ([], z)  # an exit, or a network


@pytest.mark.parametrize("exits", [1, 3])
def test_hessian_trace_in_closed_form(exits):
    """Two tensors, each with the trace K (1/K) (1 - 1/K), which the other measure takes times w^2:
    1 and 9. An undecodable video, label -1, does not count. The weights stay as they were."""
    labels = torch.tensor([*range(12), -1]).split(8)
    module = nn.ModuleList([Constant() for _ in range(3)]) if exits == 3 else Constant()
    batches = [{"labels": y, "mv": y, **dict.fromkeys(("mv1", "mv2", "mv3"), y[:, None])}
               for y in labels]
    row = hessian_trace(module, "mv", batches, 0, probes=300)
    assert row["loss"] == pytest.approx(exits * np.log(12))
    for name, expected in (("trace", exits * 2 * 11 / 12), ("relative", exits * (1 + 9) * 11 / 12)):
        assert 0 < row[f"{name} error"] < .1 * expected
        assert abs(row[name] - expected) < 4 * row[f"{name} error"]
    assert {(w.unique().item(), w.grad) for w in module.parameters()} == {(1, None), (3, None)}


def test_the_sum_of_w2_h_does_not_depend_on_the_scale_of_a_convolution():
    """Three times the weights before a BatchNorm: the same function, but another trace"""
    net = networks()[0].nets["mv"]
    x = torch.randn(6, 1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = [{"labels": torch.arange(6), "mv": x}]
    before = hessian_trace(net, "mv", batches, 0, probes=2)
    conv, norm, *_ = net.stem
    for tensor, factor in ((conv.weight, 3), (norm.running_mean, 3), (norm.running_var, 9)):
        tensor.data *= factor
    after = hessian_trace(net, "mv", batches, 0, probes=2)
    for name in ("loss", "relative"):
        assert after[name] == pytest.approx(before[name], rel=1e-3)
    assert after["trace"] != pytest.approx(before["trace"], rel=.1)


# ---- resume, and several processes


def kill_after(monkeypatch, owner, name, calls):
    """The next run is interrupted by this call of a function."""
    function, remaining = getattr(owner, name), [calls]

    def counted(*given):
        remaining[0] -= 1
        if not remaining[0]:
            raise KeyboardInterrupt
        return function(*given)

    monkeypatch.setattr(owner, name, counted)


def test_a_run_that_was_killed_twice_ends_like_an_undisturbed_one(base, coded, tmp_path):
    """In the second epoch of the networks, and in the second epoch of the exits"""
    flags = "--data", coded, *FAST, "--schedules", *TRAINED, "--out", tmp_path
    kills = (common, "compressed_inputs", 5), (pkd_compressed, "exits_loss", 50)
    for owner, name, calls in kills:
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, owner, name, calls)
            with pytest.raises(KeyboardInterrupt):
                run_main(*flags)
        flags = "--resume", next(tmp_path.rglob("results.json")).parent
    assert run_main(*flags) == base.results
    assert history(tmp_path) == history(base.out)
    for part in ("streams", "exits"):
        assert same_weights(checkpoint(tmp_path)[part], checkpoint(base.out)[part])


def test_two_processes_follow_one(base, coded, two_processes):
    """Each test video is counted once. Both processes have the same weights and statistics of
    BatchNorm. Losses differ from one process only by the batches that BatchNorm sees."""
    printed, out = two_processes[0]["pkd_compressed.py"], two_processes[1] / "pkd_compressed"
    assert "2 process(es)" in printed
    assert printed.splitlines()[-1].startswith("RESULT pkd_compressed data=")
    saved, data = checkpoint(out), common.load_dataset(coded)
    schedules = ["progressive"]
    results, _ = evaluate(*networks(saved["streams"], saved["exits"], schedules), data.test, {},
                       parse_fast("--schedules", *schedules))
    saved_results = record(out)["results"]
    assert results == {name: x for name, x in saved_results.items() if name != "scores"}
    for row, single in zip(history(out), history(base.out), strict=True):
        losses = [key for key in row if "held_out" not in key]
        assert len(losses) == (2 if "progressive" in row else 4)  # and the epoch
        assert [row[key] for key in losses] == pytest.approx([single[key] for key in losses],
                                                             rel=.2)


def test_a_degraded_network_stops_after_one_epoch(coded, tmp_path, monkeypatch):
    """Its weights, but not its BatchNorm; after --resume, too"""
    weights, log_and_checkpoint = [], pkd_compressed.log_and_checkpoint
    data, args = common.load_dataset(coded), parse_fast("--epochs", 3, "--degrade", "r")

    def interrupted_log(*given):
        log_and_checkpoint(*given)
        weights.append({stream: nn.utils.parameters_to_vector(net.parameters()).detach().clone()
                        for stream, net in given[-1]["streams"].nets.items()})
        if len(weights) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pkd_compressed, "log_and_checkpoint", interrupted_log)
    with pytest.raises(KeyboardInterrupt):
        train_networks(networks()[0], data, {"digest": 0}, tmp_path, args)
    train_networks(networks()[0], data, {"digest": 0}, tmp_path, args)
    assert len(weights) == 3
    for stream, later in product(STREAMS, weights[1:]):
        assert torch.equal(weights[0][stream], later[stream]) == (stream == "r")


def test_clean_iframe_keeps_the_labels_of_the_iframe_network(coded, tmp_path, monkeypatch):
    """With all labels wrong, its losses are those of right labels, and those of others are not."""
    monkeypatch.setattr(common, "flippable", lambda _: [False] * 12)  # else flips depend on labels
    flags = "--data", coded, *FAST, "--epochs", 1, "--exit-epochs", 1
    rows = {}
    for name, more in (("right", ()), ("wrong", ("--label-noise", 1)),
                       ("clean", ("--label-noise", 1, "--clean-iframe"))):
        run_main(*flags, *more, "--out", tmp_path / name)
        rows[name], _ = history(tmp_path / name)
    assert rows["clean"] == {**rows["wrong"], "iframe": rows["right"]["iframe"]}
    assert rows["wrong"] != rows["clean"]


# ---- videos that must be re-encoded, real videos, mistakes


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A training, a held-out and a test video of each class; H.264 in training, B-frames and a
    broken file among the test videos"""
    folder = tmp_path_factory.mktemp("odd") / "odd"
    common.make_toy_dataset(folder, 8, 4, pairs=True, motions=("growing", "moving up"))
    attributes = json.loads((folder / "toy_attributes.json").read_text())
    for name, options in (("train/0000.mp4", {"codec": "libx264", "qmax": "51"}),
                          ("test/0000.mp4", {"bf": "2"})):
        frames = common.render_video(attributes[name], 24, 96)
        common.write_video(folder / name, frames, **options)
    (folder / "test" / "0001.mp4").write_text("no video")
    return folder


def test_one_unsupported_video_is_refused_before_training(odd, tmp_path):
    with pytest.raises(common.BadInput, match=r"its codec is h264, not .*; add --reencode"):
        run_main("--data", odd, *FAST, "--out", tmp_path)
    assert not list(tmp_path.rglob("*.pt"))


def test_reencode_makes_copies_for_training_and_inference(odd, tmp_path, monkeypatch):
    read_compressed, files = common.read_compressed, set()

    def noted_read(path, *more, **flags):
        files.add(path)
        return read_compressed(path, *more, **flags)

    monkeypatch.setattr(common, "read_compressed", noted_read)
    two_probes = functools.partial(hessian_trace, probes=2)
    monkeypatch.setattr(pkd_compressed, "hessian_trace", two_probes)
    before = {path: path.read_bytes() for path in odd.rglob("*.*")}
    flags = "--data", odd, "--out", tmp_path
    results = run_main(*flags, *FAST, "--epochs", 1, "--exit-epochs", 1, "--holdout", .5,
                       "--reencode", "--flatness")
    copies = {str(path) for path in (tmp_path / "cache").rglob("*.mp4")}
    assert len(copies) == 4 + 4 + 3
    assert files == copies
    wise_results = wise_infer.main([str(flag) for flag in (*flags, "--l1", 1)])
    assert files == copies
    assert {path: path.read_bytes() for path in odd.rglob("*.*")} == before
    of = ["network", "labels exits", "progressive exits"]
    names = [(row["stream"], row["of"]) for row in results["flatness"]]
    assert names == list(product(STREAMS.values(), of))
    assert wise_results["last_exit"] == pytest.approx(results["iframe"])


def test_schedules_all():
    assert parse_fast("--schedules", "self", "all").schedules == list(SCHEDULES)


def test_mistakes_end_before_the_run_starts(coded, tmp_path):
    for flags, message in ((("--networks", "toy", "toy", "resnet19"), "no network resnet19"),
                           (("--data", "gone"), "gone")):
        with pytest.raises(common.BadInput, match=message):
            run_main("--data", coded, *FAST, "--out", tmp_path, *flags)
    for flags in (("--size", 16), ("--holdout", 1), ("--tau", 0), ("--schedules", "backwards"),
                  ("--networks", "toy"), ("--lr", 1, 2), ("--lr", "nan"), ("--resume", tmp_path),
                  (*FAST, "--imagenet")):
        with pytest.raises(SystemExit) as error:
            run_main("--data", coded, *flags)
        assert error.value.code == 2
    assert not list(tmp_path.iterdir())


def test_real_videos_that_are_not_square(shared, tmp_path):
    folder = tmp_path / "few"
    for split, people in (("train", ("daria", "denis")), ("test", ("eli",))):
        for action, person in product(("bend", "jack"), people):
            video = shared / "weizmann" / action / f"{person}_{action}.avi"
            link = folder / split / action / video.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(video)
    results = run_main("--data", folder, *FAST, "--epochs", 1, "--exit-epochs", 1, "--batch-size",
                       4, "--segments", 2, "--out", tmp_path)
    assert len(results["scores"]) == 3 + 2
    assert next(tmp_path.rglob("modalities.png")).stat().st_size > 10_000
