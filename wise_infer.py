"""Weigh the exits of three networks, and stop at the first whose weighted sum is sure: WISE.

Soufleri, Ravikumar, Roy: "Advancing Compressed Video Action Recognition through Progressive
Knowledge Distillation", arXiv 2407.02713: inference (training is in pkd_compressed.py, whose
checkpoint this reads). WISE, weighted inference with scaled ensemble, is not WiSE-FT, which
averages the weights of two CLIPs: here class scores are added, and all that is learnt is a number
per exit.

The idea. Three networks on motion vectors, residuals and I-frames have four exits each, from cheap
to dear. A clip runs through them in a fixed order; at exit j the logits of all exits so far are
added with weights w_j, learnt for that j. Once the class is sure enough, the clip leaves: what lies
behind does not run, and pictures that only the rest would need are not decoded. Whatever such an
ensemble gains may be plain late fusion, so beside it stand each exit alone, the plain mean of all
exits so far, and the mean of the finished networks; each may leave early by the same rule.

Exits e = 0..E-1 in --exit-order, logits z_e (N, K) of N clips, labels y, K classes:
  (1) weighted_logits  u_j = sum_{e <= j} W_je z_e;    W (E, E), lower-triangular
  (2) fit_wise         W_j = argmin_w  1/N sum_n CE(u_j, y) + l1 sum_e |w_e|, convex, for each j
                       (|w| = sqrt(w^2 + 1e-8) - 1e-4, so that it has a gradient at 0)
  (3) leave_at         first j with max_c softmax(u_j)_c > theta; the last otherwise
  (4) expected_cost    mean over clips of the cost up to the exit they leave at
W and theta come from clips that neither the networks nor their exits saw (--holdout of
pkd_compressed.py); the test clips are only counted.

  python wise_infer.py                         after python pkd_compressed.py; 1 minute on 2 CPUs
  python wise_infer.py --exit-order r mv i --theta 0.9
  python wise_infer.py --sweep                 segments x thetas, the Pareto front marked
  python wise_infer.py --video clip.mp4        label, confidence, exit and milliseconds of a file

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0):
RESULT wise_infer data=toy split=1 seed=0 last=0.9125 last_gmac=0.0048 fusion=0.9833
  fusion_gmac=0.0137 wise=0.9792 wise_gmac=0.0182 early=0.9833 early_gmac=0.0134 seconds=19

Differs from the paper, of which the abstract was at hand, and from its code:
 1. W is fitted on held-out clips, theta chosen there too, for at most --max-loss points lost; the
    code fits on training logits, and its thetas were read off the test list.
 2. The last row is learnt like every other; the code's last exit has hand-written weights. Row 0
    has a weight, too.
 3. L-BFGS to the optimum; --solver sgd500 is the code's 500 steps of SGD, lr .1, from ones. l1 is
    the same for all rows; the code has 0 up to exit 5 and .1 from 6 on.
 4. Cheapest stream first; --exit-order r mv i is the code's. --divide: u_j / (j + 1), as in some of
    the code's variants: same class, other confidence.
"""
import argparse
import csv
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common import (
    BadInput,
    BadVideo,
    Coded,
    ExitNet,
    compressed_view,
    exit_heads,
    exit_logits,
    p_frames,
    read_compressed,
    read_data,
    reencode_video,
    segment_indices,
    video_index,
)

# ---- the method: eqs. (1)-(4) --------------------------------------------------------------------


def weighted_logits(logits, weights):
    """Eq. (1). logits (E, N, K), weights (E, E) -> (E, N, K)"""
    E, N, K = logits.shape
    u = torch.einsum("je,enk->jnk", weights, logits)                            # (E, N, K)     (1)
    return u


def fit_wise(logits, labels, l1, solver="lbfgs"):
    """Eq. (2). logits (E, N, K), labels (N,) -> (E, E), whose row j weighs exits 0..j"""
    E, N, K = logits.shape
    z, W = logits.double(), logits.new_zeros(E, E).double()                     # (E, N, K), (E, E)
    for j in range(E):
        def objective(w, z=z[:j + 1]):                                          # (j+1,)
            u = torch.einsum("e,enk->nk", w, z)                                 # (N, K)        (1)
            size = ((w ** 2 + 1e-8).sqrt() - 1e-4).sum()
            return F.cross_entropy(u, labels) + l1 * size                       # ()            (2)
        W[j, :j + 1] = SOLVERS[solver](objective, j + 1)
    return W


