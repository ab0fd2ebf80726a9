"""Swap ActionCLIP's CLIP for a TinyCLIP: what does it cost, and what does it buy?

Technique 1 of Frans Huntink's master thesis, "Bridging the gap: Threefold knowledge distillation
for language-enabled action recognition models operating in real-time scenarios" (Utrecht, 2024), on
ActionCLIP (Wang, Xing, Liu 2021, arXiv 2109.08472) and TinyCLIP (Wu et al., ICCV 2023).

ActionCLIP encodes T frames with CLIP's image tower, nearly all of its cost, fuses them with a small
transformer and compares the result with the embedding of a sentence, "a video of <action>".
TinyCLIP is CLIP distilled into a smaller CLIP on images with captions. So put its towers in place
of the large ones and fine-tune on actions as usual: both are trained, tested and measured alike.
--compare has other arms, on one backbone: ViFi-CLIP (Rasheed et al., CVPR 2023: mean over frames,
both towers tuned), Text4Vis (Wu et al., AAAI 2023: frozen class texts as the classifier), and CLIP.

B clips with labels y, video embeddings v and text embeddings t, (B, D); x^ = x / |x|; s is the
learned scale exp(logit_scale); _s is the small model, _t the large one.
  (1) kl_pair        L = 1/2 [KL(G || softmax_rows(s v^ t^')) + KL(G || softmax_rows(s t^ v^'))],
                     G = softmax_rows(10 [y_i = y_k]); KL summed over a row, mean over B
  (2) class_scores   p(k) = 1/P sum_p softmax_k(100 v^ . t^_pk), for P = 16 sentences per class;
                     test clips get the class of the largest p, mean over their views
  (3) affinity_loss  L = 1/2 [CE(A_t, A_s) + CE(A_t', A_s')], A = softmax_rows(scale v^ t^'), A' the
                     same of t^ v^'; CE = -sum_k A_t log A_s, mean over B; it needs no labels
  (4) class_cross_entropy  L = -log softmax_k(s v^ . t_k^)[y], mean over B, no label smoothing;
                     t (K, D): every class under one template, which is P = 1 in eq. (2)
Schedule: AdamW, lr 5e-6 (toys 4e-4), 10 lr for the fusion head, weight decay .2; linear warm-up in
the first tenth of the steps, cosine to 0; 50 epochs (toys 6), batch 32. All weights are trained.

  python tinyclip_swap.py                              toy clips, 2 minutes on 2 CPU cores
  python tinyclip_swap.py --recover affinity           a third arm: small + eq. (3)
  python tinyclip_swap.py --compare                    ActionCLIP, ViFi-CLIP, Text4Vis, CLIP
  python tinyclip_swap.py --unseen 4                   four classes held out of training, and tested
  python tinyclip_swap.py --data HMDB51 --large ViT-B-32:openai --batch-size 64 \\
      --small TinyCLIP-ViT-40M-32-Text-19M:TinyCLIP-ViT-40M-32-Text-19M-LAION400M.pt
  python tinyclip_swap.py --data HMDB51 --large ViT-B-32 --eval-only vit-b-32-8f.pt
  python tinyclip_swap.py --watch my.mp4 --large ViT-B-32:openai --labels "waving, a dog jumping"

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0):
RESULT tinyclip_swap data=toy split=1 seed=0 large=0.9767 small=0.9300 gmac_ratio=0.482 seconds=90

Differs from ActionCLIP's code (sallymmx/ActionCLIP @31c34df): fp32 weights with bf16 autocast;
frames are random in their segments; jitter is drawn once per clip; no weight decay on norms,
biases, embeddings and scales; logit_scale is at most ln 100; gradients are clipped at norm 1; the
last epoch counts, not the best; class names are words (its UCF101 checkpoints: ApplyEyeMakeup).
TinyCLIP: eq. (3) has weight 1 beside eq. (1); the large model's scale is 50, as there.
The models of --compare train as ActionCLIP does. ViFi-CLIP's code (@dea0d7e) has label smoothing,
mixup, lr 8e-6, weight decay .001; Text4Vis's (@238c07f) warms up for 5 of 30 epochs, and averages
features over views. X-CLIP (attention across frames in the tower) is not included.
"""
import argparse
import collections
import datetime
import functools
import json
import math
import os
import platform
import queue
import sys
import threading
import time
import timeit
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

