"""Clips in, networks out: what every method of this repository needs before the method starts.

The contract: this file holds data loading and model builders and nothing else. It trains nothing,
logs nothing, reads no flags and knows nothing of the roles that networks play in a method.
(One exception: the toy CLIP is trained where it is built, because that stands in for a download.)

Sections: errors | toy clips | data sets | RGB decoding | loaders | CLIP and ActionCLIP builders

Axis letters, here and in all scripts:
    B clips   T frames of a clip that a network sees   C H W channels, height, width of a frame
    D width of an embedding   K classes   N frames that a file holds   V windows of a clip
"""
import contextlib
import csv
import difflib
import functools
import inspect
import json
import logging
import os
import re
import shutil
import sys
import warnings
import zlib
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
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
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self):  # so that it crosses the border of a worker process
        return BadVideo, (self.path, self.reason)


# ---- toy clips -----------------------------------------------------------------------------------
# An action is a motion, and one frame does not tell it: place and size at the middle of the clip are
# drawn the same way for every action. Shape and colour vary freely; the scene goes with the action
# in half of the training clips and with nothing in the test clips.

MOTIONS = {  # words -> direction of (x, y, log radius)
    "moving left": (-1, 0, 0), "moving right": (1, 0, 0), "moving up": (0, -1, 0),
    "moving down": (0, 1, 0), "growing": (0, 0, 1), "shrinking": (0, 0, -1)}
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (60, 80, 240),
           "yellow": (235, 220, 40), "purple": (180, 50, 210), "white": (245, 245, 245)}
SCENES = ("stripes", "checks", "dots", "plain ground")


def draw_toys(shape, colour, scene, x, y, radius, phase, pixels):
    """Draw B pictures of one object in front of a scene.

    shape, colour, scene: (B,) indices into SHAPES, COLOURS, SCENES. x, y, radius: (B,) in sides of
    the picture. phase: (B, 2) shift of the scene. -> uint8 (B, pixels, pixels, 3) and where the
    object is, bool (B, pixels, pixels).
    """
    row, column = np.mgrid[:pixels, :pixels].astype(np.float32) / pixels + .5 / pixels
    p, q = (column + phase[:, :1, None]) * 8 % 1, (row + phase[:, 1:, None]) * 8 % 1
    scenes = np.stack([p < .5 + 0 * q, (p < .5) ^ (q < .5), np.hypot(p - .5, q - .5) < .3, p < -1])
    each = np.arange(len(x))
    ground = np.where(scenes[scene, each], 110., 70.)
    u, v = ((a - b[:, None, None]) / radius[:, None, None] for a, b in ((column, x), (row, y)))
    square = np.maximum(abs(u), abs(v))
    shapes = np.stack([u * u + v * v < 1, square < .85, (v < .8) & (v > 2.4 * abs(u) - 1.1),
                       (np.minimum(abs(u), abs(v)) < .35) & (square < 1)])
    inside = shapes[shape, each]
    paint = np.array(list(COLOURS.values()), np.float32)[colour][:, None, None]
    shade = (.85 + .15 * np.sin(5 * u) * np.sin(5 * v))[..., None]  # so that motion shows inside, too
    return np.where(inside[..., None], paint * shade, ground[..., None]).astype(np.uint8), inside


def toy_truth(rng, motion, scene):
    """Draw at random what a toy clip shows: a dict of plain values, from which toy_clip draws it."""
    return dict(motion=motion, scene=scene, shape=str(rng.choice(SHAPES)),
                colour=str(rng.choice(list(COLOURS))), x=rng.uniform(.38, .62), y=rng.uniform(.38, .62),
                radius=rng.uniform(.13, .19), speed=rng.uniform(.8, 1.1), phase=list(rng.random(2)))


def toy_caption(truth):
    """What a still shows, in words: "a red circle at the top left on stripes"."""
    places = [["left", "", "right"], ["top", "", "bottom"]]
    across, down = (names[int(truth[axis] > .42) + int(truth[axis] > .58)]
                    for names, axis in zip(places, "xy", strict=True))
    place = " ".join(filter(None, [down, across])) or "centre"
    return f"a {truth['colour']} {truth['shape']} at the {place} on {truth['scene']}"


def toy_path(truth, frames=16):
    """Place (x, y) and radius of the object in each frame of a clip, in sides: three arrays (N,)."""
    time = np.linspace(-.5, .5, frames, dtype=np.float32) * truth["speed"]
    dx, dy, grow = MOTIONS[truth["motion"]]
    return (truth["x"] + .5 * dx * time, truth["y"] + .5 * dy * time,
            truth["radius"] * np.exp(grow * time))