def leave_at(logits, weights, theta):
    """Eq. (3). logits (E, N, K), weights (E, E) -> exit that each clip leaves at, (N,)"""
    sure = weighted_logits(logits, weights).softmax(-1).amax(-1) > theta        # (E, N)
    sure[-1] = True
    return sure.int().argmax(0)                                                 # (N,)          (3)


def expected_cost(left, costs):
    """Eq. (4). left (N,), costs up to each exit (E,) -> scalar"""
    cost = costs[left]                                                          # (N,)
    return cost.mean()                                                          # ()            (4)


# ---- the rest is plumbing: reading, measuring, keeping record ------------------------------------

STREAMS = ("mv", "r", "i")


def lbfgs(objective, size):
    """The minimum of a convex function of (size,), started from the mean."""
    w = torch.full((size,), 1 / size, dtype=torch.float64, requires_grad=True)
    for _ in range(10):  # started anew where its picture of the curvature has gone bad
        solver = torch.optim.LBFGS([w], max_iter=300, tolerance_grad=1e-9, tolerance_change=0,
                                   history_size=20, line_search_fn="strong_wolfe")

        def step(solver=solver):
            solver.zero_grad()
            value = objective(w)
            value.backward()
            return value

        solver.step(step)
        step()
        if w.grad.abs().max() < 1e-8:
            break
    return w.detach()


def sgd500(objective, size):
    """What the paper's code does instead."""
    w = torch.ones(size, dtype=torch.float64)
    for _ in range(500):
        w = w - .1 * torch.func.grad(objective)(w)
    return w


SOLVERS = {"lbfgs": lbfgs, "sgd500": sgd500}


def controls(exits):
    """The same rule with weights that nobody learnt: {name: (E, E)}. alone: exit j itself. uniform:
    the mean of all exits so far. fusion: the mean of the networks that have come to their end, and
    before the first has, exit j itself."""
    E = len(exits)
    alone, uniform = torch.eye(E).double(), torch.ones(E, E).double().tril()
    fusion = alone.clone()
    for j in range(E):
        ends = [e for e in range(j + 1) if exits[e][1] == 4]
        if ends:
            fusion[j] = 0
            fusion[j, ends] = 1 / len(ends)
    return {"alone": alone, "uniform": uniform / uniform.sum(1, keepdim=True), "fusion": fusion}


class Looker:
    """What the networks see of one clip, decoded only when it is asked for: motion alone first, the
    pictures when r or i wants them; of S segments each stream its own number."""

    def __init__(self, source, segments, size, device):
        self.source, self.segments, self.size, self.device = source, segments, size, device
        self.held, self.decoded = {}, []

    def __call__(self, stream):
        S, pictures = self.segments[stream], stream != "mv"
        if (S, True) not in self.held and (S, pictures) not in self.held:
            found = p_frames(self.source)
            coded = read_compressed(self.source, found[segment_indices(len(found), S)], pictures)
            coded = Coded(*(None if part is None else part.to(self.device) for part in coded[:3]),
                          coded.size)
            self.held[S, pictures] = compressed_view([coded], self.size)
            self.decoded.append((S, pictures))
        return self.held.get((S, True), self.held.get((S, pictures)))[stream]


@torch.no_grad()
def run_clip(nets, heads, exits, look, weights=None, theta=2.):
    """One clip through the exits in their order. With weights it stops where eq. (3) says; nothing
    behind that runs, and nothing that only it would need is decoded.

    -> logits of the exits that ran, (j+1, K), and the probabilities there, (K,)
    """
    z, p = [], None
    for stream, group in itertools.groupby(exits, key=lambda exit: exit[0]):
        for _, z_k in zip(group, exit_logits(nets[stream], heads[stream], look(stream)),
                          strict=False):
            z.append(z_k[0].double().cpu())
            if weights is not None:
                all_z = torch.stack(z + [z[0] * 0] * (len(weights) - len(z)))   # (E, K)
                p = weighted_logits(all_z[:, None], weights)[len(z) - 1, 0].softmax(-1)
                if p.max() > theta:
                    return torch.stack(z), p
    return torch.stack(z), p


