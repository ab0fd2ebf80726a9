"""ActionCLIP with a TinyCLIP backbone: a smaller, distilled CLIP replaces the original one.

Technique 1 of Frans Huntink's master thesis, "Bridging the gap: Threefold knowledge distillation
for language-enabled action recognition models operating in real-time scenarios" (Utrecht, 2024),
on ActionCLIP (Wang, Xing, Liu 2021, arXiv 2109.08472) and TinyCLIP (Wu et al., ICCV 2023).

ActionCLIP encodes T frames of a video with CLIP's image tower, which is nearly all of its cost. The
fusion head, a small transformer over the frames, turns them into one video embedding. The class
whose sentence, such as "A video of waving", has the most similar text embedding wins. TinyCLIP is a
smaller CLIP, distilled from a large one on images with captions. Here it replaces both towers, and
the model is fine-tuned on actions as usual. The original (`large`) and the replacement (`small`)
are trained, tested and benchmarked alike.

Teacher: none in the plain command, since TinyCLIP's authors have done the distillation. --affinity
trains a second small model, `small_affinity`; its teacher is the trained large model, frozen.
Controls: `small` is trained for the same steps without a teacher. --small NAME:random has the same
size without TinyCLIP's weights. --compare trains other models on the large backbone: ViFi-CLIP
(Rasheed et al., CVPR 2023: mean over frames) and Text4Vis (Wu et al., AAAI 2023: frozen class
texts). Its control is zero-shot CLIP, which is not trained and cannot see the order of frames.

B videos with labels y, K classes, P templates. v, t (B, D): embeddings of videos and texts; v*, t*:
the teacher's. x^ = x / |x|. s = exp(logit_scale) is learned. A(v, t, s) = softmax of each row of
s v^ t^', where ' transposes.
  (1) actionclip_loss      L = 1/2 [KL(G || A(v, t, s)) + KL(G || A(t, v, s))]
                           G = softmax of each row of 10 [y_i = y_k]; KL: sum over k, mean over B
  (2) class_probabilities  p(k) = 1/P sum_p softmax_k(100 v^ . t_pk^), P = 16 sentences per class;
                           the prediction is the class of the largest p, mean over a video's views
  (3) affinity_loss        L = 1/2 [CE(A(v*, t*, 50), A(v, t, s)) + CE(A(t*, v*, 50), A(t, v, s))]
                           CE(a, b) = -sum_k a_k log b_k, mean over B; no labels; added to (1)
  (4) class_cross_entropy  L = -log softmax_k(s v^ . t_k^)[y], mean over B, for ViFi-CLIP and
                           Text4Vis; t (K, D): all classes under one template
Schedule: AdamW, lr 5e-6 for CLIP's towers (toy networks 4e-4), 10 times that for the fusion head,
weight decay .2; linear warm-up in the first tenth of the steps, then cosine to 0; 50 epochs (toy
data 6), batch 32. All weights are trained, except Text4Vis's text tower.

  python tinyclip_swap.py                       toy videos, 1 to 2 minutes on 2 CPU cores
  python tinyclip_swap.py --affinity            also small_affinity, by eqs. (1) and (3)
  python tinyclip_swap.py --data toy-crowded --epochs 150        harder toys, trained much longer
  python tinyclip_swap.py --compare             ActionCLIP, ViFi-CLIP, Text4Vis, zero-shot CLIP
  python tinyclip_swap.py --unseen 4            hold out four classes and test them zero-shot
  for s in 2 4 8 16; do python tinyclip_swap.py --shots $s; done      few-shot learning
  python tinyclip_swap.py --data HMDB51 --large ViT-B-32:openai --batch-size 64 \\
      --small TinyCLIP-ViT-40M-32-Text-19M:LAION400M
  python tinyclip_swap.py --data HMDB51 --eval-only ViT-B-32:kinetics400-8f
  python tinyclip_swap.py --watch my.mp4 --eval-only ViT-B-32:openai --labels "waving, running"

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0):
RESULT tinyclip_swap data=toy split=1 seed=0 large=0.9833 small=0.9267 gmac_ratio=0.4818
  seconds=114
large, small: top-1 accuracy on the test videos after the last epoch. After these 222 steps both
still learn, so that it compares their speed; toy-crowded compares what they can learn. gmac_ratio:
small's multiply-accumulates per video divided by large's. With --unseen, NAME_unseen: top-1 on the
held-out classes, told apart from each other; NAME_unseen_all: the same, told apart from all
classes.

Differs from ActionCLIP's code (sallymmx/ActionCLIP @31c34df): fp32 weights with bf16 autocast, not
fp16. Training frames are random within their segments. Crops lie anywhere (there: at 13 places, ten
equally likely pairs of sides). Colour jitter is drawn once per video, in a fixed order (there: per
frame, in random order). Classes that tell left from right are not flipped. Norms, biases,
embeddings and scales do not decay. logit_scale is at most ln 100. Gradients are clipped at norm 1.
All test videos count (there: the last batch is dropped). T = 1 takes the middle frame (there:
N // 2). The last epoch counts, not the best. Class names are split into words (its UCF101 models:
ApplyEyeMakeup).
From TinyCLIP: there, both scales in eq. (3) are 50; here, the small model keeps its learned scale.
From --compare's models, which train here as ActionCLIP does: ViFi-CLIP's code (@dea0d7e) has label
smoothing, mixup, CutMix, lr 8e-6 with a floor of lr / 100, weight decay .001. Text4Vis's (@d61b34d)
has betas (.9, .999), warms up in 5 of 30 epochs, and averages features over views. Dense windows
have Text4Vis's length (128 frames) and TSM's starts. X-CLIP is left out: its image tower attends
across frames.
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
from tqdm import tqdm

import common

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these three
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
USE_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if USE_CUDA else torch.device("cpu")
DEVICE_NAME = torch.cuda.get_device_name(DEVICE) if USE_CUDA else f"{platform.machine()} CPU"
TEACHER_LOGIT_SCALE = 50.  # in eq. (3)

# ---- the method: eqs. (1)-(4) --------------------------------------------------------------------


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


def scaled_cosine(video, text, scale):
    """The logits of eqs. (3) and (4). video (B, D), text (K, D); in eq. (3), K is B -> (B, K)"""
    return scale * F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T     # (B, K)


def affinity_loss(video, text, teacher_video, teacher_text, scale, teacher_scale):
    """Eq. (3), TinyCLIP's affinity mimicking. Student and teacher have their own D. -> scalar"""
    logits = scaled_cosine(video, text, scale)                                  # (B, B)
    target = scaled_cosine(teacher_video, teacher_text, teacher_scale)          # (B, B)
    video_to_text = F.cross_entropy(logits, target.softmax(1))                  # ()
    text_to_video = F.cross_entropy(logits.T, target.T.softmax(1))              # ()
    return (video_to_text + text_to_video) / 2                                  # ()            (3)


