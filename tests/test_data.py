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
    MOTIONS,
    SCENES,
    SHAPES,
    BadInput,
    load_dataset,
    render_video,
    sample_toy_attributes,
)

RNG = np.random.default_rng


def fill(root, lists=None, clips=()):
    """Write files, lists {name: text or bytes}, and empty clips. -> root"""
    for name, content in {**dict.fromkeys(clips, ""), **(lists or {})}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def names(rows):
    return [(Path(path).name, label) for path, label in rows]


# ---- toy clips -----------------------------------------------------------------------------------


def test_same_seed_same_files(tmp_path):
    for run in ("a", "b", "c"):
        common.make_toy_dataset(tmp_path / run, train=3, test=3, seed=int(run == "c"))
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 14
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    first = Path("train/0000.mp4")
    assert (tmp_path / "a" / first).read_bytes() != (tmp_path / "c" / first).read_bytes()


def test_middle_frame_does_not_tell_the_motion():
    # the same draws for every motion, and the same picture in the middle of 17 frames
    truths = [sample_toy_attributes(RNG(0), motion, "dots") for motion in MOTIONS]
    assert all({**truth, "motion": ""} == {**truths[0], "motion": ""} for truth in truths)
    clips = [render_video(truth, frames=17) for truth in truths]
    assert all((clip[8] == clips[0][8]).all() for clip in clips)
    assert all((clip[0] != clips[0][0]).any() for clip in clips[1:])


@pytest.mark.parametrize(("motion", "dx", "dy"), [
    ("moving left", -1, 0), ("moving up", 0, -1), ("moving down and to the right", 1, 1),
    ("growing", 0, 0)])
def test_motion_is_what_its_words_say(motion, dx, dy):
    truth = {**sample_toy_attributes(RNG(2), motion, "plain ground"), "colour": "white"}
    video = render_video(truth).astype(float).mean(-1)
    y, x = np.mgrid[:64, :64]
    place = [[(at * (frame > 100)).sum() / (frame > 100).sum() for at in (x, y)] for frame in video]
    moved = np.diff(place, axis=0).mean(0) * 15 / 64
    np.testing.assert_allclose(moved, np.array([dx, dy]) * truth["speed"] / 2, atol=.03)
    sizes = (video > 100).sum((1, 2))
    grown = {"growing": 2 * truth["speed"]}.get(motion, 0)
    assert math.log(sizes[-1] / sizes[0]) == pytest.approx(grown, abs=.3)


def test_captions_name_what_the_truth_says():
    rng = RNG(0)
    for motion in MOTIONS:
        truth = sample_toy_attributes(rng, motion, str(rng.choice(SCENES)))
        caption = common.toy_caption(truth)
        assert [w for w in COLOURS if f" {w} " in caption] == [truth["colour"]]
        assert [w for w in SHAPES if f" {w} " in caption] == [truth["shape"]]
        assert caption.endswith("on " + truth["scene"])
        assert motion.split()[-1] not in caption.split(" at ")[0]  # a still knows no motion
    place = {"colour": "red", "shape": "cross", "scene": "dots"}
    assert "at the top left on" in common.toy_caption({**place, "x": .2, "y": .2})
    assert "at the centre on" in common.toy_caption({**place, "x": .5, "y": .5})
    assert "at the bottom on" in common.toy_caption({**place, "x": .5, "y": .8})


def test_toy_files_show_what_was_drawn_in_i_and_p_frames(toy):
    truths = json.loads((toy / "toy_attributes.json").read_text())
    for name in ("train/0000.mp4", "train/0004.mp4", "test/0023.mp4"):
        drawn = torch.from_numpy(render_video(truths[name])).permute(0, 3, 1, 2)
        error = (common.read_frames(toy / name, range(16)).double() - drawn).square().mean()
        assert 10 * math.log10(255 ** 2 / error) > 27  # sharp colours at half resolution: not more
        with av.open(str(toy / name)) as container:
            kinds = "".join(" IP"[frame.pict_type] for frame in container.decode(video=0))
        assert kinds == "IPPPPPPPPPPPIPPP"


