"""Data loading and model builders shared by the five scripts.

Sections: errors and files | data sets | decoding | datasets and loaders | augmentation | CLIP and
ActionCLIP | compressed video | ResNets with exits | toy videos | toy networks.

A mistake that the user can fix raises BadInput. A video that cannot be decoded raises BadVideo.

Axes:  B videos of a batch   T frames per video   C H W channels, height, width   D embedding width
K classes   P text templates   V windows of a video   S segments of a compressed video   E exits
N all videos of a list, or all frames of a file
"""
import contextlib
import csv
import dataclasses
import filecmp
import functools
import http.client
import io
import itertools
import json
import os
import queue
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
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
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD
from open_clip.transformer import QuickGELU, Transformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import functional as TF

# ---- errors and files ----------------------------------------------------------------------------


class BadInput(ValueError):
    """A mistake that the user can fix: what is wrong, where, and what would be right."""


class BadVideo(Exception):
    """A video that cannot be decoded, with the reason. PyAV's many errors become this one."""

    def __init__(self, path, reason):
        super().__init__(str(path), reason)  # both arguments, so that workers can pickle it
        self.path = str(path)
        self.reason = reason


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path and rename it to `path` at the end, so that an interrupted write never
    damages the old file. What killed processes left, a day ago or longer, is removed. Raises
    BadInput if the file or folder cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("unfinished-*"):  # by a process that was killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > 86400:
                    shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as folder:
            tmp = Path(folder) / path.name
            yield tmp
            if not (tmp.is_dir() and path.is_dir()):  # else another process made it meanwhile
                tmp.replace(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or error}") from error


def make_once(cache, name, make, verb="making"):
    """Call make(path) unless cache/name exists. Change the version in `name` with the code of make.
    In a group of processes, process 0 makes it and the others wait. -> path"""
    path = Path(cache) / name
    if not path.exists() and (not dist.is_initialized() or dist.get_rank() == 0):
        print(f"{verb} {path}, once ...", file=sys.stderr)
        with atomic_write(path) as tmp:
            make(tmp)
    if dist.is_initialized():
        dist.barrier()
    return path


def save_checkpoint(state, path):
    """Atomic torch.save of a dict. Raises BadInput if a weight is not finite."""
    for name, value in state.items():
        if isinstance(value, dict):
            require_finite(value, name, path)
    buffer = io.BytesIO()  # torch.save to a file hides why it cannot write
    torch.save(state, buffer)
    with atomic_write(path) as tmp:
        tmp.write_bytes(buffer.getbuffer())


def read_checkpoint(path, *keys):
    """Read a file of save_checkpoint, to the CPU. Raises BadInput if a key is missing."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: there is no such file")
    try:
        saved = torch.load(path, "cpu", weights_only=True)
        for key in keys:
            _ = saved[key]
        return saved
    except Exception as error:  # torch.load raises many kinds
        raise BadInput(f"{path} is damaged, or is not a checkpoint of this kind") from error


def require_finite(state, name, path):
    """Raises BadInput."""
    for key, x in state.items():
        if torch.is_tensor(x) and not x.isfinite().all():
            raise BadInput(f"{path}: {key} of {name} is not finite")


def load_state_dict(module, state, path, name):
    """module.load_state_dict(state), strictly. Raises BadInput, which says the first weight of the
    file, since that tells its layout, and the first difference."""
    try:
        module.load_state_dict(state)
    except Exception as error:  # of other kinds if the file is not what it should be
        difference = str(error).splitlines()[1:2] or [repr(error)]
        first = str(next(iter(state), "none")) if isinstance(state, dict) else type(state).__name__
        raise BadInput(f"{path} does not fit {name}; its first weight is {first:.99}: "
                       f"{difference[0].strip():.300}") from error
    require_finite(module.state_dict(), name, path)


# ---- data sets -----------------------------------------------------------------------------------


class Undecodable(dict):
    """{path: reason} of what the loaders of a data set could not decode. total: its videos"""
    total = float("inf")


@dataclasses.dataclass
class VideoLists:
    """The videos of a data set. train, test: lists of (path, class index). classes: K names.
    missing: listed videos that do not exist. copies: test videos whose content training has, too.
    unseen: classes held out of training.
    released_class_names: the names in ActionCLIP's UCF101 checkpoints. undecodable: filled by
    loaders."""
    name: str
    classes: list
    train: list
    test: list
    missing: list = dataclasses.field(default_factory=list)
    copies: list = dataclasses.field(default_factory=list)
    unseen: list = dataclasses.field(default_factory=list)
    released_class_names: list = None
    undecodable: Undecodable = dataclasses.field(default_factory=Undecodable)

    def __str__(self):
        return (f"{self.name}: {len(self.classes)} classes, {len(self.train)} training videos, "
                f"{len(self.test)} test videos")

    def digest(self):
        """A hash of classes, video names and sizes that does not depend on the folder's place."""
        videos = [(Path(path).parts[-2:], label, os.path.getsize(path))
                  for path, label in self.train + self.test]
        return zlib.crc32(repr((self.classes, len(self.train), videos)).encode())

    def warnings(self):
        """-> sentences to print beside the results"""
        trained = {label for _, label in self.train}
        untrained = [name for k, name in enumerate(self.classes) if trained and k not in trained]
        lists = {"listed videos are missing": self.missing,
                 "test videos are copies of training videos": self.copies,
                 "classes are held out of training": self.unseen,
                 "classes have no training video": untrained,
                 "videos cannot be decoded; in the test they count as wrong": self.undecodable}
        sentences = []
        for what, names in lists.items():
            if names:
                sentences.append(f"{len(names)} {what}: {', '.join(list(names)[:4])}"
                                 f"{', ...' if len(names) > 4 else ''}")
        return sentences


FORMATS = ("The formats are: HMDB51 and UCF101 as released, with the official lists beside the "
           "class folders; train1.csv and test1.csv, or train.csv and test.csv, with the header "
           "path,label; train/CLASS/* and test/CLASS/*")
# what may lie beside videos
OTHER_FILES = {".csv", ".db", ".htm", ".html", ".ini", ".json", ".md", ".pdf", ".txt", ".xml"}
PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def readable_class_name(name):
    """A class name in words: ApplyEyeMakeup -> apply eye makeup, brush_hair -> brush hair"""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name).lower()


def load_dataset(data, split=1, allow_missing=False, cache="runs/cache", toys="toy",
                 test_only=False):
    """Read the lists of a data set: one of TOY_DATASETS (rendered on first use; for "toy", `toys`
    says which) or a folder in one of FORMATS. Class indices follow the sorted names, never the
    ids of a list. test_only: train/ or the training CSV may be absent. -> VideoLists. Raises
    BadInput."""
    root = Path(data)
    if data in TOY_DATASETS:
        toys = toys if data == "toy" else data
        make = functools.partial(make_toy_dataset, **TOY_DATASETS[toys])
        root = make_once(cache, f"{toys}-v3", make)
    if not root.is_dir():
        raise BadInput(f"--data {data}: there is no such folder. Name a folder, or toy. {FORMATS}")
    train_rows, test_rows = _read_lists(root, split, test_only)
    rows = train_rows + test_rows
    file_ids = {path: _file_id(path) for path, _ in rows}
    missing = [path for path, file_id in file_ids.items() if file_id is None]
    if missing and not allow_missing:
        raise BadInput(f"{root}: {len(missing)} of {len(rows)} listed videos are missing, for "
                       f"example {', '.join(missing[:3])}. --allow-missing goes on without them")

    labels = {}  # file -> class name
    for path, name in rows:
        if labels.setdefault(file_ids[path] or path, name) != name:
            raise BadInput(f"{root}: {path} is listed under two labels, {name} and "
                           f"{labels[file_ids[path] or path]}")
    names = _class_names(root, {name for _, name in rows})
    classes = sorted(set(names.values()))
    index = {name: classes.index(names[name]) for name in names}
    train = [(path, index[name]) for path, name in train_rows if file_ids[path]]
    test = [(path, index[name]) for path, name in test_rows if file_ids[path]]
    if not (test and (train or test_only)):
        raise BadInput(f"{root}: there is no {'training' if test else 'test'} video, and "
                       f"{len(missing)} listed videos are missing")
    untrained = {name for _, name in test_rows} - {name for _, name in train_rows}
    if untrained and not test_only:
        raise BadInput(f"{root}: {len(untrained)} classes of the test list are not in the training "
                       f"list: {', '.join(sorted(untrained)[:4])}")
    train_ids = {file_ids[path] for path, _ in train}
    both = [path for path, _ in test if file_ids[path] in train_ids]
    if both:
        raise BadInput(f"{root}: {len(both)} videos are both in the training list and in the test "
                       f"list, for example {both[0]}")
    released = [name.title().replace(" ", "") for name in classes]
    is_ucf101 = (root / "ucfTrainTestlist").is_dir()
    copies = _copies(train, test, {path: file_ids[path][2] for path, _ in train + test})
    lists = VideoLists(Path(data).resolve().name, classes, train, test, missing, copies,
                       released_class_names=released if is_ucf101 else None)
    lists.undecodable.total = len(train + test)
    return lists


def _file_id(path):
    """Device, inode and size of a file, which its names share; None: not a file"""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None
    is_file = os.path.stat.S_ISREG(stat.st_mode)
    return (stat.st_dev, stat.st_ino, stat.st_size) if is_file else None


