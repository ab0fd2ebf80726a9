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
            numbers = re.findall(r"(\S+)=(-?[\d.]+)(?=\s|$)", " ".join(lines))
            numbers = {name: float(x) for name, x in numbers if name not in ("split", "seed")}
            own = runs.setdefault(command.replace(seed[0], ""), {})
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
    flags = [record["flags"] for record in records.values()]
    if not flags:
        sys.exit(f"{folder} holds no */run.json")
    rows = []
    for name, record in records.items():
        differ = [key for key in record["flags"]
                  if len({json.dumps(own.get(key)) for own in flags}) > 1]
        said = " ".join([f"--{key.replace('_', '-')} {record['flags'][key]}" for key in differ])
        rows.append(f"{name}  {said}  {' '.join(top1(record['results']))}")
    return "\n".join(rows)


def top1(results, name=""):
    """Every accuracy in a record -> words"""
    found = []
    for key, x in results.items() if isinstance(results, dict) else ():
        if isinstance(x, dict):
            found += top1(x, f"{name}{key} ".replace("top1 ", ""))
        elif isinstance(x, float) and (key.startswith("top1") or name.startswith("top1")):
            found.append(f"{name}{key.replace('top1', '')}={x:.4f}")
    return found


CLAIMS = []

if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(compare(sys.argv[1]))
    else:
        print(findings(read()), all_numbers(read()), sep="\n")
