"""Weigh the exits of three networks, and stop at the first whose weighted sum is sure: WISE.

Soufleri, Ravikumar, Roy: "Advancing Compressed Video Action Recognition through Progressive
Knowledge Distillation", arXiv 2407.02713: inference, on a checkpoint of pkd_compressed.py. WISE,
weighted inference with scaled ensemble, adds logits; WiSE-FT averages the weights of two CLIPs.

A clip runs through four exits each of networks on motion vectors, residuals, I-frames. At exit j
the logits so far are added with weights w_j. Once the class is sure enough, the clip leaves: the
rest neither runs nor is decoded. Beside it, fixed weights: each exit alone, the mean of all exits
so far (uniform), the mean of the finished networks (late fusion).

Exits e = 0..E-1 in --exit-order, logits z_e (N, K) of N clips, labels y, K classes:
  (1) weighted_logits  u_j = sum_{e <= j} W_je z_e;    W (E, E), lower-triangular
  (2) wise_loss        W_j = argmin_w  1/N sum_n CE(u_j, y) + l1 sum_e |w_e - v_je|, for each j
                       --prior paper: v_j = 0; fusion: v_j = late fusion's weights at exit j,
                       the mean of the networks finished by then; before the first, exit j alone
                       (|d| = sqrt(d^2 + 1e-8) - 1e-4, so that it has a gradient at 0)
  (3) leave_at         first j with max_c softmax(u_j)_c > theta, else the last; class: max u_j
  (4) expected_cost    mean over clips of the cost up to the exit they leave at
W (by Newton's method), theta, prior and l1 come from clips that nothing was trained on (--holdout),
all but W by u of clips left out of the fit of W (5 folds): prior and l1 by cross entropy, such that
few clips give late fusion; theta is the cheapest that loses at most --max-loss points.

  python wise_infer.py                         after python pkd_compressed.py; 1 minute on 2 CPUs
  python wise_infer.py --prior paper --l1 0.001 --exit-order r mv i --theta 0.9
  python wise_infer.py --sweep                 segments x points lost, the Pareto front marked
  python wise_infer.py --video clip.mp4        label, confidence, exit and milliseconds of a file

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0):
RESULT wise_infer data=toy split=1 seed=0 last=0.8875 last_gmac=0.0048 uniform=0.9500 fusion=0.9708
  fusion_gmac=0.0137 paper=0.9750 wise=0.9792 wise_gmac=0.0182 equal=0.9625 equal_gmac=0.0133
  early=0.9792 early_fusion=0.9500 early_gmac=0.0157 seconds=18

Differs from the paper (its abstract) and its code: the code fits on training logits, by 500 steps
of SGD from ones, l1 0 up to exit 5 and .1 from 6 on, the last row by hand, thetas read off the test
list, order r mv i; some variants divide u_j by j + 1. Late fusion as the prior is ours.
"""
import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import sys
import tempfile
import time
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import common

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
MACHINE = torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU"
STREAMS = ("mv", "r", "i")

# ---- the method: eqs. (1)-(4) --------------------------------------------------------------------


def weighted_logits(logits, weights):
    """Eq. (1). logits (E, N, K), weights (J, E), one row or more -> u (J, N, K)"""
    return torch.einsum("je,enk->jnk", weights, logits)                         # (J, N, K)     (1)


def wise_loss(w, v, logits, labels, l1):
    """Eq. (2), what fit_wise minimises. w, v (j+1,), logits (j+1, N, K), labels (N,) -> scalar"""
    u = weighted_logits(logits, w[None])[0]                                     # (N, K)        (1)
    away = (((w - v) ** 2 + 1e-8).sqrt() - 1e-4).sum()                          # ()
    return F.cross_entropy(u, labels) + l1 * away                               # ()            (2)


def leave_at(u, theta):
    """Eq. (3). u (E, N, K) -> exit that each clip leaves at, (N,)"""
    sure = u.softmax(-1).amax(-1) > theta                                       # (E, N)
    sure[-1] = True
    return sure.int().argmax(0)                                                 # (N,)          (3)


def expected_cost(left, costs):
    """Eq. (4). left (N,), costs up to each exit (E,) -> scalar"""
    return costs[left].mean()                                                   # ()            (4)


