"""Clips in, networks out: what every method of this repository needs before the method starts.

The contract: this file holds data loading and model builders and nothing else. It trains nothing,
logs nothing, reads no flags and knows nothing of the roles that networks play in a method.
(One exception: the toy CLIP is trained where it is built, because that stands in for a download.)

Sections: errors | toy clips | data sets | RGB decoding | compressed decoding | loaders | CLIP and
ActionCLIP builders | exit networks

Axis letters, here and in all scripts:
    B clips   T frames of a clip that a network sees   C H W channels, height, width of a frame
    D width of an embedding   K classes   N frames that a file holds   V windows of a clip
    S segments of a compressed clip   E exits of a network
"""
import contextlib
import csv
import difflib
import functools
import inspect
import json
import logging
import multiprocessing
import os
import re
import shutil
import sys
import warnings
import zlib
from bisect import bisect_left, bisect_right
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision
from av.codec.context import Flags2
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter
from open_clip.transformer import QuickGELU, Transformer
from torch import nn
from torchvision.transforms.v2 import functional as TF

# ---- errors --------------------------------------------------------------------------------------


class BadInput(ValueError):
    """The caller can mend it. The message says what was wrong, where, and what would be right."""


class BadVideo(Exception):
    """A file that cannot be decoded; PyAV's many errors become this one. Has .path and .reason."""

    def __init__(self, path, reason):
        super().__init__(str(path), reason)  # both arguments, so that it can be pickled
        self.path, self.reason = str(path), reason


# ---- toy clips -----------------------------------------------------------------------------------
# An action is a motion, and one frame does not tell it: place and size at the middle of a clip are
# drawn the same way for every action. Shape and colour vary freely; the scene goes with the action
# in half of the training clips and with nothing in the test clips of split 1; split 2 has the same
# training clips, and every action of its test in the usual scene of another: a test of scene bias.
# For the compressed scripts a class pairs a shape with a motion: each stream sees a part of that.
# For tests on unseen classes there are the diagonals: their words are put together of trained ones.

MOTIONS = {  # words -> direction of (x, y, log radius)
    "moving left": (-1, 0, 0), "moving right": (1, 0, 0), "moving up": (0, -1, 0),
    "moving down": (0, 1, 0), "growing": (0, 0, 1), "shrinking": (0, 0, -1)}
DIAGONALS = {f"moving {down} and to the {across}": (x, y, 0)
             for down, y in (("up", -1), ("down", 1)) for across, x in (("left", -1), ("right", 1))}
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (60, 80, 240),
           "yellow": (235, 220, 40), "purple": (180, 50, 210), "white": (245, 245, 245)}
SCENES = ("stripes", "checks", "dots", "plain ground")


def toy_truth(rng, motion, scene):
    """Draw at random what a toy clip shows: plain values, from which toy_clip draws it. Place and
    radius at mid clip and the way it moves (speed: per clip) are in sides of the picture."""
    return {"motion": motion, "scene": scene, "shape": str(rng.choice(SHAPES)),
            "colour": str(rng.choice(list(COLOURS))), "x": rng.uniform(.38, .62),
            "y": rng.uniform(.38, .62), "radius": rng.uniform(.13, .19),
            "speed": rng.uniform(.8, 1.1), "phase": list(rng.random(2))}


def toy_caption(truth):
    """What the still shows, in words: "a red circle at the top left on stripes"."""
    across = ["left", "", "right"][int(truth["x"] > .42) + int(truth["x"] > .58)]
    down = ["top", "", "bottom"][int(truth["y"] > .42) + int(truth["y"] > .58)]
    place = f"{down} {across}".strip() or "centre"
    return f"a {truth['colour']} {truth['shape']} at the {place} on {truth['scene']}"


def draw_toys(truths, x, y, radius, pixels):
    """Draw B stills, one per truth, with the object at x, y and of that radius, (B,) in sides.

    -> uint8 (B, pixels, pixels, 3), and bool (B, pixels, pixels): where the object is
    """
    shape, colour, scene = (np.array([list(names).index(truth[key]) for truth in truths])
                            for key, names in
                            (("shape", SHAPES), ("colour", COLOURS), ("scene", SCENES)))
    phase, each = np.array([truth["phase"] for truth in truths], np.float32), np.arange(len(truths))
    row, column = (np.mgrid[:pixels, :pixels].astype(np.float32) + .5) / pixels
    p, q = (column + phase[:, :1, None]) * 8 % 1, (row + phase[:, 1:, None]) * 8 % 1
    scenes = np.stack([p < .5 + 0 * q, (p < .5) ^ (q < .5), np.hypot(p - .5, q - .5) < .3, p < -1])
    ground = np.where(scenes[scene, each], 110, 70)
    u, v = ((a - b[:, None, None]) / radius[:, None, None] for a, b in ((column, x), (row, y)))
    square = np.maximum(abs(u), abs(v))
    shapes = np.stack([u * u + v * v < 1, square < .85, (v < .8) & (v > 2.4 * abs(u) - 1.1),
                       (np.minimum(abs(u), abs(v)) < .35) & (square < 1)])
    inside = shapes[shape, each]
    paint = np.array(list(COLOURS.values()), np.float32)[colour][:, None, None]
    shade = .85 + .15 * np.sin(5 * u) * np.sin(5 * v)  # so that motion shows inside, too
    return np.where(inside[..., None], paint * shade[..., None],
                    ground[..., None]).astype(np.uint8), inside


def toy_clip(truth, frames=16, pixels=64):
    """Draw a clip -> uint8 (N, pixels, pixels, 3), and its true motion, float32 (N, pixels, pixels,
    2): the way (x, y) in pixels that what is seen at a pixel has come since the frame before; 0 on
    the ground and in the first frame."""
    time = np.linspace(-.5, .5, frames, dtype=np.float32) * truth["speed"]
    dx, dy, grow = (MOTIONS | DIAGONALS)[truth["motion"]]
    x, y = truth["x"] + .5 * dx * time, truth["y"] + .5 * dy * time
    radius = truth["radius"] * np.exp(grow * time)
    video, inside = draw_toys([truth] * frames, x, y, radius, pixels)
    at = np.stack(np.meshgrid(*[np.arange(pixels, dtype=np.float32) + .5] * 2), -1)
    centre = np.stack([x, y], -1)[:, None, None] * pixels
    before = centre[:-1] + (at - centre[1:]) * (radius[:-1] / radius[1:])[:, None, None, None]
    motion = np.zeros((frames, pixels, pixels, 2), np.float32)
    motion[1:] = (at - before) * inside[1:, ..., None]
    return video, motion