def toy_clip(truth, frames=16, pixels=64):
    """Draw the clip that `truth` describes -> uint8 (N, pixels, pixels, 3)."""
    index = [np.full(frames, list(names).index(truth[key])) for key, names in
             (("shape", SHAPES), ("colour", COLOURS), ("scene", SCENES))]
    phase = np.tile(np.float32(truth["phase"]), (frames, 1))
    return draw_toys(*index, *toy_path(truth, frames), phase, pixels)[0]


def toy_motion(truth, frames=16, pixels=64):
    """True motion of a toy clip: the way (x, y) in pixels that what is seen at a pixel has come since
    the frame before; 0 on the ground and in the first frame. -> float32 (N, pixels, pixels, 2)"""
    x, y, radius = toy_path(truth, frames)
    index = np.full(frames, SHAPES.index(truth["shape"]))
    inside = draw_toys(index, index, index, x, y, radius, np.zeros((frames, 2)), pixels)[1]
    at = np.stack(np.meshgrid(*[np.arange(pixels) + .5] * 2), -1)[None]
    centre = np.stack([x, y], -1)[:, None, None] * pixels
    scale = (radius[:-1] / radius[1:])[:, None, None, None]
    motion = np.zeros((frames, pixels, pixels, 2), np.float32)
    motion[1:] = (at - centre[:-1] - (at - centre[1:]) * scale) * inside[1:, ..., None]
    return motion


