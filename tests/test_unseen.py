"""--unseen: which classes are held out, that training never sees them, that numbers are right."""
import re

import numpy as np
import pytest
import torch

import common
import deit_video
import spatial_kd
import tinyclip_swap
from common import DIAGONALS, MOTIONS, BadInput, VideoLists, hold_out_classes, load_dataset
from tinyclip_swap import class_probabilities

TOYS = ("toy-large:random", "toy-small:random")
RUNS = {  # script: its networks, and the fusion head of each variant that it trains
    tinyclip_swap: (("--large", TOYS[0], "--small", TOYS[1]),
                    {"large": common.FusionHead, "small": common.FusionHead}),
    spatial_kd: (("--student", TOYS[1], "--labeller", TOYS[1], "--variants", "baseline"),
                 {"baseline": common.FusionHead}),
    deit_video: (("--teacher", TOYS[0], "--student", TOYS[1], "--variants", "two_heads_soft"),
                 {"teacher": common.FusionHead, "two_heads_soft": deit_video.TokenFusionHead})}


@pytest.fixture(scope="module")
def diagonals(tmp_path_factory):
    """A small data set of toy videos with the diagonals"""
    folder = tmp_path_factory.mktemp("data") / "ten"
    common.make_toy_dataset(folder, train=60, test=40, motions=(*MOTIONS, *DIAGONALS))
    return folder


def class_names(data, split):
    """{path: class name}"""
    return {path: data.classes[label] for path, label in getattr(data, split)}


def test_every_video_keeps_its_class(diagonals):
    data = load_dataset(str(diagonals))
    seen, unseen, among_all = hold_out_classes(data, 3, seed=5).values()
    assert len(unseen.classes) == 3
    assert sorted(seen.classes + unseen.classes) == data.classes == among_all.classes
    for split in ("train", "test"):
        expected = {path: name for path, name in class_names(data, split).items()
                    if name in seen.classes}
        assert class_names(seen, split) == expected
    held_out = {path: name for path, name in class_names(data, "test").items()
                if name in unseen.classes}
    assert class_names(unseen, "test") == class_names(among_all, "test") == held_out
    assert len(held_out) == 12
    assert unseen.train == among_all.train == []
    assert {subset.name for subset in (seen, unseen, among_all)} == {"ten-unseen3"}


def test_seed_chooses_the_classes_and_only_diagonals_of_toys():
    videos, letters = [("a.mp4", k) for k in range(10)], list("abcdef")
    toys = VideoLists("t", [*MOTIONS, *DIAGONALS], [], videos, [])
    others = VideoLists("d", letters, [], videos[:6], [])
    for data, candidates in ((toys, set(DIAGONALS)), (others, set(letters))):
        chosen = [hold_out_classes(data, 2, seed)["_unseen"].classes for seed in range(40)]
        assert chosen[3] == hold_out_classes(data, 2, 3)["_unseen"].classes
        assert set().union(*chosen) == candidates
    assert hold_out_classes(data, 0) == {"": data}
    for count in (-1, 1, 5):
        with pytest.raises(BadInput, match="hold out two or more"):
            hold_out_classes(data, count)
    with pytest.raises(BadInput, match="no test video"):
        hold_out_classes(VideoLists("d", letters, [], [("a.mp4", 0)], []), 2)


@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)
def test_training_never_sees_held_out_classes(script, diagonals, tmp_path, monkeypatch, capsys):
    """And every number of RESULT is that of the checkpoint."""
    networks, heads = RUNS[script]
    train, trained_on = script.train, []

    def spy(*args):
        trained_on.extend(arg for arg in args if isinstance(arg, VideoLists))
        return train(*args)

    monkeypatch.setattr(script, "train", spy)
    flags = ("--epochs", 1, "--workers", 0, "--batch-size", 16, "--frames", 4, "--data", diagonals,
             "--unseen", 2, "--seed", 1, "--out", tmp_path)
    results = script.main([str(flag) for flag in (*networks, *flags)])
    test_sets = hold_out_classes(load_dataset(str(diagonals)), 2, 1)
    printed = capsys.readouterr().out
    assert trained_on == [test_sets[""]] * len(heads)
    names = ", ".join(test_sets["_unseen"].classes)
    assert re.search(rf"^NOTE 2 classes are held out of training.*{names}$", printed, re.M)
    for variant, head in heads.items():
        file = next(tmp_path.rglob(f"{variant}-last.pt"))
        model = common.build_actionclip("toy-large", head, checkpoint=file)
        for suffix, data in test_sets.items():
            dataset = common.VideoDataset(data.test, 4, 37)
            batch = next(iter(common.VideoLoader(dataset, len(data.test))))
            with torch.no_grad():
                p = class_probabilities(model.encode_video(common.center_crop(batch.video, 32)),
                                        model.encode_classes(data.classes))
            top1 = (p.argmax(1) == torch.tensor(batch.label)).float().mean().item()
            assert results[variant][f"top1{suffix}"] == pytest.approx(top1, abs=1e-6), suffix
            number = re.search(rf" {variant}{suffix}=(\S+)", printed.splitlines()[-1])
            assert float(number[1]) == pytest.approx(top1, abs=1e-4)
        seen, unseen = results[variant]["top1"], results[variant]["top1_unseen"]
        if script is tinyclip_swap:
            mean = re.search(rf"^{variant}: harmonic mean of .* (\S+)$", printed, re.M)
            expected = 0 if seen * unseen == 0 else 2 / (1 / seen + 1 / unseen)
            assert float(mean[1]) == pytest.approx(expected, abs=1e-4)


def test_trained_words_tell_unseen_diagonals_apart(plain, tmp_path):
    """The large model has seen left, right, up and down. So it knows "up and to the left", too, by
    the words and by the order of frames."""
    common.make_toy_dataset(tmp_path / "four", train=4, test=60, motions=tuple(DIAGONALS), seed=1)
    data = load_dataset(str(tmp_path / "four"))
    model = common.build_actionclip("toy-large", checkpoint=plain[1])
    batch = next(iter(common.VideoLoader(common.VideoDataset(data.test, 4, 37), 60)))
    video, labels = common.center_crop(batch.video, 32), torch.tensor(batch.label)

    def top1(classes, video):
        with torch.no_grad():
            p = class_probabilities(model.encode_video(video), model.encode_classes(classes))
        return (p.argmax(1) == labels).float().mean().item()

    names = {tuple(-np.array(direction)): name for name, direction in DIAGONALS.items()}
    opposite = [names[DIAGONALS[name]] for name in data.classes]
    assert top1(data.classes, video) > .6  # chance is .25
    assert top1(opposite, video) < .1
    assert top1(data.classes, video.flip(1)) < .1
    assert top1(data.classes, video[:, 2:3].expand_as(video)) < .45