def write_video(path, frames, fps=24, codec="mpeg4", pix_fmt="yuv420p", **options):
    """Encode uint8 frames (N, H, W, 3): I and P frames, an I-frame every 12, fine quantisation.
    options, strings, go to the codec and replace these."""
    options = {"g": "12", "bf": "0", "qmin": "2", "qmax": "4", **options}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def make_toy_folder(folder, train=1200, test=300, seed=0, pairs=False, motions=tuple(MOTIONS)):
    """Draw and encode toy clips into `folder`: train1.csv, test1.csv, train2.csv, test2.csv (see
    above), truth.json and the clips. pairs: split 1 alone, circles and crosses, the classes "circle
    moving left", ...; the clips larger and longer, with vectors for blocks of 8 pixels."""
    rng, truths = np.random.default_rng(seed), {}
    parts = [("train", train, ("train1", "train2")), ("test", test, ("test1",)),
             ("swapped", test, ("test2",))]
    for part, count, lists in [("train", train, ("train1",)), parts[1]] if pairs else parts:
        (folder / part).mkdir(parents=True)
        rows = [("path", "label")]
        for i in range(count):
            action = i % len(motions)
            scene = SCENES[(action + 2 * (part == "swapped")) % len(SCENES)]
            if part == "test" or (part == "train" and rng.random() >= .5):
                scene = str(rng.choice(SCENES))
            rows.append((f"{part}/{i:04d}.mp4", motions[action]))
            truth = truths[rows[-1][0]] = toy_truth(rng, rows[-1][1], scene)
            if pairs:
                truth["shape"] = ("circle", "cross")[i // len(motions) % 2]
                rows[-1] = rows[-1][0], f"{truth['shape']} {truth['motion']}"
                write_video(folder / rows[-1][0], toy_clip(truth, 24, 96)[0], flags="+mv4")
            else:
                write_video(folder / rows[-1][0], toy_clip(truth)[0])
        for name in lists:
            with open(folder / f"{name}.csv", "w", newline="") as file:
                csv.writer(file).writerows(rows)
    (folder / "truth.json").write_text(json.dumps(truths, indent=0))


TOYS = {"toy": {}, "toy-pairs": {"train": 900, "test": 240, "pairs": True},  # for make_toy_folder
        "toy-diagonals": {"train": 2000, "test": 500, "motions": (*MOTIONS, *DIAGONALS)}}


def cached(cache, name, make, *sources):
    """Path of a file or folder in the cache; where it is missing, make(path) makes it.

    The name carries a digest of its sources, functions and values, so that an old one is never
    taken for new. It is made under another name and renamed: a kill leaves nothing half-made.
    """
    code = "".join(inspect.getsource(s) if callable(s) else repr(s) for s in sources)
    path = Path(cache) / f"{name}-{zlib.crc32(code.encode()):08x}"
    if not path.exists():
        print(f"making {path}, once ...", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"part-{os.getpid()}-{path.name}")
        try:
            make(part)
            with contextlib.suppress(OSError):  # another process was first
                part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            part.unlink(missing_ok=True)
    return path


# ---- data sets -----------------------------------------------------------------------------------


class VideoData(NamedTuple):
    """train, test: lists of (path, class index); classes: K names in words, for prompts; missing:
    listed clips that do not exist."""
    name: str
    classes: list
    train: list
    test: list
    missing: list


FORMATS = ("the formats are: HMDB51 as released (testTrainMulti_7030_splits/ beside class "
           "folders), UCF101 as released (ucfTrainTestlist/ beside class folders or UCF-101/), "
           "train1.csv + test1.csv or train.csv + test.csv (header path,label), "
           "train/CLASS/* + test/CLASS/*")


def words(name):
    """A folder's name in words: ApplyEyeMakeup -> apply eye makeup, brush_hair -> brush hair."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name).lower()


def read_data(data, split=1, allow_missing=False, cache="runs/cache", toys="toy"):
    """Read the lists of a data set: `toy`, or a folder in one of FORMATS. -> VideoData

    split: 1, 2 or 3, where there are several. Labels come from class names, never from ids in a
    list. allow_missing: go on without listed clips that do not exist. toys: what `toy` is, one of
    TOYS. Raises BadInput for an unknown format, missing clips, an empty list, a class without
    training clips (so a test label that training lacks) and a clip on both lists.
    """
    root = Path(data)
    if data == "toy":
        root = cached(cache, toys, functools.partial(make_toy_folder, **TOYS[toys]), TOYS[toys],
                      make_toy_folder, toy_truth, toy_clip, draw_toys, write_video, MOTIONS,
                      DIAGONALS, SHAPES, COLOURS, SCENES)
    if not root.is_dir():
        raise BadInput(f"--data {data}: no such folder; name a folder, or `toy`; {FORMATS}")
    lists = [[root / f"{part}{number}.csv" for part in ("train", "test")] for number in (split, "")]
    lists = next((pair for pair in lists if all(map(Path.is_file, pair))), None)
    if (root / "testTrainMulti_7030_splits").is_dir():
        rows = _hmdb_rows(root, root / "testTrainMulti_7030_splits", split)
    elif (root / "ucfTrainTestlist").is_dir():
        rows = _ucf_rows(root, root / "ucfTrainTestlist", split)
    elif lists and (split == 1 or lists[0].name != "train.csv"):
        rows = [_csv_rows(root, path) for path in lists]
    elif split == 1 and (root / "train").is_dir() and (root / "test").is_dir():
        rows = [_folder_rows(root / part) for part in ("train", "test")]
    else:
        held = ", ".join(sorted(path.name for path in root.iterdir())[:4]) or "nothing"
        raise BadInput(f"--data {data}: no data set with a split {split} is recognised there (it "
                       f"holds {held}); {FORMATS}")
    return _checked("toy" if data == "toy" else root.resolve().name, root, *rows, allow_missing)


def _hmdb_rows(root, lists, split):
    rows, files = ([], []), sorted(lists.glob(f"*_test_split{split}.txt"))
    if not files:
        raise BadInput(f"{lists} lacks CLASS_test_split{split}.txt, HMDB51's official lists")
    folders = [file.name.rsplit("_", 2)[0] for file in files]  # brush_hair_test_split1.txt
    home = root if any((root / folder).is_dir() for folder in folders) else root / "hmdb51_org"
    for file, folder in zip(files, folders, strict=True):
        for line in file.read_text(errors="replace").splitlines():
            clip, _, part = line.strip().rpartition(" ")
            if clip and part in ("1", "2"):  # 1 training, 2 test, 0 neither
                rows[int(part) - 1].append((home / folder / clip, words(folder)))
    return rows


def _ucf_rows(root, lists, split):
    home = root / "UCF-101" if (root / "UCF-101").is_dir() else root
    files = [lists / f"{part}list0{split}.txt" for part in ("train", "test")]
    if not all(map(Path.is_file, files)):
        raise BadInput(f"{lists} lacks {files[0].name} or {files[1].name}, UCF101's official lists")
    clips = [[line.split()[0] for line in file.read_text(errors="replace").splitlines()
              if line.strip()] for file in files]
    return [[(home / clip, words(clip.split("/")[0])) for clip in part] for part in clips]


def _csv_rows(root, path):
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *lines = csv.reader(file)
        header = [cell.strip() for cell in header]
        at = header.index("path"), header.index("label")
    except (ValueError, csv.Error) as error:  # empty, not UTF-8, another header
        raise BadInput(f"{path}: no UTF-8 list whose first line is path,label ({error})") from None
    rows = [[line[i].strip() if i < len(line) else "" for i in at] for line in lines if line]
    for number, row in enumerate(rows, start=1):
        if not all(row):
            raise BadInput(f"{path}: clip {number} lacks its path or its label")
    return [(root / clip, label) for clip, label in rows]


def _folder_rows(folder):
    rows = []
    for home in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        clips = sorted(p for p in home.iterdir() if p.is_file() and not p.name.startswith("."))
        if not clips:
            raise BadInput(f"{home} holds no clip; put some there or remove the folder")
        rows += [(clip, words(home.name)) for clip in clips]
    return rows


def _checked(name, root, train, test, allow_missing):
    classes = sorted({label for _, label in train + test})
    bare = sorted({label for _, label in test} - {label for _, label in train})
    both = {path for path, _ in train} & {path for path, _ in test}
    missing = [str(path) for path, _ in train + test if not os.path.isfile(path)]
    if bare and train:
        raise BadInput(f"{root}: {len(bare)} classes of the test list have no training clip, first "
                       f"{', '.join(bare[:3])}; add some or take the class off the list")
    if both:
        raise BadInput(f"{root}: {len(both)} clips are listed both for training and for testing, "
                       f"first {min(both)}")
    if missing and not allow_missing:
        raise BadInput(f"{root}: {len(missing)} of {len(train) + len(test)} listed clips are "
                       f"missing, first {', '.join(missing[:3])}; --allow-missing goes on without")
    ids, gone = {label: i for i, label in enumerate(classes)}, set(missing)
    train, test = ([(str(path), ids[label]) for path, label in rows if str(path) not in gone]
                   for rows in (train, test))
    if not (train and test):
        raise BadInput(f"{root}: no {'test' if train else 'training'} clips"
                       + (f", since {len(missing)} listed clips are missing" if missing else ""))
    return VideoData(name, classes, train, test, missing)


def split_unseen(data, count, seed=0):
    """Keep `count` classes, chosen by the seed, out of training, to ask later what a model makes of
    words that it was never trained on. Of the toy clips only diagonals are chosen.

    -> the other classes and their clips, labels counted anew, and {"unseen": clips of the chosen
    classes, to be told among these, "unseen_all": the same, to be told among all}; count 0: data,
    {}. Raises BadInput where fewer than two classes would be left on either side."""
    if not count:
        return data, {}
    able = [name for name in data.classes if name in DIAGONALS] or data.classes
    most = min(len(able), len(data.classes) - 2)
    if not 2 <= count <= most:
        raise BadInput(f"--unseen {count}: of {data.name} 2 to {most} classes can be held out")
    unseen = sorted(np.random.default_rng([seed, 4]).choice(able, count, replace=False).tolist())
    seen = [name for name in data.classes if name not in unseen]

    def part(chosen, classes, *parts):
        """Clips of the chosen classes, to be told among `classes`."""
        train, test = ([(path, classes.index(data.classes[label])) for path, label in clips
                        if data.classes[label] in chosen] for clips in parts)
        return data._replace(name=f"{data.name}-unseen{count}", classes=classes, train=train,
                             test=test)

    return part(seen, seen, data.train, data.test), {
        "unseen": part(unseen, unseen, [], data.test),
        "unseen_all": part(unseen, data.classes, [], data.test)}


# ---- RGB decoding --------------------------------------------------------------------------------


def segment_indices(count, frames, rng=None):
    """TSN sampling: one frame of each of T equal segments -> T sorted indices into N=count frames.

    With rng a random frame of each segment (training), without it the middle one (test). A clip of
    fewer than T frames repeats some.
    """
    i = np.arange(frames)
    if rng is None and count <= frames:
        return i * count // frames
    if rng is None:
        return (i * count / frames + (count / frames - 1) / 2).astype(int)
    if count <= frames:
        return np.sort(np.concatenate([np.arange(count), rng.integers(count, size=frames - count)]))
    return rng.integers(i * count // frames, (i + 1) * count // frames)


def dense_indices(count, frames, rng=None, views=1):
    """Dense sampling as in TSM and Text4Vis: windows of 128 frames, stride 128 // T -> (V, T).

    With rng one window at a random start (training), without it `views` windows evenly spaced (one:
    the middle). Indices are taken modulo N=count: a shorter clip starts over.
    """
    last = max(0, count - 128)
    starts = [last // 2] if views == 1 else np.linspace(0, last, views).astype(int)
    starts = starts if rng is None else [rng.integers(last + 1)]
    return (np.array(starts)[:, None] + np.arange(frames) * max(1, 128 // frames)) % count


@contextlib.contextmanager
def open_video(path, **options):
    """Open a file for decoding, or a stream with av.open's options for it -> (container, video
    stream). PyAV's errors become BadVideo."""
    try:
        # HMDB51 has a file whose metadata are not UTF-8
        with av.open(str(path), metadata_errors="replace", **options) as container:
            covers = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams or container.format.name == "tty":  # FFmpeg draws a .txt as ANSI art
                raise BadVideo(path, "no video stream")
            stream = streams[0]
            if stream.codec_context is None:
                raise BadVideo(path, "its codec is unknown")
            stream.thread_count = 1  # loader workers are the threads
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else "no readable video"
        raise BadVideo(path, f"{what} ({type(error).__name__})") from error


