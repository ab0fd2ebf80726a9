"""Teach a small ActionCLIP by a large one as DeiT does, with a token of its own; and all three.

Technique 3 of Frans Huntink's master thesis, "Bridging the gap: Threefold knowledge distillation
for language-enabled action recognition models operating in real-time scenarios" (Utrecht, 2024):
DeiT (Touvron et al., ICML 2021, arXiv 2012.12877) for video, on ActionCLIP (Wang, Xing, Liu 2021,
arXiv 2109.08472). Class scores of a large ActionCLIP go into a second head of a small one.

DeiT gives a transformer a second token, whose head learns from the teacher while the class head
learns from the labels. ActionCLIP's head is the mean over frames, without a token. So a learned
token stands before the frames: a "token-based" and a "frame-based perspective" are learned at once.
The abstract credits the gain to the two heads, not to the teacher. The arms separate these: gt has
no teacher; teacher-on-frame has one head; two-frame-heads and teacher-on-linear have, in place of
the token, a linear layer on h_frame, initialised as the identity.

B clips with labels y, frames f (B, T, D), text embeddings t (B, D); p positions; x^ = x / |x|; s =
exp(logit_scale), learned; v_T, s_T and z_T (B, K) are the teacher's.
  (1) kl_pair       1/2 [KL(G || softmax_rows(s v^ t^')) + KL(G || softmax_rows(s t^ v^'))],
                    G = softmax_rows(10 [y_i = y_k]); KL summed over a row, mean over B
  (2) class_scores  p(k) = mean_p softmax_k(100 v^ . t^_pk), 16 sentences a class; argmax wins
  (3) FusionHead.read in common.py: [z_0; z_1; ...] = transformer([token + p_0; f_1 + p_1; ...]),
                    h_frame = mean_i(z_i + f_i), h_token = z_0 + mean_i f_i
  (4), (5)          spatial_loss, total_loss of spatial_kd.py, for the grid
  (6) L_token       gt: kl_pair(h_token, t(y), y).  hard: the same with the teacher's argmax for y.
                    soft_loss: tau^2 KL(softmax(z_T / tau) || softmax(s h_token^ t^' / tau)), summed
                    over all K classes, mean over B; z_T = s_T mean_p v_T^ . t^_pk
  (7) deit_loss     L = (1 - alpha) kl_pair(h_frame, t(y), y) + alpha L_token
  (8) one_vector in common.py: (h_token^ + h_frame^) / 2, what is deployed
Schedule: AdamW, lr 5e-6 (toys 4e-4), 10 lr for what is new, weight decay .2; linear warm-up in the
first tenth of the steps, cosine to 0; 50 epochs (toys 6), batch 32. The trained teacher is frozen.

  python deit_video.py                        toy clips, teacher and three arms, 2 minutes on 2 CPUs
  python deit_video.py --grid                 base, +swap, +swap+spatial, +swap+two-heads, all three
                                              (after: python spatial_kd.py --label-only)
  python deit_video.py --data HMDB51 --teacher ViT-B-32:vit-b-32-8f.pt --student \\
      TinyCLIP-ViT-40M-32-Text-19M:TinyCLIP-ViT-40M-32-Text-19M-LAION400M.pt

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0):
RESULT deit_video data=toy split=1 seed=0 teacher=0.9767 one-head=0.9300 gt=0.8533 soft=0.8400
  seconds=75

Differs from the thesis, of which the abstract was at hand: eqs. (3), (6)-(8) are our reading;
without the residual mean_i f_i the token starts far from the texts. From DeiT: alpha .5 and tau 1
are its code's (its paper's soft variant: weight .1, tau 3); its code divides the soft loss by B K;
hard is an in-batch loss, not cross entropy over K; no linear classifiers; (8) is, up to its length,
the mean of both heads' logits. soft_loss takes texts under one template a step. Spatial heads read
(8). Eq. (1) is trained as in tinyclip_swap.py, with the same differences.
"""
import argparse
import datetime
import functools
import json
import math
import os
import platform
import sys
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
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

import common

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if GPU else torch.device("cpu")
if GPU:
    torch.cuda.set_device(DEVICE)
MACHINE = torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU"
FLOOR = .3  # of eq. (4)

