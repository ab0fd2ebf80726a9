"""Train ActionCLIP on what a clip does and on what its frames show, as a frozen CLIP sees them.

Technique 2 of Frans Huntink's master thesis, "Bridging the gap: Threefold knowledge distillation
for language-enabled action recognition models operating in real-time scenarios" (Utrecht, 2024), on
ActionCLIP (Wang, Xing, Liu 2021, arXiv 2109.08472). From an image CLIP into a video ActionCLIP.

The idea. Fine-tuning on a few actions lets a model forget what else a frame tells: the place, the
people, the things. The thesis keeps these in mind by "a set of additional spatial objectives for a
given AR dataset", made by "a CLIP-based spatial prediction framework" (label_clips): a frozen image
CLIP compares frames of every training clip with words for scenes, people, framing and more (the
vocabulary). The model "has to predict both the ground truth human actions label" and what that
labeller saw (train), the latter by a small head per task that speaks language, too: it compares the
clip with the model's own embedding of each label. Does it beat the single-objective ActionCLIP, as
the abstract says? Compare the arms spatial and alone (table). The heads are dropped at inference.

With s = exp(logit_scale), B clips v, texts t, actions y, and tasks k of L labels each:
  (1) kl_pair          L_action = 1/2 [KL(G || softmax_rows(s v^ t^')) + the same of t^ v^'],
                       G = softmax_rows(10 [y_i = y_k]); KL summed over a row, mean over B; no tau
  (2) class_scores     p(class) = 1/P sum_p softmax(100 v^ . t^_p,class), the rule of evaluation
  (3) spatial_targets  q = 1/T sum_t softmax(100 f^_t b^'), frames f_t and label texts b of the
                       labeller; the n labels of most mass over the training clips, made to sum to 1
  (4) spatial_loss     L_k = KL(q_k || softmax(s_k h_k(v)^ t^_k')), summed over labels, mean over
                       the clips with max(q_k) >= floor; several labels at once: binary cross
                       entropy with [q_k > .2], mean over labels
  (5) total_loss       L = L_action + lambda mean_k L_k
x^ is x / |x|; v, t (B, D); f (B, T, D); b (L, D); q (B, L); h_k a linear D x D, at first identity.

Arms: alone, lambda 0; spatial, as above; shuffled, the targets of other clips: what it gains is
regularisation; oracle, the truth for targets, where known; adversarial, lambda < 0: the gradient is
turned round where it enters v, so that the heads learn to read v, and v not to be read.

  python spatial_kd.py                           toy clips, three arms, 3 minutes on 2 CPU cores
  python spatial_kd.py --arms alone spatial shuffled oracle adversarial
  python spatial_kd.py --describe CLIP.mp4       prints "action; colour; shape; place; scene"
  python spatial_kd.py --data HMDB51 --student ViT-B-32:openai --labeller ViT-L-14:openai

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0, caches included):
RESULT spatial_kd data=toy split=1 seed=0 alone=0.9700 alone_swapped=0.9533 spatial=0.9867
  spatial_swapped=0.9833 shuffled=0.9833 shuffled_swapped=0.9533 seconds=152

Differs from the thesis, of which the abstract was at hand, and no code was published:
 1. Vocabularies, eqs. (3)-(5), lambda .5, floor .3 and n = 16 are our reading of the abstract.
 2. Eq. (1) is trained as in tinyclip_swap.py, with the same differences from ActionCLIP's code.
 3. Label texts go through the model's own text tower as it trains, each task's under one template
    drawn per step; when tested under all.
 4. Where labels tell left from right, as ours do, no clip is flipped, in any arm.
"""
import argparse
import collections
import functools
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import zlib
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
    COLOURS,
    SCENES,
    SHAPES,
    BadInput,
    Clips,
    augment,
    build_action_clip,
    centre_crop,
    clip_loader,
    mirrors,
    note_bad,
    read_data,
    read_weights,
    split_unseen,
    toy_caption,
)

# ---- the method: eqs. (1)-(5) --------------------------------------------------------------------


def kl_pair(video, text, labels, scale):
    """ActionCLIP's loss, eq. (1): texts of the same class are equally right. -> scalar"""
    B, D = video.shape
    v, t = F.normalize(video, dim=-1), F.normalize(text, dim=-1)                # (B, D)
    logits = scale * v @ t.T                                                    # (B, B)
    G = (10 * (labels[:, None] == labels).to(logits)).softmax(1)                # (B, B)
    return (F.kl_div(logits.log_softmax(1), G, reduction="batchmean")           # (1), v to t
            + F.kl_div(logits.T.log_softmax(1), G, reduction="batchmean")) / 2  # (1), t to v


def spatial_targets(frames, bank):
    """What a frozen CLIP sees, eq. (3), in whichever order frames come.

    frames (B, T, D), bank (L, D) -> probabilities (B, L)"""
    (B, T, D), (L, _) = frames.shape, bank.shape
    f, b = F.normalize(frames, dim=-1), F.normalize(bank, dim=-1)               # (B, T, D), (L, D)
    return (100 * f @ b.T).softmax(-1).mean(1)                                  # (B, L)        (3)


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