def test_toy_scene_goes_with_the_action_in_training_only(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "render_video", lambda *_: None)  # only the truth is wanted here
    monkeypatch.setattr(common, "write_video", lambda *_, **__: None)
    common.make_toy_dataset(tmp_path / "toy", train=300, test=300)
    truths, usual = json.loads((tmp_path / "toy" / "toy_attributes.json").read_text()), {}
    for name, truth in truths.items():
        own = SCENES[list(MOTIONS).index(truth["motion"]) % 4]
        usual.setdefault(name.split("/")[0], []).append(own == truth["scene"])
    assert abs(np.mean(usual["train"]) - .625) < .08  # half, and a quarter of the other half
    assert abs(np.mean(usual["test"]) - .25) < .08
    assert not any(usual["swapped"])
    scenes = {(t["motion"], t["scene"]) for name, t in truths.items() if name.startswith("swapped")}
    assert len(scenes) == len(MOTIONS)  # each action in the one usual scene of another


def test_toy_folder_is_a_data_set_with_balanced_classes(toy):
    data, swapped = load_dataset(toy), load_dataset(toy, 2)
    assert data.classes == sorted(MOTIONS)
    for rows, each in ((data.train, 8), (data.test, 4), (swapped.test, 4)):
        assert np.bincount([label for _, label in rows]).tolist() == [each] * 6
    assert swapped.train == data.train
    assert not {path for path, _ in swapped.test} & {path for path, _ in data.test}


def test_split_2_of_pairs_is_labelled_by_colour(coded):
    truths = json.loads((coded / "toy_attributes.json").read_text())
    pairs, colours = load_dataset(coded), load_dataset(coded, 2)
    assert colours.classes == sorted(common.COLOURS)
    for part in ("train", "test"):
        videos = getattr(colours, part)
        assert [path for path, _ in videos] == [path for path, _ in getattr(pairs, part)]
        for path, label in videos:
            truth = truths["/".join(Path(path).parts[-2:])]
            assert colours.classes[label] == truth["colour"]
    assert colours.digest() != pairs.digest()


# ---- formats -------------------------------------------------------------------------------------


def test_words():
    said = {"brush_hair": "brush hair", "ApplyEyeMakeup": "apply eye makeup", "YoYo": "yo yo",
            "HandstandPushups": "handstand pushups", "tai chi": "tai chi"}
    assert {name: common.readable_class_name(name) for name in said} == said


HMDB_LISTS = "testTrainMulti_7030_splits"
ODD_NAMES = ["#20_Rhythm", "Yo&Me[1]", "a(b)!c", "x;y+z@~", "with space"]


@pytest.mark.parametrize("nested", ["", "hmdb51_org/"])
def test_hmdb51_as_released(tmp_path, nested):
    lists, clips = {}, []
    for folder in ("wave", "brush_hair"):
        own = [f"{name}_{folder}_f_nm_np1_fr_goo_0.avi" for name in ODD_NAMES]
        clips += [f"{nested}{folder}/{name}" for name in own]
        # flags: 1 training, 2 test, 0 neither; each line of the official lists ends with a space
        lines = [f"{name} {flag} \n" for name, flag in zip(own, (1, 2, 0, 1, 1), strict=True)]
        lists[f"{HMDB_LISTS}/{folder}_test_split1.txt"] = "".join(lines)
    data = load_dataset(fill(tmp_path, lists, clips))
    assert data.classes == ["brush hair", "wave"]
    assert len(data.train) == 6
    assert names(data.test) == [("Yo&Me[1]_brush_hair_f_nm_np1_fr_goo_0.avi", 0),
                                ("Yo&Me[1]_wave_f_nm_np1_fr_goo_0.avi", 1)]


def test_official_hmdb51_lists(shared, tmp_path):
    shutil.copytree(shared / "splits" / HMDB_LISTS, tmp_path / HMDB_LISTS)
    for folder in ("wave", "cartwheel"):
        for clip in (shared / "clips").glob(f"*_{folder}_*.avi"):
            fill(tmp_path, clips=[f"{folder}/{clip.name.removeprefix('hmdb51_')}"])
    with pytest.raises(BadInput, match="5096 of 5100 listed videos"):
        load_dataset(tmp_path, 3)
    data = load_dataset(tmp_path, 3, allow_missing=True)
    assert (len(data.train), len(data.test)) == (3, 1)  # as their flags in the list say
    assert {data.classes[label] for _, label in data.train + data.test} == {"wave", "cartwheel"}
    for name in data.missing:
        fill(tmp_path, clips=[name])
    data = load_dataset(tmp_path, 3)  # 70 training and 30 test clips in each class
    assert np.bincount([label for _, label in data.train]).tolist() == [70] * 51
    assert np.bincount([label for _, label in data.test]).tolist() == [30] * 51