# ---- the method: eqs. (1), (2), (4)-(7) ----------------------------------------------------------


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


def soft_loss(h, text, z_t, scale, tau):
    """Eq. (6), soft. h (B, D), text (K, D), z_t (B, K), the teacher's logits -> scalar"""
    logits = scale * F.normalize(h, dim=-1) @ F.normalize(text, dim=-1).T       # (B, K)
    return tau ** 2 * F.kl_div((logits / tau).log_softmax(1), (z_t / tau).softmax(1),
                               reduction="batchmean")                           # ()            (6)


def deit_loss(frame, token, alpha):
    """Eq. (7): the losses of the two heads, scalars -> scalar"""
    return (1 - alpha) * frame + alpha * token                                  # ()            (7)


def spatial_loss(logits, q):
    """One objective, eq. (4). logits, q (B, L); q is 0 for clips without targets -> scalar"""
    each = F.kl_div(logits.log_softmax(1), q, reduction="none").sum(1)          # (B,)
    sure = q.amax(1) >= FLOOR                                                   # (B,)
    return (sure * each).sum() / sure.sum().clamp(min=1)                        # ()            (4)


def total_loss(action, spatial, weight):
    """Eq. (5). spatial: a list, a scalar per task; weight: lambda -> scalar"""
    return action + weight * (sum(spatial) / max(1, len(spatial)))              # ()            (5)


# ---- the rest is plumbing: arms and their networks -----------------------------------------------


class Arm(NamedTuple):
    """loss: of eq. (6), None: h_frame alone. second: what it trains, the `token`'s read-out, a
    `linear` layer on h_frame, or the `frame` read-out itself. spatial: technique 2's objectives"""
    loss: str | None
    second: str = "token"
    spatial: bool = False


ONE_HEAD = Arm(None, "frame")
ARMS = {"one-head": ONE_HEAD, "gt": Arm("gt"), "hard": Arm("hard"), "soft": Arm("soft"),
        "two-frame-heads": Arm("gt", "linear"), "teacher-on-frame": Arm("soft", "frame"),
        "teacher-on-linear": Arm("soft", "linear")}


class TwoHeaded(nn.Module):
    """An ActionCLIP, .model, with what its arm needs beside it."""

    def __init__(self, model, arm, tasks):
        super().__init__()
        self.model, self.arm = model, arm
        self.tasks = tasks if arm.spatial else []
        if arm.second == "linear":
            self.linear = nn.Linear(model.width, model.width)
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        scale = model.clip.logit_scale.exp().item()
        self.heads = common.SpatialHeads(model.width, tasks, scale) if self.tasks else None

    def read(self, video):
        """Eq. (3), or what the arm has instead of the token; and eq. (8). (B, T, 3, S, S) in 0..1
        -> h_token, h_frame and the one vector, (B, D) each"""
        h_token, h_frame = self.model.fusion.read(self.model.encode_frames(video))
        if self.arm.second != "token":
            h_token = self.linear(h_frame) if self.arm.second == "linear" else h_frame
        return h_token, h_frame, common.one_vector(h_token, h_frame)

    def forward(self, video, tokens, more=None, words=None):
        """more: token ids of further texts; words: of all spatial labels -> h_token, h_frame, t
        (B, D), s, embeddings of `more`, logits (B, L_k) per task"""
        (h_token, h_frame, h), logits = self.read(video), []
        encode, scale = self.model.encode_text, self.model.clip.logit_scale.exp()
        if words is not None:
            logits = self.heads(h, encode(words).split([len(task.labels) for task in self.tasks]))
        if more is not None:
            more = encode(more)
        return h_token, h_frame, encode(tokens), scale, more, logits


# ---- training ------------------------------------------------------------------------------------

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


@torch.no_grad()
def class_logits(teacher, video, text):
    """z_T. video (B, T, 3, S, S), text (16, K, D) -> (B, K)"""
    with autocast():
        v = F.normalize(teacher.encode_video(video).float(), dim=-1)            # (B, D)
    return teacher.clip.logit_scale.exp() * v @ F.normalize(text, dim=-1).mean(0).T


def token_texts(loss, z_t, prompts, draws, rng):
    """Token ids of L_token's other texts: the teacher's classes, or all under a random template"""
    if loss == "hard":
        return prompts[draws, z_t.argmax(1)]                                    # (B/W, L)
    if loss == "soft":
        return prompts[rng.integers(16)]                                        # (K, L)
    return None