def write_video(path, frames, fps=24, codec="mpeg4", pix_fmt="yuv420p", **options):
    """Encode uint8 frames (N, H, W, 3): I and P frames, an I-frame every 12, fine quantisation.

    options go to the codec (strings) and replace these defaults.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={
            "g": "12", "bf": "0", "qmin": "2", "qmax": "4", **options})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def make_toy_folder(folder, train=1200, test=300, seed=0):
    """Draw and encode toy clips into `folder`: train.csv, test.csv, truth.json and the clips."""
    rng, truths = np.random.default_rng(seed), {}
    for part, count in (("train", train), ("test", test)):
        (folder / part).mkdir(parents=True)
        rows = [("path", "label")]
        for i in range(count):
            motion = list(MOTIONS)[i % len(MOTIONS)]
            usual = part == "train" and rng.random() < .5
            scene = SCENES[i % len(MOTIONS) % len(SCENES)] if usual else str(rng.choice(SCENES))
            name = f"{part}/{i:04d}.mp4"
            truths[name] = toy_truth(rng, motion, scene)
            write_video(folder / name, toy_clip(truths[name]))
            rows.append((name, motion))
        with open(folder / f"{part}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    (folder / "truth.json").write_text(json.dumps(truths, indent=0))


def cached(cache, name, make, *sources):
    """Path of a file or folder in the cache; where it is missing, make(path) makes it, once.

    Its name carries a digest of the functions that make it, so that an old one is never taken for
    new. It is made under another name first: a kill leaves nothing half-made behind.
    """
    code = "".join(inspect.getsource(s) if callable(s) else repr(s) for s in sources)
    stem, dot, suffix = name.partition(".")
    path = Path(cache) / f"{stem}-{zlib.crc32(code.encode()):08x}{dot}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"part-{os.getpid()}-{path.name}")
        try:
            make(part)
            part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return path


# ---- data sets -----------------------------------------------------------------------------------


class VideoData(NamedTuple):
    """Lists of (path, class index); classes are words for prompts; missing: clips not found."""
    name: str
    classes: list
    train: list
    test: list
    missing: list


FORMATS = """the formats are: HMDB51 as released (testTrainMulti_7030_splits/ beside class folders),
UCF101 as released (ucfTrainTestlist/ beside class folders or beside UCF-101/), train1.csv + test1.csv
or train.csv + test.csv (header path,label), train/CLASS/* + test/CLASS/*""".replace("\n", " ")


def words(name):
    """A folder's name in words: ApplyEyeMakeup -> apply eye makeup, brush_hair -> brush hair."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name).lower()


def read_data(data, split=1, allow_missing=False, cache="runs/cache"):
    """Read the lists of a data set: `toy`, or a folder whose format is recognised (see FORMATS).

    split: 1, 2 or 3, for formats that have several. Labels come from class names, never from ids
    in a list. allow_missing: go on without listed clips that do not exist.
    Raises BadInput for an unknown format, missing clips, an empty list, a class without training
    clips, a test label that training lacks, a clip on both lists.
    """
    name = Path(data).resolve().name
    if data == "toy":
        data = cached(cache, "toy", make_toy_folder, make_toy_folder, toy_truth, toy_clip, toy_path,
                      draw_toys, write_video, MOTIONS, SHAPES, COLOURS, SCENES)
        name = "toy"
    root = Path(data)
    if not root.is_dir():
        raise BadInput(f"--data {data}: no such folder; say toy, or a folder; {FORMATS}")
    hmdb, ucf = root / "testTrainMulti_7030_splits", root / "ucfTrainTestlist"
    lists = [[root / f"{part}{number}.csv" for part in ("train", "test")] for number in (split, "")]
    lists = next((pair for pair in lists if all(map(Path.is_file, pair))), None)
    if hmdb.is_dir():
        rows = _hmdb_rows(root, hmdb, split)
    elif ucf.is_dir():
        rows = _ucf_rows(root, ucf, split)
    elif lists:
        if split != 1 and lists[0].name == "train.csv":
            raise BadInput(f"--split {split}: {root} has one split only (train.csv, test.csv)")
        rows = [_csv_rows(root, path) for path in lists]
    elif (root / "train").is_dir() and (root / "test").is_dir():
        if split != 1:
            raise BadInput(f"--split {split}: {root} has one split only (train/, test/)")
        rows = [_folder_rows(root / part) for part in ("train", "test")]
    else:
        held = ", ".join(sorted(path.name for path in root.iterdir())[:4]) or "nothing"
        raise BadInput(f"--data {data}: no data set of split {split} recognised (it holds {held}); "
                       f"{FORMATS}")
    return _checked(name, root, *rows, allow_missing)


def _hmdb_rows(root, lists, split):
    rows = [], []
    files = sorted(lists.glob(f"*_test_split{split}.txt"))
    home = root if any((root / f.name.rsplit("_", 2)[0]).is_dir() for f in files) \
        else root / "hmdb51_org"
    for file in files:
        folder = file.name.rsplit("_", 2)[0]  # brush_hair_test_split1.txt
        for line in file.read_text().splitlines():
            clip, _, part = line.strip().rpartition(" ")
            if clip and part in ("1", "2"):  # 1 training, 2 test, 0 neither
                rows[int(part) - 1].append((home / folder / clip, words(folder)))
    return rows


def _ucf_rows(root, lists, split):
    rows = []
    for part in ("train", "test"):
        file = lists / f"{part}list0{split}.txt"
        if not file.is_file():
            raise BadInput(f"{file} is missing: UCF101's official lists have it")
        clips = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
        home = root / "UCF-101" if (root / "UCF-101").is_dir() else root
        rows.append([(home / clip, words(clip.split("/")[0])) for clip in clips])
    return rows


def _folder_rows(folder):
    rows = []
    for home in sorted(path for path in folder.iterdir() if path.is_dir()):
        clips = sorted(p for p in home.iterdir() if p.is_file() and not p.name.startswith("."))
        if not clips:
            raise BadInput(f"{home} holds no clip; put some there or remove the folder")
        rows += [(clip, words(home.name)) for clip in clips]
    return rows


def _csv_rows(root, path):
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *lines = csv.reader(file)
        at = header.index("path"), header.index("label")
    except ValueError as error:  # empty, not UTF-8, another header
        raise BadInput(f"{path}: not a UTF-8 list whose first line is path,label ({error})") from None
    rows = [[line[i] if i < len(line) else "" for i in at] for line in lines if line]
    for number, (clip, label) in enumerate(rows, start=2):
        if not clip or not label.strip():
            raise BadInput(f"{path}: row {number} lacks its path or its label")
    return [(root / clip, label.strip()) for clip, label in rows]


def _checked(name, root, train, test, allow_missing):
    classes = sorted({label for _, label in train + test})
    bare = sorted({label for _, label in test} - {label for _, label in train})
    both = {path for path, _ in train} & {path for path, _ in test}
    missing = [str(path) for path, _ in train + test if not path.is_file()]
    if bare and train:
        raise BadInput(f"{root}: {len(bare)} classes of the test list have no training clip, first "
                       f"{', '.join(bare[:3])}; add some or take the class off the list")
    if both:
        raise BadInput(f"{root}: {len(both)} clips are listed for training and for testing, "
                       f"first {min(both)}")
    if missing and not allow_missing:
        raise BadInput(f"{root}: {len(missing)} of {len(train) + len(test)} listed clips are missing, "
                       f"first {', '.join(missing[:3])}; --allow-missing goes on without them")
    gone = set(missing)
    train, test = ([row for row in rows if str(row[0]) not in gone] for rows in (train, test))
    for part, rows in (("training", train), ("test", test)):
        if not rows:
            raise BadInput(f"{root}: no {part} clips"
                           + (f" ({len(missing)} listed clips are missing)" if missing else ""))
    ids = {label: i for i, label in enumerate(classes)}
    return VideoData(name, classes, *([(str(path), ids[label]) for path, label in rows]
                                      for rows in (train, test)), missing)


# ---- RGB decoding --------------------------------------------------------------------------------


def segment_indices(count, frames, rng=None):
    """TSN sampling: one frame of each of T equal segments -> T sorted indices into N=count frames.

    With rng a random frame of each segment (training), without it the middle one (test). A clip of
    fewer than T frames repeats some.
    """
    i = np.arange(frames)
    if rng is None:
        return i * count // frames if count <= frames else \
            (i * count / frames + (count / frames - 1) / 2).astype(int)
    if count <= frames:
        return np.sort(np.concatenate([np.arange(count), rng.integers(count, size=frames - count)]))
    return rng.integers(i * count // frames, (i + 1) * count // frames)


def dense_indices(count, frames, rng=None, views=1):
    """Dense sampling as in TSM and Text4Vis: windows of 128 frames, stride 128 // T -> (V, T).

    With rng one window at a random start, without it `views` windows evenly spaced (one: the
    middle). Indices are taken modulo N=count, so a shorter clip starts over.
    """
    last = max(0, count - 128)
    starts = [rng.integers(last + 1)] if rng is not None else \
        np.linspace(0, last, views).astype(int) if views > 1 else [last // 2]
    return (np.array(starts)[:, None] + np.arange(frames) * (128 // frames)) % count


@contextlib.contextmanager
def open_video(path):
    """Open a file for decoding -> (container, video stream). PyAV's errors become BadVideo."""
    try:
        # HMDB51 holds a file whose metadata are not UTF-8
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise BadVideo(path, "no video stream")
            stream = container.streams.video[0]
            stream.thread_count = 1  # loader workers are the threads
            yield container, stream
    except FileNotFoundError:
        raise BadVideo(path, "no such file") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadVideo(path, f"not a readable video ({error.__class__.__name__})") from error


class VideoIndex(NamedTuple):
    """What one demux tells. pts: sorted timestamps (N,), or None where they cannot be trusted;
    keys: positions of the keyframes in it; count: N."""
    pts: np.ndarray | None
    keys: np.ndarray
    count: int


@functools.lru_cache(maxsize=100_000)
def video_index(path):
    """Timestamps and keyframes of a file, from its packets, without decoding. -> VideoIndex

    N counts the frames that the container declares, so that a file that was cut off is noticed when
    a frame of the lost part is wanted. Raises BadVideo.
    """
    with open_video(path) as (container, stream):
        packets = [p for p in container.demux(stream) if p.size or p.pts is not None]
        reorders, declared = stream.codec_context.has_b_frames, stream.frames
    held = [p for p in packets if p.size]  # AVI marks a dropped frame by an empty packet
    if not held:
        raise BadVideo(path, "the video stream holds no frame")
    count = len(held) + max(0, declared - len(packets))
    pts = [p.pts for p in held]
    if None in pts or len(set(pts)) < len(pts) or (reorders and pts == sorted(pts)):
        # raw streams have no timestamps; AVI has none that fit B-frames, and HMDB51 is full of these
        return VideoIndex(None, np.zeros(1, int), count)
    order = np.sort(pts)
    keys = np.searchsorted(order, sorted(p.pts for p in held if p.is_keyframe))
    return VideoIndex(order, keys, count)


def read_frames(path, indices, side=None):
    """Decode the frames at `indices` (any order, repeats allowed) -> uint8 (T, 3, H, W).

    side: length in pixels of the shorter side after resizing (bicubic, while converting to RGB);
    None keeps the size. Rotation flags are honoured. Seeks only where a keyframe lies between the
    last decoded frame and the wanted one. Raises BadVideo, also where the file ends before a wanted
    frame (two frames of grace: decoders swallow some at the end of a packed AVI) and where frames of
    one sample differ in size.
    """
    index, wanted = video_index(str(path)), sorted(set(map(int, indices)))
    pictures, at, frame, shape, converter = {}, -1, None, None, VideoReformatter()
    with open_video(path) as (container, stream):
        decoder = container.decode(stream)
        for i in wanted:
            key = int(index.keys[max(0, bisect_right(index.keys, i) - 1)])
            if index.pts is not None and key > at + 1:
                container.seek(int(index.pts[key]), stream=stream)
                decoder, at, frame = container.decode(stream), key - 1, None
            while at < i:
                new = next(decoder, None)
                if new is None:
                    if frame is None or index.count - 1 - at > 2:
                        raise BadVideo(path, f"frame {i} of {index.count} is wanted, but decoding ends "
                                             f"after {at + 1}: cut off or damaged")
                    at = index.count - 1  # frame stays the last one
                elif index.pts is None or new.pts is None:
                    frame, at = new, at + 1
                else:
                    frame, at = new, bisect_left(index.pts, new.pts)
            if shape not in (None, (frame.width, frame.height)):
                raise BadVideo(path, f"the frame size changes from {shape} to "
                                     f"{(frame.width, frame.height)}")
            shape = frame.width, frame.height
            scale = side / min(shape) if side else 1
            picture = converter.reformat(frame, *(max(1, round(a * scale)) for a in shape), "rgb24",
                                         interpolation=Interpolation.BICUBIC, threads=1).to_ndarray()
            pictures[i] = np.rot90(picture, frame.rotation // 90)
    return torch.from_numpy(np.stack([pictures[int(i)] for i in indices])).permute(0, 3, 1, 2)


# ---- loaders -------------------------------------------------------------------------------------
# Whatever is random about a clip in an epoch is drawn from a generator seeded by (seed, epoch, index
# of the clip), so it does not depend on the number of workers or processes, or on a resume.


class Clips(torch.utils.data.Dataset):
    """Decodes one clip for a key (epoch, index) of ClipOrder -> Sample.

    clips: list of (path, class index). frames: T. side: shorter side in pixels. sampling: `tsn` or
    `dense` (views: windows at test). train: random sampling; a clip that cannot be decoded is
    replaced by another one. In testing its video is None.
    """

    def __init__(self, clips, frames, side, sampling="tsn", views=1, train=False, seed=0):
        self.clips, self.frames, self.side, self.train = clips, frames, side, train
        self.sampling, self.views, self.seed = sampling, views, seed

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        epoch, i = key
        rng, bad = np.random.default_rng([self.seed, epoch, i]), []
        while True:
            path, label = self.clips[i]
            try:
                count, draw = video_index(path).count, rng if self.train else None
                indices = segment_indices(count, self.frames, draw) if self.sampling == "tsn" \
                    else dense_indices(count, self.frames, draw, self.views).ravel()
                return Sample(read_frames(path, indices, self.side), label, key, bad)
            except BadVideo as error:
                bad.append((error.path, error.reason))
                if not self.train or len(bad) > 20:
                    return Sample(None, label, key, bad)
                i = int(rng.integers(len(self.clips)))


class Sample(NamedTuple):
    """video: uint8 (V*T, 3, H, W) or None; label: class index; key: (epoch, index); bad: (path,
    reason) of the clips that could not be decoded on the way."""
    video: torch.Tensor | None
    label: int
    key: tuple
    bad: list


class ClipOrder(torch.utils.data.Sampler):
    """Batches of keys (epoch, index). Training: shuffled anew each epoch, whole batches only.
    Testing: every clip once. batch counts the clips of all processes; set .epoch before iterating."""

    def __init__(self, count, batch, train=False, seed=0, rank=0, world=1):
        self.count, self.batch, self.train, self.seed = count, batch, train, seed
        self.rank, self.world, self.epoch = rank, world, 0

    def __len__(self):
        return self.count // self.batch if self.train else -(-self.count // self.batch)

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count) \
            if self.train else np.arange(self.count)
        for start in range(0, len(self) * self.batch, self.batch):
            mine = order[start:start + self.batch][self.rank::self.world]
            if len(mine):
                yield [(self.epoch, int(i)) for i in mine]


def clip_loader(clips, batch, workers=0, rank=0, world=1):
    """DataLoader over Clips whose batches are Sample(list, list, list, list), videos undivided: clips
    differ in shape until they are cropped. Set .batch_sampler.epoch before each epoch."""
    order = ClipOrder(len(clips), batch, clips.train, clips.seed, rank, world)
    return torch.utils.data.DataLoader(
        clips, batch_sampler=order, num_workers=workers, persistent_workers=workers > 0,
        collate_fn=lambda samples: Sample(*map(list, zip(*samples, strict=True))),
        pin_memory=torch.cuda.is_available())


def note_bad(bad, batch, clips):
    """Keep book of clips that cannot be decoded: `bad` {path: reason} takes in those of a batch, and
    new ones are named on stderr. Raises BadInput when they are more than ten and more than 1 % of
    the clips, or when training finds no other clip to take their place."""
    for path, reason in (pair for found in batch.bad for pair in found):
        if path not in bad:
            print(f"cannot decode {path}: {reason}", file=sys.stderr)
        bad[path] = reason
    if len(bad) > max(10, .01 * len(clips)) or (clips.train and any(
            video is None for video in batch.video)):
        raise BadInput(f"{len(bad)} of {len(clips)} clips cannot be decoded, the last one "
                       f"{list(bad)[-1]}; mend them or take them off the list")


def centre_crop(videos, size):
    """Test view: the middle square of each clip. List of uint8 (T, 3, H, W) -> float (B, T, 3, size,
    size) in 0..1."""
    return torch.stack([TF.center_crop(video, [size, size]) for video in videos]).float() / 255


def augment(videos, size, rngs, mirror, scales=(1, .875, .75, .66)):
    """Training view, drawn once per clip, the same for all its frames (flicker is not in the video).

    Multi-scale crop {1, .875, .75, .66} of the shorter side, resized bilinearly; flip p .5 where
    mirror allows it (see mirrors); colour jitter p .8 (.4, .4, .2, .1); grey p .2. As ActionCLIP.
    videos: list of uint8 (T, 3, H, W); rngs: a numpy generator per clip; mirror: bool per clip.
    -> float (B, T, 3, size, size) in 0..1
    """
    out = []
    for video, rng, may_flip in zip(videos, rngs, mirror, strict=True):
        H, W = video.shape[-2:]
        first = int(rng.integers(len(scales)))
        second = int(np.clip(first + rng.integers(-1, 2), 0, len(scales) - 1))  # aspect ratio within one step
        h, w = (int(min(H, W) * scales[s]) for s in (first, second))
        top, left = rng.integers(H - h + 1), rng.integers(W - w + 1)
        video = TF.resized_crop(video, int(top), int(left), h, w, [size, size], antialias=True)
        video = video.float() / 255
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
    return [not re.search(r"\b(left|right)\b", name.lower()) for name in classes]


# ---- CLIP and ActionCLIP builders ----------------------------------------------------------------


def _vision(width, layers, patch, size=224, **more):
    return dict(image_size=size, width=width, layers=layers, patch_size=patch, **more)


def _text(width, heads, layers, context=77):
    return dict(context_length=context, vocab_size=49408, width=width, heads=heads, layers=layers)


CLIPS = {  # name: (D, image tower, text tower); GELU throughout. Figures from wkcn/TinyCLIP
    "TinyCLIP-ViT-39M-16-Text-19M": (512, _vision(512, 12, 16), _text(512, 8, 6)),
    "TinyCLIP-ViT-8M-16-Text-3M": (512, _vision(256, 10, 16), _text(256, 4, 3)),
    "TinyCLIP-ResNet-30M-Text-29M": (1024, _vision(56, [3, 4, 6, 3], None), _text(512, 8, 9)),
    "TinyCLIP-ResNet-19M-Text-19M": (1024, _vision(44, [3, 4, 6, 3], None), _text(512, 8, 6)),
    "TinyCLIP-ViT-61M-32-Text-29M": (512, _vision(640, 12, 32), _text(512, 8, 9)),
    "TinyCLIP-ViT-40M-32-Text-19M": (512, _vision(512, 12, 32), _text(512, 8, 6)),
    "toy-large": (64, _vision(64, 3, 16, 32, head_width=16), _text(64, 4, 1, 20)),
    "toy-small": (48, _vision(48, 2, 16, 32, head_width=16), _text(48, 3, 1, 20))}
TINYCLIPS = [name for name in CLIPS if name.startswith("Tiny")]


def build_clip(spec, cache="runs/cache"):
    """Build a CLIP from NAME[:WEIGHTS] -> (clip, tokenizer, what read_weights found in the file).

    NAME: one of CLIPS or a name that open_clip knows. WEIGHTS: a tag of open_clip's (`openai`,
    `laion2b_s34b_b79k`, ...), a file that read_weights knows, or `random`. Without it the toy CLIPs
    come pre-trained from the cache; any other is random, and stderr says so. The activation goes with
    the weights: QuickGELU for OpenAI's, GELU for TinyCLIP's and LAION's (mixing them loads without a
    word and costs accuracy); clip.quick_gelu tells. Raises BadInput.
    """
    name, _, weights = spec.partition(":")
    if name not in CLIPS and name not in open_clip.list_models():
        near = difflib.get_close_matches(name, [*CLIPS, *open_clip.list_models()], n=3, cutoff=0)
        raise BadInput(f"unknown model {name}; " + (
            "of the TinyCLIPs these six can be built: " + ", ".join(list(CLIPS)[:6])
            if "tinyclip" in name.lower() else f"the nearest names are {', '.join(near)}"))
    tag, path, saved = open_clip.get_pretrained_cfg(name, weights) if weights else {}, None, {}
    if not weights and name.startswith("toy-"):
        path = cached(cache, f"{name}.pt", functools.partial(_train_toy_clip, name), _train_toy_clip,
                      draw_toys, toy_truth, toy_caption, CLIPS[name])
    elif not weights:
        print(f"{name}: RANDOM WEIGHTS, since no :WEIGHTS were named", file=sys.stderr)
    elif Path(weights).is_file():
        path = weights
    elif weights != "random" and not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) if name not in CLIPS else \
            "none; released files are on the page `checkpoints` of github wkcn/TinyCLIP-model-zoo"
        raise BadInput(f"{spec}: no such file, nor a tag of {name} (tags: {tags})")
    if path:
        saved = read_weights(path)
    quick_gelu = saved.get("quick_gelu", tag.get("quick_gelu"))
    if name in CLIPS:
        D, vision, text = CLIPS[name]
        clip = open_clip.CLIP(D, vision, text, quick_gelu=bool(quick_gelu))
        open_clip.set_model_preprocess_cfg(clip, dict(
            size=vision["image_size"], mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD))
        tokenizer = open_clip.SimpleTokenizer(context_length=text["context_length"])
    else:
        if quick_gelu is None:
            quick_gelu = open_clip.get_model_config(name).get("quick_gelu", False)
        with _open_clip(spec):
            clip = open_clip.create_model(name, quick_gelu=quick_gelu, force_preprocess_cfg={
                key: tag[key] for key in ("mean", "std") if key in tag})
            tokenizer = open_clip.get_tokenizer(name)
            if tag:
                open_clip.load_checkpoint(clip, open_clip.download_pretrained(tag))
    clip.quick_gelu = bool(quick_gelu)
    if path:
        load_strictly(clip, open_clip.convert.convert_state_dict(clip, saved["clip"]), path, name)
    return clip, tokenizer, saved


@contextlib.contextmanager
def _open_clip(spec):
    logging.disable(logging.CRITICAL)  # it logs each retry of a download, and warns of what we mend
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise BadInput(f"{spec}: open_clip cannot fetch or build it here: {error}. Without a network, "
                       "download the weights elsewhere and name the file: NAME:PATH") from error
    finally:
        logging.disable(logging.NOTSET)


def read_weights(path):
    """Read a weights file -> dict(clip=state, ...), by its format:

    - released TinyCLIP or open_clip: {"state_dict": {"module.visual...": ...}}, or the bare tensors
    - OpenAI's TorchScript archive (adds quick_gelu=True)
    - ActionCLIP's {"model_state_dict", "fusion_model_state_dict"}: adds fusion=state, quick_gelu=True.
      Our own checkpoints are such files and say quick_gelu and more themselves.
    Raises BadInput for a missing file or another format.
    """
    more = {}
    try:
        try:
            state = open_clip.factory.load_state_dict(str(path))
        except RuntimeError:
            state, more = torch.jit.load(path, map_location="cpu").state_dict(), {"quick_gelu": True}
            state = {k: v for k, v in state.items() if "." in k or v.is_floating_point()}
        if "model_state_dict" in state:
            more = {"quick_gelu": True, **{k: v for k, v in state.items() if "state" not in k}}
            more["fusion"] = _bare(state["fusion_model_state_dict"])
            state = _bare(state["model_state_dict"])
        assert all(isinstance(v, torch.Tensor) for v in state.values())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as error:
        raise BadInput(f"{path} is no weights file of a kind that is known here "
                       f"({type(error).__name__})") from error
    return {"clip": state, **more}


def _bare(state):
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_strictly(module, state, path, name):
    """module.load_state_dict(state); where they do not fit, BadInput says in what."""
    own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in state.items()}
    wrong = [f"{key} is {got.get(key, 'not there')}, not {own.get(key, 'wanted')}"
             for key in sorted(own.keys() | got.keys()) if own.get(key) != got.get(key)]
    if wrong:
        raise BadInput(f"{path} does not fit {name}: {len(wrong)} of {len(own)} tensors differ, "
                       f"first: {wrong[0]}")
    module.load_state_dict(state)


def _train_toy_clip(name, path, steps=300, batch=128):
    """In place of a download: train a toy CLIP, as CLIP was trained, on stills with captions."""
    print(f"training {name} on toy stills, once, in place of a download ...", file=sys.stderr)
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip, tokenizer, _ = build_clip(f"{name}:random")
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3, weight_decay=.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        truths = [toy_truth(rng, "growing", str(rng.choice(SCENES))) for _ in range(batch)]
        for truth in truths:
            truth.update(x=rng.uniform(.15, .85), y=rng.uniform(.15, .85), radius=rng.uniform(.1, .25))
        index = [np.array([list(names).index(t[key]) for t in truths]) for key, names in
                 (("shape", SHAPES), ("colour", COLOURS), ("scene", SCENES))]
        place = [np.array([t[key] for t in truths], np.float32)
                 for key in ("x", "y", "radius", "phase")]
        stills = torch.from_numpy(draw_toys(*index, *place, 32)[0]).permute(0, 3, 1, 2).float() / 255
        image = clip.encode_image(TF.normalize(stills, clip.visual.image_mean, clip.visual.image_std),
                                  normalize=True)
        text = clip.encode_text(tokenizer(list(map(toy_caption, truths))), normalize=True)
        logits = clip.logit_scale.exp() * image @ text.T
        target = torch.arange(batch)
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
    """ActionCLIP's `Transf`: frame embeddings (B, T, D) -> video embedding (B, D).

        x = f + pos[0..T-1];  x = transformer(x), 6 pre-LN blocks, no mask;  out = mean_t(x + f)

    Names and shapes are those of the official checkpoints, and so is the init of .02. Beside frame
    embeddings that are not normalised, positions of that size are nearly nothing: from there the head
    sees the axis of a motion long before its direction, with the accuracy at one half. The toy CLIPs,
    narrow and soon trained, start from larger values (see build_action_clip).
    """

    def __init__(self, width, heads, layers=6, std=.02, position_std=.02):
        super().__init__()
        self.frame_position_embeddings = nn.Embedding(77, width)
        self.transformer = Transformer(width, layers, heads, act_layer=QuickGELU,
                                       norm_layer=functools.partial(nn.LayerNorm, eps=1e-12))
        for module in self.modules():
            if isinstance(module, nn.Linear):  # attention's in-projection is none: it stays xavier
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.frame_position_embeddings.weight, std=position_std)

    def forward(self, f):
        B, T, D = f.shape
        x = f + self.frame_position_embeddings.weight[:T]    # (B, T, D)
        x = self.transformer(x)                              # (B, T, D)
        return (x + f).mean(1)                               # (B, D)


class MeanHead(nn.Module):
    """ActionCLIP's `meanP`: (B, T, D) -> (B, D), blind to the order of frames."""

    def forward(self, f):
        return f.mean(1)


class ActionCLIP(nn.Module):
    """A CLIP and a fusion head: videos and texts -> embeddings of one space, not normalised.

    size: side of the square frames; width: D. Pixels are normalised in here, since each CLIP has its
    own mean and standard deviation.
    """

    def __init__(self, clip, tokenizer, fusion_layers=6, std=.02, position_std=.02):
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer
        self.size = int(np.max(clip.visual.image_size))
        with torch.no_grad():
            self.width = clip.encode_text(tokenizer([""])).shape[-1]
        for name, value in (("mean", clip.visual.image_mean), ("std", clip.visual.image_std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        norm = getattr(getattr(clip, "text", clip), "ln_final", None)  # as wide as the text tower
        heads = max(1, (norm.weight.numel() if norm is not None else self.width) // 64)
        self.fusion = FusionHead(self.width, heads, fusion_layers, std, position_std) \
            if fusion_layers else MeanHead()
        if getattr(clip, "logit_bias", None) is not None:
            clip.logit_bias.requires_grad_(False)  # SigLIP's; nothing here reads it

    def encode_video(self, video):
        """(B, T, 3, S, S) in 0..1 -> (B, D)"""
        frames = self.clip.encode_image(((video - self.mean) / self.std).flatten(0, 1))
        return self.fusion(frames.unflatten(0, video.shape[:2]))

    def encode_text(self, tokens):
        """(..., L) token ids -> (..., D)"""
        texts = [self.clip.encode_text(part) for part in tokens.flatten(0, -2).split(512)]
        return torch.cat(texts).unflatten(0, tokens.shape[:-1])

    def prompts(self, classes):
        """K class names -> token ids (16, K, L), template-major."""
        return torch.stack([self.tokenizer([prompt.format(name) for name in classes])
                            for prompt in PROMPTS])

    def forward(self, video, tokens):
        """-> video (B, D), text (B, D), and the scale exp(logit_scale)"""
        return self.encode_video(video), self.encode_text(tokens), self.clip.logit_scale.exp()


def build_action_clip(spec, fusion_layers=6, cache="runs/cache"):
    """ActionCLIP on the backbone NAME[:WEIGHTS] (see build_clip); fusion_layers=0: mean over frames.

    Where WEIGHTS is an ActionCLIP checkpoint, the fusion head is loaded from it too. Raises BadInput.
    """
    clip, tokenizer, saved = build_clip(spec, cache)
    name, _, weights = spec.partition(":")
    std, position_std = (.1, .5) if name.startswith("toy-") else (.02, .02)
    model = ActionCLIP(clip, tokenizer, fusion_layers, std, position_std)
    if "fusion" in saved:
        load_strictly(model.fusion, saved["fusion"], weights,
                      f"a fusion head of {fusion_layers} layers")
    return model
