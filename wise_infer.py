"""Weigh the exits of three networks, and stop at the first whose weighted sum is sure: WISE.

Soufleri, Ravikumar, Roy: "Advancing Compressed Video Action Recognition through Progressive
Knowledge Distillation", arXiv 2407.02713: inference, on a checkpoint of pkd_compressed.py. WISE,
weighted inference with scaled ensemble, is not WiSE-FT, which averages the weights of two CLIPs:
here logits are added, and all that is learned is a number per exit.

Networks on motion vectors, residuals and I-frames have four exits each. A clip runs through them
from cheap to expensive; at exit j the logits of all exits so far are added with weights w_j,
learned for that j. Once the class is sure enough, the clip leaves: the rest does not run, and
pictures that only the rest would need are not decoded. Much of what such an ensemble gains may be
plain late fusion, so baselines with fixed weights stand beside it: each exit alone, the mean of all
exits so far, the mean of the finished networks.

Exits e = 0..E-1 in --exit-order, logits z_e (N, K) of N clips, labels y, K classes:
  (1) weighted_logits  u_j = sum_{e <= j} W_je z_e;    W (E, E), lower-triangular
  (2) wise_loss        W_j = argmin_w  1/N sum_n CE(u_j, y) + l1 sum_e |w_e|, convex, for each j
                       (|w| = sqrt(w^2 + 1e-8) - 1e-4, so that it has a gradient at 0)
  (3) leave_at         first j with max_c softmax(u_j)_c > theta; the last otherwise; the clip gets
                       the class of the largest u_j
  (4) expected_cost    mean over clips of the cost up to the exit they leave at
W and theta come from clips that no network or exit was trained on (--holdout of pkd_compressed.py);
theta is the cheapest that loses at most --max-loss points on them. Solver: Newton's method.

  python wise_infer.py                         after python pkd_compressed.py; 1 minute on 2 CPUs
  python wise_infer.py --exit-order r mv i --theta 0.9
  python wise_infer.py --sweep                 segments x points lost, the Pareto front marked
  python wise_infer.py --video clip.mp4        label, confidence, exit and milliseconds of a file

The plain command printed (2 cores of an x86_64 CPU, torch 2.15.0):
RESULT wise_infer data=toy split=1 seed=0 last=0.9125 last_gmac=0.0048 fusion=0.9792
  fusion_gmac=0.0137 wise=0.9875 wise_gmac=0.0182 early=0.9708 early_gmac=0.0115 seconds=10

Differs from the paper (its abstract) and its code: W and theta come from held-out clips; the code
fits on training logits, by 500 steps of SGD from ones, l1 0 up to exit 5 and .1 from 6 on, and read
its thetas off the test list. The last row is learned as the others; the code's is hand-written.
Cheapest stream first; --exit-order r mv i is the code's. Some of the code's variants divide u_j by
j + 1: same class, other confidence.
"""
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time
import zlib
from pathlib import Path

import av
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian, jacobian
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


def wise_loss(w, logits, labels, l1):
    """Eq. (2), what fit_wise minimises. w (j+1,), logits (j+1, N, K), labels (N,) -> scalar"""
    u = weighted_logits(logits, w[None])[0]                                     # (N, K)        (1)
    size = ((w ** 2 + 1e-8).sqrt() - 1e-4).sum()                                # ()
    return F.cross_entropy(u, labels) + l1 * size                               # ()            (2)


def leave_at(logits, weights, theta):
    """Eq. (3). logits (E, N, K), weights (E, E) -> exit that each clip leaves at, (N,)"""
    sure = weighted_logits(logits, weights).softmax(-1).amax(-1) > theta        # (E, N)
    sure[-1] = True
    return sure.int().argmax(0)                                                 # (N,)          (3)


def expected_cost(left, costs):
    """Eq. (4). left (N,), costs up to each exit (E,) -> scalar"""
    return costs[left].mean()                                                   # ()            (4)


# ---- the rest is plumbing ------------------------------------------------------------------------