# ---- the rest is plumbing: vocabularies, labelling, training, testing, keeping record ------------

THRESHOLD = .2  # of q, above which a label of a multi-label task counts as there
VOCABULARY = {  # task, with * where several labels may be true at once: (templates, labels)
    "scene": ("a photo taken in {}|the scene is {}", """a kitchen, a living room, a bedroom,
        a bathroom, an office, a classroom, a corridor, a staircase, a gym, a swimming pool,
        a stage, a studio, a restaurant, a bar, a shop, a church, a hospital, a prison, a workshop,
        a garage, a car, a train, an airport, a street, a road, a car park, a playground, a garden,
        a park, a forest, a field, a farm, a beach, the sea, a river, a mountain, snow, a desert,
        a stadium, a sports hall"""),
    "environment": ("a photo taken {}|a scene {}", "indoors, outdoors"),
    "people": ("a photo of {}|{} in the picture", "nobody, one person, two people, a group"),
    "framing": ("a photo of the {} of a person|the picture shows the {}",
                "face, upper body, full body, lower body"),
    "viewpoint": ("a photo of a person seen from the {}|a person filmed from the {}",
                  "front, back, left, right"),
    "objects*": ("a photo of {}|{} in the picture", """a ball, a bat, a racket, a goal, a basket,
        a bow, a sword, a gun, a knife, a rope, a ladder, a bicycle, a motorcycle, a car, a horse,
        a dog, a boat, a skateboard, skis, a guitar, a piano, a drum, a microphone, a telephone,
        a computer, a book, a pen, a brush, a cup, a glass, a bottle, a plate, food, a cigarette,
        a chair, a table, a bed, a door, a window, a hat""")}
ARMS = ("alone", "spatial", "shuffled", "oracle", "adversarial")


def class_scores(video, text):
    """The rule of evaluation, eq. (2). video (B, D), text (16, K, D) -> probabilities (B, K)"""
    (B, D), (P, K, _) = video.shape, text.shape
    v, t = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
    logits = 100 * torch.einsum("bd,pkd->bpk", v, t)                            # (B, P, K)
    return logits.softmax(-1).mean(1)                                           # (B, K)        (2)


class Task(NamedTuple):
    """A spatial objective: its L labels, the sentences they are put into, whether several may be
    true at once, and for N clips q (N, L) and confidence (N,), max(q) of the labeller."""
    name: str
    labels: list
    templates: list
    multi_label: bool
    q: torch.Tensor = None
    confidence: torch.Tensor = None


def toy_vocabulary():
    """The toy clips have words of their own; templates are captions with one word left open."""
    places = [f"{down} {across}".strip() or "centre" for down in ("top", "", "bottom")
              for across in ("left", "", "right")]
    known = {"colour": list(COLOURS), "shape": SHAPES, "place": places, "scene": SCENES}
    some = list(itertools.product(*known.values()))[::67]
    return [Task(name, list(labels), ["a {} {} at the {} on {}".format(
        *(*caption[:at], "{}", *caption[at + 1:])) for caption in some], False)
        for at, (name, labels) in enumerate(known.items())]


def read_vocabulary(path, toys=False):
    """The tasks in a JSON file {task: {"labels": [...], "templates": ["a photo of {}"], and where
    several labels may be true at once "multi_label": true}}; without a file ours. Raises BadInput.
    """
    if path is None:
        return toy_vocabulary() if toys else [
            Task(name.rstrip("*"), re.split(r",\s+", labels), templates.split("|"), "*" in name)
            for name, (templates, labels) in VOCABULARY.items()]
    form = 'the form is {"scene": {"labels": ["a kitchen", "a street"], "templates": ["in {}"]}}'
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"--vocabulary {path}: no JSON file ({error}); {form}") from None
    if not isinstance(held, dict) or not held:
        raise BadInput(f"--vocabulary {path}: no task in it; {form}")
    tasks = []
    for name, task in held.items():
        task = {"templates": ["a photo of {}"], "multi_label": False} | (
            task if isinstance(task, dict) else {})
        labels, templates, several = map(task.get, ("labels", "templates", "multi_label"))
        if not all(isinstance(x, list) and x and all(isinstance(word, str) and word.strip()
                                                     for word in x) for x in (labels, templates)):
            wrong = "labels and templates are lists of words"
        elif len(task) > 3 or not isinstance(several, bool):
            wrong = "beside them only multi_label is known, true or false"
        elif len(labels) < 2:
            wrong = f"{labels[0]} is its one label; a choice takes two"
        elif len(set(labels)) < len(labels):
            wrong = f"{max(labels, key=labels.count)} stands there twice"
        elif any(re.sub("[^{}]", "", template) != "{}" for template in templates):
            wrong = "a template has one {}, where the label goes"
        else:
            tasks.append(Task(name, labels, templates, several))
            continue
        raise BadInput(f"--vocabulary {path}, task {name}: {wrong}; {form}")
    return tasks