def all_logits(clips, nets, heads, exits, segments, size, device, bad):
    """-> logits (E, N, K) of clips [(path, label)], one by one as in use; labels (N,); and which
    can be decoded, (N,). The others go into `bad` and have logits 0: they are wrong at any exit.
    Raises BadInput when they are more than ten and more than 1 % of the clips."""
    found, whole = [], []
    for path, _ in tqdm(clips, "logits", leave=False, disable=None):
        try:
            found.append(run_clip(nets, heads, exits, Looker(path, segments, size, device))[0])
            whole.append(True)
        except BadVideo as error:
            if path not in bad:
                print(f"cannot decode {path}: {error.reason}", file=sys.stderr)
            bad[path] = error.reason
            found.append(None)
            whole.append(False)
    lost = whole.count(False)
    if lost == len(clips) or lost > max(10, .01 * len(clips)):
        raise BadInput(f"{lost} of {len(clips)} clips cannot be decoded, the last one "
                       f"{list(bad)[-1]}; mend them or take them off the list")
    zero = torch.zeros_like(next(z for z in found if z is not None))
    return (torch.stack([zero if z is None else z for z in found], 1),
            torch.tensor([label for _, label in clips]), torch.tensor(whole))


@torch.no_grad()
def exit_costs(nets, heads, exits, segments, size, device):
    """GMAC of a clip up to each exit in the order, with every exit before it. -> (E,)"""
    costs, before = [], 0.
    for stream, group in itertools.groupby(exits, key=lambda exit: exit[0]):
        x = torch.rand(1, segments[stream], 2 if stream == "mv" else 3, size, size, device=device)
        for _, k in group:
            with FlopCounterMode(display=False) as counter:
                list(itertools.islice(exit_logits(nets[stream], heads[stream], x), k))
            costs.append(before + counter.get_total_flops() / 2e9)
        before = costs[-1]
    return torch.tensor(costs, dtype=torch.float64)


def operate(logits, labels, whole, weights, theta, costs):
    """What eq. (3) does with these clips -> top-1, and of those that can be decoded mean GMAC and
    share leaving at each exit; classes said (N,), exits (N,)"""
    left = leave_at(logits, weights, theta)
    said = weighted_logits(logits, weights).argmax(-1)[left, torch.arange(len(left))]
    right = (said == labels) & whole
    shares = torch.bincount(left[whole], minlength=len(costs)) / whole.sum()
    return {"top1": right.double().mean().item(), "gmac": expected_cost(left[whole], costs).item(),
            "theta": float(theta), "shares": shares.tolist()}, said, left


def thetas(logits, weights, most=200):
    """Thresholds at which something changes: confidences of these clips, and 0 and 2."""
    sure = weighted_logits(logits, weights).softmax(-1).amax(-1).flatten().sort().values
    return [0., *sure[torch.linspace(0, len(sure) - 1, most).long()].unique().tolist(), 2.]


def choose_theta(logits, labels, whole, weights, costs, max_loss):
    """The theta of least cost on these clips that loses at most max_loss points of what they reach
    with no early exit."""
    runs = [operate(logits, labels, whole, weights, theta, costs)[0]
            for theta in thetas(logits, weights)]
    fit = [run for run in runs if run["top1"] >= runs[-1]["top1"] - max_loss / 100 - 1e-9]
    return min(fit, key=lambda run: (run["gmac"], -run["theta"]))["theta"]


def theta_of_cost(logits, labels, whole, weights, costs, gmac):
    """The theta whose mean cost on these clips comes nearest to gmac without passing it (or that of
    the first exit)."""
    runs = [operate(logits, labels, whole, weights, theta, costs)[0]
            for theta in thetas(logits, weights)]
    fit = [run for run in runs if run["gmac"] <= gmac + 1e-9] or runs[:1]
    return max(fit, key=lambda run: (run["gmac"], run["top1"]))["theta"]


