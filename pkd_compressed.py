"""Progressive knowledge distillation (PKD): train early exits on compressed video, with one
teacher after another.

Soufleri, Ravikumar, Roy: "Advancing Compressed Video Action Recognition through Progressive
Knowledge Distillation" (arXiv 2407.02713), the training half; wise_infer.py is the inference half.

A compressed video contains only a few complete images (I-frames). The frames between them, the
P-frames, are stored as motion vectors and a residual. As in CoViAR (Wu et al., CVPR 2018), one
network sees the motion (mv), one the residuals (r) and one the I-frames (i). Each network has three
early exits, behind its layers 1 to 3. A video that leaves at an early exit costs less.

Training has two stages. First, the three networks learn from the labels. Then they are frozen, and
only the exits learn, from the labels or from a teacher. The teacher is one of the three networks.
The paper finds that training on motion ends in a sharp minimum of the loss, on residuals in a
flatter one and on I-frames in the flattest. PKD takes its teachers in this order.

B videos with labels y, K classes, S frames per video. z_k (B, K) are the logits of exit k, and
z_t (B, K) those of teacher t. Logits are means over the S frames of a video.
  (1) exits_loss           from labels:     L = sum_k 1/B sum_b CE(z_k, y)_b
  (2) exits_loss           from a teacher:  L = sum_k soft_cross_entropy(z_k, z_t), where that is
      soft_cross_entropy   -1/B sum_b sum_c softmax(z_t / tau)_bc log softmax(z_k / tau)_bc
                           sum over classes, mean over videos, no tau^2, no labels; tau = 1
  (3) teacher_for_step     who teaches the exits of network s in each sixth of the steps:
        schedule            1   2   3   4   5   6
        labels              -   -   -   -   -   -     baseline, eq. (1)
        progressive         mv  r   s   s   s   s     PKD as in the authors' code
        progressive_iframe  mv  r   i   i   i   i     PKD as in the paper
        anti                s   s   s   s   r   mv    control: PKD in reverse
        iframe              i   i   i   i   i   i     control: one teacher, the I-frame network
        self                s   s   s   s   s   s     control: one teacher, the network itself

The networks are frozen at the start of train_exits, including the statistics of BatchNorm. All
schedules have the same initial weights, batches and number of steps.
Schedule: AdamW, lr 1e-3 (toy networks: 3e-3), weight decay .01; linear warm-up in the first tenth
of the steps, then cosine to 0; batch 32. Networks 120 epochs (toy data: 14), exits 60 (toy: 18).
With --imagenet, the networks learn as in CoViAR, with eps 1e-3: the classifiers of mv, r and i at
lr .01, .005, .0003, pretrained layers at .01 of that, the first layers of mv and r at .1 of it.

  python pkd_compressed.py                     toy videos; 1 to 2 minutes on 2 CPU cores
  python pkd_compressed.py --schedules all --flatness
  python pkd_compressed.py --split 2 --flatness   labelled by colour, which every frame shows
  python pkd_compressed.py --epochs 42 --exit-epochs 54        where teachers help
  python pkd_compressed.py --label-noise 0.4   where they help sooner
  python pkd_compressed.py --label-noise 0.4 --clean-iframe --schedules all
  python pkd_compressed.py --data HMDB51 --reencode --imagenet --batch-size 64

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0):
RESULT pkd_compressed data=toy split=1 seed=0 motion=0.5958 residual=0.7500 iframe=0.8875
  labels_mean=0.7264 progressive_mean=0.7227 self_mean=0.7310 seconds=132
motion, residual, iframe: top-1 of the three networks. SCHEDULE_mean: mean top-1 of the nine exits.
After 14 epochs, the networks know little that labels do not say. With --epochs 42 --exit-epochs 54,
they are better teachers than labels; with --label-noise 0.4, they already are.

Why the order of teachers hardly matters: an exit has no activation, so it is a linear map of frozen
features (but for BatchNorm), and eq. (2) is convex in this map. Wherever the first teachers led,
the last one leads to the same minimum. In `progressive`, as in `self`, it is the network itself.
Why flatness follows what a stream can see: where the input shows the label, the loss gets low in a
wide region. A still shows UCF101's actions, but not a toy's motion, so I-frames end sharpest here,
and flattest if the label is the colour (--split 2).

Differs from the paper and its code:
- The code gives PKD 300 epochs, other schedules 150, and anti equal thirds. Its third teacher is s
  with BatchNorm in training mode; in the paper it is i. Its "frozen" networks update BatchNorm.
- The code starts from unpublished Kinetics weights. It trains networks by Adam with L2 1e-4 and
  steps, exits with lr .01, .005, .0003, eps 1e-3, no decay and a fixed bias in the linear layer.
- It reports each exit's best epoch on the test list. Here, it is the last epoch.
- Teacher and exits share one crop and flip, which are those of two fixed crops per video. The test
  crop is the central square. The code draws crops independently and tests larger images.
- CoViAR changes the colours of I-frames, clips residuals at 127 and stores motion in 8 bits. Its
  P-frames are sampled per group of pictures; here, per segment. Re-encoded copies have I-frames at
  scene cuts, too. More on motion and residuals: common.py.
- A fifth of the training videos (--holdout) is held out for wise_infer.py.
- With torchrun, BatchNorm in training sees the videos of its own process.
"""
import argparse
import contextlib
import csv
import json
import os
import platform
import sys
import time
from datetime import datetime, timedelta
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchvision.utils import draw_bounding_boxes, flow_to_image, make_grid, save_image
from tqdm import tqdm

