"""Clips in, networks out: data loading and model builders, what a method needs before it starts.

This file trains nothing (but the toy CLIPs, in place of a download), logs nothing, reads no flags
and knows nothing of the roles that networks play in a method. A mistake that the user can mend
raises BadInput, a file that cannot be decoded BadVideo. Sections: errors and files | toys | data
sets | RGB decoding | compressed decoding | loaders | views | CLIP, ActionCLIP | exit networks

Axes:  B clips   T frames that a network sees   C H W channels, height, width   D embedding width
K classes   N frames of a file   V windows of a clip   S segments of a coded clip   E exits
"""
import contextlib
import csv
import dataclasses
import functools
import inspect
import io
import itertools
import json
import os
import re
import sys
import tempfile
import zlib
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from av.codec.context import Flags2
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD
from open_clip.transformer import QuickGELU, Transformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_keypoints, make_grid, save_image

RANK = int(os.environ.get("RANK", 0))  # of torchrun

# ---- errors and files ----------------------------------------------------------------------------


class BadInput(ValueError):
    """A mistake that the user can fix: what was wrong, where, what would be right."""


class BadVideo(Exception):
    """A file that cannot be decoded; PyAV's many errors become this one."""

    def __init__(self, path, reason):
        super().__init__(str(path), reason)  # both arguments, so that it can be pickled
        self.path, self.reason = str(path), reason


def run(main):
    """Run a script's main(). What a user can mend ends in one line and exit code 2."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt:
        print(f"{script}: interrupted; --resume goes on from the last epoch", file=sys.stderr)
        sys.exit(130)
    except (BadInput, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader"):
            raise  # else a worker was killed or hangs
        # a mistake found by a worker stands at the end of its traceback
        line = str(error).splitlines()[-1].removeprefix("common.BadInput: ")
        print(f"{script}: {line}", file=sys.stderr)
        sys.exit(2)


def which_split(text):
    """The type of --split: 1, 2, 3 or `all`"""
    return text if text == "all" else int(text)


def several(main, argv, split, seeds):
    """A script's main() for each seed and split (`all`: 1 to 3). Prints mean and standard deviation
    of every top-1. -> {name: [top-1, ...]}"""
    argv, found = sys.argv[1:] if argv is None else argv, {}
    for part, seed in itertools.product((1, 2, 3) if split == "all" else (split,), seeds):
        # --seeds without a value: none
        results = main([*argv, "--split", str(part), "--seed", str(seed), "--seeds"])
        for name, x in top1(results):
            found.setdefault(name, []).append(x)
    if RANK == 0:
        for name, x in found.items():
            deviation = np.std(x, ddof=1) if len(x) > 1 else 0.
            each = " ".join(map("{:.4f}".format, x))
            print(f"{name}: mean {np.mean(x):.4f} sd {deviation:.4f} of {each}")
    return found


def top1(results, before=""):
    """Yields (name, x) of each top-1 in a script's results, nested dicts"""
    for key, x in results.items():
        name = f"{before} {key}"
        if isinstance(x, dict):
            yield from top1(x, name)
        elif isinstance(x, float) and "top1" in name:
            yield name.replace("top1", "").strip() or "top1", x


@contextlib.contextmanager
def renamed(path):
    """Yields a name that becomes `path` in the end: a kill or a full disk leaves what was there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            yield part
            if not (part.is_dir() and path.is_dir()):  # else another run was faster
                part.replace(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or error}") from error


def save(state, path):
    """torch.save, whole or not at all, of weights that are finite."""
    for name, part in state.items():
        if isinstance(part, dict):
            check_finite(part, name, path)
    buffer = io.BytesIO()  # torch.save hides why it cannot write to a file
    torch.save(state, buffer)
    with renamed(path) as part:
        part.write_bytes(buffer.getbuffer())


def check_finite(state, name, path):
    for key, x in state.items():
        if torch.is_tensor(x) and not x.isfinite().all():
            raise BadInput(f"{path}: {key} of {name} is not finite")


def read_saved(path, *keys):
    """What save() has written, with these keys, on the CPU."""
    try:
        saved = torch.load(path, "cpu", weights_only=True)
        for key in keys:
            _ = saved[key]
        return saved
    except Exception as error:  # torch.load raises many kinds
        raise BadInput(f"{path} was cut off, or is another kind of file: remove it") from error


# ---- toy clips -----------------------------------------------------------------------------------
# An action is a motion: no single frame tells it, since position and size at the middle of a clip
# have the same distribution for all. The scene goes with the action in half of the training clips,
# in no test clip of split 1, and in split 2 it is the usual scene of another action (scene bias).
# Classes of the compressed scripts pair a shape with a motion. Diagonals test unseen classes.

MOTIONS = {  # words -> direction of (x, y, log radius)
    "moving left": (-1, 0, 0), "moving right": (1, 0, 0), "moving up": (0, -1, 0),
    "moving down": (0, 1, 0), "growing": (0, 0, 1), "shrinking": (0, 0, -1)}
DIAGONALS = {
    "moving up and to the left": (-1, -1, 0), "moving up and to the right": (1, -1, 0),
    "moving down and to the left": (-1, 1, 0), "moving down and to the right": (1, 1, 0)}
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (60, 80, 240),
           "yellow": (235, 220, 40), "purple": (180, 50, 210), "white": (245, 245, 245)}
SCENES = ("stripes", "checks", "dots", "plain ground")


def toy_truth(rng, motion, scene):
    """What a toy clip shows, drawn at random; lengths (at mid clip) in sides of the picture."""
    return {"motion": motion, "scene": scene, "shape": str(rng.choice(SHAPES)),
            "colour": str(rng.choice(list(COLOURS))), "x": rng.uniform(.38, .62),
            "y": rng.uniform(.38, .62), "radius": rng.uniform(.13, .19),
            "speed": rng.uniform(.8, 1.1), "phase": list(rng.random(2))}


def toy_caption(truth):
    """What a still shows, in words: "a red circle at the top left on stripes"."""
    across = ["left", "", "right"][int(truth["x"] > .42) + int(truth["x"] > .58)]
    down = ["top", "", "bottom"][int(truth["y"] > .42) + int(truth["y"] > .58)]
    place = f"{down} {across}".strip() or "centre"
    return f"a {truth['colour']} {truth['shape']} at the {place} on {truth['scene']}"


def draw_toy(truth, x, y, radius, pixels):
    """Stills with the object at x, y, of that radius, (N,) each -> uint8 (N, pixels, pixels, 3)"""
    row = (np.arange(pixels, dtype=np.float32)[:, None] + .5) / pixels              # (H, 1)
    column = row.T                                                                  # (1, W)
    across, down = np.float32(truth["phase"])
    p, q = (column + across) * 8 % 1, (row + down) * 8 % 1
    ground = {"stripes": p < .5, "checks": (p < .5) ^ (q < .5),
              "dots": np.hypot(p - .5, q - .5) < .3, "plain ground": p < 0}[truth["scene"]]
    x, y, radius = np.float32([x, y, radius])[..., None, None]                      # (N, 1, 1)
    u, v = np.broadcast_arrays((column - x) / radius, (row - y) / radius)           # (N, H, W)
    far, near = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    inside = {"circle": u * u + v * v < 1, "square": far < .85, "cross": (near < .35) & (far < 1),
              "triangle": (v < .8) & (v > 2.4 * abs(u) - 1.1)}[truth["shape"]]
    # motion inside the object is visible, too
    shade = .85 + .15 * np.sin(5 * u[inside]) * np.sin(5 * v[inside])
    picture = np.empty((*inside.shape, 3), np.uint8)
    picture[:] = np.where(ground, 110, 70)[..., None]
    picture[inside] = np.float32(COLOURS[truth["colour"]]) * shade[:, None]
    return picture


def toy_clip(truth, frames=16, pixels=64):
    """Draw a clip -> uint8 (N, pixels, pixels, 3)"""
    time = np.linspace(-.5, .5, frames, dtype=np.float32) * truth["speed"]
    dx, dy, grow = (MOTIONS | DIAGONALS)[truth["motion"]]
    x, y = truth["x"] + .5 * dx * time, truth["y"] + .5 * dy * time
    return draw_toy(truth, x, y, truth["radius"] * np.exp(grow * time), pixels)


def write_video(path, frames, fps=24, codec="mpeg4", pix_fmt="yuv420p", **options):
    """Encode uint8 frames (N, H, W, 3), every 12th an I-frame, others P."""
    options = {"g": "12", "bf": "0", "qmin": "2", "qmax": "4", **options}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.thread_count = 1  # the same file on any machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def make_toy_folder(folder, train=1200, test=300, seed=0, pairs=False, motions=tuple(MOTIONS)):
    """Draw and encode toy clips into `folder`: lists of splits 1 and 2, toy_truth.json, the clips.
    pairs: split 1, classes "circle moving left", ..., larger and longer, a vector per 8 pixels."""
    rng, truths = np.random.default_rng(seed), {}
    shape, options = ((24, 96), {"flags": "+mv4"}) if pairs else ((16, 64), {})
    parts = [("train", train, ["train1", "train2"]), ("test", test, ["test1"])]
    if not pairs:
        parts.append(("swapped", test, ["test2"]))
    for part, count, lists in parts:
        (folder / part).mkdir(parents=True)
        rows = [("path", "label")]
        for i in range(count):
            action, label = i % len(motions), motions[i % len(motions)]
            scene = SCENES[(action + 2 * (part == "swapped")) % len(SCENES)]
            if part == "test" or (part == "train" and rng.random() >= .5):
                scene = str(rng.choice(SCENES))
            truth = toy_truth(rng, label, scene)
            if pairs:
                truth["shape"] = ("circle", "cross")[i // len(motions) % 2]
                label = f"{truth['shape']} {label}"
            clip = f"{part}/{i:04d}.mp4"
            write_video(folder / clip, toy_clip(truth, *shape), **options)
            truths[clip] = truth
            rows.append((clip, label))
        for name in lists:
            with open(folder / f"{name}.csv", "w", newline="") as file:
                csv.writer(file).writerows(rows)
    (folder / "toy_truth.json").write_text(json.dumps(truths, indent=0))


TOYS = {"toy": {}, "toy-pairs": {"train": 900, "test": 240, "pairs": True},  # for make_toy_folder
        "toy-diagonals": {"train": 2000, "test": 500, "motions": (*MOTIONS, *DIAGONALS)}}


def cached(cache, name, make, *sources):
    """Path of what make(path) makes once. Its name has a digest of `sources`, functions and values:
    what older code made is not reused."""
    code = "".join(inspect.getsource(s) if callable(s) else repr(s) for s in sources)
    path = Path(cache) / f"{name}-{zlib.crc32(code.encode()):08x}"
    if not path.exists() and (not dist.is_initialized() or dist.get_rank() == 0):
        print(f"making {path}, once ...", file=sys.stderr)
        with renamed(path) as part:
            make(part)
    if dist.is_initialized():
        dist.barrier()
    return path


# ---- data sets -----------------------------------------------------------------------------------


@dataclasses.dataclass
class VideoData:
    """train, test: [(path, class index)]; classes: K names in words; missing: listed clips that do
    not exist; unseen: classes held out of training; official: names as in ActionCLIP's lists; bad:
    {path: reason} of clips that cannot be decoded, filled by loaders."""
    name: str
    classes: list
    train: list
    test: list
    missing: list
    unseen: list = dataclasses.field(default_factory=list)
    official: list = None
    bad: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        return (f"{self.name}: {len(self.classes)} classes, {len(self.train)} training clips, "
                f"{len(self.test)} test clips")

    def digest(self):
        """A number for classes and clips, the same wherever the folder lies."""
        clips = [(Path(p).parts[-2:], k, os.path.getsize(p)) for p, k in self.train + self.test]
        return zlib.crc32(repr((self.classes, len(self.train), clips)).encode())

    def notes(self):
        """-> list of sentences, what a reader of the results should know"""
        trained = {label for _, label in self.train}
        untrained = [name for i, name in enumerate(self.classes) if i not in trained]
        found = {"listed clips are missing": self.missing,
                 "classes are held out of training": self.unseen,
                 "classes have no training clip": untrained,
                 "clips cannot be decoded; test clips among them count as wrong": list(self.bad)}
        return [f"{len(names)} {what}, first {', '.join(names[:4])}"
                for what, names in found.items() if names]


FORMATS = ("formats: HMDB51 and UCF101 as released, lists beside class folders; train1.csv and "
           "test1.csv or train.csv and test.csv, header path,label; train/CLASS/* + test/CLASS/*")


def words(name):
    """A folder's name in words: ApplyEyeMakeup -> apply eye makeup, brush_hair -> brush hair."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name).lower()


