"""Swap ActionCLIP's CLIP backbone for a TinyCLIP and see what it costs and what it buys.

Technique 1 of Frans Huntink's master thesis, "Bridging the gap: Threefold knowledge distillation
for language-enabled action recognition models operating in real-time scenarios" (Utrecht, 2024), on
ActionCLIP (Wang, Xing, Liu 2021, arXiv 2109.08472) and TinyCLIP (Wu et al., ICCV 2023).

The idea. ActionCLIP reads T frames with CLIP's image tower, mixes them with a small transformer and
compares the result with the embedded sentence "a video of <action>". Nearly all of its cost is the
image tower. TinyCLIP is CLIP distilled into a smaller CLIP: two towers and one space of meanings,
as before. The distillation has been done, by others, on hundreds of millions of pictures: put the
small towers in the place of the large ones and train on actions as always. Below, both are trained
by the same steps on the same clips, tested on every test clip, and measured.

ActionCLIP's loss, for B videos v, their texts t and labels y; s = exp(logit_scale):
  (1) kl_pair       L = 1/2 [KL(G || softmax_rows(s v^ t^')) + KL(G || softmax_rows(s t^ v^'))],
                    G = softmax_rows(10 [y_i = y_k]); KL summed over a row, mean over B; no tau
Its rule of evaluation, with P = 16 sentences for each of K classes:
  (2) class_scores  p(k) = 1/P sum_p softmax_k(100 v^ . t^_pk)
With --recover affinity the small model also learns from the large one, by TinyCLIP's own loss:
  (3) affinity_loss L = 1/2 [CE(A_t, A_s) + CE(A_t', A_s')], A = softmax_rows(scale v^ t^'), A' the
                    same of t^ v^'; CE = -sum_k A_t log A_s, mean over B; it needs no labels
x^ is x / |x|; B clips, T frames, K classes, D width: v, t (B, D); _s small model, _t large model.
Find the loss in kl_pair, the rule in class_scores, the fusion head in common.py's FusionHead.

  python tinyclip_swap.py                              toy clips, 2 minutes on 2 CPU cores
  python tinyclip_swap.py --recover affinity           a third arm: small + eq. (3)
  python tinyclip_swap.py --data HMDB51 --large ViT-B-32:openai --batch-size 64 \\
      --small TinyCLIP-ViT-40M-32-Text-19M:TinyCLIP-ViT-40M-32-Text-19M-LAION400M.pt
  python tinyclip_swap.py --data HMDB51 --large ViT-B-32 --eval-only vit-b-32-8f.pt
  python tinyclip_swap.py --unseen 4                   four classes held out of training, and tested
  python tinyclip_swap.py --watch my.mp4 --large ViT-B-32:openai --labels "waving, a dog jumping"

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0, caches included):
RESULT tinyclip_swap data=toy split=1 seed=0 large=0.9800 small=0.9367 gmac_ratio=0.482 seconds=106

Differs from the papers and from the code of ActionCLIP (sallymmx/ActionCLIP @31c34df):
 1. fp32 weights, bf16 autocast on CUDA; theirs are fp16, where a step of 5e-6 moves about half of
    the weights. Their learning rate, our default for real CLIPs, is a start and not a match.
 2. Segments are jittered in training (their HMDB and UCF settings lack the switch); colour jitter
    is drawn once per clip (theirs per frame); crops lie anywhere (theirs in 13 places).
 3. No weight decay on norms, biases, embeddings and scales; logit_scale is clamped at ln 100;
    gradients are clipped at norm 1; warm-up takes the first tenth of the steps.
 4. The last epoch is reported and every test clip counts; theirs: the best epoch on the test list,
    without its last batch.
 5. The thesis gives no weight of eq. (3) on action clips: here 1, beside eq. (1). The large model's
    scale is 50, as in TinyCLIP.
 6. With toy CLIPs the fusion head starts larger (FusionHead says why) and crops are milder.
"""
import argparse
import collections
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import platform
import queue
import re
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from open_clip.transformer import ResidualAttentionBlock
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import (
    BadInput,
    BadVideo,
    Clips,
    augment,
    build_action_clip,
    centre_crop,
    clip_loader,
    mirrors,
    note_bad,
    open_video,
    read_data,
    read_weights,
    split_unseen,
    to_picture,
)

# ---- the method: eqs. (1)-(3) --------------------------------------------------------------------


def kl_pair(video, text, labels, scale):
    """ActionCLIP's loss, eq. (1): texts of the same class are equally right. -> scalar"""
    B, D = video.shape
    v, t = F.normalize(video, dim=-1), F.normalize(text, dim=-1)                # (B, D)
    logits = scale * v @ t.T                                                    # (B, B)
    G = (10 * (labels[:, None] == labels).to(logits)).softmax(1)                # (B, B)
    return (F.kl_div(logits.log_softmax(1), G, reduction="batchmean")           # (1), v to t
            + F.kl_div(logits.T.log_softmax(1), G, reduction="batchmean")) / 2  # (1), t to v


def class_scores(video, text):
    """The rule of evaluation, eq. (2). video (B, D), text (16, K, D) -> probabilities (B, K)"""
    (B, D), (P, K, _) = video.shape, text.shape
    v, t = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
    logits = 100 * torch.einsum("bd,pkd->bpk", v, t)                            # (B, P, K)
    return logits.softmax(-1).mean(1)                                           # (B, K)        (2)


