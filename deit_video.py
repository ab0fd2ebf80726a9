"""Teach a small ActionCLIP by a large one as DeiT does, with a token of its own; and all three.

Technique 3 of Frans Huntink's master thesis, "Bridging the gap: Threefold knowledge distillation
for language-enabled action recognition models operating in real-time scenarios" (Utrecht, 2024):
DeiT (Touvron et al., ICML 2021, arXiv 2012.12877) for video, on ActionCLIP (Wang, Xing, Liu 2021,
arXiv 2109.08472). Class scores of a large ActionCLIP go into a second head of a small one.

The idea. DeiT gives a transformer a second token with a head of its own, which follows the teacher,
while the class head follows the labels. ActionCLIP's temporal transformer has no class token: its
head is the mean over frames. So a learned token goes in front of the frame embeddings: a "token-
based" and a "frame-based perspective", learned at once. The abstract reports a significant gain,
caused by the two heads and not by the teacher. The arms take these apart: gt has two heads and no
teacher; teacher-on-frame a teacher and one head; two-frame-heads two heads (the second a linear
layer on h_frame, from the identity) and no token.

For frames f (B, T, D) of B clips, token and positions p, texts t, labels y, s = exp(logit_scale):
  (1) kl_pair       1/2 [KL(G || softmax_rows(s v^ t^')) + KL(G || softmax_rows(s t^ v^'))],
                    G = softmax_rows(10 [y_i = y_k]); KL summed over a row, mean over B; no tau
  (2) class_scores  p(class) = 1/P sum_p softmax(100 v^ . t^_p,class), the rule of evaluation
  (3) two_heads     z = transformer([token + p_0; f_1 + p_1; ...; f_T + p_T]),
                    h_frame = mean_t(z_t + f_t), h_token = z_0 + mean_t f_t
  (6) token_loss    gt: kl_pair(h_token, t(y), y).  hard: the same with the teacher's argmax for y.
                    soft: tau^2 KL(softmax(z_T / tau) || softmax(s h^_token t^' / tau)) over all K
                    classes, summed over K, mean over B; z_T = s_T mean_p v^_T . t^_p,class. DeiT's
                    own code divides by the number of elements, B K, so it is K times weaker
  (7) deit_loss     L = (1 - alpha) kl_pair(h_frame, t(y), y) + alpha token_loss
  (8) one_vector    (h^_token + h^_frame) / 2: its logits are the mean of the two heads' logits, so
                    what is deployed is one embedding, and as open to new words as ActionCLIP's
x^ is x / |x|; v, t, h (B, D); _T teacher; (4), (5) are those of spatial_kd.py, used in the grid.

  python deit_video.py                        toy clips, teacher and four arms, 4 minutes on 2 CPUs
  python deit_video.py --arms one-head gt hard soft two-frame-heads teacher-on-frame
  python deit_video.py --grid thesis          base, +swap, +swap+spatial, +swap+two-heads, all three
  python deit_video.py --data HMDB51 --teacher ViT-B-16 --teacher-checkpoint vit-b-16-8f.pt \\
      --student TinyCLIP-ViT-40M-32-Text-19M:TinyCLIP-ViT-40M-32-Text-19M-LAION400M.pt

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0, caches included):
RESULT deit_video data=toy split=1 seed=0 teacher=0.9800 one-head=0.9367 gt=0.9133 hard=0.9267
  soft=0.7967 seconds=174

Differs from the thesis, of which the abstract was at hand, and no code was published:
 1. Eqs. (3), (6)-(8) are our reading of it: alpha .5 and tau 3, as in DeiT (toy CLIPs: tau 1); the
    residual mean_t f_t, without which the token starts far from the texts; no linear classifiers.
 2. s_T is the teacher's own exp(logit_scale), 100 for CLIP; its scores average 16 templates before
    the softmax. The student's texts in `soft` are under one template, drawn per step.
 3. The spatial heads of all three read the vector of eq. (8).
 4. Eq. (1) is trained as in tinyclip_swap.py, with the same differences from ActionCLIP's code.
"""
import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

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
from tqdm import tqdm

from common import (
    BadInput,
    Clips,
    augment,
    build_action_clip,
    centre_crop,
    clip_loader,
    mirrors,
    note_bad,
    read_data,
    split_unseen,
)

# ---- the method: eqs. (1), (3), (6)-(8) ----------------------------------------------------------


def kl_pair(video, text, labels, scale):
    """ActionCLIP's loss, eq. (1): texts of the same class are equally right. -> scalar"""
    B, D = video.shape
    v, t = F.normalize(video, dim=-1), F.normalize(text, dim=-1)                # (B, D)
    logits = scale * v @ t.T                                                    # (B, B)
    G = (10 * (labels[:, None] == labels).to(logits)).softmax(1)                # (B, B)
    return (F.kl_div(logits.log_softmax(1), G, reduction="batchmean")           # (1), v to t
            + F.kl_div(logits.T.log_softmax(1), G, reduction="batchmean")) / 2  # (1), t to v


