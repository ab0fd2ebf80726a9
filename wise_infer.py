"""WISE: combine early exits by learned weights, and stop at the first exit that is confident.

Soufleri, Ravikumar, Roy: "Advancing Compressed Video Action Recognition through Progressive
Knowledge Distillation" (arXiv 2407.02713). This file is the paper's inference; its training is in
pkd_compressed.py, whose checkpoint is loaded here. WISE (weighted inference with scaled ensemble)
weighs logits. WiSE-FT, which averages the parameters of two CLIPs, is another method.

A compressed video is shown to three networks: one sees motion vectors (mv), one residuals (r), one
I-frames (i). Each has four exits: three inside, and its own classifier. A video passes these twelve
exits in order. At each exit, WISE adds up the logits of all exits so far, multiplied by learned
weights. Once the best class is probable enough, the video leaves: networks behind that exit do not
run, and what they would see is not decoded.

E exits, N held-out videos with labels y, K classes; z_e (N, K) are the logits of exit e.
  (1) weighted_logits  u_j = sum_{e <= j} W_je z_e             W (E, E) is lower triangular
  (2) wise_loss        W_j = argmin_w  1/N sum_n CE(u_j, y) + l1 sum_e |w_e - prior_e|, for each j
                       |x| is sqrt(x^2 + 1e-8) - 1e-4, which has a gradient at 0; prior 0
  (3) first_confident  leave at the first j with max_c softmax(u_j)_c > theta, else at the last exit
  (4) mean_cost        mean over videos of the GMACs up to the exit where each one leaves

There is no teacher: networks and exits are frozen. Everything else is chosen on the videos that
pkd_compressed.py held out of training:
  W      minimizes eq. (2), which is convex, by Newton's method.
  l1     is 1, .1, .01 or .001, the same for all exits: the one with the lowest cross-entropy, mean
         over exits, in 5-fold cross-validation. The one-standard-error rule, which would take the
         largest l1 that is about as good, is not used: with prior 0, a larger l1 is not safer. It
         shrinks all logits, so that no exit is confident.
  theta  is the cheapest one that loses at most --max-drop points of top-1 in the same five folds.
Controls, without learned weights: each exit by itself; uniform, the mean of all exits so far; late
fusion, the mean of the networks that have finished.
wise_fusion_prior is this project's idea, not the paper's: the prior is late fusion's weights. Here
a larger l1 is safer, so l1 is chosen by the one-standard-error rule, and is at least 1/N.

  python wise_infer.py                       after python pkd_compressed.py; 30 s on 2 CPU cores
  python wise_infer.py --prior fusion        early exit with the weights of wise_fusion_prior
  python wise_infer.py --segments 1 2 2      frames for mv, r and i, as in the paper's table
  python wise_infer.py --video clip.mp4      class, confidence, exit and milliseconds of any file

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0, seed 0):
RESULT wise_infer data=toy split=1 seed=0 last_exit=0.8875 uniform=0.9500 late_fusion=0.9708
  wise=0.9792 wise_fusion_prior=0.9792 wise_at_fusion_cost=0.9542 wise_early=0.9792
  late_fusion_early=0.9542 late_fusion_gmac=0.0137 wise_gmac=0.0182 wise_early_gmac=0.0158
  seconds=28
Top-1 at the last exit: last_exit, by itself; uniform; late_fusion; wise; wise_fusion_prior. Top-1
with early exit: wise_at_fusion_cost, at most at the cost of late fusion without exits; wise_early,
with the chosen theta; late_fusion_early, at the cost of wise_early. GMACs per video:
late_fusion_gmac, three networks without exits; wise_gmac, with all exits; wise_early_gmac. With
--prior fusion it is wise_fusion_prior that exits early: wise_fusion_prior_early and so on.

Differs from the authors' code, which fits on training logits by 500 steps of SGD from ones, takes
l1 0 up to exit 5 and .1 after it, sets the last row by hand, chooses theta on the test list, visits
r, mv, i (--exit-order), and in some variants divides u_j by j.
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
import zlib
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import common

USE_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if USE_CUDA else "cpu")
DEVICE_NAME = torch.cuda.get_device_name() if USE_CUDA else f"{platform.machine()} CPU"
STREAMS = {"mv": "motion", "r": "residual", "i": "iframe"}
METHODS = {"zero": "wise", "fusion": "wise_fusion_prior"}  # by prior
L1_GRID = (1., .1, .01, .001)
# what weights and theta depend on, beside the checkpoint
CHOICE_FLAGS = "schedule", "exit_order", "segments", "prior", "l1", "theta", "max_drop", "seed"

# ---- the method: eqs. (1)-(4) --------------------------------------------------------------------


def weighted_logits(logits, weights):
    """Eq. (1). logits (E, N, K), weights (J, E), one row per exit -> u (J, N, K)"""
    return torch.einsum("je,enk->jnk", weights, logits)                         # (J, N, K)     (1)


def wise_loss(weights, prior, logits, labels, l1):
    """Eq. (2) for one exit. weights, prior (E,), logits (E, N, K), labels (N,) -> scalar"""
    u = weighted_logits(logits, weights[None])[0]                               # (N, K)        (1)
    distance = ((weights - prior) ** 2 + 1e-8).sqrt() - 1e-4                    # (E,)
    return F.cross_entropy(u, labels) + l1 * distance.sum()                     # ()            (2)


def first_confident(u, theta):
    """Eq. (3). u (E, N, K) -> the exit where each video leaves, (N,)"""
    confident = u.softmax(-1).amax(-1) > theta                                  # (E, N)
    confident[-1] = True
    return confident.int().argmax(0)                                            # (N,)          (3)


def mean_cost(exits_taken, costs):
    """Eq. (4). exits_taken (N,), costs up to each exit (E,) -> scalar"""
    return costs[exits_taken].mean()                                            # ()            (4)


# ---- the rest is plumbing: choose weights and theta on held-out videos ---------------------------


def fixed_weights(exits):
    """The controls, for exits [(stream, 1..4)] -> {name: (E, E)}. Until the first network has
    finished, late fusion is the single exit."""
    E = len(exits)
    single = torch.eye(E).double()
    passed = torch.ones(E, E).double().tril()
    finished = passed * torch.tensor([k == 4 for _, k in exits])
    fusion = torch.where(finished.any(1, True), finished / finished.sum(1, True), single)
    return {"single_exit": single, "uniform": passed / passed.sum(1, True), "late_fusion": fusion}


def fit_exit(logits, labels, prior, l1, start):
    """Minimize eq. (2) for one exit by Newton's method, damped as by Levenberg and Marquardt ->
    weights (E,); whether it converged"""
    def loss(weights):
        return wise_loss(weights, prior, logits, labels, l1)

    # where huge logits saturate the softmax, no curvature leads back: 0 is a better start there
    weights = min(start, torch.zeros_like(start), key=loss)
    tolerance = 1e-8 * max(1., logits.abs().max().item())
    damping = 0.
    for _ in range(500):
        gradient = torch.func.grad(loss)(weights)                               # (E,)
        if gradient.abs().max() < tolerance:
            return weights, True

        # the Hessian of the cross-entropy is the covariance of the logits under p
        p = weighted_logits(logits, weights[None])[0].softmax(-1)               # (N, K)
        centered = logits - (p * logits).sum(-1, keepdim=True)                  # (E, N, K)
        hessian = (p * centered).flatten(1) @ centered.flatten(1).T / len(labels)
        hessian += (l1 * 1e-8 / ((weights - prior) ** 2 + 1e-8) ** 1.5).diag()  # (E, E)

        # the Hessian may be singular, as where two exits agree, and a full step may go too far:
        # increase the diagonal until the loss falls enough (Armijo), up to rounding
        diagonal = (hessian.diag() + 1e-12).diag()
        before = loss(weights) * (1 + 1e-14)
        damping = max(damping / 4, 1e-10)
        while damping < 1e30:
            step = torch.linalg.solve(hessian + damping * diagonal, gradient)
            if loss(weights - step) <= before - 1e-4 * (gradient @ step):
                break
            damping = max(4 * damping, 1e-3)
        weights = weights - step
    return weights, False


def fit_weights(logits, labels, prior, l1, start):
    """Eq. (2) for all exits. prior, start (E, E) -> W (E, E); whether all exits converged"""
    W = torch.zeros_like(prior)
    converged = True
    for j in range(len(logits)):
        n = j + 1  # exit j sees exits 0..j
        W[j, :n], success = fit_exit(logits[:n], labels, prior[j, :n], l1, start[j, :n])
        converged = converged and success
    return W, converged


def cross_fit(logits, labels, prior, l1, seed, folds=5):
    """Fit W to all videos, and again without each fold -> W (E, E); u (E, N, K), where the weights
    of a video were fitted without its fold; whether W converged. Folds are balanced by class."""
    order = torch.from_numpy(np.random.default_rng([seed, 10]).permutation(len(labels)))
    by_class = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[by_class] = torch.arange(len(labels)) % folds
    W, converged = fit_weights(logits, labels, prior, l1, prior)
    u = torch.empty_like(logits)
    for n in fold.unique():
        inside = fold == n
        W_fold, _ = fit_weights(logits[:, ~inside], labels[~inside], prior, l1, W)
        u[:, inside] = weighted_logits(logits[:, inside], W_fold)
    return W, u, converged


def choose_weights(logits, labels, exits, prior, l1, seed):
    """Fit WISE with a prior of "zero" or "fusion"; l1 None: choose it by cross-validation, as the
    docstring above says. -> W and u of cross_fit; l1"""
    late_fusion = fixed_weights(exits)["late_fusion"]
    target = late_fusion if prior == "fusion" else torch.zeros_like(late_fusion)
    l1_grid = L1_GRID if l1 is None else [l1]
    if prior == "fusion" and l1 is None:  # below 1/N, the prior would count less than one video
        l1_grid = [x for x in L1_GRID if x * len(labels) >= 1]
    fits = []
    losses = []
    for l1 in tqdm(l1_grid, f"weights, prior {prior}", leave=False, disable=None):
        W, u, converged = cross_fit(logits, labels, target, l1, seed)
        fits.append((W, u, l1, converged))
        losses.append((u.logsumexp(-1) - u[:, range(len(labels)), labels]).mean(0))
    losses = torch.stack(losses)                                                # (l1, N)
    chosen = losses.mean(1).argmin()
    if prior == "fusion":  # one-standard-error rule: the largest l1 comes first
        excess = losses - losses[chosen]
        good = excess.mean(1) <= excess.std(1) / len(labels) ** .5
        chosen = good.int().argmax()
    W, u, l1, converged = fits[chosen]
    if not converged:
        print(f"NOTE the weights of {METHODS[prior]} with l1 {l1:g} have not converged")
    return W, u, l1


def evaluate(u, labels, theta, costs):
    """Top-1 and cost with early exit. A video with label -1 could not be decoded: it is wrong."""
    taken = first_confident(u, theta)                                           # (N,)
    correct = u.argmax(-1)[taken, range(len(taken))] == labels
    return {"theta": float(theta), "top1": correct.double().mean().item(),
            "GMAC": mean_cost(taken[labels >= 0], costs).item()}


def evaluate_thresholds(u, labels, costs):
    """evaluate() at theta 0 (leave at once), at up to 200 confidences that occur, and at 2 (never
    leave early) -> list of dicts"""
    confidences = u.softmax(-1).amax(-1).flatten().sort().values
    some = torch.linspace(0, len(confidences) - 1, 200).long()
    thetas = [0., *confidences[some].unique().tolist(), 2.]
    return [evaluate(u, labels, theta, costs) for theta in thetas]


def cheapest_theta(u, labels, costs, max_drop):
    """The cheapest theta that loses at most `max_drop` points of top-1"""
    points = evaluate_thresholds(u, labels, costs)
    required = points[-1]["top1"] - max_drop / 100 - 1e-9
    good = [point for point in points if point["top1"] >= required]
    return min(good, key=lambda point: (point["GMAC"], -point["theta"]))["theta"]


def theta_for_cost(u, labels, costs, gmac):
    """The theta with the highest mean cost that does not exceed `gmac`"""
    points = evaluate_thresholds(u, labels, costs)
    affordable = [point for point in points if point["GMAC"] <= gmac + 1e-9]
    affordable = affordable or points[:1]
    return max(affordable, key=lambda point: (point["GMAC"], point["top1"]))["theta"]


# ---- networks and videos -------------------------------------------------------------------------


class Cascade:
    """The frozen networks of a checkpoint and the exits of one training schedule, in the order in
    which a video passes them. segments: frames per video, one number or those of mv, r, i."""

    def __init__(self, checkpoint, schedule, streams, segments=None):
        flags = checkpoint["flags"]
        segments = segments or [flags["segments"]]
        self.classes = checkpoint["classes"]
        self.streams = streams
        self.exits = list(itertools.product(streams, (1, 2, 3, 4)))
        self.segments = dict(zip(STREAMS, segments * (3 // len(segments)), strict=True))
        self.size = flags["size"]
        self.copies = flags["copies"]
        self.nets = torch.nn.ModuleDict()
        self.heads = torch.nn.ModuleDict()
        for stream, name in zip(STREAMS, flags["networks"], strict=True):
            self.nets[stream] = common.ExitNet(stream, name, len(self.classes))
            self.heads[stream] = common.exit_heads(self.nets[stream], len(self.classes))
        self.load(self.nets, checkpoint["streams"], "nets.")
        self.load(self.heads, checkpoint["exits"], f"heads.{schedule}.")

    def load(self, modules, state, prefix):
        state = {name.removeprefix(prefix): weight for name, weight in state.items()
                 if name.startswith(prefix)}
        common.load_state_dict(modules, state, "the checkpoint", f"networks with {prefix}*")
        modules.to(DEVICE).eval().requires_grad_(False)

    def exit_logits(self, stream, x):
        """Yields the logits (B, K) of one exit after another; none runs before it is asked for."""
        return common.exit_logits(self.nets[stream], self.heads[stream], x)

    @torch.no_grad()
    def logits(self, videos, undecodable):
        """All exits of videos [(path, label)] -> logits (E, N, K); labels (N,), -1 where a video
        cannot be decoded"""
        logits = {stream: [] for stream in self.streams}
        for S in sorted(set(self.segments.values())):
            dataset = common.CompressedDataset(videos, S, self.copies)
            # one by one, since batches would round differently from early exit
            loader = common.VideoLoader(dataset, 1, undecodable=undecodable)
            labels = []
            for batch in tqdm(loader, f"logits, {S} segments", leave=False, disable=None):
                x = common.compressed_inputs([batch.video[0].to(DEVICE)], self.size)
                for stream in self.streams:
                    if self.segments[stream] == S:
                        exits = list(self.exit_logits(stream, x[stream]))
                        logits[stream].append(torch.stack(exits))               # (4, 1, K)
                labels += batch.label
        logits = [torch.cat(logits[stream], 1) for stream in self.streams]      # (4, N, K) each
        return torch.cat(logits).double().cpu(), torch.tensor(labels)

    @torch.no_grad()
    def predict(self, path, weights, theta):
        """Early exit for one file -> the exit taken; class probabilities (K,). Only motion vectors
        are decoded until a network needs pixels."""
        p_frames = common.p_frame_indices(path)
        inputs = {}  # by number of segments
        logits = []
        for stream in self.streams:
            S = self.segments[stream]
            if stream not in inputs.get(S, ()):
                frames = p_frames[common.tsn_indices(len(p_frames), S)]
                video = common.read_compressed(path, frames, pixels=stream != "mv")
                inputs[S] = common.compressed_inputs([video.to(DEVICE)], self.size)
            for z in self.exit_logits(stream, inputs[S][stream]):
                logits.append(z.double().cpu())
                j = len(logits) - 1
                u = weighted_logits(torch.stack(logits), weights[[j], :j + 1])  # (1, 1, K)
                p = u[0, 0].softmax(-1)                                         # (K,)
                if p.max() > theta:                                             # as in (3)
                    return j, p
        return j, p

    @torch.no_grad()
    def costs(self):
        """GMACs per video -> up to each exit (E,); of each network without exits, {stream: GMAC}"""
        costs = []
        network_costs = {}
        total = 0.
        for stream in self.streams:
            channels = 2 if stream == "mv" else 3
            shape = 1, self.segments[stream], channels, self.size, self.size
            x = torch.rand(shape, device=DEVICE)
            with FlopCounterMode(display=False) as counter:
                self.nets[stream](x)
            network_costs[stream] = counter.get_total_flops() / 2e9
            with FlopCounterMode(display=False) as counter:
                for _ in self.exit_logits(stream, x):
                    costs.append(total + counter.get_total_flops() / 2e9)
            total = costs[-1]
        return torch.tensor(costs, dtype=torch.float64), network_costs


def load_checkpoint(args):
    """-> the newest checkpoint of pkd_compressed.py for this data, split and seed; its path"""
    name = f"{Path(args.data).resolve().name}-s{args.split}-seed{args.seed}-"
    files = Path(args.out, "pkd_compressed").glob("*/last.pt")
    files = [path for path in files if path.parent.name.startswith(name)]
    if not files and not args.checkpoint:
        raise common.BadInput(f"{args.out}/pkd_compressed/{name}*/last.pt does not exist; run "
                              f"pkd_compressed.py first, with the same --data, --split and --seed")
    path = Path(args.checkpoint or max(files, key=os.path.getmtime))
    checkpoint = common.read_checkpoint(path, "flags", "digest", "classes", "streams", "exits")
    flags = checkpoint["flags"]
    kinds = {"flags": dict, "streams": dict, "exits": dict, "classes": list}
    if not all(isinstance(checkpoint[name], kind) for name, kind in kinds.items()):
        raise common.BadInput(f"{path} is not a checkpoint of pkd_compressed.py")
    if "optimizer" in checkpoint:
        raise common.BadInput(f"{path}: training has not finished; continue it by "
                              f"pkd_compressed.py --resume {path.parent}")
    schedules = flags["schedules"]
    if not args.schedule:
        args.schedule = "progressive" if "progressive" in schedules else schedules[0]
    if args.schedule not in schedules:
        raise common.BadInput(f"--schedule {args.schedule}: the exits of {path} were trained by "
                              f"{', '.join(schedules)}")
    if args.checkpoint:
        args.data, args.split, args.seed = flags["data"], flags["split"], flags["seed"]
    return checkpoint, path


def load_videos(checkpoint, path, args):
    """-> the data of the checkpoint, and the videos that were held out of training"""
    flags = checkpoint["flags"]
    cache = Path(args.out, "cache")
    data = common.load_dataset(args.data, args.split, args.allow_missing, cache, "toy-pairs")
    if data.digest() != checkpoint["digest"]:
        raise common.BadInput(f"{path} was trained on other videos than {args.data} has now")
    data, held_out = common.hold_out_videos(data, flags["holdout"], args.seed)
    data = common.subsample_shots(data, flags["shots"], args.seed)
    data = common.corrupt_labels(data, flags["label_noise"], args.seed)
    return data, held_out


def time_early_exit(cascade, videos, weights, theta):
    """-> mean milliseconds per video, from the file to its class"""
    times = []
    for path, _ in tqdm(videos, "early exit", leave=False, disable=None):
        start = time.perf_counter()
        try:
            file = common.reencoded_copy(path, cascade.copies) if cascade.copies else path
            cascade.predict(file, weights, theta)
        except common.BadVideo:
            continue
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.mean(times))


def classify_files(cascade, paths, weights, theta):
    """--video: print a line per file. What is not in MPEG-4 part 2 is re-encoded first."""
    lines = []
    for path in paths:
        start = time.perf_counter()
        try:
            unsupported = common.index_video(path).unsupported
            with tempfile.TemporaryDirectory() as folder:
                file = common.reencoded_copy(path, folder) if unsupported else path
                j, p = cascade.predict(file, weights, theta)
        except common.BadVideo as error:
            print(f"cannot decode {path}: {error.reason}", file=sys.stderr)
            continue
        ms = 1e3 * (time.perf_counter() - start)
        stream, k = cascade.exits[j]
        note = f" (re-encoded: {unsupported})" if unsupported else ""
        lines.append(f"{path}: {cascade.classes[p.argmax()]}, {p.max():.3f}, exit {k} of "
                     f"{STREAMS[stream]}, {ms:.1f} ms{note}")
        print(lines[-1], flush=True)
    if not lines:
        raise common.BadInput("none of the files can be decoded")
    return {"video": lines}


# ---- main and report -----------------------------------------------------------------------------


def main(argv=None):
    """Choose weights, l1 and theta on held-out videos, then test. -> results, a dict"""
    args = parse(argv)
    start_time = time.time()
    checkpoint, path = load_checkpoint(args)
    if "toy" in checkpoint["flags"]["networks"]:
        torch.set_num_threads(1)  # small networks run faster on one thread
    cascade = Cascade(checkpoint, args.schedule, args.exit_order, args.segments)

    # --video needs neither the data set nor a fit, if a run like this one has left its choice
    choice_file = path.with_name("wise.json")
    key = {name: vars(args)[name] for name in CHOICE_FLAGS}
    key["checkpoint"] = zlib.crc32(path.read_bytes())
    if args.video and choice_file.exists():
        choice = json.loads(choice_file.read_text())
        if choice["key"] == key:
            print(f"checkpoint: {path}\nweights and theta: from {choice_file}", flush=True)
            W = torch.tensor(choice["weights"], dtype=torch.float64)
            return classify_files(cascade, args.video, W, choice["theta"])

    data, held_out = load_videos(checkpoint, path, args)
    if not args.video:
        folder = create_folder(args)
        print(f"run: {folder}")
    frames = ", ".join(f"{stream} {S}" for stream, S in cascade.segments.items())
    print(f"{data}, {len(held_out)} held out\ncheckpoint: {path}, {args.schedule} exits\n"
          f"frames per video: {frames}; {DEVICE_NAME}", flush=True)
    if not held_out:
        print("NOTE no videos were held out: weights and theta are chosen on training videos")
        held_out = data.train

    # everything is chosen on the logits of held-out videos
    logits, labels = cascade.logits(held_out, data.undecodable)
    decodable = labels >= 0
    logits, labels = logits[:, decodable], labels[decodable]
    if len(labels) < 2:
        raise common.BadInput("too few held-out videos; see --holdout of pkd_compressed.py")
    costs, network_costs = cascade.costs()
    methods = {}  # name: weights (E, E), u of held-out videos (E, N, K)
    for name, weights in fixed_weights(cascade.exits).items():
        methods[name] = weights, weighted_logits(logits, weights)
    l1 = {}
    for prior, name in METHODS.items():
        if prior == args.prior or not args.video:
            W, u, l1[name] = choose_weights(
                logits, labels, cascade.exits, prior, args.l1, args.seed)
            methods[name] = W, u

    # the method that --prior deploys sets the cost that all others may have
    deployed = METHODS[args.prior]
    W, u = methods[deployed]
    theta = args.theta
    if theta is None:
        theta = cheapest_theta(u, labels, costs, args.max_drop)
    try:
        with common.atomic_write(choice_file) as tmp:
            tmp.write_text(json.dumps({"key": key, "weights": W.tolist(), "theta": theta}))
        print(f"weights and theta: chosen on {len(labels)} videos, and kept in {choice_file}")
    except common.BadInput as error:  # the checkpoint may be someone else's
        print(f"NOTE {error}")
    if args.video:
        return classify_files(cascade, args.video, W, theta)
    budget = evaluate(u, labels, theta, costs)["GMAC"]
    fusion_cost = sum(network_costs.values())
    theta_at_fusion_cost = theta_for_cost(u, labels, costs, fusion_cost)

    # test every method: at each exit, with early exit, and at all thresholds for the picture
    test_logits, test_labels = cascade.logits(data.test, data.undecodable)
    exit_rows = []
    for (stream, k), cost in zip(cascade.exits, costs.tolist(), strict=True):
        exit_rows.append({"exit": f"{STREAMS[stream]} {k}", "GMAC": cost})
    early_exit = {}
    curves = {}
    for name, (weights, u) in methods.items():
        u_test = weighted_logits(test_logits, weights)
        for row, correct in zip(exit_rows, u_test.argmax(-1) == test_labels, strict=True):
            row[name] = correct.double().mean().item()
        same_cost = theta if name == deployed else theta_for_cost(u, labels, costs, budget)
        early_exit[name] = evaluate(u_test, test_labels, same_cost, costs)
        curves[name] = evaluate_thresholds(u_test, test_labels, costs)
    u_test = weighted_logits(test_logits, W)
    at_fusion_cost = evaluate(u_test, test_labels, theta_at_fusion_cost, costs)
    early_exit[f"{deployed}_at_fusion_cost"] = at_fusion_cost
    decodable = test_labels >= 0                                                # (N,)
    taken = first_confident(u_test, theta)                                      # (N,)
    for j, row in enumerate(exit_rows):
        row["leave_here"] = (taken[decodable] == j).double().mean().item()

    # the predictions of late fusion without exits, and of the deployed method with early exit
    u_fusion = weighted_logits(test_logits, methods["late_fusion"][0])[-1]      # (N, K)
    u_early = u_test[taken, range(len(taken))]                                  # (N, K)
    for name, u in (("late_fusion", u_fusion), (f"{deployed}_early", u_early)):
        p = u.softmax(-1) * decodable[:, None]                                  # (N, K)
        save_predictions(folder / f"{name}-predictions.csv", data, p)

    # the numbers of RESULT
    last = exit_rows[-1]
    scores = {"last_exit": last["single_exit"]}
    for name in ("uniform", "late_fusion", "wise", "wise_fusion_prior"):
        scores[name] = last[name]
    scores[f"{deployed}_at_fusion_cost"] = at_fusion_cost["top1"]
    scores[f"{deployed}_early"] = early_exit[deployed]["top1"]
    scores["late_fusion_early"] = early_exit["late_fusion"]["top1"]
    scores["late_fusion_gmac"] = fusion_cost
    scores["wise_gmac"] = last["GMAC"]
    scores[f"{deployed}_early_gmac"] = early_exit[deployed]["GMAC"]
    results = {**scores, "scores": scores, "exits": exit_rows, "early_exit": early_exit,
               "weights": W.tolist(), "l1": l1, "theta": theta,
               "ms_per_video": time_early_exit(cascade, data.test, W, theta)}
    report(scores, results, curves, data, folder, args, start_time)
    return results


def report(scores, results, curves, data, folder, args, start_time):
    """Print the tables and RESULT; save results and picture."""
    deployed = METHODS[args.prior]
    l1 = ", ".join(f"{l1:g} ({name})" for name, l1 in results["l1"].items())
    print(f"\n{format_table(results['exits'])}\n"
          f"Top-1 if all videos leave at that exit, and GMACs per video up to there. single_exit: "
          f"that exit\nby itself; uniform: mean of all exits so far; late_fusion: mean of the "
          f"networks that have\nfinished; leave_here: share of videos that leave there with "
          f"{deployed}. l1: {l1}.\n")
    rows = [{"early exit": name, **row} for name, row in results["early_exit"].items()]
    print(f"{format_table(rows, compare=['top1'])}\n"
          f"theta is set such that all rows cost the same on held-out videos; in the last row, as "
          f"much as\nlate fusion without exits. {deployed} takes {results['ms_per_video']:.1f} ms "
          f"per video, decoding included.")
    if scores[deployed] < scores["late_fusion"]:
        print(f"NOTE {deployed} is worse than late fusion on the test videos")
    for warning in data.warnings():
        print(f"NOTE {warning}")

    # the picture: cost in percent of late fusion without exits
    percent = 100 / scores["late_fusion_gmac"]
    lines = {}
    for name, points in curves.items():
        lines[name] = [(percent * point["GMAC"], point["top1"]) for point in points]
    dots = {"late fusion without exits": (100., scores["late_fusion"])}
    for name, label in ((deployed, f"{deployed}_early"), (f"{deployed}_at_fusion_cost",) * 2):
        point = results["early_exit"][name]
        dots[label] = percent * point["GMAC"], point["top1"]
    save_curves(lines, dots, folder / "accuracy.svg")
    save_results(folder, data, args, results, [], start_time)
    numbers = " ".join([f"{name}={x:.4f}" for name, x in scores.items()])
    print(f"results.json and accuracy.svg are in {folder}\nRESULT wise_infer data={data.name} "
          f"split={args.split} seed={args.seed} {numbers} seconds={time.time() - start_time:.0f}")


COLORS = ("#999999", "#56b4e9", "#0072b2", "#d55e00", "#009e73")  # Okabe and Ito: safe for all eyes


def save_curves(curves, dots, path, width=860, height=430):
    """Draw accuracy over cost as SVG. curves {name: [(x, y), ...]}, dots {name: (x, y)}"""
    points = [*itertools.chain(*curves.values()), *dots.values()]
    x_min, y_min = np.subtract(np.min(points, 0), (2, .08))
    x_max, y_max = np.add(np.max(points, 0), (2, .015))
    left, right, top, bottom = 60, width - 160, 16, height - 48
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
           'font-family="sans-serif" font-size="13">',
           '<rect width="100%" height="100%" fill="white"/>']

    def place(x, y):
        x = left + (right - left) * (x - x_min) / (x_max - x_min)
        y = bottom - (bottom - top) * (y - y_min) / (y_max - y_min)
        return round(x, 1), round(y, 1)

    def text(x, y, words, style):
        svg.append(f'<text x="{x}" y="{y}" {style}>{words}</text>')

    for cost in range(20, int(x_max), 20):
        x, _ = place(cost, 0)
        if x > left:
            svg.append(f'<path d="M{x} {top}V{bottom}" stroke="#ddd"/>')
            text(x, bottom + 18, f"{cost} %", 'text-anchor="middle"')
    for tenths in range(int(10 * y_min) + 1, int(10 * y_max) + 1):
        _, y = place(0, tenths / 10)
        svg.append(f'<path d="M{left} {y}H{right}" stroke="#ddd"/>')
        text(left - 8, y, tenths / 10, 'text-anchor="end" dy="4"')
    text((left + right) / 2, height - 8, "GMACs per video, in % of three networks without exits",
         'text-anchor="middle"')
    text(0, 0, "top-1", f'transform="translate(16 {height / 2}) rotate(-90)"')

    # curves have their names at the end, from the top down, so that none covers another
    lines = []
    name_y = 0.
    styles = zip(curves.items(), COLORS, strict=True)
    for (name, curve), color in sorted(styles, key=lambda style: -style[0][1][-1][1]):
        corners = [f"{x} {y}" for x, y in itertools.starmap(place, curve)]
        lines.append(f'<path d="M{"L".join(corners)}" fill="none" stroke="{color}" '
                     f'stroke-width="2"/>')
        name_y = max(name_y + 16, place(*curve[-1])[1])
        text(right + 8, name_y, name, f'fill="{color}" dy="4"')
    svg += reversed(lines)  # the best one on top

    # dots have their names below all curves, on thin lines
    for n, (name, dot) in enumerate(sorted(dots.items(), key=lambda dot: dot[1])):
        x, y = place(*dot)
        name_y = bottom - 18 * (len(dots) - n) + 8
        svg.append(f'<path d="M{x} {y}V{name_y}" stroke="black" stroke-width=".7"/>'
                   f'<circle cx="{x}" cy="{y}" r="5" stroke="white"/>')
        text(x, name_y, name, 'text-anchor="end" dx="-5"')
    with common.atomic_write(path) as tmp:
        tmp.write_text("\n".join([*svg, "</svg>"]))


# ---- flags, run folder, tables -------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("data and model").add_argument
    add("--data", default="toy",
        help="load the newest run of pkd_compressed.py on this data (default: toy)")
    add("--split", type=int, default=1, choices=(1, 2, 3), help="split of that run (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="seed of that run (default: 0)")
    add("--checkpoint", metavar="FILE", help="load this last.pt of a run instead")
    add("--schedule", metavar="NAME", help="training schedule whose exits are used (default: "
        "progressive if it was trained, else the first)")
    add("--allow-missing", action="store_true", help="ignore listed videos that do not exist")

    add = parser.add_argument_group("method").add_argument
    add("--exit-order", nargs=3, choices=STREAMS, default=list(STREAMS), metavar="NETWORK",
        help="order in which the networks run; the authors' code has r mv i (default: mv r i)")
    add("--segments", nargs="+", type=int, metavar="N",
        help="frames per video: one number, or three for mv, r and i (default: as in training)")
    add("--prior", choices=METHODS, default="zero",
        help="prior of the weights that exit early: zero as in the paper, or late fusion's weights "
        "(default: zero)")
    add("--l1", type=float, help="strength of the priors (default: chosen by cross-validation)")
    add("--theta", type=float,
        help="confidence above which a video leaves (default: see --max-drop)")
    add("--max-drop", type=float, default=.5, metavar="POINTS",
        help="choose the cheapest theta that loses at most so many points of top-1 (default: 0.5)")
    add("--video", nargs="+", metavar="FILE", help="only classify these files, by early exit; the "
        "second time, weights and theta come from wise.json beside the checkpoint")

    add = parser.add_argument_group("output").add_argument
    add("--out", default="runs", metavar="FOLDER",
        help="where runs and the cache are written (default: runs)")
    args = parser.parse_args(argv)
    if len(set(args.exit_order)) < 3:
        parser.error("--exit-order must name mv, r and i once each")
    if args.segments and (len(args.segments) not in (1, 3) or min(args.segments) < 1):
        parser.error("--segments takes one number, or three, of at least 1")
    for name in ("l1", "theta", "max_drop"):
        if not 0 <= (getattr(args, name) or 0) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be a finite number of at least 0")
    return args


def create_folder(args):
    """Create OUT/wise_infer/DATA-sSPLIT-seedSEED-TIME -> its path"""
    name = f"{Path(args.data).resolve().name}-s{args.split}-seed{args.seed}"
    folder = Path(args.out, "wise_infer", f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}")
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


if __name__ == "__main__":
    try:
        main()
    except (common.BadInput, OSError) as error:  # a mistake that the user can fix
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