def class_cross_entropy(video, text, labels, scale):
    """Eq. (4). video (B, D), text (K, D), labels (B,) -> scalar"""
    return F.cross_entropy(scaled_cosine(video, text, scale), labels)           # ()            (4)


# ---- the rest is plumbing: models and training ---------------------------------------------------


class Recipe(NamedTuple):
    """How a variant is built and trained"""
    head: type = common.FusionHead  # over the frames
    text_tower: str = "trained"  # or "frozen"
    loss: str | None = "actionclip_loss"  # or "class_cross_entropy"; None: not trained
    templates: tuple = common.TEMPLATES


VARIANTS = {
    "large": Recipe(),
    "small": Recipe(),
    "small_affinity": Recipe(),
    "actionclip": Recipe(),
    "vifi_clip": Recipe(common.MeanHead, "trained", "class_cross_entropy", ("a photo of a {}.",)),
    "text4vis": Recipe(common.FusionHead, "frozen", "class_cross_entropy",
                       ("a video of a person {}.",)),
    "zero_shot": Recipe(common.MeanHead, "frozen", None),
    "eval_only": Recipe(common.MeanHead, "frozen", None)}


def build_model(variant, args):
    """Build the network of a variant. Its initial weights do not depend on the other variants."""
    torch.manual_seed(args.seed)
    recipe = VARIANTS[variant]
    spec = args.small if variant.startswith("small") else args.large
    if variant == "eval_only":
        spec = args.eval_only or args.large
    file = spec if Path(spec).is_file() else common.find_weights(spec)
    saved = common.read_weights(file) if file else {}
    head = saved.get("fusion")  # ActionCLIP's checkpoints have one, also those of this script
    if head and {"token", "linear.weight"} & head.keys():
        raise common.BadInput(f"{file} has two heads: use deit_video.py --eval-only {file}")
    if file == spec and "backbone" not in saved:
        raise common.BadInput(f"{file} does not name its backbone: write NAME:{file}")
    cache = Path(args.out, "cache")
    if variant != "eval_only" or head is None:
        model = common.build_actionclip(spec, recipe.head, cache)
        model.templates = recipe.templates
        return model.to(DEVICE)
    fusion_head = common.FusionHead if head else common.MeanHead
    model = common.build_actionclip(spec, fusion_head, cache, checkpoint=file)
    if model.frames is None:
        print(f"{file} does not say its number of frames; --frames {args.frames} is assumed")
    return model.to(DEVICE)