@functools.cache
def toy_truths(root):
    file = root / "truth.json"
    return json.loads(file.read_text()) if file.exists() else {}


def read_truth(path):
    """What people know of a clip -> {task: label}; {} where nobody said. Toy clips know what was
    drawn; HMDB51 has it in the file's name (..._f_nm_np1_ba_goo_0.avi)."""
    path = Path(path).absolute()
    truth = toy_truths(path.parents[1]).get(f"{path.parent.name}/{path.name}")
    if truth:
        said = re.fullmatch(r"a (\S+) (\S+) at the (.+) on (.+)", toy_caption(truth)).groups()
        return dict(zip(("colour", "shape", "place", "scene"), said, strict=True))
    tags = re.search(r"_([hufl])_[cn]m_np(\d)_(fr|ba|le|ri)_(?:bad|med|goo)_\d+\.avi$", path.name)
    return {} if not tags else {
        "framing": {"h": "face", "u": "upper body", "f": "full body", "l": "lower body"}[tags[1]],
        "people": ["nobody", "one person", "two people", "a group"][min(3, int(tags[2]))],
        "viewpoint": {"fr": "front", "ba": "back", "le": "left", "ri": "right"}[tags[3]]}


@torch.no_grad()
def embed_labels(model, task, device):
    """-> (L, D), a label's embedding under each template, normalised, averaged, normalised."""
    tokens = torch.stack([model.tokenizer([template.format(label) for label in task.labels])
                          for template in task.templates]).to(device)           # (P, L, ...)
    text = F.normalize(model.encode_text(tokens).float(), dim=-1)               # (P, L, D)
    return F.normalize(text.mean(0), dim=-1)


@torch.no_grad()
def label_clips(labeller, tasks, clips, args, device, bad):
    """The CLIP-based spatial prediction: eq. (3) for every clip -> tasks with q (N, n)."""
    labeller.to(device).eval()
    banks = [embed_labels(labeller, task, device) for task in tasks]
    q = [torch.zeros(len(clips), len(task.labels)) for task in tasks]
    loader = clip_loader(clips, args.batch_size, args.workers)
    for batch in tqdm(loader, "labelling", leave=False, disable=None):
        note_bad(bad, batch, clips)
        held = [i for i, video in enumerate(batch.video) if video is not None]
        if held:
            videos = centre_crop([batch.video[i].to(device) for i in held], labeller.size)
            f = labeller.encode_frames(videos).float()                          # (B, T, D)
            for probabilities, bank in zip(q, banks, strict=True):
                probabilities[[batch.key[i][1] for i in held]] = spatial_targets(f, bank).cpu()
    return [keep_labels(task._replace(q=p), args.keep) for task, p in zip(tasks, q, strict=True)]


def keep_labels(task, count):
    """The `count` labels of most mass over the clips, q again summing to 1; a clip that was not
    read keeps zeros, and no confidence."""
    kept = sorted(task.q.sum(0).argsort(descending=True)[:count].tolist())
    q = task.q[:, kept]
    q = (q / q.sum(1, keepdim=True).clamp(min=1e-12)).half()
    return task._replace(labels=[task.labels[k] for k in kept], q=q, confidence=q.amax(1))


def clip_names(clips):
    """By these a file of targets knows its clips: CLASS/NAME and size in bytes."""
    return [f"{Path(path).parent.name}/{Path(path).name} {os.path.getsize(path)}"
            for path, _ in clips]


def find_targets(tasks, data, args, run, place, bad):
    """The tasks with targets of the training clips, from RUN/targets.pt or made now and put there.
    Raises BadInput where that file was made for other clips."""
    labeller = build_action_clip(args.labeller, 0, Path(args.out) / "cache")
    weights = functools.reduce(lambda crc, w: zlib.crc32(w.numpy().tobytes(), crc),
                               labeller.state_dict().values(), 0)
    clips = Clips(data.train, args.frames, side(labeller))
    names = clip_names(data.train)
    made = {"labeller": f"{args.labeller} {weights:08x}", "frames": args.frames, "keep": args.keep,
            "vocabulary": [list(task[:4]) for task in tasks]}
    path, (device, rank, _) = run / "targets.pt", place
    try:
        before = torch.load(path, weights_only=True) if path.exists() else {"clips": names}
        others = before["clips"] != names
    except Exception as error:  # torch.load raises many kinds
        what = f"{path} is no file of targets ({type(error).__name__})"
        raise BadInput(f"{what}; remove it, and the clips are labelled anew") from error
    if others:
        raise BadInput(f"{path} holds targets of other clips ({len(before['clips'])}, now "
                       f"{len(names)}); remove it, or write to another folder with --out")
    changed = [key for key in made if before.get(key) != made[key]]
    if not changed and not rank:
        print(f"targets: those in {path}", flush=True)
    if not changed:
        return [Task(**task) for task in before["tasks"]]
    if "tasks" in before:
        print(f"targets: {path} was made with another {', '.join(changed)}; labelling anew",
              flush=True)
    tasks = label_clips(labeller, tasks, clips, args, device, bad)
    run.mkdir(parents=True, exist_ok=True)
    save({"clips": names, **made, "tasks": [task._asdict() for task in tasks]}, path)
    return tasks