# ---- the rest is plumbing ------------------------------------------------------------------------


def fit_wise(logits, labels, prior, l1, start):
    """Newton's method on eq. (2) for each exit, from `start`; steps halve until they descend"""
    W = torch.zeros_like(prior)
    for j in range(len(logits)):
        z, v, w = logits[:j + 1], prior[j, :j + 1], start[j, :j + 1]
        loss = functools.partial(wise_loss, v=v, logits=z, labels=labels, l1=l1)
        for _ in range(200):
            p = weighted_logits(z, w[None])[0].softmax(-1)
            d = (p.sqrt() * (z - (z * p).sum(-1, keepdim=True))).flatten(1)     # (j+1, N*K)
            bend = 1e-12 + l1 * 1e-8 / ((w - v) ** 2 + 1e-8) ** 1.5
            hessian, slope = d @ d.T / len(labels) + bend.diag(), jacobian(loss, w)
            step = torch.linalg.solve(hessian, slope)
            while loss(w - step) > loss(w) and step.abs().max() > 1e-12:
                step = step / 2
            w = w - step
            if slope.abs().max() < 1e-8:
                break
        W[j, :j + 1] = w
    return W


def cross_fit(logits, labels, prior, l1, seed):
    """-> W (E, E), fitted to all clips; u (E, N, K), each clip's by weights fitted without its
    fold, one of five drawn by the seed, each class spread over them"""
    order = torch.from_numpy(np.random.default_rng([seed, 10]).permutation(len(labels)))
    fold, u = torch.empty_like(order), torch.empty_like(logits)
    fold[order[labels[order].argsort(stable=True)]] = torch.arange(len(order)) % 5
    W = fit_wise(logits, labels, prior, l1, prior)
    for n in fold.unique():
        out = fold == n
        own = fit_wise(logits[:, ~out], labels[~out], prior, l1, W)  # W is near: a few steps
        u[:, out] = weighted_logits(logits[:, out], own)
    return W, u


def choose_weights(logits, labels, exits, args):
    """Prior and l1 by the one-standard-error rule: the first pair, from late fusion on, whose cross
    entropy on clips left out, mean over exits, is within a standard error of the least; l1 >= 1/N:
    a prior counts as one clip or more. -> W, u of cross_fit; prior and l1 in words"""
    fusion, found = baselines(exits)["fusion"], []
    priors = {"fusion": fusion, "paper": torch.zeros_like(fusion)}
    names = priors if args.prior == "auto" else [args.prior]
    grid = [l1 for l1 in (1., .1, .01, .001) if l1 * len(labels) >= 1]
    for l1, name in itertools.product(grid if args.l1 is None else [args.l1], names):
        W, u = cross_fit(logits, labels, priors[name], l1, args.seed)
        ce = (u.logsumexp(-1) - u[:, range(len(labels)), labels]).mean(0)
        found.append((W, u, f"{name}, l1 {l1:g}", ce))
    least = min([ce for *_, ce in found], key=torch.mean)
    for W, u, pair, ce in found:
        above = ce - least
        if above.mean() <= above.std() / len(labels) ** .5:
            return W, u, pair


def baselines(exits):
    """Fixed weights, {name: (E, E)}. alone: exit j itself. uniform: the mean of all exits so far.
    fusion: the mean of the finished networks; before the first, exit j itself."""
    alone, uniform = torch.eye(len(exits)).double(), torch.ones(len(exits), len(exits)).tril()
    ends = uniform * torch.tensor([k == 4 for _, k in exits])
    fusion = torch.where(ends.any(1, True), ends.double() / ends.sum(1, True), alone)
    return {"alone": alone, "uniform": uniform.double() / uniform.sum(1, True), "fusion": fusion}