class VideoIndex(NamedTuple):
    """pts: sorted timestamps (N,), or None where they cannot be trusted; keys: positions of the
    keyframes; count: N; unfit: why read_compressed cannot use it, or ""."""
    pts: np.ndarray | None
    keys: np.ndarray
    count: int
    unfit: str = ""


@functools.lru_cache(maxsize=100_000)
def video_index(path):
    """Timestamps and keyframes of a file, from its packets, without decoding. -> VideoIndex

    N counts the frames that the container declares, so that a file that was cut off is noticed when
    a frame of the lost part is wanted. Raises BadVideo.
    """
    with open_video(path) as (container, stream):
        packets = [p for p in container.demux(stream) if p.size or p.pts is not None]
        avi = container.format.name == "avi"
        vague = container.format.name.startswith("mpeg")  # seeks in TS and PS land anywhere
        coder, declared = stream.codec_context, stream.frames
        name, reorders, head = coder.codec.canonical_name, coder.has_b_frames, coder.extradata
    held = [p for p in packets if p.size and not p.is_discard]
    if not held:
        raise BadVideo(path, "the video stream holds no frame")
    pts = [p.pts for p in held]
    lost = declared - len(packets)
    if avi and None not in pts and len(pts) > 1:  # pts number the chunks; dropped frames have none
        lost = (declared - 1 - max(pts)) // max(1, int(np.median(np.diff(sorted(pts)))))
    count, given = len(held) + max(0, lost), [t for t in pts if t is not None]
    kinds = {picture[1][0] >> 6 for p in held if name == "mpeg4"  # I, P, B, S
             for picture in re.finditer(b"\0\0\1\xb6(.)", bytes(p), re.S)}
    several = name == "h264" and _references(head or b"") not in (0, 1)
    unfit = f"codec {name} exports no motion vectors" if name not in MOTION_CODECS else \
        "it has B-frames" if 2 in kinds or given != sorted(given) else \
        "it has global motion compensation" if 3 in kinds else \
        "its P-frames may refer to several frames" if several else ""
    if vague or None in pts or len(set(pts)) < len(pts) or (reorders and pts == sorted(pts)):
        # raw streams have no timestamps, AVI has none that fit B-frames: HMDB51 is full of these
        return VideoIndex(None, np.zeros(1, int), count, unfit)
    keys = np.searchsorted(np.sort(pts), sorted(p.pts for p in held if p.is_keyframe))
    keys = np.union1d([0], keys)  # 0: a start between keyframes
    return VideoIndex(np.sort(pts), keys, count, unfit)


def _decode(path, indices, export=None):
    """Open, seek and decode, in one pass -> (None, frame) for each frame that is decoded, and then
    (i, frame) again where it is the one wanted at i. Seeks only where a keyframe lies between the
    last decoded frame and the wanted one. export: have motion vectors exported, with these options
    of the decoder. Raises BadVideo."""
    index, at, frame = video_index(str(path)), -1, None
    if not 0 <= min(indices) <= max(indices) < index.count:
        raise BadVideo(path, f"it has {index.count} frames, none for all of {list(indices)}")
    with open_video(path) as (container, stream):
        if export is not None:
            stream.codec_context.flags2 |= Flags2.export_mvs  # before anything is decoded
            stream.codec_context.options = export
        decoder = container.decode(stream)
        for i in sorted(set(map(int, indices))):
            key = int(index.keys[max(0, bisect_right(index.keys, i) - 1)])
            if index.pts is not None and key > at + 1:
                container.seek(int(index.pts[key]), stream=stream)
                decoder, at, frame = container.decode(stream), key - 1, None
            while at < i:
                new = next(decoder, None)
                if new is not None:
                    trusted = index.pts is not None and new.pts is not None
                    frame, at = new, bisect_left(index.pts, new.pts) if trusted else at + 1
                    yield None, frame
                elif frame is not None and index.count - 1 - at <= 2:
                    at = index.count - 1  # the last frame stands in for one that never comes
                else:
                    raise BadVideo(path, f"frame {i} of {index.count} is wanted, but decoding ends "
                                         f"after frame {at}: cut off or damaged")
            if at > i and index.pts is not None and new is not None:
                raise BadVideo(path, f"frame {i} of {index.count} is wanted, but frame {at} comes "
                                     f"in its place: cut off or damaged")
            yield i, frame


def to_picture(frame, side=None, converter=None):
    """A decoded frame -> uint8 (H, W, 3), RGB, upright; side: as in read_frames."""
    size = frame.width, frame.height
    scaled = [max(1, round(a * side / min(size))) for a in size] if side else size
    picture = (converter or VideoReformatter()).reformat(
        frame, *scaled, "rgb24", threads=1, interpolation=Interpolation.BICUBIC).to_ndarray()
    return np.rot90(picture, round(frame.rotation / 90))


