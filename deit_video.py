"""DeiT distillation for video: a small ActionCLIP learns from a large one through an extra token.

Technique 3 of Frans Huntink's master thesis, "Bridging the gap: Threefold knowledge distillation
for language-enabled action recognition models operating in real-time scenarios" (Utrecht, 2024):
DeiT (Touvron et al., ICML 2021, arXiv 2012.12877) for video, on ActionCLIP (Wang, Xing, Liu 2021,
arXiv 2109.08472).

DeiT gives a vision transformer a second learned token: the class token learns from the labels, the
second one from a teacher. ActionCLIP has no class token: it averages over frames. So we prepend one
learned token to the frames, and train the token and the mean over frames, the thesis's
"token-based" and "frame-based perspective", together. The thesis credits the gain to the two heads
and not to the teacher; the variants tell these causes apart.

B videos with labels y, K classes, T frames per video. f (B, T, D) are frame embeddings, t (B, D) is
one sentence per video, t_pk that of template p and class k, p_i are position embeddings.
x^ is x / |x|, s = exp(logit_scale) is learned. v_T (B, D_T), s_T and z_T (B, K) are the teacher's
video embedding, scale and class logits.
  (1) actionclip_loss      1/2 [KL(G || softmax_rows(s v^ t^')) + KL(G || softmax_rows(s t^ v^'))],
                           G = softmax_rows(10 [y_i = y_k]); KL summed over a row, mean over B
  (2) class_probabilities  p(k) = mean_p softmax_k(100 v^ . t^_pk) over 16 templates; argmax wins
  (3) TokenFusionHead      [z_0; z_1; ...] = transformer([token + p_0; f_1 + p_1; ...]),
                           h_frame = mean_i (z_i + f_i),  h_token = z_0 + mean_i f_i
  (4) spatial_loss, (5) total_loss: see spatial_kd.py; for --grid
  (6) token_loss is one of
      labels               actionclip_loss(h_token, t, y); it needs no teacher
      hard                 actionclip_loss(h_token, t(c), c), where c = argmax_k z_T
      soft                 tau^2 KL(softmax(z_T / tau) || softmax(s h_token^ t^' / tau)),
                           summed over all K classes, mean over B
      class_logits         z_T = s_T mean_p v_T^ . t^_pk
  (7) deit_loss            L = (1 - alpha) actionclip_loss(h_frame, t, y) + alpha token_loss
  (8) merge_heads          (h_token^ + h_frame^) / 2, the embedding that is deployed

Teacher: a large ActionCLIP, trained first, then frozen. It sees the student's augmented frames.
Schedule: AdamW, lr 5e-6 (toy networks 4e-4), 10 lr for new layers, weight decay .2, linear warm-up,
cosine to 0, 50 epochs (toy data 6), batch 32.

Variants of the student, trained for the same number of steps:
  one_head          h_frame alone, eq. (1): plain ActionCLIP
  two_heads         the token learns from the labels, without a teacher
  two_heads_soft    the token learns from the teacher's probabilities
  two_heads_hard    the token learns from the teacher's most probable class
Controls:
  second_one_head   one_head with another seed; `ensemble` is the mean of the two networks
  two_frame_heads   two heads without a token: a linear layer on h_frame takes its place
  one_head_soft     a teacher without a second head: the soft loss trains h_frame itself
  linear_head_soft  a teacher, and the linear layer in place of the token

  python deit_video.py                  toy data, 1 to 2 minutes on 2 CPU cores
  python tinyclip_swap.py --data toy-crowded-large --epochs 30   a teacher for harder toys, then
  python deit_video.py --data toy-crowded --epochs 150 --teacher-checkpoint \\
      runs/tinyclip_swap/toy-crowded-large-s1-seed0-TIME/large-last.pt
  python spatial_kd.py --label-only && python deit_video.py --grid      all three techniques
  python deit_video.py --data HMDB51 --teacher ViT-B-32:kinetics400-8f --student \\
      TinyCLIP-ViT-40M-32-Text-19M:LAION400M
  python deit_video.py --eval-only all_three-last.pt --watch my.mp4 --labels "waving, running"

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0, seed 0):
RESULT deit_video data=toy split=1 seed=0 teacher=0.9833 one_head=0.9267 two_heads=0.8800
  two_heads_frame=0.8767 two_heads_token=0.8733 two_heads_soft=0.8300 two_heads_soft_frame=0.8067
  two_heads_soft_token=0.8367 seconds=107
Each name is a network, each number its top-1, after 222 steps; _frame and _token are its heads by
themselves. This compares how fast networks learn, and toy-crowded, what they can learn. There, the
teacher has seen more, and its soft classes help. --unseen adds NAME_unseen (among the unseen
classes) and NAME_unseen_all (among all). In --grid, base is the large network, swap the small one.

Why a token is hardly a second opinion: both heads read the same frames through the same six layers,
so they mostly make the same mistakes, and their mean is no better than each. Two networks make
different ones: compare `two_heads` with `ensemble`.

Differs from the thesis, of which we only had the abstract: eqs. (3), (6), (7) and (8) are our
interpretation. In eq. (3), the residual mean_i f_i starts h_token near the text embeddings.
Differs from DeiT: alpha .5 and tau 1 are its code's defaults; its paper has .1 and 3 for the soft
loss, which its code divides by B K. Its hard loss compares K classes; ours, the videos of a batch.
It averages the logits of two linear classifiers; eq. (8) does so up to normalisation.
tinyclip_swap.py lists the differences from ActionCLIP's code.
"""
import argparse
import collections
import csv
import json
import math
import os
import platform
import sys
import time
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchvision.utils import draw_bounding_boxes, make_grid, save_image
from tqdm import tqdm

