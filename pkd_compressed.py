"""Teach early exits on compressed video stream by stream: motion vectors, residuals, I-frames.

Soufleri, Ravikumar, Roy: "Advancing Compressed Video Action Recognition through Progressive
Knowledge Distillation", arXiv 2407.02713: training (inference: wise_infer.py). Class scores of
whole networks are distilled into early exits of the same networks, one teacher after the other.

A compressed file holds few whole pictures (I-frames); the frames between are motion and a residual.
Each of the three feeds a network, as in CoViAR (Wu et al., CVPR 2018), with exits behind layer1, 2
and 3. Networks learn from labels, are frozen, and their exits learn from a teacher's class scores.
The paper finds flatter minima on I-frames than on residuals than on motion: so "progressive" (PKD)
goes from the sharpest to the flattest. Beside it: labels alone, the reverse, one teacher all along.

B clips with labels y, K classes; z_k (B, K): logits of exit k = 1..3; z_mv, z_r, z_i those of whole
networks (exit 4); each the mean over a clip's S segments (the consensus).
  (1) exits_loss          ce:  sum_k CE(z_k, y), mean over B
  (2) soft_cross_entropy  others: sum_k -1/B sum_b sum_c softmax(z_t/tau)_c log softmax(z_k/tau)_c,
                          sum over K, mean over B, no tau^2 and no labels; tau 1
  (3) teacher_at          t over the steps of a run:  progressive  mv 1/6, r 1/6, third 4/6
  third: self or i        anti  third 4/6, r 1/6, mv 1/6;  iframe  i;  self  the exits' own network
Schedule: AdamW, lr 1e-3 (toys 3e-3; else with --imagenet, as CoViAR, eps 1e-3, mv .01, r .005,
i .0003, at the input of mv and r .1 of it, on other pretrained layers .01), weight decay .01;
linear warm-up in the first tenth of the steps, cosine to 0; networks 120 epochs (toys 14), then
exits 60 (toys 18), lr 1e-3 (toys 3e-3); batch 32.

  python pkd_compressed.py                     toy clips, ce and progressive, 2 minutes on 2 CPUs
  python pkd_compressed.py --order all --flatness
  python pkd_compressed.py --data HMDB51 --reencode --imagenet --batch-size 64

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0):
RESULT pkd_compressed data=toy split=1 seed=0 mv4=0.5958 r4=0.7500 i4=0.8875 ce-mv1=0.6042
  ce-mv2=0.6292 ce-mv3=0.6083 ce-r1=0.7250 ce-r2=0.7500 ce-r3=0.7750 ce-i1=0.7667 ce-i2=0.8000
  ce-i3=0.8792 progressive-mv1=0.5833 progressive-mv2=0.5917 progressive-mv3=0.6000
  progressive-r1=0.7292 progressive-r2=0.7250 progressive-r3=0.7625 progressive-i1=0.8083
  progressive-i2=0.8292 progressive-i3=0.8750 seconds=87

Differs from the paper and its code: the code trains progressive for 300 epochs, others for 150,
anti in thirds; its third teacher is self on batch statistics, the paper's is i; it starts from
unreleased Kinetics weights; BatchNorm moves in its "frozen" networks; its exits' linear bias is not
trained; it reports each exit's best epoch on the test list, not the last. One crop and flip serve
all streams, from a few fixed crops for exits; the test view is the middle square. Copies have
I-frames at scene cuts, too. Exits see P-frames by segment, not by group. A fifth of the training
clips is held out (--holdout). More on motion and residuals: common.py.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import itertools
import json
import math
import os
import platform
import sys
import time
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchvision.io import encode_png
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, flow_to_image, make_grid
from tqdm import tqdm

import common

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if GPU else torch.device("cpu")
if GPU:
    torch.cuda.set_device(DEVICE)
MACHINE = torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU"
STREAMS, ORDERS = ("mv", "r", "i"), ("ce", "progressive", "anti", "iframe", "self")
CROPS = 2  # fixed crops of each clip that the exits see
CACHE_GB = 16  # limit of the cache of their feature maps; HMDB51 would take 72

# ---- the method: eqs. (1)-(3) --------------------------------------------------------------------


def soft_cross_entropy(student, teacher, tau):
    """Eq. (2) for one exit. Logits (B, K) and (B, K) -> scalar"""
    p = (teacher / tau).softmax(1)                                              # (B, K)
    log_q = (student / tau).log_softmax(1)                                      # (B, K)
    return -(p * log_q).sum(1).mean()                                           # ()            (2)


def teacher_at(step, steps, order, stream, third):
    """Who teaches the exits of `stream` at step 0..steps-1, eq. (3). -> mv, r, i; None: labels"""
    always = {"ce": None, "iframe": "i", "self": stream}
    if order in always:
        return always[order]
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


# ---- the rest is plumbing: networks and what they see --------------------------------------------


class Streams(nn.Module):
    """The three networks. {stream: x (B, S, C, H, W)} -> {stream: (maps of exits 1-3, z (B, K))}"""

    def __init__(self, names, classes, imagenet, cache):
        super().__init__()
        self.nets = nn.ModuleDict()
        for stream, name in zip(STREAMS, names, strict=True):
            self.nets[stream] = common.ExitNet(stream, name, classes, imagenet, cache)

    def forward(self, x):
        return {stream: net(x[stream]) for stream, net in self.nets.items()}


class Exits(nn.Module):
    """Exits 1 to 3 of every stream, for every order; all orders start from the same weights.
    Outputs of run_frozen, S -> {(order, stream): [z_1, z_2, z_3], (B, K) each}"""

    def __init__(self, streams, orders, classes, seed):
        super().__init__()
        self.heads = nn.ModuleDict()
        for order in orders:
            torch.manual_seed(seed + 1)
            own = {stream: common.exit_heads(net, classes) for stream, net in streams.nets.items()}
            self.heads[order] = nn.ModuleDict(own)

    def forward(self, outputs, S):
        z = {}
        for order, stream in itertools.product(self.heads, STREAMS):
            pairs = zip(self.heads[order][stream], outputs[stream][:3], strict=True)
            z[order, stream] = [head(f, S) for head, f in pairs]
        return z


class FixedCrops(common.Clips):
    """Epoch e sees view e % CROPS of each clip, none of those that the networks learned from."""

    def __getitem__(self, key):
        return super().__getitem__((10 ** 6 + key[0] % CROPS, key[1]))


def see(batch, args, mirror=None):
    """-> {stream: (B, S, C, size, size)}; for training with `mirror`: may clips of class k flip?"""
    clips = [coded.to(DEVICE) for coded in batch.video]
    if mirror is None:
        return common.compressed_view(clips, args.size)
    rngs = [np.random.default_rng([args.seed, *key, 2]) for key in batch.key]
    return common.compressed_view(clips, args.size, rngs, [mirror[k] for k in batch.label])


# ---- training ------------------------------------------------------------------------------------

autocast = functools.partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=GPU)


def learning_rate(name, args):
    """Of a parameter of Streams or Exits; ImageNet's weights learn slowly, as in CoViAR's code, but
    not those of toys."""
    kind, stream, layer, *_ = name.split(".")
    if kind == "heads":
        return 3e-3 if "toy" in args.networks else 1e-3
    lr = args.lr[STREAMS.index(stream)]
    if layer == "fc" or not args.imagenet or "toy" in args.networks:
        return lr
    return lr * (.1 if layer in ("input", "stem") and stream != "i" else .01)


def adamw(module, args, steps, coviar=False):
    """AdamW, no decay on norms and biases; linear warm-up, then cosine to 0."""
    found, warm = {}, max(1, steps // 10)
    for name, w in module.named_parameters():
        found.setdefault((learning_rate(name, args), .01 * (w.ndim > 1)), []).append(w)
    groups = [{"params": own, "lr": lr, "weight_decay": wd} for (lr, wd), own in found.items()]
    optimizer = torch.optim.AdamW(groups, eps=1e-3 if coviar else 1e-8, fused=True)
    parts = [LinearLR(optimizer, 1 / warm, total_iters=warm),
             CosineAnnealingLR(optimizer, max(1, steps - warm))]
    return optimizer, SequentialLR(optimizer, parts, [warm])


def run_folder(script, data, args):
    """OUT/SCRIPT/DATA-sSPLIT-seedSEED-DIGEST: a run belongs to its clips and flags."""
    other = "copies", "data", "out", "resume", "workers"
    flags = {key: value for key, value in vars(args).items() if key not in other}
    digest = zlib.crc32(f"{data.digest()} {flags}".encode())
    run = Path(args.out) / script / f"{data.name}-s{args.split}-seed{args.seed}-{digest:08x}"
    if vars(args).get("resume") and not run.exists():
        print(f"--resume: no run with these clips and flags; {run} is new", file=sys.stderr)
    run.mkdir(parents=True, exist_ok=True)
    return run


def keep(row, rows, epochs, path, about, parts):
    """Log the row of an epoch; write the state of `parts`, {name: module or optimizer}, to `path`,
    from which --resume goes on: a kill leaves the old checkpoint or the new one."""
    rows.append(row)
    if len(rows) == epochs:  # finished: no optimizer
        parts = {name: part for name, part in parts.items() if hasattr(part, "parameters")}
    if RANK == 0:
        shown = [(k, x) for k, x in row.items() if not isinstance(x, dict)]
        cells = [f"{k} {x:.4f}" if isinstance(x, float) else f"{k} {x}" for k, x in shown]
        print("  ".join(cells), flush=True)
        state = {name: part.state_dict() for name, part in parts.items()}
        common.save({**about, **state, "rows": rows}, path)


def resume(path, parts):
    """Load what a killed run has left -> its rows. Raises BadInput."""
    saved = common.read_saved(path, "rows")
    for name, part in parts.items():
        if hasattr(part, "parameters") or name in saved:  # finished: no optimizer
            common.load_strictly(part, saved.get(name), path, name)
    return saved["rows"]


def average(terms, module):
    """A list of losses (n,) -> their mean over processes. BatchNorm's statistics become those of
    process 0: DDP copies them before a step, not after the last one."""
    if WORLD == 1:
        return terms
    terms = torch.stack(terms) / WORLD
    dist.all_reduce(terms)
    for buffer in module.buffers():
        dist.broadcast(buffer, 0)
    return list(terms)


def train_streams(streams, data, args, run):
    """The networks, each by the cross entropy of its consensus, on the same batches. -> rows"""
    clips = common.Clips(data.train, args.segments, None, "coded", train=True, seed=args.seed,
                         copies=args.copies)
    loader = common.ClipLoader(clips, args.batch_size, args.workers, bad=data.bad)
    coviar = args.imagenet and "toy" not in args.networks
    optimizer, schedule = adamw(streams, args, args.epochs * len(loader), coviar)
    parts = {"streams": streams, "optimizer": optimizer, "schedule": schedule}
    path, mirror = run / "streams-last.pt", common.mirrors(data.classes)
    rows = resume(path, parts) if args.resume and path.exists() else []
    wrapped = nn.parallel.DistributedDataParallel(streams) if WORLD > 1 else streams
    for epoch, batches in loader.epochs(len(rows), args.epochs):
        began, terms = time.time(), []
        streams.train()
        for batch in tqdm(batches, f"streams {epoch + 1}", len(loader), False, disable=None):
            with autocast():
                out = wrapped(see(batch, args, mirror))
            labels = torch.tensor(batch.label).to(DEVICE, non_blocking=True)    # (B/W,)
            losses = [F.cross_entropy(out[stream][1].float(), labels) for stream in STREAMS]
            sum(losses).backward()
            for net in streams.nets.values():
                nn.utils.clip_grad_norm_(net.parameters(), 1.)
            if args.degrade and epoch > 0:
                streams.nets[args.degrade].zero_grad()  # None: AdamW skips it
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            terms.append(torch.stack(losses).detach())
        row = {"stage": "streams", "epoch": epoch + 1}
        row.update(zip(STREAMS, loader.mean(average(terms, streams), epoch), strict=True))
        row["clips_per_s"] = len(loader) * loader.order.batch / (time.time() - began)
        keep(row, rows, args.epochs, path, {"flags": vars(args)}, parts)
    return rows


def run_frozen(streams, batch, mirror, args):
    """-> labels (B,); {stream: maps of exits 1-3, (B*S, c, h, w), and logits z (B, K)}"""
    with torch.no_grad(), autocast():
        out, outputs = streams(see(batch, args, mirror)), {}
    for stream, (maps, z) in out.items():
        outputs[stream] = [f.float() for f in (*maps, z)]
    return torch.tensor(batch.label).to(DEVICE, non_blocking=True), outputs


def feature_cache(streams, clips, mirror, args, data):
    """run_frozen for every clip and crop, in memory: labels, outputs of mv, r, i, maps in fp16; row
    crop * N + clip. None where that takes more than CACHE_GB."""
    loader = common.ClipLoader(clips, args.batch_size, args.workers, 0, 1, data.bad)
    loader.order.train = False  # every clip once, in the order of the list
    found = []
    for crop, batches in loader.epochs(0, CROPS):
        for batch in tqdm(batches, f"crop {crop + 1}", len(loader), False, disable=None):
            labels, outputs = run_frozen(streams, batch, mirror, args)
            columns = [labels, *itertools.chain(*outputs.values())]
            room = 2e-9 * CROPS * len(clips) / len(labels) * sum(f.numel() for f in columns)
            if room > CACHE_GB:
                print(f"feature maps would take {room:.0f} GB: every epoch decodes anew")
                return None
            columns = [f.half() if f.ndim == 4 else f for f in columns]
            found.append([f.unflatten(0, (len(labels), -1)).cpu() for f in columns])
    return [torch.cat(column) for column in zip(*found, strict=True)]


def cached_batches(cache, loader, epoch):
    """What run_frozen says of the batches of an epoch, from the cache"""
    for keys in loader.order.batches(epoch):
        at = torch.tensor([epoch % CROPS * len(loader.dataset) + i for _, i in keys])
        labels, *parts = [column[at].flatten(0, 1).to(DEVICE) for column in cache]
        parts = [f.float() for f in parts]
        yield labels, dict(zip(STREAMS, (parts[:4], parts[4:8], parts[8:]), strict=True))


def train_exits(streams, exits, data, held, args, run):
    """All exits by eqs. (1)-(3), on the same batches; tested on the clips `held` out as teachers
    change. -> rows"""
    streams.eval().requires_grad_(False)  # frozen, BatchNorm too
    clips = FixedCrops(data.train, args.segments, None, "coded", train=True, seed=args.seed,
                       copies=args.copies)
    loader = common.ClipLoader(clips, args.batch_size, args.workers, bad=data.bad)
    steps = args.exit_epochs * len(loader)
    optimizer, schedule = adamw(exits, args, steps)
    parts = {"streams": streams, "exits": exits, "optimizer": optimizer, "schedule": schedule}
    path, mirror = run / "last.pt", common.mirrors(data.classes)
    rows = resume(path, parts) if args.resume and path.exists() else []
    cache = len(rows) < args.exit_epochs and feature_cache(streams, clips, mirror, args, data)
    wrapped = nn.parallel.DistributedDataParallel(exits) if WORLD > 1 else exits
    ends = [round(args.exit_epochs * sixth / 6) for sixth in (1, 2, 4, 5, 6)]
    for epoch, batches in loader.epochs(len(rows), args.exit_epochs):
        began, terms = time.time(), []
        exits.train()
        seen = cached_batches(cache, loader, epoch) if cache else \
            (run_frozen(streams, batch, mirror, args) for batch in batches)
        bar = tqdm(seen, f"exits {epoch + 1}", len(loader), False, disable=None)
        for step, (labels, outputs) in enumerate(bar, epoch * len(loader)):
            with autocast():
                out = wrapped(outputs, args.segments)
            losses = []
            for (order, stream), z in out.items():
                who = teacher_at(step, steps, order, stream, args.third_teacher)
                z_t = outputs[who][3] if who else None                          # (B, K)
                losses.append(exits_loss([z_k.float() for z_k in z], labels, z_t, args.tau))
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            terms.append(torch.stack(losses).detach())
        row = {"stage": "exits", "epoch": epoch + 1}
        means = zip(out, loader.mean(average(terms, exits), epoch), strict=True)
        row.update({f"{order}-{stream}": x for (order, stream), x in means})
        row["clips_per_s"] = len(loader) * loader.order.batch / (time.time() - began)
        if held and epoch + 1 in ends:
            row["held-out"] = evaluate(streams, exits, held, data.bad, args)
        about = {"flags": vars(args), "classes": data.classes}
        keep(row, rows, args.exit_epochs, path, about, parts)
    return rows


# ---- testing and measuring -----------------------------------------------------------------------


@torch.no_grad()
def evaluate(streams, exits, clips, bad, args):
    """Top-1 on clips [(path, label)] -> {"mv4": of a network, ..., "ORDER-mv1": of an exit, ...}"""
    streams.eval()
    exits.eval()
    names = [f"{stream}4" for stream in STREAMS]
    for order, stream, k in itertools.product(args.order, STREAMS, (1, 2, 3)):
        names.append(f"{order}-{stream}{k}")
    coded = common.Clips(clips, args.segments, None, "coded", copies=args.copies)
    loader = common.ClipLoader(coded, args.batch_size, args.workers, bad=bad)
    hits = torch.zeros(len(names), device=DEVICE)
    for batch in tqdm(loader, "test", leave=False, disable=None):
        labels, outputs = run_frozen(streams, batch, None, args)
        with autocast():
            out = exits(outputs, args.segments)
        z = [outputs[stream][3] for stream in STREAMS]
        z += [z_k.float() for z_k in itertools.chain(*out.values())]
        hits += (torch.stack(z).argmax(2) == labels).sum(1)
    if WORLD > 1:
        dist.all_reduce(hits)
    return dict(zip(names, (hits / len(clips)).tolist(), strict=True))


def phases(log, args, path):
    """Draw top-1 of held-out clips where teachers change, mean of exits 1-3 -> rows"""
    rows, panels = [], {stream: {} for stream in STREAMS}
    tested = [row for row in log if "held-out" in row]
    for stream, order in itertools.product(STREAMS, args.order):
        curve = []
        for row in tested:
            top1 = [row["held-out"][f"{order}-{stream}{k}"] for k in (1, 2, 3)]
            curve.append((row["epoch"], sum(top1) / 3))
        panels[stream][order] = curve
        columns = {f"epoch {epoch}": top1 for epoch, top1 in curve}
        rows.append({"exits of": stream, "order": order, **columns})
    common.plot(panels, "epoch", "top-1 of held-out clips, mean of exits 1-3", path)
    return rows


def flatness(streams, exits, data, args, clips=128):
    """How flat minima of networks and exits are, on some training clips in the test view"""
    chosen = np.random.default_rng(args.seed).permutation(len(data.train))[:clips]
    part = common.Clips([data.train[i] for i in chosen], args.segments, None, "coded",
                        copies=args.copies)
    batches = {}
    for batch in common.ClipLoader(part, args.batch_size, args.workers, bad=data.bad):
        labels, outputs = run_frozen(streams.eval(), batch, None, args)
        for stream, x in see(batch, args).items():
            batches.setdefault(stream, []).append((x, outputs[stream][:3], labels))
    rows = [minimum(name, net, batches[name], args) for name, net in streams.nets.items()]
    for order, stream in itertools.product(args.order, STREAMS):
        heads = exits.heads[order][stream]
        rows.append(minimum(f"{order}-{stream}", heads, batches[stream], args))
    return rows


def minimum(name, module, batches, args, probes=30):
    """The trace of the Hessian H of the cross entropy, of exits the sum of three, in eval(), by
    Hutchinson: E[v H v], v of +1 and -1. Clips that cannot be decoded, label -1, do not count. ->
    row, mean and standard error over the probes"""
    module = copy.deepcopy(module).eval().requires_grad_()
    torch.manual_seed(args.seed)
    weights, traces = list(module.parameters()), np.zeros(probes)
    count = sum((y >= 0).sum() for _, _, y in batches)
    for n in range(probes):
        v, loss = [torch.randn_like(w).sign() for w in weights], 0.
        for x, maps, y in batches:  # memory holds the graph of one batch
            if isinstance(module, nn.ModuleList):
                logits = [head(f, args.segments) for head, f in zip(module, maps, strict=True)]
            else:
                logits = [module(x)[1]]
            terms = [F.cross_entropy(z, y, ignore_index=-1, reduction="sum") for z in logits]
            share = sum(terms) / count
            slopes = torch.autograd.grad(share, weights, create_graph=True)
            Hv = torch.autograd.grad(slopes, weights, v)
            traces[n] += sum((a * b).sum().item() for a, b in zip(Hv, v, strict=True))
            loss += share.item()
    return {"minimum": name, "loss": loss, "trace": traces.mean(),
            "standard error": traces.std(ddof=1) / probes ** .5}


def draw_streams(data, args, path):
    """A row per test clip: I-frame, accumulated motion (colour: direction, saturation: length),
    residual (grey: 0), reconstructed frame."""
    clips, tiles = common.Clips(data.test, args.segments, None, "coded", copies=args.copies), []
    for n in range(0, len(clips), -(-len(clips) // 6)):
        coded = clips[0, n].video
        mv, r, i = (part[args.segments // 2][None] for part in common.modalities(coded))
        pictures = {"I-frame": i, f"motion, up to {mv.norm(dim=1).max():.0f} px": flow_to_image(mv),
                    "residual": (128 + r).clamp(0, 255),
                    data.classes[data.test[n][1]]: common.warp(i, mv).round() + r}
        for name, picture in pictures.items():
            zoom = F.interpolate(picture.float(), scale_factor=192 / coded.size[0])[0].byte()
            zoom = F.pad(TF.center_crop(zoom, [192, 256]), (0, 0, 16, 0))
            tiles.append(draw_bounding_boxes(zoom, torch.tensor([[0, 0, 255, 207]]), [name], "red"))
    with common.renamed(path) as part:
        part.write_bytes(bytes(encode_png(make_grid(tiles, 4)).numpy()))


def table(rows):
    """Dicts with the same keys -> aligned text"""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def write_record(path, args, data, results, log, began):
    """run.json: flags, versions, machine and numbers; metrics.jsonl: a row per epoch"""
    versions = {name: version(name) for name in ("torch", "open_clip_torch", "av", "numpy")}
    record = {"flags": vars(args), "versions": versions, "machine": MACHINE, "bad": data.bad,
              "notes": data.notes(), "results": results, "seconds": time.time() - began}
    with common.renamed(path) as part:
        part.write_text(json.dumps(record, indent=1))
    with common.renamed(path.with_name("metrics.jsonl")) as part:
        part.write_text("\n".join(map(json.dumps, log)))


# ---- flags and main ------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="toy", help="toy, or a folder; the README lists the formats")
    add("--split", type=common.which_split, default=1, choices=(1, 2, 3, "all"), help="of lists")
    add("--allow-missing", action="store_true", help="go on without missing clips")
    add("--shots", type=int, default=0, help="training clips of each class; 0: all")
    add("--label-noise", type=float, default=0., help="share of training labels made wrong")
    add("--reencode", action="store_true", help="use copies in CoViAR's form, made in OUT/cache")
    add("--segments", type=int, default=3, help="S, frames per clip")
    add("--size", type=int, default=224, help="pixels; 32 for toy clips")
    add("--holdout", type=float, default=.2, help="share of training clips kept for wise_infer.py")
    add("--networks", nargs=3, metavar=("MV", "R", "I"), default=["resnet18", "resnet18",
        "resnet50"], help="ResNets of torchvision (the paper's) or toy; toy for toy clips")
    add("--imagenet", action="store_true", help="start from ImageNet's weights, toys from those "
        "of drawn stills")
    add("--order", nargs="+", choices=[*ORDERS, "all"], default=["ce", "progressive"], help="eq. 3")
    add("--third-teacher", choices=("self", "i"), default="self", help="of eq. (3)")
    add("--tau", type=float, default=1., help="temperature of eq. (2)")
    add("--degrade", choices=STREAMS, help="this network stops learning after one epoch")
    add("--flatness", action="store_true", help="measure how flat the minima are")
    add("--epochs", type=int, default=120, help="of the networks; 14 for toy clips")
    add("--exit-epochs", type=int, default=60, help="of the exits; 18 for toy clips")
    add("--batch-size", type=int, default=32, help="of all processes together")
    add("--lr", type=float, nargs="+", default=[1e-3], help="of mv, r, i, or one for all; 3e-3 for "
        "toys, else .01 .005 .0003 with --imagenet")
    add("--compile", action="store_true", help="torch.compile the three networks")
    add("--seed", type=int, default=0, help="of initial weights, order and augmentation")
    add("--seeds", type=int, nargs="*", default=[], help="one run each, and mean, as --split all")
    add("--out", default="runs", help="folder for runs and the cache")
    add("--resume", action="store_true", help="go on with a run that was killed")
    add("--workers", type=int, default=max(1, min(16, os.cpu_count() - 1)), help="that decode")
    args, _ = parser.parse_known_args(argv)
    if args.data == "toy":
        parser.set_defaults(size=32, epochs=14, exit_epochs=18, networks=["toy"] * 3)
    if args.imagenet:
        parser.set_defaults(lr=[.01, .005, .0003])
    if "toy" in parser.parse_known_args(argv)[0].networks:
        parser.set_defaults(lr=[3e-3])
    args = parser.parse_args(argv)
    args.lr = args.lr * 3 if len(args.lr) == 1 else args.lr
    args.order = list(ORDERS) if "all" in args.order else list(dict.fromkeys(args.order))
    copies = f"{args.out}/cache/{Path(args.data).resolve().name}-mpeg4"
    args.copies = copies if args.reencode else None
    if min(args.segments, args.epochs, args.exit_epochs, args.batch_size) < 1:
        parser.error("--segments, --epochs, --exit-epochs, --batch-size take 1 or more")
    if args.size < 32 or not (0 <= args.holdout < 1 and 0 <= args.label_noise <= 1):
        parser.error("--size takes 32 or more, --holdout and --label-noise 0 to 1")
    if not 0 <= args.seed < 2 ** 63 or min(args.shots, args.workers) < 0:
        parser.error("--seed, --shots, --workers take 0 or more")
    if len(args.lr) != 3 or not all(0 < x < math.inf for x in (*args.lr, args.tau)):
        parser.error("--lr takes one number or three; --lr, --tau: more than 0")
    return args


def refuse_unfit(data):
    """Raises BadInput where a clip's vectors cannot be followed."""
    for path, _ in data.train + data.test:
        with contextlib.suppress(common.BadVideo):
            if reason := common.video_index(path).unfit:
                raise common.BadInput(f"{path}: {reason}; add --reencode, which works on copies")