class Cascade:
    """The networks and exits of a checkpoint, in the order in which a clip runs through them."""

    def __init__(self, saved, order, exit_order, segments):
        flags, self.classes, self.streams = saved["flags"], saved["classes"], exit_order
        self.size, self.copies = flags["size"], flags["copies"]
        self.segments = dict(zip(STREAMS, segments or [flags["segments"]] * 3, strict=True))
        self.exits = list(itertools.product(exit_order, (1, 2, 3, 4)))
        self.nets, self.heads = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        for stream, name in zip(STREAMS, flags["networks"], strict=True):
            self.nets[stream] = common.ExitNet(stream, name, len(self.classes))
            self.heads[stream] = common.exit_heads(self.nets[stream], len(self.classes))
        for part, state, start in ((self.nets, saved["streams"], "nets."),
                                   (self.heads, saved["exits"], f"heads.{order}.")):
            own = {key.removeprefix(start): state[key] for key in state if key.startswith(start)}
            common.load_strictly(part, own, "the checkpoint", f"networks with exits of {order}")
            part.to(DEVICE).eval().requires_grad_(False)

    @torch.no_grad()
    def run(self, path, weights, theta):
        """One clip through the exits until eq. (3) stops it -> logits (j+1, K), softmax (K,). It is
        decoded as far as needed: motion alone until r or i needs pictures."""
        z, views, found = [], {}, common.p_frames(path)
        for stream in self.streams:
            S = self.segments[stream]
            if stream not in views.get(S, ()):
                indices = found[common.segment_indices(len(found), S)]
                coded = common.read_compressed(path, indices, stream != "mv").to(DEVICE)
                views[S] = common.compressed_view([coded], self.size)
            for z_j in common.exit_logits(self.nets[stream], self.heads[stream], views[S][stream]):
                z.append(z_j.double().cpu())
                row = weights[len(z) - 1:len(z), :len(z)]                       # (1, j+1)
                p = weighted_logits(torch.stack(z), row)[0, 0].softmax(-1)      # (K,)
                if p.max() > theta:                                             # as in (3)
                    return torch.cat(z), p
        return torch.cat(z), p

    def all_exits(self, x):
        """compressed_view -> yields the logits (B, K) of every exit"""
        for stream in self.streams:
            yield from common.exit_logits(self.nets[stream], self.heads[stream], x[stream])

    @torch.no_grad()
    def logits(self, clips, bad, counts):
        """Clips [(path, label)], one by one as in use -> {S: logits (3, 4, N, K), of streams and
        their exits} for S in counts; labels (N,), -1: cannot be decoded, so wrong at any exit"""
        z, labels = {}, torch.zeros(len(clips), dtype=torch.long)
        for S in counts:
            part = common.Clips(clips, S, None, "coded", copies=self.copies)
            loader, found = common.ClipLoader(part, 1, bad=bad), []
            for n, batch in enumerate(tqdm(loader, "logits", leave=False, disable=None)):
                labels[n] = batch.label[0]
                x = common.compressed_view([batch.video[0].to(DEVICE)], self.size)
                found.append(torch.stack(list(self.all_exits(x))))              # (E, 1, K)
            z[S] = torch.cat(found, 1).double().cpu().unflatten(0, (3, 4))
        return z, labels

    def join(self, z, segments):
        """Of what logits() found: each stream with its own S -> (E, N, K)"""
        return torch.cat([z[segments[stream]][n] for n, stream in enumerate(self.streams)])

    @torch.no_grad()
    def costs(self, segments):
        """-> GMAC of a clip up to each exit, (E,); of the whole networks, {stream: GMAC}"""
        costs, whole, x = [], {}, {}
        for stream in self.streams:
            size = 1, segments[stream], 2 if stream == "mv" else 3, self.size, self.size
            x[stream] = torch.rand(size, device=DEVICE)
            with FlopCounterMode(display=False) as counter:
                self.nets[stream](x[stream])
            whole[stream] = counter.get_total_flops() / 2e9
        with FlopCounterMode(display=False) as counter:
            for _ in self.all_exits(x):
                costs.append(counter.get_total_flops() / 2e9)
        return torch.tensor(costs, dtype=torch.float64), whole


def operate(u, labels, theta, costs):
    """Eq. (3) on these clips -> {theta, top1, GMAC}"""
    left = leave_at(u, theta)
    right = u.argmax(-1)[left, range(len(left))] == labels
    return {"theta": float(theta), "top1": right.double().mean().item(),
            "GMAC": expected_cost(left[labels >= 0], costs).item()}