import common

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these three
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
USE_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if USE_CUDA else torch.device("cpu")
DEVICE_NAME = torch.cuda.get_device_name(DEVICE) if USE_CUDA else f"{platform.machine()} CPU"
MIN_CONFIDENCE = .3  # in eq. (4)

# ---- the method: eqs. (1)-(8) --------------------------------------------------------------------


def actionclip_loss(video, text, labels, scale):
    """Eq. (1): all texts of the same class are positives. -> scalar"""
    v = F.normalize(video, dim=-1)                                              # (B, D)
    t = F.normalize(text, dim=-1)                                               # (B, D)
    logits = scale * v @ t.T                                                    # (B, B)
    same_class = labels[:, None] == labels                                      # (B, B)
    G = (10 * same_class.to(logits)).softmax(1)                                 # (B, B)
    video_to_text = F.kl_div(logits.log_softmax(1), G, reduction="batchmean")   # ()
    text_to_video = F.kl_div(logits.T.log_softmax(1), G, reduction="batchmean")
    return (video_to_text + text_to_video) / 2                                  # ()            (1)


def class_probabilities(video, text):
    """Eq. (2), the rule of evaluation. video (B, D), text (P, K, D) -> (B, K)"""
    v = F.normalize(video, dim=-1)
    t = F.normalize(text, dim=-1)
    logits = 100 * torch.einsum("bd,pkd->bpk", v, t)                            # (B, P, K)
    return logits.softmax(-1).mean(1)                                           # (B, K)        (2)


def spatial_loss(logits, targets):
    """Eq. (4) for one task. logits, targets (B, J); all-zero targets do not count. -> scalar"""
    kl = F.kl_div(logits.log_softmax(1), targets, reduction="none").sum(1)      # (B,)
    confident = targets.amax(1) >= MIN_CONFIDENCE                               # (B,)
    return (confident * kl).sum() / confident.sum().clamp(min=1)                # ()            (4)


def total_loss(action_loss, spatial_losses, weight):
    """Eq. (5). spatial_losses: a list, one scalar per task; weight: lambda -> scalar"""
    mean = sum(spatial_losses) / max(1, len(spatial_losses))                    # ()
    return action_loss + weight * mean                                          # ()            (5)


def token_loss(kind, h_token, text, labels, teacher_logits, scale, tau):
    """Eq. (6). text (B, D) says the labels, if `kind` is "hard" the teacher's classes; if it is
    "soft", text (K, D) says all classes -> scalar"""
    if kind == "labels":
        return actionclip_loss(h_token, text, labels, scale)                    # ()            (6)
    if kind == "hard":
        return actionclip_loss(h_token, text, teacher_logits.argmax(1), scale)  # ()            (6)
    h = F.normalize(h_token, dim=-1)                                            # (B, D)
    logits = scale * h @ F.normalize(text, dim=-1).T                            # (B, K)
    log_p = (logits / tau).log_softmax(1)                                       # (B, K)
    q = (teacher_logits / tau).softmax(1)                                       # (B, K)
    return tau ** 2 * F.kl_div(log_p, q, reduction="batchmean")                 # ()            (6)


def class_logits(video, text, scale):
    """z_T of eq. (6), from the teacher's embeddings. video (B, D), text (P, K, D) -> (B, K)"""
    mean_text = F.normalize(text, dim=-1).mean(0)                               # (K, D)
    return scale * F.normalize(video, dim=-1) @ mean_text.T                     # (B, K)        (6)


def deit_loss(frame_loss, token_loss, alpha):
    """Eq. (7): the losses of both heads -> scalar"""
    return (1 - alpha) * frame_loss + alpha * token_loss                        # ()            (7)


def merge_heads(h_token, h_frame):
    """Eq. (8): the two heads (B, D) become one embedding. -> (B, D)"""
    return (F.normalize(h_token, dim=-1) + F.normalize(h_frame, dim=-1)) / 2    # (B, D)        (8)


# ---- the rest is plumbing: networks, targets, training and testing -------------------------------


class TokenFusionHead(common.FusionHead):
    """ActionCLIP's fusion transformer with a learned token before the frames"""

    def __init__(self, width, heads, layers, std, position_std):
        super().__init__(width, heads, layers, std, position_std)
        self.token = nn.Parameter(position_std * torch.randn(width))
        self.token_position = nn.Parameter(position_std * torch.randn(width))

    def embed(self, f):
        """(B, T, D) -> (B, 1 + T, D), the input of the transformer"""
        token = (self.token + self.token_position).expand(len(f), 1, -1)
        return torch.cat([token, f + self.frame_position_embeddings.weight[:f.shape[1]]], 1)

    def forward_heads(self, f):
        """(B, T, D) -> h_token, h_frame (B, D)"""
        z = self.transformer(self.embed(f))                                     # (B, 1 + T, D)
        h_token = z[:, 0] + f.mean(1)                                           # (B, D)        (3)
        h_frame = (z[:, 1:] + f).mean(1)                                        # (B, D)        (3)
        return h_token, h_frame

    def forward(self, f):
        return merge_heads(*self.forward_heads(f))