def run_for_real(clips, nets, heads, exits, segments, size, device, weights, theta):
    """Eq. (3) as it is deployed: clip by clip, decoding what is needed. -> classes said and exits
    (-1: cannot be decoded), mean ms a clip with decoding, mean GMAC of the modules that ran"""
    said, left, ms, macs = [], [], [], {}
    for path, _ in tqdm(clips, "real exits", leave=False, disable=None):
        try:
            start = time.perf_counter()
            z, p = run_clip(nets, heads, exits, Looker(path, segments, size, device), weights,
                            theta)
            label = p.argmax().item()  # waits for a GPU
            ms.append((time.perf_counter() - start) * 1e3)
            said, left = [*said, label], [*left, len(z) - 1]
            if left[-1] not in macs:  # counted once: the modules are the same for the next
                look = Looker(path, segments, size, device)
                with FlopCounterMode(display=False) as counter:
                    run_clip(nets, heads, exits[:len(z)], look)
                macs[left[-1]] = counter.get_total_flops() / 2e9
        except BadVideo:
            said, left = [*said, -1], [*left, -1]
    return said, left, float(np.mean(ms)), float(np.mean([macs[j] for j in left if j >= 0]))


@torch.no_grad()
def run_plain(clips, nets, streams, segments, size, device):
    """The whole networks of these streams without exits, their logits averaged: plain late fusion,
    or one network. -> top-1 over all clips, GMAC, mean ms a clip with decoding"""
    hits, ms, macs = 0, [], None
    for path, label in tqdm(clips, "whole networks", leave=False, disable=None):
        try:
            start = time.perf_counter()
            look = Looker(path, segments, size, device)
            z = torch.stack([nets[stream](look(stream))[1][0].double() for stream in streams])
            hits += z.mean(0).argmax().item() == label
            ms.append((time.perf_counter() - start) * 1e3)
            if macs is None:
                with FlopCounterMode(display=False) as counter:
                    for stream in streams:
                        nets[stream](look(stream))
                macs = counter.get_total_flops() / 2e9
        except BadVideo:
            pass
    return {"top1": hits / len(clips), "gmac": macs, "ms": float(np.mean(ms))}


def sweep(saved, held, test, nets, heads, args, device, bad):
    """The two knobs: segments of each stream, 1 or as in training, and points that may be lost ->
    rows, the Pareto front of what the test clips show marked."""
    most, rows, found = saved["segments"], [], {}
    for stream, S in itertools.product(STREAMS, sorted({1, most})):
        own = [(stream, k) for k in (1, 2, 3, 4)]
        found[stream, S] = [all_logits(clips, nets, heads, own, {stream: S}, saved["size"], device,
                                       bad) for clips in (held, test)]
    for counts in itertools.product(*[sorted({1, most})] * 3):
        segments = dict(zip(STREAMS, counts, strict=True))
        parts = [[found[stream, segments[stream]][part] for stream in args.exit_order]
                 for part in (0, 1)]
        (z_h, labels_h, whole_h), (z_t, labels_t, whole_t) = (
            (torch.cat([z for z, _, _ in part]), *part[0][1:]) for part in parts)
        exits = [(stream, k) for stream in args.exit_order for k in (1, 2, 3, 4)]
        costs = exit_costs(nets, heads, exits, segments, saved["size"], device)
        W = fit(z_h[:, whole_h], labels_h[whole_h], args)
        for loss in (0., .5, 1., 2., 5.):
            theta = choose_theta(z_h, labels_h, whole_h, W, costs, loss)
            run = operate(z_t, labels_t, whole_t, W, theta, costs)[0]
            rows.append({**segments, "max_loss": loss, "theta": theta, "gmac": run["gmac"],
                         "top1": run["top1"]})
    for row in rows:
        row["pareto"] = not any((other["gmac"] <= row["gmac"] and other["top1"] > row["top1"]) or
                                (other["gmac"] < row["gmac"] and other["top1"] >= row["top1"])
                                for other in rows)
    return sorted(rows, key=lambda row: row["gmac"])


def fit(logits, labels, args):
    """W of eq. (2), with --solver and --divide: -> (E, E)"""
    W = fit_wise(logits, labels, args.l1, args.solver)
    return W / torch.arange(1, len(W) + 1)[:, None] if args.divide else W