def fit_wise(logits, labels, l1):
    """Minimise eq. (2), which is convex, for each exit by Newton's method from the mean; a step is
    halved until it descends. logits (E, N, K), labels (N,) -> W (E, E), row j for exits 0..j"""
    E, logits = len(logits), logits.double()
    W = torch.zeros(E, E).double()
    for j in range(E):
        loss = functools.partial(wise_loss, logits=logits[:j + 1], labels=labels, l1=l1)
        w = torch.full((j + 1,), 1 / (j + 1)).double()
        for _ in range(200):
            slope, H = jacobian(loss, w), hessian(loss, w)                      # (j+1,), (j+1, j+1)
            step = torch.linalg.solve(H + 1e-12 * torch.eye(j + 1), slope)      # (j+1,)
            while loss(w - step) > loss(w) and step.abs().max() > 1e-12:
                step = step / 2
            w = w - step
            if slope.abs().max() < 1e-8:
                break
        W[j, :j + 1] = w
    return W


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
        self.segments = {stream: segments.get(stream, flags["segments"]) for stream in STREAMS}
        self.exits = list(itertools.product(exit_order, (1, 2, 3, 4)))
        self.nets, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for stream, name in zip(STREAMS, flags["networks"], strict=True):
            self.nets[stream] = common.ExitNet(stream, name, len(self.classes))
            self.heads[stream] = common.exit_heads(self.nets[stream], len(self.classes))
        for part, state, start in ((self.nets, saved["streams"], "nets."),
                                   (self.heads, saved["exits"], f"heads.{order}.")):
            own = {key.removeprefix(start): state[key] for key in state if key.startswith(start)}
            common.load_strictly(part, own, "the checkpoint", f"networks with exits of {order}")
            part.to(DEVICE).eval().requires_grad_(False)

    def look(self, path, copies=None):
        """-> function: stream -> what its network sees of a clip, or of its copy in the folder
        `copies`. Decoded when first asked for, and only motion until r or i needs the pictures."""
        held = {}

        def view(stream):
            S = self.segments[stream]
            if stream not in held.get(S, ()):
                file = common.coded_copy(path, copies) if copies else path
                found = common.p_frames(file)
                indices = found[common.segment_indices(len(found), S)]
                coded = common.read_compressed(file, indices, stream != "mv").to(DEVICE)
                held[S] = common.compressed_view([coded], self.size)
            return held[S][stream]
        return view

    @torch.no_grad()
    def run(self, look, weights=None, theta=2.):
        """One clip through the exits, each run, and its input decoded, when it is its turn; with
        weights it stops where eq. (3) says. -> logits of the exits that ran, (j+1, K), and the
        probabilities there, (K,)"""
        z, p = [], None
        for stream in self.streams:
            for z_j in common.exit_logits(self.nets[stream], self.heads[stream], look(stream)):
                z.append(z_j.double().cpu())                                    # (1, K)
                if weights is not None:
                    row = weights[len(z) - 1:len(z), :len(z)]                   # (1, j+1)
                    p = weighted_logits(torch.stack(z), row)[0, 0].softmax(-1)  # (K,)
                    if p.max() > theta:                                         # as in (3)
                        return torch.cat(z), p
        return torch.cat(z), p

    def logits(self, clips, bad):
        """-> logits (E, N, K) of clips [(path, label)], one by one as in use, and labels (N,); a
        clip that cannot be decoded goes into `bad`; its label is -1, so it is wrong at any exit."""
        z = torch.zeros(len(self.exits), len(clips), len(self.classes)).double()
        labels = torch.tensor([label for _, label in clips])
        for n, (path, _) in enumerate(tqdm(clips, "logits", leave=False, disable=None)):
            try:
                z[:, n] = self.run(self.look(path, self.copies))[0]
            except common.BadVideo as error:
                if path not in bad:
                    print(f"cannot decode {path}: {error.reason}", file=sys.stderr)
                bad[path], labels[n] = error.reason, -1
        lost = (labels < 0).sum().item()
        if not z.isfinite().all():
            raise common.BadInput("logits of the checkpoint are not finite")
        if lost == len(clips) or lost > max(10, .01 * len(clips)):
            raise common.BadInput(f"{lost} of {len(clips)} clips cannot be decoded, the last one "
                                  f"{list(bad)[-1]}; mend them or take them off the list")
        return z, labels

    @torch.no_grad()
    def costs(self):
        """-> GMAC of a clip up to each exit, with every exit before it, (E,); of each whole network
        without exits, {stream: GMAC}"""
        costs, whole, before = [], {}, 0.
        for stream, net in [(stream, self.nets[stream]) for stream in self.streams]:
            size = 1, self.segments[stream], 2 if stream == "mv" else 3, self.size, self.size
            x = torch.rand(size, device=DEVICE)
            with FlopCounterMode(display=False) as counter:
                net(x)
            whole[stream] = counter.get_total_flops() / 2e9
            with FlopCounterMode(display=False) as counter:
                for _ in common.exit_logits(net, self.heads[stream], x):
                    costs.append(before + counter.get_total_flops() / 2e9)
            before = costs[-1]
        return torch.tensor(costs, dtype=torch.float64), whole