import common

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these three
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
USE_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if USE_CUDA else torch.device("cpu")
DEVICE_NAME = torch.cuda.get_device_name(DEVICE) if USE_CUDA else f"{platform.machine()} CPU"

STREAMS = {"mv": "motion", "r": "residual", "i": "iframe"}  # names in tables and results
EXITS = [f"{name}{k}" for name, k in product(STREAMS.values(), (1, 2, 3))]
SCHEDULES = ("labels", "progressive", "progressive_iframe", "anti", "iframe", "self")
NUM_FIXED_CROPS = 2  # crops of each video that the exits see
CACHE_GB = 16  # size limit of the feature cache

# ---- the method: eqs. (1)-(3) --------------------------------------------------------------------


def soft_cross_entropy(student_logits, teacher_logits, tau):
    """Eq. (2) for one exit. Logits (B, K) and (B, K) -> scalar"""
    p = (teacher_logits / tau).softmax(1)                                       # (B, K)
    log_q = (student_logits / tau).log_softmax(1)                               # (B, K)
    return -(p * log_q).sum(1).mean()                                           # ()            (2)


def exits_loss(z, labels, teacher_logits, tau):
    """Eqs. (1) and (2), summed over the exits. z: logits (B, K) of each exit; labels (B,);
    teacher_logits (B, K), or None if the labels teach. -> scalar"""
    if teacher_logits is None:
        return sum(F.cross_entropy(z_k, labels) for z_k in z)                   # ()            (1)
    return sum(soft_cross_entropy(z_k, teacher_logits, tau) for z_k in z)       # ()            (2)


