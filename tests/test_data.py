"""Toy clips, the formats of a data set, and what is said of bad input."""
import json
import math
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import common
from common import (
    COLOURS,
    DIAGONALS,
    MOTIONS,
    SCENES,
    SHAPES,
    BadInput,
    read_data,
    toy_clip,
    toy_truth,
)


def fill(root, lists=None, clips=""):
    """Write files, lists {name: text or bytes} and empty clips "name|name". -> root"""
    empty = dict.fromkeys(filter(None, clips.split("|")), "")
    for name, content in {**empty, **(lists or {})}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def names(rows):
    return [(Path(path).name, label) for path, label in rows]


# ---- toy clips -----------------------------------------------------------------------------------


def test_same_seed_same_files(tmp_path):
    for run in ("a", "b", "c"):
        common.make_toy_folder(tmp_path / run, train=3, test=3, seed=int(run == "c"))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    same = [(tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files]
    assert len(files) == 14
    assert all(same)
    first = Path("train/0000.mp4")
    assert (tmp_path / "a" / first).read_bytes() != (tmp_path / "c" / first).read_bytes()


def test_middle_frame_does_not_tell_the_motion():
    # the same draws for every motion, and the same picture in the middle of 17 frames
    truths = [toy_truth(np.random.default_rng(0), motion, "dots") for motion in MOTIONS]
    assert all({**truth, "motion": ""} == {**truths[0], "motion": ""} for truth in truths)
    clips = [toy_clip(truth, frames=17)[0] for truth in truths]
    assert all((clip[8] == clips[0][8]).all() for clip in clips)
    assert all((clip[0] != clips[0][0]).any() for clip in clips[1:])


@pytest.mark.parametrize("motion", [*MOTIONS, *DIAGONALS])
def test_true_motion_agrees_with_the_drawing(motion):
    truth = toy_truth(np.random.default_rng(1), motion, "plain ground") | {"shape": "square"}
    video, way = toy_clip(truth, pixels=128)
    assert not way[0].any()
    t, (y, x) = 8, np.nonzero(way[8].any(-1))
    grid = np.stack([x, y], -1) + .5 - way[t, y, x]  # where these pixels were a frame before
    before = torch.nn.functional.grid_sample(
        torch.tensor(video[t - 1]).permute(2, 0, 1)[None].double(),
        torch.tensor(grid)[None, None].double() / 64 - 1, align_corners=False)[0, :, 0].T.numpy()
    warped, still = (abs(a - video[t, y, x]).mean(-1) for a in (before, video[t - 1, y, x] * 1.))
    assert np.percentile(warped, 90) < 3 < np.percentile(still, 90)  # the rest is the outline


@pytest.mark.parametrize(("motion", "axis", "sign"), [
    ("moving left", 0, -1), ("moving right", 0, 1), ("moving up", 1, -1), ("moving down", 1, 1)])
def test_left_is_negative_x_and_up_is_negative_y(motion, axis, sign):
    _, way = toy_clip(toy_truth(np.random.default_rng(2), motion, "dots"))
    moved = way[1:][way[1:].any(-1)]
    assert (np.sign(moved[:, axis]) == sign).all()
    np.testing.assert_allclose(moved[:, 1 - axis], 0, atol=1e-4)


def test_growing_spreads_from_the_centre():
    truth = toy_truth(np.random.default_rng(2), "growing", "dots")
    _, (_, way) = toy_clip(truth, frames=2)
    y, x = np.nonzero(way.any(-1))
    outward = np.stack([x + .5 - truth["x"] * 64, y + .5 - truth["y"] * 64], -1)
    assert ((way[y, x] * outward).sum(-1) > 0).all()


def test_captions_name_what_the_truth_says():
    rng = np.random.default_rng(0)
    for motion in MOTIONS:
        truth = toy_truth(rng, motion, str(rng.choice(SCENES)))
        caption = common.toy_caption(truth)
        assert [w for w in COLOURS if f" {w} " in caption] == [truth["colour"]]
        assert [w for w in SHAPES if f" {w} " in caption] == [truth["shape"]]
        assert caption.endswith("on " + truth["scene"])
        assert motion.split()[-1] not in caption.split(" at ")[0]  # a still knows no motion
    place = {"colour": "red", "shape": "cross", "scene": "dots"}
    assert "at the top left on" in common.toy_caption({**place, "x": .2, "y": .2})
    assert "at the centre on" in common.toy_caption({**place, "x": .5, "y": .5})
    assert "at the bottom on" in common.toy_caption({**place, "x": .5, "y": .8})


def test_encoded_toy_clips_show_what_was_drawn(toy):
    truths = json.loads((toy / "truth.json").read_text())
    for name in ("train/0000.mp4", "train/0004.mp4", "test/0023.mp4"):
        drawn = torch.from_numpy(toy_clip(truths[name])[0]).permute(0, 3, 1, 2)
        error = (common.read_frames(toy / name, range(16)).double() - drawn).square().mean()
        assert 10 * math.log10(255 ** 2 / error) > 27  # sharp colours at half resolution: not more


def test_toy_files_hold_only_i_and_p_frames_with_an_i_every_12(tmp_path):
    truth = toy_truth(np.random.default_rng(0), "growing", "dots")
    common.write_video(tmp_path / "clip.mp4", toy_clip(truth, frames=30)[0])
    with av.open(str(tmp_path / "clip.mp4")) as container:
        kinds = "".join(" IP"[frame.pict_type] for frame in container.decode(video=0))
    assert kinds == "IPPPPPPPPPPP" * 2 + "IPPPPP"


def test_toy_scene_goes_with_the_action_in_training_only(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "toy_clip", lambda truth: [None])  # only the truth is wanted here
    monkeypatch.setattr(common, "write_video", lambda *_: None)
    common.make_toy_folder(tmp_path / "toy", train=300, test=300)
    truths = json.loads((tmp_path / "toy" / "truth.json").read_text())
    usual = {part: np.mean([SCENES[list(MOTIONS).index(t["motion"]) % 4] == t["scene"]
                            for name, t in truths.items() if name.startswith(part)])
             for part in ("train", "test", "swapped")}
    assert abs(usual["train"] - .625) < .08  # half, and a quarter of the other half
    assert abs(usual["test"] - .25) < .08
    assert usual["swapped"] == 0
    scenes = {(t["motion"], t["scene"]) for name, t in truths.items() if name.startswith("swapped")}
    assert len(scenes) == len(MOTIONS)  # each action in the one usual scene of another


def test_toy_folder_is_a_data_set_with_balanced_classes(toy):
    data = read_data(toy)
    assert data.classes == sorted(MOTIONS)
    assert np.bincount([label for _, label in data.train]).tolist() == [8] * 6
    assert np.bincount([label for _, label in data.test]).tolist() == [4] * 6
    swapped = read_data(toy, 2)
    assert swapped.train == data.train
    assert np.bincount([label for _, label in swapped.test]).tolist() == [4] * 6
    assert not {path for path, _ in swapped.test} & {path for path, _ in data.test}


def test_toy_is_made_once(tmp_path, monkeypatch):
    def small(folder):
        made.append(folder)
        fill(folder, clips="a.mp4|b.mp4", lists={"train.csv": "path,label\na.mp4,x\n",
                                                 "test.csv": "path,label\nb.mp4,x\n"})

    made = []
    monkeypatch.setattr(common, "make_toy_folder", small)
    assert [read_data("toy", cache=tmp_path).name for _ in range(2)] == ["toy", "toy"]
    assert len(made) == 1


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "said"), [
    ("brush_hair", "brush hair"), ("ApplyEyeMakeup", "apply eye makeup"), ("TaiChi", "tai chi"),
    ("HandstandPushups", "handstand pushups"), ("YoYo", "yo yo"), ("tai chi", "tai chi")])