def affinity_loss(video_s, text_s, video_t, text_t, scale_s, scale_t):
    """TinyCLIP's affinity mimicking, eq. (3). video_*, text_* (B, D_*) -> scalar"""
    B, D = video_s.shape
    v_s, t_s, v_t, t_t = (F.normalize(x, dim=-1) for x in (video_s, text_s, video_t, text_t))
    logits_s, logits_t = scale_s * v_s @ t_s.T, scale_t * v_t @ t_t.T           # (B, B)
    return (F.cross_entropy(logits_s, logits_t.softmax(1))                      # (3), v to t
            + F.cross_entropy(logits_s.T, logits_t.T.softmax(1))) / 2           # (3), t to v


# ---- the rest is plumbing: training, testing, measuring, keeping record --------------------------

AFFINITY_WEIGHT, SCALE_T = 1., 50.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "RTX 4090": 165}  # dense bf16


class Gather(torch.autograd.Function):
    """(B/W, ...) in each of W processes -> (B, ...) in all: in-batch losses see the global batch.
    Each process computes the whole loss, so gradients are summed here, and DDP divides by W."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    return Gather.apply(x) if dist.is_initialized() else x


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def make_optimizer(model, lr, steps):
    """AdamW and schedule as in ActionCLIP: CLIP's towers at lr, what is new beside them at 10 lr;
    linear warm-up, then cosine to 0. No decay on norms, biases, embeddings and scales."""
    groups = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            decay = .2 if weight.ndim > 1 and "embedding" not in name else 0.
            rate = lr if "clip." in name else 10 * lr
            groups.setdefault((rate, decay), []).append(weight)
    optimizer = torch.optim.AdamW([{"params": weights, "lr": rate, "weight_decay": decay}
                                   for (rate, decay), weights in groups.items()],
                                  betas=(.9, .98), eps=1e-8, fused=True)
    warm = max(1, steps // 10)
    return optimizer, SequentialLR(optimizer, [
        LinearLR(optimizer, 1 / warm, total_iters=warm),
        CosineAnnealingLR(optimizer, max(1, steps - warm))], [warm])


def save(state, path):
    """Write a checkpoint under another name and rename it: a kill leaves the old one or the new."""
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def train(arm, model, large, data, args, place, run, log, bad):
    """Train one arm by eq. (1), and by eq. (3) where `large` is given. Keeps RUN/ARM-last.pt; adds
    a row per epoch to `log`, and to `bad` {path: reason} clips that could not be decoded."""
    device, rank, world = place
    toy = args.arms[arm].startswith("toy-")
    clips = Clips(data.train, args.frames, side(model), args.sampling, train=True, seed=args.seed)
    batch_size = min(args.batch_size, len(clips)) // world * world
    loader = clip_loader(clips, batch_size, args.workers, rank, world)
    optimizer, schedule = make_optimizer(model, args.lr or (4e-4 if toy else 5e-6),
                                         args.epochs * len(loader))
    path = run / f"{arm}-last.pt"
    if args.resume and path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        model.clip.load_state_dict(saved["model_state_dict"])
        model.fusion.load_state_dict(saved["fusion_model_state_dict"])
        log += saved["rows"]
        if len(saved["rows"]) < args.epochs:
            optimizer.load_state_dict(saved["optimizer_state"])
            schedule.load_state_dict(saved["schedule_state"])
            torch.set_rng_state(saved["rng_state"].cpu())
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    prompts = model.prompts(data.classes).to(device)                            # (16, K, L)
    prompts_t = large.prompts(data.classes).to(device) if large else None       # (16, K, L_t)
    mirror = mirrors(data.classes)
    for epoch in range(sum(row["arm"] == arm for row in log), args.epochs):
        loader.batch_sampler.epoch, began = epoch, time.time()
        sums, gpu = torch.zeros(3, device=device), device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        model.train()
        for batch in tqdm(loader, f"{arm} {epoch + 1}/{args.epochs}", leave=False, disable=None):
            note_bad(bad, batch, clips)
            draws = [np.random.default_rng([args.seed, *key, 1]).integers(16) for key in batch.key]
            labels = gather(torch.tensor(batch.label, device=device))           # (B,)
            with autocast(device):
                v, t, scale = wrapped(view(batch, model.size, mirror, toy, args.seed, device),
                                      prompts[draws, batch.label])
            v, t = gather(v.float()), gather(t.float())                         # (B, D)
            loss = pair = kl_pair(v, t, labels, scale)
            affinity = agree = torch.zeros((), device=device)
            if large:
                with torch.no_grad(), autocast(device):
                    v_t, t_t, _ = large(view(batch, large.size, mirror, toy, args.seed, device),
                                        prompts_t[draws, batch.label])
                v_t, t_t = gather(v_t.float()), gather(t_t.float())             # (B, D_t)
                affinity = affinity_loss(v, t, v_t, t_t, scale, SCALE_T)
                loss = pair + AFFINITY_WEIGHT * affinity
                agree = (class_scores(v, t[None]).argmax(1)
                         == class_scores(v_t, t_t[None]).argmax(1)).float().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            with torch.no_grad():
                model.clip.logit_scale.clamp_(max=math.log(100))
                sums += torch.stack([pair, affinity, agree]) / len(loader)
        log.append({"arm": arm, "epoch": epoch + 1,
                    **dict(zip(("kl_pair", "affinity", "agreement"), sums.tolist(), strict=True)),
                    "clips_per_s": len(loader) * batch_size / (time.time() - began),
                    "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if gpu else None})
        if rank:
            continue
        print("{arm:15} epoch {epoch:3}  kl_pair {kl_pair:7.4f}".format(**log[-1])
              + ("  affinity {affinity:7.4f}  agreement {agreement:.3f}".format(**log[-1])
                 if large else "") + f"  {log[-1]['clips_per_s']:7.1f} clips/s", flush=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        done = epoch + 1 == args.epochs
        save({"model_state_dict": model.clip.state_dict(), "frames": args.frames,
              "fusion_model_state_dict": model.fusion.state_dict(),
              "quick_gelu": model.clip.quick_gelu, "backbone": args.arms[arm].partition(":")[0],
              "rows": [row for row in log if row["arm"] == arm], "rng_state": torch.get_rng_state(),
              "optimizer_state": None if done else optimizer.state_dict(),
              "schedule_state": None if done else schedule.state_dict()}, path)


def view(batch, size, mirror, toy, seed, device):
    """The training crops of a batch, (B, T, 3, size, size): the same draws at any size."""
    videos = [video.to(device, non_blocking=True) for video in batch.video]
    rngs = [np.random.default_rng([seed, *key, 2]) for key in batch.key]
    return augment(videos, size, rngs, [mirror[label] for label in batch.label],
                   (1, .875) if toy else (1, .875, .75, .66))


def side(model):
    """Shorter side that clips are decoded to: 256 pixels for a network that sees 224."""
    return round(model.size * 8 / 7)


def embed_classes(model, classes, device):
    """-> (16, K, D), computed once and kept: deployed, the text tower does not run at all."""
    with torch.no_grad(), autocast(device):
        return model.encode_text(model.prompts(classes).to(device)).float()


def infer(model, videos, text, views, device):
    """Videos (B, V*T, 3, S, S) in 0..1, texts (16, K, D) -> (B, K), mean over V windows."""
    with torch.no_grad(), autocast(device):
        v = model.encode_video(videos.unflatten(1, (views, -1)).flatten(0, 1)).float()  # (B*V, D)
    return class_scores(v, text).unflatten(0, (-1, views)).mean(1)


def evaluate(model, data, args, place, bad):
    """Test on every clip; one that cannot be decoded goes into `bad` and counts as wrong.

    -> numbers, and {index: class said} of this process's clips
    """
    device, rank, world = place
    model.eval()
    text, said = embed_classes(model, data.classes, device), {}
    hits = torch.zeros(3, device=device)  # first, among the first five, clips
    clips = Clips(data.test, args.frames, side(model), args.sampling, args.views)
    loader = clip_loader(clips, args.batch_size, args.workers, rank, world)
    for batch in tqdm(loader, "test", leave=False, disable=None):
        note_bad(bad, batch, clips)
        hits[2] += len(batch.label)
        held = [i for i, video in enumerate(batch.video) if video is not None]
        if held:
            videos = centre_crop([batch.video[i].to(device) for i in held], model.size)
            top = infer(model, videos, text, args.views, device).topk(min(5, len(data.classes)))
            labels = torch.tensor([batch.label[i] for i in held], device=device)
            right = top.indices == labels[:, None]
            hits[:2] += torch.stack([right[:, 0].sum(), right.sum()])
            said |= {batch.key[i][1]: int(k) for i, k in zip(held, top.indices[:, 0], strict=True)}
    if world > 1:
        dist.all_reduce(hits)
    top1, top5, count = hits.tolist()
    return {"top1": top1 / count, "top5": top5 / count, "clips": int(count)}, said


def count_operations(model, args, device):
    """-> GMAC to classify a clip, and GFLOP to train on one (forward, backward, its text)."""
    video = torch.rand(1, args.frames, 3, model.size, model.size, device=device)
    tokens = model.prompts(["running"])[0].to(device)
    with FlopCounterMode(display=False) as inference:  # with gradients: fused kernels hide theirs
        model.eval().encode_video(video)
    with FlopCounterMode(display=False) as training:
        sum(x.sum() for x in model(video, tokens[:1])).backward()
    model.zero_grad()
    return inference.get_total_flops() / 2e9 * args.views, training.get_total_flops() / 1e9


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


def peak_mb(function, device):
    """MB that a call needs beyond what is there before it: by CUDA's allocator; on Linux the growth
    of the resident set; elsewhere not a number."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    kb = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+)", Path("/proc/self/status").read_text()))
    function()
    peak = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+)", Path("/proc/self/status").read_text()))
    return (int(peak["VmHWM"]) - int(kb["VmRSS"])) / 1e3


