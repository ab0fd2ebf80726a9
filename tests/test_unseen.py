"""--unseen: which classes are held out, that training never meets them, that the report is true."""
import re

import numpy as np
import pytest
import torch

import common
import deit_video
import spatial_kd
import tinyclip_swap
from common import DIAGONALS, MOTIONS, BadInput, VideoData, read_data, split_unseen
from tinyclip_swap import class_scores

TOYS = ("toy-large:random", "toy-small:random")
RUNS = {  # script: its networks, and the arms that it trains
    tinyclip_swap: (("--large", TOYS[0], "--small", TOYS[1]), ("large", "small")),
    spatial_kd: (("--student", TOYS[1], "--labeller", TOYS[1], "--arms", "alone"), ("alone",)),
    deit_video: (("--teacher", TOYS[0], "--student", TOYS[1], "--arms", "soft"),
                 ("teacher", "soft"))}


@pytest.fixture(autouse=True, scope="module")
def timed_once():
    with pytest.MonkeyPatch.context() as patch:
        for script in (tinyclip_swap, deit_video):
            patch.setattr(script, "milliseconds", lambda function: float(len(function())))
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


def test_every_clip_keeps_its_class_and_lands_in_its_part(diagonals):
    data = read_data(str(diagonals))
    seen, unseen, among_all = (split_unseen(data, 3, seed=5)[part] for part in (
        "", "_unseen", "_unseen_all"))
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


def test_the_seed_chooses_and_of_toys_only_diagonals():
    tests, letters = [("a.mp4", k) for k in range(10)], list("abcdef")
    toys = VideoData("t", [*MOTIONS, *DIAGONALS], [], tests, [])
    others = VideoData("d", letters, [], tests[:6], [])
    for data, able in ((toys, set(DIAGONALS)), (others, set(letters))):
        chosen = [split_unseen(data, 2, seed)["_unseen"].classes for seed in range(40)]
        assert chosen[3] == split_unseen(data, 2, 3)["_unseen"].classes
        assert set().union(*chosen) == able
    assert split_unseen(data, 0) == {"": data}
    for count in (-1, 1, 5):
        with pytest.raises(BadInput, match="two must be left on either side"):
            split_unseen(data, count)
    with pytest.raises(BadInput, match="no test clip"):
        split_unseen(VideoData("d", letters, [], [("a.mp4", 0)], []), 2)


@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)
def test_training_never_meets_them_and_the_report_is_true(script, diagonals, tmp_path, monkeypatch,
                                                          capsys):
    networks, arms = RUNS[script]
    train, given = script.train, []

    def spied(*parts):
        given.extend(thing for thing in parts if isinstance(thing, VideoData))
        return train(*parts)

    monkeypatch.setattr(script, "train", spied)
    flags = ("--epochs", 1, "--workers", 0, "--batch-size", 16, "--frames", 4, "--data", diagonals,
             "--unseen", 2, "--seed", 1, "--out", tmp_path)
    found = script.main([str(flag) for flag in (*networks, *flags)])
    tests, printed = split_unseen(read_data(str(diagonals)), 2, 1), capsys.readouterr().out
    assert given == [tests[""]] * len(arms)
    names = ", ".join(tests["_unseen"].classes)
    assert re.search(rf"^NOTE 2 classes are held out of training, .*{names}$", printed, re.M)
    for arm in arms:
        file = next(tmp_path.rglob(f"{arm}-last.pt"))
        model = common.build_action_clip("toy-large", checkpoint=file)
        for group, part in tests.items():
            batch = next(iter(common.ClipLoader(common.Clips(part.test, 4, 37), len(part.test))))
            with torch.no_grad():
                p = class_scores(model.encode_video(common.centre_crop(batch.video, 32)),
                                 model.embed_classes(part.classes))
            right = (p.argmax(1) == torch.tensor(batch.label)).float().mean().item()
            assert found[arm][f"top1{group}"] == pytest.approx(right, abs=1e-6), group
            said = re.search(rf" {arm}{group}=(\S+)", printed.splitlines()[-1])
            assert float(said[1]) == pytest.approx(right, abs=1e-4)


def test_diagonals_are_read_from_trained_words(plain, tmp_path):
    """The large model has met left, right, up and down: it knows "up and to the left", too, by the
    words and by the order of frames."""
    common.make_toy_folder(tmp_path / "four", train=4, test=60, motions=tuple(DIAGONALS), seed=1)
    data, model = read_data(str(tmp_path / "four")), common.build_action_clip(
        "toy-large", checkpoint=plain[1])
    batch = next(iter(common.ClipLoader(common.Clips(data.test, 4, 37), 60)))
    pixels, labels = common.centre_crop(batch.video, 32), torch.tensor(batch.label)

    def top1(classes, pixels):
        with torch.no_grad():
            p = class_scores(model.encode_video(pixels), model.embed_classes(classes))
        return (p.argmax(1) == labels).float().mean().item()

    ways = {tuple(-np.array(way)): name for name, way in DIAGONALS.items()}
    opposite = [ways[DIAGONALS[name]] for name in data.classes]
    assert top1(data.classes, pixels) > .6  # chance is .25
    assert top1(opposite, pixels) < .1
    assert top1(data.classes, pixels.flip(1)) < .1
    assert top1(data.classes, pixels[:, 2:3].expand_as(pixels)) < .45