def read_frames(path, indices, side=None):
    """Decode the frames at `indices` (any order, repeats allowed) -> uint8 (T, 3, H, W).

    side: the shorter side in pixels, resized (bicubic) while converting to RGB; None keeps the
    size. Rotation flags are honoured. Raises BadVideo, also where the file ends before a wanted
    frame (but for two: decoders swallow some at the end of a packed AVI) and where the frame size
    changes.
    """
    converter, pictures, shape = VideoReformatter(), {}, None
    for i, frame in _decode(path, indices):
        if i is None:
            continue
        size = frame.width, frame.height
        if size != (shape := shape or size):
            raise BadVideo(path, f"the frame size changes from {shape} to {size}")
        pictures[i] = to_picture(frame, side, converter)
    return torch.from_numpy(np.stack([pictures[int(i)] for i in indices])).permute(0, 3, 1, 2)


# ---- compressed decoding -------------------------------------------------------------------------
# A P-frame t is stored as vectors, a block of 8 or 16 pixels each, and what they leave over. Traced
# back through the P-frames to the I-frame of its group of pictures (GOP), vector by vector,
#     A_t(p) = A_{t-1}(p - v_t(p)),  A_0(p) = p,  MV_t(p) = p - A_t(p),  R_t(p) = F_t(p) - I(A_t(p))
# after CoViAR (Wu et al., CVPR 2018), but: vectors keep their quarters of a pixel, where CoViAR
# cuts them to whole ones; a track that leaves the picture goes on from its border, as decoders do,
# where CoViAR leaves that pixel unmoved; I is read between pixels (bilinear). As there, a block
# without a vector (intra coded) counts as still: the residual holds what is new in it.

MOTION_CODECS = ("mpeg4", "h264", "mpeg1video", "mpeg2video", "h263", "flv1")
VECTORS = np.dtype({  # FFmpeg's AVMotionVector; (dst_x, dst_y) is the centre of the block
    "names": ["source", "w", "h", "src_x", "src_y", "dst_x", "dst_y", "x", "y", "scale"],
    "formats": ["i4", "u1", "u1", "i2", "i2", "i2", "i2", "i4", "i4", "u2"],
    "offsets": [0, 4, 5, 6, 8, 10, 12, 24, 28, 32], "itemsize": 40})


def _references(extradata):
    """How many frames an H.264 stream may refer to, from its sequence parameter set (ITU-T H.264,
    7.3.2.1.1), or None where that is not found."""
    found = re.search(rb"[\x27\x47\x67](.{3,}?)(?=\0\0\1|$)", extradata, re.S)
    if not found:
        return None
    sps = found[1].replace(b"\0\0\3", b"\0\0")
    bits, at = "".join(f"{byte:08b}" for byte in sps) + "1" * 64, 24  # profile, flags, level

    def skip(count):  # that many bits
        nonlocal at
        at += count
        return int(bits[at - count:at] or "0", 2)

    def golomb():
        zeros = bits.index("1", at) - at
        return skip(2 * zeros + 1) - 1

    golomb()
    if sps[0] in (100, 110, 122, 244, 44, 83, 86, 118, 128, 134, 135, 138, 139):
        skip(1 if golomb() == 3 else 0)
        golomb(), golomb(), skip(1)
        if skip(1):
            return None  # scaling matrices
    golomb()
    order = golomb()
    if order == 0:
        golomb()
    elif order == 1:
        skip(1), golomb(), golomb(), [golomb() for _ in range(golomb())]
    return golomb()


def p_frames(path):
    """Positions of the frames that have motion -> (P,): all but I-frames, of a file that may have
    no others all of them. Raises BadVideo."""
    index = video_index(str(path))
    found = np.setdiff1d(np.arange(index.count), index.keys)
    return found if len(found) else np.arange(index.count)


class Coded(NamedTuple):
    """S frames of a clip as they are stored: their I-frames and they themselves, decoded, uint8
    (S, 3, H, W), or None; motion: int16 (S, 2, h, w), x and y in quarters of a pixel, at every 4th
    pixel; size: (H, W)."""
    intra: torch.Tensor | None
    frame: torch.Tensor | None
    motion: torch.Tensor
    size: tuple


def read_compressed(path, indices, pictures=True, whole=False, step=4):
    """Decode the frames at `indices` with their I-frames and the motion between the two, MV above,
    in one pass over each GOP -> Coded. The motion of an I-frame is 0.

    pictures=False: motion alone, and the decoder leaves out what only pictures need. whole: cut
    vectors to whole pixels as CoViAR does. step: trace every step-th pixel, from the middle of a
    step x step block. Raises BadVideo as read_frames does, and for what VideoIndex.unfit names,
    interlaced and rotated frames: re-encode these.
    """
    if why := video_index(str(path)).unfit:
        raise BadVideo(path, f"{why}: re-encode it")
    convert, seen, vectors, shape, intra = VideoReformatter(), {}, [], None, None
    export = {} if pictures else {"skip_idct": "all", "skip_loop_filter": "all"}
    for i, frame in _decode(path, indices, export):
        if i is not None:
            seen[i] = list(vectors), *[
                convert.reformat(f, format="rgb24", threads=1).to_ndarray() for f in (intra, frame)
                if pictures]
            continue
        size = frame.height, frame.width
        if size != (shape := shape or size):
            raise BadVideo(path, f"the frame size changes from {shape[::-1]} to {size[::-1]}")
        odd = [what for what, found in (
            ("a B-frame", frame.pict_type == PictureType.B), ("rotated", frame.rotation),
            ("interlaced", frame.interlaced_frame)) if found]
        if odd:
            raise BadVideo(path, f"a frame in it is {odd[0]}: re-encode it")
        if frame.pict_type == PictureType.I:  # wherever the encoder put one
            intra, vectors = frame, []
        elif intra is None:
            raise BadVideo(path, "no I-frame stands where its motion starts: re-encode it")
        else:  # frame.side_data would make a reference cycle
            held = SideDataContainer(frame).get("MOTION_VECTORS")
            vectors.append(b"" if held is None else bytes(held))
    vectors, *held = zip(*[seen[int(i)] for i in indices], strict=True)
    held = [torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2) for part in held] or [None, None]
    motion = _trace(vectors, *shape, whole, step)
    if motion is None:
        raise BadVideo(path, "a vector points forward in time (B-frames): re-encode it")
    return Coded(*held, torch.from_numpy(motion), shape)


