"""Benchmarks, to be run by hand on an idle machine: `python tests/bench.py`, or some of them:
`python tests/bench.py step stream`. Ways that are compared take turns. Figures are
minimum-median-maximum.

reading     CPU ms to read 8 frames of a training video, and the cores that keep an H200 busy
compressed  ms to read 3 segments of an MPEG-4 video of 340 x 256 pixels. floor: decoding alone;
            motion; all: I-frame, frame and motion; all + residual, computed on the CPU
step        ms of a training step of ActionCLIP with 8 frames of 224 pixels: augmentation; networks
            with AdamW. On a GPU also MFU (share of an H100's peak), peak memory, and compiled
stream      ms per frame of a live video (--watch) beside encoding all 8 frames again
picture     no benchmark: draw the README's records/modalities.png again
"""
import collections
import functools
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import pkd_compressed
import tinyclip_swap

H, W, FRAMES, SEGMENTS = 256, 340, 120, 3
PEAK = 989e12  # dense bf16 operations per second of an H100 or H200
READ = {"floor": lambda path, at: collections.deque(common.decode_frames(path, at), 0),
        "motion": functools.partial(common.read_compressed, pixels=False),
        "all": common.read_compressed,
        "all + residual":
        lambda path, at: common.split_modalities(common.read_compressed(path, at))}