import common

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if GPU else torch.device("cpu")
SCALE_T = 50.  # of the large model in eq. (3)
if GPU:
    torch.cuda.set_device(DEVICE)
MACHINE = torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU"

# ---- the method: eqs. (1)-(4) --------------------------------------------------------------------


def kl_pair(video, text, labels, scale):
    """ActionCLIP's loss, eq. (1): all texts of the same class are positives. -> scalar"""
    v, t = F.normalize(video, dim=-1), F.normalize(text, dim=-1)                # (B, D)
    logits = scale * v @ t.T                                                    # (B, B)
    G = (10 * (labels[:, None] == labels).to(logits)).softmax(1)                # (B, B)
    return (F.kl_div(logits.log_softmax(1), G, reduction="batchmean")           # (1), v to t
            + F.kl_div(logits.T.log_softmax(1), G, reduction="batchmean")) / 2  # (1), t to v


def class_scores(video, text):
    """The rule of evaluation, eq. (2). video (B, D), text (16, K, D) -> probabilities (B, K)"""
    v, t = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
    logits = 100 * torch.einsum("bd,pkd->bpk", v, t)                            # (B, P, K)
    return logits.softmax(-1).mean(1)                                           # (B, K)        (2)


def similarity(video, text, scale):
    """Logits of eqs. (3) and (4). video (B, D), text (K, D), for (3) of B clips -> (B, K)"""
    return scale * F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T     # (B, K)


def affinity_loss(video_s, text_s, video_t, text_t, scale_s, scale_t):
    """TinyCLIP's affinity mimicking, eq. (3). video_*, text_* (B, D_*) -> scalar"""
    logits_s = similarity(video_s, text_s, scale_s)                             # (B, B)
    logits_t = similarity(video_t, text_t, scale_t)                             # (B, B)
    return (F.cross_entropy(logits_s, logits_t.softmax(1))                      # (3), v to t
            + F.cross_entropy(logits_s.T, logits_t.T.softmax(1))) / 2           # (3), t to v


def class_cross_entropy(video, text, labels, scale):
    """ViFi-CLIP's and Text4Vis's loss, eq. (4). video (B, D), text (K, D), labels (B,) -> scalar"""
    return F.cross_entropy(similarity(video, text, scale), labels)              # ()            (4)


# ---- the rest is plumbing: arms, training --------------------------------------------------------


class Recipe(NamedTuple):
    head: str = "fusion"  # or mean, over frames
    text: str = "tuned"  # or frozen, the tower
    loss: str = "kl_pair"  # or class_cross_entropy, or none: untrained
    templates: tuple = common.PROMPTS


ARMS = {
    "large": Recipe(), "small": Recipe(), "small+affinity": Recipe(), "actionclip": Recipe(),
    "vifi-clip": Recipe("mean", "tuned", "class_cross_entropy", ("a photo of a {}.",)),
    "text4vis": Recipe("fusion", "frozen", "class_cross_entropy", ("a video of a person {}.",)),
    "zero-shot": Recipe("mean", "frozen", "none"),
    "checkpoint": Recipe(loss="none")}  # its file knows the rest


def build_arm(arm, args):
    """-> the network of an arm, the same whatever other arms there are"""
    torch.manual_seed(args.seed)
    spec, file = args.small if "small" in arm else args.large, args.checkpoint
    fusion = common.read_weights(file).get("fusion") if file else ARMS[arm].head == "fusion"
    model = common.build_action_clip(spec, 6 if fusion else 0, Path(args.out) / "cache",
                                     checkpoint=file).to(DEVICE)
    if not file:
        model.templates = ARMS[arm].templates
    if args.compile:
        torch.compiler.config.recompile_limit = 64  # arms x batch sizes x training, testing
        model.encode_video = torch.compile(model.encode_video)
    return model