class OneHead(common.FusionHead):
    """ActionCLIP without a second head: h_frame stands for both"""

    def forward_heads(self, f):
        h_frame = self(f)
        return h_frame, h_frame


class LinearFusionHead(common.FusionHead):
    """Two heads without a token: a linear layer on h_frame takes its place"""

    def __init__(self, width, *settings):
        super().__init__(width, *settings)
        self.linear = nn.Linear(width, width)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward_heads(self, f):
        h_frame = super().forward(f)
        return self.linear(h_frame), h_frame

    def forward(self, f):
        return merge_heads(*self.forward_heads(f))


class SpatialTask(NamedTuple):
    """Something to predict about a video besides its action"""
    name: str
    labels: list                                                                # J strings
    templates: list = ("a photo of {}",)
    targets: torch.Tensor = None                                                # (N, J), eq. (3)


class SpatialHeads(nn.Module):
    """The heads h_k of eq. (4), one linear layer per task, and their scales s_k. At the start they
    are the identity, and their scale is that of the student."""

    def __init__(self, width, tasks, scale):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, width) for _ in tasks)
        self.logit_scale = nn.Parameter(torch.full((len(tasks),), math.log(scale)))
        for head in self.heads:
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, v, label_embeddings):
        """v (B, D), label_embeddings (J, D) of each task -> logits (B, J) of each task"""
        logits = []
        with torch.autocast(v.device.type, enabled=False):
            for head, scale, u in zip(self.heads, self.logit_scale.exp(), label_embeddings,
                                      strict=True):
                h = F.normalize(head(v.float()), dim=-1)                        # (B, D)
                cosine = h @ F.normalize(u.float(), dim=-1).T                   # (B, J)
                logits.append(scale * cosine)                                   # (B, J)        (4)
        return logits


class Variant(NamedTuple):
    """token_loss: "labels", "hard" or "soft" in eq. (6); None: only h_frame is trained.
    seed_offset: is added to --seed"""
    token_loss: str | None = None
    fusion_head: type = OneHead
    spatial: bool = False
    seed_offset: int = 0


VARIANTS = {
    "one_head": Variant(),
    "two_heads": Variant("labels", TokenFusionHead),
    "two_heads_soft": Variant("soft", TokenFusionHead),
    "two_heads_hard": Variant("hard", TokenFusionHead),
    "two_frame_heads": Variant("labels", LinearFusionHead),
    "one_head_soft": Variant("soft"),
    "linear_head_soft": Variant("soft", LinearFusionHead),
    "second_one_head": Variant(seed_offset=1)}


class DeiTStudent(nn.Module):
    """An ActionCLIP, and its spatial heads if the variant has spatial tasks"""

    def __init__(self, model, variant, tasks):
        super().__init__()
        self.model = model
        self.token_loss = variant.token_loss
        self.seed_offset = variant.seed_offset
        self.tasks = tasks if variant.spatial else []
        if self.tasks:
            scale = model.clip_model.logit_scale.exp().item()
            self.heads = SpatialHeads(model.embed_dim, tasks, scale)

    def forward(self, video, sentences, label_sentences):
        """sentences: token ids (B, length), the last ones for eq. (6); label_sentences (J, length)
        per task -> h_token, h_frame (B, D), embeddings, s, and logits (B, J) per task"""
        h_token, h_frame = self.model.fusion.forward_heads(self.model.encode_frames(video))
        texts = [self.model.encode_text(tokens) for tokens in sentences]        # (B, D) each
        spatial_logits = []
        if self.tasks:
            u = self.model.encode_text(torch.cat(label_sentences))              # (sum of J, D)
            u = u.split([len(tokens) for tokens in label_sentences])            # (J, D) each
            spatial_logits = self.heads(merge_heads(h_token, h_frame), u)
        scale = self.model.clip_model.logit_scale.exp()
        return h_token, h_frame, texts, scale, spatial_logits


def load_model(file, args):
    """-> the ActionCLIP of a checkpoint, with its heads; T becomes that of its training"""
    fusion = common.read_weights(file).get("fusion", {})
    fusion_head = OneHead
    if "token" in fusion:
        fusion_head = TokenFusionHead
    elif "linear.weight" in fusion:
        fusion_head = LinearFusionHead
    model = common.build_actionclip(args.teacher, fusion_head, Path(args.out, "cache"), file)
    args.frames = model.frames or args.frames
    return model.to(DEVICE).eval()


def load_targets(data, args):
    """-> the spatial tasks that spatial_kd.py has made for these training videos; their labeller"""
    paths = [args.targets] if args.targets else Path(args.out, "spatial_kd").glob("*/targets.pt")
    for path in sorted(paths, key=os.path.getmtime, reverse=True):  # from new to old
        saved = common.read_checkpoint(path, "tasks", "labeller", "digest")
        if saved["digest"] == data.digest():
            args.targets = str(path)
            return [SpatialTask(**task) for task in saved["tasks"]], saved["labeller"]
    raise common.BadInput(f"--grid needs targets: first run, with --labeller, python "
                          f"spatial_kd.py --label-only --data {args.data} --split {args.split} "
                          f"--seed {args.seed}")


def to_device(numbers):
    """A list -> a tensor, without waiting for the GPU"""
    return torch.tensor(numbers).to(DEVICE, non_blocking=True)