def teacher_for_step(step, steps, schedule, stream):
    """Eq. (3) for the exits of the network `stream` at step 0..steps-1.
    -> the teacher: mv, r or i, or None if the labels teach"""
    progressive = ["mv", "r", stream, stream, stream, stream]                   # (6,)
    teachers = {"labels": [None] * 6, "progressive": progressive, "anti": progressive,
                "progressive_iframe": ["mv", "r", "i", "i", "i", "i"],
                "iframe": ["i"] * 6, "self": [stream] * 6}
    if schedule == "anti":
        step = steps - 1 - step
    return teachers[schedule][6 * step // steps]                                #               (3)


# ---- the rest is plumbing: networks, exits and their inputs --------------------------------------


class Streams(nn.Module):
    """The three networks. {stream: x (B, S, C, H, W)} -> {stream: (feature maps for the exits,
    [(B*S, c, h, w)] * 3; the network's own logits (B, K))}"""

    def __init__(self, names, num_classes, imagenet=False):
        super().__init__()
        self.nets = nn.ModuleDict()
        for stream, name in zip(STREAMS, names, strict=True):
            self.nets[stream] = common.ExitNet(stream, name, num_classes, imagenet)

    def forward(self, x):
        with autocast():
            return {stream: net(x[stream]) for stream, net in self.nets.items()}


class Exits(nn.Module):
    """The three exits of each network, for each schedule.
    frozen_features -> {(schedule, stream): [z_1, z_2, z_3]}, logits (B, K)"""

    def __init__(self, streams, schedules, num_classes, seed):
        super().__init__()
        self.heads = nn.ModuleDict()
        for schedule in schedules:
            torch.manual_seed(seed + 1)
            self.heads[schedule] = nn.ModuleDict()
            for stream, net in streams.nets.items():
                self.heads[schedule][stream] = common.exit_heads(net, num_classes)

    def forward(self, features):
        with autocast():
            return {(schedule, stream): apply_exits(self.heads[schedule][stream], features, stream)
                    for schedule, stream in product(self.heads, STREAMS)}


def apply_exits(heads, features, stream):
    maps = [features[f"{stream}{k}"].float() for k in (1, 2, 3)]                # (B, S, c, h, w)
    z = [head(x.flatten(0, 1), x.shape[1]) for head, x in zip(heads, maps, strict=True)]
    return [z_k.float() for z_k in z]                                           # (B, K) each


class FixedCropDataset(common.CompressedDataset):
    """Epoch e sees fixed crop e % NUM_FIXED_CROPS of each video, which no network has seen."""

    def __getitem__(self, key):
        epoch, index = key
        return super().__getitem__((10**6 + epoch % NUM_FIXED_CROPS, index))


def make_loader(videos, undecodable, args, train=False, dataset=common.CompressedDataset):
    videos = dataset(videos, args.segments, args.copies, train, args.seed)
    return common.VideoLoader(videos, args.batch_size, args.workers, undecodable=undecodable)


def require_mpeg4(videos):
    """Raise BadInput if the motion vectors of a video cannot be followed."""
    for path, _ in videos:
        with contextlib.suppress(common.BadVideo):  # loaders name and count these
            reason = common.index_video(path).unsupported
            if reason:
                raise common.BadInput(f"{path}: {reason}; add --reencode, which works on copies")


def network_inputs(batch, args, can_flip=None):
    """-> {stream: (B, S, C, size, size)}: the central square, or with can_flip, a bool for each
    class, a random crop and flip"""
    videos = [video.to(DEVICE) for video in batch.video]
    if can_flip is None:
        return common.compressed_inputs(videos, args.size)
    rngs = [np.random.default_rng([args.seed, *key, 2]) for key in batch.rng_key]
    return common.compressed_inputs(videos, args.size, rngs, [can_flip[y] for y in batch.label])


@torch.no_grad()
def frozen_features(streams, batch, args, can_flip=None):
    """-> {"labels": (B,), "mv1", "mv2", "mv3": feature maps for the exits of mv (B, S, c, h, w),
    "mv4": the network's own logits (B, K); the same for r and i}"""
    features = {"labels": torch.tensor(batch.label).to(DEVICE, non_blocking=True)}
    outputs = streams(network_inputs(batch, args, can_flip))
    for stream, (maps, logits) in outputs.items():
        features[f"{stream}4"] = logits.float()
        for k, x in enumerate(maps, 1):
            features[f"{stream}{k}"] = x.float().unflatten(0, (len(batch.label), -1))
    return features


def cache_features(streams, dataset, can_flip, data, args):
    """-> frozen_features of all videos, row crop * N + index; maps in fp16. None if they take more
    than CACHE_GB."""
    loader = common.VideoLoader(dataset, args.batch_size, args.workers, 0, 1, data.undecodable)
    loader.batch_sampler.train = False  # each video once, in the order of the list
    cache = {}
    for _, batches in loader.epochs(0, NUM_FIXED_CROPS):
        for batch in tqdm(batches, "features", len(loader), leave=False, disable=None):
            features = frozen_features(streams, batch, args, can_flip)
            gigabytes = 2e-9 * sum(x[0].numel() for x in features.values()) * len(dataset)
            if gigabytes * NUM_FIXED_CROPS > CACHE_GB:
                print("features exceed CACHE_GB: every epoch decodes anew")
                return None
            for name, x in features.items():
                x = x.half() if x.ndim == 5 else x
                cache.setdefault(name, []).append(x.cpu())
    return {name: torch.cat(batches) for name, batches in cache.items()}


def cached_batches(cache, loader, epoch):
    """Yield the frozen_features of an epoch."""
    first_row = epoch % NUM_FIXED_CROPS * len(loader.dataset)
    for keys in loader.batch_sampler.batches(epoch):
        rows = [first_row + index for _, index in keys]
        yield {name: x[rows].to(DEVICE) for name, x in cache.items()}


def learning_rate(name, args):
    """name: nets.STREAM.LAYER... in Streams, heads... in Exits"""
    kind, stream, layer, *_ = name.split(".")
    lr = 3e-3 if "toy" in args.networks else 1e-3
    if kind == "heads":
        return lr
    if not args.imagenet:
        return args.lr or lr
    lr = args.lr or {"mv": .01, "r": .005, "i": .0003}[stream]
    if layer == "fc":
        return lr
    return .01 * lr if layer == "layers" or stream == "i" else .1 * lr


def build_optimizer(module, steps, args):
    """AdamW for Streams or Exits; norms and biases do not decay."""
    groups = {}
    for name, weight in module.named_parameters():
        decay = .01 if weight.ndim > 1 else 0.
        groups.setdefault((learning_rate(name, args), decay), []).append(weight)
    eps = 1e-3 if args.imagenet and isinstance(module, Streams) else 1e-8
    groups = [{"params": weights, "lr": lr, "weight_decay": decay}
              for (lr, decay), weights in groups.items()]
    optimizer = torch.optim.AdamW(groups, eps=eps, fused=True)
    return optimizer, warmup_and_cosine(optimizer, steps)


def mean_losses(losses, names, module, epoch):
    """Losses (n,) of each step -> {name: mean}. Also copies BatchNorm's statistics from process 0:
    DDP does so before each step, but not after the last."""
    if WORLD_SIZE > 1:
        for loss in losses:
            dist.all_reduce(loss.div_(WORLD_SIZE))
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
    return dict(zip(names, epoch_means(losses, epoch), strict=True))


# ---- training ------------------------------------------------------------------------------------


def allowed_flips(data, args):
    """-> for each class, whether its videos may be mirrored"""
    return [flip and not args.no_flip for flip in common.flippable(data.classes)]


def train_networks(streams, data, metadata, folder, args, iframe_labels=None):
    """Stage 1: the three networks learn from the labels; that of I-frames from iframe_labels, if
    given, one for each video of data.train. -> history"""
    loader = make_loader(data.train, data.undecodable, args, train=True)
    optimizer, lr_schedule = build_optimizer(streams, args.epochs * len(loader), args)
    modules = {"streams": streams, "optimizer": optimizer, "lr_schedule": lr_schedule}

    # a new run starts at epoch 0, a resumed one after its last checkpoint
    path = folder / "networks-last.pt"
    history = resume_training(path, metadata, modules)
    ddp_streams = DistributedDataParallel(streams) if WORLD_SIZE > 1 else streams
    can_flip = allowed_flips(data, args)

    for epoch, batches in loader.epochs(len(history), args.epochs):
        losses = []
        streams.train()
        for batch in tqdm(batches, f"networks {epoch + 1}", len(loader), leave=False, disable=None):
            # the networks see the same videos, with the same crop and flip
            x = network_inputs(batch, args, can_flip)
            labels = dict.fromkeys(STREAMS, batch.label)
            if iframe_labels:
                labels["i"] = [iframe_labels[index] for _, index in batch.rng_key]
            outputs = ddp_streams(x)                                            # maps, logits

            # one cross-entropy per network; the sum trains each as if it were alone
            ce = []
            for stream, (_, logits) in outputs.items():
                y = torch.tensor(labels[stream]).to(DEVICE, non_blocking=True)  # (B,)
                ce.append(F.cross_entropy(logits.float(), y))
            sum(ce).backward()
            for net in streams.nets.values():
                nn.utils.clip_grad_norm_(net.parameters(), 1.)

            # --degrade: without a gradient, the optimizer skips this network
            if args.degrade and epoch > 0:
                streams.nets[args.degrade].zero_grad()

            # update
            optimizer.step()
            lr_schedule.step()
            optimizer.zero_grad()
            losses.append(torch.stack(ce).detach())

        # print the losses, and save a checkpoint from which --resume continues
        metrics = {"variant": "networks", "epoch": epoch + 1}
        metrics.update(mean_losses(losses, STREAMS.values(), streams, epoch))
        log_and_checkpoint(metrics, history, args.epochs, path, metadata, modules)
    return history


def train_exits(streams, exits, data, held_out, metadata, folder, args):
    """Stage 2: the exits learn by eqs. (1)-(3), all schedules from the same batches. -> history"""
    # freeze the networks, teachers included: no gradients, and BatchNorm keeps its statistics
    streams.eval().requires_grad_(False)

    loader = make_loader(data.train, data.undecodable, args, train=True, dataset=FixedCropDataset)
    steps = args.exit_epochs * len(loader)
    optimizer, lr_schedule = build_optimizer(exits, steps, args)
    modules = {"streams": streams, "exits": exits, "optimizer": optimizer,
               "lr_schedule": lr_schedule}

    # a new run starts at epoch 0, a resumed one after its last checkpoint
    path = folder / "last.pt"
    history = resume_training(path, metadata, modules)
    ddp_exits = DistributedDataParallel(exits) if WORLD_SIZE > 1 else exits

    # what the frozen networks compute never changes: compute it once, if it fits into memory
    can_flip = allowed_flips(data, args)
    cache = cache_features(streams, loader.dataset, can_flip, data, args)
    test_epochs = [round(args.exit_epochs * sixth / 6) for sixth in (1, 2, 4, 5, 6)]

    for epoch, batches in loader.epochs(len(history), args.exit_epochs):
        losses = []
        exits.train()

        # features of the networks: from the cache, or computed batch by batch
        if cache:
            batches = cached_batches(cache, loader, epoch)
        else:
            batches = (frozen_features(streams, batch, args, can_flip) for batch in batches)
        progress = tqdm(batches, f"exits {epoch + 1}", len(loader), leave=False, disable=None)
        for step, features in enumerate(progress, epoch * len(loader)):
            # the exits of all schedules see the same features
            logits = ddp_exits(features)

            # each schedule has its own exits; its teacher depends on the step
            schedule_losses = dict.fromkeys(args.schedules, 0.)
            for (schedule, stream), z in logits.items():
                teacher = teacher_for_step(step, steps, schedule, stream)
                teacher_logits = features[f"{teacher}4"] if teacher else None   # (B, K)
                schedule_losses[schedule] += exits_loss(z, features["labels"], teacher_logits,
                                                        args.tau)

            # update; no exit gets a gradient from the loss of another
            sum(schedule_losses.values()).backward()
            optimizer.step()
            lr_schedule.step()
            optimizer.zero_grad()
            losses.append(torch.stack(list(schedule_losses.values())).detach())

        # print the losses, and, where a teacher's turn ends, the accuracy on held-out videos
        metrics = {"variant": "exits", "epoch": epoch + 1}
        metrics.update(mean_losses(losses, args.schedules, exits, epoch))
        if held_out and epoch + 1 in test_epochs:
            top1, _ = evaluate(streams, exits, held_out, data.undecodable, args)
            metrics.update({f"held_out_{name}": top1[f"{name}_mean"] for name in args.schedules})
        if args.test_every and (epoch + 1) % args.test_every == 0:
            top1, _ = evaluate(streams, exits, data.test, data.undecodable, args)
            metrics.update({f"top1_{name}": top1[f"{name}_mean"] for name in args.schedules})
        log_and_checkpoint(metrics, history, args.exit_epochs, path, metadata, modules)
    return history


@torch.no_grad()
def evaluate(streams, exits, videos, undecodable, args):
    """Top-1 on videos [(path, label)] -> {"motion": of a network, "labels_motion1": of its exit 1,
    "labels_mean": mean of the nine exits, ...}; class probabilities of the networks (3, N, K)"""
    streams.eval()
    exits.eval()
    correct = 0
    p = torch.zeros(3, len(videos), streams.nets["mv"].fc.out_features, device=DEVICE)
    for batch in tqdm(make_loader(videos, undecodable, args), "test", leave=False, disable=None):
        features = frozen_features(streams, batch, args)
        logits = {name: features[f"{stream}4"] for stream, name in STREAMS.items()}
        for (schedule, stream), z in exits(features).items():
            for k, z_k in enumerate(z, 1):
                logits[f"{schedule}_{STREAMS[stream]}{k}"] = z_k
        z = torch.stack(list(logits.values()))                                  # (nets+E, B, K)
        # an undecodable video has the label -1, and so counts as wrong
        correct += (z.argmax(2) == features["labels"]).sum(1)                   # (nets+E,)
        decodable = features["labels"][:, None] >= 0                            # (B, 1)
        rows = torch.tensor([index for _, index in batch.rng_key])              # (B,)
        p[:, rows.to(DEVICE, non_blocking=True)] = z[:3].softmax(2) * decodable  # (3, B, K)
    if WORLD_SIZE > 1:
        dist.all_reduce(correct)
        dist.all_reduce(p)
    top1 = dict(zip(logits, (correct / len(videos)).tolist(), strict=True))
    for schedule in args.schedules:
        top1[f"{schedule}_mean"] = sum([top1[f"{schedule}_{name}"] for name in EXITS]) / 9
    return top1, p


def measure_flatness(streams, exits, data, args):
    """hessian_trace of each network and its exits, on 128 training videos -> rows"""
    chosen = np.random.default_rng(args.seed).permutation(len(data.train))[:128]
    batches = []
    for batch in make_loader([data.train[index] for index in chosen], data.undecodable, args):
        batches.append(network_inputs(batch, args) | frozen_features(streams, batch, args))
    streams.requires_grad_()
    rows = []
    for stream, name in STREAMS.items():
        modules = {"network": streams.nets[stream]}
        for schedule in args.schedules:
            modules[f"{schedule} exits"] = exits.heads[schedule][stream]
        for module_name, module in modules.items():
            row = {"stream": name, "of": module_name}
            rows.append(row | hessian_trace(module, stream, batches, args.seed))
    return rows


def hessian_trace(module, stream, batches, seed, probes=30):
    """Trace of the Hessian H of the cross-entropy of a network, or of its three exits together, and
    the sum of w^2 H_ww over the weights w, which is the trace for relative changes of weights.
    Hutchinson's estimate: tr H = E[v^T H v] for random v of +1 and -1; for the sum, v is times w.
    batches: network_inputs and frozen_features; label -1 does not count. -> loss, both measures,
    their standard errors over probes"""
    weights = list(module.parameters())
    num_videos = sum((batch["labels"] >= 0).sum() for batch in batches)
    traces = np.zeros((probes, 2))
    torch.manual_seed(seed)
    for n in tqdm(range(probes), "flatness", leave=False, disable=None):
        v = [torch.randn_like(w).sign() for w in weights]
        wv = [w.detach() * v_w for w, v_w in zip(weights, v, strict=True)]
        loss = 0.
        for batch in batches:  # one by one: memory holds the graph of one batch
            if isinstance(module, nn.ModuleList):
                logits = apply_exits(module, batch, stream)
            else:
                logits = [module(batch[stream])[1]]
            ce = [F.cross_entropy(z, batch["labels"], ignore_index=-1, reduction="sum")
                  for z in logits]
            batch_loss = sum(ce) / num_videos
            grads = torch.autograd.grad(batch_loss, weights, create_graph=True)
            Hv = torch.autograd.grad(grads, weights, v, retain_graph=True)
            Hwv = torch.autograd.grad(grads, weights, wv)
            for Hv_w, v_w, Hwv_w, wv_w in zip(Hv, v, Hwv, wv, strict=True):
                traces[n] += (Hv_w * v_w).sum().item(), (Hwv_w * wv_w).sum().item()
            loss += batch_loss.item()
    trace, relative = traces.mean(0)
    errors = traces.std(0, ddof=1) / probes**.5
    return {"loss": loss, "trace": trace, "trace error": errors[0],
            "relative": relative, "relative error": errors[1]}


# ---- main and report -----------------------------------------------------------------------------


def main(argv=None):
    """Train the networks, then their exits; test and report. -> results"""
    args = parse(argv)
    start_time = time.time()
    if "toy" in args.networks:
        torch.set_num_threads(1)  # small networks are faster on one thread
    join_processes()

    # data; wise_infer.py holds out the same videos
    cache = Path(args.out, "cache")
    data = common.load_dataset(args.data, args.split, args.allow_missing, cache, "toy-pairs")
    digest = data.digest()
    data, held_out = common.hold_out_videos(data, args.holdout, args.seed)
    data = common.subsample_shots(data, args.shots, args.seed)
    iframe_labels = [label for _, label in data.train] if args.clean_iframe else None
    data = common.corrupt_labels(data, args.label_noise, args.seed)
    videos = data.train + held_out + data.test
    if not args.reencode:
        require_mpeg4(videos)

    # networks
    torch.manual_seed(args.seed)
    streams = Streams(args.networks, len(data.classes), args.imagenet).to(DEVICE)
    exits = Exits(streams, args.schedules, len(data.classes), args.seed).to(DEVICE)

    # run folder and header
    folder = make_run_folder("pkd_compressed", args)
    metadata = {"flags": vars(args), "digest": digest, "classes": data.classes}
    if RANK == 0:
        if not args.resume:  # --resume reads the flags of this file
            save_results(folder, data, args, {}, [], start_time)
        can_flip = allowed_flips(data, args)
        never = [name for name, flip in zip(data.classes, can_flip, strict=True) if not flip]
        print(f"run: {folder}\n{data}; {len(held_out)} training videos held out\nnever flipped: "
              f"{', '.join(never) or 'none'}; {args.segments} frames per video; {WORLD_SIZE} "
              f"process(es), {DEVICE_NAME}", flush=True)

    # --reencode: make the copies that do not exist yet
    if args.reencode:
        for _ in tqdm(make_loader(videos, data.undecodable, args), "re-encoding", disable=None):
            pass

    # train, test
    history = train_networks(streams, data, metadata, folder, args, iframe_labels)
    history += train_exits(streams, exits, data, held_out, metadata, folder, args)
    results, p = evaluate(streams, exits, data.test, data.undecodable, args)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK == 0:
        names = [*STREAMS.values(), *[f"{schedule}_mean" for schedule in args.schedules]]
        results["scores"] = {name: results[name] for name in names}
        if args.flatness:
            results["flatness"] = measure_flatness(streams, exits, data, args)
        for name, p_network in zip(STREAMS.values(), p, strict=True):
            save_predictions(folder / f"{name}-predictions.csv", data, p_network)
        save_results(folder, data, args, results, history, start_time)
        draw_modalities(data.test, data.classes, args, folder / "modalities.png")
        report(results, data, args, start_time)
    return results


def report(results, data, args, start_time):
    columns = {schedule: max(11, len(schedule)) for schedule in args.schedules}  # their widths
    print("exit      ", *[f"{schedule:>{width}}" for schedule, width in columns.items()])
    for name in (*EXITS, "mean"):
        top1 = [results[f"{schedule}_{name}"] for schedule in columns]
        cells = zip(top1, columns.values(), strict=True)
        print(f"{name:10}", *[f"{x:{width}.4f}" for x, width in cells])
    print(f"Top-1 after each schedule; {len(data.test)} test videos, chance 1/{len(data.classes)}")
    for row in results.get("flatness", ()):
        print("{stream:8} {of:24} loss {loss:.4g}, trace of its Hessian {trace:.4g} "
              "+- {trace error:.2g}, sum of w^2 H {relative:.4g} +- {relative error:.2g}"
              .format_map(row))
    if args.flatness:
        print("Compare networks by the sum of w^2 H, not by the trace: if a convolution before a "
              "BatchNorm\nis scaled, the function and this sum stay as they are, but the trace "
              "changes.")
    for warning in data.warnings():
        print(f"NOTE {warning}")
    numbers = " ".join([f"{name}={x:.4f}" for name, x in results["scores"].items()])
    print(f"RESULT pkd_compressed data={data.name} split={args.split} seed={args.seed} {numbers} "
          f"seconds={time.time() - start_time:.0f}")


def draw_modalities(videos, classes, args, path):
    """A row for the first of videos [(path, label)] in each of six classes"""
    rows = [draw_labels(["I-frame", "accumulated\nmotion", "residual\n(grey: 0)",
                         "P-frame = moved\nI-frame + residual"])]

    # the colour wheel: a motion from the centre to a colour has this colour
    axis = torch.linspace(-1, 1, 52)
    wheel = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))              # (2, 52, 52)
    rows[0][:, 4:56, 348:400] = flow_to_image(wheel * (wheel.norm(dim=0) < 1)) / 255

    dataset = common.CompressedDataset(videos, 1, args.copies)
    labels = [label for _, label in videos]
    present = sorted(set(labels))
    for label in present[::max(1, len(present) // 6)][:6]:
        video = dataset[0, labels.index(label)].video
        mv, residual, i_frame = common.split_modalities(video)
        p_frame = common.warp(i_frame, mv).round() + residual
        pictures = torch.cat([i_frame, flow_to_image(mv), 128 + residual, p_frame])  # (4, 3, H, W)
        size = 200 * mv.shape[2] // mv.shape[3], 200
        pictures = F.interpolate(pictures / 255, size, mode="bilinear", antialias=True)
        caption = draw_labels([classes[label], f"up to {mv.norm(dim=1).max():.0f} pixels"])
        rows += [caption[:, :30], make_grid(pictures, padding=2, pad_value=.8)]
    save_image(torch.cat(rows, 1), path)


def draw_labels(labels):
    """A label of up to two lines for each column -> (3, 60, 810) in 0..1"""
    # torchvision draws text only as the label of a box, and in a font of 10 pixels
    boxes = torch.tensor([[101 * n, 0, 101 * n, 0] for n in range(len(labels))])
    white = torch.full((3, 30, 405), 255, dtype=torch.uint8)
    picture = draw_bounding_boxes(white, boxes, labels, "white", label_colors="black") / 255
    return F.interpolate(picture[None], scale_factor=2, mode="bilinear")[0]


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", help="toy (default), or a folder in a format of the README")
    add("--split", type=int, default=1, choices=(1, 2, 3),
        help="train/test split (default: 1; toy data 2: the same videos, labelled by colour)")
    add("--allow-missing", action="store_true", help="ignore listed videos that do not exist")
    add("--shots", type=int, default=0,
        help="training videos per class; all videos stay held out (default: all)")
    add("--label-noise", type=float, default=0.,
        help="share of wrong training labels; held-out videos keep the right ones (default: 0)")
    add("--clean-iframe", action="store_true",
        help="control: with --label-noise, the I-frame network alone learns from right labels")
    add("--no-flip", action="store_true", help="never mirror videos in training")
    add("--holdout", type=float, default=.2,
        help="share of the training videos that is held out for wise_infer.py (default: 0.2)")
    add("--reencode", action="store_true", help="work on copies in CoViAR's form, in OUT/cache: "
        "some 3 GB for HMDB51, 15 GB for UCF101")
    add("--segments", type=int, default=3, help="frames per video (default: 3)")
    add("--size", type=int, help="pixels per side (default: 224, toy data 32)")

    add = parser.add_argument_group("model").add_argument
    add("--networks", nargs=3, metavar=("MV", "R", "I"),
        help="toy, or ResNets of torchvision (default: resnet18 resnet18 resnet50, toy data toy)")
    add("--imagenet", action="store_true", help="start from ImageNet's weights, as in CoViAR")
    add("--schedules", nargs="+", choices=[*SCHEDULES, "all"],
        default=["labels", "progressive", "self"],
        help="who teaches the exits, eq. (3) (default: labels progressive self)")
    add("--tau", type=float, default=1., help="temperature of eq. (2) (default: 1)")

    add = parser.add_argument_group("training").add_argument
    add("--degrade", choices=STREAMS, help="control: train this network for one epoch only")
    add("--epochs", type=int, help="epochs of the networks (default: 120, toy data 14)")
    add("--exit-epochs", type=int, help="epochs of the exits (default: 60, toy data 18)")
    add("--batch-size", type=int, default=32, help="videos per batch, on all GPUs (default: 32)")
    add("--lr", type=float, help="learning rate of the networks (default: 1e-3, toy networks 3e-3)")
    add("--test-every", type=int, default=0, metavar="EPOCHS", help="also test the exits after "
        "every so many epochs, for learning curves (default: only at the end)")
    add("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    add("--workers", type=int, default=max(1, min(16, os.cpu_count() - 1)),
        help="number of data loading processes (default: CPU cores - 1, at most 16)")
    add("--resume", metavar="RUN", help="continue the interrupted run in this folder")

    add = parser.add_argument_group("output").add_argument
    add("--flatness", action="store_true", help="measure how flat the minima are")
    add("--out", metavar="FOLDER", default="runs", help="folder of runs and cache (default: runs)")

    # defaults that depend on other flags
    if parser.parse_args(argv).data == "toy":
        parser.set_defaults(networks=["toy"] * 3, size=32, epochs=14, exit_epochs=18)
    else:
        parser.set_defaults(size=224, epochs=120, exit_epochs=60,
                            networks=["resnet18", "resnet18", "resnet50"])
    args = parse_flags(parser, argv, {
        "epochs": (1, 10**6), "exit_epochs": (1, 10**6), "batch_size": (2, 10**6),
        "segments": (1, 1000), "size": (32, 10**4),  # the networks reduce it by 32
        "holdout": (0, .99), "shots": (0, 10**9), "label_noise": (0, 1), "tau": (1e-6, 1e6),
        "lr": (1e-12, 10), "seed": (0, 2**63 - 1), "test_every": (0, 10**6)})
    if args.imagenet and "toy" in args.networks:
        parser.error("--imagenet: toy networks have no ImageNet weights")
    args.schedules = [name for name in SCHEDULES if {name, "all"} & set(args.schedules)]
    copies = f"{args.out}/cache/{Path(args.data).resolve().name}-mpeg4-v2"
    args.copies = copies if args.reencode else None
    return args


# ---- the same in every script --------------------------------------------------------------------


def parse_flags(parser, argv, limits):
    """Parse argv, and refuse numbers outside limits, {name: (low, high)}. --resume RUN takes all
    other flags from the run. -> args"""
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.resume:
        flags = {flag.partition("=")[0] for flag in argv if flag.startswith("--")}
        others = sorted(flags - {"--resume", "--workers"})
        if others:
            parser.error(f"--resume RUN takes its flags from the run; leave out {' '.join(others)}")
        flags = json.loads(Path(args.resume, "results.json").read_text())["flags"]
        args = argparse.Namespace(**{**flags, "resume": args.resume, "workers": args.workers})
    for name, (low, high) in limits.items():
        if vars(args)[name] is not None and not low <= vars(args)[name] <= high:
            parser.error(f"--{name.rstrip('_').replace('_', '-')} must be {low} to {high}")
    return args


def autocast():
    """bf16 on a GPU, fp32 on a CPU"""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=USE_CUDA)


def warmup_and_cosine(optimizer, steps):
    warmup = max(1, steps // 10)
    phases = [LinearLR(optimizer, 1 / warmup, total_iters=warmup),
              CosineAnnealingLR(optimizer, max(1, steps - warmup))]
    return SequentialLR(optimizer, phases, [warmup])


def join_processes():
    """Join the group of processes that torchrun has started."""
    if WORLD_SIZE > 1:
        if USE_CUDA:
            torch.cuda.set_device(DEVICE)
        # the others wait while process 0 makes cached files, which may take hours
        dist.init_process_group("nccl" if USE_CUDA else "gloo", timeout=timedelta(hours=12))


def make_run_folder(script, args):
    """Create OUT/SCRIPT/DATA-sSPLIT-seedSEED-TIME, or take the folder of --resume -> its path"""
    if args.resume:
        return Path(args.resume)
    name = f"{Path(args.data).resolve().name}-s{args.split}-seed{args.seed}"
    folder = Path(args.out, script, f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}")
    if RANK == 0:  # only this process writes
        folder.mkdir(parents=True)
    return folder


def save_results(folder, data, args, results, history, start_time):
    """Write results.json: flags, results, the metrics of each epoch, versions and machine."""
    record = {"flags": vars(args), "results": results, "epochs": history, "machine": DEVICE_NAME,
              "seconds": time.time() - start_time, "warnings": data.warnings(),
              "undecodable": data.undecodable,
              "versions": {name: version(name) for name in ("torch", "open_clip_torch", "av")}}
    with common.atomic_write(folder / "results.json") as path:
        path.write_text(json.dumps(record, indent=1))


def save_predictions(path, data, p):
    """Write the test videos with their classes, and the five likeliest of p (N, K). A video that
    cannot be decoded has p = 0, and no class is written."""
    values, indices = p.cpu().topk(min(5, len(data.classes)))                   # (N, 5) each
    with common.atomic_write(path) as tmp, open(tmp, "w", newline="") as file:
        file.write("video,truth,class1,p1,class2,p2,class3,p3,class4,p4,class5,p5\n")
        writer = csv.writer(file, lineterminator="\n")
        for n, (video, label) in enumerate(data.test):
            row = [video, data.classes[label]]
            for x, k in zip(values[n].tolist(), indices[n].tolist(), strict=True):
                if x > 0:
                    row += [data.classes[k], f"{x:.4f}"]
            writer.writerow(row)


def log_and_checkpoint(metrics, history, epochs, path, metadata, modules):
    """Print the metrics of an epoch and save a checkpoint from which --resume continues; the last
    one holds no optimizer. modules: {name: module, optimizer or schedule}"""
    history.append(metrics)
    if len(history) == epochs:
        modules = {name: x for name, x in modules.items() if isinstance(x, nn.Module)}
    if RANK == 0:
        cells = [f"{name} {x:7.4f}" if isinstance(x, float) else f"{name} {x}"
                 for name, x in metrics.items()]
        print("  ".join(cells), flush=True)
        state = {name: module.state_dict() for name, module in modules.items()}
        common.save_checkpoint({**metadata, **state, "history": history}, path)


def resume_training(path, metadata, modules):
    """Load the checkpoint of an interrupted run, if there is one -> its history, a list of dicts"""
    if not path.exists():
        return []
    saved = common.read_checkpoint(path, "history", "digest")
    if saved["digest"] != metadata["digest"]:
        raise common.BadInput(f"{path}: the videos have changed since this run started")
    for name, module in modules.items():
        if isinstance(module, nn.Module) or name in saved:  # a finished run has no optimizer
            common.load_state_dict(module, saved.get(name), path, name)
    return saved["history"]


def epoch_means(losses, epoch):
    """Losses (n,) of each batch of an epoch -> their means, a list. Raises BadInput for nan."""
    losses = torch.stack(losses)                                                # (steps, n)
    finite = losses.isfinite().all(1).tolist()
    if not all(finite):
        raise common.BadInput(f"epoch {epoch + 1}, batch {finite.index(False) + 1}: the loss is "
                              f"not finite; try a lower --lr")
    return losses.mean(0).tolist()


def run_cli(main):
    """Run main(). A mistake that the user can fix ends in one line."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; --resume RUN continues after the last finished epoch")
    except torch.cuda.OutOfMemoryError:
        sys.exit("out of GPU memory; try a smaller --batch-size or fewer --frames")
    except (common.BadInput, OSError) as error:
        # an error of a worker comes with its traceback, which ends with the message
        sys.exit(f"{Path(sys.argv[0]).name}: {str(error).splitlines()[-1]}")


if __name__ == "__main__":
    run_cli(main)