autocast = functools.partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=GPU)


def gather(x):
    """(B/W, ...) in each of W processes -> (B, ...) in all: the loss sees the global batch."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.detach().contiguous())
    # gradients reach this process's own part, W times, since DDP divides by W
    parts[RANK] = x + (WORLD - 1) * (x - x.detach())
    return torch.cat(parts)


def make_optimizer(model, lr, steps):
    """AdamW as in ActionCLIP: CLIP's towers at lr, newly initialised layers at 10 lr; linear
    warm-up, then cosine to 0. No decay on norms, biases, embeddings and scales."""
    found, warm = {}, max(1, steps // 10)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            decay = .2 if weight.ndim > 1 and "embedding" not in name else 0.
            found.setdefault((lr if "clip." in name else 10 * lr, decay), []).append(weight)
    groups = [{"params": own, "lr": rate, "weight_decay": wd} for (rate, wd), own in found.items()]
    optimizer = torch.optim.AdamW(groups, betas=(.9, .98), fused=True)
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


def train(arm, model, large, data, args, run, log):
    """Train one arm by its loss, and by eq. (3) where `large` is given. After each epoch, add a row
    to `log` and write RUN/ARM-last.pt, from which --resume goes on."""
    recipe, texts = ARMS[arm], None
    if recipe.text == "frozen":
        texts = model.embed_classes(data.classes)[0]                            # (K, D), once
        for name, weight in model.clip.named_parameters():
            weight.requires_grad_(name.startswith("visual.") or name == "logit_scale")
    clips = common.Clips(data.train, args.frames, model.side, args.sampling, args.views, True,
                         args.seed)
    loader = common.ClipLoader(clips, args.batch_size, args.workers, bad=data.bad)
    optimizer, schedule = make_optimizer(model, args.lr, args.epochs * len(loader))
    parts = {"model_state_dict": model.clip, "fusion_model_state_dict": model.fusion,
             "optimizer": optimizer, "schedule": schedule}
    path = run / f"{arm}-last.pt"
    rows = resume(path, parts) if args.resume and path.exists() else []
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    prompts = model.prompts(data.classes)                                       # (P, K, L)
    prompts_t = large.prompts(data.classes) if large else None                  # (16, K, L_t)
    mirror = common.mirrors(data.classes)
    for epoch, batches in loader.epochs(len(rows), args.epochs):
        began, terms = time.time(), []
        model.train()
        bar = tqdm(batches, f"{arm} {epoch + 1}/{args.epochs}", len(loader), False, disable=None)
        for batch in bar:
            view = common.training_view(batch, model.size, mirror, args.seed, DEVICE)
            draws = [np.random.default_rng([args.seed, *key, 1]).integers(16) for key in batch.key]
            draws = torch.tensor(draws).to(DEVICE, non_blocking=True)           # (B/W,)
            own = torch.tensor(batch.label).to(DEVICE, non_blocking=True)       # (B/W,)
            labels = gather(own)                                                # (B,)
            tokens = prompts[draws, own] if recipe.loss == "kl_pair" else prompts[0]
            with autocast():
                v, t, scale = wrapped(view, tokens if texts is None else None)
            v, t = gather(v.float()), texts if t is None else t.float()         # (B, D), (K, D)
            if recipe.loss == "kl_pair":
                t = gather(t)                                                   # (B, D)
                loss = kl_pair(v, t, labels, scale)
            else:
                loss = class_cross_entropy(v, t, labels, scale)
            affinity = torch.zeros((), device=DEVICE)
            if large:
                if large.size != model.size:
                    view = common.training_view(batch, large.size, mirror, args.seed, DEVICE)
                with torch.no_grad(), autocast():  # frozen
                    v_t, t_t, _ = large.eval()(view, prompts_t[draws, own])
                v_t, t_t = gather(v_t.float()), gather(t_t.float())             # (B, D_t)
                affinity = affinity_loss(v, t, v_t, t_t, scale, SCALE_T)
            (loss + affinity).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            model.clip.logit_scale.data.clamp_(max=math.log(100))
            terms.append(torch.stack([loss, affinity]).detach())
        row = {"arm": arm, "epoch": epoch + 1}
        row.update(zip((recipe.loss, "affinity"), loader.mean(terms, epoch), strict=True))
        row["clips_per_s"] = len(loader) * loader.order.batch / (time.time() - began)
        keep(row, rows, args.epochs, path, model.about(args.frames), parts)
    log += rows


# ---- testing and measuring -----------------------------------------------------------------------


@torch.no_grad()
def classify(model, videos, text, views=1):
    """videos: a list of V*T uint8 frames each; text (16, K, D) -> probabilities (B, K), the mean
    over V views"""
    pixels = common.centre_crop(videos, model.size, DEVICE)
    with autocast():
        v = model.encode_video(pixels.unflatten(1, (views, -1)).flatten(0, 1)).float()  # (B*V, D)
    return class_scores(v, text).unflatten(0, (-1, views)).mean(1)


def evaluate(model, data, args):
    """Test on every clip. -> top-1, top-5"""
    text = model.embed_classes(data.classes)                                    # (P, K, D)
    hits = torch.zeros(2, device=DEVICE)  # first, among the first five
    clips = common.Clips(data.test, args.frames, model.side, args.sampling, args.views)
    loader = common.ClipLoader(clips, args.batch_size, args.workers, bad=data.bad)
    for batch in tqdm(loader, "test", leave=False, disable=None):
        top = classify(model, batch.video, text, args.views).topk(min(5, len(data.classes))).indices
        right = top == torch.tensor(batch.label, device=DEVICE)[:, None]        # (B, 5)
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    if WORLD > 1:
        dist.all_reduce(hits)
    return (hits / len(clips)).tolist()


def milliseconds(function):
    """Median time of a call whose result comes to the CPU, so that a GPU has finished"""
    return 1e3 * float(np.median(timeit.repeat(function, repeat=23, number=1)[3:]))  # 3: warm-up


def measure(model, data, args):
    """What a clip costs, its texts cached: millions of parameters, GMAC, ms without and with
    decoding; clips/s of a batch"""
    clips = common.Clips(data.test, args.frames, model.side, args.sampling, args.views)
    text, T = model.embed_classes(data.classes), args.frames * args.views
    many = torch.randint(256, (32 if GPU else 4, T, 3, model.size, model.size)).byte()
    ms = milliseconds(lambda: classify(model, many[:1], text, args.views).cpu())
    read = milliseconds(lambda: classify(model, [clips[0, 0].video], text, args.views).cpu())
    batch = milliseconds(lambda: classify(model, many, text, args.views).cpu())
    return {"M": model.millions(), "GMAC": model.gmac(args.frames) * args.views, "ms": ms,
            "+decode": read, "clips/s": 1e3 * len(many) / batch}


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


# ---- live: --watch. If you only care about the swap, skip to parse() -----------------------------

STALL = 10  # seconds without a frame that end the stream


@torch.no_grad()
def stream_step(model, ring, frame, text):
    """A new frame, uint8 (3, H, W), costs one image pass and one fusion, since `ring`, a deque,
    keeps the embeddings of the last T, oldest first; until there are T, the first is repeated.
    text (16, K, D) -> probabilities (K,)"""
    pixels = common.centre_crop([frame[None]], model.size, DEVICE)              # (1, 1, 3, S, S)
    with autocast():
        f = model.encode_frames(pixels)[:, 0]                                   # (1, D)
        ring.append(f)
        while len(ring) < ring.maxlen:
            ring.append(f)
        v = model.fusion(torch.stack(tuple(ring), 1)).float()                   # (1, D)
    return class_scores(v, text)[0]


def read_into(frames, source):
    """Fill a queue with the frames of a stream; the last item says what ended it. Runs in a thread,
    since a read may block forever."""
    try:
        for item in common.read_stream(source):
            frames.put(item)
        frames.put("end of the stream")
    except common.BadVideo as error:
        frames.put(error.reason)


def watch(args):
    """Print a label a second for a stream at its own pace: frames that come while the networks are
    busy are dropped. Exits with 1 where the stream stalls or breaks off."""
    model = build_arm("checkpoint" if args.checkpoint else "zero-shot", args)
    text = model.embed_classes(args.labels)
    ring = collections.deque(maxlen=model.frames or args.frames)
    print(f"{args.checkpoint or args.large} watches {args.watch} on {MACHINE}: {ring.maxlen} "
          f"frames, {args.fps:g} a second; labels: {', '.join(args.labels)}", flush=True)
    frames, counts, spent = queue.Queue(32), collections.Counter(), []
    threading.Thread(target=read_into, args=(frames, args.watch), daemon=True).start()
    began, turn, second, line = None, None, 0, ""
    try:
        while not isinstance(item := frames.get(timeout=STALL), str):
            t, frame = item
            began = began or time.perf_counter() - t
            late = 0 if args.no_drop else time.perf_counter() - began - t
            time.sleep(max(0, -late))
            last, turn = turn, int(t * args.fps + .05)  # timestamps are rounded
            if turn == last:
                counts["skipped"] += 1
            elif late > 1 / args.fps and not frames.empty():  # else the source is what is slow
                counts["dropped"] += 1
            else:
                start = time.perf_counter()
                p = stream_step(model, ring, common.to_picture(frame, model.side), text)
                best = [(args.labels[k], p[k].item()) for k in p.argsort(descending=True)[:3]]
                spent.append(1e3 * (time.perf_counter() - start))
                counts["shown"] += 1
                label = best[0][0] if best[0][1] >= .5 else "none of these"
                scores = ", ".join(f"{name} {q:.2f}" for name, q in best)
                line = f"{t:7.1f} s  {label:20} {np.median(spent[-100:]):6.1f} ms  {scores}"
            if int(t) > second:
                print(line, flush=True)
                second = int(t)
        end = item
    except queue.Empty:
        end = f"no frame for {STALL} s"
    except KeyboardInterrupt:
        end = "Ctrl-C"
    if not spent and end != "Ctrl-C":
        raise common.BadInput(f"--watch {args.watch}: {end}")
    p50, p95 = np.percentile(spent or [0], (50, 95))
    print(f"{line}\n{end}\nRESULT tinyclip_swap watch={args.watch} read={counts.total()} "
          f"shown={counts['shown']} skipped={counts['skipped']} dropped={counts['dropped']} "
          f"p50_ms={p50:.1f} p95_ms={p95:.1f}")
    if end not in ("end of the stream", "Ctrl-C"):
        sys.exit(1)


# ---- flags and main ------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="toy", help="toy, or a folder; the README lists the formats")
    add("--split", type=common.which_split, default=1, choices=(1, 2, 3, "all"), help="of lists")
    add("--allow-missing", action="store_true", help="go on without missing clips")
    add("--unseen", type=int, default=0, help="classes held out of training, and tested, too")
    add("--shots", type=int, default=0, help="training clips of each class; 0: all")
    add("--label-noise", type=float, default=0., help="share of training labels made wrong")
    add("--frames", type=int, default=8, help="T, frames per clip; a checkpoint has its own")
    add("--sampling", choices=("tsn", "dense"), default="tsn", help="of frames")
    add("--views", type=int, default=1, help="windows of a test clip, with dense")
    add("--large", default="toy-large", help="NAME[:WEIGHTS] of the original backbone")
    add("--small", default="toy-small", help="NAME[:WEIGHTS] of the one swapped in")
    add("--recover", choices=("none", "affinity"), default="none", help="a third arm, with eq. (3)")
    add("--compare", action="store_true", help="instead: four models on --large, eq. (4)")
    add("--checkpoint", "--eval-only", metavar="FILE", help="test it, or --watch with it")
    add("--epochs", type=int, default=50, help="as ActionCLIP; 6 for toy clips")
    add("--batch-size", type=int, default=32, help="of all processes together")
    add("--lr", type=float, default=5e-6, help="of CLIP's towers, as ActionCLIP; 4e-4 for toys")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--watch", metavar="SOURCE", help="live: a file, an address, - (standard input), a camera "
        "(/dev/video0, avfoundation:0, dshow:video=NAME)")
    add("--labels", default="", help='of --watch, in any words: "waving, running, a dog jumping"')
    add("--fps", type=float, default=4., help="frames sampled per second of --watch")
    add("--no-drop", action="store_true", help="wait for each frame, at whatever speed")
    add("--seed", type=int, default=0, help="of initial weights, order and augmentation")
    add("--seeds", type=int, nargs="*", default=[], help="one run each, and mean, as --split all")
    add("--out", default="runs", help="folder for runs and the cache")
    add("--resume", action="store_true", help="go on with a run that was killed")
    add("--workers", type=int, default=max(1, min(16, os.cpu_count() - 1)), help="that decode")
    args, _ = parser.parse_known_args(argv)
    if args.data == "toy":
        parser.set_defaults(epochs=6)
    if args.large.startswith("toy-"):
        parser.set_defaults(lr=4e-4)
    args = parser.parse_args(argv)
    labels = [word.strip() for word in args.labels.split(",")]
    args.labels = [word for word in dict.fromkeys(labels) if word]
    if min(args.epochs, args.batch_size, args.frames, args.views) < 1 or args.frames > 77:
        parser.error("--epochs, --batch-size, --views take 1 or more, --frames 1 to 77")
    if min(args.seed, args.shots, args.workers) < 0 or not 0 <= args.label_noise <= 1:
        parser.error("--seed, --shots, --workers take 0 or more, --label-noise 0 to 1")
    if not (0 < args.lr < math.inf and 0 < args.fps < math.inf):
        parser.error("--lr, --fps take more than 0")
    if args.watch and len(args.labels) < 2:
        parser.error('--watch needs two labels or more: --labels "waving, running"')
    return args


def main(argv=None):
    """Train, test and measure the arms. -> {arm: numbers}"""
    args, began = parse(argv), time.time()
    if args.split == "all" or args.seeds:
        return common.several(main, argv, args.split, args.seeds or [args.seed])
    if args.large.startswith("toy-"):
        torch.set_num_threads(1)  # small networks run faster on one thread
    if WORLD > 1:
        dist.init_process_group("nccl" if GPU else "gloo", timeout=datetime.timedelta(hours=12),
                                device_id=DEVICE if GPU else None)  # 12: process 0 may label
    if args.watch:
        return watch(args)
    cache, toys = Path(args.out) / "cache", "toy-diagonals" if args.unseen else "toy"
    data = common.read_data(args.data, args.split, args.allow_missing, cache, toys)
    tests = common.split_unseen(data, args.unseen, args.seed)
    data = common.few_shot(tests[""], args.shots, args.seed)
    data = tests[""] = common.noisy_labels(data, args.label_noise, args.seed)
    arms = ["large", "small"] if args.recover == "none" else ["large", "small", "small+affinity"]
    if args.compare:
        arms = ["actionclip", "vifi-clip", "text4vis", "zero-shot"]
    if args.checkpoint:
        arms = ["checkpoint"]
        if "backbone" not in common.read_weights(args.checkpoint):
            data.classes = data.official or data.classes
    models = {arm: build_arm(arm, args) for arm in arms}
    if args.checkpoint:
        args.frames = models["checkpoint"].frames or args.frames
    run = run_folder("tinyclip_swap", data, args)
    if RANK == 0:
        print(f"{data}; {WORLD} process(es), {MACHINE}", flush=True)

    results, log = {}, []
    for arm, model in models.items():
        results[arm] = {"arm": arm, "backbone": model.name}
        if args.compare:
            head, text, loss, _ = ARMS[arm]
            results[arm] |= {"head": head, "text": text, "loss": loss}
        if ARMS[arm].loss != "none":
            large = models["large"] if arm == "small+affinity" else None  # trained by now
            train(arm, model, large, data, args, run, log)
        for name, part in tests.items():
            results[arm][f"top1{name}"], results[arm][f"top5{name}"] = evaluate(model, part, args)
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK == 0:
        report(models, results, tests, args, log, run, began)
    return results


@torch.no_grad()
def draw_affinity(models, data, args, path):
    """A of eq. (3), at the same scale for all, of 32 test clips and their sentences, by class"""
    clips = sorted(data.test, key=lambda clip: clip[1])
    clips, tiles = clips[::math.ceil(len(clips) / 32)], []
    for name, model in models.items():
        read = common.Clips(clips, args.frames, model.side, args.sampling)
        batch = next(iter(common.ClipLoader(read, 32)))
        texts = model.prompts(data.classes)[0, batch.label]
        with autocast():
            v, t, _ = model.eval()(common.centre_crop(batch.video, model.size, DEVICE), texts)
        A = similarity(v.float(), t.float(), SCALE_T).softmax(1).cpu()          # (B, B)
        tile = F.pad((A / A.max()).kron(torch.ones(8, 8)), (2, 2, 14, 2), value=1)
        title, corner = f"{name}: clips x texts", torch.tensor([[0, 0, 1, 1]])
        tiles.append(torchvision.utils.draw_bounding_boxes(tile[None], corner, [title]))
    with common.renamed(path) as part:
        torchvision.utils.save_image(tiles, part)


def report(models, results, tests, args, log, run, began):
    """Measure, with nothing else running; write record and pictures; print the table and RESULT."""
    data, scores = tests[""], []
    for arm, r in results.items():
        r |= measure(models[arm], data, args)
        scores += [f"{arm}{name}={r['top1' + name]:.4f}" for name in tests]
    print(table(list(results.values())))
    if "small" in results:
        small, large = results["small"], results["large"]
        keys = "M", "GMAC", "ms", "+decode", "clips/s"
        ratios = [f"{key} x{small[key] / large[key]:.2f}" for key in keys]
        print(f"small / large: {', '.join(ratios)}")
        scores.append(f"gmac_ratio={small['GMAC'] / large['GMAC']:.3f}")
    chances = [f"top1{name} 1/{len(part.classes)}" for name, part in tests.items()]
    print(f"M: million parameters without the word table; GMAC, ms, +decode (ms with decoding): of "
          f"a clip, texts cached.\n{len(data.test)} test clips; chance: {', '.join(chances)}")
    for note in data.notes():
        print(f"NOTE {note}")
    write_record(run / "run.json", args, data, results, log, began)
    dots = {arm: [(r["ms"], r["top1"])] for arm, r in results.items()}
    common.plot({f"{data.name}, {MACHINE}": dots}, "ms a clip", "top-1", run / "accuracy.png")
    if "small+affinity" in models:
        shown = {"small before training": build_arm("small", args), **models}
        draw_affinity(shown, data, args, run / "affinity.png")
    print(f"record, checkpoints, pictures: {run}\nRESULT tinyclip_swap data={data.name} "
          f"split={args.split} seed={args.seed} {' '.join(scores)} "
          f"seconds={time.time() - began:.0f}")


if __name__ == "__main__":
    common.run(main)