def main(argv=None):
    """Train three networks and their exits, test and measure them. -> numbers"""
    args, began = parse(argv), time.time()
    if args.split == "all" or args.seeds:
        return common.several(main, argv, args.split, args.seeds or [args.seed])
    if "toy" in args.networks:
        torch.set_num_threads(1)  # small networks run faster on one thread
    if WORLD > 1:
        dist.init_process_group("nccl" if GPU else "gloo", timeout=datetime.timedelta(hours=12),
                                device_id=DEVICE if GPU else None)  # 12: copies may be made
    cache = Path(args.out) / "cache"
    data = common.read_data(args.data, args.split, args.allow_missing, cache, "toy-pairs")
    if not args.reencode:
        refuse_unfit(data)
    args.clips = data.digest()  # for wise_infer.py
    data, held = common.hold_out(data, args.holdout, args.seed)
    data = common.few_shot(data, args.shots, args.seed)
    data = common.noisy_labels(data, args.label_noise, args.seed)
    torch.manual_seed(args.seed)
    streams = Streams(args.networks, len(data.classes), args.imagenet, cache).to(DEVICE)
    exits = Exits(streams, args.order, len(data.classes), args.seed).to(DEVICE)
    if args.compile:
        torch.compiler.config.recompile_limit = 64  # networks x batch sizes x training, testing
        for net in streams.nets.values():
            net.compile()
    run = run_folder("pkd_compressed", data, args)
    if RANK == 0:
        print(f"{data}, {len(held)} held out; {WORLD} process(es), {MACHINE}", flush=True)

    log = train_streams(streams, data, args, run)
    log += train_exits(streams, exits, data, held, args, run)
    top1 = evaluate(streams, exits, data.test, data.bad, args)
    if WORLD > 1:
        dist.destroy_process_group()
    minima = flatness(streams, exits, data, args) if args.flatness and RANK == 0 else []
    if RANK == 0:
        report(top1, minima, data, held, args, log, run, began)
    return {"top1": top1, "flatness": minima}