def listed_names(clips):
    """By these a checkpoint knows its clips: the end of their paths, and their size in bytes."""
    return [f"{'/'.join(Path(path).parts[-3:])} {os.path.getsize(path)}" for path, _ in clips]


def held_out(saved, data, path):
    """The clips that pkd_compressed.py kept out of training -> [(path, label)]. Raises BadInput
    where there are none, where they are not in the training list, and where one is tested."""
    wanted = set(saved["holdout"])
    held = [clip for clip, name in zip(data.train, listed_names(data.train), strict=True)
            if name in wanted]
    tested = wanted & set(listed_names(data.test))
    if tested:
        raise BadInput(f"{path}: {len(tested)} held-out clips are test clips, first {min(tested)}: "
                       f"what is chosen on them may not be tested on them")
    if not wanted:
        raise BadInput(f"{path} holds no clips out; train with pkd_compressed.py --holdout 0.2")
    if len(held) < len(wanted):
        raise BadInput(f"{path}: of {len(wanted)} held-out clips {len(held)} are on the training "
                       f"list of {saved['folder']}; the data are others than in training")
    return held


def load(args):
    """The checkpoint of pkd_compressed.py -> what it says, its networks, exits, and its path"""
    name, tail = Path(args.data).resolve().name, f"s{args.split}-seed{args.seed}/last.pt"
    runs = Path(args.out) / "pkd_compressed"
    found = [path for path in (runs / f"{name}-{tail}", runs / f"{name}-mpeg4-{tail}")
             if path.exists()]
    path = Path(args.checkpoint) if args.checkpoint else [*found, runs / f"{name}-{tail}"][0]
    if not path.exists():
        raise BadInput(f"{path} is missing; make it with: python pkd_compressed.py --data "
                       f"{args.data} --split {args.split} --seed {args.seed} --out {args.out}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        orders, ran = saved["exits_state"], sum(row["stage"] == "exits" for row in saved["rows"])
        if ran < saved["exit_epochs"]:
            raise ValueError
    except Exception as error:
        raise BadInput(f"{path} is no finished checkpoint of pkd_compressed.py "
                       f"({type(error).__name__}); finish it with --resume") from error
    order = args.order or ("progressive" if "progressive" in orders else next(iter(orders)))
    if order not in orders:
        raise BadInput(f"{path} has exits of {', '.join(orders)}, none of --order {order}")
    K, nets, heads = len(saved["classes"]), {}, {}
    for stream in STREAMS:
        nets[stream] = ExitNet(stream, saved["networks"][stream], K)
        heads[stream] = exit_heads(nets[stream], K)
        start = f"nets.{stream}."
        nets[stream].load_state_dict({key.removeprefix(start): value for key, value in
                                      saved["streams_state"].items() if key.startswith(start)})
        heads[stream].load_state_dict({key.removeprefix(f"{stream}."): value for key, value in
                                       orders[order].items() if key.startswith(f"{stream}.")})
    return {**saved, "order": order}, nets, heads, path


def classify(path, saved, nets, heads, exits, segments, device, weights, theta):
    """--video: one line per file. A file whose vectors cannot be used is re-encoded first."""
    note, source = "", path
    with tempfile.TemporaryDirectory() as folder:
        why = video_index(path).unfit
        if not why:
            try:
                Looker(path, segments, saved["size"], device)("mv")
            except BadVideo as error:
                if error.reason.endswith("re-encode it"):
                    why = error.reason.removesuffix(": re-encode it")
        if why:
            source = str(Path(folder) / "clip.mp4")
            start = time.perf_counter()
            _, lost = reencode_video(path, source)
            why += f"; damaged, {lost} frames are lost" * bool(lost)
            note = f"  (re-encoded in {time.perf_counter() - start:.1f} s: {why})"
        video_index(source)
        start = time.perf_counter()
        look = Looker(source, segments, saved["size"], device)
        z, p = run_clip(nets, heads, exits, look, weights, theta)
        sure, label = (x.item() for x in p.max(0))
        ms = (time.perf_counter() - start) * 1e3
    stream, k = exits[len(z) - 1]
    return {"file": path, "label": saved["classes"][label], "confidence": sure, "ms": ms,
            "exit": f"{stream}{k}", "note": note}


def draw_exits(test, saved, exits, said, left, sure, path):
    """Test clips, from those that left first to those that stayed longest: exit, label, confidence;
    red: wrong."""
    rows = sorted((j, -c, i) for i, (j, c) in enumerate(zip(left, sure, strict=True)) if j >= 0)
    tiles = []
    for j, c, i in [rows[n] for n in np.linspace(0, len(rows) - 1, min(30, len(rows))).astype(int)]:
        clip, label = test[i]
        found = p_frames(clip)
        try:
            coded = read_compressed(clip, found[segment_indices(len(found), 1)])
        except BadVideo:  # damaged, in a frame that the networks did not see
            continue
        tile = F.interpolate(coded.frame.float(), scale_factor=160 / coded.size[0])[0].byte()
        tile = F.pad(TF.center_crop(tile, [160, 220]), (0, 0, 30, 0))
        words = [f"{exits[j][0]}{exits[j][1]}  {-c:.2f}", saved["classes"][said[i]][:34]]
        for row, text in enumerate(words):
            tile = torchvision.utils.draw_bounding_boxes(
                tile, torch.tensor([[0, 14 * row, 219, 189]]), [text],
                "lime" if said[i] == label else "red")
        tiles.append(tile)
    if tiles:
        torchvision.io.write_png(torchvision.utils.make_grid(tiles, 6), str(path))


def exit_table(exits, costs, accuracies):
    lines = [f"{'exit':6} {'GMAC':>9} {'alone':>8} {'uniform':>8} {'fusion':>8} {'WISE':>8}"]
    for j, (stream, k) in enumerate(exits):
        lines.append(f"{stream + str(k):6} {costs[j]:9.4f} " + " ".join(
            f"{accuracies[name][j]:8.3f}" for name in ("alone", "uniform", "fusion", "WISE")))
    return "\n".join([*lines, "top-1 if every clip stops there: exit alone; mean of the exits so "
                      "far; mean of the finished\nnetworks; WISE. GMAC: a clip, up to that exit."])


def point_table(points, exits):
    lines = [f"{'operating point':28} {'theta':>9} {'top-1':>7} {'GMAC':>9} {'ms':>8}  leave at"]
    for name, r in points.items():
        shares = " ".join(f"{stream}{k} {100 * share:.0f} %" for (stream, k), share in
                          zip(exits, r.get("shares", []), strict=False) if share > 0)
        theta = f"{r['theta']:9.6f}" if r.get("theta", 2.) < 2 else f"{'-':>9}"
        ms = f"{r['ms']:8.2f}" if "ms" in r else f"{'-':>8}"
        lines.append(f"{name:28} {theta} {r['top1']:7.3f} {r['gmac']:9.4f} {ms}  {shares}")
    return "\n".join([*lines, "ms: mean of a clip with decoding, one by one. At WISE's cost: the "
                      "same rule with other weights,\ntheta set on held-out clips to that cost."])


def machine():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else \
        f"{platform.machine()} CPU with {torch.get_num_threads()} threads"


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("checkpoint").add_argument
    add("--data", default="toy", help="as for pkd_compressed.py, whose run of the same --data, "
        "--split and --seed is taken")
    add("--split", type=int, default=1, choices=(1, 2, 3))
    add("--seed", type=int, default=0)
    add("--checkpoint", metavar="FILE", help="that file instead")
    add("--order", help="of its exits (default: progressive, or the first there is)")
    add = parser.add_argument_group("method").add_argument
    add("--exit-order", nargs=3, default=list(STREAMS), metavar="STREAM", help="cheapest first: mv "
        "r i; the paper's code: r mv i")
    add("--l1", type=float, default=1e-3, help="eq. (2)")
    add("--solver", choices=SOLVERS, default="lbfgs", help="of eq. (2)")
    add("--divide", action="store_true", help="u_j / (j + 1)")
    add("--theta", default="auto", help="eq. (3), a number or auto: chosen on held-out clips")
    add("--max-loss", type=float, default=.5, help="points of top-1 that auto may lose there")
    add("--segments", default="", help="frames of a clip for each stream, as mv=1,r=1,i=1 "
        "(default: as in training)")
    add("--sweep", action="store_true", help="segments x points lost, also as tradeoff.csv")
    add = parser.add_argument_group("run").add_argument
    add("--video", nargs="+", metavar="FILE", help="classify these files instead of the test clips")
    add("--allow-missing", action="store_true", help="go on without missing clips")
    add("--out", default="runs", help="folder for records and the cache")
    add("--target", type=float, default=0., help="exit 1 if WISE's top-1 is below")
    args = parser.parse_args(argv)
    if sorted(args.exit_order) != sorted(STREAMS):
        parser.error("--exit-order takes mv, r and i in some order")
    try:
        args.theta = args.theta if args.theta == "auto" else float(args.theta)
        pairs = [pair.split("=") for pair in filter(None, args.segments.split(","))]
        args.segments = {stream: int(count) for stream, count in pairs}
        if not set(args.segments) <= set(STREAMS) or min(args.segments.values(), default=1) < 1 \
                or args.theta != args.theta:  # nan
            raise ValueError
    except ValueError:
        parser.error("--theta takes auto or a number, --segments something like mv=1,r=1,i=1")
    if not (args.l1 >= 0 and args.max_loss >= 0):
        parser.error("--l1 and --max-loss take 0 or more")
    return args


def main(argv=None):
    """Fit WISE on held-out clips, choose theta there, test. -> numbers"""
    args, began = parse(argv), time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    saved, nets, heads, path = load(args)
    if "toy" in saved["networks"].values():
        torch.set_num_threads(1)
    for module in (*nets.values(), *heads.values()):
        module.to(device).eval().requires_grad_(False)
    segments = {stream: args.segments.get(stream, saved["segments"]) for stream in STREAMS}
    exits = [(stream, k) for stream in args.exit_order for k in (1, 2, 3, 4)]
    data = read_data(saved["folder"], saved["split"], args.allow_missing, Path(args.out) / "cache",
                     toys="toy-pairs")
    held, bad = held_out(saved, data, path), {}
    if [*data.classes] != [*saved["classes"]]:
        raise BadInput(f"{path} was trained on other classes than {saved['folder']} has now")
    costs = exit_costs(nets, heads, exits, segments, saved["size"], device)
    run = Path(args.out) / "wise_infer" / f"{saved['data']}-s{saved['split']}-seed{saved['seed']}"
    run.mkdir(parents=True, exist_ok=True)
    print(f"wise_infer.py on {machine()}, torch {torch.__version__}\n{path}: exits taught by order "
          f"{saved['order']}; {len(held)} held-out clips, {len(data.test)} test clips, segments "
          + ", ".join(f"{stream} {S}" for stream, S in segments.items()), flush=True)
    look = (nets, heads, exits, segments, saved["size"], device)
    z_h, labels_h, whole_h = all_logits(held, *look, bad)
    W = fit(z_h[:, whole_h], labels_h[whole_h], args)
    theta = args.theta if args.theta != "auto" else choose_theta(
        z_h, labels_h, whole_h, W, costs, args.max_loss)
    if args.video:
        found = []
        for file in args.video:
            try:
                found.append(classify(file, saved, *look[:4], device, W, theta))
                print("{file}: {label}, {confidence:.3f}, exit {exit}, {ms:.1f} ms{note}".format(
                    **found[-1]), flush=True)
            except BadVideo as error:
                found.append({"file": file, "error": error.reason})
                print(f"cannot decode {file}: {error.reason}", file=sys.stderr)
        if all("error" in row for row in found):
            raise BadInput("none of the files can be decoded")
        return {"video": found}

    z_t, labels_t, whole_t = all_logits(data.test, *look, bad)
    weights = {**controls(exits), "WISE": W}
    accuracies = {name: [((weighted_logits(z_t, w)[j].argmax(-1) == labels_t) & whole_t).double()
                         .mean().item() for j in range(len(exits))] for name, w in weights.items()}
    last, fusion = (run_plain(data.test, nets, streams, segments, saved["size"], device)
                    for streams in (args.exit_order[-1:], args.exit_order))
    points = {f"{args.exit_order[-1]} alone, no exits": last, "late fusion, no exits": fusion}
    said = left = None
    for name, limit in (("WISE, no early exit", 2.), ("WISE, theta " + (
            "auto" if args.theta == "auto" else "given"), theta)):
        points[name], said, left = operate(z_t, labels_t, whole_t, W, limit, costs)
        real, real_left, points[name]["ms"], counted = run_for_real(data.test, *look, W, limit)
        same = [(a, b) for a, b, ok in zip(real, said.tolist(), whole_t, strict=True) if ok]
        points[name] |= {"gmac_counted": counted,
                         "same_labels": sum(a == b for a, b in same) / max(1, len(same))}
    early = points[name]
    cost_h = operate(z_h, labels_h, whole_h, W, theta, costs)[0]["gmac"]
    for other in ("alone", "uniform", "fusion"):
        limit = theta_of_cost(z_h, labels_h, whole_h, weights[other], costs, cost_h)
        points[f"{other} at WISE's cost"] = operate(z_t, labels_t, whole_t, weights[other], limit,
                                                    costs)[0]
    results = {"exits": [f"{stream}{k}" for stream, k in exits], "costs": costs.tolist(),
               "top1": accuracies, "points": points, "weights": W.tolist(), "theta": theta,
               "clips": len(data.test), "held_out": len(held)}
    print(exit_table(exits, costs, accuracies))
    print(point_table(points, exits))
    if args.sweep:
        results["sweep"] = sweep(saved, held, data.test, nets, heads, args, device, bad)
        with open(run / "tradeoff.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, results["sweep"][0])
            writer.writeheader()
            writer.writerows(results["sweep"])
        print(" mv  r  i  points lost     theta     GMAC   top-1  Pareto front of the test clips")
        for row in results["sweep"]:
            print("{mv:3}{r:3}{i:3} {max_loss:12.1f} {theta:9.6f} {gmac:8.4f} {top1:7.3f}".format(
                **row) + "  *" * row["pareto"])
    full = points["WISE, no early exit"]
    saving = 1 - early["gmac"] / full["gmac"]
    print(f"early exit saves {100 * saving:.1f} % of WISE's GMAC for "
          f"{100 * (full['top1'] - early['top1']):+.1f} points lost; against late fusion without "
          f"exits {100 * (1 - early['gmac'] / fusion['gmac']):.1f} % and "
          f"{100 * (fusion['top1'] - early['top1']):+.1f}. Of what WISE gains over "
          f"{args.exit_order[-1]} alone ({100 * (full['top1'] - last['top1']):+.1f}), late fusion "
          f"has {100 * (fusion['top1'] - last['top1']):+.1f}")
    results |= {"saved": saving, "bad": bad, "seconds": time.time() - began}
    modules = (torch, torchvision, av, np)
    (run / "run.json").write_text(json.dumps({
        "argv": sys.argv[1:], "flags": vars(args), "machine": machine(), "checkpoint": str(path),
        "python": platform.python_version(), "results": results,
        "versions": {module.__name__: module.__version__ for module in modules}}, indent=1))
    sure = weighted_logits(z_t, W).softmax(-1).amax(-1)[left, torch.arange(len(left))].tolist()
    draw_exits(data.test, saved, exits, said.tolist(), [
        j if ok else -1 for j, ok in zip(left.tolist(), whole_t.tolist(), strict=True)], sure,
        run / "run.png")
    if bad:
        print(f"NOTE {len(bad)} clips cannot be decoded; test clips among them count as wrong, "
              f"first {next(iter(bad))}")
    print(f"record, pictures: {run}\nRESULT wise_infer data={saved['data']} split={saved['split']} "
          f"seed={saved['seed']} last={last['top1']:.4f} last_gmac={last['gmac']:.4f} "
          f"fusion={fusion['top1']:.4f} fusion_gmac={fusion['gmac']:.4f} wise={full['top1']:.4f} "
          f"wise_gmac={full['gmac']:.4f} early={early['top1']:.4f} early_gmac={early['gmac']:.4f} "
          f"seconds={time.time() - began:.0f}")
    if full["top1"] < args.target:
        sys.exit(1)
    return results


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.stderr.write(f"wise_infer.py: {error}\n")
        sys.exit(2)