def two_heads(f, token, positions, transformer):
    """Both read-outs, eq. (3). f (B, T, D), token (1, D) with its position, positions (>= T, D)
    -> h_token (B, D), h_frame (B, D); with no token, (0, D), h_frame is ActionCLIP's output."""
    (B, T, D), n = f.shape, len(token)
    x = torch.cat([token.expand(B, n, D), f + positions[:T]], 1)                # (B, 1 + T, D)
    z = transformer(x)                                                          # (B, 1 + T, D)
    return z[:, :n].sum(1) + f.mean(1), (z[:, n:] + f).mean(1)                  # (B, D)        (3)


def token_loss(kind, h, text, target, scale, tau):
    """Eq. (6) for h (B, D). gt, hard: text (B, D) of the classes target (B,), which are the true
    ones or the teacher's; soft: text (K, D), target (B, K), the teacher's logits. -> scalar"""
    if kind in ("gt", "hard"):
        return kl_pair(h, text, target, scale)                                  # ()            (6)
    logits = scale * F.normalize(h, dim=-1) @ F.normalize(text, dim=-1).T       # (B, K)
    return tau ** 2 * F.kl_div((logits / tau).log_softmax(1), (target / tau).softmax(1),
                               reduction="batchmean")                           # ()            (6)


def deit_loss(frame, token, alpha):
    """Both losses, scalars, eq. (7)."""
    loss = (1 - alpha) * frame + alpha * token                                  # ()            (7)
    return loss


def one_vector(h_token, h_frame):
    """What is deployed, eq. (8). Two (B, D) -> (B, D)"""
    h = F.normalize(h_token, dim=-1) + F.normalize(h_frame, dim=-1)             # (B, D)
    return h / 2                                                                # (B, D)        (8)


# ---- the rest is plumbing: training, testing, measuring, keeping record --------------------------


class Arm(NamedTuple):
    """kind: of eq. (6), None: h_frame alone. second: what it works on, the `token`'s read-out, a
    `linear` layer on h_frame, or the `frame` read-out itself. swap: the small backbone or the large
    one. spatial: with technique 2's objectives."""
    kind: str | None
    second: str = "token"
    swap: bool = True
    spatial: bool = False


ARMS = {"one-head": Arm(None, "frame"), "gt": Arm("gt"), "hard": Arm("hard"), "soft": Arm("soft"),
        "two-frame-heads": Arm("gt", "linear"), "teacher-on-frame": Arm("soft", "frame")}
GRID = {"base": Arm(None, "frame", swap=False), "+swap": Arm(None, "frame"),
        "+swap+spatial": Arm(None, "frame", spatial=True), "+swap+two-heads": Arm("soft"),
        "all-three": Arm("soft", spatial=True)}
TEACHER = {"teacher": Arm(None, "frame", swap=False)}
THRESHOLD = .2  # of q, above which a label of a multi-label task counts as there

def class_scores(video, text):
    """The rule of evaluation, eq. (2). video (B, D), text (16, K, D) -> probabilities (B, K)"""
    (B, D), (P, K, _) = video.shape, text.shape
    v, t = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
    logits = 100 * torch.einsum("bd,pkd->bpk", v, t)                            # (B, P, K)
    return logits.softmax(-1).mean(1)                                           # (B, K)        (2)


def spatial_loss(logits, targets, confidence, floor, multi_label=False):
    """One objective, eq. (4), over the clips of which the labeller was sure (none: 0).

    logits, targets (B, L), confidence (B,) -> scalar"""
    B, L = logits.shape
    if multi_label:
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    else:
        each = F.kl_div(logits.log_softmax(1), targets, reduction="none").sum(1)
    sure = confidence >= floor                                                  # (B,)
    return each[sure].sum() / sure.sum().clamp(min=1)                           # ()            (4)


def total_loss(action, spatial, weight):
    """The action, a scalar, and lambda times the mean of the tasks, a list of scalars, eq. (5)."""
    mean = sum(spatial) / max(1, len(spatial))                                  # (), or no task: 0
    return action + weight * mean                                               # ()            (5)


class Task(NamedTuple):
    """A spatial objective: its L labels, the sentences they are put into, whether several may be
    true at once, and for N clips q (N, L) and confidence (N,), max(q) of the labeller."""
    name: str
    labels: list
    templates: list
    multi_label: bool
    q: torch.Tensor = None
    confidence: torch.Tensor = None