def train(variant, model, teacher, data, args, folder):
    """Train a variant by eq. (1) or (4), and with a teacher by eq. (3) too. Each epoch leaves a
    checkpoint. -> history, the metrics of each epoch"""
    recipe = VARIANTS[variant]
    dataset = common.VideoDataset(data.train, args.frames, model.resize_to, args.sampling,
                                  args.views, train=True, seed=args.seed)
    loader = common.VideoLoader(dataset, args.batch_size, args.workers,
                                undecodable=data.undecodable)
    can_flip = [flip and not args.no_flip for flip in common.flippable(data.classes)]
    prompts = model.tokenize_classes(data.classes)                              # (P, K, length)

    # Text4Vis: the text tower is frozen, so the classes are encoded only once
    frozen_text = None
    if recipe.text_tower == "frozen":
        frozen_text = model.encode_classes(data.classes)[0]                     # (K, D)
        for name, weight in model.clip_model.named_parameters():
            weight.requires_grad_(name.startswith("visual.") or name == "logit_scale")

    # the teacher is frozen
    if teacher:
        teacher.eval().requires_grad_(False)
        teacher_prompts = teacher.tokenize_classes(data.classes)                # (P, K, length)

    # a new run starts at epoch 0, a resumed one after its last checkpoint
    optimizer, schedule = make_optimizer(model, args.lr, args.epochs * len(loader))
    modules = {"model_state_dict": model.clip_model, "fusion_model_state_dict": model.fusion,
               "optimizer": optimizer, "schedule": schedule}
    path = folder / f"{variant}-last.pt"
    metadata = model.metadata(args.frames, data)
    history = resume_training(path, metadata, modules)
    model.clip_model.set_grad_checkpointing(args.grad_checkpointing)
    ddp_model = nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model

    for epoch, batches in loader.epochs(len(history), args.epochs):
        start_time = time.time()
        losses = []
        model.train()
        for batch in tqdm(batches, f"{variant} {epoch + 1}", len(loader), leave=False,
                          disable=None):
            # augment: one crop, flip and colour change for all frames of a video
            video = common.augment(batch, model.crop_size, can_flip, args.seed, DEVICE)
            local_labels = torch.tensor(batch.label).to(DEVICE, non_blocking=True)  # (B/W,)

            # say each video's class in one of ActionCLIP's 16 sentences, drawn at random
            if recipe.loss == "actionclip_loss":
                rngs = [np.random.default_rng([args.seed, *key, 1]) for key in batch.rng_key]
                template_ids = torch.tensor([rng.integers(16) for rng in rngs])
                template_ids = template_ids.to(DEVICE, non_blocking=True)       # (B/W,)
                tokens = prompts[template_ids, local_labels]                    # (B/W, length)
            # or say all classes in one sentence each
            else:
                tokens = prompts[0] if frozen_text is None else None            # (K, length)

            # encode the videos and the texts
            with autocast():
                v, t, scale = ddp_model(video, tokens)
            v = gather(v.float())                                               # (B, D)
            labels = gather(local_labels)                                       # (B,)

            # compare the videos of the batch, on all GPUs, with its sentences or with all classes
            if recipe.loss == "actionclip_loss":
                t = gather(t.float())                                           # (B, D)
                terms = [actionclip_loss(v, t, labels, scale)]                  # ()            (1)
            else:
                t = frozen_text if t is None else t.float()                     # (K, D)
                terms = [class_cross_entropy(v, t, labels, scale)]              # ()            (4)

            # the teacher sees the same frames at its own resolution, and the same sentences
            if teacher:
                if teacher.crop_size != model.crop_size:
                    video = common.augment(batch, teacher.crop_size, can_flip, args.seed, DEVICE)
                tokens = teacher_prompts[template_ids, local_labels]            # (B/W, length)
                with torch.no_grad(), autocast():
                    teacher_v, teacher_t, _ = teacher(video, tokens)
                teacher_v = gather(teacher_v.float())                           # (B, D)
                teacher_t = gather(teacher_t.float())                           # (B, D)
                terms.append(affinity_loss(v, t, teacher_v, teacher_t, scale,
                                           TEACHER_LOGIT_SCALE))                # ()            (3)

            # update all weights; the learned scale is bounded, as in CLIP
            sum(terms).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            model.clip_model.logit_scale.data.clamp_(max=math.log(100))
            losses.append(torch.stack(terms).detach())

        # print one line per epoch, and save a checkpoint from which --resume continues
        metrics = {"variant": variant, "epoch": epoch + 1}
        names = [recipe.loss, "affinity_loss"] if teacher else [recipe.loss]
        metrics.update(zip(names, epoch_means(losses, epoch), strict=True))
        videos = len(loader) * loader.batch_sampler.batch_size
        metrics["videos_per_s"] = round(videos / (time.time() - start_time))
        if args.test_every and (epoch + 1) % args.test_every == 0:
            metrics["top1"], _ = evaluate(model, data, args)
        log_and_checkpoint(metrics, history, args.epochs, path, metadata, modules)
    model.clip_model.set_grad_checkpointing(False)  # testing stores no activations
    return history