def token_loss(loss, h_token, t, labels, texts, z_t, scale, tau):
    """L_token of eq. (6), for the global batch; 0 where one head is trained"""
    if loss is None:
        return h_token.new_zeros(())
    if loss == "gt":
        return kl_pair(h_token, t, labels, scale)                               # (6), gt
    if loss == "hard":
        return kl_pair(h_token, gather(texts.float()), gather(z_t).argmax(1), scale)  # (6), hard
    return soft_loss(h_token, texts.float(), gather(z_t), scale, tau)           # (6), soft


def train(name, student, teacher, data, mirror, args, run, log):
    """Train one arm by eq. (7). After each epoch, add a row to `log` and write RUN/ARM-last.pt."""
    model, loss, tasks, z_t = student.model, student.arm.loss, student.tasks, None
    side, taught = max(model.side, teacher.side), loss in ("hard", "soft")
    clips = common.Clips(data.train, args.frames, side, train=True, seed=args.seed)
    loader = common.ClipLoader(clips, args.batch_size, args.workers, bad=data.bad)
    optimizer, schedule = make_optimizer(student, args.lr, args.epochs * len(loader))
    parts = {"model_state_dict": model.clip, "fusion_model_state_dict": model.fusion,
             "optimizer": optimizer, "schedule": schedule}
    parts |= {key: part for key, part in student.named_children() if key != "model"}
    path = run / f"{name}-last.pt"
    rows = resume(path, parts) if args.resume and path.exists() else []
    wrapped = nn.parallel.DistributedDataParallel(student) if WORLD > 1 else student
    prompts = model.prompts(data.classes)                                       # (16, K, L)
    text_t = teacher.embed_classes(data.classes) if taught else None            # (16, K, D_T)
    words = [model.prompts(task.labels, task.templates) for task in tasks]      # (P, L_k, L) each
    q = [task.q.float().to(DEVICE) for task in tasks]                           # (N, L_k) each
    scales = [w for name, w in student.named_parameters() if name.endswith("_scale")]
    for epoch, batches in loader.epochs(len(rows), args.epochs):
        began, terms = time.time(), []
        student.train()
        bar = tqdm(batches, f"{name} {epoch + 1}/{args.epochs}", len(loader), False, disable=None)
        for step, batch in enumerate(bar):
            view = view_t = common.training_view(batch, model.size, mirror, args.seed, DEVICE)
            if taught:
                if teacher.size != model.size:
                    view_t = common.training_view(batch, teacher.size, mirror, args.seed, DEVICE)
                z_t = class_logits(teacher, view_t, text_t)                     # (B/W, K)
            draws = [np.random.default_rng([args.seed, *key, 1]).integers(16) for key in batch.key]
            numbers = draws, batch.label, [i for _, i in batch.key]             # (B/W,) each
            draws, own, index = (torch.tensor(x).to(DEVICE, non_blocking=True) for x in numbers)
            labels, index = gather(own), gather(index)                          # (B,)
            rng = np.random.default_rng([args.seed, epoch, step, 3])
            more = token_texts(loss, z_t, prompts, draws, rng)
            said = [texts[rng.integers(len(texts))] for texts in words]         # (L_k, L) each
            with autocast():
                h_token, h_frame, t, scale, texts, logits = wrapped(
                    view, prompts[draws, own], more, torch.cat(said) if said else None)
            h_token, h_frame, t = (gather(x.float()) for x in (h_token, h_frame, t))  # (B, D)
            frame = kl_pair(h_frame, t, labels, scale)
            token = token_loss(loss, h_token, t, labels, texts, z_t, scale, args.tau)
            total = deit_loss(frame, token, args.alpha if loss else 0.)
            spatial = []
            for z, q_k in zip(logits, q, strict=True):
                spatial.append(spatial_loss(gather(z), q_k[index]))
            total_loss(total, spatial, args.weight).backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            for weight in scales:
                weight.data.clamp_(max=math.log(100))
            cosine = F.cosine_similarity(h_token, h_frame).mean()
            terms.append(torch.stack([frame, token, cosine, *spatial]).detach())
        row = {"arm": name, "epoch": epoch + 1}
        names = ["frame", "token", "cosine", *(task.name for task in tasks)]
        row.update(zip(names, loader.mean(terms, epoch), strict=True))
        row["clips_per_s"] = len(loader) * loader.order.batch / (time.time() - began)
        keep(row, rows, args.epochs, path, model.about(args.frames), parts)
    log += rows