def _trace(samples, H, W, whole, step):
    """MV of S samples, each the vectors of its P-frames as bytes, oldest first -> int16 (S, 2, h,
    w) in quarters of a pixel. None where a vector points forward in time."""
    frames = [(s, j, part) for s, parts in enumerate(samples) for j, part in enumerate(parts[::-1])]
    rows = np.frombuffer(b"".join(part for _, _, part in frames), VECTORS)
    if (rows["source"] > 0).any():
        return None
    S, J = len(samples), max(map(len, samples))  # all vectors onto a grid of 8-pixel cells at once
    h8, w8 = -(-H // 8) + 1, -(-W // 8) + 1      # and one more, for blocks that reach out
    count = [len(part) // VECTORS.itemsize for _, _, part in frames]
    origin = np.repeat(np.array([(j * S + s) * h8 * w8 for s, j, _ in frames], int), count)
    w, h = rows["w"].copy(), rows["h"].copy()    # 8 or 16; (h >> 1) keeps their 8 bits
    cell = origin + ((rows["dst_y"] - (h >> 1)) >> 3) * np.int32(w8)
    cell += (rows["dst_x"] - (w >> 1)) >> 3
    wide, high = np.flatnonzero(w > 8), np.flatnonzero(h > 8)
    both = wide[h.take(wide) > 8]
    reach = [(i, cell.take(i) + more) for i, more in ((wide, 1), (high, w8), (both, w8 + 1))]
    per_pixel = np.int16(4 // max(1, int(rows["scale"][0]))) if len(rows) else 1
    field = np.zeros((2, J * S * h8 * w8), np.int16)
    for cells, axis in zip(field, "xy", strict=True):
        v = (rows[f"src_{axis}"] - rows[f"dst_{axis}"]) * np.int16(4) if whole else \
            rows[axis].astype(np.int16) * per_pixel
        cells[cell] = v
        for i, others in reach:
            cells[others] = v.take(i)
    y, x = np.mgrid[0:-(-H // step), 0:-(-W // step)].astype(np.int16) * step + step // 2
    start = np.stack([np.minimum(x, W - 1), np.minimum(y, H - 1)]) * np.int16(4) + 2
    x, y = ends = np.repeat(start.reshape(2, 1, -1), S, 1)                      # (S, h*w) each
    at = np.empty(x.shape, np.intp)
    for v_x, v_y in zip(*field.reshape(2, J, S, h8 * w8), strict=True):
        np.multiply(y >> 5, w8, out=at)
        at += x >> 5
        for s in range(S):
            x[s] += v_x[s].take(at[s])
            y[s] += v_y[s].take(at[s])
        x.clip(2, 4 * W - 2, out=x)
        y.clip(2, 4 * H - 2, out=y)
    return (start[:, None] - ends.reshape(2, S, *start.shape[1:])).swapaxes(0, 1)


def modalities(coded, step=4):
    """Coded -> mv float (S, 2, H, W), in pixels; r, F - I(A), float (S, 3, H, W), whole numbers of
    -255..255; i uint8 (S, 3, H, W). Exactly: F = round(warp(i, mv)) + r. Without pictures: mv."""
    H, W = coded.size
    mv = coded.motion.repeat_interleave(step, -1).repeat_interleave(step, -2)[..., :H, :W] / 4
    if coded.frame is None:
        return (mv,)
    return mv, coded.frame - warp(coded.intra, mv).round(), coded.intra


def warp(i, mv):
    """I(A): i (S, 3, H, W) read at p - mv(p), mv (S, 2, H, W) in pixels. -> float (S, 3, H, W)"""
    H, W = i.shape[-2:]
    y, x = torch.meshgrid(torch.arange(H, device=i.device), torch.arange(W, device=i.device),
                          indexing="ij")
    at = torch.stack([(2 * (x - mv[:, 0]) + 1) / W - 1, (2 * (y - mv[:, 1]) + 1) / H - 1], -1)
    return F.grid_sample(i.float(), at, padding_mode="border", align_corners=False)


def compressed_view(clips, size, rngs=None, mirror=None, scales=(1, .875, .75)):
    """What the three networks see of B clips, cropped and flipped as one -> {"mv": (B, S, 2, size,
    size), pixels / 40, cut to -.5 and .5; "r": (B, S, 3, size, size), -1..1; "i": the same, 0..1}

    rngs, a numpy generator per clip, and mirror, a bool per clip: training, a square of `scales`
    times the shorter side, anywhere; flip p .5, which negates mv's x. Without: the middle square.
    """
    out = []
    for n, coded in enumerate(clips):
        mv, *pictures = modalities(coded)
        video = torch.cat([(mv / 40).clamp(-.5, .5), *(part / 255 for part in pictures)], 1)
        H, W = coded.size
        side = min(H, W)
        top, left = (H - side) // 2, (W - side) // 2
        if rngs:
            side = max(1, int(side * rngs[n].choice(scales)))
            top, left = int(rngs[n].integers(H - side + 1)), int(rngs[n].integers(W - side + 1))
        video = TF.resized_crop(video, top, left, side, side, [size, size], antialias=True)
        if rngs and rngs[n].random() < .5 and mirror[n]:
            video = video.flip(-1)
            video[:, 0] = -video[:, 0]
        out.append(video)
    parts = torch.stack(out).tensor_split((2, 5), 2)
    return {name: part.contiguous() for name, part in zip(("mv", "r", "i"), parts, strict=True)
            if part.numel()}


def reencode_video(path, out):
    """Write a video as CoViAR has it, MPEG-4 part 2, 340 x 256, an I-frame every 12 frames, no
    B-frames, quantiser 1, to `out`, a path or a file object. -> number of frames written, and lost.
    Frame by frame at a constant rate; a rotation flag is carried out. Raises BadVideo."""
    count, written, lost = video_index(str(path)).count, 0, 0
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25, options={
            "g": "12", "bf": "0", "qmin": "1", "qmax": "1"})
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        try:
            for i, frame in _decode(path, range(count)):
                if i is not None:
                    continue
                if frame.rotation:
                    turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(turned), "rgb24")
                frame = frame.reformat(340, 256, "yuv420p", threads=1)
                frame.pts, frame.time_base, frame.pict_type = written, Fraction(1, 25), 0
                container.mux(stream.encode(frame))
                written += 1
        except BadVideo:
            if not written:
                raise
            lost = count - written
        except (av.FFmpegError, ValueError) as error:  # a pixel format that cannot be converted
            raise BadVideo(path, f"cannot be re-encoded ({type(error).__name__})") from error
        container.mux(stream.encode(None))
    return written, lost


def _reencode_file(path, out):
    out.parent.mkdir(parents=True, exist_ok=True)
    part, remark = out.with_name(f"{out.name}.part"), ""
    try:
        written, lost = reencode_video(path, str(part))
        if lost:
            remark = f"{path}: damaged, only {written} of {written + lost} frames are in the copy"
    except BadVideo as error:
        shutil.copyfile(path, part)
        if path.suffix not in (".csv", ".txt", ".json"):
            remark = f"{path}: copied as it is: {error.reason}"
    part.rename(out)
    return remark


def reencode(folder, target=None, workers=None):
    """Copy a data set into CoViAR's form (see reencode_video) -> folder of the copy, by default
    FOLDER-mpeg4. Paths stay the same, so lists and class folders hold; whatever is no video is
    copied as it is, and so is a video that cannot be decoded, with a word on stderr: it will count
    as wrong. The source is only read. Files that the copy has are left unless they are older.
    Raises BadInput where one folder lies in the other."""
    folder, target = Path(folder).resolve(), Path(target or f"{folder}-mpeg4").resolve()
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    if folder.is_relative_to(target) or target.is_relative_to(folder):
        raise BadInput(f"{folder} cannot be re-encoded into {target}: one lies in the other")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    pairs = [(path, target / path.relative_to(folder)) for path in paths]
    todo = [(path, out) for path, out in pairs
            if not out.exists() or out.stat().st_mtime < path.stat().st_mtime]
    if todo:
        print(f"re-encoding {len(todo)} files of {folder} into {target} ...", file=sys.stderr)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for remark in pool.map(_reencode_file, *zip(*todo, strict=True)):
                if remark:
                    print(remark, file=sys.stderr)
    return target


# ---- loaders -------------------------------------------------------------------------------------
# Whatever is random about a clip in an epoch comes from a generator seeded by (seed, epoch, index):
# it does not depend on the number of workers or processes, nor on a resume.


class Sample(NamedTuple):
    """video: uint8 (V*T, 3, H, W) or Coded, None where none can be decoded; label: class index;
    key: (epoch, index); bad: [(path, reason)] of the clips that failed on the way. A batch is a
    Sample of lists: clips differ in shape until they are cropped."""
    video: torch.Tensor | Coded | None
    label: int
    key: tuple
    bad: list


class Clips(torch.utils.data.Dataset):
    """Decodes the clip of a key (epoch, index) -> Sample.

    clips: list of (path, class index). frames: T or S. side: shorter side in pixels. sampling:
    `tsn`, `dense`, this with `views` windows at test, or `coded`, a P-frame of each of S segments.
    train: random frames (jitter=False: those of the test), and another clip takes the place of one
    that cannot be decoded.
    """

    def __init__(self, clips, frames, side=None, sampling="tsn", views=1, train=False, seed=0,
                 jitter=True):
        self.clips, self.frames, self.side, self.train = clips, frames, side, train
        self.sampling, self.views, self.seed, self.jitter = sampling, views, seed, jitter

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        epoch, i = key
        rng, bad = np.random.default_rng([self.seed, epoch, i]), []
        while True:
            path, label = self.clips[i]
            try:
                count, draw = video_index(path).count, rng if self.train and self.jitter else None
                if self.sampling == "coded":
                    found = p_frames(path)
                    indices = found[segment_indices(len(found), self.frames, draw)]
                    return Sample(read_compressed(path, indices), label, key, bad)
                indices = segment_indices(count, self.frames, draw) if self.sampling == "tsn" \
                    else dense_indices(count, self.frames, draw, self.views).ravel()
                return Sample(read_frames(path, indices, self.side), label, key, bad)
            except BadVideo as error:
                bad.append((error.path, error.reason))
                if not self.train or len(bad) > 20:
                    return Sample(None, label, key, bad)
                i = int(rng.integers(len(self.clips)))


class ClipOrder(torch.utils.data.Sampler):
    """Batches of keys (epoch, index). Training: shuffled anew each epoch (set .epoch), and whole
    batches only. Testing: every clip once. batch counts the clips of all processes."""

    def __init__(self, count, batch, train=False, seed=0, rank=0, world=1):
        self.count, self.batch, self.train, self.seed = count, batch, train, seed
        self.rank, self.world, self.epoch = rank, world, 0

    def __len__(self):
        return self.count // self.batch if self.train else -(-self.count // self.batch)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.count) if self.train else np.arange(self.count)
        for start in range(0, len(self) * self.batch, self.batch):
            mine = order[start:start + self.batch][self.rank::self.world]
            if len(mine):
                yield [(self.epoch, int(i)) for i in mine]


def _collate(samples):
    return Sample(*map(list, zip(*samples, strict=True)))


def clip_loader(clips, batch, workers=0, rank=0, world=1):
    """DataLoader over Clips; its batches are Samples of lists. Set .batch_sampler.epoch."""
    order = ClipOrder(len(clips), batch, clips.train, clips.seed, rank, world)
    return torch.utils.data.DataLoader(
        clips, batch_sampler=order, num_workers=workers, persistent_workers=workers > 0,
        collate_fn=_collate, pin_memory=torch.cuda.is_available())


def note_bad(bad, batch, clips):
    """Keep book of clips that cannot be decoded: `bad` {path: reason} takes in those of a batch,
    new ones are named on stderr. Raises BadInput when they are more than ten and more than 1 % of
    the clips, or when training finds no other clip to take a place."""
    for path, reason in (pair for found in batch.bad for pair in found):
        if path not in bad:
            print(f"cannot decode {path}: {reason}", file=sys.stderr)
        bad[path] = reason
    stuck = clips.train and any(video is None for video in batch.video)
    if stuck or len(bad) > max(10, .01 * len(clips)):
        raise BadInput(f"{len(bad)} of {len(clips)} clips cannot be decoded, the last one "
                       f"{list(bad)[-1]}; mend them or take them off the list")


def centre_crop(videos, size):
    """Test view, the middle square. List of uint8 (T, 3, H, W) -> float (B, T, 3, size, size) in
    0..1"""
    return torch.stack([TF.center_crop(video, [size, size]) for video in videos]).float() / 255


def augment(videos, size, rngs, mirror, scales=(1, .875, .75, .66)):
    """Training view as in ActionCLIP, but drawn once per clip: flicker is not in the video.

    A crop whose height and width are of `scales` times the shorter side, resized bilinearly; flip
    p .5 where mirror allows it (see mirrors); colour jitter p .8 (.4, .4, .2, .1); grey p .2.
    videos: list of uint8 (T, 3, H, W); rngs: numpy generators, one per clip; mirror: bool per clip.
    -> float (B, T, 3, size, size) in 0..1
    """
    out = []
    for video, rng, may_flip in zip(videos, rngs, mirror, strict=True):
        H, W = video.shape[-2:]
        first = int(rng.integers(len(scales)))  # the other side is at most one step away
        second = int(np.clip(first + rng.integers(-1, 2), 0, len(scales) - 1))
        h, w = (max(1, int(min(H, W) * scales[s])) for s in (first, second))
        top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
        video = TF.resized_crop(video, top, left, h, w, [size, size], antialias=True).float() / 255
        if rng.random() < .5 and may_flip:
            video = video.flip(-1)
        if rng.random() < .8:
            video = TF.adjust_brightness(video, rng.uniform(.6, 1.4))
            video = TF.adjust_contrast(video, rng.uniform(.6, 1.4))
            video = TF.adjust_saturation(video, rng.uniform(.8, 1.2))
            video = TF.adjust_hue(video, rng.uniform(-.1, .1))
        if rng.random() < .2:
            video = TF.rgb_to_grayscale(video, num_output_channels=3)
        out.append(video)
    return torch.stack(out)


def mirrors(classes):
    """For each class: may its clips be flipped? Not where its words tell left from right."""
    return [not re.search(r"(?<![a-z])(left|right)(?![a-z])", name.lower()) for name in classes]


# ---- CLIP and ActionCLIP builders ----------------------------------------------------------------


def _towers(D, width, layers, patch, width_t, heads_t, layers_t, size=224, context=77, **more):
    return (D, {"image_size": size, "width": width, "layers": layers, "patch_size": patch, **more},
            {"context_length": context, "width": width_t, "heads": heads_t, "layers": layers_t})


CLIPS = {  # name: (D, image tower, text tower), from wkcn/TinyCLIP; all but the toys at 224 pixels
    "TinyCLIP-ViT-39M-16-Text-19M": _towers(512, 512, 12, 16, 512, 8, 6),
    "TinyCLIP-ViT-8M-16-Text-3M": _towers(512, 256, 10, 16, 256, 4, 3),
    "TinyCLIP-ResNet-30M-Text-29M": _towers(1024, 56, [3, 4, 6, 3], None, 512, 8, 9),
    "TinyCLIP-ResNet-19M-Text-19M": _towers(1024, 44, [3, 4, 6, 3], None, 512, 8, 6),
    "TinyCLIP-ViT-61M-32-Text-29M": _towers(512, 640, 12, 32, 512, 8, 9),
    "TinyCLIP-ViT-40M-32-Text-19M": _towers(512, 512, 12, 32, 512, 8, 6),
    "toy-large": _towers(64, 64, 3, 16, 64, 4, 1, 32, 20, head_width=16),
    "toy-small": _towers(48, 48, 2, 16, 48, 3, 1, 32, 20, head_width=16),
    "toy-fine": _towers(64, 96, 3, 8, 64, 4, 1, 32, 20, head_width=16)}  # sees scenes best


def build_clip(spec, cache="runs/cache"):
    """Build a CLIP from NAME[:WEIGHTS] -> (clip, tokenizer, what read_weights found or {}).

    NAME: one of CLIPS or a name that open_clip knows. WEIGHTS: a tag of open_clip's (`openai`,
    `laion2b_s34b_b79k`, ...), a file that read_weights knows, or `random`. Without it the toy CLIPs
    come pre-trained from the cache; any other is random, and stderr says so. The activation goes
    with the weights (QuickGELU for OpenAI's, GELU for TinyCLIP's and LAION-2B's; mixing them loads
    without a word and costs accuracy) or, for a bare file, with NAME: clip.quick_gelu tells. So do
    mean and std of the pixels. Loads strictly. Raises BadInput.
    """
    name, _, weights = spec.partition(":")
    if name not in CLIPS and name not in open_clip.list_models():
        near = difflib.get_close_matches(name, [*CLIPS, *open_clip.list_models()], n=3, cutoff=0)
        raise BadInput(f"unknown model {name}; " + (
            f"of the TinyCLIPs these six can be built: {', '.join(list(CLIPS)[:6])}"
            if "tinyclip" in name.lower() else f"the nearest names are {', '.join(near)}"))
    path, saved = weights if Path(weights).is_file() else None, {}
    tags = [] if name in CLIPS else open_clip.list_pretrained_tags_by_model(name)
    tag = open_clip.get_pretrained_cfg(name, weights) if weights in tags and not path else {}
    if not weights and name.startswith("toy-"):
        path = cached(cache, name, functools.partial(_train_toy_clip, name), _train_toy_clip,
                      draw_toys, toy_truth, toy_caption, CLIPS[name])
    elif not weights:
        print(f"{name}: RANDOM WEIGHTS, since no :WEIGHTS were named", file=sys.stderr)
    elif not path and not tag and weights != "random":
        raise BadInput(f"{spec}: {weights} is no file, and no tag of {name}; " + (
            f"its tags are {', '.join(tags)}" if tags else "TinyCLIP's files are released on the "
            "page `checkpoints` of github wkcn/TinyCLIP-model-zoo"))
    if path:
        saved = read_weights(path)
    quick_gelu = saved.get("quick_gelu", tag.get("quick_gelu"))
    if name in CLIPS:
        D, vision, text = CLIPS[name]
        clip = open_clip.CLIP(D, vision, text, quick_gelu=bool(quick_gelu))
        open_clip.set_model_preprocess_cfg(clip, {
            "size": vision["image_size"], "mean": open_clip.OPENAI_DATASET_MEAN,
            "std": open_clip.OPENAI_DATASET_STD})
        tokenizer = open_clip.SimpleTokenizer(context_length=text["context_length"])
    else:
        if quick_gelu is None:
            quick_gelu = open_clip.get_model_config(name).get("quick_gelu", False)
        kin = tag or (open_clip.get_pretrained_cfg(name, tags[0]) if tags else {})
        file = f"{name}{'-quickgelu' * (quick_gelu and not name.endswith('-quickgelu'))}:FILE"
        with _open_clip(spec, file):
            clip = open_clip.create_model(name, quick_gelu=quick_gelu, force_preprocess_cfg={
                key: kin[key] for key in ("mean", "std") if key in kin})
            tokenizer = open_clip.get_tokenizer(name)
            if tag:
                open_clip.load_checkpoint(clip, open_clip.download_pretrained(tag))
    clip.quick_gelu = bool(quick_gelu)
    if path:
        load_strictly(clip, open_clip.convert.convert_state_dict(clip, saved["clip"]), path, name)
    return clip, tokenizer, saved


@contextlib.contextmanager
def _open_clip(spec, file):
    logging.disable(logging.CRITICAL)  # it logs each retry of a download, and warns of what we mend
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise BadInput(f"{spec} needs a package that is not installed: {error}") from error
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise BadInput(f"{spec}: open_clip cannot fetch or build it here: {reason}. Without a "
                       f"network, download the weights elsewhere and say {file}") from error
    finally:
        logging.disable(logging.NOTSET)


def read_weights(path):
    """Read a file of weights -> {"clip": state, ...}, whichever of these it is:

    - {"state_dict": {"module.visual...": ...}} (TinyCLIP, open_clip), or the bare tensors
    - OpenAI's TorchScript archive; adds quick_gelu=True
    - ActionCLIP's {"model_state_dict", "fusion_model_state_dict"}; adds fusion=state and
      quick_gelu=True. Our checkpoints are such files, and say quick_gelu and more themselves.
    Raises BadInput for a missing file or another format.
    """
    more = {}
    try:
        try:
            state = open_clip.factory.load_state_dict(str(path))
        except RuntimeError:
            state = torch.jit.load(path, map_location="cpu").state_dict()
            more = {"quick_gelu": True}
            for key in ("input_resolution", "context_length", "vocab_size"):
                state.pop(key, None)
        if "model_state_dict" in state:
            more = {"quick_gelu": True, **{k: v for k, v in state.items() if "state" not in k}}
            more["fusion"] = _bare(state["fusion_model_state_dict"])
            state = _bare(state["model_state_dict"])
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise TypeError("other things than tensors in it")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as error:
        raise BadInput(f"{path} is no file of weights in a format that is known here "
                       f"({type(error).__name__})") from error
    return {"clip": state, **more}


def _bare(state):
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_strictly(module, state, path, name):
    """module.load_state_dict(state); where the two do not fit, BadInput says in what."""
    own, got = ({key: tuple(value.shape) for key, value in tensors.items()}
                for tensors in (module.state_dict(), state))
    wrong = [key for key in sorted(own.keys() | got.keys()) if own.get(key) != got.get(key)]
    if wrong:
        first, absent = wrong[0], "absent"
        raise BadInput(f"{path} does not fit {name}: {len(wrong)} tensors differ, first {first}: "
                       f"{got.get(first, absent)} in the file, {own.get(first, absent)} wanted")
    module.load_state_dict(state)


def _train_toy_clip(name, path, steps=300, batch=128):
    """In place of a download: train a toy CLIP as CLIP was trained, on toy stills with captions."""
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip, tokenizer, _ = build_clip(f"{name}:random")
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3, weight_decay=.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        truths = [toy_truth(rng, "growing", str(rng.choice(SCENES))) for _ in range(batch)]
        for truth in truths:
            truth |= {"x": rng.uniform(.15, .85), "y": rng.uniform(.15, .85),
                      "radius": rng.uniform(.1, .25)}
        place = (np.array([truth[key] for truth in truths]) for key in ("x", "y", "radius"))
        stills = torch.from_numpy(draw_toys(truths, *place, 32)[0]).permute(0, 3, 1, 2) / 255
        image = clip.encode_image(TF.normalize(stills, clip.visual.image_mean,
                                               clip.visual.image_std), normalize=True)
        text = clip.encode_text(tokenizer(list(map(toy_caption, truths))), normalize=True)
        logits, target = clip.logit_scale.exp() * image @ text.T, torch.arange(batch)
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    torch.save({"state_dict": clip.state_dict()}, path)


PROMPTS = (  # ActionCLIP's 16 templates
    "a photo of action {}", "a picture of action {}", "Human action of {}", "{}, an action",
    "{} this is an action", "{}, a video of action", "Playing action of {}", "{}",
    "Playing a kind of action, {}", "Doing a kind of action, {}", "Look, the human is {}",
    "Can you recognize the action of {}?", "Video classification of {}", "A video of {}",
    "The man is {}", "The woman is {}")


class FusionHead(nn.Module):
    """ActionCLIP's `Transf`: frame embeddings f (B, T, D) -> video embedding (B, D)

        x = f + pos[0..T-1];  x = transformer(x), 6 pre-LN blocks, no mask;  out = mean_t(x + f)

    Names and shapes are those of the official checkpoints, and so is the init of .02. Beside frame
    embeddings that are not normalised, positions of that size are nearly nothing: from there the
    head sees the axis of a motion long before its direction, with the accuracy at one half. The toy
    CLIPs, narrow and soon trained, start from larger values (see build_action_clip).

    token: a learned token with a position of its own goes in front of the frames. What becomes of
    it, z_0 + mean_t f_t, and the output above are normalised and averaged (see deit_video.py).
    """

    def __init__(self, width, heads, layers=6, std=.02, position_std=.02, token=False):
        super().__init__()
        self.frame_position_embeddings = nn.Embedding(77, width)
        self.transformer = Transformer(width, layers, heads, act_layer=QuickGELU,
                                       norm_layer=functools.partial(nn.LayerNorm, eps=1e-12))
        for module in self.modules():
            if isinstance(module, nn.Linear):  # attention's in-projection is none: it stays xavier
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.frame_position_embeddings.weight, std=position_std)
        self.token = nn.Parameter(position_std * torch.randn(width)) if token else None
        self.token_position = nn.Parameter(position_std * torch.randn(width)) if token else None

    def forward(self, f):
        B, T, D = f.shape
        x = f + self.frame_position_embeddings.weight[:T]    # (B, T, D)
        if self.token is None:
            return (self.transformer(x) + f).mean(1)         # (B, D)
        x = torch.cat([(self.token + self.token_position).expand(B, 1, D), x], 1)
        z = self.transformer(x)                              # (B, 1 + T, D)
        return (F.normalize(z[:, 0] + f.mean(1), dim=-1)
                + F.normalize((z[:, 1:] + f).mean(1), dim=-1)) / 2


class MeanHead(nn.Module):
    """ActionCLIP's `meanP`: (B, T, D) -> (B, D), blind to the order of frames."""

    def forward(self, f):
        return f.mean(1)


class ActionCLIP(nn.Module):
    """A CLIP and a fusion head: videos and texts -> embeddings of one space, not normalised.

    size: side of the square frames; width: D. Pixels are normalised in here, each CLIP's own way.
    """

    def __init__(self, clip, tokenizer, fusion_layers=6, std=.02, position_std=.02, token=False):
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer
        self.size = int(np.max(clip.visual.image_size))
        with torch.no_grad():
            self.width = clip.encode_text(tokenizer([""]), normalize=False).shape[-1]
        for name, value in (("mean", clip.visual.image_mean), ("std", clip.visual.image_std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        norm = getattr(getattr(clip, "text", clip), "ln_final", None)  # as wide as the text tower
        heads = max(1, (self.width if norm is None else norm.weight.numel()) // 64)
        heads = heads if self.width % heads == 0 else max(1, self.width // 64)
        self.fusion = FusionHead(self.width, heads, fusion_layers, std, position_std, token) \
            if fusion_layers else MeanHead()
        if getattr(clip, "logit_bias", None) is not None:
            clip.logit_bias.requires_grad_(False)  # SigLIP's; nothing here reads it

    def encode_frames(self, video):
        """(B, T, 3, S, S) in 0..1 -> (B, T, D)"""
        pixels = ((video - self.mean) / self.std).flatten(0, 1)
        f = self.clip.encode_image(pixels, normalize=False)  # (B*T, D); CoCa's default is True
        return f.unflatten(0, video.shape[:2])

    def encode_video(self, video):
        """(B, T, 3, S, S) in 0..1 -> (B, D)"""
        return self.fusion(self.encode_frames(video))

    def encode_text(self, tokens):
        """(..., L) token ids -> (..., D)"""
        texts = [self.clip.encode_text(part, normalize=False)
                 for part in tokens.flatten(0, -2).split(512)]
        return torch.cat(texts).unflatten(0, tokens.shape[:-1])

    def prompts(self, classes):
        """K class names -> token ids (16, K, L), template-major."""
        return torch.stack([self.tokenizer([prompt.format(name) for name in classes])
                            for prompt in PROMPTS])

    def forward(self, video, tokens):
        """-> video (B, D), text (B, D), and the scale s = exp(logit_scale)"""
        return self.encode_video(video), self.encode_text(tokens), self.clip.logit_scale.exp()


def build_action_clip(spec, fusion_layers=6, cache="runs/cache", token=False):
    """ActionCLIP on the backbone NAME[:WEIGHTS] (see build_clip); fusion_layers=0: MeanHead. Where
    WEIGHTS is an ActionCLIP checkpoint, its fusion head is loaded too, with the token if it has
    one. Raises BadInput."""
    clip, tokenizer, saved = build_clip(spec, cache)
    std, position_std = (.1, .5) if spec.startswith("toy-") else (.02, .02)
    token = "token" in saved["fusion"] if "fusion" in saved else token
    model = ActionCLIP(clip, tokenizer, fusion_layers, std, position_std, token)
    if "fusion" in saved:
        load_strictly(model.fusion, saved["fusion"], spec.partition(":")[2],
                      f"a fusion head of {fusion_layers} layers")
    return model


# ---- exit networks -------------------------------------------------------------------------------


def _toy_resnet():
    """ResNet with a block a stage and an eighth of ResNet-18's width."""
    block = torchvision.models.resnet.BasicBlock
    net = torchvision.models.ResNet(block, [1, 1, 1, 1])
    net.conv1, net.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
    net.inplanes = 16
    for i in range(4):
        setattr(net, f"layer{i + 1}", net._make_layer(block, 16 * 2 ** i, 1, stride=1 + (i > 0)))
    net.fc = nn.Linear(128, 1)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


class ExitNet(nn.Module):
    """The network of one modality, cut where its exits sit: behind layer1, 2 and 3 of a ResNet; its
    own classifier is exit 4. mv and r start with a BatchNorm, i with ImageNet's mean and std.

    name: `toy` or any ResNet of torchvision (ResNeXt and Wide ResNet are such, too). imagenet:
    torchvision's weights, but for the classifier and mv's first layer. Raises BadInput.
    """

    def __init__(self, modality, name, classes, imagenet=False):
        super().__init__()
        models = torchvision.models
        known = [n for n in models.list_models(models) if re.match(r"(wide_)?resne(t|xt)\d", n)]
        if name != "toy" and name not in known:
            raise BadInput(f"unknown network {name}; there are toy, {', '.join(known)}")
        if imagenet and name == "toy":
            raise BadInput("the toy network has no ImageNet weights")
        try:
            net = _toy_resnet() if name == "toy" else models.get_model(
                name, weights="DEFAULT" if imagenet else None)
        except OSError as error:  # no network
            url = models.get_model_weights(name).DEFAULT.url
            raise BadInput(f"{name}: cannot fetch its weights ({error}); put {url} into "
                           f"{torch.hub.get_dir()}/checkpoints") from error
        self.modality, self.name = modality, name
        self.input = nn.BatchNorm2d(2 if modality == "mv" else 3) if modality != "i" else None
        if modality == "mv":
            net.conv1 = nn.Conv2d(2, net.conv1.out_channels, 7, 2, 3, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.fc = nn.Linear(net.fc.in_features, classes)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layers = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.fc = net.fc

    def stages(self, x):
        """x (B, S, C, H, W) of compressed_view -> yields the feature maps behind layer1 to 4, each
        (B*S, c, h, w); a caller who stops early spares the rest."""
        x = x.flatten(0, 1)
        x = self.input(x) if self.input else TF.normalize(x, (.485, .456, .406),
                                                          (.229, .224, .225))
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
            yield x

    def classify(self, f, S):
        """The network's own logits from the map behind layer4: consensus, the mean of S segments.
        (B*S, c, h, w) -> (B, K)"""
        return self.fc(f.mean((2, 3))).unflatten(0, (-1, S)).mean(1)

    def forward(self, x):
        """x (B, S, C, H, W) -> the maps of exits 1 to 3, and the logits of exit 4, (B, K)"""
        *maps, last = self.stages(x)
        return maps, self.classify(last, x.shape[1])


class ExitHead(nn.Sequential):
    """An exit: Conv2d, BatchNorm2d, AdaptiveAvgPool2d(4), Linear, without any activation, as in the
    paper's code. (B*S, c, h, w), S -> consensus logits (B, K): what is linear commutes with the
    mean over segments, which therefore comes first."""

    def __init__(self, width, out, kernel, classes):
        super().__init__(nn.Conv2d(width, out, kernel, padding=1, bias=False), nn.BatchNorm2d(out),
                         nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * out, classes))

    def forward(self, f, S):
        conv, norm, *linear = self
        f = norm(conv(f)).unflatten(0, (-1, S)).mean(1)                         # (B, c, h, w)
        for layer in linear:
            f = layer(f)
        return f


def exit_heads(net, classes):
    """Exits 1 to 3 of an ExitNet, with the convolutions of the paper's code: for networks of basic
    blocks (ResNet-18) c to c, kernels 7, 3, 3; of bottlenecks (ResNet-50) 256 to 64, 512 to 256,
    1024 to 1024, kernels 3."""
    last = [layer[-1] for layer in net.layers[:3]]
    if hasattr(last[0], "conv3"):
        sizes = [(block.conv3.out_channels, part, 3) for block, part in zip(last, (4, 2, 1),
                                                                            strict=True)]
        sizes = [(width, width // part, kernel) for width, part, kernel in sizes]
    else:
        sizes = [(block.conv2.out_channels,) * 2 + (kernel,) for block, kernel in zip(
            last, (7, 3, 3), strict=True)]
    return nn.ModuleList(ExitHead(*size, classes) for size in sizes)


def exit_logits(net, heads, x):
    """The consensus logits (B, K) of exits 1 to 4 for x (B, S, C, H, W), one after the other: what
    lies behind an exit runs only when the next is asked for."""
    for k, f in enumerate(net.stages(x)):
        yield heads[k](f, x.shape[1]) if k < 3 else net.classify(f, x.shape[1])