def train(variant, student, teacher, data, can_flip, args, folder):
    """Train a variant by eqs. (5) and (7); the teacher is trained. -> history, metrics per epoch"""
    model = student.model
    kind = student.token_loss
    seed = args.seed + student.seed_offset
    uses_teacher = kind in ("hard", "soft")
    if uses_teacher:
        teacher.eval().requires_grad_(False)  # the teacher is frozen
        teacher_text = teacher.encode_classes(data.classes)                     # (P, K, D_T)

    # frames are decoded once, at the size that the larger of the two networks needs
    short_side = max(model.resize_to, teacher.resize_to)
    dataset = common.VideoDataset(data.train, args.frames, short_side, train=True, seed=seed)
    loader = common.VideoLoader(dataset, args.batch_size, args.workers,
                                undecodable=data.undecodable)
    optimizer, schedule = make_optimizer(student, args.lr, args.epochs * len(loader))
    modules = {"model_state_dict": model.clip_model, "fusion_model_state_dict": model.fusion,
               "optimizer": optimizer, "schedule": schedule}
    if student.tasks:
        modules["spatial_heads"] = student.heads
    path = folder / f"{variant}-last.pt"
    metadata = model.metadata(args.frames, data)
    history = resume_training(path, metadata, modules)
    model.clip_model.set_grad_checkpointing(args.grad_checkpointing)
    ddp_student = nn.parallel.DistributedDataParallel(student) if WORLD_SIZE > 1 else student
    prompts = model.tokenize_classes(data.classes)                              # (P, K, length)
    label_prompts = [model.tokenize_classes(task.labels, task.templates) for task in student.tasks]
    targets = [task.targets.float().to(DEVICE) for task in student.tasks]       # (N, J) each
    teacher_logits = None

    for epoch, batches in loader.epochs(len(history), args.epochs):
        start_time = time.time()
        losses = []
        student.train()
        progress = tqdm(batches, f"{variant} {epoch + 1}", len(loader), leave=False, disable=None)
        for step, batch in enumerate(progress):
            # augment: one crop, flip and colour change for all frames of a video
            video = common.augment(batch, model.crop_size, can_flip, seed, DEVICE)
            local_labels = to_device(batch.label)                               # (B/W,)

            # the frozen teacher sees the same frames, at its own resolution
            if uses_teacher:
                teacher_video = video
                if teacher.crop_size != model.crop_size:
                    teacher_video = common.augment(batch, teacher.crop_size, can_flip, seed, DEVICE)
                with torch.no_grad(), autocast():
                    v, _, teacher_scale = teacher(teacher_video, None)          # (B/W, D_T)
                teacher_logits = class_logits(v.float(), teacher_text, teacher_scale)  # (B/W, K)

            # say the class of each video in one of ActionCLIP's 16 sentences, drawn at random
            template_ids = to_device([np.random.default_rng([seed, *key, 1]).integers(16)
                                      for key in batch.rng_key])                # (B/W,)
            sentences = [prompts[template_ids, local_labels]]                   # (B/W, length)

            # hard loss: say the teacher's class of each video; soft loss: say all classes
            rng = np.random.default_rng([seed, epoch, step, 3])
            if kind == "hard":
                sentences.append(prompts[template_ids, teacher_logits.argmax(1)])  # (B/W, length)
            elif kind == "soft":
                sentences.append(prompts[rng.integers(16)])                     # (K, length)

            # spatial tasks: say all labels of a task under one of its templates
            label_sentences = [tokens[rng.integers(len(tokens))] for tokens in label_prompts]

            # run the student; the losses compare the B videos of all GPUs
            with autocast():
                h_token, h_frame, texts, scale, spatial_logits = ddp_student(
                    video, sentences, label_sentences)
            h_token = gather(h_token.float())                                   # (B, D)
            h_frame = gather(h_frame.float())                                   # (B, D)
            text = gather(texts[0].float())                                     # (B, D)
            labels = gather(local_labels)                                       # (B,)

            # the frame head learns from the labels
            loss = actionclip_loss(h_frame, text, labels, scale)                # ()            (1)
            terms = {"frame_loss": loss}

            # the token learns from the labels, or from the teacher
            if kind:
                token_text = texts[-1].float()                                  # (B/W or K, D)
                if kind != "soft":
                    token_text = gather(token_text)                             # (B, D)
                if uses_teacher:
                    teacher_logits = gather(teacher_logits)                     # (B, K)
                token_term = token_loss(kind, h_token, token_text, labels, teacher_logits, scale,
                                        args.tau)                               # ()            (6)
                loss = deit_loss(loss, token_term, args.alpha)                  # ()            (7)
                terms[f"{kind}_loss"] = token_term

            # technique 2: both heads together learn what a frozen CLIP has seen in the frames
            rows = gather(to_device([index for _, index in batch.rng_key]))     # (B,)
            spatial_losses = {}
            for task, z, q in zip(student.tasks, spatial_logits, targets, strict=True):
                spatial_losses[task.name] = spatial_loss(gather(z), q[rows])    # ()            (4)
            loss = total_loss(loss, list(spatial_losses.values()), args.lambda_)  # ()          (5)
            terms |= spatial_losses

            # update the weights; the learned scales are at most 100, as in CLIP
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            for name, weight in student.named_parameters():
                if name.endswith("logit_scale"):
                    weight.data.clamp_(max=math.log(100))
            losses.append(torch.stack(list(terms.values())).detach())

        # one line per epoch, and a checkpoint from which --resume continues
        metrics = {"variant": variant, "epoch": epoch + 1}
        metrics.update(zip(terms, epoch_means(losses, epoch), strict=True))
        num_videos = len(loader) * loader.batch_sampler.batch_size
        metrics["videos_per_s"] = round(num_videos / (time.time() - start_time))
        if args.test_every and (epoch + 1) % args.test_every == 0:
            metrics["top1"] = evaluate(model, data, args)[0]["top1"]
        log_and_checkpoint(metrics, history, args.epochs, path, metadata, modules)
    model.clip_model.set_grad_checkpointing(False)  # testing stores no activations
    return history