def operate(logits, labels, weights, theta, costs):
    """What eq. (3) does with these clips -> {theta, top1, GMAC: mean of those that can be decoded,
    leave: share at each exit}, classes said (N,), exits (N,)"""
    left, read = leave_at(logits, weights, theta), labels >= 0
    said = weighted_logits(logits, weights).argmax(-1)[left, torch.arange(len(left))]
    shares = torch.bincount(left[read], minlength=len(costs)) / read.sum()
    return {"theta": float(theta), "top1": (said == labels).double().mean().item(),
            "GMAC": expected_cost(left[read], costs).item(), "leave": shares.tolist()}, said, left


def operating_points(logits, labels, weights, costs, most=200):
    """operate() at thresholds from 0 to 2, where something changes: confidences of these clips"""
    sure = weighted_logits(logits, weights).softmax(-1).amax(-1).flatten().sort().values
    some = sure[torch.linspace(0, len(sure) - 1, most).long()].unique().tolist()
    return [operate(logits, labels, weights, theta, costs)[0] for theta in [0., *some, 2.]]


def choose_theta(logits, labels, weights, costs, max_loss):
    """The theta of least cost that loses at most max_loss points of the top-1 without early exit"""
    points = operating_points(logits, labels, weights, costs)
    least = points[-1]["top1"] - max_loss / 100 - 1e-9
    good = [point for point in points if point["top1"] >= least]
    return min(good, key=lambda point: (point["GMAC"], -point["theta"]))["theta"]


def theta_of_cost(logits, labels, weights, costs, gmac):
    """The theta whose mean cost comes nearest to gmac without exceeding it"""
    points = operating_points(logits, labels, weights, costs)
    good = [point for point in points if point["GMAC"] <= gmac + 1e-9] or points[:1]
    return max(good, key=lambda point: (point["GMAC"], point["top1"]))["theta"]


def run_for_real(cascade, clips, weights, theta):
    """Eq. (3) as deployed: clip by clip, decoding what is needed. -> classes said (-1: cannot be
    decoded), mean ms a clip with decoding"""
    said, ms = [], []
    for path, _ in tqdm(clips, "early exit", leave=False, disable=None):
        start = time.perf_counter()
        try:
            p = cascade.run(cascade.look(path, cascade.copies), weights, theta)[1]
            said.append(p.argmax().item())
            ms.append((time.perf_counter() - start) * 1e3)
        except common.BadVideo:
            said.append(-1)
    return said, float(np.mean(ms))


