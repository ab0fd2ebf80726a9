"""--unseen: which classes are held out, that training never meets them, that the report is true.
The trained model is that of the plain command, which has not met the diagonals either."""
import json
import re

import numpy as np
import pytest
import torch

import common
import deit_video
import spatial_kd
import tinyclip_swap
from common import (
    DIAGONALS,
    MOTIONS,
    BadInput,
    VideoData,
    build_action_clip,
    read_data,
    split_unseen,
)
from tinyclip_swap import class_scores

FAST = ("--epochs", 1, "--workers", 0, "--batch-size", 16, "--frames", 4)
RUNS = {  # script: flags, arms and the backbones of their checkpoints
    tinyclip_swap: (("--large", "toy-large:random", "--small", "toy-small:random"),
                    {"large": "toy-large", "small": "toy-small"}),
    spatial_kd: (("--student", "toy-small:random", "--labeller", "toy-small:random", "--arms",
                  "alone", "spatial"), {"alone": "toy-small", "spatial": "toy-small"}),
    deit_video: (("--teacher", "toy-large:random", "--student", "toy-small:random", "--arms",
                  "one-head", "soft"),
                 {"teacher": "toy-large", "one-head": "toy-small", "soft": "toy-small"})}


@pytest.fixture(autouse=True, scope="module")
def timed_once():
    with pytest.MonkeyPatch.context() as patch:
        for script in (tinyclip_swap, deit_video):
            patch.setattr(script, "median_ms", lambda function, device: bool([function()]))
        yield


@pytest.fixture(scope="module")
def diagonals(tmp_path_factory):
    """A small data set of toy clips with the diagonals."""
    folder = tmp_path_factory.mktemp("data") / "ten"
    common.make_toy_folder(folder, train=60, test=40, motions=(*MOTIONS, *DIAGONALS))
    return folder


def named(data, part):
    """What a data set says in words: {path: class}."""
    return {path: data.classes[label] for path, label in getattr(data, part)}


def videos(clips):
    batch = next(iter(common.clip_loader(common.Clips(clips, 4, 37), len(clips))))
    return common.centre_crop(batch.video, 32), torch.tensor(batch.label)


# ---- which


def test_every_clip_keeps_its_class_and_lands_in_its_part(diagonals):
    data = read_data(str(diagonals))
    seen, opened = split_unseen(data, 3, seed=5)
    unseen, among_all = opened["unseen"], opened["unseen_all"]
    assert len(unseen.classes) == 3
    assert sorted(seen.classes + unseen.classes) == data.classes == among_all.classes
    for part in ("train", "test"):
        kept = {path: name for path, name in named(data, part).items() if name in seen.classes}
        assert named(seen, part) == kept
    left = {path: name for path, name in named(data, "test").items() if name in unseen.classes}
    assert named(unseen, "test") == named(among_all, "test") == left
    assert len(left) == 12
    assert unseen.train == among_all.train == []
    assert {part.name for part in (seen, unseen, among_all)} == {"ten-unseen3"}


def test_the_seed_chooses_and_of_toys_only_diagonals(diagonals):
    data = read_data(str(diagonals))
    chosen = [tuple(split_unseen(data, 2, seed)[1]["unseen"].classes) for seed in range(20)]
    assert chosen[3] == tuple(split_unseen(data, 2, 3)[1]["unseen"].classes)
    assert len(set(chosen)) > 3
    assert set().union(*chosen) == set(DIAGONALS)


def test_of_other_data_any_class_may_be_chosen():
    data = VideoData("d", list("abcdef"), [(c, i) for i, c in enumerate("abcdef")],
                     [(c.upper(), i) for i, c in enumerate("abcdef")], [])
    chosen = [split_unseen(data, 2, seed)[1]["unseen"].classes for seed in range(40)]
    assert set().union(*chosen) == set("abcdef")
    assert split_unseen(data, 0) == (data, {})


@pytest.mark.parametrize("count", [-1, 1, 5, 6, 7])
def test_both_sides_keep_two_classes(count):
    data = VideoData("d", list("abcdef"), [], [], [])
    with pytest.raises(BadInput, match="2 to 4 classes"):
        split_unseen(data, count)


