"""Three benchmarks. Run them by hand, on a machine that does nothing else: `python tests/bench.py`.
They are no tests, and pytest does not collect them.

1. Time of reading compressed clips, as a ratio to what decoding alone takes. A sample is 3 segments
of a clip of 340 x 256, the frames of the test; the index of the file is cached, one thread. The
floor is open, seek and decode of these frames by the same rule of seeking and nothing else. Against
it: motion alone; I-frame, frame and motion (all); all with the residual computed on the CPU (it may
be left to a GPU). They take turns, so that a change of the machine's speed hits all four; the
medians are printed.

Aimed at: all at most 1.6 (MPEG-4) and 1.2 (H.264) times the floor, motion alone 1.3 and 1.1.

2. An epoch of exit training from what is kept of the frozen networks, as a share of an epoch that
decodes and runs them (--cache-gb 0). Aimed at: 1/30 on the CPU with toy clips.

3. A step on a stream (tinyclip_swap.py --watch), one image pass and one fusion pass, beside T = 8
frames read anew; 224 pixels, random weights; on a GPU where there is one. Aimed at: 1/5 at most.
`python tests/bench.py stream` runs this one alone.
"""
import collections
import contextlib
import io
import json
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

H, W, FRAMES, SEGMENTS, NOISE = 256, 340, 120, 3, .5
AIMS = {"mpeg4": (1.3, 1.6), "h264": (1.1, 1.2)}  # motion, all
H264 = {"codec": "libx264", "crf": "18", "refs": "1", "qmin": "0", "qmax": "51"}
MPEG4 = {"qmin": "1", "qmax": "1"}  # as common.reencode_video