def test_words(name, said):
    assert common.words(name) == said


HMDB_LISTS = "testTrainMulti_7030_splits"
HMDB_CLIP = "{}_{}_f_nm_np1_fr_goo_{}.avi"
ODD_NAMES = ["#20_Rhythm", "Yo&Me[1]", "a(b)!c", "x;y+z@~", "with space"]


@pytest.mark.parametrize("nested", ["", "hmdb51_org/"])
def test_hmdb51_as_released(tmp_path, nested):
    lists, clips = {}, []
    for folder in ("wave", "brush_hair"):
        clip = [HMDB_CLIP.format(name, folder, 0) for name in ODD_NAMES]
        clips += [f"{nested}{folder}/{name}" for name in clip]
        # flags: 1 training, 2 test, 0 neither; each line of the official lists ends with a space
        lists[f"{HMDB_LISTS}/{folder}_test_split1.txt"] = \
            "".join(f"{name} {flag} \n" for name, flag in zip(clip, (1, 2, 0, 1, 1), strict=True))
    data = read_data(fill(tmp_path, clips="|".join(clips), lists=lists))
    assert data.classes == ["brush hair", "wave"]
    assert [len(data.train), len(data.test)] == [6, 2]
    assert names(data.test) == [(HMDB_CLIP.format("Yo&Me[1]", folder, 0), label)
                                for label, folder in enumerate(["brush_hair", "wave"])]