def measure(model, data, args, device):
    """What a clip costs: parameters in millions, ms, clips/s, MB. Texts are cached."""
    numbers = {"image": 0, "text": 0, "fusion": 0, "words": 0}
    for name, weight in model.named_parameters():
        part = "image" if ".visual." in name else "fusion" if name.startswith("fusion.") else \
            "words" if "token_embedding" in name else "text"
        numbers[part] += weight.numel() / 1e6
    text = embed_classes(model.eval(), data.classes, device)
    batch = 32 if device.type == "cuda" else 4
    one, many = (torch.rand(B, args.views * args.frames, 3, model.size, model.size, device=device)
                 for B in (1, batch))
    clips = Clips(data.test, args.frames, side(model), args.sampling, args.views)
    held = [i for i in range(min(20, len(clips))) if clips[0, i].video is not None]
    turn = itertools.cycle(held)

    def classify(videos):
        return infer(model, videos, text, args.views, device)

    def decode_too():
        return classify(centre_crop([clips[0, next(turn)].video.to(device)], model.size)).cpu()

    peak = peak_mb(lambda: classify(many), device)
    weights = sum(w.numel() * w.element_size() for w in model.parameters()) / 1e6
    return {**numbers, "batch": batch, "ms": median_ms(lambda: classify(one), device),
            "ms_decode": median_ms(decode_too, device) if held else math.nan,
            "clips_per_s": batch * 1e3 / median_ms(lambda: classify(many), device),
            "peak_mb": weights + peak}


