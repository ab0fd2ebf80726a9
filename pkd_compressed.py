"""Teach early exits on compressed video stream by stream: motion vectors, residuals, I-frames.

Soufleri, Ravikumar, Roy: "Advancing Compressed Video Action Recognition through Progressive
Knowledge Distillation", arXiv 2407.02713: training (inference is in wise_infer.py). Class scores of
whole networks go into early exits of the same networks, one teacher after the other.

The idea. A compressed file holds few whole pictures (I-frames); the frames between are stored as
motion and as a residual, and each of the three feeds a network of its own, as in CoViAR (Wu et al.,
CVPR 2018). Behind layer1, 2 and 3 of a network sit exits. The networks are trained first and then
frozen; the exits learn from a teacher's class scores. Networks on I-frames, the paper says, end in
flatter minima than those on residuals, and these in flatter ones than those on motion: so the
teachers come from the sharpest to the flattest, "progressive" (PKD). The orders take this apart:
labels alone, the reverse, the I-frames' network all the time, each in the same number of steps.

For labels y, temperature tau, logits z_k of exit k = 1..3, and z_mv, z_r, z_i of the whole networks
(exit 4), each the mean over the S segments of a clip (the consensus); B clips, K classes:
  (1) exits_loss          ce:  sum_k CE(z_k, y), mean over B
  (2) soft_cross_entropy  others: sum_k -1/B sum_b sum_c softmax(z_t/tau)_c log softmax(z_k/tau)_c,
                          sum over K, mean over B, no tau^2 and no labels; tau 1
  (3) teacher_at          t over the steps of a run:  progressive  mv 1/6, r 1/6, third 4/6
                          anti, the reverse  third 4/6, r 1/6, mv 1/6;    iframe  i all the time
                          third: the network that the exits sit on (self), or i
An exit's gradient stays in that exit: exits share no weight, and what they sit on is frozen. So the
sum over k trains each alone, and whatever is frozen is computed once per clip and crop and kept.

  python pkd_compressed.py                     toy clips, ce and progressive, 3 minutes on 2 CPUs
  python pkd_compressed.py --order all --flatness
  python pkd_compressed.py --data HMDB51 --reencode --imagenet --batch-size 64
  python pkd_compressed.py --data weizmann --size 112 --networks toy toy toy --epochs 200

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0, caches included):
RESULT pkd_compressed data=toy split=1 seed=0 mv4=0.5958 r4=0.8250 i4=0.9125
  ce-mv1=0.6500 ce-mv2=0.6083 ce-mv3=0.6208 ce-r1=0.8167 ce-r2=0.8375 ce-r3=0.8208
  ce-i1=0.8083 ce-i2=0.8583 ce-i3=0.9083 progressive-mv1=0.5917 progressive-mv2=0.5792
  progressive-mv3=0.6000 progressive-r1=0.8083 progressive-r2=0.8208 progressive-r3=0.8208
  progressive-i1=0.8083 progressive-i2=0.8875 progressive-i3=0.9125 seconds=151

Differs from the paper, of which the abstract was at hand, and from its code, which no longer runs:
 1. The code gives progressive 300 epochs and the others 150; here all have the same steps. The
    third teacher is `self` in the code, the I-frames' in the paper; here it is a flag.
 2. What is frozen is frozen: BatchNorm does not move. Reported is the last epoch, all exits in one
    checkpoint; the code takes each exit's best epoch on the test list.
 3. One crop and one flip for all streams, for exits and teachers; the code draws each anew.
 4. Exits see a few fixed crops (--crops), so that what is frozen can be kept. AdamW, cosine.
 5. Motion and residuals are read as common.py says: quarter pixels kept, residuals not clipped.
 6. --holdout keeps clips out of all training: wise_infer.py fits its weights on them, not on
    training logits as the code does.
"""
import argparse
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import time
import zlib
from pathlib import Path

import av
import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common import (
    BadInput,
    BadVideo,
    ClipOrder,
    Clips,
    Coded,
    ExitNet,
    clip_loader,
    compressed_view,
    exit_heads,
    exit_logits,
    mirrors,
    modalities,
    note_bad,
    read_data,
    reencode,
    video_index,
    warp,
)

# ---- the method: eqs. (1)-(3) --------------------------------------------------------------------


def soft_cross_entropy(student, teacher, tau):
    """Eq. (2) for one exit. Logits (B, K) and (B, K) -> scalar"""
    B, K = student.shape
    p = (teacher / tau).softmax(1)                                              # (B, K)
    log_q = (student / tau).log_softmax(1)                                      # (B, K)
    return -(p * log_q).sum(1).mean()                                           # ()            (2)