# ---- testing and measuring -----------------------------------------------------------------------


@torch.no_grad()
def evaluate(student, data, args):
    """Test on every clip by each read-out. -> top-1 of the deployed one; by h_frame, h_token and
    their mean, eq. (8), nan where there is one head"""
    model, hits = student.eval().model, torch.zeros(3, device=DEVICE)
    text = model.embed_classes(data.classes)                                    # (16, K, D)
    clips = common.Clips(data.test, args.frames, model.side)
    loader = common.ClipLoader(clips, args.batch_size, args.workers, bad=data.bad)
    for batch in tqdm(loader, "test", leave=False, disable=None):
        pixels = common.centre_crop(batch.video, model.size, DEVICE)
        with autocast():
            vectors = student.read(pixels)                                      # (B, D) each
        labels = torch.tensor(batch.label, device=DEVICE)
        for n, vector in enumerate(vectors):
            hits[n] += (class_scores(vector.float(), text).argmax(1) == labels).sum()
    if WORLD > 1:
        dist.all_reduce(hits)
    token, frame, mean = (hits / len(clips)).tolist()
    if student.arm.second == "frame":
        return {"top1": frame, "frame": frame, "token": math.nan, "mean": math.nan}
    return {"top1": mean, "frame": frame, "token": token, "mean": mean}


def milliseconds(function):
    """Median time of a call whose result comes to the CPU, so that a GPU has finished"""
    return 1e3 * float(np.median(timeit.repeat(function, repeat=23, number=1)[3:]))  # 3: warm-up


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


@torch.no_grad()
def cost(model, T):
    """What a clip of T frames costs, its texts cached, and clips/s of a batch"""
    many = torch.rand(32 if GPU else 4, T, 3, model.size, model.size, device=DEVICE)
    with autocast():
        ms = milliseconds(lambda: model.encode_video(many[:1]).cpu())
        rate = 1e3 * len(many) / milliseconds(lambda: model.encode_video(many).cpu())
    return {"M": model.millions(), "GMAC": model.gmac(T), "ms": ms, "clips/s": rate}


@torch.no_grad()
def attention(model, pixels):
    """How much the token attends to each frame of a clip (1, T, 3, S, S), mean over layers and
    heads -> (T,)"""
    x, weights = model.fusion.sequence(model.encode_frames(pixels)), []
    for block in model.fusion.transformer.resblocks:
        n = block.ln_1(x)
        weights.append(block.attn(n, n, n)[1][0, 0, 1:])
        x = block(x)
    looks = torch.stack(weights).mean(0)
    return looks / looks.sum()