def report(top1, minima, data, held, args, log, run, began):
    """Write record and pictures; print tables and RESULT."""
    rows = []
    for stream, k in itertools.product(STREAMS, (1, 2, 3)):
        row = {order: top1[f"{order}-{stream}{k}"] for order in args.order}
        rows.append({"exit": f"{stream}{k}", **row, "whole network": top1[f"{stream}4"]})
    print(f"{table(rows)}\ntop-1 of {len(data.test)} test clips, chance 1/{len(data.classes)}")
    if minima:
        print(f"{table(minima)}\ntrace of the Hessian, of exits the sum of three; the paper finds "
              f"i < r < mv")
    if held:
        print(f"{table(phases(log, args, run / 'phases.png'))}\ntop-1 of {len(held)} held-out "
              f"clips, mean of exits 1-3, after sixths 1, 2, 4, 5, 6 of the training\n"
              f"NOTE with {len(held)} clips held out, top-1 does not compare with the paper's")
    for note in data.notes():
        print(f"NOTE {note}")
    write_record(run / "run.json", args, data, {"top1": top1, "flatness": minima}, log, began)
    draw_streams(data, args, run / "run.png")
    scores = [f"{name}={x:.4f}" for name, x in top1.items()]
    print(f"record, checkpoints, pictures: {run}\nRESULT pkd_compressed data={data.name} "
          f"split={args.split} seed={args.seed}", *scores, f"seconds={time.time() - began:.0f}")


if __name__ == "__main__":
    common.run(main)