@torch.no_grad()
def evaluate(model, data, args, path=None):
    """Test on all videos, and write the predictions to `path` if given -> {"top1": of what is
    deployed, "frame", "token": of each head, None if there is one head}; its class probabilities
    (N, K). Videos that cannot be decoded, with label -1, count as wrong."""
    text = model.eval().encode_classes(data.classes)
    dataset = common.VideoDataset(data.test, args.frames, model.resize_to)
    loader = common.VideoLoader(dataset, args.batch_size, args.workers,
                                undecodable=data.undecodable)
    p = torch.zeros(3, len(dataset), len(data.classes), device=DEVICE)          # (3, N, K)
    for batch in tqdm(loader, "test", leave=False, disable=None):
        video = common.center_crop(batch.video, model.crop_size, DEVICE)
        rows = to_device([index for _, index in batch.rng_key])                 # (B/W,)
        decodable = to_device(batch.label)[:, None] >= 0                        # (B/W, 1)
        with autocast():
            h_token, h_frame = model.fusion.forward_heads(model.encode_frames(video))
        merged = merge_heads(h_token.float(), h_frame.float())
        for i, h in enumerate((merged, h_frame, h_token)):
            p[i, rows] = class_probabilities(h.float(), text) * decodable       # (B/W, K)
    if WORLD_SIZE > 1:
        dist.all_reduce(p)
    if path and RANK == 0:
        save_predictions(path, data, p[0])
    top1, frame, token = [accuracy(p_head, data) for p_head in p]
    if isinstance(model.fusion, OneHead):
        frame = token = None
    return {"top1": top1, "frame": frame, "token": token}, p[0]


def accuracy(p, data):
    """Class probabilities (N, K) of the test videos -> top-1"""
    labels = to_device([label for _, label in data.test])                       # (N,)
    correct = (p.argmax(1) == labels) & (p.amax(1) > 0)                         # (N,)
    return correct.float().mean().item()


def median_ms(function):
    """Median milliseconds of 20 calls after 3 for warm-up; fewer calls after 5 s, at least one"""
    times = []
    for _ in tqdm(range(23), "benchmark", leave=False, disable=None):
        start_time = time.perf_counter()
        function().cpu()  # waits for the GPU
        times.append(1e3 * (time.perf_counter() - start_time))
        if sum(times) > 5000:
            break
    return float(np.median(times[3:] or times[-1:]))


@torch.no_grad()
def benchmark_embedding(model, frames):
    """-> size and speed of a model, whose class texts are encoded in advance"""
    side = model.eval().crop_size
    videos = torch.rand(32 if USE_CUDA else 4, frames, 3, side, side, device=DEVICE)
    with autocast():
        ms = median_ms(lambda: model.encode_video(videos[:1]))
        batch_ms = median_ms(lambda: model.encode_video(videos))
    return {"params M": model.num_params_m(), "GMAC/video": model.gmacs(frames), "ms/video": ms,
            "videos/s": 1e3 * len(videos) / batch_ms}


@torch.no_grad()
def token_attention(model, video):
    """Attention of the token to the frames of video (B, T, 3, S, S), mean over layers and attention
    heads -> (B, T), whose rows sum to 1"""
    x = model.fusion.embed(model.encode_frames(video))                          # (B, 1 + T, D)
    layers = []
    for block in model.fusion.transformer.resblocks:
        normed = block.ln_1(x)
        _, attention = block.attn(normed, normed, normed)                       # (B, 1 + T, 1 + T)
        layers.append(attention[:, 0, 1:])
        x = block(x)
    return F.normalize(sum(layers), p=1, dim=-1)                                # (B, T)