def texture(height, width, seed):
    """Detail of all sizes, the finer the weaker, as in pictures of the world. uint8 (H, W, 3)"""
    generator, total = torch.Generator().manual_seed(seed), 0
    for size in (2, 4, 8, 16, 32, 64):
        noise = torch.randn(1, 3, height // size + 2, width // size + 2, generator=generator)
        total = total + size ** .7 * F.interpolate(noise, (height, width), mode="bicubic")
    return (128 + total[0].permute(1, 2, 0) * (45 / total.std())).clamp(0, 255).byte().numpy()


def moving(speed):
    """A camera that pans, speed pixels a frame, an object that crosses its view, and noise"""
    rng, ground, thing = np.random.default_rng(0), texture(H, W + 500, 1), texture(100, 60, 2)
    for i in range(FRAMES):
        left, x = int(speed * i), int(120 * (1 + np.sin(i * max(.5, speed) / 30)))
        frame = ground[:, left:left + W].astype(int)
        frame[78:178, x:x + 60] = thing
        yield (frame + rng.normal(0, .5, frame.shape)).round().clip(0, 255).astype(np.uint8)


def timed(ways, repeats):
    """ms of functions that take turns -> a sorted array of each"""
    spent = [[] for _ in ways]
    for _ in range(3 + repeats):
        for way, row in zip(ways, spent, strict=True):
            start = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            row.append(1e3 * (time.perf_counter() - start))
    return [np.sort(row[3:]) for row in spent]  # the first three warm up


def spread(x):
    return f"{x[0]:.2f}-{np.median(x):.2f}-{x[-1]:.2f}"


def bench_reading(repeats=40):
    """Assumes that ViT-B-16 uses .4 of an H200's peak: about 470 videos of 8 frames per second."""
    need = .4 * PEAK / (6e9 * 140.7)
    print(f"\nCPU ms to read a training video; cores for {need:.0f} videos/s")
    x264 = {"g": "250", "bf": "3", "crf": "23", "qmin": "0", "qmax": "51"}
    files = {"MPEG-4 AVI, 320 x 240, 4 s, as HMDB51": ("a.avi", "mpeg4", 4, 240, 320, {"bf": "1"}),
             "MPEG-4, 340 x 256, 5 s, as --reencode": ("b.mp4", "mpeg4", 5, 256, 340, {}),
             "H.264, 340 x 256, 10 s": ("c.mp4", "libx264", 10, 256, 340, x264)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (file, codec, seconds, high, wide, options) in files.items():
            path = f"{folder}/{file}"
            loop = itertools.cycle([frame[:high, :wide] for frame in moving(4)])
            frames = list(itertools.islice(loop, 30 * seconds))
            common.write_video(path, frames, 30, codec, **options)
            rng, spent = np.random.default_rng(0), []
            for _ in range(3 + repeats):
                start = time.process_time()
                at = common.tsn_indices(common.index_video(path).num_frames, 8, rng)
                common.read_frames(path, at, 256, enlarge=False)
                spent.append(1e3 * (time.process_time() - start))
            spent = np.sort(spent[3:])
            print(f"{name:38} {spread(spent):18} {need * np.median(spent) / 1e3:.1f} cores")


def bench_step():
    names, size, gpu = ["TinyCLIP-ViT-40M-32-Text-19M"], 2, tinyclip_swap.USE_CUDA
    if gpu:
        names, size = [*names, "ViT-B-32", "ViT-B-16"], 64
    print(f"\na training step, batch {size}, {tinyclip_swap.DEVICE_NAME}: ms")
    for name, compiled in itertools.product(names, (False, True) if gpu else (False,)):
        model = common.build_actionclip(f"{name}:random").to(tinyclip_swap.DEVICE).train()
        gmac = model.gmacs(8)
        if compiled:
            model.encode_video = torch.compile(model.encode_video)
        step = functools.partial(learn, model, tinyclip_swap.make_optimizer(model, 5e-6, 100)[0])
        videos = list(torch.randint(256, (size, 8, 3, 256, 340), dtype=torch.uint8))
        batch = common.Sample(videos, [0] * size, [(0, i) for i in range(size)], [])
        look = functools.partial(common.augment, batch, model.crop_size, [True], 0,
                                 tinyclip_swap.DEVICE)
        view, networks = timed([look, functools.partial(step, look())], 20 if gpu else 3)
        print(f"{name}{' compiled' * compiled}: augmentation {spread(view)}, networks "
              f"{spread(networks)}")
        if gpu:
            rate, both = (1e3 * size / np.median(ms) for ms in (networks, view + networks))
            print(f"  {rate:.0f} videos/s, MFU {6e9 * gmac * rate / PEAK:.0%}; with "
                  f"augmentation {both:.0f} videos/s; "
                  f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def learn(model, optimizer, view):
    """A step of eq. (1), each video of a class of its own"""
    tokens = model.tokenize_classes([str(i) for i in range(len(view))])[0]          # (B, length)
    with tinyclip_swap.autocast():
        v, t, scale = model(view, tokens)
    labels = torch.arange(len(view), device=view.device)
    tinyclip_swap.actionclip_loss(v.float(), t.float(), labels, scale).backward()
    optimizer.step()
    optimizer.zero_grad()


def bench_compressed(repeats=100):
    print(f"\n{SEGMENTS} segments at {W} x {H}: ms, times the floor")
    with tempfile.TemporaryDirectory() as folder:
        for name, speed in (("fast", 4), ("slow", .5), ("still", 0)):
            path = Path(folder) / f"{name}.mp4"
            common.write_video(path, list(moving(speed)), qmin="2", qmax="2")  # as reencode does
            found = common.p_frame_indices(path)
            at = found[common.tsn_indices(len(found), SEGMENTS)]
            rows = timed([functools.partial(way, path, at) for way in READ.values()], repeats)
            for way, row in zip(READ, rows, strict=True):
                ratio = np.median(row) / np.median(rows[0])
                print(f"{name:6} {way:15} {spread(row):20} {ratio:.2f}")


def bench_stream(T=8, repeats=30):
    print(f"\na frame of a live video, T = {T}, 224 pixels, {tinyclip_swap.DEVICE_NAME}: ms")
    for name in ("TinyCLIP-ViT-40M-32-Text-19M", "ViT-B-32", "ViT-B-16"):
        model = common.build_actionclip(f"{name}:random").to(tinyclip_swap.DEVICE)
        text = model.encode_classes(["waving", "running", "jumping"])
        frames = torch.randint(256, (T, 3, 256, 256), dtype=torch.uint8)
        ring = collections.deque(maxlen=T)
        whole, one = timed([
            functools.partial(tinyclip_swap.classify, model, [frames], text),
            functools.partial(tinyclip_swap.stream_step, model, ring, frames[0], text)], repeats)
        print(f"{name}: all frames {spread(whole)}, one frame {spread(one)}, "
              f"1/{np.median(whole) / np.median(one):.1f}")


def bench_picture():
    data = common.load_dataset("toy", toys="toy-pairs")
    labels = [data.classes.index(name) for name in ("circle moving left", "cross moving up")]
    videos = [(path, label) for path, label in data.test[36:] if label in labels]
    path = Path(__file__).parent / "records" / "modalities.png"
    pkd_compressed.draw_modalities(videos, data.classes, pkd_compressed.parse([]), path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ("reading", "compressed", "step", "stream"):
        globals()[f"bench_{name}"]()