@torch.no_grad()
def draw_attention(name, model, data, T, path):
    """A picture of eight test clips: what an arm says, and how much its token attends to frames"""
    clips, texts = common.Clips(data.test, T, model.side), {}
    text = model.embed_classes(data.classes)                                    # (16, K, D)
    for i in range(0, len(clips), max(1, len(clips) // 8))[:8]:
        pixels = common.centre_crop([clips[0, i].video], model.size, DEVICE)
        truth = data.classes[data.test[i][1]]
        said = data.classes[class_scores(model.encode_video(pixels), text).argmax()]
        texts[i] = [(0, 0, f"truth: {truth}", "black"),
                    (40, 0, f"{name} says {said}", "green" if said == truth else "red")]
        for t, share in enumerate(attention(model, pixels).tolist()):
            texts[i].append((10 * t, 1, f"{share:.3f}", "black"))
    texts[0] += [
        (0, -3, f"{data.name}, arm {name}. Green: right, red: wrong. Numbers: token's", "black"),
        (0, -2, f"attention to a frame, mean over layers, heads; uniform {1 / T:.3f}", "black")]
    common.contact_sheet(data.test, texts, T, path)


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
    add("--frames", type=int, default=8, help="T, frames per clip")
    add("--teacher", default="toy-large", help="NAME[:WEIGHTS] of its backbone; trained first")
    add("--teacher-checkpoint", metavar="FILE", help="a teacher that is trained: an ActionCLIP")
    add("--student", default="toy-small", help="NAME[:WEIGHTS] of its backbone")
    add("--arms", nargs="+", choices=ARMS, default=["one-head", "gt", "soft"], help="students")
    add("--grid", nargs="?", const="gt", choices=("gt", "hard", "soft"), help="instead: the three "
        "techniques one by one, and together; two heads by this loss, alone: gt")
    add("--alpha", type=float, default=.5, help="of eq. (7)")
    add("--tau", type=float, default=1., help="of eq. (6)")
    add("--lambda", type=float, default=.5, dest="weight", help="of eq. (5)")
    add("--epochs", type=int, default=50, help="as ActionCLIP; 6 for toy clips")
    add("--batch-size", type=int, default=32, help="of all processes together")
    add("--lr", type=float, default=5e-6, help="of CLIP's towers, as ActionCLIP; 4e-4 for toys")
    add("--compile", action="store_true", help="torch.compile the image towers")
    add("--seed", type=int, default=0, help="of initial weights, order and augmentation")
    add("--seeds", type=int, nargs="*", default=[], help="one run each, and mean, as --split all")
    add("--out", default="runs", help="folder for runs and the cache")
    add("--resume", action="store_true", help="go on with a run that was killed")
    add("--workers", type=int, default=max(1, min(16, os.cpu_count() - 1)), help="that decode")
    args, _ = parser.parse_known_args(argv)
    if args.data == "toy":
        parser.set_defaults(epochs=6)
    if args.student.startswith("toy-"):
        parser.set_defaults(lr=4e-4)
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.frames) < 1 or args.frames > 77:
        parser.error("--epochs, --batch-size take 1 or more, --frames 1 to 77")
    if min(args.seed, args.shots, args.workers) < 0 or not 0 <= args.label_noise <= 1:
        parser.error("--seed, --shots, --workers take 0 or more, --label-noise 0 to 1")
    if not (0 < args.lr < math.inf and 0 < args.tau < math.inf and 0 <= args.weight < math.inf):
        parser.error("--lr, --tau take more than 0, --lambda 0 or more")
    if not 0 <= args.alpha <= 1:
        parser.error("--alpha takes 0 to 1")
    return args


def build(name, arm, tasks, args, cache):
    """-> the TwoHeaded network of an arm"""
    torch.manual_seed(args.seed)  # the arms do not depend on each other
    spec, file = args.student, None
    if name in ("teacher", "base"):
        spec, file = args.teacher, args.teacher_checkpoint
    model = common.build_action_clip(spec, cache=cache, token=arm.second == "token",
                                     checkpoint=file)
    if file and model.frames not in (None, args.frames):
        raise common.BadInput(f"--teacher-checkpoint {file} has {model.frames} frames, and the "
                              f"student sees the same: say --frames {model.frames}")
    if args.compile:
        torch.compiler.config.recompile_limit = 64  # arms x batch sizes x training, testing
        model.encode_frames = torch.compile(model.encode_frames)
    return TwoHeaded(model, arm, tasks).to(DEVICE)


def read_targets(data, args):
    """The tasks that spatial_kd.py has labelled these clips for. Raises BadInput."""
    path = Path(args.out) / "cache" / f"{data.name}-{data.digest():08x}-targets.pt"
    if not path.exists():
        keys = "data", "split", "seed", "frames", "unseen", "shots", "out"
        flags = [f"--{key} {vars(args)[key]}" for key in keys]
        flags += ["--allow-missing"] if args.allow_missing else []
        raise common.BadInput(f"--grid: {path} is missing; make it with: python spatial_kd.py "
                              f"--label-only {' '.join(flags)}")
    saved = common.read_saved(path, "tasks", "labeller", "frames")
    tasks = [common.Task(**task) for task in saved["tasks"]]
    args.targets = saved["labeller"], saved["frames"], [task[:3] for task in tasks]  # of the run
    return tasks


def main(argv=None):
    """Train a teacher and its students, test and measure them. -> {arm: numbers}"""
    args, began = parse(argv), time.time()
    if args.split == "all" or args.seeds:
        return common.several(main, argv, args.split, args.seeds or [args.seed])
    if args.student.startswith("toy-"):
        torch.set_num_threads(1)  # small networks run faster on one thread
    if WORLD > 1:
        dist.init_process_group("nccl" if GPU else "gloo", timeout=datetime.timedelta(hours=12),
                                device_id=DEVICE if GPU else None)  # 12: process 0 may label
    cache, toys = Path(args.out) / "cache", "toy-diagonals" if args.unseen else "toy"
    data = common.read_data(args.data, args.split, args.allow_missing, cache, toys)
    tests = common.split_unseen(data, args.unseen, args.seed)
    data, tasks = common.few_shot(tests[""], args.shots, args.seed), []
    arms = {"teacher": ONE_HEAD, **{name: ARMS[name] for name in args.arms}}
    if args.grid:
        tasks = read_targets(data, args)
        arms = {"base": ONE_HEAD, "+swap": ONE_HEAD,
                "+swap+spatial": Arm(None, "frame", spatial=True),
                "+swap+two-heads": Arm(args.grid), "all-three": Arm(args.grid, spatial=True)}
    data = tests[""] = common.noisy_labels(data, args.label_noise, args.seed)
    students = {name: build(name, arm, tasks, args, cache) for name, arm in arms.items()}
    flips = all(all(common.mirrors(task.labels)) for task in tasks)
    mirror = [may and flips for may in common.mirrors(data.classes)]  # the same in every arm
    run = run_folder("deit_video", data, args)
    if RANK == 0:
        print(f"{data}; {WORLD} process(es), {MACHINE}", flush=True)

    first, *_ = arms  # the teacher, or the base of the grid
    teacher, results, log = students[first].model, {}, []
    for name, student in students.items():
        if name != first or not args.teacher_checkpoint:
            train(name, student, teacher, data, mirror, args, run, log)
        results[name] = {"arm": name, "backbone": student.model.name}
        for group, part in tests.items():
            numbers = evaluate(student, part, args)
            results[name][f"top1{group}"] = numbers["top1"]
            if not group:
                results[name] |= numbers
        if name == first:
            teacher.eval().requires_grad_(False)  # frozen: used as the teacher from here on
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK == 0:
        report(students, results, tests, args, log, run, began)
    return results


def report(students, results, tests, args, log, run, began):
    """Measure, with nothing else running; write record and pictures; print the table and RESULT."""
    data, scores, dots, heads = tests[""], [], {}, ("frame", "token", "mean")
    for name, student in students.items():
        results[name] |= cost(student.eval().model, args.frames)
        scores += [f"{name}{group}={results[name]['top1' + group]:.4f}" for group in tests]
        if student.arm.second != "frame":
            dots[name] = [(n, results[name][head]) for n, head in enumerate(heads)]
    chances = [f"top1{group} 1/{len(part.classes)}" for group, part in tests.items()]
    print(f"{table(list(results.values()))}\nframe, token, mean: top-1 of each read-out; M: "
          f"million parameters without the word table; GMAC, ms: of a clip, texts cached.\n"
          f"{len(data.test)} test clips; chance: {', '.join(chances)}")
    if args.grid:
        small, base = results["all-three"], results["base"]
        ratios = [f"{key} x{small[key] / base[key]:.2f}" for key in ("M", "GMAC", "ms", "clips/s")]
        print(f"all three / base: {', '.join(ratios)}; top-1 {small['top1'] - base['top1']:+.3f}")
    for note in data.notes():
        print(f"NOTE {note}")
    write_record(run / "run.json", args, data, results, log, began)
    if dots:
        title = f"{data.name}, {len(data.test)} test clips: arms with two heads"
        common.plot({title: dots}, "read-out", "top-1", run / "readouts.png", heads)
    shown = [name for name, student in students.items() if student.arm.second == "token"]
    if shown:
        draw_attention(shown[-1], students[shown[-1]].model, data, args.frames, run / "run.png")
    print(f"record, checkpoints, pictures: {run}\nRESULT deit_video data={data.name} "
          f"split={args.split} seed={args.seed} {' '.join(scores)} "
          f"seconds={time.time() - began:.0f}")


if __name__ == "__main__":
    common.run(main)