@torch.no_grad()
def save_attention_picture(variant, model, data, args, path):
    """Draw eight test videos. Bars: the token's attention to each frame; gray line: uniform"""
    chosen = data.test[::max(1, len(data.test) // 8)][:8]
    dataset = common.VideoDataset(chosen, args.frames, model.resize_to)
    videos = [dataset[0, n].video for n in range(len(chosen))]
    videos = common.center_crop(videos, model.crop_size, DEVICE)                # (8, T, 3, S, S)
    p = class_probabilities(model.encode_video(videos), model.encode_classes(data.classes))
    heights = (10 * args.frames * token_attention(model, videos)).int().clamp(max=40)  # (8, T)
    # above each frame, a line of text and a bar
    images = F.interpolate(videos.flatten(0, 1).cpu(), 112)
    images = F.pad(images, (2, 2, 66, 6), value=1.)
    images[:, :, 56] = .6
    for image, height in zip(images, heights.flatten(), strict=True):
        image[:2, 66 - height:66, 42:74] = .3  # blue
    picture = F.pad(make_grid(images, args.frames, padding=0), (0, max(0, 460 - 116 * args.frames),
                                                               30, 0), value=1.)
    lines = [(0, f"{variant} on {data.name}. Bars: attention of the token; line: uniform", "black")]
    for n, (_, label) in enumerate(chosen):
        prediction = p[n].argmax()
        colour = "green" if prediction == label else "red"
        text = f"truth: {data.classes[label]}    predicted: {data.classes[prediction]}"
        lines.append((30 + 184 * n, text, colour))
    for y, text, colour in lines:
        # torchvision draws text only as the label of a box
        box = torch.tensor([[0, y, 0, y]])
        picture = draw_bounding_boxes(picture, box, [text], "white", label_colors=[colour])
    save_image(picture, path)


def main(argv=None):
    """Train, test and benchmark the teacher and the variants. -> {variant: results}"""
    args = parse(argv)
    start_time = time.time()
    if args.student.startswith("toy-"):
        torch.set_num_threads(1)  # small networks are faster on one thread
    if args.watch is not None:
        return watch(load_model(args.eval_only, args), args)
    join_processes()

    # data; with --unseen, there are several test sets
    cache = Path(args.out, "cache")
    toys = "toy-diagonals" if args.unseen else "toy"
    data = common.load_dataset(args.data, args.split, args.allow_missing, cache, toys,
                               test_only=args.eval_only is not None)
    test_sets = common.hold_out_classes(data, args.unseen, args.seed)
    data = common.subsample_shots(test_sets[""], args.shots, args.seed)
    tasks, labeller = load_targets(data, args) if args.grid else ([], None)
    data = common.corrupt_labels(data, args.label_noise, args.seed)
    test_sets[""] = data

    can_flip = common.flippable(data.classes)
    if args.grid or args.no_flip:
        can_flip = [False] * len(data.classes)  # labels of the tasks tell left from right

    first = "teacher"
    variants = {name: VARIANTS[name] for name in args.variants}
    if args.grid:
        first = "base"
        variants = {"swap": Variant(), "swap_spatial": Variant(spatial=True),
                    "swap_two_heads": Variant(args.grid, TokenFusionHead),
                    "all_three": Variant(args.grid, TokenFusionHead, spatial=True)}
    if args.eval_only:
        first = "eval_only"
        variants = {}

    # the teacher, and the variants of the student
    checkpoint = args.eval_only or args.teacher_checkpoint
    torch.manual_seed(args.seed)
    if checkpoint:
        teacher = load_model(checkpoint, args)
    else:
        teacher = common.build_actionclip(args.teacher, OneHead, cache).to(DEVICE)
    students = {first: DeiTStudent(teacher, Variant(), [])}
    for name, variant in variants.items():
        # initial weights do not depend on the other variants
        torch.manual_seed(args.seed + variant.seed_offset)
        model = common.build_actionclip(args.student, variant.fusion_head, cache)
        students[name] = DeiTStudent(model, variant, tasks).to(DEVICE)

    folder = make_run_folder("deit_video", args)
    if RANK == 0:
        never = [name for name, flip in zip(data.classes, can_flip, strict=True) if not flip]
        flips = f"never flipped: {', '.join(never) or 'none'}"
        if not any(can_flip):
            flips = "flipped: no class"
        print(f"run: {folder}\n{data}\n{flips}; {args.frames} frames per video; {WORLD_SIZE} "
              f"process(es), {DEVICE_NAME}", flush=True)
        if args.grid:
            print(f"targets of the spatial tasks: {args.targets}, by {labeller}", flush=True)
            if labeller.startswith("toy-") and tasks[0].name != "colour":
                print(f"NOTE {labeller} was trained on toy images; its labels are meaningless here")
        seen = torch.isin(common.video_ids(data.test), teacher.trained_on).sum().item()
        if seen:
            print(f"NOTE {checkpoint} was trained on {seen} of {len(data.test)} test videos")
        if not args.resume:  # --resume reads the flags of this file
            save_results(folder, data, args, {}, [], start_time)

    # train and test
    results = {}
    scores = {}
    history = []
    p = {}
    for name, student in students.items():
        if not checkpoint or student.model is not teacher:
            history += train(name, student, teacher, data, can_flip, args, folder)
        results[name] = {"variant": name, "backbone": student.model.name}
        for suffix, test_set in test_sets.items():
            path = folder / f"{name}{suffix}-predictions.csv"
            top1, p[name + suffix] = evaluate(student.model, test_set, args, path)
            results[name][f"top1{suffix}"] = scores[name + suffix] = top1["top1"]
            if suffix == "":
                results[name] |= top1
        if results[name]["token"] is not None:
            scores[f"{name}_frame"] = results[name]["frame"]
            scores[f"{name}_token"] = results[name]["token"]
    if {"one_head", "second_one_head"} <= p.keys():
        results["ensemble"] = {**results["one_head"], "variant": "ensemble"}
        for suffix, test_set in test_sets.items():
            top1 = accuracy(p[f"one_head{suffix}"] + p[f"second_one_head{suffix}"], test_set)
            results["ensemble"][f"top1{suffix}"] = scores[f"ensemble{suffix}"] = top1
    if WORLD_SIZE > 1:
        dist.destroy_process_group()

    # benchmark when nothing else is running
    if RANK == 0:
        for name, student in students.items():
            print(f"measuring the speed of {name} ...", file=sys.stderr)
            results[name] |= benchmark_embedding(student.model, args.frames)
            if isinstance(student.model.fusion, TokenFusionHead):
                save_attention_picture(name, student.model, data, args, folder / "attention.png")
        if "ensemble" in results:
            one, two = results["one_head"], results["second_one_head"]
            costs = {name: one[name] + two[name] for name in ("params M", "GMAC/video", "ms/video")}
            costs["videos/s"] = 1 / (1 / one["videos/s"] + 1 / two["videos/s"])
            results["ensemble"] |= costs
        save_results(folder, data, args, {**results, "scores": scores}, history, start_time)
        report(results, scores, test_sets, args, start_time)
    return results


def report(results, scores, test_sets, args, start_time):
    """Print the table, what its columns mean, and the RESULT line."""
    data = test_sets[""]
    print(format_table(list(results.values()), [f"top1{suffix}" for suffix in test_sets]))
    print(f"* best top-1 on {len(data.test)} test videos, chance 1/{len(data.classes)}. frame, "
          f"token: top-1 of each head; top1: of both, eq. (8).\nparams M: millions, without token "
          f"embeddings. GMAC, ms: with class texts encoded before. videos/s: in batches.")
    if args.grid:
        student = results["all_three"]
        base = results["base"]
        columns = "params M", "GMAC/video", "ms/video", "videos/s"
        ratios = [f"{column} x{student[column] / base[column]:.2f}" for column in columns]
        print(f"all_three / base: {', '.join(ratios)}")
    for warning in data.warnings():
        print(f"NOTE {warning}")
    numbers = " ".join([f"{name}={top1:.4f}" for name, top1 in scores.items()])
    print(f"RESULT deit_video data={data.name} split={args.split} seed={args.seed} {numbers} "
          f"seconds={time.time() - start_time:.0f}")


def split_labels(text):
    """"waving, running" -> ["waving", "running"], without repetitions"""
    labels = [label.strip() for label in text.split(",")]
    return [label for label in dict.fromkeys(labels) if label]


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)

    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy",
        help="toy (default), toy-crowded, or a folder in a format of the README")
    add("--split", type=int, default=1, choices=(1, 2, 3), help="train/test split (default: 1)")
    add("--allow-missing", action="store_true", help="ignore listed videos that do not exist")
    add("--unseen", type=int, default=0, help="classes to hold out and test zero-shot (default: 0)")
    add("--shots", type=int, default=0, help="training videos per class (default: all)")
    add("--label-noise", type=float, default=0., help="share of wrong training labels (default: 0)")
    add("--no-flip", action="store_true", help="never mirror videos in training")
    add("--frames", type=int, default=8, help="frames per video (default: 8)")

    add = parser.add_argument_group("model").add_argument
    add("--teacher", metavar="NAME[:WEIGHTS]", default="toy-large",
        help="backbone of the teacher, which is trained first (default: toy-large)")
    add("--teacher-checkpoint", metavar="FILE", help="an ActionCLIP that is the teacher, as it is")
    add("--student", metavar="NAME[:WEIGHTS]", default="toy-small",
        help="backbone of the variants (default: toy-small)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:3],
        help="what is trained (default: one_head two_heads two_heads_soft)")
    add("--grid", nargs="?", const="labels", choices=("labels", "hard", "soft"),
        help="instead, all three techniques, with this loss of the token (default: labels)")
    add("--targets", metavar="FILE", help="targets.pt for --grid (default: the newest that fits)")
    add("--eval-only", metavar="FILE",
        help="test this checkpoint, or --watch with it; there may be no training list")

    add = parser.add_argument_group("training").add_argument
    add("--alpha", type=float, default=.5, help="weight of the token's loss (default: 0.5)")
    add("--tau", type=float, default=1., help="temperature of the soft loss (default: 1)")
    add("--lambda", type=float, dest="lambda_", metavar="WEIGHT", default=.5,
        help="weight of the spatial losses (default: 0.5)")
    add("--epochs", type=int, help="number of epochs (default: 50, toy data 6)")
    add("--batch-size", type=int, default=32, help="videos per batch, on all GPUs (default: 32)")
    add("--grad-checkpointing", action="store_true",
        help="compute activations twice instead of storing them: slower, for small GPU memories")
    add("--lr", type=float, help="learning rate of the towers (default: 5e-6, toy networks 4e-4)")
    add("--test-every", type=int, default=0, metavar="EPOCHS",
        help="also test after every so many epochs, for learning curves (default: only at the end)")
    add("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    add("--workers", type=int, default=max(1, min(16, os.cpu_count() - 1)),
        help="number of data loading processes (default: CPU cores - 1, at most 16)")
    add("--resume", metavar="RUN", help="continue the interrupted run in this folder")

    add = parser.add_argument_group("live").add_argument
    add("--watch", metavar="SOURCE", help="label a live video: a file, an address, - (standard "
        "input), or a camera (/dev/video0, avfoundation:0, dshow:video=NAME)")
    add("--labels", type=split_labels, default=[],
        help='any words for --watch to choose from, such as "waving, running" (default: the '
        "checkpoint's classes)")
    add("--threshold", type=float, default=.5,
        help="--watch names no label that is less probable (default: 0.5)")
    add("--fps", type=float, default=4., help="frames per second for --watch (default: 4)")
    add("--no-drop", action="store_true", help="label every sampled frame, however late")

    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="FOLDER", default="runs", help="folder of runs and cache (default: runs)")

    args = parse_flags(parser, argv, {
        "epochs": (1, 10**6), "frames": (1, 77), "shots": (0, 10**9), "label_noise": (0, 1),
        "batch_size": (2, 10**6),  # eq. (1) compares the videos of a batch
        "alpha": (0, 1), "tau": (1e-6, 1e6), "lambda_": (0, 1e6), "lr": (1e-12, 10),
        "fps": (.01, 1000), "threshold": (0, 1), "seed": (0, 2**63 - 1),
        "test_every": (0, 10**6)})
    if args.epochs is None:
        args.epochs = 6 if args.data == "toy" else 50
    if args.lr is None:
        args.lr = 4e-4 if args.student.startswith("toy-") else 5e-6
    if args.watch is not None and not args.eval_only:
        parser.error("--watch needs --eval-only")
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