@pytest.mark.parametrize(("split", "there"), [(1, (2, 1)), (2, (2, 1)), (3, (3, 1))])
def test_official_hmdb51_lists_with_four_real_clips(shared, tmp_path, split, there):
    shutil.copytree(shared / "splits" / HMDB_LISTS, tmp_path / HMDB_LISTS)
    for folder in ("wave", "cartwheel"):
        (tmp_path / folder).mkdir()
        for clip in (shared / "clips").glob(f"*_{folder}_*.avi"):
            shutil.copy(clip, tmp_path / folder / clip.name.removeprefix("hmdb51_"))
    with pytest.raises(BadInput, match=f"{5100 - sum(there)} of 5100 listed clips"):
        read_data(tmp_path, split)
    data = read_data(tmp_path, split, allow_missing=True)
    assert (len(data.train), len(data.test)) == there  # as their flags in the three lists say
    assert (len(data.classes), len(data.missing)) == (51, 5100 - sum(there))
    assert {data.classes[label] for _, label in data.train + data.test} == {"wave", "cartwheel"}


@pytest.mark.parametrize("split", [1, 2, 3])
def test_official_hmdb51_lists_in_full(shared, tmp_path, split):
    shutil.copytree(shared / "splits" / HMDB_LISTS, tmp_path / HMDB_LISTS)
    for file in (tmp_path / HMDB_LISTS).glob(f"*split{split}.txt"):
        folder = tmp_path / file.name.removesuffix(f"_test_split{split}.txt")
        folder.mkdir()
        for line in file.read_text().splitlines():
            (folder / line.rstrip()[:-2]).touch()
    data = read_data(tmp_path, split)
    assert (len(data.train), len(data.test), len(data.classes)) == (3570, 1530, 51)
    # 70 training and 30 test clips in each class
    assert set(np.bincount([label for _, label in data.train])) == {70}
    assert set(np.bincount([label for _, label in data.test])) == {30}
    assert data.missing == []