def sweep(saved, order, args, held, test, bad):
    """Segments of each stream, 1 or as in training, times points that may be lost -> rows, the
    Pareto front of the test clips marked"""
    counts, rows, best = {1, saved["flags"]["segments"]}, [], -1.
    for each in itertools.product(sorted(counts), repeat=3):
        segments = dict(zip(STREAMS, each, strict=True))
        cascade = Cascade(saved, order, args.exit_order, segments)
        z, labels = cascade.logits(held, bad)
        z, labels, (costs, _) = z[:, labels >= 0], labels[labels >= 0], cascade.costs()
        W, (z_test, y_test) = fit_wise(z, labels, args.l1), cascade.logits(test, bad)
        for loss in (0., .5, 1., 2., 5.):
            theta = choose_theta(z, labels, W, costs, loss)
            point = operate(z_test, y_test, W, theta, costs)[0]
            numbers = {key: point[key] for key in ("theta", "GMAC", "top1")}
            rows.append({**segments, "max_loss": loss, **numbers})
    rows.sort(key=lambda row: (row["GMAC"], -row["top1"]))
    for row in rows:
        row["Pareto"] = "*" if row["top1"] > best else ""
        best = max(best, row["top1"])
    return rows


def classify(cascade, paths, weights, theta):
    """--video: a line about each file; one whose vectors cannot be used is re-encoded first."""
    lines = []
    for path in paths:
        note, start = "", time.perf_counter()
        try:
            z, p = cascade.run(cascade.look(path), weights, theta)
        except common.BadVideo as error:
            note = f"  ({error.reason}: done)"
            try:
                if not error.reason.endswith("re-encode it"):
                    raise
                with tempfile.TemporaryDirectory() as folder:
                    z, p = cascade.run(cascade.look(path, folder), weights, theta)
            except common.BadVideo as error:
                print(f"cannot decode {path}: {error.reason}", file=sys.stderr)
                continue
        ms, (stream, k) = 1e3 * (time.perf_counter() - start), cascade.exits[len(z) - 1]
        lines.append(f"{path}: {cascade.classes[p.argmax()]}, {p.max():.3f}, exit {stream}{k}, "
                     f"{ms:.1f} ms{note}")
        print(lines[-1], flush=True)
    if not lines:
        raise common.BadInput("none of the files can be decoded")
    return {"video": lines}


def run_folder(script, data, args):
    """OUT/SCRIPT/DATA-sSPLIT-seedSEED-DIGEST: a run belongs to its clips and flags."""
    other = "allow_missing", "copies", "data", "describe", "label_only", "out", "resume", "workers"
    flags = {key: value for key, value in vars(args).items() if key not in other}
    digest = zlib.crc32(json.dumps([data.digest(), flags], sort_keys=True).encode())
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
    versions = {module.__name__: module.__version__ for module in (torch, open_clip, av, np)}
    record = {"flags": vars(args), "versions": versions, "machine": MACHINE, "bad": data.bad,
              "notes": data.notes(), "results": results, "seconds": time.time() - began}
    with common.renamed(path) as part:
        part.write_text(json.dumps(record, indent=1))
    with common.renamed(path.with_name("metrics.jsonl")) as part:
        part.write_text("\n".join(map(json.dumps, log)))


# ---- flags and main ------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="toy", help="the newest run of pkd_compressed.py on it is read, ...")
    add("--split", type=int, default=1, choices=(1, 2, 3), help="... with this split")
    add("--seed", type=int, default=0, help="... and this seed")
    add("--checkpoint", metavar="FILE", help="that last.pt instead")
    add("--order", help="of its exits; progressive, or the first there is")
    add("--exit-order", nargs=3, default=list(STREAMS), help="of streams; the code's is r mv i")
    add("--l1", type=float, default=1e-3, help="of eq. (2)")
    add("--theta", default="auto", help="of eq. (3): a number, or auto, chosen on held-out clips")
    add("--max-loss", type=float, default=.5, help="points of top-1 that auto may lose there")
    add("--segments", default="", help="per stream, as mv=1,r=1,i=1; without it as in training")
    add("--sweep", action="store_true", help="segments x points that may be lost")
    add("--video", nargs="+", metavar="FILE", help="classify these files instead of the test clips")
    add("--allow-missing", action="store_true", help="go on without missing clips")
    add("--out", default="runs", help="folder for runs and the cache")
    args, good = parser.parse_args(argv), False
    with contextlib.suppress(ValueError):
        pairs = [pair.split("=") for pair in filter(None, args.segments.split(","))]
        args.segments = {stream: int(count) for stream, count in pairs}
        good = min(args.segments.values(), default=1) >= 1
        good &= 0 <= args.l1 < math.inf and args.max_loss >= 0
        good &= set(args.segments) <= set(STREAMS) and sorted(args.exit_order) == sorted(STREAMS)
        args.theta = args.theta if args.theta == "auto" else float(args.theta)
        good &= args.theta == args.theta  # nan is not
    if not good:
        parser.error("--exit-order takes mv, r and i in some order; --segments mv=1,r=1,i=1, say; "
                     "--theta auto or a number; --l1 and --max-loss 0 or more")
    return args