# ---- evaluation and benchmark --------------------------------------------------------------------


@torch.no_grad()
def classify(model, videos, text, views=1, crops=1):
    """videos: list of uint8 (V*T, 3, H, W); text (P, K, D) -> probabilities (B, K), the mean over
    the views and crops of a video"""
    video = common.center_crop(videos, model.crop_size, DEVICE, crops)
    views *= crops  # V counts both from here on
    video = video.unflatten(1, (views, -1)).flatten(0, 1)                       # (B*V, T, 3, H, W)
    with autocast():
        v = model.encode_video(video).float()                                   # (B*V, D)
    return class_probabilities(v, text).unflatten(0, (-1, views)).mean(1)       # (B, K)


def evaluate(model, data, args, path=None):
    """Test on all videos, and write the predictions to `path` if given -> top-1 and top-5 accuracy;
    undecodable videos count as wrong"""
    text = model.encode_classes(data.classes)                                   # (P, K, D)
    dataset = common.VideoDataset(data.test, args.frames, model.resize_to, args.sampling,
                                  args.views)
    loader = common.VideoLoader(dataset, args.batch_size, args.workers,
                                undecodable=data.undecodable)
    p = torch.zeros(len(dataset), len(data.classes), device=DEVICE)             # (N, K)
    for batch in tqdm(loader, "test", leave=False, disable=None):
        rows = torch.tensor([index for _, index in batch.rng_key])              # (B/W,)
        decodable = torch.tensor(batch.label, device=DEVICE)[:, None] >= 0      # (B/W, 1)
        p_batch = classify(model, batch.video, text, args.views, args.crops)    # (B/W, K)
        p[rows.to(DEVICE, non_blocking=True)] = p_batch * decodable
    if WORLD_SIZE > 1:
        dist.all_reduce(p)
    if path and RANK == 0:
        save_predictions(path, data, p)
    labels = torch.tensor([label for _, label in data.test], device=DEVICE)     # (N,)
    top5 = p.topk(min(5, len(data.classes)))
    correct = (top5.indices == labels[:, None]) & (top5.values[:, :1] > 0)      # (N, 5)
    return correct[:, 0].float().mean().item(), correct.any(1).float().mean().item()


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