def test_toy_draws_diagonals_only_where_they_are_wanted(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(common, "make_toy_folder", lambda folder, **more: made.append(more))
    monkeypatch.setattr(common, "cached", lambda cache, name, make, *sources: make(tmp_path)
                        or tmp_path)
    for toys in common.TOYS:
        with pytest.raises(BadInput):
            read_data("toy", cache=tmp_path, toys=toys)
    assert [set(DIAGONALS) <= set(more.get("motions", ())) for more in made] == [False, False, True]


# ---- in the scripts


@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)
def test_training_never_meets_them_and_the_report_is_true(script, diagonals, tmp_path, monkeypatch,
                                                           capsys):
    flags, arms = RUNS[script]
    train, asked = script.train, []

    def spied(*given):
        asked.append(next(thing for thing in given if isinstance(thing, VideoData)))
        return train(*given)

    monkeypatch.setattr(script, "train", spied)
    found = script.main(list(map(str, (*flags, *FAST, "--data", diagonals, "--unseen", 2, "--seed",
                                       1, "--out", tmp_path))))
    data = read_data(str(diagonals))
    seen, opened = split_unseen(data, 2, 1)
    run = tmp_path / script.__name__ / "ten-unseen2-s1-seed1"
    printed, record = capsys.readouterr().out, json.loads((run / "run.json").read_text())
    assert f"by seed 1: {', '.join(opened['unseen'].classes)}\n" in printed
    assert record["unseen"] == opened["unseen"].classes
    assert all(given == seen for given in asked)
    assert len(asked) == len(arms)
    for arm, backbone in arms.items():
        model = build_action_clip(f"{backbone}:{run / f'{arm}-last.pt'}").eval()
        for group, part in {"": seen, "unseen": opened["unseen"],
                            "unseen_all": opened["unseen_all"]}.items():
            pixels, labels = videos(part.test)
            with torch.no_grad():
                text = model.encode_text(model.prompts(part.classes))
                right = class_scores(model.encode_video(pixels), text).argmax(1) == labels
            key = "top1" if not group else f"top1_{group}" if script is spatial_kd else group
            assert found[arm][key] == pytest.approx(right.float().mean().item(), abs=1e-6), key
            if group:
                said = re.search(rf" {re.escape(arm)}_{group}=(\S+)", printed.splitlines()[-1])[1]
                assert float(said) == pytest.approx(found[arm][key], abs=1e-4)


def test_the_table_has_chance_and_what_was_before_training(diagonals, tmp_path, capsys):
    found = tinyclip_swap.main(list(map(str, (
        *RUNS[tinyclip_swap][0], *FAST, "--data", diagonals, "--unseen", 4, "--out", tmp_path))))
    printed = capsys.readouterr().out
    assert re.search(r"^chance +0\.167 +0\.250 +0\.100 *$", printed, re.M)
    for arm, r in found.items():
        cells = [(r["top1"], r["before"]["seen"])] + [
            (r[group], r["before"][group]) for group in ("unseen", "unseen_all")]
        row = re.search(rf"^{arm} +toy-{arm} +(.*\))", printed, re.M)[1]
        assert re.findall(r"[\d.]+", row) == [f"{x:.3f}" for pair in cells for x in pair]


def test_too_many_is_a_mistake_before_anything_is_trained(diagonals, tmp_path):
    for script, (flags, _) in RUNS.items():
        with pytest.raises(BadInput, match="--unseen 5: of ten 2 to 4 classes"):
            script.main(list(map(str, (*flags, *FAST, "--data", diagonals, "--unseen", 5, "--out",
                                       tmp_path))))
    assert not list(tmp_path.rglob("run.json"))


def test_the_grid_has_the_seen_clips_labelled_only(diagonals, tmp_path, monkeypatch):
    asked = []

    def label(command, **more):
        asked.append(command)
        return type("Done", (), {"returncode": 1, "stdout": ""})

    monkeypatch.setattr(deit_video.subprocess, "run", label)
    with pytest.raises(BadInput, match="could not label"):
        deit_video.main(list(map(str, (*RUNS[deit_video][0], *FAST, "--grid", "thesis", "--data",
                                       diagonals, "--unseen", 2, "--out", tmp_path))))
    given = spatial_kd.parse(asked[-1][2:])
    assert (given.unseen, given.label_only, given.data) == (2, True, str(diagonals))


# ---- what a trained model makes of words put together of trained ones


@pytest.fixture(scope="module")
def model_and_clips(plain, out, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "four"
    common.make_toy_folder(folder, train=4, test=80, motions=tuple(DIAGONALS), seed=1)
    file = out / "tinyclip_swap" / "toy-s1-seed0" / "large-last.pt"
    data = read_data(str(folder))
    batch = next(iter(common.clip_loader(common.Clips(data.test, 8, 37), 80)))
    return (build_action_clip(f"toy-large:{file}", cache=cache).eval(), data.classes,
            common.centre_crop(batch.video, 32), torch.tensor(batch.label))


@torch.no_grad()
def top1(model, names, pixels, labels):
    text = model.encode_text(model.prompts(names))
    return (class_scores(model.encode_video(pixels), text).argmax(1) == labels).float().mean()


def test_diagonals_are_read_from_trained_words(model_and_clips):
    model, names, pixels, labels = model_and_clips
    assert top1(model, names, pixels, labels) > .6  # chance is .25


@pytest.mark.parametrize("control", ["opposite words", "reversed", "one frame"])
def test_diagonals_are_not_read_from(model_and_clips, control):
    model, names, pixels, labels = model_and_clips
    ways = [np.array(DIAGONALS[name]) for name in names]
    opposite = [names[next(j for j, w in enumerate(ways) if (w == -way).all())] for way in ways]
    names = opposite if control == "opposite words" else names
    pixels = {"reversed": pixels.flip(1),
              "one frame": pixels[:, 4:5].expand_as(pixels)}.get(control, pixels)
    assert top1(model, names, pixels, labels) < (.45 if control == "one frame" else .1)