class SpatialHeads(nn.Module):
    """A head per task on the video vector, compared with the texts of its labels: eq. (4)'s logits
    s_k h_k(v)^ t_k^'. It starts as the identity, with the student's own scale. Where several labels
    may be true the average label is the zero of the sigmoid, since cosines of CLIP are all > 0."""

    def __init__(self, D, tasks, scale):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(D, D) for _ in tasks)
        self.log_scale = nn.Parameter(torch.full((len(tasks),), math.log(scale)))
        self.multi_label = [task.multi_label for task in tasks]
        for head in self.heads:
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, v, texts):
        """v (B, D), texts (L_k, D) per task -> logits (B, L_k) per task"""
        out = []
        with torch.autocast(v.device.type, enabled=False):
            for head, scale, text, several in zip(self.heads, self.log_scale.exp(), texts,
                                                  self.multi_label, strict=True):
                h, t = F.normalize(head(v.float()), dim=-1), F.normalize(text.float(), dim=-1)
                cosine = h @ t.T                                                # (B, L_k)
                out.append(scale * (cosine - several * cosine.mean(1, keepdim=True)))
        return out


class TwoHeaded(nn.Module):
    """An ActionCLIP, .model, with what its arm needs beside it."""

    def __init__(self, model, arm, tasks):
        super().__init__()
        self.model, self.arm, self.tasks = model, arm, tasks if arm.spatial else []
        self.linear = nn.Linear(model.width, model.width) if arm.second == "linear" else None
        if self.linear:
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        self.heads = SpatialHeads(model.width, tasks, model.clip.logit_scale.exp().item()) \
            if self.tasks else None

    def read(self, video):
        """(B, T, 3, S, S) in 0..1 -> h_token (or what stands in for it), h_frame, (B, D) each"""
        f, fusion = self.model.encode_frames(video), self.model.fusion
        token = f.new_zeros(0, f.shape[-1]) if fusion.token is None else \
            (fusion.token + fusion.token_position)[None]
        h_token, h_frame = two_heads(f, token, fusion.frame_position_embeddings.weight,
                                     fusion.transformer)
        if self.arm.second == "token":
            return h_token, h_frame
        return self.linear(h_frame) if self.linear else h_frame, h_frame

    def forward(self, video, tokens, more=None, words=None):
        """-> h_token, h_frame, t (B, D), s, the texts of `more`, and the spatial tasks' logits"""
        (h_token, h_frame), encode = self.read(video), self.model.encode_text
        sizes = [len(task.labels) for task in self.tasks]
        logits = self.heads(one_vector(h_token, h_frame), encode(words).split(sizes)) \
            if self.tasks else []
        return (h_token, h_frame, encode(tokens), self.model.clip.logit_scale.exp(),
                None if more is None else encode(more), logits)


def read_targets(path, data):
    """The tasks in a targets.pt of spatial_kd.py, made for these clips. Raises BadInput."""
    try:
        held = torch.load(path, weights_only=True)
        names, tasks = held["clips"], [Task(**task) for task in held["tasks"]]
    except Exception as error:
        raise BadInput(f"--spatial-targets {path}: no file of targets ({type(error).__name__}); "
                       f"spatial_kd.py --label-only writes one") from error
    if names != clip_names(data.train):
        raise BadInput(f"--spatial-targets {path} holds targets of other clips ({len(names)}, here "
                       f"{len(data.train)}); make them with spatial_kd.py --label-only")
    return tasks


def clip_names(clips):
    """By these a file of targets knows its clips: CLASS/NAME and size in bytes."""
    return [f"{Path(path).parent.name}/{Path(path).name} {os.path.getsize(path)}"
            for path, _ in clips]


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


@torch.no_grad()
def class_logits(model, videos, text, device):
    """The teacher's z_T for videos (B, T, 3, S, S), texts (16, K, D) -> (B, K)"""
    with autocast(device):
        v = F.normalize(model.encode_video(videos).float(), dim=-1)             # (B, D)
    text = F.normalize(text, dim=-1).mean(0)                                    # (K, D)
    return model.clip.logit_scale.exp() * v @ text.T


def score_clips(teacher, data, args, device, bad):
    """z_T of all training clips in the test view, once -> (N, K). In data.train another clip takes
    the place of one that cannot be decoded."""
    clips, held = Clips(data.train, args.teacher_frames, side(teacher)), []
    text = embed_classes(teacher, data.classes, device)
    scores = torch.zeros(len(clips), len(data.classes), device=device)
    for batch in tqdm(clip_loader(clips, args.batch_size, args.workers), "teacher's scores",
                      leave=False, disable=None):
        note_bad(bad, batch, clips)
        index = [i for (_, i), v in zip(batch.key, batch.video, strict=True) if v is not None]
        if index:
            videos = [video.to(device) for video in batch.video if video is not None]
            scores[index] = class_logits(teacher, centre_crop(videos, teacher.size), text, device)
        held += index
    for i in set(range(len(clips))) - set(held):
        data.train[i], scores[i] = data.train[held[i % len(held)]], scores[held[i % len(held)]]
    return scores