def gather(x):
    """(B/W, ...) in each of W processes -> (B, ...): in-batch losses see the batch of all GPUs."""
    if WORLD_SIZE == 1:
        return x
    shards = [torch.empty_like(x) for _ in range(WORLD_SIZE)]
    dist.all_gather(shards, x.detach().contiguous())
    # only the local shard carries gradients; times W, because DDP averages them over processes
    shards[RANK] = x + (WORLD_SIZE - 1) * (x - x.detach())
    return torch.cat(shards)


def make_optimizer(model, lr, steps):
    """AdamW as in ActionCLIP: CLIP's towers learn at lr, new layers at 10 lr. Norms, biases,
    embeddings and scales do not decay. Linear warm-up in the first tenth, then cosine to 0."""
    groups = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            rate = lr if "clip_model." in name else 10 * lr
            decay = .2 if weight.ndim > 1 and "embedding" not in name else 0.
            group = {"params": [], "lr": rate, "weight_decay": decay}
            groups.setdefault((rate, decay), group)["params"].append(weight)
    optimizer = torch.optim.AdamW(list(groups.values()), betas=(.9, .98), fused=True)
    return optimizer, warmup_and_cosine(optimizer, steps)


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


def format_table(rows, compare=()):
    """Dicts with the same keys -> aligned text. None becomes "-"; the highest value of each column
    in `compare` gets a star."""
    best = {name: max(row[name] for row in rows if row[name] is not None) for name in compare}
    lines = [list(rows[0])]
    for row in rows:
        cells = []
        for name, x in row.items():
            cell = "-" if x is None else str(x)
            if isinstance(x, float):
                cell = f"{x:.4f}" if 0 <= x <= 1 else f"{x:.4g}"
            if name in best:
                cell += "*" if x == best[name] else " "
            cells.append(cell)
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


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