def _copies(train, test, sizes):
    """Test videos whose content a training video has, too. Only files of one size are read, and
    whole only where their middle agrees. -> paths"""
    def middle(path):
        with open(path, "rb") as file:
            file.seek(sizes[path] // 2)
            return sizes[path], file.read(64)

    shared = {sizes[path] for path, _ in train} & {sizes[path] for path, _ in test} - {0}
    originals = {middle(path): path for path, _ in train if sizes[path] in shared}
    candidates = {path: originals.get(middle(path)) for path, _ in test if sizes[path] in shared}
    return [path for path, original in candidates.items()
            if original and filecmp.cmp(path, original, shallow=False)]


def _class_names(root, names):
    """{label as listed: class name in words}. Labels that are all numbers are looked up in
    labels.csv (header id,name), as ActionCLIP has it."""
    listed = {name: name for name in sorted(names)}
    if not any(map(str.isalpha, "".join(names))):
        try:
            with open(root / "labels.csv", newline="", encoding="utf-8-sig") as file:
                known = {row["id"].strip(): row["name"].strip() for row in csv.DictReader(file)}
            listed = {name: known[name] for name in listed}
            if not all(listed.values()):
                raise ValueError("an empty name")
        except (OSError, KeyError, AttributeError, ValueError) as error:
            raise BadInput(f"{root}: the labels are numbers. Write words, or put labels.csv beside "
                           f"the lists, with the header id,name and a line for each of "
                           f"{', '.join(sorted(names)[:4])} ...") from error
    classes = {}
    for label, name in listed.items():
        other = classes.setdefault(readable_class_name(name), label)
        if other != label:
            raise BadInput(f"{root}: {other} and {label} are two spellings of one class; use one")
    return {label: readable_class_name(name) for label, name in listed.items()}


def _read_lists(root, split, test_only):
    """-> training and test rows [(path, label as listed)]"""
    if (root / "testTrainMulti_7030_splits").is_dir():
        return _read_hmdb51(root, split)
    if (root / "ucfTrainTestlist").is_dir():
        return _read_ucf101(root, split)
    for number in (split, "") if split == 1 else (split,):
        train, test = root / f"train{number}.csv", root / f"test{number}.csv"
        if test.is_file() and (train.is_file() or test_only):
            return _read_csv(train) if train.is_file() else [], _read_csv(test)
    train, test = root / "train", root / "test"
    if split == 1 and test.is_dir() and (train.is_dir() or test_only):
        return _read_class_folders(train), _read_class_folders(test)
    raise BadInput(f"--data {root}: there is no data set with a split {split}. {FORMATS}")


def _read_official_list(path, pattern):
    """Match every line of an official list -> matches"""
    if not path.is_file():
        raise BadInput(f"{path}, one of the official lists, is missing")
    matches = re.findall(pattern, path.read_text(errors="replace"), re.M)
    if not matches:
        raise BadInput(f"{path} lists no video")
    return matches


def _read_hmdb51(root, split):
    lists = root / "testTrainMulti_7030_splits"
    videos = root / "hmdb51_org" if (root / "hmdb51_org").is_dir() else root
    names = sorted({path.name.rsplit("_", 2)[0] for path in lists.glob("*_test_split?.txt")})
    train, test = [], []
    for name in names or ["CLASS"]:
        path = lists / f"{name}_test_split{split}.txt"
        for video, flag in _read_official_list(path, r"^(.+) ([012])\s*$"):
            if flag != "0":  # 1: training, 2: test, 0: neither
                rows = train if flag == "1" else test
                rows.append((str(videos / name / video), name))
    return train, test


def _read_ucf101(root, split):
    videos = root / "UCF-101" if (root / "UCF-101").is_dir() else root
    lists = []
    for name in ("trainlist", "testlist"):
        path = root / "ucfTrainTestlist" / f"{name}0{split}.txt"
        lists.append([(str(videos / video), video.split("/")[0])
                      for video in _read_official_list(path, r"^\S+")])
    return lists


def _read_class_folders(folder):
    rows = []
    for path in sorted(folder.glob("[!.]*")):
        if path.is_file() and path.suffix.lower() not in OTHER_FILES:
            raise BadInput(f"{path} lies in no class folder")
    for path in sorted(folder.glob("[!.]*/[!.]*")):
        if path.is_dir():
            raise BadInput(f"{path} is a folder within a class folder. Move its videos up, or make "
                           f"a video of pictures: ffmpeg -i {path}/%05d.jpg -q:v 2 {path}.mp4")
        if path.suffix.lower() in PICTURES:
            raise BadInput(f"{path} is a picture. Make a video of them: ffmpeg -i {path.parent}/"
                           f"%05d{path.suffix} -q:v 2 {path.parent}.mp4")
        if path.suffix.lower() not in OTHER_FILES:
            rows.append((str(path), path.parent.name))
    return rows


def _read_csv(path):
    header = None
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames
            rows = [(row["path"].strip(), row["label"].strip()) for row in reader]
        if not all(label for _, label in rows):
            raise ValueError("an empty label")
    except (ValueError, csv.Error, KeyError, AttributeError) as error:
        raise BadInput(f"{path} must be a UTF-8 file with the header path,label and both in each "
                       f"line; its header is {header}") from error
    return [(os.path.join(path.parent, video), label) for video, label in rows]


def hold_out_classes(data, count, seed=0):
    """Hold `count` random classes (toys: diagonal motions) out of training. -> {"": the other
    classes, "_unseen": test videos of the held-out classes, classified among these, "_unseen_all":
    the same videos, classified among all classes}. Raises BadInput."""
    if not count:
        return {"": data}
    candidates = [name for name in data.classes if name in DIAGONALS] or data.classes
    if not 2 <= count <= min(len(candidates), len(data.classes) - 2):
        raise BadInput(f"--unseen {count}: hold out two or more of {len(candidates)} classes, and "
                       f"leave two")
    rng = np.random.default_rng([seed, 4])
    unseen = sorted(rng.choice(candidates, count, replace=False).tolist())
    seen = [name for name in data.classes if name not in unseen]

    def subset(chosen, classes, train, test):
        index = {data.classes.index(name): classes.index(name) for name in chosen}
        return dataclasses.replace(
            data, name=f"{data.name}-unseen{count}", classes=classes, unseen=unseen,
            released_class_names=None,
            train=[(path, index[label]) for path, label in train if label in index],
            test=[(path, index[label]) for path, label in test if label in index])

    subsets = {"": subset(seen, seen, data.train, data.test),
               "_unseen": subset(unseen, unseen, [], data.test),
               "_unseen_all": subset(unseen, data.classes, [], data.test)}
    if not all(lists.test for lists in subsets.values()):
        raise BadInput(f"--unseen {count}: {', '.join(unseen)}, or the others, have no test video")
    return subsets


def video_ids(videos):
    """Hashes of the names and sizes of videos [(path, label)], by which a checkpoint remembers what
    it was trained on. -> int64 (N,)"""
    return torch.tensor([zlib.crc32(repr((Path(path).parts[-2:], os.path.getsize(path))).encode())
                         for path, _ in videos])


def source_video(path):
    """The longer video that a clip was cut from. UCF101 names it in v_Class_gGG_cCC, HMDB51 before
    its tags (..._u_nm_np1_ba_goo_0). Other files are their own source. -> str"""
    name = Path(path).stem
    ucf101 = re.fullmatch(r"(v_.+_g\d+)_c\d+", name)
    hmdb51 = re.fullmatch(r"(.+)_[hufl]_[cn]m_np\d_(?:fr|ba|le|ri)_(?:bad|med|goo)_\d+", name)
    match = ucf101 or hmdb51
    return match[1] if match else str(path)


def hold_out_videos(data, share, seed=0):
    """Take a share of each class's training videos out of training. All clips of one source video
    go together, since they nearly repeat each other. -> data, held-out [(path, label)]"""
    rng = np.random.default_rng([seed, 7])
    held_out = set()
    for k in sorted({label for _, label in data.train}):
        groups = {}
        for path in dict.fromkeys(path for path, label in data.train if label == k):
            groups.setdefault(source_video(path), []).append(path)
        count = round(share * sum(map(len, groups.values())))
        *candidates, _ = rng.permutation(list(groups)).tolist()  # one group stays in training
        for group in candidates:
            if count > 0:
                held_out.update(groups[group])
                count -= len(groups[group])
    train = [(path, label) for path, label in data.train if path not in held_out]
    held_out = [(path, label) for path, label in data.train if path in held_out]
    return dataclasses.replace(data, train=train), held_out


def subsample_shots(data, shots, seed=0):
    """Choose `shots` random training videos of each class; 0 means all."""
    if not shots:
        return data
    rng = np.random.default_rng([seed, 8])
    train = []
    for k, name in enumerate(data.classes):
        videos = [video for video in data.train if video[1] == k]
        if 0 < len(videos) < shots:
            raise BadInput(f"--shots {shots}: {name} has only {len(videos)} training videos")
        train += [videos[i] for i in rng.permutation(len(videos))[:shots]]
    return dataclasses.replace(data, name=f"{data.name}-shots{shots}", train=train)


def corrupt_labels(data, share, seed=0):
    """Replace a random share of the training labels by other classes."""
    if not share:
        return data
    K = len(data.classes)
    if K < 2:
        raise BadInput("--label-noise: wrong labels need two classes or more")
    rng = np.random.default_rng([seed, 9])
    train = list(data.train)
    for i in rng.permutation(len(train))[:round(share * len(train))]:
        path, label = train[i]
        train[i] = path, int(label + rng.integers(1, K)) % K
    return dataclasses.replace(data, name=f"{data.name}-noise{share:g}", train=train)


# ---- decoding ------------------------------------------------------------------------------------


def tsn_indices(num_frames, T, rng=None):
    """TSN sampling: split the video into T equal segments and take one frame of each: a random one
    with rng (training), else the middle one. Frames are counted: if their rate varies, segments
    last unequally long. Short videos repeat frames. -> T sorted indices"""
    i = np.arange(T)
    if rng is None:
        return (i * num_frames / T + max(0, num_frames / T - 1) / 2).astype(int)
    if num_frames <= T:
        repeated = rng.integers(num_frames, size=T - num_frames)
        return np.sort(np.concatenate([np.arange(num_frames), repeated]))
    return rng.integers(i * num_frames // T, (i + 1) * num_frames // T)


def dense_indices(num_frames, T, rng=None, views=1):
    """Dense sampling: T frames of a window of 128, as in Text4Vis; starts as in TSM. One random
    window with rng (training), else `views` evenly spaced ones; a single one is central. Short
    videos are repeated. -> (V, T)"""
    last = max(0, num_frames - 128)
    starts = [last // 2] if views == 1 else np.linspace(0, last, views).astype(int)
    if rng is not None:
        starts = [rng.integers(last + 1)]
    return (np.array(starts)[:, None] + np.arange(T) * max(1, 128 // T)) % num_frames


# Playlists are refused, because they name other files or addresses to open.
CONTAINERS = av.formats_available - {"concat", "dash", "hls", "image2", "imf", "rtsp", "sdp", "tty",
                                     "webm_dash_manifest"}
# MPEG-4 part 2 starts each picture (VOP) with this code. The next two bits say I, P, B or S.
VOP = re.compile(b"\0\0\1\xb6(.)", re.S)
B_VOP, S_VOP = 2, 3


@contextlib.contextmanager
def open_video(path, source=None, **options):
    """Open a video -> container, video stream. PyAV's errors become BadVideo. source: what av.open
    opens with `options` if it is not the file at `path` (see live_frames)."""
    if source is None:
        source = f"file:{path}"
        options = {"options": {"format_whitelist": ",".join(CONTAINERS)}}
    try:
        # "replace": HMDB51 has a file whose metadata are not UTF-8
        with av.open(source, metadata_errors="replace", **options) as container:
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams or streams[0].codec_context is None:
                raise BadVideo(path, "it has no video stream, or one of an unknown codec")
            streams[0].thread_count = 1  # loader workers are the threads
            yield container, streams[0]
    except FileNotFoundError as error:
        raise BadVideo(path, "there is no such file") from error
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise BadVideo(path, f"it is not a readable video ({type(error).__name__})") from error


class VideoIndex(NamedTuple):
    """What the packets of a file tell. num_frames: N of a plain decode loop. timestamps: (N,),
    sorted; None if frames can only be counted, from the start. keyframes: their positions.
    unsupported: why read_compressed cannot follow the motion vectors, or ''."""
    timestamps: np.ndarray | None
    keyframes: np.ndarray
    num_frames: int
    unsupported: str


@functools.lru_cache(maxsize=100_000)
def index_video(path):
    """Scan the packets of a file -> VideoIndex. The numbers in its header are often wrong."""
    timestamps, keyframes, vop_types = [], [], []
    num_small = num_packed = 0
    truncated = False
    with open_video(path) as (container, stream):
        container_name = container.format.name
        codec = stream.codec_context.codec.canonical_name
        for packet in container.demux(stream):
            if packet.size <= (codec == "mpeg4") or packet.is_discard:
                continue  # XviD writes placeholders of one byte; an edit list hides packets
            if codec == "vp8" and not bytes(packet)[0] & 16:
                continue  # a frame that others refer to, but that is not shown
            timestamps.append(packet.pts)
            if packet.is_keyframe:
                keyframes.append(packet.pts)
            if codec == "mpeg4":
                types = [code[0] >> 6 for code in VOP.findall(bytes(packet))]
                vop_types += types
                num_packed += len(types) == 2  # a B-frame shares the packet of the next P-frame
                num_small += packet.size < 12  # some 8 bytes say "not coded": no frame
            truncated = packet.is_corrupt
        reorders = stream.codec_context.has_b_frames
    if truncated:
        raise BadVideo(path, "it is cut off: its last packet is incomplete")
    unsupported = ""
    if codec != "mpeg4":
        unsupported = f"its codec is {codec}, not MPEG-4 part 2"
    elif B_VOP in vop_types or S_VOP in vop_types:
        unsupported = "it has B-frames, or global motion compensation"

    # Timestamps are trusted if they are complete and distinct, and if each packet gives a frame.
    # Where frames are reordered, sorted timestamps are those of decoding and tell nothing.
    trusted = None not in timestamps and len(set(timestamps)) == len(timestamps) and not num_small
    trusted = trusted and timestamps and min(timestamps) in keyframes
    trusted = trusted and not container_name.startswith("mpeg")  # these may start anywhere
    trusted = trusted and not (reorders and timestamps == sorted(timestamps))
    if container_name == "avi":
        trusted = trusted and codec == "mpeg4" and not reorders
    if trusted:
        timestamps = np.sort(timestamps)
        keyframes = np.searchsorted(timestamps, np.sort(keyframes))
        return VideoIndex(timestamps, keyframes, len(timestamps), unsupported)
    # In a packed AVI, a "not coded" packet follows each packet of two pictures, except perhaps the
    # last, so that packets count frames. Everything else is decoded and counted.
    packets_count = codec == "mpeg4" and num_packed - num_small in (0, 1)
    if container_name == "avi" and packets_count and vop_types[1:2] != [B_VOP]:
        num_frames = len(timestamps)
    else:
        with open_video(path) as (container, stream):
            num_frames = sum(1 for _ in container.decode(stream))
    if num_frames < 1:
        raise BadVideo(path, "its video stream holds no frame")
    return VideoIndex(None, np.zeros(1, int), num_frames, unsupported)


def decode_frames(path, indices, seek=True, export=None):
    """Decode in one pass -> yields (index, frame) for all frames decoded on the way to `indices`.
    With `seek`, decoding starts at the last keyframe before each index. export: options of a
    decoder that exports motion vectors. Raises BadVideo."""
    index = index_video(str(path))
    if not 0 <= min(indices) <= max(indices) < index.num_frames:
        raise BadVideo(path, f"it has {index.num_frames} frames, too few for {list(indices)}")
    with open_video(path) as (container, stream):
        needed = None
        if export is not None:
            stream.codec_context.flags2 |= Flags2.export_mvs  # before anything is decoded
            stream.codec_context.options = export
        elif seek and index.timestamps is not None and stream.codec_context.name == "h264":
            # skip other frames that no frame refers to, but none of the last, which may be lost
            needed = {*index.timestamps[list(indices)], *index.timestamps[-3:]}
        at = -1
        frames = size = None
        for i in sorted(set(map(int, indices))):
            before = np.searchsorted(index.keyframes, i, "right") - 1
            keyframe = int(index.keyframes[before]) if seek else 0
            if frames is None or keyframe > at + 1:
                if keyframe:
                    container.seek(int(index.timestamps[keyframe]), stream=stream)
                frames = _frames_from(path, container, stream, keyframe, needed)
                at = keyframe - 1
            while at < i:
                at, frame = next(frames)
                size = size or (frame.width, frame.height)
                if size != (frame.width, frame.height):
                    raise BadVideo(path, f"the frame size changes from {size}")
                yield at, frame
            if at > i:
                raise BadVideo(path, f"frame {i} of {index.num_frames} is missing or out of order")


def _frames_from(path, container, stream, keyframe, needed):
    """Yield (index, frame) from a keyframe to the end of the file. needed: timestamps; other frames
    may be skipped. Raises BadVideo if decoding cannot start there, or ends early."""
    index = index_video(str(path))
    at = keyframe - 1
    for packet in container.demux(stream):
        if needed is not None:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
        for frame in packet.decode():
            new = at + 1  # counted
            if index.timestamps is not None and frame.pts is not None:
                new = int(index.timestamps.searchsorted(frame.pts))
            if new <= at:
                continue  # before the keyframe
            # after a seek, damage may look otherwise than in one pass from the start
            wrong_start = new > keyframe or frame.pict_type != PictureType.I
            if keyframe and (frame.is_corrupt or (at == keyframe - 1 and wrong_start)):
                raise BadVideo(path, f"decoding cannot start at frame {keyframe}")
            if frame.is_corrupt:
                warn_damaged(path)
            at = new
            yield at, frame
    if at < max(keyframe, index.num_frames - 3):
        raise BadVideo(path, f"decoding ends after frame {at + 1} of {index.num_frames}")
    for missing in range(at + 1, index.num_frames):  # decoders lose up to two frames at the end
        yield missing, frame


@functools.cache
def warn_damaged(path):
    print(f"damaged pictures of {path} are used", file=sys.stderr)


def retry_without_seek(path, read):
    """read(seek=True), and if that fails read(seek=False): not every keyframe can be a start."""
    try:
        with contextlib.suppress(BadVideo):
            return read(True)
        return read(False)
    except (av.FFmpegError, ValueError) as error:
        raise BadVideo(path, f"its pixels cannot be converted ({error})") from error


def side_data(frame, name):
    """Data beside a frame's pixels, or None. (frame.side_data itself would leak memory.)"""
    try:
        return SideDataContainer(frame).get(name)
    except ValueError:  # PyAV does not know every kind, and a video may have others
        return None


CONVERTER = VideoReformatter()  # reuses its set-up for frames of the same size


def frame_to_tensor(frame, short_side=None, enlarge=True):
    """A decoded frame -> uint8 (3, H, W), RGB, upright. short_side: resize (bicubic) to this many
    pixels; with enlarge=False only down. Pixels are taken as square."""
    size = [frame.width, frame.height]
    interpolation = Interpolation.BILINEAR
    if short_side and (enlarge or short_side < min(size)):
        size = [max(1, round(side * short_side / min(size))) for side in size]
        interpolation = Interpolation.BICUBIC
    pixels = CONVERTER.reformat(frame, *size, "rgb24", interpolation=interpolation,
                                threads=1).to_ndarray()                         # (H, W, 3)
    matrix = side_data(frame, "DISPLAYMATRIX")  # frame.rotation does not know mirrored videos
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def read_frames(path, indices, short_side=None, enlarge=True):
    """Decode the frames at `indices`, in any order -> uint8 (T, 3, H, W); see frame_to_tensor"""
    wanted = set(map(int, indices))

    def read(seek):
        return {i: frame_to_tensor(frame, short_side, enlarge)
                for i, frame in decode_frames(path, indices, seek) if i in wanted}

    frames = retry_without_seek(path, read)
    # stacked in memory order (H, W, C), which is faster
    video = torch.stack([frames[int(i)].permute(1, 2, 0) for i in indices])     # (T, H, W, 3)
    return video.permute(0, 3, 1, 2)


STALL_TIMEOUT = 10  # seconds without a frame after which a live stream has ended


def live_frames(source, fps=4., drop=True):
    """Yield (seconds, frame) `fps` times per second of a live stream: a file, an address, a camera
    or - (standard input). Frames come at the stream's own pace; those that arrive while the caller
    is busy are dropped, unless drop=False. Raises BadVideo if the stream breaks off or stalls."""
    frames = queue.Queue(32)

    def read():  # in a thread, because a camera may block forever
        try:
            for item in _timed_frames(source):
                frames.put(item)
            frames.put(None)
        except BadVideo as error:
            frames.put(error)

    threading.Thread(target=read, daemon=True).start()
    start_time = previous = None
    while True:
        try:
            item = frames.get(timeout=STALL_TIMEOUT)
        except queue.Empty:
            raise BadVideo(source, f"no frame came for {STALL_TIMEOUT} s") from None
        if item is None:
            return
        if isinstance(item, BadVideo):
            raise item
        seconds, frame = item
        start_time = start_time or time.perf_counter() - seconds
        lag = time.perf_counter() - start_time - seconds if drop else 0
        time.sleep(max(0, -lag))
        sample = int(seconds * fps + .05)  # timestamps are rounded
        if sample == previous:
            continue
        previous = sample
        # an empty queue means that the source is slow, not the caller
        if lag < 1 / fps or frames.empty():
            yield seconds, frame


def _timed_frames(source):
    """Decode a stream as it comes -> yields (seconds since the first frame, frame). If timestamps
    are missing or jump, the stated frame rate counts. Damaged packets are skipped."""
    if source.isdigit():
        raise BadVideo(source, f"write /dev/video{source} for a camera")
    form, _, name = source.partition(":")
    if form not in ("avfoundation", "dshow"):  # cameras of macOS and Windows
        form = "v4l2" if source.startswith("/dev/video") else None
        name = "pipe:0" if source == "-" else source
    options = {"framerate": "30"} if form == "avfoundation" else {}  # its default fits few cameras
    seconds = 0.
    previous = None
    truncated = False
    with open_video(source, name, format=form, options=options) as (container, stream):
        for packet in container.demux(stream):
            truncated = packet.is_corrupt if packet.size else truncated
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                if previous is not None:
                    step = 0 if frame.time is None else frame.time - previous
                    seconds += step if 0 < step < 10 else 1 / float(stream.guessed_rate or 25)
                previous = frame.time or 0.
                yield seconds, frame
    if truncated:
        raise BadVideo(source, "it is cut off: its last packet is incomplete")


# ---- datasets and loaders ------------------------------------------------------------------------
# All randomness is seeded by (seed, epoch, video index). So results do not depend on the number of
# workers or GPUs, or on resuming.

torch.multiprocessing.set_sharing_strategy("file_system")  # else each video holds a file handle


class Sample(NamedTuple):
    """video: uint8 (V*T, 3, H, W), or CompressedVideo. label: class index, -1 if not decodable.
    rng_key: (epoch, index). undecodable: [(path, reason)] of videos that failed. A batch is a
    Sample of lists."""
    video: object
    label: int
    rng_key: tuple
    undecodable: list


@functools.lru_cache(maxsize=2_000)  # toys: 0.1 GB in each loader worker; at most 0.5 GB
def _training_frames(path, short_side):
    """Short training videos of few pixels, such as toys, are decoded once. -> uint8 (N, 3, H, W)"""
    return read_frames(path, range(index_video(path).num_frames), short_side, enlarge=False)


class VideoDataset(torch.utils.data.Dataset):
    """Decodes T frames of the video of a key (epoch, index) -> Sample. videos: [(path, label)].
    short_side: pixels. sampling: "tsn", or "dense" with `views` windows per test video.

    In training (train=True), frames are random, and another video replaces one that cannot be
    decoded. In testing, such a video is black and has label -1, so that it counts as wrong."""

    def __init__(self, videos, frames, short_side=None, sampling="tsn", views=1, train=False,
                 seed=0):
        if views > 1 and sampling != "dense":
            raise BadInput("--views: TSN sampling has one view; add --sampling dense")
        self.videos = videos
        self.frames = frames
        self.short_side = short_side
        self.sampling = sampling
        self.views = views
        self.train = train
        self.seed = seed

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, rng_key):
        epoch, i = rng_key
        rng = np.random.default_rng([self.seed, epoch, i])
        undecodable = []
        while True:
            path, label = self.videos[i]
            try:
                video = self.read(path, rng if self.train else None)
                return Sample(video, label, (epoch, i), undecodable)
            except BadVideo as error:
                undecodable.append((error.path, error.reason))
            if not self.train or len(undecodable) > 20:
                return Sample(self.blank(), -1, (epoch, i), undecodable)
            i = int(rng.integers(len(self.videos)))

    def read(self, path, rng):
        num_frames = index_video(path).num_frames
        if self.sampling == "dense":
            indices = dense_indices(num_frames, self.frames, rng, self.views).ravel()
        else:
            indices = tsn_indices(num_frames, self.frames, rng)
        if self.train and num_frames <= 32 and self.short_side and self.short_side <= 40:
            return _training_frames(path, self.short_side)[indices]
        return read_frames(path, indices, self.short_side, enlarge=not self.train)

    def blank(self):
        side = self.short_side or 32
        return torch.zeros(self.frames * self.views, 3, side, side, dtype=torch.uint8)


class VideoBatchSampler(torch.utils.data.Sampler):
    """Batches of keys (epoch, index) for each epoch of .epochs. Training: shuffled, whole batches.
    Testing: every video once. batch_size counts the videos of all processes."""

    def __init__(self, num_videos, batch_size, train=False, seed=0, rank=0, world_size=1):
        self.num_videos = num_videos
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epochs = range(1)

    def __len__(self):
        """Batches per epoch"""
        if self.train:
            return self.num_videos // self.batch_size
        return -(-self.num_videos // self.batch_size)

    def __iter__(self):
        for epoch in self.epochs:
            yield from self.batches(epoch)

    def batches(self, epoch):
        order = np.arange(self.num_videos)
        if self.train:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_videos)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = order[start:start + self.batch_size]
            local = batch[self.rank::self.world_size].tolist()
            if local:
                yield [(epoch, i) for i in local]


def _collate(samples):
    return Sample(*map(list, zip(*samples, strict=True)))


class VideoLoader(torch.utils.data.DataLoader):
    """DataLoader over a VideoDataset; its batches are Samples of lists. batch_size counts the
    videos of all processes. Videos that cannot be decoded are named once on stderr and collected
    in `undecodable`, which the loaders of a data set share; more than ten and more than 1 % of the
    videos of the loader, or of the data set, raise BadInput."""

    def __init__(self, dataset, batch_size, workers=0, rank=0, world_size=None, undecodable=None):
        if world_size is None:  # after destroy_process_group, process 0 continues alone
            parallel = dist.is_initialized()
            rank = dist.get_rank() if parallel else 0
            world_size = dist.get_world_size() if parallel else 1
        if dataset.train:
            batch_size = min(batch_size, len(dataset)) // world_size * world_size
        if not batch_size:
            raise BadInput(f"{len(dataset)} videos, or --batch-size, are too few for {world_size} "
                           f"processes")
        sampler = VideoBatchSampler(len(dataset), batch_size, dataset.train, dataset.seed, rank,
                                    world_size)
        if dataset.train and len(sampler) < 10:
            print(f"only {len(sampler)} steps per epoch: lower --batch-size", file=sys.stderr)
        self.undecodable = {} if undecodable is None else undecodable  # of all loaders
        self.undecodable_here = set()
        super().__init__(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=_collate,
                         persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
                         timeout=600 if workers else 0)  # a full /dev/shm would hang

    def __iter__(self):
        for batch in super().__iter__():
            for path, reason in itertools.chain(*batch.undecodable):
                if path not in self.undecodable:
                    print(f"cannot decode {path}: {reason}", file=sys.stderr)
                self.undecodable[path] = reason
                self.undecodable_here.add(path)
            nothing_left = self.dataset.train and -1 in batch.label
            failures = [(len(self.undecodable_here), len(self.dataset)),
                        (len(self.undecodable), getattr(self.undecodable, "total", float("inf")))]
            for failed, total in failures:
                if nothing_left or failed > max(10, .01 * total):
                    raise BadInput(f"{failed} of {total} videos cannot be decoded, for example "
                                   f"{path}: {self.undecodable[path]}")
            yield batch

    def epochs(self, first, last):
        """Yield (epoch, its batches) for epochs first..last-1. Workers prefetch across epochs."""
        self.batch_sampler.epochs = range(first, last)
        batches = iter(self)
        for epoch in range(first, last):
            yield epoch, itertools.islice(batches, len(self))


# ---- augmentation --------------------------------------------------------------------------------


def center_crop(videos, size, device="cpu", crops=1):
    """The middle of each video, or several crops from end to end of its longer side, one after the
    other: list of uint8 (T, 3, H, W) -> float (B, crops*T, 3, S, S) in 0..1"""
    places = [.5] if crops == 1 else np.linspace(0, 1, crops)
    batch = []
    for video in videos:
        video = video.to(device, non_blocking=True)
        H, W = video.shape[-2:]
        for place in places:
            top = round((H - size) * (place if H > W else .5))
            left = round((W - size) * (.5 if H > W else place))
            batch.append(TF.crop(video, top, left, size, size))
    return torch.stack(batch).unflatten(0, (-1, crops)).flatten(1, 2).float() / 255


SIDES = re.compile(r"(?<![a-z])((left|right)(wards?)?|(counter|anti)?clock-?wise|c?cw)(?![a-z])")


def flippable(classes):
    """For each class, whether its videos may be mirrored: not if its name tells left from right, or
    clockwise from counterclockwise. -> list of bool"""
    return [not SIDES.search(name.lower()) for name in classes]


def color_jitter(video, factors):
    """torchvision's adjust_brightness, adjust_contrast, adjust_saturation and adjust_hue, then gray
    where the last factor is 1, for all videos. (B, T, 3, S, S), (B, 5) -> (B, T, 3, S, S)"""
    brightness, contrast, saturation, hue, gray = factors.T[..., None, None, None]  # (B, 1, 1, 1)

    def to_gray(x):
        return .2989 * x[0] + .587 * x[1] + .114 * x[2]

    x = video.movedim(2, 0).contiguous()  # (3, B, T, S, S): whole planes are faster
    x = (brightness * x).clamp_(0, 1)
    mean = to_gray(x).mean((-2, -1), keepdim=True)                              # (B, T, 1, 1)
    x = mean.lerp(x, contrast).clamp_(0, 1)
    x = to_gray(x).lerp(x, saturation).clamp_(0, 1)

    # turn the hue, a number from 0 to 6 around the colour wheel
    r, g, b = x                                                                 # (B, T, S, S)
    high = x.amax(0)
    chroma = high - x.amin(0)
    divisor = chroma.clamp(min=1e-8)  # gray has no hue
    sixth = torch.where(high == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    sixth = torch.where(high == r, (g - b) / divisor, sixth) + 6 * hue
    distance = (sixth + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1, 1, 1)) % 6
    share = torch.minimum(distance, 4 - distance).clamp_(0, 1)                  # (3, B, T, S, S)
    x = high - chroma * share
    return torch.where(gray > 0, to_gray(x), x).movedim(0, 2).contiguous()


def augment(batch, size, can_flip, seed, device):
    """ActionCLIP's augmentation of a loader's batch -> float (B, T, 3, size, size) in 0..1. All
    frames of a video share one draw: a crop with sides of 1, .875, .75 or .66 (small networks: 1 or
    .875) times the shorter side, a flip with p .5 where can_flip (a bool per class), colour jitter
    (.4, .4, .2, .1) with p .8, gray with p .2."""
    scales = (1, .875, .75, .66) if size > 100 else (1, .875)
    videos, factors = [], []
    for video, label, rng_key in zip(batch.video, batch.label, batch.rng_key, strict=True):
        rng = np.random.default_rng([seed, *rng_key, 2])
        H, W = video.shape[-2:]
        first = int(rng.integers(len(scales)))
        second = int(np.clip(first + rng.integers(-1, 2), 0, len(scales) - 1))  # a step away
        h = max(1, int(min(H, W) * scales[first]))
        w = max(1, int(min(H, W) * scales[second]))
        top = int(rng.integers(H - h + 1))
        left = int(rng.integers(W - w + 1))
        video = video.to(device, non_blocking=True)
        video = TF.resized_crop(video, top, left, h, w, [size, size], antialias=True)
        flip = rng.random() < .5 and can_flip[label]
        videos.append(video.flip(-1) if flip else video)
        jitter = (1, 1, 1, 0)
        if rng.random() < .8:
            jitter = rng.uniform((.6, .6, .8, -.1), (1.4, 1.4, 1.2, .1))
        factors.append((*jitter, rng.random() < .2))
    factors = torch.tensor(factors).to(device, torch.float32, non_blocking=True)  # (B, 5)
    return color_jitter(torch.stack(videos).float() / 255, factors)


# ---- CLIP and ActionCLIP -------------------------------------------------------------------------


def _clip_config(D, width, layers, patch, text_width, text_heads, text_layers, size=224, length=77,
                 **vision):
    """As open_clip.get_model_config gives it"""
    vision |= {"image_size": size, "width": width, "layers": layers, "patch_size": patch}
    text = {"context_length": length, "width": text_width, "heads": text_heads,
            "layers": text_layers}
    return {"embed_dim": D, "vision_cfg": vision, "text_cfg": text}


CLIP_CONFIGS = {  # the first six are the TinyCLIPs that open_clip can build
    "TinyCLIP-ViT-39M-16-Text-19M": _clip_config(512, 512, 12, 16, 512, 8, 6),
    "TinyCLIP-ViT-8M-16-Text-3M": _clip_config(512, 256, 10, 16, 256, 4, 3),
    "TinyCLIP-ResNet-30M-Text-29M": _clip_config(1024, 56, [3, 4, 6, 3], None, 512, 8, 9),
    "TinyCLIP-ResNet-19M-Text-19M": _clip_config(1024, 44, [3, 4, 6, 3], None, 512, 8, 6),
    "TinyCLIP-ViT-61M-32-Text-29M": _clip_config(512, 640, 12, 32, 512, 8, 9),
    "TinyCLIP-ViT-40M-32-Text-19M": _clip_config(512, 512, 12, 32, 512, 8, 6),
    "toy-large": _clip_config(64, 64, 3, 16, 64, 4, 1, 32, 20, head_width=16),
    "toy-small": _clip_config(48, 48, 2, 16, 48, 3, 1, 32, 20, head_width=16),
    "toy-resnet": _clip_config(64, 16, [1, 1, 1, 1], None, 64, 4, 1, 32, 20, head_width=16)}


TINYCLIP_URL = "https://github.com/wkcn/TinyCLIP-model-zoo/releases/download/checkpoints"
ACTIONCLIP_URL = "https://download.openmmlab.com/mmaction/v1.0/projects/actionclip"  # mmaction2
HUGGING_FACE_URL = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def weight_urls(name):
    """-> {tag: address} of weights that open_clip does not know: those of TinyCLIP, and of
    ActionCLIP trained on Kinetics-400"""
    if name in CLIP_CONFIGS and name.startswith("TinyCLIP"):
        tag = "YFCC15M" if "-16-" in name else "LAION400M"
        return {tag: f"{TINYCLIP_URL}/{name}-{tag}.pt"}
    urls = {}
    for frames in {"ViT-B-32": (8,), "ViT-B-16": (8, 16, 32)}.get(name, ()):
        model = f"actionclip_vit-base-p{name[-2:]}-res224-clip-pre_1x1x{frames}_k400-rgb"
        urls[f"kinetics400-{frames}f"] = f"{ACTIONCLIP_URL}/{model}/{name.lower()}-{frames}f.pth"
    return urls


def find_weights(spec):
    """The file of NAME:WEIGHTS, where WEIGHTS is a file, a tag of weight_urls or an address, which
    is downloaded once. -> its path, or None for other WEIGHTS. Raises BadInput."""
    name, _, weights = spec.partition(":")
    if Path(weights).is_file():
        return weights
    url = weight_urls(name).get(weights, weights)
    if not url.startswith(("https://", "http://")):
        return None
    folder = Path(torch.hub.get_dir(), "checkpoints")
    file = url.partition("?")[0].rpartition("/")[2]
    if url == weights:  # many addresses end in the same name
        file = f"{zlib.crc32(url.encode()):08x}-{file}"

    def download(tmp):
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                size = answer.length
            torch.hub.download_url_to_file(url, str(tmp))
            if size not in (None, tmp.stat().st_size):  # torch.hub does not compare
                raise OSError("the connection broke off")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise BadInput(f"{url} cannot be downloaded ({error}). Get the file in another way; "
                           f"put it at {folder / file}, or write {name}:FILE") from error

    return str(make_once(folder, file, download, f"downloading {url} to"))


def build_clip_model(spec, cache="runs/cache"):
    """Build a CLIP from NAME[:WEIGHTS] -> (clip_model, tokenizer, what read_weights gave, or {}).

    NAME: one of CLIP_CONFIGS, or an open_clip name with two plain towers. WEIGHTS: a tag of
    open_clip or weight_urls, a file that read_weights knows, its https:// address, or `random`.
    Without WEIGHTS, toy CLIPs come pre-trained and all others are random. Raises BadInput.

    The activation belongs to the weights: QuickGELU for OpenAI's, GELU for TinyCLIP's and LAION's.
    The wrong one loads silently and costs accuracy. A bare file does not say which; for a file of
    OpenAI's weights write NAME-quickgelu:FILE."""
    name, _, weights = spec.partition(":")
    config = CLIP_CONFIGS.get(name) or open_clip.get_model_config(name) or {}
    supported = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    supported_text = {"context_length", "vocab_size", "width", "heads", "layers"}
    if not config or set(config) - supported or set(config["text_cfg"]) - supported_text \
            or "timm_model_name" in config["vision_cfg"]:
        raise BadInput(f"{name:.99} is not a CLIP that can be built here, nor a file; use "
                       f"ViT-B-32, ViT-B-16, RN50, ... of open_clip, {', '.join(CLIP_CONFIGS)}")
    path, tag = find_weights(spec), {}
    if not weights and name.startswith("toy-"):
        path = make_once(cache, f"{name}-v2", functools.partial(_train_toy_clip, name))
    elif not weights:
        print(f"{name} has RANDOM WEIGHTS, because no :WEIGHTS were named", file=sys.stderr)
    elif not path and weights != "random":
        tag = open_clip.get_pretrained_cfg(name, weights)
        if not tag:
            tags = [*weight_urls(name), *open_clip.list_pretrained_tags_by_model(name)]
            raise BadInput(f"{spec}: {weights} is not a file, an address, nor a tag of {name} "
                           f"(tags: {', '.join(tags) or 'none'})")
        print(f"{spec}: downloading, unless it is in the cache ...", file=sys.stderr)
        try:
            urllib.request.urlopen(HUGGING_FACE_URL, timeout=5).close()
        except urllib.error.HTTPError:
            pass  # there is a network
        except OSError:
            # open_clip looks into its cache alone; otherwise it would retry for a minute
            open_clip.pretrained.hf_hub_download.keywords["local_files_only"] = True
        try:
            path = open_clip.download_pretrained(tag)
        except Exception as error:
            raise BadInput(f"{spec} cannot be downloaded ({type(error).__name__}). Get the weights "
                           f"from {HUGGING_FACE_URL}/{tag.get('hf_hub')} and write {name}:FILE, or "
                           f"{name}-quickgelu:FILE if they are OpenAI's") from error
    saved = read_weights(path) if path else {}
    quick_gelu = {"quick_gelu": False, **config, **tag, **saved}["quick_gelu"]  # the last is right
    clip_model = open_clip.CLIP(**{**config, "quick_gelu": quick_gelu})
    clip_model.quick_gelu = quick_gelu
    clip_model.visual.image_mean = tag.get("mean", open_clip.OPENAI_DATASET_MEAN)
    clip_model.visual.image_std = tag.get("std", open_clip.OPENAI_DATASET_STD)
    if path:
        state = open_clip.convert.convert_state_dict(clip_model, saved["clip"])
        load_state_dict(clip_model, state, path, name)
        if "quick_gelu" not in saved and not tag and name not in CLIP_CONFIGS:
            print(f"{path} does not say its activation: {'Quick' * quick_gelu}GELU is taken",
                  file=sys.stderr)
    tokenizer = open_clip.SimpleTokenizer(context_length=clip_model.context_length)
    return clip_model, tokenizer, saved


def read_weights(path):
    """Read a file of weights -> {"clip": state dict, ...}. Raises BadInput. Known layouts:
    TinyCLIP's and open_clip's {"state_dict"}, {"model"}, or bare tensors;
    ActionCLIP's {"model_state_dict", "fusion_model_state_dict"}, which adds "fusion" and quick_gelu
    = True (the checkpoints of these scripts say quick_gelu, and more, themselves);
    mmaction2's clip.* and adapter.*, which adds "frames", the number of its positions, too.
    Files that could run code, such as OpenAI's own TorchScript archives, are refused."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: there is no such file")
    metadata = {}
    try:
        state = open_clip.factory.load_state_dict(str(path))
        for key in ("input_resolution", "context_length", "vocab_size"):  # of a converted archive
            state.pop(key, None)
        state = state.get("model", state)
        if "model_state_dict" in state:
            metadata = {key: value for key, value in state.items() if "state" not in key}
            metadata = {"quick_gelu": True, **metadata, "fusion": state["fusion_model_state_dict"]}
            metadata["fusion"] = _without_wrappers(metadata["fusion"])
            state = state["model_state_dict"]
        state = _without_wrappers(state)
        if "text_model.final_layer_norm.weight" in state:
            raise ValueError("it has the layout of Hugging Face's transformers; use open_clip's")
        positions = state.get("adapter.frame_position_embeddings.weight")       # (T, D)
        if positions is not None:
            fusion = {key: state.pop(key) for key in list(state) if key.startswith("adapter.")}
            fusion = {key.removeprefix("adapter."): x for key, x in fusion.items()}
            padding = (0, 0, 0, 77 - len(positions))
            fusion["frame_position_embeddings.weight"] = F.pad(positions, padding)
            metadata = {"quick_gelu": True, "frames": len(positions), "fusion": fusion}
            state = {key.removeprefix("clip."): x for key, x in state.items()}
        dtypes = {x.dtype for x in state.values() if torch.is_tensor(x) and x.ndim}
        if not all(dtype.is_floating_point for dtype in dtypes):
            raise ValueError(f"weights of {dtypes}")
    except Exception as error:
        code = ""
        if "TorchScript" in str(error):  # as OpenAI's files
            code = f"torch.jit.load('{path}', 'cpu').state_dict()"
        elif "GLOBAL" in str(error):  # objects of other classes, as in files of mmaction2's trainer
            code = f"torch.load('{path}', 'cpu', weights_only=False)['state_dict']"
        if code:
            raise BadInput(
                f"{path} is TorchScript or holds other objects than tensors, and could run any "
                f"code. If you trust it, convert it: python -c \"import torch; torch.save({code}, "
                f"'FILE')\" and use NAME:FILE, or NAME-quickgelu:FILE for OpenAI's") from error
        raise BadInput(f"{path} holds no weights in a known layout ({error!r:.99})") from error
    return {**metadata, "clip": state}


def _without_wrappers(state):
    """Remove the prefixes that DataParallel, torch.compile and Lightning put before names."""
    return {re.sub(r"^((_orig_mod|model|module)\.)+", "", key): x for key, x in state.items()}


TEMPLATES = (  # ActionCLIP's 16
    "a photo of action {}", "a picture of action {}", "Human action of {}", "{}, an action",
    "{} this is an action", "{}, a video of action", "Playing action of {}", "{}",
    "Playing a kind of action, {}", "Doing a kind of action, {}", "Look, the human is {}",
    "Can you recognize the action of {}?", "Video classification of {}", "A video of {}",
    "The man is {}", "The woman is {}")


class FusionHead(nn.Module):
    """ActionCLIP's `Transf`, from frame embeddings f (B, T, D) to a video embedding (B, D):

        z = transformer(f + p), h = mean_t(z_t + f_t);   p: T positions; 6 pre-LN blocks, no mask

    Names, shapes and std .02 are those of the official checkpoints. Positions of std .02 are tiny
    beside unnormalised frame embeddings, so the order of frames is learned slowly; toy networks use
    a larger std."""

    def __init__(self, width, heads, layers=6, std=.02, position_std=.02):
        super().__init__()
        self.frame_position_embeddings = nn.Embedding(77, width)
        self.transformer = Transformer(width, layers, heads, act_layer=QuickGELU,
                                       norm_layer=functools.partial(nn.LayerNorm, eps=1e-12))
        for module in self.modules():
            if isinstance(module, nn.Linear):  # not attention's in-projection, which stays xavier
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.frame_position_embeddings.weight, std=position_std)

    def forward(self, f):
        positions = self.frame_position_embeddings.weight[:f.shape[1]]          # (T, D)
        z = self.transformer(f + positions)                                     # (B, T, D)
        return (z + f).mean(1)                                                  # (B, D)


class MeanHead(nn.Module):
    """ActionCLIP's `meanP`: (B, T, D) -> (B, D). It does not see the order of frames."""

    def __init__(self, *_):
        super().__init__()

    def forward(self, f):
        return f.mean(1)


class ActionCLIP(nn.Module):
    """A CLIP and a fusion head: videos and texts become embeddings in one space, not normalised.
    Pixels are normalised in here. frames: T of the checkpoint, or None. classes: those of the
    checkpoint, or []. templates: sentences about a class. trained_on: video_ids of the checkpoint.
    crop_size: side of the input frames. resize_to: shorter side to decode to (224: 256)."""

    def __init__(self, name, clip_model, tokenizer, fusion_head=FusionHead, layers=6):
        super().__init__()
        self.name = name
        self.clip_model = clip_model
        self.tokenizer = tokenizer
        self.frames = None
        self.classes = []
        self.templates = TEMPLATES
        self.longest_text = 0  # number of tokens
        self.trained_on = torch.tensor([])
        self.crop_size = int(np.max(clip_model.visual.image_size))
        self.resize_to = round(self.crop_size * 8 / 7)
        self.embed_dim = clip_model.text_projection.shape[1]
        mean, std = clip_model.visual.image_mean, clip_model.visual.image_std
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        heads = max(1, clip_model.ln_final.weight.numel() // 64)  # as in ActionCLIP
        stds = (.1, .5) if name.startswith("toy-") else (.02, .02)
        self.fusion = fusion_head(self.embed_dim, heads, layers, *stds)

    def encode_frames(self, video):
        """(B, T, 3, S, S) in 0..1 -> (B, T, D)"""
        pixels = ((video - self.mean) / self.std).flatten(0, 1)                 # (B*T, 3, S, S)
        return self.clip_model.encode_image(pixels).unflatten(0, video.shape[:2])

    def encode_video(self, video):
        """(B, T, 3, S, S) in 0..1 -> (B, D)"""
        return self.fusion(self.encode_frames(video))

    def encode_text(self, tokens):
        """(..., length) token ids -> (..., D), as CLIP.encode_text. No token sees those behind it,
        so padding can be cut off. On a CPU it is not: other sizes round differently."""
        clip = self.clip_model
        if tokens.is_cuda and self.longest_text:
            tokens = tokens[..., :self.longest_text]
        length = tokens.shape[-1]
        embeddings = []
        for chunk in tokens.flatten(0, -2).split(512):  # K classes x 16 templates need memory
            x = clip.token_embedding(chunk) + clip.positional_embedding[:length]
            x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
            x = clip.ln_final(x)[torch.arange(len(x), device=x.device), chunk.argmax(-1)]
            embeddings.append(x @ clip.text_projection)
        return torch.cat(embeddings).unflatten(0, tokens.shape[:-1])

    def tokenize_classes(self, classes, templates=None):
        """K class names -> token ids (P, K, length) under P templates (default: the model's)"""
        tokens = torch.stack([self.tokenizer([template.format(name) for name in classes])
                              for template in templates or self.templates])
        if min(len(prompts.unique(dim=0)) for prompts in tokens) < len(set(classes)):
            raise BadInput(f"two classes have the same first {tokens.shape[2]} tokens; rename one")
        self.longest_text = max(self.longest_text, int(tokens.argmax(-1).max()) + 1)
        return tokens.to(self.mean.device)

    @torch.no_grad()
    def encode_classes(self, classes, templates=None):
        """K class names -> (P, K, D). Computed once: at test time the text tower does not run."""
        return self.eval().encode_text(self.tokenize_classes(classes, templates)).float()

    def forward(self, video, tokens):
        """-> video (B, D), text (..., D) or None, and the scale exp(logit_scale)"""
        text = None if tokens is None else self.encode_text(tokens)
        return self.encode_video(video), text, self.clip_model.logit_scale.exp()

    def num_params_m(self):
        """Parameters in millions, without the token embeddings"""
        weights = [w for name, w in self.named_parameters() if "token_embedding" not in name]
        return sum(w.numel() for w in weights) / 1e6

    @torch.enable_grad()  # without gradients, PyTorch fuses layers that the counter does not see
    def gmacs(self, frames):
        """Multiply-accumulates, in 1e9, to embed a video of T frames"""
        video = torch.rand(1, frames, 3, self.crop_size, self.crop_size, device=self.mean.device,
                           requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            self.eval().encode_video(video)
        return counter.get_total_flops() / 2e9

    def metadata(self, frames, data):
        """What a checkpoint says beside the weights. data: VideoLists that it is trained on"""
        return {"backbone": self.name, "quick_gelu": self.clip_model.quick_gelu, "frames": frames,
                "classes": data.classes, "templates": self.templates, "digest": data.digest(),
                "trained_on": video_ids(data.train)}


def build_actionclip(spec, fusion_head=FusionHead, cache="runs/cache", checkpoint=None):
    """ActionCLIP on the backbone NAME[:WEIGHTS] (see build_clip_model). An ActionCLIP checkpoint as
    WEIGHTS brings its fusion head. checkpoint: such a file, used as it is; those of these scripts
    also say their backbone, frames and templates. Raises BadInput."""
    if checkpoint:
        saved = read_weights(checkpoint)
        if "fusion" not in saved:
            raise BadInput(f"{checkpoint} holds no fusion head; for CLIP alone write "
                           f"NAME:{checkpoint}")
        spec = f"{saved.get('backbone', spec.partition(':')[0])}:{checkpoint}"
    clip_model, tokenizer, saved = build_clip_model(spec, cache)
    name, _, path = spec.partition(":")
    layers = sum(key.endswith("in_proj_weight") for key in saved.get("fusion", ())) or 6
    model = ActionCLIP(name, clip_model, tokenizer, fusion_head, layers)
    if "fusion" in saved:
        load_state_dict(model.fusion, saved["fusion"], path, "the fusion head")
        model.frames = saved.get("frames")
        model.classes = saved.get("classes", [])
        model.trained_on = saved.get("trained_on", model.trained_on)
        if not torch.is_tensor(model.trained_on):
            raise BadInput(f"{path}: its trained_on is not a tensor")
        if model.frames is not None and not (type(model.frames) is int and 0 < model.frames < 78):
            raise BadInput(f"{path}: it says {model.frames} frames; 1 to 77 are possible")
    if checkpoint:
        model.templates = saved.get("templates", TEMPLATES)
        try:
            checked = [template.format("x") for template in model.templates]
            if not checked or max(map(len, checked)) > 1000:
                raise ValueError("no template, or a long one")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise BadInput(f"{path}: its templates are not sentences with {{}}") from error
    return model


# ---- compressed video ----------------------------------------------------------------------------
# MPEG-4 part 2 stores P-frame t as motion vectors v_t, one per block of 8 or 16 pixels, and a
# remainder. Accumulated motion vectors (CoViAR, Wu et al., CVPR 2018) trace each pixel p back to
# the I-frame of its group of pictures (GOP):
#     A_t(p) = A_{t-1}(p - v_t(p)),  A_0(p) = p,  MV_t(p) = p - A_t(p),  R_t(p) = F_t(p) - I(A_t(p))
# Unlike in CoViAR, vectors keep their quarters of a pixel, I is sampled bilinearly, and positions
# are clamped to the image border, as decoders do (CoViAR leaves the pixel unmoved). A block
# without a vector (intra coded) counts as still, so the residual holds its content.

AV_MOTION_VECTOR = np.dtype({  # FFmpeg's struct; (dst_x, dst_y) is the centre of the block
    "names": ["w", "h", "dst_x", "dst_y", "x", "y", "scale"], "itemsize": 40,
    "formats": ["u1", "u1", "i2", "i2", "i4", "i4", "u2"], "offsets": [4, 5, 10, 12, 24, 28, 32]})


def p_frame_indices(path):
    """Positions of the frames with motion -> (P,): all but the I-frames, if there are others"""
    index = index_video(str(path))
    indices = np.setdiff1d(np.arange(index.num_frames), index.keyframes)
    return indices if len(indices) else np.arange(index.num_frames)


class CompressedVideo(NamedTuple):
    """S frames of a video and the I-frame that each one refers to, uint8 (S, 3, H, W), or None;
    motion_qpel: accumulated motion in quarters of a pixel at every 4th pixel, x and y, int16
    (S, 2, H / 4, W / 4); size: (H, W)"""
    i_frames: torch.Tensor | None
    frames: torch.Tensor | None
    motion_qpel: torch.Tensor
    size: tuple

    def to(self, device):
        tensors = [x if x is None else x.to(device, non_blocking=True) for x in self[:3]]
        return CompressedVideo(*tensors, self.size)


def read_compressed(path, indices, pixels=True):
    """Decode the frames at `indices`, the I-frame each one refers to, and the accumulated motion
    between them (0 for I-frames) -> CompressedVideo. pixels=False: motion alone, which is faster.
    Raises BadVideo."""
    if unsupported := index_video(str(path)).unsupported:
        raise BadVideo(path, f"{unsupported}; re-encode it")
    export = {} if pixels else {"skip_idct": "all", "skip_loop_filter": "all"}
    wanted = set(map(int, indices))

    def read(seek):
        samples, vectors = {}, []
        i_frame = previous = None
        for i, frame in decode_frames(path, indices, seek, export):
            if frame.rotation or frame.interlaced_frame:
                kind = "rotated" if frame.rotation else "interlaced"
                raise BadVideo(path, f"a frame is {kind}; re-encode it")
            if frame.pict_type == PictureType.I:  # wherever the encoder put one
                i_frame = frame
                vectors = []
            elif i_frame is None:
                raise BadVideo(path, "its motion does not start at an I-frame; re-encode it")
            elif frame is not previous:  # a repeated frame has no new vectors
                vectors.append(bytes(side_data(frame, "MOTION_VECTORS") or b""))
            previous = frame
            if i in wanted:
                rgb = [x.reformat(format="rgb24", threads=1).to_ndarray()
                       for x in (i_frame, frame) if pixels]                     # (H, W, 3) each
                samples[i] = list(vectors), *rgb
        return samples, (frame.height, frame.width)

    samples, size = retry_without_seek(path, read)
    vectors, *rgb = zip(*[samples[int(i)] for i in indices], strict=True)
    motion = torch.from_numpy(_accumulate_motion(vectors, *size))
    rgb = [torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) for images in rgb]
    i_frames, frames = rgb or (None, None)
    return CompressedVideo(i_frames, frames, motion, size)


def _accumulate_motion(vectors, H, W):
    """vectors: for each of S frames, those of the P-frames since its I-frame, as bytes, oldest
    first. -> MV in quarters of a pixel at every 4th pixel, int16 (S, 2, h, w)"""
    S = len(vectors)
    longest = max(1, *map(len, vectors))
    padded = [[b""] * (longest - len(chain)) + chain for chain in vectors]  # b"": nothing moves
    grid = _motion_grid(list(itertools.chain(*padded)), H, W)                   # (S * longest, n)
    first = np.arange(S)[:, None, None] * grid[:longest].size  # where each frame's grids start
    cells_per_row = np.intp(-(-W // 8) + 1)
    y, x = np.mgrid[2:H + 2:4, 2:W + 2:4].astype(np.int16)
    start_x = 4 * np.minimum(x, W - 1) + np.int16(2)                            # (h, w)
    start_y = 4 * np.minimum(y, H - 1) + np.int16(2)
    at_x = start_x[None].repeat(S, 0)                                           # (S, h, w)
    at_y = start_y[None].repeat(S, 0)
    for t in reversed(range(longest)):  # newest first, back to the I-frame
        cell = (at_y >> 5) * cells_per_row + (at_x >> 5)
        motion = grid.take(first + t * grid.shape[1] + cell)
        at_x += motion.astype(np.int16)
        at_y += (motion >> 16).astype(np.int16)
        at_x.clip(2, 4 * W - 2, out=at_x)
        at_y.clip(2, 4 * H - 2, out=at_y)
    return np.stack([start_x - at_x, start_y - at_y], 1)


def _motion_grid(frames, H, W):
    """The motion vectors of P-frames, bytes, on cells of 8 x 8 pixels, in quarters of a pixel. One
    int32 holds x (lower half) and y, since that is faster to look up. -> int32 (P, cells)"""
    v = np.frombuffer(b"".join(frames), AV_MOTION_VECTOR)
    frame = np.repeat(np.arange(len(frames)), [len(x) // AV_MOTION_VECTOR.itemsize for x in frames])
    h, w = -(-H // 8) + 1, -(-W // 8) + 1  # blocks may reach beyond the frame
    grid = np.zeros(len(frames) * h * w, np.int32)
    x, y = v["dst_x"] - v["w"] // 2, v["dst_y"] - v["h"] // 2
    cell = (frame * h + (y >> 3)) * w + (x >> 3)  # the first cell of each block
    quarters = 4 // v["scale"].max(initial=1)
    motion = (v["y"] * quarters << 16) + (v["x"] * quarters & 0xFFFF)
    grid[cell] = motion
    wide, high = v["w"] > 8, v["h"] > 8  # blocks have 8 or 16 pixels a side
    for mask, offset in ((wide, 1), (high, w), (wide & high, w + 1)):
        grid[cell[mask] + offset] = motion[mask]
    return grid.reshape(len(frames), -1)


def split_modalities(video, top=0, left=0, height=None, width=None):
    """CompressedVideo -> motion (S, 2, h, w) in pixels; residual (S, 3, h, w), whole numbers from
    -255 to 255; i_frames uint8 (S, 3, h, w), of a window or of whole frames. For these, exactly:
    frames = round(warp(i_frames, motion)) + residual. Without pixels: (motion,)"""
    H, W = video.size
    window = ..., slice(top, top + (height or H)), slice(left, left + (width or W))
    motion = video.motion_qpel.repeat_interleave(4, -1).repeat_interleave(4, -2)[..., :H, :W]
    motion = motion[window] / 4
    if video.frames is None:
        return (motion,)
    residual = video.frames[window] - warp(video.i_frames, motion, top, left).round()
    return motion, residual, video.i_frames[window]


def warp(i_frames, motion, top=0, left=0):
    """I(A): i_frames (S, 3, H, W) sampled at p - motion(p) for the pixels p of a window; motion
    (S, 2, h, w) -> float (S, 3, h, w)"""
    H, W = i_frames.shape[-2:]
    y = torch.arange(top, top + motion.shape[-2], device=i_frames.device)[:, None]
    x = torch.arange(left, left + motion.shape[-1], device=i_frames.device)
    grid = torch.stack([(2 * (x - motion[:, 0]) + 1) / W - 1,
                        (2 * (y - motion[:, 1]) + 1) / H - 1], -1)              # (S, H, W, 2)
    return F.grid_sample(i_frames.float(), grid, padding_mode="border", align_corners=False)


def compressed_inputs(videos, size, rngs=None, can_flip=None):
    """What the three networks see of B CompressedVideos -> {"mv": (B, S, 2, size, size), pixels /
    40, clamped to +-.5; "r": (B, S, 3, size, size) in -1..1; "i": the same in 0..1}.

    The middle square. In training, with a generator and a bool per video: one random square of 1,
    .875 or .75 times the shorter side; and where can_flip, a flip with p .5, which negates mv's x.
    """
    inputs = []
    for n, video in enumerate(videos):
        side = min(video.size)
        top, left = [(length - side) // 2 for length in video.size]
        if rngs:
            side = max(1, int(side * rngs[n].choice((1, .875, .75))))
            top, left = [int(rngs[n].integers(length - side + 1)) for length in video.size]
        motion, *pixels = split_modalities(video, top, left, side, side)
        x = torch.cat([motion.clamp(-20, 20), *pixels], 1)                      # (S, 8 or 2, h, w)
        x = TF.resize(x, [size, size], antialias=True)
        if rngs and rngs[n].random() < .5 and can_flip[n]:
            x = x.flip(-1)
            x[:, 0] = -x[:, 0]
        inputs.append(x)
    mv, r, i = torch.stack(inputs).tensor_split((2, 5), 2)
    return {"mv": mv / 40, "r": r / 255, "i": i / 255} if pixels else {"mv": mv / 40}


class CompressedDataset(VideoDataset):
    """Reads a P-frame of each of S segments, its I-frame and its motion -> Sample with a
    CompressedVideo. copies: folder of re-encoded copies, which are made if need be."""

    def __init__(self, videos, segments, copies=None, train=False, seed=0):
        super().__init__(videos, segments, train=train, seed=seed)
        self.copies = copies

    def read(self, path, rng):
        path = reencoded_copy(path, self.copies) if self.copies else path
        indices = p_frame_indices(path)
        return read_compressed(path, indices[tsn_indices(len(indices), self.frames, rng)])

    def blank(self):
        pixels = super().blank()
        motion = torch.zeros(self.frames, 2, 8, 8, dtype=torch.int16)
        return CompressedVideo(pixels, pixels, motion, (32, 32))


def reencode(path, out):
    """Write a video in CoViAR's form: MPEG-4 part 2, 340 x 256, upright, an I-frame at least every
    12 frames, no B-frames, quantiser 2 (FFmpeg's -q:v 1), constant frame rate. Raises BadVideo."""
    num_frames = index_video(str(path)).num_frames
    with av.open(f"file:{out}", "w", format="mp4") as container:
        options = {"g": "12", "bf": "0", "qmin": "2", "qmax": "2"}
        stream = container.add_stream("mpeg4", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        stream.thread_count = 1  # the same file on any machine
        for i, frame in decode_frames(path, range(num_frames), seek=False):
            if frame.rotation:
                pixels = frame_to_tensor(frame).permute(1, 2, 0).contiguous().numpy()
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            try:
                # MPEG-4 part 2 does not name its colour space; decoders assume this one
                copy = frame.reformat(
                    340, 256, "yuv420p", None, Colorspace.ITU601, threads=1,
                    interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
                    dst_color_range=ColorRange.MPEG)
            except (av.FFmpegError, ValueError) as error:
                raise BadVideo(path, f"its pixels cannot be converted ({error})") from error
            copy.pts, copy.time_base, copy.pict_type = i, Fraction(1, 25), PictureType.NONE
            container.mux(stream.encode(copy))
        container.mux(stream.encode(None))


def reencoded_copy(path, folder):
    """Path of a video's copy in CoViAR's form, which is made on first use"""
    number = zlib.crc32(os.fsencode(os.path.abspath(path)))
    copy = Path(folder) / Path(path).parent.name / f"{Path(path).stem}-{number:08x}.mp4"
    if not copy.exists() or copy.stat().st_mtime < os.path.getmtime(path):
        with atomic_write(copy) as tmp:
            reencode(path, tmp)
    return str(copy)


# ---- ResNets with exits --------------------------------------------------------------------------


class ExitNet(nn.Module):
    """The ResNet of one modality. Exits 1 to 3 read layers 1 to 3; exit 4 is its own classifier.
    mv and r start with a BatchNorm, i with ImageNet's mean and std. name: `toy`, or any ResNet of
    torchvision. imagenet: start from ImageNet weights, except the classifier and mv's first layer.
    Raises BadInput."""

    def __init__(self, modality, name, num_classes, imagenet=False):
        super().__init__()
        known = [x for x in models.list_models(models) if re.match(r"(wide_)?resne(t|xt)\d", x)]
        if name not in (*known, "toy"):
            raise BadInput(f"there is no network {name}; use toy, {', '.join(known)}")
        if name == "toy":
            net = _toy_resnet()
        else:
            try:
                net = models.get_model(name, weights="DEFAULT" if imagenet else None)
            except OSError as error:
                url = models.get_model_weights(name).DEFAULT.url
                raise BadInput(f"the weights of {name} cannot be downloaded ({error}). Put {url} "
                               f"into {torch.hub.get_dir()}/checkpoints") from error
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        channels = 2 if modality == "mv" else 3
        self.input_norm = nn.BatchNorm2d(channels) if modality != "i" else None
        if modality == "mv":
            net.conv1 = nn.Conv2d(2, net.conv1.out_channels, 7, 2, 3, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layers = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.fc = nn.Linear(net.fc.in_features, num_classes)

    def stages(self, x):
        """x (B, S, C, H, W) -> yields the maps (B*S, c, h, w) after layers 1 to 4, one on demand"""
        x = x.flatten(0, 1)
        x = self.input_norm(x) if self.input_norm else (x - self.mean) / self.std
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
            yield x

    def classify(self, f, S):
        """Map after layer 4 (B*S, c, h, w) -> logits (B, K), the mean over segments (consensus)"""
        return self.fc(f.mean((2, 3))).unflatten(0, (-1, S)).mean(1)

    def forward(self, x):
        """x (B, S, C, H, W) -> the maps of exits 1 to 3, and the logits of exit 4 (B, K)"""
        *maps, last = self.stages(x)
        return maps, self.classify(last, x.shape[1])


class ExitHead(nn.Sequential):
    """An early exit, without any activation, as in the paper's code: (B*S, c, h, w), S -> (B, K).
    Pooling and classifier are linear, so the mean over segments may come first: it is cheaper."""

    def __init__(self, channels, width, kernel, num_classes):
        super().__init__(
            nn.Conv2d(channels, width, kernel, padding=1, bias=False), nn.BatchNorm2d(width),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, num_classes))

    def forward(self, f, S):
        conv, norm, pool, flatten, linear = self
        f = norm(conv(f)).unflatten(0, (-1, S)).mean(1)                         # (B, c, h, w)
        return linear(flatten(pool(f)))


def exit_heads(net, num_classes):
    """Exits 1 to 3 of an ExitNet as in the paper's code. Basic blocks (ResNet-18): c to c channels,
    kernels 7, 3, 3. Bottlenecks (ResNet-50): 256 to 64, 512 to 256, 1024 to 1024, kernels 3."""
    basic = isinstance(net.layers[0][0], BasicBlock)
    heads = nn.ModuleList()
    for k in range(3):
        channels = net.layers[k + 1][0].conv1.in_channels
        width = channels if basic else channels // (4, 2, 1)[k]
        kernel = (7, 3, 3)[k] if basic else 3
        heads.append(ExitHead(channels, width, kernel, num_classes))
    return heads


def exit_logits(net, heads, x):
    """Yield the logits (B, K) of exits 1 to 4 for x (B, S, C, H, W), each computed on demand."""
    for k, f in enumerate(net.stages(x)):
        yield heads[k](f, x.shape[1]) if k < 3 else net.classify(f, x.shape[1])


# ---- toy videos ----------------------------------------------------------------------------------
# Each action is a motion. A single frame does not reveal it: position and size at mid-video are
# distributed alike for all classes. Scene bias: in half of the training videos the background is
# the class's own; in test split 1 it is random; in test split 2 it is that of another class.
# Classes of the compressed scripts pair a shape with a motion. Diagonals test unseen classes.
# The crowded sets are hard: a smaller object lies behind the first and moves in its own way, and
# there are 25 training videos per class. toy-crowded-large has 200, for a teacher that knows more.

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
TOY_DATASETS = {  # arguments of make_toy_dataset
    "toy": {}, "toy-pairs": {"train": 900, "test": 240, "pairs": True},
    "toy-diagonals": {"train": 2000, "test": 500, "motions": (*MOTIONS, *DIAGONALS)},
    "toy-crowded": {"train": 150, "test": 600, "second": True},
    "toy-crowded-large": {"seed": 1, "second": True}}


def sample_toy_attributes(rng, motion, scene):
    """Random attributes of a toy video. Lengths are relative to the image side, at mid-video."""
    return {"motion": motion, "scene": scene, "shape": str(rng.choice(SHAPES)),
            "colour": str(rng.choice(list(COLOURS))), "x": rng.uniform(.38, .62),
            "y": rng.uniform(.38, .62), "radius": rng.uniform(.13, .19),
            "speed": rng.uniform(.8, 1.1), "phase": list(rng.random(2))}


def sample_second_object(rng, first, motions):
    """Random attributes of an object behind the first: smaller, of another colour"""
    second = sample_toy_attributes(rng, str(rng.choice(motions)), first["scene"])
    colours = [colour for colour in COLOURS if colour != first["colour"]]
    return {**second, "colour": str(rng.choice(colours)), "radius": .6 * second["radius"],
            "x": rng.uniform(.25, .75), "y": rng.uniform(.25, .75), "phase": first["phase"]}


def toy_caption(attributes):
    """What a single frame shows: "a red circle at the top left on stripes\""""
    x, y = attributes["x"], attributes["y"]
    column = ["left", "", "right"][int(x > .42) + int(x > .58)]
    row = ["top", "", "bottom"][int(y > .42) + int(y > .58)]
    place = f"{row} {column}".strip() or "centre"
    return (f"a {attributes['colour']} {attributes['shape']} at the {place} on "
            f"{attributes['scene']}")


def render_frames(attributes, x, y, radius, pixels, frames=None):
    """Frames with the object at x, y, with this radius, (N,) each -> uint8 (N, pixels, pixels, 3).
    frames: draw it on these, instead of the scene"""
    row = (np.arange(pixels, dtype=np.float32)[:, None] + .5) / pixels              # (H, 1)
    column = row.T                                                                  # (1, W)
    phase = np.float32(attributes["phase"])
    p = (column + phase[0]) * 8 % 1
    q = (row + phase[1]) * 8 % 1
    background = {"stripes": p < .5, "checks": (p < .5) ^ (q < .5), "plain ground": p < 0,
                  "dots": np.hypot(p - .5, q - .5) < .3}[attributes["scene"]]
    x, y, radius = np.float32([x, y, radius])[..., None, None]                      # (N, 1, 1)
    u, v = np.broadcast_arrays((column - x) / radius, (row - y) / radius)           # (N, H, W)
    far = np.maximum(abs(u), abs(v))
    near = np.minimum(abs(u), abs(v))
    inside = {"circle": u * u + v * v < 1, "square": far < .85, "cross": (near < .35) & (far < 1),
              "triangle": (v < .8) & (v > 2.4 * abs(u) - 1.1)}[attributes["shape"]]
    # textured, so that growing and shrinking move pixels inside the object
    shade = .85 + .15 * np.sin(5 * u[inside]) * np.sin(5 * v[inside])
    if frames is None:
        frames = np.empty((*inside.shape, 3), np.uint8)
        frames[:] = np.where(background, 110, 70)[..., None]
    frames[inside] = np.float32(COLOURS[attributes["colour"]]) * shade[:, None]
    return frames


def render_video(attributes, frames=16, pixels=64):
    """-> uint8 (N, pixels, pixels, 3)"""
    time = np.linspace(-.5, .5, frames, dtype=np.float32) * attributes["speed"]
    dx, dy, growth = (MOTIONS | DIAGONALS)[attributes["motion"]]
    x = attributes["x"] + .5 * dx * time
    y = attributes["y"] + .5 * dy * time
    radius = attributes["radius"] * np.exp(growth * time)
    behind = None
    if "second" in attributes:
        behind = render_video(attributes["second"], frames, pixels)
    return render_frames(attributes, x, y, radius, pixels, behind)


def write_video(path, frames, fps=24, codec="mpeg4", pix_fmt="yuv420p", **options):
    """Encode uint8 frames (N, H, W, 3): every 12th is an I-frame, the others are P-frames."""
    options = {"g": "12", "bf": "0", "qmin": "2", "qmax": "4", **options}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.thread_count = 1  # the same file on any machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def make_toy_dataset(folder, train=1200, test=300, seed=0, pairs=False, motions=tuple(MOTIONS),
                     second=False):
    """Render and encode toy videos into `folder`, with the lists of splits 1 and 2, and their
    attributes in toy_attributes.json. pairs: classes are shape x motion, as in "circle moving
    left"; larger and longer videos with one motion vector per 8 x 8 pixels; split 2 has the same
    videos, but its classes are the colours of the objects. second: a second object behind the
    first."""
    rng = np.random.default_rng(seed)
    attributes = {}
    shape = (24, 96) if pairs else (16, 64)  # frames, pixels
    options = {"flags": "+mv4"} if pairs else {}
    subsets = [("train", train, ["train1", "train2"]), ("test", test, ["test1"])]
    if not pairs:
        subsets.append(("swapped", test, ["test2"]))
    for subset, count, lists in subsets:
        (folder / subset).mkdir(parents=True)
        rows = [("path", "label")]
        colours = rows.copy()
        for i in range(count):
            action = i % len(motions)
            label = motions[action]
            scene = SCENES[(action + 2 * (subset == "swapped")) % len(SCENES)]
            if subset == "test" or (subset == "train" and rng.random() >= .5):
                scene = str(rng.choice(SCENES))
            sample = sample_toy_attributes(rng, label, scene)
            if pairs:
                sample["shape"] = ("circle", "cross")[i // len(motions) % 2]
                label = f"{sample['shape']} {label}"
            if second:
                sample["second"] = sample_second_object(rng, sample, motions)
            name = f"{subset}/{i:04d}.mp4"
            write_video(folder / name, render_video(sample, *shape), **options)
            attributes[name] = sample
            rows.append((name, label))
            colours.append((name, sample["colour"]))
        tables = dict.fromkeys(lists, rows)
        if pairs:
            tables[f"{subset}2"] = colours
        for name, table in tables.items():
            with open(folder / f"{name}.csv", "w", newline="") as file:
                csv.writer(file).writerows(table)
    (folder / "toy_attributes.json").write_text(json.dumps(attributes, indent=0))


# ---- toy networks --------------------------------------------------------------------------------


@functools.cache
def _toy_image_caption_pairs(steps, batch_size):
    """What toy CLIPs learn from -> uint8 (steps * batch_size, 3, 32, 32), captions"""
    rng = np.random.default_rng(0)
    images, captions = [], []
    for _ in range(steps):
        batch = [sample_toy_attributes(rng, "growing", str(rng.choice(SCENES)))
                 for _ in range(batch_size)]
        for attributes in batch:
            attributes |= {"x": rng.uniform(.15, .85), "y": rng.uniform(.15, .85)}
            radius = rng.uniform(.1, .25)
            images.append(render_frames(attributes, [attributes["x"]], [attributes["y"]], [radius],
                                        32))
            captions.append(toy_caption(attributes))
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2), captions


@torch.enable_grad()
def _train_toy_clip(name, path, steps=300, batch_size=128):
    """Instead of a download: train a toy CLIP as CLIP was trained, on toy images with captions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip_model, tokenizer, _ = build_clip_model(f"{name}:random")
    optimizer = torch.optim.AdamW(clip_model.parameters(), lr=2e-3, weight_decay=.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    images, captions = _toy_image_caption_pairs(steps, batch_size)
    tokens = {caption: tokenizer([caption])[0] for caption in set(captions)}
    target = torch.arange(batch_size)
    for start in range(0, steps * batch_size, batch_size):
        batch = slice(start, start + batch_size)
        pixels = TF.normalize(images[batch] / 255, clip_model.visual.image_mean,
                              clip_model.visual.image_std)
        image = clip_model.encode_image(pixels, normalize=True)                 # (B, D)
        text = torch.stack([tokens[caption] for caption in captions[batch]])    # (B, length)
        text = clip_model.encode_text(text, normalize=True)                     # (B, D)
        logits = clip_model.logit_scale.exp() * image @ text.T                  # (B, B)
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    save_checkpoint({"state_dict": clip_model.state_dict()}, path)


def _toy_resnet():
    """ResNet with one block per stage and a quarter of ResNet-18's width"""
    net = models.ResNet(BasicBlock, [1, 1, 1, 1])
    net.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
    net.bn1 = nn.BatchNorm2d(16)
    net.inplanes = 16
    for i in range(4):
        setattr(net, f"layer{i + 1}", net._make_layer(BasicBlock, 16 * 2 ** i, 1, 1 + (i > 0)))
    net.fc = nn.Linear(128, 1)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