def read_data(data, split=1, allow_missing=False, cache="runs/cache", toys="toy"):
    """Read the lists of `toy` (one of TOYS) or of a folder in one of FORMATS -> VideoData. Labels
    come from class names, never from ids in a list."""
    root = Path(data)
    if data == "toy":
        root = cached(cache, toys, functools.partial(make_toy_folder, **TOYS[toys]), TOYS[toys],
                      make_toy_folder, toy_truth, toy_clip, draw_toy, write_video, MOTIONS,
                      DIAGONALS, SHAPES, COLOURS, SCENES)
    if not root.is_dir():
        raise BadInput(f"--data {data}: no such folder; name a folder, or `toy`; {FORMATS}")
    train_rows, test_rows = _rows(root, split)
    listed = train_rows + test_rows
    missing = {path: name for path, name in listed if not os.path.isfile(path)}
    if missing and not allow_missing:
        raise BadInput(f"{root}: {len(missing)} of {len(listed)} listed clips are missing "
                       f"(see --allow-missing), first {', '.join(list(missing)[:3])}")
    classes = sorted({name for _, name in listed})
    train = [(path, classes.index(name)) for path, name in train_rows if path not in missing]
    test = [(path, classes.index(name)) for path, name in test_rows if path not in missing]
    if not (train and test):
        what = "test" if train else "training"
        raise BadInput(f"{root}: no {what} clips, {len(missing)} listed clips are missing")
    bare = sorted({name for _, name in test_rows} - {name for _, name in train_rows})
    if bare:
        raise BadInput(f"{root}: {len(bare)} classes to be tested have no training clip: {bare[0]}")
    trained = {os.path.realpath(path) for path, _ in train}
    both = [path for path, _ in test if os.path.realpath(path) in trained]
    if both:
        raise BadInput(f"{len(both)} clips are listed both for training and for testing: {both[0]}")
    official = [name.title().replace(" ", "") for name in classes]
    return VideoData(Path(data).resolve().name, classes, train, test, list(missing),
                     official=official if (root / "ucfTrainTestlist").is_dir() else None)


def _rows(root, split):
    """The lists of a folder as they stand there -> training and test [(path, class name)]"""
    lists = [root / f"train{split}.csv", root / f"test{split}.csv"]
    if split == 1 and not all(map(Path.is_file, lists)):
        lists = [root / "train.csv", root / "test.csv"]
    if (root / "testTrainMulti_7030_splits").is_dir():
        return _hmdb51_rows(root, split)
    if (root / "ucfTrainTestlist").is_dir():
        return _ucf101_rows(root, split)
    if all(map(Path.is_file, lists)):
        return [_csv_rows(path) for path in lists]
    if split == 1 and (root / "train").is_dir() and (root / "test").is_dir():
        return _folder_rows(root / "train"), _folder_rows(root / "test")
    raise BadInput(f"--data {root} holds no data set with a split {split}; {FORMATS}")


def _official(path, pattern):
    """What the lines of an official list hold"""
    if not path.is_file():
        raise BadInput(f"{path} is missing, one of the official lists")
    found = re.findall(pattern, path.read_text(errors="replace"), re.M)
    if not found:
        raise BadInput(f"{path} lists no clip")
    return found


def _hmdb51_rows(root, split):
    lists, rows = root / "testTrainMulti_7030_splits", ([], [])
    home = root / "hmdb51_org" if (root / "hmdb51_org").is_dir() else root
    names = {path.name.rsplit("_", 2)[0] for path in lists.glob("*_test_split?.txt")}
    for name in sorted(names) or ["CLASS"]:
        for clip, part in _official(lists / f"{name}_test_split{split}.txt", r"^(.+) ([012])\s*$"):
            if part != "0":  # 1 training, 2 test, 0 neither
                rows[int(part) - 1].append((str(home / name / clip), words(name)))
    return rows


def _ucf101_rows(root, split):
    home, rows = root / "UCF-101" if (root / "UCF-101").is_dir() else root, []
    for part in ("train", "test"):
        clips = _official(root / "ucfTrainTestlist" / f"{part}list0{split}.txt", r"^\S+")
        rows.append([(str(home / clip), words(clip.split("/")[0])) for clip in clips])
    return rows


def _folder_rows(folder):
    clips = [path for path in sorted(folder.glob("[!.]*/[!.]*")) if path.is_file()]
    return [(str(path), words(path.parent.name)) for path in clips]


def _csv_rows(path):
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [(line["path"].strip(), line["label"].strip()) for line in csv.DictReader(file)]
        if not all(label for _, label in rows):
            raise ValueError("an empty label")
    except (ValueError, csv.Error, KeyError, AttributeError) as error:
        raise BadInput(f"{path} is no UTF-8 list with path,label above and in each line") from error
    return [(str(path.parent / clip), label) for clip, label in rows]


def split_unseen(data, count, seed=0):
    """Hold `count` classes, drawn by the seed (toys: diagonals), out of training. -> {"": the other
    classes, renumbered; "_unseen": test clips of the held-out classes, to classify among these;
    "_unseen_all": the same, among all}"""
    if not count:
        return {"": data}
    able = [name for name in data.classes if name in DIAGONALS] or data.classes
    if not 2 <= count <= min(len(able), len(data.classes) - 2):
        raise BadInput(f"--unseen {count} of {len(able)} classes: two must be left on either side")
    unseen = sorted(np.random.default_rng([seed, 4]).choice(able, count, replace=False).tolist())
    seen = [name for name in data.classes if name not in unseen]

    def part(chosen, classes, train, test):
        ids = {data.classes.index(name): classes.index(name) for name in chosen}
        return dataclasses.replace(
            data, name=f"{data.name}-unseen{count}", classes=classes, unseen=unseen, official=None,
            train=[(path, ids[k]) for path, k in train if k in ids],
            test=[(path, ids[k]) for path, k in test if k in ids])

    parts = {"": part(seen, seen, data.train, data.test),
             "_unseen": part(unseen, unseen, [], data.test),
             "_unseen_all": part(unseen, data.classes, [], data.test)}
    if not all(own.test for own in parts.values()):
        raise BadInput(f"--unseen {count}: no test clip of {', '.join(unseen)}, or of the others")
    return parts