def operating_points(u, labels, costs):
    """operate() at 202 thresholds where something changes: 0, confidences of these clips, 2"""
    sure = u.softmax(-1).amax(-1).flatten().sort().values
    some = sure[torch.linspace(0, len(sure) - 1, 200).long()].unique().tolist()
    return [operate(u, labels, theta, costs) for theta in [0., *some, 2.]]


def choose_theta(u, labels, costs, max_loss):
    """The cheapest theta that loses at most max_loss points of the top-1 without early exit"""
    points = operating_points(u, labels, costs)
    least = points[-1]["top1"] - max_loss / 100 - 1e-9
    good = [point for point in points if point["top1"] >= least]
    return min(good, key=lambda point: (point["GMAC"], -point["theta"]))["theta"]


def theta_of_cost(u, labels, costs, gmac):
    """The theta of the highest mean cost up to gmac"""
    points = operating_points(u, labels, costs)
    good = [point for point in points if point["GMAC"] <= gmac + 1e-9] or points[:1]
    return max(good, key=lambda point: (point["GMAC"], point["top1"]))["theta"]


def time_clips(cascade, clips, weights, theta):
    """Eq. (3) as deployed, decoding what is needed -> mean ms a clip"""
    ms = []
    for path, _ in tqdm(clips, "early exit", leave=False, disable=None):
        start = time.perf_counter()
        with contextlib.suppress(common.BadVideo):
            path = common.coded_copy(path, cascade.copies) if cascade.copies else path
            cascade.run(path, weights, theta)
            ms.append((time.perf_counter() - start) * 1e3)
    return float(np.mean(ms))


def sweep(cascade, counts, held, labels, test, y_test, args):
    """Segments x points that may be lost -> rows, the Pareto front of the test clips marked"""
    rows, best = [], -1.
    for each in itertools.product(sorted(counts), repeat=3):
        segments = dict(zip(STREAMS, each, strict=True))
        costs, _ = cascade.costs(segments)
        W, u, _ = choose_weights(cascade.join(held, segments), labels, cascade.exits, args)
        u_test = weighted_logits(cascade.join(test, segments), W)
        for loss in (0., .5, 1., 2., 5.):
            point = operate(u_test, y_test, choose_theta(u, labels, costs, loss), costs)
            rows.append({**segments, "max_loss": loss, **point})
    rows.sort(key=lambda row: (row["GMAC"], -row["top1"]))
    for row in rows:
        row["Pareto"] = "*" if row["top1"] > best else ""
        best = max(best, row["top1"])
    return rows


def classify(cascade, paths, weights, theta):
    """--video: a line about each file; one whose vectors cannot be used is re-encoded first."""
    lines = []
    for path in paths:
        start = time.perf_counter()
        try:
            unfit = common.video_index(path).unfit
            with tempfile.TemporaryDirectory() as folder:
                file = common.coded_copy(path, folder) if unfit else path
                z, p = cascade.run(file, weights, theta)
        except common.BadVideo as error:
            print(f"cannot decode {path}: {error.reason}", file=sys.stderr)
            continue
        ms, (stream, k) = 1e3 * (time.perf_counter() - start), cascade.exits[len(z) - 1]
        how = f", re-encoded: {unfit}" if unfit else ""
        lines.append(f"{path}: {cascade.classes[p.argmax()]}, {p.max():.3f}, exit {stream}{k}, "
                     f"{ms:.1f} ms{how}")
        print(lines[-1], flush=True)
    if not lines:
        raise common.BadInput("none of the files can be decoded")
    return {"video": lines}


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


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="toy", help="of the newest run of pkd_compressed.py, which is read")
    add("--split", type=common.which_split, default=1, choices=(1, 2, 3, "all"), help="of that run")
    add("--seed", type=int, default=0, help="of that run")
    add("--seeds", type=int, nargs="*", default=[], help="one run each, and mean, as --split all")
    add("--checkpoint", metavar="FILE", help="its last.pt, in place of these flags")
    add("--order", help="of the exits; progressive, or the first there is")
    add("--exit-order", nargs=3, default=list(STREAMS), help="of streams; the code's is r mv i")
    add("--prior", choices=("auto", "fusion", "paper"), default="auto", help="of eq. (2)")
    add("--l1", type=float, help="of eq. (2); without it chosen, as by --prior auto")
    add("--theta", type=float, help="of eq. (3); without it chosen on held-out clips, ...")
    add("--max-loss", type=float, default=.5, help="... where it may cost so many points of top-1")
    add("--segments", nargs=3, type=int, metavar=("MV", "R", "I"), help="without it as in training")
    add("--sweep", action="store_true", help="segments x points that may be lost")
    add("--video", nargs="+", metavar="FILE", help="classify these files instead")
    add("--allow-missing", action="store_true", help="go on without missing clips")
    add("--out", default="runs", help="folder for runs and the cache")
    args = parser.parse_args(argv)
    if sorted(args.exit_order) != sorted(STREAMS) or min(args.segments or [1]) < 1:
        parser.error("--exit-order takes mv, r and i in some order, --segments 1 or more")
    if not all(0 <= x < float("inf") for x in (args.l1 or 0, args.theta or 0, args.max_loss)):
        parser.error("--l1, --theta and --max-loss take 0 or more")
    return args