def oracle_tasks(tasks, truths):
    """The same tasks with the truth for targets, as far as it is known; unknown: no confidence."""
    out = []
    for task in tasks:
        labels = sorted({truth[task.name] for truth in truths if task.name in truth})
        if len(labels) > 1:
            q = torch.tensor([[float(truth.get(task.name) == label) for label in labels]
                              for truth in truths]).half()
            out.append(task._replace(labels=labels, q=q, confidence=q.amax(1), multi_label=False))
    return out


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


class Student(nn.Module):
    """An ActionCLIP, .model, and its spatial heads, which only training and by-products need."""

    def __init__(self, model, tasks):
        super().__init__()
        self.model, self.tasks = model, tasks
        self.heads = SpatialHeads(model.width, tasks, model.clip.logit_scale.exp().item())

    def forward(self, video, tokens, words=None, adversarial=False):
        """-> v (B, D), t (B, D), s, and the tasks' logits, given `words`, all labels (sum L_k, ...)

        adversarial: the gradient is turned round between heads and v: the heads go on learning to
        read the labels from v, and v learns not to show them."""
        v, t, scale = self.model(video, tokens)
        if words is None:
            return v, t, scale, []
        texts = self.model.encode_text(words).split([len(task.labels) for task in self.tasks])
        return v, t, scale, self.heads(2 * v.detach() - v if adversarial else v, texts)


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