def benchmark(model, data, args):
    """Size and speed of a model whose class texts are encoded in advance. -> table columns"""
    dataset = common.VideoDataset(data.test, args.frames, model.resize_to, args.sampling,
                                  args.views)
    text = model.encode_classes(data.classes)                                   # (P, K, D)
    shape = args.frames * args.views, 3, model.crop_size, model.crop_size
    videos = torch.randint(256, (32 if USE_CUDA else 4, *shape), dtype=torch.uint8)
    views = args.views, args.crops
    batch_ms = median_ms(lambda: classify(model, videos, text, *views))
    return {
        "params M": model.num_params_m(),
        "GMAC/video": model.gmacs(args.frames) * args.views * args.crops,
        "ms/video": median_ms(lambda: classify(model, videos[:1], text, *views)),
        "ms with decoding": median_ms(
            lambda: classify(model, [dataset[0, 0].video], text, *views)),
        "videos/s": 1e3 * len(videos) / batch_ms}


# ---- main ----------------------------------------------------------------------------------------


def main(argv=None):
    """Train, test and benchmark the variants. -> {variant: results}"""
    start_time = time.time()
    args = parse(argv)
    if args.large.startswith("toy-"):
        torch.set_num_threads(1)  # small networks run faster on one thread
    if args.watch is not None:
        return watch(build_model("eval_only", args), args)
    join_processes()

    # data: with --unseen, there are test sets of the held-out classes, too
    cache = Path(args.out, "cache")
    toys = "toy-diagonals" if args.unseen else "toy"
    data = common.load_dataset(args.data, args.split, args.allow_missing, cache, toys,
                               test_only=args.eval_only is not None)
    test_sets = common.hold_out_classes(data, args.unseen, args.seed)
    data = common.subsample_shots(test_sets[""], args.shots, args.seed)
    data = common.corrupt_labels(data, args.label_noise, args.seed)
    test_sets[""] = data

    # models
    variants = ["large", "small"]
    if args.affinity:
        variants.append("small_affinity")
    if args.compare:
        variants = ["actionclip", "vifi_clip", "text4vis", "zero_shot"]
    if args.eval_only:
        variants = ["eval_only"]
    models = {variant: build_model(variant, args) for variant in variants}
    if args.eval_only:
        model = models["eval_only"]
        if model.frames is None and isinstance(model.fusion, common.FusionHead):
            # ActionCLIP's own checkpoints were trained on class names as their lists spell them
            data.classes = data.released_class_names or data.classes
        args.frames = model.frames or args.frames
        seen = torch.isin(common.video_ids(data.test), model.trained_on).sum().item()
        if seen:
            print(f"NOTE {args.eval_only} was trained on {seen} of {len(data.test)} test videos")

    # the header of the run
    can_flip = [flip and not args.no_flip for flip in common.flippable(data.classes)]
    never = [name for name, flip in zip(data.classes, can_flip, strict=True) if not flip]
    flips = f"never flipped: {', '.join(never) or 'none'}" if any(can_flip) else "flipped: no class"
    folder = make_run_folder("tinyclip_swap", args)
    if RANK == 0:
        print(f"run: {folder}\n{data}\n{flips}; {args.frames} frames per video; {WORLD_SIZE} "
              f"process(es), {DEVICE_NAME}", flush=True)
        if not args.resume:  # --resume reads the flags of this file
            save_results(folder, data, args, {}, [], start_time)

    # train and test one model after another
    results = {}
    scores = {}
    history = []
    for variant, model in models.items():
        recipe = VARIANTS[variant]
        results[variant] = {"variant": variant, "backbone": model.name}
        if args.compare:
            head = "mean" if recipe.head is common.MeanHead else "fusion"
            results[variant] |= {"head": head, "text tower": recipe.text_tower,
                                 "loss": recipe.loss}
        if recipe.loss:
            teacher = models["large"] if variant == "small_affinity" else None
            history += train(variant, model, teacher, data, args, folder)
        for suffix, test_set in test_sets.items():
            path = folder / f"{variant}{suffix}-predictions.csv"
            top1, top5 = evaluate(model, test_set, args, path)
            results[variant] |= {f"top1{suffix}": top1, f"top5{suffix}": top5}
            scores[variant + suffix] = top1

    # benchmark when the other processes have ended
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK == 0:
        for variant, model in models.items():
            print(f"measuring the speed of {variant} ...", file=sys.stderr)
            results[variant] |= benchmark(model, data, args)
        if "small" in results:
            gmacs = [results[variant]["GMAC/video"] for variant in ("small", "large")]
            scores["gmac_ratio"] = gmacs[0] / gmacs[1]
        save_results(folder, data, args, {**results, "scores": scores}, history, start_time)
        report(results, scores, test_sets, args, start_time)
    return results