def load(args):
    """-> the checkpoint of pkd_compressed.py, its path, and which order's exits to use"""
    name = f"{Path(args.data).resolve().name}-s{args.split}-seed{args.seed}"
    runs = [path for path in Path(args.out, "pkd_compressed").glob("*/last.pt")
            if path.parent.name.rpartition("-")[0] == name]
    missing = f"{args.out}/pkd_compressed/{name}-*/last.pt"
    path = Path(args.checkpoint or max(runs, key=os.path.getmtime, default=missing))
    if not path.exists():
        raise common.BadInput(f"{path} is missing; make it with: python pkd_compressed.py --data "
                              f"{args.data} --split {args.split} --seed {args.seed} --out "
                              f"{args.out}")
    saved = common.read_saved(path, "flags", "streams", "exits", "classes", "data")
    flags = saved["flags"]
    known = {"data", "split", "seed", "clips", "holdout", "networks", "size", "segments", "order"}
    if not known | {"copies"} <= flags.keys():
        raise common.BadInput(f"{path} was written by another version, or is no such checkpoint")
    orders, saved["data"] = flags["order"], Path(saved["data"]).name
    args.split, args.seed = flags["split"], flags["seed"]
    flags["copies"] = flags["copies"] and f"{args.out}/cache/{saved['data']}-mpeg4"
    order = args.order or ("progressive" if "progressive" in orders else orders[0])
    if "optimizer" in saved:
        raise common.BadInput(f"{path} is not finished; go on with its command and --resume")
    if order not in orders:
        raise common.BadInput(f"{path} has exits of {', '.join(orders)}, none of --order {order}")
    return saved, path, order


def read_clips(saved, path, args):
    """The data of the checkpoint -> test data, held-out clips. Raises BadInput where it differs."""
    flags, cache = saved["flags"], Path(args.out) / "cache"
    data = common.read_data(flags["data"], flags["split"], args.allow_missing, cache, "toy-pairs")
    if data.digest() != flags["clips"]:
        raise common.BadInput(f"{path} was trained on other clips than {flags['data']} has now")
    data, held = common.hold_out(data, flags["holdout"], flags["seed"])
    if not held:
        raise common.BadInput(f"{path} holds no clips out: pkd_compressed.py --holdout 0.2 does")
    return data, held