@pytest.mark.parametrize("home", ["", "UCF-101/"])
def test_ucf101_as_released(tmp_path, home):
    train = ["YoYo/v_YoYo_g08_c01.avi", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"]
    test = ["YoYo/v_YoYo_g01_c01.avi"]
    # ids of the list are swapped on purpose: labels come from names
    lists = {"trainlist01.txt": f"{train[0]} 1\r\n{train[1]} 2\r\n",
             "testlist01.txt": f"{test[0]}\r\n", "classInd.txt": "1 YoYo\r\n2 ApplyEyeMakeup\r\n"}
    data = read_data(fill(tmp_path, clips="|".join(home + name for name in train + test), lists={
        f"ucfTrainTestlist/{name}": text for name, text in lists.items()}))
    assert data.classes == ["apply eye makeup", "yo yo"]
    assert names(data.train) == [("v_YoYo_g08_c01.avi", 1), ("v_ApplyEyeMakeup_g08_c01.avi", 0)]
    assert names(data.test) == [("v_YoYo_g01_c01.avi", 1)]


@pytest.mark.parametrize(("split", "group"), [(1, "g01"), (2, "g08"), (3, "g15")])
def test_official_ucf101_lists(shared, tmp_path, split, group):
    shutil.copytree(shared / "splits" / "ucfTrainTestlist", tmp_path / "ucfTrainTestlist")
    fill(tmp_path, clips=f"SoccerJuggling/v_SoccerJuggling_{group}_c01.avi")  # a test clip
    for clip in (shared / "clips").glob("v_SoccerJuggling*.avi"):
        shutil.copy(clip, tmp_path / "SoccerJuggling")  # training clips of all three splits
    with pytest.raises(BadInput, match="13317 of 13320 listed"):
        read_data(tmp_path, split)
    data = read_data(tmp_path, split, allow_missing=True)
    assert (len(data.train), len(data.test), len(data.classes)) == (2, 1, 101)


@pytest.mark.parametrize("number", ["", "1", "2"])
def test_csv_with_and_without_a_split_number(tmp_path, number):
    fill(tmp_path, clips="x/1.mp4|x/2.mp4", lists={
        f"train{number}.csv": "path,label\nx/1.mp4,riding a bike\n",
        f"test{number}.csv": "path,label\nx/2.mp4,riding a bike\n"})
    data = read_data(tmp_path, split=int(number or 1))
    assert data.train == [(str(tmp_path / "x/1.mp4"), 0)]
    assert data.classes == ["riding a bike"]  # as written: these are words already


def test_csv_as_other_programs_write_it(tmp_path):
    # BOM, CR LF, an empty line, spaces around, other columns, a comma in quotes, letters not ASCII
    data = read_data(fill(tmp_path, clips="1.mp4|2.mp4|grün 3.mp4", lists={
        "train.csv": '\ufefflabel,x,path\r\n"stand up, slowly",,1.mp4\r\n\r\nwave ,, 2.mp4\r\n',
        "test.csv": "path,label\ngrün 3.mp4,wave"}))
    assert data.classes == ["stand up, slowly", "wave"]
    assert names(data.train + data.test) == [("1.mp4", 0), ("2.mp4", 1), ("grün 3.mp4", 1)]


def test_csv_of_weizmann(shared):
    folds = [read_data(shared / "weizmann", split) for split in (1, 2, 3)]
    assert [(len(f.train), len(f.test), len(f.classes)) for f in folds] == [(60, 30, 10)] * 3
    assert len({path for fold in folds for path, _ in fold.test}) == 90


def test_class_folders(tmp_path):
    data = read_data(fill(tmp_path, clips="train/TaiChi/1.mp4|train/wave/2.mp4|test/wave/3.mp4|"
                          "train/wave/.DS_Store|train/readme.txt"))
    assert data.classes == ["tai chi", "wave"]
    assert names(data.train) == [("1.mp4", 0), ("2.mp4", 1)]
    assert names(data.test) == [("3.mp4", 1)]


def test_order_of_the_list_does_not_change_class_indices(tmp_path):
    rows, got = ["1.mp4,wave", "2.mp4,clap"], []
    for order in (rows, rows[::-1]):
        got.append(read_data(fill(tmp_path, clips="1.mp4|2.mp4|3.mp4", lists={
            "train.csv": "\n".join(["path,label", *order]), "test.csv": "path,label\n3.mp4,wave"})))
    assert got[0].classes == got[1].classes == ["clap", "wave"]
    assert sorted(got[0].train) == sorted(got[1].train)


# ---- bad input -----------------------------------------------------------------------------------


GOOD = {"a.mp4": "", "b.mp4": "", "c.mp4": "", "train.csv": "path,label\na.mp4,wave\nb.mp4,clap\n",
        "test.csv": "path,label\nc.mp4,wave\n"}


def csv(*rows):
    return "\n".join(["path,label", *rows])


BAD = {  # what: (files that replace some of GOOD, or a list: all files; split; what is said)
    "empty folder": ([], 1, ["holds nothing", "train/CLASS/*", "HMDB51", "UCF101", "path,label"]),
    "unknown format": ([("x/a.mp4", "")], 1, ["holds x", "train/CLASS/*"]),
    "one list only": ([("train.csv", csv("a.mp4,wave"))], 1, ["holds train.csv", "test.csv"]),
    "other header": ({"train.csv": "file,class\na.mp4,wave"}, 1, ["train.csv", "path,label"]),
    "no header": ({"test.csv": "a.mp4,wave"}, 1, ["test.csv", "path,label"]),
    "semicolons": ({"test.csv": "path;label\na.mp4;wave"}, 1, ["test.csv", "path,label"]),
    "empty csv": ({"train.csv": ""}, 1, ["train.csv", "path,label"]),
    "header only": ({"train.csv": csv()}, 1, ["no training"]),
    "no test rows": ({"test.csv": csv()}, 1, ["no test"]),
    "row without label": ({"train.csv": csv("a.mp4,wave", "b.mp4")}, 1, ["train", "2", "label"]),
    "blank label": ({"train.csv": csv("a.mp4,wave", "b.mp4,  ")}, 1, ["train.csv", "2", "label"]),
    "row without path": ({"train.csv": csv(",wave")}, 1, ["train.csv", "path"]),
    "not UTF-8": ({"train.csv": csv("a.mp4,grün").encode("latin-1")}, 1, ["train.csv", "UTF-8"]),
    "UTF-16": ({"test.csv": csv("c.mp4,wave").encode("utf-16")}, 1, ["test.csv", "UTF-8"]),
    "test label that training lacks": (
        {"test.csv": csv("c.mp4,jump")}, 1, ["jump", "1 class", "training"]),
    "clip on both lists": ({"test.csv": csv("./a.mp4,wave")}, 1, ["a.mp4", "both", "1 clip"]),
    "missing clips": ({"train.csv": csv(*(f"{i}.mp4,wave" for i in range(5)))}, 1,
                      ["5 of 6", "0.mp4", "1.mp4", "2.mp4", "--allow-missing"]),
    "a folder for a clip": ({"d.mp4/x": "", "train.csv": csv("d.mp4,wave")}, 1, ["1 of", "d.mp4"]),
    "split 2 of one": ({}, 2, ["split 2", "train.csv"]),
    "split 2 of class folders": (
        [("train/wave/a.mp4", ""), ("test/wave/b.mp4", "")], 2, ["split 2", "train"]),
    "empty class folder": ([("train/wave/a.mp4", ""), ("train/clap/.DS_Store", ""),
                            ("test/wave/b.mp4", "")], 1, ["clap", "no clip"]),
    "class folder in test only": (
        [("train/wave/a.mp4", ""), ("test/wave/b.mp4", ""), ("test/clap/b.mp4", "")], 1, ["clap"]),
    "no class folders": ([("train/a.mp4", ""), ("test/b.mp4", "")], 1, ["no training"]),
    "no lists of HMDB51": ([(f"{HMDB_LISTS}/readme", ""), ("wave/a.avi", "")], 1,
                           ["lacks", "CLASS_test_split1.txt"]),
    "no lists of UCF101": ([("ucfTrainTestlist/classInd.txt", "")], 1, ["trainlist01.txt"]),
    # as a zip program may leave them
    "HMDB51 not UTF-8": ([(f"{HMDB_LISTS}/wave_test_split1.txt", b"a\xe9.avi 1\n"),
                          ("wave/a.avi", "")], 1, ["wave"]),
    # longer than a file system allows: OSError 36
    "too long a name": ({"train.csv": csv("a" * 300 + ",wave")}, 1, ["1 of 2", "aaa"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_names_the_place_and_the_cure(tmp_path, what):
    files, split, said = BAD[what]
    fill(tmp_path, lists=GOOD | files if isinstance(files, dict) else dict(files))
    with pytest.raises(BadInput) as caught:
        read_data(tmp_path, split)
    for part in (tmp_path.name, *said):
        assert part in str(caught.value)


@pytest.mark.parametrize("data", ["no/such/folder", "Toy", "a.mp4"])
def test_unknown_folder_lists_the_formats(tmp_path, monkeypatch, data):
    monkeypatch.chdir(fill(tmp_path, clips="a.mp4"))
    with pytest.raises(BadInput, match=r"no such folder.*toy.*HMDB51.*path,label.*train/CLASS"):
        read_data(data)


def test_good_input_is_good(tmp_path):  # or else the table above would prove nothing
    assert len(read_data(fill(tmp_path, lists=GOOD)).train) == 2


def test_allow_missing_goes_on_and_keeps_what_was_missing(tmp_path):
    fill(tmp_path, lists=GOOD | {"train.csv": csv("a.mp4,wave", "gone.mp4,clap")})
    data = read_data(tmp_path, allow_missing=True)
    assert data.missing == [str(tmp_path / "gone.mp4")]
    assert data.train == [(str(tmp_path / "a.mp4"), 1)]
    assert data.classes == ["clap", "wave"]  # the classes stay those of the list


def test_allow_missing_stops_where_nothing_is_left(tmp_path):
    fill(tmp_path, lists=GOOD | {"test.csv": csv("gone.mp4,wave")})
    with pytest.raises(BadInput, match=r"no test clips.*1 .*missing"):
        read_data(tmp_path, allow_missing=True)