def teacher_at(step, steps, order, stream, third):
    """Who teaches the exits of `stream` at step 0..steps-1, eq. (3). -> mv, r, i; None: labels"""
    if order == "ce":
        return None
    if order == "iframe":
        return "i"
    if order == "anti":
        step = steps - 1 - step
    last = stream if third == "self" else "i"
    sixths = ("mv", "r", last, last, last, last)                                # (6,)
    return sixths[6 * step // steps]                                            #               (3)


def exits_loss(z, labels, z_t, tau):
    """Eqs. (1) and (2), summed over the exits. z: (B, K) per exit; labels (B,); z_t (B, K), the
    teacher's logits, or None: labels teach. -> scalar"""
    if z_t is None:
        return sum(F.cross_entropy(z_k, labels) for z_k in z)                   # ()            (1)
    return sum(soft_cross_entropy(z_k, z_t, tau) for z_k in z)                  # ()            (2)


# ---- the rest is plumbing: training, testing, measuring, keeping record --------------------------

STREAMS = ("mv", "r", "i")
ORDERS = ("ce", "progressive", "anti", "iframe")


class Streams(nn.Module):
    """The three networks. {stream: x (B, S, C, H, W)} -> {stream: (maps of exits 1-3, z (B, K))}"""

    def __init__(self, names, classes, imagenet):
        super().__init__()
        self.nets = nn.ModuleDict({stream: ExitNet(stream, name, classes, imagenet)
                                   for stream, name in zip(STREAMS, names, strict=True)})

    def forward(self, x):
        return {stream: self.nets[stream](x[stream]) for stream in x}


class Exits(nn.Module):
    """Exits 1 to 3 of every stream, for every order; all orders start from the same weights.
    {stream: maps}, S -> {order: {stream: [z_1, z_2, z_3], (B, K) each}}"""

    def __init__(self, streams, orders, classes, seed):
        super().__init__()
        self.heads = nn.ModuleDict()
        for order in orders:
            torch.manual_seed(seed + 1)
            self.heads[order] = nn.ModuleDict({stream: exit_heads(net, classes)
                                               for stream, net in streams.nets.items()})

    def forward(self, maps, S):
        return {order: {stream: [head(f, S) for head, f in zip(heads[stream], maps[stream],
                                                               strict=True)] for stream in maps}
                for order, heads in self.heads.items()}


class FixedCrops(Clips):
    """Training clips as the exits see them: epoch e sees crop e % crops of each clip. The frames
    and crops of stage 0 are others."""
    crops = 1

    def __getitem__(self, key):
        return super().__getitem__((10 ** 6 + key[0] % self.crops, key[1]))


def see(batch, size, mirror, seed, device, train=True):
    """A batch as the networks see it: {stream: (B, S, C, size, size)}"""
    clips = [Coded(*(part.to(device, non_blocking=True) for part in coded[:3]), coded.size)
             for coded in batch.video if coded is not None]
    if not train:
        return compressed_view(clips, size)
    rngs = [np.random.default_rng([seed, *key, 2]) for key in batch.key]
    return compressed_view(clips, size, rngs, [mirror[label] for label in batch.label])


def example(stream, args, device):
    """One clip of noise as the stream's network sees it: (1, S, C, size, size)"""
    return torch.rand(1, args.segments, 2 if stream == "mv" else 3, args.size, args.size,
                      device=device)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def adamw(module, lr, steps):
    """AdamW, no decay on norms and biases; linear warm-up, then cosine to 0."""
    weights = [w for w in module.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW([
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": .01},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.}], lr, fused=True)
    warm = max(1, steps // 10)
    return optimizer, SequentialLR(optimizer, [
        LinearLR(optimizer, 1 / warm, total_iters=warm),
        CosineAnnealingLR(optimizer, max(1, steps - warm))], [warm])


def save(state, path):
    """Write a checkpoint under another name and rename it: a kill leaves the old one or the new."""
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def listed_names(clips):
    """By these a checkpoint knows its clips: the end of their paths, and their size in bytes."""
    return [f"{'/'.join(Path(path).parts[-3:])} {os.path.getsize(path)}" for path, _ in clips]


def hold_out(train, share, seed):
    """Keep that share of every class's training clips for wise_infer.py -> the rest, and those."""
    rng, held = np.random.default_rng([seed, 7]), set()
    for k in sorted({label for _, label in train}):
        own = list(dict.fromkeys(path for path, label in train if label == k))
        held |= set(rng.permutation(own)[:min(len(own) - 1, round(share * len(own)))].tolist())
    return ([clip for clip in train if clip[0] not in held],
            [clip for clip in train if clip[0] in held])


def refuse_unfit(data, args):
    """Raises BadInput where clips' vectors cannot be followed. Broken files: see note_bad."""
    unfit = []
    for path, _ in data.train + data.test:
        try:
            if why := video_index(path).unfit:
                unfit.append(f"{path}: {why}")
        except BadVideo:
            pass
    if unfit:
        raise BadInput(f"{len(unfit)} of {len(data.train + data.test)} clips cannot serve as they "
                       f"are, first {unfit[0]}. To work on a copy in MPEG-4 with I- and P-frames "
                       f"alone, say: pkd_compressed.py --data {args.data} --reencode")


def train_streams(streams, saved, data, mirror, args, place, log, bad, keep):
    """Stage 0: the three networks, each by the cross entropy of its consensus. They share nothing
    but the batches, which are decoded once for all three."""
    device, rank, world = place
    clips = Clips(data.train, args.segments, None, "coded", train=True, seed=args.seed)
    batch_size = min(args.batch_size, len(clips)) // world * world
    loader = clip_loader(clips, batch_size, args.workers, rank, world)
    optimizer, schedule = adamw(streams, args.lr, args.epochs * len(loader))
    if saved:
        optimizer.load_state_dict(saved["optimizer_state"])
        schedule.load_state_dict(saved["schedule_state"])
    wrapped = nn.parallel.DistributedDataParallel(streams) if world > 1 else streams
    for epoch in range(len(log), args.epochs):
        began, sums = time.time(), torch.zeros(6, device=device)
        loader.batch_sampler.epoch = epoch
        streams.train()
        for batch in tqdm(loader, f"streams {epoch + 1}/{args.epochs}", leave=False, disable=None):
            note_bad(bad, batch, clips)
            labels = torch.tensor(batch.label, device=device)
            with autocast(device):
                out = wrapped(see(batch, args.size, mirror, args.seed, device))
            z = [out[stream][1].float() for stream in STREAMS]
            losses = torch.stack([F.cross_entropy(z_s, labels) for z_s in z])
            losses.sum().backward()
            for net in streams.nets.values():
                nn.utils.clip_grad_norm_(net.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            hits = torch.stack([(z_s.argmax(1) == labels).float().mean() for z_s in z])
            sums += torch.cat([losses.detach(), hits]) / len(loader)
        if world > 1:
            dist.all_reduce(sums)
        numbers = (sums / world).tolist()
        log.append({"stage": "streams", "epoch": epoch + 1,
                    "loss": dict(zip(STREAMS, numbers[:3], strict=True)),
                    "top1_train": dict(zip(STREAMS, numbers[3:], strict=True)),
                    "clips_per_s": len(loader) * batch_size / (time.time() - began)})
        if not rank:
            print(f"streams  epoch {epoch + 1:3} " + "".join(
                f"  {stream} {log[-1]['loss'][stream]:7.4f} ({log[-1]['top1_train'][stream]:.3f})"
                for stream in STREAMS) + f"  {log[-1]['clips_per_s']:6.1f} clips/s", flush=True)
            keep(streams_state=streams.state_dict(), optimizer_state=optimizer.state_dict(),
                 schedule_state=schedule.state_dict())


def same_buffers(module, world):
    """BatchNorm's statistics of process 0 for all: DDP copies them before a step, not after the
    last one."""
    for buffer in module.buffers() if world > 1 else []:
        dist.broadcast(buffer, 0)


class Kept:
    """What is constant in stage 1, computed once: labels (N,) and all logits (N, K), and of the
    streams that fit the maps of exits 1-3 (N, S, c, h, w), fp16, in files mapped into memory.
    N counts crops x clips, crop by crop; a clip that could not be decoded is replaced as always."""

    def __init__(self, streams, clips, mirror, args, place, run, bad):
        device, rank, world = place
        rows, K = args.crops * len(clips), streams.nets["i"].fc.out_features
        self.clips, self.crops = len(clips), args.crops
        loader = clip_loader(clips, args.batch_size, args.workers, rank, world)
        loader.batch_sampler.train = False  # every clip once
        shapes = {}
        with torch.no_grad():
            for stream, net in streams.nets.items():
                shapes[stream] = [f.shape for f in net(example(stream, args, device))[0]]
        left, said, self.maps, self.files = args.cache_gb * 1e9, [], {}, []
        self.labels = torch.zeros(rows, dtype=torch.long, device=device)
        self.logits = {stream: torch.zeros(rows, K, device=device) for stream in STREAMS}
        for stream in STREAMS:
            need = 2 * rows * sum(shape.numel() for shape in shapes[stream])
            said.append(f"{stream} {need / 1e9:.2f} GB{'' if need <= left else ' (not kept)'}")
            if need <= left:
                left -= need
                self.files += [run / f"maps-{stream}{k + 1}.fp16" for k in range(3)]
                self.maps[stream] = [torch.from_file(
                    str(file), True, rows * shape.numel(), dtype=torch.float16).view(rows, *shape)
                    for file, shape in zip(self.files[-3:], shapes[stream], strict=True)]
        if not rank:
            print(f"keeping {rows} x logits, and feature maps, at most {args.cache_gb:g} GB: "
                  + ", ".join(said), flush=True)
        for crop in range(args.crops):
            loader.batch_sampler.epoch = crop
            for batch in tqdm(loader, f"crop {crop + 1}/{args.crops}", leave=False, disable=None):
                note_bad(bad, batch, clips)
                at = torch.tensor([crop * len(clips) + i for _, i in batch.key])
                with torch.no_grad(), autocast(device):
                    out = streams(see(batch, args.size, mirror, args.seed, device))
                self.labels[at.to(device)] = torch.tensor(batch.label, device=device)
                for stream, (maps, z) in out.items():
                    self.logits[stream][at.to(device)] = z.float()
                    for kept, f in zip(self.maps.get(stream, []), maps, strict=False):
                        kept[at] = f.unflatten(0, (-1, args.segments)).half().cpu()
        if world > 1:  # each process has filled in its own clips
            for tensor in (self.labels, *self.logits.values()):
                dist.all_reduce(tensor)
            dist.barrier()

    def look_up(self, keys, stream, device):
        """-> maps of exits 1 to 3 for keys (epoch, index), (B*S, c, h, w), or None"""
        at = self.rows(keys)
        return [f[at].flatten(0, 1).to(device).float() for f in self.maps[stream]] \
            if stream in self.maps else None

    def rows(self, keys):
        return torch.tensor([epoch % self.crops * self.clips + i for epoch, i in keys])


def train_exits(streams, exits, saved, data, mirror, args, place, run, log, bad, keep):
    """Stage 1: all exits of all orders, by eqs. (1)-(3), on the same batches."""
    device, rank, world = place
    streams.eval().requires_grad_(False)  # frozen, BatchNorm too
    clips = FixedCrops(data.train, args.segments, None, "coded", train=True, seed=args.seed)
    clips.crops = args.crops
    batch_size = min(args.batch_size, len(clips)) // world * world
    order_of_clips = ClipOrder(len(clips), batch_size, True, args.seed, rank, world)
    steps = args.exit_epochs * len(order_of_clips)
    optimizer, schedule = adamw(exits, args.lr, steps)
    if saved:
        optimizer.load_state_dict(saved["optimizer_state"])
        schedule.load_state_dict(saved["schedule_state"])
    done = sum(row["stage"] == "exits" for row in log)
    if done == args.exit_epochs:
        return
    kept = Kept(streams, clips, mirror, args, place, run, bad) if args.cache_gb else None
    live = [stream for stream in STREAMS if not kept or stream not in kept.maps]
    loader = clip_loader(clips, batch_size, args.workers, rank, world) if live else None
    wrapped = nn.parallel.DistributedDataParallel(exits) if world > 1 else exits
    for epoch in range(done, args.exit_epochs):
        began, sums = time.time(), torch.zeros(2, len(args.order), 3, device=device)
        for sampler in (order_of_clips, *([loader.batch_sampler] if live else [])):
            sampler.epoch = epoch
        exits.train()
        pairs = zip(order_of_clips, loader or itertools.repeat(None), strict=False)
        for i, (keys, batch) in enumerate(tqdm(pairs, f"exits {epoch + 1}/{args.exit_epochs}",
                                               len(order_of_clips), False, disable=None)):
            step = epoch * len(order_of_clips) + i
            maps, z_t = {}, {}
            if live:
                note_bad(bad, batch, clips)
                x = see(batch, args.size, mirror, args.seed, device)
                with torch.no_grad(), autocast(device):
                    out = streams({stream: x[stream] for stream in live})
                for stream, (held, z) in out.items():
                    maps[stream], z_t[stream] = [f.float() for f in held], z.float()
                labels = torch.tensor(batch.label, device=device)
            if kept:
                at = kept.rows(keys).to(device)
                labels, z_t = kept.labels[at], {s: kept.logits[s][at] for s in STREAMS}
                maps |= {s: kept.look_up(keys, s, device) for s in kept.maps}
            with autocast(device):
                out = wrapped({stream: maps[stream] for stream in STREAMS}, args.segments)
            total = 0.
            for o, order in enumerate(args.order):
                for s, stream in enumerate(STREAMS):
                    z = [z_k.float() for z_k in out[order][stream]]             # (B, K) each
                    who = teacher_at(step, steps, order, stream, args.third_teacher)
                    loss = exits_loss(z, labels, z_t.get(who), args.tau)
                    total = total + loss
                    said = labels if who is None else z_t[who].argmax(1)
                    agree = sum((z_k.argmax(1) == said).float().mean() for z_k in z) / len(z)
                    sums[:, o, s] += torch.stack([loss.detach(), agree]) / len(order_of_clips)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if world > 1:
            dist.all_reduce(sums)
        losses, agreement = (sums / world).tolist()
        log.append({"stage": "exits", "epoch": epoch + 1, "order": {
            order: {"teacher": {s: teacher_at(step, steps, order, s, args.third_teacher) or "labels"
                                for s in STREAMS},
                    "loss": dict(zip(STREAMS, losses[o], strict=True)),
                    "agreement": dict(zip(STREAMS, agreement[o], strict=True))}
            for o, order in enumerate(args.order)},
            "clips_per_s": len(order_of_clips) * batch_size / (time.time() - began)})
        if not rank:
            print(f"exits    epoch {epoch + 1:3}   " + "   ".join(
                f"{order} {'/'.join(row['teacher'].values())} " + " ".join(
                    f"{x:.3f}" for x in row["loss"].values())
                for order, row in log[-1]["order"].items())
                + f"  {log[-1]['clips_per_s']:6.1f} clips/s", flush=True)
            keep(streams_state=streams.state_dict(), optimizer_state=optimizer.state_dict(),
                 schedule_state=schedule.state_dict(), exits_state={
                     order: heads.state_dict() for order, heads in exits.heads.items()})
    if world > 1:
        dist.barrier()
    for file in kept.files if kept and not rank else []:
        file.unlink(missing_ok=True)


@torch.no_grad()
def evaluate(streams, exits, data, args, place, bad):
    """Top-1 of every exit on every test clip; one that cannot be decoded goes into `bad` and counts
    as wrong. -> {order: {stream: [exit 1, 2, 3, 4]}}, number of clips"""
    device, rank, world = place
    streams.eval(), exits.eval()
    clips = Clips(data.test, args.segments, None, "coded")
    hits = torch.zeros(len(args.order), 3, 4, device=device)
    count = torch.zeros(1, device=device)
    for batch in tqdm(clip_loader(clips, args.batch_size, args.workers, rank, world), "test",
                      leave=False, disable=None):
        note_bad(bad, batch, clips)
        count += len(batch.label)
        labels = torch.tensor([label for label, video in zip(batch.label, batch.video, strict=True)
                               if video is not None], device=device)
        if not len(labels):
            continue
        with autocast(device):
            out = streams(see(batch, args.size, None, args.seed, device, train=False))
            z = exits({stream: maps for stream, (maps, _) in out.items()}, args.segments)
        for o, order in enumerate(args.order):
            for s, stream in enumerate(STREAMS):
                for k, z_k in enumerate([*z[order][stream], out[stream][1]]):
                    hits[o, s, k] += (z_k.argmax(1) == labels).sum()
    if world > 1:
        dist.all_reduce(hits), dist.all_reduce(count)
    shares = (hits / count).tolist()
    return {order: dict(zip(STREAMS, shares[o], strict=True))
            for o, order in enumerate(args.order)}, int(count.item())


def median_ms(function, device):
    """Median time of a call in ms, of 20 calls or a second's worth, after 3 to warm up; on a GPU by
    CUDA's own events."""
    times, began = [], time.perf_counter()
    while len(times) < 23 or (time.perf_counter() - began < 1 and len(times) < 500):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times[3:]))


@torch.no_grad()
def costs(streams, exits, args, device):
    """What a clip costs up to each exit, with the exits before it: {stream: [(GMAC, ms) x 4]}"""
    found, heads = {}, exits.heads[args.order[0]]
    for stream, net in streams.nets.items():
        x, found[stream] = example(stream, args, device), []

        def run(k, net=net, own=heads[stream], x=x):
            return list(itertools.islice(exit_logits(net, own, x), k))

        for k in (1, 2, 3, 4):
            with FlopCounterMode(display=False) as counter:
                run(k)
            found[stream].append((counter.get_total_flops() / 2e9,
                                  median_ms(functools.partial(run, k), device)))
    return found


def flatness(streams, data, args, device, bad, clips=128, probes=30, sizes=(.01, .03, .1)):
    """How flat the minimum is that each network sits in, on some training clips in the test view:
    the trace of the Hessian of the cross entropy by Hutchinson's estimate E[v H v], v of +1 and -1,
    and how much the loss rises when each tensor w gets size |w| u / |u| added, u normal; mean and
    standard error over the probes. BatchNorm uses its running statistics. -> {stream: numbers}"""
    chosen = np.random.default_rng(args.seed).permutation(len(data.train))[:clips]
    part = Clips([data.train[i] for i in chosen], args.segments, None, "coded")
    batches, found = [], {}
    for batch in clip_loader(part, args.batch_size, args.workers):
        note_bad(bad, batch, part)
        labels = [label for label, video in zip(batch.label, batch.video, strict=True)
                  if video is not None]
        if labels:
            batches.append((see(batch, args.size, None, 0, device, train=False),
                            torch.tensor(labels, device=device)))
    count = sum(len(labels) for _, labels in batches)
    for stream, net in streams.eval().nets.items():
        generator = torch.Generator(device).manual_seed(args.seed)
        weights = [w for w in net.parameters() if w.requires_grad]

        def losses(net=net, stream=stream):
            for x, labels in batches:
                yield F.cross_entropy(net(x[stream])[1], labels) * len(labels) / count

        def noise(w, generator=generator):
            return torch.randn(w.shape, generator=generator, device=device)

        traces, rises = [], {size: [] for size in sizes}
        for _ in range(probes):
            v = [noise(w).sign() for w in weights]
            traces.append(0.)
            for loss in losses():
                slope = torch.autograd.grad(loss, weights, create_graph=True)
                slope = sum((g * v_w).sum() for g, v_w in zip(slope, v, strict=True))
                Hv = torch.autograd.grad(slope, weights)
                traces[-1] += sum((h * v_w).sum() for h, v_w in zip(Hv, v, strict=True)).item()
        with torch.no_grad():
            base, before = sum(losses()).item(), [w.clone() for w in weights]
            for size, _ in itertools.product(sizes, range(probes)):
                for w, old in zip(weights, before, strict=True):
                    u = noise(w)
                    w += size * old.norm() * u / u.norm()
                rises[size].append(sum(losses()).item() - base)
                for w, old in zip(weights, before, strict=True):
                    w.copy_(old)
        found[stream] = {"loss": base, "parameters": sum(w.numel() for w in weights) / 1e6,
                         "trace": mean_and_error(traces),
                         "rise": {str(size): mean_and_error(r) for size, r in rises.items()}}
    return found


def mean_and_error(values):
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** .5)


def flatness_table(found):
    sizes = list(found["i"]["rise"])
    lines = [f"{'stream':6} {'M':>7} {'loss':>8} {'trace of the Hessian':>24}"
             + "".join(f"{'rise at ' + size:>20}" for size in sizes)]
    for stream, r in found.items():
        lines.append(f"{stream:6} {r['parameters']:7.2f} {r['loss']:8.4f} "
                     + "{:14.2f} +- {:6.2f}".format(*r["trace"])
                     + "".join("{:12.4f} +-{:6.4f}".format(*r["rise"][size]) for size in sizes))
    for what, of in [("trace", lambda r: r["trace"])] + [
            (f"rise at {size}", lambda r, size=size: r["rise"][size]) for size in sizes]:
        (i, d_i), (r, d_r), (mv, d_mv) = (of(found[stream]) for stream in ("i", "r", "mv"))
        sure = min((r - i) / np.hypot(d_i, d_r), (mv - r) / np.hypot(d_r, d_mv)) > 2
        lines.append(f"flatness by {what}: the paper's order I < R < MV "
                     + ("holds here" if i < r < mv and sure else "holds here, within the error"
                        if i < r < mv else "does not hold here"))
    return "\n".join(lines)


def draw_streams(data, args, path):
    """A row per test clip: I-frame, accumulated motion (colour: direction, strength: length, of the
    longest in the picture), residual (grey: 0), and the frame put together again from the three."""
    rows = []
    for path_of_clip, label in data.test[::max(1, len(data.test) // 6)][:6]:
        try:
            coded = Clips([(path_of_clip, label)], args.segments, None, "coded")[0, 0].video
        except BadVideo:
            continue
        if coded is None:
            continue
        mv, r, i = (part[args.segments // 2][None] for part in modalities(coded))
        again = warp(i, mv).round() + r
        pictures = (i, torchvision.utils.flow_to_image(mv), (128 + r).clamp(0, 255), again)
        names = ("I-frame", f"motion, up to {mv.norm(dim=1).max():.0f} px", "residual",
                 f"warped + residual: {data.classes[label]}")
        for picture, name in zip(pictures, names, strict=True):
            zoom = F.interpolate(picture.float(), scale_factor=192 / picture.shape[-2])[0].byte()
            zoom = F.pad(TF.center_crop(zoom, [192, 256]), (0, 0, 16, 0))
            rows.append(torchvision.utils.draw_bounding_boxes(
                zoom, torch.tensor([[0, 0, 255, 207]]), [name], "white"))
    if rows:
        torchvision.io.write_png(torchvision.utils.make_grid(rows, 4), str(path))


def table(results):
    """Top-1 of exit x order per stream, as text; exit 4 is the network's own classifier."""
    orders = list(results["top1"])
    lines = [f"{'stream':6} {'network':10} {'exit':>4} {'GMAC':>8} {'ms':>8}  "
             + "".join(f"{order:>13}" for order in orders)]
    for stream in STREAMS:
        for k, (gmac, ms) in enumerate(results["cost"][stream]):
            lines.append(f"{stream:6} {results['networks'][stream]:10} {k + 1:4} {gmac:8.4f} "
                         f"{ms:8.2f}  " + "".join(
                             f"{results['top1'][order][stream][k]:13.3f}" for order in orders))
    return "\n".join([*lines, f"top-1 of {results['clips']} test clips. GMAC and ms of a clip at "
                      "batch 1, with the exits before; exit 4 is the frozen network's own."])


def start_record(args, run):
    """What run.json says from the start: flags, versions, machine. With --resume the flags must be
    those of the run before. Raises BadInput."""
    flags = {k: v for k, v in vars(args).items() if k not in ("resume", "workers", "out", "target")}
    if args.resume:
        if not (run / "run.json").exists():
            raise BadInput(f"--resume: there is no run in {run}; start one without --resume")
        before = json.loads((run / "run.json").read_text())["flags"]
        other = [f"--{k.replace('_', '-')} {before.get(k)}, now {v}" for k, v in flags.items()
                 if before.get(k) != v]
        if other:
            raise BadInput(f"--resume: the run in {run} had {'; '.join(other)}")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                            capture_output=True, text=True).stdout.strip()
    modules = (torch, torchvision, open_clip, av, np)
    return {"argv": sys.argv[1:], "flags": flags, "commit": commit, "machine": machine(),
            "python": platform.python_version(),
            "versions": {module.__name__: module.__version__ for module in modules}}


def machine():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else \
        f"{platform.machine()} CPU with {torch.get_num_threads()} threads"


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", help="toy, or a folder (the README lists the formats)")
    add("--split", type=int, default=1, choices=(1, 2, 3))
    add("--allow-missing", action="store_true", help="go on without missing clips")
    add("--reencode", action="store_true", help="work on a copy of the folder in CoViAR's form, in "
        "OUT/cache, made where it is missing: for files without motion vectors or with B-frames")
    add("--segments", type=int, default=3, help="S, frames of a clip that the networks see")
    add("--size", type=int, help="pixels (default: 32 for toy clips, else 224)")
    add("--holdout", type=float, default=.2, help="share of the training clips that no stage sees, "
        "by class, for wise_infer.py")
    add = parser.add_argument_group("networks").add_argument
    add("--networks", nargs=3, metavar=("MV", "R", "I"), help="toy, or ResNets of torchvision "
        "(default: toy for toy clips, else resnet18 resnet18 resnet50, the paper's)")
    add("--imagenet", action="store_true", help="start from torchvision's ImageNet weights")
    add = parser.add_argument_group("method").add_argument
    add("--order", nargs="+", choices=[*ORDERS, "all"], default=["ce", "progressive"],
        metavar="ORDER", help=f"of {', '.join(ORDERS)}; all")
    add("--third-teacher", choices=("self", "i"), default="self", help="eq. (3)")
    add("--tau", type=float, default=1., help="temperature, eq. (2)")
    add("--flatness", action="store_true", help="measure how flat the three minima are")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, help="of the networks (default: 24 for toy clips, else 120)")
    add("--exit-epochs", type=int, help="of the exits (default: 24 for toy clips, else 60)")
    add("--crops", type=int, default=2, help="ways in which the exits see a clip")
    add("--cache-gb", type=float, default=16., help="room for what is frozen; 0: nothing is kept")
    add("--batch-size", type=int, default=32, help="clips of all processes together")
    add("--lr", type=float, help="(default: 3e-3 for toy networks, else 1e-3)")
    add("--compile", action="store_true", help="torch.compile the three networks")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0)
    add("--out", default="runs", help="folder for records, checkpoints and the cache")
    add("--resume", action="store_true", help="go on with a run that was killed")
    add("--target", type=float, default=0., help="exit 1 if a whole network's top-1 is below")
    add("--workers", type=int, default=min(8, max(1, (os.cpu_count() or 1) - 1)))
    args = parser.parse_args(argv)
    toy = args.data == "toy"
    for name, small, large in (("size", 32, 224), ("epochs", 24, 120), ("exit_epochs", 24, 60),
                               ("networks", ["toy"] * 3, ["resnet18", "resnet18", "resnet50"])):
        if getattr(args, name) is None:
            setattr(args, name, small if toy else large)
    if args.lr is None:
        args.lr = 3e-3 if "toy" in args.networks else 1e-3
    if min(args.segments, args.epochs, args.exit_epochs, args.crops, args.batch_size) < 1 or \
            args.size < 32:
        parser.error("--segments, --epochs, --exit-epochs, --crops, --batch-size take 1 or more, "
                     "--size 32 or more")
    if not 0 <= args.holdout < 1 or args.tau <= 0 or args.cache_gb < 0:
        parser.error("--holdout takes 0 to 1, --tau more than 0, --cache-gb 0 or more")
    if args.reencode and toy:
        parser.error("--reencode: the toy clips need none")
    args.order = list(ORDERS) if "all" in args.order else list(dict.fromkeys(args.order))
    return args


def find_place():
    """-> (device, rank, number of processes); under torchrun it joins the other processes."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not torch.cuda.is_available():
        return torch.device("cpu"), rank, world
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device()), rank, world


def main(argv=None):
    """Train three networks and their exits, test and measure them. -> numbers"""
    args, began = parse(argv), time.time()
    device, rank, world = place = find_place()
    if "toy" in args.networks:  # threads that wait for decoding cost more than they bring
        spare = max(1, (os.cpu_count() or 1) - args.workers)
        torch.set_num_threads(min(torch.get_num_threads(), spare))
    cache = Path(args.out) / "cache"
    if rank:
        dist.barrier()  # process 0 goes first and fills the cache
    folder = args.data
    if args.reencode:
        source = Path(folder).resolve()  # two data sets may have one name
        place_of_copy = cache / f"{zlib.crc32(bytes(source)):08x}" / f"{source.name}-mpeg4"
        folder = reencode(source, place_of_copy, max(1, args.workers))
    data = read_data(folder, args.split, args.allow_missing, cache, toys="toy-pairs")
    refuse_unfit(data, args)
    bad = {"training": {}, "test": {}}  # {path: reason} of clips that cannot be decoded
    rest, held = hold_out(data.train, args.holdout, args.seed)
    data = data._replace(train=rest)
    run = Path(args.out) / "pkd_compressed" / f"{data.name}-s{args.split}-seed{args.seed}"
    record = start_record(args, run)
    torch.manual_seed(args.seed)
    streams = Streams(args.networks, len(data.classes), args.imagenet).to(device)
    exits = Exits(streams, args.order, len(data.classes), args.seed).to(device)
    if world > 1 and not rank:
        dist.barrier()
    if min(args.batch_size, len(data.train)) < world:
        raise BadInput(f"--batch-size {args.batch_size}, {len(data.train)} training clips: too few "
                       f"for {world} processes")
    last, saved = run / "last.pt", None
    if args.resume and last.exists():
        saved = torch.load(last, map_location=device, weights_only=True)
    if not rank:
        run.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            for old in (last, run / "metrics.jsonl"):
                old.unlink(missing_ok=True)
        (run / "run.json").write_text(json.dumps(record, indent=1))
        print(f"pkd_compressed.py on {machine()}, {world} process(es), torch {torch.__version__}, "
              f"seed {args.seed}\n{data.name}, split {args.split}: {len(data.classes)} classes, "
              f"{len(data.train)} training clips, {len(held)} held out, {len(data.test)} test "
              f"clips; {args.segments} segments at {args.size} px", flush=True)
    mirror, log = mirrors(data.classes), saved["rows"] if saved else []
    about = {"networks": dict(zip(STREAMS, args.networks, strict=True)), "classes": data.classes,
             "data": data.name, "folder": str(folder), "split": args.split, "seed": args.seed,
             "size": args.size, "segments": args.segments, "holdout": listed_names(held),
             "exit_epochs": args.exit_epochs}

    def keep(**state):
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        save({**about, "rows": log, **state}, last)

    half = saved and "exits_state" not in saved
    if saved:
        streams.load_state_dict(saved["streams_state"])
        for order, state in saved.get("exits_state", {}).items():
            exits.heads[order].load_state_dict(state)
    if args.compile:
        torch.compiler.config.recompile_limit = 64
        for net in streams.nets.values():
            net.compile()
    if not saved or half:
        train_streams(streams, saved, data, mirror, args, place, log, bad["training"], keep)
    same_buffers(streams, world)
    minima = flatness(streams, data, args, device, bad["training"]) if args.flatness else None
    train_exits(streams, exits, None if half else saved, data, mirror, args, place, run, log,
                bad["training"], keep)
    same_buffers(exits, world)
    top1, clips = evaluate(streams, exits, data, args, place, bad["test"])
    results = {"top1": top1, "clips": clips, "networks": about["networks"]}
    if minima:
        results["flatness"] = minima
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return results

    results["cost"] = costs(streams, exits, args, device)  # with nothing else running
    record |= {"results": results, "missing": data.missing, "bad": bad,
               "seconds": time.time() - began}
    (run / "run.json").write_text(json.dumps(record, indent=1))
    draw_streams(data, args, run / "run.png")
    print(table(results))
    if minima:
        print(flatness_table(minima))
    for names, what in ((data.missing, "listed clips are missing"),
                        (list(bad["training"]), "training clips cannot be decoded"),
                        (list(bad["test"]), "test clips cannot be decoded and count as wrong")):
        if names:
            print(f"NOTE {len(names)} {what}, first {names[0]}")
    first = args.order[0]
    print(f"record, checkpoint, pictures: {run}\n"
          f"RESULT pkd_compressed data={data.name} split={args.split} seed={args.seed} "
          + " ".join(f"{s}4={top1[first][s][3]:.4f}" for s in STREAMS) + " "
          + " ".join(f"{order}-{s}{k + 1}={top1[order][s][k]:.4f}" for order in args.order
                     for s in STREAMS for k in range(3))
          + f" seconds={time.time() - began:.0f}")
    if any(top1[first][s][3] < args.target for s in STREAMS):
        sys.exit(1)
    return results


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.stderr.write(f"pkd_compressed.py: {error}\n")
        sys.exit(2)