def main(argv=None):
    """Fit WISE on held-out clips, choose theta there, test. -> numbers"""
    args, began = parse(argv), time.time()
    saved, path, order = load(args)
    if "toy" in saved["flags"]["networks"]:
        torch.set_num_threads(1)
    cascade = Cascade(saved, order, args.exit_order, args.segments)
    data, held = read_clips(saved, path, args)
    print(f"{path}: exits of order {order}; {len(held)} held-out clips, {len(data.test)} test "
          f"clips, segments {cascade.segments}; {MACHINE}", flush=True)
    z, labels = cascade.logits(held, data.bad)
    z, labels, (costs, whole) = z[:, labels >= 0], labels[labels >= 0], cascade.costs()
    W = fit_wise(z, labels, args.l1)
    theta = choose_theta(z, labels, W, costs, args.max_loss) if args.theta == "auto" else args.theta
    if args.video:
        return classify(cascade, args.video, W, theta)

    z_test, y_test = cascade.logits(data.test, data.bad)
    weights, rows = {**baselines(cascade.exits), "WISE": W}, []
    for j, (stream, k) in enumerate(cascade.exits):
        rows.append({"exit": f"{stream}{k}", "GMAC": costs[j].item()})
        for name, w in weights.items():
            right = weighted_logits(z_test, w[j:j + 1])[0].argmax(-1) == y_test
            rows[-1][name] = right.double().mean().item()
    points = {"WISE": operate(z_test, y_test, W, 2., costs)[0]}
    early, said, left = operate(z_test, y_test, W, theta, costs)
    real, early["ms"] = run_for_real(cascade, data.test, W, theta)
    points["WISE, early exit"], limit = early, operate(z, labels, W, theta, costs)[0]["GMAC"]
    for name in ("alone", "uniform", "fusion"):
        own = theta_of_cost(z, labels, weights[name], costs, limit)
        points[f"{name}, early exit"] = operate(z_test, y_test, weights[name], own, costs)[0]
    results = {"exits": rows, "points": points, "weights": W.tolist(), "theta": theta,
               "last": rows[-1]["alone"], "last_gmac": whole[args.exit_order[-1]],
               "fusion": rows[-1]["fusion"], "fusion_gmac": sum(whole.values()),
               "held": len(labels),
               "sweep": sweep(saved, order, args, held, data.test, data.bad) if args.sweep else [],
               "same": (torch.tensor(real) == said)[y_test >= 0].double().mean().item()}
    report(results, cascade, data, said, left, y_test, saved, args, began)
    return results


def report(results, cascade, data, said, left, labels, saved, args, began):
    """Write record and picture; print the tables and RESULT."""
    flags, points, rows = saved["flags"], results["points"], []
    exits = [f"{stream}{k}" for stream, k in cascade.exits]
    for name, point in points.items():
        shares = zip(exits, point["leave"], strict=True)
        leave = " ".join(f"{at} {share:.0%}" for at, share in shares if share > 0)
        rows.append({"operating point": name, "theta": point["theta"], "top1": point["top1"],
                     "GMAC": point["GMAC"], "clips leave at": leave})
    print(f"{table(results['exits'])}\ntop-1 if every clip stops there: by that exit, the mean so "
          f"far, that of finished networks, WISE; GMAC: up to there\n\n{table(rows)}\nBaselines' "
          f"theta is set on held-out clips to WISE's cost. Early exit, run for real: "
          f"{points['WISE, early exit']['ms']:.1f} ms a clip with decoding, "
          f"{results['same']:.1%} of the classes as here")
    if results["sweep"]:
        print(table(results["sweep"]))
    if points["WISE"]["top1"] < results["fusion"]:
        print(f"NOTE learned weights lose to late fusion: {len(exits)} weights were fitted to "
              f"{results['held']} held-out clips")
    for note in data.notes():
        print(f"NOTE {note}")
    run = run_folder("wise_infer", data, args)
    write_record(run / "run.json", args, data, results, [], began)
    order, lines = left.argsort(stable=True), {}  # from those that left first
    order = order[labels[order] >= 0]
    for n in order[::max(1, len(order) // 7)].tolist():
        text = f"leaves at {exits[left[n]]}: {cascade.classes[said[n]]}"
        lines[n] = text, bool(said[n] == labels[n])
    common.contact_sheet(data.test, lines, 8, run / "run.png")
    scores = [f"{key}={results[key]:.4f}" for key in ("last", "last_gmac", "fusion", "fusion_gmac")]
    for key, name in (("wise", "WISE"), ("early", "WISE, early exit")):
        scores += [f"{key}={points[name]['top1']:.4f}", f"{key}_gmac={points[name]['GMAC']:.4f}"]
    print(f"record, picture: {run}\nRESULT wise_infer data={saved['data']} split={flags['split']} "
          f"seed={flags['seed']} {' '.join(scores)} seconds={time.time() - began:.0f}")


if __name__ == "__main__":
    common.run(main)