def train(name, student, teacher, data, mirror, args, place, run, log, bad):
    """Train one arm by eq. (7). Keeps RUN/ARM-last.pt; adds a row per epoch to `log`, and to `bad`
    {path: reason} clips that could not be decoded. teacher: None, a model, or z_T (N, K)."""
    device, rank, world = place
    model, arm, tasks = student.model, student.arm, student.tasks
    spec, frames = (args.student, args.frames) if arm.swap else (args.teacher, args.teacher_frames)
    toy, taught = spec.startswith("toy-"), arm.kind in ("hard", "soft")
    live = taught and isinstance(teacher, nn.Module)  # it looks at what the student looks at
    apart = live and args.teacher_frames != frames
    clips = Clips(data.train, frames, max(side(m) for m in [model, *[teacher] * live]),
                  train=True, seed=args.seed, jitter=not args.cache_teacher)
    batch_size = min(args.batch_size, len(clips)) // world * world
    loader = clip_loader(clips, batch_size, args.workers, rank, world)
    loader_t = clip_loader(Clips(data.train, args.teacher_frames, side(teacher), train=True,
                                 seed=args.seed), batch_size, args.workers, rank, world) \
        if apart else None
    optimizer, schedule = make_optimizer(student, args.lr or (4e-4 if toy else 5e-6),
                                         args.epochs * len(loader))
    path = run / f"{name}-last.pt"
    if args.resume and path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        model.clip.load_state_dict(saved["model_state_dict"])
        model.fusion.load_state_dict(saved["fusion_model_state_dict"])
        student.load_state_dict(saved["beside"], strict=False)
        log += saved["rows"]
        if len(saved["rows"]) < args.epochs:
            optimizer.load_state_dict(saved["optimizer_state"])
            schedule.load_state_dict(saved["schedule_state"])
    wrapped = torch.nn.parallel.DistributedDataParallel(student) if world > 1 else student
    prompts = model.prompts(data.classes).to(device)                            # (16, K, ...)
    text_t = embed_classes(teacher, data.classes, device) if live else None     # (16, K, D_T)
    words = [[model.tokenizer([template.format(label) for label in task.labels])
              for template in task.templates] for task in tasks]
    q, confidence = ([task[at].float().to(device) for task in tasks] for at in (4, 5))

    def see(batch, size):
        return view(batch, size, mirror, toy, args.seed, device) if not args.cache_teacher else \
            centre_crop([video.to(device) for video in batch.video], size)

    for epoch in range(sum(row["arm"] == name for row in log), args.epochs):
        began, sums = time.time(), torch.zeros(4 + len(tasks), device=device)
        for order in [loader, *[loader_t] * apart]:
            order.batch_sampler.epoch = epoch
        student.train()
        pairs = zip(loader, loader_t or itertools.repeat(None), strict=False)
        for step, (batch, batch_t) in enumerate(tqdm(
                pairs, f"{name} {epoch + 1}/{args.epochs}", len(loader), False, disable=None)):
            note_bad(bad, batch, clips)
            draws = [np.random.default_rng([args.seed, *key, 1]).integers(16) for key in batch.key]
            rng = np.random.default_rng([args.seed, epoch, step, 3])
            labels = gather(torch.tensor(batch.label, device=device))           # (B,)
            index = torch.tensor([i for _, i in batch.key], device=device)
            z_t = class_logits(teacher, see(batch_t or batch, teacher.size), text_t, device) \
                if live else teacher[index] if taught else None                 # (B/W, K)
            more = prompts[draws, z_t.argmax(1)] if arm.kind == "hard" else \
                prompts[rng.integers(16)] if arm.kind == "soft" else None
            said = torch.cat([texts[rng.integers(len(texts))] for texts in words]).to(device) \
                if tasks else None
            with autocast(device):
                h_token, h_frame, t, scale, texts, logits = wrapped(
                    see(batch, model.size), prompts[draws, batch.label], more, said)
            h_token, h_frame, t = (gather(x.float()) for x in (h_token, h_frame, t))  # (B, D)
            frame = kl_pair(h_frame, t, labels, scale)
            token = agree = torch.zeros((), device=device)
            if taught:
                z_t = gather(z_t)                                               # (B, K)
                nearest = (F.normalize(one_vector(h_token, h_frame), dim=-1)
                           @ F.normalize(t, dim=-1).T).argmax(1)
                agree = (labels[nearest] == z_t.argmax(1)).float().mean()
            if arm.kind:
                target = {"gt": labels, "hard": z_t.argmax(1) if taught else None, "soft": z_t}
                texts = {"gt": t, "hard": texts, "soft": texts}[arm.kind].float()
                texts = gather(texts) if arm.kind == "hard" else texts
                token = token_loss(arm.kind, h_token, texts, target[arm.kind], scale, args.tau)
            loss, each = deit_loss(frame, token, args.alpha if arm.kind else 0.), []
            if tasks:
                index = gather(index)
                whole = gather(torch.tensor([float(not bad) for bad in batch.bad], device=device))
            for z, task, p, sure in zip(logits, tasks, q, confidence, strict=True):
                p = (p > THRESHOLD).float() if task.multi_label else p
                sure = (whole * sure[index]).where(whole * sure[index] > 0, -1.)  # not read: never
                each.append(spatial_loss(gather(z), p[index], sure, args.floor, task.multi_label))
            total_loss(loss, each, vars(args)["lambda"]).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            with torch.no_grad():
                model.clip.logit_scale.clamp_(max=math.log(100))
                if tasks:
                    student.heads.log_scale.clamp_(max=math.log(100))
                cosine = F.cosine_similarity(h_token, h_frame).mean()
                sums += torch.stack([frame, token, agree, cosine, *each]) / len(loader)
        frame, token, agree, cosine, *each = sums.tolist()
        log.append({"arm": name, "epoch": epoch + 1, "frame": frame, "token": token,
                    "agreement": agree, "cosine": cosine,
                    "spatial": {task.name: x for task, x in zip(tasks, each, strict=True)},
                    "clips_per_s": len(loader) * batch_size / (time.time() - began)})
        if rank:
            continue
        print("{arm:16} epoch {epoch:3}  frame {frame:7.4f}".format(**log[-1])
              + ("  token {token:7.4f}  cosine {cosine:.3f}".format(**log[-1]) if arm.kind else "")
              + (f"  agreement {agree:.3f}" if taught else "")
              + "".join(f"  {task.name} {x:.3f}" for task, x in zip(tasks, each, strict=True))
              + f"  {log[-1]['clips_per_s']:6.1f} clips/s", flush=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        done = epoch + 1 == args.epochs
        save({"model_state_dict": model.clip.state_dict(), "frames": frames,
              "fusion_model_state_dict": model.fusion.state_dict(),
              "quick_gelu": model.clip.quick_gelu, "backbone": spec.partition(":")[0],
              "beside": {key: value for key, value in student.state_dict().items()
                         if not key.startswith("model.")},
              "rows": [row for row in log if row["arm"] == name],
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


@torch.no_grad()
def evaluate(student, data, args, place, bad):
    """Test on every clip by the read-outs frame, token and mean (eq. 8); a clip that cannot be
    decoded goes into `bad` and counts as wrong.

    -> numbers, and {index: class said by the mean} of this process's clips
    """
    device, rank, world = place
    model = student.eval().model
    frames = args.frames if student.arm.swap else args.teacher_frames
    text, said = embed_classes(model, data.classes, device), {}
    hits = torch.zeros(5, device=device)  # frame, token, mean, cosine; clips
    clips = Clips(data.test, frames, side(model))
    loader = clip_loader(clips, args.batch_size, args.workers, rank, world)
    for batch in tqdm(loader, "test", leave=False, disable=None):
        note_bad(bad, batch, clips)
        hits[4] += len(batch.label)
        held = [i for i, video in enumerate(batch.video) if video is not None]
        if held:
            videos = centre_crop([batch.video[i].to(device) for i in held], model.size)
            with autocast(device):
                h_token, h_frame = (h.float() for h in student.read(videos))    # (B, D)
            labels = torch.tensor([batch.label[i] for i in held], device=device)
            for at, h in enumerate((h_frame, h_token, one_vector(h_token, h_frame))):
                top = class_scores(h, text).argmax(1)
                hits[at] += (top == labels).sum()
            hits[3] += F.cosine_similarity(h_token, h_frame).sum()
            said |= {batch.key[i][1]: k for i, k in zip(held, top.tolist(), strict=True)}
    if world > 1:
        dist.all_reduce(hits)
    *found, count = hits.tolist()
    numbers = {key: x / count for key, x in zip(("frame", "token", "mean", "cosine"), found,
                                                strict=True)}
    two = student.arm.second != "frame"
    return {**{key: x if two or key == "frame" else math.nan for key, x in numbers.items()},
            "top1": numbers["mean" if two else "frame"], "clips": int(count)}, said


def infer(model, videos, text, views, device):
    """Videos (B, V*T, 3, S, S) in 0..1, texts (16, K, D) -> (B, K), mean over V windows."""
    with torch.no_grad(), autocast(device):
        v = model.encode_video(videos.unflatten(1, (views, -1)).flatten(0, 1)).float()  # (B*V, D)
    return class_scores(v, text).unflatten(0, (-1, views)).mean(1)


def count_macs(model, frames, device):
    """GMAC to classify a clip, by the ActionCLIP alone; its texts are cached."""
    video = torch.rand(1, frames, 3, model.size, model.size, device=device)
    with FlopCounterMode(display=False) as counter:
        model.eval().encode_video(video)
    return counter.get_total_flops() / 2e9


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


def time_clips(model, data, frames, device):
    """What a clip costs once its texts are cached: ms at batch 1, clips/s."""
    text = embed_classes(model.eval(), data.classes, device)
    batch = 32 if device.type == "cuda" else 4
    one, many = (torch.rand(B, frames, 3, model.size, model.size, device=device)
                 for B in (1, batch))
    return {"ms": median_ms(lambda: infer(model, one, text, 1, device), device), "batch": batch,
            "clips_per_s": batch * 1e3 / median_ms(lambda: infer(model, many, text, 1, device),
                                                   device)}


@torch.no_grad()
def draw_attention(student, data, said, args, device, path):
    """Test clips, and under each frame how much the token looks at it (yellow: mean over layers and
    heads of its attention, the frames' part made to sum to 1) beside the mean's 1 / T (grey)."""
    model, rows, T = student.eval().model, [], args.frames
    clips = Clips(data.test, T, 128)
    for i in sorted(said)[::max(1, len(said) // 8)][:8]:
        video, head = centre_crop([clips[0, i].video], 128), model.fusion
        small = centre_crop([Clips(data.test, T, side(model))[0, i].video.to(device)], model.size)
        x = model.encode_frames(small) + head.frame_position_embeddings.weight[:T]
        x, weights = torch.cat([(head.token + head.token_position)[None, None], x], 1), []
        for block in head.transformer.resblocks:
            n = block.ln_1(x)
            weights.append(block.attn(n, n, n)[1][0, 0, 1:])                    # (T,)
            x = block(x)
        looks = torch.stack(weights).mean(0).cpu()
        row = torchvision.utils.make_grid(video[0], T).mul(255).byte()
        row, left = F.pad(row, (2, 2, 14, 42)), 4 + 130 * torch.arange(T)
        for share, start, colour in ((looks / looks.sum(), 20, "yellow"),
                                     (torch.full((T,), 1 / T), 70, "grey")):
            top = row.shape[1] - 2 - (80 * share).clamp(1, 40)  # half of all is 40 pixels
            row = torchvision.utils.draw_bounding_boxes(row, torch.stack(
                [left + start, top, left + start + 40, torch.full((T,), row.shape[1] - 2.)], 1),
                colors=colour, fill=True)
        k, truth = said[i], data.test[i][1]
        rows.append(torchvision.utils.draw_bounding_boxes(
            row, torch.tensor([[1, 1, row.shape[2] - 2, row.shape[1] - 2]]),
            [f"truth: {data.classes[truth]}   said: {data.classes[k]}"],
            "lime" if k == truth else "red"))
    if rows:
        torchvision.io.write_png(torch.cat(rows, 1), str(path))


def table(results):
    """The arms as text, a row each."""
    lines = [f"{'arm':16} {'backbone':28} {'loss':>4} {'frame':>6} {'token':>6} {'mean':>6} "
             f"{'agree':>6} {'cosine':>6} {'M':>7} {'GMAC':>8} {'ms':>8} {'clips/s':>8}"
             + f" {'unseen':>6} {'of all':>6}" * ("unseen" in next(iter(results.values())))]
    for name, r in results.items():
        lines.append(f"{name:16} {r['backbone']:28} {r['loss'] or '-':>4} {r['frame']:6.3f} "
                     f"{r['token']:6.3f} {r['mean']:6.3f} {r['agreement']:6.3f} {r['cosine']:6.3f} "
                     f"{r['parameters']:7.2f} {r['gmac']:8.3f} {r['ms']:8.2f} "
                     f"{r['clips_per_s']:8.1f}"
                     + "".join(f" {r[key]:6.3f}" for key in ("unseen", "unseen_all") if key in r))
    first = next(iter(results.values()))
    return "\n".join([*lines, f"top-1 of {first['clips']} test clips by read-out; agree: with the "
                      f"teacher; cosine of the two vectors. M: parameters without\nthe word table; "
                      f"ms at batch 1, clips/s at batch {first['batch']}, texts cached."])


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
    add("--unseen", type=int, default=0, metavar="N", help="keep N classes, chosen by the seed, "
        "out of training, and test on them, too (nor may a --teacher-checkpoint know them)")
    add("--frames", type=int, default=8, help="T, frames of a clip that the student sees")
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", default="toy-large", help="NAME[:WEIGHTS] of its backbone")
    add("--teacher-checkpoint", metavar="FILE", help="an ActionCLIP of that backbone, ours or its "
        "authors'; without it the teacher is trained here, as the first arm")
    add("--teacher-frames", type=int, help="frames of a clip that it sees (default: --frames)")
    add("--cache-teacher", action="store_true", help="its scores are computed once, and both see "
        "the fixed crops of the test view: faster, with no augmentation")
    add = parser.add_argument_group("student").add_argument
    add("--student", default="toy-small", help="NAME[:WEIGHTS] of its backbone")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:4], metavar="ARM",
        help=f"of {', '.join(ARMS)}")
    add("--grid", choices=("thesis",), help="the thesis's last chapter instead: all three "
        "techniques, one by one and together")
    add("--alpha", type=float, default=.5, help="weight of the token's loss, eq. (7)")
    add("--tau", type=float, help="temperature of the soft loss, eq. (6) (default: 1 for a toy "
        "teacher, whose scale s_T is about 18; else 3, as in DeiT)")
    add("--spatial-targets", metavar="FILE", help="targets.pt of spatial_kd.py: adds its term to "
        "every arm (with --grid: default that of the same data and seed, made if there is none)")
    add("--lambda", type=float, default=.5, help="of the spatial objectives")
    add("--floor", type=float, default=.3, help="confidence below which a clip's label is not used")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, help="(default: 6 for toy clips, else 50, as ActionCLIP)")
    add("--batch-size", type=int, default=32, help="clips of all processes together")
    add("--lr", type=float, help="of CLIP's towers; what is new has ten times as much (default: "
        "4e-4 for toy CLIPs, else 5e-6, as ActionCLIP)")
    add("--compile", action="store_true", help="torch.compile the image towers")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0)
    add("--out", default="runs", help="folder for records, checkpoints and the cache")
    add("--resume", action="store_true", help="go on with a run that was killed")
    add("--target", type=float, default=0., help="exit 1 if an arm's top-1 is below")
    add("--workers", type=int, default=min(8, max(1, (os.cpu_count() or 1) - 1)))
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = 6 if args.data == "toy" else 50
    if args.tau is None:
        args.tau = 1. if args.teacher.startswith("toy-") else 3.
    args.teacher_frames = args.teacher_frames or args.frames
    if min(args.frames, args.teacher_frames, args.epochs, args.batch_size) < 1 or \
            max(args.frames, args.teacher_frames) > 77:
        parser.error("--frames takes 1 to 77; --epochs and --batch-size take 1 or more")
    if not 0 <= args.alpha <= 1 or args.tau <= 0 or vars(args)["lambda"] < 0:
        parser.error("--alpha takes 0 to 1, --tau more than 0, --lambda 0 or more")
    args.arms = list(dict.fromkeys(args.arms))
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


def spatial_tasks(args, data, rank):
    """The tasks of --spatial-targets, for the grid those of spatial_kd.py's run with the same data,
    split and seed; where that has not been run, it is asked to label the clips. Raises BadInput."""
    if not args.grid and not args.spatial_targets:
        return []
    path = Path(args.spatial_targets or Path(args.out) / "spatial_kd" /
                f"{data.name}-s{args.split}-seed{args.seed}" / "targets.pt")
    if not path.exists() and not args.spatial_targets and not args.teacher.startswith("toy-"):
        raise BadInput(f"--grid: {path} is missing; make it by spatial_kd.py --label-only with the "
                       f"same --data, --split and --seed, and a --labeller that knows real words")
    if not path.exists() and not args.spatial_targets and not rank:
        command = [sys.executable, str(Path(__file__).with_name("spatial_kd.py")), "--label-only",
                   "--data", args.data, "--split", args.split, "--frames", args.frames, "--seed",
                   args.seed, "--out", args.out, "--unseen", args.unseen,
                   *["--allow-missing"] * args.allow_missing]
        print(f"{path} is missing: running {' '.join(map(str, command[1:]))}", flush=True)
        alone = {key: value for key, value in os.environ.items() if key not in
                 ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
        if subprocess.run(list(map(str, command)), env=alone).returncode:
            raise BadInput("--grid: spatial_kd.py could not label the clips; its message is above")
    return read_targets(path, data)


def main(argv=None):
    """Train a teacher and its students, test and measure them. -> {arm: numbers}"""
    args, began = parse(argv), time.time()
    device, rank, world = place = find_place()
    if args.student.startswith("toy-"):  # threads that wait for decoding cost more than they bring
        spare = max(1, (os.cpu_count() or 1) - args.workers)
        torch.set_num_threads(min(torch.get_num_threads(), spare))
    cache = Path(args.out) / "cache"
    if rank:
        dist.barrier()  # process 0 goes first and fills the cache
    data = read_data(args.data, args.split, args.allow_missing, cache,
                     "toy-diagonals" if args.unseen else "toy")
    data, opened = split_unseen(data, args.unseen, args.seed)
    bad = {"training": {}, "test": {}}  # {path: reason} of clips that cannot be decoded
    run = Path(args.out) / "deit_video" / f"{data.name}-s{args.split}-seed{args.seed}"
    record = start_record(args, run)
    arms = GRID if args.grid else TEACHER | {
        name: ARMS[name]._replace(spatial=bool(args.spatial_targets)) for name in args.arms}
    specs = {name: args.student if arm.swap else args.teacher for name, arm in arms.items()}
    first = next(iter(arms))  # the teacher
    if args.teacher_checkpoint:
        specs[first] = f"{args.teacher.partition(':')[0]}:{args.teacher_checkpoint}"
    for spec in dict.fromkeys(specs.values()):
        build_action_clip(spec, cache=cache)  # a mistake shows before anything is trained
    tasks = spatial_tasks(args, data, rank)
    if world > 1 and not rank:
        dist.barrier()
    if min(args.batch_size, len(data.train)) < world:
        raise BadInput(f"--batch-size {args.batch_size}, {len(data.train)} training clips: too few "
                       f"for {world} processes")
    if not rank:
        run.mkdir(parents=True, exist_ok=True)
        given = [Path(spec.partition(":")[2]).resolve() for spec in specs.values()]
        for old in [] if args.resume else run.glob("*-last.pt"):
            if old.resolve() not in given:  # the teacher may come from the run before
                old.unlink()
        (run / "run.json").write_text(json.dumps(record, indent=1))
        print(f"deit_video.py on {machine()}, {world} process(es), torch {torch.__version__}, "
              f"seed {args.seed}\n{data.name}, split {args.split}: {len(data.classes)} classes, "
              f"{len(data.train)} training clips, {len(data.test)} test clips", flush=True)
        if opened:
            print(f"held out of training, by seed {args.seed}: "
                  f"{', '.join(opened['unseen'].classes)}", flush=True)
    sides_told = not all(mirrors([label for task in tasks for label in task.labels]))
    mirror = [may and not sides_told for may in mirrors(data.classes)]

    results, answers, students, log, teacher = {}, {}, {}, [], None
    for name, arm in arms.items():
        torch.manual_seed(args.seed)  # the arms do not depend on each other
        model = build_action_clip(specs[name], cache=cache, token=arm.second == "token")
        student = students[name] = TwoHeaded(model, arm, tasks).to(device)
        frames = args.frames if arm.swap else args.teacher_frames
        gmac = count_macs(model, frames, device)
        if args.compile:
            torch.compiler.config.recompile_limit = 64  # arms x batch sizes x training, testing
            model.encode_frames = torch.compile(model.encode_frames)
        if name != first or not args.teacher_checkpoint:
            train(name, student, teacher, data, mirror, args, place, run, log, bad["training"])
        numbers, answers[name] = evaluate(student, data, args, place, bad["test"])
        numbers |= {group: evaluate(student, part, args, place, bad["test"])[0]["top1"]
                    for group, part in opened.items()}
        same = [answers[first][i] == k for i, k in answers[name].items() if i in answers[first]]
        results[name] = {
            "backbone": specs[name].partition(":")[0], "loss": arm.kind, **numbers, "gmac": gmac,
            "agreement": sum(same) / max(1, len(same)), "parameters": sum(
                w.numel() for key, w in model.named_parameters() if "token_embedding" not in key
                and key != "clip.token_embedding.weight") / 1e6}
        if name == first:
            teacher = model.eval().requires_grad_(False)  # from here on it only teaches
            if args.cache_teacher and any(a.kind in ("hard", "soft") for a in arms.values()):
                teacher = score_clips(teacher, data, args, device, bad["training"])
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return results

    for name, student in students.items():  # one after the other, with nothing else running
        frames = args.frames if arms[name].swap else args.teacher_frames
        results[name] |= time_clips(student.model, data, frames, device)
    record |= {"results": results, "missing": data.missing, "bad": bad,
               "unseen": opened["unseen"].classes if opened else [],
               "seconds": time.time() - began}
    (run / "run.json").write_text(json.dumps(record, indent=1))
    shown = [name for name, arm in arms.items() if arm.second == "token"]
    if shown:
        draw_attention(students[shown[-1]], data, answers[shown[-1]], args, device, run / "run.png")
    print(table(results))
    if opened:
        print("chance: seen {:.3f}, unseen {:.3f}, unseen among all {:.3f}".format(
            *(1 / len(part.classes) for part in (data, *opened.values()))))
    trained = {label for _, label in data.train}
    untrained = [name for i, name in enumerate(data.classes) if i not in trained]
    for names, what in ((data.missing, "listed clips are missing"),
                        (untrained, "classes have no training clip"),
                        (list(bad["training"]), "training clips cannot be decoded"),
                        (list(bad["test"]), "test clips cannot be decoded and count as wrong")):
        if names:
            print(f"NOTE {len(names)} {what}, first {names[0]}")
    print(f"record, checkpoints, pictures: {run}\n"
          f"RESULT deit_video data={data.name} split={args.split} seed={args.seed} "
          + " ".join(f"{name}={r['top1']:.4f}"
                     + "".join(f" {name}_{group}={r[group]:.4f}" for group in opened)
                     for name, r in results.items())
          + f" seconds={time.time() - began:.0f}")
    if any(r["top1"] < args.target for r in results.values()):
        sys.exit(1)
    return results


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.stderr.write(f"deit_video.py: {error}\n")
        sys.exit(2)