def load(args):
    """-> the checkpoint of pkd_compressed.py, its path, and which order's exits to use"""
    name = f"{Path(args.data).resolve().name}-s{args.split}-seed{args.seed}-"
    runs = Path(args.out, "pkd_compressed").glob("*/last.pt")
    runs = [path for path in runs if path.parent.name.startswith(name)]
    if not runs and not args.checkpoint:
        raise common.BadInput(f"{args.out}/pkd_compressed/{name}*/last.pt is missing; run "
                              f"pkd_compressed.py first, with the same --data, --split, --seed")
    path = args.checkpoint or max(runs, key=os.path.getmtime)
    saved = common.read_saved(path, "flags", "streams", "exits", "classes")
    if "optimizer" in saved:
        raise common.BadInput(f"{path} is not finished; go on with its command and --resume")
    args.split, args.seed = saved["flags"]["split"], saved["flags"]["seed"]
    orders = saved["flags"]["order"]
    order = args.order or ("progressive" if "progressive" in orders else orders[0])
    if order not in orders:
        raise common.BadInput(f"{path} has exits of {', '.join(orders)}, none of --order {order}")
    return saved, path, order


def read_clips(saved, path, args):
    """The checkpoint's data -> test data; held-out clips, where there are none training clips"""
    flags, cache = saved["flags"], Path(args.out) / "cache"
    data = common.read_data(flags["data"], flags["split"], args.allow_missing, cache, "toy-pairs")
    if data.digest() != flags["clips"]:
        raise common.BadInput(f"{path} was trained on other clips than {flags['data']} has now")
    data, held = common.hold_out(data, flags["holdout"], flags["seed"])
    data = common.few_shot(data, flags["shots"], flags["seed"])
    data = common.noisy_labels(data, flags["label_noise"], flags["seed"])
    if not held:
        print("NOTE no clips were held out: W and theta are fitted to clips seen in training")
    return data, held or data.train