def hold_out(data, share, seed=0):
    """Take a share of each class's training clips out of training. -> data, [(path, label)]"""
    rng, held = np.random.default_rng([seed, 7]), set()
    for k in sorted({label for _, label in data.train}):
        own = list(dict.fromkeys(path for path, label in data.train if label == k))
        count = min(len(own) - 1, round(share * len(own)))
        held |= set(rng.permutation(own)[:count].tolist())
    rest = [clip for clip in data.train if clip[0] not in held]
    return dataclasses.replace(data, train=rest), [clip for clip in data.train if clip[0] in held]


def few_shot(data, shots, seed=0):
    """Keep `shots` training clips of each class, drawn by the seed; 0: all."""
    if not shots:
        return data
    rng, kept = np.random.default_rng([seed, 8]), []
    for k, name in enumerate(data.classes):
        own = [clip for clip in data.train if clip[1] == k]
        if 0 < len(own) < shots:
            raise BadInput(f"--shots {shots}: {name} has {len(own)} training clips")
        kept += [own[i] for i in rng.permutation(len(own))[:shots]]
    return dataclasses.replace(data, name=f"{data.name}-shots{shots}", train=kept)


def noisy_labels(data, share, seed=0):
    """Replace a share of the training labels, drawn by the seed, by other classes."""
    if not share:
        return data
    rng, train, K = np.random.default_rng([seed, 9]), list(data.train), len(data.classes)
    for i in rng.permutation(len(train))[:round(share * len(train))]:
        path, label = train[i]
        train[i] = path, int(label + rng.integers(1, K)) % K
    return dataclasses.replace(data, name=f"{data.name}-noise{share:g}", train=train)


# ---- RGB decoding --------------------------------------------------------------------------------


