"""The README's table of findings, computed from the RESULT lines in tests/records/*.txt.

  python tests/records.py                   print it, and mean and deviation of every number
  python tests/records.py runs/deit_video   a table of the runs in a folder: what differs, results

A record is a command after a $, the lines of its RESULT below. Runs of a command differ in --seed.
"""
import fnmatch
import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import common

HERE = Path(__file__).parent


class Claim(NamedTuple):
    """What is said, the command that shows it, and three of its numbers: patterns, of which the
    mean over all that fit counts. with_: the technique; without: at equal steps and clips; control:
    what must not gain as much. words: what these are called; why: where it holds or not."""
    said: str
    command: str
    with_: str
    without: str
    control: str
    words: tuple
    why: str


def read(folder=HERE / "records"):
    """-> {command without its seed: {seed: {name: number}}}"""
    runs = {}
    for path in sorted(folder.glob("*.txt")):
        for block in path.read_text().split("$ ")[1:]:
            command, *lines = block.splitlines()
            seed = re.search(r" --seed (\d+)", command)
            command = re.sub(r" --seed \d+", "", re.sub(r"-seed\d+-", "-seed0-", command))
            numbers = re.findall(r"(\S+)=(-?[\d.]+)(?=\s|$)", " ".join(lines))
            numbers = {name: float(x) for name, x in numbers if name not in ("split", "seed")}
            own = runs.setdefault(command, {})
            if int(seed[1]) in own:
                raise ValueError(f"{path}: {command} stands there twice")
            own[int(seed[1])] = numbers
    return runs


def values(runs, pattern):
    """A number of each run, in points where it is an accuracy; of several that fit, the mean"""
    out = []
    for seed in sorted(runs):
        fit = [x for name, x in runs[seed].items() if fnmatch.fnmatchcase(name, pattern)]
        if not fit:
            raise KeyError(f"no number fits {pattern}")
        out.append(100 * statistics.mean(fit))
    return out


def spread(numbers, form="{:.1f}"):
    return f"{form.format(statistics.mean(numbers))} ± {statistics.stdev(numbers):.1f}"


def row(claim, runs):
    """A line of the README's table"""
    own = runs[claim.command]
    a, b, c = (values(own, pattern) for pattern in (claim.with_, claim.without, claim.control))
    gain, other = ([x - y for x, y in zip(part, b, strict=True)] for part in (a, c))
    wins = sum(x > 0 for x in gain)
    with_, without, control = claim.words
    return (f"| {claim.said} | `{claim.command}` | {with_} {spread(a)}, {without} {spread(b)} | "
            f"**{spread(gain, '{:+.1f}')}**, {wins} of {len(gain)} | {control} "
            f"{spread(other, '{:+.1f}')} | {claim.why} |")


def findings(runs):
    head = ("| claim | command, `--seed 0` to `4` | top-1, % | gain, points; seeds that gain | "
            "control's gain | where it holds, and why |")
    return "\n".join([head, "|---|---|---|---|---|---|", *[row(claim, runs) for claim in CLAIMS]])


def all_numbers(runs):
    lines = []
    for command, own in runs.items():
        lines.append(f"\n$ {command}   seeds {' '.join(map(str, sorted(own)))}")
        for name in next(iter(own.values())):
            each = [own[seed].get(name) for seed in sorted(own)]
            mean = f"{statistics.mean(each):.4f}"
            deviation = f"{statistics.stdev(each):.4f}" if len(each) > 1 else ""
            lines.append(f"{name:24} {mean:>10} {deviation:>8}   {' '.join(map(str, each))}")
    return "\n".join(lines)


def compare(folder):
    """Runs of a script -> a table: the flags in which they differ, and every top-1"""
    records = {path.parent.name: json.loads(path.read_text())
               for path in sorted(Path(folder).glob("*/run.json"))}
    if not records:
        sys.exit(f"{folder} holds no */run.json")
    rows, kinds = [], {}
    for record in records.values():
        for key, x in record["flags"].items():
            if key not in ("out", "resume", "targets", "workers"):
                kinds.setdefault(key, set()).add(json.dumps(x))
    differ = [key for key in kinds if len(kinds[key]) > 1]
    for name, record in records.items():
        said = [f"--{key.replace('_', '-')} {record['flags'].get(key)}" for key in differ]
        found = [f"{key}={x:.4f}" for key, x in common.top1(record["results"])]
        rows.append("  ".join([name, *said, *found]))
    return "\n".join(rows)


SPATIAL = "python spatial_kd.py --arms alone spatial shuffled oracle"
DEIT = "python deit_video.py --arms one-head gt soft two-frame-heads teacher-on-frame"
FIVE = ("python deit_video.py --shots 5 --epochs 300 --arms one-head gt soft teacher-on-frame "
        "teacher-on-linear --teacher-checkpoint runs/deit_video/toy-s1-seed0-*/teacher-last.pt")