@pytest.mark.parametrize("home", ["", "UCF-101/"])
def test_ucf101_as_released(tmp_path, home):
    train = ["YoYo/v_YoYo_g08_c01.avi", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"]
    test = ["YoYo/v_YoYo_g01_c01.avi"]
    # ids of the list are swapped on purpose: labels come from names
    lists = {"ucfTrainTestlist/trainlist01.txt": f"{train[0]} 1\r\n{train[1]} 2\r\n",
             "ucfTrainTestlist/testlist01.txt": f"{test[0]}\r\n",
             "ucfTrainTestlist/classInd.txt": "1 YoYo\r\n2 ApplyEyeMakeup\r\n"}
    data = load_dataset(fill(tmp_path, lists, [home + name for name in train + test]))
    assert data.classes == ["apply eye makeup", "yo yo"]
    assert data.released_class_names == ["ApplyEyeMakeup", "YoYo"]
    assert names(data.train) == [("v_YoYo_g08_c01.avi", 1), ("v_ApplyEyeMakeup_g08_c01.avi", 0)]
    assert names(data.test) == [("v_YoYo_g01_c01.avi", 1)]


def test_official_ucf101_lists(shared, tmp_path):
    shutil.copytree(shared / "splits" / "ucfTrainTestlist", tmp_path / "ucfTrainTestlist")
    for number in ("g15", "g23", "g24"):  # a test clip, and two training clips
        fill(tmp_path, clips=[f"SoccerJuggling/v_SoccerJuggling_{number}_c01.avi"])
    with pytest.raises(BadInput, match="13317 of 13320 listed"):
        load_dataset(tmp_path, 3)
    data = load_dataset(tmp_path, 3, allow_missing=True)
    assert (len(data.train), len(data.test), len(data.classes)) == (2, 1, 101)


def test_csv_of_weizmann(shared):
    folds = [load_dataset(shared / "weizmann", split) for split in (1, 2, 3)]
    assert [(len(f.train), len(f.test), len(f.classes)) for f in folds] == [(60, 30, 10)] * 3
    assert len({path for fold in folds for path, _ in fold.test}) == 90


@pytest.mark.parametrize("number", ["", "2"])
def test_csv_as_other_programs_write_it(tmp_path, number):
    # BOM, CR LF, an empty line, spaces around, other columns, a comma in quotes, letters not ASCII
    train = '\ufefflabel,x,path\r\n"stand up, slowly",,1.mp4\r\n\r\nwave ,, 2.mp4\r\n'
    lists = {f"train{number}.csv": train, f"test{number}.csv": "path,label\nx/grün 3.mp4,wave"}
    data = load_dataset(fill(tmp_path, lists, ["1.mp4", "2.mp4", "x/grün 3.mp4"]), int(number or 1))
    assert data.classes == ["stand up, slowly", "wave"]
    assert names(data.train + data.test) == [("1.mp4", 0), ("2.mp4", 1), ("grün 3.mp4", 1)]


def test_labels_become_words_in_every_format(tmp_path):
    lists = {"train.csv": csv("a.mp4,MovingLeft", "b.mp4,turn_Right"),
             "test.csv": csv("c.mp4,MovingLeft")}
    data = load_dataset(fill(tmp_path, GOOD | lists))
    assert data.classes == ["moving left", "turn right"]
    assert common.flippable(data.classes) == [False, False]


def test_numbers_as_labels_need_a_list_of_names(tmp_path):
    lists = {"train.csv": csv("a.mp4,0", "b.mp4,1"), "test.csv": csv("c.mp4,0")}
    fill(tmp_path, GOOD | lists)
    with pytest.raises(BadInput, match=r"labels are numbers.*labels\.csv.*id,name"):
        load_dataset(tmp_path)
    fill(tmp_path, {"labels.csv": "id,name\n0,WaveHands\n1,clap\n"})
    data = load_dataset(tmp_path)
    assert data.classes == ["clap", "wave hands"]
    assert names(data.train) == [("a.mp4", 1), ("b.mp4", 0)]
    fill(tmp_path, {"labels.csv": "id,name\n0,wave\n"})
    with pytest.raises(BadInput, match=r"a line for each of 0, 1"):
        load_dataset(tmp_path)
    fill(tmp_path, {"labels.csv": "id,name\n0,wave\n1,Wave\n"})
    with pytest.raises(BadInput, match=r"0 and 1 are two spellings"):
        load_dataset(tmp_path)


def test_class_folders(tmp_path):
    data = load_dataset(fill(tmp_path, clips=[
        "train/TaiChi/1.mp4", "train/wave/2.mp4", "train/x.txt", "train/wave/x.txt",
        "train/wave/Thumbs.db", "test/wave/3.mp4", "train/wave/.DS_Store"]))
    assert data.classes == ["tai chi", "wave"]
    assert names(data.train) == [("1.mp4", 0), ("2.mp4", 1)]
    assert names(data.test) == [("3.mp4", 1)]


# ---- bad input -----------------------------------------------------------------------------------


GOOD = {"a.mp4": "", "b.mp4": "", "c.mp4": "", "train.csv": "path,label\na.mp4,wave\nb.mp4,clap\n",
        "test.csv": "path,label\nc.mp4,wave\n"}


def csv(*rows):
    return "\n".join(["path,label", *rows])


BAD = {  # what: (files that replace some of GOOD, or a list: all files; what is said)
    "empty folder": ([], ["there is no data set", "train/CLASS/*", "HMDB51", "UCF101",
                          "path,label"]),
    "one list only": ([("train.csv", csv("a.mp4,wave"))], ["there is no data set", "test.csv"]),
    "semicolons": ({"test.csv": "path;label\na.mp4;wave"}, ["test.csv", "path,label"]),
    "header only": ({"train.csv": csv()}, ["no training"]),
    "blank label": ({"train.csv": csv("a.mp4,wave", "b.mp4,  ")}, ["train.csv", "label"]),
    "not UTF-8": ({"train.csv": csv("a.mp4,grün").encode("latin-1")}, ["train.csv", "UTF-8"]),
    "test label that training lacks": ({"test.csv": csv("c.mp4,jump")}, ["jump", "1 class"]),
    "clip on both lists": ({"test.csv": csv("./a.mp4,wave")}, ["a.mp4", "both", "1 videos"]),
    "missing clips": ({"train.csv": csv("0.mp4,wave", "1.mp4,wave", "a.mp4,wave")},
                      ["2 of 4", "0.mp4", "1.mp4", "--allow-missing"]),
    "a folder for a clip": ({"d.mp4/x": "", "train.csv": csv("d.mp4,wave")}, ["1 of", "d.mp4"]),
    "no lists of HMDB51": ([(f"{HMDB_LISTS}/readme", ""), ("wave/a.avi", "")],
                           ["CLASS_test_split1.txt, one of the official lists, is missing"]),
    "no lists of UCF101": ([("ucfTrainTestlist/classInd.txt", "")], ["trainlist01.txt"]),
    "HMDB51 lacks a list": ([(f"{HMDB_LISTS}/wave_test_split1.txt", "a.avi 1\nb.avi 2"),
                             (f"{HMDB_LISTS}/clap_test_split2.txt", "c.avi 1"), ("wave/a.avi", ""),
                             ("wave/b.avi", "")],
                            ["clap_test_split1.txt, one of the official lists, is missing"]),
    "HMDB51, an empty list": ([(f"{HMDB_LISTS}/wave_test_split1.txt", "")], ["lists no video"]),
    "a NUL byte": ({"train.csv": csv("a\0.mp4,wave")}, ["1 of 2"]),
    # as a zip program may leave them
    "HMDB51 not UTF-8": ([(f"{HMDB_LISTS}/wave_test_split1.txt", b"a\xe9.avi 1\n"),
                          ("wave/a.avi", "")], ["wave"]),
    "two labels of a video": ({"train.csv": csv("a.mp4,wave", "./a.mp4,clap")},
                              ["a.mp4 is listed under two labels, clap and wave"]),
    "two spellings": ({"train.csv": csv("a.mp4,HandWave", "b.mp4,hand_wave", "c.mp4,wave")},
                      ["HandWave and hand_wave are two spellings"]),
    "a folder in a class folder": ([("train/wave/person/a.mp4", ""), ("test/wave/b.mp4", "")],
                                   ["wave/person is a folder within a class folder"]),
    "a video beside the class folders": ([("train/a.mp4", ""), ("test/wave/b.mp4", "")],
                                         ["train/a.mp4 lies in no class folder"]),
    "negative numbers": ({"train.csv": csv("a.mp4,-1", "b.mp4,1.5"), "test.csv": csv("c.mp4,-1")},
                         ["the labels are numbers"]),
    "pictures": ([("train/wave/1.jpg", ""), ("test/wave/b.mp4", "")],
                 ["1.jpg is a picture", "ffmpeg -i"]),
    # longer than a file system allows: OSError 36
    "too long a name": ({"train.csv": csv("a" * 300 + ",wave")}, ["1 of 2", "aaa"])}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_names_the_place_and_the_cure(tmp_path, what):
    files, said = BAD[what]
    fill(tmp_path, GOOD | files if isinstance(files, dict) else dict(files))
    with pytest.raises(BadInput) as caught:
        load_dataset(tmp_path)
    for part in (tmp_path.name, *said):
        assert part in str(caught.value)


def test_good_input_is_good_but_has_one_split(tmp_path):
    assert len(load_dataset(fill(tmp_path, GOOD)).train) == 2
    with pytest.raises(BadInput, match="there is no data set with a split 2"):
        load_dataset(tmp_path, 2)


def test_a_test_needs_no_training_list_and_may_have_other_classes(tmp_path):
    fill(tmp_path, GOOD | {"test.csv": csv("c.mp4,jump")})
    assert load_dataset(tmp_path, test_only=True).classes == ["clap", "jump", "wave"]
    (tmp_path / "train.csv").unlink()
    data = load_dataset(tmp_path, test_only=True)
    assert (data.classes, data.train, len(data.test)) == (["jump"], [], 1)
    assert data.warnings() == []


@pytest.mark.parametrize("data", ["no/such/folder", "Toy", "a.mp4"])
def test_unknown_folder_lists_the_formats(tmp_path, monkeypatch, data):
    monkeypatch.chdir(fill(tmp_path, clips=["a.mp4"]))
    with pytest.raises(BadInput, match=r"no such folder.*toy.*HMDB51.*path,label.*train/CLASS"):
        load_dataset(data)


def test_allow_missing_goes_on_and_notes_what_was_missing(tmp_path):
    fill(tmp_path, GOOD | {"train.csv": csv("a.mp4,wave", "gone.mp4,clap")})
    data = load_dataset(tmp_path, allow_missing=True)
    assert data.missing == [str(tmp_path / "gone.mp4")]
    assert data.train == [(str(tmp_path / "a.mp4"), 1)]
    assert data.classes == ["clap", "wave"]  # the classes stay those of the list
    data.undecodable["x.mp4"] = "cut off"
    gone, untrained, bad = data.warnings()
    assert "1 listed videos are missing" in gone
    assert str(tmp_path / "gone.mp4") in gone
    assert "1 classes have no training video" in untrained
    assert "clap" in untrained
    assert "x.mp4" in bad
    (tmp_path / "c.mp4").unlink()
    with pytest.raises(BadInput, match=r"no test video, and 2 .*missing"):
        load_dataset(tmp_path, allow_missing=True)


def test_copies_of_training_videos_in_the_test_are_noted(tmp_path):
    files = {"a.mp4": "one", "b.mp4": "two", "c.mp4": "two"}  # of one size
    data = load_dataset(fill(tmp_path, GOOD | files))
    assert data.copies == [str(tmp_path / "c.mp4")]
    assert data.warnings() == [f"1 test videos are copies of training videos: {tmp_path}/c.mp4"]
    assert not load_dataset(fill(tmp_path, {"c.mp4": "six"})).copies
    assert not load_dataset(fill(tmp_path, {"a.mp4": "", "c.mp4": ""})).copies


# ---- parts of a data set -------------------------------------------------------------------------


def test_digest_is_that_of_the_clips_wherever_they_lie(tmp_path):
    home = tmp_path / "here" / "data" / "set"
    first = load_dataset(fill(home, GOOD)).digest()
    assert load_dataset(fill(tmp_path / "there" / "data" / "set", GOOD)).digest() == first
    for change in ({"a.mp4": "longer"}, {"train.csv": csv("a.mp4,wave", "b.mp4,run")},
                   {"train.csv": csv("a.mp4,wave")}):
        assert load_dataset(fill(home, GOOD | change)).digest() != first


def test_hold_out_takes_its_share_of_every_class(toy):
    data = load_dataset(toy)
    rest, held = common.hold_out_videos(data, .25, seed=3)
    assert np.bincount([label for _, label in held]).tolist() == [2] * 6
    assert sorted(rest.train + held) == sorted(data.train)
    assert (rest.test, rest.classes) == (data.test, data.classes)
    assert common.hold_out_videos(data, .25, seed=3)[1] == held
    assert common.hold_out_videos(data, .25, seed=4)[1] != held
    assert np.bincount([label for _, label in common.hold_out_videos(data, .999)[0].train]).all()


@pytest.mark.parametrize("released", ["HMDB51", "UCF101"])
def test_clips_of_one_source_video_are_held_out_together(shared, released):
    """On the official lists: no held-out video has a sibling in training."""
    if released == "HMDB51":
        lists = (shared / "splits" / HMDB_LISTS).glob("*_test_split1.txt")
        lines = [(line.split()[0], path.name) for path in lists
                 for line in path.read_text().splitlines() if line.split()[-1] == "1"]
    else:
        path = shared / "splits" / "ucfTrainTestlist" / "trainlist01.txt"
        lines = [(line.split()[0], line.split("/")[0]) for line in path.read_text().splitlines()]
    classes = sorted({name for _, name in lines})
    videos = [(path, classes.index(name)) for path, name in lines]
    data, held_out = common.hold_out_videos(common.VideoLists("", classes, videos, []), .2)
    assert .19 * len(videos) < len(held_out) < .3 * len(videos)
    sources = [{(common.source_video(path), label) for path, label in rows}
               for rows in (data.train, held_out)]
    assert not sources[0] & sources[1]
    assert len(sources[1]) < .7 * len(held_out)  # the names are understood: sources have siblings
    assert {label for _, label in data.train} == set(range(len(classes)))


def test_few_shot_keeps_so_many_of_every_class(toy):
    data = load_dataset(toy)
    few = common.subsample_shots(data, 3, seed=1)
    assert np.bincount([label for _, label in few.train]).tolist() == [3] * 6
    assert set(few.train) <= set(data.train)
    assert (few.name, few.test) == (f"{data.name}-shots3", data.test)
    assert common.subsample_shots(data, 0) is data
    assert common.subsample_shots(data, 3, seed=1) == few != common.subsample_shots(data, 3, seed=2)
    with pytest.raises(BadInput, match="--shots 9: growing has only 8 training videos"):
        common.subsample_shots(data, 9)


def test_noisy_labels_are_wrong_in_their_share_of_training_alone(toy):
    data = load_dataset(toy)
    noisy = common.corrupt_labels(data, .25, seed=1)
    pairs = list(zip(data.train, noisy.train, strict=True))
    assert all(old[0] == new[0] for old, new in pairs)
    assert sum(old != new for old, new in pairs) == round(.25 * len(pairs))
    assert (noisy.name, noisy.test) == (f"{data.name}-noise0.25", data.test)
    assert common.corrupt_labels(data, 0) is data
    assert common.corrupt_labels(data, .25, seed=1) == noisy
    assert common.corrupt_labels(data, .25, seed=2) != noisy
    assert all(old[1] != new[1] for old, new in
               zip(data.train, common.corrupt_labels(data, 1).train, strict=True))