# ---- live video: --watch -------------------------------------------------------------------------


@torch.no_grad()
def stream_step(model, embeddings, frame, text):
    """Classify a stream after a new frame, uint8 (3, H, W). Each frame is encoded only once:
    `embeddings`, a deque, keeps those of the last T frames. Before T frames have come, the first
    one fills the gaps. text (P, K, D) -> probabilities (K,)"""
    frame = common.center_crop([frame[None]], model.crop_size, DEVICE)          # (1, 1, 3, H, W)
    with autocast():
        embeddings.append(model.encode_frames(frame)[:, 0])                     # (1, D)
        while len(embeddings) < embeddings.maxlen:
            embeddings.append(embeddings[0])
        v = model.fusion(torch.stack(tuple(embeddings), 1)).float()             # (1, D)
    return class_probabilities(v, text)[0]                                      # (K,)


def watch(model, args):
    """Print the most probable labels of a live video once per second, until it ends or Ctrl-C."""
    labels = args.labels or model.classes
    if len(labels) < 2:
        raise common.BadInput('--watch needs two labels or more: --labels "waving, running"')
    text = model.encode_classes(labels)                                         # (P, K, D)
    embeddings = collections.deque(maxlen=model.frames or args.frames)
    is_toy = os.path.isfile(Path(args.watch).parent / "../toy_attributes.json")
    if model.name.startswith("toy-") and not is_toy:
        print(f"NOTE {model.name} is a toy network: its labels for a real video mean little")
    print(f"{model.name} on {DEVICE_NAME}, {embeddings.maxlen} frames, {args.fps:g} per second; "
          f"labels: {', '.join(labels)}", flush=True)
    line, last_second, latencies = "", 0, []
    try:
        for seconds, frame in common.live_frames(args.watch, args.fps, drop=not args.no_drop):
            start_time = time.perf_counter()
            frame = common.frame_to_tensor(frame, model.resize_to)              # (3, H, W)
            p = stream_step(model, embeddings, frame, text).cpu()               # (K,)
            latencies.append(1e3 * (time.perf_counter() - start_time))
            top3 = [f"{labels[k]} {p[k]:.2f}" for k in p.argsort(descending=True)[:3]]
            label = labels[p.argmax()] if p.max() >= args.threshold else "-"
            line = f"{seconds:7.1f} s  {label:20} {latencies[-1]:6.1f} ms  {', '.join(top3)}\n"
            if int(seconds) > last_second:
                print(line, end="", flush=True)
                line, last_second = "", int(seconds)
    except KeyboardInterrupt:
        print("interrupted")
    except common.BadVideo as error:
        raise common.BadInput(f"--watch {args.watch}: {error.reason}") from error
    finally:
        p50, p95 = np.percentile(latencies or [0], (50, 95))
        print(f"{line}RESULT {Path(__file__).stem} watch={args.watch} frames={len(latencies)} "
              f"p50_ms={p50:.1f} p95_ms={p95:.1f}")


if __name__ == "__main__":
    run_cli(main)