LONG = ("python deit_video.py --shots 5 --epochs 900 --arms one-head soft teacher-on-frame "
        "--teacher-checkpoint runs/deit_video/toy-s1-seed0-*/teacher-last.pt")
PKD = "python pkd_compressed.py"
FEW = f"{PKD} --shots 8 --epochs 100 --exit-epochs 132"
WISE = "python wise_infer.py"

OWN = "own network as teacher all along"

CLAIMS = [
    Claim("A TinyCLIP backbone is small, at little cost (thesis 1)",
          "python tinyclip_swap.py --recover affinity", "small", "large", "small+affinity",
          ("small", "large", "with affinity loss"),
          "half of parameters and GMAC; the cost is real at equal steps, and affinity mimicking "
          "does not win it back"),
    Claim("Spatial objectives help (thesis 2): small student", SPATIAL, "spatial", "alone",
          "shuffled", ("spatial", "alone", "targets of other clips"),
          "holds: place in each frame is a first step towards motion; wrong targets bring nothing"),
    Claim("the same: large student", "python spatial_kd.py --student toy-large", "spatial",
          "alone", "shuffled", ("spatial", "alone", "targets of other clips"),
          "holds as well"),
    Claim("Two heads help, not the teacher (thesis 3)", DEIT, "gt", "one-head",
          "two-frame-heads", ("gt", "one head", "linear layer for the token"),
          "not seen: 222 steps are too few for the token"),
    Claim("A teacher helps (DeiT): all labels", DEIT, "soft", "one-head", "gt",
          ("soft", "one head", "two heads, no teacher"),
          "no: the student has the labels that its teacher had"),
    Claim("the same: 5 labels a class, through the token", FIVE, "soft", "one-head", "gt",
          ("soft", "one head", "two heads, no teacher"),
          "unclear: the token still learns when a frame head has finished"),
    Claim("the same, trained three times as long", LONG, "soft", "one-head", "teacher-on-frame",
          ("soft", "one head", "the same loss on the frame head"),
          "holds: now the token has learned, and gains as much as the frame head"),
    Claim("the same: 5 labels a class, on the frame head", FIVE, "teacher-on-frame", "one-head",
          "gt", ("teacher on frame", "one head", "two heads, no teacher"),
          "holds: the teacher has seen 200 clips a class"),
    Claim("All three together are accurate (thesis)", "python deit_video.py --grid", "all-three",
          "+swap", "+swap+spatial", ("all three", "swap alone", "swap and spatial"),
          "holds, by the spatial objectives"),
    Claim("PKD beats labels (paper): clean labels", f"{PKD} --order all", "progressive-*", "ce-*",
          "self-*", ("progressive", "labels", OWN),
          "no: exits learn clean labels to the end, and their teachers know less"),
    Claim("the same: 40 % of the labels wrong", f"{PKD} --label-noise .4 --order all",
          "progressive-*", "ce-*", "self-*", ("progressive", "labels", OWN),
          "holds, by the soft teacher: it is right more often than its labels; the progression "
          "adds nothing"),
    Claim("the same: 8 clips a class", f"{FEW} --order all", "progressive-*", "ce-*", "self-*",
          ("progressive", "labels", OWN), "hardly: the teachers overfit"),
    Claim("WISE beats late fusion (paper): 180 clips held out", f"{PKD} && {WISE}", "wise",
          "fusion", "paper", ("WISE", "late fusion", "the paper's prior"),
          "holds: the best stream gets most of the weight"),
    Claim("the same: 12 clips held out", f"{PKD} --holdout .0134 && {WISE}", "wise", "fusion",
          "paper", ("WISE", "late fusion", "the paper's prior"),
          "never below: cross-validation leans on late fusion; the paper's prior overfits"),
    Claim("the same: network of I-frames stopped early", f"{PKD} --degrade i && {WISE}", "wise",
          "fusion", "uniform", ("WISE", "late fusion", "plain mean"),
          "holds: residuals get most of the weight, where I-frames have it otherwise"),
    Claim("the same: both leaving early, at equal cost", f"{PKD} && {WISE}", "early",
          "early_fusion", "last", ("WISE", "late fusion", "I-frames alone"),
          "holds: weights count most before all streams have run"),
    Claim("the same: WISE leaving at the cost of late fusion without exits", f"{PKD} && {WISE}",
          "equal", "fusion", "last", ("WISE", "late fusion", "I-frames alone"),
          "no: heads cost a third of the networks, and the best stream runs last"),
]

if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(compare(sys.argv[1]))
    else:
        print(findings(read()), all_numbers(read()), sep="\n")