def train(arm, student, data, mirror, args, place, run, log, bad):
    """Train one arm by eq. (5). Keeps RUN/ARM-last.pt; adds a row per epoch to `log`, and to `bad`
    {path: reason} clips that could not be decoded."""
    device, rank, world = place
    model, tasks, toy = student.model, student.tasks, args.student.startswith("toy-")
    weight = vars(args)["lambda"]
    clips = Clips(data.train, args.frames, side(model), train=True, seed=args.seed)
    batch_size = min(args.batch_size, len(clips)) // world * world
    loader = clip_loader(clips, batch_size, args.workers, rank, world)
    if arm == "alone":
        student.heads.requires_grad_(False)
    optimizer, schedule = make_optimizer(student, args.lr or (4e-4 if toy else 5e-6),
                                         args.epochs * len(loader))
    path = run / f"{arm}-last.pt"
    if args.resume and path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        model.clip.load_state_dict(saved["model_state_dict"])
        model.fusion.load_state_dict(saved["fusion_model_state_dict"])
        student.heads.load_state_dict(saved["spatial_heads"])
        log += saved["rows"]
        if len(saved["rows"]) < args.epochs:
            optimizer.load_state_dict(saved["optimizer_state"])
            schedule.load_state_dict(saved["schedule_state"])
    wrapped = torch.nn.parallel.DistributedDataParallel(student) if world > 1 else student
    prompts = model.prompts(data.classes).to(device)                            # (16, K, ...)
    words = [[model.tokenizer([template.format(label) for label in task.labels])
              for template in task.templates] for task in tasks]
    q, confidence = ([task[at].float().to(device) for task in tasks] for at in (4, 5))
    for epoch in range(sum(row["arm"] == arm for row in log), args.epochs):
        loader.batch_sampler.epoch, began = epoch, time.time()
        sums = torch.zeros(2 + len(tasks), device=device)
        student.train()
        for step, batch in enumerate(tqdm(loader, f"{arm} {epoch + 1}/{args.epochs}", leave=False,
                                          disable=None)):
            note_bad(bad, batch, clips)
            draws = [np.random.default_rng([args.seed, *key, 1]).integers(16) for key in batch.key]
            labels = gather(torch.tensor(batch.label, device=device))           # (B,)
            index = gather(torch.tensor([i for _, i in batch.key], device=device))
            whole = gather(torch.tensor([float(not bad) for bad in batch.bad], device=device))
            rng = np.random.default_rng([args.seed, epoch, step, 3])
            said = None if arm == "alone" else torch.cat(
                [texts[rng.integers(len(texts))] for texts in words]).to(device)
            with autocast(device):
                v, t, scale, logits = wrapped(
                    view(batch, model.size, mirror, toy, args.seed, device),
                    prompts[draws, batch.label], said, arm == "adversarial")
            v, t = gather(v.float()), gather(t.float())                         # (B, D)
            pair = kl_pair(v, t, labels, scale)
            each, agree = [], torch.zeros((), device=device)
            for z, task, p, sure in zip(logits, tasks, q, confidence, strict=False):  # alone: none
                z, p = gather(z), p[index]                                      # (B, L)
                agree += (z.argmax(1) == p.argmax(1)).float().mean() / len(tasks)
                p = (p > THRESHOLD).float() if task.multi_label else p
                sure = (whole * sure[index]).where(whole * sure[index] > 0, -1.)  # not read: never
                each.append(spatial_loss(z, p, sure, args.floor, task.multi_label))
            total_loss(pair, each, weight).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            with torch.no_grad():
                model.clip.logit_scale.clamp_(max=math.log(100))
                student.heads.log_scale.clamp_(max=math.log(100))
                sums[:2 + len(each)] += torch.stack([pair, agree, *each]) / len(loader)
        pair, agree, *each = sums.tolist()
        spatial = {task.name: x for task, x in zip(tasks, each, strict=True) if arm != "alone"}
        log.append({"arm": arm, "epoch": epoch + 1, "kl_pair": pair, "spatial": spatial,
                    "agreement": agree, "clips_per_s": len(loader) * batch_size
                    / (time.time() - began)})
        if rank:
            continue
        print("{arm:11} epoch {epoch:3}  kl_pair {kl_pair:7.4f}".format(**log[-1])
              + "".join(f"  {name} {x:.3f}" for name, x in spatial.items())
              + (f"  agreement {agree:.3f}" if spatial else "")
              + f"  {log[-1]['clips_per_s']:6.1f} clips/s", flush=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        done = epoch + 1 == args.epochs
        save({"model_state_dict": model.clip.state_dict(), "frames": args.frames,
              "fusion_model_state_dict": model.fusion.state_dict(),
              "quick_gelu": model.clip.quick_gelu, "backbone": args.student.partition(":")[0],
              "classes": data.classes, "tasks": [list(task[:4]) for task in tasks],
              "spatial_heads": student.heads.state_dict(),
              "rows": [row for row in log if row["arm"] == arm],
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


def by_products(student, v, banks):
    """What the heads say of videos v (B, D), given label embeddings -> per task: its labels, a list
    per clip, most likely first (one, or as many as are there)."""
    out = []
    for task, z in zip(student.tasks, student.heads(v, banks), strict=True):
        order = z.argsort(1, descending=True).tolist()
        count = (z > 0).sum(1).tolist() if task.multi_label else [1] * len(v)
        out.append([[task.labels[k] for k in row[:n]] for row, n in zip(order, count, strict=True)])
    return out


@torch.no_grad()
def evaluate(student, data, args, place, bad):
    """Test on every clip, without the heads; a clip that cannot be decoded goes into `bad` and
    counts as wrong. What the heads say is compared with the truth where there is one.

    -> numbers, and {index: (class, by-products)} of this process's clips
    """
    device, rank, world = place
    model = student.eval().model
    text, said = embed_classes(model, data.classes, device), {}
    banks = [embed_labels(model, task, device) for task in student.tasks]
    hits = torch.zeros(3 + 2 * len(banks), device=device)  # first, among five, clips; right, known
    clips = Clips(data.test, args.frames, side(model))
    loader = clip_loader(clips, args.batch_size, args.workers, rank, world)
    for batch in tqdm(loader, "test", leave=False, disable=None):
        note_bad(bad, batch, clips)
        hits[2] += len(batch.label)
        held = [i for i, video in enumerate(batch.video) if video is not None]
        if held:
            videos = centre_crop([batch.video[i].to(device) for i in held], model.size)
            with autocast(device):
                v = model.encode_video(videos).float()                          # (B, D)
            top = class_scores(v, text).topk(min(5, len(data.classes))).indices
            right = top == torch.tensor([batch.label[i] for i in held], device=device)[:, None]
            hits[:2] += torch.stack([right[:, 0].sum(), right.sum()])
            seen = list(zip(*by_products(student, v, banks), strict=True)) or [()] * len(held)
            for i, k, words in zip(held, top[:, 0].tolist(), seen, strict=True):
                said[batch.key[i][1]] = k, words
                truth = read_truth(data.test[batch.key[i][1]][0])
                for at, (task, word) in enumerate(zip(student.tasks, words, strict=True)):
                    if task.name in truth:
                        hits[3 + 2 * at] += truth[task.name] in word[:1]
                        hits[4 + 2 * at] += 1
    if world > 1:
        dist.all_reduce(hits)
    top1, top5, count, *seen = hits.tolist()
    return {"top1": top1 / count, "top5": top5 / count, "clips": int(count), "by_products": {
        task.name: a / n for task, a, n in zip(student.tasks, seen[::2], seen[1::2], strict=True)
        if n}}, said


def count_macs(model, frames, device):
    """GMAC to classify a clip, by the ActionCLIP alone; its texts are cached."""
    video = torch.rand(1, frames, 3, model.size, model.size, device=device)
    with FlopCounterMode(display=False) as counter:
        model.eval().encode_video(video)
    return counter.get_total_flops() / 2e9


def describe(args, run):
    """Print what a trained run says of one file: "action; scene; people; ..."."""
    path = next((run / f"{arm}-last.pt" for arm in ("spatial", "oracle")
                 if (run / f"{arm}-last.pt").exists()), None)
    if path is None:
        raise BadInput(f"--describe: {run} holds no spatial-last.pt; train it first, by the same "
                       f"command without --describe")
    saved = read_weights(path)
    model = build_action_clip(f"{saved['backbone']}:{path}", cache=Path(args.out) / "cache")
    student = Student(model, [Task(*task) for task in saved["tasks"]]).eval()
    student.heads.load_state_dict(saved["spatial_heads"])
    sample = Clips([(args.describe, 0)], saved["frames"], side(model))[0, 0]
    if sample.video is None:
        raise BadInput(f"--describe {args.describe}: {sample.bad[0][1]}")
    with torch.no_grad():
        cpu = torch.device("cpu")
        v = model.encode_video(centre_crop([sample.video], model.size))
        said = class_scores(v, embed_classes(model, saved["classes"], cpu)).argmax(1)
        words = by_products(student, v, [embed_labels(model, t, cpu) for t in student.tasks])
    print("; ".join([saved["classes"][said], *(", ".join(word[0]) for word in words)]))


def draw_rows(rows, frames, path):
    """Contact sheet of clips, a row each, from (path of the clip, words, whether all is well)."""
    out = []
    for clip, line, good in rows:
        video = Clips([(clip, 0)], frames, 128)[0, 0].video
        if video is not None:
            row = torchvision.utils.make_grid(centre_crop([video], 128)[0], frames)
            row = F.pad(row.mul(255).byte(), (2, 2, 14, 2))
            out.append(torchvision.utils.draw_bounding_boxes(
                row, torch.tensor([[1, 1, row.shape[2] - 2, row.shape[1] - 2]]), [line],
                "lime" if good else "red"))
    if out:
        torchvision.io.write_png(torch.cat(out, 1), str(path))


def look_at_labels(tasks, truths, floor):
    """The labeller, before anything is trained on its labels: prints a row per task, returns it."""
    rows = {}
    print(f"{'task':12} labels entropy confidence  sure  right usual   of  most often")
    for task in tasks:
        q, top = task.q[task.confidence > 0].float(), [task.labels[k] for k in task.q.argmax(1)]
        known = [(word, truth[task.name]) for word, truth in zip(top, truths, strict=True)
                 if task.name in truth]
        row = rows[task.name] = {
            "labels": len(task.labels), "entropy": -torch.xlogy(q, q).sum(1).mean().item(),
            "confidence": q.amax(1).mean().item(),
            "sure": (task.confidence >= floor).float().mean().item(),
            "right": sum(a == b for a, b in known) / len(known) if known else math.nan,
            "usual": max(collections.Counter(b for _, b in known).values(), default=math.nan)
            / max(1, len(known)),
            "known": len(known), "often": {word: n / len(top) for word, n in
                                           collections.Counter(top).most_common(3)}}
        print("{0:12} {labels:6} {entropy:7.3f} {confidence:10.3f} {sure:5.3f} {right:6.3f} "
              "{usual:5.3f} {known:4}  ".format(task.name, **row)
              + ", ".join(f"{word} {n:.0%}" for word, n in row["often"].items()))
    print(f"Training clips: mean entropy in nats, mean confidence; sure: the share of confidence\n"
          f"{floor} or more; right: top label, of the clips whose truth is known; usual: what the\n"
          f"truth's most frequent label would get.", flush=True)
    return rows


def table(results):
    """The arms as text, a row each."""
    tests = [name for name in next(iter(results.values())) if name.startswith("top1")]
    seen = sorted({task for r in results.values() for task in r["by_products"]})
    lines = [f"{'arm':11} {'lambda':>6} {'M':>6} {'GMAC':>7} "
             + " ".join(f"{name.replace('top1', 'top-1'):>16}" for name in tests) + f" {'top-5':>6}"
             + "".join(f" {task:>9}" for task in seen)]
    for arm, r in results.items():
        lines.append(f"{arm:11} {r['lambda']:6.2f} {r['parameters']:6.2f} {r['gmac']:7.3f} "
                     + " ".join(f"{r[name]:16.3f}" for name in tests) + f" {r['top5']:6.3f}"
                     + "".join(f" {r['by_products'].get(task, math.nan):9.3f}" for task in seen))
    return "\n".join(lines)


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
        "out of training, and test on them, too")
    add("--frames", type=int, default=8, help="T, frames of a clip that a network sees")
    add = parser.add_argument_group("spatial objectives").add_argument
    add("--labeller", default="toy-fine", help="NAME[:WEIGHTS] of the frozen image CLIP")
    add("--vocabulary", metavar="JSON", help="tasks and labels (default: those in this script)")
    add("--keep", type=int, default=16, help="n, labels kept of a task")
    add("--floor", type=float, default=.3, help="confidence below which a clip's label is not used")
    add("--lambda", type=float, default=.5, help="of the spatial objectives")
    add = parser.add_argument_group("training").add_argument
    add("--student", default="toy-large", help="NAME[:WEIGHTS] of the backbone that is trained")
    add("--label-only", action="store_true", help="label and look at the labels; train nothing")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS[:3]), metavar="ARM",
        help=f"of {', '.join(ARMS)}")
    add("--epochs", type=int, help="(default: 6 for toy clips, else 50, as ActionCLIP)")
    add("--batch-size", type=int, default=32, help="clips of all processes together")
    add("--lr", type=float, help="of CLIP's towers; fusion and spatial heads have ten times as "
        "much (default: 4e-4 for toy CLIPs, else 5e-6, as ActionCLIP)")
    add("--compile", action="store_true", help="torch.compile the student")
    add = parser.add_argument_group("run").add_argument
    add("--describe", metavar="VIDEO", help="no training: what the trained run says of this file")
    add("--seed", type=int, default=0)
    add("--out", default="runs", help="folder for records, checkpoints and the cache")
    add("--resume", action="store_true", help="go on with a run that was killed")
    add("--target", type=float, default=0., help="exit 1 if an arm's top-1 is below")
    add("--workers", type=int, default=min(8, max(1, (os.cpu_count() or 1) - 1)))
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = 6 if args.data == "toy" else 50
    if min(args.frames, args.epochs, args.batch_size) < 1 or args.frames > 77:
        parser.error("--frames takes 1 to 77; --epochs and --batch-size take 1 or more")
    if args.keep < 2 or vars(args)["lambda"] < 0 or not 0 <= args.floor <= 1:
        parser.error("--keep takes 2 or more, --lambda 0 or more (the adversarial arm turns it "
                     "round), --floor 0 to 1")
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