def texture(height, width, seed):
    """Detail of all sizes, the finer the weaker, as in pictures of the world. uint8"""
    rng, total = np.random.default_rng(seed), 0
    for size in (2, 4, 8, 16, 32, 64):
        noise = torch.from_numpy(rng.random((1, 3, height // size + 2, width // size + 2)) - .5)
        total = total + size ** .7 * F.interpolate(noise, (height, width), mode="bicubic")
    total = 128 + total[0].permute(1, 2, 0) * (45 / total.std())
    return total.clamp(0, 255).to(torch.uint8).numpy()


def moving(speed):
    """A camera that pans, speed pixels a frame, objects that cross its view, as many as speed or
    one, and a little noise."""
    rng, t = np.random.default_rng(0), np.arange(FRAMES)
    ground, things = texture(2 * H + 800, 2 * W + 1600, 1), texture(200 * 8, 100, 2)
    left = (200 + speed * 2 * t).astype(int)  # ground has two pixels for one
    top = (200 + 60 * np.sin(t * speed / 40)).astype(int)
    for i in t:
        frame = ground[top[i]:top[i] + 2 * H:2, left[i]:left[i] + 2 * W:2].astype(int)
        for k in range(max(1, round(speed))):
            x = int(120 * (1 + np.sin(i * max(.5, speed) / 30 + 2 * k)))
            y = int(78 * (1 + np.sin(i * max(.5, speed) / 23 + 5 * k)))
            frame[y:y + 100, x:x + 60] = things[200 * k:200 * k + 100, :60]
        yield (frame + rng.normal(0, NOISE, frame.shape)).round().clip(0, 255).astype(np.uint8)


def floor(path, indices):
    for _ in common._decode(path, indices):
        pass


def ways(path, at):
    """What is timed: the floor, motion, all, all and the residual."""
    return [lambda: floor(path, at),
            lambda: common.read_compressed(path, at, pictures=False),
            lambda: common.read_compressed(path, at),
            lambda: common.modalities(common.read_compressed(path, at))]


def timed(ways, repeats):
    """Median seconds of each of some functions, which take turns."""
    seconds = [[] for _ in ways]
    for _ in range(repeats):
        for way, spent in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            spent.append(time.perf_counter() - start)
    return [float(np.median(spent)) for spent in seconds]


def bench_decoding(repeats=150):
    """Prints the table of the docstring."""
    print(f"{SEGMENTS} segments at {W} x {H}: ms, and times the floor (aim)\n")
    print("| clip | Mbit/s | floor | motion | all | all + residual |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (("mpeg4", MPEG4), ("h264", H264)):
            for pace, speed in (("fast", 4), ("slow", .5), ("still", 0)):
                path = Path(folder) / f"{name}-{pace}.mp4"
                common.write_video(path, list(moving(speed)), **options)
                found = common.p_frames(path)
                at = found[common.segment_indices(len(found), SEGMENTS)]
                timed(ways(path, at), 5)
                base, *spent = (1000 * s for s in timed(ways(path, at), repeats))
                cells = [f"{ms:.1f}: {ms / base:.2f}" for ms in spent]
                for k, aim in enumerate(AIMS[name]):
                    cells[k] += f" ({aim})"
                rate = path.stat().st_size * 8 / (FRAMES / 24) / 1e6
                print(f"| {name} {pace} | {rate:.1f} | {base:.1f} | {' | '.join(cells)} |",
                      flush=True)


def bench_exits(clips=320, epochs=4):
    """Median clips/s of pkd_compressed.py's stage 1 on toy clips, labels teaching (order ce)."""
    print(f"\nexit training, {clips} toy clips, networks toy, one thread: clips/s\n\n"
          f"| segments | pixels | plain | kept | plain / kept |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "toys"
        common.make_toy_folder(data, train=clips, test=12, pairs=True)
        for segments, size in ((3, 32), (3, 64)):
            speed = []
            for room in ("0", "16"):
                with contextlib.redirect_stdout(io.StringIO()):
                    pkd_compressed.main([
                        "--data", str(data), "--out", folder, "--networks", "toy", "toy", "toy",
                        "--segments", str(segments), "--size", str(size), "--order", "ce",
                        "--epochs", "1", "--exit-epochs", str(epochs), "--crops", "1",
                        "--holdout", "0", "--workers", "0", "--cache-gb", room])
                log = Path(folder) / "pkd_compressed" / "toys-s1-seed0" / "metrics.jsonl"
                rows = map(json.loads, log.read_text().splitlines())
                speed.append(np.median([r["clips_per_s"] for r in rows if r["stage"] == "exits"]))
            print(f"| {segments} | {size} | {speed[0]:.0f} | {speed[1]:.0f} "
                  f"| 1/{speed[1] / speed[0]:.1f} |", flush=True)


def stream_ways(model, T, device):
    """What is timed: T frames anew, a step."""
    video = torch.rand(1, T, 3, model.size, model.size, device=device)
    text = tinyclip_swap.embed_classes(model, ["waving", "running", "jumping"], device)
    ring = collections.deque(maxlen=T)
    return [lambda: tinyclip_swap.infer(model, video, text, 1, device).cpu(),
            lambda: tinyclip_swap.stream_step(model, ring, video[:, :1], text).cpu()]


def bench_stream(T=8, repeats=30):
    """Prints a row per backbone; a figure is the median of repeats that take turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\na step on a stream, T = {T}, 224 pixels, {tinyclip_swap.machine()}: ms\n\n"
          f"| backbone | {T} frames anew | a step | step / anew | frames/s anew | by steps |\n"
          f"|---|---|---|---|---|---|")
    for name in ("TinyCLIP-ViT-40M-32-Text-19M", "ViT-B-32", "ViT-B-16"):
        args = tinyclip_swap.parse(["--large", f"{name}:random", "--frames", str(T)])
        model, _ = tinyclip_swap.load_watcher(args, device, 6)
        ways = stream_ways(model, T, device)
        timed(ways, 3)
        whole, one = (1000 * s for s in timed(ways, repeats))
        print(f"| {name} | {whole:.1f} | {one:.1f} | 1/{whole / one:.1f} | {1000 / whole:.1f} "
              f"| {1000 / one:.1f} |", flush=True)


def main():
    torch.set_num_threads(1)
    if sys.argv[1:] != ["stream"]:
        bench_decoding()
        bench_exits()
    bench_stream()


if __name__ == "__main__":
    main()