def segment_indices(count, frames, rng=None):
    """TSN sampling: one frame of each of T equal segments -> T sorted indices into N=count frames,
    with rng at random (training), else the middle (test). A clip of fewer frames repeats some."""
    i = np.arange(frames)
    if rng is None:
        return (i * count / frames + max(0, count / frames - 1) / 2).astype(int)
    if count <= frames:
        return np.sort(np.concatenate([np.arange(count), rng.integers(count, size=frames - count)]))
    return rng.integers(i * count // frames, (i + 1) * count // frames)


def dense_indices(count, frames, rng=None, views=1):
    """Dense sampling: windows of 128 frames, stride 128 // T, as in Text4Vis -> (V, T), modulo
    N=count; with rng one window at random (training), else `views` evenly spaced; 1: central"""
    last = max(0, count - 128)
    starts = [last // 2] if views == 1 else np.linspace(0, last, views).astype(int)
    if rng is not None:
        starts = [rng.integers(last + 1)]
    return (np.array(starts)[:, None] + np.arange(frames) * max(1, 128 // frames)) % count


VOP = re.compile(b"\0\0\1\xb6(.)", re.S)  # a picture of MPEG-4; two bits say: I, P, B or S
# Files of a data set are opened as files. Playlists name other files or addresses to be opened.
CONTAINERS = av.formats_available - {"concat", "dash", "hls", "image2", "imf", "rtsp", "sdp", "tty",
                                     "webm_dash_manifest"}


@contextlib.contextmanager
def open_video(path, source=None, **options):
    """Open a video for decoding -> (container, video stream). PyAV's errors become BadVideo.
    source: what av.open opens with `options`, if not the file `path` (see read_stream)."""
    if source is None:
        source, options = f"file:{path}", {"options": {"format_whitelist": ",".join(CONTAINERS)}}
    try:
        # HMDB51 has a file whose metadata are not UTF-8
        with av.open(source, metadata_errors="replace", **options) as container:
            covers = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams or streams[0].codec_context is None:
                raise BadVideo(path, "no video stream, or one of an unknown codec")
            streams[0].thread_count = 1  # loader workers are the threads
            yield container, streams[0]
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else "no readable video"
        raise BadVideo(path, f"{what} ({type(error).__name__})") from error


class VideoIndex(NamedTuple):
    """pts: sorted timestamps (N,), None if they cannot be trusted; keys: positions of keyframes;
    count: N; unfit: why read_compressed cannot follow the vectors, if packets tell."""
    pts: np.ndarray | None
    keys: np.ndarray
    count: int
    unfit: str


@functools.lru_cache(maxsize=100_000)
def video_index(path):
    """Timestamps and keyframes of a file from its packets: pipes, edit lists and damaged headers
    declare wrong numbers."""
    pts, keys, kinds, cut = [], [], [], False
    with open_video(path) as (container, stream):
        form, codec = container.format.name, stream.codec_context.codec.canonical_name
        for packet in container.demux(stream):
            if packet.size <= (codec == "mpeg4") or packet.is_discard:  # XviD's lead-in has a byte
                continue
            pts.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
            kinds += [code[0] >> 6 for code in VOP.findall(bytes(packet))]
            cut = packet.is_corrupt
        reorders, count = stream.codec_context.has_b_frames, len(pts)
    if cut:
        raise BadVideo(path, "it was cut off: its last packet is incomplete")
    if not pts:
        raise BadVideo(path, "the video stream holds no frame")
    unfit = ""
    if codec != "mpeg4":
        unfit = f"its codec is {codec}, not MPEG-4 part 2"
    elif 2 in kinds or 3 in kinds:
        unfit = "it has B-frames, or global motion compensation"
    vague = form.startswith("mpeg") or None in pts or len(set(pts)) < count  # TS, PS; raw streams
    vague = vague or (form == "avi" and (reorders or codec != "mpeg4"))  # an index may be wrong
    if not vague and not (reorders and pts == sorted(pts)):
        if min(pts) not in keys:  # cut within a group: what refers to before the cut is lost
            with open_video(path) as (container, stream):
                first = next((at for at, _ in _pictures(container, stream) if at is not None), 0)
            pts, keys = ([at for at in part if at >= first] for part in (pts, keys))
        keys = np.searchsorted(np.sort(pts), np.sort(keys))
        return VideoIndex(np.sort(pts), np.union1d([0], keys), len(pts), unfit)  # 0: whatever it is
    if form == "avi":  # no timestamps, but a packet a frame; B-frames lost with the group before
        count -= sum(1 for _ in itertools.takewhile(lambda kind: kind == 2, kinds[1:]))
    else:
        with open_video(path) as (container, stream):
            count = sum(1 for _ in _pictures(container, stream))
    return VideoIndex(None, np.zeros(1, int), count, unfit)


def decode(path, indices, seek=True, export=None):
    """Decode what `indices` need in one pass -> yields (position, frame) of frames on the way. With
    `seek`, from the last keyframe before each of `indices`, and without frames that no other refers
    to. export: options of the decoder, which then exports motion vectors."""
    index, at, frames, size, needed = video_index(str(path)), -1, None, None, None
    if not 0 <= min(indices) <= max(indices) < index.count:
        raise BadVideo(path, f"it has {index.count} frames, none for all of {list(indices)}")
    with open_video(path) as (container, stream):
        if export is not None:
            stream.codec_context.flags2 |= Flags2.export_mvs  # before anything is decoded
            stream.codec_context.options = export
        elif seek and index.pts is not None and stream.codec_context.name in ("h264", "mpeg4"):
            needed = {*index.pts[list(indices)].tolist(), *index.pts[-3:].tolist()}
        for i in sorted(set(map(int, indices))):
            key = int(index.keys[np.searchsorted(index.keys, i, "right") - 1]) if seek else 0
            if frames is None or key > at + 1:
                if key:
                    container.seek(int(index.pts[key]), stream=stream)
                at, frames = key - 1, _numbered(path, _pictures(container, stream, needed), key)
            while at < i:
                at, frame = next(frames)
                size = size or (frame.width, frame.height)
                if size != (frame.width, frame.height):
                    raise BadVideo(path, f"the frame size changes from {size}")
                yield at, frame
            if at > i:
                raise BadVideo(path, f"frame {i} of {index.count} is missing or out of order")


def _numbered(path, pictures, key):
    """Yields (position, frame) of `pictures` from keyframe `key` on, up to the end of the file."""
    index, at = video_index(str(path)), key - 1
    for pts, frame in pictures:
        counted = index.pts is None or pts is None
        new = at + 1 if counted else int(index.pts.searchsorted(pts))
        if new <= at:
            continue
        if 0 <= at < key and (new > key or frame.is_corrupt or frame.pict_type != PictureType.I):
            raise BadVideo(path, f"decoding cannot start at frame {key}")
        at = new
        yield at, frame
    if at < max(key, index.count - 3):
        raise BadVideo(path, f"decoding ends after frame {at} of {index.count}")
    for lost in range(at + 1, index.count):  # decoders lose up to two frames at the end
        yield lost, frame


def _pictures(container, stream, needed=None):
    """Yields (timestamp, frame) in order. needed: timestamps; other frames, if nothing refers to
    them, are left out. Where MPEG-4 has the header of a picture and no more (not coded, as XviD
    writes still scenes), the picture before is shown again."""
    before, again, decoder = None, [], stream.codec_context
    for packet in container.demux(stream):
        if needed is not None and packet.size > 15:
            decoder.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
        frames = packet.decode()
        if not frames and 1 < packet.size < 16 and VOP.search(bytes(packet)):
            again.append(packet.pts)
        for frame in frames:
            before = frame
            yield frame.pts, frame
        # where pictures are reordered, the one before comes with the next one
        if again and before and (frames or not packet.size or not decoder.has_b_frames):
            yield from [(pts, before) for pts in again]
            again = []


def either_way(path, read):
    """read(seek=True), or where that fails read(False): not every keyframe is a place to start."""
    try:
        with contextlib.suppress(BadVideo):
            return read(True)
        return read(False)
    except (av.FFmpegError, ValueError) as error:
        raise BadVideo(path, f"its pixels cannot be converted ({error})") from error


CONVERTER = VideoReformatter()  # keeps what it has prepared for frames of the same size


def to_picture(frame, side=None, enlarge=True):
    """A decoded frame -> uint8 (3, H, W), RGB, upright. side: its shorter side in pixels, resized
    (bicubic) on the way to RGB; not enlarge: at most."""
    size, how = (frame.width, frame.height), Interpolation.BILINEAR
    if side and (enlarge or side < min(size)):
        size = [max(1, round(a * side / min(size))) for a in size]
        how = Interpolation.BICUBIC
    picture = CONVERTER.reformat(frame, *size, "rgb24", interpolation=how, threads=1).to_ndarray()
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # frame.rotation knows no mirrors
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
        if abs(b) > abs(a):
            picture, a, d = picture.swapaxes(0, 1), c, b
        picture = picture[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)


def read_frames(path, indices, side=None, enlarge=True):
    """Decode the frames at `indices`, in any order -> uint8 (T, 3, H, W), as to_picture does"""
    def read(seek):
        return {at: to_picture(frame, side, enlarge)
                for at, frame in decode(path, indices, seek) if at in wanted}

    wanted = set(map(int, indices))
    pictures = either_way(path, read)
    rows = torch.stack([pictures[int(i)].permute(1, 2, 0) for i in indices])  # as they lie
    return rows.permute(0, 3, 1, 2)


def read_stream(source):
    """Decode a file, an address, a camera or - (standard input) as it comes -> yields (seconds
    since the first frame, frame). Where timestamps are missing or jump, a frame lasts 1 / the
    stated rate. Damaged packets are skipped. A file that ends early raises BadVideo then."""
    form, _, name = source.partition(":")
    if form not in ("avfoundation", "dshow"):
        form = "v4l2" if source.startswith("/dev/video") else None
        name = "pipe:0" if source == "-" else source
    options = {"framerate": "30"} if form == "avfoundation" else {}  # its default fits few cameras
    t, before, seen, cut = 0., None, 0, False
    with open_video(source, name, format=form, options=options) as (container, stream):
        for packet in container.demux(stream):
            if packet.size:
                seen, cut = seen + 1, packet.is_corrupt
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                if before is not None:
                    passed = 0 if frame.time is None else frame.time - before
                    t += passed if 0 < passed < 10 else 1 / float(stream.guessed_rate or 25)
                before = frame.time or 0.
                yield t, frame
        declared = stream.frames if "mp4" in container.format.name else 0  # others may be wrong
    if cut or seen < .9 * declared - 25:
        raise BadVideo(source, f"it was cut off: it has {seen} of {declared or 'its'} frames")


# ---- compressed decoding -------------------------------------------------------------------------
# MPEG-4 part 2 stores a P-frame t as vectors, one per block of 8 or 16 pixels, and a remainder.
# Traced back through the P-frames to the I-frame of its group of pictures (GOP), vector by vector,
#     A_t(p) = A_{t-1}(p - v_t(p)),  A_0(p) = p,  MV_t(p) = p - A_t(p),  R_t(p) = F_t(p) - I(A_t(p))
# after CoViAR (Wu et al., CVPR 2018), but: vectors keep their quarters of a pixel; a track that
# leaves the picture continues from its border, as in decoders (CoViAR does not move that pixel); I
# is sampled bilinearly. A block without a vector (intra coded) counts as still: the residual holds
# its content. Other codecs are re-encoded.

VECTORS = np.dtype({  # FFmpeg's AVMotionVector; (dst_x, dst_y) is the centre of the block
    "names": ["w", "h", "dst_x", "dst_y", "x", "y", "scale"], "itemsize": 40,
    "formats": ["u1", "u1", "i2", "i2", "i4", "i4", "u2"], "offsets": [4, 5, 10, 12, 24, 28, 32]})


def p_frames(path):
    """Positions of the frames that have motion -> (P,): all but I-frames, if there are others."""
    index = video_index(str(path))
    found = np.setdiff1d(np.arange(index.count), index.keys)
    return found if len(found) else np.arange(index.count)


class Coded(NamedTuple):
    """S frames of a clip. intra, frame: their I-frames and they themselves, uint8 (S, 3, H, W);
    motion: int16 (S, 2, h, w), x and y in quarters of a pixel, at every 4th pixel; size: (H, W)"""
    intra: torch.Tensor | None
    frame: torch.Tensor | None
    motion: torch.Tensor
    size: tuple

    def to(self, device):
        moved = (x if x is None else x.to(device, non_blocking=True) for x in self[:3])
        return Coded(*moved, self.size)


def read_compressed(path, indices, pictures=True):
    """Decode the frames at `indices` with their I-frames and the motion between the two, MV above
    (of an I-frame: 0) -> Coded. pictures=False: motion alone, faster."""
    if reason := video_index(str(path)).unfit:
        raise BadVideo(path, f"{reason}: re-encode it")
    export = {} if pictures else {"skip_idct": "all", "skip_loop_filter": "all"}
    wanted = set(map(int, indices))

    def read(seek):
        found, vectors, intra, before = {}, [], None, None
        for at, frame in decode(path, indices, seek, export):
            if frame.rotation or frame.interlaced_frame:
                what = "rotated" if frame.rotation else "interlaced"
                raise BadVideo(path, f"a frame in it is {what}: re-encode it")
            if frame.pict_type == PictureType.I:  # wherever the encoder put one
                intra, vectors = frame, []
            elif intra is None:
                raise BadVideo(path, "no I-frame stands where its motion starts: re-encode it")
            elif frame is not before:  # else repeated. frame.side_data makes a reference cycle
                held = SideDataContainer(frame).get("MOTION_VECTORS")
                vectors.append(b"" if held is None else bytes(held))
            before = frame
            if at in wanted:
                found[at] = [list(vectors)]
                if pictures:
                    found[at] += [picture.reformat(format="rgb24", threads=1).to_ndarray()
                                  for picture in (intra, frame)]
        return found, (frame.height, frame.width)

    found, size = either_way(path, read)
    vectors, *rgb = zip(*[found[int(i)] for i in indices], strict=True)
    rgb = [torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2) for part in rgb]
    intra, frame = rgb or (None, None)
    return Coded(intra, frame, torch.from_numpy(_trace(vectors, *size)), size)


def _trace(samples, H, W):
    """The vectors of each frame's P-frames, bytes, oldest first -> MV, int16 (S, 2, h, w)"""
    S, P = len(samples), max(1, *map(len, samples))
    padded = [[b""] * (P - len(own)) + own for own in samples]  # no vectors: nothing moves
    fields = _fields(list(itertools.chain(*padded)), H, W).reshape(2, S, P, -1)
    y, x = np.mgrid[2:H + 2:4, 2:W + 2:4].astype(np.int16)
    start = 4 * np.stack([np.minimum(x, W - 1), np.minimum(y, H - 1)])[:, None] + np.int16(2)
    at, border = start.repeat(S, 1), np.array([4 * W - 2, 4 * H - 2], np.int16)
    for p in reversed(range(P)):  # newest first, back to the I-frame
        cell = (at[1] >> 5) * np.intp(-(-W // 8) + 1) + (at[0] >> 5)            # (S, h, w)
        for s in range(S):
            at[:, s] += fields[:, s, p].take(cell[s], 1)
        at.clip(2, border[:, None, None, None], out=at)
    return (start - at).swapaxes(0, 1)


def _fields(frames, H, W):
    """The vectors of P-frames -> int16 (2, P, h, w) of cells of 8 x 8 pixels, in quarters of one"""
    v = np.frombuffer(b"".join(frames), VECTORS)
    frame = np.repeat(np.arange(len(frames)), [len(part) // VECTORS.itemsize for part in frames])
    h, w = -(-H // 8) + 1, -(-W // 8) + 1  # blocks may reach out
    out, high, wide = np.zeros((2, len(frames) * h * w), np.int16), v["h"] > 8, v["w"] > 8
    x, y = v["dst_x"] - v["w"] // 2, v["dst_y"] - v["h"] // 2
    cell = (frame * h + (y >> 3)) * w + (x >> 3)  # a block's first one
    motion = np.stack([v["x"], v["y"]]).astype(np.int16) * np.int16(4 // v["scale"].max(initial=1))
    out[:, cell] = motion
    for part, more in ((wide, 1), (high, w), (wide & high, w + 1)):  # 8 or 16 pixels a side
        out[:, cell[part] + more] = motion[:, part]
    return out.reshape(2, len(frames), h, w)


def modalities(coded):
    """Coded -> mv (S, 2, H, W), in pixels; r = F - I(A) (S, 3, H, W), whole numbers of -255..255; i
    uint8 (S, 3, H, W). Exactly: F = round(warp(i, mv)) + r. Without pictures: (mv,)"""
    H, W = coded.size
    mv = coded.motion.repeat_interleave(4, -1).repeat_interleave(4, -2)[..., :H, :W] / 4
    if coded.frame is None:
        return (mv,)
    return mv, coded.frame - warp(coded.intra, mv).round(), coded.intra


def warp(i, mv):
    """I(A): i (S, 3, H, W) read at p - mv(p), mv (S, 2, H, W) in pixels. -> float (S, 3, H, W)"""
    H, W = i.shape[-2:]
    y, x = torch.arange(H, device=i.device)[:, None], torch.arange(W, device=i.device)
    at = torch.stack([(2 * (x - mv[:, 0]) + 1) / W - 1, (2 * (y - mv[:, 1]) + 1) / H - 1], -1)
    return F.grid_sample(i.float(), at, padding_mode="border", align_corners=False)


def reencode(path, out):
    """Write a video in CoViAR's form: MPEG-4 part 2, 340 x 256, upright, an I-frame at least every
    12 frames, no B-frames, quantiser 2 (FFmpeg's -q:v 1), constant rate."""
    count = video_index(str(path)).count
    with av.open(f"file:{out}", "w", format="mp4") as container:
        options = {"g": "12", "bf": "0", "qmin": "2", "qmax": "2"}
        stream = container.add_stream("mpeg4", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        stream.thread_count = 1  # the same file on any machine
        for i, frame in decode(path, range(count), seek=False):
            if frame.rotation:
                picture = to_picture(frame).permute(1, 2, 0).contiguous().numpy()
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            try:
                copy = frame.reformat(340, 256, "yuv420p", threads=1)
            except (av.FFmpegError, ValueError) as error:
                raise BadVideo(path, f"its pixels cannot be converted ({error})") from error
            copy.pts, copy.time_base, copy.pict_type = i, Fraction(1, 25), PictureType.NONE
            container.mux(stream.encode(copy))
        container.mux(stream.encode(None))


def coded_copy(path, folder):
    """Path of a clip's copy in CoViAR's form, made if need be"""
    number = zlib.crc32(os.path.abspath(path).encode())
    out = Path(folder) / Path(path).parent.name / f"{Path(path).stem}-{number:08x}.mp4"
    if not out.exists() or out.stat().st_mtime < os.path.getmtime(path):
        with renamed(out) as part:
            reencode(path, part)
    return str(out)


# ---- loaders -------------------------------------------------------------------------------------
# What is random about a clip comes from a generator seeded by (seed, epoch, index): it depends
# neither on the number of workers or processes nor on a resume.

torch.multiprocessing.set_sharing_strategy("file_system")  # else each clip holds a file handle


class Sample(NamedTuple):
    """video: uint8 (V*T, 3, H, W) or Coded; label: class index; key: (epoch, index); bad: [(path,
    reason)] of clips that failed. A batch is a Sample of lists."""
    video: torch.Tensor | Coded
    label: int
    key: tuple
    bad: list


class Clips(torch.utils.data.Dataset):
    """Decodes the clip of a key (epoch, index) -> Sample. clips: [(path, class index)]. frames: T
    or S. side: shorter side in pixels. sampling: `tsn`; `dense`, with `views` windows at test; or
    `coded`, a P-frame of each of S segments, of copies in the folder `copies` if given. train:
    random frames, and another clip in place of one that cannot be decoded; in testing it is black,
    has label -1 and so counts as wrong."""

    def __init__(self, clips, frames, side=None, sampling="tsn", views=1, train=False, seed=0,
                 copies=None):
        if views > 1 and sampling != "dense":
            raise BadInput("--views: TSN sampling has one view; add --sampling dense")
        self.clips, self.frames, self.side, self.train = clips, frames, side, train
        self.sampling, self.views, self.seed, self.copies = sampling, views, seed, copies

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        epoch, i = key
        rng, bad = np.random.default_rng([self.seed, epoch, i]), []
        while True:
            path, label = self.clips[i]
            try:
                return Sample(self.read(path, rng if self.train else None), label, (epoch, i), bad)
            except BadVideo as error:
                bad.append((error.path, error.reason))
            if not self.train or len(bad) > 20:
                return Sample(self.black(), -1, (epoch, i), bad)
            i = int(rng.integers(len(self.clips)))

    def read(self, path, rng):
        if self.sampling == "coded":
            path = coded_copy(path, self.copies) if self.copies else path
            found = p_frames(path)
            return read_compressed(path, found[segment_indices(len(found), self.frames, rng)])
        count = video_index(path).count
        if self.sampling == "dense":
            indices = dense_indices(count, self.frames, rng, self.views).ravel()
        else:
            indices = segment_indices(count, self.frames, rng)
        return read_frames(path, indices, self.side, not self.train)

    def black(self):
        side, T = self.side or 32, self.frames * self.views
        video = torch.zeros(T, 3, side, side, dtype=torch.uint8)
        motion = torch.zeros(T, 2, side // 4, side // 4, dtype=torch.int16)
        return Coded(video, video, motion, (side, side)) if self.sampling == "coded" else video


class ClipOrder(torch.utils.data.Sampler):
    """Batches of keys (epoch, index) for each of .epochs. Training: shuffled, whole batches only.
    Testing: every clip once. batch counts the clips of all processes; len: batches an epoch."""

    def __init__(self, count, batch, train=False, seed=0, rank=0, world=1):
        self.count, self.batch, self.train, self.seed = count, batch, train, seed
        self.rank, self.world, self.epochs = rank, world, range(1)

    def __len__(self):
        return self.count // self.batch if self.train else -(-self.count // self.batch)

    def __iter__(self):
        for epoch in self.epochs:
            yield from self.batches(epoch)

    def batches(self, epoch):
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.count) if self.train else np.arange(self.count)
        for start in range(0, len(self) * self.batch, self.batch):
            mine = order[start:start + self.batch][self.rank::self.world].tolist()
            if mine:
                yield [(epoch, i) for i in mine]


def _collate(samples):
    return Sample(*map(list, zip(*samples, strict=True)))


class ClipLoader(torch.utils.data.DataLoader):
    """DataLoader over Clips; its batches are Samples of lists. batch: of all processes. Clips that
    cannot be decoded go into `bad`, {path: reason}, and are named once on stderr; more than ten and
    more than 1 % of the clips raise BadInput."""

    def __init__(self, clips, batch, workers=0, rank=0, world=None, bad=None):
        if world is None:  # where the processes' group has ended, process 0 goes on alone
            live = dist.is_initialized()
            rank, world = (dist.get_rank(), dist.get_world_size()) if live else (0, 1)
        if clips.train:
            batch = min(batch, len(clips)) // world * world
        if not batch:
            raise BadInput(f"{len(clips)} training clips: too few for {world} processes")
        self.order = ClipOrder(len(clips), batch, clips.train, clips.seed, rank, world)
        self.bad, self.lost = {} if bad is None else bad, set()  # of several loaders, of this one
        if clips.train and len(self.order) < 10:
            print(f"only {len(self.order)} steps an epoch: lower --batch-size", file=sys.stderr)
        super().__init__(clips, batch_sampler=self.order, num_workers=workers,
                         timeout=600 if workers else 0,  # a full /dev/shm hangs
                         persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
                         collate_fn=_collate)

    def __iter__(self):
        for batch in super().__iter__():
            for path, reason in itertools.chain(*batch.bad):
                if path not in self.bad:
                    print(f"cannot decode {path}: {reason}", file=sys.stderr)
                self.bad[path] = reason
                self.lost.add(path)
            stuck = self.dataset.train and -1 in batch.label
            if stuck or len(self.lost) > max(10, .01 * len(self.dataset)):
                count = f"{len(self.lost)} of {len(self.dataset)}"
                raise BadInput(f"{count} clips cannot be decoded, last {path}")
            yield batch

    def epochs(self, first, last):
        """Yields each of these epochs with its batches; workers go on from one to the next."""
        self.order.epochs, batches = range(first, last), iter(self)
        for epoch in self.order.epochs:
            yield epoch, itertools.islice(batches, len(self))

    def mean(self, values, epoch):
        """Values (n,) of each batch of an epoch, a list -> their means, if all are finite"""
        values = torch.stack(values)
        finite = values.isfinite().all(1).tolist()
        if not all(finite):
            n = finite.index(False)
            keys = list(self.order.batches(epoch))[n]
            clips = ", ".join([self.dataset.clips[i][0] for _, i in keys[:3]])
            raise BadInput(f"epoch {epoch + 1}, batch {n + 1} of {len(finite)}: a value is not "
                           f"finite; a lower --lr may help, or look at its clips, {clips}, ...")
        return values.mean(0).tolist()


# ---- views: what networks see of a clip ----------------------------------------------------------


def centre_crop(videos, size, device="cpu"):
    """Test view, the middle: list of uint8 (T, 3, H, W) -> float (B, T, 3, size, size) in 0..1"""
    videos = [video.to(device, non_blocking=True) for video in videos]
    return torch.stack([TF.center_crop(video, [size, size]) for video in videos]).float() / 255


def mirrors(classes):
    """For each class: may its clips be flipped? Not where its words tell left from right."""
    return [not re.search(r"(?<![a-z])(left|right)(?![a-z])", name.lower()) for name in classes]


def jitter(video, factors):
    """torchvision's adjust_brightness, _contrast, _saturation and _hue, then grey where the last
    factor is 1, for all clips at once: few kernels. (B, T, 3, S, S), (B, 5) -> (B, T, 3, S, S)"""
    bright, contrast, saturation, hue, grey = factors.T[..., None, None, None]      # (B, 1, 1, 1)

    def to_grey(x):
        return .2989 * x[0] + .587 * x[1] + .114 * x[2]

    x = video.movedim(2, 0).contiguous()  # (3, B, T, S, S): whole planes are faster
    x = (bright * x).clamp_(0, 1)
    mean = to_grey(x).mean((-2, -1), keepdim=True)                              # (B, T, 1, 1)
    x = mean.lerp(x, contrast).clamp_(0, 1)
    x = to_grey(x).lerp(x, saturation).clamp_(0, 1)
    r, g, b = x                                                                 # (B, T, S, S)
    high, chroma = x.amax(0), x.amax(0) - x.amin(0)
    some = chroma.clamp(min=1e-8)  # of grey, the hue does not matter
    sixth = torch.where(high == g, 2 + (b - r) / some, 4 + (r - g) / some)
    sixth = torch.where(high == r, (g - b) / some, sixth) + 6 * hue
    turn = (sixth + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1, 1, 1)) % 6
    share = torch.minimum(turn, 4 - turn).clamp_(0, 1)                          # (3, B, T, S, S)
    x = high - chroma * share
    return torch.where(grey > 0, to_grey(x), x).movedim(0, 2).contiguous()


def training_view(batch, size, mirror, seed, device):
    """ActionCLIP's augmentation of a loader's batch -> float (B, T, 3, size, size) in 0..1. Drawn
    once for all frames of a clip, since videos do not flicker, and by its key: a crop with sides of
    1, .875, .75, .66 (small networks: 1, .875) times the shorter side; flip p .5 where mirror, a
    bool per class; colour jitter p .8 (.4, .4, .2, .1); grey p .2."""
    scales = (1, .875, .75, .66) if size > 100 else (1, .875)
    out, factors = [], []
    for video, label, key in zip(batch.video, batch.label, batch.key, strict=True):
        rng, (H, W) = np.random.default_rng([seed, *key, 2]), video.shape[-2:]
        first = int(rng.integers(len(scales)))  # the other side is at most one step away
        second = int(np.clip(first + rng.integers(-1, 2), 0, len(scales) - 1))
        h, w = (max(1, int(min(H, W) * scales[s])) for s in (first, second))
        top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
        video = video.to(device, non_blocking=True)
        video = TF.resized_crop(video, top, left, h, w, [size, size], antialias=True)
        out.append(video.flip(-1) if rng.random() < .5 and mirror[label] else video)
        drawn = (1, 1, 1, 0)
        if rng.random() < .8:
            drawn = rng.uniform((.6, .6, .8, -.1), (1.4, 1.4, 1.2, .1))
        factors.append((*drawn, rng.random() < .2))
    factors = torch.tensor(factors).to(device, torch.float32, non_blocking=True)  # (B, 5)
    return jitter(torch.stack(out).float() / 255, factors)


def compressed_view(clips, size, rngs=None, mirror=None):
    """What the three networks see of B clips -> {"mv": (B, S, 2, size, size), pixels / 40, clamped
    to +-.5; "r": (B, S, 3, size, size), -1..1; "i": the same, 0..1}: the middle square. Training,
    with a generator and a bool per clip: one square of 1, .875 or .75 times the shorter side; flip
    p .5 where mirror, which negates mv's x."""
    out = []
    for n, coded in enumerate(clips):
        mv, *pictures = modalities(coded)
        video = torch.cat([mv.clamp(-20, 20), *pictures], 1)
        side = min(coded.size)
        top, left = ((edge - side) // 2 for edge in coded.size)
        if rngs:
            side = max(1, int(side * rngs[n].choice((1, .875, .75))))
            top, left = (int(rngs[n].integers(edge - side + 1)) for edge in coded.size)
        video = TF.resized_crop(video, top, left, side, side, [size, size], antialias=True)
        if rngs and rngs[n].random() < .5 and mirror[n]:
            video = video.flip(-1)
            video[:, 0] = -video[:, 0]
        out.append(video)
    mv, r, i = torch.stack(out).tensor_split((2, 5), 2)
    return {"mv": mv / 40, "r": r / 255, "i": i / 255} if pictures else {"mv": mv / 40}


def draw_texts(picture, texts):
    """Write each of (x, y, word, colour) into a picture uint8 (3, H, W). -> of twice its size"""
    x, y, words, colours = zip(*texts, strict=True)
    picture = draw_bounding_boxes(picture, torch.tensor([x, y, x, y]).T, list(words), "white",
                                  label_colors=list(colours))
    return picture.repeat_interleave(2, 1).repeat_interleave(2, 2)


def contact_sheet(clips, texts, frames, path):
    """Write a picture of the clips [(path, label)] that have texts, {index: [(x, line, word,
    colour), ...]}: frames below their texts. x counts characters; a frame is ten of them wide."""
    ends = [x + len(word) for x, _, word, _ in itertools.chain(*texts.values())]
    rows, width = [], 12 * max(10 * frames, *ends)
    for i, own in texts.items():
        lines = [line for _, line, _, _ in own]
        page = torch.full((3, 12 * (max(lines) - min(lines)) + 18, width // 2), 255).byte()
        rows.append(draw_texts(page, [(6 * x, 12 * (line - min(lines)), word, colour)
                                      for x, line, word, colour in own]))
        video = centre_crop([Clips(clips, frames, 118)[0, i].video], 118)[0]
        row = make_grid(video, frames, pad_value=1).mul(255).byte()
        rows.append(F.pad(row, (0, width - row.shape[2]), value=255))
    save_image(torch.cat(rows, 1) / 255, path)


def plot(panels, x_label, y_label, path, names=()):
    """Write a picture of curves. panels: {title: {name: [(x, y), ...]}}, one below the other, all
    on the same axes; a point alone is a dot. names: of x = 0, 1, ..., in place of numbers."""
    curves = itertools.chain(*[panel.values() for panel in panels.values()])
    points = np.array(list(itertools.chain(*curves)), float)                    # (n, 2)
    low, high = points.min(0), points.max(0)
    high += (high == low) * np.maximum(abs(high), 1)
    colours = ["red", "blue", "green", "darkorange", "purple", "deeppink", "brown", "gray"]
    tiles = []
    for title, panel in panels.items():
        tile = torch.full((3, 300, 480), 255, dtype=torch.uint8)
        tile = draw_bounding_boxes(tile, torch.tensor([[40, 35, 332, 264]]), colors="black")
        texts = [(40, 10, title, "black"), (40, 280, x_label, "black"), (2, 0, y_label, "black")]
        for n, share in enumerate(np.linspace(0, 1, len(names) or 5)):
            x, y = low + share * (high - low)
            texts.append((40 + 290 * share, 265, names[n] if names else f"{x:.3g}", "black"))
            texts.append((2, 255 - 225 * share, f"{y:.3g}", "black"))
        for n, (name, curve) in enumerate(panel.items()):
            colour = colours[n % len(colours)]
            at = (np.array(curve, float) - low) / (high - low) * [290, -225] + [40, 262]  # (n, 2)
            steps = np.linspace(0, len(at) - 1, 999)
            line = np.stack([np.interp(steps, range(len(at)), side) for side in at.T], 1)
            for dots, radius in ((line, 1), (at, 3 if len(at) < 20 else 1)):
                dots = torch.from_numpy(dots)[None]
                tile = draw_keypoints(tile, dots, colors=colour, radius=radius)
            texts.append((345, 30 + 14 * n, name, colour))
        tiles.append(draw_texts(tile, texts))
    save_image(torch.cat(tiles, 1) / 255, path)


# ---- CLIP and ActionCLIP builders ----------------------------------------------------------------


def _towers(D, width, layers, patch, width_t, heads_t, layers_t, size=224, context=77, **more):
    vision = {"image_size": size, "width": width, "layers": layers, "patch_size": patch, **more}
    text = {"context_length": context, "width": width_t, "heads": heads_t, "layers": layers_t}
    return {"embed_dim": D, "vision_cfg": vision, "text_cfg": text}


CLIPS = {  # as open_clip.get_model_config gives them; the first six are wkcn/TinyCLIP's
    "TinyCLIP-ViT-39M-16-Text-19M": _towers(512, 512, 12, 16, 512, 8, 6),
    "TinyCLIP-ViT-8M-16-Text-3M": _towers(512, 256, 10, 16, 256, 4, 3),
    "TinyCLIP-ResNet-30M-Text-29M": _towers(1024, 56, [3, 4, 6, 3], None, 512, 8, 9),
    "TinyCLIP-ResNet-19M-Text-19M": _towers(1024, 44, [3, 4, 6, 3], None, 512, 8, 6),
    "TinyCLIP-ViT-61M-32-Text-29M": _towers(512, 640, 12, 32, 512, 8, 9),
    "TinyCLIP-ViT-40M-32-Text-19M": _towers(512, 512, 12, 32, 512, 8, 6),
    "toy-large": _towers(64, 64, 3, 16, 64, 4, 1, 32, 20, head_width=16),
    "toy-small": _towers(48, 48, 2, 16, 48, 3, 1, 32, 20, head_width=16),
    "toy-resnet": _towers(64, 16, [1, 1, 1, 1], None, 64, 4, 1, 32, 20, head_width=16)}


def build_clip(spec, cache="runs/cache"):
    """Build a CLIP from NAME[:WEIGHTS] -> (clip, tokenizer, what read_weights found or {}).

    NAME: one of CLIPS, or of open_clip's with two plain towers. WEIGHTS: a tag of open_clip's, a
    file that read_weights knows, or `random`; without it, toy CLIPs come pre-trained, others are
    random. The activation is that of the weights (OpenAI: QuickGELU, TinyCLIP, LAION: GELU; mixing
    them loads without a word and costs accuracy), of a bare file that of NAME: of OpenAI's files
    say NAME-quickgelu:FILE."""
    name, _, weights = spec.partition(":")
    config = CLIPS.get(name) or open_clip.get_model_config(name) or {}
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    text = {"context_length", "vocab_size", "width", "heads", "layers"}
    if not config or set(config) - known or set(config["text_cfg"]) - text \
            or "timm_model_name" in config["vision_cfg"]:
        raise BadInput(f"{name:.99} is no CLIP known here: ViT-B-32, ... of open_clip and "
                       f"{', '.join(CLIPS)}")
    path, tag = None, {}
    if Path(weights).is_file():
        path = weights
    elif not weights and name.startswith("toy-"):
        path = cached(cache, name, functools.partial(_train_toy_clip, name), _train_toy_clip,
                      _toy_stills.__wrapped__, draw_toy, toy_truth, toy_caption, config)
    elif not weights:
        print(f"{name}: RANDOM WEIGHTS, since no :WEIGHTS were named", file=sys.stderr)
    elif weights != "random":
        tag = open_clip.get_pretrained_cfg(name, weights)
        if not tag:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise BadInput(f"{spec}: no such file, nor a tag of {name} ({tags}). TinyCLIP's files: "
                           f"github.com/wkcn/TinyCLIP-model-zoo")
        print(f"{spec}: downloaded, or taken from the cache ...", file=sys.stderr)
        try:
            path = open_clip.download_pretrained(tag)
        except Exception as error:
            raise BadInput(f"{spec}: no download ({type(error).__name__}); get the file and say "
                           f"{name}:FILE, of OpenAI {name}-quickgelu:FILE") from error
    saved = read_weights(path) if path else {}
    quick_gelu = {"quick_gelu": False, **config, **tag, **saved}["quick_gelu"]  # the last is right
    clip = open_clip.CLIP(**{**config, "quick_gelu": quick_gelu})
    clip.quick_gelu = quick_gelu
    clip.visual.image_mean = tag.get("mean", open_clip.OPENAI_DATASET_MEAN)
    clip.visual.image_std = tag.get("std", open_clip.OPENAI_DATASET_STD)
    if path:
        load_strictly(clip, open_clip.convert.convert_state_dict(clip, saved["clip"]), path, name)
    return clip, open_clip.SimpleTokenizer(context_length=clip.context_length), saved


def read_weights(path):
    """Read a file of weights -> {"clip": state, ...}: TinyCLIP's and open_clip's {"state_dict"}, or
    bare tensors; ActionCLIP's {"model_state_dict", "fusion_model_state_dict"}, which adds
    quick_gelu=True and fusion=state (ours say quick_gelu and more themselves). OpenAI's TorchScript
    archives are programs, and are not run."""
    more = {}
    try:
        state = open_clip.factory.load_state_dict(str(path))
        for key in ("input_resolution", "context_length", "vocab_size"):  # of such an archive
            state.pop(key, None)
        if "model_state_dict" in state:
            more = {key: value for key, value in state.items() if "state" not in key}
            more = {"quick_gelu": True, **more, "fusion": state["fusion_model_state_dict"]}
            state = state["model_state_dict"]
            for part in (state, more["fusion"]):
                nn.modules.utils.consume_prefix_in_state_dict_if_present(part, "module.")
    except Exception as error:
        if "TorchScript" in str(error):
            raise BadInput(
                f"{path} is a TorchScript archive, as OpenAI's are, and may run any code. If you "
                f"trust it: python -c \"import torch; torch.save(torch.jit.load('{path}', 'cpu')"
                f".state_dict(), 'FILE')\", then NAME-quickgelu:FILE") from error
        raise BadInput(f"{path}: no weights in a known format ({error!r:.99})") from error
    return {**more, "clip": state}


def load_strictly(module, state, path, name):
    """module.load_state_dict(state); where the two do not fit, BadInput says in what."""
    try:
        module.load_state_dict(state)
    except Exception as error:  # of other kinds where the file is another kind of file
        what = str(error).splitlines()[1:2] or [repr(error)]  # the first of what differs
        raise BadInput(f"{path} does not fit {name}: {what[0].strip():.300}") from error
    check_finite(module.state_dict(), name, path)


@functools.cache
def _toy_stills(steps, batch):
    """What toy CLIPs learn from -> uint8 (steps * batch, 3, 32, 32), captions"""
    rng, stills, captions = np.random.default_rng(0), [], []
    for _ in range(steps):
        truths = [toy_truth(rng, "growing", str(rng.choice(SCENES))) for _ in range(batch)]
        for truth in truths:
            truth |= {"x": rng.uniform(.15, .85), "y": rng.uniform(.15, .85)}
            stills.append(draw_toy(truth, [truth["x"]], [truth["y"]], [rng.uniform(.1, .25)], 32))
            captions.append(toy_caption(truth))
    return torch.from_numpy(np.concatenate(stills)).permute(0, 3, 1, 2), captions


@torch.enable_grad()
def _train_toy_clip(name, path, steps=300, batch=128):
    """In place of a download: train a toy CLIP as CLIP was trained, on toy stills with captions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip, tokenizer, _ = build_clip(f"{name}:random")
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3, weight_decay=.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    stills, captions = _toy_stills(steps, batch)
    token = {caption: tokenizer([caption])[0] for caption in set(captions)}
    for start in range(0, steps * batch, batch):
        pixels = stills[start:start + batch] / 255
        image = clip.encode_image(TF.normalize(pixels, clip.visual.image_mean,
                                               clip.visual.image_std), normalize=True)
        texts = torch.stack([token[caption] for caption in captions[start:start + batch]])
        text = clip.encode_text(texts, normalize=True)
        logits, target = clip.logit_scale.exp() * image @ text.T, torch.arange(batch)
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    save({"state_dict": clip.state_dict()}, path)


PROMPTS = (  # ActionCLIP's 16 templates
    "a photo of action {}", "a picture of action {}", "Human action of {}", "{}, an action",
    "{} this is an action", "{}, a video of action", "Playing action of {}", "{}",
    "Playing a kind of action, {}", "Doing a kind of action, {}", "Look, the human is {}",
    "Can you recognize the action of {}?", "Video classification of {}", "A video of {}",
    "The man is {}", "The woman is {}")


class FusionHead(nn.Module):
    """ActionCLIP's `Transf`: frame embeddings f (B, T, D) -> video embedding (B, D)

        z = transformer(f + p), p of T positions, 6 pre-LN blocks, no mask;  mean_t(z_t + f_t)

    Names, shapes and the init of .02 are the official checkpoints'. Beside embeddings that are not
    normalised such positions are nearly nothing, and the direction of a motion is learnt late: toys
    start from larger ones. token: a learned token stands first (eqs. (3), (8) of deit_video.py)."""

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

    def sequence(self, f):
        """The transformer's input: f (B, T, D) -> (B, T, D), or (B, 1 + T, D) with the token"""
        B, T, D = f.shape
        x = f + self.frame_position_embeddings.weight[:T]
        if self.token is None:
            return x
        return torch.cat([(self.token + self.token_position).expand(B, 1, D), x], 1)

    def read(self, f):
        """f (B, T, D) -> h_token (B, D), None without a token, and h_frame (B, D), eq. (3)"""
        z = self.transformer(self.sequence(f))                  # (B, T, D) or (B, 1 + T, D)
        h_token = None if self.token is None else z[:, 0] + f.mean(1)           # (B, D)        (3)
        return h_token, (z[:, -f.shape[1]:] + f).mean(1)                        # (B, D)        (3)

    def forward(self, f):
        h_token, h_frame = self.read(f)
        return h_frame if h_token is None else one_vector(h_token, h_frame)


def one_vector(h_token, h_frame):
    """Eq. (8) of deit_video.py, what a two-headed model deploys. Two (B, D) -> (B, D)"""
    return (F.normalize(h_token, dim=-1) + F.normalize(h_frame, dim=-1)) / 2    # (B, D)        (8)


class MeanHead(nn.Module):
    """ActionCLIP's `meanP`: (B, T, D) -> (B, D), blind to the order of frames"""

    def forward(self, f):
        return f.mean(1)


class ActionCLIP(nn.Module):
    """A CLIP and a fusion head: videos and texts -> embeddings of one space, not normalised; pixels
    are normalised in here, each CLIP's own way. frames: T of the checkpoint, or None; templates:
    sentences about a class; size: side of the frames; side: shorter side to decode to (224: 256)"""

    def __init__(self, name, clip, tokenizer, fusion_layers=6, token=False):
        super().__init__()
        self.name, self.clip, self.tokenizer = name, clip, tokenizer
        self.frames, self.templates = None, PROMPTS
        self.size, self.width = int(np.max(clip.visual.image_size)), clip.text_projection.shape[1]
        self.side = round(self.size * 8 / 7)
        mean, std = torch.tensor([clip.visual.image_mean, clip.visual.image_std]).view(2, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        heads = max(1, clip.ln_final.weight.numel() // 64)  # one per 64 of the text tower's width
        stds = (.1, .5) if name.startswith("toy-") else (.02, .02)
        self.fusion = MeanHead()
        if fusion_layers:
            self.fusion = FusionHead(self.width, heads, fusion_layers, *stds, token)

    def encode_frames(self, video):
        """(B, T, 3, S, S) in 0..1 -> (B, T, D)"""
        pixels = ((video - self.mean) / self.std).flatten(0, 1)
        return self.clip.encode_image(pixels).unflatten(0, video.shape[:2])

    def encode_video(self, video):
        """(B, T, 3, S, S) in 0..1 -> (B, D)"""
        return self.fusion(self.encode_frames(video))

    def encode_text(self, tokens):
        """(..., L) token ids -> (..., D)"""
        texts = [self.clip.encode_text(part) for part in tokens.flatten(0, -2).split(512)]
        return torch.cat(texts).unflatten(0, tokens.shape[:-1])

    def prompts(self, classes, templates=None):
        """K class names -> token ids (P, K, L), template-major, P = 16 templates or the model's"""
        tokens = torch.stack([self.tokenizer([template.format(name) for name in classes])
                              for template in templates or self.templates])
        if min(len(texts.unique(dim=0)) for texts in tokens) < len(set(classes)):
            raise BadInput(f"two classes are the same in their first {tokens.shape[2]} tokens")
        return tokens.to(self.mean.device)

    @torch.no_grad()
    def embed_classes(self, classes, templates=None):
        """K class names -> (P, K, D), computed once: deployed, the text tower does not run."""
        return self.eval().encode_text(self.prompts(classes, templates)).float()

    def forward(self, video, tokens):
        """-> video (B, D), text (..., D) or None, and the scale s = exp(logit_scale)"""
        text = None if tokens is None else self.encode_text(tokens)
        return self.encode_video(video), text, self.clip.logit_scale.exp()

    def millions(self):
        """Parameters in millions, without the word table (token embeddings)"""
        counted = [w for name, w in self.named_parameters() if "token_embedding" not in name]
        return sum(w.numel() for w in counted) / 1e6

    @torch.enable_grad()  # else PyTorch fuses layers, into which the counter does not see
    def gmac(self, frames):
        """Multiply-accumulates to embed a clip of T frames, in 1e9"""
        shape = 1, frames, 3, self.size, self.size
        video = torch.rand(shape, device=self.mean.device, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            self.eval().encode_video(video)
        return counter.get_total_flops() / 2e9

    def about(self, frames):
        """What a checkpoint says beside the weights, for build_action_clip"""
        return {"backbone": self.name, "quick_gelu": self.clip.quick_gelu, "frames": frames,
                "templates": self.templates}


def build_action_clip(spec, fusion_layers=6, cache="runs/cache", token=False, checkpoint=None):
    """ActionCLIP on the backbone NAME[:WEIGHTS] (see build_clip); fusion_layers=0: MeanHead. An
    ActionCLIP checkpoint as WEIGHTS brings its fusion head, with the token if it has one.
    checkpoint: such a file; ours name their own backbone, frames, templates."""
    if checkpoint:
        saved = read_weights(checkpoint)
        if "fusion" not in saved:
            raise BadInput(f"{checkpoint} holds no fusion head; a CLIP alone is NAME:{checkpoint}")
        spec = f"{saved.get('backbone', spec.partition(':')[0])}:{checkpoint}"
    clip, tokenizer, saved = build_clip(spec, cache)
    name, _, path = spec.partition(":")
    fusion = saved.get("fusion")
    token = token if fusion is None else "token" in fusion
    model = ActionCLIP(name, clip, tokenizer, fusion_layers, token)
    if fusion is not None:
        load_strictly(model.fusion, fusion, path, f"a fusion head of {fusion_layers} layers")
        model.frames = saved.get("frames")
        if model.frames is not None and not (type(model.frames) is int and 0 < model.frames < 78):
            raise BadInput(f"{path} says that it has {model.frames} frames; 1 to 77 are possible")
    if checkpoint:
        model.templates = saved.get("templates", PROMPTS)
    return model


class Task(NamedTuple):
    """Something to be said of a clip beside its action. templates: sentences for the L labels; q
    (N, L): how likely each is in N clips"""
    name: str
    labels: list
    templates: list = ("a photo of {}",)
    q: torch.Tensor = None


class SpatialHeads(nn.Module):
    """A head h_k per task on the video vector: logits s_k h_k(v)^ t_k^', eq. (4) of spatial_kd.py;
    starts as the identity, with the model's scale."""

    def __init__(self, D, tasks, scale):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(D, D) for _ in tasks)
        self.log_scale = nn.Parameter(torch.full((len(tasks),), np.log(scale)))
        for head in self.heads:
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, v, texts):
        """v (B, D), texts (L_k, D) per task -> logits (B, L_k) per task"""
        out = []
        with torch.autocast(v.device.type, enabled=False):
            for k, text in enumerate(texts):
                h = F.normalize(self.heads[k](v.float()), dim=-1)
                cosine = h @ F.normalize(text.float(), dim=-1).T                # (B, L_k)
                out.append(self.log_scale[k].exp() * cosine)
        return out


# ---- exit networks -------------------------------------------------------------------------------


def _toy_resnet():
    """ResNet with a block a stage and a quarter of ResNet-18's width."""
    net = models.ResNet(BasicBlock, [1, 1, 1, 1])
    net.conv1, net.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
    net.inplanes = 16
    for i in range(4):
        setattr(net, f"layer{i + 1}", net._make_layer(BasicBlock, 16 * 2 ** i, 1, 1 + (i > 0)))
    net.fc = nn.Linear(128, 1)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


@torch.enable_grad()
def _train_toy_resnet(path, steps=300, batch=128):
    """In place of a download: train a toy ResNet to tell colour and shape of toy stills."""
    stills, captions = _toy_stills(steps, batch)
    kinds = [tuple(caption.split()[1:3]) for caption in captions]
    names = sorted(set(kinds))
    labels = torch.tensor([names.index(kind) for kind in kinds])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _toy_resnet()
        net.fc = nn.Linear(128, len(names))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for start in range(0, steps * batch, batch):
        pixels = TF.normalize(stills[start:start + batch] / 255, IMAGENET_MEAN, IMAGENET_STD)
        F.cross_entropy(net(pixels), labels[start:start + batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    state = {key: x for key, x in net.state_dict().items() if not key.startswith("fc.")}
    save({"net": state}, path)


class ExitNet(nn.Module):
    """The ResNet of one modality; exits 1 to 3 read layers 1 to 3, exit 4 is its own classifier. mv
    and r start with a BatchNorm, i with ImageNet's mean and std. name: `toy` or any of torchvision;
    imagenet: its weights (of toy: of toy stills), but for the classifier and mv's first layer"""

    def __init__(self, modality, name, classes, imagenet=False, cache="runs/cache"):
        super().__init__()
        known = [n for n in models.list_models(models) if re.match(r"(wide_)?resne(t|xt)\d", n)]
        if name not in (*known, "toy"):
            raise BadInput(f"network {name}: there are {', '.join(known)} and toy")
        if name != "toy":
            try:
                net = models.get_model(name, weights="DEFAULT" if imagenet else None)
            except OSError as error:
                url = models.get_model_weights(name).DEFAULT.url
                raise BadInput(f"{name}: no download ({error}); put {url} into "
                               f"{torch.hub.get_dir()}/checkpoints") from error
        else:
            net = _toy_resnet()
            if imagenet:
                path = cached(cache, "toy-stills", _train_toy_resnet, _train_toy_resnet,
                              _toy_resnet, _toy_stills.__wrapped__, draw_toy, toy_truth)
                net.load_state_dict(read_saved(path, "net")["net"], strict=False)  # without fc
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.input = nn.BatchNorm2d(2 if modality == "mv" else 3) if modality != "i" else None
        if modality == "mv":
            net.conv1 = nn.Conv2d(2, net.conv1.out_channels, 7, 2, 3, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layers = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.fc = nn.Linear(net.fc.in_features, classes)

    def stages(self, x):
        """x (B, S, C, H, W) -> yields the maps (B*S, c, h, w) behind layers 1 to 4, as asked for"""
        x = x.flatten(0, 1)
        x = self.input(x) if self.input else (x - self.mean) / self.std
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
            yield x

    def classify(self, f, S):
        """Map behind layer4 -> consensus logits, mean of S segments: (B*S, c, h, w) -> (B, K)"""
        return self.fc(f.mean((2, 3))).unflatten(0, (-1, S)).mean(1)

    def forward(self, x):
        """x (B, S, C, H, W) -> the maps of exits 1 to 3, and the logits of exit 4, (B, K)"""
        *maps, last = self.stages(x)
        return maps, self.classify(last, x.shape[1])


class ExitHead(nn.Sequential):
    """An exit, without any activation as in the paper's code: (B*S, c, h, w), S -> consensus logits
    (B, K). What is linear commutes with the mean over segments, which therefore comes first."""

    def __init__(self, width, out, kernel, classes):
        super().__init__(nn.Conv2d(width, out, kernel, padding=1, bias=False), nn.BatchNorm2d(out),
                         nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * out, classes))

    def forward(self, f, S):
        conv, norm, pool, flat, linear = self
        f = norm(conv(f)).unflatten(0, (-1, S)).mean(1)                         # (B, c, h, w)
        return linear(flat(pool(f)))


def exit_heads(net, classes):
    """Exits 1 to 3 of an ExitNet as in the paper's code: for basic blocks (ResNet-18) c to c,
    kernels 7, 3, 3; for bottlenecks (ResNet-50) 256 to 64, 512 to 256, 1024 to 1024, kernels 3."""
    heads, basic = nn.ModuleList(), isinstance(net.layers[0][0], BasicBlock)
    for k in range(3):
        width = net.layers[k + 1][0].conv1.in_channels
        out, kernel = (width, (7, 3, 3)[k]) if basic else (width // (4, 2, 1)[k], 3)
        heads.append(ExitHead(width, out, kernel, classes))
    return heads


def exit_logits(net, heads, x):
    """Yields consensus logits (B, K) of exits 1 to 4 for x (B, S, C, H, W), each when asked for."""
    for k, f in enumerate(net.stages(x)):
        yield heads[k](f, x.shape[1]) if k < 3 else net.classify(f, x.shape[1])