def report(results, scores, test_sets, args, start_time):
    """Print the table, the meaning of its columns, and RESULT."""
    print(format_table(list(results.values()), [f"top1{suffix}" for suffix in test_sets]))
    print("*: best top-1. params M: millions of parameters, without token embeddings. GMAC/video,\n"
          "ms/video: from frames in memory, with class texts encoded before. videos/s: in batches.")
    for suffix, test_set in test_sets.items():
        print(f"top1{suffix}: {len(test_set.test)} test videos, chance "
              f"{1 / len(test_set.classes):.3f}")
    if args.unseen:
        for variant, row in results.items():
            seen = row["top1"]
            unseen = row["top1_unseen"]
            mean = 2 * seen * unseen / max(seen + unseen, 1e-9)
            print(f"{variant}: harmonic mean of top1 and top1_unseen {mean:.4f}")
    data = test_sets[""]
    for warning in data.warnings():
        print(f"NOTE {warning}")
    numbers = " ".join([f"{name}={x:.4f}" for name, x in scores.items()])
    print(f"RESULT tinyclip_swap data={data.name} split={args.split} seed={args.seed} {numbers} "
          f"seconds={time.time() - start_time:.0f}")


# ---- flags ---------------------------------------------------------------------------------------


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
    add("--sampling", choices=("tsn", "dense"), default="tsn",
        help="one frame from each of T segments, or T frames of a window (default: tsn)")
    add("--views", type=int, default=1, help="windows per test video, if dense (default: 1)")
    add("--crops", type=int, default=1, choices=(1, 3),
        help="crops per test video: the middle, or 3 along its longer side (default: 1)")

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--large", metavar="NAME[:WEIGHTS]", default="toy-large",
        help="original backbone (default: toy-large)")
    add("--small", metavar="NAME[:WEIGHTS]", default="toy-small",
        help="backbone that replaces it (default: toy-small)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--affinity", action="store_true", help="also train small_affinity, by eqs. (1) and (3)")
    add("--compare", action="store_true", help="compare four models on the large backbone")
    add("--eval-only", metavar="MODEL", help="train nothing: test, or --watch with, a checkpoint "
        "(FILE, or NAME:WEIGHTS of ActionCLIP) or the zero-shot CLIP NAME[:WEIGHTS]; there may be "
        "no training list")

    add = parser.add_argument_group("training").add_argument
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
        "epochs": (1, 10**6), "frames": (1, 77), "views": (1, 1000), "shots": (0, 10**9),
        "batch_size": (2, 10**6),  # eq. (1) compares the videos of a batch
        "label_noise": (0, 1), "lr": (1e-12, 10), "fps": (.01, 1000), "threshold": (0, 1),
        "seed": (0, 2**63 - 1), "test_every": (0, 10**6)})
    if args.epochs is None:
        args.epochs = 6 if args.data == "toy" else 50
    if args.lr is None:
        args.lr = 4e-4 if args.large.startswith("toy-") else 5e-6
    if args.watch is not None and not (args.labels or args.eval_only):
        parser.error('--watch needs labels: --labels "waving, running"')
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