def draw_sheet(data, answers, args, path):
    """Contact sheet: eight test clips as a network sees them, the truth, and what each arm said."""
    some, rows = sorted(set.intersection(*map(set, answers.values()))), []
    clips = Clips(data.test, args.frames, 128, args.sampling)
    for i in some[::max(1, len(some) // 8)][:8]:
        truth = data.test[i][1]
        row = torchvision.utils.make_grid(centre_crop([clips[0, i].video], 128)[0], args.frames)
        row = F.pad(row.mul(255).byte(), (2, 2, 14, 2))
        label = "   ".join(f"{arm}: {data.classes[said[i]]}" for arm, said in answers.items())
        rows.append(torchvision.utils.draw_bounding_boxes(
            row, torch.tensor([[1, 1, row.shape[2] - 2, row.shape[1] - 2]]),
            [f"truth: {data.classes[truth]}   {label}"],
            "lime" if all(said[i] == truth for said in answers.values()) else "red"))
    if rows:
        torchvision.io.write_png(torch.cat(rows, 1), str(path))


def table(results):
    """The arms as text, a row each, then what the small ones are of the large one."""
    first, big = next(iter(results.values())), results.get("large")
    lines = [f"{'arm':15} {'backbone':28} {'image/text/fusion M':>19} {'GMAC':>8} {'ms':>8} "
             f"{'+decode':>8} {'clips/s':>8} {'MB':>7} {'top-1':>6} {'top-5':>6}"]
    for arm, r in results.items():
        sizes = f"{r['image']:.2f}/{r['text']:.2f}/{r['fusion']:.2f}"
        lines.append(f"{arm:15} {r['backbone']:28} {sizes:>19} {r['gmac']:8.3f} {r['ms']:8.2f} "
                     f"{r['ms_decode']:8.2f} {r['clips_per_s']:8.1f} {r['peak_mb']:7.1f} "
                     f"{r['top1']:6.3f} {r['top5']:6.3f}")
    lines.append(f"Per clip: GMAC, ms at batch 1, ms with decoding; clips/s and peak MB at batch "
                 f"{first['batch']}. Texts cached; text parameters without the word table. "
                 f"{first['clips']} test clips.")
    for arm, r in results.items() if big else ():
        if arm != "large":
            size = [sum(x[part] for part in ("image", "text", "fusion")) for x in (r, big)]
            lines.append(f"{arm} / large: parameters x{size[0] / size[1]:.2f}, "
                         + ", ".join(f"{key} x{r[key] / big[key]:.2f}" for key in
                                     ("gmac", "ms", "ms_decode", "clips_per_s", "peak_mb"))
                         + f", top-1 {100 * (r['top1'] - big['top1']):+.1f} points")
    lines.append("Time follows tokens as much as parameters: a frame of 224 pixels is 196 tokens "
                 "at patch 16,\n49 at patch 32; on a CPU TinyCLIP-ViT-8M-16 is no faster than "
                 "40M-32.")
    return "\n".join(lines)


def table_unseen(results, opened):
    """--unseen: top-1 with chance beside it, before training (CLIP's zero-shot) and after."""
    groups = {"seen": len(opened["unseen_all"].classes) - len(opened["unseen"].classes),
              "unseen": len(opened["unseen"].classes),
              "unseen_all": len(opened["unseen_all"].classes)}
    lines = [f"{'top-1, after (before) training':32} {'seen':>14} {'unseen':>14} {'of all':>14}",
             f"{'chance':32} " + " ".join(f"{1 / count:7.3f}       " for count in groups.values())]
    for arm, r in results.items():
        cells = [f"{r['top1' if group == 'seen' else group]:7.3f}"
                 + (f" ({r['before'][group]:.3f})" if r["before"] else " " * 8) for group in groups]
        lines.append(f"{arm:15} {r['backbone']:16} " + " ".join(f"{cell:14}" for cell in cells))
    return "\n".join([*lines, f"seen: clips of the {groups['seen']} trained classes, told among "
                      f"these; unseen: clips of the {groups['unseen']} held out, among\nthese; of "
                      f"all: the same clips among all {groups['unseen_all']} classes."])


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


# ---- real time (--watch): who came for the swap may go on at parse(), the flags ------------------
# On a stream a class is wanted after every frame. encode_video would read the last T frames anew
# each time; here a frame is read once, when it comes, and its embedding waits in a ring of T.


def stream_step(model, ring, frame, text):
    """A new frame costs one image pass and one fusion pass instead of T image passes: 68 ms instead
    of 354 with TinyCLIP-ViT-40M-32, T = 8, on one CPU core (tests/bench.py).

    ring: deque of the last T embeddings (1, D), oldest first, which takes in that of frame (1, 1,
    3, S, S); at the start the first frame stands for all before it. text (16, K, D) -> (K,)"""
    with torch.no_grad(), autocast(frame.device):
        f = model.encode_frames(frame)[:, 0]                                    # (1, D)
        ring.extend([f] * (1 if ring else ring.maxlen))
        v = model.fusion(torch.stack(tuple(ring), 1)).float()                   # (1, D)
    return class_scores(v, text)[0]


def read_stream(source):
    """Decode a file, an address, a camera or `-`, standard input -> yields (seconds since the first
    frame, frame). Where timestamps lack or jump, a frame counts as one of the stated rate. A packet
    that cannot be decoded yields None for the frame. Raises BadVideo."""
    driver = re.fullmatch(r"(avfoundation|dshow|lavfi|v4l2):(.+)", source)
    path, form = driver.group(2, 1) if driver else ("pipe:0" if source == "-" else source, None)
    if path.startswith("/dev/video"):
        form = "v4l2"
    more = {"framerate": "30"} if form == "avfoundation" else {}  # its default suits few cameras
    with open_video(path, format=form, options=more) as (container, stream):
        t, before, packets = None, None, 0
        for packet in container.demux(stream):
            packets += packet.size > 0
            if container.format.name == "avi" and packet.dts is not None:
                packets = packet.dts + 1  # an AVI counts the frames that were left out, too
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                frames = [None]
            for frame in frames:
                if frame is not None:
                    passed = frame.time - before if None not in (frame.time, before) else 0
                    if not 0 < passed < 10:
                        passed = 1 / float(stream.guessed_rate or 25)
                    t, before = 0. if t is None else t + passed, frame.time
                yield t, frame
        # what a file says of its video tells whether it was cut off; Matroska gives the duration
        if stream.frames - packets > 2:
            raise BadVideo(source, f"it has {packets} of the {stream.frames} frames it declares")
        said = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
        if said and t is not None:
            length = sum(float(x) * 60 ** k for k, x in enumerate(said.groups()[::-1]))
            if t + passed < .9 * length - 1:
                raise BadVideo(source, f"it has {t + passed:.1f} of the {length:.1f} seconds it "
                                       "declares")


class Reader(threading.Thread):
    """Reads the stream beside the networks and keeps its clock: a file's frames wait for their time
    as a camera's do. The newest sampled frame waits in .slot: (seconds, when it was decoded,
    picture). One that finds another there takes its place, and that one is dropped. With --no-drop
    nothing waits for the clock, and the stream waits for the networks. What ended it comes last:
    "" for its end, else what went wrong. .counts: frames read, skipped, dropped; damaged packets.
    """

    def __init__(self, args, side, out):
        super().__init__(daemon=True)  # a read that never returns must not keep the program
        self.args, self.side, self.out, self.label = args, side, out, ""
        self.slot, self.counts, self.stop = queue.Queue(1), collections.Counter(), threading.Event()
        self.writing, self.late, self.seen = threading.Lock(), 0., time.perf_counter()

    def run(self):
        try:
            self.read()
            end = ""
        except BadVideo as error:
            end = f"it breaks off ({error.reason})" if self.counts["read"] else error.reason
        except (av.FFmpegError, OSError, ValueError) as error:  # in converting, or writing --save
            end = f"{type(error).__name__}: {error}"
        self.slot.put(end)

    def read(self):
        args, began, last, size = self.args, None, None, None
        for t, frame in read_stream(args.watch):
            if frame is None:
                self.counts["damaged"] += 1
                continue
            self.seen = now = time.perf_counter()
            began = now - t if began is None else began
            self.late = max(self.late, now - began - t)
            if not args.no_drop:
                self.seen = max(now, began + t)
                self.stop.wait(self.seen - now)
            if self.stop.is_set():
                return
            self.counts["read"] += 1
            before, size = size, (frame.width, frame.height)
            if before not in (None, size):
                print(f"{t:7.1f} s  the frame size changes from {before} to {size}", flush=True)
            turn = int(t * args.fps + .05)  # timestamps are rounded, in Matroska to ms
            if turn == last:
                self.counts["skipped"] += 1
            else:
                self.offer((t, time.perf_counter(), to_picture(frame, self.side)))
            last = turn
            with self.writing:
                if self.out and not self.stop.is_set():
                    save_frame(self.out, frame, t, self.label)

    def offer(self, item):
        if not self.args.no_drop:
            self.drop()
        self.slot.put(item)
        if self.args.no_drop:
            self.slot.join()  # until the networks are done with it

    def drop(self):
        with contextlib.suppress(queue.Empty):
            self.counts["dropped"] += isinstance(self.slot.get_nowait(), tuple)
            self.slot.task_done()


def save_frame(out, frame, t, label):
    """--save: add the frame of second t, with the label drawn in, to the container `out`."""
    picture, stream = to_picture(frame), out.streams.video[0]
    if not stream.width:  # the size of the first frame holds for all
        stream.height, stream.width = (side // 2 * 2 for side in picture.shape[:2])
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
    picture = frame.reformat(stream.width, stream.height).to_ndarray()
    scale = max(1, stream.height // 160)  # the letters are about 11 pixels high
    strip = torchvision.utils.draw_bounding_boxes(
        torch.zeros(3, 15, stream.width // scale, dtype=torch.uint8),
        torch.tensor([[0, 0, 1, 1]]), [label], "lime")
    strip = strip.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).numpy()
    picture[:len(strip), :strip.shape[1]] = strip[:len(picture)]
    frame = av.VideoFrame.from_ndarray(picture, "rgb24")
    frame.pts, frame.time_base = round(1000 * t), Fraction(1, 1000)
    out.mux(stream.encode(frame))


def prepack(model):
    """A single frame is few tokens, and a CPU spends a good part of each product on rearranging the
    weights. For the MLPs, two thirds of all weights, oneDNN does that here, once."""
    for block in model.modules():
        if isinstance(block, ResidualAttentionBlock):
            for layer in (block.mlp.c_fc, block.mlp.c_proj):
                weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
                layer.forward = functools.partial(
                    lambda weight, bias, x: torch.ops.mkldnn._linear_pointwise(
                        x, weight, bias, "none", [], ""), weight, layer.bias)


def load_watcher(args, device, layers=0):
    """-> model, T. From --checkpoint, ours (of any of the three scripts) or ActionCLIP's; without
    one the CLIP that --large names, untrained on actions, with the mean over frames."""
    spec, T = args.large, args.frames
    if args.checkpoint:
        saved = read_weights(args.checkpoint)
        if "fusion" not in saved:
            raise BadInput(f"--checkpoint {args.checkpoint} holds no fusion head; a CLIP alone is "
                           f"named by --large NAME:{args.checkpoint}")
        spec = f"{saved.get('backbone', args.large.partition(':')[0])}:{args.checkpoint}"
        layers, T = args.fusion_layers, saved.get("frames", args.frames)
    if spec.startswith("toy-"):
        torch.set_num_threads(1)  # more cost more than they bring, beside the reader
    model = build_action_clip(spec, layers, Path(args.out) / "cache").to(device).eval()
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        prepack(model)
    return model, T


def watch(args):
    """--watch: prints a line a second until the stream ends, or Ctrl-C. -> counts of frames. Exits
    with 1 where the stream stalls or breaks. Raises BadInput where nothing can be read at all."""
    device, labels, out = find_place()[0], args.labels, None
    model, T = load_watcher(args, device)
    text, ring = embed_classes(model, labels, device), collections.deque(maxlen=T)
    stream_step(model, ring, torch.zeros(1, 1, 3, model.size, model.size, device=device), text)
    ring.clear()  # the first step takes longer, and was for nothing
    if args.save:
        both = args.watch, args.save
        if all(map(os.path.exists, both)) and os.path.samefile(*both):
            raise BadInput(f"--save {args.save} would write over what is watched; name another")
        try:
            if not os.access(Path(args.save).resolve().parent, os.W_OK):
                raise PermissionError("its folder is missing, or closed to writing")
            out = av.open(args.save, "w")
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            out.add_stream(codec, 1000, width=0, height=0, pix_fmt="yuv420p")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise BadInput(f"--save {args.save} cannot be written ({error}); name a file such as "
                           f"out.mp4") from error
    print(f"tinyclip_swap.py watches {args.watch} on {machine()}, torch {torch.__version__}\n"
          f"{args.checkpoint or args.large}: {T} frames, {args.fps:g} a second, which is a window "
          f"of {T / args.fps:.1f} s; labels: {', '.join(labels)}", flush=True)
    reader, spent, end, line, t = Reader(args, side(model), out), [], None, "", 0.
    counts, (shown, since) = reader.counts, (0, time.perf_counter())
    try:
        reader.start()
        while end is None:
            try:
                item = reader.slot.get(timeout=1)
            except queue.Empty:
                silent = int(time.perf_counter() - reader.seen)
                if silent > 0:
                    print(f"{t:7.1f} s  no frame for {silent} s", flush=True)
                end = f"no frame for {silent} s (--stall)" if silent >= args.stall else None
                continue
            if isinstance(item, str):
                end = item
                break
            counts["shown"] += 1
            before, (t, decoded, picture) = t, item
            frame = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
            p = stream_step(model, ring, centre_crop([frame.to(device)], model.size), text).cpu()
            now = time.perf_counter()
            spent.append(1e3 * (now - decoded))
            best = p.topk(min(3, len(labels)))
            best = [(labels[k], q) for q, k in zip(*map(torch.Tensor.tolist, best), strict=True)]
            reader.label = best[0][0] if best[0][1] >= args.threshold else "none of these"
            reader.slot.task_done()
            line = (f"{t:7.1f} s  {reader.label:{max(13, *map(len, labels))}}  "
                    + ", ".join(f"{label} {q:.2f}" for label, q in best)
                    + f"  {(counts['shown'] - shown) / (now - since):.1f} frames/s, latency "
                    + "p50 {:.1f} p95 {:.1f} ms".format(*np.percentile(spent[-100:], (50, 95))))
            if int(t + 1e-3) > int(before + 1e-3):
                print(line, flush=True)
                line, shown, since = "", counts["shown"], now
    except KeyboardInterrupt:
        end = "Ctrl-C"
    reader.stop.set()
    for _ in range(10):  # it may hang in a read for ever
        reader.join(.1)
        reader.drop()
    with reader.writing, contextlib.suppress(av.FFmpegError):  # an error has been told before
        for stream in out.streams if out else ():
            out.mux(stream.encode(None) if stream.width else [])
            out.close()
    if not counts["read"] and end != "Ctrl-C":
        raise BadInput(f"--watch {args.watch}: {end or 'it ends without a frame'}")
    print(line + "\n" * bool(line) + f"{end or 'end of the stream'}, at {t:.1f} s: "
          + ", ".join(f"{counts[kind]} {kind}" for kind in ("read", "shown", "skipped", "dropped"))
          + f"; {counts['damaged']} damaged packets" * (counts["damaged"] > 0)
          + f"; frames came {reader.late:.1f} s late" * (reader.late > 1 and not args.no_drop))
    print(f"RESULT tinyclip_swap watch={args.watch} "
          + " ".join(f"{kind}={counts[kind]}" for kind in ("read", "shown", "skipped", "dropped"))
          + " p50_ms={:.1f} p95_ms={:.1f}".format(*np.percentile(spent or [0], (50, 95))))
    if end not in ("", "Ctrl-C"):
        sys.exit(1)
    return dict(counts)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", help="toy, or a folder (the README lists the formats)")
    add("--split", type=int, default=1, choices=(1, 2, 3))
    add("--allow-missing", action="store_true", help="go on without missing clips")
    add("--unseen", type=int, default=0, metavar="N", help="keep N classes, chosen by the seed, "
        "out of training, and test on them, too")
    add("--frames", type=int, default=8, help="T, frames of a clip that a network sees")
    add("--sampling", choices=("tsn", "dense"), default="tsn")
    add("--views", type=int, default=1, help="windows of a test clip, with dense sampling")
    add = parser.add_argument_group("networks").add_argument
    add("--large", default="toy-large", help="NAME[:WEIGHTS] of the original backbone")
    add("--small", default="toy-small", help="NAME[:WEIGHTS] of the one swapped in")
    add("--fusion-layers", type=int, default=6, help="of the fusion head; 0: mean over frames")
    add("--fix-text", action="store_true", help="freeze the text tower")
    add("--recover", choices=("none", "affinity"), default="none",
        help="affinity: a third arm, the small model with eq. (3)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, help="(default: 6 for toy clips, else 50, as ActionCLIP)")
    add("--batch-size", type=int, default=32, help="clips of all processes together")
    add("--lr", type=float, help="of CLIP's towers; the fusion head has ten times as much "
        "(default: 4e-4 for toy CLIPs, else 5e-6, as ActionCLIP)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add = parser.add_argument_group("real time").add_argument
    add("--watch", metavar="SOURCE", help="no training: say what goes on in a file, an address, - "
        "(standard input) or a camera: /dev/video0, avfoundation:0, dshow:video=NAME")
    add("--labels", help='what it may be, in any words: "waving, running, a dog jumping"')
    add("--checkpoint", metavar="FILE", help="of any of the three scripts, or ActionCLIP's for the "
        "backbone that --large names (default: that backbone as it is, the mean over frames)")
    add("--fps", type=float, default=4., help="frames sampled a second; T of them are a window, "
        "which should last as long as a training clip")
    add("--threshold", type=float, default=.5, help="probability below which it is none of these")
    add("--stall", type=int, default=10, help="seconds without a frame that end it")
    add("--no-drop", action="store_true", help="wait for each frame, at whatever speed")
    add("--save", metavar="FILE", help="write the video with the label drawn in: out.mp4")
    add = parser.add_argument_group("run").add_argument
    add("--eval-only", metavar="CHECKPOINT", help="no training: test this checkpoint, ours or "
        "ActionCLIP's, of the backbone that --large (or --small) names")
    add("--seed", type=int, default=0)
    add("--out", default="runs", help="folder for records, checkpoints and the cache")
    add("--resume", action="store_true", help="go on with a run that was killed")
    add("--target", type=float, default=0., help="exit 1 if an arm's top-1 is below")
    add("--workers", type=int, default=min(8, max(1, (os.cpu_count() or 1) - 1)))
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = 6 if args.data == "toy" else 50
    if min(args.frames, args.views, args.epochs, args.batch_size) < 1 or args.frames > 77:
        parser.error("--frames takes 1 to 77; --views, --epochs and --batch-size take 1 or more")
    if args.views > 1 and args.sampling == "tsn":
        parser.error("--views: TSN sampling has one view; add --sampling dense")
    if not args.watch and (args.labels or args.checkpoint or args.save):
        parser.error("--labels, --checkpoint and --save go with --watch")
    args.labels = list(dict.fromkeys(re.findall(r"[^,\s][^,]*?(?=\s*(?:,|$))", args.labels or "")))
    if args.watch and len(args.labels) < 2:
        parser.error('--watch takes --labels, two or more: --labels "waving, running"')
    if min(args.fps, args.stall) <= 0 or not 0 <= args.threshold <= 1:
        parser.error("--fps and --stall take more than 0, --threshold 0 to 1")
    args.arms = {"large": args.large, "small": args.small}
    if args.recover == "affinity":
        args.arms["small+affinity"] = args.small
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


def report(results, log, data, bad, world):
    """What is printed after the arms: the table, training speed, and what was missing or unread."""
    print(table(results))
    last = {row["arm"]: row for row in log}
    for arm, row in last.items():
        tflops = results[arm]["gflop_training"] * row["clips_per_s"] / 1e3 / world
        peak = next((peak for name, peak in PEAK_TFLOPS.items() if name in machine()), None)
        print(f"training {arm}: {row['clips_per_s']:.1f} clips/s with decoding, "
              f"{tflops:.3f} TFLOP/s a device"
              + (f", {tflops / peak:.1%} of its peak of {peak}" if peak else "")
              + (f", {row['peak_mb']:.0f} MB at most" if row["peak_mb"] else ""))
    trained = {label for _, label in data.train}
    untrained = [name for i, name in enumerate(data.classes) if i not in trained]
    for names, what in ((data.missing, "listed clips are missing"),
                        (untrained, "classes have no training clip"),
                        (list(bad["training"]), "training clips cannot be decoded"),
                        (list(bad["test"]), "test clips cannot be decoded and count as wrong")):
        if names:
            print(f"NOTE {len(names)} {what}, first {names[0]}")


def main(argv=None):
    """Train, test and measure the arms. -> {arm: numbers}"""
    args, began, models = parse(argv), time.time(), {}
    if args.watch:
        return watch(args)
    device, rank, world = place = find_place()
    if args.large.startswith("toy-"):  # threads that wait for decoding cost more than they bring
        spare = max(1, (os.cpu_count() or 1) - args.workers)
        torch.set_num_threads(min(torch.get_num_threads(), spare))
    cache = Path(args.out) / "cache"
    if rank:
        dist.barrier()  # process 0 goes first and fills the cache
    data = read_data(args.data, args.split, args.allow_missing, cache,
                     "toy-diagonals" if args.unseen else "toy")
    data, opened = split_unseen(data, args.unseen, args.seed)
    if args.eval_only:
        held = read_weights(args.eval_only).get("backbone", args.large.partition(":")[0])
        arms = {spec.partition(":")[0]: arm for arm, spec in reversed(args.arms.items())}
        if held not in arms:
            raise BadInput(f"{args.eval_only} holds {held}, but --large is {args.large} and "
                           f"--small is {args.small}: name its backbone with one of them")
        args.arms = {arms[held]: f"{held}:{args.eval_only}"}
    for arm, spec in args.arms.items():
        torch.manual_seed(args.seed)  # the arms do not depend on each other
        models[arm] = build_action_clip(spec, args.fusion_layers, cache)
    if world > 1 and not rank:
        dist.barrier()
    if min(args.batch_size, len(data.train)) < world:
        raise BadInput(f"--batch-size {args.batch_size}, {len(data.train)} training clips: too few "
                       f"for {world} processes")
    run = Path(args.out) / "tinyclip_swap" / f"{data.name}-s{args.split}-seed{args.seed}"
    record = start_record(args, run)
    record_name = "eval.json" if args.eval_only else "run.json"
    if not rank:
        run.mkdir(parents=True, exist_ok=True)
        for old in [] if args.resume or args.eval_only else run.glob("*-last.pt"):
            old.unlink()
        (run / record_name).write_text(json.dumps(record, indent=1))
        print(f"tinyclip_swap.py on {machine()}, {world} process(es), torch {torch.__version__}, "
              f"seed {args.seed}\n{data.name}, split {args.split}: {len(data.classes)} classes, "
              f"{len(data.train)} training clips, {len(data.test)} test clips", flush=True)
        if opened:
            print(f"held out of training, by seed {args.seed}: "
                  f"{', '.join(opened['unseen'].classes)}", flush=True)

    results, answers, log, large = {}, {}, [], None
    bad = {"training": {}, "test": {}}  # {path: reason} of clips that cannot be decoded
    for arm, model in models.items():
        model.to(device)
        if args.fix_text:
            for name, weight in model.clip.named_parameters():
                weight.requires_grad_("visual." in name or name == "logit_scale")
        gmac, gflop = count_operations(model, args, device)
        if args.compile:
            torch.compiler.config.recompile_limit = 64  # arms x batch sizes x training, testing
            model.encode_video = torch.compile(model.encode_video)
            model.encode_text = torch.compile(model.encode_text)
        before = {"seen": evaluate(model, data, args, place, bad["test"])[0]["top1"],
                  **{group: evaluate(model, part, args, place, bad["test"])[0]["top1"]
                     for group, part in opened.items()}} if opened and not args.eval_only else {}
        if not args.eval_only:
            train(arm, model, large if arm == "small+affinity" else None, data, args, place, run,
                  log, bad["training"])
        numbers, answers[arm] = evaluate(model, data, args, place, bad["test"])
        results[arm] = {"backbone": args.arms[arm].partition(":")[0], "gmac": gmac,
                        "gflop_training": gflop, **numbers, "before": before,
                        **{group: evaluate(model, part, args, place, bad["test"])[0]["top1"]
                           for group, part in opened.items()}}
        if arm == "large":
            large = model.eval().requires_grad_(False)  # from here on it only teaches
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return results

    for arm, model in models.items():  # one after the other, with nothing else running
        results[arm] |= measure(model, data, args, device)
    record |= {"results": results, "missing": data.missing, "bad": bad,
               "unseen": opened["unseen"].classes if opened else [],
               "seconds": time.time() - began}
    (run / record_name).write_text(json.dumps(record, indent=1))
    draw_sheet(data, answers, args, (run / record_name).with_suffix(".png"))
    report(results, log, data, bad, world)
    if opened:
        print(table_unseen(results, opened))
    print(f"record, checkpoints, pictures: {run}\n"
          f"RESULT tinyclip_swap data={data.name} split={args.split} seed={args.seed} "
          + " ".join(f"{arm}={r['top1']:.4f}"
                     + "".join(f" {arm}_{group}={r[group]:.4f}" for group in opened)
                     for arm, r in results.items())
          + (f" gmac_ratio={results['small']['gmac'] / results['large']['gmac']:.3f}"
             if len(results) > 1 else "") + f" seconds={time.time() - began:.0f}")
    if any(r["top1"] < args.target for r in results.values()):
        sys.exit(1)
    return results


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.stderr.write(f"tinyclip_swap.py: {error}\n")
        sys.exit(2)