def main(argv=None):
    """Fit WISE on held-out clips, choose theta there, test. -> numbers"""
    args, began = parse(argv), time.time()
    if args.split == "all" or args.seeds:
        return common.several(main, argv, args.split, args.seeds or [args.seed])
    saved, path, order = load(args)
    if "toy" in saved["flags"]["networks"]:
        torch.set_num_threads(1)
    cascade = Cascade(saved, order, args.exit_order, args.segments)
    segments, exits = cascade.segments, cascade.exits
    data, held = read_clips(saved, path, args)
    print(f"{path}: exits of order {order}; weights from {len(held)} clips, {len(data.test)} test "
          f"clips, segments {segments}; {MACHINE}", flush=True)
    counts = {1, saved["flags"]["segments"]} if args.sweep else set()
    needed = sorted(counts.union(segments.values()))
    parts, labels = cascade.logits(held, data.bad, needed)
    parts, labels = {S: z[:, :, labels >= 0] for S, z in parts.items()}, labels[labels >= 0]
    if len(labels) < 2:
        raise common.BadInput("one clip is held out: --holdout of pkd_compressed.py")
    (costs, whole), z = cascade.costs(segments), cascade.join(parts, segments)
    W, u, prior = choose_weights(z, labels, exits, args)
    theta = choose_theta(u, labels, costs, args.max_loss) if args.theta is None else args.theta
    if args.video:
        return classify(cascade, args.video, W, theta)

    tests, y_test = cascade.logits(data.test, data.bad, needed)
    z_test, limit = cascade.join(tests, segments), operate(u, labels, theta, costs)["GMAC"]
    arms = {name: (w, weighted_logits(z, w)) for name, w in baselines(exits).items()}
    arms["paper"] = cross_fit(z, labels, torch.zeros_like(W), 1e-3, args.seed)
    arms["WISE"] = W, u
    rows, points, curves = [], {}, {}
    for (stream, k), cost in zip(exits, costs.tolist(), strict=True):
        rows.append({"exit": f"{stream}{k}", "GMAC": cost})
    for name, (w, u_held) in arms.items():
        own = theta if name == "WISE" else theta_of_cost(u_held, labels, costs, limit)
        u_test = weighted_logits(z_test, w)
        points[name] = operate(u_test, y_test, own, costs)
        curves[name] = [(p["GMAC"], p["top1"]) for p in operating_points(u_test, y_test, costs)]
        for row, right in zip(rows, u_test.argmax(-1) == y_test, strict=True):
            row[name] = right.double().mean().item()
    last, fused, early = rows[-1], sum(whole.values()), points["WISE"]
    u_wise = weighted_logits(z_test, W)
    equal = operate(u_wise, y_test, theta_of_cost(u, labels, costs, fused), costs)
    left = leave_at(u_wise, theta)[y_test >= 0]
    for e, row in enumerate(rows):
        row["leave"] = (left == e).double().mean().item()
    scores = {"last": last["alone"], "last_gmac": whole[args.exit_order[-1]],
              "uniform": last["uniform"], "fusion": last["fusion"], "fusion_gmac": fused,
              "paper": last["paper"], "wise": last["WISE"], "wise_gmac": last["GMAC"],
              "equal": equal["top1"], "equal_gmac": equal["GMAC"], "early": early["top1"],
              "early_fusion": points["fusion"]["top1"], "early_gmac": early["GMAC"]}
    top1 = {name: x for name, x in scores.items() if not name.endswith("gmac")}
    results = {**scores, "top1": top1, "exits": rows, "points": points, "weights": W.tolist(),
               "prior": prior, "theta": theta, "ms": time_clips(cascade, data.test, W, theta),
               "sweep": sweep(cascade, counts, parts, labels, tests, y_test, args)}
    report(scores, results, curves, data, args, began)
    return results


def report(scores, results, curves, data, args, began):
    """Write record and picture; print the tables and RESULT."""
    points = [{"early exit": name, **point} for name, point in results["points"].items()]
    print(f"{table(results['exits'])}\ntop-1 if all clips stop there; paper: prior 0, l1 .001; "
          f"WISE: {results['prior']}; leave: share of clips, WISE\n{table(points)}\nall cost the "
          f"same on held-out clips; WISE takes {results['ms']:.1f} ms a clip with decoding; equal: "
          f"WISE leaving at late fusion's cost")
    if results["sweep"]:
        print(table(results["sweep"]))
    if scores["wise"] < scores["fusion"]:
        print("NOTE learned weights lose to late fusion on the test clips")
    for note in data.notes():
        print(f"NOTE {note}")
    run = run_folder("wise_infer", data, args)
    write_record(run / "run.json", args, data, results, [], began)
    for name in ("fusion", "wise", "equal", "early"):
        curves[f"{name} of RESULT"] = [(scores[f"{name}_gmac"], scores[name])]
    common.plot({"early exits, all theta": curves}, "GMAC a clip", "top-1", run / "run.png")
    scores = [f"{key}={x:.4f}" for key, x in scores.items()]
    print(f"record, picture: {run}\nRESULT wise_infer data={data.name} split={args.split} "
          f"seed={args.seed} {' '.join(scores)} seconds={time.time() - began:.0f}")


if __name__ == "__main__":
    common.run(main)