def main(argv=None):
    """Label the training clips, train and test the arms. -> {arm: numbers}"""
    args, began = parse(argv), time.time()
    device, rank, world = place = find_place()
    if args.student.startswith("toy-"):  # threads that wait for decoding cost more than they bring
        spare = max(1, (os.cpu_count() or 1) - args.workers)
        torch.set_num_threads(min(torch.get_num_threads(), spare))
    cache = Path(args.out) / "cache"
    name = Path(args.data).resolve().name + f"-unseen{args.unseen}" * (args.unseen > 0)
    run = Path(args.out) / "spatial_kd" / f"{name}-s{args.split}-seed{args.seed}"
    if args.describe:
        return describe(args, run)
    if rank:
        dist.barrier()  # process 0 goes first: it fills the cache and labels the clips
    toys = "toy-diagonals" if args.unseen else "toy"
    data, opened = split_unseen(read_data(args.data, args.split, args.allow_missing, cache, toys),
                                args.unseen, args.seed)
    bad = {"training": {}, "test": {}}  # {path: reason} of clips that cannot be decoded
    truths = [read_truth(path) for path, _ in data.train]
    drawn = any("scene" in truth for truth in truths)
    tests = {"": data}
    if drawn and args.split == 1:
        tests["_swapped"] = split_unseen(read_data(args.data, 2, args.allow_missing, cache, toys),
                                         args.unseen, args.seed)[0]
    tests |= {f"_{group}": part for group, part in opened.items()}
    record = start_record(args, run)
    vocabulary = read_vocabulary(args.vocabulary, drawn)
    torch.manual_seed(args.seed)
    build_action_clip(args.student, cache=cache)  # a mistake in it shows before the labelling
    if not rank:
        print(f"spatial_kd.py on {machine()}, {world} process(es), torch {torch.__version__}, "
              f"seed {args.seed}\n{data.name}, split {args.split}: {len(data.classes)} classes, "
              f"{len(data.train)} training clips, {len(data.test)} test clips"
              + (f", {len(data.test)} with scenes and actions re-paired" if "_swapped" in tests
                 else ""), flush=True)
        if opened:
            print(f"held out of training, by seed {args.seed}: "
                  f"{', '.join(opened['unseen'].classes)}", flush=True)
        if args.labeller.startswith("toy-") and not drawn:
            print(f"{args.labeller} knows the words of the toy clips only: its labels of "
                  f"{data.name} are noise", file=sys.stderr)
    tasks = find_targets(vocabulary, data, args, run, place, bad["training"])
    if world > 1 and not rank:
        dist.barrier()
    if min(args.batch_size, len(data.train)) < world:
        raise BadInput(f"--batch-size {args.batch_size}, {len(data.train)} training clips: too few "
                       f"for {world} processes")
    unsure = [task.name for task in tasks if (task.confidence < args.floor).all()]
    if not rank:
        record["labels"] = look_at_labels(tasks, truths, args.floor)
        tops = [[task.labels[k] for k in task.q.argmax(1)] for task in tasks]
        some = np.linspace(0, len(truths) - 1, min(8, len(truths))).astype(int)
        draw_rows([(data.train[i][0], "; ".join(f"{top[i]} {task.confidence[i]:.2f}"
                                                for task, top in zip(tasks, tops, strict=True)),
                    all(truths[i].get(task.name, top[i]) == top[i]
                        for task, top in zip(tasks, tops, strict=True)))
                   for i in some], args.frames, run / "labels.png")
        for name in unsure:
            print(f"task {name} is left out: no clip has a label of confidence {args.floor}")
    if args.label_only:
        return {}
    tasks = [task for task in tasks if task.name not in unsure]
    if not tasks:
        raise BadInput(f"no clip has a label of confidence {args.floor}: there is nothing to learn "
                       f"from; lower --floor or name a stronger --labeller")
    order = np.random.default_rng(args.seed).permutation(len(truths))
    others = torch.empty(len(truths), dtype=torch.long)
    others[order] = torch.from_numpy(np.roll(order, 1))  # each clip gets another one's targets
    tasks_of = dict.fromkeys(args.arms, tasks) | {"oracle": oracle_tasks(vocabulary, truths)}
    tasks_of["shuffled"] = [task._replace(q=task.q[others], confidence=task.confidence[others])
                            for task in tasks]
    if "oracle" in args.arms and not tasks_of["oracle"]:
        raise BadInput(f"--arms oracle: nobody said what {data.name} shows; of the toy clips that "
                       f"is known, and of HMDB51 by its files' names")

    sides_told = not all(mirrors([label for task in vocabulary for label in task.labels]))
    mirror = [may and not sides_told for may in mirrors(data.classes)]  # the same for every arm
    if not rank:
        given = Path(args.student.partition(":")[2]).resolve()
        for old in [] if args.resume else run.glob("*-last.pt"):
            if old.resolve() != given:
                old.unlink()
        (run / "run.json").write_text(json.dumps(record, indent=1))

    results, answers, log = {}, {}, []
    for arm in args.arms:
        torch.manual_seed(args.seed)  # the arms do not depend on each other
        student = Student(build_action_clip(args.student, cache=cache), tasks_of[arm]).to(device)
        gmac = count_macs(student.model, args.frames, device)
        if args.compile:
            torch.compiler.config.recompile_limit = 64  # arms x batch sizes x training, testing
            student.model.encode_video = torch.compile(student.model.encode_video)
        train(arm, student, data, mirror, args, place, run, log, bad["training"])
        results[arm] = {
            "lambda": {"alone": 0., "adversarial": -1.}.get(arm, 1.) * vars(args)["lambda"],
            "parameters": sum(w.numel() for w in student.model.parameters()) / 1e6, "gmac": gmac}
        for name, part in tests.items():
            numbers, said = evaluate(student, part, args, place, bad["test"])
            results[arm] |= {f"{key}{name}": value for key, value in numbers.items()}
            answers.setdefault(arm, said)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return results

    record |= {"results": results, "missing": data.missing, "bad": bad, "unsure": unsure,
               "unseen": opened["unseen"].classes if opened else [],
               "seconds": time.time() - began}
    (run / "run.json").write_text(json.dumps(record, indent=1))
    some = sorted(answers[shown := "spatial" if "spatial" in answers else args.arms[-1]])
    draw_rows([(data.test[i][0], f"truth: {data.classes[data.test[i][1]]}   {shown}: "
                + "; ".join([data.classes[k], *map(", ".join, words)]), k == data.test[i][1])
               for i in some[::max(1, len(some) // 8)][:8] for k, words in [answers[shown][i]]],
              args.frames, run / "run.png")
    print(table(results))
    if opened:
        print("chance: seen {:.3f}, unseen {:.3f}, unseen among all {:.3f}".format(
            *(1 / len(part.classes) for part in (data, *opened.values()))))
    trained = {label for _, label in data.train}
    untrained = [name for i, name in enumerate(data.classes) if i not in trained]
    for names, what in ((data.missing, "listed clips are missing"),
                        (untrained, "classes have no training clip"),
                        (list(bad["training"]), "training clips cannot be decoded"),
                        (list(bad["test"]), "test clips cannot be decoded and count as wrong"),
                        (unsure, f"tasks left out, no label of confidence {args.floor}")):
        if names:
            print(f"NOTE {len(names)} {what}, first {names[0]}")
    print(f"record, checkpoints, targets, pictures: {run}\n"
          f"RESULT spatial_kd data={data.name} split={args.split} seed={args.seed} "
          + " ".join(f"{arm}{name}={r['top1' + name]:.4f}" for arm, r in results.items()
                     for name in tests) + f" seconds={time.time() - began:.0f}")
    if any(r["top1"] < args.target for r in results.values()):
        sys.exit(1)
    return results


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.stderr.write(f"spatial_kd.py: {error}\n")
        sys.exit(2)
